"""Families with an encoder and a decoder at their published shapes, each to be trained from scratch.

Claim: one config makes each of them; its parameters are the published ones (fixed sinusoids are none here).
Command:
    jaxlm prepare --input='data/web/*.parquet' --tokenizer=data/tokenizer.json --out=data/web/shards
    jaxlm train --config=experiments/families/pairs.py:t5_small --workdir=runs/t5
    jaxlm train --config=experiments/families/pairs.py:bart_base:smoke --workdir=runs/bart_smoke
Hardware: as `jaxlm config --config=... --devices=N` says for the shape; smoke sizes train on one CPU core.
Expected: not run yet; the smoke sizes are run by the tests, no loss of a published size is claimed.
Last run: none.

`NAME` is a published shape and `NAME:smoke` the same variations at toy size, byte tokens: on Python's own
source code, or on dates for those that translate. Shapes are written as the checkpoints' own config.json,
which `jaxlm.hf` reads. T5 learns from corrupted spans, BART from its noise, the others from pairs of texts.
"""

import dataclasses
import os
import pathlib
from typing import Any

from ml_collections import ConfigDict

from jaxlm.config import config_dict_of, default_config
from jaxlm.errors import check_choice
from jaxlm.hf.families import FAMILIES
from jaxlm.hf.family import read_config
from jaxlm.model.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Shape:
    """A published model."""

    fields: dict[str, Any]  # of config.json
    parameters: int  # as published
    source: str
    rounded: float = 0.0  # share of `parameters` that the source rounds away; 0 = counted

    @property
    def seq_len(self) -> int:
        """Targets of a row: what 15% of 512 inputs become, or as many as inputs."""
        return 114 if self.fields["model_type"] in ("t5", "mt5") else 512

    def config(self) -> TransformerConfig:
        """Ours of theirs."""
        return read_config(FAMILIES[self.fields["model_type"]], self.fields)


def t5(layers: int, dim: int, mlp: int, heads: int, vocab: int = 32128, **more: Any) -> dict[str, Any]:
    """config.json in the manner of T5."""
    sizes = dict(num_layers=layers, d_model=dim, d_ff=mlp, num_heads=heads, vocab_size=vocab, d_kv=64)
    return {"model_type": "t5", **sizes, **more}


def bart(layers: int, dim: int, heads: int, vocab: int, model_type: str, **more: Any) -> dict[str, Any]:
    """config.json in the manner of BART."""
    sides = {f"{side}_layers": layers for side in ("encoder", "decoder")}
    sides |= {f"{side}_attention_heads": heads for side in ("encoder", "decoder")}
    sides |= {f"{side}_ffn_dim": 4 * dim for side in ("encoder", "decoder")}
    return {"model_type": model_type, "d_model": dim, "vocab_size": vocab, **sides, **more}


MARIAN = dict(activation_function="swish", scale_embedding=True, architectures=["MarianModel"])
GATED = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
SHAPES: dict[str, Shape] = {
    "transformer_base": Shape(
        bart(6, 512, 8, 37000, "marian", **(MARIAN | dict(activation_function="relu"))),
        65_000_000,
        "Vaswani et al. 2017, arXiv:1706.03762, table 3; a vocabulary of 'about 37000'",
        0.03,
    ),
    "t5_small": Shape(t5(6, 512, 2048, 8), 60_506_624, "Hugging Face t5-small"),
    "t5_base": Shape(t5(12, 768, 3072, 12), 222_903_552, "Hugging Face t5-base"),
    "t5_v1_1_small": Shape(t5(8, 512, 1024, 6, **GATED), 76_961_152, "Hugging Face google/t5-v1_1-small"),
    "mt5_small": Shape(
        t5(8, 512, 1024, 6, 250112, model_type="mt5", **GATED), 300_176_768, "Hugging Face google/mt5-small"
    ),
    "bart_base": Shape(
        bart(6, 768, 12, 50265, "bart", architectures=["BartModel"]),
        139_420_416,
        "Hugging Face facebook/bart-base",
    ),
    "bart_large": Shape(
        bart(12, 1024, 16, 50265, "bart", architectures=["BartModel"]),
        406_291_456,
        "Hugging Face facebook/bart-large",
    ),
    "opus_en_de": Shape(
        bart(6, 512, 8, 58101, "marian", **MARIAN),
        74_410_496 - 2 * 512 * 512,
        "Hugging Face Helsinki-NLP/opus-mt-en-de, without its two tables of sinusoids",
    ),
    "m2m_100_418m": Shape(
        bart(12, 1024, 16, 128112, "m2m_100"), 483_905_536, "Hugging Face facebook/m2m100_418M"
    ),
}


def smoke(cfg: TransformerConfig) -> TransformerConfig:
    """The same variations at toy size: two layers on either side, bytes and ids for sentinels."""
    attention = dataclasses.replace(cfg.attention, num_heads=4, num_kv_heads=4, head_dim=16)
    position = dataclasses.replace(cfg.position, max_length=min(cfg.position.max_length, 64))
    encoder = dataclasses.replace(cfg.encoder, num_layers=2, num_heads=4, mlp_dim=128)
    sizes = dict(vocab_size=384, num_layers=2, model_dim=64, mlp_dim=128)
    return dataclasses.replace(cfg, **sizes, attention=attention, position=position, encoder=encoder)


def get_config(arg: str = "t5_small") -> ConfigDict:
    name, _, size = arg.partition(":")
    check_choice(name, SHAPES, "--config: shape after the colon")
    check_choice(size, ("", "smoke"), "--config: size after the shape")
    shape, config = SHAPES[name], default_config()
    model, kind = shape.config(), shape.fields["model_type"]

    data = config.data
    data.tokenizer = "data/tokenizer.json"
    data.train, data.eval = "data/web/shards", "data/web/eval/*.parquet"
    data.seq_len, data.input_len, data.batch_size = shape.seq_len, 512, 128
    if kind in ("t5", "mt5"):
        data.format, data.decoder_start = "span_corruption", "pad"
    elif kind == "bart":
        data.format, data.packing, data.decoder_start, data.with_bos = "denoise", "pad", "eos", True
        data.noise.rate, data.noise.permute = 0.3, True
    else:
        # Marian's decoder starts with padding, M2M-100's with the end of a sentence.
        data.format, data.packing = "seq2seq", "pad"
        data.decoder_start = "pad" if kind == "marian" else "eos"
        data.train, data.eval = "data/pairs/train.jsonl", "data/pairs/heldout.jsonl"
        data.text_key, data.target_key = "source", "target"
    config.optim.lr, config.optim.schedule = 1e-3, "inverse_sqrt"
    config.optim.warmup_unit, config.optim.warmup = "steps", 10_000.0
    config.mesh.data, config.mesh.fsdp = 1, -1
    train = config.train
    train.num_steps, train.sample_prompts = 500_000, ()
    train.eval_every = train.save_every = 5000
    model = dataclasses.replace(model, dtype="bfloat16", dropout=0.1)

    if size == "smoke":
        stdlib = os.path.dirname(os.__file__)
        dates = pathlib.Path(__file__).parents[1] / "objectives" / "dates.tsv"
        data.tokenizer, data.batch_size = "byte", 16
        data.with_bos = False  # bytes have one token for beginning and end
        data.seq_len, data.input_len = (12, 32) if data.format == "seq2seq" else (shape.seq_len // 8, 64)
        if data.format == "seq2seq":
            data.train = data.eval = str(dates)
            data.text_key, data.target_key = "0", "1"
        else:
            data.train, data.eval = f"{stdlib}/asyncio/*.py", f"{stdlib}/json/*.py"
            data.eval_tokens = 4096
        model = dataclasses.replace(smoke(model), dtype="float32", dropout=0.0)
        # Logits that are scaled down move little in a few steps.
        config.optim.lr, config.optim.warmup = 3e-3 if model.logit_scale >= 1 else 3e-2, 4.0
        config.mesh.data, config.mesh.fsdp = -1, 1
        train.num_steps, train.log_every, train.eval_every, train.save_every = 20, 5, 0, 0
    config.model = config_dict_of(model)
    return config
