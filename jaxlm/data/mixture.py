"""The order of training: which row of which source is the global row r, by integer arithmetic alone.

    global row r --mixture--> (source s, its k-th draw) --epoch, permutation--> row of the source's plan

Both steps are O(1) in r, so seeking is free and every host computes its own rows without the others.
"""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int

from jaxlm.errors import UserError, check

# Grain's own MapDataset.shuffle().repeat() and .mix() are the same arithmetic, but do not do here: `mix`
# rounds weights down to hundredths of the smallest one (0.7 : 0.3 becomes 233 : 100), `shuffle` seeds epoch e
# with seed + e (so epoch 1 of seed 0 is epoch 0 of seed 1), and each element costs around 100 microseconds of
# Python, where a row of a batch is ready in 20. The permutation itself is grain's.

_SHARES = 1 << 20  # weights are rounded to this many parts
_MAX_ROWS = 1 << 32  # index_shuffle is 32 bits wide and does not return beyond it
_TABLE_ROWS = 1 << 13  # it walks through 2**16 / size numbers: 6 us for large sizes, but 16 ms for 2 rows
Mixture = str | Sequence[Sequence]


def parse_mixture(spec: Mixture, where: str = "data.train") -> tuple[tuple[str, float], ...]:
    """(glob, weight) pairs of a glob, of 'glob=weight,glob=weight', or of a sequence of pairs.

    Weights are shares of the rows (with concat packing: of the tokens) and need not sum to 1.

    Raises:
        UserError: nothing named, or a weight that is not a positive number.

    >>> parse_mixture("books/*.txt=3,web/*.jsonl.zst=1")
    (('books/*.txt', 3.0), ('web/*.jsonl.zst', 1.0))
    >>> parse_mixture("books/*.txt")
    (('books/*.txt', 1.0),)
    """
    pairs = []
    for part in spec.split(",") if isinstance(spec, str) else spec:
        if isinstance(part, str):
            glob, _, weight = part.rpartition("=")
            pairs.append((glob, weight) if _is_number(weight) and glob else (part, 1.0))
        elif len(part) == 2:
            pairs.append(tuple(part))
        else:
            raise UserError(f"{where}: {part!r} is not a (glob, weight) pair")
    for glob, weight in pairs:
        check(
            isinstance(glob, str) and glob.strip() != "",
            f"{where} names no files: give a glob such as 'corpus/*.txt'",
        )
        if not _is_number(weight) or not 0 < float(weight) < float("inf"):
            raise UserError(f"{where}: the weight of {glob!r} is {weight!r}, not a positive number")
    check(bool(pairs), f"{where} names no files: give a glob such as 'corpus/*.txt'")
    return tuple((glob.strip(), float(weight)) for glob, weight in pairs)


def _is_number(value: object) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the proportions of `weights`, to a millionth of their sum; each at least 1."""
    total = sum(weights)
    return tuple(max(1, round(w / total * _SHARES)) for w in weights)


def draw(rows_B: Int[np.ndarray, "B"], shares_S: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The source of each global row, and how often that source was drawn before.

    Low discrepancy: among the first n rows source s has n * share_s / sum(shares) draws, give or take one for
    each level. The first source takes row r where ceil(r * share / total) steps; what it leaves, numbered
    anew, is shared among the others in the same way.

    Args:
        rows_B: global rows, below 2**42.

    Returns:
        (sources, draws), int64 [B] each.

    >>> [s.tolist() for s in draw(np.arange(6), (2, 1))]
    [[0, 0, 1, 0, 0, 1], [0, 1, 0, 2, 3, 1]]
    """
    now, after = rows_B.astype(np.int64), rows_B.astype(np.int64) + 1
    sources = np.full(now.shape, len(shares_S) - 1)
    draws = np.zeros_like(now)
    open_ = np.ones(now.shape, bool)
    total = sum(shares_S)
    for s, share in enumerate(shares_S):
        rest, rest_after = now * (total - share) // total, after * (total - share) // total
        taken, taken_after = now - rest, after - rest_after
        hit = open_ & (taken_after > taken)
        sources[hit], draws[hit] = s, taken[hit]
        open_ &= ~hit
        now, after, total = rest, rest_after, total - share
    return sources, draws


def permute(index: int, size: int, seed: int, source: int) -> int:
    """Row of a source's plan at its `index`-th draw: each epoch is a permutation of its own.

    Args:
        index: draws so far; epoch = index // size.
        size: rows of the plan, at most 2**32.
    """
    epoch, index = divmod(index, size)
    key = _key(seed, source, epoch)
    if size <= _TABLE_ROWS:
        return int(_table(key, size)[index])
    return index_shuffle(index, max_index=size - 1, seed=key, rounds=4)


@functools.lru_cache(64)
def _table(key: int, size: int) -> np.ndarray:
    """A whole permutation, for sources that are small."""
    return np.random.RandomState(key).permutation(size)  # whose stream, unlike Generator's, never changes


@functools.lru_cache(1024)
def _key(seed: int, source: int, epoch: int) -> int:
    """32 bits that share nothing between neighbouring seeds, sources and epochs."""
    return int.from_bytes(hashlib.sha256(f"{seed} {source} {epoch}".encode()).digest()[:4], "little")


def check_rows(size: int, where: str) -> None:
    """Raise `UserError` if a source has more rows than can be permuted."""
    check(
        size <= _MAX_ROWS, f"{where} has {size} rows; at most {_MAX_ROWS} can be shuffled: raise data.seq_len"
    )


def order_probe() -> list[int]:
    """A few permuted rows, which tell if the library's permutation, and so the order, has changed."""
    return [permute(i, size, 0, 0) for size in (1000, 1_000_000) for i in (0, size + 1)]
