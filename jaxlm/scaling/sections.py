"""The sections of a report, each a function from the evidence to blocks: texts, tables and pictures."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from jaxlm.scaling import comparisons, figures
from jaxlm.scaling.backtest import LATEST, BackTest
from jaxlm.scaling.bands import describe, has_optimum, is_surface, points_of, typical_inputs
from jaxlm.scaling.comparisons import HeldOut, Row
from jaxlm.scaling.evidence import Evidence, Variant, by_compute, exponent, held_out, texts
from jaxlm.scaling.page import Block, Bullets, Grid, Heading, Picture, Text
from jaxlm.scaling.predict import predict
from jaxlm.scaling.record import Fit
from jaxlm.scaling.style import count_text, png
from jaxlm.scaling.vertices import find_budgets, size_labels

CAPTIONS = {
    "isoflop": (
        "Iso-FLOP curves of the fit {lines!r}: at every budget the loss has a minimum (star) at an "
        "interior size. A star at the end of its curve would be no minimum."
    ),
    "isoflop-surface": (
        "The same runs with the main fit's surface along each budget: where a curve misses its "
        "points, the law does not fit."
    ),
    "optimum": (
        "Compute-optimal size and tokens. Bands: intervals; markers: minima of single budgets; grey: "
        "beyond the runs that were fitted."
    ),
    "tokens-per-parameter": "Tokens per parameter at the optimum; level only where exponents a and b agree.",
    "surface": (
        "The fitted surface. The frontier joins the points of least loss for their compute; away from "
        "the runs the contours are extrapolated."
    ),
    "envelope": "Loss against compute, a curve per size, and the fitted lowest loss with its band.",
    "residuals": (
        "Residuals of the main fit. Left: no trend with compute is left if the law is right. Right: "
        "points outside the shaded region mean heavier tails, or lighter ones, than a normal's."
    ),
    "calibration": (
        "Calibration: the share of runs inside intervals of each level. Below the diagonal the "
        "intervals are too narrow."
    ),
    "profiles": (
        "Profile of each parameter, all others refitted. A flat valley is a number that the runs do "
        "not identify."
    ),
    "exponent-by-fit": "Exponent a by fit. Shaded: the main fit's interval; methods that miss it disagree.",
    "holdout": (
        "Runs that the fit has not seen. Left: against compute, with the predicted lowest loss. "
        "Right: the error of each, on its {level} prediction interval (the law's uncertainty and a "
        "run's noise)."
    ),
    "choices": "Exponent a of N*(C) under each choice. Shaded: the main fit's interval.",
    "loss-curves": (
        "Training loss (mean of five logged steps) of the runs, coloured by size; dots mark their ends."
    ),
    "trunks": (
        "Trunks at constant learning rate and the cooldowns that branch off them: each dot is a run "
        "of its own length."
    ),
}
SHOWN = (  # columns of our own tables
    "id plan role status exclude flags budget n_total n_non_embedding tokens flops_exact epochs lr seed loss "
    "loss_se seconds detail"
)


@dataclasses.dataclass(frozen=True)
class Test:
    """How one fit did on the runs that it had not seen."""

    label: str
    runs: list[HeldOut]
    leaks: list[Any]
    why_not: str


def all_tests(evidence: Evidence) -> list[Test]:
    out = []
    for label, fit in evidence.fits.items():
        if "C" in fit.points and has_optimum(fit) and not evidence.stale(fit):
            out.append(Test(label, *held_out(evidence, fit)))
    return out


def main_test(tests: Sequence[Test]) -> tuple[list[HeldOut], str]:
    if not tests:
        return [], "there is no fit that could be tested"
    return tests[0].runs, tests[0].why_not


def with_interval(value: float, interval: Sequence[float] | None, digits: int = 4) -> str:
    if interval is None:
        return f"{value:.{digits}g}, no interval"
    return f"{value:.{digits}g} [{interval[0]:.{digits}g}, {interval[1]:.{digits}g}]"


# --- Grid ---


def grid(evidence: Evidence) -> list[Block]:
    out: list[Block] = [Heading("Grid")]
    table = evidence.table
    if not evidence.plans:
        out.append(Text("There is no plan.json: what was planned is not known."))
    else:
        status = dict(zip(texts(table, "id"), texts(table, "status"), strict=True)) if table else {}
        rows = []
        for name, plan in evidence.plans.items():
            own = plan["cells"]
            roles = dict.fromkeys(str(c.get("role", "")) for c in own)
            done = sum(status.get(str(c.get("id"))) == "finished" for c in own)
            flops = sum(float(c.get("flops") or 0) for c in own)
            off = [abs(c["flops"] / c["budget"] - 1) for c in own if c.get("budget") and c.get("flops")]
            rows.append(
                (
                    name,
                    ", ".join(roles),
                    str(len(own)),
                    str(done),
                    f"{flops:.3g}",
                    f"{100 * max(off):.2f}%" if off else "n/a",
                    str(plan.get("hash", ""))[:12],
                )
            )
        header = ("plan", "roles", "cells", "finished", "training FLOPs", "largest budget error", "hash")
        out.append(Grid(header, rows))
    if table is None:
        return [*out, Text("There is no table.csv: the runs are not known.")]
    summary = _budget_table(evidence)
    if summary:
        out.append(summary)
    shown = [n for n in SHOWN.split() if n in table.columns]
    shown = shown if "id" in shown else list(table.columns)[:12]  # a foreign table
    rows = list(zip(*(texts(table, n) for n in shown), strict=True))
    return [*out, Grid(shown, rows, folded=f"All {len(table)} runs")]


def _budget_table(evidence: Evidence) -> Grid | None:
    """The fitted runs by budget."""
    if evidence.main is None or not {"N", "D", "C", "L"} <= evidence.main.points.keys():
        return None
    points = points_of(evidence.main)
    budgets, how = find_budgets(points)
    rows = []
    for budget in budgets:
        n, d, loss = (v[budget.index] for v in (points.N, points.D, points.L))
        best = int(np.argmin(loss))
        sizes = int(size_labels(n).max()) + 1
        rows.append(
            (
                f"{budget.flops:.3g}",
                str(len(n)),
                str(sizes),
                f"{count_text(n.min())} to {count_text(n.max())}",
                f"{count_text(d.min())} to {count_text(d.max())}",
                f"{loss[best]:.4f}",
                count_text(n[best]),
                f"{d[best] / n[best]:.3g}",
            )
        )
    if not rows:
        return None
    header = ("C, FLOPs", "runs", "sizes", "N", "D", "lowest loss", "at N", "D/N there")
    return Grid(header, rows, f"Runs of the main fit by budget; budgets from {how}.")


# --- Fits ---


def fits(evidence: Evidence) -> list[Block]:
    out: list[Block] = [Heading("Fits side by side")]
    if not evidence.fits:
        return [*out, Text("There is no fit in fits/.")]
    rows = []
    for label, fit in evidence.fits.items():
        a, b = (exponent(fit, name) for name in "ab")
        sigma = f"{100 * fit.sigma:.3g}%" if fit.sigma else "n/a"
        alarms = sum(d["level"] != "note" for d in fit.diagnostics)
        rows.append(
            (
                label,
                describe(fit),
                str(len(next(iter(fit.points.values()), []))),
                with_interval(*a) if a else "n/a",
                with_interval(*b) if b else "n/a",
                sigma,
                str(alarms),
            )
        )
    header = ("fit", "method", "runs", "a", "b", "residual sd", "warnings")
    out.append(
        Grid(header, rows, "a and b: exponents of N* and D* in C, with their intervals. First: the main fit.")
    )
    if len(evidence.fits) == 1:
        out.append(Text("There is one fit only, so that no second method checks it (pitfall 7)."))
    else:
        rows = [Row(label, *exponent(fit)) for label, fit in evidence.fits.items() if exponent(fit)]
        if len(rows) > 1:
            figure = comparisons.forest(rows, r"exponent $a$ of $N^{\!*}(C)$")
            out.append(Picture("exponent-by-fit", png(figure), CAPTIONS["exponent-by-fit"]))
    for label, fit in evidence.fits.items():
        out.append(_parameters(label, fit))
    return out


def _parameters(label: str, fit: Fit) -> Grid:
    kinds = [
        k
        for k in ("bootstrap", "profile", "sandwich", "gauss_newton")
        if any(k in i for i in fit.intervals.values())
    ]
    fixed = fit.settings.get("fixed") or {}
    rows = []
    for name, value in {**fit.parameters, **fit.derived}.items():
        cells_ = []
        for kind in kinds:
            found = fit.intervals.get(name, {}).get(kind)
            cells_.append(f"{_end(found[0])} to {_end(found[1])}" if found else "")
        rows.append((name + (" (fixed)" if name in fixed else ""), f"{value:.8g}", *cells_))
    return Grid(
        ("parameter", "value", *kinds),
        rows,
        f"{label}: intervals at {100 * fit.level:g}%.",
        folded=f"Parameters of {label}",
    )


def _end(x: float | None) -> str:
    return "open" if x is None else f"{x:.5g}"


# --- Pictures of the fits ---


def pictures(evidence: Evidence, tests: Sequence[Test]) -> list[Block]:
    fit = evidence.main
    if fit is None or not {"N", "D", "C", "L"} <= fit.points.keys():
        return []
    out: list[Block] = [Heading("What the runs show")]
    able = {label: f for label, f in evidence.fits.items() if has_optimum(f) and "C" in f.points}
    lines = next(((k, f) for k, f in able.items() if f.method in ("parabola", "robust", "akima")), None)
    target = max((run.C for run in main_test(tests)[0]), default=0.0)

    def add(name: str, draw: Callable[[], Any], **words: str) -> None:
        try:
            out.append(Picture(name, png(draw()), CAPTIONS[name].format(**words)))
        except UserError as error:
            out.append(Text(f"No picture {name!r}: {error}."))

    if lines:
        add("isoflop", lambda: figures.isoflop(lines[1]), lines=lines[0])
    if is_surface(fit):
        add("isoflop-surface", lambda: figures.isoflop(fit))
    if able:
        add("optimum", lambda: figures.optimum_lines(able, target))
        add("tokens-per-parameter", lambda: figures.tokens_per_parameter(able, target))
    if is_surface(fit):
        add("surface", lambda: figures.surface(fit))
    if np.bincount(size_labels(points_of(fit).N)).max() > 1:
        chosen = next((f for f in able.values() if f.method == "envelope"), fit)
        add("envelope", lambda: figures.envelope(chosen))
    if fit.residuals and fit.sigma > 0:
        add("residuals", lambda: figures.residuals(fit))
        add("calibration", lambda: comparisons.calibration(fit, main_test(tests)[0]))
    if fit.profile:
        add("profiles", lambda: figures.profiles(fit))
    else:
        out.append(Text("The main fit has no profiles: a flat ridge would not be seen (pitfall 6)."))
    return out


# --- Hold-out ---


def holdout(evidence: Evidence, tests: Sequence[Test]) -> list[Block]:
    out: list[Block] = [Heading("Predicted against measured")]
    runs, why = main_test(tests)
    fit = evidence.main
    if not runs:
        text = f"Nothing was withheld by compute: {why}. Until a larger run has been predicted and then "
        return [*out, Text(text + "measured, the law is a description of the runs that made it.")]
    text = CAPTIONS["holdout"].format(level=f"{100 * fit.level:g}%")
    out.append(Picture("holdout", png(comparisons.holdout(fit, runs)), text))
    rows = [
        (
            run.name,
            count_text(run.N),
            count_text(run.D),
            f"{run.C:.3g}",
            f"{run.predicted:.4f}",
            f"{run.low:.4f} to {run.high:.4f}",
            f"{run.measured:.4f}",
            f"{100 * run.error:+.2f}%",
            "PASS" if run.inside else "FAIL",
        )
        for run in runs
    ]
    header = ("run", "N", "D", "C", "predicted", "interval", "measured", "error", "inside")
    out.append(Grid(header, rows, f"Main fit; the largest compute fitted is {max(fit.points['C']):.3g}."))
    out += _measured_optimum(fit, runs)
    rows = []
    for test in tests:
        if test.runs:
            errors = 100 * np.array([run.error for run in test.runs])
            inside = f"{sum(run.inside for run in test.runs)} of {len(test.runs)}"
            rows.append(
                (
                    test.label,
                    inside,
                    f"{np.abs(errors).mean():.2f}%",
                    f"{errors.mean():+.2f}%",
                    f"{errors[np.abs(errors).argmax()]:+.2f}%",
                )
            )
        else:
            rows.append((test.label, test.why_not, "", "", ""))
    out.append(
        Grid(
            ("fit", "inside", "mean |error|", "bias", "worst"),
            rows,
            "All fits. Line methods predict the lowest loss of a budget: only its best run counts.",
        )
    )
    return out


def backtest(tests: Sequence[BackTest], why: str) -> list[Block]:
    out: list[Block] = [Heading("Back-test")]
    text = (
        "Each fit again without its largest budgets, against the runs of the next one: how far a step of "
        "extrapolation was off among the runs that are there. An error that keeps its sign is a bias, and "
        "the next step has it too. A method may be chosen by this table; by the hold-out it may not. "
        f"Of more than {LATEST} budgets the largest {LATEST} are predicted."
    )
    if not tests:
        return [*out, Text(f"No back-test: {why}.")]
    rows = []
    for test in tests:
        start = (test.label, f"{test.budget:.3g}", f"{test.beyond:.2g}x", str(test.fitted))
        if not test.runs:
            rows.append((*start, test.text, "", ""))
            continue
        worst = max((run.error for run in test.runs), key=abs)
        ends = (f"{100 * np.expm1(test.error):+.2f}%", f"{100 * worst:+.2f}%")
        rows.append((*start, f"{test.inside} of {len(test.runs)}", *ends))
    header = ("fit", "predicted budget", "beyond the fitted", "runs fitted", "inside", "mean error", "worst")
    note = "Errors: measured / predicted - 1. Line methods predict the lowest loss of a budget alone."
    return [*out, Text(text), Grid(header, rows, note)]


def _measured_optimum(fit: Fit, runs: Sequence[HeldOut]) -> list[Block]:
    """Where the held-out runs of one budget are best, against the predicted N*."""
    items = []
    for group in by_compute([run.C for run in runs]):
        chosen = sorted((runs[i] for i in group), key=lambda run: run.N)
        if len(chosen) < 2:
            continue
        compute = float(np.exp(np.mean([np.log(run.C) for run in chosen])))
        best = min(chosen, key=lambda run: run.measured)
        n = predict(fit, compute, fit.level, **typical_inputs(fit)).N
        edge = " (at the edge of the sizes tried)" if best in (chosen[0], chosen[-1]) else ""
        text = (
            f"the lowest of {len(chosen)} measured losses is at N = {count_text(best.N)}{edge}; predicted "
            f"N* = {count_text(n.value)} [{count_text(n.lo)}, {count_text(n.hi)}]."
        )
        items.append((f"C = {compute:.3g}:", text))
    return [Bullets(items)] if items else []


# --- What choices do ---


def choices(evidence: Evidence, changed: Sequence[Variant]) -> list[Block]:
    out: list[Block] = [Heading("What the choices do")]
    if not changed:
        return [*out, Text("No refits: they need a table.csv that is the one the main fit was made from.")]
    text = (
        "The main fit again with one thing changed, on the same runs, with fewer bootstrap draws. What moves "
        "by more than its interval is a result of the choice and not of the runs (pitfalls 4, 5 and 8, and "
        "the counting of parameters and FLOPs)."
    )
    out.append(Text(text))
    main = evidence.main
    rows = [Row("main fit", *exponent(main), "main")] if exponent(main) else []
    rows += [Row(v.label, *exponent(v.fit), v.group) for v in changed if v.fit and exponent(v.fit)]
    if len(rows) > 1:
        out.append(
            Picture(
                "choices", png(comparisons.forest(rows, r"exponent $a$ of $N^{\!*}(C)$")), CAPTIONS["choices"]
            )
        )
    table = []
    for v in changed:
        if v.fit is None:
            table.append((v.group, v.label, v.text, "", "", ""))
            continue
        a, b = exponent(v.fit), exponent(v.fit, "b")
        floor = v.fit.parameters.get("E")
        table.append(
            (
                v.group,
                v.label,
                with_interval(*a) if a else "n/a",
                with_interval(*b) if b else "n/a",
                f"{floor:.4g}" if floor is not None else "n/a",
                f"{100 * v.fit.sigma:.3g}%",
            )
        )
    out.append(Grid(("changed", "to", "a", "b", "E", "residual sd"), table))
    return out
