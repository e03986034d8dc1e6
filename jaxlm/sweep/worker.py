"""Training the runs of a sweep: by any number of workers, on any number of machines, with no scheduler.

    while a run is left:  claim the next one in plan order, train it where it stands, give the claim back

A worker that is killed leaves a claim that goes stale, and its run goes on from its newest checkpoint: the
`train.save_every` of the runs says how much is lost at most. The sweep directory holds all there is to know.

S/claims/          who trains what, see `claims`
S/runs/<id>/       run directories; `failed.json` in one says why it could not be finished
S/groups/          states of runs that train together (--vectorize)
S/logs/<worker>.jsonl, .txt   what each worker did, and what its runs printed
"""

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxlm.config import config_hash
from jaxlm.errors import UserError, check
from jaxlm.preflight.planner import resolve_here
from jaxlm.sweep.claims import Claim, ClaimLost, Claims, Seen, this_process
from jaxlm.sweep.groups import group_key, saved_step
from jaxlm.sweep.plan import Cell
from jaxlm.sweep.status import FAILED, failure, has_checkpoint, is_done, newest_step
from jaxlm.sweep.store import RUNS, LocalStore, Store
from jaxlm.sweep.vectorized import train_group
from jaxlm.train.checkpoint import CheckpointError
from jaxlm.train.loop import NonFiniteError, StopSignals
from jaxlm.train.run import train
from jaxlm.train.rundir import LockedError, RunLock

GROUPS = "groups"
_FAILURES_IN_A_ROW = 3  # of this machine's making, after which a worker leaves the rest to others


@dataclasses.dataclass(frozen=True)
class Conduct:
    """How workers go about a sweep; no result depends on it."""

    vectorize: int = 0  # runs of one shape that train as one program at most; 0 or 1 = each alone
    retry_failed: bool = True  # try again what failed before this sweep was started
    heartbeat: float = 5.0  # seconds between renewals of a claim
    stale_after: float = 90.0  # seconds of silence after which a claim may be taken over
    max_deaths: int = 5  # workers that may die in a row on one run without a new checkpoint of it
    poll: float = 2.0  # seconds between looks at runs that others hold
    mirror_every: float = 15.0  # seconds between uploads of a run in progress, where S is a URL

    def __post_init__(self) -> None:
        check(
            self.stale_after >= 4 * self.heartbeat,
            f"--stale_after={self.stale_after:g} must be at least {4 * self.heartbeat:g}, four "
            "heartbeats: a run that compiles or evaluates would be taken from its worker",
        )


class Worker:
    """One process that trains runs of a sweep.

    Args:
        store: the sweep directory.
        cells: its runs, in plan order.
        conduct: how.
        session: of the command that started this worker; failures of earlier ones may be tried again.
        only: train this cell and no other.
    """

    def __init__(
        self,
        store: Store,
        cells: Sequence[Cell],
        conduct: Conduct,
        *,
        session: str,
        only: str | None = None,
        parent: int | None = None,
    ) -> None:
        self.store, self.conduct, self.session = store, conduct, session
        self.cells = {cell.id: cell for cell in cells}
        self.todo = [cell for cell in cells if only in (None, cell.id)]
        self.owner = this_process()
        self.claims = Claims(store, self.owner, heartbeat=conduct.heartbeat, stale_after=conduct.stale_after)
        self.name = f"{self.owner.host}-{self.owner.pid}-{self.owner.uuid[:6]}"
        self.stopped = ""  # why this worker stops early
        self._parent = parent
        self._done: set[str] = set()
        self._tried: set[str] = set()  # failed here, and not tried again
        self._faults = 0  # failures in a row that may be this machine's
        self._groups = _groups(self.todo, conduct.vectorize)

    # ------------------------------------------------------------------------------------------------- choice

    def work(self) -> None:
        """Train until nothing is left that this worker could do, or a signal stops it."""
        with StopSignals() as signals:
            self._signals = signals
            try:
                while not self.stopped and self._faults < _FAILURES_IN_A_ROW:
                    try:
                        claims, others = self._claim_next()
                    except OSError as error:
                        self._faults += 1
                        self._say(f"{self.store.url}: {error}; trying again")
                        self._wait()
                        continue
                    if claims:
                        self._run(claims)
                    elif others:
                        self._wait()
                    else:
                        return
                    self.stopped = self.stopped or self._asked_to_stop()
                if not self.stopped:
                    self._say(f"{self._faults} runs in a row failed for this machine's reasons; giving up")
            finally:
                self.claims.close()

    def _asked_to_stop(self) -> str:
        if self._parent is not None and os.getppid() != self._parent:
            return "the command that started this worker is gone"
        return self._signals(0)

    def _wait(self) -> None:
        until = time.monotonic() + self.conduct.poll
        while time.monotonic() < until and not self._asked_to_stop():
            time.sleep(0.1)

    def _claim_next(self) -> tuple[list[Claim], bool]:
        """Claims of the next run, or group of runs, that is free; else whether others may still free one."""
        self._done |= {c.id for c in self.todo if c.id not in self._done and is_done(self.store, c)}
        left = [cell for cell in self.todo if cell.id not in self._done]
        seen = self.claims.look([cell.id for cell in left])
        others = False
        for cell in left:
            ready = self._is_ready(cell, seen[cell.id])
            others |= ready is None
            if not ready:
                continue
            group = [c for c in self._groups.get(cell.id, [cell]) if c in left]
            claims = [self._take(c, seen[c.id]) for c in group if c is cell or self._is_ready(c, seen[c.id])]
            claims = [claim for claim in claims if claim is not None]
            if claims:
                return claims, True
            others = True  # another worker was faster
        return [], others

    def _is_ready(self, cell: Cell, seen: Seen) -> bool | None:
        """Whether the run can be claimed now; None: perhaps later, once another worker is done with it."""
        if cell.id in self._tried:
            return False
        if seen.state == "held":
            return None
        failed = failure(self.store, cell)
        if failed is not None and not self._may_retry(failed):
            return False
        if cell.parent and not has_checkpoint(self.store, cell.parent, cell.branch_step):
            if is_done(self.store, self.cells[cell.parent]):
                self._fail(
                    cell,
                    f"its trunk {cell.parent} is finished and kept no checkpoint of step {cell.branch_step}: "
                    f"remove {RUNS}/{cell.parent} and sweep again",
                    "run",
                )
                return False
            # The trunk comes first in plan order: if nobody is at it, it has failed, or is not in this sweep.
            return None if self.claims.look([cell.parent])[cell.parent].state == "held" else False
        return None if _is_locked(self.store.folder / RUNS / cell.id) else True

    def _may_retry(self, failed: dict[str, Any]) -> bool:
        """Not what this session has tried, unless only another machine's disk or memory was at fault."""
        attempts = failed["attempts"]
        if not any(attempt["session"] == self.session for attempt in attempts):
            return self.conduct.retry_failed
        mine = any(attempt["worker"] == self.owner.uuid for attempt in attempts)
        return attempts[-1]["kind"] == "machine" and not mine

    def _take(self, cell: Cell, seen: Seen) -> Claim | None:
        """Claim a run; None if another worker was faster, has just finished it, or too many died on it."""
        step, deaths = max(newest_step(self.store, cell.id), self._group_step(cell)), 0
        if seen.state == "stale":
            stuck = step <= seen.content.get("step", 0)
            deaths = seen.content.get("deaths", 0) + 1 if stuck else 0
        claim = self.claims.take(cell.id, seen, step=step, deaths=deaths, session=self.session)
        if claim is None:
            return None
        if is_done(self.store, cell):
            claim.release()
            return None
        if deaths >= self.conduct.max_deaths:
            why = f"{deaths} workers died on it, one after another, without a new checkpoint (memory?)"
            self._fail(cell, why, "machine")
            claim.release()
            return None
        return claim

    # --------------------------------------------------------------------------------------------------- work

    def _run(self, claims: Sequence[Claim]) -> None:
        """Train the runs of these claims, book how that went, and give the claims back."""
        cells = [self.cells[claim.run] for claim in claims]
        for cell in cells:
            self._log("started", cell, step=newest_step(self.store, cell.id))
        try:
            with self._printing():
                results = self._train(cells, claims)
        except ClaimLost as error:
            self._say(str(error))
            for cell in cells:
                self._log("lost", cell, reason=str(error))
        except LockedError as error:
            # Of a worker that hangs, and still holds the lock of its run on this machine.
            self._say(str(error))
            self._wait()
        # Whatever else a run dies of is written down, shown, and in the exit code; the others go on.
        except Exception as error:
            for cell in cells:
                self._fail(cell, error, _kind(error))
            self._faults = self._faults + 1 if _kind(error) == "machine" else 0
        else:
            self._faults = 0
            for cell, (status, reason, about) in zip(cells, results, strict=True):
                self._log(status, cell, **about)
                if status == "failed":
                    self._fail(cell, reason, "run")
                elif status == "finished":
                    self.store.remove(f"{RUNS}/{cell.id}/{FAILED}")
                else:
                    self.stopped = reason
        finally:
            for claim in claims:
                claim.release()

    def _train(self, cells: Sequence[Cell], claims: Sequence[Claim]) -> list[tuple[str, str, dict]]:
        """Status, reason and numbers of every run."""
        paths = [self._fetch(cell) for cell in cells]
        for name in self.store.names(GROUPS) if self.conduct.vectorize else ():
            self.store.pull_run(f"{GROUPS}/{name}")
        # The last run of a group whose others have ended goes on with the group's state.
        together = len(cells) > 1 or self._group_step(cells[0]) > 0

        def stop(step: int) -> str:
            last = step >= min(cell.steps for cell in cells)
            for claim in claims:
                claim.check(sure=last)
            return self._asked_to_stop()

        with self._mirrored(cells, claims):
            if together:
                pairs = [(cell.config, path) for cell, path in zip(cells, paths, strict=True)]
                results = train_group(pairs, self.store.folder / GROUPS, stop=stop, bar=False)
            else:
                results = [train(resolve_here(cells[0].config), paths[0], bar=False, stop=stop)]
        return [
            (r.status, r.reason, {"steps": r.steps, "compilation": _brief(r.compilation)}) for r in results
        ]

    def _group_step(self, cell: Cell) -> int:
        """Updates that a group of which this run is one has saved; 0 if this worker trains no groups."""
        return saved_step(self.store.folder / GROUPS, config_hash(cell.config)) if self._groups else 0

    def _fetch(self, cell: Cell) -> Path:
        """The run directory on this machine, with what it needs of its trunk beside it."""
        if cell.parent:
            trunk = f"{RUNS}/{cell.parent}"
            self.store.pull(f"{trunk}/config.json")
            self.store.pull(f"{trunk}/checkpoints/{cell.branch_step:08d}")
        return self.store.pull_run(f"{RUNS}/{cell.id}")

    @contextlib.contextmanager
    def _mirrored(self, cells: Sequence[Cell], claims: Sequence[Claim]) -> Iterator[None]:
        """Keep the shared directory up to date with the runs that are trained inside."""
        if isinstance(self.store, LocalStore):
            yield
            return
        ended = threading.Event()

        mine = {config_hash(cell.config) for cell in cells}

        def push() -> None:
            for claim in claims:
                claim.check(sure=True)  # a worker that was suspended must not overwrite its successor's files
            for folder in (self.store.folder / GROUPS).glob("*") if self.conduct.vectorize else ():
                members = folder / "group.json"
                if members.is_file() and mine & {
                    m["hash"] for m in json.loads(members.read_text())["members"]
                }:
                    self.store.push_run(f"{GROUPS}/{folder.name}")
            for cell in cells:
                self.store.push_run(f"{RUNS}/{cell.id}")

        def keep_pushing() -> None:
            while not ended.wait(self.conduct.mirror_every):
                try:
                    push()
                except ClaimLost:
                    return
                except OSError as error:
                    # Tried again; what is still missing at the end is an error of the run.
                    print(f"WARNING: {self.store.url}: {error}", file=sys.stderr, flush=True)

        thread = threading.Thread(target=keep_pushing, name="mirror", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            for claim in claims:
                claim.check(sure=True)
            push()

    # ------------------------------------------------------------------------------------------------ account

    def _fail(self, cell: Cell, error: BaseException | str, kind: str) -> None:
        """Write down why a run could not be finished."""
        self._tried.add(cell.id)
        told = isinstance(error, str | UserError | NonFiniteError | OSError) and f"{error}"
        reason = told or f"{type(error).__name__}: {error}".removesuffix(": ")
        trace = "" if isinstance(error, str) else "".join(traceback.format_exception(error))
        attempt = {
            "session": self.session,
            "worker": self.owner.uuid,
            "name": self.name,
            "kind": kind,
            "reason": reason,
            "traceback": trace,
        }
        self._log("failed", cell, kind=kind, reason=reason)
        try:
            attempts = (failure(self.store, cell) or {"attempts": []})["attempts"]
            tree = {"reason": reason, "kind": kind, "attempts": [*attempts, attempt][-10:]}
            self.store.write(f"{RUNS}/{cell.id}/{FAILED}", (json.dumps(tree, indent=1) + "\n").encode())
        except OSError as second:
            self._say(f"{cell.id}: {reason}; that could not be written down either: {second}")

    def _log(self, event: str, cell: Cell, **about: Any) -> None:
        row = {"event": event, "run": cell.id, "time": round(time.time(), 3), **about}
        try:
            self.store.append(f"logs/{self.name}.jsonl", (json.dumps(row) + "\n").encode())
        except OSError as error:
            self._say(f"{event} {cell.id}; the log cannot be written: {error}")

    def _say(self, text: str) -> None:
        print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _printing(self) -> Iterator[None]:
        """What a run prints goes to this worker's own file, beside its log, on this machine."""
        path = self.store.folder / "logs" / f"{self.name}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a", encoding="utf-8")
        except OSError as error:
            self._say(f"runs print here, for {path} cannot be written: {error}")
            yield
            return
        with file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            yield


def _groups(cells: Sequence[Cell], size: int) -> dict[str, list[Cell]]:
    """Runs by the group that they train in: cut once, so that a group that was killed is found again."""
    if size < 2:
        return {}
    keyed: dict[str, list[Cell]] = {}
    for cell in cells:
        if key := group_key(cell.config):
            keyed.setdefault(key, []).append(cell)
    parts = [same[i : i + size] for same in keyed.values() for i in range(0, len(same), size)]
    return {cell.id: part for part in parts for cell in part}


def _is_locked(path: Path) -> bool:
    """Whether a process works in the run directory, as far as its lock tells: on this machine, or on NFS."""
    if not (path / "run.lock").exists():
        return False
    try:
        with RunLock(path):
            return False
    except LockedError:
        return True


def _kind(error: BaseException) -> str:
    """'machine' if another machine may do better: its disk, its memory; 'run' if none will."""
    chain, link = [], error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    if any(isinstance(e, OSError | MemoryError) for e in chain) or "RESOURCE_EXHAUSTED" in str(error):
        return "machine"
    # Orbax tells of a full disk by ValueError, too, which the checkpointer hands on as the cause.
    return "machine" if isinstance(error, CheckpointError) and error.__cause__ is not None else "run"


def _brief(compilation: Any) -> dict[str, Any]:
    """Programs of a run that were compiled or read from the cache."""
    names = ("cache_hits", "cache_misses", "seconds")
    return {name: compilation[name] for name in names if name in compilation}
