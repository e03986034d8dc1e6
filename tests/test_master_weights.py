"""Parameters below float32 follow a float32 run, rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.errors import UserError
from jaxlm.master_weights import MasterState, RoundingState, stochastic_round
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


def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour():
    x_N = jnp.asarray(
        [1.0 + 0.3 / 128, -1.0 - 0.9 / 128, 3e-39, 1e-3, 0.0, 1.5, -jnp.inf, jnp.nan], jnp.float32
    )
    draws = 1 << 14
    y_DN = stochastic_round(jnp.broadcast_to(x_N, (draws, len(x_N))), jax.random.key(3))
    y_DN = np.asarray(y_DN, np.float64)
    for i, x in enumerate(np.asarray(x_N, np.float64)[:6]):
        seen = np.unique(y_DN[:, i])
        gap = seen.max() - seen.min()
        assert len(seen) == (1 if x in (0.0, 1.5) else 2)
        assert seen.min() <= x <= seen.max()
        assert abs(y_DN[:, i].mean() - x) <= 4 * gap / 2 / draws**0.5  # four standard errors at the most
    assert (y_DN[:, 6] == -np.inf).all()
    assert np.isnan(y_DN[:, 7]).all()


def test_rounded_at_random_bf16_parameters_follow_a_float32_run_on_average():
    cfg = OptimConfig(weight_decay=0.1, low_precision="stochastic")
    low, state = run(cfg, "bfloat16")
    high, _ = run(cfg, "float32")
    assert isinstance(state.inner, RoundingState)
    held = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim and leaf.dtype == jnp.float32]
    assert sum(leaf.size for leaf in held) <= 2 * sum(leaf.size for leaf in jax.tree.leaves(low))  # no master
    # Each of 60 roundings errs by a uniform-like share of 2 ** -7 at most: 0.03 in all, less in the mean.
    for a, b, start in zip(*map(jax.tree.leaves, (low, high, params("bfloat16"))), strict=True):
        gone = np.asarray(b - start.astype(jnp.float32)).mean()
        assert abs(gone) > 0.03
        error = np.asarray(a.astype(jnp.float32) - b)
        assert np.abs(error).max() < 0.08
        assert abs(error.mean()) < 0.1 * abs(gone) + 0.05 / a.size**0.5


def test_stochastic_rounding_knows_bf16_alone():
    with pytest.raises(UserError, match=r"w_down is float16: .* use 'master'"):
        run(OptimConfig(low_precision="stochastic"), "float16", steps=1)
