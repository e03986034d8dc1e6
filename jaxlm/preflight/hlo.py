"""Optimised HLO text as values: computations, instructions, array sizes, device groups, trip counts.

Reads what `jax.stages.Compiled.as_text()` prints for CPU, GPU and TPU; knows no JAX. An instruction is

    %name = TYPE opcode(OPERANDS), attribute=..., metadata={op_name="..."}, backend_config={...}

where a tuple TYPE may hold comments (`/*index=5*/`) and layouts with parentheses, and a Pallas kernel's
metadata may hold newlines; a computation ends at a line that is exactly `}`.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25, "f4e2m1fn": 0.5, "token": 0}
BYTES |= {f"{sign}{bits}": bits // 8 for sign in "su" for bits in (8, 16, 32, 64)}
BYTES |= {"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}

_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<=]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str  # 'f32[2,3]{1,0}' or a tuple of such
    opcode: str
    operands: tuple[str, ...]  # names; of a constant or parameter, its text
    attributes: str  # the rest of the line
    root: bool

    def attribute(self, name: str) -> str:
        """The name of a computation that an attribute points to, '' if there is none."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""

    @property
    def where(self) -> str:
        """The path of the JAX operation that it stands for, '' if the compiler made it up."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of instructions."""

    name: str
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction:
        """What it returns."""
        return next(i for i in self.instructions.values() if i.root)


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: Mapping[str, Computation]
    entry: str
    num_devices: int  # partitions x replicas


def parse(text: str) -> Module:
    """The module that `as_text()` printed.

    Raises:
        ValueError: it has no entry computation, or an instruction cannot be read.
    """
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", []
    for line in text.splitlines():
        if not name:
            header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line) if line[:1] in "%E" else None
            if header:
                name, lines = header[2], []
                entry = name if header[1] else entry
        elif re.fullmatch(r'\}(, execution_thread="[^"]*")?', line):
            made = [_instruction(text) for text in lines]
            computations[name] = Computation(name, {i.name: i for i in made})
            name = ""
        elif re.match(r"  (ROOT )?%[\w.\-]+ = ", line):
            lines.append(line.strip())
        elif lines:
            lines[-1] += " " + line
    if not entry:
        raise ValueError("this is no HLO module: it has no ENTRY computation")
    counts = (
        re.search(rf"\b{name}=(\d+)", text[: text.find("\n")]) for name in ("num_partitions", "replica_count")
    )
    return Module(computations, entry, math.prod(int(found[1]) for found in counts if found))


def _instruction(line: str) -> Instruction:
    root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    start = rest.find("(")
    stop = _closing(rest, start)
    if start < 1:
        raise ValueError(f"cannot read the instruction {line[:200]!r}")
    inside = rest[start + 1 : stop]
    operands = re.findall(r"%([\w.\-]+)", inside) or ([inside] if inside else [])
    return Instruction(name.lstrip("%"), kind, rest[:start], tuple(operands), rest[stop + 1 :], root)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"a parenthesis is left open in {text[:200]!r}")


def nbytes(type_text: str) -> float:
    """Bytes of an array, or of all arrays of a tuple; tiling and padding are not in it.

    >>> nbytes("f32[2,3]{1,0:T(8,128)}"), nbytes("(bf16[4]{0}, /*index=1*/u32[]{:S(2)})")
    (24, 12)
    """
    return sum(
        BYTES.get(kind, 1 if kind.startswith("f8") else 0)
        * math.prod(int(n.lstrip("<=")) for n in dims.split(",") if n)
        for kind, dims in _ARRAY.findall(type_text)
    )


def elements(type_text: str) -> list[str]:
    """The types in a tuple, one level deep; of an array, itself.

    >>> elements("((f32[2]{0}, s32[]), bf16[4]{0:T(8)})")
    ['(f32[2]{0}, s32[])', 'bf16[4]{0:T(8)}']
    """
    if not type_text.startswith("("):
        return [type_text]
    parts, depth, last = [], 0, 1
    for at, char in enumerate(type_text):
        depth += (char in "([{") - (char in ")]}")
        if (char == "," and depth == 1) or (char == ")" and depth == 0):
            parts.append(re.sub(r"/\*.*?\*/", "", type_text[last:at]).strip())
            last = at + 1
    return [part for part in parts if part]


# --------------------------------------------------------------------------------------------- device groups


def device_groups(attributes: str, num_devices: int) -> Int[np.ndarray, "groups members"]:
    """The groups of devices that a collective runs in, by their place in the mesh (flattened).

    Reads all forms of `replica_groups`: lists, iota with or without a transposition, and mesh axes.

    >>> device_groups("replica_groups={{0,1},{2,3}}", 4).tolist()
    [[0, 1], [2, 3]]
    >>> device_groups("replica_groups=[2,2]<=[2,2]T(1,0), x=1", 4).tolist()
    [[0, 2], [1, 3]]
    >>> device_groups("replica_groups=mesh['a'=2,'b'=2] {'b'}", 4).tolist()
    [[0, 1], [2, 3]]
    >>> device_groups("replica_groups={}", 4).tolist()
    [[0, 1, 2, 3]]

    Raises:
        ValueError: a form that is not known, or groups of different sizes.
    """
    at = attributes.find("replica_groups=")
    text = attributes[at + len("replica_groups=") :] if at >= 0 else "{}"
    if listed := re.match(r"\{(\{[\d,{} ]*\})?\}", text):
        groups = [
            [int(n) for n in g.split(",") if n.strip()] for g in re.findall(r"\{([\d, ]+)\}", listed[0])
        ]
        if len({len(g) for g in groups}) > 1:
            raise ValueError(f"groups of different sizes: {text[:200]!r}")
        return np.asarray(groups) if groups else np.arange(num_devices)[None]
    if iota := re.match(r"\[([\d,]+)\]" + _IOTA, text):
        return _iota(iota[2], iota[3]).reshape(_whole(iota[1]))
    if text.startswith("mesh["):
        return _mesh_groups(text)
    raise ValueError(f"replica_groups of an unknown form: {text[:200]!r}")


_IOTA = r"<=\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _whole(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(shape: str, order: str | None) -> Int[np.ndarray, "..."]:
    ids = np.arange(math.prod(_whole(shape))).reshape(_whole(shape))
    return ids.transpose(_whole(order)) if order else ids


def _mesh_groups(text: str) -> Int[np.ndarray, "groups members"]:
    """Groups along axes of a mesh or parts of one: `'a':(2)4` are 4 steps of axis a, below 2 outer ones."""
    axes, chosen = text[: text.index("]")], re.search(r"\{('[^}]*)\}", text)
    if chosen is None:
        raise ValueError(f"replica_groups of an unknown form: {text[:200]!r}")
    sizes = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if order := re.search(
        r"device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\)", text[: chosen.start()]
    ):
        ids = _iota(order[1], order[2]).reshape(-1) if order[1] else np.asarray(_whole(order[3]))
    parts = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", chosen[1])
    picked = [(n, int(a or 1), int(b or 0)) for n, a, b in parts]
    shape, inside = [], []
    for name, size in sizes.items():
        cuts = sorted({1, size} | {edge for n, a, b in picked if n == name for edge in (a, a * (b or size))})
        for low, high in itertools.pairwise(cuts):
            if any(n == name and a <= low and high <= a * (b or size) for n, a, b in picked):
                inside.append(len(shape))
            shape.append(high // low)
    outside = [i for i in range(len(shape)) if i not in inside]
    members = math.prod(shape[i] for i in inside)
    return ids.reshape(shape or [1]).transpose(outside + inside or [0]).reshape(-1, members)


# ----------------------------------------------------------------------------------------------- trip counts


def trip_count(module: Module, caller: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` runs; None if the text does not say.

    The compiler's `known_trip_count` if it is there. Else from the condition `i < limit`, the body's
    `i + step` and the first `i` (a windowed-einsum loop counts by two).
    """
    if known := re.search(r'"?known_trip_count"?:?=?\{"?n"?[:=]"?(\d+)', loop.attributes):
        return int(known[1])
    condition = module.computations[loop.attribute("condition")]
    body = module.computations[loop.attribute("body")]
    compared = _inline(module, condition, condition.root, "compare")
    if compared is None:
        return None
    (left, right), direction = compared.operands, re.search(r"direction=(\w\w)", compared.attributes)
    index = _tuple_index(condition, left)
    if index is None or direction is None:
        return None
    init = _initial(caller, loop, index)
    limit = _constant(condition, right)
    if limit is None:  # the limit may travel in the loop's tuple
        place = _tuple_index(condition, right)
        limit = None if place is None else _initial(caller, loop, place)
    step = _increment(module, body, index)
    if None in (init, limit, step) or not step:
        return None
    span = {"LT": limit - init, "LE": limit - init + 1, "GT": init - limit, "GE": init - limit + 1}
    if direction[1] not in span:
        return None
    return max(0, math.ceil(span[direction[1]] / abs(step)))


def _through(computation: Computation, name: str) -> Instruction | None:
    """The instruction behind copies and conversions."""
    found = computation.instructions.get(name)
    while found is not None and found.opcode in (
        "copy",
        "bitcast",
        "convert",
        "copy-done",
        "copy-start",
        "reshape",
    ):
        found = computation.instructions.get(found.operands[0])
    return found


def _constant(computation: Computation, name: str) -> int | None:
    found = _through(computation, name)
    text = name[1:] if name.startswith("=") else ""
    if found is not None and found.opcode == "constant":
        text = found.operands[0].strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _tuple_index(computation: Computation, name: str) -> int | None:
    """Which element of the computation's only parameter a value is."""
    found = _through(computation, name)
    if found is None or found.opcode != "get-tuple-element":
        return None
    source = computation.instructions.get(found.operands[0])
    index = re.search(r"\bindex=(\d+)", found.attributes)
    return int(index[1]) if source is not None and source.opcode == "parameter" and index else None


def _initial(caller: Computation, loop: Instruction, index: int) -> int | None:
    """The first value of an element of the loop's tuple."""
    start = caller.instructions.get(loop.operands[0])
    return _constant(caller, start.operands[index]) if start is not None and start.opcode == "tuple" else None


def _inline(module: Module, computation: Computation, found: Instruction, opcode: str) -> Instruction | None:
    """An operation that stands there, or alone in a fusion; then its operands are what the fusion is given.

    A constant inside the fusion becomes the operand `=text`.
    """
    if found.opcode == opcode:
        return found
    if found.opcode != "fusion":
        return None
    inner = module.computations[found.attribute("calls")]
    core = _through(inner, inner.root.name)
    if core is None or core.opcode != opcode:
        return None
    names = []
    for source in (_through(inner, operand) for operand in core.operands):
        if source is None or source.opcode not in ("parameter", "constant"):
            return None
        given = source.operands[0]
        names.append(found.operands[int(given)] if source.opcode == "parameter" else f"={given}")
    return dataclasses.replace(core, operands=tuple(names))


def _increment(module: Module, body: Computation, index: int) -> int | None:
    """What an iteration adds to an element of the loop's tuple."""
    if body.root.opcode != "tuple":
        return None
    found = _through(body, body.root.operands[index])
    added = None if found is None else _inline(module, body, found, "add")
    if added is None:
        return None
    for own, other in (added.operands, added.operands[::-1]):
        step = _constant(body, other)
        if step is not None and _tuple_index(body, own) == index:
            return step
    return None
