"""Encoders that differ from BERT: shared layers, projected embeddings, disentangled attention."""

from typing import Any

from jaxlm.errors import check, check_choice
from jaxlm.hf.bert_like import (
    DEFAULTS,
    ENCODER,
    IGNORED,
    KEYS,
    PARTS,
    PREDICTIONS,
    PREDICTIONS_ALIASES,
    PREDICTIONS_BIAS,
    embedded,
    plain,
    plain_keys,
    settled,
)
from jaxlm.hf.family import Family, Fields, HFConfig, Top, labels
from jaxlm.hf.fields import PLAIN, activation, activation_name, refuse
from jaxlm.hf.gpt_like import layer
from jaxlm.hf.packing import Packing, convolution, linear, same
from jaxlm.hf.tops import (
    classes,
    encoder_tops,
    lm,
    pooled,
    pooler,
    rows,
    vocabulary,
    vocabulary_bias,
    with_vocabulary,
)
from jaxlm.model.config import TransformerConfig
from jaxlm.model.disentangled import TERMS


def _projection(name: str) -> dict[str, Packing]:
    return {f"{name}.weight": linear("projection/w"), f"{name}.bias": same("projection/b")}


# --------------------------------------------------------------------------------------------------- ALBERT


def _albert(hf: HFConfig) -> Fields:
    layers, groups, unit = hf["num_hidden_layers"], hf["num_hidden_groups"], hf["inner_group_num"]
    check(layers % groups == 0, f"config.json: num_hidden_groups={groups} must divide {layers} layers")
    check(unit == 1 or groups < layers, f"config.json: inner_group_num={unit} without groups that are shared")
    shared = {"shared_layers": layers // groups, "attention.pattern": ("global",) * unit}
    return {**plain(hf, 0), **shared, "num_layers": layers * unit}


def _albert_keys(cfg: TransformerConfig) -> dict[str, Any]:
    unit = cfg.period
    groups = cfg.num_layers // unit // cfg.shared_layers
    return {
        **plain_keys(cfg),
        "num_hidden_layers": cfg.num_layers // unit,
        "num_hidden_groups": groups,
        "inner_group_num": unit,
    }


def _albert_family() -> Family:
    head = vocabulary("predictions.dense", "predictions.LayerNorm", "predictions.decoder")
    dense = pooler("albert.pooler")
    order = rows({**dense, **classes("sop_classifier.classifier")}, dense="tanh", pairs=True)
    parts = {
        "q": "attention.query",
        "k": "attention.key",
        "v": "attention.value",
        "out": "attention.dense",
        "up": "ffn",
        "down": "ffn_output",
        "attention_norm": "attention.LayerNorm",
        "mlp_norm": "full_layer_layer_norm",
    }
    return Family(
        "albert",
        "AlbertForMaskedLM",
        {**KEYS, "embedding_size": "embed_dim"},
        _albert,
        _albert_keys,
        {
            **embedded("albert."),
            **_projection("albert.encoder.embedding_hidden_mapping_in"),
            **layer("albert.encoder.albert_layer_groups.{unit}.albert_layers.{member}.", parts),
        },
        defaults={
            **DEFAULTS,
            "hidden_act": "gelu_new",
            "embedding_size": 128,
            "num_hidden_groups": 1,
            "inner_group_num": 1,
        },
        prefix="albert.",
        ignored=IGNORED,
        settle=settled,
        alternatives=vocabulary_bias("predictions.bias", "predictions.decoder.bias"),
        aliases={"predictions.bias": ("predictions.decoder.bias",)},
        tops=encoder_tops(
            "Albert",
            head=head,
            sequence=rows({**dense, **classes("classifier")}, dense="tanh"),
            model=pooled("albert.pooler"),
            ForPreTraining=with_vocabulary(order, head),
        ),
    )


# -------------------------------------------------------------------------------------------------- ELECTRA


def _electra(hf: HFConfig) -> Fields:
    width = hf["embedding_size"]
    return {**plain(hf, 0), "embed_dim": 0 if width == hf["hidden_size"] else width}


def _generator(hf: HFConfig) -> Fields:
    refuse(hf, hidden_act="gelu")  # its head knows no other
    return lm(hf)


def _detector(hf: HFConfig) -> Fields:
    """Was this token replaced? One number a token, through the activation of the layers."""
    dense = activation(hf, "hidden_act", PLAIN)["activation"]
    return {"readout.of": "each", "readout.dense": dense, "readout.classes": 1}


def _electra_family() -> Family:
    head = vocabulary("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head")
    detector = pooler("discriminator_predictions.dense")
    detector |= classes("discriminator_predictions.dense_prediction")
    tops = encoder_tops(
        "Electra",
        head=head,
        sequence=rows({**pooler("classifier.dense"), **classes("classifier.out_proj")}, dense="gelu"),
        ForPreTraining=Top("classes", _detector, detector, flat=True),
    )
    tops["ElectraForMaskedLM"] = Top("vocabulary", _generator, head)
    return Family(
        "electra",
        "ElectraForPreTraining",
        KEYS,
        _electra,
        lambda cfg: {**plain_keys(cfg), "embedding_size": cfg.embed_width},
        {
            **embedded("electra."),
            **_projection("electra.embeddings_project"),
            **layer("electra.encoder.layer.{i}.", PARTS),
        },
        defaults={**DEFAULTS, "embedding_size": 128},
        prefix="electra.",
        ignored=IGNORED,
        alternatives=vocabulary_bias("generator_lm_head.bias", "generator_lm_head.bias"),
        tops=tops,
    )


# ------------------------------------------------------------------------------------------------- DeBERTa


def _deberta(hf: HFConfig) -> Fields:
    refuse(hf, conv_groups=1, legacy=True, embedding_size=hf["hidden_size"])
    named = hf.get("pos_att_type") or ()
    named = [term.strip() for term in named.lower().split("|")] if isinstance(named, str) else named
    for term in named:
        check_choice(term, TERMS, "config.json: pos_att_type")
    terms = tuple(term for term in TERMS if term in named)
    fields = {**ENCODER, **activation(hf, "hidden_act", PLAIN)}
    if hf["conv_kernel_size"] > 0:
        fields["convolution.width"] = hf["conv_kernel_size"]
        fields["convolution.activation"] = activation(hf, "conv_act", PLAIN)["activation"]
    if hf["position_biased_input"]:
        fields |= {"position.kind": "learned", "position.max_length": hf["max_position_embeddings"]}
    else:
        fields |= {"position.kind": "none"}
    if not hf["relative_attention"]:
        head_dim = hf["hidden_size"] // hf["num_attention_heads"]
        return {**fields, "attention.scale": (head_dim * (1 + len(terms))) ** -0.5}
    return {
        **fields,
        "disentangled.terms": terms,
        "disentangled.span": _span(hf),
        "disentangled.buckets": max(hf["position_buckets"], 0),
        "disentangled.shared": hf["share_att_key"],
        "disentangled.norm": "layer_norm" in [x.strip() for x in hf["norm_rel_ebd"].lower().split("|")],
    }


def _span(hf: HFConfig) -> int:
    span = hf["max_relative_positions"]
    return span if span >= 1 else hf["max_position_embeddings"]


def _deberta_keys(cfg: TransformerConfig) -> dict[str, Any]:
    d, learned = cfg.disentangled, cfg.position.kind == "learned"
    theirs = {ours: name for name, ours in reversed(PLAIN.items())}.__getitem__
    terms = round(1 / (cfg.attention.scale**2 * cfg.head_dim)) - 1 if cfg.attention.scale else 0
    return {
        "hidden_act": activation_name(cfg, PLAIN),
        "pooler_hidden_act": theirs(cfg.readout.dense or "gelu"),
        "tie_word_embeddings": cfg.tie_embeddings,
        "position_biased_input": learned,
        "max_position_embeddings": cfg.position.max_length if learned else d.span or 512,
        "conv_kernel_size": cfg.convolution.width,
        "conv_act": theirs(cfg.convolution.activation),
        "relative_attention": d.span > 0,
        "max_relative_positions": d.span or -1,
        "position_buckets": d.buckets or -1,
        "pos_att_type": list(d.terms if d.span else TERMS[:terms]),
        "share_att_key": d.shared,
        "norm_rel_ebd": "layer_norm" if d.norm else "none",
    }


def _deberta_family() -> Family:
    def sequence(hf: HFConfig) -> Fields:
        names = {"pooler_hidden_act": "gelu", **hf}
        return {
            "readout.dense": activation(names, "pooler_hidden_act", PLAIN)["activation"],
            "readout.classes": labels(hf),
        }

    parts = {
        "q": "attention.self.query_proj",
        "k": "attention.self.key_proj",
        "v": "attention.self.value_proj",
        "out": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "mlp_norm": "output.LayerNorm",
    }
    distances = {}
    for letter, name in (("k", "key"), ("q", "query")):
        own = f"deberta.encoder.layer.{{i}}.attention.self.pos_{name}_proj"
        distances[f"{own}.weight"] = linear(f"attention/w{letter}_rel")
        distances[f"{own}.bias"] = same(f"attention/b{letter}_rel")
    return Family(
        "deberta-v2",
        "DebertaV2ForMaskedLM",
        KEYS,
        _deberta,
        _deberta_keys,
        {
            **embedded("deberta."),
            **layer("deberta.encoder.layer.{i}.", parts),
            **distances,
            "deberta.encoder.rel_embeddings.weight": same("distances/table"),
            "deberta.encoder.conv.conv.weight": convolution("convolution/w"),
            "deberta.encoder.conv.conv.bias": same("convolution/b"),
            "deberta.encoder.conv.LayerNorm.weight": same("convolution_norm/scale"),
            "deberta.encoder.conv.LayerNorm.bias": same("convolution_norm/bias"),
            "deberta.encoder.LayerNorm.weight": same("distances_norm/scale"),
            "deberta.encoder.LayerNorm.bias": same("distances_norm/bias"),
        },
        defaults={
            **DEFAULTS,
            "layer_norm_eps": 1e-7,
            "type_vocab_size": 0,
            "relative_attention": False,
            "max_relative_positions": -1,
            "position_buckets": -1,
            "share_att_key": False,
            "norm_rel_ebd": "none",
            "position_biased_input": True,
            "conv_kernel_size": 0,
            "conv_act": "tanh",
        },
        prefix="deberta.",
        ignored=(*IGNORED, r"mask_predictions\.", r"^lm_predictions\.", r"position_embeddings"),
        alternatives=PREDICTIONS_BIAS,
        aliases=PREDICTIONS_ALIASES,
        tops=encoder_tops(
            "DebertaV2",
            head=PREDICTIONS,
            sequence=Top("classes", sequence, {**pooler("pooler.dense"), **classes("classifier")}),
        ),
    )


FAMILIES = (_albert_family(), _electra_family(), _deberta_family())
