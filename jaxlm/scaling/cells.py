"""Files of runs as columns: text split into cells, cells as numbers, and the remedy where a file is none."""

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxlm.errors import UserError, check

# Cells that say that there is no number, beside what float reads.
MISSING = frozenset(
    ("", "na", "n/a", "#n/a", "-", "--", "\N{EM DASH}", "\N{EN DASH}", "null", "none", "missing")
)
DELIMITERS = ",;\t|"
RULE = re.compile(r":?-+:?")  # a cell of the line below the header of a Markdown table
SUFFIXES = {"K": "e3", "M": "e6", "B": "e9", "G": "e9", "T": "e12", "%": "e-2"}  # as a number is written


def read_text(path: Path, content: bytes) -> tuple[dict[str, np.ndarray], np.ndarray | None, tuple[str, ...]]:
    """Columns, the line of each row (None in a JSON array), and the names that stand there twice."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"table {str(path)!r} is not text in UTF-8 (byte {error.start})") from None
    check("\0" not in text, f"table {str(path)!r} is not a CSV file: it holds zero bytes")
    first = text.lstrip()[:1]
    if first in ("{", "["):
        return _read_json(path, text)
    top = [line for line in text.splitlines()[:20] if line.strip()][:2]
    below = len(top) < 2 or any(number(cell) is not None for cell in re.split(r"[,;|\t]", top[1]))
    check(
        first != "#" or below,
        f"table {str(path)!r} begins with a comment: delete the lines with # above the header",
    )
    lines = _split(path, text, "\t" if ".tsv" in path.suffixes[-2:] else ",")
    check(bool(lines), f"table {str(path)!r} is empty")
    if len(lines[0][1]) == 1:
        other = max(DELIMITERS, key=lines[0][1][0].count)
        lines = _split(path, text, other) if other in lines[0][1][0] else lines
        if (
            other == "|"
            and len(lines) > 1
            and all(RULE.fullmatch(c.strip()) for c in lines[1][1] if c.strip())
        ):
            del lines[1]
    names = [name.strip() for name in lines[0][1]]
    check(
        not all(number(name) is not None for name in names),
        f"table {str(path)!r} has no header: its first line is {','.join(names)[:80]!r}",
    )
    for line, row in lines[1:]:
        check(
            len(row) == len(names),
            f"table {str(path)!r}, line {line}: {len(row)} cells under {len(names)} column names",
        )
    cells = [row for _, row in lines[1:]]
    twice = tuple(dict.fromkeys(name for name in names if name and names.count(name) > 1))
    columns = {
        name: _column([row[i] for row in cells]) for i, name in enumerate(names) if name and name not in twice
    }
    return columns, np.array([line for line, _ in lines[1:]], int), twice


def _read_json(path: Path, text: str) -> tuple[dict[str, np.ndarray], np.ndarray | None, tuple[str, ...]]:
    """Runs as an array of objects, one object a line, or one object of columns; objects within are a.b."""
    what = (
        f"table {str(path)!r} is JSON and no table: that is an array of objects, one object a line, or one "
        "object of columns. Of files of one run each, `pandas.json_normalize` of all makes one"
    )
    lines = None
    try:
        found = json.loads(text)
    except RecursionError:
        raise UserError(what) from None
    except ValueError:
        numbered = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        lines, found = np.array([i for i, _ in numbered], int), []
        for i, line in numbered:
            try:
                found.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise UserError(f"table {str(path)!r}, line {i}: not JSON: {error}") from None
    if isinstance(found, dict):
        keys = {tuple(v) for v in found.values() if isinstance(v, dict)}
        check(len(keys) <= 1, f"{what}; here the columns name other rows, or name them in another order")
        parts = [list(v.values()) if isinstance(v, dict) else v for v in found.values()]
        check(all(isinstance(v, list) and len(v) == len(parts[0]) for v in parts), what)
        check(not any(isinstance(cell, (list, dict)) for v in parts for cell in v), what)
        found = [dict(zip(found, row, strict=True)) for row in zip(*parts, strict=True)]
    check(isinstance(found, list) and all(isinstance(row, dict) for row in found), what)
    rows = [_flat(row) for row in found]
    names = dict.fromkeys(name for row in rows for name in row)
    check(bool(names), what)
    return {name: _column([row.get(name, "") for row in rows]) for name in names}, lines, ()


def _flat(row: Mapping, above: str = "") -> dict[str, str]:
    """
    >>> _flat({"a": {"b": 1.5, "c": None}, "d": "x"})
    {'a.b': '1.5', 'a.c': '', 'd': 'x'}
    """
    out: dict[str, str] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{above}{name}.")
        else:
            out[f"{above}{name}"] = "" if value is None else str(value)
    return out


def _split(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """(line number, cells) of every line that holds something; only line feeds and returns end a line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        return [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise UserError(f"table {str(path)!r} is not a CSV file: line {reader.line_num}: {error}") from None


def read_parquet(path: Path) -> dict[str, np.ndarray]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"table {str(path)!r} needs pyarrow: pip install 'jaxlm[data]', or use CSV") from None
    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"table {str(path)!r} is not a Parquet file: {error}") from None
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        columns[name] = _column(["" if cell is None else str(cell) for cell in column.to_pylist()])
    check(bool(columns), f"table {str(path)!r} has no columns")
    return columns


def number(cell: str) -> float | None:
    """The number in a cell, NaN if it says that there is none, None if it holds something else.

    >>> number("1e3"), number(" N/A "), number("diverged")
    (1000.0, nan, None)
    """
    try:
        return float(cell)
    except ValueError:
        return np.nan if cell.strip().lower() in MISSING else None


def suffixed(cell: str) -> float | None:
    """What a number with a suffix of SUFFIXES stands for; None if it is none.

    >>> suffixed("1.4B"), suffixed("70m"), suffixed("52 %"), suffixed("done")
    (1400000000.0, 70000000.0, 0.52, None)
    """
    cell = cell.strip()
    power = SUFFIXES.get(cell[-1:].upper())
    plain = cell[:-1].strip()
    digits = power is not None and plain[-1:].isdigit() and number(plain) is not None
    return float(f"{plain}{power}") if digits and "e" not in plain.lower() else None


def _column(cells: Sequence[str]) -> np.ndarray:
    """Numbers; text if a cell holds something else, or if words such as `none` are all that it holds."""
    stripped = [cell.strip() for cell in cells]
    values = [number(cell) for cell in stripped]
    words = any(stripped) and all(cell.lower() in MISSING for cell in stripped)
    if words or any(value is None for value in values):
        return np.array(stripped)
    return np.array(values, float)
