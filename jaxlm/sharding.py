"""One mesh, one table of logical axes per leaf, and two rules dicts from logical to mesh axes.

A parameter's layout is looked up twice: its name gives logical axes (`attention/wq: embed heads head_dim`,
the model's AXES table) and the rules give the mesh axes (`embed -> fsdp`). Optimizer state, checkpoints and
the printed layout all derive from the same two tables. Where a weight is used it may lie otherwise than where
it is stored: `RULES` say how it is stored, `COMPUTE` what differs in use. Fully sharded data parallelism is
no more than that: `embed` is stored split over `fsdp` and used whole.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.errors import UserError, check, check_choice, nearest
from jaxlm.tree import map_named, named_leaves

# From the slowest links to the fastest, as devices are numbered: neighbours along `tensor` talk most.
MESH_AXES = ("pipe", "data", "fsdp", "expert", "sequence", "tensor")

# Logical axis -> mesh axes, in storage. Every device has its own part of the batch except along `tensor`;
# stages of a pipeline share out rows like replicas do, for embedding and head.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("pipe", "data", "fsdp", "expert"),
    "length": ("sequence",),
    "residual": ("sequence", "tensor"),  # columns of the stream between blocks, where all work is per column
    "embed": ("fsdp",),
    "expert_embed": ("fsdp",),  # D of an expert's weights; follows "embed", less what splits the experts
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "expert_batch": ("pipe", "data", "fsdp"),  # rows of tokens that stand beside an experts dimension
    "expert_mlp": ("tensor",),
    "activation": (),
    "norm": (),
    "layers": ("pipe",),
}
# What differs where a weight is used.
COMPUTE: dict[str, tuple[str, ...]] = {"embed": (), "expert_embed": ()}

REDUCE_DTYPES = ("float32", "bfloat16")
HOST = "pinned_host"  # JAX's name of the host's memory that a device reads and writes
OFFLOADS = ("none", "optimizer", "all")
DCN_AXES = ("data", "pipe")  # axes that need little from the links between slices


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; -1 on one of them takes all devices that the others leave."""

    data: int = -1  # replicas of the parameters, each with its own rows of the batch
    fsdp: int = 1  # parameters, gradients and optimizer state split along `embed`; rows split too
    tensor: int = 1  # heads, mlp and vocabulary split (Megatron layout)
    expert: int = 1  # experts split; rows split too
    sequence: int = 1  # columns of the batch split (context parallelism)
    pipe: int = 1  # layers split into stages
    pipe_microbatches: int = 0  # parts of a batch that follow each other through the stages; 0 = one a stage
    pipe_repeats: int = 1  # blocks of layers a stage holds: 1 = GPipe, more = circular (smaller bubble)
    slices: int = 1  # groups of devices with fast links, joined by a data-centre network
    dcn: str = "data"  # the axis that crosses it: data | pipe; the others stay inside a slice
    rules: tuple[tuple[str, str], ...] = ()  # (logical axis, mesh axes) pairs that replace those of RULES
    compute_rules: tuple[tuple[str, str], ...] = ()  # likewise of COMPUTE: weights where they are used
    reduce_dtype: str = "float32"  # in which weight gradients are summed over devices: float32 | bfloat16
    offload: str = "none"  # in the host's memory: none | optimizer (its state) | all (and layers, gradients)
    compiler_options: tuple[tuple[str, str], ...] = ()  # (name, value) for the compiler of the train step
    auto: bool = False  # the command chooses sizes (and `embed`'s rule) for its hardware: --config.mesh=auto

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in MESH_AXES}
        for where in ("rules", "compute_rules"):
            for axis, mesh_axes in getattr(self, where):
                check_choice(axis, RULES, f"mesh.{where}")
                for mesh_axis in mesh_axes.split():
                    check_choice(mesh_axis, MESH_AXES, f"mesh.{where}: {axis}")
        check_choice(self.reduce_dtype, REDUCE_DTYPES, "mesh.reduce_dtype")
        check_choice(self.dcn, DCN_AXES, "mesh.dcn")
        check_choice(self.offload, OFFLOADS, "mesh.offload")
        check(
            self.offload != "all" or self.pipe == 1,
            f"mesh.offload='all' with mesh.pipe={self.pipe}: stages keep their layers on the device; "
            "use 'optimizer'",
        )
        check(self.pipe_repeats >= 1, f"mesh.pipe_repeats={self.pipe_repeats} must be at least 1")
        parts = self.pipe_microbatches
        check(parts >= 0, f"mesh.pipe_microbatches={parts} must not be negative")
        check(self.slices >= 1, f"mesh.slices={self.slices} must be at least 1")
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
        >>> MeshConfig(rules=(("embed", "fsdp expert"),)).table()["expert_embed"]
        ('fsdp',)
        """
        return _replace(RULES, self.rules)

    def compute_table(self) -> dict[str, tuple[str, ...]]:
        """The rules for weights where they are used, and for activations.

        >>> MeshConfig(rules=(("embed", "fsdp sequence"),)).compute_table()["embed"]
        ()
        """
        return _replace(self.table() | COMPUTE, self.compute_rules)

    def shape(self, num_devices: int) -> tuple[int, ...]:
        """Axis sizes in the order of `MESH_AXES` on `num_devices` devices.

        >>> MeshConfig(tensor=2).shape(8)
        (1, 4, 1, 1, 1, 2)
        """
        check(not self.auto, "mesh.auto=True: no sizes are chosen, see jaxlm.preflight.planner.resolve_mesh")
        sizes = [getattr(self, name) for name in MESH_AXES]
        fixed = int(np.prod([n for n in sizes if n != -1]))
        text = " x ".join(f"{name}={n}" for name, n in zip(MESH_AXES, sizes, strict=True) if n != 1)
        if -1 in sizes:
            if num_devices % fixed or fixed > num_devices:
                raise UserError(f"mesh {text}: {num_devices} devices are not a multiple of {fixed}")
            sizes[sizes.index(-1)] = num_devices // fixed
        elif fixed > num_devices:
            raise UserError(f"mesh {text} needs {fixed} devices, but there are {num_devices}")
        across = sizes[MESH_AXES.index(self.dcn)]
        check(
            across % self.slices == 0,
            f"mesh.slices={self.slices} slices share the axis that crosses between them, and "
            f"mesh.{self.dcn}={across} is not a multiple of {self.slices}",
        )
        return tuple(sizes)


def _replace(
    rules: Mapping[str, tuple[str, ...]], pairs: Sequence[tuple[str, str]]
) -> dict[str, tuple[str, ...]]:
    """`rules` with these replacements; what they say of "embed" holds of the experts' D as far as it can."""
    new = {axis: tuple(mesh_axes.split()) for axis, mesh_axes in pairs}
    table = {**rules, **new}
    if "embed" in new and "expert_embed" not in new:
        table["expert_embed"] = tuple(m for m in table["embed"] if m not in table["experts"])
    return table


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with `Auto` axes named `MESH_AXES`.

    Of several slices, each takes its own consecutive part of axis `cfg.dcn` and all of the others. Devices
    that do not say which slice they are in are taken to be numbered slice by slice.

    Args:
        cfg: axis sizes.
        devices: which devices; default all. If `cfg` has no -1 and needs fewer, the first ones are used.

    Raises:
        UserError: the mesh is larger than the machine, does not divide it, or counts other slices than it
            (on GPUs, one is always right: nothing is then known of which links are slow).
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = cfg.shape(len(devices))
    used = devices[: int(np.prod(shape))]
    there = {getattr(device, "slice_index", None) for device in used}
    # To JAX every GPU node is a slice; an axis may cross nodes as it may not leave a TPU's torus.
    free = cfg.slices == 1 and used[0].platform != "tpu"
    check(
        free or there == {None} or len(there) == cfg.slices,
        f"mesh.slices={cfg.slices}, but the devices lie in {len(there)} slices",
    )
    inside = [n // cfg.slices if name == cfg.dcn else n for name, n in zip(MESH_AXES, shape, strict=True)]
    if cfg.slices == 1:
        grid = mesh_utils.create_device_mesh(shape, used, allow_split_physical_axes=True)
    elif there != {None}:
        across = [cfg.slices if name == cfg.dcn else 1 for name in MESH_AXES]
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, used, allow_split_physical_axes=True)
    else:
        parts = [part.reshape(inside) for part in np.split(np.asarray(used), cfg.slices)]
        grid = np.concatenate(parts, axis=MESH_AXES.index(cfg.dcn))
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules that map logical axes onto it."""

    mesh: Mesh | AbstractMesh
    rules: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: dict(RULES))
    compute: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: RULES | COMPUTE)
    reduce_dtype: str = "float32"  # of the sums of weight gradients over devices
    pipe_microbatches: int = 0  # see `MeshConfig`
    pipe_repeats: int = 1
    offload: str = "none"

    def spec(self, axes: Sequence[str | None], *, compute: bool = False) -> PartitionSpec:
        """The `PartitionSpec` of an array whose dimensions carry these logical axes (None = replicated).

        Args:
            axes: logical axis of each dimension.
            compute: of an activation, or of a weight where it is used; default: of a weight in storage.

        Raises:
            UserError: an unknown logical axis, or two dimensions on one mesh axis.
        """
        dims = [self.mesh_axes(axis, compute=compute) for axis in axes]
        used = [m for dim in dims for m in dim]
        for m in used:
            if used.count(m) > 1:
                raise UserError(f"axes {tuple(axes)}: the rules put two dimensions on mesh axis {m!r}")
        return make_spec(dims)

    def mesh_axes(self, axis: str | None, *, compute: bool = False) -> tuple[str, ...]:
        """The mesh axes that split a logical axis; those of size one go unsaid, so that specs are short."""
        rules = self.compute if compute else self.rules
        if axis is not None and axis not in rules:
            raise UserError(f"logical axis {axis!r} has no rule{nearest(axis, rules)}")
        return tuple(m for m in (() if axis is None else rules[axis]) if self.mesh.shape[m] > 1)

    def fitting(self, shape: Sequence[int], axes: Sequence[str | None]) -> PartitionSpec:
        """The spec of an activation of this shape, for the place where it is made.

        A dimension goes without the last mesh axes of its rule until the rest divides it: a single decoded
        column is not split. Axes that a surrounding `shard_map` has already split by hand go unsaid.
        """
        manual = manual_axes()
        dims = []
        for n, axis in zip(shape, axes, strict=True):
            dim = tuple(m for m in self.mesh_axes(axis, compute=True) if m not in manual)
            while n % self.size(dim):
                dim = dim[:-1]
            dims.append(dim)
        return make_spec(dims)

    def sharding(self, axes: Sequence[str | None]) -> NamedSharding:
        """`NamedSharding` for these logical axes, in storage."""
        return NamedSharding(self.mesh, self.spec(axes))

    def shards(self, axis: str) -> int:
        """Into how many parts the rules split a logical axis."""
        return self.size(self.rules[axis])

    @property
    def stages(self) -> int:
        """Stages of the pipeline."""
        return self.mesh.shape.get("pipe", 1)

    @property
    def pipeline_parts(self) -> int:
        """Microbatches that follow each other through the stages."""
        return self.pipe_microbatches or self.stages

    @property
    def row_multiple(self) -> int:
        """The number of rows of a batch must be a multiple of this."""
        return self.size([m for m in self.rules["batch"] if m != "pipe"]) * self.pipeline_parts

    def size(self, mesh_axes: Sequence[str]) -> int:
        """Product of the sizes of these mesh axes."""
        return math.prod(self.mesh.shape[m] for m in mesh_axes)


def make_spec(dims: Sequence[tuple[str, ...]]) -> PartitionSpec:
    """The `PartitionSpec` of an array whose dimensions are split over these mesh axes."""
    return PartitionSpec(*[None if not dim else dim[0] if len(dim) == 1 else dim for dim in dims])


def make_layout(cfg: MeshConfig, mesh: Mesh | AbstractMesh | None = None) -> Layout:
    """The layout of a config on `mesh`; default: on the devices of this machine.

    Raises:
        UserError: as `make_mesh`, or microbatches that do not suit the stages.
    """
    mesh = make_mesh(cfg) if mesh is None else mesh
    pipeline = (cfg.pipe_microbatches, cfg.pipe_repeats)
    layout = Layout(mesh, cfg.table(), cfg.compute_table(), cfg.reduce_dtype, *pipeline, cfg.offload)
    if cfg.offload != "none" and isinstance(mesh, Mesh):
        device = mesh.devices.flat[0]
        kinds = [memory.kind for memory in device.addressable_memories()]
        check(
            HOST in kinds,
            f"mesh.offload={cfg.offload!r}: {device.device_kind} has no memory {HOST!r} (it has "
            f"{', '.join(kinds)}); use 'none'",
        )
    S, M = layout.stages, layout.pipeline_parts
    check(
        M % S == 0,
        f"mesh.pipe_microbatches={M} is not a multiple of mesh.pipe={S}; the nearest that is: "
        f"{max(S, round(M / S) * S)}",
    )
    return layout


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


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': of the mesh in use, whose devices need not be here, else of this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None or device.platform is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def manual_axes() -> frozenset[str]:
    """Mesh axes that a surrounding `shard_map` has split by hand."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def constrain(x: jax.Array, *axes: str | None, gradient: tuple[str | None, ...] | None = None) -> jax.Array:
    """Ask for this layout of an activation; without a layout in use, or on one device, `x` as it is.

    Its gradient gets the same layout, or the one that `gradient` names.
    """
    layout = current()
    if layout is None:
        return x
    spec = layout.fitting(x.shape, axes)
    back = spec if gradient is None else layout.fitting(x.shape, gradient)
    if back == spec:
        return jax.lax.with_sharding_constraint(x, spec)
    return _constrain_both(x, spec, back)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _constrain_both(x: jax.Array, spec: PartitionSpec, back: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, spec)


_constrain_both.defvjp(
    lambda x, spec, back: (jax.lax.with_sharding_constraint(x, spec), None),
    lambda spec, back, _, g: (jax.lax.with_sharding_constraint(g, back),),
)


def split_axes(axis: str) -> tuple[str, ...]:
    """The mesh axes that split a logical axis of an activation here and now."""
    layout = current()
    return () if layout is None else layout.mesh_axes(axis, compute=True)


def on_own_part(
    fn: Callable[..., tuple[Any, Any]], whole: Sequence[jax.Array], x_BTD: jax.Array, *parts_BT: jax.Array
) -> tuple[Any, Any]:
    """`fn(whole, x, *parts)` on every device's own rows and columns, and sums over devices once, after it.

    Left to the compiler, a loop in `fn` that adds up sums over tokens would make each addition a sum over
    devices. Mesh axes that split neither rows nor columns stay with the compiler.

    Args:
        fn: returns (sums over its tokens, arrays [B, T, ...]).
        whole: arrays that every device needs; they travel in the dtype of `x` if that is narrower, and `fn`
            gets them in that dtype.
        x_BTD, parts_BT: arrays [B, T, ...].

    Returns:
        What `fn` gives for all tokens.
    """
    layout = current()
    rows_columns = PartitionSpec() if layout is None else layout.fitting(x_BTD.shape[:2], ("batch", "length"))
    by_hand = [m for part in rows_columns for m in spec_axes(part)]
    if not by_hand:
        return fn(whole, x_BTD, *parts_BT)

    def own(whole: Sequence[jax.Array], *parts: jax.Array) -> tuple[Any, Any]:
        sums, columns = fn(whole, *parts)
        return jax.tree.map(lambda s: s[None], sums), columns

    def over_devices(s: jax.Array) -> jax.Array:
        narrow = s.ndim > 1 and jnp.finfo(layout.reduce_dtype).bits < jnp.finfo(s.dtype).bits
        s = s.astype(layout.reduce_dtype) if narrow else s
        return jax.lax.reduce(s, np.zeros((), s.dtype), jax.lax.add, (0,))  # jnp.sum would widen it first

    narrower = jnp.finfo(x_BTD.dtype).bits
    whole = [w.astype(x_BTD.dtype) if jnp.finfo(w.dtype).bits > narrower else w for w in whole]
    sums, columns = jax.shard_map(
        own,
        in_specs=(PartitionSpec(), *[rows_columns] * (1 + len(parts_BT))),
        out_specs=(PartitionSpec(tuple(by_hand)), rows_columns),
        axis_names=set(by_hand),
        check_vma=False,
    )(whole, x_BTD, *parts_BT)
    return jax.tree.map(over_devices, sums), columns


def spec_axes(part: Any) -> tuple[str, ...]:
    """Mesh axes in one entry of a `PartitionSpec`."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


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
    spec: PartitionSpec  # in storage
    compute: PartitionSpec  # where it is used
    bytes_per_device: int


def describe(layout: Layout, tree: Any, table: Mapping[str, tuple[str | None, ...]]) -> list[LeafLayout]:
    """How every leaf of a (real or abstract) parameter tree lies on the mesh."""
    rows = []
    for name, leaf in named_leaves(tree):
        axes = leaf_axes(name, len(leaf.shape), table)
        check_divisible(layout, name, leaf.shape, axes)
        own = math.prod(layout.sharding(axes).shard_shape(tuple(leaf.shape)))
        rows.append(
            LeafLayout(
                name=name,
                shape=tuple(leaf.shape),
                dtype=np.dtype(leaf.dtype).name,
                axes=axes,
                spec=layout.spec(axes),
                compute=layout.spec(axes, compute=True),
                bytes_per_device=own * np.dtype(leaf.dtype).itemsize,
            )
        )
    return rows
