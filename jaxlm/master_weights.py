"""How parameters kept in bf16 are updated: through a float32 copy, or with stochastic rounding.

bf16 has 8 bits: a weight near 1 moves in steps of 2 ** -8, so that updates of lr 1e-3 round to nothing or to
too much. Either the optimizer updates a float32 copy that is kept in its state, and the parameter is that
copy, rounded; or the sum of parameter and update is rounded up or down at random, right on average, and there
is no copy.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32, Int

from jaxlm.errors import check
from jaxlm.tree import combine, map_named, named_leaves


class MasterState(NamedTuple):
    """State of `keep_master` where some parameter is below float32."""

    inner: Any
    master: Any  # float32 copies of the low-precision leaves; None for the others


def _master(params: Any) -> Any:
    low = lambda p: jnp.finfo(p.dtype).bits < 32  # noqa: E731
    return jax.tree.map(lambda p: p.astype(jnp.float32) if low(p) else None, params)


class RoundingState(NamedTuple):
    """State of `round_at_random`: updates so far, which the random numbers are drawn from."""

    inner: Any
    count: Int[Array, ""]


def _as_float32(params: Any) -> Any:
    return jax.tree.map(lambda p: p.astype(jnp.float32), params)


def stochastic_round(x: Float32[Array, "*S"], key: Array) -> BFloat16[Array, "*S"]:
    """`x` in bf16, up or down at random, so that its expected value is `x` (arXiv:1502.02551).

    Uniform bits are added to the 16 that bf16 does not have, and the sum is cut off. Infinities and NaN stay.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    cut = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), cut, x.astype(jnp.bfloat16))


def round_at_random(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Add `inner`'s float32 updates to bf16 parameters with stochastic rounding; other dtypes as ever.

    Random numbers are functions of (leaf name, update): the same on every mesh and after a resume. They are
    independent of the run's seed, from which dropout and initial values come.

    >>> optimizer = round_at_random(optax.sgd(1e-3))
    >>> w = jnp.ones(4096, jnp.bfloat16)
    >>> update, _ = optimizer.update(jnp.ones(4096), optimizer.init(w), w)
    >>> w = optax.apply_updates(w, update)
    >>> sorted({float(x) for x in w}), abs(float(w.astype(jnp.float32).mean()) - 0.999) < 1e-4
    ([0.99609375, 1.0], True)
    """

    def init(params: Any) -> RoundingState:
        for name, p in named_leaves(params):
            known = p.dtype == jnp.bfloat16 or jnp.finfo(p.dtype).bits >= 32
            check(
                known, f"{name} is {p.dtype}: optim.low_precision='stochastic' is for bfloat16; use 'master'"
            )
        return RoundingState(inner.init(_as_float32(params)), jnp.zeros([], jnp.int32))

    def update(grads: Any, state: RoundingState, params: Any = None) -> tuple[Any, RoundingState]:
        updates, inner_state = inner.update(grads, state.inner, _as_float32(params))
        step_key = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), state.count)

        def step(name: str, u: Array, p: Array) -> Array:
            if p.dtype != jnp.bfloat16:
                return u
            key = jax.random.fold_in(step_key, zlib.crc32(name.encode()))
            old = p.astype(jnp.float32)
            # A difference of two bf16 numbers this close is exact, so `apply_updates` lands on the rounded.
            return stochastic_round(old + u.astype(jnp.float32), key).astype(jnp.float32) - old

        return map_named(step, updates, params), RoundingState(inner_state, state.count + 1)

    return optax.GradientTransformation(init, update)


def keep_master(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Let `inner` see and update float32 copies of the parameters that are kept in bf16 or fp16.

    Its updates are float32 differences between the rounded copy and the parameter, so that
    `optax.apply_updates` lands on the rounded copy. With float32 parameters it is `inner` itself.

    >>> optimizer = keep_master(optax.sgd(1e-3))
    >>> w = jnp.ones((), jnp.bfloat16)
    >>> state = optimizer.init(w)
    >>> for _ in range(100):
    ...     update, state = optimizer.update(jnp.ones(()), state, w)
    ...     w = optax.apply_updates(w, update)
    >>> float(w), round(float(state.master), 4)  # plain bf16 would still stand at 1
    (0.8984375, 0.9)
    """

    def init(params: Any) -> Any:
        master = _master(params)
        if not jax.tree.leaves(master):
            return inner.init(params)
        return MasterState(inner.init(combine(master, params)), master)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if not isinstance(state, MasterState):
            return inner.update(grads, state, params)
        updates, inner_state = inner.update(grads, state.inner, combine(state.master, params))
        new = jax.tree.map(
            lambda m, u: None if m is None else m + u, state.master, updates, is_leaf=lambda x: x is None
        )
        steps = jax.tree.map(
            lambda m, p, u: u if m is None else m.astype(p.dtype).astype(jnp.float32) - p.astype(jnp.float32),
            new,
            params,
            updates,
            is_leaf=lambda x: x is None,
        )
        return steps, MasterState(inner_state, new)

    return optax.GradientTransformation(init, update)
