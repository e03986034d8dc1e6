"""Documents from files: plain text, JSON lines, tables, Parquet and ArrayRecord, found by glob.

| suffix | documents | place of a document |
|---|---|---|
| .jsonl .ndjson .json, also .gz, .zst | one JSON object a line, its `text_key` | byte of the line |
| .parquet | one row each, the column `text_key` | row |
| .arrayrecord .array_record | one record each: a JSON object, or UTF-8 text where `text_key` is '' | record |
| anything else, also .gz and .zst | the whole file, UTF-8 | 0 |

With two keys, 'en,de', every record gives two documents, an input and its target, neither of them empty:

| suffix | a pair | keys |
|---|---|---|
| .jsonl .parquet .arrayrecord | as above | two fields or columns |
| .csv .tsv, also .gz, .zst | one row of a table | two names in its first row, or numbers from 0: no head |
| anything else | a line, and the line of that number in the file beside | the second is its suffix, '.de' |

Places run over [0, extent(path)), so that a file can be cut into ranges that are read apart: a range holds
exactly the documents whose place lies in it.
"""

import csv
import glob as globbing
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.errors import UserError, check, nearest

_CHUNK = 1 << 20  # bytes read at once
_JSON = (".jsonl", ".ndjson", ".json")
_TABLES = {".csv": ",", ".tsv": "\t"}
_ARRAY_RECORD = (".arrayrecord", ".array_record")


class Document(NamedTuple):
    """One document and where it stands, for error messages."""

    text: str
    where: str  # 'file', 'file:line', 'file row 3' or 'file record 3'


def expand(globs: str | Sequence[str]) -> list[Path]:
    """The files and folders that the glob or globs match, in order of glob and then of name, each once.

    Raises:
        UserError: a glob matches nothing; the message names what is nearest to it.
    """
    found: dict[Path, None] = {}
    patterns = [globs] if isinstance(globs, str) else list(globs)
    check(bool(patterns), "no input: name a file or a glob such as 'corpus/*.txt'")
    for pattern in patterns:
        check(bool(pattern), "an empty glob matches nothing: name a file or a glob such as 'corpus/*.txt'")
        matches = sorted(globbing.glob(os.path.expanduser(pattern), recursive=True))
        if not matches:
            raise UserError(f"no file matches {pattern!r}{_near(pattern)}")
        found.update(dict.fromkeys(map(Path, matches)))
    return list(found)


def expand_files(globs: str | Sequence[str]) -> list[Path]:
    """The files that the glob or globs match; folders that `**` meets on the way are passed over.

    Raises:
        UserError: no file at all.
    """
    paths = expand(globs)
    files = [path for path in paths if not path.is_dir()]
    if not files:
        raise UserError(f"{str(paths[0])!r} is a folder: name its files, such as {str(paths[0] / '*.txt')!r}")
    return files


def extent(path: Path, text_key: str) -> int:
    """The number of places of a file: unpacked bytes, rows, records, or 1 for a text file.

    The place of a compressed file's documents takes a pass over it.
    """
    kind, packed = _format(path)
    if kind == "json":
        return sum(map(len, _chunks(path, packed, 0))) if packed else path.stat().st_size
    if kind == "parquet":
        return _open_parquet(path, text_key).metadata.num_rows
    if kind == "array_record":
        return _open_array_record(path).num_records()
    return 1


def text_size(path: Path, text_key: str) -> int:
    """About how many bytes of text a file holds; good enough to cut work into even parts."""
    kind, packed = _format(path)
    if kind == "parquet":
        meta = _open_parquet(path, text_key).metadata
        groups = (meta.row_group(i) for i in range(meta.num_row_groups))
        return sum(
            group.column(c).total_uncompressed_size
            for group in groups
            for c in range(group.num_columns)
            if group.column(c).path_in_schema in text_key.split(",")
        )
    return path.stat().st_size * (4 if packed else 1)


def is_divisible(path: Path) -> bool:
    """Whether a file holds more than one document, so that it may be cut into ranges."""
    return _format(path)[0] != "text"


def is_packed(path: Path) -> bool:
    """Whether a range of the file is reached only by unpacking all that stands before it."""
    return _format(path)[1] != ""


def iter_documents(
    path: str | os.PathLike, text_key: str = "text", start: int = 0, stop: int | None = None
) -> Iterator[Document]:
    """The documents of one file whose place lies in [start, stop), in order.

    Empty ones are left out; of a pair neither may be empty.

    Args:
        path: the file; its suffix says what it is.
        text_key: the JSON field or Parquet column that holds the text, or two with a comma between them.
        start, stop: places, see the table above; stop None = to the end.

    Raises:
        UserError: the file is missing, corrupt, not UTF-8, or has no such key; the message names the file and
            place.
    """
    path = Path(path)
    kind, packed = _format(path)
    read = {
        "json": _read_json,
        "parquet": _read_parquet,
        "array_record": _read_array_record,
        "text": _read_text,
    }
    if "," not in text_key:
        return (document for document in read[kind](path, packed, text_key, start, stop) if document.text)
    if kind == "text":
        read["text"] = _read_table if _delimiter(path) else _read_aligned
    return map(_not_empty, read[kind](path, packed, text_key, start, stop))


def _not_empty(document: Document) -> Document:
    check(bool(document.text), f"{document.where}: one half of the pair is empty; remove the pair")
    return document


def parts(path: Path, text_key: str) -> list[Path]:
    """The files that one input is made of: itself, and the one beside it that holds its targets.

    Raises:
        UserError: there is none beside it.
    """
    kind, packed = _format(path)
    if "," not in text_key or kind != "text" or _delimiter(path):
        return [path]
    suffix = text_key.split(",")[1]
    check(
        suffix.startswith("."),
        f"{path} is plain text: its targets are the lines of a file beside it, named by a suffix such as "
        f"'.de', not by a field {suffix!r}",
    )
    beside = Path(str(path).removesuffix(packed)).with_suffix(suffix)
    beside = beside.with_name(beside.name + packed)
    if not beside.is_file():
        raise UserError(
            f"{path} has no file {beside.name!r} beside it{nearest(beside.name, _names(path.parent))}"
        )
    return [path, beside]


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def iter_all(globs: str | Sequence[str], text_key: str = "text") -> Iterator[Document]:
    """The documents of every file that the globs match."""
    for path in expand_files(globs):
        yield from iter_documents(path, text_key)


def _near(pattern: str) -> str:
    """What stands closest to a pattern that matched nothing."""
    folder = Path(os.path.expanduser(pattern)).parent
    while globbing.has_magic(str(folder)):
        folder = folder.parent
    if not folder.is_dir():
        return f"; the folder {str(folder)!r} does not exist"
    names = _names(folder)
    guess = nearest(Path(pattern).name, names)
    if guess:
        return f" in {str(folder)!r}{guess}"
    return (
        f"; {str(folder)!r} holds {', '.join(names[:3]) + (', ...' if len(names) > 3 else '') or 'nothing'}"
    )


def _format(path: Path) -> tuple[str, str]:
    """(json, parquet, array_record or text; '', '.gz' or '.zst')."""
    suffixes = [s.lower() for s in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in (".gz", ".zst") else ""
    last = suffixes[-1] if suffixes else ""
    if last in _JSON:
        return "json", packed
    if last == ".parquet" and not packed:
        return "parquet", ""
    if last in _ARRAY_RECORD and not packed:
        return "array_record", ""
    return "text", packed


def _chunks(path: Path, packed: str, start: int) -> Iterator[bytes]:
    """The unpacked bytes of a file from offset `start` on."""
    try:
        with open(path, "rb") as file:
            if not packed:
                file.seek(start)
                while chunk := file.read(_CHUNK):
                    yield chunk
                return
            for chunk in _unzstd(path, file) if packed == ".zst" else _gunzip(file):
                if start < len(chunk):
                    yield chunk[start:]
                start = max(0, start - len(chunk))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is corrupt or cut short: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _gunzip(file: Any) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file, mode="rb") as unzipped:
        while chunk := unzipped.read(_CHUNK):
            yield chunk


def _unzstd(path: Path, file: Any) -> Iterator[bytes]:
    """Every frame of a .zst file; the library's stream reader would not notice that a file is cut short."""
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path}: reading .zst needs the extra `pip install 'jaxlm[data]'`") from error
    # Frames of `zstd --long=31` need the largest window.
    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, fed = unpacker.decompressobj(), False
    try:
        while data := file.read(_CHUNK):
            while data:
                out = frame.decompress(data)
                if out:
                    yield out
                fed, data = not frame.eof, frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = unpacker.decompressobj()
    except zstandard.ZstdError as error:
        raise UserError(f"{path} is corrupt: {error}") from error
    if fed:
        raise UserError(f"{path} is cut short: its last zstd frame has no end")


def _read_text(path: Path, packed: str, text_key: str, start: int, stop: int | None) -> Iterator[Document]:
    if start > 0 or stop == 0:
        return
    data = b"".join(_chunks(path, packed, 0))
    try:
        yield Document(data.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line} is not UTF-8: {error.reason} at byte {error.start}") from error


def _whole(path: Path, packed: str) -> str:
    """The text of a whole file."""
    return next(_read_text(path, packed, "", 0, None)).text


def _read_aligned(path: Path, packed: str, text_key: str, start: int, stop: int | None) -> Iterator[Document]:
    if start > 0 or stop == 0:
        return
    files = parts(path, text_key)
    texts = [_whole(file, packed).removesuffix("\n").split("\n") for file in files]
    if len(texts[0]) != len(texts[1]):
        counts = " but ".join(
            f"{file} has {len(lines)} lines" for file, lines in zip(files, texts, strict=True)
        )
        raise UserError(f"{counts}: line n of one must be line n of the other")
    for number, pair in enumerate(zip(*texts, strict=True), 1):
        for file, text in zip(files, pair, strict=True):
            yield Document(text.removesuffix("\r"), f"{file}:{number}")


def _delimiter(path: Path) -> str:
    """What stands between the columns of a table; '' if the file is none."""
    return next((_TABLES[s] for s in (s.lower() for s in path.suffixes[-2:]) if s in _TABLES), "")


def _read_table(path: Path, packed: str, text_key: str, start: int, stop: int | None) -> Iterator[Document]:
    if start > 0 or stop == 0:
        return
    keys = text_key.split(",")
    plain = dict(quoting=csv.QUOTE_NONE) if _delimiter(path) == "\t" else {}
    rows = csv.reader(io.StringIO(_whole(path, packed), newline=""), delimiter=_delimiter(path), **plain)
    if all(key.isdigit() for key in keys):
        columns = [int(key) for key in keys]
    else:
        head = next(rows, [])
        missing = next((key for key in keys if key not in head), None)
        if missing is not None:
            names = ", ".join(map(repr, head[:8]))
            raise UserError(
                f"{path} has no column {missing!r} (its first row: {names}){nearest(missing, head)}; "
                "name two of them, or give numbers from 0 if there is no head"
            )
        columns = [head.index(key) for key in keys]
    for row in filter(None, rows):
        where = f"{path}:{rows.line_num}"
        check(max(columns) < len(row), f"{where} has {len(row)} columns, not {max(columns) + 1}")
        yield from (Document(row[column], where) for column in columns)


def _read_json(path: Path, packed: str, text_key: str, start: int, stop: int | None) -> Iterator[Document]:
    for offset, line in _lines(path, packed, start, stop):
        if not line.strip():
            continue
        try:
            texts = _fields(json.loads(line), text_key)
        except ValueError as error:  # JSON, UTF-8 and the messages of _field
            number = _line_number(path, packed, offset)
            raise UserError(f"{path}:{number} {_json_fault(error)}") from error
        for text in texts:
            yield Document(text, f"{path} at byte {offset}")


def _lines(path: Path, packed: str, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that begin in [start, stop)."""
    # One byte early: the line that begins at `start` is known by the line end before it.
    offset = max(start - 1, 0)
    skip = start > 0
    rest = b""
    for chunk in _chunks(path, packed, offset):
        lines = (rest + chunk).split(b"\n")
        rest = lines.pop()
        for line in lines:
            if stop is not None and offset >= stop:
                return
            if not skip:
                yield offset, line
            skip = False
            offset += len(line) + 1
        if stop is not None and offset >= stop:
            return
    if rest and not skip and (stop is None or offset < stop):
        yield offset, rest


def _line_number(path: Path, packed: str, offset: int) -> int:
    """The number, from 1, of the line that begins at `offset`."""
    number, seen = 1, 0
    for chunk in _chunks(path, packed, 0):
        number += chunk[: max(offset - seen, 0)].count(b"\n")
        seen += len(chunk)
        if seen >= offset:
            break
    return number


def _fields(record: Any, text_key: str) -> list[str]:
    """The text of a JSON record, or its two texts, of which the second may be a number: a label."""
    first, *second = text_key.split(",")
    texts = [_field(record, first)]
    for key in second:
        label = record.get(key)
        texts.append(str(label) if type(label) is int else _field(record, key))
    return texts


def _field(record: Any, text_key: str) -> str:
    """The text of a JSON record; a ValueError says what is wrong with it."""
    if not isinstance(record, dict):
        raise UserError(f"is not a JSON object but a {type(record).__name__}")
    if text_key not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise UserError(
            f"has no key {text_key!r} (its keys: {keys}){nearest(text_key, record)}; set text_key"
        )
    text = record[text_key]
    if not isinstance(text, str):
        raise UserError(f"has a {type(text).__name__} under {text_key!r}, not a string")
    text.encode()  # a lone surrogate has no UTF-8 form
    return text


def _json_fault(error: ValueError) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, UnicodeEncodeError):
        return "holds half of a surrogate pair, which has no UTF-8 form"
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8: {error.reason} at byte {error.start} of the line"
    return f"is not JSON: {error}"


def _open_parquet(path: Path, text_key: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading Parquet needs the extra `pip install 'jaxlm[data]'`") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from error
    names = file.schema_arrow.names
    for key in text_key.split(","):
        if key not in names:
            raise UserError(
                f"{path} has no column {key!r} (its columns: {', '.join(names)}){nearest(key, names)}"
            )
        kind = file.schema_arrow.field(key).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise UserError(f"{path}: column {key!r} holds {kind}, not strings")
    return file


def _read_parquet(path: Path, packed: str, text_key: str, start: int, stop: int | None) -> Iterator[Document]:
    file = _open_parquet(path, text_key)
    import pyarrow

    keys = text_key.split(",")
    first = 0  # row where the group begins
    for g in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(g).num_rows
        if first + rows > start and (stop is None or first < stop):
            row = first
            try:
                for batch in file.iter_batches(batch_size=1024, row_groups=[g], columns=keys):
                    for texts in zip(*(batch.column(key).to_pylist() for key in keys), strict=True):
                        if row >= start and (stop is None or row < stop):
                            for key, text in zip(keys, texts, strict=True):
                                if text is None:
                                    raise UserError(f"{path} row {row}: {key!r} is null")
                                yield Document(text, f"{path} row {row}")
                        row += 1
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path} is corrupt near row {row}: {error}") from error
        first += rows


def _open_array_record(path: Path) -> Any:
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise UserError(f"{path}: reading ArrayRecord needs the extra `pip install 'jaxlm[data]'`") from error
    try:
        # Without this buffer setting the reader would start a read-ahead thread, which a range does not need.
        reader = array_record_module.ArrayRecordReader(str(path), options="readahead_buffer_size:0")
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{path} is not a readable ArrayRecord file: {error}") from error
    # No records is also what the library makes of a file that is not one, or is cut short.
    if reader.num_records() == 0:
        raise UserError(f"{path} is not an ArrayRecord file, or is cut short: it holds no records")
    return reader


def _read_array_record(
    path: Path, packed: str, text_key: str, start: int, stop: int | None
) -> Iterator[Document]:
    reader = _open_array_record(path)
    stop = min(reader.num_records(), reader.num_records() if stop is None else stop)
    for first in range(start, stop, 256):
        try:
            records = reader.read(first, min(first + 256, stop))
        except (RuntimeError, IndexError) as error:
            raise UserError(f"{path} is corrupt near record {first}: {error}") from error
        for number, record in enumerate(records, first):
            try:
                texts = _fields(json.loads(record), text_key) if text_key else [record.decode()]
            except ValueError as error:
                hint = "" if isinstance(error, UserError) else "; set text_key='' for records of plain text"
                raise UserError(f"{path} record {number} {_json_fault(error)}{hint}") from error
            yield from (Document(text, f"{path} record {number}") for text in texts)
