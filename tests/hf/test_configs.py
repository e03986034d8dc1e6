"""config.json of every family by its dicts alone: other names of fields, sizes that are lacking, windows."""

import sys
from pathlib import Path

import pytest

from jaxlm.errors import UserError
from jaxlm.hf.families import FAMILIES
from jaxlm.hf.family import read_config, write_config

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import CASES, ENCODERS, LLAMA3, MOE, SEQ2SEQ, SIZES

ALL = {**CASES, **{name: (kind, fields) for name, (kind, _, fields) in {**ENCODERS, **SEQ2SEQ}.items()}}
OTHERS = [
    case for case, (kind, fields) in ALL.items() if fields.keys() & set(FAMILIES[kind].spellings.values())
]


def read(kind, fields):
    return read_config(FAMILIES[kind], fields)


@pytest.mark.parametrize("case", OTHERS)
def test_either_name_of_a_field_is_read_and_the_other_one_counts(case):
    kind, fields = ALL[case]
    family = FAMILIES[kind]
    changed = {other: fields[name] for other, name in family.spellings.items() if name in fields}
    assert changed
    want = read(kind, fields)
    wrong = {name: fields[name] + 1 for other, name in family.spellings.items() if other in changed}
    without = {key: value for key, value in fields.items() if key not in wrong}
    assert read(kind, without | changed) == want
    assert read(kind, fields | wrong | changed) == want
    # And what is written over a config with both is the model that was to be written.
    assert read(kind, write_config(family, want, fields | changed | {"vocab_size": 11})) == want


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_size_that_is_lacking_is_asked_for(kind):
    fields = next(fields for other, fields in ALL.values() if other == kind)
    lacking = 0
    for key, ours in FAMILIES[kind].keys.items():
        if ours.rpartition(".")[2] in ("vocab_size", "model_dim", "num_layers", "num_heads"):
            lacking += 1
            with pytest.raises(UserError, match=f"lacks .*{key}"):
                read(kind, {name: value for name, value in fields.items() if name != key})
    assert lacking >= 2


def test_qwen3_moe_has_no_head_dim_of_its_own():
    assert read("qwen3_moe", SIZES | MOE).head_dim == 72 // 6
    assert read("qwen3_moe", SIZES | MOE | {"head_dim": 24}).head_dim == 24


def locals_of(kind, **fields):
    """Which layers have a window, of as many as there are."""
    cfg = read(kind, SIZES | MOE | dict(num_hidden_layers=6, shared_expert_intermediate_size=56) | fields)
    assert cfg.attention.window in (0, fields["sliding_window"])
    again = read(kind, write_config(FAMILIES[kind], cfg, {}))
    assert again == cfg
    return [i for i, (attention, _) in enumerate(cfg.layer_kinds) if attention == "local"]


def test_which_layers_have_a_window():
    used = dict(use_sliding_window=True, sliding_window=4, max_window_layers=3)
    kinds = ["sliding_attention", "full_attention", "full_attention"] * 2
    assert locals_of("qwen3", **used) == locals_of("qwen2", **used) == [3, 4, 5]
    assert locals_of("qwen2_moe", **used) == [0, 2]
    assert locals_of("qwen2_moe", **used, layer_types=kinds) == [0, 3]
    assert locals_of("qwen3_moe", **used) == list(range(6))
    for kind in ("qwen2", "qwen2_moe", "qwen3_moe"):
        assert locals_of(kind, sliding_window=4, use_sliding_window=False) == []
        del used["sliding_window"]
        assert (
            read(
                kind,
                SIZES | MOE | dict(shared_expert_intermediate_size=56) | used | dict(max_window_layers=1),
            ).attention.window
            == 4096
        )
        used["sliding_window"] = 4
    for kind in ("mistral", "mixtral"):
        assert locals_of(kind, sliding_window=4, layer_types=kinds, num_local_experts=5) == list(range(6))


def test_llama_3_without_its_first_length_takes_the_config_s():
    scaling = {key: x for key, x in LLAMA3.items() if key != "original_max_position_embeddings"}
    assert read("llama", SIZES | dict(rope_parameters=scaling)).position.original_length == 64
    assert read("llama", SIZES | dict(rope_parameters=LLAMA3)).position.original_length == 16


def test_which_rotary_field_counts():
    """Of both spellings the older one, with a base of its own; dynamic NTK has no length of its own."""
    older = dict(rope_type="linear", factor=2.0, rope_theta=5e5)
    both = SIZES | dict(rope_theta=1e4, rope_scaling=older, rope_parameters=LLAMA3)
    position = read("llama", both).position
    assert (position.scaling, position.factor, position.theta) == ("linear", 2.0, 5e5)
    dynamic = dict(rope_type="dynamic", factor=2.0)
    fields = SIZES | dict(original_max_position_embeddings=8, rope_parameters=dynamic)
    assert read("llama", fields).position.original_length == 64
    kind, fields = CASES["deepseek-v2"]
    assert read(kind, fields | dict(rope_interleave=False)).position.interleaved
    kind, fields = CASES["deepseek-v3"]
    assert not read(kind, fields | dict(rope_interleave=False)).position.interleaved


def test_gemma_3_does_not_scale_its_local_layers():
    kind, fields = CASES["gemma3"]
    local = dict(rope_type="linear", rope_theta=1e4, factor=4.0)
    rope = fields["rope_parameters"] | {"sliding_attention": local}
    with pytest.raises(UserError, match="rope_type='linear' is not supported"):
        read(kind, fields | {"rope_parameters": rope})
    assert {"Gemma3TextModel", "Gemma3TextForSequenceClassification"} < FAMILIES[kind].tops.keys()


def test_names_of_activations_and_options_that_are_read_over():
    assert read("openai-gpt", CASES["gpt-1"][1] | dict(afn="silu")).activation == "silu"
    gated = {"gelu_python": "geglu_exact", "gelu_accurate": "geglu", "quick_gelu": "quick_geglu"}
    for name, ours in gated.items():
        assert read("llama", SIZES | dict(hidden_act=name)).activation == ours
    fields = CASES["mpt"][1]
    unread = dict(no_bias=False, logit_scale=0.5, attn_config=dict(alibi=False, alibi_bias_max=4, qk_ln=True))
    assert read("mpt", fields | unread) == read("mpt", fields)


def test_other_names_of_fields_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    for kind, family in FAMILIES.items():
        theirs = transformers.AutoConfig.for_model(kind).attribute_map
        read = {*family.keys, *family.defaults, "num_local_experts", "num_experts", "n_routed_experts"}
        theirs = {other: name for other, name in theirs.items() if name in read}
        ours = {other: name for other, name in family.spellings.items() if other != "n_embed"}
        assert ours == theirs, kind
