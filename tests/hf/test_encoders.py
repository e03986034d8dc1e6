"""Encoders and what stands on top of models, against `transformers`, and back."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="parity needs the extra `pip install 'jaxlm[parity]'`")
pytest.importorskip("transformers", reason="parity needs the extra `pip install 'jaxlm[parity]'`")
import torch
import transformers
from safetensors import safe_open

import jaxlm.hf
from jaxlm.errors import UserError
from jaxlm.hf.family import read_config, write_config
from jaxlm.hf.pretrained import save
from jaxlm.tree import named_leaves

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import ENCODERS
from test_families import T, close, made, padded, rows  # noqa: F401  `made` is a fixture


def theirs_of(model, row, **given):
    """(what its outputs call logits, what it says of the row beside them, pooled, hidden states)."""
    with torch.no_grad():
        out = model(torch.tensor(row)[None], output_hidden_states=True, **given)
    logits = next((out[k] for k in ("logits", "prediction_logits") if k in out), None)
    if "start_logits" in out:
        logits = torch.stack([out.start_logits, out.end_logits], -1)
    beside = next((out[k] for k in ("seq_relationship_logits", "sop_logits") if k in out), None)
    parts = logits, beside, out.get("pooler_output"), *out.hidden_states
    return [None if x is None else x[0].numpy() for x in parts]


@pytest.mark.parametrize("case", ENCODERS)
def test_what_it_says_is_theirs_on_either_side_of_padding(case, made):  # noqa: F811
    _, model, ours = made(case)
    kinds = ours.cfg.token_types
    types = np.random.default_rng(1).integers(0, max(kinds, 1), (3, T))
    some, worst = rows(), {}
    for left in (True, False):
        ids, mask = padded(some, left)
        given = {"attention_mask": mask, "token_type_ids": types if kinds else None}
        states = ours.hidden_states(ids, **given)
        theirs = []
        for i, row in enumerate(some):
            own = {"token_type_ids": torch.tensor(types[i][mask[i] == 1])[None]} if kinds else {}
            theirs.append(theirs_of(model, row, **own))
        said = {
            "logits": ours.logits(ids, **given) if theirs[0][0] is not None else None,
            "beside": ours.next_sentence_logits(ids, **given) if theirs[0][1] is not None else None,
            "pooled": ours.pooled(ids, **given) if theirs[0][2] is not None else None,
        }
        assert len(theirs[0]) == 3 + len(states)
        said |= {f"hidden {k}": state for k, state in enumerate(states)}
        for i in range(3):
            for (name, mine), want in zip(said.items(), theirs[i], strict=True):
                if mine is not None:
                    mine = mine[i][mask[i] == 1] if mine.shape[1:2] == (T,) else mine[i]
                    assert mine.shape == want.shape, name
                    worst[name] = max(worst.get(name, 0), close(mine, want))
    print(case, {name: round(float(x), 3) for name, x in worst.items()})
    assert all(x < 1 for x in worst.values()), worst


@pytest.mark.parametrize("case", ENCODERS)
def test_import_and_export_are_inverse(case, made, tmp_path):  # noqa: F811
    folder, model, ours = made(case)
    save(ours, tmp_path / "kept")
    before, after = (safe_open(p / "model.safetensors", "np") for p in (folder, tmp_path / "kept"))
    assert sorted(before.keys()) == sorted(after.keys())
    for name in before.keys():  # noqa: SIM118
        np.testing.assert_array_equal(before.get_tensor(name), after.get_tensor(name))
    # Without the config.json that it came with: one made from the table alone.
    fresh = write_config(ours.family, ours.cfg, {})
    assert read_config(ours.family, fresh) == read_config(ours.family, ours.config)
    assert fresh["architectures"] == [type(model).__name__]
    (tmp_path / "kept" / "config.json").write_text(json.dumps(fresh))
    again = type(model).from_pretrained(tmp_path / "kept", attn_implementation="eager").eval()
    for a, b in zip(theirs_of(again, rows()[0]), theirs_of(model, rows()[0]), strict=True):
        assert (a is None and b is None) or close(a, b) < 0.01  # bits depend on where weights lie in memory


def test_what_a_class_does_not_say_is_refused(made):  # noqa: F811
    ids, mask = padded(rows(), left=False)
    *_, rows_only = made("bert-ForSequenceClassification")
    *_, bare = made("llama-Model")
    with pytest.raises(UserError, match="BertForSequenceClassification has no classes of tokens"):
        rows_only.token_logits(ids, mask)
    with pytest.raises(UserError, match="LlamaModel has no head: use hidden_states"):
        bare.logits(ids, mask)
    np.testing.assert_array_equal(bare.last_pooled(ids, mask)[2], bare.hidden_states(ids, mask)[-1][2, 4])
    config = {**rows_only.config, "architectures": ["BertForSequenceClasification"]}
    with pytest.raises(UserError, match="did you mean 'BertForSequenceClassification'"):
        rows_only.family.topped(config)


@pytest.mark.parametrize("what", ["untied", "unpooled"])
def test_what_config_json_may_change_on_top(what, tmp_path):
    sizes = dict(vocab_size=307, hidden_size=24, num_hidden_layers=1, num_attention_heads=3)
    config = transformers.BertConfig(**sizes, intermediate_size=40, tie_word_embeddings=what != "untied")
    torch.manual_seed(0)
    if what == "untied":
        model = transformers.BertForMaskedLM(config).eval()
        torch.nn.init.normal_(model.cls.predictions.decoder.bias)
    else:
        model = transformers.BertModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    ours = jaxlm.hf.load(tmp_path)
    ids, mask = padded(rows(), left=True)
    assert ours.cfg.tie_embeddings == (what != "untied")
    assert not ours.cfg.readout.dense
    logits, _, _, *states = theirs_of(model, rows()[1])
    assert close(ours.hidden_states(ids, mask)[-1][1][mask[1] == 1], states[-1]) < 1
    if what == "untied":
        assert close(ours.logits(ids, mask)[1][mask[1] == 1], logits) < 1
    save(ours, tmp_path / "again")
    again = jaxlm.hf.load(tmp_path / "again")
    for (name, a), (_, b) in zip(named_leaves(ours.params), named_leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
