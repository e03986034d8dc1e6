"""One update: sums over microbatches and devices, one division, one optimizer step.

    g = (sum over microbatches of d loss_sum / d params) / (sum of weights)

An objective is `objective(params, batch, key) -> (loss_sum, weight_sum, metrics)` where every metric is a
(sum, weight) pair. Because all of them are sums, the split of a batch into microbatches or devices cannot be
seen in the result, however unevenly the weights fall.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxlm.optim import grad_norm, learning_rate, nonfinite_counts
from jaxlm.sharding import HOST, constrain
from jaxlm.train.state import Params, TrainState
from jaxlm.tree import combine, named_leaves
from jaxlm.weights import beside, in_host, on_device

Batch = Any  # dict of arrays whose first dimension is the row
Pairs = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
Objective = Callable[[Params, Batch, jax.Array | None], tuple[Float[Array, ""], Float[Array, ""], Pairs]]
Step = Callable[[TrainState, Params | None, Batch], tuple[TrainState, Pairs]]


def whole(params: Params, frozen: Params | None) -> Params:
    """All parameters: the trainable ones, and the frozen ones if there are any."""
    return params if frozen is None else combine(params, frozen)


def split_rows(batch: Batch, microbatches: int) -> Batch:
    """`[B, ...]` leaves as `[M, B/M, ...]`; microbatch m gets the rows m, m + M, m + 2M, ...

    A device holds a block of consecutive rows. Cutting the batch into M consecutive pieces would put a whole
    piece on a few devices, so each microbatch would be sent around the mesh. Taking every M-th row takes
    the same share of every device's block, so that no row moves: reshape to [B/M, M], then swap.

    Raises:
        ValueError: M does not divide B.
    """

    def one(x: jax.Array) -> jax.Array:
        rows = x.shape[0]
        if rows % microbatches:
            raise ValueError(f"microbatches={microbatches} does not divide the batch of {rows} rows")
        x = x.reshape(rows // microbatches, microbatches, *x.shape[1:]).swapaxes(0, 1)
        rest = ("length",) if x.ndim == 3 else (None,) * (x.ndim - 2)
        return constrain(x, None, "batch", *rest)

    return jax.tree.map(one, batch)


def _accumulate(
    objective: Objective,
    params: Params,
    frozen: Params | None,
    batch: Batch,
    key: jax.Array,
    microbatches: int,
) -> tuple[Params, Float[Array, ""], Float[Array, ""], Pairs]:
    """`(gradient_sum, loss_sum, weight_sum, metrics)` of the whole batch."""

    def loss_sum(params: Params, rows: Batch, key: jax.Array) -> tuple[Float[Array, ""], tuple]:
        loss, weight, metrics = objective(whole(params, frozen), rows, key)
        return loss, (weight, metrics)

    grad = jax.value_and_grad(loss_sum, has_aux=True)

    def sums(rows: Batch, index: Any) -> tuple:
        (loss, (weight, metrics)), grads = grad(params, rows, jax.random.fold_in(key, index))
        return grads, loss, weight, metrics

    if microbatches == 1:
        return sums(batch, 0)

    def body(carry: tuple, xs: tuple) -> tuple[tuple, None]:
        # fp32 sums whatever the parameters' dtype: bf16 sums would lose the small microbatches.
        def add(a: jax.Array, b: jax.Array) -> jax.Array:
            return beside(on_device(a) + on_device(b).astype(a.dtype), a)

        return jax.tree.map(add, carry, sums(*xs)), None

    rows = split_rows(batch, microbatches)
    shapes = jax.eval_shape(sums, jax.tree.map(lambda x: x[0], rows), 0)
    grads, *rest = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    zeros = (jax.tree.map(beside, grads, params), *rest)
    total, _ = jax.lax.scan(body, zeros, (rows, jnp.arange(microbatches)))
    return total


def _norm(tree: Any) -> Float[Array, ""]:
    """Euclidean norm over all leaves, summed in fp32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


def _check_stable(old: TrainState, new: TrainState) -> None:
    """A state whose types change with the update would compile again at the next step and defeat donation."""
    for (name, a), (_, b) in zip(named_leaves(old), named_leaves(new), strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise ValueError(
                f"the update turns state leaf {name} from {a.dtype}{list(a.shape)} "
                f"into {b.dtype}{list(b.shape)}; "
                "the optimizer must keep the types of its state"
            )


def on_chip(shardings: Any) -> Any:
    """The shardings with every leaf in the device's own memory."""
    return jax.tree.map(lambda s: s.with_memory_kind("device") if s.memory_kind == HOST else s, shardings)


def to_host(x: jax.Array, sharding: Any) -> jax.Array:
    """`x` in the host's memory if that is where it is kept."""
    return jax.device_put(x, sharding) if sharding.memory_kind == HOST and not in_host(x) else x


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int = 1,
    shardings: TrainState | None = None,
    norms: bool = True,
) -> Step:
    """The jitted training step `step(state, frozen, batch) -> (state, metrics)`; `state` is donated.

    A batch whose total weight is 0 has gradient 0 (not NaN): momentum and weight decay still act.
    With `microbatches=1` there is no scan and no fp32 copy of the gradient.

    Args:
        objective: returns sums; its key is `fold_in(fold_in(state.key, step), microbatch)`.
        optimizer: gets the mean gradient; from `jaxlm.optim.make_optimizer`, or wrapped in its `guard`,
            because the norm and the counts of skipped updates are read from its state.
        microbatches: M; the rows are split in M parts that are run one after the other.
        shardings: where the state lies, `jax.tree.map(lambda x: x.sharding, state)`. Gradients and the new
            state are pinned to it, so that step 2 finds what step 1 found. None leaves that to the
            compiler.
        norms: report the norms of parameters and updates; costs one reading of both.

    Returns:
        A function whose metrics are `(sum, weight)` arrays, left on the device: those of the objective,
        `total` (the loss that is minimised) and `grad_norm` (before clipping), `lr`, `nonfinite` (1 if the
        loss or the gradient is), `skipped` (updates left out so far), `update_norm` and `param_norm`
        (before the update).

    Raises:
        ValueError: at the first call, if M does not divide the rows, or the optimizer changes its state's
            types.
    """
    if microbatches < 1:
        raise ValueError(f"microbatches={microbatches} must be at least 1")

    def step(state: TrainState, frozen: Params | None, batch: Batch) -> tuple[TrainState, Pairs]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl="threefry2x32"), state.step)
        with jax.named_scope("gradient"):
            grads, loss, weight, metrics = _accumulate(
                objective, state.params, frozen, batch, key, microbatches
            )
            grads = jax.tree.map(on_device, grads)
            if shardings is not None:
                grads = jax.lax.with_sharding_constraint(grads, on_chip(shardings.params))
            divisor = jnp.where(weight > 0, weight, 1.0)
            grads = jax.tree.map(lambda g: jnp.where(weight > 0, g / divisor, jnp.zeros_like(g)), grads)
        with jax.named_scope("optimizer"):
            params = jax.tree.map(on_device, state.params)
            updates, opt_state = optimizer.update(grads, state.opt_state, params)
            after = state.next(optax.apply_updates(params, updates), opt_state)
            if shardings is not None:
                after = jax.tree.map(to_host, after, shardings)
        _check_stable(state, after)

        skipped, in_a_row = nonfinite_counts(opt_state)
        scalars = {
            "grad_norm": grad_norm(opt_state),
            "lr": learning_rate(opt_state),
            "nonfinite": (in_a_row > 0) | ~jnp.isfinite(loss),
            "skipped": skipped,
        }
        if norms:
            scalars |= {"update_norm": _norm(updates), "param_norm": _norm(params)}
        one = jnp.ones((), jnp.float32)
        return after, {
            **metrics,
            "total": (loss, weight),
            **{name: (jnp.asarray(x, jnp.float32), one) for name, x in scalars.items()},
        }

    return jax.jit(step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))
