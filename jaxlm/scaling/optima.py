"""Compute-optimal lines without a surface: the envelope (approach 1) and iso-FLOP vertices (approach 2).

Both end in power laws of the training FLOPs C,

    N*(C) = exp(log_kN) C^a      D*(C) = exp(log_kD) C^b      L*(C) = E_L + exp(log_kL) C^-c

N* and D* are fitted separately, so that a + b and C / (N* D*) check each other. The floor E_L is fitted from
three optima on; with two, L* is a plain power law (E_L = 0, not among the fit's `names`), too low far out.

Envelope (Hoffmann et al. 2022, section 3.1): every size's loss is interpolated linearly in log C, log L, and
at 1500 log-spaced C the best size is taken. Where the best size changes, N* is the geometric mean of the two;
in between it is interpolated (the slope of the bare staircase is too small by 1 / n^2 with n sizes).
Stretches of the smallest and the largest size are dropped.

Iso-FLOP: for each budget the vertex of the loss against log N, and separately against log D:
  parabola  least squares (Hoffmann et al. 2022, section 3.2).
  akima     Akima's spline of log L, smallest value on 25 points an interval, refined; a minimum at the edge
            is rejected (Porian et al. 2024, formll/resolving-scaling-law-discrepancies).
  robust    the parabola under a Huber loss with delta = 1 standard deviation of the noise (Marin's delta is 1
            nat, which no residual ever reaches).
The lines are plain least squares of the vertices, as in the literature; Akima's, and all where a sigma column
tells the noise, weigh them by 1 / max(sigma, grid step / 3)^2 (Porian et al.), sigma from draws of the noise.
Where vertices scatter more than that noise explains, each moves in the draws by what is left over as well,
with Student's factor: 95% intervals of a slope cover .98, .95, .94 (4, 6, 10 of them), without it .83 to .92.

Noise is drawn onto losses that are noisy already. To parabolas that makes no difference: 95% intervals of a,
b and N* at 10x the compute cover .93 to .95 (200 sweeps of 15 and of 28 runs), robust ones .93 to .96.
Akima's spline goes through every point: its intervals are wide, and cover .985 to .995. Noise on the smooth
curve alone is no way out: .90 to .92 where it moves minima to the edge (28 runs, noise 0.4%).

If alpha and beta differ, all vertices of grids of one form are off by one factor: `parabola_bias`.
"""

import dataclasses
import math

import numpy as np
import scipy
from jaxtyping import Float64, Int64

from jaxlm.errors import check, check_choice
from jaxlm.scaling.lines import FLOOR_NEEDS, Refusal, compute_lines, excess_scatter, percentiles
from jaxlm.scaling.record import Fit
from jaxlm.scaling.table import Exclusion, Points
from jaxlm.scaling.vertices import (
    LEAST_SIZES,
    VARIANTS,
    Budget,
    find_budgets,
    parabola,
    size_labels,
    sizes,
    vertices,
)

BOOTSTRAPS = ("residual", "case", "block")
Array = np.ndarray


# --- Noise and draws ---


@dataclasses.dataclass(frozen=True)
class _Noise:
    """Noise of a run's loss, which the draws add."""

    source: str  # 'sigma column' | 'residuals of the parabolas'
    scale: Float64[Array, "R"]  # standard deviation of log L
    pool: Float64[Array, "P"]  # standardised residuals to draw from; empty: normal
    dof: int  # of the estimate; 0: known


def _noise(points: Points, budgets: list[Budget], robust: bool) -> _Noise | None:
    """From the sigma column, else from the residuals of all parabolas, pooled; None where neither tells."""
    if points.sigma is not None:
        return _Noise("sigma column", points.sigma / points.L, np.empty(0), 0)
    residuals, dof = [], 0
    for budget in budgets:
        x, y = np.log(points.N[budget.index]), points.L[budget.index][None]
        residuals.append((y / parabola(x, y, np.ones_like(y))[3] - 1.0)[0])
        dof += len(x) - 3
    if dof < 1:
        return None
    flat = np.concatenate(residuals)
    deviation = math.sqrt((flat**2).sum() / dof)
    if robust:  # the unit of the Huber loss must not be made by the outliers
        deviation = min(deviation, 1.4826 * float(np.median(np.abs(flat))) * math.sqrt(len(flat) / dof))
    deviation = max(deviation, 1e-15)
    pool = flat * math.sqrt(len(flat) / dof) / deviation
    return _Noise("residuals of the parabolas", np.full(len(points), deviation), pool, dof)


def _resample(
    points: Points, budgets: list[Budget], noise: _Noise, kind: str, draws: int, rng: np.random.Generator
) -> tuple[Float64[Array, "S R"], Float64[Array, "S R"]]:
    """Losses and weights of the bootstrap samples."""
    runs = len(points)
    if kind == "residual":
        shape = (draws, runs)
        shocks = rng.choice(noise.pool, shape) if noise.pool.size else rng.standard_normal(shape)
        if noise.dof:  # the variance is itself an estimate: Student's t
            shocks = shocks * np.sqrt(noise.dof / rng.chisquare(noise.dof, (draws, 1)))
        return points.L * np.maximum(1.0 + noise.scale * shocks, 0.1), np.ones(shape)
    weight = np.zeros((draws, runs))
    if kind == "case":
        for budget in budgets:
            n = len(budget.index)
            weight[:, budget.index] = rng.multinomial(n, np.full(n, 1 / n), size=draws)
    else:
        labels, member = np.unique(points.block, return_inverse=True)
        n = len(labels)
        weight[:] = rng.multinomial(n, np.full(n, 1 / n), size=draws)[:, member]
    return np.broadcast_to(points.L, (draws, runs)), weight


# --- Approach 2 ---


def fit_isoflop(
    points: Points,
    *,
    variant: str = "parabola",
    bootstrap: str = "residual",
    draws: int = 400,
    seed: int = 0,
    level: float = 0.95,
    tolerance: float = 0.15,
) -> Fit:
    """Approach 2: a vertex per budget, then lines of log N*, log D* and L* against log C.

    Args:
        points: the runs. With `sigma` the curves weigh by 1 / sigma^2 and the noise counts as known.
        variant: parabola | akima | robust.
        bootstrap: residual: noise, drawn from the pooled residuals (or normal with `sigma`), is added to
            every run, with Student's factor where the variance is estimated; case: runs are resampled within
            their budget, which with five to nine sizes makes intervals two to four times too wide; block:
            the labels of `points.block` are resampled.
        draws: bootstrap draws, from which the sigma of each vertex comes too.
        seed: of the draws.
        level: of the intervals.
        tolerance: width of a budget in log C, where no budget column says what belongs together.

    Raises:
        Refusal: too_few_points (fewer than two budgets with three sizes); no_interior_minimum (fewer than two
            with a minimum inside their sizes).
    """
    check_choice(variant, VARIANTS, "variant")
    check_choice(bootstrap, BOOTSTRAPS, "bootstrap")
    check(bootstrap != "block" or points.block is not None, "bootstrap='block' needs a block column")
    budgets, how = find_budgets(points, tolerance)
    budgets = [b for b in budgets if sizes(points.N[b.index]) >= LEAST_SIZES]
    if len(budgets) < 2:
        raise Refusal(
            "too_few_points",
            f"iso-FLOP lines need two budgets with {LEAST_SIZES} sizes each; the {len(points)} runs have "
            f"{len(budgets)} (budgets from {how})",
        )
    noise = _noise(points, budgets, variant == "robust")
    if noise is None and variant == "robust":
        raise Refusal("too_few_points", "variant='robust' needs a budget with more than three runs, or sigma")
    y, weight = points.L[None], np.ones((1, len(points)))
    if noise is not None:
        more = _resample(points, budgets, noise, bootstrap, draws, np.random.default_rng(seed))
        y, weight = np.concatenate([y, more[0]]), np.concatenate([weight, more[1]])
    if points.sigma is not None:
        weight = weight * (points.sigma.min() / points.sigma) ** 2
    unit = points.L * (1.0 if noise is None else noise.scale)

    optima, found = [], []
    for budget in budgets:
        at = budget.index
        rows = (y[:, at], weight[:, at], unit[at])
        by_n = vertices(variant, np.log(points.N[at]), *rows)
        by_d = vertices(variant, np.log(points.D[at]), *rows)
        optima.append(_optimum(points, budget, by_n, by_d))
        found.append((by_n[0], by_d[0], by_n[1], by_n[3] & by_d[3]))
    used = [i for i, optimum in enumerate(optima) if optimum["used"]]
    if len(used) < 2:
        reasons = "; ".join(f"C = {o['budget']:.3g}: {o['reason'] or 'fine'}" for o in optima)
        raise Refusal("no_interior_minimum", f"a line needs two budgets with a minimum inside ({reasons})")

    log_n, log_d, lowest, inside = (np.stack([found[i][k] for i in used], -1) for k in range(4))
    floor = len(used) >= FLOOR_NEEDS
    kept = inside.sum(-1) >= (3 if floor else 2)
    log_c = np.broadcast_to(np.log([optima[i]["budget"] for i in used]), inside.shape)
    spread = np.array([optima[i]["sigma_log_N"] for i in used])
    excess, ratio = excess_scatter(log_c[0], log_n[0], spread)
    moved = excess * np.random.default_rng([seed, 1]).standard_normal(log_n.shape)
    if excess:  # an estimate itself, of few vertices: Student's t
        dof = len(used) - 2
        moved *= np.sqrt(dof / np.random.default_rng([seed, 2]).chisquare(dof, (len(moved), 1)))
    moved[0] = 0.0  # the estimate
    log_n, log_d = log_n + moved, log_d - moved  # N D is the budget's
    weighted = variant == "akima" or points.sigma is not None
    weights = [inside.astype(float) for _ in "ND"]
    if weighted:
        steps = [math.log(optima[i]["N_high"] / optima[i]["N_low"]) / (optima[i]["sizes"] - 1) for i in used]
        sigmas = ([optima[i][f"sigma_log_{column}"] for i in used] for column in "ND")
        weights = [inside * np.maximum(s, np.array(steps) / 3) ** -2 for s in sigmas]
    names, table = compute_lines(
        tuple(v[kept] for v in (log_c, log_n, log_d, *weights)),
        tuple(v[kept] for v in (log_c, lowest, inside.astype(float))),
        floor,
    )
    errors = log_n[0] - table[0, 0] - table[0, 1] * log_c[0]
    value = float((weights[0][0] * errors**2).sum())
    seen = np.sort(np.concatenate([budgets[i].index for i in used]))
    residuals, sigma = _curve_residuals(points, [budgets[i] for i in used], seen)
    notes = [f"{len(used)} of {len(budgets)} budgets and {len(seen)} of {len(points)} runs used; from {how}"]
    if noise is None:
        notes.append("three runs a budget and no sigma: the noise is unknown, so there are no intervals")
    return _pack(
        points.take(seen),
        names,
        table,
        method=variant,
        objective="huber" if variant == "robust" else "mse",
        delta=1.0 if variant == "robust" else 0.0,
        bootstrap=dict(kind=bootstrap, seed=seed, asked=len(y) - 1, failed=int((~kept).sum())),
        level=level,
        value=value,
        optima=optima,
        sigma=sigma,
        residuals=residuals,
        excluded=_left_out(points, seen, budgets, optima),
        notes=notes,
        settings=dict(
            budgets_from=how,
            noise="unknown" if noise is None else noise.source,
            noise_dof=0 if noise is None else noise.dof,
            line_weights="1 / max(sigma, grid step / 3)^2" if weighted else "equal",
            excess_scatter=excess,
            scatter_ratio=ratio,
        ),
    )


def _optimum(points: Points, budget: Budget, by_n: tuple, by_d: tuple) -> dict:
    """What is known of one budget: row 0 of the vertices is the data, the others are draws."""
    n, c = points.N[budget.index], points.C[budget.index]
    labels = size_labels(n)
    mean_loss = np.bincount(labels, points.L[budget.index]) / np.bincount(labels)
    inside = by_n[3] & by_d[3]
    share = float(inside[1:].mean()) if len(inside) > 1 else float(inside[0])
    reason = ""
    if not by_n[2][0] > 0:
        reason = (
            "no minimum: the curve bends down" if np.isfinite(by_n[2][0]) else "no minimum inside its sizes"
        )
    elif not inside[0]:
        reason = "the vertex is outside its sizes"
    elif share < 0.5:
        reason = f"the vertex is outside its sizes in {1 - share:.0%} of the draws"
    spread = [float(v[0][1:][inside[1:]].std()) if inside[1:].sum() > 1 else 0.0 for v in (by_n, by_d)]
    found = [
        float(np.exp(v[0][0])) if np.isfinite(v[0][0]) and abs(v[0][0]) < 500 else None for v in (by_n, by_d)
    ]
    centre = math.sqrt(n.min() * n.max())
    return dict(
        budget=budget.flops,
        N=found[0],
        D=found[1],
        L=_number(by_n[1][0]),
        curvature=_number(by_n[2][0]),
        inside=bool(inside[0]),
        edge=bool(not inside[0] or mean_loss.argmin() in (0, len(mean_loss) - 1)),
        inside_share=share,
        points=len(n),
        sizes=len(mean_loss),
        sigma_log_N=spread[0],
        sigma_log_D=spread[1],
        centre=centre,
        distance=None if found[0] is None else math.log(centre / found[0]),
        N_low=float(n.min()),
        N_high=float(n.max()),
        C_spread=float(c.max() / c.min() - 1.0),
        used=not reason,
        reason=reason,
    )


def _number(value: float) -> float | None:
    """None for what JSON does not have."""
    return float(value) if np.isfinite(value) else None


def _curve_residuals(
    points: Points, budgets: list[Budget], seen: Int64[Array, "n"]
) -> tuple[list[float], float]:
    """log L minus the log of its budget's parabola, for the runs `seen`, and their deviation."""
    out, dof = np.zeros(len(points)), 0
    for budget in budgets:
        x, y = np.log(points.N[budget.index]), points.L[budget.index][None]
        out[budget.index] = np.log(y / parabola(x, y, np.ones_like(y))[3])[0]
        dof += len(x) - 3
    sigma = math.sqrt((out**2).sum() / dof) if dof else 0.0
    return out[seen].tolist(), sigma


def _left_out(
    points: Points, seen: Int64[Array, "n"], budgets: list[Budget], optima: list[dict]
) -> list[dict]:
    """An exclusion for every run that no line has seen."""
    rows = np.arange(len(points)) if points.rows is None else points.rows
    reasons = {int(i): o["reason"] for b, o in zip(budgets, optima, strict=True) for i in b.index}
    out = []
    for i in sorted(set(range(len(points))) - set(seen.tolist())):
        rule = "no_interior_minimum" if i in reasons else "no_budget"
        detail = reasons.get(i) or f"C = {points.C[i]:.4g} shares no budget with two other sizes"
        out.append(dataclasses.asdict(Exclusion(int(rows[i]), rule, detail)))
    return out


def _pack(points: Points, names: tuple[str, ...], table: Float64[Array, "S P"], **fields) -> Fit:
    """A fit from the lines' parameters: row 0 of the table is the estimate, the others are draws."""
    parameters = {name: float(v) for name, v in zip(names, table[0], strict=True)}
    draws, level = table[1:], fields["level"]
    intervals = {}
    if len(draws) > 1:
        intervals = {
            name: {"bootstrap": percentiles(draws[:, i], (1 - level) / 2)} for i, name in enumerate(names)
        }
    has_floor = "E_L" in names
    note = (
        "L* is fitted with a floor E_L"
        if has_floor
        else f"fewer than {FLOOR_NEEDS} optima: L* is a plain power law"
    )
    rows = np.arange(len(points)) if points.rows is None else points.rows
    columns = dict(N=points.N, D=points.D, C=points.C, L=points.L, row=rows)
    columns |= {} if points.sigma is None else {"sigma": points.sigma}
    columns |= {} if points.block is None else {"block": points.block}
    fields["notes"] = [*fields["notes"], note]
    fields["settings"] = fields["settings"] | dict(numpy=np.__version__, scipy=scipy.__version__)
    return Fit(
        law="power",
        parameters=parameters if has_floor else parameters | {"E_L": 0.0},
        derived={"a": parameters["a"], "b": parameters["b"]},
        names=names,
        draws=draws.tolist(),
        intervals=intervals,
        points={name: np.asarray(v).tolist() for name, v in (columns | dict(points.extra)).items()},
        **fields,
    )


# --- Approach 1 ---


@dataclasses.dataclass(frozen=True)
class _Curves:
    """Every size's loss and tokens on one grid of log C; NaN where a size was not trained."""

    log_c: Float64[Array, "G"]
    log_n: Float64[Array, "K"]
    log_l: Float64[Array, "K G"]
    log_d: Float64[Array, "K G"]


def fit_envelope(
    points: Points, *, draws: int = 400, seed: int = 0, level: float = 0.95, bins: int = 1500
) -> Fit:
    """Approach 1: the lower envelope of the sizes' loss curves, then lines of log N*, log D*, L* on log C.

    Points of one curve are not independent: the bootstrap resamples whole sizes (`points.block`, if given).

    Args:
        points: several (C, L) per size: runs of their own schedule, or branches; not a decayed
            run's way there.
        draws: bootstrap draws.
        seed: of the draws.
        level: of the intervals.
        bins: log-spaced values of C.

    Raises:
        Refusal: too_few_points (fewer than three sizes with two points); no_envelope (the best size changes
            fewer than twice, leaving the smallest and the largest aside).
    """
    labels = size_labels(points.N)
    counts = np.bincount(labels)
    chosen = np.flatnonzero(counts >= 2)
    if len(chosen) < 3:
        text = (
            f"an envelope needs three sizes with two points each, not {len(chosen)} (of {len(counts)} sizes)"
        )
        raise Refusal("too_few_points", text)
    curves = _curves(points, labels, chosen, bins)
    whole = _envelope(curves, np.arange(len(chosen)))
    if whole is None:
        text = "fewer than two sizes, the smallest and the largest aside, are best at any sampled compute"
        raise Refusal("no_envelope", text)
    block = labels if points.block is None else points.block
    keys = np.array([block[labels == k][0] for k in chosen])
    groups = [np.flatnonzero(keys == key) for key in np.unique(keys)]
    rng, table = np.random.default_rng(seed), [whole.parameters]
    for _ in range(draws):
        picked = np.unique(rng.integers(len(groups), size=len(groups)))
        drawn = _envelope(curves, np.sort(np.concatenate([groups[g] for g in picked])), names=whole.names)
        table += [] if drawn is None else [drawn.parameters]
    seen = np.flatnonzero(np.isin(labels, chosen))
    rows = np.arange(len(points)) if points.rows is None else points.rows
    return _pack(
        points.take(seen),
        whole.names,
        np.stack(table),
        method="envelope",
        objective="mse",
        delta=0.0,
        bootstrap=dict(kind="block", seed=seed, asked=draws, failed=draws + 1 - len(table)),
        level=level,
        value=whole.value,
        optima=whole.optima,
        sigma=whole.sigma,
        excluded=[
            dataclasses.asdict(Exclusion(int(rows[i]), "one_point", "the only point of its size"))
            for i in np.setdiff1d(np.arange(len(points)), seen)
        ],
        notes=[f"{len(whole.optima)} of {len(chosen)} sizes are best somewhere inside; bootstrap over sizes"],
        settings=dict(bins=bins),
    )


def _curves(points: Points, labels: Int64[Array, "n"], chosen: Int64[Array, "K"], bins: int) -> _Curves:
    """Linear interpolation of every size's log L and log D in log C."""
    log_c = np.log(points.C)
    grid = np.linspace(log_c.min(), log_c.max(), bins)
    log_n, log_l, log_d = [], [], []
    for k in chosen:
        at = np.flatnonzero(labels == k)
        x, first = np.unique(log_c[at], return_inverse=True)
        mean = [np.bincount(first, np.log(v[at])) / np.bincount(first) for v in (points.L, points.D)]
        log_n.append(np.log(points.N[at]).mean())
        log_l.append(np.interp(grid, x, mean[0], left=np.nan, right=np.nan))
        log_d.append(np.interp(grid, x, mean[1], left=np.nan, right=np.nan))
    return _Curves(grid, np.array(log_n), np.stack(log_l), np.stack(log_d))


@dataclasses.dataclass(frozen=True)
class _Envelope:
    """Lines through one lower envelope."""

    names: tuple[str, ...]
    parameters: Float64[Array, "P"]
    value: float  # sum of squares of log N about its line
    sigma: float  # deviation of log L from its line
    optima: list[dict]


def _envelope(curves: _Curves, rows: Int64[Array, "k"], names: tuple[str, ...] = ()) -> _Envelope | None:
    """The envelope of some of the sizes; None where it has too few stretches (for lines of these `names`)."""
    x, log_n, log_l, log_d = curves.log_c, curves.log_n[rows], curves.log_l[rows], curves.log_d[rows]
    heights = np.where(np.isnan(log_l), np.inf, log_l)
    best, known = heights.argmin(0), np.isfinite(heights.min(0))
    g = np.flatnonzero((best[1:] != best[:-1]) & known[1:] & known[:-1])
    i, j = best[g], best[g + 1]
    # Where the two curves cross between grid points; NaN where one of them only begins or ends.
    before, after = log_l[j, g] - log_l[i, g], log_l[i, g + 1] - log_l[j, g + 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = before / (before + after)
    cross = x[g] + (x[1] - x[0]) * share
    cross_n = (log_n[i] + log_n[j]) / 2
    cross_d = sum(log_d[k, g] + share * (log_d[k, g + 1] - log_d[k, g]) for k in (i, j)) / 2

    size, ends = j[:-1], np.stack([cross[:-1], cross[1:]], -1)  # stretches between changes and whose they are
    good = np.isfinite(ends).all(-1) & (size > 0) & (size < len(rows) - 1)
    floor = "E_L" in names or (not names and good.sum() >= FLOOR_NEEDS)
    if good.sum() < (3 if floor else 2):
        return None
    middle = ends.mean(-1)
    grid, fit_n, fit_d = [], [], []
    for q in np.flatnonzero(good):
        inside = np.append(x[(x > ends[q, 0]) & (x < ends[q, 1])], middle[q])
        grid.append(inside)
        fit_n.append(np.interp(inside, ends[q], cross_n[q : q + 2]))
        fit_d.append(np.interp(inside, ends[q], cross_d[q : q + 2]))
    flat = np.stack([np.concatenate(v) for v in (grid, fit_n, fit_d)])[:, None]
    ones = np.ones_like(flat[0])
    at, lengths = middle[good][None], np.diff(ends[good])[None, :, 0]
    lowest = np.array([[np.interp(m, x, log_l[k]) for m, k in zip(middle[good], size[good], strict=True)]])
    found, parameters = compute_lines((*flat, ones, ones), (at, np.exp(lowest), lengths), floor)
    p = dict(zip(found, parameters[0], strict=True))
    errors = lowest[0] - np.log(p.get("E_L", 0.0) + np.exp(p["log_kL"] - p["c"] * at[0]))
    freedom = len(errors) - (3 if floor else 2)
    optima = [
        dict(
            budget=float(np.exp(m)),
            N=float(np.exp(n[-1])),
            D=float(np.exp(d[-1])),
            L=float(np.exp(low)),
            used=True,
        )
        for m, n, d, low in zip(at[0], fit_n, fit_d, lowest[0], strict=True)
    ]
    return _Envelope(
        found,
        parameters[0],
        value=float(((flat[1] - p["log_kN"] - p["a"] * flat[0]) ** 2).sum()),
        sigma=math.sqrt((errors**2).sum() / freedom) if freedom > 0 else 0.0,
        optima=optima,
    )
