"""Alarms of a fitted law: optimiser, residuals, identification, uncertainty, for `diagnostics.examine`."""

import math
from collections.abc import Callable

import numpy as np

from jaxlm.scaling.design_checks import Found, found
from jaxlm.scaling.laws import LAWS
from jaxlm.scaling.record import Fit
from jaxlm.scaling.table import Points

LOOSE = {"L": 0.05}  # robust deviation of the log residuals beyond which a law describes no table, by target
LOOSE_ELSE = 0.3  # of other targets: a tuned learning rate is known to a factor
FLOOR = 1 / 3  # width of an interval of E over it, from which on the data do not hold E
RIDGE = 10.0  # ends of an interval over each other, of a positive parameter that is no level of a power
LEVELS = ("N_c", "D_c")  # of powers in laws that are no sum: as wide as the exponent lets them be
EXACT = 1e-6  # deviation of the log residuals below which losses are computed, not measured
REACHED = 1e-6  # gap to the best objective, relative, at which a start counts as arrived


def few_points(fit: Fit, points: Points) -> Found:
    """Small samples look precise (pitfall 14); fewer runs than parameters are refused before the fit."""
    free = len(fit.names)
    if len(points) >= 3 * free and len(points) - free >= 5:
        return []
    text = (
        f"{len(points)} runs for {free} free parameters: the residuals say little about the errors, and a "
        "good fit is no evidence. Fix or tie parameters, or add runs"
    )
    return found("few_points", "warning", text, len(points))


def no_noise(fit: Fit, points: Points) -> Found:
    """A law that meets every run: a made-up table, whose intervals mean nothing."""
    if fit.sigma > EXACT or len(points) <= len(fit.names):
        return []
    text = (
        f"the law meets every run to {fit.sigma:.1g}: such values are computed, not measured, and errors and "
        "intervals say nothing"
    )
    return found("no_noise", "note", text, fit.sigma)


def start_scatter(fit: Fit, points: Points) -> Found:
    """Starts that end elsewhere: the optimiser's scatter, no sampling error (pitfalls 6 and 10)."""
    gaps = np.array([start["gap"] for start in fit.starts], float)
    reached = gaps <= REACHED * max(abs(fit.value), 1e-300) + 1e-15
    missed = int((~reached).sum())
    out: Found = []
    if missed:
        worst = float(gaps[np.isfinite(gaps)].max(initial=0.0)) / max(abs(fit.value), 1e-300)
        text = (
            f"{missed} of {len(gaps)} starts ended at another objective (up to {worst:.2g} of it worse): "
            "local optima or a flat valley. Their scatter is no sampling error and enters no interval here"
        )
        out += found("start_scatter", "warning" if missed > len(gaps) / 2 else "note", text, missed)
    if fit.starts and not any(fit.starts[i]["converged"] for i in np.flatnonzero(reached)):
        out += found("not_converged", "warning", "no start converged at the best objective", float(fit.value))
    return out


def rounding(fit: Fit, points: Points, value: Callable[[dict[str, float]], np.ndarray]) -> Found:
    """What printing the exponents with 2 and the coefficients with 3 digits does to the loss (pitfall 2)."""
    law = LAWS[fit.law]
    rounded = {
        name: float(f"{exact:.{3 if name in law.logs or name == 'E' else 2}g}")
        for name, exact in fit.parameters.items()
    }
    ratio = float(np.mean(np.log(np.abs(value(rounded) / value(fit.parameters)))))
    if abs(ratio) < 1e-3:
        return []
    what = "losses" if law.target == "L" else law.target
    text = (
        f"exponents of 2 digits and coefficients of 3 would shift the predicted {what} by "
        f"{math.expm1(ratio):+.2%} on average (residual deviation {fit.sigma:.2%}): print 6 digits or more"
    )
    return found("rounding", "note", text, ratio)


def residuals(fit: Fit, points: Points) -> Found:
    """Heavy tails (pitfall 5) and trends of the residuals."""
    r = np.asarray(fit.residuals, float)
    free = len(fit.names)
    if len(r) < max(8, free + 3) or fit.sigma < EXACT:
        return []
    out: Found = []
    spread = 1.4826 * float(np.median(np.abs(r - np.median(r)))) * math.sqrt(len(r) / (len(r) - free))
    target = LAWS[fit.law].target if fit.law in LAWS else "L"
    if spread > (most := LOOSE.get(target, LOOSE_ELSE)):
        text = (
            f"the robust deviation of the log residuals of {target} is {spread:.1%}, over {most:.0%}: the "
            "law does not describe this table. Check the columns and their units, and look at the residuals"
        )
        out += found("poor_fit", "warning", text, spread)
    far = int((np.abs(r - np.median(r)) > 4 * spread).sum())
    if far >= max(2, 0.01 * len(r)):
        quantiles = ", ".join(f"{v:+.2%}" for v in np.quantile(r, [0.01, 0.25, 0.5, 0.75, 0.99]))
        text = (
            f"{far} of {len(r)} residuals lie beyond 4 robust deviations ({spread:.2%}); quantiles 1, 25, "
            f"50, 75, 99%: {quantiles}. The loss function matters: fit with huber and mse, and compare"
        )
        out += found("heavy_tails", "warning", text, far)
    inner = np.abs(r - np.median(r)) <= 4 * spread
    for name in "CND":
        x = np.log(getattr(points, name)[inner])
        x = np.nan_to_num(x - x.mean())
        width = float(np.ptp(x))
        if width < 0.5:
            continue
        slope = float((x * r[inner]).sum() / (x**2).sum())
        error = float(np.std(r[inner] - slope * x)) / math.sqrt((x**2).sum())
        shift = slope * width
        if abs(slope) > 4 * error and abs(shift) > max(0.5 * spread, 1e-4):
            text = (
                f"the residuals of log L change by {shift:+.2%} from the smallest to the largest {name}: "
                f"the law's form is off, and an extrapolation in {name} will be too"
            )
            out += found("residual_trend", "warning", text, shift)
    return out


def _widest(fit: Fit, name: str) -> list | None:
    """The range that profile and bootstrap cover together; without a profile, the covariance stands for it.

    A parameter is as loose as the widest of its intervals says: reports print the bootstrap, and a profile is
    narrower where a few runs decide. None without any interval.
    """
    kept = fit.intervals.get(name, {})
    kinds = ("bootstrap", "profile" if kept.get("profile") else "gauss_newton")
    found = [kept[kind] for kind in kinds if kept.get(kind)]
    if not found:
        return None
    lows, highs = zip(*found, strict=True)
    return [None if None in lows else min(lows), None if None in highs else max(highs)]


def _open(fit: Fit, name: str) -> bool:
    """Whether the profile of a parameter does not close on both sides."""
    profile = fit.profile.get(name)
    if not profile or not profile.get("interval"):
        return False
    grid, ends = profile["grid"], profile["interval"]
    if any(end is None or not math.isfinite(end) for end in ends):
        return True
    return ends[0] <= min(grid) or ends[1] >= max(grid)


def identification(fit: Fit, points: Points) -> Found:
    """Flat ridges (pitfall 6) and an E that the data do not hold."""
    out: Found = []
    floor = "E" if "E" in fit.names else "E_L" if "E_L" in fit.names else ""
    lowest = float(points.L.min())
    if floor:
        value, ends = fit.parameters[floor], _widest(fit, floor)
        bare = value < 1e-3 * lowest
        loose = ends is not None and (
            None in ends or ends[0] < 0.02 * lowest or ends[1] - ends[0] > FLOOR * value
        )
        if bare or loose or _open(fit, floor):
            span = "unknown" if ends is None or None in ends else f"{ends[0]:.4g} to {ends[1]:.4g}"
            text = (
                f"{floor} = {value:.4g} is not identified ({fit.level:.0%}: {span}; lowest loss "
                f"{lowest:.4g}): all runs are far above any floor. Judge the fit by held-out runs, and do "
                "not quote it as an entropy"
            )
            out += found("E_not_identified", "warning", text, value)
    law = LAWS.get(fit.law)
    if law and law.separable and len(law.terms) == 1:
        return out + _trends(fit)
    levels = {*LEVELS, *(c for c, _ in law.terms)} if law else set()
    for name in fit.names:
        if law is None or name == floor or name in levels:
            continue
        ends = _widest(fit, name)
        wide = ends is not None and None not in ends
        if wide and name in law.logs:
            wide = ends[1] > RIDGE * ends[0]
        elif wide:
            wide = ends[1] - ends[0] > abs(fit.parameters[name])
        if wide or _open(fit, name):
            text = (
                f"{name} = {fit.parameters[name]:.4g} lies on a flat ridge: "
                + ("its profile does not close" if _open(fit, name) else f"{ends[0]:.4g} to {ends[1]:.4g}")
                + f" at {fit.level:.0%}. Other values fit as well and predict other optima"
            )
            out += found("flat_ridge", "warning", text, [name, *(ends or [])])
    return out


def _trends(fit: Fit) -> Found:
    """A single power is a straight line of the logs: it has no ridge, but an exponent may be no trend."""
    out: Found = []
    for _, factors in LAWS[fit.law].terms:
        for name, role, _ in factors:
            ends = _widest(fit, name) if name in fit.names else None
            if ends is not None and None not in ends and ends[0] < 0 < ends[1]:
                text = (
                    f"{name} = {fit.parameters[name]:.4g} cannot be told from 0 at {fit.level:.0%} "
                    f"({ends[0]:.4g} to {ends[1]:.4g}): no trend in {role.removeprefix('log_')} is shown; "
                    f"--fix={name}=0 leaves it out"
                )
                out += found("no_trend", "warning", text, [name, *ends])
    return out


def at_bound(fit: Fit, points: Points) -> Found:
    """Parameters that ended at a bound: the data want a value that the law, or the user, does not take."""
    bounded = fit.settings.get("bounds", {})
    out: Found = []
    for text in fit.settings.get("at_bounds", ()):
        tied = text.rsplit(" vanishes", 1)[0].rsplit(" is at", 1)[0].split(" = ")
        name, given = tied[0], any(one in bounded for one in tied)
        whose = "that --bound gives" if given else "of the law itself"
        what = (
            f"{text} ({whose}): {name} = {fit.parameters[name]:.6g} is no estimate, and it has no covariance"
        )
        out += found("at_bound", "note" if given else "warning", what, name)
    return out


def intervals(fit: Fit, points: Points) -> Found:
    """Failed draws, and bootstrap intervals that theory does not confirm (pitfall 3)."""
    out: Found = []
    asked, failed = fit.bootstrap.get("asked", 0), fit.bootstrap.get("failed", 0)
    if asked and failed > 0.05 * asked:
        text = f"{failed} of {asked} bootstrap draws failed: the intervals are of the others and too narrow"
        out += found("failed_draws", "warning", text, failed)
    law = LAWS.get(fit.law)
    if law is None or not fit.draws:
        return out
    table = np.asarray(fit.draws, float)
    kind = "sandwich" if "sandwich" in fit.covariance else "gauss_newton"
    if kind not in fit.covariance:
        return out
    theory = np.sqrt(np.maximum(np.diag(np.asarray(fit.covariance[kind], float)), 0))
    for i, name in enumerate(fit.names):
        if name in law.logs or not theory[i] > 0:
            continue
        ratio = float(table[:, i].std() / theory[i])
        if not 0.4 < ratio < 2.5:
            text = (
                f"the bootstrap's standard error of {name} is {ratio:.2g} times the "
                f"{kind.replace('_', '-')} one: a few runs, a ridge or a bound decide. Report the wider"
            )
            out += found("intervals_disagree", "warning", text, [name, ratio])
    return out


def influence(
    fit: Fit, points: Points, without: dict[str, float], errors: dict[str, float], dropped: list[int]
) -> Found:
    """What a refit without the runs of largest residual changes (pitfall 4).

    Args:
        fit: of all points.
        points: of the fit.
        without: parameters of the refit.
        errors: its standard errors, of those parameters that are judged.
        dropped: rows that it has left out.
    """
    out: Found = []
    if fit.sigma < EXACT:
        return []
    limit = 1.0 + 4.0 * math.sqrt(len(dropped) / len(points))
    for name, error in errors.items():
        shift = without[name] - fit.parameters[name]
        if error > 0 and abs(shift) > limit * error:
            text = (
                f"without the {len(dropped)} runs of largest residual (rows "
                f"{', '.join(map(str, dropped[:8]))} from 0) {name} goes from {fit.parameters[name]:.4g} to "
                f"{without[name]:.4g}, {abs(shift) / error:.2g} standard errors: look at these runs, and "
                "report both"
            )
            out += found("influential_points", "warning", text, [name, shift / error])
    return out


CHECKS = (few_points, no_noise, start_scatter, residuals, at_bound, intervals, identification)
