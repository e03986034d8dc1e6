"""Tables of runs: reading, columns by role, filters, and a named rule for every row left out of a fit."""

import ast
import csv
import dataclasses
import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from jaxlm.errors import UserError, check, nearest

# What our own collected table calls the roles; used where --columns does not say otherwise.
DEFAULTS = {"N": "n_total", "D": "tokens", "C": "flops_exact", "loss": "loss"}
EXTRAS = {"U": "unique_tokens", "epochs": "epochs", "budget": "budget", "seed": "seed", "lr": "lr"}
FLOPS = 6.0  # per parameter and token, of the identity C = 6 N D
# What a plain table is likely to call them: named in the message when a role is missing.
HINTS = {"N": ("params", "n"), "D": ("tokens", "d"), "C": ("flops", "train_flop"), "loss": ("loss", "nll")}


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

    def __len__(self) -> int:
        return len(self.rows)


def read_table(path: str | Path) -> Table:
    """Reads a .csv, .tsv or .parquet file.

    Raises:
      UserError: it cannot be read, or is no table: no header, a name twice, a row of another length.
    """
    path = Path(path)
    check(path.is_file(), f"table {str(path)!r} is not a file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"table {str(path)!r} cannot be read: {error.strerror}") from None
    digest = hashlib.sha256(content).hexdigest()
    if path.suffix == ".parquet" or content[:4] == b"PAR1":
        columns = _read_parquet(path)
    else:
        columns = _read_csv(path, content)
    count = len(next(iter(columns.values())))
    check(count > 0, f"table {str(path)!r} has a header and no rows")
    return Table(columns, str(path), digest, np.arange(count))


def _read_csv(path: Path, content: bytes) -> dict[str, np.ndarray]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"table {str(path)!r} is not text in UTF-8 (byte {error.start})") from None
    check("\0" not in text, f"table {str(path)!r} is not a CSV file: it holds zero bytes")
    delimiter = "\t" if path.suffix == ".tsv" else ","
    reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
    try:
        lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise UserError(f"table {str(path)!r} is not a CSV file: line {reader.line_num}: {error}") from None
    check(bool(lines), f"table {str(path)!r} is empty")
    names = [name.strip() for name in lines[0][1]]
    for i, name in enumerate(names):
        check(name not in names[:i], f"table {str(path)!r} has the column {name!r} twice")
    check(
        not all(_number(name) is not None for name in names),
        f"table {str(path)!r} has no header: its first line is {','.join(names)[:80]!r}",
    )
    for number, row in lines[1:]:
        check(
            len(row) == len(names),
            f"table {str(path)!r}, line {number}: {len(row)} cells under {len(names)} column names",
        )
    cells = [row for _, row in lines[1:]]
    return {name: _column([row[i] for row in cells]) for i, name in enumerate(names) if name}


def _read_parquet(path: Path) -> dict[str, np.ndarray]:
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


def _number(cell: str) -> float | None:
    """The number in a cell, NaN if it is empty, None if it holds something else."""
    if not cell.strip():
        return np.nan
    try:
        return float(cell)
    except ValueError:
        return None


def _column(cells: Sequence[str]) -> np.ndarray:
    numbers = [_number(cell) for cell in cells]
    if any(number is None for number in numbers):
        return np.array([cell.strip() for cell in cells])
    return np.array(numbers, float)


def parse_columns(text: str) -> dict[str, str]:
    """Role -> column, from `N=params,C=train_flop,loss=loss_nats`.

    >>> parse_columns("N=params, loss=loss_nats")
    {'N': 'params', 'loss': 'loss_nats'}
    """
    out: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        role, equals, column = (piece.strip() for piece in part.partition("="))
        check(bool(role and equals and column), f"--columns: {part!r} is not ROLE=COLUMN, such as N=params")
        role = "loss" if role == "L" else role
        check(role not in out, f"--columns: role {role!r} is given twice")
        out[role] = column
    return out


def resolve(table: Table, columns: Mapping[str, str]) -> dict[str, str]:
    """Role -> column of the table: what is asked for, and what our own tables call the rest.

    A role of N, D, C that is not asked for is looked up only where none of the three is: a foreign table
    whose tokens column happens to be called as ours must not change what `N=..,C=..` means.
    """
    out = dict(columns)
    for role, column in columns.items():
        if column not in table.columns:
            close = nearest(column, table.columns)
            raise UserError(
                f"--columns={role}={column}: table {table.path!r} has no column {column!r}{close}"
                + ("" if close else f"; it has {', '.join(table.columns)}")
            )
    ours = "config_hash" in table.columns or not {"N", "D", "C"} & set(columns)
    for role, column in (DEFAULTS | EXTRAS).items():
        if role not in out and column in table.columns and (ours or role in ("loss", *EXTRAS)):
            out[role] = column
    return out


def numeric(table: Table, column: str) -> Float64[np.ndarray, "R"]:
    """A column as numbers (empty cells are NaN); `UserError` names the first cell that is none."""
    values = table.columns[column]
    if values.dtype.kind == "f":
        return values
    for row, cell in zip(table.rows, values, strict=True):
        if _number(cell) is None:
            raise UserError(
                f"table {table.path!r}, column {column!r}, row {row}: {str(cell)!r} is not a number"
            )
    return np.array([_number(cell) for cell in values], float)


def groups(table: Table, column: str) -> dict[str, Table]:
    """The table of each value of a column, in the order of first appearance."""
    check(
        column in table.columns,
        f"--group={column}: table {table.path!r} has no column {column!r}{nearest(column, table.columns)}",
    )
    labels = table.columns[column]
    names = [f"{label:.12g}" if labels.dtype.kind == "f" else str(label) for label in labels]
    out = {}
    for name in dict.fromkeys(names):
        index = np.flatnonzero(np.array(names) == name)
        part = {key: values[index] for key, values in table.columns.items()}
        out[name or "empty"] = dataclasses.replace(table, columns=part, rows=table.rows[index])
    return out


_BINARY: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type, Callable] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def where_mask(text: str, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Rows for which an expression over columns holds: comparisons, and/or/not, arithmetic, `in`; no calls.

    >>> where_mask("C < 1e21 and k in ('a', 'b')", {"C": np.array([1.0, 1e22]), "k": np.array(["a"] * 2)})
    array([ True, False])
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(f"--where={text!r} is not an expression such as 'C < 1e21 and N > 1e7'") from None
    count = len(next(iter(columns.values())))

    def truth(node: ast.expr) -> np.ndarray:
        value = np.asarray(visit(node))
        check(
            value.dtype == bool,
            f"--where={text!r}: {ast.unparse(node)!r} is not a condition",
        )
        return value

    def visit(node: ast.expr) -> np.ndarray | float | str | bool:
        match node:
            case ast.BoolOp(op=op, values=values):
                parts = [np.broadcast_to(truth(value), (count,)) for value in values]
                return np.all(parts, 0) if isinstance(op, ast.And) else np.any(parts, 0)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~truth(operand)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -number(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return _BINARY[type(op)](number(left), number(right))
            case ast.Compare(left=left, ops=ops, comparators=others):
                out = np.ones(count, bool)
                for op, right in zip(ops, others, strict=True):
                    out &= compare(op, left, right)
                    left = right
                return out
            case ast.Name(id=name):
                if name not in columns:
                    raise UserError(f"--where={text!r}: no column {name!r}{nearest(name, columns)}")
                return columns[name]
            case ast.Constant(value=str(value)):
                return value
            case ast.Constant(value=float(value) | int(value)):
                return float(value)  # a power of integers could take for ever
        raise UserError(f"--where={text!r}: {ast.unparse(node)!r} is not allowed here")

    def number(node: ast.expr) -> np.ndarray:
        value = np.asarray(visit(node))
        check(value.dtype.kind == "f", f"--where={text!r}: {ast.unparse(node)!r} is not a number")
        return value

    def compare(op: ast.cmpop, left: ast.expr, right: ast.expr) -> np.ndarray:
        if isinstance(op, (ast.In, ast.NotIn)):
            check(
                isinstance(right, (ast.Tuple, ast.List, ast.Set)),
                f"--where={text!r}: `in` needs a list, such as seed in (0, 1)",
            )
            found = np.any([np.asarray(visit(left) == visit(item)) for item in right.elts], 0)
            return np.broadcast_to(found if isinstance(op, ast.In) else ~found, (count,))
        check(type(op) in _COMPARE, f"--where={text!r}: {ast.unparse(ast.Compare(left, [op], [right]))!r}")
        a, b = np.asarray(visit(left)), np.asarray(visit(right))
        check(
            (a.dtype.kind == "U") == (b.dtype.kind == "U"),
            f"--where={text!r}: {ast.unparse(left)!r} and {ast.unparse(right)!r} are not both numbers or "
            "strings",
        )
        return _COMPARE[type(op)](a, b)

    try:
        with np.errstate(all="ignore"):
            return np.broadcast_to(truth(tree), (count,)).copy()
    except (TypeError, ValueError, OverflowError, ZeroDivisionError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--where={text!r}: {error}") from None


def select(
    table: Table,
    columns: Mapping[str, str],
    *,
    where: str = "",
    drop_highest: int = 0,
    drop_status: bool = True,
    needs: Sequence[str] = ("N", "D", "L"),
) -> tuple[Points, list[Exclusion], list[str]]:
    """The points of a table, the rows left out and why, and notes on what was derived.

    Args:
      table: what `read_table` returned.
      columns: role -> column; roles are N, D, C, loss, sigma, block and any extra (U, lr, batch, E, ...).
      where: an expression over columns and roles; rows for which it is false are left out.
      drop_highest: leaves out that many rows of highest loss, after every other rule.
      drop_status: leaves out rows that our own tables mark by `exclude` or `status`.
      needs: the roles that the law reads or fits; a row needs finite positive values of all of them.

    Raises:
      UserError: a column is missing or not numeric, a role is missing, nothing is left.
    """
    names = resolve(table, columns)
    notes: list[str] = []
    count = len(table)
    values = {role: numeric(table, column) for role, column in names.items() if role != "block"}
    if "loss" in values:
        values["L"] = values.pop("loss")
    _derive(values, needs, notes)
    for role in needs:
        if role not in values:
            named = "loss" if role == "L" else role
            hint = next((c for h in HINTS.get(named, ()) for c in table.columns if c.lower() == h), None)
            example = (
                f", such as --columns={named}={hint}" if hint else f": it has {', '.join(table.columns)}"
            )
            raise UserError(
                f"the fit needs {named} and table {table.path!r} does not say which column it is{example}"
            )

    gone: dict[int, Exclusion] = {}

    def leave_out(position: int, rule: str, detail: str) -> None:
        if position not in gone:
            gone[position] = Exclusion(int(table.rows[position]), rule, detail)

    if drop_status and "exclude" in table.columns:
        marks = table.columns["exclude"]
        for i in np.flatnonzero(marks != "") if marks.dtype.kind == "U" else ():
            detail = table.columns.get("detail")
            leave_out(
                i, str(marks[i]), str(detail[i]) if detail is not None and detail.dtype.kind == "U" else ""
            )
    if drop_status and "finished" in (statuses := table.columns.get("status", np.array([""]))):
        for i in np.flatnonzero(statuses != "finished"):
            leave_out(i, "status", str(statuses[i]))
    for role in dict.fromkeys(
        [*needs, *(r for r in ("N", "D", "C", "L", "sigma") if r in names or r in values)]
    ):
        v = values[role]
        good = np.isfinite(v) & ((v > 0) if role != "sparsity" else (v >= 0) & (v < 1))
        for i in np.flatnonzero(~good):
            leave_out(i, "value", f"{role}={v[i]:g}")
    if where:
        # What --columns names comes first: `C<1e21` means the role even if another column is called C.
        asked = {role: values["L" if role == "loss" else role] for role in columns if role != "block"}
        derived = values | ({"loss": values["L"]} if "L" in values else {})
        mask = where_mask(where, derived | table.columns | asked)
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
        rules: dict[str, int] = {}
        for e in gone.values():
            rules[e.rule] = rules.get(e.rule, 0) + 1
        raise UserError(
            f"table {table.path!r}: none of {count} rows is left: "
            + ", ".join(f"{k} by the rule {rule!r}" for rule, k in rules.items())
        )

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


def _derive(values: dict[str, np.ndarray], needs: Sequence[str], notes: list[str]) -> None:
    """Adds the one of N, D, C that is missing from the identity C = 6 N D, and says so."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if "D" not in values and {"N", "C"} <= set(values):
            values["D"] = values["C"] / (FLOPS * values["N"])
            notes.append("the table gives no tokens: D = C/(6N)")
        elif "C" not in values and {"N", "D"} <= set(values):
            values["C"] = FLOPS * values["N"] * values["D"]
            notes.append("the table gives no FLOPs: C = 6ND")
        elif "N" not in values and {"C", "D"} <= set(values) and "N" in needs:
            values["N"] = values["C"] / (FLOPS * values["D"])
            notes.append("the table gives no parameters: N = C/(6D)")
