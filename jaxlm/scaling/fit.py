"""From points to a fitted law: `run_fit`, and `fit_command` behind `jaxlm fit`.

This module stands to the right of the methods, the diagnostics and the figures; what those need of a fit
(`Fit`, `save_fit`, `load_fit`, `predict_loss`, `optimum`) is in `jaxlm.scaling.record`.
"""

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from scipy import stats

from jaxlm.errors import UserError, check, check_choice
from jaxlm.scaling import table as tables
from jaxlm.scaling.diagnostics import compare, examine, require
from jaxlm.scaling.figures import draw_fit
from jaxlm.scaling.laws import get_law
from jaxlm.scaling.optima import fit_envelope, fit_isoflop
from jaxlm.scaling.problem import OBJECTIVES, Problem, make_problem, objective_value
from jaxlm.scaling.record import SURFACES, Fit, save_fit
from jaxlm.scaling.solve import RESTARTS, TOLERANCE, Solution, solve
from jaxlm.scaling.table import Points
from jaxlm.scaling.uncertainty import (
    EXPONENTS,
    bootstrap,
    curvature,
    delta_interval,
    parameter_jacobian,
    percentile_interval,
    profile,
)
from jaxlm.scaling.varpro import solve_varpro

METHODS = (*SURFACES, "envelope", "parabola", "akima", "robust")
LEAST_DRAWS = 20  # fewer give no percentile interval


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
    fixed: Mapping[str, float] | None = None,
    ties: Sequence[str] = (),
    bounds: Mapping[str, tuple[float, float]] | None = None,
) -> Fit:
    """Fits a law to points and says how far it can be trusted.

    Args:
      points: what `table.select` returned.
      law: a name in `laws.LAWS`; the line methods (envelope, parabola, akima, robust) fit power laws.
      method: surface | varpro | envelope | parabola | akima | robust.
      objective: huber | lad | mse | log_mse, of the surface methods.
      delta: of huber, in log loss.
      starts: how many of the law's grid of starts are followed to their end, drawn at random; 0 = all.
      draws: bootstrap draws.
      seed: of the choice of starts and of the bootstrap.
      level: of the intervals.
      profile: walk along every parameter, refitting the others: the one interval that shows a flat ridge.
      block: resample `points.block` whole in place of runs.
      fixed: parameter -> value that it keeps.
      ties: `alpha=beta` makes two parameters equal.
      bounds: parameter -> (low, high).

    Raises:
      Refusal: too few points; no interior minimum (line methods).
      UserError: an unknown name, a missing input, constraints that contradict each other.
    """
    check_choice(method, METHODS, "method")
    check_choice(objective, OBJECTIVES, "objective")
    check(delta > 0, f"delta={delta:g} must be positive")
    check(0 < level < 1, f"level={level:g} must lie in (0, 1)")
    check(starts >= 0 and draws >= 0, f"starts={starts} and draws={draws} must not be negative")
    if method not in SURFACES:
        check(
            not fixed and not ties and not bounds,
            f"method={method!r} has no parameters to fix, tie or bound: use method=surface",
        )
        common = dict(draws=draws, seed=seed, level=level)
        if method == "envelope":
            fit = fit_envelope(points, **common)
        else:
            kind = "block" if block else "residual"
            fit = fit_isoflop(points, variant=method, bootstrap=kind, **common)
    else:
        constraints = dict(fixed=dict(fixed or {}), ties=tuple(ties), bounds=dict(bounds or {}))
        fit = _fit_surface(
            points, law, method, objective, delta, starts, draws, seed, level, profile, block, constraints
        )
    return dataclasses.replace(fit, diagnostics=[*fit.diagnostics, *examine(fit, points)])


def _fit_surface(
    points: Points,
    law_name: str,
    method: str,
    objective: str,
    delta: float,
    starts: int,
    draws: int,
    seed: int,
    level: float,
    with_profile: bool,
    block: bool,
    constraints: Mapping[str, Any],
) -> Fit:
    """A law with parameters, by the multi-start solver or by variable projection."""
    law = get_law(law_name)
    check(not block or points.block is not None, "the block bootstrap needs a block column: --block=COLUMN")
    free = len(law.names) - len(constraints["fixed"]) - len(constraints["ties"])
    require(len(points), free, f"law={law_name!r}")
    problem = make_problem(points, law_name, objective, delta, **constraints)
    grid = law.starts(problem.x, problem.y)
    if starts and starts < len(grid):
        grid = grid[np.sort(np.random.default_rng(seed).choice(len(grid), starts, replace=False))]
    found = solve(problem, grid) if method == "surface" else solve_varpro(problem, law_name)

    names = tuple(name for name in law.names if name not in constraints["fixed"])
    profiles: dict[str, dict] = {}
    near = curvature(problem, found.phi)
    if with_profile:
        found, profiles = _profiles(problem, found, names, level)
        near = curvature(problem, found.phi)
    estimate = _named(law.names, problem.parameters(found.phi))
    derived = {name: float(value) for name, value in law.derived(estimate).items()}

    picked = [law.names.index(name) for name in names]
    jacobian = parameter_jacobian(problem, found.phi, lambda p: p)[picked]
    matrices = {"gauss_newton": near.gauss_newton, "sandwich": near.sandwich}
    intervals: dict[str, dict[str, list[float]]] = {name: {} for name in (*names, *derived)}
    for kind, matrix in matrices.items():
        for name, error, positive in _errors(problem, found, names, derived, matrix):
            value = estimate[name] if name in names else derived[name]
            intervals[name][kind] = delta_interval(value, error, near.dof, level, positive)
    table, how = (
        np.zeros((0, len(names))),
        dict(kind="block" if block else "case", seed=seed, asked=0, failed=0),
    )
    if draws:
        sampled = bootstrap(problem, found.phi, draws=draws, seed=seed, block=points.block if block else None)
        how = dict(kind=sampled.kind, seed=seed, asked=sampled.asked, failed=sampled.failed)
        table = sampled.draws[:, picked]
        if len(table) >= LEAST_DRAWS:
            each = _named(law.names, sampled.draws.T)
            for name, column in ({name: each[name] for name in names} | law.derived(each)).items():
                good = column[np.isfinite(column)]
                runs = len(np.unique(points.block)) if block else len(points)
                intervals[name]["bootstrap"] = percentile_interval(good, level, runs, min(free, runs - 1))
    for name, told in profiles.items():
        intervals[name]["profile"] = told["interval"]

    residuals = problem.residuals(found.phi)[0]
    if objective == "mse":  # its residuals are differences of the target itself
        residuals = np.log1p(residuals / problem.y)
    grid_size = len(law.starts(problem.x, problem.y))
    return Fit(
        law=law_name,
        method=method,
        objective=objective,
        delta=delta,
        parameters=estimate,
        derived=derived,
        names=names,
        covariance={k: (jacobian @ m @ jacobian.T).tolist() for k, m in matrices.items()},
        draws=table.tolist(),
        bootstrap=how,
        intervals=intervals,
        level=level,
        value=float(objective_value(problem, problem.residuals(found.phi)[0])),
        starts=found.starts,
        profile=profiles,
        sigma=float(np.sqrt(np.sum(residuals**2) / max(len(residuals) - free, 1))),
        residuals=residuals.tolist(),
        points=_columns(points),
        settings=dict(
            fixed=constraints["fixed"],
            ties=list(constraints["ties"]),
            bounds={name: list(pair) for name, pair in constraints["bounds"].items()},
            starts=f"{len(grid)} of {grid_size}, seed {seed}",
            optimiser="Newton, L-BFGS restarted from its own end, BFGS, Nelder-Mead"
            if method == "surface"
            else "grid and Nelder-Mead over the exponents, NNLS inside",
            restarts=RESTARTS,
            tolerance=TOLERANCE,
            polish=found.polish,
            weights="1/sigma^2" if points.sigma is not None else "equal",
            interval="expanded percentile of the bootstrap; Student's t of the covariances; F of the profile",
            numpy=np.__version__,
            scipy=scipy.__version__,
            python=platform.python_version(),
        ),
    )


def _named(names: Sequence[str], values: Any) -> dict[str, Any]:
    """Values in the order of names, under them; numbers as Python's own."""
    return {n: float(v) if np.ndim(v) == 0 else v for n, v in zip(names, values, strict=True)}


def _columns(points: Points) -> dict[str, list[float]]:
    """The points as `fit.json` keeps them."""
    rows = np.arange(len(points)) if points.rows is None else points.rows
    columns = dict(N=points.N, D=points.D, C=points.C, L=points.L, row=rows)
    columns |= {} if points.sigma is None else {"sigma": points.sigma}
    columns |= {} if points.block is None else {"block": points.block}
    return {name: np.asarray(column).tolist() for name, column in (columns | dict(points.extra)).items()}


def _errors(
    problem: Problem, found: Solution, names: Sequence[str], derived: Sequence[str], matrix: np.ndarray
) -> list[tuple[str, float, bool]]:
    """(name, standard error, whether it is the logarithm's) of parameters and derived numbers."""
    law = problem.law
    logs = [name in law.logs for name in names] + [name not in EXPONENTS for name in derived]

    def numbers(p: np.ndarray) -> np.ndarray:
        each = {name: p[..., i] for i, name in enumerate(law.names)}
        told = [each[name] for name in names]
        told += [x for name, x in law.derived(each).items() if name in derived]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.stack([np.log(x) if log else x for x, log in zip(told, logs, strict=True)], -1)

    jacobian = parameter_jacobian(problem, found.phi, numbers)
    errors = np.sqrt(np.maximum(np.diag(jacobian @ matrix @ jacobian.T), 0.0))
    return list(zip((*names, *derived), map(float, errors), logs, strict=True))


def _profiles(
    problem: Problem, found: Solution, names: Sequence[str], level: float
) -> tuple[Solution, dict[str, dict]]:
    """The profile of every parameter with a coordinate; a lower objective met on the way is the optimum."""
    law = problem.law
    for _ in range(3):
        near = curvature(problem, found.phi)
        rise = near.cutoff * float(stats.f.ppf(level, 1, near.dof))
        errors = {name: error for name, error, _ in _errors(problem, found, names, (), near.gauss_newton)}
        told, best = {}, found.phi
        for name in names:
            if name in law.mixed:
                continue
            told[name], phi = profile(problem, found.phi, name, errors[name], rise)
            if _value(problem, phi) < _value(problem, best):
                best = phi
        gain = _value(problem, found.phi) - _value(problem, best)
        if gain <= 1e-9 * max(abs(found.value), 1e-300):
            return found, told
        lower = _value(problem, best)
        starts = [start | {"gap": start["value"] - lower} for start in found.starts]
        found = dataclasses.replace(found, phi=best, value=lower, starts=starts)
    return found, told


def _value(problem: Problem, phi: np.ndarray) -> float:
    return float(objective_value(problem, problem.residuals(phi)[0]))


# ------------------------------------------------------------------------------------------- jaxlm fit


def fit_command(
    path: str | Path,
    out: str | Path,
    *,
    columns: str = "",
    law: str = "chinchilla",
    method: str = "surface",
    objective: str = "huber",
    delta: float = 1e-3,
    where: str = "",
    drop_highest: int = 0,
    group: str = "",
    block: str = "",
    fix: Sequence[str] = (),
    tie: Sequence[str] = (),
    starts: int = 16,
    draws: int = 400,
    seed: int = 0,
    level: float = 0.95,
    profile: bool = True,
    pictures: bool = True,
) -> int:
    """What `jaxlm fit` does: fit a table, write OUT/fit.json and the pictures, print what was found.

    With `group` every value of that column is fitted apart, in OUT/VALUE; with `method='all'` every method,
    in OUT/METHOD, and their disagreement is told. Returns the exit code.

    Raises:
      UserError: bad flags or tables, before anything is written; a refusal of a fit by name.
    """
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 120)
    fixed = _assignments(fix)
    table = tables.read_table(path)
    roles = tables.parse_columns(columns)
    if block:
        roles["block"] = block
    parts = tables.groups(table, group) if group else {"": table}
    methods = METHODS if method == "all" else (method,)
    check_choice(method, (*METHODS, "all"), "--method")
    needs = get_law(law)
    roles_needed = tuple(dict.fromkeys(("N", "D", "L", *needs.inputs, needs.target)))
    if needs.inputs and not {"N", "D"} <= set(needs.inputs):
        roles_needed = tuple(dict.fromkeys((*needs.inputs, needs.target)))
    if any(m not in SURFACES for m in methods):
        roles_needed = tuple(dict.fromkeys((*roles_needed, "N", "D", "C", "L")))

    # Everything is read and checked before the first fit.
    chosen = {
        name: tables.select(part, roles, where=where, drop_highest=drop_highest, needs=roles_needed)
        for name, part in parts.items()
    }
    refused = 0
    for name, (points, excluded, notes) in chosen.items():
        fits = []
        for each in methods:
            options = dict(starts=starts, draws=draws, seed=seed, level=level, profile=profile)
            if each in SURFACES:
                options |= dict(fixed=fixed, ties=tuple(tie))
            folder = Path(out).joinpath(*filter(None, (name, each if len(methods) > 1 else "")))
            try:
                fit = run_fit(points, law, each, objective, delta, block=bool(block), **options)
            except UserError as error:
                if len(methods) == 1 and len(chosen) == 1:
                    raise
                refused += 1
                console.print(f"{folder}: refused: {error}", markup=False, highlight=False, soft_wrap=True)
                continue
            used = {"N": points.N, "D": points.D, "C": points.C, "L": points.L}
            fit = dataclasses.replace(
                fit,
                excluded=[dataclasses.asdict(row) for row in excluded],
                notes=[*notes, *fit.notes],
                data=dict(
                    path=str(path),
                    sha256=table.sha256,
                    rows=len(parts[name]),
                    used=len(points),
                    columns=tables.resolve(parts[name], roles),
                    where=where,
                    drop_highest=drop_highest,
                    group={group: name} if group else {},
                    ranges={role: [float(np.min(x)), float(np.max(x))] for role, x in used.items()},
                ),
            )
            fits.append(fit)
            written = [save_fit(fit, folder)]
            if pictures:
                written += draw_fit(fit, folder)
            for line in _tell(fit, written):
                console.print(line, markup=False, highlight=False, soft_wrap=isinstance(line, str))
        for told in compare(fits) if len(fits) > 1 else ():
            console.print(f"{told['level']} {told['name']}: {told['text']}", markup=False, soft_wrap=True)
    return 1 if refused else 0


def _assignments(pairs: Sequence[str]) -> dict[str, float]:
    """`E=1.69` as {'E': 1.69}."""
    out = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            out[name.strip()] = float(value)
        except ValueError:
            raise UserError(f"--fix={pair} must be NAME=NUMBER, such as E=1.69") from None
    return out


def _tell(fit: Fit, written: Sequence[Path]) -> list[Any]:
    """A table of parameters with their intervals, and what else a reader must know."""
    from rich.table import Table

    used, total = len(fit.points["L"]), fit.data["rows"]
    kinds = list(dict.fromkeys(kind for told in fit.intervals.values() for kind in told))
    title = f"{fit.law} by {fit.method}: {used} of {total} rows of {fit.data['path']}"
    table = Table(title=title, title_justify="left")
    table.add_column("parameter")
    table.add_column("value", justify="right")
    for kind in kinds:
        table.add_column(f"{100 * fit.level:g}% {kind.replace('_', '-')}", justify="right")
    for name, value in (fit.parameters | fit.derived).items():
        told = fit.intervals.get(name, {})
        cells = [f"{told[k][0]:.5g} to {told[k][1]:.5g}" if k in told else "" for k in kinds]
        table.add_row(name, f"{value:.7g}", *cells)
    lines: list[Any] = [table]
    if fit.method in SURFACES:
        good = sum(start["converged"] and abs(start["gap"]) <= 1e-8 for start in fit.starts)
        lines.append(
            f"objective {fit.value:.7g} ({fit.objective}, summed); {good} of {len(fit.starts)} starts end "
            f"within 1e-8 of it; residual sigma {100 * fit.sigma:.3g}% of the loss"
        )
    rules: dict[str, int] = {}
    for row in fit.excluded:
        rules[row["rule"]] = rules.get(row["rule"], 0) + 1
    lines += [f"excluded: {count} by {rule}" for rule, count in rules.items()]
    lines += [f"note: {note}" for note in fit.notes]
    lines += [f"{told['level']} {told['name']}: {told['text']}" for told in fit.diagnostics]
    folder = written[0].parent
    lines.append(f"{folder}: {', '.join(path.name for path in written)}")
    return lines
