"""Variable projection: a search over the exponents alone, the coefficients solved for at each.

At given exponents a sum of powers is linear in its coefficients: least squares with coefficients that are not
negative (NNLS) finds them, and for a robust objective Newton's method takes them on from there. What is left
is a well-conditioned problem of one or two dimensions, searched on a grid and refined: the cross-check of the
surface fit, which it shares the objective with and nothing of the way.
"""

import dataclasses
import itertools

import numpy as np

from jaxlm.errors import UserError
from jaxlm.scaling.forms import Array
from jaxlm.scaling.problem import TINY, Problem, objective_value
from jaxlm.scaling.solve import LAD_DELTAS, Solution, refit

GRID = tuple(np.geomspace(0.03, 2.5, 24))  # of each exponent
REFINED = 3  # of the grid's local minima, the best ones
MOST = 2  # exponents
SIDE, SHRINK, ZOOMS = 7, 0.5, 45  # points a side of a refining grid, its shrinkage, how often


def nnls(columns: Array, y: Array, weights: Array) -> Array:
    """Coefficients (B, K) >= 0 of least weighted squares of `columns (B, R, K) @ c - y`, y (R,) or (B, R).

    Tries every support: exact, and cheap for the few coefficients of a law.

    >>> nnls(np.array([[[1.0, 1], [1, 2], [1, 3]]]), np.array([3.0, 2, 1]), np.ones(3)).round(6)
    array([[2., 0.]])
    """
    norm = np.maximum(np.linalg.norm(columns, axis=-2), TINY)
    scaled = columns / norm[:, None, :] * np.sqrt(weights)[:, None]
    target = np.sqrt(weights) * y
    normal = np.swapaxes(scaled, -1, -2) @ scaled
    projected = (np.swapaxes(scaled, -1, -2) @ target[..., None])[..., 0]
    size = columns.shape[-1]
    best = np.zeros((len(columns), size))
    least = np.full(len(columns), np.inf)
    for mask in itertools.product((False, True), repeat=size):
        used = np.flatnonzero(mask)
        found = np.zeros_like(best)
        if len(used):
            part = normal[:, used[:, None], used[None, :]] + 1e-15 * np.eye(len(used))
            c = np.linalg.solve(part, projected[:, used, None])[..., 0]
            # One step of refinement makes up for the squared condition number.
            rest = target - (scaled[:, :, used] @ c[..., None])[..., 0]
            gradient = np.swapaxes(scaled[:, :, used], -1, -2) @ rest[..., None]
            found[:, used] = c + np.linalg.solve(part, gradient)[..., 0]
        value = np.sum(((scaled @ found[..., None])[..., 0] - target) ** 2, -1)
        better = (found >= 0).all(-1) & (value < least)
        best[better], least[better] = found[better], value[better]
    return best / norm


class Projected:
    """A problem as a function of its free exponents."""

    def __init__(self, problem: Problem, law_name: str):
        law = problem.law
        exponents = {e for _, factors in law.terms for e, _, _ in factors if e}
        at = {name: i for i, name in enumerate(law.names)}
        if not (law.separable and exponents):
            raise UserError(
                f"method='varpro' needs a sum of powers, law {law_name!r} is none: use method='surface'"
            )
        moved = np.abs(problem.basis[[at[e] for e in exponents]]).sum(0) > 0
        if moved.sum() > MOST:
            raise UserError(
                f"method='varpro' searches at most {MOST} exponents, law {law_name!r} has {int(moved.sum())} "
                "free ones: fix or tie some, or use method='surface'"
            )
        if not moved.any():
            raise UserError("method='varpro': every exponent is fixed")
        self.problem = problem
        self.outer, self.inner = np.flatnonzero(moved), np.flatnonzero(~moved)
        self.names = [next(e for e in sorted(exponents) if problem.basis[at[e], k]) for k in self.outer]
        self.linear = [(c, at[c], c in law.logs, factors) for c, factors in law.terms]
        self.at = at

    def first(self, exponents: Array) -> Array:
        """phi (B, F) at exponents (B, len(outer)) with the coefficients of NNLS."""
        problem = self.problem
        phi = np.zeros((len(exponents), problem.basis.shape[1]))
        phi[:, self.outer] = exponents
        z = problem.coordinates(phi)
        columns, known, free = [], np.zeros((len(phi), len(problem.y))), []
        for c, i, is_log, factors in self.linear:
            power = sum(
                (s * (z[:, [self.at[e]]] if e else 1.0) * problem.x[v] for e, v, s in factors),
                np.zeros((len(phi), len(problem.y))),
            )
            if np.any(problem.basis[i][self.inner]):
                columns.append(np.exp(np.clip(power, -300, 300)))
                free.append((c, i, is_log))
            else:  # a fixed coefficient
                known += np.exp(z[:, [i]] + power) if is_log else z[:, [i]] * np.exp(power)
        if columns:
            # Relative errors stand for those of the logarithm.
            weights = problem.weights * (1.0 if problem.objective == "mse" else problem.y**-2.0)
            for (_, i, is_log), c in zip(
                free, nnls(np.stack(columns, -1), problem.y - known, weights).T, strict=True
            ):
                z[:, i] = np.log(np.maximum(c, TINY)) if is_log else c
        inner = np.linalg.lstsq(problem.basis, (z - problem.offset).T, rcond=None)[0].T
        phi[:, self.inner] = np.clip(inner, problem.lower, problem.upper)[:, self.inner]
        return phi

    def solve(self, phi: Array, deltas: tuple = LAD_DELTAS) -> tuple[Array, Array]:
        """The best coefficients at the exponents of phi (B, F): phi and the objective."""
        problem = self.problem
        if not len(self.inner):
            return phi, objective_value(problem, problem.residuals(phi)[0])
        less, offsets = self._less(phi)
        found, value, _, _ = refit(less, phi[:, self.inner], offset=offsets, deltas=deltas, iterations=100)
        out = phi.copy()
        out[:, self.inner] = found
        return out, value

    def _less(self, phi: Array) -> tuple[Problem, Array]:
        """The problem over the coefficients alone, and its offsets (B, P)."""
        p = self.problem
        less = dataclasses.replace(
            p,
            basis=p.basis[:, self.inner],
            lower=p.lower[self.inner],
            upper=p.upper[self.inner],
            loose=(p.loose[0][self.inner], p.loose[1][self.inner]),
        )
        return less, p.offset + phi[:, self.outer] @ p.basis[:, self.outer].T


def solve_varpro(problem: Problem, law_name: str) -> Solution:
    """The optimum by variable projection; its `starts` are the grid's best local minima.

    Raises:
      UserError: the law is no sum of powers, or has more than two free exponents.
    """
    projected = Projected(problem, law_name)
    low, high = problem.lower[projected.outer], problem.upper[projected.outer]
    axes = [np.clip(GRID, a, b) for a, b in zip(low, high, strict=True)]
    grid = np.array(list(itertools.product(*axes)))
    phi = projected.first(grid)
    value = objective_value(problem, problem.residuals(phi)[0])
    picture = value.reshape([len(axis) for axis in axes])
    around = np.pad(picture, 1, constant_values=np.inf)
    shifts = itertools.product((-1, 0, 1), repeat=picture.ndim)
    neighbours = [
        around[tuple(slice(1 + d, 1 + d + n) for d, n in zip(s, picture.shape, strict=True))] for s in shifts
    ]
    minima = np.flatnonzero((picture <= np.min(neighbours, 0)).ravel())
    minima = minima[np.argsort(value[minima])][:REFINED]

    ends = [_refine(projected, phi[i]) for i in minima]
    best = min(ends, key=lambda end: end[1])
    told = [
        {
            "start": dict(zip(projected.names, map(float, grid[i]), strict=True)),
            "value": end[1],
            "iterations": end[2],
            "converged": end[3],
            "gap": end[1] - best[1],
        }
        for i, end in zip(minima, ends, strict=True)
    ]
    return Solution(best[0], best[1], told, {})


def _refine(projected: Projected, phi: Array) -> tuple[Array, float, int, bool]:
    """Ever smaller grids of exponents around the best so far: phi, objective, points tried, convergence."""
    problem, outer = projected.problem, projected.outer
    low, high = problem.lower[outer], problem.upper[outer]
    width = np.full(len(outer), GRID[1] / GRID[0] - 1) * np.maximum(phi[outer], GRID[0])
    offsets = np.array(list(itertools.product(np.linspace(-1, 1, SIDE), repeat=len(outer))))
    best, value = projected.solve(phi[None])
    best, value, count = best[0], float(value[0]), 1
    for _ in range(ZOOMS):
        trial = np.repeat(best[None], len(offsets), 0)
        trial[:, outer] = np.clip(best[outer] + offsets * width, low, high)
        found, values = projected.solve(trial, LAD_DELTAS if width.max() > 1e-3 else LAD_DELTAS[-4:])
        count += len(trial)
        at = int(np.argmin(np.where(np.isfinite(values), values, np.inf)))
        edge = (np.abs(offsets[at]) == 1).any()
        flat = np.ptp(values) <= 1e-15 * abs(value)
        if values[at] < value:
            best, value = found[at], float(values[at])
        if flat:
            break
        width = width if edge else width * SHRINK
    return best, value, count, bool(width.max() < 1e-5)
