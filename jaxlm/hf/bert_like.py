"""Encoders in the manner of BERT: norms after the branches, learned positions, token types, and their heads.

The class that a file names decides what stands on top, see `jaxlm.hf.tops`.
"""

from collections.abc import Mapping
from typing import Any

from jaxlm.hf.family import Family, Fields, HFConfig
from jaxlm.hf.fields import PLAIN, activation, activation_name, refuse
from jaxlm.hf.gpt_like import biases, layer
from jaxlm.hf.packing import Packing, same
from jaxlm.hf.tops import (
    classes,
    encoder_tops,
    pooled,
    pooler,
    rows,
    vocabulary,
    vocabulary_bias,
    with_vocabulary,
)
from jaxlm.model.config import TransformerConfig

KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "model_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "attention.num_heads",
    "intermediate_size": "mlp_dim",
    "layer_norm_eps": "norm_eps",
    "type_vocab_size": "token_types",
}
DEFAULTS = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}
PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp_norm": "output.LayerNorm",
}
ENCODER: Fields = {
    **biases(True),
    "norm": "layernorm",
    "norm_position": "post",
    "embed_norm": True,
    "causal": False,
    "tie_embeddings": True,
    "position.kind": "learned",
}


def embedded(prefix: str) -> dict[str, Packing]:
    return {
        f"{prefix}embeddings.word_embeddings.weight": same("embed/table"),
        f"{prefix}embeddings.position_embeddings.weight": same("embed/positions"),
        f"{prefix}embeddings.token_type_embeddings.weight": same("embed/types"),
        f"{prefix}embeddings.LayerNorm.weight": same("embed_norm/scale"),
        f"{prefix}embeddings.LayerNorm.bias": same("embed_norm/bias"),
    }


def plain(hf: HFConfig, offset: int) -> Fields:
    refuse(hf, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    return {
        **ENCODER,
        **activation(hf, "hidden_act", PLAIN),
        "position.max_length": hf["max_position_embeddings"] - offset,
        "position.offset": offset,
    }


def plain_keys(cfg: TransformerConfig) -> dict[str, Any]:
    length = cfg.position.offset + cfg.position.max_length
    return {"max_position_embeddings": length, "hidden_act": activation_name(cfg, PLAIN), **top_keys(cfg)}


def settled(hf: HFConfig, shapes: Mapping[str, Any]) -> HFConfig:
    """A bare model's files may have no pooler, and their config.json does not say so."""
    named = (hf.get("architectures") or [""])[0]
    lacks = named.endswith("Model") and not any("pooler" in name for name in shapes)
    return {**hf, "add_pooling_layer": False} if lacks else hf


def top_keys(cfg: TransformerConfig) -> dict[str, Any]:
    """What config.json says of what stands on top, beside the class."""
    bare = not (cfg.readout.dense or cfg.readout.classes or cfg.head_transform)
    return {"tie_word_embeddings": cfg.tie_embeddings, **({"add_pooling_layer": False} if bare else {})}


PREDICTIONS = vocabulary(
    "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.decoder"
)
PREDICTIONS_BIAS = vocabulary_bias("cls.predictions.bias", "cls.predictions.decoder.bias")
PREDICTIONS_ALIASES = {"cls.predictions.bias": ("cls.predictions.decoder.bias",)}
# A bias that stands beside that of an untied matrix is not used.
IGNORED = (r"^cls\.predictions\.bias$", r"^predictions\.bias$", r"^lm_head\.bias$")


def _bert_family() -> Family:
    dense = pooler("bert.pooler.dense")
    next_sentence = rows({**dense, **classes("cls.seq_relationship")}, dense="tanh", number=2, pairs=True)
    tops = encoder_tops(
        "Bert",
        head=PREDICTIONS,
        sequence=rows({**dense, **classes("classifier")}, dense="tanh"),
        model=pooled("bert.pooler.dense"),
        ForNextSentencePrediction=next_sentence,
        ForPreTraining=with_vocabulary(next_sentence, PREDICTIONS),
    )
    return Family(
        "bert",
        "BertForMaskedLM",
        KEYS,
        lambda hf: plain(hf, 0),
        plain_keys,
        {**embedded("bert."), **layer("bert.encoder.layer.{i}.", PARTS)},
        defaults=DEFAULTS,
        prefix="bert.",
        ignored=IGNORED,
        settle=settled,
        alternatives=PREDICTIONS_BIAS,
        aliases=PREDICTIONS_ALIASES,
        tops=tops,
    )


def _roberta_family(model_type: str, name: str) -> Family:
    head = {**pooler("classifier.dense"), **classes("classifier.out_proj")}
    # Positions are counted from the row after the padding's.
    return Family(
        model_type,
        f"{name}ForMaskedLM",
        KEYS,
        lambda hf: plain(hf, (1 if hf.get("pad_token_id") is None else hf["pad_token_id"]) + 1),
        lambda cfg: {**plain_keys(cfg), "pad_token_id": cfg.position.offset - 1},
        {**embedded("roberta."), **layer("roberta.encoder.layer.{i}.", PARTS)},
        defaults=DEFAULTS,
        prefix="roberta.",
        ignored=IGNORED,
        settle=settled,
        alternatives=vocabulary_bias("lm_head.bias", "lm_head.decoder.bias"),
        aliases={"lm_head.bias": ("lm_head.decoder.bias",)},
        tops=encoder_tops(
            name,
            head=vocabulary("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
            sequence=rows(head, dense="tanh"),
            model=pooled("roberta.pooler.dense"),
        ),
    )


def _distilbert(hf: HFConfig) -> Fields:
    return {
        **ENCODER,
        **activation(hf, "activation", PLAIN),
        "norm_eps": 1e-12,
        "position.max_length": hf["max_position_embeddings"],
    }


def _distilbert_family() -> Family:
    head = {**pooler("pre_classifier"), **classes("classifier")}
    parts = {
        "q": "attention.q_lin",
        "k": "attention.k_lin",
        "v": "attention.v_lin",
        "out": "attention.out_lin",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "attention_norm": "sa_layer_norm",
        "mlp_norm": "output_layer_norm",
    }
    embeddings = {n: p for n, p in embedded("distilbert.").items() if ".embeddings." in n and "type" not in n}
    return Family(
        "distilbert",
        "DistilBertForMaskedLM",
        {
            "vocab_size": "vocab_size",
            "dim": "model_dim",
            "n_layers": "num_layers",
            "n_heads": "attention.num_heads",
            "hidden_dim": "mlp_dim",
        },
        _distilbert,
        lambda cfg: {
            "max_position_embeddings": cfg.position.max_length,
            "activation": activation_name(cfg, PLAIN),
            "tie_word_embeddings": cfg.tie_embeddings,
        },
        {**embeddings, **layer("distilbert.transformer.layer.{i}.", parts)},
        defaults={"activation": "gelu", "max_position_embeddings": 512},
        spellings={"hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"},
        prefix="distilbert.",
        ignored=IGNORED,
        alternatives=vocabulary_bias("vocab_projector.bias", "vocab_projector.bias"),
        tops=encoder_tops(
            "DistilBert",
            head=vocabulary("vocab_transform", "vocab_layer_norm", "vocab_projector"),
            sequence=rows(head, dense="relu"),
        ),
    )


FAMILIES = (
    _bert_family(),
    _roberta_family("roberta", "Roberta"),
    _roberta_family("xlm-roberta", "XLMRoberta"),
    _distilbert_family(),
)
