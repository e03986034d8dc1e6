"""Plans of sweeps: every cell counted, checked and priced before anything runs; `plan_file` keeps them."""

import contextlib
import dataclasses
import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.chips import Chip
from jaxlm.config import RunConfig, canonical_json, identity, to_dict
from jaxlm.data.loader import DataConfig, Dataset, Loader, make_dataset
from jaxlm.data.shards import INDEX
from jaxlm.data.tokenizer import check_vocabulary, load_tokenizer
from jaxlm.errors import UserError, check
from jaxlm.model.models import check_transformer
from jaxlm.optim import make_schedule
from jaxlm.preflight.planner import HEADROOM, choose_mesh, describe_mesh, estimate, resolve_here, resolve_mesh
from jaxlm.preflight.report import Report
from jaxlm.preflight.topology import Topology
from jaxlm.scaling import record
from jaxlm.scaling.counting import count
from jaxlm.sweep import chips, preflights
from jaxlm.sweep.grids import Draft, GridConfig, expand
from jaxlm.sweep.shapes import describe_shape
from jaxlm.sweep.store import open_store
from jaxlm.train.run import Plan as Need
from jaxlm.train.run import plan as plan_run

ROLES = ("grid", "branch", "seed", "holdout", "tune", "trunk")


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """A sweep: the run that every cell starts from, and what varies."""

    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    grid: GridConfig = dataclasses.field(default_factory=GridConfig)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a plan."""

    id: str  # first 12 hex digits of config_hash(config): the folder in S/runs
    plan: str  # name of the plan
    role: str  # one of ROLES
    config: RunConfig
    budget: float  # training FLOPs asked for; 0 if the grid asks for none
    flops: float  # exact training FLOPs of all its tokens
    tokens: int  # steps * B * T, those of the trunk below a branch included
    steps: int  # updates, those of the trunk included
    counts: Mapping[str, Any]  # counting.Counts as a dict
    parent: str = ""  # id of the trunk that it starts from
    branch_step: int = 0  # updates of the trunk before the branch
    labels: Mapping[str, float | int | str] = dataclasses.field(default_factory=dict)  # what the grid varied
    warnings: tuple[str, ...] = ()
    unique_tokens: int = 0  # targets of one epoch of the training data
    epochs: float = 0.0  # passes over the training data
    memory_bytes: int = 0  # per device, estimated or by the compiler
    seconds: float = 0.0  # estimated, of the steps that are its own; 0 = not known

    @property
    def own_flops(self) -> float:
        """Training FLOPs that this run spends itself: a branch is charged from where it leaves its trunk."""
        return self.flops * (self.steps - self.branch_step) / self.steps


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cells of one grid."""

    name: str
    config: SweepConfig
    hash: str  # of the config, without what only concerns execution, and of the ids of the cells
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()  # what holds of the whole grid


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What a plan is priced for."""

    chip: Chip | None = None  # None = this machine
    count: int = 1  # chips that train one run
    mfu: float = 0.0  # share of the chip's peak; 0 = its assumed one
    gflops: float = 0.0  # sustained GFLOP/s of a run, in place of chip and measurement
    price: float = 0.0  # of an hour of one chip (of this machine)
    measure: bool = True  # time this machine where neither chip nor gflops is given
    topology: Topology | None = None  # of the chips: what preflights have compiled for it is used
    preflight: bool = False  # compile for it what they have not


# ------------------------------------------------------------------------------------------------ the plan


def make_plan(
    config: SweepConfig,
    workdir: str | Path,
    name: str = "grid",
    *,
    hardware: Hardware | None = None,
    dry_run: bool = False,
) -> Plan:
    """Every run of a sweep with its counts, epochs, memory, estimated time and warnings.

    Args:
        config: the base run and the grid.
        workdir: S, a path or a URL; token shards of raw text go to S/runs/data_cache, where the runs look.
        name: of the plan; a sweep directory may hold several.
        hardware: what to price it for; default this machine.
        dry_run: leave no file behind in the sweep directory.

    Raises:
        UserError: a grid that cannot be filled; a run that reads its data more than once without
            grid.allow_epochs; no eval set; whatever `jaxlm train` would refuse before its first step.
    """
    check_transformer(config.run.model, "jaxlm plan")
    hardware, grid, store = hardware or Hardware(), config.grid, open_store(workdir)
    check(name.isidentifier(), f"--name={name!r}: letters, digits and underscores, please")
    drafts = expand(config.run, grid, _center(grid, store.pull(grid.center_fit)) if grid.center_fit else None)
    check(
        all(draft.config.data.eval for draft in drafts),
        "run.data.eval names no files: all runs of a sweep are scored on one held-out set",
    )
    for cfg in (draft.config for draft in drafts):  # warm-up and cooldown must fit in every run
        check(
            cfg.data.format == "lm",
            f"run.data.format={cfg.data.format!r}: runs of a sweep are scored in nats per next token, 'lm'",
        )
        make_schedule(cfg.optim, cfg.train.num_steps, cfg.data.batch_size * cfg.data.seq_len)
    devices = hardware.count * hardware.chip.devices if hardware.chip else None
    probes = {key: _probe(d.config, hardware) for key, d in _shapes(drafts)}
    needs = {key: plan_run(probe, num_devices=devices) for key, probe in probes.items()}
    with _datasets(drafts, store.folder, dry_run) as datasets:
        epochs, unique, held_out = zip(*[_epochs(d.config, datasets) for d in drafts], strict=True)
        _check_epochs(drafts, epochs, unique, grid.allow_epochs)
        seconds = _clock(list(probes.values()), hardware, store.folder, dry_run)
    reports = preflights.reports(probes, hardware.topology, compile_missing=hardware.preflight)
    sending = {key: _sending(probe, hardware, reports.get(key)) for key, probe in probes.items()}
    cells = []
    for i, draft in enumerate(drafts):
        cfg, counts = draft.config, count(draft.config.model, draft.config.data.seq_len)
        key, steps = _shape_key(cfg), cfg.train.num_steps
        need = needs[key]
        memory = need.memory.total
        if key in reports:
            memory = preflights.reserved(reports[key], memory)
        tokens = steps * cfg.data.batch_size * cfg.data.seq_len
        cell = Cell(
            id=draft.id,
            plan=name,
            role=draft.role,
            config=cfg,
            budget=draft.budget,
            flops=counts.flops_train * tokens,
            tokens=tokens,
            steps=steps,
            counts=counts.to_dict(),
            parent=draft.parent,
            branch_step=draft.branch_step,
            labels=dict(draft.labels),
            unique_tokens=unique[i],
            epochs=epochs[i],
            memory_bytes=memory,
        )
        took = seconds(need, cell.own_flops, steps - cell.branch_step, held_out[i], sending[key])
        warnings = tuple(_warnings(cell, probes[key], need, hardware, reports.get(key)))
        cells.append(dataclasses.replace(cell, seconds=took, warnings=warnings))
    sha256 = _plan_hash(config, [cell.id for cell in cells])
    notes = (*_notes(config, cells), *preflights.notes(reports, len(probes)))
    return Plan(name, config, sha256, tuple(cells), notes)


def _plan_hash(config: SweepConfig, ids: Sequence[str]) -> str:
    """The ids are in it because a config may name a file: a refitted center_fit gives other cells."""
    tree = {"run": identity(config.run), "grid": to_dict(config.grid), "cells": list(ids)}
    return hashlib.sha256(canonical_json(tree).encode()).hexdigest()


def _center(grid: GridConfig, path: Path) -> Callable[[float], float]:
    """Budget -> N* of the fit, which must count sizes and FLOPs as the grid does."""
    fit = record.load_fit(path)
    columns = fit.data.get("columns", {})
    for role, ours in (("N", grid.size_by), ("C", "flops_exact")):
        theirs = columns.get(role, ours)
        check(
            theirs == ours,
            f"{path} was fitted with {role}={theirs}, this grid has {role}={ours}: fit with --columns="
            f"{role}={ours}" + (f", or set grid.size_by={theirs!r}" if role == "N" else ""),
        )
    return lambda budget: float(record.optimum(fit, budget)[0])


def _shape_key(cfg: RunConfig) -> str:
    """Equal for runs whose memory is equal."""
    what = dict(model=to_dict(cfg.model), loss=to_dict(cfg.loss), mesh=to_dict(cfg.mesh))
    what |= dict(B=cfg.data.batch_size, T=cfg.data.seq_len, M=cfg.train.microbatches)
    return canonical_json(what | dict(optim=cfg.optim.name, ema=cfg.optim.ema > 0))


def _shapes(drafts: Sequence[Draft]) -> list[tuple[str, Draft]]:
    """The first run of every shape."""
    return list({_shape_key(d.config): d for d in reversed(drafts)}.items())


def _probe(cfg: RunConfig, hardware: Hardware) -> RunConfig:
    """The run without its schedule: what `train.run.plan` says of memory holds for all of one shape.

    A mesh that is left to us is chosen for the hardware.
    """
    cfg = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, warmup=0.0, cooldown=0.0))
    if (chip := hardware.chip) is None:
        return resolve_here(cfg)
    return resolve_mesh(cfg, chip.kind, hardware.count * chip.devices)


def _sending(cfg: RunConfig, hardware: Hardware, report: Report | None) -> float:
    """Seconds that a step's collectives take on the chips of one run; 0 where links have no numbers.

    By the compiler's program where there is one that can be read, else by the estimate.
    """
    chip = hardware.chip
    if chip is None or chip.network is None or hardware.count * chip.devices == 1:
        return 0.0
    told = None if report is None else preflights.sending(report)
    return estimate(cfg, chip, hardware.count * chip.devices).links if told is None else told


# ------------------------------------------------------------------------------------------------ its data


@contextlib.contextmanager
def _datasets(drafts: Sequence[Draft], workdir: Path, dry_run: bool) -> Iterator[dict[str, Any]]:
    """Open (and, once, tokenise) the training and the eval data of every run, by `_data_key`."""
    cache, found = workdir / "runs" / "data_cache", {}
    with contextlib.ExitStack() as stack:
        if dry_run:  # what is not tokenised yet is tokenised aside, and forgotten
            aside = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for folder in cache.glob("tokens-*"):
                if (folder / INDEX).is_file():
                    (aside / folder.name).symlink_to(folder.absolute(), target_is_directory=True)
            cache = aside
        for draft in drafts:
            cfg = draft.config
            tokenizer = load_tokenizer(cfg.data.tokenizer)
            check_vocabulary(tokenizer, cfg.model.vocab_size)
            for split in ("train", "eval"):
                if (key := _data_key(cfg.data, split)) not in found:
                    data = dataclasses.replace(cfg.data, cache_dir="") if dry_run else cfg.data
                    found[key] = make_dataset(data, tokenizer, cache_dir=cache, split=split)
        yield found


def _data_key(data: DataConfig, split: str) -> str:
    """Equal for runs that read one dataset."""
    names = ("tokenizer", "text_key", "seq_len", "packing", "cache_dir")
    names += ("train", "seed") if split == "train" else ("eval", "eval_tokens")
    return split + canonical_json({name: getattr(data, name) for name in names})


def _epochs(cfg: RunConfig, datasets: Mapping[str, Dataset]) -> tuple[float, int, int]:
    """Passes over the source that is read most, unique targets of all of them, and eval tokens."""
    train, held_out = (datasets[_data_key(cfg.data, split)] for split in ("train", "eval"))
    passes = Loader(train, cfg.data).epochs(cfg.train.num_steps)
    return max(passes.values()), train.num_tokens, held_out.num_tokens


def _check_epochs(
    drafts: Sequence[Draft], epochs: Sequence[float], unique: Sequence[int], allowed: bool
) -> None:
    over = [i for i, e in enumerate(epochs) if e > 1]
    if over and not allowed:
        worst = max(over, key=lambda i: epochs[i])
        cfg = drafts[worst].config
        tokens = cfg.train.num_steps * cfg.data.batch_size * cfg.data.seq_len
        raise UserError(
            f"{len(over)} of {len(drafts)} runs read their data more than once; the worst, "
            f"{describe_shape(cfg.model)}, has {tokens:,} tokens where {cfg.data.train!r} has "
            f"{unique[worst]:,} ({epochs[worst]:.2f} epochs). No single-epoch law holds for them: take "
            "more text, larger models or smaller budgets, or set grid.allow_epochs=True and fit a law that "
            "knows unique tokens"
        )


# ----------------------------------------------------------------------------------------------- its price


def _clock(
    probes: Sequence[RunConfig], hardware: Hardware, workdir: Path, dry_run: bool
) -> Callable[..., float]:
    """(need, own FLOPs, own steps, eval tokens, seconds of a step's sending) -> seconds, 0 = not known.

    Args:
        probes: a run of every shape, its mesh chosen.
        hardware, workdir, dry_run: as for `make_plan`.
    """
    if hardware.gflops:
        return lambda need, flops, steps, held_out, sending: flops / (hardware.gflops * 1e9)
    if (chip := hardware.chip) is not None:
        return lambda need, flops, steps, held_out, sending: chips.chip_seconds(
            chip, _devices(need), hardware.mfu, flops=flops, steps=steps, memory=need.memory, sending=sending
        )
    timings: list[chips.Timing] = []
    if hardware.measure:
        programs_dir = None if dry_run else workdir / "runs" / "compilation_cache"
        timings = chips.calibrate(
            probes, workdir / "calibration.json", keep=not dry_run, programs_dir=programs_dir
        )

    def measured(need: Need, flops: float, steps: int, held_out: int, sending: float) -> float:
        sizes = dict(flops_per_token=need.counts.flops_train, flops=flops, eval_tokens=held_out)
        return chips.run_seconds(timings, **sizes) if timings else 0.0

    return measured


def _devices(need: Need) -> int:
    """Devices that the mesh of a run takes; it may leave others idle."""
    return math.prod(need.mesh_shape.values())


# -------------------------------------------------------------------------------------- what to be warned of


def _warnings(
    cell: Cell, probe: RunConfig, need: Need, hardware: Hardware, report: Report | None
) -> Iterator[str]:
    """What is known to bend a scaling law, and what will not run."""
    cfg, optim, batch = cell.config, cell.config.optim, cell.config.data.batch_size * cell.config.data.seq_len
    unit = {"steps": 1.0, "tokens": 1.0 / batch, "fraction": float(cell.steps)}[optim.warmup_unit]
    warm = optim.warmup * unit
    if warm > math.ceil(0.1 * cell.steps):
        share = f"{warm / cell.steps:.0%} of the run"
        yield f"the warm-up takes {share}: more than a tenth bends the fit (Porian 2024)"
    if cell.role != "trunk" and (optim.schedule in ("constant", "inverse_sqrt") or optim.final > 0.1 + 1e-9):
        yield f"optim.schedule={optim.schedule!r} does not decay to a tenth or less: no run of its own length"
    if batch > cell.counts["n_total"]:
        yield f"a batch of {batch:,} tokens is larger than the model ({cell.counts['n_total']:,} parameters)"
    if cell.steps < 300:
        yield f"{cell.steps} step(s): fewer than 300 are mostly warm-up and noise; lower data.batch_size"
    if optim.name == "adamw" and optim.b2 <= 0.95 and cfg.data.batch_size <= 128:
        yield f"optim.b2={optim.b2:g} is too low for {cfg.data.batch_size} rows (Porian 2024): .99 or so"
    if cell.epochs > 1:
        yield f"{cell.epochs:.2f} epochs: no point of a single-epoch law"
    if (chip := hardware.chip) is not None:
        needed, has = need.memory.total, f"{chip.limit / 1e9:.0f} GB"
        if report is not None and not report.fits:
            yield f"needs more than {has} a device by the compiler: {_remedy(probe, hardware)}"
        if report is None and needed > HEADROOM * chip.limit:
            short = f"which has {has}"
            if needed <= chip.limit:  # the compiler may still find room
                short = f"more than {HEADROOM:.0%} of its {has}, so that it may not fit"
            yield f"needs {needed / 1e9:.1f} GB a device, {short}: {_remedy(probe, hardware)}"
        if _devices(need) < hardware.count * chip.devices:
            yield f"the mesh takes {_devices(need)} of {hardware.count * chip.devices} devices: the rest idle"


def _remedy(cfg: RunConfig, hardware: Hardware) -> str:
    """What makes a run fit on its chips, or that they are too few."""
    chip, generic = hardware.chip, "raise --num_chips and mesh.fsdp, or set model.remat"
    if chip.network is None or hardware.count * chip.devices == 1:
        return generic
    try:
        mesh = choose_mesh(cfg, chip, hardware.count * chip.devices)
    except UserError:
        return f"no mesh of {hardware.count} chips holds it; {generic}"
    return f"a mesh that holds it: {describe_mesh(mesh)}"


def _notes(config: SweepConfig, cells: Sequence[Cell]) -> Iterator[str]:
    """What holds of the grid as a whole."""
    grid, points = config.grid, [cell for cell in cells if cell.role in ("grid", "branch", "seed")]
    if not points:
        return
    sizes = {cell.counts["n_total"]: cell for cell in points}
    transfers = all(cell.config.model.parametrization != "standard" for cell in points)
    tuned = grid.lr_rule != "fixed" or grid.lrs or grid.lr_exponent or transfers
    if len(sizes) > 1 and not tuned:
        yield (
            "one learning rate for all sizes: an untuned sweep bends the curve; set grid.lr_rule or "
            "grid.lr_exponent, or tune per size with grid.lrs"
        )
    if grid.kind == "isoflop":
        rows = {b: {c.counts["n_total"] for c in points if c.budget == b} for b in grid.budgets}
        thin = [f"{budget:g}" for budget, row in rows.items() if len(row) < 4]
        if thin:
            yield f"fewer than 4 sizes at {', '.join(thin)} FLOPs: a parabola and its error need 4"
        if len(grid.budgets) < 3:
            yield f"{len(grid.budgets)} budget(s): a line over budgets and its error need 3"
    if not any(cell.role == "seed" for cell in cells) and "seed" not in str(grid.product):
        yield "no run is repeated with another seed: the noise of the loss will not be measured (grid.seeds)"
    smallest = sizes[min(sizes)]
    tables = 1 - smallest.counts["n_non_embedding"] / smallest.counts["n_total"]
    if tables > 0.2:
        yield (
            f"embedding and head are {tables:.0%} of the smallest model: exponents depend on what is counted "
            "as N and C, so report the convention"
        )
    held_out = {_data_key(cell.config.data, "eval") for cell in cells}
    if len(held_out) > 1:
        yield "the runs are not all scored on the same eval rows: losses compare in bits per byte at best"
