"""From points to a fitted law: `run_fit`, and `fit_command` behind `jaxlm fit`.

This module stands to the right of the methods, the diagnostics and the figures; what those need of a fit
(`Fit`, `save_fit`, `load_fit`, `predict_loss`, `optimum`) is in `jaxlm.scaling.record`. It imports no JAX.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from scipy import stats

from jaxlm import __version__
from jaxlm.errors import UserError, check, check_choice
from jaxlm.scaling import diagnostics, optima, solve, table, uncertainty
from jaxlm.scaling.laws import get_law
from jaxlm.scaling.problem import OBJECTIVES, TINY, Problem, make_problem
from jaxlm.scaling.record import SURFACES, Fit, load_fit, optimum, predict_loss, save_fit
from jaxlm.scaling.table import Points
from jaxlm.scaling.varpro import solve_varpro

__all__ = ["METHODS", "Fit", "fit_command", "load_fit", "optimum", "predict_loss", "run_fit", "save_fit"]

METHODS = ("surface", "varpro", "envelope", "parabola", "akima", "robust")
SAME = 1e-8  # relative to the objective: starts that end within it found the same optimum
IDENTITY = ("a", "b", "c")  # derived numbers whose interval is symmetric; the others are positive scales


def run_fit(
    points: Points,
    law: str = "chinchilla",
    method: str = "surface",
    objective: str = "huber",
    delta: float = 1e-3,
    *,
    starts: int = 16,
    draws: int = 400,
    seed: int = 0,
    level: float = 0.95,
    profile: bool = True,
    block: bool = False,
    fixed: Mapping[str, float] = {},
    ties: Sequence[str] = (),
    bounds: Mapping[str, tuple[float, float]] = {},
) -> Fit:
    """Fits a law to points, with its uncertainty and its diagnostics.

    Args:
      points: what `table.select` returned.
      law: a name in `laws.LAWS`; the methods that fit lines to optima (envelope, parabola, akima, robust)
        have none.
      method: one of METHODS.
      objective: huber | lad | mse | log_mse, of surface and varpro.
      delta: of huber, in log loss.
      starts: a random subset of this size of the law's grid of starts; the whole grid if that is smaller.
      draws: bootstrap draws; 0: no bootstrap.
      seed: of the starts and the draws.
      level: of all intervals.
      profile: profile the objective over every free parameter.
      block: resample blocks (points.block; without it runs of one N) instead of runs.
      fixed: parameter -> value that it keeps.
      ties: `alpha=beta` makes two parameters equal.
      bounds: parameter -> (low, high).

    Raises:
      UserError: a setting that makes no sense, too few points, an input of the law that is missing.
    """
    check_choice(method, METHODS, "method")
    check(0 < level < 1, f"level={level} must be between 0 and 1")
    check(starts >= 1, f"starts={starts} must be at least 1")
    check(draws >= 0 and draws != 1, f"draws={draws} must be 0 or at least 2")
    check(seed >= 0, f"seed={seed} must not be negative")
    check_choice(objective, OBJECTIVES, "objective")
    check(delta > 0, f"delta={delta} must be positive")
    labels, notes = None, []
    if block and points.block is None:
        labels = np.unique(points.N, return_inverse=True)[1].astype(np.int64)
        notes.append(f"no block column: the {labels.max() + 1} different N are the blocks")
    elif block:
        labels = points.block
    if method in SURFACES:
        options = dict(starts=starts, draws=draws, seed=seed, level=level, profile=profile)
        free = len(get_law(law).names) - len(fixed) - len(ties)
        diagnostics.require(len(points), free, f"law={law!r}")
        problem = make_problem(points, law, objective, delta, fixed=fixed, ties=ties, bounds=bounds)
        fit = _fit_surface(points, problem, law, method, labels, **options)
        kept = dict(fixed=dict(fixed), ties=list(ties), bounds={k: list(v) for k, v in bounds.items()})
        fit = dataclasses.replace(fit, settings=fit.settings | kept)
    else:
        unused = [name for name, given in (("fixed", fixed), ("ties", ties), ("bounds", bounds)) if given]
        check(not unused, f"method={method!r} fits lines to optima and takes no {', '.join(unused)}")
        for name in "NDCL":
            good = np.isfinite(getattr(points, name)).all()
            check(bool(good), f"method={method!r} needs {name} of every run: name its column in --columns")
        given = points if labels is None else dataclasses.replace(points, block=labels)
        common = dict(draws=draws, seed=seed, level=level)
        if method == "envelope":
            fit = optima.fit_envelope(given, **common)
        else:
            kind = {"bootstrap": "block"} if block else {}
            fit = optima.fit_isoflop(given, variant=method, **kind, **common)
    fit = dataclasses.replace(fit, notes=[*notes, *fit.notes])
    return dataclasses.replace(fit, diagnostics=diagnostics.examine(fit, points))


def _fit_surface(
    points: Points,
    problem: Problem,
    law: str,
    method: str,
    labels: np.ndarray | None,
    *,
    starts: int,
    draws: int,
    seed: int,
    level: float,
    profile: bool,
) -> Fit:
    grid = problem.law.starts(problem.x, problem.y)
    if method == "varpro":
        found = solve_varpro(problem, law)
    else:
        chosen = np.arange(len(grid))
        if starts < len(grid):
            chosen = np.sort(np.random.default_rng(seed).choice(len(grid), starts, replace=False))
        found = solve.solve(problem, grid[chosen])
    found = dataclasses.replace(found, phi=_on_bounds(problem, found.phi))
    shape = uncertainty.curvature(problem, found.phi)
    profiles, notes = {}, []
    if profile:
        profiles, better = _profiles(problem, found.phi, shape, level)
        if better is not None:
            again = solve.solve(problem, problem.coordinates(better)[None])
            lower = [{**s, "gap": s["value"] - again.value} for s in found.starts]
            found = dataclasses.replace(again, starts=[*lower, *again.starts])
            notes.append("a profile led to a lower objective than any start: the fit goes on from there")
            shape = uncertainty.curvature(problem, found.phi)
            profiles, _ = _profiles(problem, found.phi, shape, level)

    names = problem.law.names
    p = problem.parameters(found.phi)
    parameters = dict(zip(names, map(float, p), strict=True))
    free = [i for i, row in enumerate(problem.basis) if np.any(row) or names[i] in problem.law.mixed]
    notes += _at_bounds(problem, found.phi)
    derived = _derived(problem, p)
    samples = uncertainty.Bootstrap(np.zeros((0, len(names))), "none", 0, 0)
    if draws:
        samples = uncertainty.bootstrap(problem, found.phi, draws=draws, seed=seed, block=labels)
    jacobian = uncertainty.parameter_jacobian(problem, found.phi, lambda q: q)[free]
    covariance = {
        kind: (jacobian @ getattr(shape, kind) @ jacobian.T).tolist() for kind in ("gauss_newton", "sandwich")
    }
    intervals = _intervals(problem, found.phi, p, derived, samples, shape, level, free)
    for name, told in profiles.items():
        intervals[name]["profile"] = told["interval"]
    r = np.log(problem.y) - np.log(
        np.maximum(problem.law.form(problem.coordinates(found.phi), problem.x)[0], TINY)
    )
    rows = np.arange(len(points)) if points.rows is None else points.rows
    columns = {"N": points.N, "D": points.D, "C": points.C, "L": points.L, "row": rows, **points.extra}
    columns |= {} if points.sigma is None else {"sigma": points.sigma}
    columns |= (
        {}
        if labels is None and points.block is None
        else {"block": points.block if labels is None else labels}
    )
    return Fit(
        law=law,
        method=method,
        objective=problem.objective,
        delta=problem.delta,
        parameters=parameters,
        derived={name: float(v) for name, v in derived.items()},
        names=tuple(names[i] for i in free),
        covariance=covariance,
        draws=samples.draws[:, free].tolist(),
        bootstrap={"kind": samples.kind, "seed": seed, "asked": samples.asked, "failed": samples.failed},
        intervals=intervals,
        level=level,
        value=found.value,
        starts=found.starts,
        profile=profiles,
        sigma=float(np.sqrt(np.sum(r**2) / max(len(r) - len(found.phi), 1))),
        residuals=r.tolist(),
        points={name: np.asarray(v).tolist() for name, v in columns.items()},
        notes=notes,
        settings={
            "free": len(found.phi),
            "starts": starts,
            "start_grid": len(grid),
            "draws": draws,
            "seed": seed,
            "profile": profile,
            "weighted": points.sigma is not None,
            "polish": found.polish,
            "tolerance": solve.TOLERANCE,
            "restarts": solve.RESTARTS,
            "solver": "Newton, L-BFGS, Newton; best: BFGS, Nelder-Mead"
            if method == "surface"
            else "NNLS, grids",
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "jaxlm": __version__,
        },
    )


def _derived(problem: Problem, p: np.ndarray) -> dict[str, np.ndarray]:
    """Derived numbers of parameters (..., P), each (...)."""
    columns = {name: p[..., i] for i, name in enumerate(problem.law.names)}
    with np.errstate(all="ignore"):
        return problem.law.derived(columns)


def _on_bounds(problem: Problem, phi: np.ndarray) -> np.ndarray:
    """phi with what stopped a rounding error short of a bound on it."""
    for bound in (problem.lower, problem.upper):
        near = np.isfinite(bound) & (np.abs(phi - bound) <= 1e-9 * np.maximum(1.0, np.abs(bound)))
        phi = np.where(near, bound, phi)
    return phi


def _at_bounds(problem: Problem, phi: np.ndarray) -> list[str]:
    """Says which parameters ended at a bound: their intervals end there, and have no curvature."""
    out = []
    for k in np.flatnonzero((phi <= problem.lower) | (phi >= problem.upper)):
        moved = [n for n, row in zip(problem.law.names, problem.basis, strict=True) if row[k]]
        vanished = moved[0] in problem.law.logs and phi[k] <= problem.lower[k]
        out.append(f"{' = '.join(moved[:1])} {'vanishes' if vanished else 'is at its bound'}")
    return out


def _profiles(
    problem: Problem, phi: np.ndarray, shape: uncertainty.Curvature, level: float
) -> tuple[dict[str, dict], np.ndarray | None]:
    """The profile of every parameter with a coordinate of its own; a phi with a lower objective, if one is
    met."""
    rise = shape.cutoff * float(stats.f.ppf(level, 1, shape.dof))
    out, better = {}, None
    if rise <= 1e-20 * len(problem.y):
        return {}, None  # the law meets every point: nothing to profile
    for i, name in enumerate(problem.law.names):
        if name in problem.law.mixed or not np.any(problem.basis[i]):
            continue
        error = float(np.sqrt(problem.basis[i] @ shape.gauss_newton @ problem.basis[i]))
        out[name], best = uncertainty.profile(problem, phi, name, error, rise)
        if min(out[name]["value"]) < out[name]["cutoff"] - rise - SAME * (out[name]["cutoff"] - rise):
            better = best
    return out, better


def _intervals(
    problem: Problem,
    phi: np.ndarray,
    p: np.ndarray,
    derived: Mapping[str, np.ndarray],
    samples: uncertainty.Bootstrap,
    shape: uncertainty.Curvature,
    level: float,
    free: Sequence[int],
) -> dict[str, dict[str, list[float]]]:
    """By bootstrap and by both covariances, of free parameters and of derived numbers."""
    law, out = problem.law, {}
    columns = {law.names[i]: (p[i], samples.draws[:, i], law.names[i] in law.logs) for i in free}
    drawn = _derived(problem, samples.draws)
    columns |= {name: (v, drawn[name], name not in IDENTITY) for name, v in derived.items()}

    def everything(q: np.ndarray) -> np.ndarray:
        values = {**{law.names[i]: q[..., i] for i in free}, **_derived(problem, q)}
        return np.stack([np.log(values[n]) if columns[n][2] else values[n] for n in columns], -1)

    with np.errstate(all="ignore"):
        slopes = uncertainty.parameter_jacobian(problem, phi, everything)
    for (name, (value, draws, positive)), slope in zip(columns.items(), slopes, strict=True):
        kinds = {}
        if len(draws) >= 2:
            good = draws[np.isfinite(draws)]
            if len(good) >= 2:
                kinds["bootstrap"] = uncertainty.percentile_interval(good, level)
        for kind in ("gauss_newton", "sandwich"):
            variance = float(slope @ getattr(shape, kind) @ slope)
            if not (np.isfinite(variance) and variance >= 0):
                continue  # a direction that no run constrains: no interval, and not one of no width
            error = float(np.sqrt(variance))
            ends = uncertainty.delta_interval(float(value), error, shape.dof, level, positive)
            low, high = law.limits.get(name, (-np.inf, np.inf)) if name not in law.logs else (0.0, np.inf)
            kinds[kind] = [max(ends[0], low), min(ends[1], high)]
        out[name] = kinds
    return out


# --- The command ---


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
    `out`
    too; with a group column every group writes to `out`/GROUP. A method or group that is refused is
    printed as
    such, and is an error where nothing is left.

    Args:
      table_path: .csv, .tsv or .parquet.
      columns: `N=params,C=train_flop,loss=loss_nats`; see `table.select`.
      block: a column whose values are resampled together, or `N` for the sizes.
      fix: `E=1.69`. tie: `alpha=beta`. bound: `alpha=0.1:1`.
      plots: whether to draw.
      The others are those of `run_fit` and `table.select`.

    Raises:
      UserError: bad input, before anything is written.
    """
    form = get_law(law)
    check_choice(method, ("all", *METHODS), "method")
    check(bool(out), "the fit needs --out, a folder to write to")
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
            points, excluded, notes = table.select(
                part, roles, where=where, drop_highest=drop_highest, needs=needs
            )
        except UserError as error:
            if not label:
                raise
            refused.append(f"{title}{error}")
            console.print(f"[red]{escape(title)}refused[/]: {escape(str(error))}")
            continue
        data = _data(
            part,
            roles,
            points,
            where=where,
            drop_highest=drop_highest,
            group=f"{group}={label}" if label else "",
        )
        done: list[Fit] = []
        for name in methods:
            lines = name not in SURFACES
            given = settings | (dict(fixed={}, ties=(), bounds={}) if lines and method == "all" else {})
            try:
                fit = run_fit(points, law, name, **given)
            except UserError as error:
                if len(methods) == 1 and not label:
                    raise
                refused.append(f"{title}{name}: {error}")
                console.print(f"[red]{escape(title)}{name} refused[/]: {escape(str(error))}")
                continue
            gone = [dataclasses.asdict(e) for e in excluded]
            fit = dataclasses.replace(
                fit, data=data, excluded=[*gone, *fit.excluded], notes=[*notes, *fit.notes]
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
    lines = [
        f"{len(fit.residuals)} points, left out: {left_out}; residual deviation of the log {fit.sigma:.4%}",
    ]
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
        lines.append(f"{len(fit.draws)} bootstrap draws ({kind}), {failed} failed")
    lines += [f"note: {text}" for text in fit.notes]
    return [grid, *map(escape, lines), *map(_alarm, fit.diagnostics)]
