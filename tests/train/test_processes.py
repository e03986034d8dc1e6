"""Several processes are one run: the same losses, one directory, one decision to stop.

Processes of one CPU device or two, over gloo. Sums over four devices are the same sums in one process and in
several, up to the order in which gloo adds: rows agree to 2e-6.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import distributed
from jaxlm.config import build, load_experiment
from jaxlm.errors import UserError
from jaxlm.sharding import Layout, MeshConfig, make_mesh
from jaxlm.train import run
from jaxlm.train.checkpoint import step_dirs
from jaxlm.train.feed import own_rows, place_batch
from jaxlm.train.metrics import read_rows

ROOT = Path(__file__).parents[2]
STEPS = 60
EXPERIMENT = """
from jaxlm.config import default_config

def get_config():
    config = default_config()
    config.model.update(dict(num_layers=2, model_dim=16, mlp_dim=16, dropout=0.1))
    config.model.attention.update(dict(num_heads=4, num_kv_heads=2))
    config.data.update(dict(train="{text}", eval="{text}", seq_len=16, batch_size=8))
    config.optim.lr = 3e-3
    config.sample.max_new_tokens = 2
    config.mesh.update(dict(data=1, fsdp=2, tensor=2))
    config.train.update(dict(num_steps={steps}, log_every=1, eval_every=30, save_every=20))
    config.train.noise_scale_every = 20
    return config
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A config file of a tiny run on four devices."""
    folder = tmp_path_factory.mktemp("experiment")
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat"], 800)
    (folder / "text.txt").write_text(" ".join(words))
    (folder / "tiny.py").write_text(EXPERIMENT.format(text=folder / "text.txt", steps=STEPS))
    return folder / "tiny.py"


@pytest.fixture(scope="module")
def alone(experiment, tmp_path_factory):
    """Directory of the run in one process, uninterrupted."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    run.train(build(load_experiment(str(experiment))), workdir, bar=False)
    return workdir


class Processes:
    """`count` processes that train together."""

    def __init__(self, experiment, workdir, count, devices, *words):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        flags = ["train", f"--config={experiment}", f"--workdir={workdir}", *words]
        flags += [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
        self.all = [
            subprocess.Popen(
                [sys.executable, "-m", "jaxlm", *flags, f"--process_id={i}"],
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i in range(count)
        ]
        self.workdir = workdir

    def wait_for_step(self, step):
        """Return when the row of that step is on disk."""
        rows = self.workdir / "metrics.jsonl"
        deadline = time.time() + 180
        while not (rows.exists() and any(row["step"] >= step for row in read_rows(rows))):
            if time.time() > deadline or any(p.poll() is not None for p in self.all):
                raise AssertionError(self.end(timeout=1))
            time.sleep(0.05)

    def end(self, timeout=180):
        """[(exit code, output)], by process."""
        try:
            outputs = [p.communicate(timeout=timeout)[0] for p in self.all]
        finally:
            for process in self.all:
                process.kill()
        return [(p.returncode, text) for p, text in zip(self.all, outputs, strict=True)]


def numbers(workdir):
    """The rows of a run without what a clock measured."""
    rows = read_rows(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "perf/"))} for row in rows]


def assert_same_run(workdir, want, steps):
    got, want = numbers(workdir), numbers(want)[:steps]
    assert [row["step"] for row in got] == list(range(1, steps + 1))
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=2e-4 if "noise" in name else 2e-6), (a["step"], name)


@pytest.mark.slow
def test_two_processes_go_on_with_a_run_of_one_and_one_with_theirs(experiment, alone, tmp_path, monkeypatch):
    """One process stops after 3 steps; two go on until one is told to stop, and both do; one ends it."""
    workdir, cfg = tmp_path / "run", build(load_experiment(str(experiment)))
    with monkeypatch.context() as patched:
        stop = lambda warn: contextlib.nullcontext(lambda done: "SIGTERM" if done == 3 else "")  # noqa: E731
        patched.setattr(run, "StopSignals", stop)
        assert run.train(cfg, workdir, bar=False).steps == 3
    pair = Processes(experiment, workdir, 2, 2)
    pair.wait_for_step(5)
    pair.all[1].send_signal(signal.SIGTERM)
    ended = pair.end()
    assert [code for code, _ in ended] == [75, 75], ended
    assert "SIGTERM: stopping after this step" not in ended[0][1]  # it was the other that was told
    stopped = json.loads((workdir / "result.json").read_text())
    assert (stopped["status"], stopped["reason"]) == ("stopped", "SIGTERM")
    assert 5 <= stopped["steps"] < STEPS
    assert stopped["steps"] in step_dirs(workdir / "checkpoints")
    assert stopped["mesh"]["fsdp"] == stopped["mesh"]["tensor"] == 2
    assert_same_run(workdir, alone, stopped["steps"])
    assert run.train(cfg, workdir, bar=False).status == "finished"
    assert_same_run(workdir, alone, STEPS)
    assert (workdir / "samples.txt").read_text() == (alone / "samples.txt").read_text()


@pytest.mark.slow
def test_four_processes_of_which_two_share_their_rows_equal_one(experiment, tmp_path):
    """The tensor axis crosses processes; each pair makes the same rows. A refusal is told to all of them."""
    cfg = load_experiment(str(experiment))
    cfg.train.update(dict(num_steps=4, noise_scale_every=0, sample_prompts=()))
    cfg.data.eval = ""
    cfg.mesh.update(dict(fsdp=1, data=2))
    flags = ["--config.train.num_steps=4", "--config.train.noise_scale_every=0", "--config.data.eval="]
    flags += ["--config.train.sample_prompts=()", "--config.mesh.fsdp=1", "--config.mesh.data=2"]
    four = Processes(experiment, tmp_path / "four", 4, 1, *flags)
    ended = four.end()
    assert [code for code, _ in ended] == [0] * 4, ended
    assert "finished at step 4" in ended[0][1]
    assert "finished" not in ended[1][1]  # the first one speaks
    run.train(build(cfg), tmp_path / "one", bar=False)
    assert_same_run(tmp_path / "four", tmp_path / "one", 4)
    other = Processes(experiment, tmp_path / "four", 2, 2).end()
    assert [code for code, _ in other] == [2, 2], other
    assert all("train.num_steps: 4 -> 60" in text for _, text in other)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others(experiment, tmp_path):
    pair = Processes(experiment, tmp_path / "run", 2, 2, "--config.train.num_steps=100000")
    pair.wait_for_step(3)
    pair.all[1].kill()
    began = time.time()
    (code, text), _ = pair.end(timeout=60)
    assert code not in (0, 75), text
    assert "process 0 of 2 failed" in text
    assert time.time() - began < 30


REFUSAL = """
import sys
import jax
from jaxlm import distributed
from jaxlm.errors import UserError

def lacks_a_file():
    if jax.process_index() == 1:
        raise UserError("no file here")
    return 1

distributed.start(sys.argv[1], 2, int(sys.argv[2]))
assert distributed.chief_first(jax.process_index) == int(sys.argv[2])
try:
    distributed.chief_first(lacks_a_file)
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_what_one_process_refuses_all_refuse():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-c", REFUSAL, address]
    pair = [
        subprocess.Popen([*command, str(i)], cwd=ROOT, stdout=subprocess.PIPE, text=True) for i in range(2)
    ]
    # Gloo speaks on the same stream.
    told = [process.communicate(timeout=180)[0].splitlines()[-1] for process in pair]
    assert told == ["process 1: no file here", "no file here"]


def test_a_mesh_without_devices_of_some_process_is_refused_in_all(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="the mesh of 8 devices has none of process 1: with 2 processes"):
        own_rows(Layout(make_mesh(MeshConfig(data=8))), 8)


def test_every_device_gets_its_rows_from_a_part_of_the_batch():
    layout = Layout(make_mesh(MeshConfig(data=4, tensor=2)))
    np.testing.assert_array_equal(own_rows(layout, 8), np.arange(8))
    batch = {"tokens": np.arange(8 * 3).reshape(8, 3)}
    placed = place_batch(layout, batch, 8, own_rows(layout, 8))["tokens"]
    np.testing.assert_array_equal(placed, batch["tokens"])
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, batch["tokens"][shard.index])
        assert shard.data.shape == (2, 3)


def test_processes_stop_together_one_step_after_one_is_told():
    mesh = make_mesh(MeshConfig(data=8))
    told = {3: "SIGINT", 7: "wall time"}
    stop = distributed.AgreedStop(lambda step: told.get(step, ""), mesh)
    assert [stop(step) for step in range(1, 6)] == ["", "", "", "SIGINT", "SIGINT"]
    stop = distributed.AgreedStop(lambda step: told.get(step, "") if step > 5 else "", mesh)
    assert [stop(step) for step in range(6, 9)] == ["", "", "wall time"]


def test_one_process_alone_agrees_with_itself():
    distributed.start()  # nobody to join
    assert jax.process_count() == 1
    assert distributed.is_chief()
    assert distributed.from_chief(lambda: 3) == distributed.chief_first(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError), distributed.leaving_at_once():
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("", 2, None), "--num_processes=2 needs --coordinator=HOST:PORT"),
        (("auto", None, 1), "--process_id=1 needs --coordinator=HOST:PORT"),
        (("10.0.0.1:80", 2, None), "--coordinator=10.0.0.1:80 needs --process_id"),
        (("10.0.0.1", 2, 0), "--coordinator='10.0.0.1' is not HOST:PORT"),
        (("10.0.0.1:80", 2, 2), r"--process_id=2 is not in \[0, --num_processes=2\)"),
    ],
)
def test_flags_that_do_not_belong_together(flags, message):
    with pytest.raises(UserError, match=message):
        distributed.start(*flags)


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables of a launcher, and returns what JAX is asked to join with."""
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kw: asked.append((args, kw)))
    for each in distributed.LAUNCHERS:
        for name in (each.sign, each.count, each.rank, each.local, each.step, "JAX_LOCAL_DEVICE_IDS"):
            monkeypatch.delenv(name or each.count, raising=False)

    def put(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        return asked

    return put


OPEN_MPI_5 = dict(OMPI_COMM_WORLD_SIZE=4, OMPI_COMM_WORLD_RANK=3, OMPI_COMM_WORLD_LOCAL_RANK=1)
STEP = dict(
    SLURM_STEP_NODELIST="n[1-2]", SLURM_NTASKS=2, SLURM_PROCID=1, SLURM_LOCALID=0, SLURM_STEP_NUM_TASKS=2
)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (OPEN_MPI_5, r"Open MPI started 4 processes \(OMPI_COMM_WORLD_SIZE\).* add --coordinator=HOST:PORT"),
        (OPEN_MPI_5 | STEP, "Open MPI started 4 processes"),  # its daemons are started by srun
        (dict(PMI_SIZE=2, PMI_RANK=0), r"MPI started 2 processes .* taken from PMI_SIZE and PMI_RANK"),
    ],
)
def test_processes_that_cannot_find_each_other_do_not_train_alone(environment, variables, message):
    asked = environment(**variables)
    with pytest.raises(UserError, match=message):
        distributed.start()
    assert asked == []


def test_launchers_tell_each_process_its_place(environment):
    asked = environment(SLURM_NTASKS=2, SLURM_PROCID=0)  # a batch script is one process
    distributed.start()
    environment(**STEP | dict(SLURM_STEP_NUM_TASKS=1))  # so is the shell of an interactive job
    distributed.start()
    assert asked == []
    environment(PMI_SIZE=8, PMI_RANK=5)
    distributed.start("10.0.0.1:80")
    assert asked.pop() == (("10.0.0.1:80", 8, 5), dict(local_device_ids=None))
    environment(**STEP)
    distributed.start()
    assert asked.pop() == ((), {})  # JAX asks SLURM
    environment(**OPEN_MPI_5)
    distributed.start("10.0.0.1:80")
    assert asked.pop() == (("10.0.0.1:80", 4, 3), dict(local_device_ids=[1]))
    distributed.start("10.0.0.1:80", 2, 0)  # what is given counts
    assert asked.pop() == (("10.0.0.1:80", 2, 0), dict(local_device_ids=[1]))
    environment(JAX_LOCAL_DEVICE_IDS="0,1")
    distributed.start("10.0.0.1:80")
    assert asked.pop() == (("10.0.0.1:80", 4, 3), dict(local_device_ids=None))
    with pytest.raises(UserError, match="needs --process_id"):
        distributed.start("10.0.0.1:80", 2)
    environment(OMPI_COMM_WORLD_RANK=4)
    with pytest.raises(UserError, match=r"OMPI_COMM_WORLD_RANK=4 is not in \[0, OMPI_COMM_WORLD_SIZE=4\)"):
        distributed.start("10.0.0.1:80")
    environment(OMPI_MCA_orte_hnp_uri="1.0;tcp://10.0.0.1:34911", OMPI_COMM_WORLD_RANK=3)
    distributed.start()
    assert asked.pop() == ((), {})  # Open MPI 4
