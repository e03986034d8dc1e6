"""How far a fit can be trusted: bootstrap, covariance, profile likelihood, and intervals from each.

With psi = rho', s^2 = sum w psi^2 / (R - F) and m the mean of rho'' (for a kink narrower than the residuals,
a window around 0 takes its place), R points and F free parameters:

    Gauss-Newton   k^2 s^2 / m^2 (J'WJ)^-1, which is s^2 (J'J)^-1 for least squares
    sandwich       k^2 H^-1 (sum w^2 psi^2 / (1 - h)^2 J J') H^-1, H = sum w rho'' J J', h the leverage (HC3)
    profile        all values whose best objective is within k^2 s^2 / (2 m) F_{1, R-F}(level) of the optimum

with Huber's correction for few points, k = 1 + F/R Var(rho'') / m^2 (Huber 1973, Annals of Statistics 1,
799).

Bootstrap intervals are percentiles of the draws. Under a kink (LAD, Huber with runs beyond delta) resampled
fits scatter more than fits of new runs do, since few runs of a resample hold the kink: such percentiles are
calibrated by a second resample of every first one, see `calibrate`. Smooth objectives need none, and with it
they would cover too little (.89 at 20 runs). Over 200 to 400 made-up sweeps, plain percentiles and calibrated
ones hold E, A, B, alpha, beta and N* at 10x the compute in

    81 runs   Huber .957 to .987, .937 to .973    least squares .927 to .953
    20 runs   Huber .962 to .995, .942 to .978    least squares .952 to .980
    20 runs   LAD   .975 to 1.00, .940 to .990
    15 runs   Huber .973 to .983, .937 to .950
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import stats

from jaxlm.errors import check
from jaxlm.scaling.forms import Array
from jaxlm.scaling.laws import Law
from jaxlm.scaling.problem import Problem, objective_value, rho
from jaxlm.scaling.solve import refit

STEPS = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, 128.0, 256.0, 512.0)
WIDEST = 3.0  # a step of a profile in a coordinate, at most: a ridge has no standard error
LEAST_PAIRS = 100  # draws and their second draws that a calibration is made of
KINKED = 0.25  # share of the runs beyond Huber's delta from which on its draws are calibrated
CALIBRATED = (0.8, 0.9, 0.95)  # levels at which it is looked at
FACTORS = (0.5, 2.0)  # that it may give: beyond, too few runs are left in a second draw
EXPONENTS = ("a", "b", "c")  # derived numbers that are no positive scale


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """Parameters of resampled fits."""

    draws: Array  # (draws that succeeded, P), every parameter of the law
    kind: str  # case | block
    asked: int
    failed: int
    calibration: float = 1.0  # what an interval's normal quantile is multiplied by


def resamples(count: int, draws: int, seed: int, block: Array | None = None) -> Array:
    """How often each of `count` runs is drawn, (draws, count): with replacement, whole blocks where given.

    >>> resamples(4, 2, 0, np.array([0, 0, 1, 1])).sum(-1)
    array([4., 4.])
    """
    rng = np.random.default_rng(seed)
    if block is None:
        return rng.multinomial(count, np.full(count, 1 / count), size=draws).astype(float)
    labels, index = np.unique(block, return_inverse=True)
    times = rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=draws)
    return times[:, index].astype(float)


def bootstrap(
    problem: Problem, phi: Array, *, draws: int = 400, seed: int = 0, block: Array | None = None
) -> Bootstrap:
    """Refits resampled runs from the optimum phi (F,); block labels (R,) keep runs of one curve together.

    A draw fails if it holds fewer different runs than there are free parameters, or its fit does not
    converge. Draws of runs are calibrated by a second draw from each where the objective has a kink; those of
    blocks are not (`tail_share` widens them by their number).
    """
    if block is not None:
        labels = len(np.unique(block))
        check(labels >= 3, f"the block bootstrap needs at least 3 blocks, got {labels}")
    times = resamples(len(problem.y), draws, seed, block)
    enough = (times > 0).sum(-1) >= len(phi)
    times = times[enough]
    phis, value, done, _ = refit(problem, np.repeat(phi[None], len(times), 0), times * problem.weights)
    p = problem.parameters(phis)
    good = done & np.isfinite(value) & np.isfinite(p).all(-1)
    failed = draws - int(good.sum())
    if block is not None:
        return Bootstrap(p[good], "block", draws, failed)
    kink = kinked(problem, phi)
    factor = _second_draws(problem, phi, phis[good], times[good], seed) if kink else 1.0
    return Bootstrap(p[good], "case", draws, failed, factor)


def kinked(problem: Problem, phi: Array) -> bool:
    """Whether many runs lie beyond the smooth part of the objective at phi."""
    beyond = np.abs(problem.residuals(phi)[0]) > problem.delta
    return problem.objective == "lad" or (problem.objective == "huber" and bool(beyond.mean() >= KINKED))


def _second_draws(problem: Problem, phi: Array, phis: Array, times: Array, seed: int) -> float:
    """The factor of `calibrate`, from a resample of each resample; 1 where too few of them can be fitted."""
    if len(times) < LEAST_PAIRS:
        return 1.0
    count = len(problem.y)
    rng = np.random.default_rng((seed, 1))
    twice = rng.multinomial(count, times / count).astype(float)
    enough = (twice > 0).sum(-1) >= len(phi)
    again, value, done, _ = refit(problem, phis[enough], twice[enough] * problem.weights)
    good = done & np.isfinite(value)
    if good.sum() < LEAST_PAIRS:
        return 1.0
    free = np.any(problem.basis != 0, axis=1)
    here, first, second = (problem.coordinates(x)[..., free] for x in (phi, phis[enough][good], again[good]))
    return calibrate(first - here, second - first)


def calibrate(first: Array, second: Array) -> float:
    """The factor on the normal quantile with which intervals from draws hold as often as they claim.

    In the world of a draw the truth is known: it is the estimate. An interval from second draws, which leaves
    out a share t on either side, holds it where the rank u of minus the first deviation among the second ones
    has min(u, 1 - u) >= t; so that share must be the (1 - level) quantile of min(u, 1 - u). The factor is the
    median of z(t) / z((1 - level) / 2) over parameters and levels. Source: the fast double bootstrap of
    Davidson and MacKinnon 2007, Computational Statistics and Data Analysis 51(7).

    Args:
      first: draws less the estimate, (S, P), in coordinates where noise adds.
      second: a second draw from each, less that draw.

    Draws that scatter twice as much as what they stand for, in their own world too:

    >>> rng = np.random.default_rng(0)
    >>> bool(abs(calibrate(rng.normal(size=(4000, 3)), rng.normal(size=(4000, 3)) * 2) - 0.5) < 0.03)
    True
    """
    moves = (np.ptp(first, axis=0) > 0) & (np.ptp(second, axis=0) > 0)
    if not moves.any():
        return 1.0
    order = np.sort(second[:, moves], axis=0)
    ranks = [
        (np.searchsorted(column, x, "left") + np.searchsorted(column, x, "right")) / (2 * len(column))
        for column, x in zip(order.T, -first[:, moves].T, strict=True)
    ]
    nearer = np.minimum(ranks, 1 - np.array(ranks))  # (P, S)
    levels = np.array(CALIBRATED)
    tails = np.maximum(np.quantile(nearer, 1 - levels, axis=1), 0.5 / len(order))  # (levels, P)
    factors = stats.norm.ppf(tails) / stats.norm.ppf((1 - levels) / 2)[:, None]
    return float(np.clip(np.median(factors), *FACTORS))


@dataclasses.dataclass(frozen=True)
class Curvature:
    """What the neighbourhood of an optimum says; matrices over the free coordinates phi."""

    gauss_newton: Array  # (F, F)
    sandwich: Array
    cutoff: float  # rise of the objective at the end of a profile interval, per unit of the F quantile
    dof: int


def _seconds(problem: Problem, r: Array) -> Array:
    """rho'' at each run; of a kink narrower than the residuals' spread, a window around 0 of that width."""
    if problem.objective in ("mse", "log_mse"):
        return np.full_like(r, 2.0)
    delta = problem.delta if problem.objective == "huber" else 0.0
    width = max(delta, 1.4826 * float(np.median(np.abs(r))) * len(r) ** -0.2, float(np.abs(r).min()), 1e-12)
    return (np.abs(r) <= width) * (delta if problem.objective == "huber" else 1.0) / width


def curvature(problem: Problem, phi: Array) -> Curvature:
    """Gauss-Newton and sandwich covariance of phi, and the scale of the profile's cut-off.

    Coordinates at a bound have no variance; a direction that no run constrains has a large one, never none.
    """
    r, jac = problem.residuals(phi)
    # The smoothed LAD has psi = sign(r) but on the F residuals that it makes vanish.
    delta = problem.delta if problem.objective != "lad" else 1e-9
    psi = rho(problem.objective, r, delta)[1]
    w = problem.weights
    dof = max(len(r) - len(phi), 1)
    seconds = _seconds(problem, r)
    m = max(float(np.average(seconds, weights=w)), float(seconds.max()) / len(r), 1e-300)
    k = 1 + len(phi) / len(r) * float(np.average((seconds - m) ** 2, weights=w)) / m**2
    s2 = float(np.sum(w * psi**2)) / dof
    inside = (phi > problem.lower) & (phi < problem.upper)
    full = np.zeros((2, len(phi), len(phi)))
    if not inside.any():
        return Curvature(full[0], full[1], k**2 * s2 / (2 * m), dof)
    j = jac[:, inside]
    scale = np.linalg.norm(j * np.sqrt(w)[:, None], axis=0)
    scale = np.maximum(scale, max(1e-12 * float(scale.max()), 1e-60))
    j = j / scale

    def invert(each: Array) -> Array:
        values, vectors = np.linalg.eigh(j.T @ ((w * each)[:, None] * j))
        return (vectors / np.maximum(values, 1e-14 * each.max())) @ vectors.T

    # A window around 0 that holds too few runs to span all directions is widened by the mean.
    bread = invert(seconds + 1e-3 * m)
    inverse = invert(np.ones_like(r))
    leverage = np.minimum(w * np.einsum("rf,fg,rg->r", j, inverse, j), 0.99)
    meat = j.T @ ((w * psi / (1 - leverage))[:, None] ** 2 * j)
    outer = scale[:, None] * scale[None, :]
    where = np.ix_(inside, inside)
    full[0][where] = k**2 * s2 / m**2 * inverse / outer
    full[1][where] = k**2 * bread @ meat @ bread / outer
    return Curvature(full[0], full[1], k**2 * s2 / (2 * m), dof)


def parameter_jacobian(problem: Problem, phi: Array, of: Callable[[Array], Array]) -> Array:
    """d of(parameters) / d phi by central differences; `of` maps (..., P) to (..., K)."""
    step = 1e-6 * np.maximum(np.abs(phi), 1.0)
    moved = np.concatenate([phi + np.diag(step), phi - np.diag(step)])
    values = of(problem.parameters(moved))
    count = len(phi)
    return ((values[:count] - values[count:]) / (2 * step)[:, None]).T


def delta_interval(estimate: float, error: float, dof: int, level: float, positive: bool) -> list[float]:
    """Estimate -+ t error; of a positive scale on its logarithm (`error` is then that of the logarithm)."""
    t = float(stats.t.ppf((1 + level) / 2, dof))
    if not positive:
        return [estimate - t * error, estimate + t * error]
    with np.errstate(over="ignore"):
        return [float(estimate * np.exp(-t * error)), float(estimate * np.exp(t * error))]


def tail_share(level: float, blocks: int, calibration: float = 1.0) -> float:
    """The share of bootstrap draws that an interval leaves out on either side.

    Where runs are resampled (1 - level) / 2, its normal quantile times the calibration. Where n blocks are,
    `Phi(-sqrt(n / (n - 1)) t)` with the (1 + level) / 2 quantile t of Student's t with n - 1 degrees of
    freedom: the draws of few units are spread too little, and 4 trunks are few. Source: Hesterberg 2015, The
    American Statistician 69(4), section 5 (expanded percentile interval).

    Args:
      level: of the interval.
      blocks: how many were resampled; 0 = runs were.
      calibration: factor of `calibrate`, of runs.

    >>> [round(tail_share(0.95, n), 4) for n in (0, 4, 16, 256)]
    [0.025, 0.0001, 0.0139, 0.0242]
    """
    if not blocks:
        return float(stats.norm.cdf(calibration * stats.norm.ppf((1 - level) / 2)))
    t = stats.t.ppf((1 + level) / 2, blocks - 1)
    return float(stats.norm.cdf(-np.sqrt(blocks / (blocks - 1)) * t))


def profile(
    problem: Problem, phi: Array, name: str, error: float, rise: float
) -> tuple[dict[str, list[float] | float], Array]:
    """The best objective at fixed values of one parameter, and the range where it rises by less than `rise`.

    Walks from the optimum to either side in growing multiples of `error` (the standard error of the
    parameter's coordinate), every refit from the one before, until it is past twice the cut-off, a bound, or
    512 errors; there the interval is open and ends with the grid.

    Returns:
      grid (values of the parameter), value (objective), interval, cutoff; and the best phi found on the way.
    """
    law = problem.law
    index = law.names.index(name)
    less, unit, kept = problem.pinned(index)
    centre = float(problem.coordinates(phi)[index])
    best = float(objective_value(problem, problem.residuals(phi)[0]))
    low, high = _range(problem, law, name)
    error = min(error if np.isfinite(error) and error > 0 else WIDEST, WIDEST)

    def at(z: float, start: Array) -> tuple[float, Array]:
        offset = less.offset + unit * z
        if not len(kept):
            r = less.residuals(np.zeros((1, 0)), offset[None])[0]
            return float(objective_value(less, r)[0]), start
        found, value, _, _ = refit(less, start[None], offset=offset[None])
        return float(value[0]), found[0]

    zs, values, ends = [centre], [best], []
    best_phi, best_value = phi, best
    for sign, bound in ((-1.0, low), (1.0, high)):
        start, inner = phi[kept], (centre, best)
        end = None
        for step in STEPS:
            z = centre + sign * step * error
            stop = (z <= bound) if sign < 0 else (z >= bound)
            z = bound if stop else z
            value, start = at(z, start)
            if not np.isfinite(value):
                break
            zs.append(z)
            values.append(value)
            if value < best_value - 1e-9 * abs(best):
                best_value = value
                best_phi = problem.free(less.coordinates(start, less.offset + unit * z))
            if end is None and value > best + rise:
                end = _crossing(at, inner, (z, value), start, best, rise)
            inner = (z, value)
            if stop or value > best + 4 * rise:
                break
        ends.append(inner[0] if end is None else end)
    order = np.argsort(zs)
    to_public = np.exp if name in law.logs else float
    with np.errstate(over="ignore"):
        ends = [float(to_public(end)) for end in ends]  # inf where the walk went beyond what a float holds
        zs = [float(to_public(z)) for z in zs]
    told = {
        "grid": [zs[i] for i in order],
        "value": [values[i] for i in order],
        "interval": ends,
        "cutoff": best + rise,
    }
    return told, best_phi


def _range(problem: Problem, law: Law, name: str) -> tuple[float, float]:
    """Bounds of a coordinate: those of phi where it is a coordinate of its own, else none."""
    row = problem.basis[law.names.index(name)]
    own = np.flatnonzero(row)
    if len(own) == 1 and row[own[0]] == 1 and problem.offset[law.names.index(name)] == 0:
        return float(problem.lower[own[0]]), float(problem.upper[own[0]])
    return -np.inf, np.inf


def _crossing(at: Callable, inner: tuple, outer: tuple, start: Array, best: float, rise: float) -> float:
    """Where the objective has risen by `rise`: regula falsi on its root, which is nearly straight."""

    def height(value: float) -> float:
        return np.sqrt(max(value - best, 0.0)) - np.sqrt(rise)

    (a, fa), (b, fb) = (inner[0], height(inner[1])), (outer[0], height(outer[1]))
    for _ in range(6):
        if abs(fb - fa) < 1e-12 or abs(b - a) < 1e-9 * max(abs(a), abs(b)):
            break
        z = a - fa * (b - a) / (fb - fa)
        value, start = at(z, start)
        f = height(value)
        if abs(f) < 1e-4 * np.sqrt(rise):
            return float(z)
        if f > 0:
            b, fb = z, f
        else:
            a, fa = z, f
    return float(a - fa * (b - a) / (fb - fa)) if fb != fa else float(b)
