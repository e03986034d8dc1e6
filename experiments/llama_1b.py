"""Llama 3.2 1B: the small sibling of `llama_8b.py`, with tied embeddings and scaled RoPE (arXiv:2407.21783).

Claim: 1,235,814,400 parameters; fits one host of 8 accelerators with parameters split over `fsdp`.
Command: jaxlm train --config=experiments/llama_1b.py --workdir=runs/llama_1b
Hardware: 8 accelerators of 40 GB or more, 0.5 M tokens a step in 8 microbatches.
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
    model.vocab_size = 128_256
    model.num_layers = 16
    model.model_dim = 2048
    model.mlp_dim = 8192
    model.attention.num_heads = 32
    model.attention.num_kv_heads = 8
    model.position.theta = 500_000.0
    model.position.scaling = "llama3"
    model.position.factor = 32.0
    model.position.original_length = 8192
    model.norm_eps = 1e-5
    model.tie_embeddings = True
    model.dtype = "bfloat16"
    model.remat = "full"

    data = config.data
    data.tokenizer = "data/llama3/tokenizer.json"
    data.train = "data/web/shards"
    data.eval = "data/web/eval/*.parquet"
    data.seq_len = 8192
    data.batch_size = 64

    optim = config.optim
    optim.lr = 5e-4
    optim.schedule = "wsd"
    optim.warmup_unit = "steps"
    optim.warmup = 2000.0

    config.mesh.data = 1
    config.mesh.fsdp = -1

    train = config.train
    train.num_steps = 50_000
    train.microbatches = 8
    train.eval_every = 2000
    train.save_every = 1000

    if size == "smoke":
        stdlib = os.path.dirname(os.__file__)
        data.tokenizer, data.train, data.eval = "byte", f"{stdlib}/asyncio/*.py", f"{stdlib}/json/*.py"
        data.seq_len, data.batch_size = 64, 16
        model.vocab_size, model.num_layers, model.model_dim, model.mlp_dim = 256, 2, 64, 128
        model.attention.num_heads, model.attention.num_kv_heads = 4, 2
        model.dtype = "float32"
        optim.lr, optim.warmup = 3e-3, 4.0
        train.num_steps, train.microbatches, train.log_every = 20, 2, 5
        train.eval_every = train.save_every = 10
    return config
