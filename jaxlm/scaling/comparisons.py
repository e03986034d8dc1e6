"""Pictures that judge: predicted against measured, calibration, and what a choice does to a number."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64
from scipy import stats

from jaxlm.errors import check
from jaxlm.scaling.bands import optimum_curve, points_of
from jaxlm.scaling.record import Fit
from jaxlm.scaling.style import (
    COLOURS,
    GREY,
    INK,
    LIGHT,
    count_text,
    data_ends,
    flops_axis,
    handle,
    interval_text,
    legend_below,
    loss_axis,
    marks,
    new_figure,
    power_text,
    span,
    styled,
)

INSIDE, OUTSIDE = COLOURS[2], COLOURS[1]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A run that the fit has not seen: what was predicted for it, and what came out."""

    name: str
    N: float
    D: float
    C: float
    measured: float  # loss, nats per token
    predicted: float
    low: float  # of the prediction interval: the law's uncertainty and a run's noise
    high: float

    @property
    def error(self) -> float:
        """measured / predicted - 1."""
        return self.measured / self.predicted - 1

    @property
    def inside(self) -> bool:
        """Whether the interval holds the measured loss."""
        return self.low <= self.measured <= self.high

    def nominal(self, level: float) -> float:
        """Level of the narrowest interval that holds the measured loss (log-normal prediction)."""
        side = self.high if self.measured > self.predicted else self.low
        deviation = abs(np.log(side / self.predicted)) / stats.norm.ppf((1 + level) / 2)
        return float(2 * stats.norm.cdf(abs(np.log1p(self.error)) / deviation) - 1)


@styled
def holdout(fit: Fit, runs: Sequence[HeldOut]) -> Any:
    """Predicted and measured losses of runs beyond the fit: against compute, and relative with intervals."""
    check(bool(runs), "there are no held-out runs")
    points = points_of(fit)
    figure, (left, right) = new_figure(6.8, 3.2, 1, 2, width_ratios=(1.25, 1))
    curve = optimum_curve(fit, max(run.C for run in runs))
    left.plot(points.C, points.L, "o", color=GREY, alpha=0.5, markersize=3, markeredgewidth=0)
    if np.all(np.isfinite(curve["L"])):
        left.plot(curve["C"], curve["L"], color=COLOURS[0], zorder=3)
        if "L_lo" in curve:
            left.fill_between(
                curve["C"], curve["L_lo"], curve["L_hi"], color=COLOURS[0], alpha=0.15, linewidth=0
            )
    for run in runs:
        colour = INSIDE if run.inside else OUTSIDE
        left.plot(run.C, run.measured, color=colour, zorder=5, **marks("D" if run.inside else "X", 6))
    low, high = span(points.C, [run.C for run in runs], pad=0.06)
    flops_axis(left, low, high)
    loss_axis(left, *span(points.L, [run.measured for run in runs], pad=0.06))
    data_ends(left, points.C.max(), high)

    order = sorted(runs, key=lambda run: (run.C, run.N), reverse=True)
    for y, run in enumerate(order):
        edges = [100 * (edge / run.predicted - 1) for edge in (run.low, run.high)]
        right.plot(edges, [y, y], color=COLOURS[0], alpha=0.35, linewidth=6, solid_capstyle="butt")
        colour = INSIDE if run.inside else OUTSIDE
        right.plot(100 * run.error, y, color=colour, zorder=4, **marks("D" if run.inside else "X", 6))
    right.axvline(0, color=INK, linewidth=0.8)
    right.set_yticks(range(len(order)), [f"{count_text(r.N)} at {power_text(r.C)}" for r in order])
    right.set_ylim(-0.7, len(order) - 0.3)
    right.grid(axis="y", visible=False)
    right.set_xlabel("measured / predicted - 1 (%)")
    entries = [
        handle("fitted runs", marker="o", color=GREY, markersize=4),
        handle("predicted, with interval", color=COLOURS[0], linestyle="-"),
        handle("measured, inside", color=INSIDE, **marks("D", 6)),
        handle("measured, outside", color=OUTSIDE, **marks("X", 6)),
    ]
    legend_below(figure, entries[:3] if all(r.inside for r in runs) else entries)
    return figure


@styled
def calibration(fit: Fit, runs: Sequence[HeldOut] = ()) -> Any:
    """How often intervals of each level hold what they should: the fitted runs, and the held-out ones.

    A curve below the diagonal: intervals too narrow. The shaded region holds a calibrated curve of as many
    runs as were fitted 95% of the time.
    """
    z = np.sort(np.abs(np.asarray(fit.residuals)) / fit.sigma)
    n = len(z)
    figure, axis = new_figure(3.9, 3.5)
    levels = np.linspace(0, 1, 201)
    edges = [stats.binom.ppf(q, n, levels) / n for q in (0.025, 0.975)]
    axis.fill_between(levels, *edges, color=LIGHT, linewidth=0, step="mid")
    axis.plot([0, 1], [0, 1], color=INK, linewidth=0.8)
    _steps(axis, 2 * stats.norm.cdf(z) - 1, COLOURS[0], "-")
    entries = [handle(f"fitted runs ({n})", color=COLOURS[0], linestyle="-")]
    if runs:
        _steps(axis, np.sort([run.nominal(fit.level) for run in runs]), OUTSIDE, (0, (4, 1.5)))
        entries.append(handle(f"held-out runs ({len(runs)})", color=OUTSIDE, linestyle=(0, (4, 1.5))))
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.005)
    axis.set_aspect("equal")
    axis.set_xlabel("level of the interval")
    axis.set_ylabel("share of the runs inside")
    legend_below(figure, entries)
    return figure


def _steps(axis: Any, at: Float64[np.ndarray, "n"], colour: Any, line: Any) -> None:
    """The empirical distribution function of sorted values in [0, 1]."""
    x = np.concatenate([[0], at, [1]])
    y = np.concatenate([[0], np.arange(1, len(at) + 1), [len(at)]]) / len(at)
    axis.step(x, y, where="post", color=colour, linestyle=line)


@dataclasses.dataclass(frozen=True)
class Row:
    """One estimate of a comparison."""

    label: str
    value: float
    interval: tuple[float, float] | None = None
    group: str = ""


@styled
def forest(rows: Sequence[Row], label: str, *, digits: int = 3) -> Any:
    """One number under several choices, with intervals; rows of a group stand together.

    Args:
        rows: from top to bottom; the first is the reference, whose interval is shaded.
        label: of the x axis.
        digits: decimals of the numbers at the right.
    """
    check(bool(rows), "there is nothing to compare")
    groups = list(dict.fromkeys(row.group for row in rows))
    figure, axis = new_figure(5.6, 0.7 + 0.235 * len(rows) + 0.12 * (len(groups) - 1))
    y, ticks = 0.0, []
    if rows[0].interval:
        axis.axvspan(*rows[0].interval, color=LIGHT, alpha=0.6, linewidth=0, zorder=0)
    axis.axvline(rows[0].value, color=GREY, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    for i, row in enumerate(rows):
        if i and row.group != rows[i - 1].group:
            y -= 0.5
        colour = COLOURS[groups.index(row.group) % len(COLOURS)]
        if row.interval:
            axis.plot(row.interval, [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
        axis.plot(row.value, y, color=colour, zorder=4, **marks("o", 5.5))
        axis.annotate(
            interval_text(row.value, row.interval, digits), (1.02, y), xycoords=axis.get_yaxis_transform(),
            va="center", ha="left", fontsize=7, annotation_clip=False,
        )  # fmt: skip
        ticks.append(y)
        y -= 1
    axis.set_yticks(ticks, [row.label for row in rows])
    axis.set_ylim(ticks[-1] - 0.6, 0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.spines["left"].set_visible(False)
    axis.set_xlabel(label)
    return figure
