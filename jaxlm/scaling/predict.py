"""What a fit says: N*, D*, L* at a budget, the law's value at its inputs, with intervals; what to run next.

Every number is computed once from the estimate and once from each bootstrap draw; an interval is the central
part of the draws. A run's loss scatters about the law by `fit.sigma` too: its prediction interval holds both.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy.special import ndtri

from jaxlm.errors import UserError, check, nearest
from jaxlm.scaling.design_checks import Found, found
from jaxlm.scaling.laws import features, get_law, to_coordinates
from jaxlm.scaling.lines import Refusal, percentiles
from jaxlm.scaling.record import Fit, flops_per_param_token
from jaxlm.scaling.uncertainty import tail_share

Array = np.ndarray
LINES = ("envelope", "parabola", "akima", "robust")
FAR = 100.0  # times the largest compute seen: two decades
NOISE = ndtri((np.arange(41) + 0.5) / 41)  # quantiles of the noise that each draw is spread by
GRID = 801  # values of log N where an optimum is searched


class Estimate(NamedTuple):
    """A number and its interval."""

    value: float
    lo: float
    hi: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What to train with `budget` FLOPs, and what to expect."""

    budget: float
    level: float
    N: Estimate  # parameters
    D: Estimate  # tokens
    L: Estimate  # loss of a run of N and D: prediction interval, noise of a run included
    L_law: Estimate  # the law's value there: the interval of the fit alone
    tokens_per_param: Estimate
    curve: list[dict]  # budget, N, D, L, tokens_per_param and, as name_lo and name_hi, their intervals
    draws: int  # that the intervals are from
    diagnostics: list[dict]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a law gives at its inputs."""

    at: dict[str, float]  # every input that the law reads
    target: str  # role of the column that was fitted: L, lr, batch, accuracy ...
    level: float
    value: Estimate  # of a run there: prediction interval, noise of a run included
    value_law: Estimate  # the law's value: the interval of the fit alone
    draws: int  # that the intervals are from
    diagnostics: list[dict]


def _table(fit: Fit) -> Float64[Array, "S P"]:
    """Parameters in the order of `fit.names`: the estimate in row 0, then the draws."""
    if len(fit.draws) < 20:
        text = f"the fit has {len(fit.draws)} bootstrap draws: no interval. Fit again with 100 or more"
        raise Refusal("no_interval", text)
    return np.array([[fit.parameters[name] for name in fit.names], *fit.draws], float)


def _coordinates(fit: Fit, table: Float64[Array, "S P"], x: Mapping[str, Array]) -> Float64[Array, "S P"]:
    """The law's coordinates of each row; parameters that were fixed are filled in."""
    law = get_law(fit.law)
    columns = {name: table[:, i] for i, name in enumerate(fit.names)}
    full = [columns.get(name, np.full(len(table), fit.parameters[name])) for name in law.names]
    return to_coordinates(law, np.stack(full, -1), x)


def surface(
    fit: Fit, N: Float64[Array, "M"], D: Float64[Array, "M"], **extra: float | Array
) -> Float64[Array, "S M"]:
    """The law at M runs: the estimate in row 0, then one row a draw.

    Args:
        fit: of a law of N and D.
        N: parameters.
        D: tokens.
        extra: further inputs of the law, one value or one for each run (U, sparsity, ...).

    Raises:
        Refusal: no_surface (an envelope or iso-FLOP fit), no_interval (no draws).
        UserError: an input of the law is missing.
    """
    inputs = {"N": N, "D": D, "C": flops_per_param_token(fit) * N * D}
    inputs |= {name: np.broadcast_to(np.asarray(v, float), N.shape) for name, v in extra.items()}
    return law_rows(fit, inputs)


def law_rows(fit: Fit, inputs: Mapping[str, Float64[Array, "M"]]) -> Float64[Array, "S M"]:
    """The law at M values of each of its inputs: the estimate in row 0, then one row a draw.

    Raises:
        Refusal: no_surface (an envelope or iso-FLOP fit), no_interval (no draws).
        UserError: an input of the law is missing.
    """
    if fit.method in LINES:
        text = f"method={fit.method!r} fits lines N*(C), D*(C), L*(C) and no L(N, D): "
        raise Refusal("no_surface", text + "ask it for a budget, or fit with method=surface")
    law, table = get_law(fit.law), _table(fit)
    missing = [name for name in law.inputs if name not in inputs]
    check(not missing, f"law={fit.law!r} needs {', '.join(missing)} too: {law.formula}")
    x = features({name: inputs[name] for name in law.inputs})
    return law.form(_coordinates(fit, table, x), x)[0]


def check_inputs(fit: Fit, given: Mapping[str, float], budget: bool = True) -> None:
    """`UserError` for an input that the law does not read, or of a value that it cannot take.

    With a budget N, D and C follow from it and are none.
    """
    beside = ("N", "D", "C") if budget else ()
    known = [] if fit.method in LINES else [n for n in get_law(fit.law).inputs if n not in beside]
    what = f"a fit of {fit.law} by {fit.method}"
    for name, value in given.items():
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no input besides the budget"
            if name in beside and fit.method not in LINES and name in get_law(fit.law).inputs:
                takes += "; its value at given N, D, C is asked for without a budget"
            raise UserError(f"{what} has no input {name!r}{nearest(name, known)}: it {takes}")
        good = (0 <= value < 1) if name == "sparsity" else (math.isfinite(value) and value > 0)
        check(good, f"{name}={value} is outside what {what} takes")


def optima(fit: Fit, budget: float, **extra: float) -> tuple[Float64[Array, "S"], Float64[Array, "S"]]:
    """log N* and log D* at a budget: the estimate in row 0, then the draws (NaN where there is no optimum).

    Lines give both. Surfaces give N* under C = k N D, with k of `record.flops_per_param_token`.
    """
    table = _table(fit)
    if fit.method in LINES:
        at = {name: table[:, i] for i, name in enumerate(fit.names)}
        x = math.log(budget)
        return at["log_kN"] + at["a"] * x, at["log_kD"] + at["b"] * x
    law = get_law(fit.law)
    product = math.log(budget / flops_per_param_token(fit))
    if law.compute == "closed":
        columns = {name: table[:, i] for i, name in enumerate(fit.names)}
        p = {name: columns.get(name, np.full(len(table), fit.parameters[name])) for name in law.names}
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            derived = law.derived(p)
            log_n = np.log(derived["G"]) + derived["a"] * product
    elif law.compute == "numeric":
        log_n = _search(fit, product, extra)
    else:
        text = f"law={fit.law!r} has no compute optimum: {law.formula}. Ask for its value at "
        raise Refusal("no_optimum", text + f"{', '.join(law.inputs)} (jaxlm predict --at)")
    return log_n, product - log_n


def _search(fit: Fit, product: float, extra: Mapping[str, float]) -> Float64[Array, "S"]:
    """log N of least loss at log N D = product, row by row: a grid, then the parabola of three neighbours."""
    # Far from all sizes some laws fall to nothing: the search stays within 100 times the sizes fitted, moved
    # by the compute that is beyond them.
    sizes, beyond = np.log(fit.points["N"]), product - np.log(np.multiply(fit.points["N"], fit.points["D"]))
    low = sizes.min() - math.log(FAR) + min(beyond.max(), 0.0)
    grid = np.linspace(low, sizes.max() + math.log(FAR) + max(beyond.min(), 0.0), GRID)
    for zoom in (True, False):
        loss = surface(fit, np.exp(grid), np.exp(product - grid), **extra)
        best = np.where(np.isfinite(loss), loss, np.inf).argmin(-1)
        edge = (best == 0) | (best == GRID - 1)
        inner = best[~edge]
        if not len(inner):
            return np.full(len(loss), np.nan)
        low, high = grid[max(inner.min() - 2, 0)], grid[min(inner.max() + 2, GRID - 1)]
        if not zoom or (high - low) * 2 > grid[-1] - grid[0]:
            break
        grid = np.linspace(low, high, GRID)
    at, rows = np.clip(best, 1, GRID - 2), np.arange(len(loss))
    left, here, right = loss[rows, at - 1], loss[rows, at], loss[rows, at + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = 0.5 * (left - right) / (left - 2 * here + right)
    return np.where(edge, np.nan, grid[at] + np.nan_to_num(shift) * (grid[1] - grid[0]))


def _loss_line(fit: Fit, budget: float) -> Float64[Array, "S"]:
    """L* of each row of a line fit."""
    at = dict(zip(fit.names, _table(fit).T, strict=True))
    check("c" in at, f"this {fit.method} fit has no L*(C)")
    return at.get("E_L", 0.0) + np.exp(at["log_kL"] - at["c"] * math.log(budget))


def tail_of(fit: Fit, level: float, *, noisy: bool = False) -> float:
    """The share of draws that an interval leaves out on either side; noisy: of those of `noisy`."""
    blocks = 0 if fit.method in LINES else fit.bootstrap.get("blocks", 0)
    return tail_share(level, blocks, 1.0 if noisy else fit.bootstrap.get("calibration", 1.0))


def central(value: float, draws: Float64[Array, "S"], tail: float) -> Estimate:
    """The central part of the draws, as the intervals in fit.json are."""
    return Estimate(float(value), *percentiles(draws, tail))


def calibrated(fit: Fit, rows: Float64[Array, "S ..."]) -> Float64[Array, "Z ..."]:
    """The law's draws at their calibrated spread about the estimate in row 0, see `uncertainty.calibrate`."""
    return rows[0] + fit.bootstrap.get("calibration", 1.0) * (rows[1:] - rows[0])


def noisy(fit: Fit, rows: Float64[Array, "S"]) -> Float64[Array, "Z"]:
    """Draws of a run's loss: the law's, at their calibrated spread about row 0, each spread by the noise."""
    return (calibrated(fit, rows)[:, None] * np.exp(fit.sigma * NOISE)).ravel()


def loss_interval(
    fit: Fit, N: Float64[Array, "M"], D: Float64[Array, "M"], level: float = 0.95, **extra: float | Array
) -> list[Estimate]:
    """Prediction interval of the loss of runs: the law's uncertainty and the scatter of a run about it.

    What a held-out run is judged by. Raises `Refusal` as `surface` does.
    """
    tail = tail_of(fit, level, noisy=True)
    values = surface(fit, np.atleast_1d(np.asarray(N, float)), np.atleast_1d(np.asarray(D, float)), **extra)
    return [central(column[0], noisy(fit, column), tail) for column in values.T]


def rows_at(fit: Fit, at: Mapping[str, float]) -> tuple[dict[str, float], Float64[Array, "S"]]:
    """Every input that the law reads, and the law there: the estimate in row 0, then the draws with a value.

    Args:
        fit: of a law, with bootstrap draws.
        at: a value for every input that the law reads; C may be left out where N and D are given (k N D).

    Raises:
        Refusal: no_surface, no_interval, as `law_rows` does; too few draws with a value there.
        UserError: an input is missing, out of range or not read.
    """
    check_inputs(fit, at, budget=False)
    at = dict(at)
    if {"N", "D"} <= set(at):
        at.setdefault("C", flops_per_param_token(fit) * at["N"] * at["D"])
    rows = law_rows(fit, {name: np.array([v], float) for name, v in at.items()})[:, 0]
    good = np.isfinite(rows)
    if not good[0] or good.sum() < 20:
        raise Refusal("no_interval", f"{int(good[1:].sum())} of {len(rows) - 1} draws have a value there")
    return at, rows[good]


def value_at(fit: Fit, at: Mapping[str, float], level: float = 0.95) -> Answer:
    """The law's value at given inputs: the loss of N and D, the best rate at C, the accuracy at L ...

    Arguments and errors are those of `rows_at`, and a level of the intervals.
    """
    check(0 < level < 1, f"level={level} must lie between 0 and 1")
    at, rows = rows_at(fit, at)
    law = get_law(fit.law)
    return Answer(
        {name: float(at[name]) for name in law.inputs},
        law.target,
        level,
        central(rows[0], noisy(fit, rows), tail_of(fit, level, noisy=True)),
        central(rows[0], rows[1:], tail_of(fit, level)),
        len(rows) - 1,
        outside(fit, at),
    )


def best_loss(fit: Fit, budget: float, **extra: float) -> Float64[Array, "S"]:
    """The loss of the run that one would train at a budget: the estimate in row 0, then the draws.

    Raises:
        Refusal: no_optimum, no_interval.
        UserError: as `predict` does.
    """
    check(math.isfinite(budget) and budget > 0, f"budget={budget} must be positive FLOPs")
    check_inputs(fit, extra)
    return _best(fit, budget, extra)[2]


def _best(fit: Fit, budget: float, extra: Mapping[str, float]) -> tuple[Array, Array, Array]:
    """log N*, log D* of the draws that have them, and the loss at the estimated ones: row 0 the estimate."""
    log_n, log_d = optima(fit, budget, **extra)
    good = np.isfinite(log_n) & np.isfinite(log_d)
    if not good[0] or good.sum() < 20:
        text = f"no interior optimum at C = {budget:.4g}: the loss falls to the edge of all sizes"
        raise Refusal("no_optimum", text)
    if fit.method in LINES:
        loss = _loss_line(fit, budget)
    else:  # of the run that one would train: at the estimated optimum
        loss = surface(fit, np.exp(log_n[:1]), np.exp(log_d[:1]), **extra)[:, 0]
    return log_n[good], log_d[good], loss[good & np.isfinite(loss)]


def _at(fit: Fit, budget: float, level: float, extra: Mapping[str, float]) -> tuple[dict[str, Estimate], int]:
    """All quantities at one budget, and the number of draws with an optimum."""
    log_n, log_d, loss = _best(fit, budget, extra)
    out, tail = {}, tail_of(fit, level)
    for name, rows in (("N", log_n), ("D", log_d), ("tokens_per_param", log_d - log_n)):
        out[name] = Estimate(*(math.exp(v) for v in central(rows[0], rows[1:], tail)))
    out["L_law"] = central(loss[0], loss[1:], tail)
    out["L"] = central(loss[0], noisy(fit, loss), tail_of(fit, level, noisy=True))
    return out, len(log_n) - 1


def predict(fit: Fit, budget: float, level: float = 0.95, **extra: float) -> Prediction:
    """N*, D*, L* and tokens per parameter at a budget, and their curve from the smallest compute seen to it.

    Args:
        fit: with bootstrap draws; of a law of N and D, or lines.
        budget: training FLOPs, counted as in the fit's column C.
        level: of the intervals.
        extra: further inputs of the law (U: unique tokens, sparsity, ...), one value each.

    Raises:
        Refusal: no_interval (too few draws), no_optimum (no interior one, or a law without).
        UserError: a budget or level out of range; an input of the law is missing, or given and not read.
    """
    check(math.isfinite(budget) and budget > 0, f"budget={budget} must be positive FLOPs")
    check(0 < level < 1, f"level={level} must lie between 0 and 1")
    check_inputs(fit, extra)
    here, draws = _at(fit, budget, level, extra)
    seen = np.asarray(fit.points["C"], float)
    curve, bare = [], []
    for c in np.geomspace(min(seen.min(), budget), max(seen.max(), budget), 25):
        try:
            estimates = _at(fit, float(c), level, extra)[0]
        except Refusal as error:
            if error.name != "no_optimum":
                raise
            bare.append(float(c))
            continue
        row = {"budget": float(c)}
        for name, estimate in estimates.items():
            row |= {name: estimate.value, f"{name}_lo": estimate.lo, f"{name}_hi": estimate.hi}
        curve.append(row)
    alarms = extrapolation(fit, budget, here["D"].value)
    if bare:
        text = f"{len(bare)} of 25 budgets of the curve ({bare[0]:.3g} to {bare[-1]:.3g} FLOPs) have no "
        text += "interior optimum and are left out of it"
        alarms += found("curve_without_optimum", "note", text, len(bare))
    lost = len(fit.draws) - draws
    if lost:
        text = f"{lost} of {len(fit.draws)} draws have no optimum at this budget and are not in the intervals"
        alarms += found("draws_without_optimum", "warning", text, lost)
    return Prediction(budget, level, curve=curve, draws=draws, diagnostics=alarms, **here)


def extrapolation(fit: Fit, budget: float, tokens: float = 0.0) -> Found:
    """How far a budget is beyond the runs, and whether its tokens are beyond the unique ones."""
    largest = float(np.max(fit.points["C"]))
    out: Found = []
    if budget > largest:
        ratio, far = budget / largest, budget > FAR * largest
        text = f"{budget:.4g} FLOPs are {ratio:.3g} times the largest compute that was fitted ({largest:.3g})"
        if far:
            text += (
                ": beyond two decades an interval says what the law allows, not whether the law still holds"
            )
        out += found("extrapolation", "warning" if far else "note", text, ratio)
    unique = fit.points.get("U")
    if unique is not None and tokens > np.max(unique) and fit.law != "data_constrained":
        text = f"D* = {tokens:.3g}, of {np.max(unique):.3g} unique tokens, and the law knows no repetition"
        out += found("multi_epoch", "warning", text, float(tokens / np.max(unique)))
    return out


def outside(fit: Fit, at: Mapping[str, float]) -> Found:
    """How far inputs are outside of the runs, and whether tokens are beyond the unique ones.

    A share (sparsity) and a loss outside are warned of at any distance: a sigmoid turns within a nat.
    """
    law, out = get_law(fit.law), []
    made = np.asarray(fit.points.get("row", ()), float)
    for name in law.inputs:
        if name == "C" or name not in fit.points:
            continue
        seen = np.asarray(fit.points[name], float)
        seen = seen[made >= 0] if len(made) == len(seen) else seen  # row -1: a point that no run made
        low, high, value = float(seen.min()), float(seen.max()), at[name]
        if low <= value <= high:
            continue
        text = f"{name} = {value:.4g} lies outside of what was fitted, {low:.4g} to {high:.4g}"
        if name in ("L", "sparsity"):
            out += found("extrapolation", "warning", text, value)
        else:
            ratio = max(value / high, low / value)
            out += found("extrapolation", "warning" if ratio > FAR else "note", text, ratio)
    if "C" in at and np.isfinite(fit.points.get("C", math.nan)).all():
        out += extrapolation(fit, at["C"], at.get("D", 0.0))
    return out


# --- What to run next ---


@dataclasses.dataclass(frozen=True)
class NextRun:
    """A run worth doing, given those above it in the list."""

    N: float
    D: float
    C: float
    sd_before: float  # standard deviation of log N* at the target
    sd_after: float
    reduction: float  # share of the variance that this run is expected to remove


def candidates(fit: Fit, most: float = 0.0, **extra: float) -> Float64[Array, "K 2"]:
    """(N, D) to choose from: three budgets up to `most` FLOPs (0: the largest fitted), 1/16 to 16 N*(C).

    `extra` are further inputs of the law, as `predict` takes them: N*(C) is the optimum there.
    """
    top = most or float(np.max(fit.points["C"]))
    out = []
    for c in top * np.array([0.1, 10**-0.5, 1.0]):
        log_n, log_d = optima(fit, float(c), **extra)
        for shift in np.log(2.0) * np.arange(-4, 5):
            out.append((math.exp(log_n[0] + shift), math.exp(log_d[0] - shift)))
    return np.array(out)


def next_runs(
    fit: Fit,
    budget: float,
    runs: Sequence[tuple[float, float]] | None = None,
    k: int = 3,
    **extra: float,
) -> list[NextRun]:
    """The k runs that are expected to cut Var[log N*(budget)] most, chosen one after the other.

    With u = log N*(budget) and v = log L(N, D) over the draws, measuring a run of noise sigma takes

        Cov(u, v)^2 / (Var v + sigma^2)

    off the variance of u: the Gauss-Newton information update, with the covariance of the bootstrap. Each
    chosen run then updates the covariance of all others. A candidate may be chosen again: that is another
    seed.

    Args:
        fit: of a surface, with draws.
        budget: target FLOPs.
        runs: (N, D) to choose from; default `candidates(fit)`, none dearer than the dearest run fitted.
        k: how many.
        extra: further inputs of the law (U: unique tokens, sparsity, ...), one value each: those of the
            target, and of the runs to choose from.

    Raises:
        Refusal: no_surface, no_interval, no_optimum; no_noise (sigma is 0: every run tells everything).
        UserError: an input of the law is missing, or given and not read.
    """
    check(k >= 1, f"k={k} must be at least 1")
    check_inputs(fit, extra)
    choice = candidates(fit, **extra) if runs is None else np.asarray(runs, float).reshape(-1, 2)
    check(len(choice) > 0 and bool((choice > 0).all()), "candidates must be pairs (N, D) of positive numbers")
    if not fit.sigma > 0:
        raise Refusal("no_noise", "the residuals are zero: there is no variance that a run could reduce")
    u = optima(fit, budget, **extra)[0][1:]
    v = np.log(surface(fit, choice[:, 0], choice[:, 1], **extra)[1:])
    good = np.isfinite(u) & np.isfinite(v).all(-1)
    rows = np.column_stack([u, v])[good]
    low, high = np.percentile(rows, [1, 99], axis=0)  # a few draws far out on a ridge are no second moment
    cov = np.cov(np.clip(rows, low, high), rowvar=False)
    out, per_flop = [], flops_per_param_token(fit)
    for _ in range(k):
        gain = cov[0, 1:] ** 2 / (np.diag(cov)[1:] + fit.sigma**2)
        best = int(gain.argmax())
        before, column = float(cov[0, 0]), cov[:, best + 1]
        cov = cov - np.outer(column, column) / (column[best + 1] + fit.sigma**2)
        n, d = (float(x) for x in choice[best])
        after = max(float(cov[0, 0]), 0.0)
        out.append(NextRun(n, d, per_flop * n * d, math.sqrt(before), math.sqrt(after), 1 - after / before))
    return out
