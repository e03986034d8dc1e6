"""Shakespeare in a few minutes on two CPU cores: the experiment that `tools/quickstart` trains.

Claim: a small Llama-style transformer on 5 MB of text beats a Kneser-Ney 5-gram on three plays that it has
not seen.
Command:
    tools/quickstart
or, once it has made text, tokenizer and token shards:
    jaxlm train --config=experiments/quickstart.py --workdir=runs/quickstart
Hardware: two CPU cores, 4 GB.
Expected: eval/bpb 2.11 bits per byte (eval/nll 3.83 nats per token); the 5-gram has 2.13.
Last run: 2026-11-22, commit 4099b29.

`:smoke` trains a smaller one for a few steps on Python's own source code, byte tokens.
"""

import os

from ml_collections import ConfigDict

from jaxlm.config import default_config
from jaxlm.errors import check_choice


def get_config(size: str = "full") -> ConfigDict:
    check_choice(size, ("full", "smoke"), "--config: size after the colon")
    config = default_config()

    model = config.model
    model.vocab_size = 2048
    model.num_layers = 4
    model.model_dim = 128
    model.mlp_dim = 352
    model.attention.num_heads = 4
    model.tie_embeddings = True
    model.scan = False  # four layers compile quickly, and unrolled is faster on a CPU
    model.dtype = "bfloat16"  # operands of products; sums, parameters and optimizer stay fp32

    data = config.data
    data.tokenizer = "data/quickstart/tokenizer.model"
    data.train = "data/quickstart/tokens/train"
    data.eval = "data/quickstart/tokens/heldout"
    data.seq_len = 256
    data.batch_size = 16

    # Little more than an epoch: what counts is progress per token, and Muon makes the most.
    config.optim.name = "muon"
    config.optim.lr = 1e-2
    config.optim.schedule, config.optim.final = "linear", 0.0
    config.optim.warmup = 0.05

    config.sample.temperature = 0.8
    train = config.train
    train.num_steps = 450
    train.eval_every = train.sample_every = train.save_every = 225
    train.sample_prompts = ("FALSTAFF.", "To be, or")

    if size == "smoke":
        stdlib = os.path.dirname(os.__file__)
        data.tokenizer, data.train, data.eval = "byte", f"{stdlib}/asyncio/*.py", f"{stdlib}/json/*.py"
        data.seq_len, data.batch_size = 64, 8
        model.vocab_size, model.num_layers, model.model_dim, model.mlp_dim = 256, 2, 64, 128
        model.attention.num_heads = 4
        model.dtype = "float32"
        train.num_steps, train.log_every = 20, 5
        train.eval_every = train.sample_every = train.save_every = 10
        train.sample_prompts = ("def ",)
    return config
