"""The plans of a sweep on disk, and their runs.

S/plan.json         {"format": 1, "plans": {NAME: {"config", "hash", "cells", "notes"}}}
S/runs/<id>/        the run directory of a cell; id = first 12 hex digits of its config's hash
S/calibration.json  measured speed of this machine
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.config import RunConfig, build, diff, identity
from jaxlm.errors import UserError, check, check_choice
from jaxlm.sweep.plan import ROLES, Cell, Plan, SweepConfig
from jaxlm.sweep.shapes import describe_shape
from jaxlm.sweep.store import open_store
from jaxlm.train.rundir import RunLock, probe_writable

FORMAT = 1
FILE = "plan.json"


def run_dir(workdir: str | Path, cell: Cell) -> Path:
    """Where the cell trains."""
    return Path(workdir) / "runs" / cell.id


def save_plan(workdir: str | Path, plan: Plan) -> None:
    """Add `plan` to `S/plan.json`, whole or not at all.

    Raises:
        UserError: a plan of that name with another hash is there; the message has the difference.
    """
    store = open_store(workdir)
    probe_writable(store.folder)
    with RunLock(store.folder):  # two plans at once must not lose each other
        plans = {} if store.read(FILE) is None else load_plans(workdir)
        old = plans.get(plan.name)
        if old is not None and old.hash != plan.hash:
            raise UserError(
                f"{workdir}/{FILE} holds a plan {plan.name!r} with another grid; choose another --name or "
                "--workdir, or go back:\n" + "\n".join(f"  {line}" for line in _difference(old, plan))
            )
        plans[plan.name] = plan
        tree = {"format": FORMAT, "plans": {name: _plain(p) for name, p in plans.items()}}
        store.write(FILE, (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode())


def _difference(old: Plan, new: Plan) -> list[str]:
    """Fields that differ, and what only one of the two plans has."""
    lines = [
        *diff(identity(old.config.run), identity(new.config.run)),
        *(f"grid.{line}" for line in diff(old.config.grid, new.config.grid)),
    ]
    for sign, these, those in (("-", old.cells, new.cells), ("+", new.cells, old.cells)):
        gone = [cell for cell in these if cell.id not in {other.id for other in those}]
        lines += [f"{sign} {cell.id} {describe_shape(cell.config.model)}" for cell in gone[:4]]
        lines += [f"{sign} and {len(gone) - 4} more runs"] if len(gone) > 4 else []
    return lines


def _plain(plan: Plan) -> dict[str, Any]:
    tree = dataclasses.asdict(plan)
    return {key: tree[key] for key in ("config", "hash", "cells", "notes")}


def load_plans(workdir: str | Path) -> dict[str, Plan]:
    """The plans of a sweep directory by name, in the order in which they were made.

    Raises:
        UserError: no plan is there, or the file is damaged or of another format.
    """
    data, path = open_store(workdir).read(FILE), f"{workdir}/{FILE}"
    check(data is not None, f"{workdir} is no sweep directory: it has no {FILE}; `jaxlm plan` makes it")
    try:
        tree = json.loads(data)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    found = tree.get("format") if isinstance(tree, dict) else None
    check(found == FORMAT, f"{path} has format {found}, this version reads {FORMAT}")
    plans = {}
    try:
        for name, plan in tree["plans"].items():
            config = build(plan["config"], SweepConfig)
            cells = tuple(_cell(cell) for cell in plan["cells"])
            plans[name] = Plan(name, config, plan["hash"], cells, tuple(plan["notes"]))
    except (AttributeError, KeyError, TypeError, UserError) as error:
        told = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is damaged, or of another version: {told}") from error
    check(len(plans) > 0, f"{path} holds no plan; `jaxlm plan` adds one")
    return plans


def _cell(tree: Mapping[str, Any]) -> Cell:
    config, warnings = build(tree["config"], RunConfig), tuple(tree["warnings"])
    check_choice(tree["role"], ROLES, "role of a cell")
    return Cell(**{**tree, "config": config, "warnings": warnings})


def all_cells(plans: Mapping[str, Plan]) -> list[Cell]:
    """Every run once, trunks before their branches.

    A run of two plans is that of the earlier one; a trunk keeps the checkpoints that any plan branches from.
    """
    found: dict[str, Cell] = {}
    for plan in plans.values():
        for cell in plan.cells:
            old = found.setdefault(cell.id, cell)
            if steps := set(cell.config.train.save_steps) - set(old.config.train.save_steps):
                kept = tuple(sorted(steps.union(old.config.train.save_steps)))
                train = dataclasses.replace(old.config.train, save_steps=kept)
                config = dataclasses.replace(old.config, train=train)
                found[cell.id] = dataclasses.replace(old, config=config)
    return sorted(found.values(), key=lambda cell: cell.role == "branch")
