"""Gradient transformations by leaf name, and the names' meaning: what is a matrix, and along which axes.

All state is float32. A state array that belongs to a parameter has the parameter's name at the end of its
path and the parameter's rank, each dimension equal to the parameter's or 1: layouts derive from names.
"""

import math
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxlm.tree import combine, map_named, partition

Transform = optax.GradientTransformation

# Gains, offsets and other per-channel leaves: no matrices, however many dimensions they have.
VECTORS = (
    r"(^|/)(scale|bias|sinks|router_b(ias)?|b[qkvo](_rel)?|b_\w+|\w*norm)$|(^|/)(position_bias|distances)/"
)


# --- Names ---


def stacked(name: str) -> bool:
    """Whether the leaf has a leading dimension over layers."""
    return "blocks" in name.split("/")


def matrix_axes(name: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Axes, from the right, that are rows (inputs) and columns (outputs) of its matrices; None for vectors.

    All other axes (layers, experts) count matrices. Attention's input projections [D, N, H] are D x (N H) and
    its output projection [N, H, D] is (N H) x D.

    >>> matrix_axes("blocks/0/attention/wq", 4), matrix_axes("blocks/0/attention/wo", 4)
    (((-3,), (-2, -1)), ((-3, -2), (-1,)))
    >>> matrix_axes("blocks/0/moe/w_up", 4), matrix_axes("blocks/0/mlp_norm/scale", 2)
    (((-2,), (-1,)), None)
    """
    if re.search(VECTORS, name) or ndim - stacked(name) < 2:
        return None
    leaf = name.rsplit("/", 1)[-1]
    if leaf in ("wq", "wk", "wv", "wq_rel", "wk_rel", "wq_up", "wk_up", "wv_up"):
        return (-3,), (-2, -1)
    if leaf == "wo":
        return (-3, -2), (-1,)
    return (-2,), (-1,)


def owner_of(name: str, params: Collection[str]) -> str | None:
    """The parameter to which a leaf of the optimizer's state belongs: that whose name ends its own, if any.

    >>> owner_of("inner/0/mu/head/w", {"head/w", "embed/w"})
    'head/w'
    """
    parts = name.split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if end in params), None)


def is_router_bias(name: str, leaf: Any) -> bool:
    return name.rsplit("/", 1)[-1] == "router_bias"


# --- Transforms ---


class SplitState(NamedTuple):
    """States of two transformations that share a tree; either has holes (None) where the other has leaves."""

    yes: Any
    no: Any


def split(predicate: Callable[[str, Any], bool], yes: Transform, no: Transform) -> Transform:
    """Send the leaves for which `predicate(name, leaf)` holds through `yes` and the others through `no`."""

    def init(params):
        chosen, others = partition(params, predicate)
        return SplitState(yes.init(chosen), no.init(others))

    def update(grads, state, params=None):
        chosen, others = partition(grads, predicate)
        chosen_params, other_params = partition(params, predicate)
        chosen, yes_state = yes.update(chosen, state.yes, chosen_params)
        others, no_state = no.update(others, state.no, other_params)
        return combine(chosen, others), SplitState(yes_state, no_state)

    return optax.GradientTransformation(init, update)


def with_eps_factors(adam: Transform, factor: Callable[[str], float]) -> Transform:
    """Adam with an epsilon that is multiplied by `factor(leaf name)`.

    m / (sqrt(v) + f eps) is what Adam makes of the gradient divided by f, so the moments kept are those of
    g / f.
    """

    def update(grads, state, params=None):
        return adam.update(map_named(lambda name, g: g / factor(name), grads), state, params)

    return optax.GradientTransformation(adam.init, update)


class FactoredState(NamedTuple):
    """Adafactor's second moments: `v_row` and `v_col` of factored leaves, `v` of the rest; else None."""

    count: Int[Array, ""]
    v_row: Any
    v_col: Any
    v: Any


def scale_by_adafactor(factor_min: int = 128, parameter_scale: bool = False) -> Transform:
    """Divide by a root second moment that is kept, for each matrix, as row and column means.

        b = 1 - t^-0.8;  R = b R + (1 - b) mean_columns(g^2 + 1e-30);  C likewise over rows
        u = g / sqrt(R C / mean(R));  u / max(1, RMS(u));  with `parameter_scale`, * max(1e-3, RMS(parameter))

    Optax's own factors the two largest dimensions of an array, which may be the stacked layers, and takes its
    RMS over all layers at once. Here rows and columns are `matrix_axes`, and each RMS is one layer's (one
    expert's). Means keep dimensions: for a [L, D, N, H] leaf `v_row` is [L, D, 1, 1], `v_col` [L, 1, N, H].

    Source: arXiv:1804.04235, without its relative step size and momentum. Arguments: see `OptimConfig`.
    """

    def averaged(name: str, leaf: Array) -> tuple[tuple[int, ...] | None, ...]:
        """Axes averaged away in `v_row`, `v_col` and `v`; None where the leaf has no such moment."""
        axes = matrix_axes(name, leaf.ndim)
        if axes and min(math.prod(leaf.shape[axis] for axis in group) for group in axes) >= factor_min:
            return axes[1], axes[0], None
        return None, None, ()

    def init(params):
        def zeros(part: int):
            def leaf_zeros(name, p):
                if (axes := averaged(name, p)[part]) is not None:
                    return jnp.zeros(
                        [1 if i - p.ndim in axes else n for i, n in enumerate(p.shape)], jnp.float32
                    )

            return map_named(leaf_zeros, params)

        return FactoredState(jnp.zeros([], jnp.int32), zeros(0), zeros(1), zeros(2))

    def update(grads, state, params=None):
        count = optax.safe_increment(state.count)
        b = 1.0 - count.astype(jnp.float32) ** -0.8

        def moments(part: int):
            def moment(name, g, old):
                if old is not None:
                    return b * old + (1.0 - b) * jnp.mean(
                        g * g + 1e-30, averaged(name, g)[part], keepdims=True
                    )

            return map_named(moment, grads, state[1 + part])

        v_row, v_col, v = moments(0), moments(1), moments(2)

        def direction(name, g, row, col, whole, param):
            axes = matrix_axes(name, g.ndim)
            if row is None:
                u = g * jax.lax.rsqrt(whole)
            else:
                u = g * jax.lax.rsqrt(row / jnp.mean(row, axes[0], keepdims=True)) * jax.lax.rsqrt(col)
            block = axes[0] + axes[1] if axes else tuple(range(int(stacked(name)), g.ndim))
            u = u / jnp.maximum(1.0, jnp.sqrt(jnp.mean(u * u, block, keepdims=True)))
            if parameter_scale:
                p = param.astype(jnp.float32)
                u = u * jnp.maximum(1e-3, jnp.sqrt(jnp.mean(p * p, block, keepdims=True)))
            return u

        updates = map_named(direction, grads, v_row, v_col, v, params)
        return updates, FactoredState(count, v_row, v_col, v)

    return optax.GradientTransformation(init, update)


def scale_matrices(rms: float) -> Transform:
    """Multiply r x c orthogonalised updates by rms * sqrt(max(r, c)), or by sqrt(max(1, c / r)) if rms is 0.

    An orthogonal matrix has RMS 1 / sqrt(max(r, c)), so the first gives every matrix the same RMS and lets
    Muon share AdamW's learning rate and decay. Sources: arXiv:2502.16982; github.com/KellerJordan/Muon.
    """

    def scale(name: str, u: Array) -> Array:
        rows, columns = (math.prod(u.shape[axis] for axis in group) for group in matrix_axes(name, u.ndim))
        return u * (rms * math.sqrt(max(rows, columns)) if rms else math.sqrt(max(1.0, columns / rows)))

    return optax.stateless(lambda updates, params: map_named(scale, updates))


class EmaState(NamedTuple):
    """Average of the parameters, float32."""

    ema: Any


def average_params(decay: float) -> Transform:
    """Keep ema = decay * ema + (1 - decay) * (parameters after this update), starting from the first."""

    def init(params):
        # A copy: parameters and optimizer state are both donated, so they must not share a buffer.
        return EmaState(jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params))

    def update(updates, state, params=None):
        new = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p.astype(jnp.float32), state.ema, new)
        return updates, EmaState(ema)

    return optax.GradientTransformation(init, update)


class GuardState(NamedTuple):
    """The last gradient's norm before clipping, and updates skipped in total and in a row."""

    grad_norm: Float[Array, ""]
    nonfinite: Int[Array, ""]
    nonfinite_run: Int[Array, ""]
    inner: Any


def guard(inner: optax.GradientTransformation, clip_norm: float) -> Transform:
    """Clip by global norm, and skip the update when the norm is not finite.

    The norm, computed once in float32, serves clipping (g * min(1, clip_norm / norm)), the metric and the
    check, since one NaN or infinity makes it non-finite. `router_bias` leaves are checked, but are no part of
    it.

    A skipped update leaves parameters and inner state unchanged to the bit (the schedule's count, too).
    Unlike `optax.apply_if_finite`, this reads gradients once and never applies a bad update: the caller stops
    on `nonfinite_counts`. It is a `lax.cond`: with a select between old and new state, XLA:CPU copies both
    moments, which takes an update of AdamW a third longer.

    Args:
        inner: gets float32 gradients and the parameters.
        clip_norm: largest global norm; 0 = no clipping.
    """

    def init(params):
        norm, total, run = jnp.zeros([], jnp.float32), jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        return GuardState(norm, total, run, inner.init(params))

    def update(grads, state, params=None):
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        biases, weights = partition(grads, is_router_bias)
        norm = optax.tree.norm(weights)
        ok = jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(biases))
        scale = clip_norm / jnp.maximum(norm, clip_norm) if clip_norm else 1.0

        def apply():
            clipped = combine(biases, jax.tree.map(lambda g: g * scale, weights))
            return inner.update(clipped, state.inner, params)

        def skip():
            # -0.0 is the zero that leaves every number's bits alone: -0.0 + 0.0 would be 0.0.
            return jax.tree.map(lambda g: jnp.full_like(g, -0.0), grads), state.inner

        updates, new_inner = jax.lax.cond(ok, apply, skip)
        return updates, GuardState(
            grad_norm=norm,
            nonfinite=jnp.where(ok, state.nonfinite, optax.safe_increment(state.nonfinite)),
            nonfinite_run=jnp.where(ok, 0, optax.safe_increment(state.nonfinite_run)),
            inner=new_inner,
        )

    return optax.GradientTransformation(init, update)
