"""Whole runs of a tiny model: the directory, resume to the bit, refusals before work is spent."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.config import build, config_hash, to_dict
from jaxlm.errors import UserError
from jaxlm.sharding import MESH_AXES, MeshConfig
from jaxlm.train import programs, run
from jaxlm.train.checkpoint import Checkpointer, step_dirs
from jaxlm.train.loop import NonFiniteError
from jaxlm.train.metrics import read_rows
from jaxlm.train.run import plan, train
from jaxlm.train.rundir import RunLock
from jaxlm.train.trained import load_trained, sample
from jaxlm.tree import named_leaves

ROOT = Path(__file__).parents[2]
STEPS = 6


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A few documents of a small language."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dogs", "run"]
    for name, count in {"train_a": 400, "train_b": 300, "eval": 120}.items():
        (folder / f"{name}.txt").write_text(" ".join(rng.choice(words, count)) + ".\n")
    return folder


def config(texts, **groups):
    """A model with everything that a resume could lose: dropout, two layer kinds, Adam's moments."""
    tree = {
        "model": {
            "num_layers": 2,
            "model_dim": 32,
            "mlp_dim": 32,
            "dropout": 0.1,
            "attention": {"num_heads": 4, "num_kv_heads": 2, "pattern": ["local", "global"], "window": 8},
        },
        "data": {
            "train": [[f"{texts}/train_a.txt", 2.0], [f"{texts}/train_b.txt", 1.0]],
            "eval": f"{texts}/eval.txt",
            "seq_len": 16,
            "batch_size": 16,
            "packing": "first_fit",
        },
        "optim": {"lr": 3e-3, "warmup": 2.0, "warmup_unit": "steps"},
        "loss": {"chunk": 8, "z_loss": 1e-4},
        "train": {"num_steps": STEPS, "microbatches": 2, "log_every": 1, "eval_every": 3, "save_every": 2},
        "sample": {"max_new_tokens": 4},
        "mesh": {"data": 1},
    }
    tree["train"]["sample_prompts"] = ["the cat", ""]
    for name, changes in groups.items():
        tree[name] = {**tree.get(name, {}), **changes} if isinstance(changes, dict) else changes
    return build(tree)


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    """One whole run: (config, directory, result)."""
    cfg = config(texts)
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    programs._programs.cache_clear()  # another test may have run this shape in this process
    return cfg, workdir, train(cfg, workdir, bar=False)


def final_state(cfg, workdir, step=STEPS):
    """Every saved leaf of a run by name."""
    from functools import partial

    from jaxlm.model import transformer
    from jaxlm.optim import make_optimizer, make_schedule
    from jaxlm.train.state import abstract_state

    optimizer = make_optimizer(cfg.optim, make_schedule(cfg.optim, cfg.train.num_steps))
    target, _ = abstract_state(partial(transformer.init, cfg.model), optimizer)
    restored = Checkpointer(workdir / "checkpoints").restore(target, step=step)
    return {name: np.asarray(leaf) for name, leaf in named_leaves(restored.state)}


class StopAt:
    """In place of `StopSignals`: asks to stop after one step."""

    def __init__(self, step):
        self.step = step

    def __call__(self, warn=None):
        return contextlib.nullcontext(lambda done: "SIGTERM" if done == self.step else "")


def stop_and_go_on(cfg, workdir, steps, monkeypatch):
    """The run of `cfg`, stopped after each of `steps` and started again."""
    for step in steps:
        with monkeypatch.context() as patched:
            patched.setattr(run, "StopSignals", StopAt(step))
            stopped = train(cfg, workdir, bar=False)
        assert (stopped.status, stopped.steps, stopped.reason) == ("stopped", step, "SIGTERM")
        assert step in step_dirs(workdir / "checkpoints")
    return train(cfg, workdir, bar=False)


TIMES = ("seconds", "perf/")


def numbers(workdir):
    """The rows of a run without what a clock measured."""
    return [
        {k: v for k, v in row.items() if not k.startswith(TIMES)}
        for row in read_rows(workdir / "metrics.jsonl")
    ]


def test_the_directory_explains_itself(finished):
    cfg, workdir, result = finished
    names = {path.name for path in workdir.iterdir()}
    assert names >= {
        "config.json",
        "metrics.jsonl",
        "events",
        "checkpoints",
        "samples.txt",
        "loss.png",
        "result.json",
    }
    record = json.loads((workdir / "config.json").read_text())
    assert build(record["config"]) == cfg
    assert record["hash"] == config_hash(cfg) == result.config_hash
    (start,) = record["starts"]
    assert start["packages"]["jax"] == jax.__version__
    assert "git" in start
    assert [row["step"] for row in read_rows(workdir / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "events").glob("events*"))
    # Kept: the two newest and the best by eval/nll, which was measured at steps 3 and 6 and saved at 6.
    assert sorted(step_dirs(workdir / "checkpoints")) == [4, 6]


def test_the_result_says_what_was_done(finished):
    _, workdir, result = finished
    saved = json.loads((workdir / "result.json").read_text())
    assert saved == json.loads(json.dumps(result.to_dict()))
    assert saved["status"] == "finished"
    assert saved["steps"] == STEPS
    assert saved["tokens"] == STEPS * 16 * 16
    assert saved["flops"] == saved["tokens"] * saved["counts"]["flops_train"]
    assert {"n_total", "n_embedding", "n_head", "n_non_embedding", "n_active"} <= set(saved["counts"])
    rows = read_rows(workdir / "metrics.jsonl")
    assert saved["eval/nll"] == rows[-1]["eval/nll"]
    assert saved["eval/bpb"] == pytest.approx(rows[-1]["eval/bpb"])
    assert 0 < saved["eval/nll"] < 6.0
    causes = {"init", "compile", "data_wait", "step", "eval", "checkpoint", "other"}
    assert causes <= set(saved["seconds"])
    assert "eval/nll" in result.text()


def test_three_programs_are_compiled_besides_sampling(finished):
    """init, train step, eval step; `start` and `decode_chunk` are the sampler's. Nothing compiles twice."""
    _, _, result = finished
    compiled = result.compilation["programs"]
    names = {"build", "step", "eval_step", "start", "decode_chunk"}
    assert {name: len(compiled[name]) for name in names} == dict.fromkeys(names, 1)
    # Besides: the learning rates, seeds to keys, and the copy that a checkpoint takes of the state.
    assert set(compiled) - names <= {"schedule", "_threefry_seed", "bitwise_or", "stage"}


def test_runs_of_one_shape_share_their_programs(finished, texts, tmp_path):
    """Other seed, rate, schedule, length, decay and beta2: nothing is traced again, and each has its own."""
    _, workdir, _ = finished
    optim = {"lr": 1e-3, "schedule": "linear", "final": 0.0, "weight_decay": 0.3, "b2": 0.9}
    optim |= {"warmup": 1.0, "warmup_unit": "steps"}
    train_part = {"num_steps": 3, "sample_prompts": []}
    other = config(texts, seed=5, optim=optim, train=train_part)
    result = train(other, tmp_path / "other", bar=False)
    assert set(result.compilation["programs"]) <= {"schedule"}
    rows = read_rows(tmp_path / "other" / "metrics.jsonl")
    np.testing.assert_allclose([row["train/lr"] for row in rows], [1e-3, 1e-3, 5e-4], rtol=1e-6)
    # The same run in a process of its own, so to speak.
    programs._programs.cache_clear()
    again = train(other, tmp_path / "again", bar=False)
    assert "step" in again.compilation["programs"]
    assert numbers(tmp_path / "other") == numbers(tmp_path / "again")
    assert rows[0]["train/nll"] != read_rows(workdir / "metrics.jsonl")[0]["train/nll"]


def test_samples_follow_their_prompts(finished):
    _, workdir, _ = finished
    text = (workdir / "samples.txt").read_text()
    assert text.startswith("##### step 6\nthe cat")


def test_a_finished_run_is_not_run_again(finished):
    cfg, workdir, result = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    again = train(cfg, workdir, bar=False)
    assert again.to_dict() == json.loads(json.dumps(result.to_dict()))
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_torn_result_is_no_result(tmp_path, capsys):
    (tmp_path / "result.json").write_text("{")
    assert run._read_result(tmp_path) is None
    assert "result.json is damaged" in capsys.readouterr().err


def test_resume_equals_uninterrupted_to_the_bit(finished, tmp_path, monkeypatch):
    """Stopped between two periodic saves: parameters, moments, key and the rows of metrics agree."""
    cfg, workdir, _ = finished
    result = stop_and_go_on(cfg, tmp_path / "cut", [3], monkeypatch)
    assert result.status == "finished"
    whole, cut = final_state(cfg, workdir), final_state(cfg, tmp_path / "cut")
    assert whole.keys() == cut.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], cut[name], err_msg=name)
    assert numbers(workdir) == numbers(tmp_path / "cut")
    assert len(json.loads((tmp_path / "cut" / "config.json").read_text())["starts"]) == 2
    assert (tmp_path / "cut" / "samples.txt").read_text() == (workdir / "samples.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "stops"), [("adamw", [1, 2, 3, 4, 5]), ("muon", [2]), ("adafactor", [3]), ("lion", [4])]
)
def test_resume_at_every_step(texts, tmp_path, monkeypatch, optimizer, stops):
    cfg = config(texts, optim={"name": optimizer, "ema": 0.9, "lr": 1e-3}, train={"sample_prompts": []})
    train(cfg, tmp_path / "whole", bar=False)
    stop_and_go_on(cfg, tmp_path / "cut", stops, monkeypatch)
    whole, cut = final_state(cfg, tmp_path / "whole"), final_state(cfg, tmp_path / "cut")
    for name in whole:
        np.testing.assert_array_equal(whole[name], cut[name], err_msg=name)
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "cut")


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(finished, texts, tmp_path, monkeypatch):
    """The mesh is no part of a run's identity; losses agree up to the order of fp32 sums."""
    cfg, workdir, _ = finished
    meshes = ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2})
    for mesh, stop in zip(meshes, (3, STEPS + 1), strict=True):
        other = config(texts, mesh=mesh, train={"sample_prompts": []})
        assert config_hash(other) == config_hash(cfg)
        with monkeypatch.context() as patched:
            patched.setattr(run, "StopSignals", StopAt(stop))
            result = train(other, tmp_path / "cut", bar=False)
        assert result.mesh == {**dict.fromkeys(MESH_AXES, 1), **mesh}
    assert result.status == "finished"
    for a, b in zip(numbers(workdir), numbers(tmp_path / "cut"), strict=True):
        assert a["train/nll"] == pytest.approx(b["train/nll"], rel=1e-5)


def test_another_config_is_refused_with_the_diff(finished, texts):
    cfg, workdir, _ = finished
    other = config(texts, optim={"lr": 1e-3})
    with pytest.raises(UserError, match="holds a run with another config") as error:
        train(other, workdir, bar=False)
    assert "optim.lr: 0.003 -> 0.001" in str(error.value)
    assert str(error.value).count(" -> ") == 1
    assert build(json.loads((workdir / "config.json").read_text())["config"]) == cfg


def test_a_second_process_is_refused(finished):
    cfg, workdir, _ = finished
    with RunLock(workdir), pytest.raises(UserError, match=f"is in use by process {os.getpid()}"):
        train(cfg, workdir, bar=False)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"data": {"batch_size": 24}, "mesh": {"data": 8}},
            "data.batch_size=24 is not divisible by train.microbatches=2 x 8 mesh devices",
        ),
        (
            {"mesh": {"data": 16}},
            "mesh data=16 needs 16 devices, but there are 8",
        ),
        ({"mesh": {"data": -1, "tensor": 3}}, "8 devices are not a multiple of 3"),
        (
            {"mesh": {"data": 2, "tensor": 4}},
            "kv_heads has size 2, which the mesh (tensor=4) does not divide",
        ),
        ({"model": {"vocab_size": 200}}, "'byte' has 256 tokens, but the model's vocab_size is 200"),
        ({"data": {"train": "/nowhere/*.txt"}}, "/nowhere"),
        ({"data": {"train": ""}}, "data.train names no files"),
        ({"data": {"tokenizer": "/nowhere.model"}}, "tokenizer '/nowhere.model' does not exist"),
        (
            {
                "model": {"position": {"kind": "learned", "max_length": 16}},
                "sample": {"max_new_tokens": 10},
            },
            "'the cat' is 8 tokens, which with sample.max_new_tokens=10 do not fit the model's 16 positions",
        ),
        ({"train": {"warm_start": "/nowhere"}}, "/nowhere holds no checkpoint"),
        ({"optim": {"warmup": 100.0}}, "do not fit in the run of 6"),
    ],
)
def test_bad_input_is_refused_before_work_is_spent(texts, tmp_path, groups, message):
    """And the directory stays free for the mended config."""
    cfg = config(texts, **groups)
    with pytest.raises(UserError) as error:
        train(cfg, tmp_path / "run", bar=False)
    assert message in str(error.value)
    assert not step_dirs(tmp_path / "run" / "checkpoints")
    with RunLock(tmp_path / "run"):
        run._forget_unstarted(tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_learned_positions_must_reach_the_end_of_a_row(texts):
    model = {"position": {"kind": "learned", "max_length": 8}}
    with pytest.raises(UserError, match=r"data.seq_len=16 is longer than model.position.max_length=8"):
        plan(config(texts, model=model))


def test_changed_data_is_refused_at_resume(finished, texts, tmp_path, monkeypatch):
    cfg, _, _ = finished
    copies = tmp_path / "texts"
    copies.mkdir()
    for path in texts.glob("*.txt"):
        (copies / path.name).write_text(path.read_text())
    cfg = config(copies)
    with monkeypatch.context() as patched:
        patched.setattr(run, "StopSignals", StopAt(1))
        train(cfg, tmp_path / "run", bar=False)
    (copies / "train_a.txt").write_text("other words")
    with pytest.raises(UserError, match="the training data is not what"):
        train(cfg, tmp_path / "run", bar=False)


def test_a_plan_covers_machines_that_are_not_here(texts):
    wide = {"mesh": {"data": -1}, "data": {"batch_size": 128}}
    here, there = plan(config(texts, **wide)), plan(config(texts, **wide), num_devices=64)
    assert here.mesh_shape["data"] == 8
    assert there.mesh_shape["data"] == 64
    assert here.counts.n_total == there.counts.n_total == sum(np.prod(row.shape) for row in here.leaves)
    split = plan(config(texts, mesh={"data": 2, "fsdp": 4}))
    assert split.memory.params < here.memory.params
    assert split.memory.opt_state < here.memory.opt_state


def test_a_run_directory_gives_its_model_back(finished):
    cfg, workdir, _ = finished
    trained = load_trained(workdir)
    assert trained.step == STEPS
    assert trained.cfg == cfg
    saved = final_state(cfg, workdir)
    for name, leaf in named_leaves(trained.params):
        np.testing.assert_array_equal(np.asarray(leaf), saved[f"params/{name}"], err_msg=name)
    assert load_trained(workdir, step=4).step == 4
    with pytest.raises(UserError, match="not a run directory"):
        load_trained(workdir.parent)


def test_samples_of_a_run_are_a_function_of_the_seed(finished):
    _, workdir, _ = finished
    first = sample(workdir, ["the", "a cat"], max_new_tokens=5, seed=3)
    again = sample(workdir, ["the", "a cat"], max_new_tokens=5, seed=3)
    assert [r.tokens for r in first] == [r.tokens for r in again]
    assert all(1 <= len(r.tokens) <= 5 for r in first)


@pytest.mark.slow
def test_a_moved_run_keeps_its_tokenizer_and_a_profile_is_written(texts, tmp_path):
    """The tokenizer's own file and the text are gone: the run directory is enough to sample."""
    from jaxlm.data.tokenizer import train_sentencepiece

    spec = tmp_path / "t.model"
    train_sentencepiece([(texts / "train_a.txt").read_text()], spec, 275)
    cfg = config(
        texts,
        data={"tokenizer": str(spec)},
        model={"vocab_size": 275},
        train={"profile_start": 2, "profile_steps": 2},
    )
    train(cfg, tmp_path / "runs" / "run", bar=False)
    spec.unlink()
    moved = tmp_path / "elsewhere"
    (tmp_path / "runs" / "run").rename(moved)
    (result,) = sample(moved, ["the"], max_new_tokens=3)
    assert 1 <= len(result.tokens) <= 3
    assert list((moved / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_a_diverging_run_stops_with_a_message(texts, tmp_path):
    cfg = config(texts, optim={"lr": 1e30, "clip_norm": 0.0}, train={"max_nonfinite": 2, "num_steps": 20})
    with pytest.raises(NonFiniteError, match="was not finite in 2 updates in a row"):
        train(cfg, tmp_path / "run", bar=False)
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    assert saved["status"] == "failed"
    assert "not finite" in saved["reason"]


@pytest.mark.slow
def test_the_noise_scale_is_measured_beside_an_unchanged_run(finished, texts, tmp_path):
    cfg, workdir, _ = finished
    watched = config(texts, train={"noise_scale_every": 2, "sample_prompts": []})
    assert config_hash(watched) == config_hash(cfg)
    train(watched, tmp_path / "run", bar=False)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "noise/trace" in row] == [2, 4, 6]
    plain = [
        {k: v for k, v in row.items() if not k.startswith("noise/")} for row in numbers(tmp_path / "run")
    ]
    assert plain == numbers(workdir)


@pytest.mark.slow
def test_a_warm_start_takes_the_parameters_of_another_run(finished, texts, tmp_path):
    _, workdir, _ = finished
    cfg = config(
        texts,
        train={"warm_start": str(workdir), "num_steps": 3, "eval_every": 0, "sample_prompts": []},
        optim={"lr": 0.0},
    )
    train(cfg, tmp_path / "warm", bar=False)
    before, after = load_trained(workdir).params, load_trained(tmp_path / "warm").params
    for (name, a), (_, b) in zip(named_leaves(before), named_leaves(after), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


@pytest.mark.slow
def test_the_averaged_parameters_are_evaluated_and_loaded(texts, tmp_path):
    cfg = config(texts, optim={"ema": 0.5}, train={"sample_prompts": []})
    result = train(cfg, tmp_path / "run", bar=False)
    assert result.metrics["eval_ema/nll"] != result.metrics["eval/nll"]
    raw, mean = load_trained(tmp_path / "run").params, load_trained(tmp_path / "run", ema=True).params
    assert float(np.abs(np.asarray(raw["embed"]["table"]) - np.asarray(mean["embed"]["table"])).max()) > 0


def command(*words, **env):
    return subprocess.Popen(
        [sys.executable, "-m", "jaxlm", *words],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    """Real processes: one is stopped while training (exit code 75), a second is refused meanwhile, a third
    goes on where the first stopped."""
    workdir = tmp_path / "run"
    words = [
        "train",
        "--config=experiments/base.py:smoke",
        f"--workdir={workdir}",
        "--config.train.num_steps=4000",
    ]
    words += ["--config.train.log_every=20", "--config.train.eval_every=0", "--config.train.save_every=0"]
    words += ["--config.train.sample_prompts=()", "--config.data.eval_tokens=2000"]
    first = command(*words)
    deadline = time.time() + 240
    while not (workdir / "metrics.jsonl").exists() or len(read_rows(workdir / "metrics.jsonl")) < 3:
        assert first.poll() is None, first.communicate()
        assert time.time() < deadline
        time.sleep(0.2)
    second = command(*words)
    out, err = second.communicate(timeout=120)
    assert second.returncode == 2, (out, err)
    assert f"is in use by process {first.pid}" in err
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=120)
    assert first.returncode == 75, (out, err)
    assert "SIGTERM: stopping after this step" in err
    result = json.loads((workdir / "result.json").read_text())
    assert result["status"] == "stopped"
    (saved,) = step_dirs(workdir / "checkpoints")
    assert saved == result["steps"]
    third = command(*words)
    while True:
        rows = read_rows(workdir / "metrics.jsonl")
        if rows[-1]["step"] > saved:
            break
        assert third.poll() is None, third.communicate()
        time.sleep(0.2)
    third.send_signal(signal.SIGINT)
    out, err = third.communicate(timeout=120)
    assert third.returncode == 75, (out, err)
    assert f"going on at step {saved}" in err
    steps = [row["step"] for row in read_rows(workdir / "metrics.jsonl")]
    assert steps == sorted(set(steps))
    again = json.loads((workdir / "result.json").read_text())
    assert again["steps"] > saved
    assert to_dict(load_trained(workdir, mesh=MeshConfig(data=1)).cfg)["train"]["num_steps"] == 4000
