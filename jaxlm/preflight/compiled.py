"""Lower and compile the training step of a run for a topology, and keep what the compiler says: `Facts`.

Nothing is allocated and nothing runs: all arguments are `ShapeDtypeStruct`s with shardings. Facts hold what
was found and no judgement of it (`report` has that), and are cached as JSON by everything that they depend
on: config, topology, compiler, and our own source.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

import jaxlm
from jaxlm.config import RunConfig, canonical_json, to_dict
from jaxlm.data.config import batch_columns, column_dtype
from jaxlm.errors import UserError, check
from jaxlm.preflight import gpu, hlo
from jaxlm.preflight.collectives import BETWEEN, Collective, schedule, traffic
from jaxlm.preflight.topology import (
    Topology,
    captured_stderr,
    devices,
    make_topology_mesh,
    on_slices,
    outgoing_links,
    positions,
    versions,
)
from jaxlm.sharding import HOST, MESH_AXES, Layout, make_layout, use
from jaxlm.train.programs import programs_on, shape_of
from jaxlm.train.run import plan
from jaxlm.train.rundir import write_json
from jaxlm.tree import named_leaves

MOST = 2.0**40  # bytes of a device by the estimate: far beyond any chip, and the compiler's integers overflow


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device as the compiler allocates them."""

    arguments: int  # state and batch
    outputs: int
    aliased: int  # of the outputs, in the place of arguments that are donated
    temporaries: int
    code: int
    peak: int  # most that is in use at one time, arguments included, code not; 0 = not said

    @property
    def allocated(self) -> int:
        """All that is reserved for the program."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Shortage:
    """The program does not fit: the compiler refuses it (TPU), or it needs more than there is (GPU)."""

    needed: float  # bytes on one device
    available: float
    message: str


@dataclasses.dataclass(frozen=True)
class Row:
    """Equal collectives of a step, taken together; bytes are those of one device."""

    kind: str
    axes: str  # mesh axes that its groups run along, 'fsdp' or 'data fsdp'
    size: int  # devices in a group
    links: int  # over which a chip sends
    count: int  # runs in a step
    nbytes: float  # of the array, one run; see `Collective`
    ici: float  # sent to chips of the slice, all runs
    dcn: float  # sent to other slices, all runs
    where: str  # path of the JAX operation; '' if the compiler made it up


@dataclasses.dataclass(frozen=True)
class Facts:
    """What compiling a step for a topology told."""

    topology: str
    mesh: Mapping[str, int]
    state: Mapping[str, int]  # exact bytes on one device: params, gradients, opt_state, batch
    host: int  # bytes of the state that one device keeps in the host's memory (`mesh.offload`)
    largest_replicated: tuple[str, int]  # leaf of the parameters that every device holds whole, and its bytes
    memory: DeviceMemory | None  # None: it does not fit
    shortage: Shortage | None
    collectives: Sequence[Row] | None  # None: it does not fit, or the program cannot be printed
    unreadable: str  # why the program could not be read; '' = it was
    kernels: Mapping[str, int]  # runs in a step of each Pallas kernel and library call, 'splash_mha_fwd': 64
    cycles: float  # the compiler's estimate for one step; 0 = it gives none
    unknown_loops: int  # counted as one trip
    replicated: Sequence[str]  # operations whose operand the compiler replicates to go to another layout
    seconds: Mapping[str, float]  # trace, lower, compile
    versions: Mapping[str, str]

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "Facts":
        """The inverse of `dataclasses.asdict`, from JSON."""
        parts = {"memory": DeviceMemory, "shortage": Shortage}
        made = {name: None if tree[name] is None else part(**tree[name]) for name, part in parts.items()}
        rows = tree["collectives"]
        made["collectives"] = None if rows is None else tuple(Row(**row) for row in rows)
        made |= {name: tuple(tree[name]) for name in ("largest_replicated", "replicated")}
        return cls(**{**tree, **made})


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A training step on its way to the compiler."""

    program: Any  # jax.stages.Lowered
    target: Any  # abstract state
    batch: Mapping[str, jax.ShapeDtypeStruct]
    mesh: Any
    seconds: Mapping[str, float]  # trace (of the state too), lower


def lower_step(cfg: RunConfig, topology: Topology) -> Lowered:
    """Trace and lower the step that `train` would run on that hardware; nothing is compiled.

    Raises:
        UserError: shapes that do not fit together or are absurdly large, a mesh that does not fit the
            topology, no compiler.
    """
    cfg = on_slices(cfg, topology)
    mesh = make_topology_mesh(cfg.mesh, topology, devices(topology))
    layout = make_layout(cfg.mesh, mesh)
    need = plan(cfg, num_devices=topology.num_devices).memory.total
    model, data = cfg.model, cfg.data
    check(
        need < MOST,
        f"about {need / 2**30:,.0f} GiB on each device of --topology={topology}, and more than "
        f"{MOST / 2**30:,.0f} is not compiled; it follows from data.batch_size={data.batch_size}, "
        f"data.seq_len={data.seq_len}, model.num_layers={model.num_layers}, "
        f"model.model_dim={model.model_dim}, model.vocab_size={model.vocab_size}",
    )
    loss = dataclasses.replace(cfg.loss, per_position=False)
    # Bytes of a token's text are a table of constants in the step; which ones does not matter here.
    some_bytes = np.ones(cfg.model.vocab_size, np.float32)
    shared = dict(microbatches=cfg.train.microbatches, token_bytes=some_bytes, data_format=cfg.data.format)
    options = dict(cfg.mesh.compiler_options)
    clock = [time.perf_counter()]
    built = programs_on(layout, cfg.model, loss, cfg.optim, options, **shared)
    batch = _abstract_batch(cfg, layout)
    numbers = {name: jax.ShapeDtypeStruct((), np.float32) for name in ("lr", "weight_decay", "b2")}
    with use(layout):
        traced = built.step.trace(built.target, None, (batch, numbers))
        clock.append(time.perf_counter())
        program = traced.lower()
        clock.append(time.perf_counter())
    seconds = {name: b - a for name, a, b in zip(("trace", "lower"), clock[:-1], clock[1:], strict=True)}
    return Lowered(program, built.target, batch, mesh, seconds)


def compile_step(cfg: RunConfig, topology: Topology, announce: Callable[[], None] = lambda: None) -> Facts:
    """Compile the step that `train` would run on that hardware; `announce` is called before that.

    Raises:
        UserError: as `lower_step`, or the compiler fails.
    """
    lowered = lower_step(cfg, topology)
    announce()
    mesh, began = lowered.mesh, time.perf_counter()
    compiled, shortage = None, None
    try:
        with captured_stderr() as log:
            compiled = lowered.program.compile(gpu.COMPILER_OPTIONS if topology.platform == "gpu" else None)
    except jax.errors.JaxRuntimeError as error:
        shortage = parse_shortage(str(error))
        if shortage is None:
            raise UserError(
                f"--topology={topology}: the compiler fails: {str(error).splitlines()[0]}"
            ) from error
    seconds = {**lowered.seconds, "compile": time.perf_counter() - began}
    rows, kernels, cycles, unknown, unreadable = None, {}, 0.0, 0, ""
    if compiled is not None:
        try:
            # Some versions of libtpu cannot print some programs, and the text is no stable format.
            found = schedule(hlo.parse(compiled.as_text()))
            rows = summarise(found.collectives, topology, mesh)
            kernels, cycles, unknown = found.kernels, found.cycles, found.unknown_loops
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            unreadable = str(error).splitlines()[0]
    memory = None if compiled is None else _memory(compiled)
    if topology.platform == "gpu" and memory is not None and memory.allocated > topology.chip.limit:
        # The GPU compiler has no limit of its own.
        shortage = Shortage(memory.allocated, topology.chip.limit, "more than the memory of the GPU")
    return Facts(
        topology=str(topology),
        mesh=dict(mesh.shape),
        state=_state_bytes(lowered.target, lowered.batch, cfg),
        host=_local_bytes(lowered.target, host=True),
        largest_replicated=_largest_replicated(lowered.target.params),
        memory=memory,
        shortage=shortage,
        collectives=rows,
        unreadable=unreadable,
        kernels=kernels,
        cycles=cycles,
        unknown_loops=unknown,
        replicated=replications(log.text),
        seconds={name: round(took, 3) for name, took in seconds.items()},
        versions=versions(topology),
    )


def _abstract_batch(cfg: RunConfig, layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    def one(name: str, columns: int) -> jax.ShapeDtypeStruct:
        shape = (cfg.data.batch_size, columns) if columns else (cfg.data.batch_size,)
        rows = layout.sharding(("batch", "length")[: len(shape)])
        return jax.ShapeDtypeStruct(shape, column_dtype(name), sharding=rows)

    return {name: one(name, columns) for name, columns in batch_columns(cfg.data).items()}


def _leaves(tree: Any, *, host: bool = False) -> list[Any]:
    """The leaves that lie in the devices' memory, or those in the host's."""
    return [x for x in jax.tree.leaves(tree) if (x.sharding.memory_kind == HOST) == host]


def _elements(leaf: Any) -> int:
    """Of a leaf on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def _local_bytes(tree: Any, *, host: bool = False) -> int:
    """Bytes of a tree in one device's memory, or of its part in the host's."""
    return sum(_elements(x) * np.dtype(x.dtype).itemsize for x in _leaves(tree, host=host))


def _state_bytes(target: Any, batch: Any, cfg: RunConfig) -> dict[str, int]:
    params = _local_bytes(target.params)
    # Several gradients are summed in fp32.
    grads = 4 * sum(map(_elements, _leaves(target.params))) if cfg.train.microbatches > 1 else params
    return {
        "params": params,
        "gradients": grads,
        "opt_state": _local_bytes(target.opt_state),
        "batch": _local_bytes(batch),
    }


def _largest_replicated(params: Any) -> tuple[str, int]:
    whole = [
        (name, _local_bytes(leaf)) for name, leaf in named_leaves(params) if leaf.sharding.is_fully_replicated
    ]
    return max(whole, key=lambda item: item[1], default=("", 0))


def _memory(compiled: Any) -> DeviceMemory:
    m = compiled.memory_analysis()
    # The compiler's peak is of both memories taken together; arguments in the host's are alive all the time.
    peak = max(0, getattr(m, "peak_memory_in_bytes", 0) - m.host_argument_size_in_bytes)
    return DeviceMemory(
        arguments=m.argument_size_in_bytes,
        outputs=m.output_size_in_bytes,
        aliased=m.alias_size_in_bytes,
        temporaries=m.temp_size_in_bytes,
        code=m.generated_code_size_in_bytes,
        peak=peak,
    )


def parse_shortage(message: str) -> Shortage | None:
    """What an out-of-memory message of the compiler says; None if it is another one.

    >>> text = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    >>> found = parse_shortage(text + "(17.06G) exceeds available HBM (15.75G).")
    >>> round((found.needed - found.available) / 2**30, 2)
    1.31
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    size = r"\(([\d.]+)([BKMGTP])\)"
    found = re.search(rf"required.*?{size}.*?available.*?{size}", message, re.DOTALL)
    if found is None:
        return Shortage(0.0, 0.0, message.splitlines()[0])
    scale = {unit: 1024.0**n for n, unit in enumerate("BKMGTP")}
    needed, available = (float(found[i]) * scale[found[i + 1]] for i in (1, 3))
    return Shortage(needed, available, message.splitlines()[0])


_REPLICATION = re.compile(
    r"Involuntary full remat.*? HLO operation %[\w.\-]+ = (\w+\[[\d,]*\])\S* ([\w\-]+)\("
)


def replications(log: str) -> tuple[str, ...]:
    """What the partitioner complains of having replicated, 'gather f32[8,16,8]', each once.

    >>> log = "[SPMD] Involuntary full rematerialization. The compiler cannot go from sharding {x} to {y} "
    >>> replications(log + "for HLO operation %g.1 = f32[8,16]{1,0} gather(%a, %b), offset_dims={2}")
    ('gather f32[8,16]',)
    """
    return tuple(dict.fromkeys(f"{found[2]} {found[1]}" for found in _REPLICATION.finditer(log)))


def summarise(collectives: Sequence[Collective], topology: Topology, mesh: Any) -> tuple[Row, ...]:
    """Rows of equal collectives, those that send most first."""
    slices, coordinates = positions(topology, mesh)
    shape = tuple(mesh.shape[name] for name in MESH_AXES)
    sums: dict[tuple, list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
    for each in collectives:
        groups = each.groups
        sent = traffic(each, slices)
        between = each.kind.startswith(BETWEEN)
        links = 1 if between else max(outgoing_links(topology, coordinates, g) for g in _some(groups))
        axes = "slices" if between else _axes(groups, shape)
        key = (each.kind, axes, topology.slices if between else each.size, links, each.nbytes, each.where)
        total = sums[key]
        total[0] += each.trips
        total[1] += sent.ici * each.trips
        total[2] += sent.dcn * each.trips
    rows = [
        Row(kind, axes, size, links, int(count), nbytes, ici, dcn, where)
        for (kind, axes, size, links, nbytes, where), (count, ici, dcn) in sums.items()
    ]
    return tuple(sorted(rows, key=lambda row: -(row.ici + row.dcn)))


def _some(groups: Int[np.ndarray, "groups members"]) -> Int[np.ndarray, "some members"]:
    """A few groups, all of one kind on a regular mesh: the first, one in the middle, the last."""
    return groups[sorted({0, len(groups) // 2, len(groups) - 1})]


def _axes(groups: Int[np.ndarray, "groups members"], shape: Sequence[int]) -> str:
    """Mesh axes along which members of a group differ."""
    moved = set()
    for members in _some(groups):
        moved |= {i for i, at in enumerate(np.unravel_index(members, shape)) if len(set(at.tolist())) > 1}
    return " ".join(MESH_AXES[i] for i in sorted(moved))


# ------------------------------------------------------------------------------------------------------ cache


def default_cache() -> Path:
    """`jaxlm/preflight` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxlm" / "preflight"


def cache_key(cfg: RunConfig, topology: Topology) -> str:
    """sha256 of all that the facts depend on; what training reads and does with its data is not in it."""
    tree = to_dict(cfg)
    names = ("model", "optim", "loss", "mesh")
    tree["optim"] = to_dict(shape_of(cfg.optim))
    what = {name: tree[name] for name in names}
    what |= {"shape": [cfg.data.batch_size, cfg.data.seq_len, cfg.train.microbatches]}
    if cfg.data.format != "lm":
        what |= {"format": [cfg.data.format, cfg.data.input_len]}
    what |= {"topology": str(topology), "versions": versions(topology), "source": _source_hash()}
    what |= {"flags": {name: os.environ.get(name, "") for name in _FLAGS}}
    return hashlib.sha256(canonical_json(what).encode()).hexdigest()


_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64")


@functools.cache  # what runs is what was imported, whatever becomes of the files
def _source_hash() -> str:
    """Of our own modules: facts of another version of the step are not facts of this one."""
    digest = hashlib.sha256()
    root = Path(jaxlm.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def cached_facts(cfg: RunConfig, topology: Topology, cache: Path) -> Facts | None:
    """What was compiled before; None if nothing was, or if its file cannot be read."""
    path = cache / f"{cache_key(cfg, topology)}.json"
    try:
        return Facts.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def facts_of(
    cfg: RunConfig, topology: Topology, cache: Path | None, announce: Callable[[], None] = lambda: None
) -> tuple[Facts, bool]:
    """`(facts, whether they came from the cache)`; a cache file that cannot be read is written again.

    Where nothing can be written, a warning on stderr says so: facts took minutes, and are returned all the
    same.

    Args:
        cfg, topology: what to compile.
        cache: folder; None = compile and keep nothing.
        announce: called before something is compiled.
    """
    known = None if cache is None else cached_facts(cfg, topology, cache)
    if known is not None:
        return known, True
    facts = compile_step(cfg, topology, announce)
    if cache is not None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            write_json(cache / f"{cache_key(cfg, topology)}.json", dataclasses.asdict(facts))
        except OSError as error:
            print(f"WARNING: --cache={cache} keeps nothing: {error}", file=sys.stderr, flush=True)
    return facts, False
