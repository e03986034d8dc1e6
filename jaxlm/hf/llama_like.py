"""Families in the manner of Llama: RMSNorm, rotary positions, gated MLPs, and what was varied since."""

from typing import Any

from jaxlm.hf.family import Family, Fields, HFConfig, shortest
from jaxlm.hf.fields import (
    GATED,
    activation,
    activation_name,
    layer_names,
    layer_types,
    refuse,
    rope,
    rope_keys,
)
from jaxlm.hf.packing import Packing, linear, same
from jaxlm.model.config import TransformerConfig

KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "model_dim",
    "num_hidden_layers": "num_layers",
    "intermediate_size": "mlp_dim",
    "num_attention_heads": "attention.num_heads",
    "num_key_value_heads": "attention.num_kv_heads",
    "head_dim": "attention.head_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
DEFAULTS = {
    "hidden_act": "silu",
    "default_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
LAYER = "model.layers.{i}."
OUTSIDE = {
    "model.embed_tokens.weight": same("embed/table"),
    "model.norm.weight": same("final_norm/scale"),
    "model.norm.bias": same("final_norm/bias"),
    "lm_head.weight": linear("head/w"),
    "lm_head.bias": same("head/b"),
}
ATTENTION = {
    **{f"{LAYER}self_attn.{x}_proj.weight": linear(f"attention/w{x}") for x in "qkv"},
    **{f"{LAYER}self_attn.{x}_proj.bias": same(f"attention/b{x}") for x in "qkv"},
    f"{LAYER}self_attn.o_proj.weight": linear("attention/wo", inputs=2),
    f"{LAYER}self_attn.o_proj.bias": same("attention/bo"),
}
QK_NORM = {f"{LAYER}self_attn.{x}_norm.weight": same(f"{x}_norm/scale") for x in "qk"}
NORMS = {
    f"{LAYER}input_layernorm.weight": same("attention_norm/scale"),
    f"{LAYER}input_layernorm.bias": same("attention_norm/bias"),
    f"{LAYER}post_attention_layernorm.weight": same("mlp_norm/scale"),
    f"{LAYER}post_attention_layernorm.bias": same("mlp_norm/bias"),
}
MLP = {
    **{f"{LAYER}mlp.{x}_proj.weight": linear(f"mlp/w_{x}") for x in ("gate", "up", "down")},
    **{f"{LAYER}mlp.{x}_proj.bias": same(f"mlp/b_{x}") for x in ("gate", "up", "down")},
}
TENSORS = {**OUTSIDE, **ATTENTION, **NORMS, **MLP}


def moe(block: str, gate: str, up: str, down: str) -> dict[str, Packing]:
    """Router and experts under the name of their block."""
    experts = {"w_gate": gate, "w_up": up, "w_down": down}
    return {
        f"{LAYER}{block}.gate.weight": linear("moe/router_w"),
        **{f"{LAYER}{block}.experts.{{e}}.{x}.weight": linear(f"moe/{w}") for w, x in experts.items()},
    }


EXPERTS = moe("mlp", "gate_proj", "up_proj", "down_proj")


def family(model_type: str, architecture: str, read: Any, write: Any, **rest: Any) -> Family:
    """A family with what stands above where `rest` says nothing else."""
    shared = dict(keys=KEYS, tensors=TENSORS, defaults=DEFAULTS)
    return Family(model_type, architecture, read=read, write=write, **{**shared, **rest})


def base(hf: HFConfig, *, act: str = "hidden_act", partial: bool = False) -> Fields:
    """Rotation and gated activation; only `partial` families read a share of the head that rotates."""
    whole = {} if partial else {"position.fraction": 1.0}
    return {**rope(hf), **whole, **activation(hf, act, GATED)}


def base_keys(cfg: TransformerConfig, *, act: str = "hidden_act") -> dict[str, Any]:
    """The inverse of `base`."""
    keys = rope_keys(cfg)
    if keys["partial_rotary_factor"] == 1.0:
        del keys["partial_rotary_factor"]
    return {**keys, act: activation_name(cfg, GATED)}


# ------------------------------------------------------------------------------------------------ biases


def llama(hf: HFConfig) -> Fields:
    bias = {"attention.qkv_bias": hf["attention_bias"], "attention.out_bias": hf["attention_bias"]}
    return {**base(hf), **bias, "mlp_bias": hf["mlp_bias"]}


def llama_keys(cfg: TransformerConfig) -> dict[str, Any]:
    return {**base_keys(cfg), "attention_bias": cfg.attention.qkv_bias, "mlp_bias": cfg.mlp_bias}


# ---------------------------------------------------------------------------------------------- windows


def _one_window(hf: HFConfig) -> Fields:
    """Mistral: all layers have the window, or none, whatever `layer_types` says."""
    window = hf.get("sliding_window")
    kinds = ["sliding_attention" if window else "full_attention"] * hf["num_hidden_layers"]
    return layer_types(kinds, window)


def _one_window_keys(cfg: TransformerConfig) -> dict[str, Any]:
    return {"sliding_window": cfg.attention.window or None}


def _in_use(hf: HFConfig) -> int | None:
    return hf.get("sliding_window") if hf.get("use_sliding_window") else None


def _upper_window(hf: HFConfig) -> Fields:
    """Qwen: layers from `max_window_layers` on have the window, if it is in use."""
    window, first = _in_use(hf), hf.get("max_window_layers", 28)
    layers = range(hf["num_hidden_layers"])
    kinds = ["sliding_attention" if window and i >= first else "full_attention" for i in layers]
    return layer_types(hf.get("layer_types") or kinds, window)


def _lower_window(hf: HFConfig) -> Fields:
    """Qwen2-MoE: every second layer before `max_window_layers` has it."""
    window, end = _in_use(hf), hf.get("max_window_layers", 28)
    local = [bool(window) and i % 2 == 0 and i < end for i in range(hf["num_hidden_layers"])]
    kinds = ["sliding_attention" if x else "full_attention" for x in local]
    return layer_types(hf.get("layer_types") or kinds, window)


def _window_keys(cfg: TransformerConfig) -> dict[str, Any]:
    local = "local" in cfg.attention.pattern
    window = {"sliding_window": cfg.attention.window if local else None, "use_sliding_window": local}
    return {**window, "layer_types": layer_names(cfg)}


def _qwen(hf: HFConfig, **more: Any) -> Fields:
    return {**base(hf), **_upper_window(hf), **more}


def _qwen3_moe(hf: HFConfig) -> Fields:
    window = _one_window({**hf, "sliding_window": _in_use(hf)})
    return {**base(hf), **window, **_sparse_layers(hf), **both_biases(hf), "attention.qk_norm": True}


def _qwen3_moe_keys(cfg: TransformerConfig) -> dict[str, Any]:
    window = {**_one_window_keys(cfg), "use_sliding_window": cfg.attention.window > 0}
    biases = both_biases_keys(cfg)
    return {**base_keys(cfg), **window, **experts_keys(cfg), **_sparse_keys(cfg), **biases}


def _qwen_keys(cfg: TransformerConfig) -> dict[str, Any]:
    return {**base_keys(cfg), **_window_keys(cfg)}


# ---------------------------------------------------------------------------------------------- experts


def _experts(hf: HFConfig) -> Fields:
    return {
        "moe.num_experts": hf.get("num_experts") or hf["num_local_experts"],
        "moe.top_k": hf["num_experts_per_tok"],
        "moe.expert_dim": hf["moe_intermediate_size"],
        "moe.normalize": hf["norm_topk_prob"],
    }


def experts_keys(cfg: TransformerConfig) -> dict[str, Any]:
    return {
        "num_experts": cfg.moe.num_experts,
        "num_experts_per_tok": cfg.moe.top_k,
        "moe_intermediate_size": cfg.moe.expert_dim or cfg.mlp_width,
        "norm_topk_prob": cfg.moe.normalize,
    }


def _sparse_layers(hf: HFConfig) -> Fields:
    """Every `decoder_sparse_step`-th layer routes, but for those named in `mlp_only_layers`; the experts."""
    step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    layers = range(hf["num_hidden_layers"])
    kinds = ["moe" if i not in dense and (i + 1) % step == 0 else "dense" for i in layers]
    if "moe" not in kinds:
        return {"mlp_pattern": ("dense",)}
    first, pattern = kinds.index("moe"), shortest(kinds)
    if len(rest := shortest(kinds[first:])) < len(pattern):
        return {**_experts(hf), "first_dense": first, "mlp_pattern": rest}
    return {**_experts(hf), "mlp_pattern": pattern}


def _sparse_keys(cfg: TransformerConfig) -> dict[str, Any]:
    dense = [i for i, (_, mlp) in enumerate(cfg.layer_kinds) if mlp == "dense"]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def _qwen2_moe(hf: HFConfig) -> Fields:
    shared = {
        "moe.shared_experts": 1,
        "moe.shared_dim": hf["shared_expert_intermediate_size"],
        "moe.shared_gate": True,
    }
    experts = _sparse_layers(hf)
    shared = shared if "moe.num_experts" in experts else {}
    return {**base(hf), **_lower_window(hf), **experts, **shared, **qkv_bias(hf.get("qkv_bias", True))}


def _qwen2_moe_keys(cfg: TransformerConfig) -> dict[str, Any]:
    shared = {"shared_expert_intermediate_size": cfg.moe.shared_dim, "qkv_bias": cfg.attention.qkv_bias}
    return {**_qwen_keys(cfg), **experts_keys(cfg), **_sparse_keys(cfg), **shared}


def qkv_bias(on: bool) -> Fields:
    return {"attention.qkv_bias": on}


def both_biases(hf: HFConfig) -> Fields:
    return {"attention.qkv_bias": hf["attention_bias"], "attention.out_bias": hf["attention_bias"]}


def both_biases_keys(cfg: TransformerConfig) -> dict[str, Any]:
    return {"attention_bias": cfg.attention.qkv_bias}


def _mixtral(hf: HFConfig) -> Fields:
    experts = {"moe.num_experts": hf["num_local_experts"], "moe.top_k": hf["num_experts_per_tok"]}
    return {**base(hf), **_one_window(hf), **experts, "mlp_pattern": ("moe",)}


def _mixtral_keys(cfg: TransformerConfig) -> dict[str, Any]:
    experts = {"num_local_experts": cfg.moe.num_experts, "num_experts_per_tok": cfg.moe.top_k}
    return {**base_keys(cfg), **_one_window_keys(cfg), **experts}


# ------------------------------------------------------------------------------------------------ Gemma


def _gemma(hf: HFConfig, act: str = "hidden_act") -> Fields:
    refuse(hf, use_bidirectional_attention=None if hf.get("use_bidirectional_attention") is None else False)
    return {**base(hf, act=act), **both_biases(hf), "norm_offset": True, "scale_embeddings": True}


def _gemma_1(hf: HFConfig) -> Fields:
    # Files of the first release say `gelu` and mean its tanh form.
    return _gemma({**hf, "hidden_act": "gelu_pytorch_tanh"} if hf["hidden_act"] == "gelu" else hf)


def _gemma_2(hf: HFConfig, *, alternate: int = 2) -> Fields:
    layers = hf["num_hidden_layers"]
    step = hf.get("sliding_window_pattern") or alternate
    kinds = ["full_attention" if (i + 1) % step == 0 else "sliding_attention" for i in range(layers)]
    return {
        **_gemma(hf, "hidden_activation"),
        **layer_types(hf.get("layer_types") or kinds, hf["sliding_window"]),
        "norm_position": "sandwich",
        "attention.scale": float(hf["query_pre_attn_scalar"]) ** -0.5,
        "attention.softcap": float(hf.get("attn_logit_softcapping") or 0.0),
        "logit_softcap": float(hf.get("final_logit_softcapping") or 0.0),
    }


def _gemma_2_keys(cfg: TransformerConfig) -> dict[str, Any]:
    scalar = round((cfg.attention.scale or cfg.head_dim**-0.5) ** -2, 6)
    return {
        **base_keys(cfg, act="hidden_activation"),
        **both_biases_keys(cfg),
        "layer_types": layer_names(cfg),
        "sliding_window": cfg.attention.window or None,
        "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
        "attn_logit_softcapping": cfg.attention.softcap or None,
        "final_logit_softcapping": cfg.logit_softcap or None,
    }


def _gemma_3(hf: HFConfig) -> Fields:
    local = (hf.get("rope_parameters") or {}).get("sliding_attention") or {}
    refuse(local, rope_type="default")
    theta = local.get("rope_theta") or hf.get("rope_local_base_freq") or 10000.0
    fields = _gemma_2(hf, alternate=6)
    return {**fields, "position.local_theta": float(theta), "attention.qk_norm": True}


def _gemma_3_keys(cfg: TransformerConfig) -> dict[str, Any]:
    return {**_gemma_2_keys(cfg), "rope_local_base_freq": cfg.position.local_theta or cfg.position.theta}


_SANDWICH = {
    f"{LAYER}input_layernorm.weight": same("attention_norm/scale"),
    f"{LAYER}post_attention_layernorm.weight": same("attention_post_norm/scale"),
    f"{LAYER}pre_feedforward_layernorm.weight": same("mlp_norm/scale"),
    f"{LAYER}post_feedforward_layernorm.weight": same("mlp_post_norm/scale"),
}
_GEMMA = {**DEFAULTS, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256}

_QWEN = {**DEFAULTS, "sliding_window": 4096}

# --------------------------------------------------------------------------------------------- the table

FAMILIES = (
    family("llama", "LlamaForCausalLM", llama, llama_keys),
    family(
        "mistral",
        "MistralForCausalLM",
        lambda hf: {**base(hf), **_one_window(hf)},
        lambda cfg: {**base_keys(cfg), **_one_window_keys(cfg)},
        defaults={**DEFAULTS, "sliding_window": 4096},
    ),
    family(
        "mixtral",
        "MixtralForCausalLM",
        _mixtral,
        _mixtral_keys,
        defaults={**DEFAULTS, "default_theta": 1e6, "rms_norm_eps": 1e-5},
        spellings={"num_experts": "num_local_experts"},
        tensors={**OUTSIDE, **ATTENTION, **NORMS, **moe("block_sparse_moe", "w1", "w3", "w2")},
    ),
    family("qwen2", "Qwen2ForCausalLM", lambda hf: _qwen(hf, **qkv_bias(True)), _qwen_keys, defaults=_QWEN),
    family(
        "qwen3",
        "Qwen3ForCausalLM",
        lambda hf: _qwen(hf, **both_biases(hf), **{"attention.qk_norm": True}),
        lambda cfg: {**_qwen_keys(cfg), **both_biases_keys(cfg)},
        tensors={**TENSORS, **QK_NORM},
        defaults={**_QWEN, "head_dim": 128},
    ),
    family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        _qwen2_moe,
        _qwen2_moe_keys,
        defaults={**_QWEN, "norm_topk_prob": False},
        tensors={
            **TENSORS,
            **EXPERTS,
            **{
                f"{LAYER}mlp.shared_expert.{x}_proj.weight": linear(f"moe/shared_w_{x}")
                for x in ("gate", "up", "down")
            },
            f"{LAYER}mlp.shared_expert_gate.weight": linear("moe/shared_gate"),
        },
    ),
    family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _qwen3_moe,
        _qwen3_moe_keys,
        defaults={**_QWEN, "norm_topk_prob": False},
        spellings={"num_experts": "num_local_experts"},
        tensors={**TENSORS, **QK_NORM, **EXPERTS},
    ),
    family(
        "gemma",
        "GemmaForCausalLM",
        _gemma_1,
        lambda cfg: {
            **base_keys(cfg),
            **both_biases_keys(cfg),
            "hidden_activation": activation_name(cfg, GATED),
        },
        defaults=_GEMMA | {"hidden_act": "gelu_pytorch_tanh"},
    ),
    family(
        "gemma2",
        "Gemma2ForCausalLM",
        _gemma_2,
        _gemma_2_keys,
        defaults=_GEMMA
        | dict(
            query_pre_attn_scalar=256,
            sliding_window=4096,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
        ),
        tensors={**TENSORS, **_SANDWICH},
    ),
    family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _gemma_3,
        _gemma_3_keys,
        defaults=_GEMMA | dict(query_pre_attn_scalar=256, sliding_window=4096, default_theta=1e6),
        tensors={**TENSORS, **_SANDWICH, **QK_NORM},
    ),
)
