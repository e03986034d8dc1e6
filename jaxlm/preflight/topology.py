"""Hardware that need not be there: its devices, where they stand, and a mesh of them.

libtpu compiles for any TPU topology without a TPU. It is an extra, loaded here and nowhere else, and told
first not to look for a metadata server and not to lock itself (two preflights may run at once). The CUDA
plugin, another extra, does the same for GPUs that are described to it (`gpu.py`).
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from jaxtyping import Int

from jaxlm.chips import CHIPS, Chip
from jaxlm.config import RunConfig
from jaxlm.errors import UserError, check, nearest
from jaxlm.preflight import gpu
from jaxlm.sharding import MeshConfig, make_mesh

TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
GPUS = tuple(gpu.KINDS)
GPUS_OF_HOST = 8
PODS = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256, "tpu7x": 9216}  # chips of a pod: no slice has more
EMULATED = 4096  # CPU devices at most: each has a thread
_ALIASES = {"v7x": "tpu7x"}
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """What a preflight compiles for."""

    name: str  # as the user wrote it, 'v5p:8x8x8'
    platform: str  # tpu | gpu | cpu
    chip: Chip | None  # None on a CPU
    shape: tuple[int, ...]  # chips of a slice in each dimension; of GPUs, those of a host
    slices: int

    @property
    def num_chips(self) -> int:
        """Over all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def num_devices(self) -> int:
        """JAX devices over all slices."""
        return self.num_chips * (self.chip.devices if self.chip else 1)

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """`v5p:8x8x8`, `v6e:16x16`, `tpu7x:4x4x4`, `h100:8`, or `cpu:8` for emulated devices.

    >>> parse_topology("v5e:16x16", slices=2).num_devices
    512

    Raises:
        UserError: a name or a shape that is not one.
    """
    kind, _, dims = text.lower().partition(":")
    kind = _ALIASES.get(kind, kind)
    names = (*TPUS, *GPUS, "cpu")
    check(
        kind in names, f"--topology={text}: {kind!r} is not one of {', '.join(names)}{nearest(kind, names)}"
    )
    check(slices >= 1, f"--slices={slices} must be at least 1")
    chip = None if kind == "cpu" else CHIPS[{"tpu7x": "v7x"}.get(kind, kind)]
    rank = chip.network.dims if chip else 1
    example = {1: f"{kind}:8", 2: f"{kind}:8x8", 3: f"{kind}:4x4x4"}[rank]
    check(
        re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", dims) is not None and dims.count("x") + 1 == rank,
        f"--topology={text}: {kind} is wired in {rank} dimension{'s' * (rank > 1)}, write it like {example}"
        + " (hosts are --slices)" * (kind in GPUS),
    )
    shape = tuple(int(n) for n in dims.split("x"))
    count = math.prod(shape)
    if chip is None:
        check(count <= EMULATED, f"--topology={text}: at most {EMULATED} devices are emulated")
        near = max(n for n in range(1, min(slices, count) + 1) if count % n == 0)
        check(
            count % slices == 0, f"--slices={slices} does not divide --topology={text}; --slices={near} does"
        )
        return Topology(f"{kind}:{dims}", "cpu", None, (count // slices,), slices)
    if kind in GPUS:
        most = GPUS_OF_HOST
        check(count <= most, f"--topology={text}: a host has {most} GPUs at most, write {kind}:{most}")
        return Topology(f"{kind}:{dims}", "gpu", chip, shape, slices)
    check(
        count <= PODS[kind],
        f"--topology={text} has {count:,} chips, a slice of {kind} {PODS[kind]:,} at most; join several by "
        "--slices",
    )
    even = tuple(n + (n > 1 and n % 2) for n in shape[:2]) + shape[2:]
    check(
        shape == even,
        f"--topology={text}: a host has 2 x 2 chips, so the first two dimensions are 1 or even; the nearest: "
        f"{kind}:{'x'.join(map(str, even))}",
    )
    return Topology(f"{kind}:{dims}", "tpu", chip, shape, slices)


def likely_topology(chip: str, count: int) -> Topology | None:
    """The slice of so many chips whose shape is nearest to a cube; None if none can be compiled for.

    >>> likely_topology("v5p", 128).name, likely_topology("v5p", 4).name, likely_topology("v5e", 8).name
    ('v5p:4x4x8', 'v5p:2x2x1', 'v5e:2x4')
    >>> likely_topology("v5e", 9), likely_topology("h100", 16)  # odd; several hosts of GPUs
    (None, None)
    """
    kind = next((name for name in (*TPUS, *GPUS) if {"tpu7x": "v7x"}.get(name, name) == chip), "")
    if not kind or count > PODS.get(kind, GPUS_OF_HOST):
        return None
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    shapes = itertools.combinations_with_replacement(divisors, CHIPS[chip].network.dims)
    for shape in sorted((shape for shape in shapes if math.prod(shape) == count), key=sum):
        with contextlib.suppress(UserError):
            return parse_topology(f"{kind}:" + "x".join(map(str, sorted(shape, key=lambda n: (n == 1, n)))))
    return None


def has_compiler(topology: Topology) -> bool:
    """Whether what compiles for these TPUs or GPUs is installed."""
    return importlib.util.find_spec(_COMPILERS[topology.platform][0]) is not None


def versions(topology: Topology) -> dict[str, str]:
    """Versions of what compiles."""
    out = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    if topology.platform != "cpu":
        _, package, _ = _need_compiler(topology)
        out[package] = importlib.metadata.version(package)
    return out


# Platform -> (module, its package, the extra that brings it).
_COMPILERS = {
    "tpu": ("libtpu", "libtpu", "preflight"),
    "gpu": ("jax_cuda12_plugin", "jax-cuda12-plugin", "cuda"),
}


def _need_compiler(topology: Topology) -> tuple[str, str, str]:
    """What compiles for the topology; refused if it is not installed."""
    module, package, extra = _COMPILERS[topology.platform]
    if not has_compiler(topology):
        raise UserError(
            f"--topology={topology.name} needs the {topology.platform.upper()} compiler, which runs without "
            f"one: pip install 'jaxlm[{extra}]'"
        )
    return module, package, extra


def devices(topology: Topology) -> list[Any]:
    """The JAX devices of a topology, slice by slice.

    Raises:
        UserError: no compiler, a shape that it does not know, too few emulated devices.
    """
    if topology.platform == "cpu":
        if jax.config.jax_num_cpu_devices < topology.num_devices:
            with contextlib.suppress(RuntimeError):  # the backend runs already, with devices of its own
                jax.config.update("jax_num_cpu_devices", topology.num_devices)
        found = jax.devices("cpu")
        check(
            len(found) >= topology.num_devices,
            f"--topology={topology.name}: this process has {len(found)} CPU devices already",
        )
        return list(found[: topology.num_devices])
    _need_compiler(topology)
    options: dict[str, Any] = {"platform": "tpu", "topology_name": topology.name}
    if topology.platform == "gpu":
        check(
            topology.slices == 1,
            f"--slices={topology.slices}: the CUDA plugin numbers the GPUs of several hosts as those of one; "
            "take --slices=1",
        )
        name, count = topology.name.partition(":")[0], topology.shape[0]
        options = {"platform": "cuda", "topology": f"{topology.slices}x1x{count}"}
        options |= {"target_config": gpu.target_config(name)}
    else:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        options |= {"chip_config_name": "megacore"} if topology.name.startswith("v4") else {}
        options |= {"num_slices": topology.slices} if topology.slices > 1 else {}
        if 1 in topology.shape[:2]:  # less than a host's 2 x 2 chips
            options |= {"chips_per_host_bounds": [*(min(n, 2) for n in topology.shape[:2]), 1]}
    try:
        with captured_stderr():
            made = topologies.get_topology_desc(**options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology={topology}: the compiler refuses it ({str(error).splitlines()[0]})"
        ) from None
    return list(made.devices)


@dataclasses.dataclass
class Log:
    """What a block of code wrote to the process's stderr."""

    text: str = ""


@contextlib.contextmanager
def captured_stderr() -> Iterator[Log]:
    """Keep what compilers write to the process's stderr: libtpu's noise, and XLA's warnings, to be read."""
    log = Log()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield log
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            log.text = file.read().decode(errors="replace")


def on_slices(cfg: RunConfig, topology: Topology) -> RunConfig:
    """The run with the mesh that spans the topology's slices.

    Raises:
        UserError: the config has another number of them.
    """
    check(
        cfg.mesh.slices in (1, topology.slices),
        f"mesh.slices={cfg.mesh.slices}, but --slices={topology.slices}: make them equal",
    )
    return dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, slices=topology.slices))


def make_topology_mesh(cfg: MeshConfig, topology: Topology, found: Sequence[Any]) -> Mesh:
    """The mesh that training makes on that hardware: neighbours in it are neighbours on the torus.

    Raises:
        UserError: the mesh does not use all devices, or not so many slices.
    """
    used, n = math.prod(cfg.shape(len(found))), len(found)
    check(used == n, f"mesh of {used} devices on --topology={topology} of {n}: set one axis to -1")
    return make_mesh(cfg, found)


def positions(
    topology: Topology, mesh: Mesh
) -> tuple[Int[np.ndarray, " devices"], Int[np.ndarray, "devices dims"]]:
    """`(slice, coordinates)` of every place of the flattened mesh."""
    flat = list(mesh.devices.flat)
    if topology.platform != "tpu":
        order = {device: i for i, device in enumerate(sorted(flat, key=lambda d: d.id))}
        place = np.asarray([order[device] for device in flat])
        return place // topology.shape[0], (place % topology.shape[0])[:, None]
    slices = np.asarray([getattr(device, "slice_index", None) or 0 for device in flat])
    return slices, np.asarray([device.coords[: len(topology.shape)] for device in flat])


def outgoing_links(
    topology: Topology, coordinates: Int[np.ndarray, "devices dims"], members: Int[np.ndarray, " members"]
) -> int:
    """Links over which a chip sends to these places: 2 for each dimension that is a ring, 1 for a line.

    An upper bound: it takes all dimensions in which members differ for usable at once.
    """
    if topology.chip is None or topology.chip.network.dims == 1:
        return 1
    wrap, links = topology.chip.network.wrap, 0
    for dim, length in enumerate(topology.shape):
        extent = len(set(coordinates[members, dim].tolist()))
        if extent > 1:
            links += 2 if extent == length and length % wrap == 0 else 1
    return max(links, 1)  # members may share a chip
