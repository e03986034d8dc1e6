"""Every family against `transformers`: logits, hidden states, continuations, both spellings, and back."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="parity needs the extra `pip install 'jaxlm[parity]'`")
pytest.importorskip("transformers", reason="parity needs the extra `pip install 'jaxlm[parity]'`")
pytest.importorskip("safetensors")
import torch
import transformers
from safetensors import safe_open

import jaxlm.hf
from jaxlm.hf.families import FAMILIES, family_of
from jaxlm.hf.family import read_config, write_config
from jaxlm.hf.pretrained import save

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import CASES, ENCODERS, SEQ2SEQ, make

LENGTHS, T = (16, 11, 5), 16
BY_LENGTH = ("llama-dynamic", "llama-longrope")
ROOM = {}  # case -> (folder, their model, ours), made once


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    def one(case):
        if case not in ROOM:
            folder = tmp_path_factory.mktemp(case)
            ROOM[case] = (folder, make(case, folder), jaxlm.hf.load(folder))
        return ROOM[case]

    return one


def rows(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 307, n) for n in LENGTHS]


def padded(rows, left):
    ids, mask = np.full((len(rows), T), 3), np.zeros((len(rows), T), int)
    for i, row in enumerate(rows):
        where = slice(T - len(row), T) if left else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def close(ours, theirs):
    """1e-4 and a hundred-thousandth of the largest value; returns the error in units of that."""
    return np.abs(ours - theirs).max() / (1e-4 + 1e-5 * np.abs(theirs).max())


def theirs_of(model, row):
    with torch.no_grad():
        out = model(torch.tensor(row)[None], output_hidden_states=True)
    return out.logits[0].numpy(), [h[0].numpy() for h in out.hidden_states]


@pytest.mark.parametrize("case", CASES)
def test_logits_and_hidden_states_are_theirs_on_either_side_of_padding(case, made):
    _, model, ours = made(case)
    some = rows()
    if case in BY_LENGTH:  # frequencies depend on the longest row of the batch
        some = [some[0]] * 3
    worst = {}
    reference = [theirs_of(model, row) for row in some]
    for left in (True, False):
        ids, mask = padded(some, left)
        logits = ours.logits(ids, mask)
        states = ours.hidden_states(ids, mask) if left else ()
        assert logits.shape == (3, T, 307)
        for i, (want, hidden) in enumerate(reference):
            worst[f"logits {left=}"] = max(
                worst.get(f"logits {left=}", 0), close(logits[i][mask[i] == 1], want)
            )
            assert len(states) in (0, len(hidden))
            for k, state in enumerate(states):
                error = close(state[i][mask[i] == 1], hidden[k])
                worst[f"hidden {k}"] = max(worst.get(f"hidden {k}", 0), error)
    print(case, {name: round(float(x), 3) for name, x in worst.items()})
    assert all(x < 1 for x in worst.values()), worst


@pytest.mark.parametrize("case", CASES)
def test_greedy_continuations_are_theirs(case, made):
    if case in BY_LENGTH:
        pytest.skip("cached keys keep the rotation of the length at which they were made, here one less")
    _, model, ours = made(case)
    ids, mask = padded(rows(), left=True)
    got = ours.generate(ids, mask, max_new_tokens=20, eos_token_id=())
    assert (got[:, :T] == ids).all()
    model.generation_config.eos_token_id = None
    for i, row in enumerate(rows()):
        want = model.generate(torch.tensor(row)[None], max_new_tokens=20, do_sample=False)[0, len(row) :]
        assert got[i, T:].tolist() == want.tolist()


@pytest.mark.parametrize("case", CASES)
def test_import_and_export_are_inverse(case, made, tmp_path):
    folder, model, ours = made(case)
    save(ours, tmp_path / "kept")
    before, after = (safe_open(p / "model.safetensors", "np") for p in (folder, tmp_path / "kept"))
    assert sorted(before.keys()) == sorted(after.keys())
    for name in before.keys():  # noqa: SIM118
        a, b = before.get_tensor(name), after.get_tensor(name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    # Without the config.json that it came with: one made from the table alone.
    kept = json.loads((folder / "config.json").read_text())
    family = family_of(kept)
    fresh = write_config(family, ours.cfg, {})
    assert read_config(family, fresh) == read_config(family, kept)
    (tmp_path / "kept" / "config.json").write_text(json.dumps(fresh))
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "kept", attn_implementation=model.config._attn_implementation, dtype=torch.float32
    ).eval()
    row = rows()[0]
    np.testing.assert_array_equal(theirs_of(again, row)[0], theirs_of(model, row)[0])


def older(config):
    """config.json as transformers 4 wrote it."""
    config = dict(config)
    rope = config.pop("rope_parameters", None)
    if rope is None:
        return config
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    rope = dict(rope)
    config["rope_theta"] = rope.pop("rope_theta")
    share = rope.pop("partial_rotary_factor", None)
    if share is not None:
        config["rotary_pct" if config["model_type"] == "gpt_neox" else "partial_rotary_factor"] = share
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if "num_local_experts" in config and config["model_type"].startswith("qwen"):
        config["num_experts"] = config.pop("num_local_experts")
    return config


@pytest.mark.parametrize("case", CASES)
def test_both_spellings_of_a_config_are_one(case, made):
    folder, *_ = made(case)
    config = json.loads((folder / "config.json").read_text())
    family = family_of(config)
    if "rope_parameters" in config and family.read(config).get("position.kind") == "rope":
        assert older(config) != config
    assert read_config(family, older(config)) == read_config(family, config)


def test_every_family_has_a_case():
    tested = {model_type for group in (CASES, ENCODERS, SEQ2SEQ) for model_type, *_ in group.values()}
    assert tested == FAMILIES.keys()
