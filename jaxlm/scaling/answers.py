"""What `jaxlm predict` prints, around `jaxlm.scaling.predict`: tables for a reader, or JSON."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxlm.errors import check
from jaxlm.scaling.design_checks import Found
from jaxlm.scaling.diagnostics import two_step
from jaxlm.scaling.downstream import Chained, chain, unchecked
from jaxlm.scaling.laws import get_law
from jaxlm.scaling.predict import (
    LINES,
    Answer,
    Estimate,
    NextRun,
    Prediction,
    best_loss,
    check_inputs,
    next_runs,
    predict,
    rows_at,
    value_at,
)
from jaxlm.scaling.record import Fit, load_fit
from jaxlm.scaling.table import parse_columns, read_table, select


def predict_command(
    path: str | Path,
    budgets: Sequence[float],
    *,
    at: Mapping[str, float] = {},
    next_count: int = 0,
    level: float = 0.95,
    as_json: bool = False,
    then: str | Path = "",
    measured: str | Path = "",
    columns: str = "",
) -> None:
    """`jaxlm predict`: prints what the fit in `path` says about budgets, or at inputs, as tables or as JSON.

    Args:
        path: fit.json, or the folder that holds it.
        budgets: training FLOPs, one answer each; JSON of several is a list. None: the law's value at `at`.
        at: further inputs of the law, see `predict`; without a budget all of them, see `value_at`.
        next_count: how many next runs to recommend for each budget: those that cut Var[log N*] there, at the
            inputs `at`, most.
        level: of the intervals.
        as_json: print JSON.
        then: fit.json of a law of the loss, such as `loss_to_accuracy`: what it makes of the predicted loss.
        measured: table of held-out runs that both steps are compared with, see `diagnostics.two_step`.
        columns: of that table, `ROLE=COLUMN`: what the first law reads, loss, and what the second predicts.

    Raises:
        UserError, Refusal: as `predict`, `value_at`, `chain` and `next_runs` do, before anything is printed.
    """
    fit = load_fit(path)
    check(bool(then) or not measured, "--measured compares two steps: name the second fit with --then")
    check(bool(measured) or not columns, "--columns is of the table --measured, which is not given")
    if then:
        check(not next_count, "--next recommends runs for N*: ask for it without --then")
        _two_steps(fit, load_fit(then), budgets, at, level, as_json, measured, columns)
        return
    if not budgets:
        reads = "--budget" if fit.method in LINES else f"--budget, or --at for {get_law(fit.law).formula}"
        check(bool(at), f"jaxlm predict needs {reads}")
        check(not next_count, "--next recommends runs for a budget: give --budget")
        answer = value_at(fit, at, level)
        if as_json:
            print(json.dumps(_plain(answer), indent=2))
        else:
            _show_answer(fit, answer)
        return
    check_inputs(fit, at)
    results = [predict(fit, budget, level, **at) for budget in budgets]
    after = [next_runs(fit, budget, k=next_count, **at) if next_count else [] for budget in budgets]
    if as_json:
        records = [_record(result, runs) for result, runs in zip(results, after, strict=True)]
        print(json.dumps(records[0] if len(records) == 1 else records, indent=2))
        return
    for result, runs in zip(results, after, strict=True):
        _show(fit, result, runs, at)


def _two_steps(
    fit: Fit,
    second: Fit,
    budgets: Sequence[float],
    at: Mapping[str, float],
    level: float,
    as_json: bool,
    measured: str | Path,
    columns: str,
) -> None:
    """Prints what two fits, one after the other, say about budgets or inputs, and of held-out runs."""
    check(bool(budgets or at or measured), "--then needs --budget, --at or --measured")
    for which, one, reads in (("--fit", fit, False), ("--then", second, True)):
        law = None if one.method in LINES else get_law(one.law)
        right = law is not None and law.inputs == ("L",) if reads else law is None or law.target == "L"
        check(right, f"{which} must be a law {'of' if reads else 'that gives'} the loss, not {one.law!r}")
    if budgets:
        with_at = f", {_where(at)}" if at else ""
        asked = [(f"C = {c:.4g} FLOPs{with_at}", best_loss(fit, c, **at)) for c in budgets]
    else:
        asked = [(_where(at), rows_at(fit, at)[1])] if at else []
    results = [(where, chain(fit, second, rows, level)) for where, rows in asked]
    errors, alarms = _held_out(fit, second, measured, columns) if measured else ([], unchecked())
    if as_json:
        told = [{"asked": where} | _plain(result) for where, result in results]
        print(json.dumps({"predicted": told, "held_out": errors, "diagnostics": alarms}, indent=2))
        return
    console = _console()
    for where, result in results:
        name = result.target
        rows = (
            ("loss of the run, in the table's unit", result.loss, "{:.5f}"),
            (f"{name} of the run", result.value, "{:.4f}"),
            (f"{name}, both laws alone", result.value_law, "{:.4f}"),
            ("  if step 2 were known exactly", result.of_loss, "{:.4f}"),
            ("  if the loss were known exactly", result.of_step, "{:.4f}"),
        )
        console.print(_estimates(f"{fit.law}, then {second.law}, at {where}", rows, result.level))
    if errors:
        table = Table(title="held-out runs: errors by step", title_justify="left")
        for column in ("row", "loss", "step 1", "step 2", "chained"):
            table.add_column(column, justify="right")
        for row in errors:
            steps = (f"{row[name]:+.4f}" for name in ("step_1", "step_2", "chained"))
            table.add_row(str(row["row"]), f"{row['loss_error']:+.2%}", *steps)
        console.print(table)
    _alarms(console, [fit, second], [*(a for _, r in results for a in r.diagnostics), *alarms])


def _held_out(fit: Fit, second: Fit, measured: str | Path, columns: str) -> tuple[list[dict], Found]:
    """Errors of both steps on the runs of a table, a row each, and what they alarm of."""
    target = get_law(second.law).target
    first = [] if fit.method in LINES else get_law(fit.law).inputs
    needs = tuple(dict.fromkeys([*first, "L", target]))
    runs, _, _ = select(read_table(measured), parse_columns(columns), needs=needs)
    rows, alarms = two_step(fit, second, runs, runs.extra[target])
    return [{"row": int(i)} | row for i, row in zip(runs.rows, rows, strict=True)], alarms


def _where(at: Mapping[str, float]) -> str:
    return ", ".join(f"{name} = {value:.4g}" for name, value in at.items())


def _plain(answer: Answer | Chained | Prediction) -> dict:
    """An answer as JSON holds it."""
    values = {field.name: getattr(answer, field.name) for field in dataclasses.fields(answer)}
    return {name: v._asdict() if isinstance(v, Estimate) else v for name, v in values.items()}


def _record(result: Prediction, after: Sequence[NextRun]) -> dict:
    """A prediction as JSON holds it."""
    return _plain(result) | {"next": [dataclasses.asdict(run) for run in after]}


def _console() -> Console:
    return Console(width=None if Console().is_terminal else 110)


def _estimates(title: str, rows: Sequence[tuple[str, Estimate, str]], level: float) -> Table:
    """A table of what, value and interval, each with its format."""
    table = Table(title=title, title_justify="left")
    for column in ("what", "value", f"{100 * level:g}% from", "to"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, estimate, form in rows:
        table.add_row(name, *(form.format(v) for v in estimate))
    return table


def _alarms(console: Console, fits: Sequence[Fit], own: Sequence[dict]) -> None:
    """The fits' warnings, and all that an answer carries itself."""
    for alarm in [*(a for fit in fits for a in fit.diagnostics if a["level"] != "note"), *own]:
        console.print(f"{alarm['level']}: {alarm['name']}: {alarm['text']}", highlight=False, markup=False)


def _show_answer(fit: Fit, answer: Answer) -> None:
    """Prints the law's value at inputs, with the fit's warnings and its own."""
    console = _console()
    what = "loss" if answer.target == "L" else answer.target
    rows = (
        (f"{what} of a run, in the table's unit", answer.value, "{:.6g}"),
        (f"{what}, the law alone", answer.value_law, "{:.6g}"),
    )
    console.print(_estimates(f"{fit.law} by {fit.method} at {_where(answer.at)}", rows, answer.level))
    _alarms(console, [fit], answer.diagnostics)


def _show(fit: Fit, result: Prediction, after: Sequence[NextRun], at: Mapping[str, float]) -> None:
    """Prints a prediction as tables, with the fit's warnings and its own."""
    console = _console()
    budget, label = result.budget, f"{100 * result.level:g}%"
    where = "".join(f", {name} = {value:.4g}" for name, value in at.items())
    title = f"{fit.law} by {fit.method} at C = {budget:.4g} FLOPs{where}"
    rows = (
        ("N*, parameters", result.N, "{:.4g}"),
        ("D*, tokens", result.D, "{:.4g}"),
        ("tokens per parameter", result.tokens_per_param, "{:.4g}"),
        ("loss of the run, in the table's unit", result.L, "{:.5f}"),
        ("loss, the law alone", result.L_law, "{:.5f}"),
    )
    console.print(_estimates(title, rows, result.level))
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
    _alarms(console, [fit], result.diagnostics)
