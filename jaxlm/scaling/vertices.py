"""Where the loss of one budget is smallest: budgets, parabolas, Akima splines, and the parabola's bias.

Everything works on many rows of losses at once (the data and the bootstrap draws).
"""

import dataclasses

import numpy as np
from jaxtyping import Float64, Int64
from scipy.interpolate import Akima1DInterpolator

from jaxlm.scaling.table import Points

VARIANTS = ("parabola", "akima", "robust")
LEAST_SIZES = 3  # distinct sizes that a vertex needs
SAME_SIZE = 0.01  # sizes whose logarithms are closer than this are one, digitised or rounded
AKIMA_POINTS = 25  # grid points an interval
Array = np.ndarray


# --- Budgets ---


@dataclasses.dataclass(frozen=True)
class Budget:
    """Runs of about the same training FLOPs."""

    flops: float  # geometric mean
    index: Int64[Array, "n"]  # positions in the points


def find_budgets(points: Points, tolerance: float = 0.15) -> tuple[list[Budget], str]:
    """Groups of runs of one budget, in order of C, and how they were found.

    If there is a `budget` among the extras, its values are the groups (0 and NaN: in none). If not, the
    window of log C of width `tolerance` that holds most runs is taken out, again and again, while it has
    three sizes and a third of those of the fullest window: between budgets there is no budget.
    """
    log_c = np.log(points.C)
    asked = np.nan_to_num(points.extra.get("budget", np.zeros(len(points))))
    found = [np.flatnonzero(asked == value) for value in np.unique(asked[asked > 0])]
    how = "the budget column"
    if not found:
        how = f"windows of {tolerance:g} in log C, fullest first"
        left, fullest = np.argsort(log_c, kind="stable"), 0
        while len(left):
            ends = np.searchsorted(log_c[left], log_c[left] + tolerance, side="right")
            counts, spread = ends - np.arange(len(left)), log_c[left][ends - 1] - log_c[left]
            first = int(np.lexsort((spread, -counts))[0])
            window = left[first : ends[first]]
            fullest = max(fullest, sizes(points.N[window]))
            if sizes(points.N[window]) < max(LEAST_SIZES, fullest / 3):
                break
            found.append(np.sort(window))
            left = np.delete(left, np.arange(first, ends[first]))
    groups = [Budget(float(np.exp(log_c[index].mean())), index) for index in found]
    return sorted(groups, key=lambda budget: budget.flops), how


def size_labels(values: Float64[Array, "n"]) -> Int64[Array, "n"]:
    """0, 1, ... for the distinct values in rising order; what differs by less than 1% is one.

    >>> size_labels(np.array([100.0, 1e6, 100.4, 200.0])).tolist()
    [0, 2, 0, 1]
    """
    order = np.argsort(values, kind="stable")
    labels = np.empty(len(values), np.int64)
    labels[order] = np.cumsum(np.diff(np.log(values[order]), prepend=np.log(values[order[:1]])) > SAME_SIZE)
    return labels


def sizes(values: Float64[Array, "n"]) -> int:
    """How many distinct values there are, up to 1%."""
    return int(size_labels(values).max(initial=-1)) + 1


# --- Vertices, for many rows of losses at once ---


def _quadratic(t: Array, y: Array, weight: Array) -> tuple[Array, Array]:
    """Coefficients (S, 3) of 1, t, t^2 by weighted least squares and the values (S, n); NaN if singular."""
    powers = np.stack([np.ones_like(t), t, t * t], -1)
    gram = np.einsum("ni,sn,nj->sij", powers, weight, powers)
    size = np.trace(gram, axis1=-2, axis2=-1)
    singular = np.linalg.det(gram) < 1e-13 * size**3  # well spread sizes: 1e-3
    gram[singular] = np.eye(3)
    right = np.einsum("ni,sn->si", powers, weight * y)
    coefficients = np.linalg.solve(gram, right[..., None])[..., 0]
    coefficients[singular] = np.nan
    return coefficients, coefficients @ powers.T


def parabola(
    x: Float64[Array, "n"],
    y: Float64[Array, "S n"],
    weight: Float64[Array, "S n"],
    scale: Float64[Array, "n"] | None = None,
) -> tuple[Float64[Array, "S"], Float64[Array, "S"], Float64[Array, "S"], Float64[Array, "S n"]]:
    """Vertex, value there, second derivative and fitted values of a quadratic, row by row.

    Args:
        x: log N or log D.
        y: losses.
        weight: of their squares.
        scale: the unit of a Huber loss with delta = 1; None: least squares.
    """
    middle, half = (x.max() + x.min()) / 2, (x.max() - x.min()) / 2
    t = (x - middle) / half
    coefficients, values = _quadratic(t, y, weight)
    todo = np.flatnonzero(np.isfinite(coefficients[:, 0]))
    for _ in range(0 if scale is None else 100):  # reweighted least squares
        shrink = 1.0 / np.maximum(np.abs(y[todo] - values[todo]) / scale, 1.0)
        new, values[todo] = _quadratic(t, y[todo], weight[todo] * shrink)
        moved = np.abs(new - coefficients[todo]).max(-1) > 1e-9
        coefficients[todo] = new
        todo = todo[moved]
        if not len(todo):
            break
    height, slope, bend = coefficients.T
    with np.errstate(divide="ignore", invalid="ignore"):
        at, lowest = -slope / (2 * bend), height - slope**2 / (4 * bend)
    return middle + half * at, lowest, 2 * bend / half**2, values


def akima(
    x: Float64[Array, "n"], y: Float64[Array, "S n"], weight: Float64[Array, "S n"]
) -> tuple[Float64[Array, "S"], Float64[Array, "S"], Float64[Array, "S"]]:
    """Minimum, value there and second derivative of log y of Akima's spline, row by row; NaN at an edge.

    Runs of one size are averaged; those of weight 0 (which a bootstrap left out) are no knots.
    """
    out = np.full((3, len(y)), np.nan)
    for pattern in np.unique(weight > 0, axis=0):
        rows = np.flatnonzero(((weight > 0) == pattern).all(-1))
        if sizes(np.exp(x[pattern])) < LEAST_SIZES:
            continue
        labels = size_labels(np.exp(x[pattern]))
        member = np.eye(labels.max() + 1)[labels]
        w = weight[np.ix_(rows, pattern)]
        knots = (x[pattern] @ member) / member.sum(0)
        spline = Akima1DInterpolator(knots, np.log((w * y[np.ix_(rows, pattern)]) @ member / (w @ member)).T)
        pieces = np.linspace(knots[:-1], knots[1:], AKIMA_POINTS, endpoint=False, axis=-1)
        grid = np.append(pieces.ravel(), knots[-1])
        curve = spline(grid)
        low = curve.argmin(0)
        inside = (low > 0) & (low < len(grid) - 1)
        low = np.clip(low, 1, len(grid) - 2)
        # The parabola through the lowest grid point and its neighbours.
        left, here, right = (curve[low + step, np.arange(len(rows))] for step in (-1, 0, 1))
        back, ahead = grid[low] - grid[low - 1], grid[low + 1] - grid[low]
        up, down = (right - here) / ahead, (here - left) / back
        bend, slope = 2 * (up - down) / (back + ahead), (up * back + down * ahead) / (back + ahead)
        with np.errstate(divide="ignore", invalid="ignore"):
            step = np.where(bend > 0, np.clip(-slope / bend, -back, ahead), 0.0)
        found = np.stack([grid[low] + step, np.exp(here + slope * step + bend * step**2 / 2), bend])
        out[:, rows] = np.where(inside, found, np.nan)
    return out[0], out[1], out[2]


def vertices(variant: str, x: Array, y: Array, weight: Array, scale: Array) -> tuple[Array, ...]:
    """Vertex, loss there, curvature, and whether it is a minimum inside the sampled range: each (S,)."""
    if variant == "akima":
        at, lowest, bend = akima(x, y, weight)
    else:
        at, lowest, bend, _ = parabola(x, y, weight, scale if variant == "robust" else None)
    return at, lowest, bend, np.isfinite(at) & (bend > 0) & (at > x.min()) & (at < x.max())


def parabola_bias(alpha: float, beta: float, offsets: Float64[Array, "n"]) -> float:
    """By how much a parabola's vertex in log N is off, for L = E + A N^-alpha + B D^-beta at fixed N D.

    About the optimum the reducible loss is proportional to beta exp(-alpha x) + alpha exp(beta x) with
    x = log N / N*, whatever A, B and C are; the vertex of its parabola is the bias. That of log D is its
    negative.

    Args:
        alpha: exponent of N.
        beta: exponent of D.
        offsets: log N_i / N* of the sampled sizes.

    Chinchilla's surface, 15 sizes within 16x: D* comes out 5% low.

    >>> bias = parabola_bias(0.34, 0.28, np.linspace(-1, 1, 15) * np.log(16))
    >>> [round(float(v), 4) for v in (bias / np.log(10), np.exp(-bias))]
    [0.0227, 0.949]
    """
    curve = beta * np.exp(-alpha * offsets) + alpha * np.exp(beta * offsets)
    return float(parabola(offsets, curve[None], np.ones((1, len(offsets))))[0][0])
