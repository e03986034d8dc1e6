"""Workers that are killed, whose clocks are wrong or whose disks are full: every run is as if undisturbed."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxlm.sweep.claims import Claims, this_process
from jaxlm.sweep.command import cells_of
from jaxlm.sweep.status import newest_step, survey
from jaxlm.sweep.store import open_store
from jaxlm.train.checkpoint import step_dirs
from jaxlm.train.metrics import read_rows

ROOT = Path(__file__).parents[2]

# A worker whose clock is three years behind, and one whose disk takes no file of more than 4 kB.
WRONG_CLOCK = """
import time
now, now_ns = time.time, time.time_ns
time.time, time.time_ns = (lambda: now() - 1e8), (lambda: now_ns() - 10**17)
time.strftime = lambda form, *t: "2021-01-01T00:00:00+0000"
"""
FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
"""


def twelve(tiny):
    """Nine lone runs of one shape (three rates, three seeds, two lengths), a trunk and its two branches."""
    texts, cells = tiny.texts, []
    for lr in (1e-3, 3e-3, 9e-3):
        for seed in range(3):
            train = {"num_steps": 20 if seed else 28, "save_every": 4}
            cells.append(tiny.cell(tiny.config(texts, seed=seed, optim={"lr": lr}, train=train)))
    return [*cells, *tiny.branches(texts)]


def start(folder, before="", log=None):
    """A worker process."""
    order = {"workdir": str(folder), "scratch": None, "name": None, "session": "test", "parent": os.getpid()}
    order |= {"heartbeat": 0.5, "poll": 0.2, "max_deaths": 100}
    code = f"{before}\nimport sys\nfrom jaxlm.sweep.command import main\n"
    code += f"sys.exit(main([{json.dumps(order)!r}]))"
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    with (log or folder.parent / "workers.txt").open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=file, stderr=file
        )


def wait(processes, seconds):
    """Until all have ended; they are killed, and the test fails, when that takes too long."""
    until = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            raise


def outcome(folder, cell):
    """What a run computed: its losses at every logged step, its final loss, a hash of its whole state."""
    path = folder / "runs" / cell.id
    result = json.loads((path / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["config_hash"].startswith(cell.id)
    digest = hashlib.sha256()
    for item in ("params", "optimizer"):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.restore(step_dirs(path / "checkpoints")[cell.steps] / item)
        for name, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            digest.update(jax.tree_util.keystr(name).encode() + np.asarray(leaf).tobytes())
    rows = {row["step"]: row["train/nll"] for row in read_rows(path / "metrics.jsonl")}
    assert list(rows) == sorted(rows)
    kept = {step: loss for step, loss in rows.items() if step % 5 == 0}
    return result["eval/nll"], digest.hexdigest(), kept


def events(folder, kind, field="run"):
    """A field of the events of a kind that all workers logged."""
    lines = [line for path in (folder / "logs").glob("*.jsonl") for line in path.read_text().splitlines()]
    return [row[field] for row in map(json.loads, lines) if row["event"] == kind]


def holders(claims, cells, workers, saved):
    """Workers that hold a run with a checkpoint of at least this step."""
    seen = claims.look([cell.id for cell in cells])
    held = {run: claim for run, claim in seen.items() if claim.state == "held" and claim.content}
    pids = {c.content["pid"] for run, c in held.items() if newest_step(claims.store, run) >= saved}
    return [i for i, process in enumerate(workers) if process.pid in pids]


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """One worker that nobody disturbs: its cells and their outcomes."""
    folder = tiny.make(tmp_path_factory.mktemp("undisturbed") / "S", twelve(tiny))
    process = start(folder)
    wait([process], 240)
    assert process.returncode == 0, (folder.parent / "workers.txt").read_text()
    cells = cells_of(folder)
    assert len(cells) == 12
    outcomes = {cell.id: outcome(folder, cell) for cell in cells}
    assert len({digest for _, digest, _ in outcomes.values()}) == 12
    # All runs of one shape: one program for training, though rates, schedules and lengths differ.
    cached = [path.name for path in (folder / "runs" / "compilation_cache").iterdir()]
    assert sum(name.startswith("jit_step-") for name in cached) == 1
    return cells, outcomes


@pytest.mark.slow
def test_kills_at_random_times_change_nothing(tiny, tmp_path, undisturbed):
    """Three workers, one of them with a wrong clock; whoever works is killed every now and then."""
    cells, outcomes = undisturbed
    folder = tiny.make(tmp_path / "S", twelve(tiny))
    store, rng, killed = open_store(folder), random.Random(0), []
    saved = [0, 4, 8, 0, 12]  # each blow falls on a worker whose run has a checkpoint of this step
    claims = Claims(store, this_process())
    kinds = ["", "", WRONG_CLOCK]
    workers = [start(folder, kind) for kind in kinds]
    began = time.monotonic()
    try:
        while time.monotonic() - began < 120 and len(killed) < len(saved):
            time.sleep(rng.uniform(0.5, 2.0))
            until = time.monotonic() + 20
            while not (busy := holders(claims, cells, workers, saved[len(killed)])):
                if time.monotonic() > until or all(process.poll() is not None for process in workers):
                    break
                time.sleep(0.01)
            if busy:
                i = rng.choice(busy)
                workers[i].send_signal(signal.SIGKILL)
                workers[i].wait()
                killed.append(i)
                workers[i] = start(folder, kinds[i])
        wait(workers, 240)
    finally:
        for process in workers:
            process.kill()
    resumed = [step for step in events(folder, "started", "step") if step > 0]
    print((tmp_path / "workers.txt").read_text())
    print("KILLS", killed, len(events(folder, "started")), len(events(folder, "finished")), resumed)
    assert len(killed) == len(saved)
    assert [process.returncode for process in workers] == [0, 0, 0]
    assert all(status.state == "done" for status in survey(store, cells, claims).values())
    for cell in cells:
        assert outcome(folder, cell) == outcomes[cell.id], cell
    # Nobody ran to its end what another had finished; a worker may die after the result and before its note.
    finished = events(folder, "finished")
    assert len(finished) == len(set(finished)) >= 12 - len(killed)
    assert not events(folder, "failed")
    assert not events(folder, "lost")
    # Kills struck in the middle of runs, which then went on from their checkpoints.
    assert len(resumed) >= 2


@pytest.mark.slow
def test_a_full_disk_harms_no_other_worker(tiny, tmp_path, undisturbed):
    """Its runs fail for that reason and are free again; another worker trains them, and all the others."""
    _, outcomes = undisturbed
    cells = twelve(tiny)[:5]
    folder = tiny.make(tmp_path / "S", cells)
    full = start(folder, FULL_DISK)
    wait([full], 120)
    failed = events(folder, "failed")
    assert len(failed) == 3  # then it leaves the rest to others
    for run in failed:
        record = json.loads((folder / "runs" / run / "failed.json").read_text())
        assert record["kind"] == "machine"
        assert "large" in record["reason"] or "could not be written" in record["reason"], record["reason"]
    assert not events(folder, "finished")
    worker = start(folder)
    wait([worker], 240)
    assert worker.returncode == 0
    assert sorted(events(folder, "finished")) == sorted(cell.id for cell in cells)
    for cell in cells:
        assert outcome(folder, cell) == outcomes[cell.id], cell
        assert not (folder / "runs" / cell.id / "failed.json").exists()
