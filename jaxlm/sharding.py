"""One mesh, one table of logical axes per leaf, one rules dict from logical to mesh axes.

A parameter's layout is looked up twice: its name gives logical axes (`attention/wq: embed heads head_dim`,
the model's AXES table) and the rules give the mesh axes (`embed -> fsdp`). Optimizer state, checkpoints and
the printed layout all derive from the same two tables.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.errors import UserError, check_choice, nearest
from jaxlm.tree import map_named, named_leaves

# From the slowest links to the fastest, as devices are numbered: neighbours along `tensor` talk most.
MESH_AXES = ("pipe", "data", "fsdp", "expert", "sequence", "tensor")

# Logical axis -> mesh axes. Every device holds its own rows of the batch except along `tensor`.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "expert_batch": ("data", "fsdp"),  # rows of tokens that stand beside an experts dimension
    "expert_mlp": ("tensor",),
    "activation": (),
    "norm": (),
    "layers": (),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; -1 on one of them takes all devices that the others leave."""

    data: int = -1  # replicas of the parameters, each with its own rows of the batch
    fsdp: int = 1  # parameters, gradients and optimizer state split along `embed`; rows split too
    tensor: int = 1  # heads, mlp and vocabulary split (Megatron layout)
    expert: int = 1  # experts split; rows split too
    sequence: int = 1  # columns of the batch split (context parallelism)
    pipe: int = 1  # layers split into stages
    rules: tuple[tuple[str, str], ...] = ()  # (logical axis, mesh axes) pairs that replace those of RULES

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in MESH_AXES}
        for axis, mesh_axes in self.rules:
            check_choice(axis, RULES, "mesh.rules")
            for mesh_axis in mesh_axes.split():
                check_choice(mesh_axis, MESH_AXES, f"mesh.rules: {axis}")
        for name, n in sizes.items():
            if n != -1 and n < 1:
                raise UserError(f"mesh.{name}={n} must be a positive size, or -1 for all remaining devices")
        if sum(n == -1 for n in sizes.values()) > 1:
            free = [name for name, n in sizes.items() if n == -1]
            raise UserError(
                f"mesh: only one axis can be -1 (all remaining devices), got {' and '.join(free)}"
            )

    def table(self) -> dict[str, tuple[str, ...]]:
        """`RULES` with this config's replacements.

        >>> MeshConfig(rules=(("kv_heads", ""), ("mlp", "tensor expert"))).table()["mlp"]
        ('tensor', 'expert')
        """
        return RULES | {axis: tuple(mesh_axes.split()) for axis, mesh_axes in self.rules}

    def shape(self, num_devices: int) -> tuple[int, ...]:
        """Axis sizes in the order of `MESH_AXES` on `num_devices` devices.

        >>> MeshConfig(tensor=2).shape(8)
        (1, 4, 1, 1, 1, 2)
        """
        sizes = [getattr(self, name) for name in MESH_AXES]
        fixed = int(np.prod([n for n in sizes if n != -1]))
        text = " x ".join(f"{name}={n}" for name, n in zip(MESH_AXES, sizes, strict=True) if n != 1)
        if -1 in sizes:
            if num_devices % fixed or fixed > num_devices:
                raise UserError(f"mesh {text}: {num_devices} devices are not a multiple of {fixed}")
            sizes[sizes.index(-1)] = num_devices // fixed
        elif fixed > num_devices:
            raise UserError(f"mesh {text} needs {fixed} devices, but there are {num_devices}")
        return tuple(sizes)


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with `Auto` axes named `MESH_AXES`.

    Args:
        cfg: axis sizes.
        devices: which devices; default all. If `cfg` has no -1 and needs fewer, the first ones are used.

    Raises:
        UserError: the mesh is larger than the machine, or does not divide it.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = cfg.shape(len(devices))
    used = devices[: int(np.prod(shape))]
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=used)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules that map logical axes onto it."""

    mesh: Mesh | AbstractMesh
    rules: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: dict(RULES))

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """The `PartitionSpec` of an array whose dimensions carry these logical axes (None = replicated).

        Raises:
            UserError: an unknown logical axis, or two dimensions on one mesh axis.
        """
        dims: list[tuple[str, ...]] = []
        for axis in axes:
            if axis is not None and axis not in self.rules:
                raise UserError(f"logical axis {axis!r} has no rule{nearest(axis, self.rules)}")
            dims.append(() if axis is None else tuple(self.rules[axis]))
        used = [m for dim in dims for m in dim if self.mesh.shape[m] > 1]
        for m in used:
            if used.count(m) > 1:
                raise UserError(f"axes {tuple(axes)}: the rules put two dimensions on mesh axis {m!r}")
        # Axes of size one are left out, so that the printed spec says only what is really split.
        dims = [tuple(m for m in dim if self.mesh.shape[m] > 1) for dim in dims]
        return PartitionSpec(*[None if not dim else dim[0] if len(dim) == 1 else dim for dim in dims])

    def sharding(self, axes: Sequence[str | None]) -> NamedSharding:
        """`NamedSharding` for these logical axes."""
        return NamedSharding(self.mesh, self.spec(axes))

    def shards(self, axis: str) -> int:
        """Into how many parts the rules split a logical axis."""
        return int(np.prod([self.mesh.shape[m] for m in self.rules[axis]], dtype=np.int64))


_current: Layout | None = None


@contextlib.contextmanager
def use(layout: Layout | None) -> Iterator[None]:
    """Make `layout` the one that `constrain` reads while a function is traced; also sets the JAX mesh."""
    global _current
    previous, _current = _current, layout
    try:
        if layout is None:
            yield
        else:
            with jax.set_mesh(layout.mesh):
                yield
    finally:
        _current = previous


def current() -> Layout | None:
    """The layout in use; None without one, and on one device, where nothing is laid out."""
    return None if _current is None or _current.mesh.size == 1 else _current


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Ask for this layout of an activation; without a layout in use, or on one device, `x` as it is."""
    if _current is None or _current.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _current.sharding(axes))


def leaf_axes(name: str, ndim: int, table: Mapping[str, tuple[str | None, ...]]) -> tuple[str | None, ...]:
    """Logical axes of a leaf by the last two components of its name; leading stacked dims are `layers`.

    >>> leaf_axes("blocks/0/attention/wo", 4, {"attention/wo": ("heads", "head_dim", "embed")})
    ('layers', 'heads', 'head_dim', 'embed')

    Raises:
        UserError: the table has no entry for this leaf.
    """
    key = "/".join(name.split("/")[-2:])
    if key not in table:
        raise UserError(f"parameter {name!r} has no entry {key!r} in the AXES table{nearest(key, table)}")
    axes = table[key]
    extra = ndim - len(axes)
    if extra not in (0, 1):
        raise UserError(f"parameter {name!r} has {ndim} dimensions, its AXES entry {axes} has {len(axes)}")
    return ("layers",) * extra + tuple(axes)


def check_divisible(layout: Layout, name: str, shape: Sequence[int], axes: Sequence[str | None]) -> None:
    """Raise `UserError` if a dimension of the leaf does not divide into the parts that the rules ask for."""
    for n, axis in zip(shape, axes, strict=True):
        parts = 1 if axis is None else layout.shards(axis)
        if n % parts:
            where = " x ".join(f"{m}={layout.mesh.shape[m]}" for m in layout.rules[axis])
            raise UserError(
                f"{name}: {axis} has size {n}, which the mesh ({where}) does not divide; "
                f"choose a mesh axis that divides {n}, or leave {axis!r} whole: mesh.rules=(({axis!r}, ''),)"
            )


def tree_shardings(layout: Layout, tree: Any, table: Mapping[str, tuple[str | None, ...]]) -> Any:
    """`NamedSharding` of every leaf of a parameter tree.

    Raises:
        UserError: a leaf without an entry, or a size that the mesh does not divide.
    """

    def one(name: str, leaf: Any) -> NamedSharding:
        axes = leaf_axes(name, len(leaf.shape), table)
        check_divisible(layout, name, leaf.shape, axes)
        return layout.sharding(axes)

    return map_named(one, tree)


@dataclasses.dataclass(frozen=True)
class LeafLayout:
    """One row of the printed layout."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    spec: PartitionSpec
    bytes_per_device: int


def describe(layout: Layout, tree: Any, table: Mapping[str, tuple[str | None, ...]]) -> list[LeafLayout]:
    """How every leaf of a (real or abstract) parameter tree lies on the mesh."""
    rows = []
    for name, leaf in named_leaves(tree):
        axes = leaf_axes(name, len(leaf.shape), table)
        check_divisible(layout, name, leaf.shape, axes)
        parts = int(np.prod([1 if a is None else layout.shards(a) for a in axes], dtype=np.int64))
        total = int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize
        rows.append(
            LeafLayout(
                name, tuple(leaf.shape), np.dtype(leaf.dtype).name, axes, layout.spec(axes), total // parts
            )
        )
    return rows
