"""Mixture of experts on meshes: what travels, and that a mesh gives what one device gives."""

import dataclasses
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm import sharding
from jaxlm.model.axes import AXES, BY_HAND
from jaxlm.model.moe import dropless_backend, exchange
from jaxlm.tree import map_named, named_leaves

sys.path.insert(0, str(Path(__file__).parent))
from moe_cases import (
    BASE,
    E,
    F,
    T,
    assert_trees_close,
    batch,
    compiled_gradients,
    gradients,
    params_of,
    routed,
)


def test_auto_backend_is_a_matter_of_record():
    cfg = dataclasses.replace(BASE, dropless_backend="auto")
    assert dropless_backend(cfg) == "loop"  # one CPU device
    with sharding.use(layout_of(EXPERT4)):
        assert dropless_backend(cfg) == "loop"
        assert exchange(cfg) == "padded"
    assert dropless_backend(dataclasses.replace(cfg, dropless_backend="ragged")) == "ragged"


# --- Layout and precision ---


def layout_of(mesh):
    return sharding.make_layout(sharding.MeshConfig(**mesh))


EXPERT4, PRODUCT = dict(data=2, expert=4), dict(data=1, fsdp=2, tensor=2, expert=2)
COLUMNS, FSDP8 = dict(data=1, sequence=2, expert=2, tensor=2), dict(data=1, fsdp=8)
BOTH = dict(data=2, fsdp=2, expert=2, rules=(("embed", "data fsdp expert"),))
slow = pytest.mark.slow


def ragged_exchange(x_MD, out_RD, from_S, sent_S, there_S, received_S, *, axis_name):
    """`jax.lax.ragged_all_to_all` by its documentation, as XLA:CPU has none; NaN if the sizes disagree."""
    me, row_R = jax.lax.axis_index(axis_name), jnp.arange(out_RD.shape[0])
    x, begin, sent, there = (jax.lax.all_gather(a, axis_name) for a in (x_MD, from_S, sent_S, there_S))
    for s in range(x.shape[0]):
        rank_R = row_R - there[s, me]
        rows = jnp.where(sent[s, me] == received_S[s], x[s][begin[s, me] + rank_R], jnp.nan)
        out_RD = jnp.where(((rank_R >= 0) & (rank_R < sent[s, me]))[:, None], rows, out_RD)
    return out_RD


@pytest.mark.parametrize(
    ("mesh", "dispatch", "fields"),
    [
        (EXPERT4, "dropping", {}),
        (PRODUCT, "loop", {}),
        pytest.param(EXPERT4, "loop", dict(exchange="ragged"), marks=slow),
        pytest.param(EXPERT4, "ragged", {}, marks=slow),
        pytest.param(EXPERT4, "dense", {}, marks=slow),
        pytest.param(PRODUCT, "dropping", {}, marks=slow),
        pytest.param(PRODUCT, "dense", {}, marks=slow),
        pytest.param(COLUMNS, "dropping", {}, marks=slow),
        pytest.param(COLUMNS, "loop", dict(exchange="ragged"), marks=slow),
        pytest.param(FSDP8, "loop", {}, marks=slow),
        pytest.param(BOTH, "loop", dict(rounds=5), marks=slow),
        pytest.param(BOTH, "dropping", {}, marks=slow),
    ],
)
def test_a_mesh_equals_one_device(mesh, dispatch, fields, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_exchange)
    cfg = routed(dispatch, shared_experts=1)
    params, (x_BTD, mask_BT) = params_of(cfg), batch(rows=8)
    want = gradients(cfg, params, x_BTD, mask_BT)
    got, program, placed = on_mesh(dataclasses.replace(cfg, **fields), mesh, params, x_BTD, mask_BT)
    w_up = placed["params"]["w_up"]
    assert len(w_up.sharding.device_set) == 8
    assert w_up.addressable_shards[0].data.shape[0] == E // mesh.get("expert", 1)
    if dispatch != "dense" and "exchange" not in fields:  # of tokens, only the choices travel
        assert ("all-to-all(" in program) == ("expert" in mesh)
        gathered = re.findall(r"= (\w+)\[[\d,]*\]\S* all-gather\(", program)
        assert set(gathered) <= {"s32", "f32"}, gathered
        if mesh == EXPERT4:  # how many choices each expert gets
            assert ("s32" in gathered) == (dispatch != "dropping")
        # Three weights, along each axis that they are stored over; their gradients go the way back.
        steps = 3 * sum(m in ("data", "fsdp") for m in stored_over(w_up)) if "fsdp" in mesh else 0
        assert gathered.count("f32") == steps
        assert len(re.findall(r" reduce-scatter\(", program)) == steps
    assert_trees_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["loop", "dropping", "dense"])
def test_biases_are_added_once_on_a_mesh_that_splits_an_experts_width(dispatch):
    cfg = routed(dispatch, bias=True)
    params, (x_BTD, mask_BT) = params_of(cfg), batch(rows=8)
    want = gradients(cfg, params, x_BTD, mask_BT)
    got, _, placed = on_mesh(cfg, PRODUCT, params, x_BTD, mask_BT)
    assert placed["params"]["b_up"].addressable_shards[0].data.shape == (E // 2, F // 2)
    assert_trees_close(got, want)


def stored_over(w):
    return [m for part in w.sharding.spec for m in sharding.spec_axes(part)]


def on_mesh(cfg, mesh, params, x_BTD, mask_BT):
    """What `gradients` gives, on a mesh, the program, and the parameters as they lie."""
    layout = layout_of(mesh)
    with sharding.use(layout):

        def place(name, a):
            leaf = f"moe/{name.split('/')[-1]}"
            spec = layout.spec(AXES[leaf], compute=leaf not in BY_HAND)
            return jax.device_put(a, NamedSharding(layout.mesh, spec))

        placed = map_named(place, params)
        rows = [
            jax.device_put(a, NamedSharding(layout.mesh, layout.fitting(a.shape, ("batch", "length"))))
            for a in (x_BTD[..., 0], mask_BT)
        ]
        x_BTD = jax.device_put(x_BTD, NamedSharding(layout.mesh, P(*rows[0].sharding.spec, None)))
        key = (*mesh.items(), x_BTD.shape)
        step = compiled_gradients(cfg, "float32", key).lower(placed, x_BTD, rows[1]).compile()
        return step(placed, x_BTD, rows[1]), step.as_text(), placed


@pytest.mark.parametrize(
    ("mesh", "dispatch"),
    [
        (EXPERT4, "loop"),
        pytest.param(EXPERT4, "dropping", marks=slow),
        pytest.param(dict(data=1, fsdp=4, expert=2), "loop", marks=slow),  # stored over what splits no token
    ],
)
def test_rows_too_few_for_the_experts_axis_are_computed_where_the_experts_are(mesh, dispatch):
    cfg = routed(dispatch)
    params, (x_BTD, mask_BT) = params_of(cfg), batch(rows=2)
    got, program, _ = on_mesh(cfg, mesh, params, x_BTD, mask_BT)
    assert "all-to-all(" not in program
    assert_trees_close(got, gradients(cfg, params, x_BTD, mask_BT))


@slow
@pytest.mark.parametrize("how", ["padded", "ragged"])
def test_a_bounded_buffer_drops_what_does_not_fit_and_counts_it(how, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_exchange)
    cfg = routed("loop", exchange=how)
    params, (x_BTD, mask_BT) = params_of(cfg), batch(rows=8)
    (_, aux), _ = gradients(cfg, params, x_BTD, mask_BT)
    assert float(aux["moe/dropped"][0]) == 0
    lost = {}
    for factor in (1.0, 0.5):
        bounded = dataclasses.replace(cfg, buffer_factor=factor)
        ((_, aux), grads), _, _ = on_mesh(bounded, EXPERT4, params, x_BTD, mask_BT)
        lost[factor] = float(aux["moe/dropped"][0])
        assert all(bool(jnp.isfinite(g).all()) for _, g in named_leaves(grads))
    assert 0 < lost[1.0] < lost[0.5]
    # half of a fair share for every device is at most half of all choices
    assert lost[0.5] >= float(aux["moe/dropped"][1]) / 2 - 8 * T


@slow
def test_gradients_of_experts_are_summed_in_the_dtype_that_the_mesh_names():
    cfg = routed("loop")
    params, (x_BTD, mask_BT) = params_of(cfg), batch(rows=8)
    (_, (want, _)) = gradients(cfg, params, x_BTD, mask_BT)
    mesh = FSDP8 | dict(reduce_dtype="bfloat16")
    (_, (got, _)), _, _ = on_mesh(cfg, mesh, params, x_BTD, mask_BT)
    for name in ("w_gate", "w_up", "w_down"):
        error = np.abs(got["params"][name] - want["params"][name]).max()
        assert 1e-5 < error / np.abs(want["params"][name]).max() < 2e-2, name
