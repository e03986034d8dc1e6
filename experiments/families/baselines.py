"""The models before the transformer, and a transformer beside them, at equal training compute.

Claim: at the same number of training FLOPs on Shakespeare, in bits per byte of three plays that none has
seen, a small transformer beats a small LSTM; beside both the Kneser-Ney 5-gram, which needs next to none.
Command:
    tools/quickstart                                   # corpus and tokenizer; or `python tools/corpus.py`
    python tools/compare_baselines.py --out=runs/baselines
or one of them:
    jaxlm train --config=experiments/families/baselines.py:lstm:4e12 --workdir=runs/lstm
Hardware: one CPU core.
Expected: at 1e12 FLOPs 3.035 bits per byte (LSTM), 2.794 (transformer); the 5-gram has 2.133.
Last run: 2026-11-22; see README.md beside this file.

`NAME` is lstm or transformer, `NAME:FLOPS` trains for that many FLOPs (default 4e12; the number of steps
follows from the sizes that stand here), `NAME:smoke` for a few steps on Python's own source code, as bytes.
"""

import os

from ml_collections import ConfigDict

from jaxlm.config import build, default_config
from jaxlm.errors import UserError, check, check_choice
from jaxlm.model.recurrence import LSTMConfig
from jaxlm.scaling.counting import count

NAMES = ("lstm", "transformer")
BUDGET = "4e12"


def get_config(arg: str = "lstm") -> ConfigDict:
    name, _, size = arg.partition(":")
    check_choice(name, NAMES, "--config: model after the colon")
    config = default_config()
    if name == "lstm":
        config.model = default_config(LSTMConfig)
        config.model.num_layers = 2
        config.optim.lr = 1e-2
    else:
        config.model.num_layers, config.model.mlp_dim, config.model.scan = 2, 352, False
        config.optim.lr = 1e-2
    model = config.model
    model.vocab_size, model.model_dim, model.tie_embeddings, model.init_std = 2048, 128, True, 0.0

    data = config.data
    data.tokenizer = "data/quickstart/tokenizer.model"
    data.train, data.eval = "data/quickstart/tokens/train", "data/quickstart/tokens/heldout"
    data.seq_len, data.batch_size = 128, 16

    optim = config.optim
    optim.schedule, optim.final, optim.warmup = "linear", 0.0, 0.05
    train = config.train
    train.sample_prompts = ()

    if size == "smoke":
        stdlib = os.path.dirname(os.__file__)
        data.tokenizer, data.train, data.eval = "byte", f"{stdlib}/asyncio/*.py", f"{stdlib}/json/*.py"
        data.seq_len, data.batch_size, data.eval_tokens = 32, 16, 8192
        model.vocab_size, model.model_dim = 256, 32
        train.num_steps, train.log_every = 20, 5
        return config
    try:
        budget = float(size or BUDGET)
    except ValueError:
        raise UserError(
            f"--config: {size!r} after the model is neither a number of FLOPs nor 'smoke'"
        ) from None
    per_step = count(build(config).model, data.seq_len).flops_train * data.seq_len * data.batch_size
    check(budget >= 20 * per_step, f"--config: {budget:g} FLOPs are fewer than 20 steps of {per_step:.3g}")
    train.num_steps = round(budget / per_step)
    return config
