"""What a preflight tells: memory against the limit, FLOPs, traffic, time, money, and what looks wrong."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from jaxlm.config import RunConfig, config_hash
from jaxlm.preflight.collectives import BETWEEN
from jaxlm.preflight.compiled import Facts, Row
from jaxlm.preflight.roofline import Roofline, dcn_seconds, ici_seconds, roofline
from jaxlm.preflight.topology import Topology, on_slices
from jaxlm.scaling import counting
from jaxlm.scaling.memory import Memory
from jaxlm.train.metrics import format_count, format_seconds
from jaxlm.train.run import plan

GiB = 2.0**30
LARGE = 16 * 2**20  # bytes; what is smaller is not worth a warning


@dataclasses.dataclass(frozen=True)
class Report:
    """A preflight of one run on one topology. Bytes and FLOPs are per device unless said otherwise."""

    topology: str
    devices: int
    chips: int
    config_hash: str
    fits: bool
    limit: float  # bytes of HBM that a program can have; 0 = not known
    tokens_per_step: int  # over all devices
    num_steps: int
    model_flops: float  # exact training FLOPs of a step
    hardware_flops: float  # with masked scores and rematerialisation
    counts: counting.Counts
    estimate: Memory  # the analytic model's
    facts: Facts
    time: Roofline | None  # None: no chip, or no program
    price: float  # of an hour of a chip; 0 = not asked
    warnings: Sequence[str]

    @property
    def chip_hours(self) -> float:
        """Of the whole run at the bound; compilation, evaluation and checkpoints not in it."""
        return self.chips * self.time.bound * self.num_steps / 3600

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        tree = dataclasses.asdict(dataclasses.replace(self, time=None))
        tree["counts"] = self.counts.to_dict()
        tree["sums"] = sums(self.facts.collectives or ())
        if self.facts.memory is not None:
            tree["facts"]["memory"]["allocated"] = self.facts.memory.allocated
        if self.time is not None:
            tree["time"] = self.time.to_dict()
            tree["tokens_per_second"] = self.tokens_per_step / self.time.bound
            tree["chip_hours"] = self.chip_hours
            tree["cost"] = self.chip_hours * self.price
        return tree


def sums(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Runs in a step and bytes sent by one device for each kind of collective, and for all."""
    out: dict[str, dict[str, float]] = {}
    for row in rows:
        for kind in (row.kind, "all"):
            total = out.setdefault(kind, {"count": 0, "ici": 0.0, "dcn": 0.0})
            for name in total:
                total[name] += getattr(row, name)
    return dict(sorted(out.items(), key=lambda item: -(item[1]["ici"] + item[1]["dcn"])))


def make_report(cfg: RunConfig, topology: Topology, facts: Facts, price: float = 0.0) -> Report:
    """Judge what the compiler said.

    Args:
        cfg, topology, facts: as given to and got from `facts_of`.
        price: of an hour of one chip; 0 = not asked.
    """
    cfg = on_slices(cfg, topology)
    need = plan(cfg, num_devices=topology.num_devices)
    share = need.tokens_per_step / topology.num_devices
    model_flops, hardware_flops = need.counts.flops_train * share, need.counts.flops_hardware * share
    chip, rows, time = topology.chip, facts.collectives, None
    if chip is not None and rows is not None:
        flops = dict(hardware_flops=hardware_flops, model_flops=model_flops)
        time = roofline(chip, rows, **flops, state=facts.state, activations=need.memory.activations)
    return Report(
        topology=str(topology),
        devices=topology.num_devices,
        chips=topology.num_chips,
        config_hash=config_hash(cfg),
        fits=facts.shortage is None,
        limit=chip.limit if chip else 0.0,
        tokens_per_step=need.tokens_per_step,
        num_steps=cfg.train.num_steps,
        model_flops=model_flops,
        hardware_flops=hardware_flops,
        counts=need.counts,
        estimate=need.memory,
        facts=facts,
        time=time,
        price=price,
        warnings=tuple(_warnings(topology, facts, need, time, cfg.mesh.table()["embed"])),
    )


# --------------------------------------------------------------------------------------------------- warnings


def _warnings(
    topology: Topology, facts: Facts, need: Any, time: Roofline | None, stored: Sequence[str]
) -> Iterator[str]:
    name, size = facts.largest_replicated
    if size >= LARGE and topology.num_devices > 1:
        yield f"{name} is replicated: {size / GiB:.2f} GiB on every device; give one of its axes a rule"
    if facts.host:
        yield (
            f"{facts.host / GiB:.2f} GiB of a device's state lie in the host's memory and travel to the "
            "device and back in a step: the roofline does not know that link"
        )
    if facts.unreadable:
        yield f"the program cannot be read ({facts.unreadable}): collectives are not known"
    if facts.unknown_loops:
        yield f"{facts.unknown_loops} loops of unknown length count as one trip: traffic is a lower bound"
    for operation in facts.replicated:
        yield f"the compiler replicates an operand of {operation} to change its layout"
    rows = facts.collectives or ()
    yield from _reshards(rows)
    if topology.platform != "cpu":  # XLA:CPU has no reduce-scatter of a product
        torus = topology.platform == "tpu"
        yield from _whole_gradients(rows, facts.state["params"], need, stored, torus)
    if time is not None:
        yield from _slow_axes(topology, rows, time, need)


def _reshards(rows: Sequence[Row]) -> Iterator[str]:
    """Exchanges that no operation of the program asks for.

    Permutations at a product are no reshard: there the compiler sends parts while it multiplies others.
    """
    asked = ("ppermute", "all_to_all", "ragged_all_to_all", "pshuffle", "psend", "precv")
    for row in rows:
        name = row.where.rpartition("/")[2]
        exchange = row.kind in ("all-to-all", "ragged-all-to-all", "collective-permute")
        windowed = row.kind == "collective-permute" and name == "dot_general"
        if exchange and name not in asked and not windowed and row.ici + row.dcn >= LARGE:
            yield (
                f"a reshard that the compiler inserted: {row.kind} over {row.axes}, {row.count} x "
                f"{row.nbytes / 1e6:,.1f} MB, at {short_name(row.where) or 'no operation of ours'}"
            )


def _whole_gradients(
    rows: Sequence[Row], params: int, need: Any, stored: Sequence[str], torus: bool
) -> Iterator[str]:
    """All-reduces along the axes that split parameters, of about the size of all that a device gathers."""
    shards = math.prod(need.mesh_shape[m] for m in stored)
    found = [row for row in rows if row.kind == "all-reduce" and set(stored) & set(row.axes.split())]
    total = sum(row.nbytes * row.count for row in found)
    if shards > 1 and total > params * shards / 2:
        remedy = (
            ". A TPU does that over a group that fills its torus: store weights over two axes, say mesh.data "
            "and mesh.fsdp with mesh.rules=(('embed', 'data fsdp'),)"
        )
        yield (
            f"whole all-reduces along {' and '.join(stored)} ({total / 1e9:,.1f} GB a step): gathers and "
            f"reduce-scatters would send half{remedy if torus else ''}"
        )


def _slow_axes(topology: Topology, rows: Sequence[Row], time: Roofline, need: Any) -> Iterator[str]:
    by_axis: dict[str, float] = {}
    for row in rows:
        by_axis[row.axes] = by_axis.get(row.axes, 0.0) + ici_seconds(row, topology.chip)
    for axes, seconds in by_axis.items():
        if seconds > 0.5 * time.compute:
            yield f"collectives along {axes} take {seconds:.3g} s, computing takes {time.compute:.3g} s"
    weights = sum(
        ici_seconds(row, topology.chip)
        for row in rows
        if "fsdp" in row.axes.split() and row.kind in ("all-gather", "reduce-scatter", "all-reduce")
    )
    tokens = need.tokens_per_step / topology.num_devices
    if weights > time.compute:
        yield (
            f"the batch is too small to hide the gathers of parameters: {tokens:,.0f} tokens a device; they "
            f"would be hidden from about {tokens * weights / time.compute:,.0f}"
        )
    dcn = sum(dcn_seconds(row, topology.chip) for row in rows)
    if dcn > time.compute:
        yield f"traffic between slices takes {dcn:.3g} s, computing {time.compute:.3g} s"


def short_name(where: str) -> str:
    """The end of an operation's path: the model's scopes, without JAX's own.

    >>> short_name("jit(step)/gradient/jvp()/while/body/closed_call/Block/attention/qkv/BTD,DNH->BTNH/dot")
    'Block/attention/qkv/BTD,DNH->BTNH/dot'
    """
    noise = r"^((transpose\()?jvp\((gradient)?\)+|jit\(.*"
    noise += r"|while|body|closed_call|eval_jaxpr|checkpoint|gradient|)$"
    backward = "backward " if "transpose(" in where else ""
    again = "again " if "rematted" in where else ""
    parts = [p for p in where.split("/") if not re.match(noise, p) and p != "rematted_computation"]
    return f"{again or backward}{'/'.join(parts)}" if parts else ""


# ----------------------------------------------------------------------------------------------------- people


def tables(report: Report, top: int = 8) -> list[Table]:
    """Tables of memory, traffic by kind, the collectives that send most, and time."""
    out = [_memory_table(report)]
    if report.facts.collectives:
        out += [_kinds_table(report), _top_table(report, top)]
    if report.time is not None:
        out.append(_time_table(report, report.time))
    return out


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _memory_table(report: Report) -> Table:
    facts, memory = report.facts, report.facts.memory
    table = _table("memory of a device", "what", "GiB", "known from")
    state = facts.state
    rows = [(name, state[name], "shapes") for name in ("params", "opt_state", "batch")]
    if memory is not None:
        guess = report.estimate
        parts = {"kept activations": guess.activations, "a layer's backward pass": guess.layer}
        parts |= {"blocks in the compute dtype": guess.casts, "the head's gradient, whole": guess.head_grad}
        parts |= {"logits": guess.logits, "the rest of the loss": guess.head, "updates": guess.update}
        rows += [
            ("temporaries", memory.temporaries, "compiler"),
            ("  gradients, at most", state["gradients"], "shapes"),
            *[(f"  {what}, about", size, "analytic model") for what, size in parts.items()],
            ("outputs beside the donated state", memory.outputs - memory.aliased, "compiler"),
            ("code", memory.code, "compiler"),
        ]
    for what, size, source in rows:
        table.add_row(what, f"{size / GiB:,.3f}", source)
    if facts.host:
        table.add_row("of the state in the host's memory", f"{facts.host / GiB:,.3f}", "shapes")
    table.add_section()
    if memory is not None:
        table.add_row("allocated", f"{memory.allocated / GiB:,.3f}", "compiler")
        if memory.peak:
            table.add_row("in use at one time, at most", f"{memory.peak / GiB:,.3f}", "compiler")
        table.add_row("the same, about", f"{report.estimate.total / GiB:,.3f}", "analytic model")
    if report.limit:
        table.add_row("limit", f"{report.limit / GiB:,.2f}", "table of chips")
    if facts.shortage is not None and facts.shortage.needed:
        missing = facts.shortage.needed - facts.shortage.available
        table.add_row("needed", f"{facts.shortage.needed / GiB:,.2f}", "compiler")
        table.add_row("MISSING", f"{missing / GiB:,.2f}", "compiler")
    return table


def _kinds_table(report: Report) -> Table:
    table = _table("collectives of a step, per device", "kind", "runs", "GB on ICI", "GB on DCN")
    for kind, total in sums(report.facts.collectives).items():
        table.add_row(
            kind, f"{total['count']:,.0f}", f"{total['ici'] / 1e9:,.3f}", f"{total['dcn'] / 1e9:,.3f}"
        )
    return table


def _top_table(report: Report, top: int) -> Table:
    table = _table("the largest of them", "kind", "along", "runs", "MB each", "GB sent", "for")
    table.columns[-1].justify = "left"
    for row in report.facts.collectives[:top]:
        sent = f"{(row.ici + row.dcn) / 1e9:,.3f}"
        along = row.axes if row.kind.startswith(BETWEEN) else f"{row.axes} ({row.size})"
        table.add_row(
            row.kind, along, f"{row.count:,}", f"{row.nbytes / 1e6:,.2f}", sent, short_name(row.where)
        )
    return table


def _time_table(report: Report, time: Roofline) -> Table:
    table = _table("a step at the roofline", "term", "seconds", "MFU", "tokens/s")
    for name in ("compute", "hbm", "ici", "dcn"):
        table.add_row(name, f"{getattr(time, name):.4g}")
    table.add_section()
    for label, seconds in (("all overlap: upper bound", time.bound), ("none overlaps", time.serial)):
        mfu, rate = time.model_compute / seconds, report.tokens_per_step / seconds
        table.add_row(label, f"{seconds:.4g}", f"{mfu:.1%}", format_count(rate))
    return table


def lines(report: Report, topology: Topology, cached: bool = False) -> list[str]:
    """What is said below the tables; `cached`: another call compiled it, and the seconds are that one's."""
    facts = report.facts
    mesh = " x ".join(f"{name}={n}" for name, n in facts.mesh.items() if n > 1) or "one device"
    per_token = (report.counts.flops_train, report.counts.flops_hardware)
    out = [
        f"{report.topology}, {report.devices:,} devices, mesh {mesh}; "
        f"{report.tokens_per_step:,} tokens a step, {report.tokens_per_step / report.chips:,.0f} a chip",
        f"FLOPs of a step: {per_token[0] * report.tokens_per_step:.4g} of the model, "
        f"{per_token[1] * report.tokens_per_step:.4g} executed (masked scores, rematerialisation)",
    ]
    if report.time is not None:
        hours = report.chip_hours
        cost = f", {hours * report.price:,.0f} at {report.price:g} a chip hour" if report.price else ""
        wall = format_seconds(report.time.bound * report.num_steps)
        out.append(
            f"{report.num_steps:,} steps take at least {wall} = {hours:,.0f} chip hours{cost} (limited by "
            f"{report.time.limited_by}; with 40% MFU {hours * report.time.mfu / 0.4:,.0f} chip hours)"
        )
    if facts.kernels:
        runs = ", ".join(f"{name} x {count:,}" for name, count in facts.kernels.items())
        out.append(f"kernels and library calls of a step: {runs}")
    if facts.cycles:
        clock = topology.chip.clock if topology.chip else 0.0
        seconds = f" = {facts.cycles / clock:.3g} s at {clock / 1e9:g} GHz" if clock else ""
        out.append(
            f"second opinion, compiler estimate: {facts.cycles:.4g} cycles{seconds}; without custom kernels "
            "and links, clock nominal"
        )
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in facts.seconds.items())
    spent = f"from the cache; the call that compiled it took: {spent}" if cached else spent
    out.append(f"{spent}; {', '.join(f'{name} {v}' for name, v in facts.versions.items())}")
    out += [f"WARNING: {text}" for text in report.warnings]
    if not report.fits:
        short = facts.shortage
        missing = (
            f" by {(short.needed - short.available) / GiB:.2f} GiB" if short.needed else f": {short.message}"
        )
        out.append(f"DOES NOT FIT{missing}")
    return out


def summary(report: Report) -> Mapping[str, Any]:
    """One row of a table of preflights."""
    total = sums(report.facts.collectives or ()).get("all", {"ici": 0.0, "dcn": 0.0})
    memory = report.facts.memory
    return {
        "topology": report.topology,
        "mesh": " ".join(f"{name}={n}" for name, n in report.facts.mesh.items() if n > 1),
        "fits": report.fits,
        "allocated_GiB": None if memory is None else memory.allocated / GiB,
        "peak_GiB": None if memory is None else memory.peak / GiB,
        "ici_GB": total["ici"] / 1e9,
        "dcn_GB": total["dcn"] / 1e9,
        "mfu_bound": report.time.mfu if report.time else None,
        "limited_by": report.time.limited_by if report.time else "",
    }
