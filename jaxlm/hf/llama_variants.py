"""OLMo, SmolLM3, StableLM, Cohere and Phi: Llama's layout with other norms, positions or branches."""

from typing import Any

from jaxlm.hf.family import Fields, HFConfig, shortest
from jaxlm.hf.fields import PLAIN, activation, activation_name, refuse, rope, rope_keys
from jaxlm.hf.llama_like import (
    ATTENTION,
    DEFAULTS,
    EXPERTS,
    KEYS,
    LAYER,
    MLP,
    NORMS,
    OUTSIDE,
    QK_NORM,
    TENSORS,
    base,
    base_keys,
    both_biases,
    both_biases_keys,
    experts_keys,
    family,
    llama,
    llama_keys,
    qkv_bias,
)
from jaxlm.hf.packing import head_rows, linear, same
from jaxlm.model.config import TransformerConfig

# ------------------------------------------------------------------------------------------------- OLMo


def _clip(hf: HFConfig) -> Fields:
    return {"attention.clip_qkv": float(hf.get("clip_qkv") or 0.0)}


def _olmo_keys(cfg: TransformerConfig) -> dict[str, Any]:
    return {**base_keys(cfg), **both_biases_keys(cfg), "clip_qkv": cfg.attention.clip_qkv or None}


def _olmo(hf: HFConfig) -> Fields:
    return {
        **base(hf),
        **both_biases(hf),
        **_clip(hf),
        "norm": "layernorm_plain",
        "norm_eps": 1e-5,
    }


_NORM_ALL = {"attention.qk_norm": True, "attention.qk_norm_over": "all"}


def _olmo_2(hf: HFConfig) -> Fields:
    return {**base(hf), **both_biases(hf), **_NORM_ALL, "norm_position": "branch"}


def _olmoe(hf: HFConfig) -> Fields:
    experts = {
        "moe.num_experts": hf["num_experts"],
        "moe.top_k": hf["num_experts_per_tok"],
        "moe.normalize": hf["norm_topk_prob"],
    }
    return {
        **base(hf),
        **both_biases(hf),
        **_clip(hf),
        **_NORM_ALL,
        **experts,
        "mlp_pattern": ("moe",),
    }


def _olmoe_keys(cfg: TransformerConfig) -> dict[str, Any]:
    experts = experts_keys(cfg)
    return {**_olmo_keys(cfg), **{k: x for k, x in experts.items() if k != "moe_intermediate_size"}}


# ------------------------------------------------------------------------------ SmolLM3, StableLM, Cohere


def _smollm3(hf: HFConfig) -> Fields:
    refuse(hf, use_sliding_window=False)
    step, layers = hf.get("no_rope_layer_interval") or 4, hf["num_hidden_layers"]
    rotates = hf.get("no_rope_layers") or [int((i + 1) % step != 0) for i in range(layers)]
    pattern = shortest(["global" if r else "nope" for r in rotates[:layers]])
    return {**llama(hf), "attention.pattern": pattern}


def _smollm3_keys(cfg: TransformerConfig) -> dict[str, Any]:
    return {**llama_keys(cfg), "no_rope_layers": [int(kind != "nope") for kind, _ in cfg.layer_kinds]}


def _stablelm(hf: HFConfig) -> Fields:
    over = {"attention.qk_norm_kind": "layernorm_scale", "attention.qk_norm_over": "heads"}
    return {
        **base(hf, partial=True),
        **qkv_bias(hf["use_qkv_bias"]),
        "norm": "layernorm",
        "parallel_block": hf["use_parallel_residual"],
        **({"attention.qk_norm": True, **over} if hf["qk_layernorm"] else {}),
    }


def _stablelm_keys(cfg: TransformerConfig) -> dict[str, Any]:
    return {
        **base_keys(cfg),
        "partial_rotary_factor": cfg.position.fraction,
        "use_qkv_bias": cfg.attention.qkv_bias,
        "use_parallel_residual": cfg.parallel_block,
        "qk_layernorm": cfg.attention.qk_norm,
    }


def _cohere(hf: HFConfig) -> Fields:
    over = {"attention.qk_norm_kind": "layernorm_scale", "attention.qk_norm_over": "heads"}
    return {
        **base(hf),
        **both_biases(hf),
        "norm": "layernorm_scale",
        "parallel_block": True,
        "position.interleaved": True,
        **({"attention.qk_norm": True, **over} if hf["use_qk_norm"] else {}),
    }


def _cohere_keys(cfg: TransformerConfig) -> dict[str, Any]:
    return {**base_keys(cfg), **both_biases_keys(cfg), "use_qk_norm": cfg.attention.qk_norm}


def _phi(hf: HFConfig) -> Fields:
    over = {"attention.qk_norm": True, "attention.qk_norm_kind": "layernorm"}
    return {
        **(over if hf["qk_layernorm"] else {}),
        **rope(hf),
        **activation(hf, "hidden_act", PLAIN),
        **{"attention.qkv_bias": True, "attention.out_bias": True, "mlp_bias": True},
        **{"norm": "layernorm", "parallel_block": True, "head_bias": True},
    }


_LAYERNORM_KEYS = {("layer_norm_eps" if key == "rms_norm_eps" else key): ours for key, ours in KEYS.items()}

# --------------------------------------------------------------------------------------------- the table

FAMILIES = (
    family(
        "olmo",
        "OlmoForCausalLM",
        _olmo,
        _olmo_keys,
        keys={key: ours for key, ours in KEYS.items() if key != "rms_norm_eps"},
    ),
    family(
        "olmo2",
        "Olmo2ForCausalLM",
        _olmo_2,
        lambda cfg: {**base_keys(cfg), **both_biases_keys(cfg)},
        defaults={**DEFAULTS, "rms_norm_eps": 1e-5},
        tensors={
            **OUTSIDE,
            **ATTENTION,
            **MLP,
            **QK_NORM,
            f"{LAYER}post_attention_layernorm.weight": same("attention_post_norm/scale"),
            f"{LAYER}post_feedforward_layernorm.weight": same("mlp_post_norm/scale"),
        },
    ),
    family(
        "olmoe",
        "OlmoeForCausalLM",
        _olmoe,
        _olmoe_keys,
        defaults={**DEFAULTS, "rms_norm_eps": 1e-5, "norm_topk_prob": False},
        spellings={"num_local_experts": "num_experts"},
        tensors={**TENSORS, **QK_NORM, **EXPERTS},
    ),
    family(
        "smollm3",
        "SmolLM3ForCausalLM",
        _smollm3,
        _smollm3_keys,
        defaults={**DEFAULTS, "default_theta": 2e6, "tie_word_embeddings": True},
    ),
    family(
        "stablelm",
        "StableLmForCausalLM",
        _stablelm,
        _stablelm_keys,
        keys=_LAYERNORM_KEYS,
        defaults={
            **DEFAULTS,
            "layer_norm_eps": 1e-5,
            "partial_rotary_factor": 0.25,
            "use_qkv_bias": False,
            "use_parallel_residual": False,
            "qk_layernorm": False,
        },
        tensors={
            **TENSORS,
            **{f"{LAYER}self_attn.{x}_layernorm.norms.{{h}}.weight": same(f"{x}_norm/scale") for x in "qk"},
        },
    ),
    family(
        "cohere",
        "CohereForCausalLM",
        _cohere,
        _cohere_keys,
        keys={**_LAYERNORM_KEYS, "logit_scale": "logit_scale"},
        defaults={
            **DEFAULTS,
            "layer_norm_eps": 1e-5,
            "default_theta": 500000.0,
            "use_qk_norm": False,
            "tie_word_embeddings": True,
            "logit_scale": 0.0625,
        },
        tensors={
            **TENSORS,
            **{f"{LAYER}self_attn.{x}_norm.weight": head_rows(f"{x}_norm/scale") for x in "qk"},
        },
    ),
    family(
        "phi",
        "PhiForCausalLM",
        _phi,
        lambda cfg: {
            **rope_keys(cfg),
            "hidden_act": activation_name(cfg, PLAIN),
            "qk_layernorm": cfg.attention.qk_norm,
        },
        keys=_LAYERNORM_KEYS,
        defaults={
            **DEFAULTS,
            "layer_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "hidden_act": "gelu_new",
            "qk_layernorm": False,
        },
        tensors={
            **{f"{LAYER}self_attn.{x}_layernorm.weight": same(f"{x}_norm/scale") for x in "qk"},
            **{f"{LAYER}self_attn.{x}_layernorm.bias": same(f"{x}_norm/bias") for x in "qk"},
            **{name: packing for name, packing in OUTSIDE.items() if "norm" not in name},
            **{name: packing for name, packing in ATTENTION.items() if "o_proj" not in name},
            **NORMS,
            "model.final_layernorm.weight": same("final_norm/scale"),
            "model.final_layernorm.bias": same("final_norm/bias"),
            f"{LAYER}self_attn.dense.weight": linear("attention/wo", inputs=2),
            f"{LAYER}self_attn.dense.bias": same("attention/bo"),
            f"{LAYER}mlp.fc1.weight": linear("mlp/w_up"),
            f"{LAYER}mlp.fc1.bias": same("mlp/b_up"),
            f"{LAYER}mlp.fc2.weight": linear("mlp/w_down"),
            f"{LAYER}mlp.fc2.bias": same("mlp/b_down"),
        },
    ),
)
