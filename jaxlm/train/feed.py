"""Batches onto the mesh: which rows a process makes, and how they become its part of the global batch."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxlm.errors import UserError
from jaxlm.sharding import Layout
from jaxlm.train.step import Batch


def own_rows(layout: Layout, batch_size: int) -> Int[np.ndarray, " rows"]:
    """The rows of a global batch that lie on this process's devices, ascending.

    On most meshes they are one block; on a torus they may be several. Processes whose devices share rows
    (split along `tensor`, say) each make them.

    Raises:
        UserError: the mesh has no device of some process; told to every process alike.
    """
    idle = set(range(jax.process_count())) - {device.process_index for device in layout.mesh.devices.flat}
    if idle:
        raise UserError(
            f"the mesh of {layout.mesh.size} devices has none of process {min(idle)}: with "
            f"{jax.process_count()} processes it must use all {jax.device_count()} devices, such as by "
            "mesh.data=-1"
        )
    places = layout.sharding(("batch",)).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in places.values()]))


def place_batch(layout: Layout, batch: Batch, batch_size: int = 0, rows: Any = None) -> Batch:
    """A batch on the mesh, split along rows and columns.

    Args:
        layout: mesh and rules.
        batch: arrays `[rows, columns]` or `[rows]`.
        batch_size: rows of the global batch; 0 = those of `batch`, which is whole then.
        rows: which of them `batch` has, as from `own_rows`; None = all.
    """

    def one(x: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(batch_size or len(x))
            if rows is not None:
                first, last = np.searchsorted(rows, [first, last])
            return x[(slice(first, last), *index[1:])]

        sharding = layout.sharding(("batch", "length")[: x.ndim])
        return jax.make_array_from_callback((batch_size or len(x), *x.shape[1:]), sharding, part)

    return {name: one(x) for name, x in batch.items()}
