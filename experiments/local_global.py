"""Gemma 2 2B: sliding-window and global layers in turn, soft-capped scores and logits (arXiv:2408.00118).

Claim: 2,614,341,888 parameters; a mixed stack is scanned by its period of two layers, and local layers keep a
cache of `window` positions only.
Command: jaxlm train --config=experiments/local_global.py --workdir=runs/local_global
Hardware: 16 accelerators of 40 GB or more, 0.5 M tokens a step in 2 microbatches.
Expected: not run yet; no loss is claimed.
Last run: none.

`:smoke` keeps the architecture at toy size on Python's own source code, byte tokens, for a CPU.
"""

import os

from ml_collections import ConfigDict

from jaxlm.config import default_config
from jaxlm.errors import check_choice


def get_config(size: str = "full") -> ConfigDict:
    check_choice(size, ("full", "smoke"), "--config: size after the colon")
    config = default_config()

    model = config.model
    model.vocab_size = 256_000
    model.num_layers = 26
    model.model_dim = 2304
    model.mlp_dim = 9216
    model.activation = "geglu"
    model.norm_position = "sandwich"
    model.attention.num_heads = 8
    model.attention.num_kv_heads = 4
    model.attention.head_dim = 256
    model.attention.pattern = ("local", "global")
    model.attention.window = 4096
    model.attention.softcap = 50.0
    model.logit_softcap = 30.0
    model.tie_embeddings = True
    model.scale_embeddings = True
    model.dtype = "bfloat16"
    model.remat = "full"

    data = config.data
    data.tokenizer = "data/gemma/tokenizer.model"
    data.train = "data/web/shards"
    data.eval = "data/web/eval/*.parquet"
    data.seq_len = 8192
    data.batch_size = 64

    optim = config.optim
    optim.lr = 4e-4
    optim.warmup_unit = "steps"
    optim.warmup = 2000.0

    config.mesh.data = 1
    config.mesh.fsdp = -1

    train = config.train
    train.num_steps = 100_000
    train.microbatches = 2
    train.eval_every = 2000
    train.save_every = 1000

    if size == "smoke":
        stdlib = os.path.dirname(os.__file__)
        data.tokenizer, data.train, data.eval = "byte", f"{stdlib}/asyncio/*.py", f"{stdlib}/json/*.py"
        data.seq_len, data.batch_size = 64, 16
        model.vocab_size, model.num_layers, model.model_dim, model.mlp_dim = 256, 4, 64, 128
        model.attention.num_heads, model.attention.num_kv_heads, model.attention.head_dim = 4, 2, 16
        model.attention.window = 16
        model.dtype = "float32"
        optim.lr, optim.warmup = 3e-3, 4.0
        train.num_steps, train.log_every = 20, 5
        train.eval_every = train.save_every = 10
    return config
