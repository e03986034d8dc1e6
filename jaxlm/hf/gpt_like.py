"""Families in the manner of GPT: LayerNorm, plain MLPs, positions of every kind, often joined q, k and v."""

from typing import Any

from jaxlm.hf.family import Family, Fields, HFConfig, shortest
from jaxlm.hf.fields import PLAIN, activation, activation_name, refuse, rope, rope_keys
from jaxlm.hf.packing import Packing, joined_qkv, linear, same
from jaxlm.model.config import TransformerConfig


def layer(
    prefix: str, names: dict[str, str], *, torch: bool = True, grouped: bool = False
) -> dict[str, Packing]:
    """Weights and biases of a layer's parts from the parts' own names.

    Args:
        prefix: of the layer, with {i}.
        names: part of ours -> theirs: qkv or q, k, v; out; up; down; and norms.
        torch, grouped: see `jaxlm.hf.packing`.
    """
    out = {}
    for ours, theirs in names.items():
        weight, bias = f"{prefix}{theirs}.weight", f"{prefix}{theirs}.bias"
        if ours == "qkv":
            out[weight] = joined_qkv(torch=torch, grouped=grouped)
            out[bias] = joined_qkv(bias=True, grouped=grouped)
        elif ours in ("q", "k", "v", "out"):
            letter = ours[0]
            out[weight] = linear(f"attention/w{letter}", inputs=2 if ours == "out" else 1, torch=torch)
            out[bias] = same(f"attention/b{letter}")
        elif ours in ("up", "down"):
            out[weight] = linear(f"mlp/w_{ours}", torch=torch)
            out[bias] = same(f"mlp/b_{ours}")
        else:
            out[weight], out[bias] = same(f"{ours}/scale"), same(f"{ours}/bias")
    return out


def outside(table: str, norm: str = "", *, head: str = "lm_head", embed_norm: str = "") -> dict[str, Packing]:
    """Embedding, last norm and head."""
    out = {f"{table}.weight": same("embed/table"), f"{head}.weight": linear("head/w")}
    out[f"{head}.bias"] = same("head/b")
    for ours, theirs in (("final_norm", norm), ("embed_norm", embed_norm)):
        if theirs:
            out |= {f"{theirs}.weight": same(f"{ours}/scale"), f"{theirs}.bias": same(f"{ours}/bias")}
    return out


def biases(on: bool) -> Fields:
    """Biases on all projections."""
    return {"attention.qkv_bias": on, "attention.out_bias": on, "mlp_bias": on}


LAYERNORM = {"norm": "layernorm"}
TIED = {"tie_word_embeddings": True}


def learned(length: int, offset: int = 0) -> Fields:
    fields = {"position.kind": "learned", "position.max_length": length}
    return {**fields, "position.offset": offset} if offset else fields


# ----------------------------------------------------------------------------------------- GPT-1 and GPT-2

_GPT_KEYS = {
    "vocab_size": "vocab_size",
    "n_embd": "model_dim",
    "n_layer": "num_layers",
    "n_head": "attention.num_heads",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
_GPT_SPELLINGS = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_GPT_PARTS = {
    "qkv": "attn.c_attn",
    "out": "attn.c_proj",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
}
_GPT_DEFAULTS = {
    **TIED,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "n_positions": 1024,
}


def _gpt2(hf: HFConfig) -> Fields:
    refuse(hf, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return {
        "attention.scale": 0.0 if hf.get("scale_attn_weights", True) else 1.0,
        **LAYERNORM,
        **biases(True),
        **learned(hf["n_positions"]),
        **activation(hf, "activation_function", PLAIN),
    }


def _gpt2_keys(cfg: TransformerConfig) -> dict[str, Any]:
    return {
        "n_positions": cfg.position.max_length,
        "n_inner": cfg.mlp_width,
        "scale_attn_weights": cfg.attention.scale != 1.0,
        "activation_function": activation_name(cfg, PLAIN),
    }


_GPT1 = {"gelu": "gelu_tanh", "relu": "relu", "swish": "silu", "silu": "silu"}  # its activations


def _gpt1(hf: HFConfig) -> Fields:
    return {
        **LAYERNORM,
        **biases(True),
        **learned(hf["n_positions"]),
        **activation(hf, "afn", _GPT1),
        "norm_position": "post",
        "mlp_dim": 4 * hf["n_embd"],
    }


def _gpt1_keys(cfg: TransformerConfig) -> dict[str, Any]:
    return {"n_positions": cfg.position.max_length, "afn": activation_name(cfg, _GPT1)}


# ----------------------------------------------------------------------------------------- GPT-Neo, J, NeoX


def _gpt_neo(hf: HFConfig) -> Fields:
    kinds = hf.get("attention_layers")
    if not kinds:
        kinds = [kind for part, times in hf["attention_types"] for kind in list(part) * times]
    pattern = shortest(list(kinds)[: hf["num_layers"]])
    return {
        **LAYERNORM,
        **learned(hf["max_position_embeddings"]),
        **activation(hf, "activation_function", PLAIN),
        "attention.pattern": pattern,
        "attention.window": hf["window_size"] if "local" in pattern else 0,
        "attention.out_bias": True,
        "attention.scale": 1.0,
        "mlp_bias": True,
    }


def _gpt_neo_keys(cfg: TransformerConfig) -> dict[str, Any]:
    kinds = [kind for kind, _ in cfg.layer_kinds]
    return {
        "max_position_embeddings": cfg.position.max_length,
        "attention_types": [[kinds, 1]],
        "attention_layers": kinds,
        "window_size": cfg.attention.window or 256,
        "activation_function": activation_name(cfg, PLAIN),
    }


def _gptj(hf: HFConfig) -> Fields:
    return {
        **LAYERNORM,
        **activation(hf, "activation_function", PLAIN),
        "position.fraction": (hf.get("rotary_dim") or hf["n_embd"]) / (hf["n_embd"] // hf["n_head"]),
        "position.interleaved": True,
        "parallel_block": True,
        "mlp_bias": True,
        "head_bias": True,
    }


def _gptj_keys(cfg: TransformerConfig) -> dict[str, Any]:
    return {
        "rotary_dim": round(cfg.position.fraction * cfg.head_dim),
        "n_inner": cfg.mlp_width,
        "activation_function": activation_name(cfg, PLAIN),
    }


def _neox(hf: HFConfig) -> Fields:
    bias = hf["attention_bias"]
    return {
        **LAYERNORM,
        **rope({**hf, "rope_theta": hf.get("rope_theta", hf.get("rotary_emb_base"))}, fraction="rotary_pct"),
        **activation(hf, "hidden_act", PLAIN),
        "attention.qkv_bias": bias,
        "attention.out_bias": bias,
        "mlp_bias": True,
        "parallel_block": hf["use_parallel_residual"],
        "parallel_norms": hf["use_parallel_residual"],
    }


def _neox_keys(cfg: TransformerConfig) -> dict[str, Any]:
    keys = rope_keys(cfg, fraction="rotary_pct")
    return {
        **keys,
        "rotary_emb_base": keys["rope_theta"],
        "hidden_act": activation_name(cfg, PLAIN),
        "attention_bias": cfg.attention.qkv_bias,
        "use_parallel_residual": cfg.parallel_block,
    }


# --------------------------------------------------------------------------------------------- the table

FAMILIES = (
    Family(
        "openai-gpt",
        "OpenAIGPTLMHeadModel",
        {key: ours for key, ours in _GPT_KEYS.items() if key != "n_inner"},
        _gpt1,
        _gpt1_keys,
        {
            **outside("transformer.tokens_embed"),
            **layer("transformer.h.{i}.", _GPT_PARTS, torch=False),
            "transformer.positions_embed.weight": same("embed/positions"),
        },
        defaults={**_GPT_DEFAULTS, "afn": "gelu", "n_positions": 512},
        spellings=_GPT_SPELLINGS,
        prefix="transformer.",
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        {**_GPT_KEYS, "n_inner": "mlp_dim"},
        _gpt2,
        _gpt2_keys,
        {
            **outside("transformer.wte", "transformer.ln_f"),
            **layer("transformer.h.{i}.", _GPT_PARTS, torch=False),
            "transformer.wpe.weight": same("embed/positions"),
        },
        defaults=_GPT_DEFAULTS,
        spellings=_GPT_SPELLINGS,
        prefix="transformer.",
    ),
    Family(
        "gpt_neo",
        "GPTNeoForCausalLM",
        {
            "vocab_size": "vocab_size",
            "hidden_size": "model_dim",
            "num_layers": "num_layers",
            "num_heads": "attention.num_heads",
            "intermediate_size": "mlp_dim",
            "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tie_embeddings",
        },
        _gpt_neo,
        _gpt_neo_keys,
        {
            **outside("transformer.wte", "transformer.ln_f"),
            "transformer.wpe.weight": same("embed/positions"),
            **layer(
                "transformer.h.{i}.",
                {
                    **{x: f"attn.attention.{x}_proj" for x in "qkv"},
                    "out": "attn.attention.out_proj",
                    "up": "mlp.c_fc",
                    "down": "mlp.c_proj",
                    "attention_norm": "ln_1",
                    "mlp_norm": "ln_2",
                },
            ),
        },
        defaults={**TIED, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "window_size": 256},
        spellings={"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"},
        prefix="transformer.",
    ),
    Family(
        "gptj",
        "GPTJForCausalLM",
        {**_GPT_KEYS, "n_inner": "mlp_dim"},
        _gptj,
        _gptj_keys,
        {
            **outside("transformer.wte", "transformer.ln_f"),
            **layer(
                "transformer.h.{i}.",
                {
                    **{x: f"attn.{x}_proj" for x in "qkv"},
                    "out": "attn.out_proj",
                    "up": "mlp.fc_in",
                    "down": "mlp.fc_out",
                    "attention_norm": "ln_1",
                },
            ),
        },
        defaults={**_GPT_DEFAULTS, "rotary_dim": 64, "tie_word_embeddings": False},
        spellings=_GPT_SPELLINGS,
        prefix="transformer.",
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        {
            "vocab_size": "vocab_size",
            "hidden_size": "model_dim",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "attention.num_heads",
            "intermediate_size": "mlp_dim",
            "layer_norm_eps": "norm_eps",
            "tie_word_embeddings": "tie_embeddings",
        },
        _neox,
        _neox_keys,
        {
            **outside("gpt_neox.embed_in", "gpt_neox.final_layer_norm", head="embed_out"),
            **layer(
                "gpt_neox.layers.{i}.",
                {
                    "qkv": "attention.query_key_value",
                    "out": "attention.dense",
                    "up": "mlp.dense_h_to_4h",
                    "down": "mlp.dense_4h_to_h",
                    "attention_norm": "input_layernorm",
                    "mlp_norm": "post_attention_layernorm",
                },
                grouped=True,
            ),
        },
        defaults={
            "tie_word_embeddings": False,
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu",
            "default_theta": 10000.0,
            "rotary_pct": 0.25,
            "attention_bias": True,
            "use_parallel_residual": True,
        },
        prefix="gpt_neox.",
    ),
)
