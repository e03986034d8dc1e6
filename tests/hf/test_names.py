"""Which tensors of a file are a model's: other names, lacking and surplus ones, heads that are tied."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.hf.families import family_of
from jaxlm.hf.family import read_config
from jaxlm.hf.files import Source, open_folder, write_folder
from jaxlm.hf.transfer import layout_of, names_in, settled

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import CASES, ENCODERS, SEQ2SEQ


def source_of(case, change=lambda tensors: None, **fields):
    """Family and source of a case whose tensors are numbered, after a change of these."""
    kind, *top, theirs = {**CASES, **ENCODERS, **SEQ2SEQ}[case]
    hf = {"model_type": kind, **theirs, **({"architectures": top} if top else {}), **fields}
    family = family_of(hf)
    shapes = {name: entry.shape for name, entry in layout_of(read_config(family, hf), family).items()}
    tensors = {name: np.full(shape, i + 1, np.float32) for i, (name, shape) in enumerate(shapes.items())}
    change(tensors)
    shapes = {name: x.shape for name, x in tensors.items()}
    return family, Source(Path(case), hf, shapes, "float32", tensors.__getitem__)


def names_of(family, source):
    hf = settled(family, source)
    cfg = read_config(family, hf)
    return names_in(family, layout_of(cfg, family), dataclasses.replace(source, config=hf))[0]


def with_head(name, like, value):
    def change(tensors):
        tensors[name] = np.full_like(tensors[like], value)

    return change


HEADS = {
    "gpt2": ("lm_head.weight", "transformer.wte.weight"),
    "llama-tied-biases": ("lm_head.weight", "model.embed_tokens.weight"),
    "distilbert": ("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_that_differs_from_the_table_is_its_own(case):
    head, table = HEADS[case]
    family, plain = source_of(case)
    assert head not in plain.shapes
    assert read_config(family, settled(family, plain)).tie_embeddings
    first = plain.read(table).ravel()[0]
    family, same = source_of(case, with_head(head, table, first))
    assert settled(family, same) == same.config
    assert head not in names_of(family, same).values()
    family, other = source_of(case, with_head(head, table, first + 1))
    assert settled(family, other) == {**other.config, "tie_word_embeddings": False}
    assert head in names_of(family, other).values()


@pytest.mark.parametrize("case", HEADS)
def test_a_tied_model_s_file_may_hold_the_head_alone(case):
    head, table = HEADS[case]
    family, source = source_of(case, lambda tensors: tensors.update({head: tensors.pop(table)}))
    assert names_of(family, source)[table] == head


@pytest.mark.parametrize(
    ("case", "ours", "theirs"),
    [
        ("bert", "cls.predictions.bias", "cls.predictions.decoder.bias"),
        ("roberta", "lm_head.bias", "lm_head.decoder.bias"),
        ("albert-ForMaskedLM", "predictions.bias", "predictions.decoder.bias"),
        ("deberta-ForMaskedLM", "cls.predictions.bias", "cls.predictions.decoder.bias"),
    ],
)
def test_a_tied_head_s_bias_has_two_names(case, ours, theirs):
    family, source = source_of(case, lambda tensors: tensors.update({theirs: tensors.pop(ours)}))
    assert names_of(family, source)[ours] == theirs
    family, source = source_of(case, with_head(theirs, ours, 0.0))
    with pytest.raises(UserError, match=f"{ours} and {theirs} differ"):
        names_of(family, source)


def test_buffers_are_read_over_and_a_bias_of_zeros_may_be_lacking():
    buffers = {
        "gpt2": ("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"),
        "falcon-7b": ("transformer.h.0.self_attention.rotary_emb.inv_freq",),
        "bloom": ("transformer.h.0.self_attention.masked_bias",),
        "opt": ("model.decoder.version",),
        "deberta-ForMaskedLM": ("mask_predictions.dense.weight", "deberta.embeddings.position_ids"),
    }
    for case, names in buffers.items():
        family, source = source_of(
            case, lambda tensors, n=names: tensors.update(dict.fromkeys(n, np.ones(2)))
        )
        assert not set(names) & set(names_of(family, source).values())
    family, source = source_of("opt", lambda tensors: tensors.update(surplus=np.ones(2)))
    with pytest.raises(UserError, match="1 surplus"):
        names_of(family, source)
    for case in ("bart", "marian"):
        family, source = source_of(case, lambda tensors: tensors.pop("final_logits_bias"))
        assert "final_logits_bias" in names_of(family, source)
        family, source = source_of(case, lambda tensors: tensors.pop("model.decoder.layers.0.fc1.bias"))
        with pytest.raises(UserError, match="1 missing"):
            names_of(family, source)


def test_masks_have_no_say_in_the_dtype_of_the_weights(tmp_path):
    pytest.importorskip("safetensors")
    tensors = {"w": np.ones((2, 3), np.float16), "h.0.attn.bias": np.ones((8, 8), bool)}
    made = {name: (x.shape, lambda x=x: x) for name, x in tensors.items()}
    write_folder(tmp_path, {"model_type": "gpt2"}, made, itemsize=2)
    with open_folder(tmp_path) as source:
        assert source.dtype == "float16"
        assert source.odd == {"h.0.attn.bias": "BOOL"}


def test_a_weight_that_is_no_float_is_refused():
    family, source = source_of("gpt2")
    source = dataclasses.replace(source, odd={"transformer.wte.weight": "I8"})
    with pytest.raises(UserError, match="is I8"):
        names_of(family, source)
