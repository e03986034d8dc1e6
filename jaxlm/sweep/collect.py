"""From run directories to one flat table: every count, every status, and why a row is left out of fits.

`S/table.csv` (and `S/table.parquet` where pyarrow is installed) has one row per run of any plan. Nothing is
dropped: a row that a fit must not see carries the name of the rule in `exclude`, and what is worth knowing of
a row that it may see in `flags`; `detail` has the numbers. RULES and FLAGS say what the names mean.

The loss is that of the whole eval set after the last update (`loss`, nats per token, with the standard error
`loss_se` that the choice of the eval text has and all runs share), and the mean training loss at the end
(`loss_smooth`). `loss_seed_sd` is the noise of a repetition, for weights. Rows of one `block` are not
independent: branches of one trunk share most of their path.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxlm.config import config_hash
from jaxlm.sweep.plan import ROLES, Cell, Plan
from jaxlm.sweep.plan_file import load_plans
from jaxlm.sweep.status import failure, is_done
from jaxlm.sweep.store import RUNS, Store, open_store

Row = dict[str, Any]  # column -> number, text or None

CSV, PARQUET = "table.csv", "table.parquet"
FAR = 1.25  # a final loss this many times the neighbours' is a divergence
TAIL = 0.05  # the last share of a run over which its training loss is averaged

# Why a row is no point of a fit. The first that applies stands in `exclude`.
RULES = {
    "not_finished": "the run has not finished",
    "diverged": (
        "the final loss is not finite, is not below the first training loss (a branch: its trunk's), or is "
        f"more than {FAR} times the larger of the best losses at the neighbouring sizes of its budget (and, "
        "in a grid of learning rates, at its own size)"
    ),
    "trunk": "a trunk at constant learning rate is no finished run of its length; its branches are",
    "tune": "the run tunes a learning rate or batch; its plan is no sample of the law",
    "holdout": "the run tests a fit, so no fit may see it",
    "not_best_lr": "another learning rate of the same cell ended lower",
}
FLAGS = {
    "best_lr": "the best of the learning rates that its plan tried; their grid is no sample of the law",
    "best_of_lr_grid": (
        "kept as the best of several learning rates: this takes noise away on one side only and flattens "
        "exponents; tune at a few cells and plan the grid with the rule that results"
    ),
    "lr_edge": "the best learning rate is the smallest or largest tried: the optimum may lie outside",
    "lr_grid_open": "not all learning rates of the cell have finished: the best may be another one",
    "multi_epoch": "the run read its data more than once: not for a single-epoch law",
}


def collect(workdir: str | Path) -> list[Row]:
    """One row per run of the sweep's plans, in their order.

    A run that several plans hold has one row: its `plan` names all of them, its role is the first of grid,
    branch, seed, holdout, tune and trunk that any of them gives it.

    Raises:
        UserError: no plan is there.
    """
    store, plans = open_store(workdir), load_plans(workdir)
    rows = []
    for cell, held in _cells(plans):
        rows.append(_row(store, cell) | {"plan": "+".join(c.plan for c in held), "cell": cell, "held": held})
    first = {row["id"]: row["loss_first"] for row in rows}
    for row in rows:  # a branch begins where its trunk has got to, not at the beginning
        row["loss_first"] = first.get(row["parent"]) if row["parent"] else row["loss_first"]
    _mark(rows)
    labels = sorted({name for row in rows for name in row["cell"].labels})
    for row in rows:
        cell, _ = row.pop("cell"), row.pop("held")
        row |= {f"label_{name}": cell.labels.get(name) for name in labels}
    return rows


def _cells(plans: Mapping[str, Plan]) -> list[tuple[Cell, list[Cell]]]:
    """Every run once: the cell whose role counts, the first in ROLES, and those of all plans."""
    found: dict[str, list[Cell]] = {}
    for plan in plans.values():
        for cell in plan.cells:
            found.setdefault(cell.id, []).append(cell)
    return [(min(cells, key=lambda cell: ROLES.index(cell.role)), cells) for cells in found.values()]


# --------------------------------------------------------------------------------------------------- one row


def _row(store: Store, cell: Cell) -> Row:
    """Everything known of a run; None where it is not (yet)."""
    cfg, n = cell.config, cell.counts
    result = _json(store.read(f"{RUNS}/{cell.id}/result.json"))
    failed = failure(store, cell)
    curve = [r for r in _lines(store.read(f"{RUNS}/{cell.id}/metrics.jsonl")) if "train/nll" in r]
    if is_done(store, cell):
        status, reason = "finished", ""
    elif failed is not None or result.get("status") == "failed":
        status, reason = "failed", (failed or result)["reason"]
    else:
        status, reason = ("unfinished", result.get("reason", "")) if curve else ("missing", "")
    if status != "finished":
        result = {}
    start = (_json(store.read(f"{RUNS}/{cell.id}/config.json")).get("starts") or [{}])[-1]
    git = start.get("git") or {}
    return {
        "id": cell.id,
        "plan": "",
        "role": cell.role,
        "status": status,
        "exclude": "",
        "flags": "",
        "detail": reason,
        "seed": cfg.seed,
        "data_seed": cfg.data.seed,
        "budget": cell.budget or None,
        **{
            name: n[name]
            for name in ("n_total", "n_non_embedding", "n_embedding", "n_head", "n_active", "n_products")
        },
        "tokens": cell.tokens,
        "steps": cell.steps,
        "batch_tokens": cfg.data.batch_size * cfg.data.seq_len,
        "seq_len": cfg.data.seq_len,
        "flops_exact": cell.flops,
        **{f"flops_{name}": per_token * cell.tokens for name, per_token in n["conventions"].items()},
        "flops_own": cell.own_flops,
        "epochs": cell.epochs,
        "unique_tokens": cell.unique_tokens,
        "loss": result.get("eval/nll"),
        "loss_smooth": _smooth(curve, cell.steps) if status == "finished" else None,
        "loss_se": result.get("eval/standard_error"),
        "loss_seed_sd": None,
        "loss_first": curve[0]["train/nll"] if curve else None,
        "bpb": result.get("eval/bpb"),
        "eval_tokens": result.get("eval/tokens"),
        "lr": cfg.optim.lr,
        "weight_decay": cfg.optim.weight_decay,
        "b2": cfg.optim.b2,
        "optimizer": cfg.optim.name,
        "schedule": cfg.optim.schedule,
        "warmup": cfg.optim.warmup,
        "warmup_unit": cfg.optim.warmup_unit,
        "parametrization": cfg.model.parametrization,
        "model_dim": cfg.model.model_dim,
        "num_layers": cfg.model.num_layers,
        "num_heads": cfg.model.attention.num_heads,
        "mlp_dim": cfg.model.mlp_width,
        "vocab_size": cfg.model.vocab_size,
        "experts": cfg.model.moe.num_experts,
        "sparsity": 1 - cfg.model.moe.top_k / cfg.model.moe.num_experts if cfg.model.moe.num_experts else 0.0,
        "block": cell.parent or cell.id,
        "parent": cell.parent,
        "branch_step": cell.branch_step,
        "config_hash": config_hash(cfg),
        "commit": git.get("commit", "") + ("+changes" if git.get("changed") else ""),
        "seconds": _seconds(result),
        "device": result.get("device", ""),
    }


def _json(data: bytes | None) -> dict[str, Any]:
    """A JSON object; {} for nothing, and for what is still being written."""
    try:
        tree = json.loads(data or b"{}")
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _lines(data: bytes | None) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics file."""
    for line in (data or b"").split(b"\n")[:-1]:
        yield _json(line)


def _smooth(curve: Sequence[Mapping[str, Any]], steps: int) -> float | None:
    """Mean training loss of the last 5% of a run's updates, of the last five logged ones at least."""
    late = [row["train/nll"] for row in curve if row["step"] > (1 - TAIL) * steps]
    values = late if len(late) >= 5 else [row["train/nll"] for row in curve[-5:]]
    values = [x for x in values if x is not None]
    return math.fsum(values) / len(values) if values else None


def _seconds(result: Mapping[str, Any]) -> float | None:
    """Wall time of the last start; of a vectorised group, this run's share."""
    if not result:
        return None
    return math.fsum(result["seconds"].values()) / (result.get("group/cells") or 1.0)


# ---------------------------------------------------------------------------------------------- named rules


def _mark(rows: Sequence[Row]) -> None:
    """Fill in `exclude`, `flags` and `detail`."""
    for row in rows:
        if row["status"] != "finished":
            row["exclude"] = "not_finished"
        elif row["epochs"] > 1:
            _flag(row, "multi_epoch", f"{row['epochs']:.2f} epochs")
    _mark_diverged(rows)
    for row in rows:
        if not row["exclude"] and row["role"] in ("trunk", "tune", "holdout"):
            row["exclude"] = row["role"]
    _mark_learning_rates(rows)
    _measure_noise(rows)


def _flag(row: Row, name: str, detail: str) -> None:
    row["flags"] = ",".join(filter(None, (row["flags"], name)))
    row["detail"] = "; ".join(filter(None, (row["detail"], detail)))


def _same(cell: Cell, *but: str) -> tuple:
    """What the grid asked of a cell, without some of it and the seed."""
    labels = {k: v for k, v in cell.labels.items() if k not in (*but, "seed")}
    return (cell.plan, cell.role == "trunk", *sorted(labels.items()))


def _mark_diverged(rows: Sequence[Row]) -> None:
    finished = [row for row in rows if row["status"] == "finished"]
    groups: dict[tuple, list[Row]] = {}
    for row in finished:
        loss, first = row["loss"], row["loss_first"]
        wrong = ""
        if loss is None or not math.isfinite(loss):
            wrong = "the final loss is not finite"
        elif first is not None and loss >= first:
            wrong = f"the final loss {loss:.4f} is not below the first training loss {first:.4f}"
        if wrong:
            row["exclude"], row["detail"] = "diverged", wrong
        else:
            groups.setdefault(_budget(row), []).append(row)
    far = []  # judged by all rows of the group, and only then marked
    for group in groups.values():
        best: dict[int, float] = {}
        for row in group:
            best[row["n_total"]] = min(row["loss"], best.get(row["n_total"], math.inf))
        sizes = sorted(best)
        for row in group:
            at = sizes.index(row["n_total"])
            near = [best[size] for size in sizes[max(0, at - 1) : at] + sizes[at + 1 : at + 2]]
            if row["loss"] > best[row["n_total"]]:
                near.append(best[row["n_total"]])
            if near and row["loss"] > FAR * max(near):
                far.append((row, f"the final loss {row['loss']:.4f} is {row['loss'] / max(near):.2f} times"))
    for row, text in far:
        row["exclude"], row["detail"] = "diverged", f"{text} that of its neighbours"


_LR = ("lr", "optim.lr")  # labels of a grid of learning rates


def _mark_learning_rates(rows: Sequence[Row]) -> None:
    """In every cell with several learning rates: which is best, whether it lies at the edge."""
    groups: dict[tuple, list[tuple[Row, Cell]]] = {}
    for row in rows:
        for cell in row["held"]:  # a run that one plan tunes with may be a point of another
            if cell.labels.keys() & set(_LR):
                key = (*_same(cell, *_LR), row["n_total"], row["seed"])
                groups.setdefault(key, []).append((row, cell))
    for group in groups.values():
        rates = sorted({row["lr"] for row, _ in group})
        ended = [row for row, _ in group if row["exclude"] in ("", "tune", "holdout")]
        if len(rates) < 2 or not ended:
            continue
        best = min(ended, key=lambda row: row["loss"])
        tunes = all(cell.role == "tune" for _, cell in group)
        tried = f"lr {best['lr']:g} of {', '.join(f'{lr:g}' for lr in rates)}"
        _flag(best, "best_lr" if tunes else "best_of_lr_grid", tried)
        if best["lr"] in (rates[0], rates[-1]):
            _flag(best, "lr_edge", "")
        if any(row["exclude"] == "not_finished" and row["status"] != "failed" for row, _ in group):
            _flag(best, "lr_grid_open", "")
        for row, cell in group:
            if row is not best and not row["exclude"] and cell is row["cell"]:
                row["exclude"] = "not_best_lr"
                row["detail"] = f"{row['loss'] - best['loss']:+.4f} nats above lr {best['lr']:g}"


def _measure_noise(rows: Sequence[Row]) -> None:
    """`loss_seed_sd`: standard deviation of the final loss over seeds, from the repeats at a row's budget.

    Repeats are equal in all but their seeds; several sets of them at one budget are pooled by their degrees
    of freedom. Empty where a budget has none.
    """
    cells: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["exclude"] in ("", "holdout"):
            cells.setdefault((*_same(row["cell"]), row["n_total"], row["lr"]), []).append(row)
    squares: dict[tuple, tuple[float, int]] = {}
    for group in cells.values():
        if len(group) > 1:
            budget, mean = _budget(group[0]), math.fsum(row["loss"] for row in group) / len(group)
            total, free = squares.get(budget, (0.0, 0))
            total += math.fsum((row["loss"] - mean) ** 2 for row in group)
            squares[budget] = (total, free + len(group) - 1)
    for row in rows:
        if row["status"] == "finished" and _budget(row) in squares:
            total, free = squares[_budget(row)]
            row["loss_seed_sd"] = math.sqrt(total / free)


def _budget(row: Row) -> tuple:
    """The same for all sizes (and learning rates) of one budget, ratio or token count of a plan."""
    return _same(row["cell"], "size", *_LR)


# ------------------------------------------------------------------------------------------------ the files


def write_table(workdir: str | Path, rows: Sequence[Row]) -> list[str]:
    """Write the rows to `table.csv`, and to `table.parquet` if pyarrow is there; returns the files' names."""
    store = open_store(workdir)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    # repr of a float has all its digits; None is an empty field.
    writer.writerows(["" if x is None else x for x in row.values()] for row in rows)
    store.write(CSV, text.getvalue().encode())
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return [CSV]
    table = pyarrow.table({name: [row[name] for row in rows] for name in rows[0]})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    store.write(PARQUET, buffer.getvalue())
    return [CSV, PARQUET]


def collect_command(workdir: str | Path) -> int:
    """What `jaxlm collect` does: write the table, and say what is in it and what a fit will not see.

    Returns:
        The exit code.
    """
    rows = collect(workdir)
    files = write_table(workdir, rows)
    console = Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    def numbers(column: str) -> dict[str, int]:
        values = [value for row in rows for value in str(row[column]).split(",") if value]
        return {value: values.count(value) for value in dict.fromkeys(values)}

    say(f"{len(rows)} runs: " + ", ".join(f"{k} {status}" for status, k in numbers("status").items()))
    say("roles: " + ", ".join(f"{k} {role}" for role, k in numbers("role").items()))
    for rule, k in numbers("exclude").items():
        say(f"excluded: {k} {rule}: {RULES[rule]}")
    for flag, k in numbers("flags").items():
        say(f"flagged: {k} {flag}: {FLAGS[flag]}")
    for row in rows:
        if row["status"] == "failed" or row["exclude"] == "diverged":
            say(f"  {row['id']} {row['exclude']}: {row['detail']}")
        if "+" in row["plan"] and row["role"] not in ("trunk", "tune"):
            plans = row["plan"].replace("+", ", ")
            say(f"  {row['id']} is in the plans {plans}: counted once, as {row['role']}")
    sets = {row["eval_tokens"] for row in rows if row["eval_tokens"] is not None}
    if len(sets) > 1:
        say(f"the runs were scored on eval sets of {sorted(sets)} tokens: their losses are not paired")
    usable = sum(not row["exclude"] for row in rows)
    say(f"{usable} rows for a fit; wrote " + ", ".join(f"{workdir}/{name}" for name in files))
    if PARQUET not in files:
        say("no Parquet: pyarrow is not installed (pip install 'jaxlm[data]')")
    return 0
