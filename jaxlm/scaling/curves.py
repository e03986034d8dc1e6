"""Loss curves of runs: the rate of every update and the loss where it was read, and the areas that they make.

eta_i is the learning rate of update i = 1, 2, ...
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64
from scipy.signal import lfilter

from jaxlm.errors import UserError, check, nearest


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run: the rate of every update, and the loss where it was read."""

    name: str
    lr: Float64[np.ndarray, "T"]  # of updates 1 .. T
    step: Int64[np.ndarray, "P"]  # updates done when the loss was read; growing, 1 .. T
    loss: Float64[np.ndarray, "P"]  # nats per token
    reach: int = 0  # the losses are means over up to this many rows a side; 0 = as logged

    def __post_init__(self) -> None:
        step, where = self.step, f"curve {self.name!r}"
        check(len(self.lr) > 0 and len(step) > 0, f"{where} is empty")
        check(len(step) == len(self.loss), f"{where}: {len(step)} steps and {len(self.loss)} losses")
        check(bool(np.all(np.diff(step) > 0)), f"{where}: steps do not grow")
        check(
            step[0] >= 1 and step[-1] <= len(self.lr),
            f"{where}: steps {step[0]} to {step[-1]}, but learning rates of updates 1 to {len(self.lr)}",
        )
        check(bool(np.all(np.isfinite(self.lr) & (self.lr >= 0))), f"{where}: a learning rate is below 0")
        check(
            bool(np.all(np.isfinite(self.loss) & (self.loss > 0))), f"{where}: a loss is not a number above 0"
        )


def warmup_steps(lr: Float64[np.ndarray, "T"]) -> int:
    """Updates of the first rise: the rate never falls before update `warmup_steps(lr) + 1`.

    >>> warmup_steps(np.array([1.0, 2.0, 3.0, 3.0, 2.0])), warmup_steps(np.array([3.0, 3.0, 2.0]))
    (2, 0)
    """
    falls = np.flatnonzero(np.diff(lr) < 0)
    first_fall = int(falls[0]) if len(falls) else len(lr) - 1
    return int(np.argmax(lr[: first_fall + 1]))


def areas(
    lr: Float64[np.ndarray, "T"], momentum: float
) -> tuple[Float64[np.ndarray, "T"], Float64[np.ndarray, "T"], Float64[np.ndarray, "T"]]:
    """S1, S2 and dS2/dlambda after each update, in linear time.

        m_i = lambda m_{i-1} + eta_{i-1} - eta_i,  S2 = cumsum m,  m'_i = lambda m'_{i-1} + m_{i-1}

    >>> s1, s2, _ = areas(np.array([1.0, 1.0, 0.5, 0.0]), 0.5)
    >>> s1.tolist(), s2.tolist()
    ([1.0, 2.0, 2.5, 2.5], [0.0, 0.0, 0.5, 1.25])
    """
    drop = np.zeros_like(lr)
    drop[1:] = lr[:-1] - lr[1:]
    drop[: warmup_steps(lr) + 1] = 0.0
    filt = ([1.0], [1.0, -momentum])
    m = lfilter(*filt, drop)
    slope = lfilter(*filt, np.concatenate([[0.0], m[:-1]]))
    return np.cumsum(lr), np.cumsum(m), np.cumsum(slope)


# --- Reading run directories ---


def moving_mean(y: Float64[np.ndarray, "P"], reach: int) -> Float64[np.ndarray, "P"]:
    """Mean over up to `reach` neighbours a side, as many left as right: no lag, and the ends stay put.

    >>> moving_mean(np.array([4.0, 1.0, 1.0, 1.0, 6.0]), 1).tolist()
    [4.0, 2.0, 1.0, 2.6666666666666665, 6.0]
    """
    index = np.arange(len(y))
    half = np.minimum(reach, np.minimum(index, len(y) - 1 - index))
    sums = np.concatenate([[0.0], np.cumsum(y)])
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)


def read_curve(run: str | Path, *, column: str = "train/nll", reach: int = 0, skip: int = 0) -> Curve:
    """The loss curve of a run directory, from its `metrics.jsonl`.

    The rate of an update between two logged ones is interpolated: exact while the schedule is linear there. A
    branch has the rates of its trunk (`train.branch_from` in its `config.json`) before its first row.

    Args:
        run: run directory.
        column: of the loss: `train/nll` (one batch: noisy) or `eval/nll`.
        reach: smooth with the mean over this many rows a side (`moving_mean`); 0 = as logged.
        skip: leave losses of the first `skip` updates out (the rates count all the same).

    Raises:
        UserError: no metrics, no such column, no learning rate, or a branch without its trunk.
    """
    path = Path(run) / "metrics.jsonl"
    rows = _rows(path)
    rates = _column(path, rows, "train/lr")
    losses = _column(path, rows, column)
    names = {name for row in rows for name in row}
    check(bool(losses), f"{path} has no finite {column!r}{nearest(column, names)}")
    check(bool(rates), f"{path} has no 'train/lr': the law needs the learning rate of every update")
    at, lr = (np.asarray(x, np.float64) for x in zip(*rates, strict=True))
    step, loss = (np.asarray(x) for x in zip(*losses, strict=True))
    check(bool(np.all(np.diff(step) > 0) and np.all(np.diff(at) > 0)), f"{path}: steps do not grow")
    every = np.interp(np.arange(1, max(at[-1], step[-1]) + 1), at, lr)
    before = int(at[0]) - 1  # updates of the trunk
    if before > 0:
        every[:before] = _trunk_rates(Path(run), before)
    kept = step > skip
    check(bool(kept.any()), f"{path}: no {column!r} after step {skip}")
    smoothed = moving_mean(loss.astype(np.float64), reach)
    return Curve(Path(run).name, every, step[kept].astype(np.int64), smoothed[kept], reach)


def _rows(path: Path) -> list[dict]:
    """The whole lines of a metrics file: a crash can tear the last one."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; is {path.parent} a run directory?") from error
    try:
        rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
    except ValueError as error:
        raise UserError(f"{path} is not a file of metrics ({error})") from error
    check(all(isinstance(row, dict) for row in rows), f"{path} is not a file of metrics")
    return rows


def _column(path: Path, rows: list[dict], name: str) -> list[tuple[int, float]]:
    """(step, value) where a column has a finite value."""
    try:
        return [(int(row["step"]), float(row[name])) for row in rows if row.get(name) is not None]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a file of metrics ({error!r})") from error


def _trunk_rates(run: Path, before: int) -> Float64[np.ndarray, "T"]:
    """Learning rates of updates 1 .. before, which the run's trunk made."""
    where = f"{run} starts after update {before}"
    try:
        trunk = json.loads((run / "config.json").read_bytes())["config"]["train"]["branch_from"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}, and its config.json names no trunk ({error!r})") from error
    check(bool(trunk), f"{where}, but it is no branch: earlier rows of metrics.jsonl are missing")
    rates = read_curve(run.parent / trunk).lr
    check(len(rates) >= before, f"{where}, but its trunk {trunk} has only {len(rates)} updates")
    return rates[:before]
