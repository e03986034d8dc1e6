"""The solvers: one problem from many starts, and one start for many resampled problems.

A start is brought near by a batched Newton method under a wide Huber objective, goes on with L-BFGS,
restarted from its own end, and ends with Newton; the best of all starts is then polished by BFGS and
Nelder-Mead. Objectives are of order 1e-3, and scipy's L-BFGS-B stops on their change relative to max(|f|, 1):
it sees them over delta. Exponents may be negative on the way, since a start can get stuck at a bound that the
solution is far from.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import optimize

from jaxlm.scaling.forms import Array
from jaxlm.scaling.problem import TINY, Problem, objective_value, rho

LAD_DELTAS = tuple(10.0**-k for k in range(2, 11))  # of the Huber objectives that lead to the LAD optimum
WARM_DELTAS = LAD_DELTAS[1:7]  # the same from the solution of a similar problem
RESTARTS = 3  # of L-BFGS from its own end
TOLERANCE = 1e-13  # of the objective, relative: a problem is solved when a Newton step promises less
STALLED = 1e-9  # the same where no step descends: rounding, or a point that no step leads away from
ITERATIONS = 5000  # of Newton at most: along a bent valley (mixtures of experts) a few take thousands
FIRST_DELTA = 0.1  # of the Huber objective that brings a start near, in log loss
AROUND = 64  # points around an optimum from which a lower one is looked for
REACH = 1.5  # their standard deviation in a coordinate, at most: a ridge has no standard error
LOWER = 1e-7  # of the objective, relative, by which an optimum is a lower one
ALIVE = (-3.0, 1.0)  # log of a power term over the mean target at a start: a dead term stays dead


@dataclasses.dataclass(frozen=True)
class Solution:
    """The best point that was found, and how each start ended."""

    phi: Array  # (F,)
    value: float  # objective, summed over the points
    starts: list[dict]  # start (parameters), value, iterations, converged, gap = value - best
    polish: dict[str, float]  # what BFGS and Nelder-Mead still gained, relative to the value


def _boxed_step(matrix: Array, gradient: Array, low: Array, high: Array) -> Array:
    """Minimises `g s + s M s / 2` over a box, for a batch: what would leave ends on it, the rest adapts."""
    diagonal = np.einsum("bii->bi", matrix)
    scale = np.sqrt(np.maximum(diagonal, 1e-14 * np.max(diagonal, -1, keepdims=True) + TINY))
    scaled = matrix / scale[:, :, None] / scale[:, None, :]
    held = np.zeros(gradient.shape, bool)
    edge = np.zeros_like(gradient)  # where the held coordinates stand
    eye = np.eye(gradient.shape[-1])
    for _ in range(gradient.shape[-1]):
        rhs = gradient / scale + (scaled @ (edge * scale)[..., None])[..., 0]
        ridge = eye * np.where(held, 1.0, 1e-13)[:, :, None]
        free = np.where(held[:, :, None] | held[:, None, :], 0.0, scaled) + ridge
        step = -np.linalg.solve(free, np.where(held, 0.0, rhs)[..., None])[..., 0] / scale
        step = np.where(held, edge, step)
        out = ~held & ((step < low) | (step > high))
        if not out.any():
            break
        edge = np.where(out, np.clip(step, low, high), edge)
        held |= out
    return np.clip(step, low, high)


def _promised(gradient: Array, matrix: Array, step: Array) -> Array:
    """How far `g s + s M s / 2` falls by a step, for a batch."""
    return -np.sum(gradient * step, -1) - np.sum(step * (matrix @ step[..., None])[..., 0], -1) / 2


def newton(
    problem: Problem,
    phi: Array,
    weights: Array | None = None,
    offset: Array | None = None,
    *,
    delta: float | None = None,
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
    loose: bool = False,
) -> tuple[Array, Array, Array, Array]:
    """Minimises many problems at once from phi (B, F), with weights (B, R) and offsets (B, P) of their own.

    Each step solves (H + lambda K) s = -gradient, H with the weights rho'' of Newton's method and K with the
    weights rho'/r of reweighted least squares, both without the law's second derivatives: lambda near 0
    converges fast, lambda near 1 descends surely. A problem is done when a step that is little damped
    promises less than `tolerance` of the objective. Where no step descends, however damped, it ends; that
    counts as done if the step of lambda = 1 promises less than STALLED of it, else as failed.

    Returns:
      phi, the objective (of `lad`: smoothed within delta), whether it is done, and the steps; one per
      problem.
    """
    delta = problem.delta if delta is None else delta
    low, high = problem.loose if loose else (problem.lower, problem.upper)
    phi = np.clip(np.array(phi, float), low, high)
    count = len(phi)
    weights = np.broadcast_to(problem.weights if weights is None else weights, (count, len(problem.y)))
    offset = np.broadcast_to(problem.offset if offset is None else offset, (count, len(problem.offset)))
    damping, done, steps = np.full(count, 1.0), np.zeros(count, bool), np.zeros(count, int)
    todo = np.arange(count)

    def system(at: Array, which: Array) -> tuple:
        r, jac = problem.residuals(at, offset[which])
        value, psi, second, ratio = rho(problem.objective, r, delta)
        w = weights[which]
        turned = np.swapaxes(jac, -1, -2)
        gradient = (turned @ (w * psi)[..., None])[..., 0]
        h = turned @ ((w * second)[..., None] * jac)
        k = turned @ ((w * ratio)[..., None] * jac)
        return np.sum(w * value, -1), gradient, h, k

    def undamped(at: Array, of: tuple) -> Array:
        """What the step of lambda = 1 promises."""
        _, g, h, k = of
        return _promised(g, h + k, _boxed_step(h + k, g, low - at, high - at))

    with np.errstate(over="ignore", invalid="ignore"):
        current = system(phi, todo)
        value = current[0].copy()
        nothing = 1e-30 * weights.sum(-1)  # squares of log losses: rounding
        for _ in range(iterations):
            if not len(todo):
                break
            steps[todo] += 1
            _, g, h, k = current
            at = phi[todo]
            matrix = h + damping[todo, None, None] * k
            step = _boxed_step(matrix, g, low - at, high - at)
            promised = _promised(g, matrix, step)
            new = system(at + step, todo)
            better = new[0] < value[todo]
            next_damping = np.where(better, damping[todo] / 5, damping[todo] * 4)
            small = (promised <= tolerance * value[todo]) & (damping[todo] <= 1.0)
            small |= value[todo] <= nothing[todo]
            stuck = (next_damping > 1e12) & ~small
            if stuck.any():
                promise = undamped(at[stuck], tuple(a[stuck] for a in current))
                small[stuck] = promise <= STALLED * value[todo[stuck]]
            finished = small | stuck
            damping[todo] = np.maximum(next_damping, 1e-9)
            phi[todo[better]] = (at + step)[better]
            value[todo[better]] = new[0][better]
            done[todo] = small
            current = tuple(
                np.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b)[~finished]
                for a, b in zip(new, current, strict=True)
            )
            todo = todo[~finished]
    return phi, value, done, steps


def refit(
    problem: Problem,
    phi: Array,
    weights: Array | None = None,
    offset: Array | None = None,
    *,
    deltas: Sequence[float] = WARM_DELTAS,
    iterations: int = ITERATIONS,
    loose: bool = False,
) -> tuple[Array, Array, Array, Array]:
    """`newton`, for LAD through smoother and smoother versions of it; the objective is the reported one."""
    if problem.objective != "lad":
        return newton(problem, phi, weights, offset, iterations=iterations, loose=loose)
    steps: Array | int = 0
    for delta in deltas:
        phi, _, done, more = newton(
            problem, phi, weights, offset, delta=delta, iterations=iterations, tolerance=1e-9, loose=loose
        )
        steps = steps + more
    value = objective_value(problem, problem.residuals(phi, _rows(offset))[0], weights)
    return phi, value, done, np.asarray(steps)


def _rows(offset: Array | None) -> Array | None:
    return None if offset is None else np.atleast_2d(offset)


def first_points(problem: Problem, starts: Array) -> Array:
    """Starts z (S, P) as phi (S, F): every power term alive, the constant E below the least target."""
    z = np.array(starts, float)
    law, level = problem.law, float(np.log(problem.y.mean()))
    at = {name: i for i, name in enumerate(law.names)}
    for c, factors in law.terms:
        if factors and c in law.logs:
            shift = sum(
                (s * (z[:, at[e]] if e else 1.0) * problem.x[i].mean() for e, i, s in factors),
                np.zeros(len(z)),
            )
            z[:, at[c]] = np.clip(z[:, at[c]] + shift, level + ALIVE[0], level + ALIVE[1]) - shift
        elif not factors and c not in law.logs:
            z[:, at[c]] = np.minimum(z[:, at[c]], 0.95 * problem.y.min())
    return problem.free(z)


def look_around(problem: Problem, phi: Array, covariance: Array, seed: int) -> Array | None:
    """A point (F,) of lower objective than an optimum phi, or None.

    Where a kink is narrower than the residuals, an optimum is one of several along a ridge, and every start
    that came over a wide Huber objective ends in the same one. AROUND points within about two standard
    deviations of phi, by the covariance (F, F), are followed to their own ends without it.
    """
    scale = np.sqrt(np.minimum(np.nan_to_num(np.diagonal(covariance), nan=np.inf), REACH**2))
    with np.errstate(invalid="ignore"):
        tied = np.nan_to_num(covariance / np.sqrt(np.outer(*[np.diagonal(covariance)] * 2)))
    np.fill_diagonal(tied, 1.0)
    values, vectors = np.linalg.eigh((tied + tied.T) / 2)
    normal = np.random.default_rng((seed, 2)).standard_normal((AROUND, len(phi)))
    points = phi + 2 * scale * (normal * np.sqrt(np.maximum(values, 0.0)) @ vectors.T)
    with np.errstate(over="ignore", invalid="ignore"):
        found, value, _, _ = refit(problem, points, iterations=400)
    here = float(objective_value(problem, problem.residuals(phi)[0]))
    best = int(np.nanargmin(np.where(np.isfinite(value), value, np.inf)))
    return found[best] if value[best] < here * (1 - LOWER) else None


def solve(problem: Problem, starts: Array, *, near: bool = False) -> Solution:
    """The best optimum from starts z (S, P), each of which is followed to its own end.

    `near`: the starts are close to optima already, and are not brought near by a wide Huber objective.
    """
    phi = problem.free(starts) if near else first_points(problem, starts)
    smooth = LAD_DELTAS[0] if problem.objective == "lad" else problem.delta
    scale = 1 / smooth if problem.objective == "huber" else 1.0
    wide = max(FIRST_DELTA, smooth)
    steps = np.zeros(len(phi), int)
    if not near:
        phi, _, _, steps = newton(problem, phi, delta=wide, iterations=100, tolerance=1e-6, loose=True)
        steps = steps.copy()

    def fun(at: Array) -> tuple[float, Array]:
        r, jac = problem.residuals(at)
        value, psi, _, _ = rho(problem.objective, r, smooth)
        w = problem.weights * scale
        return float(w @ value), (w * psi) @ jac

    bounds = list(zip(*(np.where(np.isinf(b), np.nan, b) for b in problem.loose), strict=True))
    bounds = [tuple(None if np.isnan(v) else v for v in pair) for pair in bounds]
    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-15, "gtol": 1e-10}
    with np.errstate(over="ignore", invalid="ignore"):
        for i in range(len(phi)):
            for _ in range(RESTARTS):
                found = optimize.minimize(
                    fun, phi[i], jac=True, method="L-BFGS-B", bounds=bounds, options=options
                )
                phi[i] = found.x if found.fun <= fun(phi[i])[0] else phi[i]
                steps[i] += found.nit
        phi, value, done, more = refit(problem, phi, deltas=LAD_DELTAS, iterations=400)
        steps += more
        best = int(np.nanargmin(np.where(np.isfinite(value), value, np.inf)))
        point, polish = _polish(problem, phi[best], fun)
    total = float(objective_value(problem, problem.residuals(point)[0]))
    total = min(total, float(value[best]))
    names = problem.law.names
    told = [
        {
            "start": dict(zip(names, map(float, start), strict=True)),
            "value": float(v),
            "iterations": int(n),
            "converged": bool(d and np.isfinite(v)),
            "gap": float(v - total),
        }
        for start, v, n, d in zip(problem.given(starts), value, steps, done, strict=True)
    ]
    return Solution(point, total, told, polish)


def _polish(problem: Problem, phi: Array, fun) -> tuple[Array, dict[str, float]]:
    """BFGS, Nelder-Mead and, for LAD, the vertex where as many residuals vanish as there are parameters."""
    inside = np.all((phi > problem.lower) & (phi < problem.upper))
    value = float(objective_value(problem, problem.residuals(phi)[0]))
    gains = {}

    def reported(at: Array) -> float:
        if np.any((at < problem.lower) | (at > problem.upper)):
            return np.inf
        return float(objective_value(problem, problem.residuals(at)[0])) * problem.scale

    def consider(name: str, at: Array) -> None:
        nonlocal phi, value
        new = reported(at) / problem.scale
        gains[name] = max(value - new, 0.0) / max(value, TINY)
        if new < value:
            phi, value = at, new

    if problem.objective == "lad":
        consider("vertex", _vertex(problem, phi))
    elif inside:
        consider("bfgs", optimize.minimize(fun, phi, jac=True, method="BFGS", options={"gtol": 1e-12}).x)
    spread = 1e-6 * np.maximum(np.abs(phi), 1e-3)
    simplex = np.concatenate(
        [phi[None], phi + np.diag(np.where(phi + spread <= problem.upper, spread, -spread))]
    )
    options = {"initial_simplex": simplex, "xatol": 1e-14, "fatol": 1e-18, "maxfev": 200 * len(phi)}
    consider("nelder_mead", optimize.minimize(reported, phi, method="Nelder-Mead", options=options).x)
    return phi, gains


def _vertex(problem: Problem, phi: Array) -> Array:
    """Newton's method on the F smallest residuals: an LAD optimum makes as many of them vanish."""
    r, jac = problem.residuals(phi)
    chosen = np.argsort(np.abs(r))[: len(phi)]
    at = phi.copy()
    for _ in range(20):
        r, jac = problem.residuals(at)
        at = np.clip(
            at - np.linalg.lstsq(jac[chosen], r[chosen], rcond=1e-12)[0], problem.lower, problem.upper
        )
    return at
