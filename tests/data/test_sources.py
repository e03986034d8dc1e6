"""Every format gives the same documents, whole or in ranges; every kind of damage is named with its place."""

import gzip
import itertools
import json
from pathlib import Path

import pytest

from jaxlm.data import sources
from jaxlm.errors import UserError

from .conftest import TRICKY

DOCUMENTS = [*TRICKY, *(f"document {i} " + "x" * (i * 37 % 200) for i in range(300))]
FORMATS = ("a.jsonl", "a.json", "a.jsonl.gz", "a.ndjson.zst", "a.parquet", "a.arrayrecord")


def write(path: Path, texts: list[str], key: str = "text") -> None:
    """Write documents in the format that the suffix names."""
    lines = b"".join(json.dumps({"id": i, key: t}).encode() + b"\n" for i, t in enumerate(texts))
    if path.suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({key: texts}), path, row_group_size=50)
    elif path.suffix == ".arrayrecord":
        module = pytest.importorskip("array_record.python.array_record_module")
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        for line in lines.splitlines():
            writer.write(line)
        writer.close()
    elif path.suffix == ".gz":  # two members, as `cat a.gz b.gz` makes
        path.write_bytes(gzip.compress(lines[:1000]) + gzip.compress(lines[1000:]))
    elif path.suffix == ".zst":  # two frames
        compress = pytest.importorskip("zstandard").ZstdCompressor().compress
        path.write_bytes(compress(lines[:1000]) + compress(lines[1000:]))
    else:
        path.write_bytes(lines)


def texts_of(path: Path, key: str = "text", *place: int) -> list[str]:
    return [d.text for d in sources.iter_documents(path, key, *place)]


@pytest.mark.parametrize("name", FORMATS)
def test_formats_give_the_documents(tmp_path: Path, name: str):
    write(tmp_path / name, DOCUMENTS)
    assert texts_of(tmp_path / name) == DOCUMENTS
    write(tmp_path / name, DOCUMENTS, key="content")
    assert texts_of(tmp_path / name, "content") == DOCUMENTS


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("parts", [2, 7, 100])
def test_ranges_partition_the_documents(
    tmp_path: Path, name: str, parts: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sources, "_CHUNK", 997)  # lines and ranges cross the ends of reads
    write(tmp_path / name, DOCUMENTS)
    places = sources.extent(tmp_path / name, "text")
    bounds = [places * c // parts for c in range(parts + 1)]
    ranges = [texts_of(tmp_path / name, "text", a, b) for a, b in itertools.pairwise(bounds)]
    assert sum(map(bool, ranges)) > 1
    assert list(itertools.chain(*ranges)) == DOCUMENTS


def test_range_that_begins_exactly_at_a_line(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    write(path, ["one", "two", "three"])
    second = path.read_bytes().index(b"\n") + 1
    assert texts_of(path, "text", 0, second) == ["one"]
    assert texts_of(path, "text", second) == ["two", "three"]
    assert texts_of(path, "text", second + 1) == ["three"]


@pytest.mark.parametrize("name", ["a.txt", "noextension", "code.py", "a.txt.gz", "a.txt.zst"])
def test_text_is_one_document_byte_for_byte(tmp_path: Path, name: str):
    text = "\n".join(TRICKY)
    path = tmp_path / name
    data = text.encode()
    if name.endswith(".gz"):
        data = gzip.compress(data)
    elif name.endswith(".zst"):
        data = pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    path.write_bytes(data)
    assert texts_of(path) == [text]
    assert sources.extent(path, "text") == 1
    assert not sources.is_divisible(path)


def test_last_line_without_end_blank_lines_and_empty_documents(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n  \n{"text": ""}\n{"text": "b"}')
    assert texts_of(tmp_path / "a.jsonl") == ["a", "b"]
    (tmp_path / "empty.txt").write_text("")
    assert texts_of(tmp_path / "empty.txt") == []


def test_array_records_of_plain_text(tmp_path: Path):
    module = pytest.importorskip("array_record.python.array_record_module")
    path = tmp_path / "a.array_record"
    writer = module.ArrayRecordWriter(str(path), "group_size:4")
    for text in TRICKY:
        writer.write(text.encode())
    writer.close()
    assert texts_of(path, "") == list(TRICKY)
    with pytest.raises(UserError, match=r"record 0 is not JSON.*text_key=''"):
        texts_of(path)


def test_expand(tmp_path: Path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text("x")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "d.txt").write_text("y")

    def names(*globs: str) -> list[str]:
        return [p.name for p in sources.expand_files([str(tmp_path / g) for g in globs])]

    assert names("*.txt") == ["a.txt", "b.txt"]
    assert names("c.md", "*") == ["c.md", "a.txt", "b.txt"]  # in order of glob, each once
    assert names("**/*") == ["a.txt", "b.txt", "c.md", "d.txt"]
    assert [d.text for d in sources.iter_all(str(tmp_path / "**/*.txt"))] == ["x", "x", "y"]


def test_globs_without_files(tmp_path: Path):
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(UserError, match=r"no file matches '.*tran\.jsonl'.*did you mean 'train\.jsonl'"):
        sources.expand(str(tmp_path / "tran.jsonl"))
    with pytest.raises(UserError, match=r"holds train\.jsonl"):
        sources.expand(str(tmp_path / "*.parquet"))
    with pytest.raises(UserError, match=r"the folder '.*nowhere' does not exist"):
        sources.expand(str(tmp_path / "nowhere" / "*" / "*.txt"))
    with pytest.raises(UserError, match="empty glob"):
        sources.expand("")
    with pytest.raises(UserError, match="no input"):
        sources.expand([])
    with pytest.raises(UserError, match="is a folder: name its files"):
        sources.expand_files(str(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r":3 is not JSON"),
        (b"[1]", r":3 is not a JSON object but a list"),
        (b'{"txt": "a"}', r":3 has no key 'text' \(its keys: 'txt'\); did you mean 'txt'"),
        (b'{"text": 5}', r":3 has a int under 'text', not a string"),
        (b'{"text": "\xff"}', r":3 is not UTF-8"),
        (b'{"text": "\\ud800"}', r":3 holds half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str, packed: str):
    path = tmp_path / f"a.jsonl{packed}"
    data = b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n'
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(UserError, match=message) as error:
        texts_of(path)
    assert str(error.value).startswith(str(path))
    if not packed:  # the number of the line is that of the file, also in a range
        with pytest.raises(UserError, match=message):
            texts_of(path, "text", 14, 20)


def damaged(path: Path, how: str) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(
        {
            "cut": data[:middle],
            "flipped": data[:middle]
            + bytes(b ^ 0xFF for b in data[middle : middle + 64])
            + data[middle + 64 :],
            "other": b"this is something else " * 40,
            "empty": b"",
        }[how]
    )


@pytest.mark.parametrize("how", ["cut", "flipped", "other", "empty"])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrayrecord"])
def test_damaged_files_are_named(tmp_path: Path, name: str, how: str):
    path = tmp_path / name
    write(path, DOCUMENTS)
    damaged(path, how)
    if how == "empty" and ".jsonl" in name:
        assert texts_of(path) == []  # an empty stream is a stream without lines
        return
    with pytest.raises(UserError) as error:
        texts_of(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_cut_is_seen_where_no_line_is_torn(tmp_path: Path, packed: str):
    compress = (
        gzip.compress if packed == ".gz" else pytest.importorskip("zstandard").ZstdCompressor().compress
    )
    line = b'{"text": "a"}\n'
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(compress(line) + compress(line)[:-3])
    with pytest.raises(UserError, match="cut short"):
        texts_of(path)


def test_text_that_is_not_utf8(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"fine\nfine\nbad \xff\n")
    with pytest.raises(UserError, match=r"a\.txt:3 is not UTF-8: invalid start byte at byte 14"):
        texts_of(tmp_path / "a.txt")


def test_missing_file(tmp_path: Path):
    for name in ("a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrayrecord"):
        with pytest.raises(UserError, match=str(tmp_path / name)):
            texts_of(tmp_path / name)


def test_parquet_columns(tmp_path: Path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"content": ["a", None], "n": [1, 2]}), path)
    with pytest.raises(UserError, match=r"no column 'contents' .*did you mean 'content'"):
        texts_of(path, "contents")
    with pytest.raises(UserError, match="holds int64, not strings"):
        texts_of(path, "n")
    with pytest.raises(UserError, match="row 1: 'content' is null"):
        texts_of(path, "content")


@pytest.mark.parametrize(
    ("name", "module"),
    [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow"), ("a.arrayrecord", "array_record.python")],
)
def test_the_extra_is_named(tmp_path: Path, name: str, module: str, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / name, ["a"])
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UserError, match=r"jaxlm\[data\]"):
        texts_of(tmp_path / name)
