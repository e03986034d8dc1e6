"""Pictures of fits: what was measured, what the fit says between the points, and how far to believe it.

Every function takes fits and returns a matplotlib figure; `style.save_figure` writes it. Bands and bars are
intervals of the fit's bootstrap draws, at its level.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from scipy import stats
from scipy.interpolate import Akima1DInterpolator

from jaxlm.errors import check
from jaxlm.scaling.bands import (
    best_interval,
    describe,
    frontier,
    has_optimum,
    is_surface,
    optimum_curve,
    other_inputs,
    points_of,
)
from jaxlm.scaling.laws import get_law
from jaxlm.scaling.predict import LINES as LINE_METHODS
from jaxlm.scaling.record import Fit, predict_loss
from jaxlm.scaling.style import (
    COLOURS,
    GREY,
    INK,
    LIGHT,
    LINES,
    MARKERS,
    count_text,
    data_ends,
    flops_axis,
    handle,
    interval_text,
    legend_below,
    legend_right,
    log_axis,
    loss_axis,
    marks,
    new_figure,
    power_text,
    save_figure,
    shades,
    size_bar,
    span,
    styled,
)
from jaxlm.scaling.table import Points
from jaxlm.scaling.vertices import find_budgets, size_labels

Array = Float64[np.ndarray, "..."]


# --- Iso-FLOP curves ---


@styled
def isoflop(fit: Fit) -> Any:
    """Loss against size at each budget, with the fitted curves and their vertices.

    Line methods show their parabolas or Akima splines; budgets that they did not use are absent.
    Surfaces show themselves along the budget's N D, and their minimum there.
    """
    points = points_of(fit)
    budgets, _ = find_budgets(points)
    check(bool(budgets), "no two runs share a budget: there are no iso-FLOP curves")
    figure, axis = new_figure(5.6, 3.6)
    entries, path = [], []
    for i, (budget, colour) in enumerate(zip(budgets, shades(len(budgets)), strict=True)):
        marker, at = MARKERS[i % len(MARKERS)], budget.index
        axis.plot(points.N[at], points.L[at], color=colour, linestyle="none", **marks(marker))
        grid = np.geomspace(*span(points.N[at], pad=0.06), 200)
        curve, vertex = _isoflop_curve(fit, points, budget, grid)
        if curve is not None:
            axis.plot(grid, curve, color=colour, linewidth=1.2)
        if vertex is not None:
            path.append(vertex[:2])
            axis.errorbar(
                *vertex[:2], xerr=vertex[2], color=INK, marker="*", markersize=10, markerfacecolor=colour,
                markeredgecolor=INK, markeredgewidth=0.7, elinewidth=1, capsize=2, zorder=5,
            )  # fmt: skip
        entries.append(handle(power_text(budget.flops), color=colour, **marks(marker)))
    if len(path) > 1:
        axis.plot(*zip(*path, strict=True), color=GREY, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
    low, high = span(points.L, [p[1] for p in path] or points.L, pad=0.07)
    loss_axis(axis, low, high)
    log_axis(axis, "x", *span(points.N, pad=0.07), "parameters $N$")
    entries.append(handle("minimum", marker="*", markersize=9, markerfacecolor="white"))
    legend_right(figure, entries, "compute $C$ (FLOPs)")
    return figure


def _isoflop_curve(
    fit: Fit, points: Points, budget: Any, grid: Array
) -> tuple[Array | None, tuple[float, float, Any] | None]:
    """The fitted curve over sizes `grid`, and its minimum as (N, L, horizontal error or None)."""
    at, log_n = budget.index, np.log(points.N[budget.index])
    if fit.method in LINE_METHODS:
        near = [
            o for o in fit.optima if abs(math.log(o["budget"] / budget.flops)) < 0.2 and o["N"] and o["L"]
        ]
        if not near:
            return None, None
        o = min(near, key=lambda o: abs(math.log(o["budget"] / budget.flops)))
        error = o.get("sigma_log_N") or None
        if error:
            error = [[o["N"] * -math.expm1(-error)], [o["N"] * math.expm1(error)]]
        vertex = (o["N"], o["L"], error)
        if fit.method == "envelope":
            return None, vertex
        if fit.method == "akima":
            labels = size_labels(points.N[at])
            sizes, losses = (
                np.bincount(labels, v) / np.bincount(labels) for v in (log_n, np.log(points.L[at]))
            )
            inside = np.clip(np.log(grid), sizes[0], sizes[-1])
            curve = np.exp(Akima1DInterpolator(sizes, losses)(inside))
            return np.where(inside == np.log(grid), curve, np.nan), vertex
        return o["L"] + o["curvature"] / 2 * (np.log(grid) - math.log(o["N"])) ** 2, vertex
    if not is_surface(fit):
        return None, None
    # C / (N D) depends on the size where C is exact: between the runs it is interpolated.
    order = np.argsort(log_n)
    ratio = np.log(points.C[at] / (points.N[at] * points.D[at]))[order]
    d = points.C[at].mean() / (grid * np.exp(np.interp(np.log(grid), log_n[order], ratio)))
    extra = {name: np.full_like(grid, np.median(x[at])) for name, x in other_inputs(fit, points).items()}
    curve = predict_loss(fit, grid, d, **extra)
    low = int(np.argmin(curve))
    return curve, (grid[low], curve[low], None) if 0 < low < len(grid) - 1 else None


# --- N*, D* and tokens per parameter against compute ---


def _reach(fits: Mapping[str, Fit], target: float) -> tuple[float, float, float]:
    """Lowest and highest compute to draw, and where the data ends."""
    seen = [c for fit in fits.values() for c in fit.points["C"]]
    low, high = span(seen, pad=0.04)
    return low, max(high, target * 1.15), max(seen)


@styled
def optimum_lines(fits: Mapping[str, Fit], target: float = 0.0) -> Any:
    """N*(C) and D*(C) of several fits, with bands, the minima per budget, and the exponents.

    Args:
        fits: by label; each must have an optimum (`has_optimum`).
        target: compute to extend the lines to, in FLOPs; 0 = where the data ends.
    """
    low, high, end = _reach(fits, target)
    figure, axes = new_figure(6.8, 3.3, 1, 2)
    entries, ranges = [], {"N": [], "D": []}
    for i, (label, fit) in enumerate(fits.items()):
        colour, line, marker = COLOURS[i % len(COLOURS)], LINES[i % len(LINES)], MARKERS[i % len(MARKERS)]
        curve = optimum_curve(fit, target)
        for name, axis in zip("ND", axes, strict=True):
            ranges[name] += _line_with_band(axis, curve, name, colour, line)
            dots = [(o["budget"], o[name]) for o in fit.optima if o.get("used", True) and o[name]]
            if dots:
                axis.plot(
                    *zip(*dots, strict=True), linestyle="none", color=colour, zorder=4, **marks(marker, 5.5)
                )
                ranges[name].append([y for _, y in dots])
        style = marks(marker, 5.5) if fit.optima else {}
        entries.append(handle(_with_exponents(label, fit), color=colour, linestyle=line, **style))
    for (name, values), axis in zip(ranges.items(), axes, strict=True):
        flops_axis(axis, low, high)
        log_axis(
            axis,
            "y",
            *span(*values, pad=0.05),
            f"{'parameters' if name == 'N' else 'tokens'} ${name}^{{\\!*}}$",
        )
        data_ends(axis, end, high)
    legend_below(figure, entries, 1)
    return figure


def _line_with_band(axis: Any, curve: Mapping[str, Array], name: str, colour: Any, line: Any) -> list[Array]:
    """Draw an optimum against compute; returns what to show (of a wide band only a part)."""
    best, shown = curve[name], [curve[name]]
    axis.plot(curve["C"], best, color=colour, linestyle=line, zorder=3)
    if f"{name}_lo" in curve:
        edges = curve[f"{name}_lo"], curve[f"{name}_hi"]
        axis.fill_between(curve["C"], *edges, color=colour, alpha=0.13, linewidth=0)
        shown += [np.clip(edge, best / 6, best * 6) for edge in edges]
    return shown


def _with_exponents(label: str, fit: Fit) -> str:
    """The label, and a and b with their intervals."""
    values = {**fit.derived, **fit.parameters}
    text = [f"${n}$ = {interval_text(values[n], best_interval(fit, n))}" for n in ("a", "b") if n in values]
    return ":  ".join([label, ",  ".join(text)]) if text else label


@styled
def tokens_per_parameter(fits: Mapping[str, Fit], target: float = 0.0) -> Any:
    """D*/N* against compute, with bands; level where the exponents of N* and D* are equal."""
    low, high, end = _reach(fits, target)
    figure, axis = new_figure(4.8, 3.2)
    entries, shown = [], []
    for i, (label, fit) in enumerate(fits.items()):
        colour, line = COLOURS[i % len(COLOURS)], LINES[i % len(LINES)]
        shown += _line_with_band(axis, optimum_curve(fit, target), "tokens_per_param", colour, line)
        entries.append(handle(label, color=colour, linestyle=line))
    bottom, top = span(*shown, pad=0.05)
    if bottom / 3 < 20 < top * 3:
        bottom, top = min(bottom, 18), max(top, 23)
        axis.axhline(20, color=GREY, linewidth=0.7, linestyle=(0, (1, 2)))
        axis.text(low, 20, " 20 (rule of thumb)", va="bottom", ha="left", fontsize=6.5, color=GREY)
    flops_axis(axis, low, high)
    log_axis(axis, "y", bottom, top, "tokens per parameter $D^{\\!*}/N^{\\!*}$")
    data_ends(axis, end, high)
    legend_below(figure, entries)
    return figure


# --- The surface ---


@styled
def surface(fit: Fit) -> Any:
    """Contours of the fitted loss over N and D, the runs, and the efficient frontier with its band."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    check(is_surface(fit), f"law={fit.law!r} is no surface over N and D")
    points = points_of(fit)
    n, d = (np.geomspace(*span(v, pad=0.1), 120) for v in (points.N, points.D))
    mesh_n, mesh_d = np.meshgrid(n, d)
    extra = {k: np.full_like(mesh_n, np.median(v)) for k, v in other_inputs(fit, points).items()}
    if "C" in extra:
        extra["C"] = mesh_n * mesh_d * np.median(points.C / (points.N * points.D))
    loss = predict_loss(fit, mesh_n, mesh_d, **extra)
    figure, axis = new_figure(5.4, 3.8)
    levels = MaxNLocator(14, steps=[1, 2, 2.5, 5, 10]).tick_values(
        points.L.min() * 0.97, points.L.max() * 1.06
    )
    light = LinearSegmentedColormap.from_list("light", colormaps["PuBuGn_r"](np.linspace(0.25, 1, 64)))
    filled = axis.contourf(n, d, loss, levels=levels, cmap=light, extend="both")
    axis.contour(n, d, loss, levels=levels, colors="white", linewidths=0.6)
    axis.plot(
        points.N, points.D, "o", color=INK, markersize=3.2, markeredgecolor="white", markeredgewidth=0.5
    )
    entries = [handle("runs", marker="o", markersize=3.5)]
    if has_optimum(fit):
        best_n, best_d, edges = frontier(fit, points.C.min() / 2, points.C.max() * 4)
        if edges is not None:
            axis.fill_between(best_n, *edges, color=COLOURS[1], alpha=0.3, linewidth=0, zorder=3)
        axis.plot(best_n, best_d, color=COLOURS[1], linewidth=1.4, zorder=4)
        entries.append(handle("efficient frontier", color=COLOURS[1], linestyle="-"))
    log_axis(axis, "x", n[0], n[-1], "parameters $N$")
    log_axis(axis, "y", d[0], d[-1], "tokens $D$")
    axis.grid(False)
    bar = figure.colorbar(filled, ax=axis, pad=0.02, aspect=30)
    bar.set_label("fitted loss (nats/token)")
    bar.outline.set_visible(False)
    legend_below(figure, entries)
    return figure


# --- Residuals, envelope, profiles ---


@styled
def residuals(fit: Fit) -> Any:
    """Relative residuals against compute (or the law's first input), and their quantiles against a normal's.

    The shaded region of the quantile plot holds each order statistic of a normal sample 95% of the time.
    """
    r = 100 * np.asarray(fit.residuals)
    known = _known(fit)
    x_name = "C" if "C" in known else next(n for n in get_law(fit.law).inputs if n in known)
    x = np.asarray(fit.points[x_name], np.float64)
    runs = np.asarray(fit.points.get("row", np.zeros(len(x)))) >= 0  # row -1: a point that no run made
    figure, (left, right) = new_figure(6.8, 2.9, 1, 2)
    left.axhline(0, color=INK, linewidth=0.8)
    for edge in (-2, 2):
        left.axhline(edge * 100 * fit.sigma, color=GREY, linewidth=0.8, linestyle=(0, (4, 2)))
    left.plot(x[runs], r[runs], "o", color=COLOURS[0], markersize=3.5, alpha=0.75, markeredgewidth=0)
    left.set_ylabel("measured / fitted - 1 (%)")
    text = power_text if x_name == "C" else count_text
    log_axis(
        left, "x", *span(x[runs]), "training compute $C$ (FLOPs)" if x_name == "C" else f"${x_name}$", text
    )
    left.set_title(f"(a)  dashed: $\\pm2\\sigma$, $\\sigma$ = {100 * fit.sigma:.2g}%", fontsize=8)
    reach = 1.12 * max(np.abs(r).max(), 200 * fit.sigma)
    left.set_ylim(-reach, reach)

    n = len(r)
    rank = np.arange(1, n + 1)
    normal = stats.norm.ppf((rank - 0.5) / n)
    edges = [stats.norm.ppf(stats.beta.ppf(q, rank, n + 1 - rank)) for q in (0.025, 0.975)]
    standard = np.sort(r) / (100 * fit.sigma)
    right.fill_between(normal, *edges, color=LIGHT, linewidth=0)
    right.plot(normal, normal, color=INK, linewidth=0.8)
    right.plot(normal, standard, "o", color=COLOURS[0], markersize=3.5, alpha=0.75, markeredgewidth=0)
    right.set_xlabel("quantile of a normal")
    right.set_ylabel(r"residual / $\sigma$")
    top = 1.1 * max(np.abs(standard).max(), normal.max())
    right.set_ylim(-top, top)
    right.set_title("(b)", fontsize=8)
    return figure


@styled
def envelope(fit: Fit) -> Any:
    """Loss against compute, one curve per size, and the fitted lowest loss L*(C)."""
    points = points_of(fit)
    labels = size_labels(points.N)
    count = int(labels.max()) + 1
    figure, axis = new_figure(5.4, 3.5)
    for k, colour in enumerate(shades(count)):
        at = np.flatnonzero(labels == k)
        at = at[np.argsort(points.C[at])]
        axis.plot(points.C[at], points.L[at], "-", color=colour, linewidth=0.9, alpha=0.8)
        axis.plot(points.C[at], points.L[at], "o", color=colour, markersize=3.2, markeredgewidth=0)
    low, high = span(points.C, pad=0.05)
    if has_optimum(fit):
        curve = optimum_curve(fit)
        _line_with_band(axis, curve, "L_law", INK, "-")
        entries = [
            handle("run", marker="o", color=GREY),
            handle("fitted lowest loss $L^{\\!*}(C)$", linestyle="-"),
        ]
        legend_below(figure, entries)
    flops_axis(axis, low, high)
    loss_axis(axis, *span(points.L, pad=0.07))
    size_bar(figure, axis, np.array([points.N[labels == k].mean() for k in range(count)]))
    return figure


@styled
def profiles(fit: Fit) -> Any:
    """The objective against each parameter with the others refitted, and the cut-off of the interval.

    A flat valley is a number that the data do not identify, however narrow another interval may look.
    """
    check(bool(fit.profile), "the fit has no profiles")
    columns = min(3, len(fit.profile))
    rows = -(-len(fit.profile) // columns)
    figure, axes = new_figure(2.25 * columns, 2.1 * rows + 0.2, rows, columns, squeeze=False)
    for axis, (name, profile) in zip(axes.ravel(), fit.profile.items(), strict=False):
        grid, value = np.asarray(profile["grid"]), np.asarray(profile["value"]) - fit.value
        order = np.argsort(grid)
        cut = profile.get("cutoff")
        cut = None if cut is None else cut - fit.value
        axis.plot(grid[order], value[order], "-", color=COLOURS[0], marker="o", markersize=2.2)
        near = grid[value <= 3 * cut] if cut else grid  # the walk may have gone far up one side
        wide = near.min() > 0 and near.max() > 10 * near.min()
        if wide:
            log_axis(axis, "x", *span(near, pad=0.1), symbol(name), "{:g}".format, fewest=3)
        else:
            axis.set_xlim(*(near.min() + np.ptp(near) * np.array([-0.1, 1.1])))
        low, high = profile["interval"]
        edges = axis.get_xlim()
        bounded = [edges[0] if low is None else low, edges[1] if high is None else high]
        axis.axvspan(*np.clip(bounded, *edges), color=COLOURS[0], alpha=0.12, linewidth=0)
        axis.set_xlim(edges)
        best = {**fit.derived, **fit.parameters}.get(name)
        if best is not None:
            axis.axvline(best, color=INK, linewidth=0.8)
        if cut is not None:
            axis.axhline(cut, color=COLOURS[1], linewidth=0.9, linestyle=(0, (4, 2)))
            axis.set_ylim(-0.08 * cut, max(2.6 * cut, 1e-12))
        axis.set_xlabel(symbol(name))
        linear = "y" if wide else "both"
        axis.ticklabel_format(axis=linear, style="sci", scilimits=(-3, 4), useMathText=True)
        axis.locator_params(axis=linear, nbins=5)
        for one in (axis.xaxis, axis.yaxis):
            one.get_offset_text().set_fontsize(6.5)
    for axis in axes[:, 0]:
        axis.set_ylabel("objective above minimum")
    for axis in axes.ravel()[len(fit.profile) :]:
        axis.set_visible(False)
    cut = handle(f"cut-off at {100 * fit.level:g}%", color=COLOURS[1], linestyle=(0, (4, 2)))
    inside = handle("interval", color=COLOURS[0], alpha=0.2, linestyle="-", linewidth=7)
    legend_below(figure, [handle("estimate", linestyle="-", linewidth=0.8), cut, inside])
    return figure


def symbol(name: str) -> str:
    """A parameter's name in mathtext.

    >>> symbol("alpha"), symbol("E"), symbol("R_D"), symbol("log_kN")
    ('$\\\\alpha$', '$E$', '$R_{D}$', 'log_kN')
    """
    greek = ("alpha", "beta", "gamma", "delta", "eta", "lambda")
    head, _, tail = name.partition("_")
    head = rf"\{head}" if head in greek else head
    if len(name.partition("_")[0]) > 1 and not head.startswith("\\"):
        return name
    return f"${head}_{{{tail}}}$" if tail else f"${head}$"


# --- All that makes sense for one fit ---


def _known(fit: Fit) -> set[str]:
    """Columns of the fit's points that hold numbers: a law of C alone has no N, one of the loss no C."""
    return {name for name, values in fit.points.items() if np.isfinite(np.asarray(values, float)).all()}


def draw_fit(fit: Fit, out_dir: str | Path) -> list[Path]:
    """Draw a fit into `out_dir`, as PNG; what its law or method has no picture of is left out.

    Returns:
        The files: residuals, isoflop, envelope, surface, optimum, tokens_per_parameter, profiles.
    """
    pictures: dict[str, Any] = {}
    grid = {"N", "D", "C", "L"} <= _known(fit)
    if fit.residuals and fit.sigma > 0:
        pictures["residuals"] = residuals(fit)
    if grid and find_budgets(points_of(fit))[0]:
        pictures["isoflop"] = isoflop(fit)
    if grid and np.bincount(size_labels(points_of(fit).N)).max() > 1:
        pictures["envelope"] = envelope(fit)
    if grid and is_surface(fit):
        pictures["surface"] = surface(fit)
    if grid and has_optimum(fit):
        pictures["optimum"] = optimum_lines({describe(fit): fit})
        pictures["tokens_per_parameter"] = tokens_per_parameter({describe(fit): fit})
    if fit.profile:
        pictures["profiles"] = profiles(fit)
    return [save_figure(figure, Path(out_dir) / f"{name}.png") for name, figure in pictures.items()]
