"""Encoders in the manner of BERT: norms after the branches, learned positions, token types, and their heads.

The class that a file names decides what stands on top: a masked-LM head, a pooler, or neither.
"""

from typing import Any

from jaxlm.errors import UserError, check_choice
from jaxlm.hf.family import Family, Fields, HFConfig
from jaxlm.hf.fields import PLAIN, activation, activation_name, refuse
from jaxlm.hf.gpt_like import biases, layer
from jaxlm.hf.packing import Packing, linear, same
from jaxlm.model.config import TransformerConfig

_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "model_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "attention.num_heads",
    "intermediate_size": "mlp_dim",
    "layer_norm_eps": "norm_eps",
    "type_vocab_size": "token_types",
}
_DEFAULTS = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}
_PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp_norm": "output.LayerNorm",
}
_ENCODER: Fields = {
    **biases(True),
    "norm": "layernorm",
    "norm_position": "post",
    "embed_norm": True,
    "causal": False,
    "tie_embeddings": True,
    "position.kind": "learned",
}


def _tops(name: str, pooled: bool = True) -> dict[str, Fields]:
    """Class -> what stands on top of the encoder."""
    head = {"head_transform": True, "head_bias": True}
    return {f"{name}ForMaskedLM": head, f"{name}Model": {"pooler": True} if pooled else {}}


def _top(hf: HFConfig, tops: dict[str, Fields]) -> Fields:
    named = (hf.get("architectures") or [next(iter(tops))])[0]
    check_choice(named, tops, "config.json: architectures")
    return tops[named]


def _top_name(cfg: TransformerConfig, tops: dict[str, Fields]) -> dict[str, Any]:
    for name, fields in tops.items():
        if cfg.head_transform == ("head_transform" in fields) and cfg.pooler == ("pooler" in fields):
            return {"architectures": [name]}
    raise UserError(
        f"model.pooler={cfg.pooler} with model.head_transform={cfg.head_transform}: no class has it"
    )


def _tensors(prefix: str) -> dict[str, Packing]:
    return {
        f"{prefix}embeddings.word_embeddings.weight": same("embed/table"),
        f"{prefix}embeddings.position_embeddings.weight": same("embed/positions"),
        f"{prefix}embeddings.token_type_embeddings.weight": same("embed/types"),
        f"{prefix}embeddings.LayerNorm.weight": same("embed_norm/scale"),
        f"{prefix}embeddings.LayerNorm.bias": same("embed_norm/bias"),
        **layer(f"{prefix}encoder.layer.{{i}}.", _PARTS),
        f"{prefix}pooler.dense.weight": linear("pooler/w"),
        f"{prefix}pooler.dense.bias": same("pooler/b"),
    }


def _head(dense: str, norm: str, bias: str) -> dict[str, Packing]:
    """The masked-LM head; its matrix is the table."""
    return {
        f"{dense}.weight": linear("transform/w"),
        f"{dense}.bias": same("transform/b"),
        f"{norm}.weight": same("transform_norm/scale"),
        f"{norm}.bias": same("transform_norm/bias"),
        bias: same("head/b"),
    }


def _plain(hf: HFConfig, offset: int) -> Fields:
    refuse(hf, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    refuse(hf, tie_word_embeddings=True)
    return {
        **_ENCODER,
        **activation(hf, "hidden_act", PLAIN),
        "position.max_length": hf["max_position_embeddings"] - offset,
        "position.offset": offset,
    }


def _plain_keys(cfg: TransformerConfig) -> dict[str, Any]:
    length = cfg.position.offset + cfg.position.max_length
    return {"max_position_embeddings": length, "hidden_act": activation_name(cfg, PLAIN)}


def _bert_family() -> Family:
    tops = _tops("Bert")
    return Family(
        "bert",
        "BertForMaskedLM",
        _KEYS,
        lambda hf: {**_plain(hf, 0), **_top(hf, tops)},
        lambda cfg: {**_plain_keys(cfg), **_top_name(cfg, tops)},
        {
            **_tensors("bert."),
            **_head(
                "cls.predictions.transform.dense",
                "cls.predictions.transform.LayerNorm",
                "cls.predictions.bias",
            ),
        },
        defaults=_DEFAULTS,
        prefix="bert.",
        ignored=(r"position_ids$",),
        bare=("BertModel",),
    )


def _roberta_family(model_type: str, name: str) -> Family:
    tops = _tops(name)
    # Positions are counted from the row after the padding's.
    return Family(
        model_type,
        f"{name}ForMaskedLM",
        _KEYS,
        lambda hf: {
            **_plain(hf, (1 if hf.get("pad_token_id") is None else hf["pad_token_id"]) + 1),
            **_top(hf, tops),
        },
        lambda cfg: {**_plain_keys(cfg), **_top_name(cfg, tops), "pad_token_id": cfg.position.offset - 1},
        {**_tensors("roberta."), **_head("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")},
        defaults=_DEFAULTS,
        prefix="roberta.",
        ignored=(r"position_ids$",),
        bare=(f"{name}Model",),
    )


def _distilbert(hf: HFConfig, tops: dict[str, Fields]) -> Fields:
    refuse(hf, sinusoidal_pos_embds=False, tie_word_embeddings=True)
    return {
        **_ENCODER,
        **activation(hf, "activation", PLAIN),
        "norm_eps": 1e-12,
        "position.max_length": hf["max_position_embeddings"],
        **_top(hf, tops),
    }


def _distilbert_family() -> Family:
    tops = _tops("DistilBert", pooled=False)
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
    embeddings = {n: p for n, p in _tensors("distilbert.").items() if ".embeddings." in n and "type" not in n}
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
        lambda hf: _distilbert(hf, tops),
        lambda cfg: {
            "max_position_embeddings": cfg.position.max_length,
            "activation": activation_name(cfg, PLAIN),
            **_top_name(cfg, tops),
        },
        {
            **embeddings,
            **layer("distilbert.transformer.layer.{i}.", parts),
            **_head("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
        },
        defaults={"activation": "gelu", "max_position_embeddings": 512},
        prefix="distilbert.",
        ignored=(r"position_ids$",),
        bare=("DistilBertModel",),
    )


FAMILIES = (
    _bert_family(),
    _roberta_family("roberta", "Roberta"),
    _roberta_family("xlm-roberta", "XLMRoberta"),
    _distilbert_family(),
)
