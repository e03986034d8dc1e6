"""Back-tests: each fit again without its largest budgets, against the runs of the next one.

A hold-out costs a run; a back-test costs a fit, and says before that run how far one step of extrapolation
was off in these very runs, and on which side: rolling-origin evaluation (Tashman 2000, International Journal
of Forecasting 16). It is what a choice between methods may rest on; the hold-out then is not.
"""

import dataclasses

import numpy as np

from jaxlm.errors import UserError
from jaxlm.scaling.bands import LEAST_DRAWS, has_optimum, is_surface
from jaxlm.scaling.comparisons import HeldOut
from jaxlm.scaling.evidence import Evidence, fitted_points, judged, refit
from jaxlm.scaling.record import Fit
from jaxlm.scaling.table import Points
from jaxlm.scaling.vertices import find_budgets, size_labels

LEAST_BUDGETS = 3  # that a fit is made from
LATEST = 5  # budgets that are predicted, the largest ones: each costs a refit of every fit


@dataclasses.dataclass(frozen=True)
class BackTest:
    """A fit of the smaller budgets, judged by the next one; without `runs`, `text` says why."""

    label: str  # of the fit
    budget: float  # FLOPs, predicted from the budgets below
    beyond: float  # the budget over the largest that was fitted
    fitted: int  # runs that were fitted
    runs: list[HeldOut]
    text: str

    @property
    def error(self) -> float:
        """Mean of log(measured / predicted)."""
        return float(np.mean([np.log1p(run.error) for run in self.runs]))

    @property
    def inside(self) -> int:
        """Runs inside their prediction interval."""
        return sum(run.inside for run in self.runs)


def back_tests(evidence: Evidence) -> tuple[list[BackTest], str]:
    """Every fit that has an optimum, at the largest budgets that leave three below; and why there is none.

    Line methods predict the lowest loss of a budget, where the mean over seeds counts: the luckiest seed's
    would be too low.
    """
    table, out = evidence.table, []
    if table is None:
        return [], "there is no table"
    why = "there is no fit that could be tested"
    for label, fit in evidence.fits.items():
        if not has_optimum(fit) or "C" not in fit.points or evidence.stale(fit):
            continue
        points, names = fitted_points(table, fit)
        budgets, _ = find_budgets(points)
        if len(budgets) <= LEAST_BUDGETS:
            why = f"the runs have {len(budgets)} budgets, {LEAST_BUDGETS + 1} are needed"
        for i in range(max(LEAST_BUDGETS, len(budgets) - LATEST), len(budgets)):
            largest = budgets[i - 1].flops
            between = np.sqrt(largest * budgets[i].flops)
            below = np.flatnonzero(between > points.C)
            again = refit(fit, points.take(below), "back-test", label)
            test = BackTest(label, budgets[i].flops, budgets[i].flops / largest, len(below), [], again.text)
            if again.fit is not None:
                new, ids = points.take(budgets[i].index), [names[j] for j in budgets[i].index]
                runs, text = _judged(again.fit, *((new, ids) if is_surface(fit) else _one_a_size(new, ids)))
                test = dataclasses.replace(test, runs=runs, text=text)
            out.append(test)
    return out, "" if out else why


def _judged(fit: Fit, points: Points, names: list[str]) -> tuple[list[HeldOut], str]:
    """The runs beside their predictions, or why there are none."""
    if len(fit.draws) < LEAST_DRAWS:
        return [], f"{len(fit.draws)} bootstrap draws: no interval"
    try:
        runs = judged(fit, points, names)
    except UserError as error:
        return [], f"refused: {error}"
    return runs, "" if runs else "no line of losses"


def _one_a_size(points: Points, names: list[str]) -> tuple[Points, list[str]]:
    """The points with the mean loss of each size in place of its runs."""
    labels = size_labels(points.N)
    first = np.unique(labels, return_index=True)[1]
    means = np.bincount(labels, points.L) / np.bincount(labels)
    return dataclasses.replace(points.take(first), L=means), [names[i] for i in first]
