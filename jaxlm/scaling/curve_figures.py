"""Pictures of whole loss curves: all runs of a sweep, and trunks with their branches."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.errors import check
from jaxlm.scaling.curves import Curve
from jaxlm.scaling.style import (
    GREY,
    handle,
    legend_below,
    log_axis,
    loss_axis,
    marks,
    new_figure,
    shades,
    size_bar,
    span,
    styled,
)


def late_range(curves: Sequence[Curve], first: float) -> tuple[float, float]:
    """Range of the losses from update `first` on: the first descent would leave no room for the rest."""
    return span(*(c.loss[c.step >= min(first, c.step[-1])] for c in curves), pad=0.05)


def thinned(curve: Curve, most: int = 600) -> np.ndarray:
    """Positions of rows that are about evenly spaced on a logarithmic axis."""
    return np.unique(np.geomspace(1, len(curve.step), min(most, len(curve.step))).round().astype(int)) - 1


@styled
def loss_curves(curves: Sequence[Curve], sizes: Sequence[float], tokens_per_step: Sequence[float]) -> Any:
    """Loss against tokens of every run, coloured by size; a dot marks the end of each.

    Args:
        curves: the runs.
        sizes: parameters of each.
        tokens_per_step: of each.
    """
    check(bool(curves), "there are no curves to draw")
    distinct = np.unique(sizes)
    colours = dict(zip(distinct, shades(len(distinct)), strict=True))
    figure, axis = new_figure(5.6, 3.5)
    seen = []
    for curve, size, per_step in zip(curves, sizes, tokens_per_step, strict=True):
        at = thinned(curve)
        axis.plot(curve.step[at] * per_step, curve.loss[at], color=colours[size], linewidth=0.8, alpha=0.8)
        axis.plot(curve.step[-1] * per_step, curve.loss[-1], color=colours[size], **marks("o", 3.6))
        seen += [curve.step[-1] * per_step, max(curve.step[-1] * per_step * 0.02, curve.step[0] * per_step)]
    log_axis(axis, "x", *span(seen, pad=0.03), "tokens")
    loss_axis(axis, *late_range(curves, 0.02 * min(c.step[-1] for c in curves)))
    size_bar(figure, axis, distinct)
    return figure


@styled
def trunks(
    families: Mapping[str, tuple[Curve, Sequence[Curve]]], tokens_per_step: float, sizes: Sequence[float] = ()
) -> Any:
    """Trunks at constant learning rate with the cooldowns that branch off them, and the rates below.

    Args:
        families: label -> (trunk, branches).
        tokens_per_step: of all runs.
        sizes: parameters of each family, for the colours' order; default: as they come.
    """
    check(bool(families), "there are no trunks to draw")
    order = np.argsort(sizes) if len(sizes) else np.arange(len(families))
    colours = [shades(len(families))[int(np.flatnonzero(order == i)[0])] for i in range(len(families))]
    figure, (upper, lower) = new_figure(5.8, 4.2, 2, 1, sharex=True, height_ratios=(4, 1))
    entries, everything = [], []
    for (label, (trunk, branches)), colour in zip(families.items(), colours, strict=True):
        everything += [trunk, *branches]
        at = thinned(trunk)
        upper.plot(trunk.step[at] * tokens_per_step, trunk.loss[at], color=colour, linewidth=0.9, alpha=0.75)
        lower.plot(np.arange(1, len(trunk.lr) + 1) * tokens_per_step, trunk.lr, color=colour, linewidth=0.9)
        for branch in branches:
            start = _branch_start(trunk, branch)
            own = branch.step >= start
            upper.plot(branch.step[own] * tokens_per_step, branch.loss[own], color=colour, linewidth=1.4)
            upper.plot(branch.step[-1] * tokens_per_step, branch.loss[-1], color=colour, **marks("o", 5))
            steps = np.arange(start, len(branch.lr) + 1)
            lower.plot(steps * tokens_per_step, branch.lr[start - 1 :], color=colour, linewidth=0.9)
        entries.append(handle(label, color=colour, linestyle="-"))
    entries.append(handle("end of a cooldown", color=GREY, **marks("o", 5)))
    last = max(c.step[-1] for c in everything) * tokens_per_step
    log_axis(upper, "x", 0.02 * last, last * 1.08, "")
    log_axis(lower, "x", 0.02 * last, last * 1.08, "tokens")
    upper.tick_params(labelbottom=False)
    loss_axis(upper, *late_range(everything, 0.02 * last / tokens_per_step))
    rate_axis(lower)
    figure.align_ylabels((upper, lower))
    legend_below(figure, entries)
    return figure


def _branch_start(trunk: Curve, branch: Curve) -> int:
    """The first update whose rate is not the trunk's."""
    n = min(len(trunk.lr), len(branch.lr))
    differs = np.flatnonzero(~np.isclose(trunk.lr[:n], branch.lr[:n], rtol=1e-6, atol=0))
    return int(differs[0]) + 1 if len(differs) else n


def rate_axis(axis: Any) -> None:
    """A small y axis of learning rates."""
    axis.set_ylabel("learning rate")
    axis.set_ylim(bottom=0)
    axis.margins(y=0.12)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    axis.yaxis.get_offset_text().set_fontsize(6.5)
    axis.locator_params(axis="y", nbins=3)
