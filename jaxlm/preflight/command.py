"""`jaxlm preflight`: compile for hardware that is not here, and say what it needs."""

import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxlm.config import RunConfig
from jaxlm.errors import check
from jaxlm.model.models import check_transformer
from jaxlm.preflight.compiled import Facts, default_cache, facts_of
from jaxlm.preflight.planner import describe_mesh, mesh_overrides, resolve_mesh
from jaxlm.preflight.report import lines, make_report, tables
from jaxlm.preflight.search import flags, ranking_table, search
from jaxlm.preflight.topology import parse_topology, versions
from jaxlm.train.rundir import probe_writable, write_json


def preflight_command(
    cfg: RunConfig,
    topology: str,
    *,
    slices: int = 1,
    price: float = 0.0,
    top: int = 8,
    cache: str | None = None,
    as_json: bool = False,
    search_layouts: bool = False,
    max_compiles: int = 4,
    out: str = "",
) -> bool:
    """Print the report of one run on one topology; returns whether it fits.

    With `search_layouts` it first finds the best layout, and reports on that one.

    Args:
        cfg: the run.
        topology: 'v5p:8x8x8'.
        slices: of that topology, joined by the data-centre network.
        price: of an hour of one chip; 0 = no prices.
        top: collectives to list.
        cache: folder of facts; None = the user's, '' = keep nothing.
        as_json: print JSON alone.
        search_layouts: try meshes, remat, microbatches and tiles in place of the config's.
        max_compiles: layouts that the search compiles.
        out: file for the overrides of the best layout, JSON; '' = only print them.

    Raises:
        UserError: what cannot be compiled for, or a mesh that does not fit.
    """
    check_transformer(cfg.model, "jaxlm preflight")
    check(0 <= price < math.inf, f"--price={price:g} must be a number, 0 or more")
    check(search_layouts or not out, f"--out={out} is what a search writes: add --search")
    if out:
        check(not Path(out).is_dir(), f"--out={out} is a folder; name a file in it")
        probe_writable(Path(out).parent)  # before the search takes its minutes
    hardware = parse_topology(topology, slices)
    versions(hardware)  # a compiler is there, or refused before anything is searched
    # This machine only compiles. Where libtpu is installed JAX would look for a TPU first.
    jax.config.update("jax_platforms", "cpu")
    if cfg.mesh.auto:
        kind = hardware.chip.kind if hardware.chip else "cpu"
        cfg = resolve_mesh(cfg, kind, hardware.num_devices, slices)
        print(f"mesh: {flags(mesh_overrides(cfg.mesh))}", file=sys.stderr)
    folder = default_cache() if cache is None else Path(cache) if cache else None

    @functools.cache  # the best of a search is reported on, too
    def compile_one(cfg: RunConfig) -> tuple[Facts, bool]:
        layout = f"{describe_mesh(cfg.mesh)}, remat {cfg.model.remat}, {cfg.train.microbatches} microbatches"
        if (attention := cfg.model.attention).tile_q or attention.tile_k:
            layout += f", tiles {attention.tile_q} x {attention.tile_k}"
        what = f"compiling for {hardware}, {layout}: this can take minutes"
        return facts_of(cfg, hardware, folder, lambda: print(what, file=sys.stderr, flush=True))

    console = Console(width=None if sys.stdout.isatty() else 160)
    if search_layouts:
        options = dict(max_compiles=max_compiles, price=price)
        compiled, estimated = search(cfg, hardware, lambda each: compile_one(each)[0], **options)
        best = compiled[0]
        cfg = best.cfg
        if out:
            write_json(out, best.overrides)
        if not as_json:
            console.print(ranking_table(compiled, estimated))
            console.print(f"the best: {flags(best.overrides)}", highlight=False, soft_wrap=True)
    facts, cached = compile_one(cfg)
    report = make_report(cfg, hardware, facts, price)
    if as_json:
        tree = {**report.to_dict(), "cached": cached}
        if search_layouts:
            tree["overrides"] = best.overrides
            tree["ranking"] = [
                {**each.overrides, "seconds": each.score, "fits": each.report.fits} for each in compiled
            ]
        print(json.dumps(_plain(tree), indent=2, allow_nan=False))
        return report.fits
    for table in tables(report, top):
        console.print(table)
    for line in lines(report, hardware, cached):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return report.fits


def _plain(tree: Any) -> Any:
    """The same with None for what JSON does not have."""
    if isinstance(tree, dict):
        return {str(name): _plain(x) for name, x in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(x) for x in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
