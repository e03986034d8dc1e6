"""What a mesh must not change, and what it must: initial values, training in microbatches, traffic, refusals.

That every mesh trains as one device does is tested in test_conformance.
"""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.mesh_rules import preset
from jaxlm.model import transformer as tf
from jaxlm.model.attention import AttentionConfig
from jaxlm.model.backends import BACKENDS
from jaxlm.model.moe import MoEConfig
from jaxlm.objectives.lm import LossConfig, make_lm_objective
from jaxlm.optim import OptimConfig, make_optimizer, make_schedule
from jaxlm.sharding import MESH_AXES, Layout, MeshConfig, make_layout, make_mesh, tree_shardings, use
from jaxlm.train.state import abstract_state, create_state
from jaxlm.train.step import make_step
from jaxlm.tree import named_leaves
from jaxlm.weights import gather, matmul

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
}


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


@pytest.mark.parametrize("name", ["tied_biased", "dropless"])
def test_a_mesh_draws_the_same_initial_values_to_the_bit(name):
    cfg = MODELS[name]
    layout = make_layout(MeshConfig(data=1, fsdp=2, tensor=2, expert=2 if cfg.moe.num_experts else 1))
    want = jax.device_get(jax.jit(partial(tf.init, cfg))(jax.random.key(0)))
    with use(layout):
        shardings = tree_shardings(layout, tf.abstract_params(cfg), tf.AXES)
        got = jax.jit(partial(tf.init, cfg), out_shardings=shardings)(jax.random.key(0))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(got))
    for (leaf, a), (_, b) in zip(named_leaves(jax.device_get(got)), named_leaves(want), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=leaf)


def collectives(hlo):
    """(inside a loop, kind, dimensions of every array in the result) of each collective of a program."""
    entry, found = False, []
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            entry = line.startswith("ENTRY")
        kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
        match = re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line)
        if match:
            shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", match[1])]
            found.append((not entry, match[2], shapes))
    return found


def test_weights_are_gathered_layer_by_layer_and_the_vocabulary_never():
    """On fsdp x tensor, read from the compiled program; sizes are such that each tells what it belongs to."""
    layers, D, F, V, fsdp, tensor = 6, 32, 96, 80, 4, 2
    cfg = dataclasses.replace(
        MODELS["tied_biased"], vocab_size=V, num_layers=layers, model_dim=D, mlp_dim=F, tie_embeddings=False
    )
    layout = make_layout(MeshConfig(data=1, fsdp=fsdp, tensor=tensor))
    optimizer = make_optimizer(OptimConfig(), lambda count: 0.0)
    state, _ = abstract_state(partial(tf.init, cfg), optimizer, layout=layout, table=tf.AXES)
    where = layout.sharding(("batch", "length"))
    rows = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for k, x in batch().items()}
    with use(layout):
        objective = make_lm_objective(Model(cfg), LossConfig(chunk=4), None)
        step = make_step(objective, optimizer, shardings=jax.tree.map(lambda x: x.sharding, state))
        found = collectives(step.lower(state, None, rows).compile().as_text())
    gathered = [(loop, shape) for loop, kind, shapes in found if kind == "all-gather" for shape in shapes]
    assert (True, (D, F // tensor)) in gathered
    assert (False, (D, V // tensor)) in gathered
    for loop, shape in gathered:
        assert V not in shape, shape  # neither the table nor the logits
        assert layers not in shape, shape  # no stack of layers
        assert loop or F // tensor not in shape, shape
    summed = [(loop, shape) for loop, kind, shapes in found if "reduce" in kind for shape in shapes]
    head = [loop for loop, shape in summed if shape in ((D, V // tensor), (D // fsdp, V // tensor))]
    assert head == [False]  # the head's gradient, once a step
    assert not [shape for loop, shape in summed if V in shape]


def test_rows_of_a_table_are_found_however_it_is_split():
    """Vocabulary and width over axes that the residual stream has or has not, with gradients."""
    rng = np.random.default_rng(0)
    table, probe = rng.normal(size=(32, 16)).astype(np.float32), rng.normal(size=(8, 16, 16))
    ids = rng.integers(-3, 35, (8, 16)).astype(np.int32)  # out of range, the nearest row is taken

    def value(table, axes=None):
        x = gather(table, ids, axes)
        return jnp.sum(x * probe), x

    (_, want), want_grad = jax.value_and_grad(value, has_aux=True)(table)
    np.testing.assert_array_equal(want, table[ids.clip(0, 31)])
    for first, rules in (
        ("vocab", ()),
        (None, ()),  # a table of positions
        ("vocab", (("vocab", ""),)),
        ("vocab", (("residual", ""),)),
        ("vocab", (("residual", "tensor sequence"),)),
        ("vocab", (("embed", "fsdp sequence"),)),
    ):
        layout = make_layout(MeshConfig(data=1, fsdp=2, sequence=2, tensor=2, rules=rules))
        with use(layout):
            placed = jax.device_put(table, layout.sharding((first, "embed")))
            run = jax.jit(jax.value_and_grad(partial(value, axes=(first, "embed")), has_aux=True))
            program = run.lower(placed).compile()
            (_, got), grad = program(placed)
        assert "all-to-all(" in program.as_text()  # the table itself does not travel
        np.testing.assert_array_equal(got, want, err_msg=str((first, rules)))
        np.testing.assert_allclose(grad, want_grad, rtol=1e-5, atol=1e-5, err_msg=str((first, rules)))


@pytest.mark.slow
def test_training_on_a_product_mesh_and_in_microbatches_follows_one_device():
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
    assert want[-1] < want[0]
    for mesh, microbatches in (
        (MeshConfig(fsdp=2, expert=2, tensor=2), 1),
        (MeshConfig(data=2, fsdp=1, tensor=2, expert=1), 4),  # a device's part of a microbatch is one row
    ):
        got, params = run(mesh, jax.devices(), microbatches)
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


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of one of several slices, as far as a mesh asks."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_slices_take_consecutive_parts_of_the_axis_that_crosses_them():
    ids = np.vectorize(lambda device: device.id)
    first = lambda mesh, **where: ids(mesh.devices)[tuple(where.get(a, slice(None)) for a in MESH_AXES)]  # noqa: E731
    mesh = make_mesh(MeshConfig(data=4, tensor=2, slices=2))
    assert sorted(first(mesh, data=slice(0, 2)).flat) == [0, 1, 2, 3]
    mesh = make_mesh(MeshConfig(data=1, pipe=2, fsdp=4, slices=2, dcn="pipe"))
    assert sorted(first(mesh, pipe=1).flat) == [4, 5, 6, 7]
    with pytest.raises(UserError, match=r"mesh.slices=2 .* mesh.data=1 is not a multiple of 2"):
        make_mesh(MeshConfig(data=1, fsdp=8, slices=2))
    with pytest.raises(UserError, match=r"mesh.dcn='tensor' is not one of 'data', 'pipe'"):
        MeshConfig(dcn="tensor")

    chips = [Chip(id=i, slice_index=i % 2, process_index=i % 2) for i in range(8)]
    grid = make_mesh(MeshConfig(data=2, fsdp=4, slices=2), chips).devices
    assert {chip.slice_index for chip in grid[0, 0].flat} == {0}
    nodes = [dataclasses.replace(chip, platform="gpu") for chip in chips]
    assert make_mesh(MeshConfig(data=1, fsdp=8), nodes).shape["fsdp"] == 8  # as every GPU node is a slice
    torus = [dataclasses.replace(chip, platform="tpu") for chip in chips]
    with pytest.raises(UserError, match=r"mesh.slices=1, but the devices lie in 2 slices"):
        make_mesh(MeshConfig(data=2, fsdp=4), torus)


def test_the_preset_of_some_hardware_fits_it_and_unknown_hardware_is_refused():
    for hardware in (
        "cpu x 8",
        "TPU v5 x 64",
        "TPU v5 x 4096",
        "TPU v6 lite x 512",
        "NVIDIA H100 80GB HBM3 x 16",
    ):
        rule, count = preset(hardware)
        fields = {name[5:]: x for name, x in rule.overrides(count).items() if name.startswith("mesh.")}
        assert math.prod(MeshConfig(**fields).shape(count)) == count
        kernel = BACKENDS[rule.backend]
        assert kernel.platform == {"c": "", "T": "tpu", "N": "gpu"}[hardware[0]]
        assert rule.dtype == ("bfloat16" if kernel.platform else "float32")
    assert preset("TPU v6 lite x 512")[0].overrides(512)["mesh.slices"] == 2
    with pytest.raises(UserError, match="no mesh rule matches 'abacus x 3'"):
        preset("abacus x 3")


@pytest.mark.parametrize("reduce_dtype", ["float32", "bfloat16"])
def test_sums_over_devices_are_made_in_the_dtype_asked_for(reduce_dtype):
    """The compiler puts them right behind the product, in the dtype of its result."""
    x, w = jnp.ones((2, 4, 8), jnp.bfloat16), jnp.ones((8, 16))

    def results(mesh):
        with use(make_layout(mesh, make_mesh(mesh, jax.devices()[: mesh.fsdp * mesh.tensor]))):
            grad = jax.grad(lambda x, w: matmul("BTD,DF->BTF", x, w, dtype="bfloat16").sum(), argnums=(0, 1))
            jaxpr = str(jax.make_jaxpr(grad)(x, w))
        return re.findall(r"(\w+)\[([\d,]+)\] = dot_general", jaxpr)

    short = {"float32": "f32", "bfloat16": "bf16"}[reduce_dtype]
    mesh = MeshConfig(data=1, fsdp=2, tensor=2, reduce_dtype=reduce_dtype)
    found = {shape: dtype for dtype, shape in results(mesh)}
    assert found == {"8,16": short, "2,4,16": "bf16", "2,4,8": "bf16"}
    found = results(MeshConfig(data=1, reduce_dtype=reduce_dtype))
    assert {dtype for dtype, _ in found} == {"f32"}
