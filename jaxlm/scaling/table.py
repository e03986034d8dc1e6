"""Tables of runs: reading, columns by role, filters, and a named rule for every row left out of a fit."""

import csv
import dataclasses
import gzip
import hashlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from jaxlm.errors import UserError, check, nearest
from jaxlm.scaling.cells import number, read_parquet, read_text, suffixed
from jaxlm.scaling.where import where_mask

# What our own collected table calls the roles; used where --columns does not say otherwise.
DEFAULTS = {"N": "n_total", "D": "tokens", "C": "flops_exact", "loss": "loss"}
EXTRAS = {"U": "unique_tokens", "epochs": "epochs", "budget": "budget", "seed": "seed", "lr": "lr"}
OURS = "config_hash"  # a column of our own tables: EXTRAS, `exclude` and `status` mean nothing in others
FLOPS = 6.0  # per parameter and token, of the identity C = 6 N D
# What a plain table is likely to call them: named in the message when a role is missing.
HINTS = {
    "N": ("params", "parameters", "n_params", "n"),
    "D": ("tokens", "train_tokens", "n_tokens", "d"),
    "C": ("flops", "train_flop", "train_flops", "flop", "c"),
    "loss": ("loss", "val_loss", "nll", "loss_nats"),
}
SHARES = ("sparsity", "accuracy", "error")  # roles whose values are shares of 1: 52% is read, 70M is not
COUNTS = ("N", "D", "C", "U")  # 70M is read, 52% is not
PLAIN = ("loss", "sigma", "lr")  # neither: a sigma of 5% may be of the loss, a rate of 3m may be milli


@dataclasses.dataclass(frozen=True)
class Points:
    """What a fit sees: arrays of one length, one entry per run."""

    N: Float64[np.ndarray, "R"]  # parameters, in the convention of the column that was chosen
    D: Float64[np.ndarray, "R"]  # training tokens
    C: Float64[np.ndarray, "R"]  # training FLOPs
    L: Float64[np.ndarray, "R"]  # loss, nats per token; NaN where a law fits another column
    sigma: Float64[np.ndarray, "R"] | None = None  # standard deviation of the fitted column; None: unweighted
    block: Int64[np.ndarray, "R"] | None = None  # labels of what is resampled together: size, trunk
    extra: Mapping[str, Float64[np.ndarray, "R"]] = dataclasses.field(default_factory=dict)  # U, lr, E, ...
    rows: Int64[np.ndarray, "R"] | None = None  # row of the source table, from 0; None: 0 .. R-1

    def __len__(self) -> int:
        return len(self.N)

    def take(self, index: np.ndarray) -> "Points":
        """The points at these positions (integers, repeats allowed, or a mask)."""
        return Points(
            N=self.N[index],
            D=self.D[index],
            C=self.C[index],
            L=self.L[index],
            sigma=None if self.sigma is None else self.sigma[index],
            block=None if self.block is None else self.block[index],
            extra={name: column[index] for name, column in self.extra.items()},
            rows=np.arange(len(self))[index] if self.rows is None else self.rows[index],
        )


@dataclasses.dataclass(frozen=True)
class Exclusion:
    """A row that the fit does not see, and why."""

    row: int  # of the source table, from 0
    rule: str  # value | status | where | drop_highest, or what the table's column `exclude` says
    detail: str  # what broke the rule


@dataclasses.dataclass(frozen=True)
class Table:
    """A file of runs: columns of numbers (float64) or, where a cell is none, of strings."""

    columns: dict[str, np.ndarray]
    path: str
    sha256: str  # of the file
    rows: np.ndarray  # row numbers in the file, from 0 at the first below the header
    lines: np.ndarray | None = None  # line of the file that each row ends on, from 1; None of Parquet
    twice: tuple[str, ...] = ()  # columns that the file has twice: none of them can be told from the other

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, position: int) -> str:
        """Where in the file a reader finds the row at this position."""
        return f"row {self.rows[position] + 1}" if self.lines is None else f"line {self.lines[position]}"

    def require(self, column: str, asked: str) -> None:
        """`UserError` unless the table has this column, once."""
        check(column not in self.twice, f"{asked}: table {self.path!r} has the column {column!r} twice")
        if column not in self.columns:
            close = nearest(column, self.columns)
            raise UserError(
                f"{asked}: table {self.path!r} has no column {column!r}{close}"
                + ("" if close else f"; it has {', '.join(self.columns)}")
            )


def read_table(path: str | Path) -> Table:
    """Reads a .csv, .tsv, .json or .jsonl file, packed by gzip or not, or a .parquet file.

    Text is separated by tabs in .tsv, else by commas, or by what else its first line holds of `; tab |` if it
    holds no comma; what begins with a brace or a bracket is JSON. Cells that say in a usual way that there is
    no number (MISSING) are NaN in a column of numbers. Columns without a name are not read.

    Raises:
      UserError: it cannot be read, or is no table: packed otherwise, JSON of another form, no header, no
        rows, a row of another length.
    """
    path = Path(path)
    check(path.is_file(), f"table {str(path)!r} is not a file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"table {str(path)!r} cannot be read: {error.strerror}") from None
    digest = hashlib.sha256(content).hexdigest()
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"table {str(path)!r} cannot be unpacked: {error}") from None
    packed = content.startswith((b"PK\x03\x04", b"BZh"))
    check(not packed, f"table {str(path)!r} is packed: unpack it first (unzip; a workbook: save as CSV)")
    if path.suffix == ".parquet" or content[:4] == b"PAR1":
        columns, lines, twice = read_parquet(path), None, ()
    else:
        columns, lines, twice = read_text(path, content)
    count = len(next(iter(columns.values()))) if lines is None else len(lines)
    check(count > 0, f"table {str(path)!r} has a header and no rows")
    return Table(columns, str(path), digest, np.arange(count), lines, twice)


def parse_columns(text: str) -> dict[str, str]:
    """Role -> column, from `N=params_b*1e9,loss=loss_nats`; a name with a comma goes in quotes.

    >>> parse_columns('loss=loss_nats, "N=params, total"')
    {'loss': 'loss_nats', 'N': 'params, total'}
    """
    out: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in next(csv.reader([text], skipinitialspace=True), []))):
        role, equals, column = (piece.strip() for piece in part.partition("="))
        check(
            bool(role and equals and column),
            f"--columns: {part!r} is not ROLE=COLUMN, such as N=params; one whose name holds a comma goes in "
            'quotes, "N=params, total"',
        )
        role = "loss" if role == "L" else role
        check(role not in out, f"--columns: role {role!r} is given twice")
        out[role] = column
    return out


def resolve(table: Table, columns: Mapping[str, str]) -> dict[str, str]:
    """Role -> column of the table: what is asked for, and what our own tables call the rest.

    A role of N, D, C that is not asked for is looked up only where none of the three is: a foreign table
    whose tokens column happens to be called as ours must not change what `N=..,C=..` means. EXTRAS are looked
    up in our own tables alone: a foreign `budget` may be in dollars, and an `lr` say `auto`.
    """
    out = dict(columns)
    for role, column in columns.items():
        name = column if role == "block" else scaled(table, column)[0]  # labels are not multiplied
        table.require(name, f"--columns={role}={column}")
    ours = OURS in table.columns
    known = ours or not {"N", "D", "C"} & set(columns)
    for role, column in (DEFAULTS | (EXTRAS if ours else {})).items():
        if role not in out and column in table.columns and (known or role == "loss"):
            out[role] = column
    return out


def scaled(table: Table, text: str) -> tuple[str, float]:
    """The column that `--columns` names and its factor: `gflops*1e9`, unless that is a column's name."""
    column, star, factor = (part.strip() for part in text.rpartition("*"))
    named = text in table.columns or text in table.twice
    if not star or named or (value := number(factor)) is None or not 0 < value < np.inf:
        return text, 1.0
    return column, value


def _numeric(
    table: Table, role: str, name: str, notes: list[str]
) -> tuple[Float64[np.ndarray, "R"], np.ndarray]:
    """A column as numbers, and the positions of cells that are none and do not say so; both are NaN.

    Numbers with a suffix that the role takes are read, with a note. `name` may hold a factor, see `scaled`.
    """
    column, factor = scaled(table, name)
    values = table.columns[column]
    if values.dtype.kind == "f":
        return values if factor == 1 else values * factor, np.zeros(0, int)
    read = [number(cell) for cell in values]
    sized = [i for i, value in enumerate(read) if value is None and _suffix_fits(role, values[i])]
    if sized:
        first = str(values[sized[0]])
        check(
            factor == 1,
            f"--columns={role}={name}: column {column!r} has {first!r}, and a suffix does not go together "
            "with a factor: write such cells out, or leave the factor away",
        )
        small = [str(values[i]) for i, value in enumerate(read) if i not in sized and 0 < (value or 0) < 1e3]
        check(
            role not in COUNTS or not small,
            f"table {table.path!r}, column {column!r}: {', '.join(small[:1])} beside {first}: in which unit? "
            "Give every cell a suffix, or none",
        )
        for i in sized:
            read[i] = suffixed(values[i])
        notes.append(
            f"column {column!r}: {len(sized)} cells such as {first!r} are read as "
            f"{read[sized[0]]:g}; counts that are not rounded fit better"
        )
    odd = np.flatnonzero([value is None for value in read])
    return factor * np.array([np.nan if value is None else value for value in read], float), odd


def _suffix_fits(role: str, cell: str) -> bool:
    """Whether a cell is a number with a suffix that such a column may have."""
    if role in PLAIN or suffixed(cell) is None:
        return False
    percent = cell.strip().endswith("%")
    return role not in (COUNTS if percent else SHARES)


def _no_number(table: Table, role: str, column: str, position: int, all_odd: bool) -> UserError:
    """Names a cell that is no number, and what to do about it; `all_odd`: no cell of the column is one."""
    column, _ = scaled(table, column)
    cell = str(table.columns[column][position]).strip()
    hint = f"leave such rows out with --where='{role} >= 0', or empty the cell"
    if all_odd:
        hint = f"nor is any other cell of the column: name another for {role} in --columns"
    if "," in cell and number(cell.replace(",", "")) is not None:
        hint = "numbers are written without commas, as 1234.5"
    elif suffixed(cell) is not None:
        hint = f"a suffix is read in counts, % in {', '.join(SHARES)}; write the number out"
    return UserError(
        f"table {table.path!r}, {table.place(position)}, column {column!r}: {cell!r} is not a number; {hint}"
    )


def groups(table: Table, column: str) -> dict[str, Table]:
    """The table of each value of a column, in the order of first appearance."""
    table.require(column, f"--group={column}")
    labels = table.columns[column]
    names = [f"{label:.12g}" if labels.dtype.kind == "f" else str(label) for label in labels]
    out = {}
    for name in dict.fromkeys(names):
        index = np.flatnonzero(np.array(names) == name)
        part = {key: values[index] for key, values in table.columns.items()}
        lines = None if table.lines is None else table.lines[index]
        out[name or "empty"] = dataclasses.replace(table, columns=part, rows=table.rows[index], lines=lines)
    return out


def select(
    table: Table,
    columns: Mapping[str, str],
    *,
    where: str = "",
    drop_highest: int = 0,
    drop_status: bool = True,
    refuse: bool = True,
    needs: Sequence[str] = ("N", "D", "L"),
) -> tuple[Points, list[Exclusion], list[str]]:
    """The points of a table, the rows left out and why, and notes on what was derived.

    Args:
      table: what `read_table` returned.
      columns: role -> column; roles are N, D, C, loss, sigma, block and any extra (U, lr, batch, E, ...).
      where: an expression over columns and roles; rows for which it is false are left out.
      drop_highest: leaves out that many rows of highest loss, after every other rule.
      drop_status: leaves out rows that our own tables mark by `exclude` or `status`; in other tables the
        two are columns as any.
      refuse: whether a cell that is no number, or a sigma that is not positive, is an error; else its row
        is left out by the rule `value`.
      needs: the roles that the law reads or fits; a row needs finite positive values of all of them.

    Raises:
      UserError: a column or a role is missing, a cell is no number in a row that neither `where` nor a mark
        leaves out, nothing is left.
    """
    names = resolve(table, columns)
    notes: list[str] = []
    count = len(table)
    values, odd = {}, {}
    for role, column in names.items():
        if role != "block":
            values[role], odd[role] = _numeric(table, role, column, notes)
    if "loss" in values:
        values["L"] = values.pop("loss")
    _derive(values, needs, notes)
    if missing := [role for role in needs if role not in values]:
        raise _no_role(table, names, needs, missing)

    gone: dict[int, Exclusion] = {}

    def leave_out(position: int, rule: str, detail: str) -> None:
        if position not in gone:
            gone[position] = Exclusion(int(table.rows[position]), rule, detail)

    marked = drop_status and OURS in table.columns
    if drop_status and not marked and "exclude" in table.columns:
        notes.append(
            "the column exclude means nothing in a table that `jaxlm collect` did not write: use --where"
        )
    if marked and "exclude" in table.columns:
        marks = table.columns["exclude"]
        for i in np.flatnonzero(marks != "") if marks.dtype.kind == "U" else ():
            detail = table.columns.get("detail")
            leave_out(
                i, str(marks[i]), str(detail[i]) if detail is not None and detail.dtype.kind == "U" else ""
            )
    if marked and "finished" in (statuses := table.columns.get("status", np.array([""]))):
        for i in np.flatnonzero(statuses != "finished"):
            leave_out(i, "status", str(statuses[i]))
    mask = np.ones(count, bool)
    if where:
        # What --columns names comes first: `C<1e21` means the role even if another column is called C.
        derived = values | ({"loss": values["L"]} if "L" in values else {})
        own = [role for role, column in names.items() if role in columns or role == column]
        asked = {role: derived[role] for role in own if role != "block"}
        mask = where_mask(where, derived | table.columns | asked)
    for role, positions in odd.items():
        for i in positions:
            if mask[i] and i not in gone and refuse:
                raise _no_number(table, role, names[role], i, len(positions) == count)
            leave_out(i, *(("value", f"{role} is no number") if mask[i] else ("where", where)))
    weights = ["sigma"] if "sigma" in values and not refuse else []
    for role in dict.fromkeys([*needs, *weights]):
        v = values[role]
        if role in SHARES:
            large = [i for i in np.flatnonzero(v > 1) if mask[i] and i not in gone]
            if large:
                raise UserError(
                    f"table {table.path!r}, {table.place(large[0])}: {role}={v[large[0]]:g} is above 1 (as "
                    f"in {len(large)} rows): {role} is read as a share, from 0 to 1. Divide percent by 100"
                )
        good = _is_good(role, v)
        for i in np.flatnonzero(~good):
            leave_out(i, "value", f"{role}={v[i]:g}")
    for i in np.flatnonzero(~mask):
        leave_out(i, "where", where)
    keep = np.array([i for i in range(count) if i not in gone], int)
    check(drop_highest >= 0, f"--drop_highest={drop_highest} must not be negative")
    if drop_highest:
        check("L" in values, "--drop_highest needs the role loss")
        for i in keep[np.argsort(values["L"][keep], kind="stable")[::-1][:drop_highest]]:
            leave_out(i, "drop_highest", f"loss={values['L'][i]:.6g}")
        keep = np.array([i for i in range(count) if i not in gone], int)
    if not len(keep):
        raise UserError(f"table {table.path!r}: none of {count} rows is left: {left_out(gone.values())}")
    _unread(table, values, names, needs, keep, notes)

    block = None
    if "block" in names:
        block = np.unique(table.columns[names["block"]], return_inverse=True)[1].astype(np.int64)[keep]
    nothing = np.full(count, np.nan)
    points = Points(
        N=values.get("N", nothing)[keep],
        D=values.get("D", nothing)[keep],
        C=values.get("C", nothing)[keep],
        L=values.get("L", nothing)[keep],
        sigma=values["sigma"][keep] if "sigma" in values else None,
        block=block,
        extra={r: v[keep] for r, v in values.items() if r not in ("N", "D", "C", "L", "sigma")},
        rows=table.rows[keep],
    )
    return points, [gone[i] for i in sorted(gone)], notes


def left_out(exclusions: Iterable[Exclusion]) -> str:
    """How many rows each rule left out, with the first that it did.

    >>> left_out([Exclusion(3, "value", "L=nan"), Exclusion(7, "value", "L=0")])
    "2 by the rule 'value' (row 4: L=nan)"
    """
    first: dict[str, Exclusion] = {}
    counts: dict[str, int] = {}
    for e in exclusions:
        first.setdefault(e.rule, e)
        counts[e.rule] = counts.get(e.rule, 0) + 1
    return ", ".join(
        f"{k} by the rule {rule!r} (row {first[rule].row + 1}: {first[rule].detail})"
        for rule, k in counts.items()
    )


def _is_good(role: str, v: np.ndarray) -> np.ndarray:
    """Where a value is one that a law can read: finite and positive, a sparsity from 0 to below 1."""
    return np.isfinite(v) & ((v > 0) if role != "sparsity" else (v >= 0) & (v < 1))


def _no_role(
    table: Table, names: Mapping[str, str], needs: Sequence[str], missing: Sequence[str]
) -> UserError:
    """Names the roles without a column, and a whole --columns that would do, where the names suggest one."""
    lower = {name.lower(): name for name in reversed(table.columns)}
    named = ["loss" if role == "L" else role for role in dict.fromkeys(needs)]
    found = {
        role: names.get(role) or next((lower[h] for h in HINTS.get(role, ()) if h in lower), "")
        for role in {**dict.fromkeys(named), **names, "C": None}
    }
    given = {role for role in ("N", "D", "C") if found[role]} if {"N", "D"} & set(named) else set()
    line = [role for role in found if found[role] and (role in names or role in named or role in given)]
    lacking = [role for role in named if not found[role] and not (role in "NDC" and len(given) == 2)]
    what = ", ".join("loss" if role == "L" else role for role in missing)
    text = f"the fit needs {what} and table {table.path!r} does not say which column it is"
    if line and not lacking:
        return UserError(text + ", such as --columns=" + ",".join(f"{role}={found[role]}" for role in line))
    return UserError(
        f"{text}: it has {', '.join(table.columns)}; name all of them, --columns="
        + ",".join(f"{role}={found[role] or '...'}" for role in dict.fromkeys([*line, *lacking]))
    )


def _unread(
    table: Table,
    values: dict[str, np.ndarray],
    names: Mapping[str, str],
    needs: Sequence[str],
    keep: np.ndarray,
    notes: list[str],
) -> None:
    """What the kept rows lack of columns that the fit does not need: filled in or left aside, with a note.

    C is filled in as k N D, k as in the rows that have it. A sigma that is not always positive is refused.
    """
    for role in ("N", "D", "C", "L", "sigma"):
        if role in needs or role not in values:
            continue
        bad = keep[~_is_good(role, values[role][keep])]
        if not len(bad):
            continue
        if role == "sigma":
            raise UserError(
                f"table {table.path!r}, {table.place(bad[0])}: sigma={values[role][bad[0]]:g}; {len(bad)} of "
                f"{len(keep)} rows have none that is positive. Fill it in, leave them out with "
                "--where='sigma > 0', or leave sigma out of --columns"
            )
        named = "loss" if role == "L" else role
        lack = (
            f"{len(bad)} of {len(keep)} rows have no {named} ({names.get(named, named)}), which the fit does "
        )
        rest = np.setdiff1d(keep, bad)
        if role == "C" and len(rest) and {"N", "D"} <= set(needs):
            known = np.log(values["C"][rest] / (values["N"][rest] * values["D"][rest]))
            k = float(np.exp(known.mean()))
            values["C"] = values["C"].copy()
            values["C"][bad] = k * values["N"][bad] * values["D"][bad]
            notes.append(f"{lack}not read: there C = {k:.6g} N D, as in the others on average")
        else:
            values[role] = np.full(len(table), np.nan)
            notes.append(f"{lack}not read: the column is left aside")


def _derive(values: dict[str, np.ndarray], needs: Sequence[str], notes: list[str]) -> None:
    """Adds the one of N, D, C that is missing from the identity C = 6 N D, and says so."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if "D" not in values and {"N", "C"} <= set(values):
            values["D"] = values["C"] / (FLOPS * values["N"])
            notes.append("--columns names no tokens: D = C/(6N)")
        elif "C" not in values and {"N", "D"} <= set(values):
            values["C"] = FLOPS * values["N"] * values["D"]
            notes.append("--columns names no FLOPs: C = 6ND")
        elif "N" not in values and {"C", "D"} <= set(values) and "N" in needs:
            values["N"] = values["C"] / (FLOPS * values["D"])
            notes.append("--columns names no parameters: N = C/(6D)")
