"""Which collectives a compiled program runs, how often, between whom, and what they put on the links.

Bytes are those that one chip sends in a ring (or along both directions of a torus, which is as many):

    all-gather (n - 1) / n of the result      reduce-scatter (n - 1) / n of the operand
    all-reduce 2 (n - 1) / n                  all-to-all (n - 1) / n        collective-permute all of it

A ragged all-to-all sends as many rows as the run decides: those of a balanced load are counted.

A group of n members that lie on S slices, m = n / S on each, works in two levels: over the data-centre
network (S - 1) / n of the bytes of a gather, over the links inside a slice (m - 1) / m of them; together
(n - 1) / n. A program compiled for several slices of TPUs is a program of one slice: its groups are
slice-local, and what leaves the slice is already taken apart into `send`s, each of a chip's own share.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from jaxlm.preflight.hlo import Computation, Instruction, Module, device_groups, elements, nbytes, trip_count

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
KINDS += ("collective-broadcast",)
BETWEEN = "between slices: "  # kind of a transfer that the compiler has already taken out of a collective


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction and how often a step runs it."""

    kind: str  # of KINDS, or BETWEEN and the collective that it is part of
    nbytes: float  # of the whole array: a gather's result, any other's operand; per chip and run
    groups: Int[np.ndarray, "groups members"]  # places in the mesh; of a permutation: (source, target) pairs
    trips: int  # runs in one step
    where: str  # path of the JAX operation, '' if the compiler made it up

    @property
    def size(self) -> int:
        """Devices in a group."""
        return self.groups.shape[1]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What a step executes, as far as a preflight wants to know."""

    collectives: Sequence[Collective]
    cycles: float  # the compiler's estimates, summed over what it schedules; 0 = it gives none
    unknown_loops: int  # loops whose trip count the text does not say; counted as one trip
    kernels: Mapping[str, int]  # runs in a step of each Pallas kernel and each library call


def schedule(module: Module) -> Schedule:
    """All collectives and kernels of a program with their trips, and the compiler's own estimate of cycles.

    Of a conditional the branch that sends more bytes counts. A collective that the compiler has spread over
    several fusions (asynchronous, one step in each) counts once.
    """
    unknown: list[str] = []
    found, cycles, kernels = _walk(module, module.computations[module.entry], 1, unknown)
    return Schedule(tuple(found), cycles, len(unknown), dict(kernels))


def kernel_name(each: Instruction) -> str:
    """What a custom call runs: a Pallas kernel's name or a library's call; '' if the compiler's own business.

    A kernel for TPUs is named by its instruction, `%splash_mha_fwd.2`; a call of a library by its target,
    `__cudnn$fmhaSoftmax`.
    """
    target = re.search(r'custom_call_target="([^"]*)"', each.attributes)
    if each.opcode != "custom-call" or target is None:
        return ""
    if target[1] == "tpu_custom_call":
        return re.sub(r"(\.(\d+|clone|remat\d*))+$", "", each.name)
    return target[1] if target[1].startswith("__") else ""


def _walk(
    module: Module, computation: Computation, trips: int, unknown: list[str]
) -> tuple[list[Collective], float, Counter[str]]:
    found: list[Collective] = []
    cycles, spread, kernels = 0.0, set(), Counter()
    for each in computation.instructions.values():
        if (made := _collective(module, computation, each, trips)) is not None:
            found.append(made)
        elif name := kernel_name(each):
            kernels[name] += trips
        elif each.opcode == "while":
            count = trip_count(module, computation, each)
            if count is None:
                unknown.append(each.name)
            body = module.computations[each.attribute("body")]
            inner = _walk(module, body, trips * (1 if count is None else count), unknown)
            found, cycles, kernels = found + inner[0], cycles + inner[1], kernels + inner[2]
        elif each.opcode == "conditional":
            branches = [_walk(module, module.computations[name], trips, unknown) for name in _branches(each)]
            inner = max(branches, key=lambda b: (sum(map(_weight, b[0])), b[1]))
            found, cycles, kernels = found + inner[0], cycles + inner[1], kernels + inner[2]
        elif each.opcode == "call":
            inner = _walk(module, module.computations[each.attribute("to_apply")], trips, unknown)
            found, cycles, kernels = found + inner[0], cycles + inner[1], kernels + inner[2]
        elif each.opcode in ("fusion", "async-start"):
            for key, made in _fused(module, each, trips):
                if key not in spread:
                    spread.add(key)
                    found.append(made)
        if estimate := re.search(r'"estimated_cycles":"(\d+)"', each.attributes):
            cycles += int(estimate[1]) * trips if int(estimate[1]) < 1 << 60 else 0
    return found, cycles, kernels


def _weight(collective: Collective) -> float:
    return collective.nbytes * collective.trips


def _branches(conditional: Instruction) -> list[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes):
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return [conditional.attribute("true_computation"), conditional.attribute("false_computation")]


def _fused(module: Module, fusion: Instruction, trips: int) -> Iterator[tuple[tuple, Collective]]:
    """Collectives inside a fusion (or an asynchronous computation), with what tells copies of one apart."""
    inner = module.computations[fusion.attribute("calls")]
    for each in inner.instructions.values():
        made = _collective(module, inner, each, trips)
        if made is not None:
            if made.kind == "all-reduce" and nbytes(fusion.type) < made.nbytes and _is_sliced(inner):
                made = dataclasses.replace(made, kind="reduce-scatter")
            channel = re.search(r"channel_id=(\d+)", each.attributes)
            yield (made.kind, channel[1] if channel else each.name, each.type, made.where), made
        elif each.opcode in ("fusion", "async-start"):
            yield from _fused(module, each, trips)


def _is_sliced(computation: Computation) -> bool:
    """A TPU writes a reduce-scatter as a fusion of all-reduce and dynamic-slice."""
    return any(each.opcode == "dynamic-slice" for each in computation.instructions.values())


def _collective(module: Module, computation: Computation, each: Instruction, trips: int) -> Collective | None:
    kind = each.opcode.removesuffix("-start")
    if kind == "send" and "megascale" in each.attributes:
        part = re.search(r'_xla_megascale_transfer_type="(\w+)"', each.attributes)
        name = part[1].lower().replace("_", "-") if part else "transfer"
        return Collective(
            BETWEEN + name, nbytes(elements(each.type)[0]), np.asarray([[0, 0]]), trips, each.where
        )
    if kind not in KINDS:
        return None
    size = _result_bytes(each)
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{([\d,{} ]*)\}", each.attributes)
        listed = re.findall(r"\{(\d+), ?(\d+)\}", pairs[1] if pairs else "")
        groups = np.asarray([[int(a), int(b)] for a, b in listed]).reshape(-1, 2)
        groups = groups[groups[:, 0] != groups[:, 1]]
        return Collective(kind, size, groups, trips, each.where) if len(groups) else None
    groups = device_groups(each.attributes, module.num_devices)
    if groups.shape[1] == 1:
        return None
    if kind == "reduce-scatter":
        size *= groups.shape[1]
    if kind == "ragged-all-to-all" and (rows := computation.instructions.get(each.operands[0])):
        size = min(size, nbytes(rows.type))  # a balanced load: what is sent, not the room for more
    return Collective(kind, size, groups, trips, each.where)


def _result_bytes(each: Instruction) -> float:
    """Bytes of a collective's result; a `-start` returns (operands, results, contexts)."""
    if not each.opcode.endswith("-start") or each.opcode == "all-reduce-start":
        return nbytes(each.type)
    parts = elements(each.type)
    return nbytes(parts[1] if len(parts) > 1 else parts[0])


# -------------------------------------------------------------------------------------------- bytes on links


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one chip sends for one run of a collective."""

    ici: float  # to chips of its slice
    dcn: float  # to chips of other slices


def traffic(collective: Collective, slices: Int[np.ndarray, " devices"]) -> Traffic:
    """What a collective puts on the links and on the data-centre network, per chip and run.

    Args:
        collective: one of a schedule.
        slices: the slice of each place in the mesh.
    """
    size, n = collective.nbytes, collective.size
    if collective.kind.startswith(BETWEEN):
        total = len(set(slices.tolist()))
        share = {"all-reduce": 2 * (total - 1) / total, "reduce-scatter": (total - 1) / total}
        share |= {"all-to-all": (total - 1) / total, "all-gather": total - 1}
        return Traffic(0.0, size * share.get(collective.kind.removeprefix(BETWEEN), 1))
    where = slices[collective.groups]
    if collective.kind == "collective-permute":
        crosses = bool((where[:, 0] != where[:, 1]).any())
        return Traffic(0.0, size) if crosses else Traffic(size, 0.0)
    spread = max(len(set(row)) for row in where.tolist()) if len(set(slices.tolist())) > 1 else 1
    members = n // spread
    if collective.kind in ("all-to-all", "ragged-all-to-all"):
        return Traffic(size * (members - 1) / n, size * (n - members) / n)
    times = 2 if collective.kind == "all-reduce" else 1
    return Traffic(times * size * (members - 1) / members, times * size * (spread - 1) / n)
