"""From points to a fitted law: `run_fit`. What `jaxlm fit` does with a table is in `jaxlm.scaling.fit_table`.

This module stands to the right of the methods, the diagnostics and the figures; what those need of a fit
(`Fit`, `save_fit`, `load_fit`, `predict_loss`, `optimum`) is in `jaxlm.scaling.record`. It imports no JAX.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import scipy
from scipy import stats

from jaxlm import __version__
from jaxlm.errors import check, check_choice
from jaxlm.scaling import diagnostics, optima, solve, uncertainty
from jaxlm.scaling.laws import UNBOUNDED, Law, get_law
from jaxlm.scaling.lines import percentiles
from jaxlm.scaling.problem import OBJECTIVES, TINY, Problem, make_problem
from jaxlm.scaling.rank import require_rank
from jaxlm.scaling.record import SURFACES, Fit
from jaxlm.scaling.table import Points
from jaxlm.scaling.varpro import solve_varpro

METHODS = ("surface", "varpro", "envelope", "parabola", "akima", "robust")
LOOKS = 3  # times that a lower objective is looked for around an optimum
SAME = 1e-8  # relative to the objective: starts that end within it found the same optimum
# Derived numbers whose interval is symmetric, and what they may be; the others are positive scales.
IDENTITY = {"a": (0.0, 1.0), "b": (0.0, 1.0), "c": (0.0, np.inf)}


def run_fit(
    points: Points,
    law: str = "chinchilla",
    method: str = "surface",
    objective: str = "huber",
    delta: float = 1e-3,
    *,
    starts: int = 16,
    draws: int = 400,
    seed: int = 0,
    level: float = 0.95,
    profile: bool = True,
    block: bool = False,
    fixed: Mapping[str, float] = {},
    ties: Sequence[str] = (),
    bounds: Mapping[str, tuple[float, float]] = {},
) -> Fit:
    """Fits a law to points, with its uncertainty and its diagnostics.

    Args:
      points: what `table.select` returned.
      law: a name in `laws.LAWS`; the methods that fit lines to optima (envelope, parabola, akima, robust)
        have none.
      method: one of METHODS.
      objective: huber | lad | mse | log_mse, of surface and varpro.
      delta: of huber, in log loss.
      starts: a random subset of this size of the law's grid of starts; 0, or more than it has: all of it.
      draws: bootstrap draws; 0: no bootstrap.
      seed: of the starts and the draws.
      level: of all intervals.
      profile: profile the objective over every free parameter.
      block: resample blocks (points.block; without it runs of one N) instead of runs.
      fixed: parameter -> value that it keeps.
      ties: `alpha=beta` makes two parameters equal.
      bounds: parameter -> (low, high).

    Raises:
      UserError: a setting that makes no sense, too few points, an input of the law that is missing.
    """
    check_choice(method, METHODS, "method")
    check(0 < level < 1, f"level={level} must be between 0 and 1")
    check(starts >= 0, f"starts={starts} must not be negative")
    check(draws >= 0 and draws != 1, f"draws={draws} must be 0 or at least 2")
    check(seed >= 0, f"seed={seed} must not be negative")
    check_choice(objective, OBJECTIVES, "objective")
    check(delta > 0, f"delta={delta} must be positive")
    labels, notes = None, []
    if block and points.block is None:
        labels = np.unique(points.N, return_inverse=True)[1].astype(np.int64)
        notes.append(f"no block column: the {labels.max() + 1} different N are the blocks")
    elif block:
        labels = points.block
    if method in SURFACES:
        options = dict(starts=starts, draws=draws, seed=seed, level=level, profile=profile)
        free = len(get_law(law).names) - len(fixed) - len(ties)
        diagnostics.require(len(points), free, f"law={law!r}")
        problem = make_problem(points, law, objective, delta, fixed=fixed, ties=ties, bounds=bounds)
        require_rank(problem, points, law)
        fit = _fit_surface(points, problem, law, method, labels, **options)
        kept = dict(fixed=dict(fixed), ties=list(ties), bounds={k: list(v) for k, v in bounds.items()})
        fit = dataclasses.replace(fit, settings=fit.settings | kept)
    else:
        unused = [name for name, given in (("fixed", fixed), ("ties", ties), ("bounds", bounds)) if given]
        check(not unused, f"method={method!r} fits lines to optima and takes no {', '.join(unused)}")
        for name in "NDCL":
            good = np.isfinite(getattr(points, name)).all()
            check(bool(good), f"method={method!r} needs {name} of every run: name its column in --columns")
        given = points if labels is None else dataclasses.replace(points, block=labels)
        common = dict(draws=draws, seed=seed, level=level)
        if method == "envelope":
            fit = optima.fit_envelope(given, **common)
        else:
            kind = {"bootstrap": "block"} if block else {}
            fit = optima.fit_isoflop(given, variant=method, **kind, **common)
    fit = dataclasses.replace(fit, notes=[*notes, *fit.notes])
    return dataclasses.replace(fit, diagnostics=diagnostics.examine(fit, points))


def _fit_surface(
    points: Points,
    problem: Problem,
    law: str,
    method: str,
    labels: np.ndarray | None,
    *,
    starts: int,
    draws: int,
    seed: int,
    level: float,
    profile: bool,
) -> Fit:
    grid = problem.law.starts(problem.x, problem.y)
    if method == "varpro":
        found = solve_varpro(problem, law)
    else:
        chosen = np.arange(len(grid))
        if 0 < starts < len(grid):
            chosen = np.sort(np.random.default_rng(seed).choice(len(grid), starts, replace=False))
        found = solve.solve(problem, grid[chosen])
    found = dataclasses.replace(found, phi=_on_bounds(problem, found.phi))
    shape = uncertainty.curvature(problem, found.phi)
    profiles, notes = {}, []
    for _ in range(LOOKS if method == "surface" and uncertainty.kinked(problem, found.phi) else 0):
        lower = solve.look_around(problem, found.phi, shape.gauss_newton, seed)
        if lower is None:
            break
        found = _continued(problem, found, lower)
        notes = ["around the best end of the starts a lower objective was found: the fit goes on from there"]
        shape = uncertainty.curvature(problem, found.phi)
    if profile:
        profiles, better = _profiles(problem, found.phi, shape, level)
        if better is not None and method == "varpro":
            # Its search is exhaustive over the exponents: the cross-check says so and keeps its own answer.
            notes.append("a profile met a lower objective than the search over the exponents did")
        elif better is not None:
            found = _continued(problem, found, better)
            notes.append("a profile led to a lower objective than any start: the fit goes on from there")
            shape = uncertainty.curvature(problem, found.phi)
            profiles, _ = _profiles(problem, found.phi, shape, level)

    names = problem.law.names
    p = problem.parameters(found.phi)
    parameters = dict(zip(names, map(float, p), strict=True))
    free = [i for i, row in enumerate(problem.basis) if np.any(row) or names[i] in problem.law.mixed]
    at_bounds = _at_bounds(problem, found.phi)
    notes += at_bounds
    derived = _derived(problem, p)
    samples = uncertainty.Bootstrap(np.zeros((0, len(names))), "none", 0, 0)
    if draws:
        samples = uncertainty.bootstrap(problem, found.phi, draws=draws, seed=seed, block=labels)
    jacobian = uncertainty.parameter_jacobian(problem, found.phi, lambda q: q)[free]
    covariance = {
        kind: (jacobian @ getattr(shape, kind) @ jacobian.T).tolist() for kind in ("gauss_newton", "sandwich")
    }
    blocks = 0 if labels is None else len(np.unique(labels))
    tail = uncertainty.tail_share(level, blocks, samples.calibration)
    intervals = _intervals(problem, found.phi, p, derived, samples, shape, level, tail, free)
    for name, value in derived.items():
        low, high = intervals[name].get("gauss_newton", (0.0, np.inf))
        if high - low <= 1e-9 * abs(float(value)):
            notes.append(f"{name} = {float(value):.4g} is imposed by what is fixed or tied, not measured")
    for name, told in profiles.items():
        intervals[name]["profile"] = told["interval"]
    r = np.log(problem.y) - np.log(
        np.maximum(problem.law.form(problem.coordinates(found.phi), problem.x)[0], TINY)
    )
    rows = np.arange(len(points)) if points.rows is None else points.rows
    columns = {"N": points.N, "D": points.D, "C": points.C, "L": points.L, "row": rows, **points.extra}
    columns |= {} if points.sigma is None else {"sigma": points.sigma}
    columns |= (
        {}
        if labels is None and points.block is None
        else {"block": points.block if labels is None else labels}
    )
    return Fit(
        law=law,
        method=method,
        objective=problem.objective,
        delta=problem.delta,
        parameters=parameters,
        derived={name: float(v) for name, v in derived.items()},
        names=tuple(names[i] for i in free),
        covariance=covariance,
        draws=samples.draws[:, free].tolist(),
        bootstrap={
            "kind": samples.kind,
            "seed": seed,
            "asked": samples.asked,
            "failed": samples.failed,
            "blocks": blocks,
            "calibration": samples.calibration,
        },
        intervals=intervals,
        level=level,
        value=found.value,
        starts=found.starts,
        profile=profiles,
        sigma=float(np.sqrt(np.sum(r**2) / max(len(r) - len(found.phi), 1))),
        residuals=r.tolist(),
        points={name: np.asarray(v).tolist() for name, v in columns.items()},
        notes=notes,
        settings={
            "free": len(found.phi),
            "starts": starts,
            "start_grid": len(grid),
            "draws": draws,
            "seed": seed,
            "profile": profile,
            "at_bounds": at_bounds,
            "weighted": points.sigma is not None,
            "polish": found.polish,
            "tolerance": solve.TOLERANCE,
            "restarts": solve.RESTARTS,
            "solver": "Newton, L-BFGS, Newton; best: BFGS, Nelder-Mead"
            if method == "surface"
            else "NNLS, grids",
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "jaxlm": __version__,
        },
    )


def _continued(problem: Problem, found: solve.Solution, phi: np.ndarray) -> solve.Solution:
    """The optimum near a point that is lower than the best end of all starts, which keep their own ends."""
    again = solve.solve(problem, problem.coordinates(phi)[None], near=True)
    starts = [{**s, "gap": s["value"] - again.value} for s in found.starts]
    return dataclasses.replace(again, phi=_on_bounds(problem, again.phi), starts=[*starts, *again.starts])


def _derived(problem: Problem, p: np.ndarray) -> dict[str, np.ndarray]:
    """Derived numbers of parameters (..., P), each (...)."""
    columns = {name: p[..., i] for i, name in enumerate(problem.law.names)}
    with np.errstate(all="ignore"):
        return problem.law.derived(columns)


def _on_bounds(problem: Problem, phi: np.ndarray) -> np.ndarray:
    """phi with what stopped a rounding error short of a bound on it."""
    for bound in (problem.lower, problem.upper):
        near = np.isfinite(bound) & (np.abs(phi - bound) <= 1e-9 * np.maximum(1.0, np.abs(bound)))
        phi = np.where(near, bound, phi)
    return phi


def _at_bounds(problem: Problem, phi: np.ndarray) -> list[str]:
    """Says which parameters ended at a bound: their intervals end there, and have no curvature."""
    out = []
    for k in np.flatnonzero((phi <= problem.lower) | (phi >= problem.upper)):
        rows = {n: row for n, row in zip(problem.law.names, problem.basis, strict=True) if row[k]}
        # An exponent moves its centred coefficient too: the name is of what moves with this coordinate alone.
        moved = [n for n, row in rows.items() if np.count_nonzero(row) == 1] or list(rows)[:1]
        vanished = moved[0] in problem.law.logs and phi[k] <= problem.lower[k]
        out.append(f"{' = '.join(moved)} {'vanishes' if vanished else 'is at its bound'}")
    return out


def _profiles(
    problem: Problem, phi: np.ndarray, shape: uncertainty.Curvature, level: float
) -> tuple[dict[str, dict], np.ndarray | None]:
    """The profile of every parameter with a coordinate of its own; the lowest phi below the fit, if any."""
    rise = shape.cutoff * float(stats.f.ppf(level, 1, shape.dof))
    out, better = {}, None
    lowest = np.inf
    if rise <= 1e-20 * len(problem.y):
        return {}, None  # the law meets every point: nothing to profile
    for i, name in enumerate(problem.law.names):
        if name in problem.law.mixed or not np.any(problem.basis[i]):
            continue
        error = float(np.sqrt(problem.basis[i] @ shape.gauss_newton @ problem.basis[i]))
        out[name], best = uncertainty.profile(problem, phi, name, error, rise)
        here, value = out[name]["cutoff"] - rise, min(out[name]["value"])
        if value < min(here - SAME * here, lowest):
            better, lowest = best, value
    return out, better


def _public_limits(law: Law, name: str) -> tuple[float, float]:
    """What a parameter or a derived number may be; a law's limits of mixed ones are of other coordinates."""
    if name in law.logs:
        return 0.0, np.inf
    if name not in law.names:
        return IDENTITY.get(name, UNBOUNDED)
    return UNBOUNDED if name in law.mixed else law.limits.get(name, UNBOUNDED)


def _intervals(
    problem: Problem,
    phi: np.ndarray,
    p: np.ndarray,
    derived: Mapping[str, np.ndarray],
    samples: uncertainty.Bootstrap,
    shape: uncertainty.Curvature,
    level: float,
    tail: float,
    free: Sequence[int],
) -> dict[str, dict[str, list[float]]]:
    """By bootstrap and by both covariances, of free parameters and of derived numbers."""
    law, out = problem.law, {}
    columns = {law.names[i]: (p[i], samples.draws[:, i], law.names[i] in law.logs) for i in free}
    drawn = _derived(problem, samples.draws)
    columns |= {name: (v, drawn[name], name not in IDENTITY) for name, v in derived.items()}

    def everything(q: np.ndarray) -> np.ndarray:
        values = {**{law.names[i]: q[..., i] for i in free}, **_derived(problem, q)}
        return np.stack([np.log(values[n]) if columns[n][2] else values[n] for n in columns], -1)

    with np.errstate(all="ignore"):
        slopes = uncertainty.parameter_jacobian(problem, phi, everything)
    for (name, (value, draws, positive)), slope in zip(columns.items(), slopes, strict=True):
        kinds = {}
        if len(draws) >= 2:
            good = draws[np.isfinite(draws)]
            if len(good) >= 2:
                kinds["bootstrap"] = percentiles(good, tail)
        for kind in ("gauss_newton", "sandwich"):
            variance = float(slope @ getattr(shape, kind) @ slope)
            if not (np.isfinite(variance) and variance >= 0):
                continue  # a direction that no run constrains: no interval, and not one of no width
            if variance == 0 and name in law.names:
                continue  # at its bound, where there is no curvature
            error = float(np.sqrt(variance))
            ends = uncertainty.delta_interval(float(value), error, shape.dof, level, positive)
            low, high = _public_limits(law, name)
            kinds[kind] = [max(ends[0], low), min(ends[1], high)]
        out[name] = kinds
    return out
