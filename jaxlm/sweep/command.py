"""`jaxlm sweep`: one process that trains, or several on this machine with a table over them."""

import dataclasses
import glob
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError, check, nearest
from jaxlm.sweep.board import Board, headline, watch
from jaxlm.sweep.claims import Claims, this_process
from jaxlm.sweep.plan import Cell
from jaxlm.sweep.plan_file import all_cells, load_plans
from jaxlm.sweep.status import count, survey
from jaxlm.sweep.store import Store, open_store
from jaxlm.sweep.worker import Conduct, Worker
from jaxlm.train.rundir import probe_writable

DONE, FAILED, STOPPED = 0, 1, 75  # exit codes; 75: the same command goes on
_RESTARTS = 3  # of a worker that was killed, before any run ends in between


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a sweep stands when `sweep` returns."""

    done: tuple[str, ...]  # ids of finished runs
    failed: Mapping[str, str]  # id -> why
    open: Mapping[str, str]  # id of what neither finished nor failed -> for what it waits, or who trains it
    stopped: str  # the signal that ended this command, or ''
    seconds: float  # wall time of this command
    text: str  # in one line

    @property
    def exit_code(self) -> int:
        """0 all is done, 75 stopped by a signal or left to others, 1 something failed."""
        if self.stopped:
            return STOPPED
        if self.failed:
            return FAILED
        return STOPPED if self.open else DONE


def cells_of(workdir: str | Path, name: str | None = None) -> list[Cell]:
    """The runs of a sweep directory, or those of one of its plans with their trunks; trunks first.

    Raises:
        UserError: no plan is there, or none of this name.
    """
    plans = load_plans(workdir)
    cells = all_cells(plans)
    if name is None:
        return cells
    if name not in plans:
        raise UserError(f"--name={name!r}: {workdir} has the plans {', '.join(plans)}{nearest(name, plans)}")
    ids = {cell.id for cell in plans[name].cells} | {cell.parent for cell in plans[name].cells}
    return [cell for cell in cells if cell.id in ids]


def sweep(
    workdir: str | Path,
    *,
    workers: int = 1,
    index: int | None = None,
    name: str | None = None,
    conduct: Conduct | None = None,
    scratch: str | Path | None = None,
    live: bool | None = None,
) -> Summary:
    """Train every run of a sweep that is not finished.

    Args:
        workdir: the sweep directory S, a path or a URL, with a plan in it.
        workers: processes on this machine; they share its cores (or NVIDIA devices) evenly. With 1, the runs
            train in this process.
        index: train this run alone, by its place in the plan, from 0: one element of a job array.
        name: of the plan; default all plans of S.
        conduct: how the workers behave.
        scratch: where S is a URL, the local folder to train in.
        live: draw a table; default: if stderr is a terminal.

    Raises:
        UserError: no plan, no such run, more workers than NVIDIA devices, a directory that is not writable.
    """
    began, conduct, store = time.monotonic(), conduct or Conduct(), open_store(workdir, scratch=scratch)
    cells = cells_of(workdir, name)
    check(workers >= 1, f"--workers={workers} must be at least 1")
    probe_writable(store.folder)
    only, session = None, uuid.uuid4().hex
    if index is not None:
        check(
            0 <= index < len(cells),
            f"--index={index}: the sweep has {len(cells)} runs, 0 to {len(cells) - 1}",
        )
        check(workers == 1, f"--index={index} trains one run, so --workers={workers} makes no sense")
        only = cells[index].id
    watched = [cell for cell in cells if only in (None, cell.id)]
    observer = Claims(store, this_process(), stale_after=conduct.stale_after)
    with Board(store, watched, observer, live=live):
        if workers == 1:
            worker = Worker(store, cells, conduct, session=session, only=only)
            worker.work()
            stopped = worker.stopped
        else:
            order = dict(workdir=str(workdir), scratch=str(store.folder), name=name, session=session)
            stopped = _Team(store, watched, observer, order | dataclasses.asdict(conduct), workers).work()
    return _summary(store, watched, observer, stopped, time.monotonic() - began)


def _summary(store: Store, cells: Sequence[Cell], claims: Claims, stopped: str, seconds: float) -> Summary:
    states = survey(store, cells, claims)
    chosen = lambda *names: {i: s for i, s in states.items() if s.state in names}  # noqa: E731
    return Summary(
        done=tuple(chosen("done")),
        failed={i: status.text for i, status in chosen("failed").items()},
        open={i: status.text or status.state for i, status in chosen("running", "waiting").items()},
        stopped=stopped,
        seconds=seconds,
        text=headline(cells, states),
    )


# ------------------------------------------------------------------------------------- several on one machine


class _Team:
    """Worker processes on this machine: started, stopped together, and started again when they are killed."""

    def __init__(
        self, store: Store, cells: Sequence[Cell], claims: Claims, order: Mapping[str, Any], size: int
    ) -> None:
        self._store, self._cells, self._claims, self._order = store, cells, claims, order
        self._shares = _shares(size)
        self._processes: list[subprocess.Popen] = []
        self._restarts = [0] * size
        self._ended = -1  # runs that were done or failed when a worker was last started again
        self._signal = ""

    def work(self) -> str:
        """Run until all workers have ended; the signal that stopped them early, or ''."""
        handlers = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._processes = [self._start(i) for i in range(len(self._shares))]
            while True:
                alive = any(process.poll() is None for process in self._processes)
                if not self._replace() and not alive:
                    break
                time.sleep(0.1)
        except BaseException:
            for process in self._processes:
                process.kill()  # their runs stand where their last checkpoints do
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for process in self._processes:
                process.wait()
        return self._signal

    def _handle(self, number: int, frame: Any) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def _start(self, i: int) -> subprocess.Popen:
        share = self._shares[i]
        folder = self._store.folder / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        root = str(Path(__file__).resolve().parents[2])
        paths = filter(None, [root, os.environ.get("PYTHONPATH")])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **share.get("environment", {})}
        order = {**self._order, "cores": share.get("cores"), "parent": os.getpid()}
        with (folder / f"worker-{i}.txt").open("a", encoding="utf-8") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "jaxlm.sweep.command", json.dumps(order)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then stops its workers
            )

    def _replace(self) -> bool:
        """Start workers again that were killed (by the kernel, for their memory), unless all is at an end."""
        replaced = False
        for i, process in enumerate(self._processes):
            if (process.poll() or 0) >= 0 or self._signal:
                continue
            counts = count(survey(self._store, self._cells, self._claims).values())
            ended = counts["done"] + counts["failed"]
            if ended > self._ended:
                self._ended, self._restarts = ended, [0] * len(self._restarts)
            if ended < len(self._cells) and self._restarts[i] < _RESTARTS:
                self._restarts[i] += 1
                self._processes[i], replaced = self._start(i), True
        return replaced


def _shares(workers: int) -> list[dict[str, Any]]:
    """What each of several workers on this machine gets: NVIDIA devices of its own, or else cores."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]
    if asked is not None:  # as CUDA reads it: what comes before the first name of no device
        devices = list(itertools.takewhile(lambda name: name not in ("", "-1"), asked.split(",")))
    if devices and os.environ.get("JAX_PLATFORMS") != "cpu":
        check(
            workers <= len(devices),
            f"--workers={workers}: this machine has {len(devices)} NVIDIA devices, and two workers cannot "
            "share one; use --vectorize to train several small runs on a device",
        )
        return [
            {"environment": {"CUDA_VISIBLE_DEVICES": ",".join(devices[i::workers])}} for i in range(workers)
        ]
    if not hasattr(os, "sched_getaffinity"):
        return [{} for _ in range(workers)]
    cores = sorted(os.sched_getaffinity(0))
    n = len(cores)
    shares = [cores[i * n // workers : (i + 1) * n // workers] for i in range(workers)]
    # More workers than cores take turns on them.
    return [{"cores": share or [cores[i % n]]} for i, share in enumerate(shares)]


def main(argv: Sequence[str]) -> int:
    """One worker of several, as `_Team` starts it: `python -m jaxlm.sweep.command JSON`."""
    order = json.loads(argv[0])
    if order.get("cores"):
        os.sched_setaffinity(0, order["cores"])  # before JAX counts them and starts its threads
    names = {field.name for field in dataclasses.fields(Conduct)}
    conduct = Conduct(**{name: value for name, value in order.items() if name in names})
    worker = Worker(
        open_store(order["workdir"], scratch=order["scratch"]),
        cells_of(order["workdir"], order["name"]),
        conduct,
        session=order["session"],
        parent=order["parent"],
    )
    worker.work()
    return STOPPED if worker.stopped else DONE


# -------------------------------------------------------------------------------------------------- the verb


def sweep_command(
    workdir: str,
    *,
    workers: int = 1,
    index: int | None = None,
    vectorize: int = 0,
    name: str | None = None,
    retry_failed: bool = True,
    stale_after: float = 90.0,
    scratch: str | None = None,
    show: bool = False,
    live: bool | None = None,
) -> int:
    """What `jaxlm sweep` does; returns its exit code.

    0 all runs are finished; 1 some failed, each with its reason; 75 stopped by a signal, or runs are left
    that others hold or that wait for their trunks: the same command goes on.
    """
    conduct = Conduct(vectorize=vectorize, retry_failed=retry_failed, stale_after=stale_after)
    if show:
        store, cells = open_store(workdir, scratch=scratch), cells_of(workdir, name)
        claims = Claims(store, this_process(), stale_after=stale_after)
        watch(store, cells, claims, live=live)
        summary = _summary(store, cells, claims, "", 0.0)
    else:
        options = dict(workers=workers, index=index, name=name, scratch=scratch, live=live)
        summary = sweep(workdir, conduct=conduct, **options)
    print(f"{workdir}: {summary.text}" + (f" (stopped by {summary.stopped})" if summary.stopped else ""))
    for state, runs in (("failed", summary.failed), ("open", summary.open)):
        for run, text in runs.items():
            print(f"  {run} {state}: {text}")
    return summary.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
