"""The training loop: the host asks for step n + 1 before it reads what step n measured.

    while the device runs step n:   fetch batch n + 1, dispatch step n + 1, then read the metrics of step n

so the device always has its next step queued, and the host never runs more than one step ahead of it. All
that is optional (evaluation, saving, sampling, profiles, plots) is an `Every`; the loop itself asks no
question about the configuration.
"""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import jax

from jaxlm.errors import UserError
from jaxlm.train.metrics import Clock, StepReport
from jaxlm.train.state import Params, TrainState
from jaxlm.train.step import Batch, Step

Source = Callable[[int, TrainState], Batch]


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a loss or gradient that was not finite."""

    def __init__(self, step: int, count: int) -> None:
        super().__init__(
            f"the loss or the gradient was not finite in {count} updates in a row "
            f"(steps {step - count + 1} to {step}); stopped. Go back to an earlier checkpoint with a lower "
            "learning rate, a longer warm-up or a tighter clip."
        )
        self.step, self.count = step, count


@dataclasses.dataclass(frozen=True)
class Every:
    """Work that is done beside the updates.

    `fn(step, state)` runs after update number `step` when `step % n == 0`, and may return values (name ->
    float) that join the step's row in the metrics (not with `after_report`: the row is gone by then).
    """

    n: int  # steps between runs; 0 = only where a flag below says so
    fn: Callable[[int, TrainState], Mapping[str, float] | None]
    name: str = ""
    first: bool = False  # also before the first step of a fresh run
    last: bool = False  # also after the last step
    stop: bool = False  # also when a signal ends the run early
    cause: str = "other"  # where the clock books its time
    after_report: bool = False  # runs when the step's row is on disk: no checkpoint covers a step without one
    at: frozenset[int] = frozenset()  # also after these steps

    def __post_init__(self) -> None:
        if self.n < 0:
            raise UserError(f"Every({self.name!r}): n={self.n} must be 0 (never) or a number of steps")


@dataclasses.dataclass(frozen=True)
class LoopResult:
    """How and where a loop ended."""

    state: TrainState
    step: int  # updates done
    status: str  # 'finished' | 'stopped'
    reason: str  # why it stopped early, else ''


class StopSignals:
    """While entered, the first SIGINT or SIGTERM asks the loop to stop after the step at hand.

    A second SIGINT raises KeyboardInterrupt at once. The previous handlers come back at exit. Outside the
    main thread Python allows no handlers, and none are installed.

    Args:
        warn: told once, between two steps, that the run will stop; default: a line on stderr at once.
    """

    def __init__(self, warn: Callable[[str], None] | None = None) -> None:
        self.reason = ""
        self._warn, self._told = warn, False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def __call__(self, step: int) -> str:
        """Why the loop should stop after `step`, or ''."""
        if self.reason and self._warn is not None and not self._told:
            self._told = True
            self._warn(self._message())
        return self.reason

    def _message(self) -> str:
        return f"{self.reason}: stopping after this step, with a checkpoint; Ctrl-C again aborts"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.reason = not self.reason, signal.Signals(number).name
        if first and self._warn is None:
            # Not print: a handler may interrupt one, and Python's streams cannot be entered twice.
            os.write(2, f"{self._message()}\n".encode())


class _Rows:
    """Collects what one step has to say, and hands it on in rows: one per logged step."""

    def __init__(self, report: Callable[[StepReport], None], clock: Clock, start: int) -> None:
        self._report, self._clock = report, clock
        self._step, self._metrics, self._extra = start, None, {}
        self._steps_done, self._mark, self._aside = start, time.perf_counter(), 0.0
        self._waited = clock.seconds().get("data_wait", 0.0)

    def aside(self, seconds: float) -> None:
        """Take time out of the throughput (compilation, evaluation, saving)."""
        self._aside += seconds

    def metrics(self, step: int, pairs: dict) -> None:
        self._step, self._metrics = step, pairs

    def extra(self, step: int, values: Mapping[str, float]) -> None:
        self._step = step
        self._extra |= values

    def flush(self) -> None:
        """Report the row, if anything was collected."""
        if self._metrics is None and not self._extra:
            return
        now, waited = time.perf_counter(), self._clock.seconds().get("data_wait", 0.0)
        measured = self._metrics is not None
        row = StepReport(
            step=self._step,
            metrics=self._metrics or {},
            extra=self._extra,
            steps=self._step - self._steps_done if measured else 0,
            seconds=max(now - self._mark - self._aside, 0.0),
            data_wait=waited - self._waited,
        )
        self._metrics, self._extra = None, {}
        if measured:
            self._steps_done, self._mark, self._aside, self._waited = self._step, now, 0.0, waited
        with self._clock.spend("report"):
            self._report(row)


def train_loop(
    state: TrainState,
    frozen: Params | None,
    step: Step,
    source: Source,
    periodic: Sequence[Every] = (),
    *,
    num_steps: int,
    start: int = 0,
    report: Callable[[StepReport], None] = lambda row: None,
    log_every: int = 10,
    tick: Callable[[int], None] = lambda step: None,
    stop: Callable[[int], str] = lambda step: "",
    clock: Clock | None = None,
    nonfinite_limit: int = 20,
) -> LoopResult:
    """Update `state` until `num_steps` updates are done.

    Args:
        state: donated to the first step; use the returned one.
        frozen: parameters that are not trained, or None.
        step: from `make_step`.
        source: `source(n, state) -> batch` for the update that follows n others; n is a host int, so a
            source that ignores the state makes nobody wait.
        periodic: run in this order after the steps where they are due.
        num_steps: total number of updates, those before `start` included.
        start: updates that `state` has seen; `int(state.step)` after a restore.
        report: gets one `StepReport` per logged step.
        log_every: steps between rows; the first and the last step of the loop are logged too.
        tick: called with the number of dispatched updates at every step (a progress bar).
        stop: asked after every step; a non-empty reason ends the loop (`StopSignals`).
        clock: books seconds as `compile` (the first call), `step`, `data_wait`, `report` and the causes of
            `periodic`.
        nonfinite_limit: this many non-finite updates in a row raise; 0 = never.

    Raises:
        NonFiniteError: after the row of the last bad step was reported.
    """
    clock = clock or Clock()
    rows = _Rows(report, clock, start)
    bad = 0

    def run(jobs: Sequence[Every], done: int) -> None:
        for late in (False, True):
            for job in jobs:
                if job.after_report == late:
                    began = time.perf_counter()
                    with clock.spend(job.cause):
                        values = job.fn(done, state)
                    if values and not late:
                        rows.extra(done, values)
                    rows.aside(time.perf_counter() - began)
            rows.flush()

    def settle(done: int, metrics: dict) -> None:
        """Wait for update number `done`, and collect its row if it is one to log."""
        nonlocal bad
        logged = done % log_every == 0 or done == start + 1 or done == num_steps or reason
        with clock.spend("step"):
            # Every step is waited for, one step late: the host cannot run away and pile up batches on the
            # device.
            bad = bad + 1 if float(metrics["nonfinite"][0]) > 0 else 0
        stuck = nonfinite_limit > 0 and bad >= nonfinite_limit
        if logged or stuck:
            rows.metrics(done, jax.device_get(metrics))
        if stuck:
            rows.flush()
            raise NonFiniteError(done, bad)

    if start == 0:
        run([job for job in periodic if job.first], 0)
    done, reason, pending = start, "", None
    while done < num_steps and not reason:
        with clock.spend("data_wait"):
            batch = source(done, state)
        began = time.perf_counter()
        with clock.spend("compile" if done == start else "step"):
            state, metrics = step(state, frozen, batch)
        if done == start:
            rows.aside(time.perf_counter() - began)
        done += 1
        tick(done)
        if pending is not None:
            settle(*pending)
            rows.flush()
        pending = (done, metrics)
        reason = stop(done)
        finished = done == num_steps
        due = [
            job
            for job in periodic
            if (job.n and done % job.n == 0)
            or done in job.at
            or (finished and job.last)
            or (reason and not finished and job.stop)
        ]
        if due or finished or reason:
            # They read the new state anyway; waiting here books the step's time as a step.
            settle(*pending)
            pending = None
            run(due, done)
    status = "finished" if done >= num_steps else "stopped"
    return LoopResult(state, done, status, "" if status == "finished" else reason)
