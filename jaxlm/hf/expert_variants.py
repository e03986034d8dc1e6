"""GPT-OSS, DeepSeek-V2 and V3: experts with biases or in groups, sinks, latent attention."""

import math
from typing import Any

from jaxlm.errors import check_choice
from jaxlm.hf.family import Fields, HFConfig
from jaxlm.hf.fields import layer_names, layer_types, refuse, rope, rope_keys
from jaxlm.hf.llama_like import (
    ATTENTION,
    DEFAULTS,
    EXPERTS,
    KEYS,
    LAYER,
    MLP,
    NORMS,
    OUTSIDE,
    base,
    base_keys,
    both_biases,
    both_biases_keys,
    family,
)
from jaxlm.hf.packing import alternating, linear, same, split_heads
from jaxlm.model.config import TransformerConfig

# ---------------------------------------------------------------------------------------------- GPT-OSS

# What a config.json without rotary fields means.
_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _gpt_oss(hf: HFConfig) -> Fields:
    refuse(hf, hidden_act="silu", swiglu_alpha=1.702)
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(hf["num_hidden_layers"])]
    spelled = hf.get("rope_parameters") or hf.get("rope_scaling")
    return {
        **rope(hf if spelled else {**hf, "rope_scaling": _OSS_ROPE}),
        **layer_types(hf.get("layer_types") or kinds, hf["sliding_window"]),
        **both_biases(hf),
        "attention.sinks": True,
        "activation": "quick_geglu",
        "gate_limit": float(hf["swiglu_limit"]),
        "mlp_pattern": ("moe",),
        "moe.num_experts": hf["num_local_experts"],
        "moe.top_k": hf.get("num_experts_per_tok") or hf["experts_per_token"],
        "moe.bias": True,
    }


def _gpt_oss_keys(cfg: TransformerConfig) -> dict[str, Any]:
    keys = rope_keys(cfg)
    return {
        "rope_theta": keys["rope_theta"],
        "rope_scaling": keys["rope_scaling"] or {"rope_type": "default"},
        **both_biases_keys(cfg),
        "layer_types": layer_names(cfg),
        "sliding_window": cfg.attention.window or None,
        "swiglu_limit": cfg.gate_limit,
        "num_local_experts": cfg.moe.num_experts,
        "num_experts_per_tok": cfg.moe.top_k,
    }


_OSS_EXPERTS = {
    f"{LAYER}mlp.router.weight": linear("moe/router_w"),
    f"{LAYER}mlp.router.bias": same("moe/router_b"),
    f"{LAYER}mlp.experts.gate_up_proj": alternating("moe/w_gate", "moe/w_up"),
    f"{LAYER}mlp.experts.gate_up_proj_bias": alternating("moe/b_gate", "moe/b_up"),
    f"{LAYER}mlp.experts.down_proj": same("moe/w_down"),
    f"{LAYER}mlp.experts.down_proj_bias": same("moe/b_down"),
}

# --------------------------------------------------------------------------------------------- DeepSeek


def _mscale(hf: HFConfig) -> float:
    """What the scores of a stretched context are multiplied by: the square of 0.1 mscale_all_dim ln s + 1."""
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    weight, factor = scaling.get("mscale_all_dim") or 0.0, scaling.get("factor") or 1.0
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return 1.0 if kind == "default" or factor <= 1 else (0.1 * weight * math.log(factor) + 1.0) ** 2


def _deepseek(hf: HFConfig) -> Fields:
    refuse(hf, moe_layer_freq=1)
    first, layers = hf.get("first_k_dense_replace") or 0, hf["num_hidden_layers"]
    fields = {
        **base(hf),
        **both_biases(hf),
        "position.interleaved": hf.get("rope_interleave", True),
        "attention.scale": (hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"]) ** -0.5 * _mscale(hf),
    }
    if first >= layers:
        return fields
    return {
        **fields,
        "first_dense": first,
        "mlp_pattern": ("moe",),
        "moe.num_experts": hf["n_routed_experts"],
        "moe.top_k": hf["num_experts_per_tok"],
        "moe.expert_dim": hf["moe_intermediate_size"],
        "moe.shared_experts": hf["n_shared_experts"],
        "moe.routed_scale": float(hf["routed_scaling_factor"]),
    }


def _groups(hf: HFConfig, best: int) -> Fields:
    if not hf.get("n_group") or hf["n_group"] == 1:
        return {}
    return {"moe.groups": hf["n_group"], "moe.top_groups": hf["topk_group"], "moe.group_best": best}


def _deepseek_2(hf: HFConfig) -> Fields:
    refuse(hf, scoring_func="softmax", mlp_bias=False)
    fields = {**_deepseek(hf), "position.interleaved": True}  # `rope_interleave` is V3's
    if "moe.top_k" not in fields:
        return fields
    check_choice(hf["topk_method"], ("greedy", "group_limited_greedy"), "config.json: topk_method")
    groups = _groups(hf, 1) if hf["topk_method"] != "greedy" else {}
    # `transformers` reads norm_topk_prob and leaves the weights as they are; no released model sets it.
    return {**fields, **groups, "moe.normalize": False}


def _deepseek_3(hf: HFConfig) -> Fields:
    refuse(hf, scoring_func="sigmoid", topk_method="noaux_tc")
    fields = _deepseek(hf)
    if "moe.top_k" not in fields:
        return fields
    router = {"moe.router": "sigmoid", "moe.bias_balancing": True, "moe.normalize": hf["norm_topk_prob"]}
    return {**fields, **_groups(hf, 2), **router}


def _deepseek_keys(cfg: TransformerConfig) -> dict[str, Any]:
    keys, latent, moe = base_keys(cfg), cfg.attention.latent, cfg.moe
    if cfg.position.scaling == "yarn":
        unit = 0.1 * math.log(cfg.position.factor)
        over = math.sqrt((cfg.attention.scale or cfg.head_dim**-0.5) * math.sqrt(cfg.head_dim))
        keys["rope_scaling"]["mscale_all_dim"] = round((over - 1.0) / unit, 6)
        if cfg.position.attention_factor and keys["rope_scaling"]["mscale_all_dim"]:
            keys["rope_scaling"]["mscale"] = round((cfg.position.attention_factor * over - 1.0) / unit, 6)
            if keys["rope_scaling"]["mscale"]:
                del keys["rope_scaling"]["attention_factor"]
    sparse = cfg.num_moe_layers > 0
    return {
        **keys,
        **both_biases_keys(cfg),
        "q_lora_rank": latent.q_rank or None,
        "num_key_value_heads": cfg.attention.num_heads,
        "rope_interleave": cfg.position.interleaved,
        "first_k_dense_replace": cfg.first_dense if sparse else cfg.num_layers,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_dim or cfg.mlp_width,
        "n_shared_experts": moe.shared_experts,
        "routed_scaling_factor": moe.routed_scale,
        "n_group": moe.groups,
        "topk_group": moe.top_groups,
    }


def _deepseek_2_keys(cfg: TransformerConfig) -> dict[str, Any]:
    method = "group_limited_greedy" if cfg.moe.groups > 1 else "greedy"
    return {**_deepseek_keys(cfg), "topk_method": method, "norm_topk_prob": False}


def _deepseek_3_keys(cfg: TransformerConfig) -> dict[str, Any]:
    return {**_deepseek_keys(cfg), "norm_topk_prob": cfg.moe.normalize}


_DEEPSEEK = dict(
    keys={
        **{key: ours for key, ours in KEYS.items() if key not in ("head_dim", "num_key_value_heads")},
        "kv_lora_rank": "attention.latent.kv_rank",
        "q_lora_rank": "attention.latent.q_rank",
        "qk_nope_head_dim": "attention.latent.nope_dim",
        "qk_rope_head_dim": "attention.latent.rope_dim",
        "v_head_dim": "attention.latent.value_dim",
    },
    tensors={
        **OUTSIDE,
        **NORMS,
        **MLP,
        **EXPERTS,
        f"{LAYER}mlp.gate.e_score_correction_bias": same("moe/router_bias"),
        **{
            f"{LAYER}mlp.shared_experts.{x}_proj.weight": linear(f"moe/shared_w_{x}")
            for x in ("gate", "up", "down")
        },
        f"{LAYER}self_attn.q_proj.weight": linear("attention/wq"),
        f"{LAYER}self_attn.q_a_proj.weight": linear("attention/wq_down"),
        f"{LAYER}self_attn.q_a_proj.bias": same("attention/b_q"),
        f"{LAYER}self_attn.q_a_layernorm.weight": same("q_norm/scale"),
        f"{LAYER}self_attn.q_b_proj.weight": linear("attention/wq_up"),
        f"{LAYER}self_attn.kv_a_proj_with_mqa.weight": linear("attention/wkv_down"),
        f"{LAYER}self_attn.kv_a_proj_with_mqa.bias": same("attention/b_kv"),
        f"{LAYER}self_attn.kv_a_layernorm.weight": same("kv_norm/scale"),
        f"{LAYER}self_attn.kv_b_proj.weight": split_heads("attention/wk_up", "attention/wv_up"),
        f"{LAYER}self_attn.o_proj.weight": linear("attention/wo", inputs=2),
        f"{LAYER}self_attn.o_proj.bias": same("attention/bo"),
    },
)
_SIZES = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_shared_experts": 1,
}

# --------------------------------------------------------------------------------------------- the table

FAMILIES = (
    family(
        "gpt_oss",
        "GptOssForCausalLM",
        _gpt_oss,
        _gpt_oss_keys,
        tensors={
            **OUTSIDE,
            **ATTENTION,
            **NORMS,
            **_OSS_EXPERTS,
            f"{LAYER}self_attn.sinks": same("attention/sinks"),
        },
        defaults={
            **DEFAULTS,
            "attention_bias": True,
            "default_theta": 150000.0,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
        },
        spellings={"num_experts": "num_local_experts"},
    ),
    family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        _deepseek_2,
        _deepseek_2_keys,
        **_DEEPSEEK,
        defaults={
            **DEFAULTS,
            **_SIZES,
            "n_shared_experts": 2,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
            "moe_intermediate_size": 1407,
        },
        spellings={"num_experts": "n_routed_experts"},
    ),
    family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        _deepseek_3,
        _deepseek_3_keys,
        **_DEEPSEEK,
        defaults={
            **DEFAULTS,
            **_SIZES,
            "first_k_dense_replace": 3,
            "n_group": 8,
            "topk_group": 4,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "moe_intermediate_size": 2048,
        },
        spellings={"num_local_experts": "n_routed_experts"},
        # Modules that predict several tokens, behind the last layer.
        ignored=(r"^model\.layers\.61\.",),
    ),
)
