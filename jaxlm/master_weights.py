"""A float32 copy of low-precision parameters, kept in the optimizer's state.

bf16 has 8 bits: a weight near 1 moves in steps of 2 ** -8, so that updates of lr 1e-3 round to nothing or to
too much. The optimizer therefore updates a float32 copy, and the parameter is that copy, rounded.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.tree import combine


class MasterState(NamedTuple):
    """State of `keep_master` where some parameter is below float32."""

    inner: Any
    master: Any  # float32 copies of the low-precision leaves; None for the others


def _master(params: Any) -> Any:
    low = lambda p: jnp.finfo(p.dtype).bits < 32  # noqa: E731
    return jax.tree.map(lambda p: p.astype(jnp.float32) if low(p) else None, params)


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
