"""From compute to a task in two steps: a law gives the loss, a sigmoid of the loss the accuracy.

Step 1 is an ordinary fit of the task's loss (bits per byte, mean of the last evaluations, Huber 1e-3 on
logs). Step 2 fits `loss_to_accuracy` by least squares to running averages of all evaluations of all runs
after their first tenth, and to the ideal point (loss 0, accuracy 1). Errors of the two steps may cancel:
`diagnostics.two_step` compares both with held-out runs. Source: Bhagia et al. 2024, arXiv:2412.04403.
"""

import dataclasses

import numpy as np
from jaxtyping import Float64

from jaxlm.errors import check
from jaxlm.scaling.design_checks import Found, found
from jaxlm.scaling.laws import get_law
from jaxlm.scaling.predict import Estimate, calibrated, central, law_rows, noisy, outside, tail_of
from jaxlm.scaling.record import Fit
from jaxlm.scaling.table import Points

WINDOW = 5  # evaluations of a running average
SKIPPED = 0.1  # of the evaluations of a run, at its start
IDEAL = 1e-4  # the ideal point's loss: 0 is no loss of a run, and the sigmoid's value at e^-9 is the same


@dataclasses.dataclass(frozen=True)
class Chained:
    """What two steps predict for a run: each interval holds what its comment says."""

    target: str  # role of the column that step 2 fitted
    level: float
    loss: Estimate  # of step 1: law and noise of a run
    value: Estimate  # both laws, noise of a run's loss, and of the metric about its law
    value_law: Estimate  # both laws alone
    of_loss: Estimate  # what step 1 alone leaves open: its law and the noise of a run's loss
    of_step: Estimate  # what step 2 alone leaves open: its law at the predicted loss
    diagnostics: list[dict]


def smoothed(values: Float64[np.ndarray, "E"], window: int = WINDOW) -> Float64[np.ndarray, "S"]:
    """Running averages of a run's evaluations after its first tenth.

    >>> smoothed(np.arange(10.0), window=3)
    array([2., 3., 4., 5., 6., 7., 8.])
    """
    kept = values[int(np.ceil(SKIPPED * len(values))) :]
    check(len(kept) >= window, f"a run needs {window} evaluations after its first tenth, got {len(kept)}")
    return np.convolve(kept, np.full(window, 1 / window), "valid")


def averaged(evaluations: Points) -> Points:
    """What step 2 is fitted to: running averages of the evaluations of every run, and the ideal point.

    Args:
      evaluations: one point each, those of a run in order; `block` says which run, extra holds accuracy.

    Returns:
      Points of loss and accuracy, runs as blocks; row -1 is the ideal point, of a block of its own.

    Raises:
      UserError: no blocks, or too few evaluations of a run.
    """
    check(evaluations.block is not None, "--evaluations needs --block, the column that names the run")
    check(evaluations.sigma is None, "--evaluations averages rows: leave sigma out of --columns")
    runs = [np.flatnonzero(evaluations.block == run) for run in np.unique(evaluations.block)]
    for run, rows in zip(np.unique(evaluations.block), runs, strict=True):
        kept = len(rows) - int(np.ceil(SKIPPED * len(rows)))
        check(kept >= WINDOW, f"run {run} has {kept} evaluations after its first tenth; it needs {WINDOW}")
    loss = [smoothed(evaluations.L[rows]) for rows in runs]
    accuracy = [smoothed(evaluations.extra["accuracy"][rows]) for rows in runs]
    block = np.repeat(np.arange(len(runs) + 1), [*map(len, loss), 1])
    of_table = np.arange(len(evaluations)) if evaluations.rows is None else evaluations.rows
    nothing = np.full(len(block), np.nan)
    return Points(
        nothing,
        nothing,
        nothing,
        np.concatenate([*loss, [IDEAL]]),
        block=block,
        extra={"accuracy": np.concatenate([*accuracy, [1.0]])},
        rows=np.concatenate([*(of_table[r][-len(x) :] for r, x in zip(runs, loss, strict=True)), [-1]]),
    )


def chain(loss_fit: Fit, metric_fit: Fit, rows: Float64[np.ndarray, "S"], level: float = 0.95) -> Chained:
    """The metric of a run whose loss step 1 predicts, with the uncertainty of both steps.

    The draws of the two fits are independent: every draw of step 2 is taken at every draw of step 1, each
    with one draw of the noise.

    Args:
      loss_fit: step 1.
      metric_fit: step 2: of `loss_to_accuracy` or `loss_to_error`.
      rows: the loss that step 1 gives the run (`predict.law_rows`, `predict.best_loss`): the estimate, then
        the draws.
      level: of the intervals.

    Raises:
      UserError: step 2 is no law of the loss. Refusal: no_interval (no draws).
    """
    check(0 < level < 1, f"level={level} must lie between 0 and 1")
    law = get_law(metric_fit.law)
    check(law.inputs == ("L",), f"step 2 must be a law of the loss, not {metric_fit.law!r}")
    rng = np.random.default_rng(0)
    loss, fits = float(rows[0]), (loss_fit, metric_fit)
    laws = calibrated(loss_fit, rows)
    runs = laws * np.exp(loss_fit.sigma * rng.normal(size=len(laws)))
    good = (laws > 0) & (runs > 0)

    def second(losses: Float64[np.ndarray, "M"]) -> Float64[np.ndarray, "S M"]:
        """Step 2 at losses: the estimate in row 0, then its draws at their calibrated spread."""
        values = law_rows(metric_fit, {"L": losses})
        return np.vstack([values[:1], calibrated(metric_fit, values)])

    value, at_loss = float(second(rows[:1])[0, 0]), second(rows[:1])[1:, 0]
    of_laws, of_runs = second(laws[good]), second(runs[good])
    scattered = of_runs[1:] * np.exp(metric_fit.sigma * rng.normal(size=of_runs[1:].shape))
    # Few blocks of either step widen both; the draws are calibrated already.
    tail = min(tail_of(fit, level, noisy=True) for fit in fits)
    return Chained(
        law.target,
        level,
        central(loss, noisy(loss_fit, rows), tail_of(loss_fit, level, noisy=True)),
        central(value, scattered.ravel(), tail),
        central(value, of_laws[1:].ravel(), tail),
        central(value, of_runs[0], tail_of(loss_fit, level, noisy=True)),
        central(value, at_loss, tail_of(metric_fit, level, noisy=True)),
        outside(metric_fit, {"L": loss}),
    )


def unchecked() -> Found:
    """What to say of two steps that no held-out run has tested."""
    text = "no held-out run tells whether errors of the two steps cancel: give some with --measured"
    return found("steps_unchecked", "note", text, 0)
