"""An encoder-decoder that reads dates as people write them and says them as ISO 8601: the answer is exact.

Claim: an encoder-decoder with two layers of each learns to write every date of days that it has not seen;
what counts is exact match, the share of whole answers that greedy decoding gets right.
Command:
    python tools/dates.py --out data/dates
    jaxlm train --config=experiments/objectives/dates.py --workdir=runs/dates
    jaxlm evaluate --workdir=runs/dates
Hardware: two CPU cores; four minutes when others use them too.
Expected: exact match 1.0000 on 2,000 held-out dates, none of whose days is in the training set (0.883 after
200 steps, 0.960 after 400, 0.993 after 600); 250,624 parameters, 64,000 dates seen.
Last run: 2026-11-22, commit 8b0df5d.

`:smoke` sees the dates of dates.tsv beside this file, for a few steps.
"""

import pathlib

from ml_collections import ConfigDict

from jaxlm.config import default_config
from jaxlm.errors import check_choice


def get_config(size: str = "full") -> ConfigDict:
    check_choice(size, ("full", "smoke"), "--config: size after the colon")
    config = default_config()

    model = config.model
    model.num_layers, model.encoder.num_layers = 2, 2
    model.model_dim, model.mlp_dim, model.attention.num_heads = 64, 176, 4
    model.tie_embeddings = True
    model.scan = False

    data = config.data
    data.format, data.packing = "seq2seq", "pad"
    data.text_key, data.target_key = "date", "iso"
    data.train, data.eval = "data/dates/train.jsonl", "data/dates/heldout.jsonl"
    data.input_len, data.seq_len, data.batch_size = 32, 12, 64

    optim, train = config.optim, config.train
    optim.name, optim.lr = "muon", 1e-2
    optim.schedule, optim.final, optim.warmup = "linear", 0.0, 0.05
    train.sample_prompts = ()
    train.num_steps, train.eval_every, train.save_every = 1000, 200, 200

    if size == "smoke":
        model.num_layers, model.encoder.num_layers, model.model_dim, model.mlp_dim = 1, 1, 32, 64
        data.train = data.eval = str(pathlib.Path(__file__).with_name("dates.tsv"))
        data.text_key, data.target_key, data.batch_size = "0", "1", 8
        train.num_steps, train.log_every, train.eval_every, train.save_every = 20, 5, 10, 10
    return config
