"""How fast a step can be at most: what it computes, moves and sends, over the chip's peaks.

    compute   hardware FLOPs (masked scores and rematerialisation included) / bf16 peak
    HBM       state read and written once, gradients and kept activations written and read, gathered weights
              written and read / bandwidth: a lower bound, what fusions re-read is not in it
    ICI       bytes on the links / (links that the group can use x bandwidth of one), summed over collectives
    DCN       bytes to other slices / bandwidth beyond the slice

If everything overlaps, the step takes the longest of the four: its MFU is an upper bound, no measurement. If
nothing overlaps it takes compute (or HBM, if longer) + ICI + DCN; expect the truth between them or above.
"""

import dataclasses
from collections.abc import Mapping

from jaxlm.chips import Chip
from jaxlm.preflight.compiled import Row


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step."""

    compute: float
    hbm: float
    ici: float
    dcn: float
    model_compute: float  # exact training FLOPs alone at the peak: what MFU counts

    @property
    def bound(self) -> float:
        """Step time if all four overlap."""
        return max(self.compute, self.hbm, self.ici, self.dcn)

    @property
    def serial(self) -> float:
        """Step time if communication overlaps with nothing."""
        return max(self.compute, self.hbm) + self.ici + self.dcn

    @property
    def limited_by(self) -> str:
        """The longest of the four."""
        return max(("compute", "hbm", "ici", "dcn"), key=lambda name: getattr(self, name))

    @property
    def mfu(self) -> float:
        """Upper bound of MFU."""
        return self.model_compute / self.bound

    @property
    def mfu_serial(self) -> float:
        """MFU if communication overlaps with nothing."""
        return self.model_compute / self.serial

    def to_dict(self) -> dict[str, float | str]:
        """Plain values."""
        names = ("bound", "serial", "limited_by", "mfu", "mfu_serial")
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in names}}


def ici_seconds(row: Row, chip: Chip) -> float:
    """Seconds that a row's transfers inside a slice take; the devices of a chip share its links."""
    return row.ici * chip.devices / (row.links * chip.network.link)


def dcn_seconds(row: Row, chip: Chip) -> float:
    """Seconds that a row's transfers between slices take."""
    return row.dcn * chip.devices / chip.network.beyond


def roofline(
    chip: Chip,
    rows: list[Row] | tuple[Row, ...],
    *,
    hardware_flops: float,
    model_flops: float,
    state: Mapping[str, int],
    activations: float,
) -> Roofline:
    """The four terms for one device.

    Args:
        chip: with a network.
        rows: collectives of a step.
        hardware_flops, model_flops: of a step on one device.
        state: bytes on one device, as in `Facts.state`.
        activations: bytes kept for the backward pass on one device.
    """
    peak, bandwidth = chip.peak / chip.devices, chip.bandwidth / chip.devices
    gathered = sum(row.nbytes * row.count for row in rows if row.kind == "all-gather")
    moved = state["params"] + state["opt_state"] + state["gradients"] + activations + gathered
    return Roofline(
        compute=hardware_flops / peak,
        hbm=2 * moved / bandwidth,
        ici=sum(ici_seconds(row, chip) for row in rows),
        dcn=sum(dcn_seconds(row, chip) for row in rows),
        model_compute=model_flops / peak,
    )
