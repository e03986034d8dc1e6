"""A law on points under a robust objective, as a function of free coordinates.

The objective is `sum over runs of w rho(r)`, with r = log f - log y (or f - y for `mse`) and

    huber    r^2 / 2 for |r| <= delta, else delta (|r| - delta / 2)
    lad      |r|
    mse, log_mse    r^2

Weights are 1 / sigma^2 of the residual, scaled to mean 1, so that delta keeps its meaning. Free coordinates
`phi` are an affine image of the law's coordinates, z = offset + basis phi: that centres the coefficients,
fixes
parameters and ties them. Objectives are of order 1e-3 and less: every solver sees them divided by delta.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxlm.errors import UserError, check, check_choice, nearest
from jaxlm.scaling.forms import Array, Features
from jaxlm.scaling.laws import EXPONENT, UNBOUNDED, Law, features, get_law, to_parameters
from jaxlm.scaling.table import SHARES, Points

OBJECTIVES = ("huber", "lad", "mse", "log_mse")
COEFFICIENT = (-30.0, 12.0)  # log of a power term over the mean target, at the mean point
TINY = 1e-300


@dataclasses.dataclass(frozen=True)
class Problem:
    """A law on points under an objective, as a function of free coordinates phi (F,)."""

    law: Law
    x: Features
    y: Array  # (R,), what is fitted
    weights: Array  # (R,), mean 1
    objective: str
    delta: float
    basis: Array  # (P, F)
    offset: Array  # (P,)
    lower: Array  # (F,), of phi
    upper: Array
    loose: tuple[Array, Array]  # bounds on the way to the optimum: exponents may change their sign

    @property
    def scale(self) -> float:
        """What solvers multiply the objective by."""
        return 1 / self.delta if self.objective == "huber" else 1.0

    def coordinates(self, phi: Array, offset: Array | None = None) -> Array:
        """z (..., P)."""
        return (self.offset if offset is None else offset) + phi @ self.basis.T

    def parameters(self, phi: Array) -> Array:
        """Public parameters (..., P) in the order of law.names."""
        return to_parameters(self.law, self.coordinates(phi), self.x)

    def given(self, z: Array) -> Array:
        """Coordinates z (..., P) as public parameters, without the constraints."""
        return to_parameters(self.law, z, self.x)

    def free(self, z: Array) -> Array:
        """The phi within bounds that comes nearest to coordinates z (..., P)."""
        flat = (z - self.offset).reshape(-1, len(self.offset)).T
        phi = np.linalg.lstsq(self.basis, flat, rcond=None)[0].T
        return np.clip(phi.reshape(*z.shape[:-1], -1), self.lower, self.upper)

    def pinned(self, index: int) -> tuple["Problem", Array, Array]:
        """The problem with coordinate `index` of z held, for profiles.

        Returns the problem without that freedom (its offset is that of z[index] = 0), the change of the
        offset by a unit of z[index], and the positions in phi that stay free.
        """
        row = self.basis[index]
        pivot = int(np.argmax(np.abs(row)))
        kept = np.delete(np.arange(len(row)), pivot)
        unit = self.basis[:, pivot] / row[pivot]
        less = dataclasses.replace(
            self,
            basis=(self.basis - np.outer(unit, row))[:, kept],
            offset=self.offset - unit * self.offset[index],
            lower=self.lower[kept],
            upper=self.upper[kept],
            loose=(self.loose[0][kept], self.loose[1][kept]),
        )
        return less, unit, kept

    def residuals(self, phi: Array, offset: Array | None = None) -> tuple[Array, Array]:
        """r (..., R) and d r / d phi (..., R, F)."""
        value, jac = self.law.form(self.coordinates(phi, offset), self.x)
        jac = jac @ self.basis
        if self.objective == "mse":
            return value - self.y, jac
        value = np.maximum(value, TINY)
        return np.log(value) - np.log(self.y), jac / value[..., None]


def make_problem(
    points: Points,
    law: str,
    objective: str = "huber",
    delta: float = 1e-3,
    *,
    fixed: Mapping[str, float] = {},
    ties: Sequence[str] = (),
    bounds: Mapping[str, tuple[float, float]] = {},
) -> Problem:
    """The problem of fitting a law to points.

    Args:
      points: what `table.select` returned.
      law: a name in `laws.LAWS`.
      objective: huber | lad | mse | log_mse.
      delta: of huber, in log loss.
      fixed: parameter -> value that it keeps.
      ties: `alpha=beta` makes two parameters equal.
      bounds: parameter -> (low, high); else the law's own limits.

    Raises:
      UserError: an unknown name, a missing input, too few points, or constraints that contradict each other.
    """
    form = get_law(law)
    check_choice(objective, OBJECTIVES, "objective")
    check(np.isfinite(delta) and delta > 0, f"delta={delta} must be positive")
    given = {"N": points.N, "D": points.D, "C": points.C, "L": points.L, **points.extra}
    for role in (*form.inputs, form.target):
        if role not in given or np.isnan(given[role]).all():
            named = "loss" if role == "L" else role
            raise UserError(f"law {law!r} needs {named}: name its column with --columns={named}=...")
        good = np.isfinite(given[role]) & ((given[role] > 0) if role != "sparsity" else (given[role] >= 0))
        check(
            bool(good.all()),
            f"law {law!r}: {role} of point {int(np.argmin(good))} is {given[role][~good][:1]}",
        )
        large = given[role] > 1 if role in SHARES else np.zeros(0, bool)
        at = int(np.argmax(large)) if large.any() else 0
        text = (
            f"law {law!r}: {role} of point {at} is {given[role][at]:g}, above 1: it is read as a share, from "
        )
        check(not large.any(), text + "0 to 1. Divide percent by 100")
    x, y = features({role: given[role] for role in form.inputs}), np.asarray(given[form.target], float)
    weights = np.ones(len(y))
    if points.sigma is not None:
        good = np.isfinite(points.sigma) & (points.sigma > 0)
        check(bool(good.all()), f"sigma of point {int(np.argmin(good))} is not positive")
        weights = 1 / points.sigma**2 if objective == "mse" else (y / points.sigma) ** 2
        weights = weights / weights.mean()

    names = form.names
    for name in (*fixed, *bounds, *(part for tie in ties for part in tie.split("="))):
        check(name in names, f"law {law!r} has no parameter {name!r}{nearest(name, names)}: {form.formula}")
        own = [n for n in names if n not in form.mixed]
        check(
            name not in form.mixed,
            f"law {law!r}: {name} cannot be fixed, tied or bounded; {', '.join(own)} can",
        )
    basis = np.eye(len(names))
    at = {name: i for i, name in enumerate(names)}
    level = float(np.log(y.mean()))
    centred = [c for c, factors in form.terms if factors and c in form.logs and c not in bounds]
    for c, factors in form.terms:
        for exponent, variable, sign in factors:
            if c in centred and exponent:
                basis[at[c], at[exponent]] -= sign * x[variable].mean()
    low, high = np.full((2, len(names)), np.inf) * [[-1], [1]]
    loose = np.full((2, len(names)), np.inf) * [[-1], [1]]
    for name, i in at.items():
        limit = form.limits.get(name, UNBOUNDED)
        if name in centred:
            limit = (level + COEFFICIENT[0], level + COEFFICIENT[1])
        low[i], high[i] = loose[0][i], loose[1][i] = limit
        if limit == EXPONENT:
            loose[0][i] = -EXPONENT[1]
        if name in bounds:
            a, b = bounds[name]
            check(a < b, f"bounds of {name}: {a} is not below {b}")
            if name in form.logs:
                check(b > 0, f"bounds of {name}: it is positive")
                a, b = np.log(max(a, TINY)), np.log(b)
            low[i] = loose[0][i] = max(a, low[i]) if name in form.limits else a
            high[i] = loose[1][i] = min(b, high[i]) if name in form.limits else b
            low_high = ":".join(f"{v:g}" for v in (np.exp(limit) if name in form.logs else limit))
            given_range = ":".join(f"{v:g}" for v in bounds[name])
            check(
                low[i] < high[i],
                f"--bound={name}={given_range} is outside of what law {law!r} takes, {low_high}",
            )

    offset = np.zeros(len(names))
    columns = list(range(len(names)))

    def impose(row: Array, value: float, pivot: int, what: str) -> None:
        """Eliminates one free coordinate by `row phi = value`, that of `pivot` if it can be."""
        nonlocal basis, offset
        usable = [k for k in range(len(columns)) if abs(row[k]) > 1e-12]
        check(bool(usable), f"{what} contradicts, or repeats, another constraint")
        k = columns.index(pivot) if pivot in columns and columns.index(pivot) in usable else usable[-1]
        offset = offset + basis[:, k] * value / row[k]
        basis = basis - np.outer(basis[:, k], row) / row[k]
        basis = np.delete(basis, k, 1)
        columns.pop(k)

    for name, value in fixed.items():
        positive = name in form.logs
        check(np.isfinite(value) and (value > 0 or not positive), f"{name}={value} must be a positive number")
        z = float(np.log(value)) if positive else float(value)
        inside = name in centred or low[at[name]] <= z <= high[at[name]]
        check(inside, f"{name}={value} is outside its bounds")
        impose(basis[at[name]], z - offset[at[name]], at[name], f"{name}={value}")
    for tie in ties:
        pair = tie.split("=")
        check(len(pair) == 2 and pair[0] != pair[1], f"tie {tie!r} is not NAME=NAME")
        i, j = at[pair[0]], at[pair[1]]
        check((pair[0] in form.logs) == (pair[1] in form.logs), f"tie {tie!r}: a coefficient and an exponent")
        impose(basis[i] - basis[j], offset[j] - offset[i], j, f"tie {tie!r}")
        for array, pick in ((low, max), (high, min), (loose[0], max), (loose[1], min)):
            array[i] = pick(array[i], array[j])
        check(low[i] < high[i], f"tie {tie!r}: the bounds of the two leave nothing between them")
    check(bool(columns), "every parameter is fixed: there is nothing to fit")
    distinct = len(np.unique(np.stack([given[role] for role in form.inputs]), axis=1).T)
    check(
        len(y) > len(columns) and distinct >= len(columns),
        f"law {law!r} has {len(columns)} free parameters and needs at least {len(columns) + 1} points, "
        f"{len(columns)} of them different: got {len(y)}, {distinct} of them different",
    )
    return Problem(
        form,
        x,
        y,
        weights,
        objective,
        float(delta),
        basis,
        offset,
        low[columns],
        high[columns],
        (loose[0][columns], loose[1][columns]),
    )


def rho(objective: str, r: Array, delta: float) -> tuple[Array, Array, Array, Array]:
    """rho, rho', rho'' and rho'/r at residuals r; `lad` smoothed within delta."""
    if objective in ("mse", "log_mse"):
        two = np.full_like(r, 2.0)
        return r * r, 2 * r, two, two
    size = np.abs(r)
    inside = size <= delta
    if objective == "lad":  # smoothed: Huber over delta, which tends to |r|
        smooth = np.where(inside, 0.5 * r * r / delta, size - 0.5 * delta)
        return smooth, np.clip(r / delta, -1, 1), inside / delta, 1 / np.maximum(size, delta)
    value = np.where(inside, 0.5 * r * r, delta * (size - 0.5 * delta))
    return value, np.clip(r, -delta, delta), inside.astype(float), delta / np.maximum(size, delta)


def objective_value(problem: Problem, r: Array, weights: Array | None = None) -> Array:
    """The objective as reported: summed over runs, LAD exactly |r|."""
    w = problem.weights if weights is None else weights
    return np.sum(
        w * (np.abs(r) if problem.objective == "lad" else rho(problem.objective, r, problem.delta)[0]), -1
    )
