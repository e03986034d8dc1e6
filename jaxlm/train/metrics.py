"""What a run tells: (sum, weight) pairs to numbers, rows to files and the console, seconds to causes.

`metrics.jsonl` holds one JSON object per logged step, in order, each step once, also after a crash: a
resume at step s cuts a torn last line and every row past s, and training writes them again.
"""

import contextlib
import dataclasses
import io
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from jaxlm.errors import UserError

Pair = tuple[Any, Any]


def value(pair: Pair) -> float:
    """sum / weight of a pair, on the host; nan when nothing was weighed.

    >>> value((6.0, 4.0)), value((0.0, 0.0))
    (1.5, nan)
    """
    total, weight = float(pair[0]), float(pair[1])
    return total / weight if weight != 0 else math.nan


def values(pairs: Mapping[str, Pair], prefix: str = "") -> dict[str, float]:
    """`value` of every pair, under `prefix + name`; pairs that weighed nothing are left out."""
    return {prefix + name: value(pair) for name, pair in pairs.items() if float(pair[1]) != 0}


def add_pairs(first: Mapping[str, Pair], second: Mapping[str, Pair]) -> dict[str, Pair]:
    """Sum of two sets of pairs; the means of the parts are never averaged.

    >>> add_pairs({"nll": (6.0, 3.0)}, {"nll": (2.0, 1.0)})
    {'nll': (8.0, 4.0)}
    """
    both = {
        name: (a[0] + second[name][0], a[1] + second[name][1]) for name, a in first.items() if name in second
    }
    return {**first, **second, **both}


class Clock:
    """Seconds of wall time by cause; nested causes are booked once, to the inner one.

    `seconds()` adds up to the time since the clock was made: what no cause claims is `other`.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._booked: dict[str, float] = {}
        self._inner: list[float] = []  # seconds taken by inner causes, for each open one

    @contextlib.contextmanager
    def spend(self, cause: str) -> Iterator[None]:
        """Book the time inside the `with` to `cause`."""
        began = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            took = time.perf_counter() - began
            own = took - self._inner.pop()
            self._booked[cause] = self._booked.get(cause, 0.0) + own
            if self._inner:
                self._inner[-1] += took

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._start

    def seconds(self) -> dict[str, float]:
        """Seconds by cause; they add up to `total()`."""
        booked = dict(self._booked)
        booked["other"] = booked.get("other", 0.0) + max(self.total() - sum(self._booked.values()), 0.0)
        return booked


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What the loop knows about a logged step."""

    step: int  # updates done
    metrics: Mapping[
        str, Pair
    ]  # (sum, weight) of that update, on the host; empty where only `extra` was made
    extra: Mapping[str, float]  # values that periodic work returned
    steps: int  # updates since the last report with metrics
    seconds: float  # wall time that they took, compilation and periodic work left out
    data_wait: float  # seconds of it spent waiting for batches


class Writer(Protocol):
    """Anything that takes rows."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take one row."""

    def close(self) -> None:
        """Flush and free."""


def _kept_bytes(path: Path, resume_step: int) -> tuple[int, int]:
    """Length of a jsonl file's intact prefix up to `resume_step`, and the last step in it (-1 if none)."""
    kept, last = 0, -1
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break  # torn by a crash
            try:
                step = int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError) as error:
                # A power cut can leave zeros; anything else was not written by us.
                if not line.strip(b"\0\n"):
                    break
                raise UserError(
                    f"{path}:{number} is not a row of metrics ({error}); move the file away"
                ) from error
            if step > resume_step:
                break
            kept, last = kept + len(line), step
    return kept, last


class JsonlWriter:
    """Rows as JSON lines, appended and flushed one by one; not-a-number and infinity become null.

    Args:
        path: the file; made if it is not there.
        resume_step: the step that training goes on from. Later rows and a torn last line are cut; 0 starts
            afresh.
    """

    def __init__(self, path: str | Path, resume_step: int = 0) -> None:
        self._path, self._last = Path(path), -1
        if resume_step > 0 and self._path.exists():
            kept, self._last = _kept_bytes(self._path, resume_step)
            with self._path.open("r+b") as file:
                file.truncate(kept)
            self._file = self._path.open("a", encoding="utf-8")
        else:
            self._file = self._path.open("w", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the row of `step`; steps must grow.

        Raises:
            ValueError: a row of this or a later step is there.
        """
        if step <= self._last:
            raise ValueError(f"{self._path}: row of step {step} after that of step {self._last}")
        plain = {name: x if isinstance(x, int) else float(x) for name, x in values.items()}
        row = {name: (x if math.isfinite(x) else None) for name, x in plain.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        self._last = step

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_rows(path: str | Path) -> list[dict[str, float | None]]:
    """The rows of a metrics file; a torn last line is left out."""
    with Path(path).open("rb") as file:
        return [json.loads(line) for line in file if line.endswith(b"\n")]


class TensorBoardWriter:
    """Rows as TensorBoard scalars; events past `resume_step` of an earlier run are hidden by TensorBoard."""

    def __init__(self, directory: str | Path, resume_step: int = 0) -> None:
        from tensorboardX import SummaryWriter

        purge = {"purge_step": resume_step + 1} if resume_step else {}
        self._events = SummaryWriter(str(directory), **purge)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar per name; TensorBoard has no point for what is not finite."""
        for name, x in values.items():
            if math.isfinite(x):
                self._events.add_scalar(name, x, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._events.close()


def format_count(x: float) -> str:
    """A number of things with three digits: 950, 12.3k, 4.56M.

    >>> [format_count(x) for x in (7, 950, 12345, 4.56e6, 1.2e12)]
    ['7', '950', '12.3k', '4.56M', '1.2T']
    """
    for unit in ("", "k", "M", "G"):
        if abs(x) < 999.5:
            return f"{x:.3g}{unit}"
        x /= 1000
    return f"{x:.3g}T"


def format_seconds(seconds: float) -> str:
    """A duration as 42s, 3:05 or 1:02:03.

    >>> [format_seconds(s) for s in (42, 185, 3723)]
    ['42s', '3:05', '1:02:03']
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# Name in the row, label on the console, format.
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("train/nll", "nll", ".4f"),
    ("train/bpb", "bpb", ".3f"),
    ("train/lr", "lr", ".2e"),
    ("train/grad_norm", "grad", ".2f"),
    ("eval/nll", "eval nll", ".4f"),
    ("eval/bpb", "eval bpb", ".4f"),
    ("eval/accuracy", "right", ".4f"),  # where there are no bits per byte
    ("eval/label_accuracy", "labels right", ".4f"),
    ("eval/exact", "exact", ".4f"),
)


def format_row(values: Mapping[str, float]) -> str:
    """The part of a row that a person watches, in one line; only columns that are there.

    >>> format_row({"train/nll": 3.21987, "perf/tokens_per_second": 12345.0, "train/skipped": 2.0})
    'nll 3.2199  12.3k tok/s  skipped 2'
    """
    row = dict(values)
    if "train/nll" not in row and "train/total" in row:
        row["train/nll"] = row["train/total"]
    if "eval/bpb" in row:
        row.pop("eval/accuracy", None)
    parts = [f"{label} {row[name]:{form}}" for name, label, form in COLUMNS if name in row]
    if "perf/tokens_per_second" in row:
        parts.append(f"{format_count(row['perf/tokens_per_second'])} tok/s")
    if "perf/mfu" in row:
        parts.append(f"MFU {100 * row['perf/mfu']:.1f}%")
    if row.get("train/skipped", 0) > 0:
        parts.append(f"skipped {row['train/skipped']:.0f}")
    return "  ".join(parts)


class Console:
    """Progress for a person: a bar on a terminal, a line per row elsewhere.

    Args:
        num_steps: updates of the whole run.
        start: updates done before.
        stream: where to write; default stderr.
        bar: draw a bar; default: if the stream is a terminal.
        quiet: show nothing: another process does.
    """

    def __init__(
        self,
        num_steps: int,
        start: int = 0,
        stream: TextIO | None = None,
        bar: bool | None = None,
        quiet: bool = False,
    ) -> None:
        self._stream = stream or sys.stderr
        if quiet:
            self._stream, bar = io.StringIO(), False
        self._num_steps, self._start, self._done, self._began = num_steps, start, start, time.perf_counter()
        self._progress: Any = None
        if self._stream.isatty() if bar is None else bar:
            from rich.console import Console as Terminal
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=Terminal(file=self._stream, force_terminal=True),
                refresh_per_second=4,
            )
            self._task = self._progress.add_task("compiling", total=num_steps, completed=start)
            self._progress.start()

    def tick(self, step: int) -> None:
        """Move the bar."""
        self._done = step
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Show a row."""
        self._done = max(self._done, step)
        text = format_row(values)
        if self._progress is not None:
            if any(name.startswith("train/") for name in values):
                self._progress.update(self._task, description=text)
            if any(name.startswith("eval/") for name in values):
                self._progress.console.print(f"step {step}  {text}", highlight=False)
        elif text:
            width = len(str(self._num_steps))
            self.log(f"step {step:{width}d}/{self._num_steps}  {text}{self._remaining(step)}")

    def log(self, text: str) -> None:
        """Print a line (above the bar)."""
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        if self._progress is not None:
            self._progress.stop()

    def _remaining(self, step: int) -> str:
        done = step - self._start
        if done < 2 or step >= self._num_steps:
            return ""
        left = (time.perf_counter() - self._began) / done * (self._num_steps - step)
        return f"  {format_seconds(left)} left"


class Reporter:
    """Turns the loop's reports into rows and gives them to every writer.

    A row holds `train/<metric>`, what periodic work returned, `tokens` (positions seen so far), `seconds`
    (since the reporter was made) and `perf/tokens_per_second`, `perf/step_seconds`, `perf/data_wait` (share
    of the time), `perf/mfu`.

        MFU = tokens per second * FLOPs per token / (peak FLOP/s of a device * devices)

    Args:
        writers: where rows go, in this order.
        tokens_per_step: B * T positions of one update, over all hosts.
        flops_per_token: of a training step, forward and backward, without recomputation.
        peak: FLOP/s of one device (`peak_flops`); None leaves MFU out.
        num_devices: devices of the mesh.
    """

    def __init__(
        self,
        writers: Sequence[Writer],
        *,
        tokens_per_step: int,
        flops_per_token: float | None = None,
        peak: float | None = None,
        num_devices: int = 1,
    ) -> None:
        self._writers, self._tokens = tuple(writers), tokens_per_step
        self._flops_share = flops_per_token / (peak * num_devices) if flops_per_token and peak else None
        self._began = time.perf_counter()
        self.last: dict[str, float] = {}  # the newest value of every name

    def __call__(self, report: StepReport) -> None:
        """Write one row."""
        row = {
            "tokens": report.step * self._tokens,
            "seconds": round(time.perf_counter() - self._began, 3),
            **values(report.metrics, "train/"),
            **report.extra,
        }
        if report.steps > 0 and report.seconds > 0:
            rate = report.steps * self._tokens / report.seconds
            row["perf/tokens_per_second"] = rate
            row["perf/step_seconds"] = report.seconds / report.steps
            row["perf/data_wait"] = min(report.data_wait / report.seconds, 1.0)
            if self._flops_share is not None:
                row["perf/mfu"] = rate * self._flops_share
        self.last |= row
        for writer in self._writers:
            writer.write(report.step, row)

    def close(self) -> None:
        """Close all writers."""
        for writer in self._writers:
            writer.close()
