"""Text to token shards: on all cores, resumable after a kill at any time, and divisible over machines.

The inputs are cut into work units, and each unit becomes one shard. The cut depends on the inputs alone, so
every run and every machine makes the same plan and byte-identical shards, and a unit is done exactly when its
sidecar exists. Nobody coordinates: machine i of n takes units i, i + n, ..., and whoever finds all of them
done writes index.json.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data import shards, sources
from jaxlm.data.tokenizer import Tokenizer, load_tokenizer
from jaxlm.errors import UserError, check

SHARD_TOKENS = 1 << 24
_BYTES_PER_TOKEN = 4  # of a subword tokenizer, for cutting the inputs; a shard's true count differs
_PACKED_CUTS = (
    16  # ranges of one compressed file at most: each is reached by unpacking all that stands before it
)
_WHOLE_DIGEST = 8 << 20  # a file up to this size is fingerprinted by all of its content
_BATCH_CHARACTERS = 1 << 20  # text that is tokenised at once

Progress = Callable[
    [int, int, int, int], None
]  # units done, units of this machine, tokens, bytes of this call


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a call of `prepare` did."""

    out_dir: Path
    units: int  # of all machines
    done: int  # units that this call did; the others were there, or are another machine's
    complete: bool  # index.json is written
    tokens: int  # of all finished units, EOS included
    documents: int
    bytes: int  # UTF-8 bytes of their text


def prepare(
    inputs: str | Sequence[str],
    out_dir: str | os.PathLike,
    tokenizer_spec: str,
    *,
    text_key: str = "text",
    shard_tokens: int = SHARD_TOKENS,
    workers: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
    progress: Progress | None = None,
) -> Prepared:
    """Tokenise the files that `inputs` match into token shards under `out_dir`.

    Run it again after any interruption: only what is missing is done. Resident memory is about one batch of
    text and its tokens for each worker, plus the largest document.

    Args:
        inputs: glob or globs, see `sources` for the formats.
        out_dir: folder of the shards; made if missing.
        tokenizer_spec: see `load_tokenizer`.
        text_key: JSON field or Parquet column of the text; two with a comma between them for pairs, which
            become every other document.
        shard_tokens: about how many tokens a shard should hold, at 4 bytes of text per token (1 for 'byte').
            A document is never divided.
        workers: processes; 0 = one per core. They import neither JAX nor the caller's main module.
        shard_index, shard_count: this call does units shard_index, shard_index + shard_count, ...
        progress: called as progress(done, units, tokens, bytes) for this call, after each unit.

    Raises:
        UserError: bad input or tokenizer, a folder prepared from other inputs or with other settings, or a
            disk that is full or cannot be written.
    """
    check(shard_tokens > 0, f"shard_tokens={shard_tokens} must be positive")
    check(
        0 <= shard_index < shard_count, f"shard_index={shard_index} is not in [0, shard_count={shard_count})"
    )
    check(workers >= 0, f"workers={workers} must be 0 (all cores) or more")
    tokenizer = load_tokenizer(tokenizer_spec)
    files = sources.expand_files(inputs)
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shards.remove_abandoned(folder)
    except OSError as error:
        raise shards.cannot_write(folder, error) from error
    plan = _agree_on_plan(folder, files, tokenizer, text_key, shard_tokens)
    names = shards.shard_names(len(plan["units"]))
    dtype = np.dtype(plan["dtype"])
    mine = range(shard_index, len(names), shard_count)
    todo = [u for u in mine if not shards.is_whole(folder, names[u], dtype)]
    job = {
        "folder": os.path.abspath(folder),
        "files": [os.path.abspath(f) for f in files],  # not resolved: the suffix of a link says what it is
        "tokenizer": tokenizer_spec if tokenizer_spec == "byte" else os.path.abspath(tokenizer_spec),
        "text_key": text_key,
    }
    count = min(workers or os.cpu_count() or 1, len(todo))
    results = _run_here(job, tokenizer, todo) if count <= 1 else _run_workers(job, todo, count)
    tokens = size = 0
    for done, entry in enumerate(results, 1):
        tokens, size = tokens + entry["tokens"], size + entry["bytes"]
        if progress is not None:
            progress(done, len(todo), tokens, size)
    return _finish(folder, plan, names, len(todo))


def plan_fingerprint(
    inputs: str | Sequence[str], tokenizer: Tokenizer, text_key: str, shard_tokens: int = SHARD_TOKENS
) -> str:
    """sha256 of what decides the shards: the content of the inputs, the tokenizer and the settings."""
    files = sources.expand_files(inputs)
    return hashlib.sha256(shards.dump_json(_identity(files, tokenizer, text_key, shard_tokens))).hexdigest()


def _identity(files: list[Path], tokenizer: Tokenizer, text_key: str, shard_tokens: int) -> dict[str, Any]:
    """All that decides the content of a prepared folder. No path in it: a corpus may move."""
    return {
        "version": shards.VERSION,
        "tokenizer": {
            "name": tokenizer.name if tokenizer.name == "byte" else Path(tokenizer.name).name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
        },
        "dtype": shards.token_dtype(tokenizer.vocab_size).str,
        "text_key": text_key,
        "shard_tokens": shard_tokens,
        "inputs": [_identify(part) for file in files for part in sources.parts(file, text_key)],
    }


def _identify(path: Path) -> dict[str, Any]:
    """Name, size and sha256 of a file; of a large one, of its time of change and three MiB of it."""
    try:
        stat = path.stat()
        if stat.st_size <= _WHOLE_DIGEST:
            digest = shards.file_sha256(path)
        else:
            samples = hashlib.sha256(str(stat.st_mtime_ns).encode())
            with open(path, "rb") as file:
                for start in (0, stat.st_size // 2, max(0, stat.st_size - (1 << 20))):
                    file.seek(start)
                    samples.update(file.read(1 << 20))
            digest = samples.hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return {"name": path.name, "size": stat.st_size, "digest": digest}


def _agree_on_plan(
    folder: Path, files: list[Path], tokenizer: Tokenizer, text_key: str, shard_tokens: int
) -> dict[str, Any]:
    """The plan in the folder, checked against this call's, or a new one.

    A plan is its identity and `units`: for each shard the [file, start, stop] ranges that it is made of.
    """
    identity = _identity(files, tokenizer, text_key, shard_tokens)
    path = folder / shards.PLAN
    if path.is_file():
        plan = shards.read_json(path)
        differences = _differences({k: v for k, v in plan.items() if k != "units"}, identity)
        if differences:
            listed = "; ".join(differences[:6]) + (
                f"; and {len(differences) - 6} more" if differences[6:] else ""
            )
            raise UserError(
                f"{folder} was prepared from something else ({listed}): choose another out_dir or delete it"
            )
        return plan
    plan = {**identity, "units": _cut(files, tokenizer, text_key, shard_tokens)}
    shards.write_atomic(path, shards.dump_json(plan))
    return plan


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two identities, in words: 'key: old -> new'."""
    out = []
    for key in ("text_key", "shard_tokens"):
        if old.get(key) != new[key]:
            out.append(f"{key}: {old.get(key)!r} -> {new[key]!r}")
    if old["tokenizer"]["fingerprint"] != new["tokenizer"]["fingerprint"]:
        was, now = ("{name} {fingerprint:.8}".format(**t["tokenizer"]) for t in (old, new))
        out.append(f"tokenizer: {was} -> {now}")
    was, now = ([(f["name"], f["size"], f["digest"]) for f in t["inputs"]] for t in (old, new))
    if was != now:
        gone, come = ({f[0] for f in a} - {f[0] for f in b} for a, b in ((was, now), (now, was)))
        out += [f"input gone: {name}" for name in sorted(gone)] + [
            f"input new: {name}" for name in sorted(come)
        ]
        out += [f"input changed: {f[0]}" for f in now if f not in was and f[0] not in come]
        if len(out) == 0:
            out.append("inputs: in another order")
    return out


def _cut(files: list[Path], tokenizer: Tokenizer, text_key: str, shard_tokens: int) -> list[list[list[int]]]:
    """Cut the inputs into units of about the same size; small files share one, large ones are divided."""
    unit_bytes = shard_tokens * (1 if tokenizer.name == "byte" else _BYTES_PER_TOKEN)
    units: list[list[list[int]]] = []
    open_unit: list[list[int]] = []
    filled = 0
    for number, path in enumerate(files):
        size = sources.text_size(path, text_key)
        if size >= unit_bytes and sources.is_divisible(path):
            places = sources.extent(path, text_key)
            if sources.is_packed(path):
                size = places  # the unpacked size is known by now
            cuts = max(1, round(size / unit_bytes))
            if sources.is_packed(path):
                cuts = min(cuts, _PACKED_CUTS)
            bounds = [places * c // cuts for c in range(cuts + 1)]
            units += [open_unit] if open_unit else []
            units += [[[number, low, high]] for low, high in itertools.pairwise(bounds)]
            open_unit, filled = [], 0
            continue
        if open_unit and filled + size > unit_bytes:
            units.append(open_unit)
            open_unit, filled = [], 0
        open_unit.append([number, 0, -1])
        filled += size
    return units + ([open_unit] if open_unit else [])


def _run_here(job: dict[str, Any], tokenizer: Tokenizer, units: list[int]) -> Iterator[dict[str, Any]]:
    plan = shards.read_json(Path(job["folder"]) / shards.PLAN)
    for unit in units:
        yield write_unit(job, plan, tokenizer, unit)


def _run_workers(job: dict[str, Any], units: list[int], count: int) -> Iterator[dict[str, Any]]:
    """Do the units in `count` processes; the sidecar of each as it is finished.

    Plain subprocesses and pipes, not a process pool: they start without the caller's main module and without
    JAX, and when the parent is killed they read the end of their pipe and stop instead of waiting for ever.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for unit in units:
        todo.put(unit)
    finished: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    package_root = str(Path(__file__).resolve().parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")])),
        "TOKENIZERS_PARALLELISM": "false",  # the processes are the parallelism
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "jaxlm.data.prepare"]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(count)
    ]
    threads = [threading.Thread(target=_feed, args=(p, job, todo, finished), daemon=True) for p in processes]
    for thread in threads:
        thread.start()
    try:
        for _ in units:
            result = finished.get()
            if "error" in result:
                raise UserError(result["error"])
            if "died" in result:
                raise RuntimeError(result["died"])
            yield result
    finally:
        for process in processes:
            process.kill()  # idle where all went well; a unit that is cut off leaves nothing visible
        for process, thread in zip(processes, threads, strict=True):
            process.wait()
            thread.join()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        shards.remove_abandoned(Path(job["folder"]))


def _feed(
    process: subprocess.Popen,
    job: dict[str, Any],
    todo: "queue.SimpleQueue[int]",
    finished: queue.SimpleQueue,
) -> None:
    """Hand units to one worker, one at a time, until there are none."""
    unit = None
    try:
        process.stdin.write(json.dumps(job) + "\n")
        while True:
            unit = todo.get_nowait()
            process.stdin.write(f"{unit}\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise BrokenPipeError
            finished.put(json.loads(line))
    except queue.Empty:
        return
    except (BrokenPipeError, ValueError):  # it died, or was killed because another failed
        code = process.wait()
        finished.put(
            {"died": f"a prepare worker ended with exit code {code} at unit {unit}; see its messages above"}
        )


def _serve() -> None:
    """The worker: a job on the first line of stdin, then one unit a line; one line of JSON out for each."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # ctrl-C reaches the whole group; the parent stops its workers
    job = json.loads(sys.stdin.readline())
    plan = shards.read_json(Path(job["folder"]) / shards.PLAN)
    tokenizer = load_tokenizer(job["tokenizer"])
    for line in sys.stdin:
        try:
            answer = write_unit(job, plan, tokenizer, int(line))
        except UserError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


def write_unit(job: dict[str, Any], plan: dict[str, Any], tokenizer: Tokenizer, unit: int) -> dict[str, Any]:
    """Make one shard; returns its sidecar."""
    folder = Path(job["folder"])
    name = shards.shard_names(len(plan["units"]))[unit]
    dtype = np.dtype(plan["dtype"])
    eos = np.array([tokenizer.eos_id], dtype)
    starts = [0]
    counted = {"tokens": 0, "documents": 0, "bytes": 0}
    digest = hashlib.sha256()
    paths = [folder / f"{name}.bin", folder / f"{name}.idx"]
    files = [shards.temporary(path) for path in paths]
    try:
        with open(files[0], "wb") as tokens, open(files[1], "wb") as index:
            for texts in _batches(_documents(job, plan["units"][unit])):
                for ids, text in zip(_encode(tokenizer, texts), texts, strict=True):
                    document = np.concatenate([ids.astype(dtype), eos]).tobytes()
                    tokens.write(document)
                    digest.update(document)
                    counted["tokens"] += len(ids) + 1
                    counted["bytes"] += len(text.text.encode())
                    starts.append(counted["tokens"])
            counted["documents"] = len(starts) - 1
            places = np.array(starts, "<i8").tobytes()
            index.write(places)
            for file in (tokens, index):
                file.flush()
                os.fsync(file.fileno())
        for file, path in zip(files, paths, strict=True):
            os.replace(file, path)
    except OSError as error:
        raise shards.cannot_write(paths[0], error) from error
    finally:
        for file in files:
            file.unlink(missing_ok=True)
    entry = {
        "version": shards.VERSION,
        "name": name,
        **counted,
        "sha256.bin": digest.hexdigest(),
        "sha256.idx": hashlib.sha256(places).hexdigest(),
    }
    shards.write_atomic(folder / f"{name}.json", shards.dump_json(entry))
    return entry


def _documents(job: dict[str, Any], ranges: list[list[int]]) -> Iterator[sources.Document]:
    for number, start, stop in ranges:
        yield from sources.iter_documents(
            job["files"][number], job["text_key"], start, None if stop < 0 else stop
        )


def _batches(documents: Iterator[sources.Document]) -> Iterator[list[sources.Document]]:
    """Lists of documents of about a MiB of text."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, documents: list[sources.Document]) -> list[np.ndarray]:
    try:
        return tokenizer.encode_batch([d.text for d in documents])
    except UserError:
        for document in documents:  # find the one at fault
            try:
                tokenizer.encode(document.text)
            except UserError as error:
                raise UserError(f"{document.where}: {error}") from error
        raise


def _finish(folder: Path, plan: dict[str, Any], names: list[str], done: int) -> Prepared:
    """Count what is there, and write index.json once everything is."""
    dtype = np.dtype(plan["dtype"])
    entries = [shards.read_json(folder / f"{n}.json") for n in names if shards.is_whole(folder, n, dtype)]
    totals = {key: sum(e[key] for e in entries) for key in ("tokens", "documents", "bytes")}
    complete = len(entries) == len(names)
    if complete:
        files = ", ".join(file["name"] for file in plan["inputs"])
        check(totals["documents"] > 0, f"no documents in {files}: the input is empty")
        index = {k: v for k, v in plan.items() if k not in ("units", "inputs")}
        index = {**index, **totals, "shards": entries}
        data = shards.dump_json(index)
        path = folder / shards.INDEX
        if not path.is_file() or path.read_bytes() != data:
            shards.write_atomic(path, data)
    return Prepared(
        folder, len(names), done, complete, totals["tokens"], totals["documents"], totals["bytes"]
    )


if __name__ == "__main__":
    _serve()
