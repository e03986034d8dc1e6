"""Counts as tables for people."""

from rich.table import Table

from jaxlm.scaling.counting import Counts
from jaxlm.scaling.memory import Memory


def tables(counts: Counts, estimate: Memory | None = None) -> list[Table]:
    """Rich tables of parameters per room, FLOPs per token under every convention, and memory per device."""
    params = Table(title="parameters", title_justify="left")
    params.add_column("part")
    params.add_column("count", justify="right")
    params.add_column("share", justify="right")
    for room, size in counts.rooms.items():
        params.add_row(room, f"{size:,}", f"{size / counts.n_total:.1%}")
    params.add_section()
    for name in ("n_total", "n_embedding", "n_head", "n_non_embedding", "n_active"):
        size = getattr(counts, name)
        params.add_row(name, f"{size:,}", f"{size / counts.n_total:.1%}")

    flops = Table(title=f"FLOPs per token, T = {counts.seq_len}", title_justify="left")
    flops.add_column("convention")
    flops.add_column("training", justify="right")
    flops.add_column("of exact", justify="right")
    rows = {
        "exact (use this)": counts.flops_train,
        "  of which attention scores": counts.flops_attention,
        "  of which head": counts.flops_head,
        "executed (masked scores, remat)": counts.flops_hardware,
        **counts.conventions,
    }
    for name, value in rows.items():
        flops.add_row(name, f"{value:,.0f}", f"{value / counts.flops_train:.2f}")
    if estimate is None:
        return [params, flops]

    memory_table = Table(title="memory per device, estimated", title_justify="left")
    memory_table.add_column("what")
    memory_table.add_column("MiB", justify="right")
    for name, size in estimate.to_dict().items():
        memory_table.add_row(name, f"{size / 2**20:,.1f}")
    return [params, flops, memory_table]
