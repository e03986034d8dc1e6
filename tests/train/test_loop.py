import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.train.loop import Every, NonFiniteError, StopSignals, train_loop
from jaxlm.train.metrics import Clock, values
from jaxlm.train.state import create_state
from jaxlm.train.step import make_step


class Fake:
    """A step on the host that keeps a diary; its metrics note when they are read."""

    def __init__(self, bad=()):
        self.diary, self.bad = [], set(bad)

    def __call__(self, state, frozen, batch):
        self.diary.append(f"step {state + 1}")
        return state + 1, {
            "nll": (Read(self, state + 1, 2.0), 1.0),
            "nonfinite": (float(state + 1 in self.bad), 1.0),
        }

    def source(self, n, state):
        assert n == state
        self.diary.append(f"batch {n}")
        return n

    def job(self, name, result=None):
        def fn(step, state):
            assert step == state
            self.diary.append(f"{name} {step}")
            return result

        return fn


class Read:
    """A number that writes into the diary when it is fetched from the device."""

    def __init__(self, fake, step, x):
        self.fake, self.step, self.x = fake, step, x

    def __array__(self, dtype=None, copy=None):
        self.fake.diary.append(f"read {self.step}")
        return np.asarray(self.x, dtype)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(jax, "device_get", lambda tree: jax.tree.map(np.asarray, tree))
    return Fake()


def run(fake, *periodic, num_steps, **fields):
    rows = []

    def report(row):
        fake.diary.append(f"row {row.step}")
        rows.append(row)

    state = fields.get("start", 0)
    result = train_loop(
        state, None, fake, fake.source, periodic, num_steps=num_steps, report=report, **fields
    )
    return result, rows


def test_metrics_of_a_step_are_read_after_the_next_one_is_dispatched(fake):
    result, rows = run(fake, num_steps=4, log_every=1)
    assert fake.diary == [
        "batch 0", "step 1", "batch 1", "step 2", "read 1", "row 1", "batch 2", "step 3", "read 2", "row 2",
        "batch 3", "step 4", "read 3", "row 3", "read 4", "row 4",
    ]  # fmt: skip
    assert (result.state, result.step, result.status, result.reason) == (4, 4, "finished", "")
    assert [values(r.metrics)["nll"] for r in rows] == [2.0] * 4


def test_only_logged_steps_are_fetched_and_first_and_last_are_logged(fake):
    _, rows = run(fake, num_steps=12, log_every=5)
    assert [r.step for r in rows] == [1, 5, 10, 12]
    assert [r.steps for r in rows] == [1, 4, 5, 2]
    assert [line for line in fake.diary if line.startswith("read")] == [
        "read 1",
        "read 5",
        "read 10",
        "read 12",
    ]


def test_every_runs_when_due_and_joins_the_row_of_its_step(fake):
    periodic = [
        Every(2, fake.job("save", {"dropped": 1.0}), after_report=True, last=True, stop=True),
        Every(3, fake.job("eval", {"eval/nll": 1.5}), first=True, last=True),
        Every(0, fake.job("end"), last=True),
        Every(0, fake.job("never")),
        Every(0, fake.job("stopped"), stop=True),
    ]
    _, rows = run(fake, *periodic, num_steps=5, log_every=100)
    told = [
        line for line in fake.diary if line.split()[0] in ("save", "eval", "end", "never", "stopped", "row")
    ]
    assert told == [
        "eval 0", "row 0", "row 1", "save 2", "eval 3", "row 3", "save 4",
        "eval 5", "end 5", "row 5", "save 5",
    ]  # fmt: skip
    by_step = {r.step: r for r in rows}
    assert len(by_step) == len(rows)
    assert by_step[0].extra == by_step[3].extra == by_step[5].extra == {"eval/nll": 1.5}
    assert by_step[3].metrics == {}
    assert by_step[5].metrics.keys() == {"nll", "nonfinite"}


def test_work_beside_the_updates_sees_a_finished_step(fake):
    run(fake, Every(2, fake.job("eval")), num_steps=3, log_every=2)
    assert fake.diary.index("read 2") < fake.diary.index("eval 2") < fake.diary.index("batch 2")


def test_resume_goes_on_where_it_was(fake):
    result, rows = run(fake, Every(2, fake.job("eval"), first=True), num_steps=6, start=3, log_every=2)
    assert [line for line in fake.diary if line.startswith("step")] == ["step 4", "step 5", "step 6"]
    assert [line for line in fake.diary if line.startswith("eval")] == ["eval 4", "eval 6"]
    assert [(r.step, r.steps) for r in rows] == [(4, 1), (6, 2)]
    assert result.step == 6


def test_nothing_left_to_do(fake):
    result, rows = run(fake, Every(1, fake.job("eval"), last=True), num_steps=3, start=3)
    assert (result.state, result.status, rows, fake.diary) == (3, "finished", [], [])


def test_stop_ends_after_the_step_and_runs_only_what_must_be_saved(fake):
    periodic = [Every(0, fake.job("eval"), last=True), Every(0, fake.job("save"), stop=True, last=True)]
    result, rows = run(
        fake, *periodic, num_steps=10, stop=lambda step: "SIGTERM" if step == 3 else "", log_every=10
    )
    assert (result.step, result.status, result.reason) == (3, "stopped", "SIGTERM")
    assert [line for line in fake.diary if line.split()[0] in ("eval", "save")] == ["save 3"]
    assert [r.step for r in rows] == [1, 3]


def test_stop_at_the_last_step_is_a_finish(fake):
    result, _ = run(fake, Every(0, fake.job("eval"), last=True), num_steps=3, stop=lambda step: "SIGTERM")
    assert result.status == "stopped"
    result, _ = run(fake, Every(0, fake.job("eval"), last=True), num_steps=1, stop=lambda step: "SIGTERM")
    assert (result.status, result.reason) == ("finished", "")


def test_a_run_of_nonfinite_steps_stops_after_its_row_is_written(monkeypatch):
    monkeypatch.setattr(jax, "device_get", lambda tree: jax.tree.map(np.asarray, tree))
    fake = Fake(bad=[2, 3, 5, 6, 7])
    rows = []
    with pytest.raises(NonFiniteError, match=r"3 updates in a row \(steps 5 to 7\)") as error:
        train_loop(
            0, None, fake, fake.source, num_steps=20, report=rows.append, log_every=100, nonfinite_limit=3
        )
    assert (error.value.step, error.value.count) == (7, 3)
    assert [r.step for r in rows] == [1, 7]
    result = train_loop(0, None, Fake(bad=range(99)), fake.source, num_steps=20, nonfinite_limit=0)
    assert result.status == "finished"


def test_negative_interval_is_refused():
    with pytest.raises(UserError, match="n=-1"):
        Every(-1, lambda step, state: None, name="save")


# -------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks_and_handlers_come_back(number):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    said = []
    with StopSignals(said.append) as stop:
        assert stop(1) == ""
        os.kill(os.getpid(), number)
        assert stop(1) == signal.Signals(number).name
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop(2) == "SIGTERM"
        assert len(said) == 1
        assert "with a checkpoint" in said[0]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_is_answered_on_stderr_at_once(capfd):
    with StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert capfd.readouterr().err == (
            "SIGTERM: stopping after this step, with a checkpoint; Ctrl-C again aborts\n"
        )


def test_signals_in_another_thread_are_left_alone():
    seen = []

    def work():
        with StopSignals() as stop:
            seen.append((stop(0), signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [("", before)]


def test_sigterm_stops_a_real_run_with_its_checkpoint_work(toy):
    optimizer = toy.optimizer(num_steps=1000)
    state, _ = create_state(toy.init, optimizer, 0)
    saved = []

    def source(n, state):
        if n == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return toy.batch(n)

    save = Every(0, lambda n, state: saved.append((n, int(state.step))), stop=True, after_report=True)
    with StopSignals(lambda text: None) as stop:
        result = train_loop(
            state, None, make_step(toy.objective, optimizer), source, [save], num_steps=1000, stop=stop
        )
    assert (result.status, result.reason) == ("stopped", "SIGTERM")
    assert saved == [(4, 4)]


# ------------------------------------------------------------------------------------------------ real steps


def test_seconds_are_booked_by_cause():
    fake = Fake()

    def slow(seconds, result=None):
        return lambda *args: (time.sleep(seconds), result)[1]

    def step(state, frozen, batch):
        time.sleep(0.2 if state == 0 else 0.01)
        return fake(state, frozen, batch)

    clock = Clock()
    periodic = [
        Every(2, slow(0.06), cause="eval"),
        Every(4, slow(0.05), cause="checkpoint", after_report=True),
    ]
    rows = []
    train_loop(
        0, None, step, slow(0.03, 0), periodic, num_steps=4, clock=clock, report=rows.append, log_every=4
    )
    seconds = clock.seconds()
    wanted = {"compile": 0.2, "data_wait": 0.12, "step": 0.03, "eval": 0.12, "checkpoint": 0.05}
    for cause, least in wanted.items():
        assert least <= seconds[cause] < least + 0.15, (cause, seconds)
    # Throughput leaves out compilation and the work beside the updates, not the wait for data.
    spent = sum(r.seconds for r in rows)
    assert 0.15 <= spent < 0.25 + 0.1
    assert sum(r.data_wait for r in rows) == pytest.approx(seconds["data_wait"], abs=0.02)


def test_the_loop_adds_little_to_the_steps_it_runs():
    """Host time of 2,000 loop turns around an empty step: far below 2% of a step of 20 ms."""
    metrics = {"nonfinite": (0.0, 1.0)}
    periodic = [Every(10_000, lambda n, state: None) for _ in range(5)]
    began = time.process_time()
    train_loop(
        0, None, lambda s, f, b: (s, metrics), lambda n, s: None, periodic, num_steps=2000, log_every=10_000
    )
    per_step = (time.process_time() - began) / 2000
    assert per_step < 0.02 * 20e-3


def test_a_real_run_learns_and_its_rows_agree_with_the_steps(toy):
    optimizer = toy.optimizer(num_steps=30)
    state, _ = create_state(toy.init, optimizer, 0)
    step = make_step(toy.objective, optimizer)
    rows = []
    train_loop(state, None, step, lambda n, s: toy.batch(0), num_steps=30, report=rows.append, log_every=1)
    losses = [values(r.metrics)["nll"] for r in rows]
    assert losses[-1] < 0.7 * losses[0]

    again, _ = create_state(toy.init, optimizer, 0)
    for n in range(30):
        again, metrics = step(again, None, toy.batch(0))
        total, weight = metrics["nll"]
        assert losses[n] == float(total) / float(weight)
    assert jnp.isfinite(losses[-1])
