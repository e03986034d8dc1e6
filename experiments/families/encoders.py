"""Encoder-only families at their published shapes, each to be trained from scratch on masked tokens.

Claim: one config makes each of them; its parameters are the published ones, to the digit.
Command:
    jaxlm prepare --input='data/web/*.parquet' --tokenizer=data/tokenizer.json --out=data/web/shards
    jaxlm train --config=experiments/families/encoders.py:roberta_base --workdir=runs/roberta
    jaxlm train --config=experiments/families/encoders.py:bert_base:smoke --workdir=runs/bert_smoke
Hardware: as `jaxlm config --config=... --devices=N` says for the shape; smoke sizes train on one CPU core.
Expected: not run yet; the smoke sizes are run by the tests, no loss of a published size is claimed.
Last run: none.

`NAME` is a published shape and `NAME:smoke` the same variations at toy size on Python's own source code, byte
tokens. Shapes are written as the checkpoints' own config.json, which `jaxlm.hf` reads. Those with a head for
pairs of sentences are trained as BERT and ALBERT were (tokens masked the same way in ten copies, and whether
the second sentence is the next one, or in which order they come), the others as RoBERTa was (masked anew in
each epoch). ELECTRA and DeBERTa-v3, which were trained to tell replaced tokens, are these shapes under a head
for masked tokens: replacing needs a second model, which is not here.
"""

import dataclasses
import os
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
    steps: int = 1_000_000
    rows: int = 256  # of 512 tokens a step
    lr: float = 1e-4
    rounded: float = 0.0  # share of `parameters` that the source rounds away; 0 = counted
    seq_len: int = 512

    def config(self) -> TransformerConfig:
        """Ours of theirs."""
        return read_config(FAMILIES[self.fields["model_type"]], self.fields)


def encoder(
    model_type: str, layers: int, dim: int, heads: int, vocab: int, top: str, **more: Any
) -> dict[str, Any]:
    """config.json in the manner of BERT."""
    sizes = dict(num_hidden_layers=layers, hidden_size=dim, num_attention_heads=heads, vocab_size=vocab)
    sizes |= dict(intermediate_size=4 * dim, architectures=[top])
    return {"model_type": model_type, **sizes, **more}


ROBERTA = dict(max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1)
DEBERTA_V3 = dict(
    relative_attention=True,
    position_buckets=256,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    pos_att_type="p2c|c2p",
    position_biased_input=False,
)
SHAPES: dict[str, Shape] = {
    "bert_base": Shape(
        encoder("bert", 12, 768, 12, 30522, "BertForPreTraining"),
        110_106_428,
        "Hugging Face bert-base-uncased",
    ),
    "bert_large": Shape(
        encoder("bert", 24, 1024, 16, 30522, "BertForPreTraining"),
        336_226_108,
        "Hugging Face bert-large-uncased",
    ),
    "roberta_base": Shape(
        encoder("roberta", 12, 768, 12, 50265, "RobertaForMaskedLM", **ROBERTA),
        124_697_433,
        "Hugging Face roberta-base",
        steps=500_000,
        rows=8192,
        lr=6e-4,
    ),
    "roberta_large": Shape(
        encoder("roberta", 24, 1024, 16, 50265, "RobertaForMaskedLM", **ROBERTA),
        355_412_057,
        "Hugging Face roberta-large",
        steps=500_000,
        rows=8192,
        lr=4e-4,
    ),
    "xlm_roberta_base": Shape(
        encoder("xlm-roberta", 12, 768, 12, 250002, "XLMRobertaForMaskedLM", **ROBERTA),
        278_295_186,
        "Hugging Face xlm-roberta-base",
        steps=1_500_000,
        rows=8192,
        lr=6e-4,
    ),
    "distilbert_base": Shape(
        dict(
            model_type="distilbert",
            n_layers=6,
            dim=768,
            n_heads=12,
            hidden_dim=3072,
            vocab_size=30522,
            architectures=["DistilBertForMaskedLM"],
        ),
        66_985_530,
        "Hugging Face distilbert-base-uncased",
    ),
    "albert_base_v2": Shape(
        encoder("albert", 12, 768, 12, 30000, "AlbertForPreTraining", embedding_size=128),
        11_813_810,
        "Hugging Face albert-base-v2",
        steps=125_000,
        rows=4096,
        lr=1.76e-3,
    ),
    "electra_small": Shape(
        encoder("electra", 12, 256, 4, 30522, "ElectraForMaskedLM", embedding_size=128),
        13_546_682,
        "Hugging Face google/electra-small-discriminator, whose trunk has 13,483,008, and a head",
        rows=128,
        lr=5e-4,
        seq_len=128,
    ),
    "electra_base": Shape(
        encoder("electra", 12, 768, 12, 30522, "ElectraForMaskedLM", embedding_size=768),
        109_514_298,
        "Hugging Face google/electra-base-discriminator, whose trunk has 108,891,648, and a head",
        steps=766_000,
        lr=2e-4,
    ),
    "deberta_v3_base": Shape(
        encoder("deberta-v2", 12, 768, 12, 128100, "DebertaV2ForMaskedLM", **DEBERTA_V3),
        184_551_780,
        "Hugging Face microsoft/deberta-v3-base, whose trunk has 183,831,552, and a head",
        steps=500_000,
        rows=8192,
        lr=6e-4,
    ),
}


def smoke(cfg: TransformerConfig) -> TransformerConfig:
    """The same variations at toy size: two layers, bytes."""
    attention = dataclasses.replace(cfg.attention, num_heads=4, num_kv_heads=4, head_dim=16)
    position = dataclasses.replace(cfg.position, max_length=min(cfg.position.max_length, 64))
    near = dataclasses.replace(
        cfg.disentangled, span=min(cfg.disentangled.span, 32), buckets=min(cfg.disentangled.buckets, 8)
    )
    sizes = dict(vocab_size=260, num_layers=2, model_dim=64, mlp_dim=128)
    sizes |= dict(embed_dim=min(cfg.embed_dim, 32), shared_layers=min(cfg.shared_layers, 2))
    return dataclasses.replace(cfg, **sizes, attention=attention, position=position, disentangled=near)


def get_config(arg: str = "bert_base") -> ConfigDict:
    name, _, size = arg.partition(":")
    check_choice(name, SHAPES, "--config: shape after the colon")
    check_choice(size, ("", "smoke"), "--config: size after the shape")
    shape, config = SHAPES[name], default_config()
    model = shape.config()

    data = config.data
    data.tokenizer = "data/tokenizer.json"
    data.train, data.eval = "data/web/shards", "data/web/eval/*.parquet"
    data.seq_len, data.batch_size = shape.seq_len, shape.rows
    data.format = "mlm"
    if model.readout.classes:  # pairs of sentences
        data.format, data.packing = "sop" if shape.fields["model_type"] == "albert" else "nsp", "pad"
        data.noise.variants, data.noise.max_predictions = 10, 77
    config.optim.lr, config.optim.schedule, config.optim.final = shape.lr, "linear", 0.0
    config.optim.warmup, config.optim.b2, config.optim.weight_decay = 0.02, 0.98, 0.01
    config.mesh.data, config.mesh.fsdp = 1, -1
    train = config.train
    train.num_steps, train.sample_prompts = shape.steps, ()
    train.eval_every = train.save_every = 5000
    model = dataclasses.replace(model, dtype="bfloat16", dropout=0.1)

    if size == "smoke":
        stdlib = os.path.dirname(os.__file__)
        data.tokenizer, data.train, data.eval = "byte", f"{stdlib}/asyncio/*.py", f"{stdlib}/json/*.py"
        data.seq_len, data.batch_size, data.eval_tokens = 32, 16, 32768  # several documents
        model = dataclasses.replace(smoke(model), dtype="float32", dropout=0.0)
        config.optim.lr, config.optim.warmup = 3e-3, 0.1
        config.mesh.data, config.mesh.fsdp = -1, 1
        train.num_steps, train.log_every, train.eval_every, train.save_every = 20, 5, 0, 0
    config.model = config_dict_of(model)
    return config
