"""Packing: which tokens stand in which row, and the batch that they make.

The target stream of a store is its documents in order, each ended by EOS. A *piece* is a range of it. A row
is one or more pieces; a *segment* is the part of a piece that lies in one document. The input of a target is
the token before it, or BOS where a document begins; a row that begins inside a document begins a segment:

    targets   t1  t2  EOS u1  EOS       every token and EOS is predicted exactly once in an epoch, BOS never;
    tokens    BOS t1  t2  BOS u1        where BOS is EOS this is the one stream <sep> t1 t2 <sep> u1 <sep>
    segments  1   1   1   2   2         what lies before a segment is not seen by it: attention is masked by
    positions 0   1   2   0   1         segments, positions restart, and no target is in another document

| packing | pieces | memory |
|---|---|---|
| concat | row i is the targets [iT, iT + T), whatever documents they are of | none |
| first_fit | documents, cut at multiples of T, set into rows where they fit | 12 B a piece, 8 B a row |
| pad | one document a row (or T targets of one), the rest of the row empty | 16 B a document |
"""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int

from jaxlm.data.shards import TokenStore
from jaxlm.errors import check_choice

Batch = dict[str, np.ndarray]  # tokens, targets, segments, positions i32[B, T] and weights f32[B, T]
PACKINGS = ("concat", "first_fit", "pad")


class Plan(Protocol):
    """The rows of one epoch of a store."""

    num_rows: int
    nbytes: int  # resident

    def pieces(self, row: int) -> Sequence[tuple[int, int]]:
        """The [start, stop) ranges of targets in a row; together at most T."""
        ...


@dataclasses.dataclass(frozen=True)
class ConcatPlan:
    """Row i holds the targets [iT, iT + T); the last row may be shorter."""

    num_targets: int
    seq_len: int
    nbytes: int = 0

    @property
    def num_rows(self) -> int:
        return -(-self.num_targets // self.seq_len)

    def pieces(self, row: int) -> Sequence[tuple[int, int]]:
        start = row * self.seq_len
        return ((start, min(start + self.seq_len, self.num_targets)),)


class PadPlan:
    """Each document begins a row of its own and goes on in further rows where it is longer than T."""

    def __init__(self, starts_E: Int[np.ndarray, "documents+1"], seq_len: int):
        self._starts = starts_E
        self._seq_len = seq_len
        self._row_ends = np.cumsum(-(-np.diff(starts_E) // seq_len))
        self.num_rows = int(self._row_ends[-1])
        self.num_documents = len(self._row_ends)
        self.nbytes = self._starts.nbytes + self._row_ends.nbytes

    def document(self, row: int) -> int:
        """The document that a row is of."""
        return int(np.searchsorted(self._row_ends, row, side="right"))

    def rows_of(self, document: int) -> range:
        """The rows of a document."""
        before = int(self._row_ends[document - 1]) if document else 0
        return range(before, int(self._row_ends[document]))

    def pieces(self, row: int) -> Sequence[tuple[int, int]]:
        document = self.document(row)
        start = int(self._starts[document]) + (row - self.rows_of(document).start) * self._seq_len
        return ((start, min(start + self._seq_len, int(self._starts[document + 1]))),)


class FitPlan:
    """Documents, cut at multiples of T, set into rows by `best_fit`."""

    def __init__(self, starts_E: Int[np.ndarray, "documents+1"], seq_len: int, seed: int):
        lengths = np.diff(starts_E)
        cuts = -(-lengths // seq_len)
        document = np.repeat(np.arange(len(lengths)), cuts)
        nth = np.arange(len(document)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
        starts = starts_E[document] + nth * seq_len
        sizes = np.minimum(lengths[document] - nth * seq_len, seq_len)
        row_of = best_fit(sizes, seq_len, seed)
        order = np.argsort(row_of, kind="stable")
        self._starts = starts[order]
        self._sizes = sizes[order].astype(np.int32)
        self._row_ends = np.cumsum(np.bincount(row_of))
        self.num_rows = len(self._row_ends)
        self.nbytes = self._starts.nbytes + self._sizes.nbytes + self._row_ends.nbytes

    def pieces(self, row: int) -> Sequence[tuple[int, int]]:
        low = int(self._row_ends[row - 1]) if row else 0
        high = int(self._row_ends[row])
        starts = self._starts[low:high].tolist()
        return [(s, s + n) for s, n in zip(starts, self._sizes[low:high].tolist(), strict=True)]


def make_plan(store: TokenStore, packing: str, seq_len: int, seed: int, num_targets: int = 0) -> Plan:
    """The rows of one epoch of `store`.

    Args:
        packing: 'concat', 'first_fit' or 'pad'.
        seq_len: T, targets in a row.
        seed: of first_fit's order among documents of equal length.
        num_targets: only the first so many tokens of the store; 0 = all.
    """
    check_choice(packing, PACKINGS, "data.packing")
    limit = min(num_targets or store.num_tokens, store.num_tokens)
    if packing == "concat":
        return ConcatPlan(limit, seq_len)
    starts = store.document_starts()
    if limit < store.num_tokens:
        starts = np.append(starts[: np.searchsorted(starts, limit)], limit)
    return PadPlan(starts, seq_len) if packing == "pad" else FitPlan(starts, seq_len, seed)


def best_fit(sizes_P: Int[np.ndarray, "P"], capacity: int, seed: int) -> Int[np.ndarray, "P"]:
    """The row of each piece: longest pieces first, each into the fullest row that still takes it.

    Pieces of one size are placed together, so the work is O(P log P) in numpy and a Python loop over the
    distinct sizes, not over the pieces.

    Args:
        sizes_P: in [1, capacity].
        capacity: T.
        seed: decides which of several pieces of one size goes where.

    Source: best-fit decreasing, Ding et al. (2024), https://arxiv.org/abs/2404.10830.

    >>> best_fit(np.array([3, 5, 2, 4, 1]), 5, seed=0).tolist()
    [2, 0, 2, 1, 1]
    """
    # RandomState and not Generator: numpy promises that its stream never changes.
    shuffled = np.random.RandomState(seed % 2**32).permutation(len(sizes_P))
    order = shuffled[np.argsort(-sizes_P[shuffled], kind="stable")]
    row_of = np.empty(len(sizes_P), np.int64)
    distinct, counts = np.unique(sizes_P, return_counts=True)
    rooms: list[int] = []  # the distinct free spaces of rows, ascending
    rows_with: dict[int, np.ndarray] = {}  # free space -> rows
    num_rows = done = 0

    def give_back(rows: np.ndarray, room: int) -> None:
        if room == 0 or len(rows) == 0:
            return
        if room in rows_with:
            rows_with[room] = np.concatenate([rows_with[room], rows])
        else:
            bisect.insort(rooms, room)
            rows_with[room] = rows

    for size, left in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            at = bisect.bisect_left(rooms, size)
            if at < len(rooms):
                room = rooms.pop(at)
                rows = rows_with.pop(room)
            else:
                room = capacity
                rows = num_rows + np.arange(-(-left // (capacity // size)))
                num_rows += len(rows)
            each = room // size  # the row that has just taken one is the fullest: it takes all it can
            used = min(len(rows), -(-left // each))
            placed = min(used * each, left)
            row_of[order[done : done + placed]] = np.repeat(rows[:used], each)[:placed]
            last = placed - (used - 1) * each  # pieces in the last row used
            give_back(rows[: used - 1], room - each * size)
            give_back(rows[used - 1 : used], room - last * size)
            give_back(rows[used:], room)
            done, left = done + placed, left - placed
    return row_of


def empty_batch(rows: int, seq_len: int, pad_id: int) -> Batch:
    """A batch of nothing but padding."""
    shape = (rows, seq_len)
    return {
        "tokens": np.full(shape, pad_id, np.int32),
        "targets": np.full(shape, pad_id, np.int32),
        "weights": np.zeros(shape, np.float32),
        "segments": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
    }


def fill_row(
    store: TokenStore,
    pieces: Sequence[tuple[int, int]],
    bos_id: int,
    tokens_T: Int[np.ndarray, "T"],
    targets_T: Int[np.ndarray, "T"],
    begins_T: Int[np.ndarray, "T"],
) -> int:
    """Write one row in place; returns its number of targets.

    Args:
        pieces: ranges of the target stream.
        tokens_T, targets_T: written up to the number of targets.
        begins_T: zeros; 1 is written where a segment begins.
    """
    column = 0
    for start, stop in pieces:
        end = column + stop - start
        begins = store.starts_between(start, stop) + (column - start)
        if start:
            span = store.read(start - 1, stop)
            tokens_T[column:end] = span[:-1]
            targets_T[column:end] = span[1:]
        else:
            span = store.read(start, stop)
            tokens_T[column + 1 : end] = span[:-1]
            targets_T[column:end] = span
        tokens_T[begins] = bos_id
        begins_T[column] = 1
        begins_T[begins] = 1
        column = end
    return column


def finish_batch(batch: Batch, begins_BT: Int[np.ndarray, "B T"], used_B: Int[np.ndarray, "B"]) -> None:
    """Write weights, segments and positions, from where segments begin and rows end."""
    columns_T = np.arange(begins_BT.shape[1], dtype=np.int32)
    real_BT = columns_T < used_B[:, None]
    batch["weights"][:] = real_BT
    np.cumsum(begins_BT, axis=1, dtype=np.int32, out=batch["segments"])
    batch["segments"] *= real_BT
    first_BT = np.maximum.accumulate(begins_BT * columns_T, axis=1)
    np.multiply(columns_T - first_BT, real_BT, out=batch["positions"])
