"""Workers in this process: what they train, in which order, and what they make of failures."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jaxlm.errors import UserError
from jaxlm.sweep import board, worker
from jaxlm.sweep.claims import Claims, Owner, this_process
from jaxlm.sweep.command import Summary, _shares, cells_of, sweep, sweep_command
from jaxlm.sweep.plan_file import all_cells, load_plans
from jaxlm.sweep.status import Status, newest_row, newest_step, survey
from jaxlm.sweep.store import open_store
from jaxlm.sweep.worker import Conduct
from jaxlm.train import programs, run
from jaxlm.train.checkpoint import CheckpointError, step_dirs
from jaxlm.train.loop import NonFiniteError
from jaxlm.train.rundir import RunLock

ROOT = Path(__file__).parents[2]
FAST = Conduct(poll=0.1, heartbeat=0.5)


def events(folder):
    """What the workers logged, in order."""
    rows = [
        json.loads(line)
        for path in (folder / "logs").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    return [(row["event"], row["run"]) for row in sorted(rows, key=lambda row: row["time"])]


def result(folder, cell):
    return json.loads((folder / "runs" / cell.id / "result.json").read_text())


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A whole sweep, trained here: three learning rates, a trunk and two branches."""
    texts = tiny.texts
    lrs = [tiny.cell(tiny.config(texts, optim={"lr": lr})) for lr in (1e-3, 2e-3, 4e-3)]
    folder = tiny.make(tmp_path_factory.mktemp("sweep") / "S", [*lrs, *tiny.branches(texts)])
    programs._programs.cache_clear()
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream):
        summary = sweep(folder, conduct=FAST, live=False)
    return folder, summary, stream.getvalue()


def test_every_run_is_trained_once_trunks_before_branches(finished):
    folder, summary, _ = finished
    cells = cells_of(folder)
    assert summary.exit_code == 0
    assert set(summary.done) == {cell.id for cell in cells}
    assert len(cells) == 6
    log = events(folder)
    assert log == [(event, cell.id) for cell in cells for event in ("started", "finished")]
    assert [cell.role for cell in cells][-3:] == ["trunk", "branch", "branch"]
    for cell in cells:
        assert result(folder, cell)["config_hash"].startswith(cell.id)
    short = cells[-2]
    assert result(folder, short)["branch"]["own_steps"] == 2


def test_runs_of_one_shape_share_one_compilation(finished):
    """Three rates, three schedules, three lengths: the first run traces and compiles, the others do not."""
    folder, _, _ = finished
    compiled = [set(result(folder, cell)["compilation"]["programs"]) for cell in cells_of(folder)]
    assert {"build", "step", "eval_step"} <= compiled[0]
    for later in compiled[1:]:
        assert later <= {"schedule"}


def test_a_second_sweep_has_nothing_to_do(finished):
    folder, _, _ = finished
    before = events(folder)
    summary = sweep(folder, conduct=FAST, live=False)
    assert (summary.exit_code, summary.text) == (0, "6 of 6 done")
    assert events(folder) == before


def test_plain_lines_tell_what_changes(finished):
    _, _, text = finished
    lines = text.splitlines()
    assert lines[-1] == "6 of 6 done"
    assert any(" done     branch" in line and "loss " in line for line in lines)


def test_what_a_run_prints_goes_to_a_file(finished):
    folder, _, text = finished
    (path,) = (folder / "logs").glob("*.txt")
    assert "parameters, 128 tokens a step" in path.read_text()
    assert "tokens a step" not in text


# --------------------------------------------------------------------------------------------------- failures


def raises(error, ids):
    """`train`, but the runs of these ids fail with `error`."""
    train = worker.train

    def failing(cfg, workdir, **options):
        if workdir.name in ids:
            raise error
        return train(cfg, workdir, **options)

    return failing


@pytest.fixture
def three(tiny, tmp_path):
    cells = [tiny.cell(tiny.config(tiny.texts, seed=seed, train={"num_steps": 4})) for seed in range(3)]
    return tiny.make(tmp_path / "S", cells), cells


def chained(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NonFiniteError(7, 3), "run"),
        (UserError("data.train names no files"), "run"),
        (ZeroDivisionError("a bug"), "run"),
        (CheckpointError("another model's state"), "run"),
        (MemoryError(), "machine"),
        (OSError(28, "No space left on device"), "machine"),
        (chained(UserError("cannot write to /full"), OSError(28, "No space left on device")), "machine"),
        (chained(CheckpointError("could not be written"), ValueError("write failed")), "machine"),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), "machine"),
    ],
)
def test_whose_fault_a_failure_is(error, kind):
    assert worker._kind(error) == kind


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (MemoryError(), "machine", "MemoryError"),
        pytest.param(ZeroDivisionError("a bug"), "run", "ZeroDivisionError: a bug", marks=pytest.mark.slow),
        pytest.param(UserError("data.train names no files"), "run", "no files", marks=pytest.mark.slow),
    ],
)
def test_a_failure_is_written_down_and_the_others_go_on(three, monkeypatch, error, kind, text):
    folder, cells = three
    with monkeypatch.context() as patched:
        patched.setattr(worker, "train", raises(error, {cells[1].id}))
        summary = sweep(folder, conduct=FAST, live=False)
    assert summary.exit_code == 1
    assert set(summary.done) == {cells[0].id, cells[2].id}
    assert text in summary.failed[cells[1].id]
    record = json.loads((folder / "runs" / cells[1].id / "failed.json").read_text())
    assert (record["kind"], len(record["attempts"])) == (kind, 1)
    assert type(error).__name__ in record["attempts"][0]["traceback"]
    # Told not to, another sweep leaves it; else it is tried again, and is as if nothing had happened.
    left = sweep(folder, conduct=dataclasses.replace(FAST, retry_failed=False), live=False)
    assert (left.exit_code, list(left.failed)) == (1, [cells[1].id])
    again = sweep(folder, conduct=FAST, live=False)
    assert again.exit_code == 0
    assert not (folder / "runs" / cells[1].id / "failed.json").exists()
    assert [run for event, run in events(folder) if event == "finished"] == [
        cells[0].id,
        cells[2].id,
        cells[1].id,
    ]


@pytest.mark.slow
def test_a_divergent_run_fails_with_its_reason(tiny, tmp_path):
    wild = tiny.config(tiny.texts, optim={"lr": 1e30, "clip_norm": 0.0}, train={"max_nonfinite": 2})
    folder = tiny.make(tmp_path / "S", [tiny.cell(wild)])
    summary = sweep(folder, conduct=FAST, live=False)
    assert summary.exit_code == 1
    (reason,) = summary.failed.values()
    assert "the loss or the gradient was not finite in 2 updates in a row" in reason
    assert result(folder, tiny.cell(wild))["status"] == "failed"


def test_a_full_disk_fails_one_run_here_and_another_worker_takes_it(three, monkeypatch):
    """Of one session: what failed for a machine's reasons is another worker's to try, once; a bug is not."""
    folder, cells = three
    store = open_store(folder)
    full = CheckpointError("the checkpoint of step 4 could not be written")
    full.__cause__ = ValueError("RESOURCE_EXHAUSTED: write failed")
    with monkeypatch.context() as patched:
        patched.setattr(worker, "train", raises(full, {cells[0].id}))
        first = worker.Worker(store, cells, FAST, session="s")
        first.work()
        again = worker.Worker(store, cells, FAST, session="s")
        assert again._is_ready(cells[0], again.claims.look([cells[0].id])[cells[0].id])
        again.work()
    states = survey(store, cells, Claims(store, this_process()))
    assert [states[cell.id].state for cell in cells] == ["failed", "done", "done"]
    third = worker.Worker(store, cells, FAST, session="s")
    third.work()
    assert survey(store, cells, Claims(store, this_process()))[cells[0].id].state == "done"
    shutil.rmtree(folder / "runs" / cells[1].id)
    with monkeypatch.context() as patched:
        patched.setattr(worker, "train", raises(TypeError("a bug"), {cells[1].id}))
        worker.Worker(store, cells, FAST, session="s").work()
    other = worker.Worker(store, cells, FAST, session="s")
    assert not other._is_ready(cells[1], other.claims.look([cells[1].id])[cells[1].id])


def test_a_worker_whose_machine_fails_every_run_leaves_the_rest_to_others(
    tiny, tmp_path, monkeypatch, capsys
):
    cells = [tiny.cell(tiny.config(tiny.texts, seed=seed)) for seed in range(5)]
    folder = tiny.make(tmp_path / "S", cells)
    monkeypatch.setattr(worker, "train", raises(OSError(30, "Read-only file system"), {c.id for c in cells}))
    summary = sweep(folder, conduct=FAST, live=False)
    assert (len(summary.failed), len(summary.open), summary.exit_code) == (3, 2, 1)
    assert "giving up" in capsys.readouterr().err


def test_a_disk_too_full_for_the_record_does_no_harm(three, monkeypatch, capsys):
    """Not even the reason can be written: the claim is free again, and the others are trained."""
    folder, cells = three
    store = open_store(folder)
    write = type(store).write

    def full(self, name, data):
        if name.endswith("failed.json"):
            raise OSError(28, "No space left on device")
        write(self, name, data)

    with monkeypatch.context() as patched:
        patched.setattr(worker, "train", raises(OSError(28, "No space left on device"), {cells[0].id}))
        patched.setattr(type(store), "write", full)
        summary = sweep(folder, conduct=FAST, live=False)
    assert set(summary.done) == {cells[1].id, cells[2].id}
    assert "that could not be written down either" in capsys.readouterr().err
    assert Claims(store, this_process()).look([cells[0].id])[cells[0].id].state == "free"


def test_a_run_on_which_workers_die_is_failed_in_the_end(three):
    """Their processes are gone, time after time, and no checkpoint is newer."""
    folder, cells = three
    store = open_store(folder)
    dead = dataclasses.replace(this_process(), started="1")
    for deaths in range(4):
        ghost = Claims(store, dead)
        seen = ghost.look([cells[0].id])[cells[0].id]
        assert seen.state == ("stale" if deaths else "free")
        worker_of = worker.Worker(store, cells, FAST, session="s")
        worker_of.claims = ghost
        assert worker_of._take(cells[0], seen) is not None
        ghost._held.clear()
    summary = sweep(folder, conduct=dataclasses.replace(FAST, max_deaths=4), live=False)
    assert "4 workers died on it, one after another" in summary.failed[cells[0].id]
    assert set(summary.done) == {cells[1].id, cells[2].id}
    assert sweep(folder, conduct=FAST, live=False).exit_code == 0  # asked to, it is tried again


def test_the_branches_of_a_failed_trunk_wait(tiny, tmp_path, monkeypatch):
    cells = tiny.branches(tiny.texts)
    folder = tiny.make(tmp_path / "S", cells)
    monkeypatch.setattr(worker, "train", raises(MemoryError(), {cells[0].id}))
    summary = sweep(folder, conduct=FAST, live=False)
    assert list(summary.failed) == [cells[0].id]
    assert summary.open[cells[1].id] == f"for step 8 of its trunk {cells[0].id}"
    assert summary.exit_code == 1


# ---------------------------------------------------------------------------------------------- interruptions


class StopAt:
    """In place of `StopSignals`, in the loop: asks to stop after one step."""

    def __init__(self, step):
        self.step = step

    def __call__(self, warn=None):
        return contextlib.nullcontext(lambda done: "SIGTERM" if done == self.step else "")


def test_a_signal_stops_with_a_checkpoint_and_the_same_command_goes_on(three, monkeypatch):
    folder, cells = three
    with monkeypatch.context() as patched:
        patched.setattr(run, "StopSignals", StopAt(2))
        summary = sweep(folder, conduct=FAST, live=False)
    assert (summary.exit_code, summary.stopped) == (75, "SIGTERM")
    assert sorted(step_dirs(folder / "runs" / cells[0].id / "checkpoints")) == [2]
    assert events(folder) == [("started", cells[0].id), ("stopped", cells[0].id)]
    store = open_store(folder)
    assert Claims(store, this_process()).look([cells[0].id])[cells[0].id].state == "free"
    assert sweep(folder, conduct=FAST, live=False).exit_code == 0
    assert len(json.loads((folder / "runs" / cells[0].id / "config.json").read_text())["starts"]) == 2


def test_a_run_that_was_taken_over_is_left_alone(three, monkeypatch, capsys):
    """The claim is lost in the middle: the run stops at the next step, and writes no result."""
    folder, cells = three
    store, train = open_store(folder), worker.train

    def rival(cfg, workdir, *, stop, **options):
        def meddling(step):
            if step == 2 and workdir.name == cells[0].id:
                other = Claims(store, Owner("other", "elsewhere", "", 1, ""), clock=lambda: 0.0)
                seen = dataclasses.replace(other.look([cells[0].id])[cells[0].id], state="stale")
                assert other.take(cells[0].id, seen)
                for claim in ours.claims._held.values():
                    claim.renew()  # as the next heartbeat does
            return stop(step)

        return train(cfg, workdir, stop=meddling, **options)

    monkeypatch.setattr(worker, "train", rival)
    ours = worker.Worker(store, cells, FAST, session="s")
    monkeypatch.setattr(ours, "_wait", lambda: setattr(ours, "stopped", "enough"))
    ours.work()
    assert ("lost", cells[0].id) in events(folder)
    assert not (folder / "runs" / cells[0].id / "result.json").exists()
    assert not (folder / "runs" / cells[0].id / "failed.json").exists()
    assert not step_dirs(folder / "runs" / cells[0].id / "checkpoints")
    assert "another worker has taken it over" in capsys.readouterr().err
    assert [c.id for c in cells if (folder / "runs" / c.id / "result.json").exists()] == [
        cells[1].id,
        cells[2].id,
    ]


def test_a_run_that_is_locked_on_this_machine_is_not_taken(three):
    """A worker that hangs beats no more, but holds its lock: nobody writes where it may still write."""
    folder, cells = three
    path = folder / "runs" / cells[0].id
    path.mkdir(parents=True)
    ours = worker.Worker(open_store(folder), cells, FAST, session="s")
    with RunLock(path):
        claims, others = ours._claim_next()
        assert [claim.run for claim in claims] == [cells[1].id]
        assert others
    claims[0].release()
    ours.claims.close()


def test_what_another_worker_has_just_finished_is_not_done_again(three):
    """It finished and let go after this worker had looked for results, and before it looked for claims."""
    folder, cells = three
    ours = worker.Worker(open_store(folder), cells[:1], FAST, session="s")
    look = ours.claims.look

    def late(runs):
        if not ours._tried:
            ours._tried.add("the other worker came and went")
            worker.Worker(open_store(folder), cells[:1], FAST, session="t").work()
        return look(runs)

    ours.claims.look = late
    ours.work()
    assert [event for event, _ in events(folder)] == ["started", "finished"]


@pytest.mark.slow
def test_cells_that_differ_in_numbers_train_together(tiny, tmp_path):
    short = {"num_steps": 4}
    lrs = [tiny.cell(tiny.config(tiny.texts, optim={"lr": lr}, train=short)) for lr in (1e-3, 2e-3, 3e-3)]
    other = tiny.cell(tiny.config(tiny.texts, train={"num_steps": 5}))
    folder = tiny.make(tmp_path / "S", [lrs[0], other, *lrs[1:]])
    ours = worker.Worker(open_store(folder), cells_of(folder), FAST, session="s")
    assert ours._groups == {}
    conduct = dataclasses.replace(FAST, vectorize=2)
    groups = worker._groups(cells_of(folder), conduct.vectorize)
    assert [[c.id for c in groups[cell.id]] for cell in (*lrs, other)] == [
        [lrs[0].id, lrs[1].id],
        [lrs[0].id, lrs[1].id],
        [lrs[2].id],
        [other.id],
    ]
    assert sweep(folder, conduct=conduct, live=False).exit_code == 0
    sizes = [result(folder, cell).get("group/cells") for cell in (*lrs, other)]
    assert sizes == [2.0, 2.0, None, None]
    assert sorted(run for event, run in events(folder) if event == "finished") == sorted(
        cell.id for cell in (*lrs, other)
    )


def test_the_newest_row_gives_progress_and_the_time_that_is_left(three):
    folder, cells = three
    path = folder / "runs" / cells[0].id
    path.mkdir(parents=True)
    rows = [{"step": n, "train/nll": 5.0 - n, "perf/step_seconds": 2.0} for n in (1, 2)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "tr')
    store = open_store(folder)
    claims = Claims(store, this_process())
    claims.take(cells[0].id, claims.look([cells[0].id])[cells[0].id])
    states = survey(store, cells, claims)
    claims.close()
    status = states[cells[0].id]
    assert (status.state, status.step, status.loss, status.seconds) == ("running", 2, 3.0, 4.0)
    assert status.text.startswith(f"process {os.getpid()} on ")
    # One of three is half done, at 2 s a step: 2 + 4 + 4 steps are left.
    assert board.remaining(cells, states) == pytest.approx(20.0)
    assert board.headline(cells, states) == "0 of 3 done, 1 running, 2 waiting; about 20s left"


# ----------------------------------------------------------------------------------------- one cell, no plan


def test_an_index_trains_one_run(three):
    folder, cells = three
    assert sweep_command(str(folder), index=1, live=False) == 0
    assert [run for event, run in events(folder)] == [cells[1].id, cells[1].id]
    with pytest.raises(UserError, match=r"--index=3: the sweep has 3 runs, 0 to 2"):
        sweep(folder, index=3, live=False)
    with pytest.raises(UserError, match=r"--index=0 trains one run, so --workers=2 makes no sense"):
        sweep(folder, index=0, workers=2, live=False)


def test_an_index_of_a_branch_without_its_trunk_is_for_later(tiny, tmp_path, capsys):
    cells = tiny.branches(tiny.texts)
    folder = tiny.make(tmp_path / "S", cells)
    assert sweep_command(str(folder), index=1, live=False) == 75
    assert f"for step 8 of its trunk {cells[0].id}" in capsys.readouterr().out
    assert sweep_command(str(folder), index=0, live=False) == 0
    assert sweep_command(str(folder), index=1, live=False) == 0


def test_names_of_plans(tiny, tmp_path):
    folder = tmp_path / "S"
    with pytest.raises(UserError, match="is no sweep directory"):
        sweep(folder, live=False)
    trunks = tiny.branches(tiny.texts)
    tiny.make(folder, trunks)
    other = tiny.cell(tiny.config(tiny.texts, seed=9))
    tiny.make(folder, [other, trunks[0]], name="holdout")
    assert cells_of(folder, "grid") == trunks
    assert [cell.id for cell in cells_of(folder, "holdout")] == [trunks[0].id, other.id]
    assert len(cells_of(folder)) == len(all_cells(load_plans(folder))) == 4
    with pytest.raises(UserError, match="did you mean 'holdout'"):
        cells_of(folder, "holdouts")


def test_exit_codes():
    def code(done=(), failed=(), left=(), stopped=""):
        return Summary(
            done, dict.fromkeys(failed, "why"), dict.fromkeys(left, ""), stopped, 0.0, ""
        ).exit_code

    assert code(done=("a",)) == 0
    assert code(done=("a",), failed=("b",)) == 1
    assert code(done=("a",), left=("b",)) == 75
    assert code(failed=("b",), stopped="SIGTERM") == 75


def test_workers_share_cores(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6, 7, 8}, raising=False)
    assert [share["cores"] for share in _shares(2)] == [[4, 5], [6, 7, 8]]
    assert sorted(core for share in _shares(5) for core in share["cores"]) == [4, 5, 6, 7, 8]
    assert all(len(share["cores"]) == 1 for share in _shares(7))
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    names = [share["environment"]["CUDA_VISIBLE_DEVICES"] for share in _shares(2)]
    assert names == ["0,2", "1,3"]
    with pytest.raises(UserError, match="--workers=5: this machine has 4 NVIDIA devices"):
        _shares(5)
    for none in ("", "-1", "-1,0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert "cores" in _shares(2)[0]


# -------------------------------------------------------------------------------------------------- elsewhere


@pytest.mark.slow
def test_a_sweep_behind_a_url(tiny, tmp_path, monkeypatch):
    """Two machines in turn; the second finds the first one's checkpoint, and the trunk of its branch."""
    pytest.importorskip("fsspec")
    url = f"memory://workers{tmp_path}/S"
    cells = tiny.branches(tiny.texts, steps=(20,))
    tiny.make(url, cells)
    one, other = tmp_path / "one", tmp_path / "other"
    with monkeypatch.context() as patched:
        patched.setattr(run, "StopSignals", StopAt(7))
        first = sweep(url, conduct=FAST, live=False, scratch=one)
    assert (first.exit_code, len(first.done)) == (75, 0)
    store = open_store(url, scratch=other)
    assert newest_step(store, cells[0].id) == 7
    assert sweep(url, conduct=FAST, live=False, scratch=other).exit_code == 0
    starts = json.loads(store.read(f"runs/{cells[0].id}/config.json"))["starts"]
    assert len(starts) == 2
    assert json.loads(store.read(f"runs/{cells[1].id}/result.json"))["branch"]["own_steps"] == 4
    assert "loss.png" in store.names(f"runs/{cells[1].id}")
    assert "run.lock" not in store.names(f"runs/{cells[1].id}")
    # The same, undisturbed, in a folder.
    plain = tiny.make(tmp_path / "plain", cells)
    sweep(plain, conduct=FAST, live=False)
    for cell in cells:
        far = json.loads(store.read(f"runs/{cell.id}/result.json"))
        assert far["eval/nll"] == result(plain, cell)["eval/nll"]
    monkeypatch.setattr(worker, "train", raises(TypeError("not to be trained again"), {c.id for c in cells}))
    assert sweep(url, conduct=FAST, live=False, scratch=tmp_path / "third").exit_code == 0


# ------------------------------------------------------------------------------------------ several processes


@pytest.mark.slow
def test_several_processes_are_restarted_and_stopped_together(tiny, tmp_path):
    """One is killed and comes back; SIGTERM to the command stops all, each with a checkpoint; it goes on."""
    long = {"num_steps": 100_000, "save_every": 0}
    cells = [tiny.cell(tiny.config(tiny.texts, seed=seed, train=long)) for seed in range(2)]
    folder = tiny.make(tmp_path / "S", cells)
    code = "import sys; from jaxlm.sweep.command import sweep_command\n"
    code += "sys.exit(sweep_command(sys.argv[1], workers=2))"
    with (tmp_path / "out.txt").open("w") as file:
        command = subprocess.Popen(
            [sys.executable, "-c", code, str(folder)], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        )
    store = open_store(folder)
    claims = Claims(store, this_process())

    def training(least=1):
        """Process of every run that is held and has made a step."""
        for _ in range(1200):
            assert command.poll() is None, (tmp_path / "out.txt").read_text()
            seen = claims.look([cell.id for cell in cells])
            held = {run: s.content["pid"] for run, s in seen.items() if s.state == "held" and s.content}
            if len(held) == 2 and all(newest_row(store, run).get("step", 0) >= least for run in held):
                return held
            time.sleep(0.1)
        raise AssertionError((tmp_path / "out.txt").read_text())

    try:
        before = training()
        os.kill(before[cells[0].id], signal.SIGKILL)
        while claims.look([cells[0].id])[cells[0].id].generation < 2:
            time.sleep(0.1)
        after = training()
        assert after[cells[0].id] != before[cells[0].id]
        assert after[cells[1].id] == before[cells[1].id]
        command.send_signal(signal.SIGTERM)
        assert command.wait(60) == 75
    finally:
        command.kill()
    out = (tmp_path / "out.txt").read_text()
    assert "stopped by SIGTERM" in out
    assert " running  grid" in out
    for cell in cells:
        assert claims.look([cell.id])[cell.id].state == "free"
        step = result(folder, cell)["steps"]
        assert (result(folder, cell)["status"], newest_step(store, cell.id)) == ("stopped", step)
    for pid in after.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# ------------------------------------------------------------------------------------------------- the table


def drawn(renderable, width=160):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def test_the_table_shows_states_times_and_reasons(tiny):
    cells = [tiny.cell(tiny.config(tiny.texts, seed=n), labels={"seed": n, "lr": 3e-3}) for n in range(4)]
    states = dict(
        zip(
            [cell.id for cell in cells],
            [
                Status("done", 20, 5.4321, 61.0),
                Status("running", 10, 5.5, 125.0, 12.5, "process 7 on box"),
                Status("failed", 0, None, text="No space left on device\nand more"),
                Status("waiting"),
            ],
            strict=True,
        )
    )
    text = drawn(board.table(cells, states))
    assert "1 of 4 done, 1 running, 1 failed, 1 waiting; about 6:15 left" in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "5.4321" in lines[cells[0].id]
    assert "1:01" in lines[cells[0].id]
    assert "10/20" in lines[cells[1].id]
    assert "2:05 left" in lines[cells[1].id]
    assert "process 7 on box" in lines[cells[1].id]
    assert "No space left on device" in lines[cells[2].id]
    assert "and more" not in text
    assert "seed 3, lr 0.003" in lines[cells[3].id]


def test_a_long_sweep_shows_what_matters_first(tiny):
    cells = [tiny.cell(tiny.config(tiny.texts, seed=n)) for n in range(30)]
    states = {cell.id: Status("done", 20, 5.0, 1.0) for cell in cells}
    states[cells[29].id] = Status("failed", text="why")
    states[cells[28].id] = Status("running", 1)
    text = drawn(board.table(cells, states, rows=8))
    assert cells[29].id in text
    assert cells[28].id in text
    assert "and 22 more, not shown" in text


def test_a_live_board_draws_over_itself(finished):
    folder, _, _ = finished
    store, cells, stream = open_store(folder), cells_of(folder), io.StringIO()
    board_of = board.watch(store, cells, Claims(store, this_process()), live=False)
    assert all(status.state == "done" for status in board_of.values())
    with board.Board(store, cells, Claims(store, this_process()), stream=stream, live=True):
        pass
    assert "6 of 6 done" in stream.getvalue()


def test_showing_trains_nothing(three, monkeypatch, capsys):
    folder, cells = three
    monkeypatch.setattr(worker, "train", raises(TypeError("not to be trained"), {c.id for c in cells}))
    monkeypatch.setattr(board.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    assert sweep_command(str(folder), show=True, live=False) == 75
    assert "0 of 3 done, 3 waiting" in capsys.readouterr().out
    assert not (folder / "claims").exists()


def test_hashes_of_parameters_differ_between_runs(finished):
    """The oracle of the durability test is no constant."""
    folder, _, _ = finished
    losses = [result(folder, cell)["eval/nll"] for cell in cells_of(folder)]
    assert len(set(np.round(losses, 12))) == len(losses)
