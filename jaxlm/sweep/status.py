"""How every run of a sweep stands, read from the sweep directory alone."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxlm.sweep.claims import Claims, Seen
from jaxlm.sweep.plan import Cell
from jaxlm.sweep.store import RUNS, Store
from jaxlm.train.checkpoint import MANIFEST

FAILED = "failed.json"  # in a run directory: why the run cannot be finished, and who tried
TAIL = 8192  # bytes of metrics.jsonl that are sure to hold a row


@dataclasses.dataclass(frozen=True)
class Status:
    """One run."""

    state: str  # done | running | failed | waiting (for a worker, or for its trunk)
    step: int = 0  # updates done, those of the trunk included
    loss: float | None = None  # nats per token: eval/nll when it is done, else the newest train/nll
    seconds: float = 0.0  # running: left, 0 = not known; done: that it took, as far as known
    step_seconds: float = 0.0  # of one update, measured; 0 = not known
    text: str = ""  # failed: why; running: where; waiting: for what


def is_done(store: Store, cell: Cell) -> dict[str, Any] | None:
    """The run's `result.json`, if it says that this very run is finished."""
    result = _json(store.read(f"{RUNS}/{cell.id}/result.json"))
    finished = result.get("status") == "finished" and str(result.get("config_hash", "")).startswith(cell.id)
    return result if finished else None


def failure(store: Store, cell: Cell) -> dict[str, Any] | None:
    """What `failed.json` of the run holds, if it is there."""
    data = store.read(f"{RUNS}/{cell.id}/{FAILED}")
    return None if data is None else {"reason": f"{FAILED} is damaged", "attempts": [], **_json(data)}


def has_checkpoint(store: Store, run: str, step: int) -> bool:
    """Whether a run directory holds a whole checkpoint of a step."""
    return MANIFEST in store.names(f"{RUNS}/{run}/checkpoints/{step:08d}")


def newest_step(store: Store, run: str) -> int:
    """Step of the newest checkpoint in a run directory; 0 if there is none."""
    names = store.names(f"{RUNS}/{run}/checkpoints")
    return max((int(name) for name in names if name.isdigit()), default=0)


def newest_row(store: Store, run: str) -> dict[str, Any]:
    """The newest whole row of a run's metrics that has a training loss; {} if there is none."""
    lines = store.tail(f"{RUNS}/{run}/metrics.jsonl", TAIL).split(b"\n")
    # What stands behind the last line end is being written; what stands before the first one may be cut.
    for line in reversed(lines[:-1]):
        row = _json(line)
        if "train/nll" in row:
            return row
    return {}


def survey(
    store: Store, cells: Sequence[Cell], claims: Claims, done: dict[str, Status] | None = None
) -> dict[str, Status]:
    """The state of every run, by id.

    Args:
        store: the sweep directory.
        cells: its runs.
        claims: this process's view of the claims; keep it from call to call.
        done: runs known to be finished; they are not read again, and new ones are added.
    """
    done = {} if done is None else done
    for cell in cells:
        if cell.id not in done and (result := is_done(store, cell)):
            seconds = sum(result.get("seconds", {}).values())
            done[cell.id] = Status("done", result["steps"], result.get("eval/nll"), seconds)
    seen = claims.look([cell.id for cell in cells if cell.id not in done])
    out = {}
    for cell in cells:
        out[cell.id] = done.get(cell.id) or _open(store, cell, seen[cell.id], done)
    return out


def _open(store: Store, cell: Cell, seen: Seen, done: Mapping[str, Status]) -> Status:
    """The status of a run that is not finished."""
    row = newest_row(store, cell.id)
    step, loss = row.get("step", cell.branch_step), row.get("train/nll")
    pace = row.get("perf/step_seconds") or 0.0
    if seen.state == "held":
        quiet = f", silent for {seen.silent:.0f} s" if seen.silent > 30 else ""
        left = pace * (cell.steps - step)
        return Status("running", step, loss, left, pace, f"{seen.owner}{quiet}")
    failed = failure(store, cell)
    if failed is not None:
        return Status("failed", step, loss, text=failed["reason"])
    if seen.state == "stale":
        return Status("waiting", step, loss, text=f"its worker ({seen.owner}) is gone")
    if cell.parent and cell.parent not in done and not has_checkpoint(store, cell.parent, cell.branch_step):
        return Status("waiting", step, loss, text=f"for step {cell.branch_step} of its trunk {cell.parent}")
    return Status("waiting", step, loss, text="stopped" if row else "")


def _json(data: bytes | None) -> dict[str, Any]:
    """A JSON object; {} for nothing, and for what another machine has not finished writing."""
    try:
        tree = json.loads(data or b"{}")
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


def count(states: Iterable[Status]) -> dict[str, int]:
    """How many runs are in each state."""
    out = dict.fromkeys(("done", "running", "failed", "waiting"), 0)
    for status in states:
        out[status.state] += 1
    return out
