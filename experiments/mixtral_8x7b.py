"""Mixtral 8x7B: every MLP is 8 experts of which a token takes 2 (arXiv:2401.04088).

Claim: 46,702,792,704 parameters, 12.9 G of them active; experts split over the `expert` axis.
Command:
    jaxlm config --config=experiments/mixtral_8x7b.py --sharding --devices=128
    jaxlm train --config=experiments/mixtral_8x7b.py --workdir=runs/mixtral
Hardware: 128 accelerators of 80 GB or more (mesh expert 8 x fsdp 16), 1 M tokens a step.
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
    model.vocab_size = 32_000
    model.num_layers = 32
    model.model_dim = 4096
    model.mlp_dim = 14_336
    model.mlp_pattern = ("moe",)
    model.attention.num_heads = 32
    model.attention.num_kv_heads = 8
    model.position.theta = 1_000_000.0
    model.moe.num_experts = 8
    model.moe.top_k = 2
    model.moe.dispatch = "capacity"
    model.norm_eps = 1e-5
    model.dtype = "bfloat16"
    model.remat = "full"

    data = config.data
    data.tokenizer = "data/mixtral/tokenizer.model"
    data.train = "data/web/shards"
    data.eval = "data/web/eval/*.parquet"
    data.seq_len = 8192
    data.batch_size = 128

    optim = config.optim
    optim.lr = 2e-4
    optim.warmup_unit = "steps"
    optim.warmup = 2000.0

    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 8

    train = config.train
    train.num_steps = 200_000
    train.eval_every = 2000
    train.save_every = 1000

    if size == "smoke":
        stdlib = os.path.dirname(os.__file__)
        data.tokenizer, data.train, data.eval = "byte", f"{stdlib}/asyncio/*.py", f"{stdlib}/json/*.py"
        data.seq_len, data.batch_size = 64, 8
        model.vocab_size, model.num_layers, model.model_dim, model.mlp_dim = 256, 2, 64, 128
        model.attention.num_heads, model.attention.num_kv_heads, model.moe.num_experts = 4, 2, 4
        model.dtype = "float32"
        optim.lr, optim.warmup = 3e-3, 4.0
        config.mesh.expert = 1
        train.num_steps, train.log_every = 20, 5
        train.eval_every = train.save_every = 10
    return config
