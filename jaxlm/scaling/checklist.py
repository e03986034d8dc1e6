"""What a paper that reports a scaling law should say, filled in from the files; else 'not stated'.

The items are those of the (Mis)Fitting checklist (of 50 papers 45 fitted a power law, and most left several
out) and of pitfall 15: units, seeds, evaluation.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.scaling.bands import is_surface
from jaxlm.scaling.comparisons import HeldOut
from jaxlm.scaling.evidence import Evidence, cells, number_text, texts
from jaxlm.scaling.laws import get_law
from jaxlm.scaling.page import Grid
from jaxlm.scaling.predict import LINES
from jaxlm.scaling.record import Fit, calibrated
from jaxlm.scaling.style import count_text

MISSING = "not stated"
FORMS = {
    "envelope": "N* and D* = k C^a along the lower envelope of the sizes' loss curves, L* = E + k C^-c",
    "parabola": "a parabola of the loss in log N at each budget; N* and D* = k C^a, L* = E + k C^-c",
    "akima": "an Akima spline of the loss in log N at each budget; N* and D* = k C^a, L* = E + k C^-c",
    "robust": "a robust parabola of the loss in log N at each budget; N* and D* = k C^a, L* = E + k C^-c",
}
COUNTS = {
    "n_total": "all parameters",
    "n_non_embedding": "without embeddings and head",
    "n_active": "parameters that one token uses",
    "n_products": "weights that one token is multiplied with, head once",
    "flops_exact": "exact training FLOPs: 3 x (2 x product weights + causal attention)",
    "flops_6nd": "6 x product weights x tokens",
    "flops_kaplan": "6 x body weights x tokens",
    "tokens": "training tokens",
    "loss": "final evaluation loss, nats per token",
}


def checklist(evidence: Evidence, runs: Sequence[HeldOut], why_not: str) -> Grid:
    """The checklist of the main fit.

    Args:
        evidence: what the sweep holds.
        runs: that test the main fit.
        why_not: why there are none.
    """
    fit = evidence.main
    rows = _of_fit(fit, runs, why_not) if fit else [("form of the law", MISSING)]
    rows += _of_runs(evidence)
    return Grid(("item", "answer"), [(item, answer or MISSING) for item, answer in rows])


def _of_fit(fit: Fit, runs: Sequence[HeldOut], why_not: str) -> list[tuple[str, str]]:
    columns, settings, data = fit.data.get("columns") or {}, fit.settings, fit.data
    ranges = "; ".join(
        f"{name} {count_text(min(fit.points[name]))} to {count_text(max(fit.points[name]))}"
        for name in ("N", "D")
        if name in fit.points
    )
    if "C" in fit.points:
        ranges += f"; C {min(fit.points['C']):.3g} to {max(fit.points['C']):.3g} FLOPs"
    form = FORMS[fit.method] if fit.method in LINES else get_law(fit.law).formula
    level = f"{100 * fit.level:g}%"
    kinds = sorted({kind for found in fit.intervals.values() for kind in found})
    asked, failed = fit.bootstrap.get("asked", len(fit.draws)), fit.bootstrap.get("failed", 0)
    boot = (
        f"{fit.bootstrap.get('kind', '')} bootstrap, {asked} draws of which {failed} failed{calibrated(fit)}"
        if fit.draws
        else ""
    )
    errors = [100 * run.error for run in runs]
    out = [
        ("form of the law", form),
        ("parameters fixed or tied", _plain(settings, "fixed", "ties", "bounds") or "none"),
        *((f"what {role} counts", _counted(columns.get(role))) for role in ("N", "D", "C", "loss")),
        ("notes on the columns", "; ".join(fit.notes) or "none"),
        ("data range", ranges),
        ("runs fitted", f"{len(next(iter(fit.points.values()), []))} of {data.get('rows', MISSING)} rows"),
        ("runs excluded, and why", _excluded(fit)),
        ("objective", f"{fit.objective}{f', delta {fit.delta:g}' if fit.objective == 'huber' else ''}"),
        (
            "weights",
            "1 / sigma^2 from a column" if "sigma" in fit.points else "none: every run counts the same",
        ),
        (
            "optimiser",
            str(settings.get("optimiser") or settings.get("optimizer") or settings.get("solver") or ""),
        ),
        ("tolerances", _matching(settings, "tol")),
        ("initialisation", _starts(fit)),
        (
            "intervals",
            ", ".join([*([boot] if boot else []), *(k for k in kinds if k != "bootstrap")]) + f" at {level}",
        ),
    ]
    if is_surface(fit):
        out.append(("residual standard deviation of log L", f"{fit.sigma:.4g}"))
    if runs:
        inside = sum(run.inside for run in runs)
        mean = float(np.mean(np.abs(errors)))
        text = f"{len(runs)} runs, mean |error| {mean:.2f}%, bias {np.mean(errors):+.2f}%, "
        text += f"{inside} inside {level}"
        reach = max(r.C for r in runs) / max(fit.points["C"])
        out.append(("hold-out by compute", f"{text}, up to {reach:.3g} times the largest compute fitted"))
    else:
        out.append(("hold-out by compute", f"none: {why_not}"))
    return out


def _counted(name: str | None) -> str:
    if name is None:
        return ""
    return f"column {name}" + (f": {COUNTS[name]}" if name in COUNTS else "")


def _excluded(fit: Fit) -> str:
    rules: dict[str, int] = {}
    for e in fit.excluded:
        rules[e["rule"]] = rules.get(e["rule"], 0) + 1
    return ", ".join(f"{count} by {rule!r}" for rule, count in rules.items()) or "none"


def _starts(fit: Fit) -> str:
    if not fit.starts:
        return "closed form: no start" if fit.method in LINES else ""
    good = sum(bool(s.get("converged")) for s in fit.starts)
    gap = max((s["gap"] for s in fit.starts if s.get("converged") and s.get("gap") is not None), default=None)
    text = f"{len(fit.starts)} starts, {good} converged"
    return text + (f", the worst of them {gap:.2g} above the best" if gap is not None else "")


def _plain(settings: dict[str, Any], *names: str) -> str:
    return "; ".join(f"{name}: {settings[name]}" for name in names if settings.get(name))


def _matching(settings: dict[str, Any], part: str) -> str:
    return "; ".join(f"{name} {value}" for name, value in settings.items() if part in name.lower())


def _of_runs(evidence: Evidence) -> list[tuple[str, str]]:
    """What the table and the plans say about how the runs were made."""
    table = evidence.table
    if table is None:
        return [("how the runs were made", "")]

    def told(name: str, most: int = 6) -> str:
        values = list(dict.fromkeys(x for x in texts(table, name) if x))
        return ", ".join(values[:most]) + (f" and {len(values) - most} more" if len(values) > most else "")

    tokenizers = {
        number_text(cell["config"]["data"].get("tokenizer", ""))
        for _, cell in cells(evidence)
        if isinstance(cell.get("config"), dict) and isinstance(cell["config"].get("data"), dict)
    }
    warm = " ".join(filter(None, (told("warmup"), told("warmup_unit"))))
    errors = [x for x in texts(table, "loss_se") if x]
    seeds = told("seed")
    tuned = sum(role == "tune" for role in texts(table, "role"))
    flagged = sum("best_of_lr_grid" in flags for flags in texts(table, "flags"))
    epochs = [float(x) for x in texts(table, "epochs") if x]
    return [
        ("optimizer of the runs", told("optimizer")),
        ("learning rates", told("lr")),
        ("how the learning rate was chosen", _tuning(tuned, flagged)),
        ("schedule and warm-up", "; ".join(filter(None, (told("schedule"), warm and f"warm-up {warm}")))),
        ("batch, tokens a step", told("batch_tokens")),
        ("weight decay, beta2", "; ".join(filter(None, (told("weight_decay"), told("b2"))))),
        ("parametrisation", told("parametrization")),
        (
            "seeds",
            seeds + (" (one seed: no run-to-run noise is measured)" if seeds and "," not in seeds else ""),
        ),
        ("tokenizer", ", ".join(sorted(filter(None, tokenizers)))),
        ("vocabulary", told("vocab_size")),
        ("evaluation set, tokens", told("eval_tokens")),
        ("standard error of the evaluation loss", f"{min(errors)} to {max(errors)}" if errors else ""),
        ("largest number of epochs", f"{max(epochs):.3g}" if epochs else ""),
    ]


def _tuning(tuned: int, flagged: int) -> str:
    parts = [f"{tuned} tuning runs, kept out of the fit"] if tuned else []
    parts += [f"the best of a grid in {flagged} cells (flattens exponents)"] if flagged else []
    return "; ".join(parts)
