"""Rows by index and products of rows sorted by group: what routing to experts is made of."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Int32

from jaxlm.errors import check_choice
from jaxlm.weights import PRODUCT, precision, wire_of

# --- Moving rows ---


def _rows(x_BND: Array, index_BM: Array) -> Array:
    """x[b, index[b, m]], zero where the index is N."""
    return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))(x_BND, index_BM)


@jax.custom_vjp
def take_rows(
    x_BND: Float[Array, "B N D"], index_BM: Int[Array, "B M"], inverse_BNJ: Int[Array, "B N J"]
) -> Float[Array, "B M D"]:
    """Rows of x by index; N means a row of zeros.

    The caller gives the inverse too: row n of x went to `inverse_BNJ[b, n, :]` (M = nowhere). So the gradient
    is a gather and a short sum, not a scatter-add, which is slow on TPU and has no fixed order on GPU.
    """
    return _rows(x_BND, index_BM)


def _take_rows_bwd(inverse_BNJ: Array, g_BMD: Array):
    batch, n, j = inverse_BNJ.shape
    g = _rows(g_BMD, inverse_BNJ.reshape(batch, n * j)).reshape(batch, n, j, -1)
    return g.sum(2, dtype=jnp.float32).astype(g_BMD.dtype) if j > 1 else g[:, :, 0], None, None


take_rows.defvjp(lambda x, index, inverse: (_rows(x, index), inverse), _take_rows_bwd)


# --- Grouped products ---


def _block_rows(rows: int, groups: int) -> int:
    """Rows per block of the loop: near the mean group, at least 8 and at most 128."""
    return min(128, max(8, 1 << max(0, (rows // groups) - 1).bit_length()))


def _loop_blocks(sizes_E: Array, block: int, body: Callable, init: Array) -> Array:
    """Fold `body(carry, expert, first row, rows)` over the blocks of every group, in row order."""
    blocks_E = -(-sizes_E // block)
    last_E, end_E = jnp.cumsum(blocks_E), jnp.cumsum(sizes_E)

    def step(i, carry):
        e = jnp.searchsorted(last_E, i, side="right")
        first = end_E[e] - sizes_E[e] + (i - (last_E[e] - blocks_E[e])) * block
        return body(carry, e, first, end_E[e] - first)

    return jax.lax.fori_loop(0, last_E[-1], step, init)


def _block(x_MD: Array, first: Array, rows: Array, block: int) -> Array:
    """`block` rows from `first` on, zero from `rows` on."""
    x = jax.lax.dynamic_slice_in_dim(x_MD, first, block)
    return jnp.where(jnp.arange(block)[:, None] < rows, x, 0)


def _loop_product(x_MD: Array, w_EDF: Array, sizes_E: Array, accum: str) -> Array:
    rows, block = x_MD.shape[0], _block_rows(x_MD.shape[0], w_EDF.shape[0])
    x_MD = jnp.pad(x_MD, ((0, block), (0, 0)))

    def body(y_MF, e, first, n):
        # Rows after the group's end are written as zeros here and by their own group's block later.
        x = _block(x_MD, first, n, block)
        y = jnp.dot(x, w_EDF[e], precision=precision(x.dtype), preferred_element_type=accum)
        return jax.lax.dynamic_update_slice_in_dim(y_MF, y, first, 0)

    y_MF = jnp.zeros((rows + block, w_EDF.shape[2]), accum)
    return _loop_blocks(sizes_E, block, body, y_MF)[:rows]


def _loop_weight_gradient(x_MD: Array, g_MF: Array, sizes_E: Array, accum: str) -> Array:
    experts, block = sizes_E.shape[0], _block_rows(x_MD.shape[0], sizes_E.shape[0])
    x_MD, g_MF = (jnp.pad(a, ((0, block), (0, 0))) for a in (x_MD, g_MF))

    def body(dw_EDF, e, first, n):
        x = _block(x_MD, first, n, block)
        g = jax.lax.dynamic_slice_in_dim(g_MF, first, block)
        how = dict(precision=precision(x.dtype), preferred_element_type=accum)
        return dw_EDF.at[e].add(jnp.einsum("MD,MF->DF", x, g, **how))

    return _loop_blocks(sizes_E, block, body, jnp.zeros((experts, x_MD.shape[1], g_MF.shape[1]), accum))


_SUM_OVER_GROUP = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=()
)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6, 7))
def _grouped(
    x_MD: Array,
    w_EDF: Array,
    sizes_E: Array,
    backend: str,
    dtype: str,
    accum: str,
    result: str,
    gradients: str,
) -> Array:
    x_MD, w_EDF = x_MD.astype(dtype), w_EDF.astype(dtype)
    if backend == "loop":
        y_MF = _loop_product(x_MD, w_EDF, sizes_E, accum)
    else:
        how = dict(precision=precision(x_MD.dtype), preferred_element_type=accum)
        y_MF = jax.lax.ragged_dot(x_MD, w_EDF, sizes_E, **how)
    return y_MF.astype(result)


def _grouped_fwd(x_MD, w_EDF, sizes_E, *how):
    return _grouped(x_MD, w_EDF, sizes_E, *how), (x_MD, w_EDF, sizes_E)


def _grouped_bwd(backend, dtype, accum, result, gradients, saved, g_MF):
    # As in `weights.matmul`: both gradients are products of `dtype` operands summed in `accum`.
    x_MD, w_EDF, sizes_E = saved
    w_EFD = jnp.swapaxes(w_EDF, 1, 2)
    dx_MD = _grouped(g_MF, w_EFD, sizes_E, backend, dtype, accum, str(x_MD.dtype), gradients)
    x, g = x_MD.astype(dtype), g_MF.astype(dtype)
    if backend == "loop":
        dw_EDF = _loop_weight_gradient(x, g, sizes_E, accum)
    else:
        how = dict(precision=precision(x.dtype), preferred_element_type=gradients)
        dw_EDF = jax.lax.ragged_dot_general(x, g, sizes_E, _SUM_OVER_GROUP, **how)
    return dx_MD, dw_EDF.astype(w_EDF.dtype), None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def grouped_matmul(
    x_MD: Float[Array, "M D"],
    w_EDF: Float[Array, "E D F"],
    group_sizes_E: Int32[Array, " E"],
    *,
    backend: str,
    dtype: str = "float32",
    accum: str = "float32",
    result: str | None = None,
) -> Float[Array, "M F"]:
    """Multiply each group of rows by its own matrix: the first group_sizes[0] rows by w[0], and so on.

    Rows after the last group come out undefined; they take no gradient if the caller never reads them.

    Args:
        x_MD: rows sorted by group.
        w_EDF: one matrix per group.
        group_sizes_E: rows of each group; their sum is at most M.
        backend: `loop` or `ragged`, see `jaxlm.model.moe.dropless_backend`.
        dtype: compute dtype.
        accum: dtype of the sums.
        result: dtype of the result; default `dtype`.
    """
    check_choice(backend, ("loop", "ragged"), "grouped_matmul: backend")
    wire = wire_of(str(accum))  # the sum over devices that follows takes gradients in this dtype
    dtypes = str(dtype), str(accum), str(result or dtype), wire[1] if wire else str(accum)
    y_MF = _grouped(x_MD, w_EDF, group_sizes_E, backend, *dtypes)
    return checkpoint_name(y_MF, PRODUCT)
