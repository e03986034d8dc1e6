"""A pipelined stack equals a scanned one: values, per-layer sums and every gradient leaf, in float32."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model import transformer as tf
from jaxlm.model.attention import AttentionConfig
from jaxlm.model.moe import MoEConfig
from jaxlm.model.positions import PositionConfig
from jaxlm.sharding import MeshConfig, make_layout, tree_shardings, use
from jaxlm.tree import named_leaves

B, T, V, D = 8, 16, 32, 16

DENSE = tf.TransformerConfig(
    vocab_size=V,
    num_layers=4,
    model_dim=D,
    mlp_dim=32,
    init_std=0.0,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
)
MODELS = {
    "dense": DENSE,
    "mixed": dataclasses.replace(  # two periods of two layers, a tail of one, experts and a learned bias
        DENSE,
        num_layers=5,
        attention=dataclasses.replace(DENSE.attention, pattern=("local", "global"), window=5),
        mlp_pattern=("dense", "moe"),
        moe=MoEConfig(num_experts=4, expert_dim=16, router="sigmoid", bias_balancing=True),
        position=PositionConfig(kind="t5"),
        remat="full",
    ),
}


def batch():
    rng = np.random.default_rng(0)
    segments = np.ones((B, T), np.int32)
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    for row in range(B):  # every row its own documents, so that a row with another's context is seen
        segments[row, 3 + row :], positions[row, 3 + row :] = 2, np.arange(T - 3 - row)
    segments[5:, 14:] = 0
    return jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32), jnp.asarray(segments), jnp.asarray(positions)


def values(cfg, mesh, key=None):
    """(hidden states, auxiliary values, gradients), and the program."""
    layout = make_layout(mesh)

    def loss(params, tokens, segments, positions):
        hidden, _, aux = tf.apply(cfg, params, tokens, segments_BT=segments, positions_BT=positions, key=key)
        probe = jnp.sin(jnp.arange(hidden.size, dtype=jnp.float32)).reshape(hidden.shape)
        real = jnp.where(segments[..., None] != 0, hidden * probe, 0)
        return real.sum() + aux.get("loss", 0.0), (hidden, aux)

    with use(layout):
        shardings = tree_shardings(layout, tf.abstract_params(cfg), tf.AXES)
        params = jax.jit(partial(tf.init, cfg), out_shardings=shardings)(jax.random.key(0))
        rows = [jax.device_put(x, layout.sharding(("batch", "length"))) for x in batch()]
        step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, *rows).compile()
        (_, (hidden, aux)), grads = step(params, *rows)
    return jax.device_get((hidden, aux, grads)), step.as_text(), params


_scanned = {}


def assert_equal(name, mesh):
    cfg = MODELS[name]
    if name not in _scanned:
        _scanned[name] = values(cfg, MeshConfig(data=1))[:2]
    (want, want_aux, want_grads), plain = _scanned[name]
    (got, aux, grads), program, params = values(cfg, mesh)
    assert "collective-permute" in program
    assert "collective-permute" not in plain
    wq = params["blocks"]["0"]["attention"]["wq"]
    assert wq.addressable_shards[0].data.shape[0] == wq.shape[0] // mesh.pipe
    real = np.asarray(batch()[1]) != 0
    np.testing.assert_allclose(got[real], want[real], rtol=2e-5, atol=2e-5)
    for leaf, a in named_leaves(want_aux):
        np.testing.assert_allclose(dict(named_leaves(aux))[leaf], a, rtol=1e-5, err_msg=leaf)
    for (leaf, a), (_, b) in zip(named_leaves(grads), named_leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * np.abs(b).max() + 1e-9, err_msg=leaf)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("mixed", MeshConfig(data=2, pipe=2, tensor=2)),
        ("dense", MeshConfig(data=1, pipe=2, pipe_repeats=2, pipe_microbatches=4)),
        pytest.param("dense", MeshConfig(data=1, pipe=4, fsdp=2), marks=pytest.mark.slow),
        pytest.param("dense", MeshConfig(data=1, pipe=2, pipe_repeats=2), marks=pytest.mark.slow),
        pytest.param("dense", MeshConfig(data=1, pipe=2, pipe_microbatches=8), marks=pytest.mark.slow),
        pytest.param("mixed", MeshConfig(data=1, pipe=2, fsdp=2, expert=2), marks=pytest.mark.slow),
    ],
)
def test_a_pipeline_equals_a_scan_in_values_sums_and_every_gradient_leaf(name, mesh):
    assert_equal(name, mesh)
