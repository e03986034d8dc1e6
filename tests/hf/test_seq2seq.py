"""Families with an encoder against `transformers`: logits, hidden states, continuations, and back."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="parity needs the extra `pip install 'jaxlm[parity]'`")
pytest.importorskip("transformers", reason="parity needs the extra `pip install 'jaxlm[parity]'`")
pytest.importorskip("safetensors")
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jaxlm.hf
from jaxlm.errors import UserError
from jaxlm.hf.family import read_config, write_config
from jaxlm.hf.pretrained import save
from jaxlm.hf.seq2seq import Seq2Seq

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import SEQ2SEQ, make

INPUTS, TOKENS = (13, 8, 5), (9, 4, 7)
WITH_HEAD = [case for case in SEQ2SEQ if not case.endswith("bare")]
ROOM = {}  # case -> (folder, their model, ours), made once


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    def one(case):
        if case not in ROOM:
            folder = tmp_path_factory.mktemp(case)
            ROOM[case] = (folder, make(case, folder), jaxlm.hf.load(folder))
        return ROOM[case]

    return one


def rows(lengths, seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 300, n) for n in lengths]


def padded(rows, left, pad):
    columns = max(map(len, rows))
    ids, mask = np.full((len(rows), columns), pad), np.zeros((len(rows), columns), int)
    for i, row in enumerate(rows):
        where = slice(columns - len(row), columns) if left else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def error(ours, theirs):
    """In units of 1e-4 and a hundred-thousandth of the largest value."""
    theirs = theirs.numpy()
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / (1e-4 + 1e-5 * np.abs(theirs).max()))


@pytest.mark.parametrize("case", SEQ2SEQ)
def test_logits_and_hidden_states_are_theirs_on_either_side_of_padding(case, made):
    _, model, ours = made(case)
    assert isinstance(ours, Seq2Seq)
    pad = model.config.pad_token_id
    inputs, tokens = rows(INPUTS, 0), rows(TOKENS, 1)
    wanted = []
    for a, b in zip(inputs, tokens, strict=True):
        with torch.no_grad():
            given = dict(input_ids=torch.tensor(a)[None], decoder_input_ids=torch.tensor(b)[None])
            wanted.append(model(**given, output_hidden_states=True))
    worst = {}

    def note(name, mine, mask, theirs):
        worst[name] = max(worst.get(name, 0.0), error(mine[mask == 1], theirs[0]))

    for left in (True, False):
        given = (*padded(inputs, left, pad), *padded(tokens, left, pad))
        logits = ours.logits(*given) if case in WITH_HEAD else None
        states = ours.hidden_states(*given) if left else ()
        encoder = ours.encoder_hidden_states(*given[:2]) if left else ()
        for i, want in enumerate(wanted):
            if logits is not None:
                note("logits", logits[i], given[3][i], want.logits)
            if left:
                assert len(states) == len(want.decoder_hidden_states)
                assert len(encoder) == len(want.encoder_hidden_states)
            for k, mine in enumerate(states):
                note(f"hidden {k}", mine[i], given[3][i], want.decoder_hidden_states[k])
            for k, mine in enumerate(encoder):
                note(f"encoder {k}", mine[i], given[1][i], want.encoder_hidden_states[k])
    print(case, {name: round(x, 3) for name, x in worst.items()})
    assert all(x < 1 for x in worst.values()), worst


@pytest.mark.parametrize("case", WITH_HEAD)
def test_greedy_texts_are_theirs(case, made):
    _, model, ours = made(case)
    inputs = rows(INPUTS, 0)
    ids, mask = padded(inputs, case == "bart", model.config.pad_token_id)
    got = ours.generate(ids, mask, max_new_tokens=20, eos_token_id=())
    settings = model.generation_config
    eos, settings.eos_token_id = settings.eos_token_id, None
    assert got.shape == (3, 21)
    for row, mine in zip(inputs, got, strict=True):
        given = dict(max_new_tokens=20, do_sample=False)
        want = model.generate(torch.tensor(row)[None], **given)[0]
        assert mine.tolist() == want.tolist()
        assert settings.forced_eos_token_id is None or mine[-1] == settings.forced_eos_token_id
    settings.eos_token_id = eos
    if case == "bart":
        assert (got[:, 1] == settings.forced_bos_token_id).all()


@pytest.mark.parametrize("case", ["t5", "marian"])
def test_rows_that_meet_an_end_token_stop_and_the_others_go_on(case, made):
    _, model, ours = made(case)
    ids, mask = padded(rows(INPUTS, 0), False, model.config.pad_token_id)
    stop = int(ours.generate(ids, mask, max_new_tokens=20, eos_token_id=())[0, 5])
    eos, model.generation_config.eos_token_id = model.generation_config.eos_token_id, stop
    given = dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    want = model.generate(**given, max_new_tokens=20, do_sample=False).numpy()
    model.generation_config.eos_token_id = eos
    np.testing.assert_array_equal(ours.generate(ids, mask, max_new_tokens=20, eos_token_id=stop), want)


def test_texts_may_be_begun_and_drawn(made):
    _, _, ours = made("bart")
    ids, mask = padded(rows(INPUTS, 0), True, 1)
    begun = np.stack(rows((4, 4, 4), 2))
    free = dict(forced_eos_token_id=(), eos_token_id=())
    more = ours.generate(ids, mask, begun, max_new_tokens=4, **free)
    np.testing.assert_array_equal(more[:, :4], begun)
    np.testing.assert_array_equal(more[:, 4], ours.logits(ids, mask, begun)[:, -1].argmax(-1))
    drawn = [
        ours.generate(ids, mask, begun, temperature=2.0, seed=s, max_new_tokens=4, **free) for s in (1, 1, 2)
    ]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()


@pytest.mark.parametrize("case", SEQ2SEQ)
def test_import_and_export_are_inverse(case, made, tmp_path):
    folder, model, ours = made(case)
    save(ours, tmp_path / "kept")
    before, after = (safe_open(p / "model.safetensors", "np") for p in (folder, tmp_path / "kept"))
    unused = {"model.shared.weight"} if case == "bart-untied" else set()  # both stacks have their own
    assert sorted(set(before.keys()) - unused) == sorted(after.keys())
    for name in after.keys():  # noqa: SIM118
        a, b = before.get_tensor(name), after.get_tensor(name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    file = "generation_config.json"
    assert (folder / file).is_file() == (tmp_path / "kept" / file).is_file() == (case in WITH_HEAD)
    row, text = torch.tensor(rows(INPUTS, 0)[0])[None], torch.tensor(rows(TOKENS, 1)[0])[None]
    fresh = write_config(ours.family, ours.cfg, {})
    assert read_config(ours.family, fresh) == read_config(ours.family, ours.config)
    for config in (None, fresh):  # the one that came along, and one made from the table alone
        if config is not None:
            (tmp_path / "kept" / "config.json").write_text(json.dumps(config))
        again = type(model).from_pretrained(tmp_path / "kept", attn_implementation="eager").eval()
        with torch.no_grad():
            mine, theirs = (m(input_ids=row, decoder_input_ids=text)[0] for m in (again, model))
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy())


def test_a_shared_table_is_found_under_its_other_names(made, tmp_path):
    folder, _, ours = made("t5")
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors["decoder.embed_tokens.weight"] = tensors.pop(
        "shared.weight"
    )
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    ids = rows((5,), 3)[0][None]
    np.testing.assert_array_equal(jaxlm.hf.load(tmp_path).logits(ids), ours.logits(ids))


def test_settings_of_generation(made):
    _, _, ours = made("t5")
    ids = rows((5,), 3)[0][None]
    plain = ours.generate(ids, max_new_tokens=4, eos_token_id=())
    first = int(plain[0, 1])
    banned = dataclasses.replace(ours, generation={"bad_words_ids": [[first]]})
    assert banned.generate(ids, max_new_tokens=4)[0, 1] != first
    alone = dataclasses.replace(ours, generation={}, config={**ours.config, "eos_token_id": first})
    assert alone.generate(ids, max_new_tokens=4).shape == (1, 2)
    with pytest.raises(UserError, match="of several tokens"):
        dataclasses.replace(ours, generation={"bad_words_ids": [[1, 2]]}).generate(ids)
    with pytest.raises(UserError, match="give decoder_input_ids"):
        dataclasses.replace(ours, generation={}, config={}).logits(ids)
    with pytest.raises(UserError, match=r"decoder_attention_mask has shape \[1, 3\]"):
        ours.logits(ids, None, ids, np.ones((1, 3)))
    with pytest.raises(UserError, match="BartModel has no head"):
        made("bart-bare")[2].logits(ids)
