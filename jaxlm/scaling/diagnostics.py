"""Every known way for a scaling fit to mislead, as a named alarm.

`examine` looks at one fit, `compare` at several of one table, `require` refuses before a fit, and
`predict.extrapolation` is asked at a prediction. A diagnostic is {'name', 'level', 'text', 'value'} with
level note, warning or refusal; a refusal is raised as `Refusal` (a `UserError` with the diagnostic's name)
and leaves no number behind.

The pitfalls of the literature, and what stands against each:

   1  objective below the optimiser's tolerance   impossible: solvers see it divided by delta, with analytic
                                                  gradients, to 1e-12 (`solve`); not_converged, start_scatter
   2  rounded parameters                          rounding; fit.json holds 17 digits
   3  intervals too narrow                        intervals_disagree, failed_draws, scattered_vertices,
                                                  duplicate_rows
   4  a few outliers                              influential_points; exclusions only by named rule
   5  the loss function is a choice               heavy_tails, objective_matters
   6  flat ridges, local optima                   flat_ridge, E_not_identified, start_scatter
   7  bias of approach 2                          parabola_bias, drifting_centre, vertex_at_edge,
                                                  no_interior_minimum, budget_spread, methods_disagree
   8  untuned hyper-parameters, long warm-up      lr_edge, one_lr, lr_in_cells, low_beta2, long_warmup
   9  checkpoints of a decayed schedule           checkpoints_as_runs
  10  scatter of starts as a standard error       impossible: intervals come from resampling, covariance or
                                                  profile; start_scatter says so
  11  best-of-grid selection                      best_of_grid, not_optima
  12  data that do not give the published number  impossible to miss: fit.json holds the data's hash, rows and
                                                  exclusions; `jaxlm selftest scaling` names its sources
  13  downstream errors that cancel               cancelling_errors (`two_step` reports both steps)
  14  small samples look precise                  too_few_points, too_few_N, too_few_D (refusals), few_points,
                                                  few_optima
  15  units, shared evaluation noise              different_tables, different_columns, no_seed_noise,
                                                  sigma_too_small, odd_units
  16  repeated tokens in a single-epoch law       multi_epoch
  17  reporting                                   impossible to leave out: `Fit` has a field for each item
                                                  of the (Mis)Fitting checklist, and the report prints them

Beyond these: extrapolation, draws_without_optimum, curve_without_optimum, no_optimum, no_interval
(`predict`), steps_unchecked (`downstream`), narrow_range, flops_by_6nd, residual_trend,
exponents_do_not_add, no_envelope, at_bound, poor_fit, mixed_rows, no_repeats, no_noise, no_trend.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64
from scipy.special import ndtri

from jaxlm.errors import check
from jaxlm.scaling import design_checks, fit_checks, line_checks
from jaxlm.scaling.design_checks import Found, found
from jaxlm.scaling.laws import LAWS, get_law, to_coordinates
from jaxlm.scaling.laws import predict as law_value
from jaxlm.scaling.lines import Refusal
from jaxlm.scaling.predict import LINES, optima
from jaxlm.scaling.problem import make_problem
from jaxlm.scaling.record import Fit, predict_loss
from jaxlm.scaling.solve import first_points, refit
from jaxlm.scaling.table import Points

__all__ = ["Refusal", "compare", "examine", "require", "two_step"]
DROPPED = 0.02  # share of the runs that the influence of outliers is measured by
Array = np.ndarray


def require(runs: int, parameters: int, what: str) -> None:
    """Refuses a fit with no residual degree of freedom, `too_few_points`; see also `rank.require_rank`."""
    if runs <= parameters:
        text = (
            f"{what} has {parameters} free parameters and {runs} runs: it needs {parameters + 1} at least, "
        )
        raise Refusal("too_few_points", text + f"and {3 * parameters} to say anything about errors")


def examine(fit: Fit, points: Points) -> Found:
    """Everything that is suspicious about one fit and the points it was made of.

    Args:
        fit: as fitted; its own `diagnostics` are not read.
        points: all points that were given to the fit.
    """
    out: Found = []
    sampled = all(np.isfinite(v).all() for v in (points.N, points.D, points.C))
    for design in design_checks.CHECKS if sampled else ():  # a law of the loss alone has no design
        out += design(points, fit.law)
    if fit.method in LINES:
        for alarm in (*line_checks.CHECKS, fit_checks.intervals, fit_checks.identification):
            out += alarm(fit, points)
        surface = quick_surface(points)
        if surface is not None:
            out += line_checks.bias(fit, points, surface["alpha"], surface["beta"])
        return out
    law = get_law(fit.law)

    def value(parameters: dict[str, float]) -> Array:
        columns = {"N": points.N, "D": points.D, "C": points.C, "L": points.L} | dict(points.extra)
        return law_value(law, parameters, {name: columns[name] for name in law.inputs})

    for alarm in fit_checks.CHECKS:
        out += alarm(fit, points)
    out += fit_checks.rounding(fit, points, value)
    if len(points) > len(fit.names) + 3 and not law.mixed:
        out += fit_checks.influence(fit, points, *without_largest(fit, points))
    return out


def _label(fit: Fit) -> str:
    return f"{fit.law} by {fit.method}" + (f" ({fit.objective})" if fit.method not in LINES else "")


def compare(fits: Sequence[Fit]) -> Found:
    """Where fits of one table differ by more than their joint interval.

    Two estimates with standard errors s1, s2 (of their draws) disagree if they differ by more than z
    sqrt(s1^2 + s2^2), z the normal quantile of the fits' level. Methods and laws are compared in N* at the
    largest compute fitted and at ten times that; objectives of one law and method in every exponent, by one
    standard error, since the runs are the same.
    """
    out: Found = []
    for one, two in itertools.combinations(fits, 2):
        names = f"{_label(one)} and {_label(two)}"
        if one.data.get("sha256") != two.data.get("sha256"):
            text = f"{names} are of different tables: compare losses in bits per byte only"
            out += found("different_tables", "warning", text, [one.data.get("path"), two.data.get("path")])
            continue
        if one.data.get("columns") != two.data.get("columns"):
            text = f"{names} count differently: {one.data.get('columns')} and {two.data.get('columns')}"
            out += found("different_columns", "note", text, 0)
        if one.law == two.law and one.method == two.method:
            out += _objectives(one, two)
        elif one.data.get("columns") == two.data.get("columns"):
            out += _methods(one, two)
    return out


def _objectives(one: Fit, two: Fit) -> Found:
    """The exponents of one law under two objectives (pitfall 5)."""
    moved = []
    for name in set(one.names) & set(two.names) - set(LAWS[one.law].logs if one.law in LAWS else ()):
        spread = max(_spread(fit, name) for fit in (one, two))
        shift = two.parameters[name] - one.parameters[name]
        if spread > 0 and abs(shift) > spread:
            moved.append(f"{name} {one.parameters[name]:.4g} -> {two.parameters[name]:.4g}")
    if one.objective == two.objective or not moved:
        return []
    text = f"{one.objective} and {two.objective} differ by over a standard error: {', '.join(sorted(moved))}"
    return found("objective_matters", "warning", text + ". Report both", len(moved))


def _spread(fit: Fit, name: str) -> float:
    draws = np.asarray(fit.draws, float)
    return float(draws[:, fit.names.index(name)].std()) if len(draws) > 1 else 0.0


def _methods(one: Fit, two: Fit) -> Found:
    """N* and a by two methods or laws (pitfall 7)."""
    if any(len(fit.draws) < 20 for fit in (one, two)):
        return []
    if any(fit.method not in LINES and not LAWS[fit.law].compute for fit in (one, two)):
        return []
    largest = max(float(np.max(fit.points["C"])) for fit in (one, two))
    z = float(ndtri(0.5 + min(one.level, two.level) / 2))
    for factor in (1.0, 10.0):
        values, errors = [], []
        for fit in (one, two):
            log_n = optima(fit, factor * largest, **_extras(fit))[0]
            values.append(float(log_n[0]))
            errors.append(float(np.nanstd(log_n[1:])))
        shift, joint = values[1] - values[0], math.hypot(*errors)
        if np.isfinite(shift) and abs(shift) > z * joint:
            text = (
                f"at C = {factor * largest:.3g} {_label(two)} puts N* {math.exp(shift):.3g} times where "
                f"{_label(one)} does: {abs(shift) / joint:.2g} joint standard errors. One of them is biased "
                "(see parabola_bias, drifting_centre, residual_trend); do not extrapolate either before it "
                "is clear which"
            )
            return found("methods_disagree", "warning", text, shift)
    return []


def _extras(fit: Fit) -> dict[str, float]:
    """The largest value of each further input of the law."""
    if fit.method in LINES:
        return {}
    others = [name for name in LAWS[fit.law].inputs if name not in ("N", "D", "C")]
    return {name: float(np.max(fit.points[name])) for name in others}


def two_step(
    loss_fit: Fit, accuracy_fit: Fit, runs: Points, accuracy: Float64[Array, "R"]
) -> tuple[list[dict], Found]:
    """Errors of a downstream prediction by step, on held-out runs (pitfall 13).

    Step 1 predicts the loss from N and D, step 2 the metric from the loss; chained, the metric from N and
    D. In units of the metric, step 1's error is f(L predicted) - f(L measured), step 2's f(L measured) -
    measured, and the chained error is their sum.

    Args:
        loss_fit: a law of the loss.
        accuracy_fit: a law of the metric with the loss as its input.
        runs: held-out runs.
        accuracy: their measured metric.

    Returns:
        A row for each run with loss_error (relative), step_1, step_2 and chained; and cancelling_errors, if
        the two steps err by more than twice the chained error somewhere.
    """
    law = LAWS[accuracy_fit.law]
    check(law.inputs == ("L",), f"law={accuracy_fit.law!r} does not predict from the loss")
    check(loss_fit.method not in LINES, f"method={loss_fit.method!r} predicts no loss of single runs")
    others = {name: runs.extra[name] for name in LAWS[loss_fit.law].inputs if name in runs.extra}
    if "C" in LAWS[loss_fit.law].inputs and np.isfinite(runs.C).all():
        others["C"] = runs.C
    predicted = predict_loss(loss_fit, runs.N, runs.D, **others)
    chained, measured = (law_value(law, accuracy_fit.parameters, {"L": v}) for v in (predicted, runs.L))
    first, second = chained - measured, measured - accuracy
    rows = [
        dict(loss_error=float(e), step_1=float(f), step_2=float(s), chained=float(f + s))
        for e, f, s in zip(predicted / runs.L - 1, first, second, strict=True)
    ]
    larger = np.maximum(np.abs(first), np.abs(second))
    cancelling = (np.abs(first + second) < 0.5 * larger) & (larger > 0.01 * np.abs(accuracy))
    if not cancelling.any():
        return rows, []
    worst = rows[int(np.where(cancelling, larger, 0).argmax())]
    text = (
        f"{int(cancelling.sum())} of {len(rows)} predictions are better than their steps: errors of "
        f"{worst['step_1']:+.3g} and {worst['step_2']:+.3g} leave {worst['chained']:+.3g}. Such a success "
        "does not carry over; report both steps"
    )
    return rows, found("cancelling_errors", "warning", text, int(cancelling.sum()))


def quick_surface(points: Points) -> dict[str, float] | None:
    """The surface E + A N^-alpha + B D^-beta by least squares of log L; None with under eight runs.

    Good enough to size a parabola's bias, for which alpha and beta are needed.
    """
    if len(points) < 8 or not np.isfinite(points.L).all():
        return None
    problem = make_problem(points, "chinchilla", "log_mse")
    exponents = itertools.product((0.2, 0.4, 0.8), repeat=2)
    starts = np.array([[0.6 * points.L.min(), 0.0, 0.0, *pair] for pair in exponents])
    phi, value, _, _ = refit(problem, first_points(problem, starts))
    best = problem.parameters(phi)[int(value.argmin())]
    return dict(zip(problem.law.names, map(float, best), strict=True))


def without_largest(fit: Fit, points: Points) -> tuple[dict[str, float], dict[str, float], list[int]]:
    """A refit without the runs of largest residual (2% of them, at least one).

    Returns:
        Its parameters; the Gauss-Newton standard errors of its exponents, with the robust deviation of the
        runs that it keeps (the bootstrap's hold the outliers' effect already); the rows left out.
    """
    settings = {name: fit.settings[name] for name in ("fixed", "ties", "bounds") if name in fit.settings}
    problem = make_problem(points, fit.law, fit.objective, fit.delta or 1e-3, **settings)
    law = problem.law
    z = to_coordinates(law, np.array([fit.parameters[name] for name in law.names]), problem.x)
    order = np.argsort(-np.abs(fit.residuals), kind="stable")
    dropped = order[: max(1, round(DROPPED * len(points)))]
    weights = problem.weights.copy()
    weights[dropped] = 0.0
    phi = refit(problem, problem.free(z)[None], weights[None])[0]
    moved = problem.parameters(phi)[0]

    r, jac = (v[0] for v in problem.residuals(phi))
    kept = weights > 0
    spare = max(int(kept.sum()) - jac.shape[1], 1)
    deviation = 1.4826 * float(np.median(np.abs(r[kept]))) * math.sqrt(kept.sum() / spare)
    cov = deviation**2 * np.linalg.pinv((jac[kept] * weights[kept, None]).T @ jac[kept])
    # Of a direction that no run constrains, rounding can make the variance negative.
    spread = np.sqrt(np.maximum(np.einsum("pf,fg,pg->p", problem.basis, cov, problem.basis), 0.0))
    judged = [i for i, name in enumerate(law.names) if name not in law.logs and name != "E"]
    rows = np.arange(len(points)) if points.rows is None else points.rows
    errors = {law.names[i]: float(spread[i]) for i in judged}
    return dict(zip(law.names, map(float, moved), strict=True)), errors, rows[dropped].tolist()
