"""`jaxlm preflight`: compile for hardware that is not here, and say what it needs."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxlm.config import RunConfig
from jaxlm.errors import check
from jaxlm.preflight.compiled import default_cache, facts_of
from jaxlm.preflight.report import lines, make_report, tables
from jaxlm.preflight.topology import parse_topology


def preflight_command(
    cfg: RunConfig,
    topology: str,
    *,
    slices: int = 1,
    price: float = 0.0,
    top: int = 8,
    cache: str | None = None,
    as_json: bool = False,
) -> bool:
    """Print the report of one run on one topology; returns whether it fits.

    Args:
        cfg: the run.
        topology: 'v5p:8x8x8'.
        slices: of that topology, joined by the data-centre network.
        price: of an hour of one chip; 0 = no prices.
        top: collectives to list.
        cache: folder of facts; None = the user's, '' = keep nothing.
        as_json: print JSON alone.

    Raises:
        UserError: what cannot be compiled for, or a mesh that does not fit.
    """
    check(price >= 0, f"--price={price:g} must not be negative")
    hardware = parse_topology(topology, slices)
    # This machine only compiles. Where libtpu is installed JAX would look for a TPU first.
    jax.config.update("jax_platforms", "cpu")
    folder = default_cache() if cache is None else Path(cache) if cache else None
    if not as_json:
        print(f"compiling for {hardware}: this can take minutes", file=sys.stderr, flush=True)
    facts, cached = facts_of(cfg, hardware, folder)
    report = make_report(cfg, hardware, facts, price)
    if as_json:
        print(json.dumps(_plain({**report.to_dict(), "cached": cached}), indent=2, allow_nan=False))
        return report.fits
    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables(report, top):
        console.print(table)
    for line in lines(report, hardware):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return report.fits


def _plain(tree: Any) -> Any:
    """The same with None for what JSON does not have."""
    if isinstance(tree, dict):
        return {str(name): _plain(x) for name, x in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(x) for x in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
