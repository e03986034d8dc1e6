"""Branches: trunk and cooldown are, to the bit, the run that would have been made in one piece."""

import contextlib
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxlm.config import build, config_hash
from jaxlm.errors import UserError
from jaxlm.train import run
from jaxlm.train.checkpoint import step_dirs
from jaxlm.train.metrics import read_rows
from jaxlm.train.run import train

STEPS, BRANCH = 8, 6  # of a branch; it cools down over its last quarter


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for name, count in {"train": 900, "eval": 100}.items():
        (folder / f"{name}.txt").write_text(" ".join(rng.choice(["the", "cat", "sat", "mat"], count)))
    return folder


def config(texts, **groups):
    """The run in one piece: WSD, with all that a branch could lose (dropout, moments, an average)."""
    tree = {
        "model": {"num_layers": 1, "model_dim": 16, "dropout": 0.1, "attention": {"num_heads": 2}},
        "data": {
            "train": f"{texts}/train.txt",
            "eval": f"{texts}/eval.txt",
            "seq_len": 16,
            "batch_size": 8,
        },
        "optim": {
            "lr": 3e-3,
            "schedule": "wsd",
            "cooldown": 0.25,
            "final": 0.0,
            "warmup": 2.0,
            "warmup_unit": "steps",
            "ema": 0.5,
        },
        "train": {"num_steps": STEPS, "microbatches": 2, "log_every": 1, "sample_prompts": []},
        "mesh": {"data": 1},
    }
    for name, changes in groups.items():
        tree[name] = {**tree.get(name, {}), **changes} if isinstance(changes, dict) else changes
    return build(tree)


def branch(texts, **groups):
    """The same run as a branch of `trunk`."""
    changes = {"branch_from": "trunk", "branch_step": BRANCH, **groups.pop("train", {})}
    return config(texts, train=changes, **groups)


@pytest.fixture(scope="module")
def runs(texts, tmp_path_factory):
    """A folder with a trunk of 12 steps, its branch and the run in one piece."""
    folder = tmp_path_factory.mktemp("runs")
    # Its own cooldown would begin at step 9, and it keeps but one checkpoint besides those it is asked for.
    trunk = config(texts, train={"num_steps": 12, "save_steps": [2, BRANCH], "keep_last": 1})
    train(trunk, folder / "trunk", bar=False)
    train(branch(texts), folder / "branch", bar=False)
    train(config(texts), folder / "whole", bar=False)
    return folder


def leaves(path):
    """Every array of a checkpoint directory, by file content."""
    out = {}
    for item in ("params", "optimizer"):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.restore(path / item)
        flat = jax.tree_util.tree_flatten_with_path(tree)[0]
        out |= {f"{item}{jax.tree_util.keystr(name)}": np.asarray(x) for name, x in flat}
    return out


def assert_same_state(a, b, step=STEPS):
    one, two = (leaves(step_dirs(path / "checkpoints")[step]) for path in (a, b))
    assert one.keys() == two.keys()
    assert len(one) > 20
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def rows(path):
    """Numbers of a run by step, without what a clock measured."""
    return {
        row["step"]: {k: v for k, v in row.items() if not k.startswith(("seconds", "perf/"))}
        for row in read_rows(path / "metrics.jsonl")
    }


def test_trunk_and_branch_are_the_run_in_one_piece(runs):
    assert_same_state(runs / "branch", runs / "whole")
    whole, own, trunk = (rows(runs / name) for name in ("whole", "branch", "trunk"))
    assert list(own) == [7, 8]
    assert own == {n: whole[n] for n in own}
    assert {n: trunk[n] for n in range(1, BRANCH + 1)} == {n: whole[n] for n in range(1, BRANCH + 1)}
    # The two took different paths: the trunk goes on at the full rate where the branch cools down.
    assert own[8]["train/lr"] < trunk[8]["train/lr"] == pytest.approx(3e-3)


def test_the_trunk_keeps_the_checkpoints_that_it_was_asked_for(runs):
    assert sorted(step_dirs(runs / "trunk" / "checkpoints")) == [2, BRANCH, 12]


def test_the_result_counts_the_trunk_and_names_its_own_part(runs):
    result, whole = (json.loads((runs / name / "result.json").read_text()) for name in ("branch", "whole"))
    for name in ("steps", "tokens", "flops", "eval/nll", "status"):
        assert result[name] == whole[name], name
    trunk = json.loads((runs / "trunk" / "config.json").read_text())
    part = result["branch"]
    assert (part["step"], part["own_steps"]) == (BRANCH, STEPS - BRANCH)
    assert part["own_tokens"] == 2 * 8 * 16
    assert part["own_flops"] == pytest.approx(result["flops"] * 2 / STEPS)
    assert part["config_hash"] == trunk["hash"]
    assert whole["branch"] == {}


def test_the_trunk_is_part_of_the_identity_and_the_kept_steps_are_not(texts):
    assert config_hash(branch(texts)) != config_hash(config(texts))
    assert config_hash(branch(texts, train={"branch_from": "other"})) != config_hash(branch(texts))
    assert config_hash(config(texts, train={"save_steps": [3]})) == config_hash(config(texts))


class StopAt:
    """In place of `StopSignals`: asks to stop after one step."""

    def __init__(self, step):
        self.step = step

    def __call__(self, warn=None):
        return contextlib.nullcontext(lambda done: "SIGTERM" if done == self.step else "")


def test_an_interrupted_branch_goes_on_without_its_trunk(texts, runs, tmp_path, monkeypatch):
    shutil.copytree(runs / "trunk", tmp_path / "trunk")
    with monkeypatch.context() as patched:
        patched.setattr(run, "StopSignals", StopAt(7))
        assert train(branch(texts), tmp_path / "cut", bar=False).steps == 7
    shutil.rmtree(tmp_path / "trunk")
    result = train(branch(texts), tmp_path / "cut", bar=False)
    assert result.branch["own_steps"] == 2
    assert_same_state(tmp_path / "cut", runs / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optim", "trunk_optim"),
    [
        ({"name": "muon"}, {}),
        ({"cooldown_shape": "linear", "final": 0.1}, {"schedule": "constant"}),
        ({"name": "adafactor"}, {"cooldown": 0.0}),
    ],
)
def test_other_optimizers_and_trunks_at_a_constant_rate(texts, tmp_path, optim, trunk_optim):
    base = {**config(texts).optim.__dict__, **optim}
    trunk = config(texts, optim={**base, **trunk_optim}, train={"num_steps": 7, "save_steps": [5]})
    train(trunk, tmp_path / "trunk", bar=False)
    train(branch(texts, optim=base, train={"branch_step": 5}), tmp_path / "branch", bar=False)
    train(config(texts, optim=base), tmp_path / "whole", bar=False)
    assert_same_state(tmp_path / "branch", tmp_path / "whole")


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"train": {"branch_from": "trnk"}}, "trnk is not a run directory"),
        ({"train": {"branch_step": 5}}, "has no checkpoint of step 5; there are: 2, 6, 12. Train it with"),
        ({"model": {"num_layers": 2}}, "model.num_layers: 1 -> 2"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"data": {"seed": 1}}, "data.seed: 0 -> 1"),
        ({"optim": {"name": "lion"}}, "optim.name: 'adamw' -> 'lion'"),
        ({"optim": {"lr": 1e-3}}, "the learning rate of step 1 is 0.0015 in the trunk and 0.0005"),
        ({"optim": {"cooldown": 0.5}}, "the learning rate of step 6 is 0.003 in the trunk and 0.0015"),
        ({"optim": {"warmup": 0.5, "warmup_unit": "fraction"}}, "a warm-up in steps or tokens"),
        ({"train": {"branch_from": "branch", "branch_step": 7}}, "has no checkpoint of step 7"),
    ],
)
def test_what_does_not_continue_the_trunk_is_refused(texts, runs, groups, message):
    optim = {**config(texts).optim.__dict__, **groups.pop("optim", {})}
    with pytest.raises(UserError) as error:
        train(branch(texts, optim=optim, **groups), runs / "refused", bar=False)
    assert message in str(error.value)
    shutil.rmtree(runs / "refused")


def test_a_branch_past_the_end_of_its_trunk_is_refused(texts, runs):
    far = branch(texts, train={"branch_step": 14, "num_steps": 20})
    with pytest.raises(UserError, match="branch_step=14 lies beyond the trunk's 12 steps"):
        train(far, runs / "far", bar=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch_from": "trunk"}, "train.branch_step=0 must lie between 0 and train.num_steps=1000"),
        ({"branch_from": "t", "branch_step": 1000}, "must lie between 0 and train.num_steps=1000"),
        ({"branch_step": 5}, "train.branch_step=5 needs train.branch_from"),
        ({"branch_from": "t", "branch_step": 5, "warm_start": "w"}, "both say where to start"),
        ({"save_steps": [0]}, "train.save_steps has 0; this run makes steps 1 to 1000"),
        ({"branch_from": "t", "branch_step": 5, "save_steps": [5]}, "this run makes steps 6 to 1000"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        build({"train": changes})


def test_other_data_than_the_trunk_saw_are_refused(texts, runs, tmp_path):
    """The same paths, but a file has changed since."""
    copies = tmp_path / "texts"
    shutil.copytree(texts, copies)
    trunk = config(copies, train={"save_steps": [BRANCH], "num_steps": 7})
    train(trunk, tmp_path / "runs" / "trunk", bar=False)
    (copies / "train.txt").write_text("other words " * 300)
    with pytest.raises(UserError, match="the training data is not what the trunk"):
        train(branch(copies), tmp_path / "runs" / "branch", bar=False)


def test_a_stop_that_raises_leaves_no_result(texts, tmp_path):
    """As when another worker has taken the run over."""

    class LostError(RuntimeError):
        pass

    def stop(step):
        if step == 3:
            raise LostError

    with pytest.raises(LostError):
        train(config(texts), tmp_path / "run", bar=False, stop=lambda step: stop(step) or "")
    assert not (tmp_path / "run" / "result.json").exists()
    calls = []

    def late(step):
        calls.append(step)
        if calls.count(STEPS) == 2:
            raise LostError  # after the last step, the last evaluation and the last checkpoint
        return ""

    with pytest.raises(LostError):
        train(config(texts), tmp_path / "late", bar=False, stop=late)
    assert not (tmp_path / "late" / "result.json").exists()
    told = train(config(texts), tmp_path / "run", bar=False, stop=lambda step: "enough" * (step == 4))
    assert (told.status, told.reason, told.steps) == ("stopped", "enough", 4)
