"""Token shards: the one form in which training reads text.

A prepared folder holds, for each shard, `NAME.bin` (the tokens, little-endian uint16 or uint32), `NAME.idx`
(where each document begins, and the end; int64) and `NAME.json` (counts and sha256 of both), and an
`index.json` that lists all shards once every one is there. A shard exists when its .json does: it is written
last.

Every document is stored as its tokens and one EOS. BOS is never stored: it is only ever an input, and packing
puts it in. So the tokens of a store are exactly its targets, and their count is the number of predictions in
one epoch.
"""

import functools
import hashlib
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from jaxlm.errors import UserError, check

VERSION = 1
INDEX = "index.json"
PLAN = "plan.json"
_VERIFY_BELOW = 1 << 30  # bytes of a store up to which its checksums are computed whenever it is opened
_OPEN_SHARDS = 128  # memory maps kept open at once by one store (each holds a file descriptor)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smaller of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a crash.

    Raises:
        UserError: the disk is full or cannot be written; nothing is left behind.
    """
    file = temporary(path)
    try:
        with open(file, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(file, path)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        file.unlink(missing_ok=True)


def temporary(path: Path) -> Path:
    """The name under which `path` is being written: it tells the host and process that own it."""
    return path.with_name(f".tmp-{socket.gethostname()}-{os.getpid()}-{path.name}")


def remove_abandoned(folder: Path) -> None:
    """Delete temporary files whose process, on this host, is gone."""
    prefix = f".tmp-{socket.gethostname()}-"
    for file in folder.glob(prefix + "*"):
        owner = file.name.removeprefix(prefix).split("-", 1)[0]
        if owner.isdigit() and not _alive(int(owner)):
            file.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # someone else's
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def cannot_write(path: Path, error: OSError) -> UserError:
    """The message for a full or unwritable disk."""
    return UserError(f"cannot write {path}: {error.strerror or error}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that this module wrote.

    Raises:
        UserError: it is missing or not one.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is corrupt: {error}") from error
    if not isinstance(value, dict) or value.get("version") != VERSION:
        raise UserError(f"{path} is not a file of token shards of version {VERSION}")
    return value


def dump_json(value: dict[str, Any]) -> bytes:
    """The bytes of a JSON file; the same value always gives the same bytes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


class Shard:
    """One shard, memory mapped.

    Attributes:
        tokens: uint16 or uint32 [number of tokens].
        starts: int64 [documents + 1], where each document begins; the last entry is the number of tokens.
    """

    def __init__(self, folder: Path, entry: dict[str, Any], dtype: np.dtype):
        base = folder / entry["name"]
        # An empty file cannot be mapped; np.asarray leaves the map but not the slower indexing of np.memmap.
        mapped = np.memmap(f"{base}.bin", dtype, "r") if entry["tokens"] else np.zeros(0, dtype)
        self.tokens = np.asarray(mapped)
        self.starts = np.asarray(np.memmap(f"{base}.idx", "<i8", "r"))


def is_whole(folder: Path, name: str, dtype: np.dtype) -> bool:
    """Whether a shard's sidecar is there and its files have the sizes that it states."""
    if not (folder / f"{name}.json").is_file():
        return False
    try:
        check_shard(folder, read_json(folder / f"{name}.json"), dtype, verify=False)
    except UserError:
        return False
    return True


def check_shard(folder: Path, entry: dict[str, Any], dtype: np.dtype, verify: bool) -> None:
    """Raise `UserError`, naming the file, unless both files of a shard are whole.

    Args:
        entry: the shard's line of index.json.
        verify: compute their sha256 too, not only compare sizes.
    """
    expected = {".bin": entry["tokens"] * dtype.itemsize, ".idx": (entry["documents"] + 1) * 8}
    for suffix, size in expected.items():
        path = folder / (entry["name"] + suffix)
        try:
            found = path.stat().st_size
        except OSError as error:
            raise UserError(f"shard {path} cannot be read: {error.strerror}") from error
        if found != size:
            raise UserError(
                f"shard {path} is corrupt: it has {found} bytes, not {size}; prepare again to rebuild it"
            )
        if verify and file_sha256(path) != entry["sha256" + suffix]:
            raise UserError(
                f"shard {path} is corrupt: its sha256 is not the one that was written; delete "
                f"{path.with_suffix('.json')} and prepare again to rebuild it"
            )


def file_sha256(path: Path) -> str:
    """sha256 of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenStore:
    """The tokens of one or more prepared folders as a single long array of documents.

    Opening costs O(shards); nothing is read until it is asked for, and resident memory is the page cache's to
    reclaim.

    Attributes:
        num_tokens: tokens, which are the targets, EOS included.
        num_documents: documents.
        num_bytes: UTF-8 bytes of the text.
        text_keys: with which key each folder was prepared; with a comma in it, documents come in pairs.
        fingerprint: sha256 of the content (every shard's sha256, in order) and of the tokenizer's.
    """

    def __init__(self, folders: Sequence[Path], *, verify: bool | None = None):
        """Open prepared folders.

        Args:
            folders: each with an index.json.
            verify: compute checksums; None = where all shards together are below 1 GiB. Sizes are always
                compared.

        Raises:
            UserError: a folder is not prepared to the end, was made with another tokenizer, or a shard is
                corrupt.
        """
        indexes = [(folder, _read_index(folder)) for folder in folders]
        first = indexes[0][1]
        self.tokenizer: dict[str, Any] = first["tokenizer"]
        for folder, index in indexes:
            if index["tokenizer"]["fingerprint"] != self.tokenizer["fingerprint"]:
                raise UserError(
                    f"{folder} was prepared with tokenizer {index['tokenizer']['name']!r}, but {folders[0]} "
                    f"with {self.tokenizer['name']!r}"
                )
        self.text_keys = tuple(index.get("text_key", "") for _, index in indexes)
        self.dtype = np.dtype(first["dtype"])
        self._shards = [(folder, entry) for folder, index in indexes for entry in index["shards"]]
        total = sum(entry["tokens"] for _, entry in self._shards) * self.dtype.itemsize
        for folder, entry in self._shards:
            check_shard(folder, entry, self.dtype, total < _VERIFY_BELOW if verify is None else verify)
        self._token_ends = np.cumsum([entry["tokens"] for _, entry in self._shards], dtype=np.int64)
        self._document_ends = np.cumsum([entry["documents"] for _, entry in self._shards], dtype=np.int64)
        self.num_tokens = int(self._token_ends[-1])
        self.num_documents = int(self._document_ends[-1])
        self.num_bytes = sum(entry["bytes"] for _, entry in self._shards)
        if self.num_tokens == 0:
            raise UserError(f"{', '.join(map(str, folders))} holds no documents")
        digest = hashlib.sha256(self.tokenizer["fingerprint"].encode())
        for _, entry in self._shards:
            digest.update((entry["sha256.bin"] + entry["sha256.idx"]).encode())
        self.fingerprint = digest.hexdigest()
        self._open = functools.lru_cache(_OPEN_SHARDS)(self._map)

    def _map(self, number: int) -> Shard:
        folder, entry = self._shards[number]
        return Shard(folder, entry, self.dtype)

    def read(self, start: int, stop: int) -> Integer[np.ndarray, "n"]:
        """Tokens [start, stop), across shards; a view where they lie in one."""
        number = int(np.searchsorted(self._token_ends, start, side="right"))
        parts = []
        while start < stop:
            end = int(self._token_ends[number])
            tokens = self._open(number).tokens
            offset = end - len(tokens)
            parts.append(tokens[start - offset : min(stop, end) - offset])
            start, number = end, number + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0, self.dtype)

    def starts_between(self, start: int, stop: int) -> Int[np.ndarray, "n"]:
        """The places in [start, stop) at which a document begins."""
        number = int(np.searchsorted(self._token_ends, start, side="right"))
        parts = []
        while start < stop:
            end = int(self._token_ends[number])
            shard = self._open(number)
            offset = end - len(shard.tokens)
            low, high = np.searchsorted(shard.starts, (start - offset, min(stop, end) - offset))
            parts.append(shard.starts[low:high] + offset)
            start, number = end, number + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def document_starts(self) -> Int[np.ndarray, "documents+1"]:
        """Where every document begins, and the number of tokens; 8 bytes per document, in memory."""
        parts = [np.zeros(1, np.int64)]
        for number in range(len(self._shards)):
            shard = self._open(number)
            parts.append(shard.starts[1:] + (self._token_ends[number] - len(shard.tokens)))
        return np.concatenate(parts)


def _read_index(folder: Path) -> dict[str, Any]:
    """index.json of a prepared folder."""
    if not (folder / INDEX).is_file():
        if (folder / PLAN).is_file():
            plan = read_json(folder / PLAN)
            done = sum((folder / f"{name}.json").is_file() for name in shard_names(len(plan["units"])))
            raise UserError(
                f"{folder} is prepared only in part ({done} of {len(plan['units'])} shards): "
                "run prepare again to finish it"
            )
        raise UserError(f"{folder} is not a folder of token shards: it has no {INDEX}")
    index = read_json(folder / INDEX)
    check(bool(index["shards"]), f"{folder / INDEX} lists no shards")
    return index


def shard_names(count: int) -> list[str]:
    """The names of a folder's shards, in order."""
    return [f"shard-{i:05d}-of-{count:05d}" for i in range(count)]
