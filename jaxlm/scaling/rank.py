"""Whether the runs can tell a law's parameters apart: different values of each input do, not runs alone."""

import dataclasses

import numpy as np

from jaxlm.scaling.laws import features
from jaxlm.scaling.lines import Refusal
from jaxlm.scaling.problem import Problem
from jaxlm.scaling.solve import first_points
from jaxlm.scaling.table import Points

TRIED = 8  # points of the start grid at which the rank is taken: at a few it is lower by chance
SMALL = 1e-11  # a singular value of the scaled gradients, relative to the largest, that is rounding


def require_rank(problem: Problem, points: Points, law: str) -> None:
    """Refuses runs of too few different N, D, ... for the parameters that are free: `too_few_N` and so on.

    The gradients of the law at the runs, one column a free coordinate, must be independent. Where they are
    not, and would be if an input that takes few values took more of them, that input is named. What no
    number of values would mend (repeats that no run has) is left to the alarms of the fit.
    """
    free = len(problem.lower)
    grid = problem.law.starts(problem.x, problem.y)
    starts = first_points(problem, grid[np.linspace(0, len(grid) - 1, min(TRIED, len(grid))).astype(int)])
    if _rank(problem, starts) == free:
        return
    given = {"N": points.N, "D": points.D, "C": points.C, "L": points.L, **points.extra}
    inputs = {role: np.asarray(given[role], float) for role in problem.law.inputs}
    for role, column in inputs.items():
        values = np.unique(column)
        if len(values) >= free:
            continue
        for count in range(len(values), free + 2):
            # Dealt out in a random order, every value about as often: as many values as there are, too.
            places = np.random.default_rng(0).permutation(np.arange(len(column)) % count)
            moved = dataclasses.replace(problem, x=features(inputs | {role: _spread(values, count)[places]}))
            if _rank(moved, starts) == free:
                if count == len(values):
                    break  # their number is not the reason, but which runs have which
                raise Refusal(f"too_few_{role}", _text(problem, law, role, len(values), count))


def _rank(problem: Problem, starts: np.ndarray) -> int:
    """The largest rank of the law's gradients at phi (S, F), each column scaled to length 1."""
    jac = problem.law.form(problem.coordinates(starts), problem.x)[1] @ problem.basis
    norm = np.linalg.norm(jac, axis=1, keepdims=True)
    values = np.linalg.svd(jac / np.maximum(norm, 1e-300), compute_uv=False)
    return int((values > SMALL * values[:, :1]).sum(-1).max())


def _spread(values: np.ndarray, count: int) -> np.ndarray:
    """So many different values over the range of these, at least a factor of 4 (of a share: up to .9)."""
    low, high = float(values.min()), float(values.max())
    if low <= 0 or high < 1:
        return np.linspace(low, max(high, 0.9), count)
    return np.geomspace(low, max(high, 4 * low), count)


def _text(problem: Problem, law: str, role: str, seen: int, needed: int) -> str:
    names = ", ".join(n for n, row in zip(problem.law.names, problem.basis, strict=True) if np.any(row))
    both = problem.law.target == "L" and {"N", "D"} <= set(problem.law.inputs)
    other = {"D": "loss_n", "N": "loss_d"}.get(role, "") if both else ""
    alone = f", or fit a law in {'N' if role == 'D' else 'D'} alone, --law={other}" if other else ""
    return (
        f"law {law!r} with {names} free needs {needed} different {role} and these runs have {seen}: other "
        f"parameters fit as well. Add runs at other {role}, hold parameters with --fix{alone}"
    )
