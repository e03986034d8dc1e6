"""Fields that many families share: rotary scalings in both spellings, layer types, activations."""

import math
from collections.abc import Mapping
from typing import Any

from jaxlm.errors import UserError, check, check_choice
from jaxlm.hf.family import Fields, HFConfig, shortest
from jaxlm.model.config import TransformerConfig

# Name in config.json -> name in jaxlm.model.layers.ACTIVATIONS.
PLAIN = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python": "gelu",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
GATED = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
    "gelu_fast": "geglu",
    "gelu_accurate": "geglu",
    "gelu": "geglu_exact",
    "gelu_python": "geglu_exact",
    "quick_gelu": "quick_geglu",
    "relu": "reglu",
}


def activation(hf: HFConfig, key: str, table: Mapping[str, str]) -> Fields:
    """Our name of the activation function that `key` names."""
    check_choice(hf[key], table, f"config.json: {key}")
    return {"activation": table[hf[key]]}


def activation_name(cfg: TransformerConfig, table: Mapping[str, str]) -> str:
    """Theirs of ours."""
    names = [name for name, ours in table.items() if ours == cfg.activation]
    check(bool(names), f"model.activation={cfg.activation!r} has no name in this family")
    return names[0]


# Their type of scaling -> ours.
_TYPES = {"default": "none"}
_TYPES |= {kind: kind for kind in ("linear", "dynamic", "yarn", "llama3", "longrope")}
# Their constant -> ours, by type.
_CONSTANTS = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_length",
    },
    "longrope": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "short_factor": "short_factors",
        "long_factor": "long_factors",
        "attention_factor": "attention_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "beta_round",
        "attention_factor": "attention_factor",
    },
}
_FORMS = {  # of constants that are no floats
    "original_length": int,
    "beta_round": bool,
    "short_factors": lambda x: tuple(map(float, x)),
    "long_factors": lambda x: tuple(map(float, x)),
}


def rope(hf: HFConfig, *, layers: str = "full_attention", fraction: str = "partial_rotary_factor") -> Fields:
    """Rotary fields from `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

    Where both stand, `rope_scaling` counts, as in `transformers`.

    Args:
        hf: config.json; needs a default `rope_theta`.
        layers: which layers' parameters, where they differ by the type of the layer.
        fraction: name of the share of a head that rotates, in the older spelling.
    """
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    scaling = scaling.get(layers, scaling) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    check_choice(kind, _TYPES, "config.json: rope_scaling's type")
    fields = {
        "kind": "rope",
        "theta": float(scaling.get("rope_theta") or hf.get("rope_theta") or hf["default_theta"]),
        "fraction": float(scaling.get("partial_rotary_factor") or hf.get(fraction) or 1.0),
        "scaling": _TYPES[kind],
    }
    constants = _CONSTANTS.get(kind, {})
    for theirs, ours in constants.items():
        if scaling.get(theirs) is not None:
            fields[ours] = _FORMS.get(ours, float)(scaling[theirs])
    if kind in ("yarn", "dynamic", "longrope", "llama3") and not fields.get("original_length"):
        length = hf.get("original_max_position_embeddings") if kind != "dynamic" else None
        fields["original_length"] = int(length or hf["max_position_embeddings"])
    if kind in ("yarn", "longrope") and "factor" not in fields:
        fields["factor"] = hf["max_position_embeddings"] / fields["original_length"]
    weights = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if kind == "yarn" and all(weights) and scaling.get("attention_factor") is None:
        over, under = (0.1 * w * math.log(fields["factor"]) + 1.0 for w in weights)
        fields["attention_factor"] = over / under
    return {f"position.{name}": value for name, value in fields.items()}


def rope_keys(cfg: TransformerConfig, *, fraction: str = "partial_rotary_factor") -> dict[str, Any]:
    """The older spelling, which every tool reads."""
    p = cfg.position
    check_choice(p.kind, ("rope",), "model.position.kind")
    names = {ours: theirs for theirs, ours in _TYPES.items()}
    check_choice(p.scaling, names, "model.position.scaling")
    out: dict[str, Any] = {"rope_theta": p.theta, fraction: p.fraction, "rope_scaling": None}
    if p.scaling != "none":
        kind = names[p.scaling]
        constants = {theirs: getattr(p, ours) for theirs, ours in _CONSTANTS[kind].items()}
        if not constants.get("attention_factor", 1.0):
            del constants["attention_factor"]
        out["rope_scaling"] = {"rope_type": kind, **constants}
        if kind == "dynamic":
            out["max_position_embeddings"] = p.original_length
    return out


def layer_types(kinds: list[str], window: int | None) -> Fields:
    """Attention pattern from one of 'full_attention', 'sliding_attention', 'nope' per layer."""
    names = {"full_attention": "global", "sliding_attention": "local", "nope": "nope"}
    for kind in kinds:
        check_choice(kind, names, "config.json: layer_types")
    pattern = shortest([names[kind] for kind in kinds])
    if "local" in pattern and not window:
        raise UserError(f"config.json: sliding_window={window!r}, but layer_types names sliding layers")
    return {"attention.pattern": pattern, "attention.window": int(window) if "local" in pattern else 0}


def layer_names(cfg: TransformerConfig) -> list[str]:
    """The inverse: one name per layer."""
    names = {"global": "full_attention", "local": "sliding_attention", "nope": "full_attention"}
    return [names[attention] for attention, _ in cfg.layer_kinds]


def refuse(hf: HFConfig, **wanted: Any) -> None:
    """Refuse a config that differs from what the family's tables can express."""
    for key, value in wanted.items():
        if hf.get(key, value) != value:
            raise UserError(f"config.json: {key}={hf[key]!r} is not supported, only {value!r}")
