"""Presets by hardware: what to run a model with on so many devices of a kind.

A table and no search: the first rule whose pattern matches "KIND x COUNT" says the mesh, the remat policy,
the compute dtype, the attention backend and the compiler options that are a sound start there. Accelerators
get their kernels, which multiply in bfloat16; a model that asks a kernel for more than it can do is refused
by name (`jaxlm.model.backends`), and 'blocked' is the backend that can. `jaxlm config --preset` applies
one and prints it as overrides.
"""

import dataclasses
import re
from typing import Any

from jaxlm.errors import UserError

# Products stay whole: cut into loops that hide a collective piece by piece, they took longer by estimate.
_TPU: dict[str, Any] = {
    "backend": "splash",
    "compiler_options": (("xla_jf_spmd_threshold_for_windowed_einsum_mib", "1000000"),),
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """What a rule says, by room of the config."""

    pattern: str  # regex over the whole of "KIND x COUNT"
    mesh: dict[str, int]  # sizes of axes, those left out 1; -1 takes all devices that the others leave
    slice_devices: int = 0  # devices that fast links join, more are several slices; 0 = all are joined
    remat: str = "full"
    backend: str = "blocked"
    dtype: str = "bfloat16"
    compiler_options: tuple[tuple[str, str], ...] = ()

    def overrides(self, count: int) -> dict[str, Any]:
        """Config field -> value, on `count` devices.

        >>> Preset("", {"data": -1, "fsdp": 256}, slice_devices=256).overrides(512)["mesh.slices"]
        2
        """
        sizes = {"data": 1, "fsdp": 1, "tensor": 1} | self.mesh
        return {
            **{f"mesh.{name}": size for name, size in sizes.items()},
            "mesh.slices": max(1, count // self.slice_devices) if self.slice_devices else 1,
            "mesh.compiler_options": self.compiler_options,
            "model.remat": self.remat,
            "model.attention.backend": self.backend,
            "model.dtype": self.dtype,
        }


_UP_TO_512 = r"(\d{1,2}|[1-4]\d\d|50\d|51[0-2])"
MESH_RULES: tuple[Preset, ...] = (
    Preset(r"cpu x \d+", {"data": -1}, remat="none", dtype="float32"),
    # Up to 512 chips, each has rows of its own; of more, eight share rows and split heads and MLP.
    Preset(rf"TPU ?(v4|v5|7x) x {_UP_TO_512}", {"fsdp": -1}, **_TPU),
    Preset(r"TPU ?(v4|v5|7x) x \d+", {"fsdp": -1, "tensor": 8}, **_TPU),
    # The largest torus of these is 16 x 16.
    Preset(r"TPU v[56] lite x (\d{1,2}|1\d\d|2[0-4]\d|25[0-6])", {"fsdp": -1}, **_TPU),
    Preset(r"TPU v[56] lite x \d+", {"data": -1, "fsdp": 256}, slice_devices=256, **_TPU),
    # Eight share NVLink.
    Preset(r"NVIDIA (H100|H200|A100).* x [1-8]", {"fsdp": -1}, backend="cudnn"),
    Preset(r"NVIDIA (H100|H200|A100).* x \d+", {"data": -1, "fsdp": 8}, backend="cudnn"),
)


def preset(hardware: str, rules: tuple[Preset, ...] = MESH_RULES) -> tuple[Preset, int]:
    """The first rule for this hardware, and the number of devices.

    Args:
        hardware: "KIND x COUNT", the kind as in `jax.Device.device_kind`.
        rules: the table.

    >>> preset("TPU v5 x 4096")[0].mesh
    {'fsdp': -1, 'tensor': 8}

    Raises:
        UserError: no rule matches.
    """
    for rule in rules:
        if re.fullmatch(rule.pattern, hardware):
            return rule, int(hardware.rpartition(" ")[2])
    patterns = "; ".join(rule.pattern for rule in rules)
    raise UserError(f"no mesh rule matches {hardware!r} ('KIND x COUNT'); there are: {patterns}")
