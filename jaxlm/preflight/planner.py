"""What a layout will cost, without compiling it: memory, traffic and time in closed form, and the best mesh.

Memory is `scaling.memory.memory`. Traffic of one device and step, with w the bytes of its share of the
parameters in the compute dtype as the axis gathers them, g the same in `mesh.reduce_dtype`, M microbatches,
x = tokens of the device x D x bytes of an activation, L layers, n the size of the axis:

    storage   (n - 1) / n of 2 M w gathered (forward, backward) and of M g scattered, for each axis that
              splits `embed` in storage: the innermost gathers the parts that the outer ones leave
    data      2 (n - 1) / n of the gradients' shard, where `data` is none of them
    tensor    2 (n - 1) / n of 4 L x (6 L x where blocks are rematerialised)
    sequence  (n - 1) of 6 L x (K / N): keys and values of the others, forward, again, and their gradients
    expert    (n - 1) / n of 4 k x for each layer of experts (6 where blocks are rematerialised)
    pipe      2 R x, with R blocks of layers a stage (`mesh.pipe_repeats`)

An axis that alone fills a torus with rings in all dimensions sends twice as much for storage: there a TPU
gathers and scatters by sums of whole arrays (`weights.way`). The time of an axis is its bytes over its links:
an axis of n of N chips is taken to lie along ceil(dims log n / log N) dimensions of the torus, two links in
each. While a pipeline fills and empties, a stage computes what nobody uses: that share of time is added. An
estimate to choose with; the compiler has the last word.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxlm.chips import Chip, chip_of_kind
from jaxlm.config import RunConfig
from jaxlm.errors import UserError, check
from jaxlm.mesh_rules import preset
from jaxlm.pipeline import bubble_fraction
from jaxlm.scaling.memory import Memory
from jaxlm.sharding import MESH_AXES, MeshConfig
from jaxlm.train.run import plan

HEADROOM = 0.6  # share of the memory that the estimate may fill: compilers reserve up to 1.67 times as much


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one configuration on one chip; bytes and seconds of one device and step."""

    memory: Memory
    limit: float  # bytes that a program can have
    compute: float  # seconds, hardware FLOPs at the peak, a pipeline's bubble included
    links: float  # seconds of all collectives inside a slice
    dcn: float  # seconds of those between slices
    traffic: dict[str, float]  # mesh axis -> bytes sent

    @property
    def fits(self) -> bool:
        """With `HEADROOM`."""
        return self.memory.total <= HEADROOM * self.limit

    @property
    def seconds(self) -> float:
        """Between full overlap and none: the longest of the three, and a fifth of the others."""
        terms = sorted((self.compute, self.links, self.dcn))
        return terms[-1] + 0.2 * sum(terms[:-1])


def estimate(cfg: RunConfig, chip: Chip, num_devices: int, slices: int = 1) -> Estimate:
    """Memory and time of a run's step on that many devices.

    Args:
        cfg: its mesh need not be resolved.
        chip: with a network.
        num_devices: over all slices.
        slices: which `mesh.dcn` crosses.

    Raises:
        UserError: shapes that do not fit together or that the mesh does not divide.
    """
    cfg = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, slices=slices))
    need = plan(cfg, num_devices=num_devices)
    chips = num_devices / slices / chip.devices
    closed = chip.network.dims > 1 and chips >= chip.network.wrap**chip.network.dims
    torus = num_devices // slices if closed else 0
    traffic = axis_traffic(cfg, need.mesh_shape, need.memory.params, torus=torus)
    seconds, between = 0.0, 0.0
    for axis, sent in traffic.items():
        n = need.mesh_shape[axis]
        if slices > 1 and axis == cfg.mesh.dcn:
            between += sent * chip.devices / chip.network.beyond
            n //= slices
        if n > 1:
            dims = math.ceil(chip.network.dims * math.log(n) / math.log(max(chips, n, 2)) - 1e-9)
            links = 2 * max(dims, 1) if chip.network.dims > 1 else 1
            seconds += sent * chip.devices / (links * chip.network.link)
    share, stages = need.tokens_per_step / num_devices, need.mesh_shape["pipe"]
    idle = bubble_fraction(stages, cfg.mesh.pipe_microbatches or stages, cfg.mesh.pipe_repeats)
    return Estimate(
        memory=need.memory,
        limit=chip.limit,
        compute=need.counts.flops_hardware * share / (chip.peak / chip.devices) / (1 - idle),
        links=seconds,
        dcn=between,
        traffic=traffic,
    )


def axis_traffic(cfg: RunConfig, mesh: dict[str, int], params: int, *, torus: int = 0) -> dict[str, float]:
    """Bytes that one device sends along each mesh axis in a step; see the module's text.

    Args:
        cfg: the run.
        mesh: resolved sizes.
        params: bytes of the parameters on one device.
        torus: devices of a slice that is closed to rings in all its dimensions; 0 = it is not.
    """
    model, M = cfg.model, cfg.train.microbatches
    width, summed = np.dtype(model.dtype).itemsize, np.dtype(cfg.mesh.reduce_dtype).itemsize
    shard = params / np.dtype(model.param_dtype).itemsize  # elements
    rows = cfg.data.batch_size / (mesh["data"] * mesh["fsdp"] * mesh["expert"])
    x = rows * cfg.data.seq_len / mesh["sequence"] * model.model_dim * width
    layers = model.num_layers / mesh["pipe"]
    passes = 6 if model.remat == "full" else 4

    def part(axis: str) -> float:
        return (mesh[axis] - 1) / mesh[axis]

    stored = [axis for axis in cfg.mesh.table()["embed"] if mesh[axis] > 1]
    storage, gathered = dict.fromkeys(MESH_AXES, 0.0), shard * math.prod(mesh[axis] for axis in stored)
    for axis in stored:  # from the outermost in
        again = 2 if mesh[axis] == torus else 1
        storage[axis] = again * part(axis) * gathered * M * (2 * width + summed)
        gathered /= mesh[axis]
    heads = model.attention.kv_heads / model.attention.num_heads
    moe = model.num_moe_layers / mesh["pipe"] * model.moe.top_k if model.num_moe_layers else 0
    asked = {
        "data": 0.0 if "data" in stored else 2 * part("data") * shard * summed,
        "tensor": 2 * part("tensor") * passes * layers * x,
        "sequence": (mesh["sequence"] - 1) * 6 * layers * x * heads / mesh["tensor"],
        "expert": part("expert") * passes * moe * x,
        "pipe": 2 * cfg.mesh.pipe_repeats * x if mesh["pipe"] > 1 else 0.0,
    }
    return {axis: storage[axis] + asked.get(axis, 0.0) for axis in MESH_AXES}


def meshes(cfg: RunConfig, num_devices: int, slices: int = 1) -> Iterator[MeshConfig]:
    """Layouts worth asking about; many of them will not divide the model.

    `pipe` stays as the config has it. `data` is as large as the slices, unless `pipe` crosses them; `fsdp`
    takes what pipe, tensor (up to 16), expert and sequence leave. More `data` in place of `fsdp` saves
    gathers where the state fits, so a few of those follow; so does storage over two axes, neither of which
    fills the torus, where the config has no rule of its own for `embed`.

    Raises:
        UserError: a `pipe` that the devices or the slices do not divide by.
    """
    pipe, across = cfg.mesh.pipe, slices if cfg.mesh.dcn == "data" else 1
    check(pipe > 0, f"mesh.pipe={pipe}: stages are not searched for, give their number")
    check(
        num_devices % (pipe * across) == 0 and (across == slices or pipe % slices == 0),
        f"mesh.pipe={pipe} stages, which are not searched for, do not share out {num_devices} devices in "
        f"{slices} slice(s) with mesh.dcn={cfg.mesh.dcn!r}",
    )
    tensors = [n for n in (1, 2, 4, 8, 16) if cfg.model.attention.num_heads % n == 0]
    experts = _divisors(cfg.model.moe.num_experts) if cfg.model.num_moe_layers else [1]
    sequences = [1, 2, 4, 8, 16, 32, 64]
    for tensor, expert, sequence in itertools.product(tensors, experts, sequences):
        used = pipe * across * tensor * expert * sequence
        if num_devices % used:
            continue
        rest = num_devices // used
        # Columns are split only when there are not rows enough.
        if sequence > 1 and cfg.data.batch_size >= pipe * across * rest * expert * sequence:
            continue
        others = dict(tensor=tensor, expert=expert, sequence=sequence, slices=slices)
        for more in (1, 4, rest):
            if rest % more == 0 and (more == 1 or more < rest or more == rest > 4):
                yield dataclasses.replace(cfg.mesh, data=across * more, fsdp=rest // more, **others)
        inner = 2 ** (int(math.log2(rest)) // 2)
        if "embed" in dict(cfg.mesh.rules) or inner < 4 or rest % inner:
            continue
        if across == 1:
            outer, sizes = "data", dict(data=rest // inner, fsdp=inner)
        elif not cfg.model.num_moe_layers:  # `data` leaves the slice; a dense model has no use for `expert`
            outer, sizes = "expert", dict(data=across, fsdp=inner, expert=rest // inner)
        else:
            continue
        rules = (*cfg.mesh.rules, ("embed", f"{outer} fsdp"))
        yield dataclasses.replace(cfg.mesh, **(others | sizes), rules=rules)


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0 and k & (k - 1) == 0]


def ranked(
    configs: Iterator[RunConfig] | Sequence[RunConfig], chip: Chip, num_devices: int, slices: int = 1
) -> list[tuple[RunConfig, Estimate]]:
    """Configurations that divide and fit by the estimate, the fastest first."""
    found = []
    for cfg in configs:
        try:
            made = estimate(cfg, chip, num_devices, slices)
        except UserError:
            continue
        if made.fits:
            found.append((cfg, made))
    return sorted(found, key=lambda item: item[1].seconds)


def why_none(
    configs: Iterator[RunConfig] | Sequence[RunConfig], chip: Chip, num_devices: int, slices: int = 1
) -> str:
    """Why `ranked` finds nothing: what refuses most of them, or what the smallest needs."""
    refused: collections.Counter[str] = collections.Counter()
    smallest, tried = math.inf, []
    for cfg in configs:
        tried.append(cfg)
        try:
            smallest = min(smallest, estimate(cfg, chip, num_devices, slices).memory.total)
        except UserError as error:
            refused[str(error)] += 1
    if smallest < math.inf:
        return (
            f"the smallest needs {smallest / 2**30:.1f} GiB by the estimate, more than {HEADROOM:.0%} of "
            f"{chip.limit / 2**30:.1f} GiB: take {' or '.join(_untried(tried))}"
        )
    ((message, count),) = refused.most_common(1)
    return f"none divides the model and its rows ({count} of {refused.total()} are refused so: {message})"


def _untried(configs: Sequence[RunConfig]) -> Iterator[str]:
    """What takes memory off a device and is in none of the configurations."""
    most = max(cfg.train.microbatches for cfg in configs)
    yield "more chips"
    if all(cfg.model.remat != "full" for cfg in configs):
        yield "model.remat='full'"
    if all(cfg.mesh.offload == "none" for cfg in configs):
        yield "mesh.offload='optimizer'"
    if all(cfg.data.batch_size > most for cfg in configs):
        yield f"train.microbatches above {most}"


def choose_mesh(cfg: RunConfig, chip: Chip, num_devices: int, slices: int = 1) -> MeshConfig:
    """The mesh that the estimate finds fastest for a run, of those that fit; with the config's `pipe`.

    Raises:
        UserError: none of them does.
    """
    tried = (dataclasses.replace(cfg, mesh=mesh) for mesh in meshes(cfg, num_devices, slices))
    found = ranked(tried, chip, num_devices, slices)
    if not found:
        tried = (dataclasses.replace(cfg, mesh=mesh) for mesh in meshes(cfg, num_devices, slices))
        raise UserError(
            f"no mesh of {num_devices} devices will do: {why_none(tried, chip, num_devices, slices)}"
            "; sizes that are given are not held to that"
        )
    return found[0][0].mesh


def resolve_mesh(cfg: RunConfig, kind: str, num_devices: int, slices: int = 1) -> RunConfig:
    """The run with a mesh, if it leaves the choice to us: the planner's, else that of `mesh_rules`.

    The table decides for hardware whose links have no numbers (a CPU), and for GPUs of several hosts.

    Args:
        cfg: any run; without `mesh.auto` it comes back as it is.
        kind: as `jax.Device.device_kind`.
        num_devices: over all slices.
        slices: groups of devices with fast links; of GPUs, hosts.

    Raises:
        UserError: nothing fits, or the hardware is in neither table.
    """
    if not cfg.mesh.auto:
        return cfg
    asked, chip = dataclasses.replace(cfg.mesh, auto=False), chip_of_kind(kind)
    torus = chip is not None and chip.network is not None and chip.network.dims > 1
    if chip is not None and chip.network is not None and (torus or slices == 1):
        mesh = choose_mesh(dataclasses.replace(cfg, mesh=asked), chip, num_devices, slices)
    else:
        rule, _ = preset(f"{kind} x {num_devices}")
        sizes = dict.fromkeys(MESH_AXES, 1) | rule.mesh | dict(pipe=asked.pipe)
        mesh = dataclasses.replace(asked, **sizes)
    return dataclasses.replace(cfg, mesh=mesh)


def resolve_here(cfg: RunConfig, num_devices: int | None = None) -> RunConfig:
    """`resolve_mesh` for the devices of this process, or for so many of their kind."""
    if not cfg.mesh.auto:
        return cfg
    devices = jax.devices()
    slices = len({getattr(device, "slice_index", None) for device in devices})
    return resolve_mesh(cfg, devices[0].device_kind, num_devices or len(devices), slices)


def describe_mesh(mesh: MeshConfig) -> str:
    """`fsdp=32 tensor=2`: the axes that split something, and storage where a rule of the config says it."""
    parts = [f"{name}={getattr(mesh, name)}" for name in MESH_AXES if getattr(mesh, name) != 1]
    parts += [f"({axis} over {axes or 'none'})" for axis, axes in mesh.rules if axis == "embed"]
    return " ".join(parts) or "one device"


def mesh_overrides(mesh: MeshConfig) -> dict[str, Any]:
    """Config fields that make this mesh: its sizes, and its rules if it has any."""
    sizes = {f"mesh.{name}": getattr(mesh, name) for name in (*MESH_AXES, "slices")}
    return sizes | ({"mesh.rules": mesh.rules} if mesh.rules else {})
