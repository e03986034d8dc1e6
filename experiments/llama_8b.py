"""Llama 3 8B: grouped-query attention, RoPE with base 500,000, SwiGLU, RMSNorm (arXiv:2407.21783).

Claim: 8,030,261,248 parameters; runs on a pod by parameters split over `fsdp` and heads over `tensor`.
Command:
    jaxlm config --config=experiments/llama_8b.py --sharding --devices=64
    jaxlm train --config=experiments/llama_8b.py --workdir=runs/llama_8b
Hardware: 64 accelerators of 80 GB or more (mesh fsdp 32 x tensor 2), 0.5 M tokens a step.
Expected: not run yet. The shape and its cost are checked by `jaxlm config`; no loss is claimed.
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
    model.num_layers = 32
    model.model_dim = 4096
    model.mlp_dim = 14_336
    model.attention.num_heads = 32
    model.attention.num_kv_heads = 8
    model.position.theta = 500_000.0
    model.norm_eps = 1e-5
    model.dtype = "bfloat16"
    model.remat = "full"

    data = config.data
    data.tokenizer = "data/llama3/tokenizer.json"
    data.train = "data/web/shards"
    data.eval = "data/web/eval/*.parquet"
    data.seq_len = 8192
    data.batch_size = 64

    optim = config.optim
    optim.lr = 3e-4
    optim.warmup_unit = "steps"
    optim.warmup = 2000.0

    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 2

    train = config.train
    train.num_steps = 200_000
    train.eval_every = 2000
    train.save_every = 1000

    if size == "smoke":
        stdlib = os.path.dirname(os.__file__)
        data.tokenizer, data.train, data.eval = "byte", f"{stdlib}/asyncio/*.py", f"{stdlib}/json/*.py"
        data.seq_len, data.batch_size = 64, 8
        model.vocab_size, model.num_layers, model.model_dim, model.mlp_dim = 256, 2, 64, 128
        model.attention.num_heads, model.attention.num_kv_heads = 4, 2
        model.dtype = "float32"
        optim.lr, optim.warmup = 3e-3, 4.0
        config.mesh.tensor = 1
        train.num_steps, train.log_every = 20, 5
        train.eval_every = train.save_every = 10
    return config
