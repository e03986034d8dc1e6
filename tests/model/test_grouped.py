"""Rows by index and products of rows sorted by group, against plain loops."""

import functools
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model.grouped import grouped_matmul, take_rows

sys.path.insert(0, str(Path(__file__).parent))
from moe_cases import D, E, F, assert_trees_close


@functools.cache
def grouped_gradients(backend):
    def value(x_MD, w_EDF, sizes_E, probe_MF):
        ends_E = jnp.cumsum(sizes_E)
        row_M = jnp.arange(x_MD.shape[0])
        if backend == "naive":
            member_ME = (row_M[:, None] >= ends_E - sizes_E) & (row_M[:, None] < ends_E)
            y_MF = sum((x_MD * member_ME[:, e, None]) @ w_EDF[e] for e in range(E))
        else:
            y_MF = grouped_matmul(x_MD, w_EDF, sizes_E, backend=backend)
        y_MF = jnp.where(row_M[:, None] < ends_E[-1], y_MF, 0)
        return jnp.sum(y_MF * probe_MF), y_MF

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("sizes", [[3, 0, 5, 2], [0, 0, 0, 37], [0, 0, 0, 0], [30, 1, 1, 1], [8, 8, 16, 5]])
def test_grouped_products_equal_a_loop_over_groups(sizes):
    rows = 37  # some of the last ones belong to no group
    x_MD = jax.random.normal(jax.random.key(0), (rows, D))
    w_EDF = jax.random.normal(jax.random.key(1), (E, D, F))
    probe_MF = jnp.where(
        jnp.arange(rows)[:, None] < sum(sizes), jax.random.normal(jax.random.key(2), (rows, F)), 0
    )
    want, loop, ragged = (
        grouped_gradients(b)(x_MD, w_EDF, jnp.array(sizes), probe_MF) for b in ("naive", "loop", "ragged")
    )
    assert_trees_close(loop, want, atol=1e-4)
    assert_trees_close(ragged, want, atol=1e-4)
    assert (np.abs(want[1][1]).max((1, 2)) > 0).tolist() == [n > 0 for n in sizes]


@pytest.mark.parametrize("backend", ["loop", "ragged"])
def test_grouped_products_of_fp32_are_made_in_fp32(backend):
    """An accelerator would round the operands of a product of default precision."""
    x_MD, w_EDF, sizes_E = jnp.ones((9, D)), jnp.ones((E, D, F)), jnp.array([3, 0, 5, 1])
    for dtype in ("float32", "bfloat16"):
        loss = lambda x, w: grouped_matmul(x, w, sizes_E, backend=backend, dtype=dtype).sum()  # noqa: E731, B023
        text = str(jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(x_MD, w_EDF))
        found = re.findall(r"precision=\(?Precision\.HIGHEST", text)
        assert len(found) == (3 if dtype == "float32" else 0)


def test_take_rows_and_its_gradient():
    x_BND = jax.random.normal(jax.random.key(0), (1, 3, 2))
    index_BM = jnp.array([[2, 0, 3, 2]])  # 3 = nowhere
    inverse_BNJ = jnp.array([[[1, 4], [4, 4], [0, 3]]])
    y_BMD, pull = jax.vjp(lambda x: take_rows(x, index_BM, inverse_BNJ), x_BND)
    np.testing.assert_array_equal(y_BMD[0], np.asarray([x_BND[0, 2], x_BND[0, 0], [0, 0], x_BND[0, 2]]))
    g_BMD = jnp.arange(8.0).reshape(1, 4, 2)
    np.testing.assert_array_equal(pull(g_BMD)[0][0], [[2, 3], [0, 0], [6, 8]])
