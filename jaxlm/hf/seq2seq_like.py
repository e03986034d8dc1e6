"""Families with an encoder and a decoder: T5 in its versions, and those that fairseq and Marian trained."""

from collections.abc import Mapping
from typing import Any

from jaxlm.errors import check, check_choice
from jaxlm.hf.family import Family, Fields, HFConfig, Top
from jaxlm.hf.fields import PLAIN, activation, activation_name, refuse
from jaxlm.hf.gpt_like import biases
from jaxlm.hf.packing import Packing, linear, row, same
from jaxlm.model.config import TransformerConfig
from jaxlm.model.layers import ACTIVATIONS

_LETTERS = ("q", "k", "v", "o")
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of a table that both stacks read


def _attention(prefix: str, leaf: str, names: tuple[str, ...]) -> dict[str, Packing]:
    """Weights and biases of one attention from the names of its q, k, v and output."""
    out = {}
    for letter, name in zip(_LETTERS, names, strict=True):
        out[f"{prefix}.{name}.weight"] = linear(f"{leaf}/w{letter}", inputs=2 if letter == "o" else 1)
        out[f"{prefix}.{name}.bias"] = same(f"{leaf}/b{letter}")
    return out


def _norm(name: str, leaf: str) -> dict[str, Packing]:
    return {f"{name}.weight": same(f"{leaf}/scale"), f"{name}.bias": same(f"{leaf}/bias")}


# ---------------------------------------------------------------------------------------------- T5 and mT5

_T5_KEYS = {
    "vocab_size": "vocab_size",
    "d_model": "model_dim",
    "d_kv": "attention.head_dim",
    "d_ff": "mlp_dim",
    "num_layers": "encoder.num_layers",
    "num_heads": "attention.num_heads",
    "relative_attention_num_buckets": "position.num_buckets",
    "relative_attention_max_distance": "position.max_distance",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
# A feed_forward_proj -> name in jaxlm.model.layers.ACTIVATIONS.
_PROJECTIONS = {
    "relu": "relu",
    "gated-gelu": "geglu",
    "gelu": "gelu",
    "silu": "silu",
    "gated-silu": "swiglu",
    "gated-relu": "reglu",
}


def _t5_tensors() -> dict[str, Packing]:
    out = {"shared.weight": same("embed/table"), "lm_head.weight": linear("head/w")}
    for side, own in (("encoder", "encoder/"), ("decoder", "")):
        layer = f"{side}.block.{{i}}.layer"
        parts = [("SelfAttention", "attention", "attention_norm")]
        parts += [("EncDecAttention", "cross_attention", "cross_norm")] if side == "decoder" else []
        for k, (theirs, ours, norm) in enumerate(parts):
            out |= _attention(f"{layer}.{k}.{theirs}", own + ours, _LETTERS)
            out[f"{layer}.{k}.layer_norm.weight"] = same(f"{own}{norm}/scale")
        k = len(parts)
        out[f"{layer}.{k}.layer_norm.weight"] = same(f"{own}mlp_norm/scale")
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        out[bias] = same(f"{own}position_bias/table")
        out[f"{side}.final_layer_norm.weight"] = same(f"{own}final_norm/scale")
    return out


def _t5_mlps(cfg: TransformerConfig) -> dict[str, Packing]:
    """Two matrices into an MLP with a gate, one into a plain one."""
    gated = ACTIVATIONS[cfg.activation][1]
    names = {"wo": "w_down", **({"wi_0": "w_gate", "wi_1": "w_up"} if gated else {"wi": "w_up"})}
    return {
        f"{side}.block.{{i}}.layer.{k}.DenseReluDense.{theirs}.weight": linear(f"{own}mlp/{ours}")
        for side, own, k in (("encoder", "encoder/", 1), ("decoder", "", 2))
        for theirs, ours in names.items()
    }


def _t5_settled(hf: HFConfig, shapes: Mapping[str, Any]) -> HFConfig:
    """The files say whether the head is the table: configs of untied models may deny it."""
    scaled = hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings", True) is not False)
    tied = "lm_head.weight" not in shapes
    return {**hf, "tie_word_embeddings": tied, "scale_decoder_outputs": scaled}


def _t5(hf: HFConfig, scaled: bool) -> Fields:
    check_choice(hf["feed_forward_proj"], _PROJECTIONS, "config.json: feed_forward_proj")
    refuse(hf, is_decoder=False)
    layers = hf.get("num_decoder_layers")
    return {
        "num_layers": hf["num_layers"] if layers is None else layers,
        "activation": _PROJECTIONS[hf["feed_forward_proj"]],
        "attention.scale": 1.0,  # it is in the initial weights
        "position.kind": "t5",
        "logit_scale": hf["d_model"] ** -0.5 if scaled else 1.0,
    }


def _t5_keys(cfg: TransformerConfig) -> dict[str, Any]:
    names = [name for name, ours in _PROJECTIONS.items() if ours == cfg.activation]
    check(bool(names), f"model.activation={cfg.activation!r} has no name in this family")
    return {
        "feed_forward_proj": names[0],
        "num_decoder_layers": cfg.num_layers,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
    }


def _t5_family(model_type: str, name: str, projection: str, *, scales: bool) -> Family:
    """T5 multiplies what enters a tied head by D ** -0.5; mT5 and T5 1.1 do not."""

    def scaled(hf: HFConfig) -> bool:
        return scales and hf.get("scale_decoder_outputs", hf["tie_word_embeddings"] is not False)

    def write(cfg: TransformerConfig) -> dict[str, Any]:
        out = _t5_keys(cfg)
        return {**out, "scale_decoder_outputs": cfg.logit_scale != 1.0} if scales else out

    def settle(hf: HFConfig, shapes: Mapping[str, Any]) -> HFConfig:
        settled = _t5_settled(hf, shapes)
        if not scales:
            settled = {key: value for key, value in settled.items() if key != "scale_decoder_outputs"}
        return settled

    return Family(
        model_type,
        f"{name}ForConditionalGeneration",
        _T5_KEYS,
        lambda hf: _t5(hf, scaled(hf)),
        write,
        _t5_tensors(),
        defaults={
            "feed_forward_proj": projection,
            "tie_word_embeddings": True,
            "d_kv": 64,
            "layer_norm_epsilon": 1e-6,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
        },
        spellings={
            "hidden_size": "d_model",
            "num_attention_heads": "num_heads",
            "num_hidden_layers": "num_layers",
            "head_dim": "d_kv",
        },
        prefix="",
        bare=(f"{name}Model",),
        ignored=(r"EncDecAttention\.relative_attention_bias\.weight$",),
        alternatives=_t5_mlps,
        aliases={"shared.weight": _COPIES},
        settle=settle,
    )


# ------------------------------------------------------------------------------- BART, Marian and M2M-100

_KEYS = {
    "d_model": "model_dim",
    "encoder_layers": "encoder.num_layers",
    "encoder_attention_heads": "encoder.num_heads",
    "encoder_ffn_dim": "encoder.mlp_dim",
    "decoder_layers": "num_layers",
    "decoder_attention_heads": "attention.num_heads",
    "decoder_ffn_dim": "mlp_dim",
    "scale_embedding": "scale_embeddings",
    "tie_word_embeddings": "tie_embeddings",
}
_DEFAULTS = {
    "tie_word_embeddings": True,
    "activation_function": "gelu",
    "max_position_embeddings": 1024,
    "share_encoder_decoder_embeddings": True,
}
_SPELLINGS = {
    "hidden_size": "d_model",
    "num_attention_heads": "encoder_attention_heads",
    "num_hidden_layers": "encoder_layers",
}
_TABLE = "model.shared.weight"


def _tensors() -> dict[str, Packing]:
    out = {
        "lm_head.weight": linear("head/w"),
        "final_logits_bias": row("head/b"),
    }
    for side, own in (("encoder", "encoder/"), ("decoder", "")):
        layer = f"model.{side}.layers.{{i}}"
        parts = {"self_attn": "attention", **({"encoder_attn": "cross_attention"} if not own else {})}
        for theirs, ours in parts.items():
            out |= _attention(f"{layer}.{theirs}", own + ours, ("q_proj", "k_proj", "v_proj", "out_proj"))
            out |= _norm(f"{layer}.{theirs}_layer_norm", f"{own}{ours.removesuffix('_attention')}_norm")
        for theirs, ours in (("fc1", "up"), ("fc2", "down")):
            out[f"{layer}.{theirs}.weight"] = linear(f"{own}mlp/w_{ours}")
            out[f"{layer}.{theirs}.bias"] = same(f"{own}mlp/b_{ours}")
        out |= _norm(f"{layer}.final_layer_norm", f"{own}mlp_norm")
        out |= _norm(f"model.{side}.layer_norm", f"{own}final_norm")
        out |= _norm(f"model.{side}.layernorm_embedding", f"{own}embed_norm")
        out[f"model.{side}.embed_positions.weight"] = same(f"{own}embed/positions")
    return out


def _plain(hf: HFConfig) -> Fields:
    refuse(hf, is_decoder=False)
    return {
        "norm": "layernorm",
        "norm_eps": 1e-5,
        **biases(True),
        **activation(hf, "activation_function", PLAIN),
    }


def _plain_keys(cfg: TransformerConfig) -> dict[str, Any]:
    return {"activation_function": activation_name(cfg, PLAIN), "is_encoder_decoder": True}


def _tops(whole: str, bare: str) -> dict[str, Top]:
    """The class without a head has no bias on the logits either."""
    return {
        whole: Top("vocabulary", lambda hf: {"head_bias": True}),
        bare: Top("", lambda hf: {"head_bias": False}),
    }


def _post(hf: HFConfig, *, embed_norm: bool) -> Fields:
    """BART's and Marian's."""
    refuse(hf, normalize_before=False, add_final_layer_norm=False, add_bias_logits=False)
    refuse(hf, normalize_embedding=embed_norm)
    return {
        **_plain(hf),
        "norm_position": "post",
        "embed_norm": embed_norm,
    }


_SHARES = "share_encoder_decoder_embeddings"  # Marian's field; here of all three


def _split(hf: HFConfig, shapes: Mapping[str, Any]) -> HFConfig:
    """Without ties the two stacks have tables of their own, if the files hold them, whatever is shared."""
    own = all(any(name.endswith(copy) for name in shapes) for copy in _COPIES)
    if hf.get("tie_word_embeddings", True) or not own or not hf.get(_SHARES, True):
        return hf
    return {**hf, _SHARES: False, "decoder_vocab_size": hf.get("vocab_size")}


def _table_sizes(hf: HFConfig) -> Fields:
    if hf[_SHARES]:
        return {"vocab_size": hf["vocab_size"], "encoder.vocab_size": 0}
    decoder = hf.get("decoder_vocab_size") or hf["vocab_size"]
    return {"vocab_size": decoder, "encoder.vocab_size": hf["vocab_size"]}


def _table_keys(cfg: TransformerConfig) -> dict[str, Any]:
    encoder = cfg.encoder.vocab_size
    sizes = {"vocab_size": encoder or cfg.vocab_size, "decoder_vocab_size": cfg.vocab_size}
    return {**sizes, _SHARES: not encoder}


def _tables(cfg: TransformerConfig) -> dict[str, Packing]:
    if not cfg.encoder.vocab_size:
        return {_TABLE: same("embed/table")}
    encoder, decoder = (f"model.{name}" for name in _COPIES)
    return {encoder: same("encoder/embed/table"), decoder: same("embed/table")}


_UNUSED = r"^(model\.)?shared\.weight$"  # a table that both stacks would share, where each has its own
_BART = Family(
    "bart",
    "BartForConditionalGeneration",
    {"vocab_size": "vocab_size", "max_position_embeddings": "position.max_length", **_KEYS},
    lambda hf: {
        **_post(hf, embed_norm=True),
        **_table_sizes(hf),
        "position.kind": "learned",
        "position.offset": 2,
    },
    lambda cfg: {**_plain_keys(cfg), **_table_keys(cfg)},
    _tensors(),
    defaults={**_DEFAULTS, "scale_embedding": False},
    spellings=_SPELLINGS,
    tops=_tops("BartForConditionalGeneration", "BartModel"),
    aliases={_TABLE: tuple(f"model.{name}" for name in _COPIES)},
    ignored=(_UNUSED,),
    zeros=("final_logits_bias",),
    alternatives=_tables,
    settle=_split,
)


def _marian(hf: HFConfig) -> Fields:
    refuse(hf, static_position_embeddings=True)
    return {
        **_post(hf, embed_norm=False),
        "position.kind": "sinusoidal",
        "position.sines": "halves",
        **_table_sizes(hf),
    }


_MARIAN = Family(
    "marian",
    "MarianMTModel",
    _KEYS,
    _marian,
    lambda cfg: {**_plain_keys(cfg), **_table_keys(cfg)},
    _tensors(),
    defaults={**_DEFAULTS, "scale_embedding": False},
    spellings=_SPELLINGS,
    tops=_tops("MarianMTModel", "MarianModel"),
    aliases={_TABLE: tuple(f"model.{name}" for name in _COPIES)},
    ignored=(r"embed_positions\.weight$", _UNUSED),
    zeros=("final_logits_bias",),
    alternatives=_tables,
    settle=_split,
)


def _m2m(hf: HFConfig) -> Fields:
    padding = hf["pad_token_id"]
    check(
        padding is not None, "config.json: pad_token_id=null, and positions are counted from the row after it"
    )
    return {
        **_plain(hf),
        **_table_sizes(hf),
        "position.kind": "sinusoidal",
        "position.sines": "inclusive",
        "position.offset": padding + 1,
    }


_M2M = Family(
    "m2m_100",
    "M2M100ForConditionalGeneration",
    {"vocab_size": "vocab_size", **_KEYS},
    _m2m,
    lambda cfg: {**_plain_keys(cfg), **_table_keys(cfg), "pad_token_id": cfg.position.offset - 1},
    _tensors(),
    defaults={**_DEFAULTS, "scale_embedding": True, "activation_function": "relu", "pad_token_id": 1},
    spellings=_SPELLINGS,
    bare=("M2M100Model",),
    aliases={_TABLE: tuple(f"model.{name}" for name in _COPIES)},
    ignored=(r"embed_positions\.weights?$", _UNUSED),
    alternatives=_tables,
    settle=_split,
)


FAMILIES = (
    _t5_family("t5", "T5", "relu", scales=True),
    _t5_family("mt5", "MT5", "gated-gelu", scales=False),
    _BART,
    _MARIAN,
    _M2M,
)
