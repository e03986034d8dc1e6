"""From compute to a task in two steps: the law gives the loss, a sigmoid of the loss the accuracy.

Step 1 is an ordinary fit of the task's loss (bits per byte, mean of the last evaluations, Huber 1e-3 on
logs). Step 2 fits `loss_to_accuracy` to running averages of all evaluations of all runs after their first
tenth, and to the ideal point (loss 0, accuracy 1). Errors of the two steps may cancel: look at both. Source:
Bhagia et al. 2024, arXiv:2412.04403.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from jaxlm.errors import check
from jaxlm.scaling import laws
from jaxlm.scaling.fit import run_fit
from jaxlm.scaling.record import Fit, predict_loss
from jaxlm.scaling.table import Points

WINDOW = 5  # evaluations of a running average
SKIPPED = 0.1  # of the evaluations of a run, at its start


@dataclasses.dataclass(frozen=True)
class Chained:
    """What the two steps predict for one run, and how far each was off where the truth is given."""

    loss: float
    accuracy: float
    loss_error: float = float("nan")  # predicted / measured - 1, of step 1
    accuracy_error: float = float("nan")  # of step 2 at the measured loss
    chained_error: float = float("nan")  # of both


def last_evaluations(loss: Float64[np.ndarray, "E"], window: int = WINDOW) -> float:
    """The mean of the last evaluations of a run, what step 1 fits.

    >>> last_evaluations(np.array([9.0, 3, 2, 2, 2, 1]))
    2.0
    """
    return float(np.mean(loss[-window:]))


def smoothed(values: Float64[np.ndarray, "E"], window: int = WINDOW) -> Float64[np.ndarray, "S"]:
    """Running averages of a run's evaluations after its first tenth.

    >>> smoothed(np.arange(10.0), window=3)
    array([2., 3., 4., 5., 6., 7., 8.])
    """
    kept = values[int(np.ceil(SKIPPED * len(values))) :]
    check(len(kept) >= window, f"a run needs {window} evaluations after its first tenth, got {len(kept)}")
    return np.convolve(kept, np.full(window, 1 / window), "valid")


def fit_accuracy(
    runs: Sequence[tuple[Float64[np.ndarray, "E"], Float64[np.ndarray, "E"]]],
    *,
    ideal: bool = True,
    **options,
) -> Fit:
    """Step 2: accuracy of loss.

    Args:
      runs: (loss, accuracy) at every evaluation, run by run.
      ideal: add the point (loss 0, accuracy 1).
      options: of `fit.run_fit`; the objective is mse unless they say otherwise.

    Raises:
      UserError: too few evaluations, or an accuracy that is not positive.
    """
    loss = np.concatenate([smoothed(np.asarray(x, float)) for x, _ in runs] + [np.zeros(int(ideal))])
    accuracy = np.concatenate([smoothed(np.asarray(y, float)) for _, y in runs] + [np.ones(int(ideal))])
    block = np.repeat(
        np.arange(len(runs) + ideal), [len(smoothed(np.asarray(x))) for x, _ in runs] + [1] * ideal
    )
    nothing = np.full(len(loss), np.nan)
    # Loss 0 is no loss of a run; the sigmoid is flat there, and its value at e^-9 is the same.
    points = Points(
        nothing, nothing, nothing, np.maximum(loss, 1e-4), block=block, extra={"accuracy": accuracy}
    )
    return run_fit(points, "loss_to_accuracy", **({"objective": "mse", "block": True} | options))


def chain(
    step1: Fit, step2: Fit, N: float, D: float, *, loss: float = float("nan"), accuracy: float = float("nan")
) -> Chained:
    """Loss and accuracy of a run of N parameters and D tokens; both steps' errors where the truth is given.

    Args:
      step1: a fit of the task's loss; step2: one of `loss_to_accuracy` or `loss_to_error`.
      N: parameters. D: tokens.
      loss: measured. accuracy: measured.
    """
    law = laws.get_law(step2.law)
    check(law.inputs == ("L",), f"step 2 must be a law of the loss, not {step2.law!r}")
    predicted = float(predict_loss(step1, N, D))

    def second(x: float) -> float:
        return float(laws.predict(law, step2.parameters, {"L": x}))

    reached = second(predicted)
    known = np.isfinite(loss)
    return Chained(
        predicted,
        reached,
        predicted / loss - 1,
        second(loss) / accuracy - 1 if known else float("nan"),
        reached / accuracy - 1,
    )
