"""What a fit says about a budget, N*, D*, L*, tokens per parameter, with intervals; and what to run next.

Every number is computed once from the estimate and once from each bootstrap draw; an interval is the central
part of the draws. A run's loss scatters about the law by `fit.sigma` too: its prediction interval holds both.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy.special import ndtri

from jaxlm.errors import UserError, check, nearest
from jaxlm.scaling.design_checks import Found, found
from jaxlm.scaling.laws import features, get_law, to_coordinates
from jaxlm.scaling.lines import Refusal, percentiles
from jaxlm.scaling.record import Fit, flops_per_param_token, load_fit
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
    if fit.method in LINES:
        text = f"method={fit.method!r} fits lines N*(C), D*(C), L*(C) and no L(N, D); fit with method=surface"
        raise Refusal("no_surface", text)
    law, table = get_law(fit.law), _table(fit)
    inputs = {"N": N, "D": D, "C": flops_per_param_token(fit) * N * D}
    inputs |= {name: np.broadcast_to(np.asarray(v, float), N.shape) for name, v in extra.items()}
    missing = [name for name in law.inputs if name not in inputs]
    check(not missing, f"law={fit.law!r} needs {', '.join(missing)} too: {law.formula}")
    x = features({name: inputs[name] for name in law.inputs})
    return law.form(_coordinates(fit, table, x), x)[0]


def check_inputs(fit: Fit, given: Mapping[str, float]) -> None:
    """`UserError` for a further input that the law does not read, or of a value that it cannot take."""
    known = [] if fit.method in LINES else [n for n in get_law(fit.law).inputs if n not in ("N", "D", "C")]
    what = f"a fit of {fit.law} by {fit.method}"
    for name, value in given.items():
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no input besides the budget"
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
        raise Refusal("no_optimum", f"law={fit.law!r} has no compute optimum: {law.formula}")
    return log_n, product - log_n


def _search(fit: Fit, product: float, extra: Mapping[str, float]) -> Float64[Array, "S"]:
    """log N of least loss at log N D = product, row by row: a grid, then the parabola of three neighbours."""
    # Far from all sizes some laws fall to nothing: the search stays within 100 times the sizes fitted, moved
    # by the compute that is beyond them.
    sizes, beyond = np.log(fit.points["N"]), product - np.log(np.multiply(fit.points["N"], fit.points["D"]))
    low = max(sizes.min() - math.log(FAR) + min(beyond.max(), 0.0), 0.0)
    grid = np.linspace(low, min(sizes.max() + math.log(FAR) + max(beyond.min(), 0.0), product), GRID)
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
    """The share of draws that an interval leaves out on either side; noisy: of those of `_noisy`."""
    blocks = 0 if fit.method in LINES else fit.bootstrap.get("blocks", 0)
    return tail_share(level, blocks, 1.0 if noisy else fit.bootstrap.get("calibration", 1.0))


def _central(value: float, draws: Float64[Array, "S"], tail: float) -> Estimate:
    """The central part of the draws, as the intervals in fit.json are."""
    return Estimate(float(value), *percentiles(draws, tail))


def _noisy(fit: Fit, rows: Float64[Array, "S"]) -> Float64[Array, "Z"]:
    """Draws of a run's loss: the law's, at their calibrated spread about row 0, each spread by the noise."""
    law = rows[0] + fit.bootstrap.get("calibration", 1.0) * (rows[1:] - rows[0])
    return (law[:, None] * np.exp(fit.sigma * NOISE)).ravel()


def loss_interval(
    fit: Fit, N: Float64[Array, "M"], D: Float64[Array, "M"], level: float = 0.95, **extra: float | Array
) -> list[Estimate]:
    """Prediction interval of the loss of runs: the law's uncertainty and the scatter of a run about it.

    What a held-out run is judged by. Raises `Refusal` as `surface` does.
    """
    tail = tail_of(fit, level, noisy=True)
    values = surface(fit, np.atleast_1d(np.asarray(N, float)), np.atleast_1d(np.asarray(D, float)), **extra)
    return [_central(column[0], _noisy(fit, column), tail) for column in values.T]


def _at(fit: Fit, budget: float, level: float, extra: Mapping[str, float]) -> tuple[dict[str, Estimate], int]:
    """All quantities at one budget, and the number of draws with an optimum."""
    log_n, log_d = optima(fit, budget, **extra)
    good = np.isfinite(log_n) & np.isfinite(log_d)
    if not good[0] or good.sum() < 20:
        text = f"no interior optimum at C = {budget:.4g}: the loss falls to the edge of all sizes"
        raise Refusal("no_optimum", text)
    if fit.method in LINES:
        loss = _loss_line(fit, budget)
    else:  # of the run that one would train: at the estimated optimum
        loss = surface(fit, np.exp(log_n[:1]), np.exp(log_d[:1]), **extra)[:, 0]
    loss = loss[good & np.isfinite(loss)]
    log_n, log_d = log_n[good], log_d[good]
    out, tail = {}, tail_of(fit, level)
    for name, rows in (("N", log_n), ("D", log_d), ("tokens_per_param", log_d - log_n)):
        out[name] = Estimate(*(math.exp(v) for v in _central(rows[0], rows[1:], tail)))
    out["L_law"] = _central(loss[0], loss[1:], tail)
    out["L"] = _central(loss[0], _noisy(fit, loss), tail_of(fit, level, noisy=True))
    return out, int(good.sum()) - 1


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
        text = f"the budget is {ratio:.3g} times the largest compute that was fitted ({largest:.3g})"
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


# --- The command ---


def predict_command(
    path: str | Path,
    budgets: Sequence[float],
    *,
    at: Mapping[str, float] = {},
    next_count: int = 0,
    level: float = 0.95,
    as_json: bool = False,
) -> None:
    """`jaxlm predict`: prints what the fit in `path` says about budgets, as tables or as JSON.

    Args:
        path: fit.json, or the folder that holds it.
        budgets: training FLOPs, one answer each; JSON of several is a list.
        at: further inputs of the law, see `predict`.
        next_count: how many next runs to recommend for each budget: those that cut Var[log N*] there, at the
            inputs `at`, most.
        level: of the intervals.
        as_json: print JSON.

    Raises:
        UserError, Refusal: as `predict` and `next_runs` do, before anything is printed.
    """
    fit = load_fit(path)
    check_inputs(fit, at)
    results = [predict(fit, budget, level, **at) for budget in budgets]
    after = [next_runs(fit, budget, k=next_count, **at) if next_count else [] for budget in budgets]
    if as_json:
        records = [_record(result, runs) for result, runs in zip(results, after, strict=True)]
        print(json.dumps(records[0] if len(records) == 1 else records, indent=2))
        return
    for result, runs in zip(results, after, strict=True):
        _show(fit, result, runs, at)


def _record(result: Prediction, after: Sequence[NextRun]) -> dict:
    """A prediction as JSON holds it."""
    record = dataclasses.asdict(result)
    for name in ("N", "D", "L", "L_law", "tokens_per_param"):
        record[name] = getattr(result, name)._asdict()
    return record | {"next": [dataclasses.asdict(run) for run in after]}


def _show(fit: Fit, result: Prediction, after: Sequence[NextRun], at: Mapping[str, float]) -> None:
    """Prints a prediction as tables, with the fit's warnings and its own."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 110)
    budget, label = result.budget, f"{100 * result.level:g}%"
    where = "".join(f", {name} = {value:.4g}" for name, value in at.items())
    title = f"{fit.law} by {fit.method} at C = {budget:.4g} FLOPs{where}"
    table = Table(title=title, title_justify="left")
    for column in ("what", "value", f"{label} from", "to"):
        table.add_column(column, justify="left" if column == "what" else "right")
    rows = (
        ("N*, parameters", result.N, "{:.4g}"),
        ("D*, tokens", result.D, "{:.4g}"),
        ("tokens per parameter", result.tokens_per_param, "{:.4g}"),
        ("loss of the run, in the table's unit", result.L, "{:.5f}"),
        ("loss, the law alone", result.L_law, "{:.5f}"),
    )
    for name, estimate, form in rows:
        table.add_row(name, *(form.format(v) for v in estimate))
    console.print(table)
    steps = Table(title="tokens per parameter by compute", title_justify="left")
    for column in ("C", "N*", "D*", "D*/N*", f"{label} from", "to"):
        steps.add_column(column, justify="right")
    for row in result.curve[::4]:
        names = ("budget", "N", "D", "tokens_per_param", "tokens_per_param_lo", "tokens_per_param_hi")
        steps.add_row(*(f"{row[name]:.4g}" for name in names))
    console.print(steps)
    if after:
        title = f"runs that cut the variance of N* at C = {budget:.4g}{where} most"
        plan = Table(title=title, title_justify="left")
        for column in ("N", "D", "C", "sd of log N* before", "after", "variance removed"):
            plan.add_column(column, justify="right")
        for run in after:
            numbers = [f"{v:.4g}" for v in (run.N, run.D, run.C, run.sd_before, run.sd_after)]
            plan.add_row(*numbers, f"{run.reduction:.0%}")
        console.print(plan)
    for alarm in (*fit.diagnostics, *result.diagnostics):
        if alarm["level"] != "note" or alarm in result.diagnostics:
            console.print(
                f"{alarm['level']}: {alarm['name']}: {alarm['text']}", highlight=False, markup=False
            )
