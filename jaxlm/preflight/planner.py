"""What a layout will cost, without compiling it: memory, traffic and time in closed form, and the best mesh.

Memory is `scaling.counting.memory`. Traffic of one device and step, with w the bytes of its share of the
parameters in the compute dtype before `fsdp` splits them, M microbatches, x = tokens of the device x D x
bytes of an activation, L layers, n the size of the axis:

    fsdp      (n - 1) / n of 2 M w gathered (forward, backward) and of M w in fp32 scattered
    data      2 (n - 1) / n of the gradients' shard, fp32
    tensor    2 (n - 1) / n of 4 L x (6 L x where blocks are rematerialised)
    sequence  (n - 1) of 6 L x (K / N): keys and values of the others, forward, again, and their gradients
    expert    (n - 1) / n of 4 k x for each layer of experts (6 where blocks are rematerialised)
    pipe      2 x

The time of an axis is its bytes over its links: an axis of n of N chips is taken to lie along
ceil(dims log n / log N) dimensions of the torus, two links in each. An estimate to choose with; the compiler
has the last word.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from jaxlm.chips import Chip
from jaxlm.config import RunConfig
from jaxlm.errors import UserError
from jaxlm.scaling.counting import Memory
from jaxlm.sharding import MESH_AXES, MeshConfig
from jaxlm.train.run import plan

HEADROOM = 0.9  # share of the memory that the estimate may fill


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one configuration on one chip; bytes and seconds of one device and step."""

    memory: Memory
    limit: float  # bytes that a program can have
    compute: float  # seconds, hardware FLOPs at the peak
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
    traffic = axis_traffic(cfg, need.mesh_shape, need.memory.params)
    chips = num_devices / slices / chip.devices
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
    share = need.tokens_per_step / num_devices
    return Estimate(
        memory=need.memory,
        limit=chip.limit,
        compute=need.counts.flops_hardware * share / (chip.peak / chip.devices),
        links=seconds,
        dcn=between,
        traffic=traffic,
    )


def axis_traffic(cfg: RunConfig, mesh: dict[str, int], params: int) -> dict[str, float]:
    """Bytes that one device sends along each mesh axis in a step; see the module's text.

    Args:
        cfg: the run.
        mesh: resolved sizes.
        params: bytes of the parameters on one device.
    """
    model, M = cfg.model, cfg.train.microbatches
    width, stored = np.dtype(model.dtype).itemsize, np.dtype(model.param_dtype).itemsize
    shard = params / stored  # elements
    rows = cfg.data.batch_size / (mesh["data"] * mesh["fsdp"] * mesh["expert"])
    x = rows * cfg.data.seq_len / mesh["sequence"] * model.model_dim * width
    layers = model.num_layers / mesh["pipe"]
    passes = 6 if model.remat == "full" else 4

    def part(axis: str) -> float:
        return (mesh[axis] - 1) / mesh[axis]

    heads = model.attention.kv_heads / model.attention.num_heads
    moe = model.num_moe_layers / mesh["pipe"] * model.moe.top_k if model.num_moe_layers else 0
    return {
        "fsdp": part("fsdp") * mesh["fsdp"] * shard * M * (2 * width + 4),
        "data": 2 * part("data") * shard * 4,
        "tensor": 2 * part("tensor") * passes * layers * x,
        "sequence": (mesh["sequence"] - 1) * 6 * layers * x * heads / mesh["tensor"],
        "expert": part("expert") * passes * moe * x,
        "pipe": 2 * x if mesh["pipe"] > 1 else 0.0,
    }


def meshes(cfg: RunConfig, num_devices: int, slices: int = 1) -> Iterator[MeshConfig]:
    """Layouts worth asking about, with the rules of `cfg.mesh`; many of them will not divide the model.

    `data` is as large as the slices; `fsdp` takes what tensor (up to 16), expert and sequence leave. More
    `data` in place of `fsdp` saves gathers where the state fits, so a few of those follow.
    """
    tensors = [n for n in (1, 2, 4, 8, 16) if cfg.model.attention.num_heads % n == 0]
    experts = _divisors(cfg.model.moe.num_experts) if cfg.model.num_moe_layers else [1]
    sequences = [1, 2, 4, 8, 16, 32, 64]
    for tensor in tensors:
        for expert in experts:
            for sequence in sequences:
                used = slices * tensor * expert * sequence
                if num_devices % used:
                    continue
                rest = num_devices // used
                # Columns are split only when there are not rows enough.
                if sequence > 1 and cfg.data.batch_size >= slices * rest * expert * sequence:
                    continue
                for more in (1, 4, rest):
                    if rest % more == 0 and (more == 1 or more < rest or more == rest > 4):
                        yield dataclasses.replace(
                            cfg.mesh,
                            data=slices * more,
                            fsdp=rest // more,
                            tensor=tensor,
                            expert=expert,
                            sequence=sequence,
                            pipe=1,
                            slices=slices,
                        )


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


def choose_mesh(cfg: RunConfig, chip: Chip, num_devices: int, slices: int = 1) -> MeshConfig:
    """The mesh that the estimate finds fastest for a run, of those that fit.

    Raises:
        UserError: none of them does.
    """
    tried = (dataclasses.replace(cfg, mesh=mesh) for mesh in meshes(cfg, num_devices, slices))
    found = ranked(tried, chip, num_devices, slices)
    if not found:
        raise UserError(
            f"no mesh of {num_devices} devices divides this model and its {cfg.data.batch_size} rows "
            f"and leaves it within {HEADROOM:.0%} of {chip.limit / 2**30:.1f} GiB: take more chips, "
            f"model.remat='full', or more train.microbatches"
        )
    return found[0][0].mesh


def describe_mesh(mesh: MeshConfig) -> str:
    """`fsdp=32 tensor=2`: the axes that split something."""
    sizes = [f"{name}={getattr(mesh, name)}" for name in MESH_AXES if getattr(mesh, name) != 1]
    return " ".join(sizes) or "one device"
