"""The live table of a sweep: what is done, what runs and for how long still, what failed and why."""

import contextlib
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jaxlm.sweep.claims import Claims
from jaxlm.sweep.plan import Cell
from jaxlm.sweep.status import Status, count, survey
from jaxlm.sweep.store import Store
from jaxlm.train.metrics import format_count, format_seconds

COLORS = {"done": "green", "running": "cyan", "failed": "red", "waiting": "bright_black"}
_ORDER = ("failed", "running", "waiting", "done")  # what is shown first where not all rows fit


def remaining(cells: Sequence[Cell], states: Mapping[str, Status]) -> float:
    """Estimated seconds until all is done: the FLOPs that are left over the speed of the runs in progress.

    0 = not known: nothing runs, or no run has measured a step yet.
    """
    left, speed = 0.0, 0.0
    for cell in cells:
        status, own = states[cell.id], cell.steps - cell.branch_step
        flops_per_step = cell.own_flops / own
        if status.state in ("running", "waiting"):
            left += flops_per_step * (cell.steps - max(status.step, cell.branch_step))
        if status.state == "running" and status.step_seconds > 0:
            speed += flops_per_step / status.step_seconds
    return left / speed if speed else 0.0


def headline(cells: Sequence[Cell], states: Mapping[str, Status]) -> str:
    """One line: `5 of 12 done, 2 running, 1 failed, 4 waiting; about 3:20 left`."""
    counts = count(states.values())
    parts = [f"{counts['done']} of {len(cells)} done"]
    parts += [f"{counts[name]} {name}" for name in ("running", "failed", "waiting") if counts[name]]
    left = remaining(cells, states)
    return ", ".join(parts) + (f"; about {format_seconds(left)} left" if left else "")


def describe(cell: Cell, status: Status) -> tuple[str, str, str, str, str, str]:
    """Role, what the grid varied, steps, loss, time and remark of one run."""
    labels = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in cell.labels.items()
    )
    size = f"{format_count(cell.counts['n_total'])} x {format_count(cell.tokens)}"
    started = status.state == "done" or status.step > cell.branch_step
    steps = f"{status.step:,}/{cell.steps:,}" if started else f"{cell.steps:,}"
    loss = "" if status.loss is None else f"{status.loss:.4f}"
    if status.state == "running":
        took = f"{format_seconds(status.seconds)} left" if status.seconds else ""
    else:
        took = format_seconds(status.seconds) if status.seconds else ""
    return cell.role, f"{size}  {labels}".strip(), steps, loss, took, status.text


def table(cells: Sequence[Cell], states: Mapping[str, Status], rows: int = 40) -> RenderableType:
    """The sweep as a table of `rows` rows at most, with a headline above it."""
    shown, hidden = list(cells), 0
    if len(shown) > rows:
        first = sorted(cells, key=lambda cell: _ORDER.index(states[cell.id].state))[:rows]
        ids = {cell.id for cell in first}
        shown, hidden = [cell for cell in cells if cell.id in ids], len(cells) - rows
    out = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "state", "role", "parameters x tokens", "steps", "loss", "time", ""):
        right = name in ("steps", "loss", "time")
        out.add_column(name, justify="right" if right else "left", no_wrap=name != "", overflow="ellipsis")
    for cell in shown:
        status = states[cell.id]
        role, what, steps, loss, took, text = describe(cell, status)
        state = Text(status.state, style=COLORS[status.state])
        out.add_row(cell.id, state, role, what, steps, loss, took, Text(text.split("\n", 1)[0]))
    lines: list[RenderableType] = [Text(headline(cells, states), style="bold"), out]
    if hidden:
        lines.append(Text(f"and {hidden} more, not shown", style="bright_black"))
    return Group(*lines)


def changes(cells: Sequence[Cell], old: Mapping[str, Status], new: Mapping[str, Status]) -> list[str]:
    """A line for each run whose state is not what it was: for logs, where no table can be drawn over."""
    out = []
    for cell in cells:
        status = new[cell.id]
        if cell.id in old and old[cell.id].state == status.state:
            continue
        if cell.id not in old and status.state == "waiting":
            continue
        role, what, steps, loss, took, text = describe(cell, status)
        rest = [f"{role} {what}", f"steps {steps}", loss and f"loss {loss}", took, text.split("\n", 1)[0]]
        out.append(f"{cell.id} {status.state:7}  {'  '.join(part for part in rest if part)}")
    if out:
        out.append(headline(cells, new))
    return out


class Board:
    """Shows a sweep until it is left: a table on a terminal, a line per change elsewhere.

    Args:
        store: the sweep directory.
        cells: its runs.
        claims: for looking only; the board's own.
        every: seconds between looks.
        stream: where to show it.
        live: draw a table; default: if the stream is a terminal.
    """

    def __init__(
        self,
        store: Store,
        cells: Sequence[Cell],
        claims: Claims,
        *,
        every: float = 2.0,
        stream: TextIO | None = None,
        live: bool | None = None,
    ) -> None:
        self._store, self._cells, self._claims, self._every = store, cells, claims, every
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty() if live is None else live
        self._done: dict[str, Status] = {}
        self.states: dict[str, Status] = {}  # as of the last look
        self._ended, self._failed = threading.Event(), ""
        self._thread = threading.Thread(target=self._show, name="board", daemon=True)
        self._drawn: Live | None = None

    def __enter__(self) -> "Board":
        if self._live:
            console = Console(file=self._stream, force_terminal=True)
            # Logs of runs go to files, so nothing else writes here.
            self._drawn = Live(
                console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
            )
            self._drawn.start()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
        self.look()
        if self._drawn is not None:
            self._drawn.stop()

    def _show(self) -> None:
        while True:
            self.look()
            if self._ended.wait(self._every):
                return

    def look(self) -> dict[str, Status]:
        """Read the sweep directory once, show what is new, and return it."""
        try:
            states = survey(self._store, self._cells, self._claims, self._done)
        except OSError as error:
            # The workers go on without being watched; the next look may succeed.
            if str(error) != self._failed:
                self._failed = str(error)
                print(f"WARNING: {self._store.url} cannot be read: {error}", file=self._stream, flush=True)
            return self.states
        if self._drawn is not None:
            rows = max(self._drawn.console.height - 5, 8)
            self._drawn.update(table(self._cells, states, rows), refresh=True)
        else:
            for line in changes(self._cells, self.states, states):
                print(line, file=self._stream, flush=True)
        self.states = states
        return states


def watch(
    store: Store, cells: Sequence[Cell], claims: Claims, *, live: bool | None = None
) -> dict[str, Status]:
    """Show a sweep that others train until nothing runs or waits any more, or Ctrl-C; its last state."""
    with Board(store, cells, claims, live=live) as board, contextlib.suppress(KeyboardInterrupt):
        while not board.states or any(s.state in ("running", "waiting") for s in board.states.values()):
            time.sleep(0.2)
    return board.states
