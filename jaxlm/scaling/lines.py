"""Power laws of the compute, for many bootstrap draws at once, and the refusal that all fits share.

log N* = log_kN + a log C      log D* = log_kD + b log C      L* = E_L + exp(log_kL) C^-c
"""

import math

import numpy as np
from jaxtyping import Float64

from jaxlm.errors import UserError

Array = np.ndarray
FLOOR_NEEDS = 3  # optima from which on E_L is fitted


class Refusal(UserError):
    """A number that would mean nothing; `name` is that of the diagnostic which refuses it."""

    def __init__(self, name: str, text: str):
        super().__init__(f"{name}: {text}")
        self.name = name


def line(
    x: Float64[Array, "S M"], y: Float64[Array, "S M"], weight: Float64[Array, "S M"]
) -> tuple[Float64[Array, "S"], Float64[Array, "S"]]:
    """Intercept and slope of weighted least squares of each row; weight 0 leaves a point out.

    >>> x, y, weight = np.array([[[0.0, 1, 2]], [[1.0, 3, 9]], [[1.0, 1, 0]]])
    >>> [float(v[0]) for v in line(x, y, weight)]
    [1.0, 2.0]
    """
    y = np.where(weight > 0, y, 0.0)
    total = weight.sum(-1)
    x_mean, y_mean = (weight * x).sum(-1) / total, (weight * y).sum(-1) / total
    dx = x - x_mean[:, None]
    slope = (weight * dx * (y - y_mean[:, None])).sum(-1) / (weight * dx**2).sum(-1)
    return y_mean - slope * x_mean, slope


def loss_line(
    x: Float64[Array, "S M"], y: Float64[Array, "S M"], weight: Float64[Array, "S M"], floor: bool
) -> tuple[Float64[Array, "S"], Float64[Array, "S"], Float64[Array, "S"]]:
    """E_L, log_kL and c of y = E_L + exp(log_kL - c x) by least squares of the relative errors, row by row.

    For a given c the other two are linear (and not negative); c is bracketed on a grid of .003 to 3 and
    found by golden section.

    Args:
        x: log C.
        y: losses.
        weight: 0 leaves a point out.
        floor: fit E_L; else it is 0 and the line is straight in the logarithms.
    """
    y = np.where(weight > 0, y, 1.0)
    if not floor:
        intercept, slope = line(x, np.log(y), weight)
        return np.zeros_like(slope), intercept, -slope
    middle = (weight * x).sum(-1) / weight.sum(-1)
    z, w = x - middle[:, None], weight / y**2

    def cost(c: Array) -> Array:
        return _floor_and_scale(c, z, y, w)[2]

    grid = np.geomspace(0.003, 3.0, 140)
    best = np.stack([cost(np.full(len(z), c)) for c in grid], -1).argmin(-1).clip(1, len(grid) - 2)
    low, high = np.log(grid[best - 1]), np.log(grid[best + 1])
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        one, two = high - golden * (high - low), low + golden * (high - low)
        left = cost(np.exp(one)) < cost(np.exp(two))
        low, high = np.where(left, low, one), np.where(left, two, high)
    c = np.exp((low + high) / 2)
    floors, scale, _ = _floor_and_scale(c, z, y, w)
    return floors, np.log(np.maximum(scale, 1e-300)) + c * middle, c


def _floor_and_scale(c: Array, x: Array, y: Array, weight: Array) -> tuple[Array, Array, Array]:
    """E and k, neither negative, that minimise sum w (E + k exp(-c x) - y)^2 in each row, and that sum."""
    basis = np.exp(-c[:, None] * x)
    s1, sb, sbb = weight.sum(-1), (weight * basis).sum(-1), (weight * basis**2).sum(-1)
    sy, sby = (weight * y).sum(-1), (weight * basis * y).sum(-1)
    scale = (s1 * sby - sb * sy) / (s1 * sbb - sb**2)
    floor = (sy - scale * sb) / s1
    bare, flat = floor < 0, scale < 0
    floor = np.where(flat, sy / s1, np.where(bare, 0.0, floor))
    scale = np.where(flat, 0.0, np.where(bare, sby / sbb, scale))
    return floor, scale, (weight * (floor[:, None] + scale[:, None] * basis - y) ** 2).sum(-1)


def excess_scatter(
    x: Float64[Array, "M"], y: Float64[Array, "M"], sigma: Float64[Array, "M"]
) -> tuple[float, float]:
    """How far vertices lie from their plain line beyond what their noise explains.

    Args:
        x: log C.
        y: log N*.
        sigma: standard deviation of y by the noise of the runs; 0: unknown.

    Returns:
        The standard deviation that is left over, 0 where the scatter could be chance (chi^2 within four
        standard deviations of its mean) or there are fewer than four vertices; and the root of chi^2 / dof.
    """
    dof = len(x) - 2
    if dof < 2 or not np.all(sigma > 0):
        return 0.0, 0.0
    ones = np.ones((1, len(x)))
    intercept, slope = line(x[None], y[None], ones)
    squares = (y - intercept - slope * x) ** 2
    ratio = float((squares / sigma**2).sum() / dof)
    if ratio < 1 + 4 * math.sqrt(2 / dof):
        return 0.0, math.sqrt(ratio)
    return math.sqrt(max(float(squares.sum() / dof - (sigma**2).mean()), 0.0)), math.sqrt(ratio)


def compute_lines(
    optima: tuple[Float64[Array, "S M"], ...],
    losses: tuple[Float64[Array, "S K"], ...],
    floor: bool,
) -> tuple[tuple[str, ...], Float64[Array, "S P"]]:
    """The three lines through the optima of each row: names, and parameters in their order.

    Args:
        optima: log C, log N*, log D*, and the weights of the two in their lines.
        losses: log C, L* and its weight.
        floor: whether to fit E_L.
    """
    log_c, log_n, log_d, weight_n, weight_d = optima
    log_kn, a = line(log_c, log_n, weight_n)
    log_kd, b = line(log_c, log_d, weight_d)
    e, log_kl, c = loss_line(*losses, floor)
    columns = {"log_kN": log_kn, "a": a, "log_kD": log_kd, "b": b}
    columns |= {"E_L": e, "log_kL": log_kl, "c": c} if floor else {"log_kL": log_kl, "c": c}
    return tuple(columns), np.stack(list(columns.values()), -1)


def percentiles(values: Float64[Array, "S"], tail: float) -> list[float]:
    """The central interval of a sample: its `tail` and 1 - `tail` quantiles.

    Of S draws the k-th stands for the share k / (S + 1), so that what one more draw would miss is twice the
    tail: at 200 draws the other definitions lose a hundredth of the coverage.
    """
    return [float(v) for v in np.quantile(values, [tail, 1.0 - tail], method="weibull")]
