"""loss.png: training and evaluation loss over steps and tokens, with the learning rate below."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from jaxlm.train.metrics import format_count, read_rows

BLUE, ORANGE, GREY = "#2a6fbb", "#d1571e", "#5b6470"


def _series(rows: list[dict], *names: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the first of `names` that any row has; rows without a finite value are left out."""
    for name in names:
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            return np.asarray(steps, float), np.asarray(values, float)
    return np.zeros(0), np.zeros(0)


def smooth(y: np.ndarray, reach: int) -> np.ndarray:
    """Mean over up to `reach` neighbours on each side, as many left as right: no lag, and the ends stay put.

    >>> smooth(np.array([4.0, 1.0, 1.0, 1.0, 6.0]), 1).tolist()
    [4.0, 2.0, 1.0, 2.6666666666666665, 6.0]
    """
    index = np.arange(len(y))
    half = np.minimum(reach, np.minimum(index, len(y) - 1 - index))
    sums = np.concatenate([[0.0], np.cumsum(y)])
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)


def _limits(curve: np.ndarray, points: np.ndarray) -> tuple[float, float]:
    """A range that shows how the run goes on: its first steep descent may start above the top.

    The top is the highest value after the first tenth of the curve, or three times as far up again as the
    curve lies at that point.
    """
    start = len(curve) // 10
    low, high = min([*curve, *points]), max([*curve, *points])
    if len(curve) > 10:
        late = curve[start:]
        high = min(high, max(late.max(), low + 4.0 * (curve[start] - low)))
    pad = 0.06 * (high - low) or 0.05
    return float(low - pad), float(high + pad)


def plot_loss(metrics: str | Path, out: str | Path, *, title: str = "") -> Path:
    """Draw the loss of a run.

    Args:
        metrics: the run's `metrics.jsonl`.
        out: PNG file to write.
        title: shown above, such as the name of the run.

    Returns:
        The path of the picture.

    Raises:
        UserError: there is no row with a finite loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    rows = read_rows(metrics)
    steps, loss = _series(rows, "train/nll", "train/total")
    eval_steps, eval_loss = _series(rows, "eval/nll", "eval/total")
    lr_steps, lr = _series(rows, "train/lr")
    if not len(steps) and not len(eval_steps):
        raise UserError(f"{metrics} has no row with a finite loss")

    # Figure and canvas without pyplot: no global state, and nothing asks for a display.
    figure = Figure(figsize=(8.0, 5.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))

    smoothed = smooth(loss, len(loss) // 60)
    if len(steps):
        upper.plot(steps, loss, color=BLUE, alpha=0.35, linewidth=0.8)
        upper.plot(steps, smoothed, color=BLUE, linewidth=1.8, label="train")
    if len(eval_steps):
        upper.plot(eval_steps, eval_loss, color=ORANGE, linewidth=1.6, marker="o", markersize=4, label="eval")
        upper.annotate(
            f"{eval_loss[-1]:.3f}",
            (eval_steps[-1], eval_loss[-1]),
            textcoords="offset points",
            xytext=(6, 4),
            color=ORANGE,
            fontsize=9,
        )
    upper.set_ylim(*_limits(smoothed, eval_loss))
    of_text = any("train/bpb" in row or "eval/bpb" in row for row in rows)
    upper.set_ylabel(f"loss (nats per {'token' if of_text else 'prediction'})")
    upper.legend(frameon=False, loc="upper right")
    if title:
        upper.set_title(title, loc="left", fontsize=11, color=GREY)

    lower.plot(lr_steps, lr, color=GREY, linewidth=1.4)
    lower.set_ylim(0, (float(lr.max()) if len(lr) and lr.max() > 0 else 1.0) * 1.15)
    lower.set_ylabel("learning rate")
    lower.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    lower.set_xlabel("step")
    for axis in (upper, lower):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e3e6ea", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.margins(x=0.02)
    figure.align_ylabels((upper, lower))
    _token_axis(upper, rows, FuncFormatter)

    out = Path(out)
    part = out.with_name(f".{out.name}.part")
    figure.savefig(part, format="png")
    part.replace(out)
    return out


def _token_axis(axis: Any, rows: list[dict], formatter: Any) -> None:
    """A second x axis in tokens, where the rows say how many a step has."""
    seen = [row["tokens"] / row["step"] for row in rows if row["step"] > 0 and row.get("tokens")]
    if not seen or not math.isfinite(seen[-1]):
        return
    per_step = seen[-1]
    top = axis.secondary_xaxis("top", functions=(lambda s: s * per_step, lambda t: t / per_step))
    top.xaxis.set_major_formatter(formatter(lambda x, _: format_count(x)))
    top.set_xlabel("tokens", fontsize=9, color=GREY)
    top.tick_params(labelsize=9, colors=GREY)
    top.spines["top"].set_visible(False)
