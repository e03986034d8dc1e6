"""Attention kernels on each device's own rows and heads."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxlm.errors import UserError, check
from jaxlm.sharding import current, manual_axes


def per_device(
    fn: Callable[..., Array],
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_segments_BT: Int[Array, "B T"] | None,
    k_segments_BS: Int[Array, "B S"] | None,
    sinks_N: Float[Array, " N"] | None,
) -> Float[Array, "B T N H"]:
    """`fn(q, k, v, q_segments, k_segments, sinks)` in a `shard_map` over the mesh in use.

    XLA cannot split a kernel, so each device is handed its rows of the batch and its heads. Where the rules
    leave `kv_heads` whole and split `heads`, a device takes the key heads that its query heads read. Mesh
    axes that are manual already (inside another `shard_map`) stay as they are; without a mesh, `fn` is just
    called.

    Raises:
        UserError: rows that the mesh does not divide, columns split over devices, or query heads of one
            device that read parts of several groups.
    """
    args = (q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, sinks_N)
    layout, ambient = current(), jax.sharding.get_abstract_mesh()
    free = set(ambient.axis_names) - manual_axes()
    if layout is None or all(ambient.shape[a] == 1 for a in free):
        return fn(*args)

    def split(axis: str) -> tuple[str, ...]:
        """Mesh axes of more than one device, still free, along which a logical axis is split."""
        return tuple(m for m in layout.mesh_axes(axis, compute=True) if m in free)

    def parts(axis: str) -> int:
        return layout.size(split(axis))

    B, N, K = q_BTNH.shape[0], q_BTNH.shape[2], k_BSKH.shape[2]
    check(B % parts("batch") == 0, f"a batch of {B} rows does not divide over {parts('batch')} devices")
    if split("length"):
        raise UserError(
            f"an attention kernel sees whole rows; mesh axis {split('length')[0]!r} splits their columns"
        )
    alone = parts("heads") > 1 and parts("kv_heads") == 1
    if alone:
        n, G = N // parts("heads"), N // K
        check(
            n % G == 0 or G % n == 0,
            f"{n} query heads a device read parts of several of the {K} key heads, {G} query heads each: "
            f"choose mesh.tensor so that a device has a multiple or a divisor of {G} of the {N} query heads",
        )
    else:
        check(
            parts("heads") == parts("kv_heads"),
            f"the mesh splits heads in {parts('heads')} and kv_heads in {parts('kv_heads')}; it must split "
            "both alike, or leave kv_heads whole",
        )

    def own(q, k, v, q_segments, k_segments, sinks):
        if alone:
            first = jax.lax.axis_index(split("heads")) * n // G
            k, v = (jax.lax.dynamic_slice_in_dim(x, first, max(1, n // G), axis=2) for x in (k, v))
        return fn(q, k, v, q_segments, k_segments, sinks)

    def spec(*axes: str | None) -> PartitionSpec:
        return PartitionSpec(*[None if axis is None else split(axis) for axis in axes])

    q, kv, columns = (
        spec("batch", None, "heads", None),
        spec("batch", None, "kv_heads", None),
        spec("batch", None),
    )
    return jax.shard_map(
        own,
        in_specs=(q, kv, kv, columns, columns, spec("heads")),
        out_specs=q,
        axis_names=free,
        check_vma=False,  # a kernel does not say along which axes its result varies
    )(*args)
