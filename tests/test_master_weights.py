"""Parameters below float32 follow a float32 run, rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.master_weights import MasterState
from jaxlm.optim import OptimConfig, make_optimizer

SHAPES = {"mlp": {"w_up": (1, 4, 6), "w_down": (1, 6, 4)}, "norm": {"scale": (4,)}}


def params(dtype):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jnp.asarray(1 + 0.1 * rng.normal(size=s), jnp.bfloat16).astype(dtype),
        {"blocks": {"0": SHAPES}},
        is_leaf=lambda x: isinstance(x, tuple),
    )


def run(cfg, dtype, steps=60):
    optimizer = make_optimizer(cfg, lambda count: 1e-3)
    p = params(dtype)
    state = optimizer.init(p)

    @jax.jit
    def update(p, state, grads):
        updates, state = optimizer.update(grads, state, p)
        return optax.apply_updates(p, updates), state

    rng = np.random.default_rng(1)
    for _ in range(steps):
        grads = jax.tree.map(lambda x: jnp.asarray(1 + 0.3 * rng.normal(size=x.shape), jnp.bfloat16), p)
        p, state = update(p, state, jax.tree.map(lambda g, x: g.astype(x.dtype), grads, p))
    return p, state


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "muon", "adafactor"])
def test_bf16_parameters_are_the_rounded_ones_of_a_float32_run(name):
    cfg = OptimConfig(name=name, weight_decay=0.1, ema=0.9)
    low, state = run(cfg, "bfloat16")
    high, _ = run(cfg, "float32")
    moved = params("bfloat16")
    for a, b, start in zip(*map(jax.tree.leaves, (low, high, moved)), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.asarray(a, np.float32), b.astype(jnp.bfloat16).astype(jnp.float32), rtol=0.004
        )
        assert float(jnp.abs(a - start).max()) > 0.01  # steps of 1e-3 would not move a bf16 number near 1
    assert isinstance(state.inner, MasterState)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.inner.master)} == {jnp.dtype("float32")}


def test_float32_parameters_have_no_second_copy():
    _, state = run(OptimConfig(), "float32", steps=1)
    assert not isinstance(state.inner, MasterState)
