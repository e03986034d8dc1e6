"""Which rows an expression over columns picks: `--where` of `jaxlm fit`, read by `ast` and never executed."""

import ast
import operator
from collections.abc import Callable, Mapping

import numpy as np

from jaxlm.errors import UserError, check, nearest

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
        odd = next((name for name in columns if name in text and not name.isidentifier()), None)
        hint = f". A column such as {odd!r} needs a role to be named here: --columns=x={odd}" if odd else ""
        raise UserError(
            f"--where={text!r} is not an expression such as 'C < 1e21 and N == 1e7'{hint}"
        ) from None
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
            case ast.BinOp(op=ast.BitAnd() | ast.BitOr()) | ast.UnaryOp(op=ast.Invert()):
                raise UserError(f"--where={text!r}: write `and`, `or` and `not` in place of &, | and ~")
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
