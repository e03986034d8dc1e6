"""State kept in the host's memory: the same training, and where each leaf lies."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.errors import UserError
from jaxlm.model.attention import AttentionConfig
from jaxlm.model.moe import MoEConfig
from jaxlm.model.transformer import TransformerConfig
from jaxlm.objectives.lm import LossConfig
from jaxlm.optim import OptimConfig
from jaxlm.sharding import HOST, MeshConfig, make_layout, use
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.programs import numbers_of, programs_on
from jaxlm.tree import named_leaves

MODEL = TransformerConfig(
    vocab_size=32,
    num_layers=2,
    model_dim=16,
    remat="full",
    attention=AttentionConfig(num_heads=4, backend="reference"),
    mlp_pattern=("moe",),
    moe=MoEConfig(num_experts=4, top_k=2, expert_dim=16, rounds=2, dropless_backend="loop"),
)
B, T = 8, 8


def batch():
    tokens = np.random.default_rng(0).integers(0, 32, (B, T + 1)).astype(np.int32)
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    ones = np.ones((B, T), np.int32)
    rows = dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], segments=ones, positions=positions)
    return rows | dict(weights=np.ones((B, T), np.float32))


def train(offload, mesh, microbatches):
    """Losses of three updates and of an evaluation, the last state, and its type."""
    layout = make_layout(dataclasses.replace(mesh, offload=offload))
    optim = OptimConfig(lr=0.05, eps=1e-3)  # else updates of gradients near 0 are their rounding
    with use(layout):
        built = programs_on(
            layout, MODEL, LossConfig(), optim, {}, microbatches=microbatches, token_bytes=None
        )
        state, _ = built.new_state(0)
        rows = jax.device_put(batch(), layout.sharding(("batch", "length")))
        losses = []
        for n in range(3):
            numbers = numbers_of(optim, np.full(3, 0.05, np.float32), n)
            state, metrics = built.step(state, None, (rows, numbers))
            losses.append(float(metrics["total"][0] / metrics["total"][1]))
        losses.append(float(built.eval_step(state.params, rows).nll_B.sum()))
    return losses, state, built.target


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "microbatches", "offloads"),
    [
        pytest.param(MeshConfig(data=1), 1, ("optimizer", "all"), id="one"),
        pytest.param(MeshConfig(data=1, fsdp=2, expert=2), 1, ("all",), id="experts"),
        pytest.param(MeshConfig(data=2, fsdp=2), 2, ("optimizer",), id="microbatches"),
    ],
)
def test_what_is_kept_on_the_host_trains_alike_and_comes_back(mesh, microbatches, offloads, tmp_path):
    want, plain, _ = train("none", mesh, microbatches)
    assert want[2] < want[0]
    for offload in offloads:
        got, state, target = train(offload, mesh, microbatches)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        for (name, a), (_, b) in zip(named_leaves(state), named_leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)
            layers = offload == "all" and "params/blocks" in name
            moved = layers or (name.startswith("opt_state") and b.ndim > 0)
            assert (a.sharding.memory_kind == HOST) == moved, name
            assert b.sharding.memory_kind == "device"
        with Checkpointer(tmp_path / offload) as checkpoints:
            checkpoints.save(3, state, data={}, config={})
            checkpoints.wait()
            again = checkpoints.restore(target).state
        for (name, a), (_, b) in zip(named_leaves(state), named_leaves(again), strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.sharding == b.sharding, name


def test_a_device_without_the_hosts_memory_is_refused(monkeypatch):
    mesh = sharding.make_mesh(MeshConfig(data=1))
    kind = type(mesh.devices.flat[0])
    monkeypatch.setattr(kind, "addressable_memories", lambda self: [self.default_memory()])
    message = r"mesh.offload='optimizer': cpu has no memory 'pinned_host' \(it has device\); use 'none'"
    with pytest.raises(UserError, match=message):
        make_layout(MeshConfig(data=1, offload="optimizer"))
    with pytest.raises(UserError, match=r"mesh.offload='all' with mesh.pipe=2"):
        MeshConfig(data=1, pipe=2, offload="all")
