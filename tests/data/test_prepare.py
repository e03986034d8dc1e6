"""Shards: every token of every document, the same bytes however the work is divided or interrupted."""

import gzip
import hashlib
import itertools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from jaxlm.data import prepare as prepare_module
from jaxlm.data import shards
from jaxlm.data.prepare import prepare
from jaxlm.data.shards import TokenStore
from jaxlm.data.sources import iter_all
from jaxlm.data.tokenizer import ByteTokenizer, load_tokenizer, train_sentencepiece
from jaxlm.errors import UserError

from .conftest import words

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder, hidden ones too, by sha256."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def documents_of(store: TokenStore) -> list[str]:
    starts = store.document_starts()
    return [ByteTokenizer().decode(store.read(a, b)) for a, b in itertools.pairwise(starts.tolist())]


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two JSON lines files of 60 kB, one of them packed."""
    folder = tmp_path_factory.mktemp("jsonl")
    rng = np.random.default_rng(5)
    for name in ("a.jsonl", "b.jsonl.gz"):
        lines = "".join(json.dumps({"text": words(rng, int(n))}) + "\n" for n in rng.integers(1, 60, 400))
        data = lines.encode()
        (folder / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    return str(folder / "*.jsonl*")


def test_store_holds_every_document_in_order(corpus: Path, store: TokenStore):
    texts = [d.text for d in iter_all(str(corpus / "*.txt"))]
    assert documents_of(store) == texts
    assert store.num_documents == len(texts)
    assert store.num_bytes == sum(len(t.encode()) for t in texts)
    assert store.num_tokens == store.num_bytes + len(texts)
    whole = store.read(0, store.num_tokens)
    assert whole.dtype == np.uint16
    np.testing.assert_array_equal(np.flatnonzero(whole == 0) + 1, store.document_starts()[1:])


def test_reads_across_shards(store: TokenStore):
    whole = store.read(0, store.num_tokens)
    starts = store.document_starts()
    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = sorted(rng.integers(0, store.num_tokens + 1, 2).tolist())
        np.testing.assert_array_equal(store.read(a, b), whole[a:b])
        np.testing.assert_array_equal(store.starts_between(a, b), starts[(starts >= a) & (starts < b)])


@pytest.mark.parametrize("size", [2_000, 20_000, 10**9])
def test_shard_size_does_not_change_the_content(jsonl: str, tmp_path: Path, size: int):
    done = prepare(jsonl, tmp_path / "out", "byte", shard_tokens=size, workers=1)
    assert done.complete
    assert (done.units == 1) == (size == 10**9)
    assert documents_of(TokenStore([tmp_path / "out"])) == [d.text for d in iter_all(jsonl)]


def test_workers_and_machines_give_the_same_bytes(jsonl: str, tmp_path: Path):
    one = prepare(jsonl, tmp_path / "one", "byte", shard_tokens=20_000, workers=1)
    assert one.units > 5
    prepare(jsonl, tmp_path / "two", "byte", shard_tokens=20_000, workers=2)
    calls = [
        prepare(
            jsonl, tmp_path / "split", "byte", shard_tokens=20_000, workers=1, shard_index=i, shard_count=3
        )
        for i in (2, 0, 1)
    ]
    assert [c.complete for c in calls] == [False, False, True]
    assert [c.done for c in calls] == [len(range(i, one.units, 3)) for i in (2, 0, 1)]
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "split")


def test_subword_tokenizer(jsonl: str, tmp_path: Path):
    spec = str(tmp_path / "bpe.model")
    tokenizer = train_sentencepiece((d.text for d in iter_all(jsonl)), spec, 400)
    prepare(jsonl, tmp_path / "out", spec, shard_tokens=5_000, workers=2)
    store = TokenStore([tmp_path / "out"])
    texts = [d.text for d in iter_all(jsonl)]
    starts = store.document_starts()
    for i in (0, 1, 399, 400, 799):
        tokens = store.read(int(starts[i]), int(starts[i + 1]))
        assert tokens[-1] == tokenizer.eos_id
        assert tokenizer.decode(tokens[:-1]) == texts[i]
    assert tokenizer.token_bytes[store.read(0, store.num_tokens)].sum() == store.num_bytes


def test_progress_and_second_call_does_nothing(jsonl: str, tmp_path: Path):
    seen = []
    first = prepare(
        jsonl, tmp_path / "out", "byte", shard_tokens=20_000, workers=2, progress=lambda *a: seen.append(a)
    )
    assert [s[0] for s in seen] == list(range(1, first.units + 1))
    assert seen[-1] == (first.units, first.units, first.tokens, first.bytes)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    again = prepare(jsonl, tmp_path / "out", "byte", shard_tokens=20_000, workers=2)
    assert (again.done, again.complete, again.tokens) == (0, True, first.tokens)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}


def test_workers_import_neither_jax_nor_the_main_module():
    code = "import sys, jaxlm.data.prepare; print(sorted({'jax', 'grain', 'flax'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def start_prepare(inputs: str, out: Path) -> subprocess.Popen:
    """A process that prepares slowly enough to be killed in the middle."""
    code = f"""
        import time
        from jaxlm.data.prepare import prepare
        slow = lambda *_: time.sleep(0.05)
        prepare({inputs!r}, {str(out)!r}, "byte", shard_tokens=4000, workers=2, progress=slow)
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT)


def test_killed_at_any_time_it_goes_on_where_it_was(jsonl: str, tmp_path: Path):
    whole = prepare(jsonl, tmp_path / "whole", "byte", shard_tokens=4000, workers=1)
    out = tmp_path / "out"
    process = start_prepare(jsonl, out)
    deadline = time.monotonic() + 60
    while len(list(out.glob("shard-*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.3)  # the workers read the end of their pipe
    finished = {p.name: p.stat().st_mtime_ns for p in out.glob("shard-*.json")}
    assert 3 <= len(finished) < whole.units
    assert not (out / "index.json").exists()
    with pytest.raises(
        UserError, match=rf"prepared only in part \({len(finished)} of {whole.units} shards\)"
    ):
        TokenStore([out])
    # What a kill in the middle of a write leaves: a file of a dead process, and a shard without its sidecar.
    (out / f".tmp-{socket.gethostname()}-{process.pid}-x.bin").write_bytes(b"half")
    missing = next(n for n in shards.shard_names(whole.units) if f"{n}.json" not in finished)
    (out / f"{missing}.bin").write_bytes(b"half")
    again = prepare(jsonl, out, "byte", shard_tokens=4000, workers=1)
    assert again.done == whole.units - len(finished)
    assert {n: (out / n).stat().st_mtime_ns for n in finished} == finished
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_killed_again_and_again(jsonl: str, tmp_path: Path):
    prepare(jsonl, tmp_path / "whole", "byte", shard_tokens=4000, workers=1)
    left_over = []
    for seconds in np.random.default_rng(0).uniform(0.3, 2.5, 6):
        process = start_prepare(jsonl, tmp_path / "out")
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        left_over.append(len(list((tmp_path / "out").glob("*.json"))))
    assert left_over == sorted(left_over)
    assert left_over[-1] > 0
    time.sleep(1)  # workers of a killed parent may still be at their last unit
    prepare(jsonl, tmp_path / "out", "byte", shard_tokens=4000, workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_at_once_do_not_harm_each_other(jsonl: str, tmp_path: Path):
    processes = [start_prepare(jsonl, tmp_path / "out") for _ in range(2)]
    assert [p.wait() for p in processes] == [0, 0]
    prepare(jsonl, tmp_path / "whole", "byte", shard_tokens=4000, workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_of_something_else_is_refused_with_the_difference(corpus: Path, tmp_path: Path):
    inputs = tmp_path / "in"
    inputs.mkdir()
    for name in ("1.txt", "2.txt", "3.txt"):
        (inputs / name).write_bytes((corpus / name).read_bytes())
    out = tmp_path / "out"
    prepare(str(inputs / "*"), out, "byte", workers=1)
    train_sentencepiece([(corpus / "1.txt").read_text()], tmp_path / "bpe.model", 300)
    with pytest.raises(UserError, match=r"tokenizer: byte \w{8} -> bpe.model \w{8}"):
        prepare(str(inputs / "*"), out, str(tmp_path / "bpe.model"), workers=1)
    with pytest.raises(UserError, match="shard_tokens: 16777216 -> 99"):
        prepare(str(inputs / "*"), out, "byte", shard_tokens=99, workers=1)
    (inputs / "2.txt").write_text("changed")
    (inputs / "3.txt").rename(inputs / "4.txt")
    with pytest.raises(UserError, match=r"input gone: 3.txt; input new: 4.txt; input changed: 2.txt"):
        prepare(str(inputs / "*"), out, "byte", workers=1)


def test_large_inputs_are_told_apart_by_time_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prepare_module, "_WHOLE_DIGEST", 10)
    path = tmp_path / "a.txt"
    path.write_text("x" * 1000)
    first = prepare_module.plan_fingerprint(str(path), ByteTokenizer(), "text")
    assert prepare_module.plan_fingerprint(str(path), ByteTokenizer(), "text") == first
    os.utime(path, ns=(1, 1))
    assert prepare_module.plan_fingerprint(str(path), ByteTokenizer(), "text") != first


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_documents_are_named_and_leave_nothing_half_written(jsonl: str, tmp_path: Path, workers: int):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n' * 500 + '{"text": "a\\u0000b"}\n')
    with pytest.raises(UserError, match=r"bad.jsonl at byte 8500: the text holds a NUL"):
        prepare([str(bad), jsonl], tmp_path / "out", "byte", shard_tokens=4000, workers=workers)
    assert not list((tmp_path / "out").glob(".tmp*"))
    assert not (tmp_path / "out" / "index.json").exists()


def test_links_and_empty_documents(tmp_path: Path):
    """A link is read as what its own name says (caches link to nameless blobs), and shards may be empty."""
    empty = '{"text": ""}\n' * 300
    (tmp_path / "blob").write_text('{"text": "one"}\n' + empty + '{"text": "two"}\n')
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "blob")
    made = prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", "byte", shard_tokens=1000, workers=2)
    assert (made.units, made.documents, made.tokens) == (4, 2, 8)
    store = TokenStore([tmp_path / "out"])
    assert documents_of(store) == ["one", "two"]
    assert store.starts_between(0, 8).tolist() == [0, 4]
    assert store.starts_between(1, 5).tolist() == [4]
    (tmp_path / "blob").unlink()
    with pytest.raises(UserError, match=r"cannot read .*a\.jsonl: No such file"):
        prepare(str(tmp_path / "*.jsonl"), tmp_path / "again", "byte")


def test_no_documents_at_all(tmp_path: Path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="no documents"):
        prepare(str(tmp_path / "a.txt"), tmp_path / "out", "byte", workers=1)


@pytest.fixture
def prepared(jsonl: str, tmp_path: Path) -> Path:
    prepare(jsonl, tmp_path / "out", "byte", shard_tokens=20_000, workers=1)
    return tmp_path / "out"


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_corrupt_shards_are_named(prepared: Path, jsonl: str, suffix: str):
    before = contents(prepared)
    path = sorted(prepared.glob(f"*{suffix}"))[1]
    data = path.read_bytes()
    path.write_bytes(data[:-8])
    with pytest.raises(UserError, match=rf"{path} is corrupt: it has {len(data) - 8} bytes, not {len(data)}"):
        TokenStore([prepared], verify=False)
    path.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
    with pytest.raises(UserError, match=rf"{path} is corrupt: its sha256"):
        TokenStore([prepared])  # a small store is always verified
    with pytest.raises(UserError, match="sha256"):
        TokenStore([prepared], verify=True)
    path.unlink()
    with pytest.raises(UserError, match=rf"{path} cannot be read"):
        TokenStore([prepared], verify=False)
    prepare(jsonl, prepared, "byte", shard_tokens=20_000, workers=1)  # mends what is missing or cut short
    assert contents(prepared) == before


def test_checksums_of_large_stores_only_on_request(prepared: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "_VERIFY_BELOW", 10)
    path = sorted(prepared.glob("*.bin"))[0]
    data = path.read_bytes()
    path.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
    TokenStore([prepared])
    with pytest.raises(UserError, match="sha256"):
        TokenStore([prepared], verify=True)


def test_corrupt_index(prepared: Path):
    (prepared / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index.json is corrupt"):
        TokenStore([prepared])
    (prepared / "index.json").write_text('{"version": 99}')
    with pytest.raises(UserError, match="not a file of token shards of version 1"):
        TokenStore([prepared])


def test_unwritable_folder(corpus: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/out: Not a directory"):
        prepare(str(corpus / "*"), tmp_path / "file" / "out", "byte")
    with pytest.raises(UserError, match="cannot write /proc/out"):
        prepare(str(corpus / "*"), "/proc/out", "byte")


def test_full_disk(corpus: Path, tmp_path: Path):
    """A limit on the size of files stands for a full disk: the write fails half-way, in the system."""
    code = f"""
        import resource
        from jaxlm.data.prepare import prepare
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        prepare({str(corpus / "*")!r}, {str(tmp_path / "out")!r}, "byte", workers=1)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True
    )
    assert out.stderr.strip().splitlines()[-1].endswith("shard-00000-of-00001.bin: File too large")
    assert "UserError: cannot write" in out.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["plan.json"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert prepare(str(corpus / "*"), tmp_path / "out", "byte", workers=1).complete  # with room it goes on


def test_a_worker_that_dies_is_an_error(jsonl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="a prepare worker ended with exit code 1"):
        prepare(jsonl, tmp_path / "out", "byte", shard_tokens=4000, workers=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard_index": 3, "shard_count": 3}, r"shard_index=3 is not in \[0, shard_count=3\)"),
        ({"shard_tokens": 0}, "shard_tokens=0 must be positive"),
        ({"workers": -1}, "workers=-1"),
        ({"text_key": "txt"}, "did you mean"),
    ],
)
def test_bad_settings(jsonl: str, tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        prepare(jsonl, tmp_path / "out", "byte", **settings)


def test_stores_of_two_tokenizers_do_not_mix(prepared: Path, jsonl: str, tmp_path: Path):
    spec = str(tmp_path / "bpe.model")
    train_sentencepiece((d.text for d in iter_all(jsonl)), spec, 300)
    prepare(jsonl, tmp_path / "bpe", spec, workers=1)
    assert load_tokenizer(spec).fingerprint != ByteTokenizer.fingerprint
    with pytest.raises(UserError, match=r"was prepared with tokenizer 'bpe\.model', but .* with 'byte'"):
        TokenStore([prepared, tmp_path / "bpe"])


def test_one_store_of_two_folders(prepared: Path, corpus: Path, tmp_path: Path):
    prepare(str(corpus / "*"), tmp_path / "more", "byte", workers=1)
    both = TokenStore([prepared, tmp_path / "more"])
    assert documents_of(both) == [
        *documents_of(TokenStore([prepared])),
        *documents_of(TokenStore([tmp_path / "more"])),
    ]


def test_token_dtype():
    assert [shards.token_dtype(v) for v in (256, 65536, 65537)] == [np.uint16, np.uint16, np.uint32]
