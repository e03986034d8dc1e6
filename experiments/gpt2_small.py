"""GPT-2 small on web text: the shape of Radford et al. 2019, trained as GPT-3's smallest model was.

Claim: with tied embeddings, learned positions, LayerNorm, biases and tanh-GELU it has GPT-2's 124,439,808
parameters.
Command:
    jaxlm prepare --input='data/web/*.parquet' --tokenizer=data/gpt2/tokenizer.json --out=data/web/shards
    jaxlm train --config=experiments/gpt2_small.py --workdir=runs/gpt2_small
Hardware: 8 accelerators of 40 GB or more; 0.5 M tokens a step in 4 microbatches.
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
    model.vocab_size = 50257
    model.num_layers = 12
    model.model_dim = 768
    model.attention.num_heads = 12
    model.attention.qkv_bias = True
    model.attention.out_bias = True
    model.activation = "gelu_tanh"
    model.mlp_bias = True
    model.norm = "layernorm"
    model.norm_eps = 1e-5
    model.position.kind = "learned"
    model.position.max_length = 1024
    model.tie_embeddings = True
    model.dtype = "bfloat16"
    model.remat = "minimal"

    data = config.data
    data.tokenizer = "data/gpt2/tokenizer.json"
    data.train = "data/web/shards"
    data.eval = "data/web/eval/*.parquet"
    data.seq_len = 1024
    data.batch_size = 480

    optim = config.optim
    optim.lr = 6e-4
    optim.warmup_unit = "steps"
    optim.warmup = 715.0

    train = config.train
    train.num_steps = 20_000
    train.microbatches = 4
    train.eval_every = 1000
    train.sample_every = 5000
    train.save_every = 1000

    if size == "smoke":
        stdlib = os.path.dirname(os.__file__)
        data.tokenizer, data.train, data.eval = "byte", f"{stdlib}/asyncio/*.py", f"{stdlib}/json/*.py"
        data.seq_len, data.batch_size = 64, 16
        model.vocab_size, model.num_layers, model.model_dim, model.attention.num_heads = 256, 2, 64, 4
        model.position.max_length = 128
        model.dtype = "float32"
        optim.lr, optim.warmup = 3e-3, 4.0
        config.sample.max_new_tokens = 32
        train.num_steps, train.microbatches, train.log_every = 20, 2, 5
        train.eval_every = train.sample_every = train.save_every = 10
    return config
