"""Claims: which worker trains which run, without a server and without comparing clocks.

claims/<run>.<generation>.json    who holds the run, and how often the holder has beaten since

A claim is taken by creating the file of the next generation, which only one worker can. It is never deleted:
the highest generation counts, so a worker that wakes from a long sleep cannot mistake another's claim for its
own, nor its own for a valid one. The holder rewrites its file every few seconds. Whoever looks on measures by
its own monotonic clock for how long the file's content has stayed the same; after `stale_after` seconds the
holder counts as gone. No time that another machine wrote is ever read. The holder, too, gives up when it
could not rewrite its file for half of that: before anybody else may take over.
"""

import dataclasses
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxlm.sweep.store import Store

FOLDER = "claims"


class ClaimLost(RuntimeError):
    """Another worker has taken the run over; this one must leave it as it is."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """One worker process, told apart from every other one that ever was."""

    uuid: str
    host: str
    machine: str  # boot and namespace within which process numbers mean something; '' = not known
    pid: int
    started: str  # when the process began, in ticks since the boot: numbers are used again

    def text(self) -> str:
        """For people."""
        return f"process {self.pid} on {self.host}"


def this_process() -> Owner:
    """The owner that this process is."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        machine = ""
    pid = os.getpid()
    return Owner(uuid.uuid4().hex, socket.gethostname(), machine, pid, _started(pid) or "")


def _started(pid: int) -> str | None:
    """Start time of a process of this machine; None if there is none of that number, or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def is_gone(owner: dict[str, Any], observer: Owner) -> bool:
    """Whether the claim's process is known to have ended: only for one of the observer's own machine."""
    same = observer.machine != "" and owner.get("machine") == observer.machine
    return same and _started(int(owner.get("pid", 0))) != owner.get("started")


@dataclasses.dataclass(frozen=True)
class Seen:
    """What an observer knows of a run's claim."""

    generation: int  # the newest one's; 0 = the run was never claimed
    state: str  # free | held | stale
    content: dict[str, Any]  # of the newest claim; {} if there is none or it is torn
    silent: float  # seconds for which it has not changed, by the observer's clock

    @property
    def owner(self) -> str:
        """The holder, for people."""
        return "process {pid} on {host}".format(**self.content) if self.content else "an unknown process"


class Claims:
    """The claims of one worker, and its view of the others'.

    Args:
        store: the sweep directory.
        owner: who claims.
        heartbeat: seconds between two renewals of the claims that are held.
        stale_after: seconds without a renewal after which a claim may be taken over.
        clock: monotonic seconds of this process.
    """

    def __init__(
        self,
        store: Store,
        owner: Owner,
        *,
        heartbeat: float = 5.0,
        stale_after: float = 90.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.owner = store, owner
        self.heartbeat, self.stale_after, self.clock = heartbeat, stale_after, clock
        self._seen: dict[str, tuple[int, bytes, float]] = {}  # run -> generation, content, since when
        self._held: dict[str, Claim] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def look(self, runs: Iterable[str]) -> dict[str, Seen]:
        """The state of each run's claim, as far as this worker has seen it."""
        newest: dict[str, int] = {}
        for name in self.store.names(FOLDER):
            run, _, rest = name.partition(".")
            generation = rest.removesuffix(".json")
            if generation.isdecimal():
                newest[run] = max(newest.get(run, 0), int(generation))
        return {run: self._observe(run, newest.get(run, 0)) for run in runs}

    def _observe(self, run: str, generation: int) -> Seen:
        data = self.store.read(_name(run, generation)) if generation else None
        if data is None:
            return Seen(0, "free", {}, 0.0)
        now, known = self.clock(), self._seen.get(run)
        if known is None or known[:2] != (generation, data):
            known = self._seen[run] = (generation, data, now)
        silent = now - known[2]
        try:
            content = json.loads(data)
        except ValueError:
            content = None
        if not _is_claim(content):
            content = {}  # being written, or its writer's disk was full, or damaged
        if content.get("state") == "released":
            state = "free"
        elif silent > self.stale_after or (content and is_gone(content, self.owner)):
            state = "stale"
        else:
            state = "held"
        return Seen(generation, state, content, silent)

    def take(self, run: str, seen: Seen, **about: Any) -> "Claim | None":
        """Claim a run that was seen free or stale; None if another worker was faster.

        Args:
            run: its name.
            seen: what `look` said of it.
            about: JSON values to keep in the claim.
        """
        claim = Claim(self, run, seen.generation + 1, about)
        if not self.store.create(_name(run, claim.generation), claim.content()):
            return None
        claim.renewed = self.clock()
        self._held[run] = claim
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)
            self._thread.start()
        return claim

    def _beat(self) -> None:
        while not self._ended.wait(self.heartbeat):
            for claim in list(self._held.values()):
                claim.renew()

    def forget(self, run: str) -> None:
        """Renew the claim of this run no longer."""
        self._held.pop(run, None)

    def close(self) -> None:
        """Stop renewing."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()


class Claim:
    """A run that this worker holds."""

    def __init__(self, claims: Claims, run: str, generation: int, about: dict[str, Any]) -> None:
        self.run, self.generation, self.renewed = run, generation, 0.0
        self._claims, self._about, self._beats, self._lost = claims, about, 0, ""
        self._lock = threading.Lock()

    def content(self, state: str = "held") -> bytes:
        """What the claim's file holds; `time` is for people only."""
        tree = {
            **self._about,
            **dataclasses.asdict(self._claims.owner),
            "run": self.run,
            "state": state,
            "beat": self._beats,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        return (json.dumps(tree) + "\n").encode()

    def renew(self, state: str = "held") -> bool:
        """Rewrite the claim's file; False if that was not possible, or the claim is lost."""
        store, name = self._claims.store, _name(self.run, self.generation)
        with self._lock:
            if self._lost:
                return False
            try:
                if store.read(_name(self.run, self.generation + 1)) is not None:
                    self._lost = "another worker has taken it over"
                    return False
                held = json.loads(store.read(name) or b"{}")
                held = held if _is_claim(held) else {"host": "nobody"}
                if held.get("uuid") != self._claims.owner.uuid:
                    self._lost = f"its claim now belongs to {held['host']}"
                    return False
                self._beats += 1
                store.write(name, self.content(state))
            except (OSError, ValueError) as error:
                # A network's hiccup, or a full disk: tried again at the next beat, until `check` gives up.
                print(f"WARNING: claim of {self.run}: {error}", file=sys.stderr, flush=True)
                return False
            self.renewed = self._claims.clock()
            return True

    def check(self, sure: bool = False) -> None:
        """Raise `ClaimLost` unless the claim is known to be this worker's.

        Args:
            sure: ask the store, and do not rely on the last heartbeat.
        """
        overdue = self._claims.clock() - self.renewed > self._claims.stale_after / 2
        if (sure or overdue) and not self.renew() and overdue and not self._lost:
            with self._lock:
                self._lost = f"it could not be renewed for {self._claims.stale_after / 2:.0f} seconds"
        if self._lost:
            raise ClaimLost(f"{self.run}: {self._lost}")

    def release(self) -> None:
        """Give the run back, if it is still this worker's."""
        self._claims.forget(self.run)
        self.renew("released")


def _is_claim(content: Any) -> bool:
    """Whether a claim's file holds what is read of it."""
    if not isinstance(content, dict):
        return False
    numbers = (content.get("pid"), content.get("step", 0), content.get("deaths", 0))
    return isinstance(content.get("host"), str) and all(isinstance(n, int) for n in numbers)


def _name(run: str, generation: int) -> str:
    return f"{FOLDER}/{run}.{generation}.json"
