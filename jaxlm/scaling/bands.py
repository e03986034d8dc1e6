"""What pictures and reports ask of a fit: its points, what it can predict, and intervals from its draws."""

import numpy as np
from jaxtyping import Float64

from jaxlm.scaling.laws import get_law
from jaxlm.scaling.predict import LINES, optima, predict, tail_of
from jaxlm.scaling.record import Fit, optimum
from jaxlm.scaling.table import Points

LEAST_DRAWS = 20  # that an interval is made of
Array = Float64[np.ndarray, "..."]


def points_of(fit: Fit) -> Points:
    """The points that a fit has seen."""
    columns = {name: np.asarray(values, np.float64) for name, values in fit.points.items()}
    known = ("N", "D", "C", "L", "row", "sigma", "block")
    return Points(
        **{name: columns[name] for name in ("N", "D", "C", "L")},
        extra={name: x for name, x in columns.items() if name not in known},
        rows=columns["row"].astype(np.int64),
    )


def is_surface(fit: Fit) -> bool:
    """Whether the fit gives a loss for every N and D."""
    if fit.method in LINES:
        return False
    law = get_law(fit.law)
    return law.target == "L" and {"N", "D"} <= set(law.inputs)


def has_optimum(fit: Fit) -> bool:
    """Whether the fit gives N*(C) and D*(C)."""
    return fit.method in LINES or bool(get_law(fit.law).compute)


def best_interval(fit: Fit, name: str) -> list[float] | None:
    """The interval of a parameter or derived number: by bootstrap, else by profile, else by covariance."""
    found = fit.intervals.get(name, {})
    return next(
        (found[kind] for kind in ("bootstrap", "profile", "sandwich", "gauss_newton") if kind in found), None
    )


def describe(fit: Fit) -> str:
    """A fit in a few words: its method, law and objective, as far as they say something."""
    if fit.method in LINES:
        return {"envelope": "envelope"}.get(fit.method, f"iso-FLOP {fit.method}")
    law = "" if fit.law == "chinchilla" else f"{fit.law} "
    return f"{law}{fit.method} ({fit.objective})"


def other_inputs(fit: Fit, points: Points) -> dict[str, Array]:
    """What a surface reads besides N and D, as the points have it."""
    names = [name for name in get_law(fit.law).inputs if name not in ("N", "D")]
    return {name: points.C if name == "C" else points.extra[name] for name in names}


def typical_inputs(fit: Fit) -> dict[str, float]:
    """One value for each input of the law besides N, D, C: the largest fitted (of U: all there is)."""
    if fit.method in LINES:
        return {}
    return {name: float(np.max(fit.points[name])) for name in get_law(fit.law).inputs if name not in "NDC"}


def optimum_curve(fit: Fit, target: float = 0.0) -> dict[str, Array]:
    """The optimum along the compute, from the smallest fitted to the largest or to `target`.

    Returns:
        `C`; N*, D*, L_law (the law's loss there), L (a run's) and tokens_per_param, under these names; and
        their intervals as name_lo and name_hi, if the fit has the draws for it.
    """
    seen = np.asarray(fit.points["C"], np.float64)
    if len(fit.draws) >= LEAST_DRAWS:
        curve = predict(fit, max(target, seen.max()), fit.level, **typical_inputs(fit)).curve
        return {
            "C" if name == "budget" else name: np.array([row[name] for row in curve]) for name in curve[0]
        }
    c = np.geomspace(seen.min(), max(target, seen.max()), 25)
    n, d, loss = optimum(fit, c, **typical_inputs(fit))
    return {"C": c, "N": n, "D": d, "L_law": loss, "L": loss, "tokens_per_param": d / n}


def frontier(fit: Fit, low: float, high: float) -> tuple[Array, Array, tuple[Array, Array] | None]:
    """N*, D*, and the interval of D* at each N*, for C from low to high; None without draws."""
    c = np.geomspace(low, high, 40)
    if len(fit.draws) < LEAST_DRAWS:
        n, d, _ = optimum(fit, c, **typical_inputs(fit))
        return n, d, None
    rows = np.stack([optima(fit, float(x), **typical_inputs(fit)) for x in c], -1)  # (2, 1 + draws, C)
    rows = rows[:, np.isfinite(rows).all((0, 2))]
    around = np.stack([np.interp(rows[0, 0], *row) for row in rows.swapaxes(0, 1)[1:]])
    tail = tail_of(fit, fit.level)
    edges = np.exp(np.quantile(around, [tail, 1 - tail], axis=0, method="weibull"))
    return np.exp(rows[0, 0]), np.exp(rows[1, 0]), (edges[0], edges[1])
