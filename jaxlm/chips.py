"""Accelerators: what a chip computes, holds and sends. The one table of hardware numbers.

Peaks of devices by their JAX kind (for MFU), and chips by the names that people use (for plans and
preflights). All from the vendors' data sheets except `usable`: that is what the TPU compiler (libtpu 0.0.42)
says is there when a program needs more.
"""

import dataclasses

from jaxlm.errors import UserError, nearest

# Dense bf16 FLOP/s of one JAX device, from the vendors' data sheets; the first name that the device kind
# starts with counts. A TPU v2, v3 and 7x chip is two JAX devices. V100 and T4 have no bf16: fp16.
PEAKS: tuple[tuple[str, float], ...] = (
    ("TPU v2", 23e12),
    ("TPU v3", 61.5e12),
    ("TPU v4 lite", 138e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 1153.5e12),
    ("TPU v7x", 1153.5e12),
    ("NVIDIA GB300", 2500e12),
    ("NVIDIA B300", 2250e12),
    ("NVIDIA GB200", 2500e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA H200", 989.4e12),
    ("NVIDIA GH200", 989.4e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989.4e12),
    ("NVIDIA H800", 989.4e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA A800", 312e12),
    ("NVIDIA A40", 149.7e12),
    ("NVIDIA A10G", 70e12),
    ("NVIDIA A10", 125e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA L40", 181e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA RTX 6000 Ada", 364e12),
    ("NVIDIA GeForce RTX 4090", 165.2e12),
    ("NVIDIA GeForce RTX 3090", 71e12),
    ("Tesla V100", 125e12),
    ("Tesla T4", 65e12),
    ("AMD Instinct MI300X", 1307e12),
    ("AMD Instinct MI325X", 1307e12),
    ("AMD Instinct MI250", 191.5e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one JAX device of this kind; None if the table does not know it (and on a CPU).

    >>> peak_flops("TPU v5 lite") / 1e12, peak_flops("NVIDIA H100 80GB HBM3") / 1e12, peak_flops("cpu")
    (197.0, 989.4, None)
    """
    for name, peak in PEAKS:
        if device_kind.lower().startswith(name.lower()):
            return peak
    return None


@dataclasses.dataclass(frozen=True)
class Network:
    """How chips are joined: a torus of links inside a slice (GPU: a switch in a host), a network beyond."""

    dims: int  # of the torus; 1 = a switch, every chip has one port
    link: float  # bytes/s of one link in one direction; a chip has two links in each dimension of a torus
    wrap: int  # a dimension closes into a ring if its length is a multiple of this; 1 = always
    beyond: float  # bytes/s that one chip sends to chips of other slices


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip of an accelerator; the peak FLOP/s of its devices stand in `PEAKS`."""

    kind: str  # JAX device kind
    devices: int  # JAX devices of a chip
    memory: float  # bytes of HBM of a chip
    bandwidth: float  # bytes/s of it
    mfu: float = 0.4  # share of the peak that training is assumed to reach; large dense models do
    usable: float = 0.0  # bytes of HBM that a program can have, of a chip; 0 = all of it
    int8: float = 0.0  # dense int8 (fp8 where there is no int8) operations/s of a chip; 0 = not stated
    clock: float = 0.0  # cycles/s of a TPU core, nominal: to read the compiler's estimates; 0 = not known
    network: Network | None = None  # None = not stated

    @property
    def peak(self) -> float:
        """Dense bf16 FLOP/s of the chip; a TPU multiplies fp32 as fast by default, rounded to bf16."""
        peak = peak_flops(self.kind)
        assert peak is not None, f"PEAKS does not know {self.kind!r}"
        return peak * self.devices

    @property
    def limit(self) -> float:
        """Bytes of HBM that a program can have on one JAX device."""
        return (self.usable or self.memory) / self.devices


_GiB = 2.0**30

# TPU: "bidirectional ICI bandwidth per chip" over 4 (2D) or 6 (3D) links and two directions, and "DCN
# bandwidth per chip", both from the pages of Cloud TPU (v4: 50 GB/s a link, arXiv:2304.01433). A 2D torus
# closes at 16, a 3D one at multiples of 4. GPU: NVLink inside a host, in one direction, and beyond it one
# 400 Gb/s adapter a GPU (A100: 200 Gb/s), as in the vendor's reference systems.
_V4, _V5P = Network(3, 50e9, 4, 6.25e9), Network(3, 100e9, 4, 6.25e9)
_V5E, _V6E = Network(2, 50e9, 16, 6.25e9), Network(2, 100e9, 16, 12.5e9)
_V7X = Network(3, 100e9, 4, 12.5e9)
_A100, _H100, _B200 = Network(1, 300e9, 1, 25e9), Network(1, 450e9, 1, 50e9), Network(1, 900e9, 1, 50e9)

CHIPS: dict[str, Chip] = {
    "v2": Chip("TPU v2", 2, 16e9, 0.70e12, usable=2 * 7.48 * _GiB),
    "v3": Chip("TPU v3", 2, 32e9, 0.90e12, usable=2 * 15.48 * _GiB),
    "v4": Chip("TPU v4", 1, 32e9, 1.20e12, usable=30.75 * _GiB, int8=275e12, clock=1.05e9, network=_V4),
    "v5e": Chip(
        "TPU v5 lite", 1, 16e9, 0.819e12, usable=15.75 * _GiB, int8=394e12, clock=1.5e9, network=_V5E
    ),
    "v5p": Chip("TPU v5", 1, 95e9, 2.765e12, usable=95.74 * _GiB, int8=918e12, clock=1.75e9, network=_V5P),
    "v6e": Chip("TPU v6 lite", 1, 32e9, 1.64e12, usable=31.25 * _GiB, int8=1836e12, network=_V6E),
    "v7x": Chip("TPU7x", 2, 192e9, 7.38e12, usable=2 * 94.75 * _GiB, int8=4614e12, network=_V7X),
    "v100": Chip("Tesla V100", 1, 16e9, 0.90e12, mfu=0.3),
    "a100-40": Chip("NVIDIA A100", 1, 40e9, 1.555e12, int8=624e12, network=_A100),
    "a100-80": Chip("NVIDIA A100", 1, 80e9, 2.039e12, int8=624e12, network=_A100),
    "l4": Chip("NVIDIA L4", 1, 24e9, 0.30e12, mfu=0.3),
    "h100": Chip("NVIDIA H100", 1, 80e9, 3.35e12, int8=1979e12, network=_H100),
    "h200": Chip("NVIDIA H200", 1, 141e9, 4.8e12, int8=1979e12, network=_H100),
    "b200": Chip("NVIDIA B200", 1, 180e9, 8.0e12, int8=4500e12, network=_B200),
    "mi300x": Chip("AMD Instinct MI300X", 1, 192e9, 5.3e12, mfu=0.3),
    "4090": Chip("NVIDIA GeForce RTX 4090", 1, 24e9, 1.008e12, mfu=0.3),
}


def find_chip(name: str) -> Chip:
    """The chip of that name.

    Raises:
        UserError: there is none; the message lists them.
    """
    if name not in CHIPS:
        raise UserError(f"--chip={name} is not one of {', '.join(CHIPS)}{nearest(name, CHIPS)}")
    return CHIPS[name]


def chip_of_kind(device_kind: str) -> Chip | None:
    """The chip whose devices JAX calls so, of several the one with least memory; None if there is none.

    >>> chip_of_kind("TPU v5 lite").memory, chip_of_kind("NVIDIA A100-SXM4-80GB").memory, chip_of_kind("cpu")
    (16000000000.0, 40000000000.0, None)
    """
    found = [chip for chip in CHIPS.values() if device_kind.lower().startswith(chip.kind.lower())]
    return max(found, key=lambda chip: (len(chip.kind), -chip.memory), default=None)
