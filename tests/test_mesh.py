"""Every mesh gives what one device gives: the initial values to the bit, the loss and every gradient leaf.

The tolerance is that of fp32 sums in another order: sums of at most some thousand terms, each rounded to
6e-8, stay within 2e-5 of the largest value of a leaf.
"""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.model import transformer as tf
from jaxlm.model.attention import AttentionConfig
from jaxlm.model.moe import MoEConfig
from jaxlm.objectives.lm import LossConfig, make_lm_objective
from jaxlm.optim import OptimConfig, make_optimizer, make_schedule
from jaxlm.sharding import Layout, MeshConfig, make_mesh, tree_shardings, use
from jaxlm.train.state import create_state
from jaxlm.train.step import make_step
from jaxlm.tree import named_leaves

B, T, V = 8, 16, 64

DENSE = tf.TransformerConfig(
    vocab_size=V,
    num_layers=4,
    model_dim=32,
    mlp_dim=64,
    init_std=0.0,
    attention=AttentionConfig(
        num_heads=8, num_kv_heads=4, pattern=("local", "global"), window=5, qk_norm=True
    ),
)
MODELS = {
    "dense": DENSE,
    "tied_biased": dataclasses.replace(
        DENSE,
        num_layers=2,
        tie_embeddings=True,
        norm="layernorm",
        activation="gelu",
        mlp_bias=True,
        attention=AttentionConfig(num_heads=4, qkv_bias=True, out_bias=True, sinks=True),
        remat="full",
    ),
    "dropless": dataclasses.replace(
        DENSE,
        num_layers=2,
        mlp_pattern=("dense", "moe"),
        moe=MoEConfig(
            num_experts=4, top_k=2, expert_dim=32, shared_experts=1, bias_balancing=True, router="sigmoid"
        ),
    ),
    "capacity": dataclasses.replace(
        DENSE,
        num_layers=2,
        mlp_pattern=("moe",),
        moe=MoEConfig(num_experts=4, top_k=2, expert_dim=32, dispatch="capacity", capacity_factor=1.0),
    ),
}
MESHES = {
    "data8": MeshConfig(data=8),
    "fsdp8": MeshConfig(data=1, fsdp=8),
    "tensor4": MeshConfig(data=1, tensor=4),
    "expert4": MeshConfig(data=1, expert=4),
    "data2_fsdp2_tensor2": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp2_tensor2_expert2": MeshConfig(data=1, fsdp=2, tensor=2, expert=2),
    "fsdp4_tensor2": MeshConfig(data=1, fsdp=4, tensor=2),
    "data2_expert4": MeshConfig(data=2, expert=4),
}
FAST = {("dense", "data2_fsdp2_tensor2"), ("capacity", "fsdp2_tensor2_expert2")}
CASES = [
    pytest.param(model, mesh, marks=() if (model, mesh) in FAST else pytest.mark.slow)
    for model, cfg in MODELS.items()
    for mesh in MESHES
    if "expert" not in mesh or cfg.moe.num_experts
]


class Model:
    """What the objective needs of a transformer."""

    def __init__(self, cfg):
        self.cfg = cfg

    def apply(self, params, batch, key):
        hidden, _, aux = tf.apply(
            self.cfg,
            params,
            batch["tokens"],
            segments_BT=batch["segments"],
            positions_BT=batch["positions"],
            key=key,
        )
        return hidden, aux

    def unembed(self, params, hidden):
        return tf.unembed(self.cfg, params, hidden)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    segments = np.ones((B, T), np.int32)
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    segments[2:, 6:], positions[2:, 6:] = 2, np.arange(T - 6)
    segments[5:, 13:], positions[5:, 13:] = 0, 0
    weights = ((segments != 0) & (rng.random((B, T)) < 0.8)).astype(np.float32)
    tokens = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    return dict(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=weights, segments=segments, positions=positions
    )


def loss_and_gradients(cfg, mesh_cfg, devices):
    """Initial parameters, and mean loss and gradients of one batch, on a mesh."""
    layout = Layout(make_mesh(mesh_cfg, devices))
    objective = make_lm_objective(Model(cfg), LossConfig(z_loss=1e-3, chunk=5), np.ones(V, np.float32))
    with use(layout):
        shardings = tree_shardings(layout, tf.abstract_params(cfg), tf.AXES)
        params = jax.jit(partial(tf.init, cfg), out_shardings=shardings)(jax.random.key(0))
        rows = jax.device_put(batch(), layout.sharding(("batch", "length")))

        def mean(params):
            total, weight, metrics = objective(params, rows, None)
            return total / weight, metrics

        (loss, metrics), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    return jax.device_get((params, loss, metrics, grads)), params


_one_device = {}


def on_one_device(name):
    if name not in _one_device:
        _one_device[name] = loss_and_gradients(MODELS[name], MeshConfig(data=1), jax.devices()[:1])[0]
    return _one_device[name]


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_a_mesh_equals_one_device_in_init_loss_and_every_gradient_leaf(name, mesh):
    want_params, want, want_metrics, want_grads = on_one_device(name)
    (params, loss, metrics, grads), placed = loss_and_gradients(MODELS[name], MESHES[mesh], jax.devices())
    assert any(leaf.sharding.num_devices > 1 for leaf in jax.tree.leaves(placed))
    if mesh != "data8":
        assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
    for (leaf, a), (_, b) in zip(named_leaves(params), named_leaves(want_params), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=f"init of {leaf}")
    np.testing.assert_allclose(loss, want, rtol=2e-6)
    for key in want_metrics:
        np.testing.assert_allclose(metrics[key], want_metrics[key], rtol=1e-5, err_msg=key)
    for (leaf, a), (_, b) in zip(named_leaves(grads), named_leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * np.abs(b).max() + 1e-9, err_msg=leaf)


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_training_on_a_product_mesh_and_in_microbatches_follows_one_device(microbatches):
    cfg = dataclasses.replace(MODELS["dropless"], remat="full")
    optim = OptimConfig(lr=1e-2, warmup=0.0, ema=0.9)

    def run(mesh_cfg, devices, microbatches):
        layout = Layout(make_mesh(mesh_cfg, devices))
        optimizer = make_optimizer(optim, make_schedule(optim, 8))
        with use(layout):
            state, _ = create_state(partial(tf.init, cfg), optimizer, 0, layout=layout, table=tf.AXES)
            step = make_step(
                make_lm_objective(Model(cfg), LossConfig(), None),
                optimizer,
                microbatches=microbatches,
                shardings=jax.tree.map(lambda x: x.sharding, state),
            )
            losses = []
            for n in range(4):
                rows = jax.device_put(batch(n), layout.sharding(("batch", "length")))
                state, metrics = step(state, None, rows)
                losses.append(float(metrics["total"][0] / metrics["total"][1]))
        return losses, jax.device_get(state.params)

    want, want_params = run(MeshConfig(data=1), jax.devices()[:1], 1)
    mesh = (
        MeshConfig(data=2, fsdp=1, tensor=2, expert=1)
        if microbatches > 1
        else MeshConfig(fsdp=2, expert=2, tensor=2)
    )
    got, params = run(mesh, jax.devices(), microbatches)
    assert want[-1] < want[0]
    np.testing.assert_allclose(got, want, rtol=2e-5)
    for (leaf, a), (_, b) in zip(named_leaves(params), named_leaves(want_params), strict=True):
        # Adam divides by the gradient's size: where that is rounding noise, so is the update's sign
        differing = np.abs(a - b) > 1e-4
        assert differing.mean() < 0.02, leaf


def test_a_mesh_larger_than_the_machine_or_a_size_it_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"data=4.*tensor=4.*needs 16 devices, but there are 8"):
        make_mesh(MeshConfig(data=4, tensor=4))
    with pytest.raises(UserError, match="8 devices are not a multiple of 3"):
        make_mesh(MeshConfig(tensor=3))
    layout = Layout(make_mesh(MeshConfig(tensor=8)))
    with pytest.raises(UserError, match=r"attention/wk: kv_heads has size 4.*tensor=8"):
        tree_shardings(layout, tf.abstract_params(DENSE), tf.AXES)
