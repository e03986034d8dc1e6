"""Gradient noise scale: how many tokens a batch can hold before a larger one is a waste of tokens.

A batch of W tokens is cut into parts of w_1, w_2, ... tokens, each with its mean gradient g_i; the mean over
the batch is g. With the true gradient G and per-token noise of total variance tr(S), E|g_i|^2 = |G|^2 +
tr(S) / w_i and E|g|^2 = |G|^2 + tr(S) / W, so that

    tr(S) = (mean_i |g_i|^2 - |g|^2) / (mean_i 1/w_i - 1/W),     |G|^2 = |g|^2 - tr(S) / W

are unbiased however the batch is cut. With equal parts this is the two-batch estimator
|G|^2 = (W |g|^2 - w |g_i|^2) / (W - w). Both are averaged over measurements before they are divided:

    B_simple = tr(S) / |G|^2      in tokens (target tokens, that is, units of the loss's weight).

To reach a given loss in S steps and E tokens, (S / S_min - 1) (E / E_min - 1) = 1, and B_simple estimates the
critical batch E_min / S_min: at B = B_simple training takes twice the fewest steps and the fewest tokens.
Rows are what is drawn independently, so parts are whole rows; tokens of one row are not independent of each
other, and what that adds to the noise is part of tr(S). Source: arXiv:1812.06162, Appendix A.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.errors import UserError
from jaxlm.sharding import constrain
from jaxlm.train.state import Params, TrainState
from jaxlm.train.step import Batch, Objective, split_rows, whole
from jaxlm.tree import named_leaves

Squares = tuple[Float[Array, " M"], Float[Array, " M"], Float[Array, ""]]
DECAY = 0.95  # of the averages over measurements


def choose_parts(batch_size: int, shards: int = 1, most: int = 8) -> int:
    """How many equal parts of whole rows to cut a batch into: the most that fit, up to `most`.

    Args:
        batch_size: rows B.
        shards: mesh devices that share the rows; each part is spread over all of them.
        most: parts at most; at least the microbatches of a step, so that a part fits where they do.

    Raises:
        UserError: there are no two parts to compare.

    >>> choose_parts(16), choose_parts(12), choose_parts(16, shards=4)
    (8, 6, 4)
    """
    fitting = [n for n in range(2, most + 1) if batch_size % (n * shards) == 0]
    if not fitting:
        least = 2 * shards
        raise UserError(
            f"train.noise_scale_every cuts a batch in 2 to {most} equal parts, each on {shards} devices; "
            f"data.batch_size={batch_size} cannot be, {-(-batch_size // least) * least} could"
        )
    return max(fitting)


def _square(grads: Params) -> Float[Array, ""]:
    """Squared norm in float32, without `router_bias`: its rule reads a sign, no gradient of the loss."""
    kept = [leaf for name, leaf in named_leaves(grads) if not name.endswith("router_bias")]
    return sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in kept)


def make_part_squares(objective: Objective, parts: int) -> Callable[..., Squares]:
    """The jitted `squares(params, frozen, batch, key) -> (|g_i|^2 [M], w_i [M], |g|^2)`.

    The parts are run one after the other; one gradient and one sum of gradients exist at a time. A part of
    weight 0 has |g_i|^2 = 0.
    """

    def squares(params: Params, frozen: Params | None, batch: Batch, key: jax.Array | None) -> Squares:
        def loss_sum(params: Params, rows: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            loss, weight, _ = objective(whole(params, frozen), rows, key)
            return loss, weight

        def body(total: Params, xs: tuple[Batch, jax.Array]) -> tuple[Params, tuple[jax.Array, jax.Array]]:
            rows, index = xs
            part_key = None if key is None else jax.random.fold_in(key, index)
            grads, weight = jax.grad(loss_sum, has_aux=True)(params, rows, part_key)
            total = jax.tree.map(lambda a, g: a + g.astype(a.dtype), total, grads)
            return total, (_square(grads) / jnp.where(weight > 0, weight, 1.0) ** 2, weight)

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        rows = split_rows(batch, parts)
        total, (part_squares, weights) = jax.lax.scan(body, zeros, (rows, jnp.arange(parts)))
        whole_weight = jnp.maximum(weights.sum(), 1e-30)
        # Replicated, so that every host of a mesh can read them.
        measured = part_squares, weights, _square(total) / whole_weight**2
        return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), measured)

    return jax.jit(squares)


def estimate(
    part_squares: Float[Array, " M"], weights: Float[Array, " M"], whole_square: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(|G|^2, tr(S)) of one batch, unbiased, so either may come out negative; nan with fewer than two parts.

    Args:
        part_squares: |g_i|^2.
        weights: w_i; parts of weight 0 are left out.
        whole_square: |g|^2.

    >>> g2, trace = estimate(jnp.array([4.0, 0.0]), jnp.array([8.0, 8.0]), jnp.array(1.0))
    >>> float(g2), float(trace)
    (0.0, 16.0)
    """
    real = weights > 0
    count = real.sum()
    mean = lambda x: jnp.sum(jnp.where(real, x, 0.0)) / jnp.maximum(count, 1)  # noqa: E731
    inverse = mean(1.0 / jnp.where(real, weights, 1.0)) - 1.0 / jnp.maximum(weights.sum(), 1e-30)
    trace = (mean(part_squares) - whole_square) / jnp.where(count > 1, inverse, jnp.nan)
    return whole_square - trace / weights.sum(), trace


class NoiseScale:
    """Periodic work: measures the gradient noise of one batch and keeps averages over measurements.

    It reads the state and changes nothing: the run is the same with and without it. A measurement costs about
    one more step.
    """

    def __init__(
        self,
        squares: Callable[..., Squares],
        source: Callable[[int], Batch],
        *,
        tokens_per_step: int,
        frozen: Params | None = None,
        dropout: bool = False,
        history: Iterable[Mapping[str, float | None]] = (),
    ) -> None:
        """Prepare the measurements.

        Args:
            squares: from `make_part_squares`.
            source: step -> the batch that the next update will see, which the parameters have not.
            tokens_per_step: B of the run, that B_simple is compared with.
            frozen: parameters that are not trained.
            dropout: draw the step's dropout in every part, which is noise as well.
            history: rows of metrics of earlier starts, from which the averages go on.
        """
        self._squares, self._source, self._frozen = squares, source, frozen
        self._tokens, self._dropout = tokens_per_step, dropout
        self._square = self._trace = self._weight = 0.0
        for row in history:
            if row.get("noise/grad_square") is not None and row.get("noise/trace") is not None:
                self._add(row["noise/grad_square"], row["noise/trace"])

    def _add(self, square: float, trace: float) -> None:
        self._square = DECAY * self._square + (1 - DECAY) * square
        self._trace = DECAY * self._trace + (1 - DECAY) * trace
        self._weight = DECAY * self._weight + (1 - DECAY)

    def __call__(self, step: int, state: TrainState) -> dict[str, float]:
        """Measure at `state`.

        Returns:
            `noise/grad_square` |G|^2 and `noise/trace` tr(S) of this batch; and of the averages
            `noise/b_simple` in tokens and `noise/steps_factor`, 1 + B_simple / B, the steps taken over the
            fewest possible. The last two are missing where the noise drowns the gradient so far (average
            |G|^2 not above 0) or the reverse; all four where the gradient is not finite.
        """
        key = None
        if self._dropout:
            key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl="threefry2x32"), step)
        measured = self._squares(state.params, self._frozen, self._source(step), key)
        square, trace = (float(x) for x in estimate(*measured))
        if not (math.isfinite(square) and math.isfinite(trace)):
            return {}
        self._add(square, trace)
        row: dict[str, Any] = {"noise/grad_square": square, "noise/trace": trace}
        if self._square > 0 and self._trace > 0:
            simple = self._trace / self._square
            row |= {"noise/b_simple": simple, "noise/steps_factor": 1.0 + simple / self._tokens}
        return row
