"""Configs, parameters and gradients that the tests of the mixture of experts share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.model.moe import MoE, MoEConfig
from jaxlm.tree import map_named, named_leaves

B, T, D, F, E = 2, 10, 8, 12, 4
BASE = MoEConfig(num_experts=E, top_k=2, dropless_backend="dense")
VARIANTS = {
    "softmax": BASE,
    "softmax-raw": dataclasses.replace(BASE, normalize=False, routed_scale=1.5),
    "top1": dataclasses.replace(BASE, top_k=1, normalize=False),
    "sigmoid": dataclasses.replace(BASE, router="sigmoid", routed_scale=2.5, bias_balancing=True),
    "sigmoid-raw": dataclasses.replace(BASE, router="sigmoid", normalize=False),
    "shared": dataclasses.replace(BASE, shared_experts=2, expert_dim=6),
    "biases": dataclasses.replace(BASE, bias=True),
    "groups": dataclasses.replace(BASE, groups=2, normalize=False),
    "groups-sigmoid": dataclasses.replace(
        BASE, groups=2, group_best=2, router="sigmoid", bias_balancing=True
    ),
}
DISPATCHES = {
    "dense": dict(dispatch="dropless", dropless_backend="dense"),
    "loop": dict(dispatch="dropless", dropless_backend="loop"),
    "ragged": dict(dispatch="dropless", dropless_backend="ragged"),
    "capacity": dict(dispatch="capacity", capacity_factor=E / 2.0),  # top-2 of E: C = T, nothing is dropped
    "dropping": dict(dispatch="capacity", capacity_factor=0.7),
}


def layer(cfg, dtype="float32", activation="swiglu"):
    return MoE(cfg, F, activation, lambda n: n**-0.5, 0.7, dtype, "float32", "float32")


def batch(rows=B, seed=0):
    """Activations, a ragged mask with a hole, and padding made of values that must not matter."""
    x_BTD = jax.random.normal(jax.random.key(seed), (rows, T, D))
    mask_BT = np.arange(T)[None] < np.resize([T, T - 3], rows)[:, None]
    mask_BT[0, 4] = False
    return jnp.where(mask_BT[..., None], x_BTD, 50.0), jnp.asarray(mask_BT)


def params_of(cfg, seed=1, activation="swiglu"):
    """Random parameters, with a router sharp enough that capacity matters and a bias that moves selection."""
    shapes = jax.eval_shape(layer(cfg, activation=activation).init, jax.random.key(0), *batch())
    rng = np.random.default_rng(seed)

    def leaf(name, s):
        fixed = {
            "router_bias": 0.3,
            "router_b": 0.3,
            "router_w": 1.0,
            "b_up": 0.5,
            "b_gate": 0.5,
            "b_down": 0.5,
        }
        scale = fixed.get(name.rsplit("/", 1)[-1]) or s.shape[-2] ** -0.5
        return jnp.asarray(rng.normal(size=s.shape) * scale, jnp.float32)

    return map_named(leaf, shapes)


@functools.cache
def compiled(cfg, dtype, activation):
    return jax.jit(layer(cfg, dtype, activation).apply)


def run(cfg, params, x_BTD, mask_BT, dtype="float32", activation="swiglu"):
    return compiled(cfg, dtype, activation)(params, x_BTD, mask_BT)


@functools.cache
def compiled_gradients(cfg, dtype, layout=None):
    def value(params, x_BTD, mask_BT):
        y_BTD, aux = layer(cfg, dtype).apply(params, x_BTD, mask_BT)
        # Weights that are the same in every row, so that a row's share does not depend on its batch.
        probe_TD = jnp.sin(jnp.arange(T * D, dtype=jnp.float32)).reshape(T, D)
        return jnp.sum(y_BTD * probe_TD) + aux["loss"], aux

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))


def gradients(cfg, params, x_BTD, mask_BT, dtype="float32"):
    """((value, aux), gradients in parameters and inputs) of weighted outputs plus the auxiliary loss."""
    return compiled_gradients(cfg, dtype)(params, x_BTD, mask_BT)


def routed(dispatch, **fields):
    return dataclasses.replace(VARIANTS["sigmoid"], **fields, **DISPATCHES[dispatch])


def assert_trees_close(got, want, rtol=1e-4, atol=2e-5):
    for (name, a), (_, b) in zip(named_leaves(got), named_leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=name)
