"""A two-layer network on dict batches with ragged weights: all that these tests need to know of a model."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.optim import OptimConfig, make_optimizer, make_schedule
from jaxlm.sharding import Layout, MeshConfig, make_mesh

AXES = {
    "mlp/w_up": ("embed", "mlp"),
    "mlp/w_down": ("mlp", "embed"),
    "norm/scale": ("norm",),
    "head/w": ("embed", "vocab"),
}
D, F, V, T = 16, 32, 8, 4


def init(key):
    # One draw for all leaves: the tests compile this often.
    flat = jax.random.normal(key, (4 * D * F + D * V,))
    up, down, head = jnp.split(flat, (2 * D * F, 4 * D * F))
    return {
        "blocks": {
            "0": {
                "mlp": {
                    "w_up": up.reshape(2, D, F) / D**0.5,
                    "w_down": down.reshape(2, F, D) / F**0.5,
                },
                "norm": {"scale": jnp.ones((2, D))},
            }
        },
        "head": {"w": head.reshape(D, V) / D**0.5},
    }


def objective(params, batch, key):
    """Weighted squared error; with a key, dropout of a tenth of the hidden units."""
    x_BTD = batch["x"]
    block = params["blocks"]["0"]
    for layer in range(2):
        h_BTF = jax.nn.silu((x_BTD * block["norm"]["scale"][layer]) @ block["mlp"]["w_up"][layer])
        if key is not None and "dropout" in batch:
            keep = jax.random.bernoulli(jax.random.fold_in(key, layer), 0.9, h_BTF.shape)
            h_BTF = jnp.where(keep, h_BTF / 0.9, 0.0)
        x_BTD = x_BTD + h_BTF @ block["mlp"]["w_down"][layer]
    error_BT = jnp.sum(jnp.square(x_BTD @ params["head"]["w"] - batch["y"]), axis=-1)
    loss, weight = jnp.sum(error_BT * batch["weights"]), jnp.sum(batch["weights"])
    return (
        loss,
        weight,
        {"nll": (loss, weight), "large": (jnp.sum(error_BT > 1.0), jnp.float32(error_BT.size))},
    )


def batch(step, rows=16, dropout=False):
    """A pure function of the step; weights are ragged, and some rows have none."""
    rng = np.random.default_rng([7, step])
    weights = rng.random((rows, T)) * (rng.random((rows, 1)) < 0.8)
    out = {
        "x": rng.normal(size=(rows, T, D)).astype(np.float32),
        "y": rng.normal(size=(rows, T, V)).astype(np.float32),
        "weights": weights.astype(np.float32),
    }
    return out | {"dropout": np.ones(rows, np.float32)} if dropout else out


def optimizer(num_steps=20, **fields):
    cfg = OptimConfig(**{"name": "adamw", "lr": 1e-2, "warmup": 2, "warmup_unit": "steps", **fields})
    return make_optimizer(cfg, make_schedule(cfg, num_steps))


def layout(**sizes):
    return Layout(make_mesh(MeshConfig(**sizes)))


@pytest.fixture(scope="session")
def toy():
    return types.SimpleNamespace(
        AXES=AXES, init=init, objective=objective, batch=batch, optimizer=optimizer, layout=layout
    )
