"""Schedule-aware fits: one law for whole loss curves under any learning-rate schedule.

    L(s) = L0 + A S1(s)^-alpha - C S2(s)                                   Tissue et al., arXiv:2408.11029
    S1(s) = sum_{i <= s} eta_i                                             the area under the schedule
    S2(s) = sum_{i <= s} sum_{k <= i} (eta_{k-1} - eta_k) lambda^(i-k)     the annealing area

eta_i is the learning rate of update i = 1, 2, ... The first term is what any schedule gains by going on, the
second what it gains by letting the rate fall; a fall goes on paying for about 1 / (1 - lambda) updates. Two
runs (a constant rate, and one cooldown off it) identify all five numbers, and any other schedule is a
prediction: of its whole curve, with an interval.

The rise of a warm-up adds to S1 but is no annealing: differences of eta count from the end of the first rise.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from scipy.optimize import least_squares, nnls

from jaxlm.errors import UserError, check, check_choice
from jaxlm.scaling.curve_figures import late_range, rate_axis
from jaxlm.scaling.curves import Curve, areas, read_curve
from jaxlm.scaling.lines import percentiles
from jaxlm.scaling.page import write_text
from jaxlm.scaling.style import (
    COLOURS,
    GREY,
    LINES,
    count_text,
    handle,
    legend_below,
    loss_axis,
    new_figure,
    save_figure,
    span,
    styled,
)

NAMES = ("L0", "A", "alpha", "C", "lambda")
RESAMPLE = ("auto", "block", "run")
ALPHA = (1e-3, 4.0)  # bounds of alpha
LAMBDA = (0.0, 1.0 - 1e-7)  # bounds of lambda
STARTS = [(alpha, lam) for alpha in (0.2, 0.5, 1.0) for lam in (0.9, 0.99, 0.999, 0.9999)]


def curve_loss(parameters: Mapping[str, float], lr: Float64[np.ndarray, "T"]) -> Float64[np.ndarray, "T"]:
    """The law's loss after each update of a schedule."""
    s1, s2, _ = areas(np.asarray(lr, np.float64), parameters["lambda"])
    if s1[0] <= 0:
        raise UserError("the schedule starts with a learning rate of 0: the law has no loss there")
    return parameters["L0"] + parameters["A"] * s1 ** -parameters["alpha"] - parameters["C"] * s2


# --- Fitting ---


@dataclasses.dataclass(frozen=True)
class AnnealingFit:
    """A fitted annealing law; `annealing.json` holds exactly this."""

    parameters: dict[str, float]  # NAMES; C in nats per unit of S2
    intervals: dict[str, list[float]]  # percentiles of the draws
    draws: list[list[float]]  # in the order of NAMES
    level: float  # of the intervals
    resample: str  # 'block' | 'run'
    block: int  # rows of a block; 0 with 'run'
    failed: int  # draws that no law fits
    seed: int
    objective: str  # 'huber', of log losses
    delta: float
    value: float  # objective at the optimum, summed over rows
    sigma: float  # standard deviation of log L - log predicted
    fixed: dict[str, float]
    starts: list[dict[str, Any]]  # alpha, lambda, value, converged, gap
    curves: list[dict[str, Any]]  # name, updates, rows, reach, S1 and S2 at the end, rmse
    notes: list[str]

    def save(self, path: str | Path) -> Path:
        """Write as JSON, whole or not at all."""
        return write_text(path, json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n")


def load_annealing(path: str | Path) -> AnnealingFit:
    """Read what `AnnealingFit.save` wrote.

    Raises:
        UserError: not such a file.
    """
    try:
        return AnnealingFit(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a fitted annealing law ({error})") from error


class _Problem:
    """Residuals log L - log predicted of all curves and their gradient, in well-scaled coordinates.

    Coordinates: L0, log A - alpha m, alpha, C scaled, log(1 - lambda), with m the mean of log S1: without the
    shift A and alpha are one ridge.
    """

    def __init__(self, curves: Sequence[Curve], fixed: Mapping[str, float]) -> None:
        self.lr = [c.lr for c in curves]
        self.at = [c.step - 1 for c in curves]
        self.loss = np.concatenate([c.loss for c in curves])
        s1, s2, _ = self.areas(0.99)
        check(bool(np.all(s1 > 0)), "a curve's losses start while its learning rate is still 0: skip them")
        self.shift, self.log_s1 = float(np.mean(np.log(s1))), np.log(s1)
        self.unit = 1.0 / max(float(np.max(np.abs(s2))), 1e-300)  # of C: one nat at the largest S2
        self.fixed = fixed

    def areas(self, lam: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        parts = [[a[at] for a in areas(lr, lam)] for lr, at in zip(self.lr, self.at, strict=True)]
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def full(self, x: np.ndarray) -> dict[str, float]:
        """The law's parameters at coordinates x."""
        return {
            "L0": float(x[0]),
            "A": math.exp(x[1] + x[2] * self.shift),
            "alpha": float(x[2]),
            "C": float(x[3]) * self.unit,
            "lambda": -math.expm1(x[4]),
        }

    def coordinates(self, p: Mapping[str, float]) -> np.ndarray:
        log_a = math.log(max(p["A"], 1e-300)) - p["alpha"] * self.shift
        return np.array([p["L0"], log_a, p["alpha"], p["C"] / self.unit, math.log1p(-p["lambda"])])

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Losses and their gradient (rows, 5)."""
        lam = -math.expm1(x[4])
        _, s2, slope = self.areas(lam)
        power = np.exp(x[1] - x[2] * (self.log_s1 - self.shift))
        c = x[3] * self.unit
        columns = (
            np.ones_like(power),
            power,
            -power * (self.log_s1 - self.shift),
            -self.unit * s2,
            c * slope * math.exp(x[4]),  # d lambda = -exp(x4) d x4
        )
        return x[0] + power - c * s2, np.stack(columns, 1)

    def start(self, alpha: float, lam: float) -> np.ndarray:
        """The best L0, A, C >= 0 at this alpha and lambda: a linear problem."""
        power = np.exp(-alpha * (self.log_s1 - self.shift))
        # C >= 0 with S2 >= 0: the column is -S2, and its weight must not be negative.
        design = np.stack([np.ones_like(power), power, -self.areas(lam)[1] * self.unit], 1)
        (l0, a, c), _ = nnls(design / self.loss[:, None], np.ones_like(self.loss))
        return np.array([l0, math.log(max(a, 1e-6)), alpha, max(c, 1e-6), math.log1p(-lam)])

    def solve(self, x0: np.ndarray, delta: float) -> tuple[np.ndarray, float, bool]:
        """Coordinates, summed Huber objective, and whether the solver stopped at an optimum."""
        low = np.array([0.0, -40.0, ALPHA[0], 0.0, math.log1p(-LAMBDA[1])])
        high = np.array([self.loss.max(), 40.0, ALPHA[1], np.inf, math.log1p(-LAMBDA[0])])
        for name, value in self.fixed.items():
            i = NAMES.index(name)
            x0 = x0.copy()
            x0[i] = {"alpha": value, "L0": value, "lambda": math.log1p(-value)}[name]
        free = np.array([name not in self.fixed for name in NAMES])

        def place(y: np.ndarray) -> np.ndarray:
            x = x0.copy()
            x[free] = y
            return x

        def residuals(y: np.ndarray) -> np.ndarray:
            loss, _ = self.predict(place(y))
            return np.log(np.maximum(loss, 1e-9)) - np.log(self.loss)

        def gradient(y: np.ndarray) -> np.ndarray:
            loss, slope = self.predict(place(y))
            return (slope / np.maximum(loss, 1e-9)[:, None])[:, free]

        pad = 1e-9
        y0 = np.clip(x0[free], low[free] + pad, high[free] - pad)
        tight = dict(ftol=1e-15, xtol=1e-15, gtol=1e-15, x_scale="jac", max_nfev=400)
        found = least_squares(
            residuals, y0, gradient, bounds=(low[free], high[free]), loss="huber", f_scale=delta, **tight
        )
        return place(found.x), float(found.cost), found.status > 0


def fit_annealing(
    curves: Sequence[Curve],
    *,
    delta: float = 1e-3,
    fixed: Mapping[str, float] | None = None,
    draws: int = 200,
    resample: str = "auto",
    block: int = 0,
    seed: int = 0,
    level: float = 0.95,
) -> AnnealingFit:
    """Fit the annealing law to whole curves, all at once.

    min over L0, A, alpha, C, lambda of sum Huber_delta(log predicted - log L) over all rows of all curves,
    by trust-region least squares with analytic gradients from twelve starts in (alpha, lambda); L0, A and C
    start at their linear optimum.

    Args:
        curves: runs of one model, data and batch; at least one with a falling rate.
        delta: where the Huber loss of a log residual turns linear.
        fixed: values of `L0`, `alpha` or `lambda` that are not fitted, such as {"lambda": 0.999}.
        draws: bootstrap refits; 0 = no intervals.
        resample: what is drawn: `block` (blocks of neighbouring residuals, within each run: rows of a curve
            are not independent), `run` (whole runs), or `auto`: runs if there are five or more, else blocks.
        block: rows of a block; 0 = the cube root of all rows, and at least twice the window of the smoothing.
        seed: of the draws.
        level: of the intervals (percentiles).

    Raises:
        UserError: too few rows, no falling rate, an impossible option, or too few runs to resample.
    """
    fixed = dict(fixed or {})
    _check(curves, fixed, resample, level, draws)
    problem = _Problem(curves, fixed)
    solved = [problem.solve(problem.start(a, lam), delta) for a, lam in STARTS]
    best, value, _ = min(solved, key=lambda s: s[1])
    parameters = problem.full(best)
    history = [
        {"alpha": a, "lambda": lam, "value": v, "converged": ok, "gap": v - value}
        for (a, lam), (_, v, ok) in zip(STARTS, solved, strict=True)
    ]
    predicted, _ = problem.predict(best)
    residuals = np.log(problem.loss) - np.log(predicted)
    if resample == "auto":
        resample = "run" if len(curves) >= 5 else "block"
    if not block:
        block = max(round(len(problem.loss) ** (1 / 3)), *(4 * c.reach + 2 for c in curves))
    drawn, failed = _bootstrap(curves, problem, best, delta, draws, resample, block, seed)
    intervals = {}
    if len(drawn) > 1:
        intervals = {n: percentiles(drawn[:, i], (1 - level) / 2) for i, n in enumerate(NAMES)}
    return AnnealingFit(
        parameters=parameters,
        intervals=intervals,
        draws=drawn.tolist(),
        level=level,
        resample=resample,
        block=block if resample == "block" else 0,
        failed=failed,
        seed=seed,
        objective="huber",
        delta=delta,
        value=value,
        sigma=float(np.sqrt(np.sum(residuals**2) / max(len(residuals) - len(NAMES) + len(fixed), 1))),
        fixed=fixed,
        starts=history,
        curves=_summaries(curves, parameters),
        notes=_notes(curves, parameters, drawn, fixed),
    )


def _check(curves: Sequence[Curve], fixed: dict, resample: str, level: float, draws: int) -> None:
    check_choice(resample, RESAMPLE, "resample")
    for name in fixed:
        check_choice(name, ("L0", "alpha", "lambda"), "a fixed parameter")
    check(0 < level < 1, f"level={level} must lie between 0 and 1")
    check(draws >= 0, f"draws={draws} must not be negative")
    check(0 <= fixed.get("lambda", 0) <= LAMBDA[1], f"lambda={fixed.get('lambda')} must lie in [0, 1)")
    check(bool(curves), "no curves to fit")
    rows, need = sum(len(c.loss) for c in curves), 2 * (len(NAMES) - len(fixed))
    check(
        rows >= need,
        f"{rows} losses in all; {len(NAMES) - len(fixed)} free parameters need at least {need}",
    )
    falling = [c for c in curves if areas(c.lr, 0.0)[1][c.step - 1].any()]
    check(
        bool(falling),
        "the learning rate falls in none of the curves "
        f"({', '.join(repr(c.name) for c in curves)}): C and lambda need a run with a cooldown",
    )
    if resample == "run":
        check(len(curves) >= 3, f"{len(curves)} runs are too few to resample; use resample='block'")


def _bootstrap(
    curves: Sequence[Curve],
    problem: _Problem,
    best: np.ndarray,
    delta: float,
    draws: int,
    resample: str,
    block: int,
    seed: int,
) -> tuple[np.ndarray, int]:
    """Refits from the optimum: (draws that worked, 5), and how many did not."""
    rng = np.random.default_rng(seed)
    done, failed = [], 0
    predicted, _ = problem.predict(best)
    residuals = np.log(problem.loss) - np.log(predicted)
    ends = np.cumsum([len(c.loss) for c in curves])[:-1]
    pieces = np.split(residuals, ends)
    truth = problem.full(best)
    for _ in range(draws):
        if resample == "run":
            chosen = [curves[i] for i in rng.integers(len(curves), size=len(curves))]
            if not any(areas(c.lr, 0.0)[1][c.step - 1].any() for c in chosen):
                failed += 1  # no falling rate among them: C and lambda are not identified
                continue
            again = _Problem(chosen, problem.fixed)
        else:
            again = _Problem(curves, problem.fixed)
            again.loss = predicted * np.exp(np.concatenate([_blocks(r, block, rng) for r in pieces]))
        x, _, ok = again.solve(again.coordinates(truth), delta)
        if ok:
            found = again.full(x)
            done.append([found[name] for name in NAMES])
        else:
            failed += 1
    return np.asarray(done, np.float64).reshape(-1, len(NAMES)), failed


def _blocks(residuals: np.ndarray, block: int, rng: np.random.Generator) -> np.ndarray:
    """As many residuals, drawn in blocks of neighbours; the end joins the start."""
    n = len(residuals)
    first = rng.integers(n, size=-(-n // block))
    return residuals[((first[:, None] + np.arange(block)) % n).ravel()[:n]]


def _summaries(curves: Sequence[Curve], parameters: dict[str, float]) -> list[dict[str, Any]]:
    out = []
    for c in curves:
        s1, s2, _ = areas(c.lr, parameters["lambda"])
        error = curve_loss(parameters, c.lr)[c.step - 1] - c.loss
        out.append(
            {
                "name": c.name,
                "updates": len(c.lr),
                "rows": len(c.loss),
                "reach": c.reach,
                "S1": float(s1[-1]),
                "S2": float(s2[-1]),
                "rmse": float(np.sqrt(np.mean(error**2))),
            }
        )
    return out


def _notes(curves: Sequence[Curve], p: dict, drawn: np.ndarray, fixed: dict) -> list[str]:
    """What a reader should know before believing the numbers."""
    out = []
    falling = sum(bool(areas(c.lr, 0.0)[1][c.step - 1].any()) for c in curves)
    if falling == 1:
        out.append("one curve has a falling rate: C and lambda rest on it alone")
    if p["L0"] < 1e-6 and "L0" not in fixed:
        out.append("L0 is at its bound of 0: the floor is not identified by these curves")
    if "alpha" not in fixed and not ALPHA[0] * 1.01 < p["alpha"] < ALPHA[1] * 0.99:
        out.append(f"alpha is at its bound {p['alpha']:.3g}")
    if "lambda" not in fixed:
        reach, longest = 1 / (1 - p["lambda"]), max(len(c.lr) for c in curves)
        if reach > longest:
            out.append(f"1 / (1 - lambda) = {reach:.3g} updates, more than the longest run's {longest}")
    gains = [d[3] * max(areas(c.lr, d[4])[1].max() for c in curves) for d in drawn]
    if p["C"] <= 0 or (len(gains) > 1 and np.mean(gains) < 2 * np.std(gains)):
        out.append("C is not told from 0: these curves show no gain from annealing")
    return out


def predict_curve(
    fit: AnnealingFit, lr: Float64[np.ndarray, "T"]
) -> tuple[Float64[np.ndarray, "T"], Float64[np.ndarray, "T"], Float64[np.ndarray, "T"]]:
    """Loss after each update of a schedule, and its interval at `fit.level`: draws and residual noise.

    Raises:
        UserError: the fit has no draws.
    """
    check(len(fit.draws) > 1, "this fit has no bootstrap draws: no interval can be given")
    centre = curve_loss(fit.parameters, lr)
    spread = np.log(np.stack([curve_loss(dict(zip(NAMES, d, strict=True)), lr) for d in fit.draws]))
    noise = np.random.default_rng(fit.seed).normal(0.0, fit.sigma, (len(fit.draws), 1))
    tails = [50 * (1 - fit.level), 50 * (1 + fit.level)]
    low, high = np.exp(np.percentile(spread + noise, tails, axis=0, method="weibull"))
    return centre, low, high


# --- Picture and command ---


@styled
def annealing_figure(fit: AnnealingFit, curves: Sequence[Curve], predicted: Sequence[Curve] = ()) -> Any:
    """The annealing law on the curves that it was fitted to, and on schedules that it predicts; rates below.

    Args:
        fit: the law; with draws, the predictions carry a band.
        curves: fitted.
        predicted: measured curves of other schedules, which the fit has not seen.
    """
    figure, (upper, lower) = new_figure(6.2, 4.4, 2, 1, sharex=True, height_ratios=(4, 1))
    entries, last = [], max(len(c.lr) for c in [*curves, *predicted])
    shown = [*late_range([*curves, *predicted], 0.06 * last)]
    for i, curve in enumerate([*curves, *predicted]):
        colour, line = COLOURS[i % len(COLOURS)], LINES[i % len(LINES)]
        new, steps = i >= len(curves), np.arange(int(curve.step[0]), len(curve.lr) + 1)
        every = max(len(curve.step) // 250, 1)
        dots = dict(markersize=2, alpha=0.5, markeredgewidth=0)
        upper.plot(curve.step[::every], curve.loss[::every], "o", color=colour, **dots)
        centre = curve_loss(fit.parameters, curve.lr)
        if new and len(fit.draws) > 1:
            centre, low, high = predict_curve(fit, curve.lr)
            upper.fill_between(steps, low[steps - 1], high[steps - 1], color=colour, alpha=0.18, linewidth=0)
            shown += [low[steps - 1].min()]
        upper.plot(steps, centre[steps - 1], color=colour, linestyle=line, linewidth=1.3, zorder=4)
        lower.plot(np.arange(1, len(curve.lr) + 1), curve.lr, color=colour, linestyle=line, linewidth=1.1)
        entries.append(
            handle(f"{curve.name} ({'predicted' if new else 'fitted'})", color=colour, linestyle=line)
        )
    entries.append(handle("measured", marker="o", color=GREY, markersize=2.5))
    upper.set_xlim(0, last * 1.01)
    loss_axis(upper, *span(shown, pad=0.02))
    rate_axis(lower)
    lower.set_xlabel("update")
    lower.xaxis.set_major_formatter(lambda x, _: count_text(x) if x else "0")
    figure.align_ylabels((upper, lower))
    legend_below(figure, entries)
    return figure


def annealing_command(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    predict: Sequence[str | Path] = (),
    column: str = "train/nll",
    reach: int = 0,
    skip: int = 0,
    **options: Any,
) -> AnnealingFit:
    """Fit the annealing law to run directories, write `annealing.json` and its picture, print what it says.

    Args:
        runs: run directories to fit, trunks and branches among them.
        out: folder for the two files.
        predict: run directories whose whole curve is predicted from its schedule, and compared.
        column: see `read_curve`; also reach and skip.
        options: of `fit_annealing`.
    """
    from rich.console import Console
    from rich.table import Table

    curves, held = (
        [read_curve(r, column=column, reach=reach, skip=skip) for r in rs] for rs in (runs, predict)
    )
    fit = fit_annealing(curves, **options)
    out = Path(out)
    fit.save(out / "annealing.json")
    save_figure(annealing_figure(fit, curves, held), out / "annealing.png")
    console = Console()
    table = Table("parameter", "value", f"{100 * fit.level:g}% interval", title="L = L0 + A S1^-alpha - C S2")
    for name in NAMES:
        low, high = fit.intervals.get(name, (None, None))
        how = "fixed" if name in fit.fixed else "" if low is None else f"{low:.6g} to {high:.6g}"
        table.add_row(name, f"{fit.parameters[name]:.8g}", how)
    console.print(table)
    for c in fit.curves:
        line = (
            f"fitted {c['name']}: {c['rows']} losses over {c['updates']} updates, rms error {c['rmse']:.4f}"
        )
        console.print(line, markup=False, highlight=False)
    for curve in held:
        end = int(curve.step[-1]) - 1
        centre = curve_loss(fit.parameters, curve.lr)
        error = np.sqrt(np.mean((centre[curve.step - 1] - curve.loss) ** 2))
        line = f"predicted {curve.name}: rms error {error:.4f}; at its end {centre[end]:.4f}"
        if len(fit.draws) > 1:
            _, low, high = predict_curve(fit, curve.lr)
            line += f" [{low[end]:.4f}, {high[end]:.4f}]"
        console.print(f"{line}, measured {curve.loss[-1]:.4f}", markup=False, highlight=False)
    for note in fit.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    console.print(
        f"wrote {out / 'annealing.json'} and {out / 'annealing.png'}", markup=False, highlight=False
    )
    return fit
