"""The one door through which a parameter meets an activation.

Every contraction of a weight goes through `matmul`, so that dtypes, layout and, later, leaf types with a
product of their own (LoRA, int8) are settled in one place. `lay_out` brings weights from the layout in which
they are stored to the one in which they are used.
"""

import itertools
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxlm.sharding import Layout, constrain, current, leaf_axes, make_spec, manual_axes, spec_axes
from jaxlm.tree import map_named

# The name by which a remat policy finds the results of `matmul`.
PRODUCT = "matmul"
# Likewise the result and the logsumexp of an attention kernel: with both it need not run again.
ATTENDED = "attended"


def _split(eqn: str) -> tuple[str, str, str]:
    inputs, out = eqn.split("->")
    x, w = inputs.split(",")
    return x, w, out


def precision(dtype: Any) -> jax.lax.Precision | None:
    """Of a product of operands of that dtype: fp32 means fp32, which TPUs round to bf16 and GPUs to TF32."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def einsum(eqn: str, a: Array, b: Array, dtype: str, accum: str) -> Array:
    """Operands cast to `dtype`, sums in `accum`; gradients are autodiff's, unlike those of `product`."""
    return jnp.einsum(
        eqn, a.astype(dtype), b.astype(dtype), precision=precision(dtype), preferred_element_type=accum
    )


Wire = tuple[bool, str]  # do activations travel in their own dtype; the dtype in which weight gradients do


@partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5, 6))
def product(
    eqn: str, x: Array, w: Array, dtype: str, accum: str, result: str, wire: Wire | None = None
) -> Array:
    """einsum with both operands cast to `dtype`, sums kept in `accum`, returned in `result`.

    Its gradients are products of the same kind. Parameters go through `matmul`; attention uses this directly.
    With a `wire`, a sum over devices is made in the dtype in which it arrives, not in `accum`: a device sums
    its own terms as ever, and the compiler puts the sum over devices right behind the product.
    """
    return einsum(eqn, x, w, dtype, result if wire and wire[0] else accum).astype(result)


def _product_fwd(eqn: str, x: Array, w: Array, dtype: str, accum: str, result: str, wire: Wire | None):
    # The cast weight is not kept: casting again costs less than holding a second copy of every weight.
    return product(eqn, x, w, dtype, accum, result, wire), (x, w)


def _product_bwd(
    eqn: str, dtype: str, accum: str, result: str, wire: Wire | None, saved: tuple[Array, Array], g: Array
):
    # Autodiff would transpose the product into one whose result type is the operand's (bf16), which is both
    # slower on a CPU (measured 0.6 of fp32 against 1.6) and rounds weight gradients before they are summed.
    x, w = saved
    x_axes, w_axes, out_axes = _split(eqn)
    own, gradients = wire or (False, accum)
    dx = einsum(f"{out_axes},{w_axes}->{x_axes}", g, w, dtype, str(x.dtype) if own else accum)
    dw = einsum(f"{x_axes},{out_axes}->{w_axes}", x, g, dtype, gradients)
    return dx.astype(x.dtype), dw.astype(w.dtype)


product.defvjp(_product_fwd, _product_bwd)


def wire_of(accum: str) -> Wire | None:
    """How sums over devices travel: on one device there are none."""
    layout = current()
    if layout is None:
        return None
    narrow = jnp.finfo(layout.reduce_dtype).bits < jnp.finfo(accum).bits
    return layout.mesh.shape["tensor"] > 1, layout.reduce_dtype if narrow else accum


def matmul(
    eqn: str,
    x: Array,
    w: Array,
    *,
    dtype: str = "float32",
    accum: str = "float32",
    result: str | None = None,
    out: tuple[str | None, ...] | None = None,
) -> Array:
    """Contract activation `x` with weight `w`.

    Operands are cast to `dtype`, products are summed in `accum`, and the result is returned in `result`. Both
    gradients are products of the same kind; the weight's arrives in the weight's own dtype, unrounded in
    between.

    Args:
        eqn: einsum equation `x,w->out`; each letter stands in at least two of the three terms.
        x: activation, any dtype.
        w: weight, any dtype; or a leaf type with a method `product(eqn, x, dtype, accum, result)` of its own.
        dtype: compute dtype.
        accum: dtype of the sums.
        result: dtype of the result; default `dtype`.
        out: logical axes of the result, to constrain its layout.

    >>> x, w = jnp.ones((2, 3)), jnp.ones((3, 4))
    >>> matmul("BD,DF->BF", x, w, dtype="bfloat16").dtype.name
    'bfloat16'
    """
    dtypes = str(dtype), str(accum), str(result or dtype)
    if hasattr(w, "product"):
        y = w.product(eqn, x, *dtypes)
    else:
        y = product(eqn, x, w, *dtypes, wire_of(str(accum)))
    y = checkpoint_name(y, PRODUCT)
    return y if out is None else constrain(y, *out)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _move(w: Array, stored: PartitionSpec, used: PartitionSpec, dtype: str) -> Array:
    own, w = w.dtype, w.astype(dtype)
    for spec in way(stored, used):
        w = jax.lax.with_sharding_constraint(w, spec)
    return w.astype(own)


def _scatter(stored: PartitionSpec, used: PartitionSpec, dtype: str, _: None, g: Array) -> tuple[Array]:
    for spec in way(stored, used)[-2::-1]:
        g = jax.lax.with_sharding_constraint(g, spec)
    return (g,)


_move.defvjp(lambda w, stored, used, dtype: (_move(w, stored, used, dtype), None), _scatter)


def way(stored: PartitionSpec, used: PartitionSpec) -> list[PartitionSpec]:
    """Layouts from one to the other; of several mesh axes to gather over, one at a time, the innermost first.

    As many bytes travel as in one step over all of them. But a TPU does not gather in a group that fills its
    torus: there it sums arrays that are zero but for a device's own part, which is twice the bytes.

    >>> steps = way(PartitionSpec(("data", "fsdp"), "tensor"), PartitionSpec(None, "tensor"))
    >>> [tuple(spec) for spec in steps]
    [(('data', 'fsdp'), 'tensor'), ('data', 'tensor'), (None, 'tensor')]
    """
    parts = [spec_axes(part) for part in stored]
    kept = {m for part in used for m in spec_axes(part)}
    steps = [stored]
    for gone in [m for part in parts for m in part if m not in kept][:0:-1]:
        parts = [tuple(m for m in part if m != gone) for part in parts]
        steps.append(make_spec(parts))
    return [*steps, used]


def in_host(x: Array) -> bool:
    """Whether `x`, which may be traced, is kept in the host's memory."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def on_device(x: Array) -> Array:
    """`x`, fetched if it is in the host's memory; its gradient goes back there."""
    return jax.device_put(x, jax.memory.Space.Device) if in_host(x) else x


def beside(x: Array, other: Array) -> Array:
    """`x`, which is on the device, moved to the memory in which `other` is kept."""
    return jax.device_put(x, jax.memory.Space.Host) if in_host(other) else x


def lay_out(
    params: Any,
    table: Mapping[str, tuple[str | None, ...]],
    dtype: str,
    *,
    exact: Collection[str] = (),
    left: Collection[str] = (),
) -> Any:
    """Weights as they are used: gathered over the mesh axes that split them in storage alone.

    What travels is the weight in the compute dtype where that is narrower. What arrives is that value in the
    weight's own dtype, so that its gradient is not rounded; products cast it back for nothing. Gradients go
    back to the layout of storage: a sum over devices of which each keeps its part.

    Args:
        params: tree of weights in storage layout, such as one layer's.
        table: the model's AXES table.
        dtype: compute dtype.
        exact: keys of the table whose leaves are used in their own dtype.
        left: keys of the table whose leaves stay as they are, for `gather_by_hand`.

    Returns:
        The same tree, on the device; on one device, or where storage and use do not differ, the very same
        leaves.
    """
    layout, params = current(), jax.tree.map(on_device, params)
    if layout is None:
        return params
    manual = manual_axes()

    def one(name: str, w: Array) -> Array:
        axes, key = leaf_axes(name, w.ndim, table), "/".join(name.split("/")[-2:])
        stored, used = layout.spec(axes), layout.spec(axes, compute=True)
        if stored == used or key in left:
            return w
        if manual & {m for part in (*stored, *used) for m in spec_axes(part)}:
            return w  # whoever split these axes by hand has gathered it
        narrower = key not in exact and jnp.finfo(dtype).bits < jnp.finfo(w.dtype).bits
        return _move(w, stored, used, str(dtype) if narrower else str(w.dtype))

    return map_named(one, params)


def hand_steps(stored: PartitionSpec, used: PartitionSpec) -> tuple[tuple[int, str], ...] | None:
    """(dimension, mesh axis) of each gather from one layout to the other, in order; None if it takes more.

    >>> hand_steps(PartitionSpec("expert", ("data", "fsdp"), None), PartitionSpec("expert", None, None))
    ((1, 'fsdp'), (1, 'data'))
    """
    steps: list[tuple[int, str]] = []
    for dim, (before, after) in enumerate(itertools.zip_longest(stored, used)):
        kept = spec_axes(after)
        if spec_axes(before)[: len(kept)] != kept:
            return None
        steps += [(dim, m) for m in spec_axes(before)[len(kept) :]]
    return tuple(steps[::-1])


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_by_hand(w: Array, steps: tuple[tuple[int, str], ...], dtype: str, gradients: str) -> Array:
    """In a `shard_map`: the whole of which every device has a part, in its own dtype.

    A sum over devices of a sharded result is a reduce-scatter here; what the compiler makes of a sum after a
    `shard_map` is mostly an all-reduce, of twice the bytes and all of the result's memory.

    Args:
        w: this device's part.
        steps: from `hand_steps`.
        dtype: in which it travels.
        gradients: in which its gradient does.
    """
    if not steps:
        return w
    own, w = w.dtype, w.astype(dtype)
    for dim, axis in steps:
        w = jax.lax.all_gather(w, axis, axis=dim, tiled=True)
    return w.astype(own)


def _scatter_by_hand(
    steps: tuple[tuple[int, str], ...], dtype: str, gradients: str, _: None, g: Array
) -> tuple[Array]:
    own, g = g.dtype, g.astype(gradients) if steps else g
    for dim, axis in steps[::-1]:
        g = jax.lax.psum_scatter(g, axis, scatter_dimension=dim, tiled=True)
    return (g.astype(own),)


gather_by_hand.defvjp(
    lambda w, steps, dtype, gradients: (gather_by_hand(w, steps, dtype, gradients), None), _scatter_by_hand
)


def gather(
    table_VD: Float[Array, "V D"],
    ids_BT: Int[Array, "*S"],
    axes: tuple[str | None, ...] | None = None,
    *,
    dtype: str = "float32",
) -> Float[Array, "*S D"]:
    """Rows of an embedding table, in the compute dtype.

    With the table's logical `axes`, on a mesh that splits it, ids and rows travel and the table does not: a
    device looks up, for all who share its columns of D, the ids that fall into its part of the vocabulary.

    Args:
        table_VD: in storage layout.
        ids_BT: out of range, the nearest row is taken.
        axes: logical axes of the table; None = leave it to the compiler.
        dtype: of the result.
    """
    layout = current()
    if layout is not None and axes is not None and ids_BT.ndim == 2 and not manual_axes():
        rows, columns = map(spec_axes, layout.fitting(ids_BT.shape, ("batch", "length")))
        vocab, embed = (layout.mesh_axes(axis) for axis in axes)
        if (vocab or embed) and set(embed) <= {*rows, *columns} and not {*rows, *columns} & {*vocab}:
            return _gather_parts(layout, table_VD, ids_BT, vocab, embed, dtype)
    return jnp.take(table_VD, ids_BT, axis=0, mode="clip").astype(dtype)


def _gather_parts(
    layout: Layout, table_VD: Array, ids_BT: Array, vocab: tuple[str, ...], embed: tuple[str, ...], dtype: str
) -> Array:
    """`gather` of a table split over mesh axes `vocab` and `embed`, the latter among those of the ids."""
    rows_columns = layout.fitting(ids_BT.shape, ("batch", "length"))
    rows, columns = rows_columns
    where = {m: dim for dim, part in enumerate(rows_columns) for m in spec_axes(part)}
    # Sums over the vocabulary are scattered along columns where the residual stream is split by that axis.
    stream = spec_axes(layout.fitting(ids_BT.shape, ("batch", "residual"))[1])
    scattered = tuple(m for m in stream if m in vocab)
    if stream != (*spec_axes(columns), *scattered):
        scattered = ()

    def own(table_vd: Array, ids_bt: Array) -> Array:
        for m in embed:
            ids_bt = jax.lax.all_gather(ids_bt, m, axis=where[m], tiled=True)
        size = table_vd.shape[0]
        ids_bt = jnp.clip(ids_bt, 0, table_VD.shape[0] - 1)
        ids_bt = ids_bt - (jax.lax.axis_index(vocab) * size if vocab else 0)
        mine = (ids_bt >= 0) & (ids_bt < size)
        x = jnp.where(mine[..., None], jnp.take(table_vd, ids_bt, axis=0, mode="clip"), 0).astype(dtype)
        waiting = list(embed)
        while any(where[m] for m in waiting):  # columns come home before they are split once more
            m = waiting.pop()
            x = jax.lax.all_to_all(x, m, where[m], 2, tiled=True)
        for m in scattered:  # one term of each sum is not zero, so that it is exact in any dtype
            x = jax.lax.psum_scatter(x, m, scatter_dimension=1, tiled=True)
        if kept := tuple(m for m in vocab if m not in scattered):
            x = jax.lax.psum(x, kept)
        while waiting:
            m = waiting.pop()
            x = jax.lax.all_to_all(x, m, where[m], 2, tiled=True)
        return x

    split = PartitionSpec(vocab or None, embed or None)
    out = PartitionSpec(rows, (*spec_axes(columns), *scattered) or None)
    return jax.shard_map(own, in_specs=(split, rows_columns), out_specs=out)(table_VD, ids_BT)
