"""Groups of cells against the same cells alone: rows, scores, checkpoints, failures, resume, refusals."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxlm.config import build, config_hash, to_dict
from jaxlm.errors import UserError
from jaxlm.sweep import vectorized
from jaxlm.sweep.groups import FREE, saved_step
from jaxlm.sweep.vectorized import group_key, train_group, why_not
from jaxlm.train.checkpoint import Checkpointer, step_dirs
from jaxlm.train.loop import NonFiniteError
from jaxlm.train.metrics import read_rows
from jaxlm.train.programs import programs
from jaxlm.train.run import train
from jaxlm.train.rundir import RunLock
from jaxlm.train.trained import evaluate, load_trained
from jaxlm.tree import named_leaves

ROOT = Path(__file__).parents[2]
STEPS = 6
# Of a loss or a norm, over a few steps: a batched product sums in another order than a single one.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A few documents of a small language."""
    folder = tmp_path_factory.mktemp("words")
    rng = np.random.default_rng(0)
    for name, count in {"train": 600, "eval": 120}.items():
        chosen = rng.choice(["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dogs"], count)
        (folder / f"{name}.txt").write_text(" ".join(chosen) + ".\n")
    return folder


def config(words, **groups):
    """A model with what a group could mix up: dropout, microbatches, packed documents; and no clipping."""
    tree = {
        "model": {
            "num_layers": 1,
            "model_dim": 16,
            "mlp_dim": 32,
            "dropout": 0.1,
            "attention": {"num_heads": 2},
        },
        "data": {
            "train": f"{words}/train.txt",
            "eval": f"{words}/eval.txt",
            "seq_len": 16,
            "batch_size": 8,
            "packing": "first_fit",
        },
        "optim": {"lr": 3e-3, "warmup": 2.0, "warmup_unit": "steps", "clip_norm": 0.0},
        "loss": {"chunk": 8, "z_loss": 1e-4},
        "train": {"num_steps": STEPS, "microbatches": 2, "log_every": 1, "eval_every": 3, "save_every": 2},
        "mesh": {"data": 1},
    }
    tree["train"] |= {"sample_prompts": [], "max_nonfinite": 2}
    for name, changes in groups.items():
        tree[name] = {**tree.get(name, {}), **changes} if isinstance(changes, dict) else changes
    return build(tree)


def members(words, **groups):
    """Three cells that differ in every free number, and one whose learning rate is out of this world."""
    numbers = [
        (1, 1, 3e-3, 0.1, 0.95, 0.02),
        (2, 2, 1e-3, 0.0, 0.999, 0.04),
        (3, 1, 3e-2, 0.3, 0.9, 0.01),
        (4, 2, 1e30, 0.1, 0.95, 0.02),
    ]
    return [
        config(
            words,
            seed=seed,
            data={"seed": data_seed},
            optim={"lr": lr, "weight_decay": decay, "b2": b2},
            model={"init_std": std},
            **groups,
        )
        for seed, data_seed, lr, decay, b2, std in numbers
    ]


def folders(cfgs, root):
    return [(cfg, root / "runs" / config_hash(cfg)[:12]) for cfg in cfgs]


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory):
    """The cells one after another: {directory: result}."""
    results = {}
    for cfg, path in folders(members(words), tmp_path_factory.mktemp("alone")):
        try:
            results[path] = train(cfg, path, bar=False)
        except NonFiniteError:
            results[path] = None
    return results


@pytest.fixture(scope="module")
def together(words, tmp_path_factory):
    """The cells as one program, every operation over all of them: {directory: result}."""
    root = tmp_path_factory.mktemp("together")
    cells = folders(members(words), root)
    results = train_group(cells, root / "groups", bar=False, width=0)
    return {path: result for (_, path), result in zip(cells, results, strict=True)}


def saved(path, step=STEPS):
    """Every leaf of a cell's final checkpoint, read back into the state of a lone run."""
    cfg = build(json.loads((path / "config.json").read_text())["config"])
    target = programs(cfg.model, cfg.loss, cfg.optim, cfg.mesh, microbatches=1, token_bytes=None).target
    restored = Checkpointer(path / "checkpoints").restore(target, step=step)
    return {name: np.asarray(leaf) for name, leaf in named_leaves(restored.state)}


def numbers(path):
    """The rows of a run without what a clock measured."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("seconds", "perf/"))}
        for row in read_rows(path / "metrics.jsonl")
    ]


def assert_like_alone(path, lone, tolerance=TOLERANCE):
    """The same rows, with the same names, and the same numbers up to rounding."""
    ours, theirs = numbers(path), numbers(lone)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert {name for name in a if a[name] is None} == {name for name in b if b[name] is None}
        for name in (name for name in a if a[name] is not None):
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=1e-7), (a["step"], name)
    fields = [[set(row) for row in read_rows(folder / "metrics.jsonl")] for folder in (path, lone)]
    failed = json.loads((path / "result.json").read_text())["status"] == "failed"
    last = -1 if failed else None  # the row of a failure is written when it is seen, and has no speed
    assert fields[0][:last] == fields[1][:last]


def assert_same_to_the_bit(path, other):
    for (name, a), b in zip(saved(path).items(), saved(other).values(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert numbers(path) == numbers(other)


# ---------------------------------------------------------------------------------------- the same as alone


def test_every_cell_is_what_it_is_alone(alone, together):
    """At every logged step; the sides took different paths: one program for all, one run after another."""
    for (path, ours), (lone, theirs) in zip(together.items(), alone.items(), strict=True):
        assert_like_alone(path, lone) if theirs else None
        assert "group_step" in ours.compilation["programs"]
        if theirs is None:
            continue
        assert "group_step" not in theirs.compilation["programs"]
        assert (ours.status, ours.steps, ours.tokens, ours.flops) == (
            "finished",
            STEPS,
            STEPS * 128,
            theirs.flops,
        )
        assert ours.counts == theirs.counts
        assert ours.config_hash == theirs.config_hash
        assert ours.metrics.keys() == {*theirs.metrics, "group/cells"}
        assert ours.metrics["eval/nll"] == pytest.approx(theirs.metrics["eval/nll"], rel=TOLERANCE)
        assert json.loads((path / "result.json").read_text()) == json.loads(json.dumps(ours.to_dict()))
    losses = [result.metrics["eval/nll"] for result in together.values() if result.status == "finished"]
    assert len({round(x, 3) for x in losses}) == 3  # the cells are three, not one thrice


def test_a_cell_that_diverges_ends_alone(alone, together):
    """It fails at the update at which it fails alone; the others are those of the test above."""
    *good, bad = together.values()
    (*_, path), (*_, lone) = together, alone
    assert [result.status for result in good] == ["finished"] * 3
    theirs = json.loads((lone / "result.json").read_text())
    assert (bad.status, bad.reason, bad.steps) == ("failed", theirs["reason"], theirs["steps"])
    assert "was not finite in 2 updates in a row" in bad.reason
    assert bad.steps < STEPS
    assert_like_alone(path, lone)
    assert json.loads((path / "result.json").read_text())["status"] == "failed"
    assert not step_dirs(path / "checkpoints")


def test_the_optimizer_states_agree(alone, together):
    """Moments and parameters of the final checkpoints, in the layout of a lone run."""
    for path, lone in list(zip(together, alone, strict=True))[:3]:
        a, b = saved(path), saved(lone)
        assert a.keys() == b.keys()
        for name in a:
            scale = max(np.abs(b[name]).max(), 1e-12)
            assert np.abs(a[name] - b[name]).max() <= 1e-3 * scale, name
        np.testing.assert_array_equal(a["key"], b["key"])


def test_a_cells_directory_is_a_run_directory(together):
    path, result = next(iter(together.items()))
    trained = load_trained(path)
    assert trained.step == STEPS
    scores = evaluate(path)
    assert scores.nll == pytest.approx(result.metrics["eval/nll"], rel=1e-6)
    assert scores.tokens == result.metrics["eval/tokens"]
    record = json.loads((path / "config.json").read_text())
    assert build(record["config"]) == trained.cfg
    assert len(record["starts"]) == 1
    assert train(trained.cfg, path, bar=False).to_dict() == json.loads(json.dumps(result.to_dict()))


def test_a_finished_group_leaves_no_state(together):
    groups = next(iter(together)).parents[1] / "groups"
    assert len(list(groups.glob("*/group.json"))) == 1
    assert not list(groups.glob("*/checkpoints"))


def test_cells_one_at_a_time(words, alone, tmp_path):
    """The default on a CPU."""
    cells = folders(members(words), tmp_path)
    train_group(cells, tmp_path / "groups", bar=False)
    for (_, path), lone in zip(cells, alone, strict=True):
        assert_like_alone(path, lone)


@pytest.mark.slow
def test_a_width_that_does_not_divide_the_cells(words, alone, tmp_path):
    cells = folders(members(words), tmp_path)
    train_group(cells, tmp_path / "groups", bar=False, width=3)
    for (_, path), lone in zip(cells, alone, strict=True):
        assert_like_alone(path, lone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "groups"),
    [
        (
            0,
            {
                "optim": {"ema": 0.9, "name": "muon", "lr": 1e-3},
                "model": {"num_layers": 2, "attention": {"num_heads": 2, "pattern": ["local"], "window": 8}},
            },
        ),
        (1, {"optim": {"name": "lion", "lr": 1e-3}, "model": {"num_layers": 2, "scan": False}}),
        (0, {"model": {"mlp_pattern": ["moe"], "moe": {"num_experts": 4, "top_k": 2}}}),
    ],
    ids=["muon_ema_window", "lion_unrolled", "moe"],
)
def test_other_models_and_optimizers(words, tmp_path, width, groups):
    """With one data seed, so that all cells read one batch."""
    cfgs = [config(words, **{"seed": seed, **groups}) for seed in (1, 2)]
    cells = folders(cfgs, tmp_path)
    train_group(cells, tmp_path / "groups", bar=False, width=width)
    for cfg, path in cells:
        train(cfg, tmp_path / "alone" / path.name, bar=False)
        assert_like_alone(path, tmp_path / "alone" / path.name, 1e-4)


# ---------------------------------------------------------------------------------- interrupted and resumed


class Crash(Exception):
    """What a kill looks like from inside."""


def crash_at(step):
    def stop(done):
        if done == step:
            raise Crash
        return ""

    return stop


@pytest.mark.slow
def test_resume_equals_uninterrupted_to_the_bit(words, together, tmp_path):
    """Stopped by a signal after an odd step, then thrown out between two saves, then left alone."""
    cells = folders(members(words), tmp_path)
    options = dict(bar=False, width=0)
    stop = lambda done: "SIGTERM" if done == 3 else ""  # noqa: E731
    stopped = train_group(cells, tmp_path / "groups", stop=stop, **options)
    assert [(r.status, r.reason) for r in stopped[:3]] == [("stopped", "SIGTERM")] * 3
    assert not any(step_dirs(path / "checkpoints") for _, path in cells)
    with pytest.raises(Crash):
        train_group(cells, tmp_path / "groups", stop=crash_at(5), **options)
    (group,) = (tmp_path / "groups").iterdir()
    assert max(step_dirs(group / "checkpoints")) in (3, 4)
    assert saved_step(tmp_path / "groups", config_hash(cells[1][0])) in (3, 4)
    assert saved_step(tmp_path / "groups", "another") == 0
    seen = []
    results = train_group(cells, tmp_path / "groups", progress=seen.append, **options)
    assert seen[-1] == STEPS
    assert seen[0] in (4, 5)
    assert [r.status for r in results] == [r.status for r in together.values()]
    for (_, path), whole in list(zip(cells, together, strict=True))[:3]:
        assert_same_to_the_bit(path, whole)
    assert numbers(cells[3][1]) == numbers(list(together)[3])


def test_a_group_goes_on_with_the_cells_that_are_left(words, together, tmp_path, monkeypatch):
    """Killed between the endings of two cells: the others need no further update."""
    cells = folders(members(words), tmp_path)
    real, finished = vectorized.write_json, []

    def fail_at_the_second(path, tree):
        finished.append(tree.get("status"))
        if finished.count("finished") == 2:
            raise Crash
        real(path, tree)

    with monkeypatch.context() as patched:
        patched.setattr(vectorized, "write_json", fail_at_the_second)
        with pytest.raises(Crash):
            train_group(cells, tmp_path / "groups", bar=False, width=0)
    done = [path for _, path in cells if (path / "result.json").exists()]
    assert len(done) == 2  # one finished, one failed
    left = [(cfg, path) for cfg, path in cells if path not in done]
    results = train_group(left, tmp_path / "groups", bar=False, width=0)
    assert [r.status for r in results] == ["finished"] * 2
    assert "group_step" not in results[0].compilation["programs"]
    for (_, path), whole in list(zip(cells, together, strict=True))[:3]:
        assert_same_to_the_bit(path, whole)


def test_finished_cells_are_not_run_again(together, words, tmp_path):
    path, result = next(iter(together.items()))
    before = (path / "metrics.jsonl").read_bytes()
    cfg = members(words)[0]
    (again,) = train_group([(cfg, path)], tmp_path / "groups", bar=False)
    assert again.to_dict() == json.loads(json.dumps(result.to_dict()))
    assert (path / "metrics.jsonl").read_bytes() == before
    assert not (tmp_path / "groups").exists()


SCRIPT = """
import os, signal, sys
from pathlib import Path
from jaxlm.config import load_config
from jaxlm.sweep.vectorized import train_group
def stop(done):
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return ""
root = Path(sys.argv[1])
paths = sorted(root.glob("cells/*"))
cells = [(load_config(path / "cell.json"), root / "runs" / path.name) for path in paths]
train_group(cells, root / "groups", stop=stop, bar=False, width=0)
"""


@pytest.mark.slow
def test_a_killed_process_loses_no_more_than_since_the_last_save(words, together, tmp_path):
    cells = folders(members(words), tmp_path)
    for cfg, path in cells:
        place = tmp_path / "cells" / path.name
        place.mkdir(parents=True)
        (place / "cell.json").write_text(json.dumps(to_dict(cfg)))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    seen = []
    train_group(cells, tmp_path / "groups", bar=False, width=0, progress=seen.append)
    assert seen[0] >= 3  # saved after steps 2 and 4, of which the last may still have been on its way
    for (_, path), whole in list(zip(cells, together, strict=True))[:3]:
        assert [row["step"] for row in numbers(path)] == list(range(1, STEPS + 1))
        for a, b in zip(numbers(path), numbers(whole), strict=True):
            assert a["train/nll"] == pytest.approx(b["train/nll"], rel=TOLERANCE)


def test_other_data_is_refused_at_resume(words, tmp_path):
    copy = tmp_path / "words"
    copy.mkdir()
    for path in words.glob("*.txt"):
        (copy / path.name).write_text(path.read_text())
    cells = folders(members(copy), tmp_path)
    with pytest.raises(Crash):
        train_group(cells, tmp_path / "groups", stop=crash_at(3), bar=False, width=0)
    (copy / "train.txt").write_text("other words " * 100)
    with pytest.raises(UserError, match="the training data is not what"):
        train_group(cells, tmp_path / "groups", bar=False, width=0)


# --------------------------------------------------------------------------------------------------- refusals


def test_the_key_is_equal_for_what_differs_in_numbers_alone(words):
    keys = {group_key(cfg) for cfg in members(words)}
    assert len(keys) == 1
    assert keys != {""}
    assert len(FREE) == 6


@pytest.mark.parametrize(
    "groups",
    [
        {"optim": {"b1": 0.8}},
        {"optim": {"schedule": "linear"}},
        {"model": {"model_dim": 32}},
        {"model": {"init_std": 0.0}},
        {"data": {"batch_size": 16}},
        {"train": {"num_steps": 7}},
        {"train": {"log_every": 2}},
        {"loss": {"z_loss": 0.0}},
    ],
    ids=str,
)
def test_the_key_differs_for_all_else(words, groups):
    cfg, other = config(words), config(words, **groups)
    assert group_key(other) not in ("", group_key(cfg))
    ((group, fields),) = groups.items()
    with pytest.raises(UserError, match=f"cannot train in one group(.|\n)*{group}.{next(iter(fields))}: "):
        train_group([(cfg, Path("a")), (other, Path("b"))], Path("groups"))


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        ({"mesh": {"data": 2}}, "its mesh has 2 devices"),
        ({"mesh": {"data": -1}}, "its mesh has 8 devices"),
        ({"mesh": {"data": 16}}, "needs 16 devices, but there are 8"),
        ({"train": {"warm_start": "x"}}, "train.warm_start='x': a group starts all its cells from scratch"),
        ({"train": {"branch_from": "x", "branch_step": 1}}, "train.branch_from='x'"),
        ({"train": {"save_steps": [2]}}, "train.save_steps=(2,)"),
        ({"train": {"profile_start": 2}}, "train.profile_start=2"),
        ({"train": {"noise_scale_every": 2}}, "train.noise_scale_every=2"),
    ],
)
def test_what_cannot_train_in_a_group_has_no_key(words, tmp_path, groups, reason):
    cfg = config(words, **groups)
    assert group_key(cfg) == ""
    assert reason in why_not(cfg)
    with pytest.raises(UserError, match="cannot train in a group") as error:
        train_group([(cfg, tmp_path / "run")], tmp_path / "groups")
    assert reason in str(error.value)
    assert not list(tmp_path.iterdir())


def test_nothing_and_the_same_twice_are_refused(words, tmp_path):
    one, two = members(words)[:2]
    with pytest.raises(UserError, match="there are no cells"):
        train_group([], tmp_path)
    with pytest.raises(UserError, match="two cells have one run"):
        train_group([(one, tmp_path / "a"), (one, tmp_path / "b")], tmp_path)
    with pytest.raises(UserError, match="two cells have one directory"):
        train_group([(one, tmp_path / "a"), (two, tmp_path / "a")], tmp_path)


def test_a_directory_in_use_is_refused(words, tmp_path):
    cells = folders(members(words)[:2], tmp_path)
    cells[1][1].mkdir(parents=True)
    with RunLock(cells[1][1]), pytest.raises(UserError, match="is in use by process"):
        train_group(cells, tmp_path / "groups", bar=False)
