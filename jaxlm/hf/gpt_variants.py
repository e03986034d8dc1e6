"""OPT, BLOOM, MPT and Falcon: GPT's layout with other positions, branches or joined heads."""

from typing import Any

from jaxlm.hf.family import Family, Fields, HFConfig
from jaxlm.hf.fields import PLAIN, activation, activation_name, refuse, rope, rope_keys
from jaxlm.hf.gpt_like import LAYERNORM, TIED, biases, layer, learned, outside
from jaxlm.hf.packing import Packing, same
from jaxlm.model.config import TransformerConfig

# ------------------------------------------------------------------------------------- OPT, BLOOM, MPT


def _opt(hf: HFConfig) -> Fields:
    same_width = hf.get("word_embed_proj_dim", hf["hidden_size"])
    refuse({"word_embed_proj_dim": same_width}, word_embed_proj_dim=hf["hidden_size"])
    refuse(hf, _remove_final_layer_norm=False)
    return {
        "norm": "layernorm" if hf["layer_norm_elementwise_affine"] else "layernorm_plain",
        **biases(hf["enable_bias"]),
        "norm_position": "pre" if hf["do_layer_norm_before"] else "post",
        **learned(hf["max_position_embeddings"], offset=2),
        **activation(hf, "activation_function", PLAIN),
        "norm_eps": 1e-5,
    }


def _opt_keys(cfg: TransformerConfig) -> dict[str, Any]:
    return {
        "max_position_embeddings": cfg.position.max_length,
        "word_embed_proj_dim": cfg.model_dim,
        "enable_bias": cfg.mlp_bias,
        "do_layer_norm_before": cfg.norm_position == "pre",
        "layer_norm_elementwise_affine": cfg.norm == "layernorm",
        "activation_function": activation_name(cfg, PLAIN),
    }


def _bloom(hf: HFConfig) -> Fields:
    refuse(hf, apply_residual_connection_post_layernorm=False)
    return {
        **LAYERNORM,
        **biases(True),
        "mlp_dim": 4 * hf["hidden_size"],
        "position.kind": "alibi",
        "embed_norm": True,
        "activation": "gelu_tanh",
    }


def _mpt(hf: HFConfig) -> Fields:
    attention = hf.get("attn_config") or {}
    refuse(attention, attn_type="multihead_attention")
    # `transformers` reads none of alibi, alibi_bias_max, qk_ln, prefix_lm, no_bias, logit_scale.
    return {
        "norm": "layernorm_scale",
        "mlp_dim": 4 * hf["d_model"],  # whatever expansion_ratio says: `transformers` does not read it
        "position.kind": "alibi",
        "activation": "gelu",
        "attention.clip_qkv": float(attention.get("clip_qkv") or 0.0),
        "attention.scale": float(attention.get("softmax_scale") or 0.0),
    }


def _mpt_keys(cfg: TransformerConfig) -> dict[str, Any]:
    attention = {"alibi": True, "alibi_bias_max": 8, "clip_qkv": cfg.attention.clip_qkv or None}
    return {
        "attn_config": {**attention, "softmax_scale": cfg.attention.scale or None},
        "no_bias": True,
    }


# ------------------------------------------------------------------------------------------------ Falcon


def _falcon(hf: HFConfig) -> Fields:
    new, heads = hf["new_decoder_architecture"], hf.get("num_attention_heads") or hf["n_head"]
    kv = (hf.get("num_kv_heads") or heads) if new else 1 if hf["multi_query"] else heads
    norms = hf.get("num_ln_in_parallel_attn") or 2
    parallel = hf["parallel_attn"] or new
    head_dim = hf["hidden_size"] // heads
    alibi = {"position.kind": "alibi", "position.bias_scale": head_dim**-0.5}
    return {
        **LAYERNORM,
        **biases(hf["bias"]),
        **(alibi if hf["alibi"] else rope(hf)),
        **activation(hf, "activation", PLAIN),
        "num_layers": hf.get("num_hidden_layers") or hf["n_layer"],
        "attention.num_heads": heads,
        "attention.num_kv_heads": kv,
        "parallel_block": parallel,
        "parallel_norms": new and norms == 2,
    }


def _falcon_keys(cfg: TransformerConfig) -> dict[str, Any]:
    heads, kv, alibi = cfg.attention.num_heads, cfg.attention.kv_heads, cfg.position.kind == "alibi"
    new = cfg.parallel_norms or kv not in (1, heads)
    rotation = {} if alibi else rope_keys(cfg)
    rotation.pop("partial_rotary_factor", None)
    return {
        **rotation,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": heads,
        "num_kv_heads": kv,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (2 if cfg.parallel_norms else 1) if new else None,
        "multi_query": kv == 1,
        "parallel_attn": cfg.parallel_block,
        "alibi": alibi,
        "bias": cfg.mlp_bias,
        "activation": activation_name(cfg, PLAIN),
    }


_FALCON_PARTS = {
    "qkv": "self_attention.query_key_value",
    "out": "self_attention.dense",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}


def _falcon_norms(cfg: TransformerConfig) -> dict[str, Packing]:
    one = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    two = {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"}
    return layer("transformer.h.{i}.", two if cfg.parallel_norms else one)


# --------------------------------------------------------------------------------------------- the table

FAMILIES = (
    Family(
        "opt",
        "OPTForCausalLM",
        {
            "vocab_size": "vocab_size",
            "hidden_size": "model_dim",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "attention.num_heads",
            "ffn_dim": "mlp_dim",
            "tie_word_embeddings": "tie_embeddings",
        },
        _opt,
        _opt_keys,
        {
            **outside("model.decoder.embed_tokens", "model.decoder.final_layer_norm"),
            "model.decoder.embed_positions.weight": same("embed/positions"),
            **layer(
                "model.decoder.layers.{i}.",
                {
                    **{x: f"self_attn.{x}_proj" for x in "qkv"},
                    "out": "self_attn.out_proj",
                    "up": "fc1",
                    "down": "fc2",
                    "attention_norm": "self_attn_layer_norm",
                    "mlp_norm": "final_layer_norm",
                },
            ),
        },
        defaults={
            **TIED,
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "max_position_embeddings": 2048,
        },
    ),
    Family(
        "bloom",
        "BloomForCausalLM",
        {
            "vocab_size": "vocab_size",
            "hidden_size": "model_dim",
            "n_layer": "num_layers",
            "n_head": "attention.num_heads",
            "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tie_embeddings",
        },
        _bloom,
        lambda cfg: {},
        {
            **outside(
                "transformer.word_embeddings",
                "transformer.ln_f",
                embed_norm="transformer.word_embeddings_layernorm",
            ),
            **layer(
                "transformer.h.{i}.",
                {
                    **_FALCON_PARTS,
                    "attention_norm": "input_layernorm",
                    "mlp_norm": "post_attention_layernorm",
                },
                grouped=True,
            ),
        },
        defaults={**TIED, "layer_norm_epsilon": 1e-5},
        spellings={"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
        prefix="transformer.",
    ),
    Family(
        "mpt",
        "MptForCausalLM",
        {
            "vocab_size": "vocab_size",
            "d_model": "model_dim",
            "n_layers": "num_layers",
            "n_heads": "attention.num_heads",
            "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tie_embeddings",
        },
        _mpt,
        _mpt_keys,
        {
            **outside("transformer.wte", "transformer.norm_f"),
            **layer(
                "transformer.blocks.{i}.",
                {
                    "qkv": "attn.Wqkv",
                    "out": "attn.out_proj",
                    "up": "ffn.up_proj",
                    "down": "ffn.down_proj",
                    "attention_norm": "norm_1",
                    "mlp_norm": "norm_2",
                },
            ),
        },
        defaults={**TIED, "layer_norm_epsilon": 1e-5},
        spellings={
            "hidden_size": "d_model",
            "num_attention_heads": "n_heads",
            "num_hidden_layers": "n_layers",
        },
        prefix="transformer.",
    ),
    Family(
        "falcon",
        "FalconForCausalLM",
        {
            "vocab_size": "vocab_size",
            "hidden_size": "model_dim",
            "ffn_hidden_size": "mlp_dim",
            "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tie_embeddings",
        },
        _falcon,
        _falcon_keys,
        {
            **outside("transformer.word_embeddings", "transformer.ln_f"),
            **layer("transformer.h.{i}.", _FALCON_PARTS, grouped=True),
        },
        defaults={
            **TIED,
            "default_theta": 10000.0,
            "layer_norm_epsilon": 1e-5,
            "activation": "gelu",
            "alibi": False,
            "bias": False,
            "multi_query": True,
            "parallel_attn": True,
            "new_decoder_architecture": False,
        },
        spellings={"n_embed": "hidden_size"},
        prefix="transformer.",
        alternatives=_falcon_norms,
    ),
)
