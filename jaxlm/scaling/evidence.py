"""What a sweep directory holds for its report: plans, table, fits, held-out runs, and fits made otherwise.

Read are `S/plan.json`, `S/table.csv` and `S/fits/*/fit.json`; for the picture of loss curves, where they are,
`S/runs/*/metrics.jsonl`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.errors import UserError, check
from jaxlm.scaling.bands import LEAST_DRAWS, best_interval, has_optimum, is_surface, typical_inputs
from jaxlm.scaling.comparisons import HeldOut
from jaxlm.scaling.fit import run_fit
from jaxlm.scaling.laws import get_law
from jaxlm.scaling.predict import LINES, loss_interval, predict
from jaxlm.scaling.record import Fit, load_fit
from jaxlm.scaling.table import Points, Table, read_table, select
from jaxlm.scaling.vertices import find_budgets

# Which columns make N and C, and how a reader calls that. The first is the reference.
CONVENTIONS = (
    ("exact FLOPs, N = all parameters", "n_total", "flops_exact"),
    ("exact FLOPs, N = non-embedding", "n_non_embedding", "flops_exact"),
    ("exact FLOPs, N = products (head once)", "n_products", "flops_exact"),
    ("6ND, N = products (head once)", "n_products", "flops_6nd"),
    ("Kaplan: C = 6 N D, N = non-embedding", "n_non_embedding", "flops_kaplan"),
)
OBJECTIVES = ("huber", "lad", "log_mse", "mse")
FEW_DRAWS = 60  # of the refits that show the effect of a choice


@dataclasses.dataclass(frozen=True)
class Evidence:
    """All that a report is made of."""

    workdir: Path
    plans: dict[str, dict]  # name -> {config, hash, cells, notes}; {} without plan.json
    table: Table | None
    fits: dict[str, Fit]  # by label, the main one first
    unreadable: list[str]  # what could not be read, with the reason

    @property
    def main(self) -> Fit | None:
        """The fit that headlines and refits are about."""
        return next(iter(self.fits.values()), None)

    def stale(self, fit: Fit) -> bool:
        """Whether the table that is there now would give the fit other points than it was made from.

        A hold-out that was collected since changes the file, and not what the fit sees.
        """
        if self.table is None or fit.data.get("sha256") in (None, self.table.sha256):
            return False
        return not _same_points(self.table, fit)


def _same_points(table: Table, fit: Fit) -> bool:
    """Whether the fit's columns and filters still choose its points from the table, to the bit."""
    chosen = {name: fit.data.get(name) for name in ("where", "drop_highest") if fit.data.get(name)}
    try:
        points, _, _ = select(table, _columns(fit), **chosen)
    except UserError:
        return False
    now = {"N": points.N, "D": points.D, "C": points.C, "L": points.L}
    return all(np.array_equal(x, np.asarray(fit.points[role], float)) for role, x in now.items())


def gather(workdir: str | Path) -> Evidence:
    """Read a sweep directory.

    Raises:
        UserError: it is none: there is neither a table nor a plan nor a fit.
    """
    workdir = Path(workdir)
    check(workdir.is_dir(), f"--workdir={workdir} is not a folder")
    plans, unreadable = _plans(workdir / "plan.json")
    table = read_table(workdir / "table.csv") if (workdir / "table.csv").is_file() else None
    fits = {}
    for path in sorted((workdir / "fits").glob("*/fit.json")):
        try:
            fits[path.parent.name] = load_fit(path)
        except UserError as error:
            unreadable.append(str(error))
    check(
        bool(plans or table or fits),
        f"--workdir={workdir} holds no plan.json, table.csv or fits/*/fit.json: is it a sweep directory?",
    )
    order = sorted(fits, key=lambda label: (_rank(fits[label]), label))
    return Evidence(workdir, plans, table, {label: fits[label] for label in order}, unreadable)


def _plans(path: Path) -> tuple[dict[str, dict], list[str]]:
    if not path.is_file():
        return {}, []
    try:
        plans = json.loads(path.read_text(encoding="utf-8"))["plans"]
        good = all(isinstance(plan["cells"], list) for plan in plans.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{path} is not a plan ({error!r})"]
    return (plans, []) if good else ({}, [f"{path} is not a plan"])


def _rank(fit: Fit) -> tuple:
    """The main fit is a surface with draws, by the Huber objective, as free as the law is."""
    return (
        not has_optimum(fit),
        len(fit.draws) < LEAST_DRAWS,
        not is_surface(fit),
        fit.law != "chinchilla",
        fit.method != "surface",
        fit.objective != "huber",
        -len(fit.names),
    )


def cells(evidence: Evidence) -> list[tuple[str, dict]]:
    """(plan, cell) of every cell of every plan."""
    return [(name, cell) for name, plan in evidence.plans.items() for cell in plan["cells"]]


def column(table: Table, name: str) -> np.ndarray:
    """A column, or empty strings if the table has none of that name."""
    return table.columns.get(name, np.full(len(table), ""))


def texts(table: Table, name: str) -> list[str]:
    """A column as words; a whole number without a point, an empty cell as ''."""
    return [number_text(x) for x in column(table, name)]


def number_text(x: Any) -> str:
    """A cell as a word.

    >>> number_text(3.0), number_text(0.25), number_text("abc"), number_text(float("nan"))
    ('3', '0.25', 'abc', '')
    """
    if not isinstance(x, (float, np.floating)):
        return str(x)
    if not math.isfinite(x):
        return "" if math.isnan(x) else str(x)
    return f"{x:.0f}" if x == int(x) and abs(x) < 1e15 else f"{x:.6g}"


# --- Held-out runs ---


@dataclasses.dataclass(frozen=True)
class Leak:
    """A run that was planned as a hold-out and that the fit has seen all the same."""

    name: str
    row: int


def held_out(evidence: Evidence, fit: Fit) -> tuple[list[HeldOut], list[Leak], str]:
    """Runs that test a fit, with its prediction of each; hold-outs that it has seen; why there are none.

    A run tests the fit if its role is `holdout`, or if a rule `where` kept it out and its compute is above
    all that was fitted.
    """
    if evidence.table is None:
        return [], [], "there is no table"
    points, names = _whole(evidence.table, fit)
    seen = {int(row) for row in fit.points.get("row", [])}
    by_rule = {int(e["row"]): e["rule"] for e in fit.excluded}
    roles, status = texts(evidence.table, "role"), texts(evidence.table, "status")
    why = texts(evidence.table, "exclude")
    most = max(fit.points["C"])
    runs, leaks = [], []
    for i, row in enumerate(points.rows):
        planned = roles[row] == "holdout"
        if planned and int(row) in seen:
            leaks.append(Leak(names[i], int(row)))
            continue
        withheld = by_rule.get(int(row)) == "where" and points.C[i] > 1.01 * most
        done = status[row] in ("", "finished") and why[row] in ("", "holdout")
        if done and (planned or withheld):
            runs.append(i)
    if not runs:
        return [], leaks, "no finished run is marked as a hold-out or lies beyond a fit's `where`"
    if len(fit.draws) < LEAST_DRAWS:
        return [], leaks, f"the fit has {len(fit.draws)} bootstrap draws: it predicts no interval"
    tested = judged(fit, points.take(np.array(runs)), [names[i] for i in runs])
    return tested, leaks, "" if tested else "the fit has no line of losses"


def judged(fit: Fit, points: Points, labels: Sequence[str]) -> list[HeldOut]:
    """What a fit with draws predicts for runs, beside what they measured; [] if it predicts no loss.

    Line methods predict the lowest loss of a budget: its best run stands for it.
    """
    if is_surface(fit):
        extra = {name: points.extra[name] for name in _extra_names(fit)}
        estimates = loss_interval(fit, points.N, points.D, fit.level, **extra)
    else:
        best = [group[np.argmin(points.L[group])] for group in by_compute(points.C)]
        points, labels = points.take(np.array(best)), [labels[i] for i in best]
        if not np.isfinite(predict(fit, max(fit.points["C"]), fit.level).L.value):
            return []
        estimates = [predict(fit, float(c), fit.level, **typical_inputs(fit)).L for c in points.C]
    rows = zip(labels, points.N, points.D, points.C, points.L, estimates, strict=True)
    return [HeldOut(k, float(n), float(d), float(c), float(loss), *e) for k, n, d, c, loss, e in rows]


def by_compute(compute: Sequence[float]) -> list[np.ndarray]:
    """Positions of runs of about one compute (gaps below 15%), in rising order.

    >>> [group.tolist() for group in by_compute([4e13, 1e12, 4.1e13])]
    [[1], [0, 2]]
    """
    order = np.argsort(compute, kind="stable")
    gaps = np.diff(np.log(np.asarray(compute)[order]))
    return np.split(order, np.flatnonzero(gaps > 0.15) + 1)


def _extra_names(fit: Fit) -> list[str]:
    return [name for name in get_law(fit.law).inputs if name not in ("N", "D", "C")]


def _whole(table: Table, fit: Fit) -> tuple[Points, list[str]]:
    """All rows of the table that have the numbers, in the fit's columns, and what to call each."""
    points, _, _ = select(table, _columns(fit), drop_status=False, refuse=False)
    ids = texts(table, "id")
    return points, [ids[row] or f"row {row}" for row in points.rows]


def fitted_points(table: Table, fit: Fit) -> tuple[Points, list[str]]:
    """The rows of the table that the fit was made from, in its columns, and what to call each."""
    points, names = _whole(table, fit)
    index = np.flatnonzero(np.isin(points.rows, np.asarray(fit.points["row"], int)))
    return points.take(index), [names[i] for i in index]


def _columns(fit: Fit) -> dict[str, str]:
    return dict(fit.data.get("columns") or {})


# --- The same fit, made otherwise ---


@dataclasses.dataclass(frozen=True)
class Variant:
    """The main fit with one thing changed; `fit` is None where that was refused, and `text` says why."""

    group: str
    label: str
    fit: Fit | None
    text: str


def variants(evidence: Evidence) -> list[Variant]:
    """Refits of the main fit: counting conventions, without the smallest budget, other objectives."""
    main, table = evidence.main, evidence.table
    if main is None or table is None or evidence.stale(main):
        return []
    seen, _ = fitted_points(table, main)
    out = []
    names = _columns(main)
    for label, n, c in CONVENTIONS:
        if {n, c} <= table.columns.keys():
            counted, _, _ = select(table, {**names, "N": n, "C": c}, drop_status=False, refuse=False)
            counted = counted.take(np.flatnonzero(np.isin(counted.rows, seen.rows)))
            out.append(refit(main, counted, "counting convention", label))
    out.append(_without_smallest(main, seen))
    if main.method not in LINES:
        for objective in OBJECTIVES:
            label = objective if objective != "huber" else f"huber, delta {main.delta:g}"
            out.append(refit(main, seen, "objective", label, objective=objective))
    return out


def _without_smallest(main: Fit, points: Points) -> Variant:
    group, label = "data", "without the smallest budget"
    budgets, _ = find_budgets(points)
    if len(budgets) < 3:
        return Variant(group, label, None, f"not possible: the runs have {len(budgets)} budgets")
    rest = np.setdiff1d(np.arange(len(points)), budgets[0].index)
    return refit(main, points.take(rest), group, label)


def refit(main: Fit, points: Points, group: str, label: str, **changes: Any) -> Variant:
    """A fit's law, method and settings on other points, with fewer draws; `changes`: options of `run_fit`."""
    chosen = main.settings
    options = dict(
        law=main.law,
        method=main.method,
        objective=main.objective,
        delta=main.delta or 1e-3,
        starts=8,
        draws=FEW_DRAWS,
        seed=int(main.bootstrap.get("seed", 0)),
        level=main.level,
        profile=False,
        block=main.bootstrap.get("kind") == "block" and points.block is not None,
        fixed=dict(chosen.get("fixed") or {}),
        ties=tuple(chosen.get("ties") or ()),
        bounds=dict(chosen.get("bounds") or {}),
    )
    if main.method in LINES:
        options |= dict(law="chinchilla", fixed={}, ties=(), bounds={})
    try:
        fit = run_fit(points, **(options | changes))
    except UserError as error:
        return Variant(group, label, None, f"refused: {error}")
    return Variant(group, label, fit, "")


def exponent(fit: Fit, name: str = "a") -> tuple[float, tuple[float, float] | None] | None:
    """An exponent and its interval, of a law or of lines; None if the fit has none."""
    values: Mapping[str, float] = {**fit.derived, **fit.parameters}
    if not has_optimum(fit) or name not in values:
        return None
    interval = best_interval(fit, name)
    return values[name], None if interval is None else (interval[0], interval[1])
