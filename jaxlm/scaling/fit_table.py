"""From a table of runs to fits: what `jaxlm fit` reads, writes and prints, around `jaxlm.scaling.fit`."""

import dataclasses
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from jaxlm.errors import UserError, check, check_choice
from jaxlm.scaling import diagnostics, downstream, table
from jaxlm.scaling.fit import METHODS, SAME, run_fit
from jaxlm.scaling.laws import get_law
from jaxlm.scaling.lines import Refusal
from jaxlm.scaling.record import SURFACES, Fit, calibrated, save_fit
from jaxlm.scaling.table import Points


def parse_numbers(texts: Sequence[str], flag: str, example: str) -> list[float]:
    """`["1e22,1e23"]` as [1e22, 1e23], one at least.

    >>> parse_numbers(["1e22,1e23", "2e23"], "--budget", "1e22")
    [1e+22, 1e+23, 2e+23]
    """
    out = []
    for part in (part.strip() for text in texts for part in text.split(",")):
        try:
            out.append(float(part))
        except ValueError:
            raise UserError(f"{flag}={part}: not a number, such as {flag}={example}") from None
    check(bool(out), f"{flag} needs a number, such as {flag}={example}")
    return out


def parse_pairs(texts: Sequence[str], flag: str) -> dict[str, float]:
    """`["E=1.69"]` as {'E': 1.69}; several may stand in one text, with commas.

    >>> parse_pairs(["E=1.69,alpha=.34"], "--fix")
    {'E': 1.69, 'alpha': 0.34}
    """
    out = {}
    for part in (part.strip() for text in texts for part in text.split(",") if part.strip()):
        name, _, value = part.partition("=")
        try:
            out[name.strip()] = float(value)
        except ValueError:
            raise UserError(f"{flag}={part}: not NAME=NUMBER, such as {flag}=E=1.69") from None
    return out


def parse_bounds(texts: Sequence[str]) -> dict[str, tuple[float, float]]:
    """`["alpha=0.1:1"]` as {'alpha': (0.1, 1.0)}.

    >>> parse_bounds(["alpha=0.1:1"])
    {'alpha': (0.1, 1.0)}
    """
    out = {}
    for part in (part.strip() for text in texts for part in text.split(",") if part.strip()):
        name, _, ends = part.partition("=")
        try:
            low, high = map(float, ends.split(":"))
        except ValueError:
            raise UserError(f"--bound={part}: not NAME=LOW:HIGH, such as --bound=alpha=0.1:1") from None
        out[name.strip()] = (low, high)
    return out


def fit_command(
    table_path: str,
    columns: str = "",
    *,
    out: str,
    law: str = "chinchilla",
    method: str = "surface",
    objective: str = "huber",
    delta: float = 1e-3,
    drop_highest: int = 0,
    where: str = "",
    group: str = "",
    block: str = "",
    evaluations: bool = False,
    starts: int = 16,
    draws: int = 400,
    seed: int = 0,
    level: float = 0.95,
    fix: Sequence[str] = (),
    tie: Sequence[str] = (),
    bound: Sequence[str] = (),
    profile: bool = True,
    plots: bool = True,
) -> list[Fit]:
    """Fits the runs of a table, writes `out`/fit.json and pictures, prints what was found.

    With method='all' every method writes to `out`/METHOD, the first that succeeds (surface, if it does) to
    `out` too; with a group column every group writes to `out`/GROUP. A method or group that is refused is
    printed as such, and is an error where nothing is left.

    Args:
      table_path: .csv, .tsv or .parquet.
      columns: `N=params,C=train_flop,loss=loss_nats`; see `table.select`.
      block: a column whose values are resampled together, or `N` for the sizes.
      evaluations: rows are evaluations of the runs that `block` names, in order: fit `downstream.averaged`.
      fix: `E=1.69`. tie: `alpha=beta`. bound: `alpha=0.1:1`.
      plots: whether to draw.
      The others are those of `run_fit` and `table.select`.

    Raises:
      UserError: bad input, before anything is written.
    """
    form = get_law(law)
    check_choice(method, ("all", *METHODS), "method")
    check(bool(out), "the fit needs --out, a folder to write to")
    accuracy = law == "loss_to_accuracy" and bool(block) and block != "N"
    check(not evaluations or accuracy, "--evaluations is of --law=loss_to_accuracy, with --block=RUN_COLUMN")
    if method not in ("all", *SURFACES):
        given = dict(law=law, objective=objective, delta=delta, starts=starts)
        unused = [f"--{k}={v}" for k, v in given.items() if v != fit_command.__kwdefaults__[k]]
        check(not unused, f"method={method!r} fits lines to optima and takes no {', '.join(unused)}")
    fixed, bounds = parse_pairs(fix, "--fix"), parse_bounds(bound)
    ties = [part.strip() for text in tie for part in text.split(",") if part.strip()]
    roles = table.parse_columns(columns)
    check(block != "N" or "block" not in roles, "--block=N and --columns=block=... disagree: keep one")
    if block and block != "N":
        check(
            "block" not in roles or roles["block"] == block,
            f"--block={block} and --columns=block=... disagree",
        )
        roles["block"] = block
    whole = table.read_table(table_path)
    parts = table.groups(whole, group) if group else {"": whole}
    needs = tuple(dict.fromkeys([*form.inputs, form.target]))
    if method not in ("all", *SURFACES):
        needs = ("N", "D", "C", "L")
    of_n_and_d = form.target == "L" and {"N", "D"} <= set(form.inputs)
    methods = (method,) if method != "all" else METHODS if of_n_and_d else SURFACES
    if method == "all" and of_n_and_d:
        needs = tuple(dict.fromkeys([*needs, "C"]))
    settings = dict(objective=objective, delta=delta, starts=starts, draws=draws, seed=seed, level=level)
    settings |= dict(profile=profile, block=bool(block), fixed=fixed, ties=ties, bounds=bounds)
    names = [_folder_name(label) for label in parts]
    for label, name in zip(parts, names, strict=True):
        check(
            names.count(name) == 1,
            f"--group={group}: another value than {label!r} would share its folder {name!r}",
        )
    _check_folder(Path(out))
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    fits, refused = [], []
    for label, part in parts.items():
        folder = Path(out) / _folder_name(label) if label else Path(out)
        title = f"{group}={label}: " if label else ""
        try:
            read, excluded, notes = table.select(
                part, roles, where=where, drop_highest=drop_highest, needs=needs
            )
            points = downstream.averaged(read) if evaluations else read
        except UserError as error:
            if not label:
                raise
            refused.append(f"{title}{error}")
            console.print(f"[red]{escape(title)}refused[/]: {escape(str(error))}")
            continue
        data = _data(
            part,
            roles,
            read,
            where=where,
            drop_highest=drop_highest,
            group=f"{group}={label}" if label else "",
        )
        if evaluations:
            notes = [*notes, f"running averages of {downstream.WINDOW} evaluations, and accuracy 1 at loss 0"]
        done: list[Fit] = []
        for name in methods:
            lines = name not in SURFACES
            given, aside = settings, []
            if lines and method == "all" and (fixed or ties or bounds):
                given = settings | dict(fixed={}, ties=(), bounds={})
                aside = ["--fix, --tie and --bound are of the law's parameters: these lines are free of them"]
            try:
                fit = run_fit(points, law, name, **given)
            except UserError as plain:
                error = _with_left_out(plain, excluded, len(part))
                if len(methods) == 1 and not label:
                    raise error from None
                refused.append(f"{title}{name}: {error}")
                console.print(f"[red]{escape(title)}{name} refused[/]: {escape(str(error))}")
                continue
            gone = [dataclasses.asdict(e) for e in excluded]
            fit = dataclasses.replace(
                fit, data=data, excluded=[*gone, *fit.excluded], notes=[*notes, *aside, *fit.notes]
            )
            done.append(fit)
            where_to = folder / name if len(methods) > 1 else folder
            _write(fit, where_to, plots)
            for item in describe(fit, f"{title}{name}"):
                console.print(item)
            console.print(f"wrote {escape(str(where_to / 'fit.json'))}\n")
        if len(methods) > 1 and done:
            save_fit(done[0], folder)
            for item in diagnostics.compare(done):
                console.print(_alarm(item))
        fits += done
    if not fits:
        raise UserError("nothing was fitted: " + "; ".join(refused))
    return fits


def _with_left_out(error: UserError, excluded: Sequence[table.Exclusion], rows: int) -> UserError:
    """The same refusal with what had left the table before it came to the fit."""
    if not excluded:
        return error
    text = f"{error}. Of {rows} rows {len(excluded)} were left out: {table.left_out(excluded)}"
    if isinstance(error, Refusal):
        return Refusal(error.name, text.removeprefix(f"{error.name}: "))
    return UserError(text)


def _folder_name(label: str) -> str:
    """A value of the group column as a folder of its own, never one above.

    >>> _folder_name("../a b")
    '_a_b'
    """
    return re.sub(r"[^\w.+-]+", "_", label).lstrip(".") or "group"


def _check_folder(folder: Path) -> None:
    """What cannot be written to is refused before anything is fitted."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    good = there.is_dir() and os.access(there, os.W_OK)
    check(good, f"--out={folder} cannot be made: {there} is no folder that can be written to")


def _data(part: table.Table, roles: Mapping[str, str], points: Points, **filters) -> dict:
    ranges = {}
    for name in "NDCL":
        values = getattr(points, name)
        if np.isfinite(values).any():
            ranges[name] = [float(np.nanmin(values)), float(np.nanmax(values))]
    return {
        "path": part.path,
        "sha256": part.sha256,
        "rows": len(part),
        "used": len(points),
        "columns": table.resolve(part, roles),
        "ranges": ranges,
        **filters,
    }


def _write(fit: Fit, folder: Path, plots: bool) -> None:
    save_fit(fit, folder)
    if plots:
        from jaxlm.scaling.figures import draw_fit  # matplotlib takes a second to import

        draw_fit(fit, folder)


def _alarm(item: Mapping) -> str:
    colour = {"note": "cyan", "warning": "yellow"}.get(item["level"], "red")
    return f"[{colour}]{item['level']}[/] {item['name']}: {escape(item['text'])}"


def describe(fit: Fit, title: str) -> list:
    """What a reader wants to see of a fit, as things that rich prints."""
    form = f": {get_law(fit.law).formula}" if fit.method in SURFACES else ""
    kinds = [
        k
        for k in ("bootstrap", "profile", "gauss_newton", "sandwich")
        if any(k in v for v in fit.intervals.values())
    ]
    grid = RichTable(title=escape(f"{title} {fit.law}{form}"), title_justify="left")
    grid.add_column("parameter")
    grid.add_column("value", justify="right")
    for kind in kinds:
        grid.add_column(f"{fit.level:.0%} {kind.replace('_', '-')}", justify="right")
    for name, value in {**fit.parameters, **fit.derived}.items():
        known = fit.intervals.get(name, {})
        ends = [f"{known[k][0]:.6g} .. {known[k][1]:.6g}" if k in known else "" for k in kinds]
        fixed = name in fit.parameters and name not in fit.names
        grid.add_row(name, f"{value:.8g}", *(["fixed", *ends[1:]] if fixed and ends else ends))
    rules: dict[str, int] = {}
    for item in fit.excluded:
        rules[item["rule"]] = rules.get(item["rule"], 0) + 1
    left_out = ", ".join(f"{count} by {rule}" for rule, count in rules.items()) or "none"
    used = f"{len(next(iter(fit.points.values()), fit.residuals))} points, left out: {left_out}"
    lines = [used + (f"; residual deviation of the log {fit.sigma:.4%}" if fit.residuals else "")]
    if fit.method in SURFACES:
        same = sum(abs(s["gap"]) <= SAME * abs(fit.value) + 1e-25 for s in fit.starts)
        size = f" delta={fit.delta:g}" if fit.objective == "huber" else ""
        lines.append(
            f"objective {fit.objective}{size}: {fit.value:.10g} summed over points; {same} of "
            f"{len(fit.starts)} "
            f"starts end within {SAME:g} of it"
        )
    kind = fit.bootstrap.get("kind", "")
    if fit.draws:
        failed = fit.bootstrap.get("failed", 0)
        lines.append(f"{len(fit.draws)} bootstrap draws ({kind}), {failed} failed{calibrated(fit)}")
    lines += [f"note: {text}" for text in fit.notes]
    return [grid, *map(escape, lines), *map(_alarm, fit.diagnostics)]
