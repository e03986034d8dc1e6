"""The floor of the house: trees, layouts, the one product, the stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.errors import UserError
from jaxlm.model import transformer as tf
from jaxlm.sharding import RULES, Layout, MeshConfig, constrain, describe, make_mesh, use
from jaxlm.stack import REMAT, run_stack
from jaxlm.tree import combine, map_named, named_leaves, nbytes, partition, size
from jaxlm.weights import matmul

TREE = {"blocks": {"0": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3, jnp.bfloat16)}}, "head": jnp.ones(5)}


def test_partition_and_combine_are_inverse_and_pass_through_grad():
    yes, no = partition(TREE, lambda name, leaf: name.endswith("/w"))
    assert [n for n, _ in named_leaves(yes)] == ["blocks/0/w"]
    assert [n for n, _ in named_leaves(no)] == ["blocks/0/b", "head"]
    assert jax.tree.structure(combine(yes, no)) == jax.tree.structure(TREE)
    grads = jax.grad(lambda y: sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(combine(y, no))))(yes)
    assert [n for n, _ in named_leaves(grads)] == ["blocks/0/w"]


def test_sizes_and_names():
    assert (size(TREE), nbytes(TREE)) == (14, 6 * 4 + 3 * 2 + 5 * 4)
    assert map_named(lambda name, leaf: name, TREE)["blocks"]["0"]["b"] == "blocks/0/b"


def test_layouts_name_what_is_wrong():
    layout = Layout(make_mesh(MeshConfig(fsdp=2, tensor=2)))
    assert layout.spec(("embed", "heads", "head_dim")) == P("fsdp", "tensor", None)
    assert layout.spec(("batch", None)) == P(("data", "fsdp"), None)
    with pytest.raises(UserError, match="did you mean 'heads'"):
        layout.spec(("head",))
    with pytest.raises(UserError, match="two dimensions on mesh axis 'tensor'"):
        layout.spec(("heads", "mlp"))
    with pytest.raises(UserError, match="'blocks/0/mlp/w_upp' has no entry"):
        describe(layout, {"blocks": {"0": {"mlp": {"w_upp": jnp.ones((4, 4))}}}}, tf.AXES)


def test_every_leaf_of_every_variant_has_an_entry_and_bytes_add_up():
    cfg = tf.TransformerConfig(num_layers=3, model_dim=64, mlp_dim=128)
    params = tf.abstract_params(cfg)
    one = describe(Layout(make_mesh(MeshConfig(), jax.devices()[:1])), params, tf.AXES)
    assert sum(row.bytes_per_device for row in one) == nbytes(params)
    eight = {
        row.name: row for row in describe(Layout(make_mesh(MeshConfig(data=1, fsdp=8))), params, tf.AXES)
    }
    assert eight["blocks/0/mlp/w_up"].bytes_per_device == 3 * 64 * 128 * 4 // 8
    assert eight["final_norm/scale"].bytes_per_device == 64 * 4
    assert all(axis in RULES for axes in tf.AXES.values() for axis in axes if axis)


def test_constrain_acts_only_inside_a_layout():
    x = jnp.ones((8, 4))
    assert constrain(x, "batch", None) is x
    layout = Layout(make_mesh(MeshConfig()))
    with use(layout):
        y = jax.jit(lambda x: constrain(x * 2, "batch", None))(x)
    assert y.sharding.is_equivalent_to(layout.sharding(("batch", None)), 2)
    assert not y.sharding.is_fully_replicated
    assert constrain(x, "batch", None) is x


@pytest.mark.parametrize("eqn", ["BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,VD->BTV", "BKGTH,BKSH->BKGTS"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_and_its_gradients_equal_autodiff_of_einsum(eqn, dtype):
    sizes = dict(B=2, T=3, D=4, N=2, H=5, V=7, K=2, G=3, S=6)
    rng = np.random.default_rng(0)
    a, b = (
        jnp.asarray(rng.normal(size=[sizes[c] for c in term]), jnp.float32)
        for term in eqn.split("->")[0].split(",")
    )
    out = eqn.split("->")[1]
    g = jnp.asarray(rng.normal(size=[sizes[c] for c in out]), jnp.float32)
    got, pull = jax.vjp(lambda a, b: matmul(eqn, a, b, dtype=dtype), a, b)
    want, want_pull = jax.vjp(lambda a, b: jnp.einsum(eqn, a, b, precision="highest"), a, b)
    assert got.dtype == dtype
    tolerance = 1e-6 if dtype == "float32" else 0.03
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=tolerance * 4, rtol=tolerance)
    for x, y in zip(pull(g.astype(dtype)), want_pull(g), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, atol=tolerance * 8, rtol=tolerance)


def test_bf16_products_keep_fp32_sums_both_ways():
    jaxpr = str(
        jax.make_jaxpr(
            jax.grad(lambda x, w: matmul("BD,DF->BF", x, w, dtype="bfloat16").astype("float32").sum(), (0, 1))
        )(jnp.ones((2, 3)), jnp.ones((3, 4)))
    )
    products = [line for line in jaxpr.splitlines() if "dot_general" in line]
    assert len(products) == 3
    assert all(":f32[" in line.split("=")[0] for line in products), products


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", list(REMAT))
def test_the_stack_equals_a_loop(scan, remat):
    w_LDD = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4)), jnp.float32)

    def block(w, x, i):
        y = jnp.tanh(x @ w) + i
        return y, y.sum()

    def loop(w, x):
        sums = []
        for layer in range(3):
            x, s = block(w[layer], x, layer)
            sums.append(s)
        return x.sum() + jnp.stack(sums)[1]

    def stack(w, x):
        x, sums = run_stack(block, w, x, jnp.arange(3), scan=scan, remat=remat)
        return x.sum() + sums[1]

    x = jnp.ones((2, 4))
    traced = str(jax.make_jaxpr(jax.grad(stack))(w_LDD, x))
    assert ("<host>" in traced) == remat.startswith(
        "offload"
    )  # a CPU traces and runs it; its host is its device
    (got, grads), (want, want_grads) = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(w_LDD, x) for f in (stack, loop)
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for a, b in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
