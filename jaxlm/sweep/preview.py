"""The table of a plan, and `plan_command` behind `jaxlm plan`."""

from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxlm.chips import CHIPS, find_chip
from jaxlm.config import build
from jaxlm.errors import check
from jaxlm.preflight.topology import likely_topology
from jaxlm.sweep import chips
from jaxlm.sweep.plan import Hardware, Plan, SweepConfig, make_plan
from jaxlm.sweep.plan_file import FILE, save_plan
from jaxlm.sweep.shapes import describe_shape
from jaxlm.train.metrics import format_seconds


def plan_table(plan: Plan) -> Table:
    """One row per run."""
    table = Table(title=f"plan {plan.name!r}: {len(plan.cells)} runs", title_justify="left")
    left = {"run", "role", "shape", "!"}
    names = ["run", "role", "budget", "shape", "N", "N non-emb", "N emb", "N head", "batch", "lr", "D"]
    names += ["steps", "FLOPs", "dev", "6ND", "D/N", "epochs", "MiB", "time", "!"]
    active = any(cell.counts["n_active"] != cell.counts["n_total"] for cell in plan.cells)
    if active:
        names.insert(5, "N active")
    for name in names:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    texts = _footnotes(plan)
    for cell in plan.cells:
        n, data, budget = cell.counts, cell.config.data, cell.budget
        row = {
            "run": cell.id,
            "role": cell.role,
            "budget": f"{budget:.3g}" if budget else "-",
            "shape": describe_shape(cell.config.model),
            "N": f"{n['n_total']:,}",
            "N active": f"{n['n_active']:,}",
            "N non-emb": f"{n['n_non_embedding']:,}",
            "N emb": f"{n['n_embedding']:,}",
            "N head": f"{n['n_head']:,}",
            "batch": f"{data.batch_size}x{data.seq_len}",
            "lr": f"{cell.config.optim.lr:.3g}",
            "D": f"{cell.tokens:,}",
            "steps": f"{cell.steps:,}",
            "FLOPs": f"{cell.flops:.4g}",
            "dev": f"{cell.flops / budget - 1:+.2%}" if budget else "-",
            "6ND": f"{6 * n['n_total'] * cell.tokens / cell.flops:.2f}",
            "D/N": f"{cell.tokens / n['n_total']:.3g}",
            "epochs": f"{cell.epochs:.2f}",
            "MiB": f"{cell.memory_bytes / 2**20:,.0f}",
            "time": format_seconds(cell.seconds) if cell.seconds else "?",
            "!": ",".join(str(texts[text]) for text in cell.warnings),
        }
        table.add_row(*(row[name] for name in names))
    return table


def _footnotes(plan: Plan) -> dict[str, int]:
    """Number of every different warning, from 1."""
    return {text: i for i, text in enumerate(dict.fromkeys(t for c in plan.cells for t in c.warnings), 1)}


def plan_totals(plan: Plan, hardware: Hardware) -> list[str]:
    """What the whole plan costs, and what stands behind the estimate."""
    flops = sum(cell.own_flops for cell in plan.cells)
    seconds = sum(cell.seconds for cell in plan.cells)
    longest = max((cell.seconds for cell in plan.cells), default=0.0)
    lines = [f"{len(plan.cells)} runs, {flops:.4g} training FLOPs"]
    if hardware.gflops:
        basis = f"{hardware.gflops:g} GFLOP/s as given"
    elif hardware.chip:
        share = hardware.mfu or hardware.chip.mfu
        basis = (
            f"{hardware.count} x {hardware.chip.kind} a run, {share:.0%} of {hardware.chip.peak / 1e12:g} "
            f"TFLOP/s{'' if hardware.mfu else ' assumed'}, no compilation or evaluation"
        )
    else:
        basis = f"measured on {jax.devices()[0].device_kind}, one run at a time"
    if any(cell.parent for cell in plan.cells):
        lines[0] += ", branches from where they leave their trunk"
    if not seconds:
        why = "the steps are too large to be timed here" if hardware.measure else "this machine is not timed"
        return [*lines, f"no estimate of the time: {why}; give --chip or --gflops"]
    hours = seconds * hardware.count / 3600
    lines.append(
        f"{format_seconds(seconds)} one after another, the longest {format_seconds(longest)}; "
        f"{hours:.3g} chip-hours ({basis})"
    )
    if hardware.price:
        lines.append(f"{hours * hardware.price:,.2f} at {hardware.price:g} a chip-hour")
    return lines


def plan_command(
    config: Any,
    workdir: str | Path,
    *,
    name: str = "grid",
    dry_run: bool = False,
    chip: str = "",
    num_chips: int = 1,
    mfu: float = 0.0,
    gflops: float = 0.0,
    price: float = 0.0,
    measure: bool = True,
    preflight: bool = False,
) -> int:
    """What `jaxlm plan` does: make a plan, print it, and keep it unless `dry_run`.

    Args:
        config: ConfigDict of a `SweepConfig`.
        workdir: the sweep directory.
        name: of the plan; a sweep directory may hold several.
        dry_run: print the same and write nothing into the sweep directory.
        chip, num_chips, mfu, gflops, price, measure, preflight: see `Hardware`; the chips are taken to stand
            in the shape that is nearest to a cube.

    Returns:
        The exit code.
    """
    check(
        "grid" in config,
        "--config is that of one run; a sweep's get_config returns `run` and `grid`, as "
        "experiments/scaling/smoke.py does",
    )
    chips.check_rate(gflops, mfu, price, num_chips)
    check(not mfu or (chip and not gflops), f"--mfu={mfu:g} is read with --chip, and not with --gflops")
    found = find_chip(chip) if chip else None
    topology = likely_topology(chip, num_chips) if chip else None
    if preflight:
        names = ", ".join(name for name in CHIPS if likely_topology(name, 4))
        check(
            topology is not None,
            f"--preflight compiles for a slice (of GPUs: a host) of {names}: --chip={chip} "
            f"--num_chips={num_chips} makes none",
        )
        jax.config.update("jax_platforms", "cpu")  # this machine only compiles
    hardware = Hardware(found, num_chips, mfu, gflops, price, measure, topology, preflight)
    plan = make_plan(build(config, SweepConfig), workdir, name, hardware=hardware, dry_run=dry_run)
    # Saved first: a refusal stands alone, not below a page of numbers.
    if not dry_run:
        save_plan(workdir, plan)
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=220)
    console.print(plan_table(plan), highlight=False)
    for line in plan_totals(plan, hardware):
        console.print(line, highlight=False)
    for text, number in _footnotes(plan).items():
        console.print(f"! {number}  {text}", highlight=False, soft_wrap=True)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    where = "nothing is written (--dry_run)" if dry_run else f"{workdir}/{FILE}"
    console.print(where, highlight=False, soft_wrap=True)
    return 0
