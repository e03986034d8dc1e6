"""Where a sweep lies: a folder that its workers share, on a local disk, on NFS or behind any fsspec URL.

Two things only are asked of it: exclusive creation of a file, and replacement of a whole one. Both are atomic
on local disks, on NFS since version 3, and in object stores that know conditional writes. Behind a URL, runs
train in a local scratch folder and are mirrored: what a reader finds there is always a whole checkpoint,
because its manifest is uploaded last.
"""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from jaxlm.errors import UserError
from jaxlm.train.checkpoint import MANIFEST, step_dirs

RUNS = "runs"
# Names inside a run directory that stay on the machine that trains.
_LOCAL_ONLY = ("run.lock", "write_probe")


class Store(Protocol):
    """A sweep directory; names are relative to it, with slashes."""

    url: str  # as the user gave it
    folder: Path  # where the runs of this machine train: the directory itself, or its scratch copy

    def read(self, name: str) -> bytes | None:
        """The file's bytes; None if it is not there."""

    def tail(self, name: str, size: int) -> bytes:
        """The last bytes of a file, `size` of them at most; b"" if it is not there."""

    def write(self, name: str, data: bytes) -> None:
        """Put a whole file in the place of what was there."""

    def create(self, name: str, data: bytes) -> bool:
        """Make a file, unless it is there: then False, and it stays as it is."""

    def append(self, name: str, line: bytes) -> None:
        """Add to a file that only this process writes."""

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""

    def names(self, folder: str) -> list[str]:
        """Sorted names of what a folder holds; [] if it is not there."""

    def pull(self, name: str) -> Path:
        """Bring a file or folder to `self.folder / name`, unless it is there already."""

    def pull_run(self, name: str) -> Path:
        """Bring a run directory (or a group's) here, if the shared one is further than the local one."""

    def push_run(self, name: str) -> None:
        """Bring what is new in a local run directory to the shared one."""


def open_store(workdir: str | Path, *, scratch: str | Path | None = None) -> Store:
    """The store of a sweep directory.

    Args:
        workdir: a path, or a URL that fsspec knows (`s3://bucket/sweep`, `gs://...`, `memory://...`).
        scratch: for URLs, the local folder to train in; default: one of a fixed name in the system's
            temporary folder, so that a restarted worker finds its data and programs again.

    Raises:
        UserError: a scheme that fsspec does not know, or fsspec or the scheme's own package is not installed.
    """
    url = str(workdir)
    if url.startswith("file://"):
        url = url.removeprefix("file://")
    if "://" not in url:
        return LocalStore(url, Path(url).absolute())
    try:
        import fsspec
    except ImportError as error:
        raise UserError(f"--workdir={url} needs the package fsspec: pip install 'jaxlm[remote]'") from error
    try:
        fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise UserError(f"--workdir={url}: {error}") from error
    if scratch is None:
        key = hashlib.sha256(url.encode()).hexdigest()[:12]
        scratch = Path(tempfile.gettempdir()) / f"jaxlm-{os.getuid()}" / key
    return RemoteStore(url, Path(scratch).absolute(), fs, root.rstrip("/"))


# --------------------------------------------------------------------------------------------------- a folder


@dataclasses.dataclass(frozen=True)
class LocalStore:
    """A folder of this machine's file system, NFS included."""

    url: str
    folder: Path

    def read(self, name: str) -> bytes | None:
        """See `Store`."""
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def tail(self, name: str, size: int) -> bytes:
        """See `Store`."""
        try:
            with (self.folder / name).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - size))
                return file.read()
        except FileNotFoundError:
            return b""

    def write(self, name: str, data: bytes) -> None:
        """See `Store`."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not the process's number: two machines may write here, and their numbers may be equal.
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            with part.open("wb") as file:
                _put(file, data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def create(self, name: str, data: bytes) -> bool:
        """See `Store`."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("xb") as file:
                _put(file, data)
        except FileExistsError:
            return False
        except OSError:
            path.unlink(missing_ok=True)  # a full disk takes names, but no bytes
            raise
        return True

    def append(self, name: str, line: bytes) -> None:
        """See `Store`."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            _put(file, line)

    def remove(self, name: str) -> None:
        """See `Store`."""
        (self.folder / name).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        """See `Store`."""
        try:
            return sorted(entry for entry in os.listdir(self.folder / folder) if not entry.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def pull(self, name: str) -> Path:
        """See `Store`."""
        return self.folder / name

    def pull_run(self, name: str) -> Path:
        """See `Store`."""
        return self.folder / name

    def push_run(self, name: str) -> None:
        """See `Store`: it is there already."""


def _put(file: Any, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------------------ a URL


@dataclasses.dataclass(frozen=True)
class RemoteStore:
    """Whatever fsspec reaches; runs train in a scratch folder and are mirrored."""

    url: str
    folder: Path
    fs: Any  # an fsspec file system
    root: str
    pushed: dict[Path, tuple[int, int]] = dataclasses.field(default_factory=dict)  # size, mtime when uploaded

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str) -> bytes | None:
        """See `Store`."""
        try:
            return self.fs.cat_file(self._at(name))
        except FileNotFoundError:
            return None

    def tail(self, name: str, size: int) -> bytes:
        """See `Store`."""
        try:
            whole = self.fs.size(self._at(name))
            return self.fs.cat_file(self._at(name), start=max(0, whole - size), end=whole)
        except FileNotFoundError:
            return b""

    def write(self, name: str, data: bytes) -> None:
        """See `Store`: an object is replaced whole."""
        self._make_parent(name)
        self.fs.pipe_file(self._at(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """See `Store`.

        Where the file system has no conditional write, fsspec looks before it writes, and two workers may
        both believe that they made the file; it holds what the later one wrote, which the other finds when
        it reads its claim again.
        """
        self._make_parent(name)
        try:
            self.fs.pipe_file(self._at(name), data, mode="create")
        except FileExistsError:
            return False
        return self.read(name) == data

    def append(self, name: str, line: bytes) -> None:
        """See `Store`: objects cannot grow, so the file is written again."""
        self.write(name, (self.read(name) or b"") + line)

    def remove(self, name: str) -> None:
        """See `Store`."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._at(name))

    def names(self, folder: str) -> list[str]:
        """See `Store`."""
        try:
            found = self.fs.ls(self._at(folder), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    def pull(self, name: str) -> Path:
        """See `Store`."""
        path = self.folder / name
        if not path.exists():
            # Beside the place first: a folder that is there is whole.
            part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
            part.parent.mkdir(parents=True, exist_ok=True)
            try:
                for file in self._files(name):
                    target = part / file if file else part
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self.fs.get_file(self._at(f"{name}/{file}" if file else name), str(target))
                if part.exists():
                    part.replace(path)
            finally:
                part.unlink(missing_ok=True) if part.is_file() else shutil.rmtree(part, ignore_errors=True)
        return path

    def pull_run(self, name: str) -> Path:
        """See `Store`."""
        path = self.folder / name
        here = max(step_dirs(path / "checkpoints"), default=-1)
        there = max(self._steps(name), default=-1)
        # Without metrics it is what a branch needed of its trunk, and not the whole run.
        whole = any((path / file).exists() for file in ("metrics.jsonl", "group.json"))
        if there > here or not whole:
            shutil.rmtree(path, ignore_errors=True)
            self.pull(name)
            # A checkpoint whose upload was cut off has no manifest, and is none.
            for step in step_dirs(path / "checkpoints").values():
                if not (step / MANIFEST).exists():
                    shutil.rmtree(step)
        return path

    def push_run(self, name: str) -> None:
        """See `Store`.

        Within a checkpoint the manifest goes last, and `result.json` after everything else.
        """
        path = self.folder / name
        for folder in step_dirs(path / "checkpoints").values():
            self._push_checkpoint(folder)
        for step in self._steps(name, finished=False):
            if step not in step_dirs(path / "checkpoints"):
                self.fs.rm(self._at(f"{name}/checkpoints/{_name(step)}"), recursive=True)
        rest = [file for file in _walk(path) if "checkpoints" not in file.relative_to(path).parts]
        for file in sorted(rest, key=lambda file: file.name == "result.json"):
            self._push(file)

    def _push_checkpoint(self, folder: Path) -> None:
        manifest = folder / MANIFEST
        try:
            for file in sorted(_walk(folder), key=lambda file: file == manifest):
                self._push(file, vanishes=True)
        except FileNotFoundError:
            pass  # the training has just deleted this checkpoint; what was uploaded goes with the next push

    def _push(self, file: Path, vanishes: bool = False) -> None:
        """Upload a file, unless its size and time are those of the last upload."""
        try:
            stat = file.stat()
            if self.pushed.get(file) != (stat.st_size, stat.st_mtime_ns):
                self.write(file.relative_to(self.folder).as_posix(), file.read_bytes())
                self.pushed[file] = (stat.st_size, stat.st_mtime_ns)
        except FileNotFoundError:
            if vanishes:
                raise

    def _steps(self, name: str, finished: bool = True) -> list[int]:
        """Steps of the mirrored checkpoints."""
        folder = f"{name}/checkpoints"
        steps = [int(name) for name in self.names(folder) if name.isdigit()]
        if not finished:
            return steps
        return [step for step in steps if MANIFEST in self.names(f"{folder}/{_name(step)}")]

    def _files(self, name: str) -> list[str]:
        """Files under a name, relative to it; '' for a file itself."""
        root = self._at(name)
        if self.fs.isfile(root):
            return [""]
        return [path.removeprefix(root).lstrip("/") for path in self.fs.find(root)]

    def _make_parent(self, name: str) -> None:
        self.fs.makedirs(self._at(name).rsplit("/", 1)[0], exist_ok=True)


def _name(step: int) -> str:
    return f"{step:08d}"


def _walk(folder: Path) -> Iterator[Path]:
    """Files of a folder that are to be mirrored: nothing half written, nothing of this machine alone."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and "tmp" not in name)
        for name in sorted(files):
            if not name.startswith(".") and name not in _LOCAL_ONLY:
                yield Path(root) / name
