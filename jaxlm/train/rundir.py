"""The run directory: one run, one writing process, one config; every file in it is whole.

config.json    {"config", "hash", "starts": [{"time", "git", "packages", ...}, ...]}
run.lock       held by the process that writes here
"""

import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "sentencepiece",
    "tokenizers",
)


def write_text(path: str | Path, text: str) -> None:
    """Write a file that a reader, or a crash, sees whole or not at all (a temporary file, then a rename)."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | Path, tree: Any) -> None:
    """`write_text` of indented JSON; NaN and infinity are refused."""
    write_text(path, json.dumps(tree, indent=2, allow_nan=False) + "\n")


def probe_writable(directory: str | Path, need_bytes: int = 0) -> Path:
    """Make `directory` and prove that it takes files, before any work is spent.

    Args:
        directory: made with its parents.
        need_bytes: free space that the work will need at least.

    Raises:
        UserError: it cannot be made or written, or its disk has less room.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "write_probe", "x" * 4096)
        (directory / "write_probe").unlink()
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}") from error
    if free < need_bytes:
        raise UserError(
            f"{directory}: the disk has {free / 1e9:.2f} GB free, "
            f"one checkpoint needs {need_bytes / 1e9:.2f} GB"
        )
    return directory


class LockedError(UserError):
    """Another process works in the run directory."""


class RunLock:
    """Held by the one process that may write in a run directory; freed by the kernel however it ends.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as path, RunLock(path):
    ...     RunLock(path).__enter__()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    jaxlm.train.rundir.LockedError: ... is in use by process ...
    """

    def __init__(self, directory: str | Path) -> None:
        self._path = Path(directory) / "run.lock"
        self._file: Any = None

    def __enter__(self) -> "RunLock":
        """Take the lock.

        Raises:
            LockedError: another process has it; the message names its pid and host.
        """
        file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "an unknown process"
            file.close()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"cannot lock {self._path}: {error.strerror}") from error
            raise LockedError(
                f"{self._path.parent} is in use by {holder}; wait for it or stop it first"
            ) from error
        file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on host {socket.gethostname()} since {started}\n")
        file.flush()
        self._file = file
        return self

    def __exit__(self, *exc: object) -> None:
        """Free the lock. The file stays: to unlink it would let two processes lock two files of one name."""
        self._file.truncate(0)
        self._file.close()
        self._file = None


def _git_commit() -> dict[str, Any] | None:
    """Commit of the source tree that this file lies in, and whether it differs from that commit."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ("git", *words), cwd=here, capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie inside somebody else's repository: only a tracked file says whose commit
    # it is.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": bool(changes)} if commit else None


def environment() -> dict[str, Any]:
    """What a run's numbers may depend on besides its config: commit, packages, Python, host, command."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "git": _git_commit(),
        "packages": packages,
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


# What a start that was refused before its first step may have left behind.
OWN_FILES = frozenset(
    {"run.lock", "config.json", "metrics.jsonl", "events", "checkpoints", "tokenizer", "failed.json"}
)


def open_run_dir(
    directory: str | Path,
    config: Mapping[str, Any],
    *,
    sha256: str,
    diff: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]],
) -> Path:
    """Make or reopen the directory of the run that `config` describes.

    Args:
        directory: the run directory.
        config: the resolved config, plain values.
        sha256: its hash; equal hashes are the same run.
        diff: `(old, new) -> lines`, to say what differs.

    Returns:
        The directory, with a `config.json` to which this start (environment) was added.

    Raises:
        UserError: not writable, another config's run lives here, or its `config.json` cannot be read.
    """
    directory = probe_writable(directory)
    path = directory / "config.json"
    if not path.exists():
        foreign = sorted(entry.name for entry in directory.iterdir() if entry.name not in OWN_FILES)
        if foreign:
            raise UserError(
                f"{directory} is not a run directory, but holds {foreign[0]!r}"
                f"{f' and {len(foreign) - 1} more' if foreign[1:] else ''}; choose an empty or a new one"
            )
    record: dict[str, Any] = {"config": dict(config), "hash": sha256, "starts": []}
    if path.exists():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            same, starts = old["hash"] == sha256, list(old["starts"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not the config of a run ({error!r}); choose another directory"
            ) from error
        if not same:
            lines = diff(old["config"], config) or ["(the same fields; the hashes differ)"]
            raise UserError(
                f"{directory} holds a run with another config; choose another directory, or go back:\n"
                + "\n".join(f"  {line}" for line in lines)
            )
        record = {**old, "starts": starts}
    record["starts"].append(environment())
    write_json(path, record)
    return directory
