"""Packing against a brute-force reference: every token once, and nothing across a document's end."""

import collections
import time
from pathlib import Path

import numpy as np
import pytest

from jaxlm.data import packing
from jaxlm.data.packing import Batch
from jaxlm.data.shards import TokenStore
from jaxlm.errors import UserError

from .conftest import store_of

EOS, BOS, FIRST = 1, 2, 10


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents of these lengths in which every token is a number of its own."""
    ends = FIRST + np.cumsum([0, *lengths])
    return [list(range(a, b)) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]


def all_rows(store: TokenStore, plan: packing.Plan, seq_len: int, bos: int = BOS) -> Batch:
    """One epoch in the order of the plan."""
    batch = packing.empty_batch(plan.num_rows, seq_len, pad_id=0)
    begins = np.zeros((plan.num_rows, seq_len), np.int32)
    used = np.zeros(plan.num_rows, np.int32)
    for r in range(plan.num_rows):
        pieces = plan.pieces(r)
        used[r] = packing.fill_row(store, pieces, bos, batch["tokens"][r], batch["targets"][r], begins[r])
    packing.finish_batch(batch, begins, used)
    return batch


def reference(rows: list[list[tuple[int, list[tuple[int, int]]]]], seq_len: int) -> Batch:
    """A batch written out column by column; a row is a list of (document, [(input, target), ...])."""
    batch = packing.empty_batch(len(rows), seq_len, pad_id=0)
    for r, row in enumerate(rows):
        column = 0
        for segment, (_, pairs) in enumerate(row, 1):
            for position, (token, target) in enumerate(pairs):
                batch["tokens"][r, column] = token
                batch["targets"][r, column] = target
                batch["weights"][r, column] = 1
                batch["segments"][r, column] = segment
                batch["positions"][r, column] = position
                column += 1
    return batch


def predictions(documents: list[list[int]], bos: int) -> list[list[tuple[int, int]]]:
    """(input, target) of every prediction of every document."""
    return [list(zip([bos, *d], [*d, EOS], strict=True)) for d in documents]


def concat_reference(documents: list[list[int]], seq_len: int, bos: int) -> Batch:
    stream = [(d, pair) for d, pairs in enumerate(predictions(documents, bos)) for pair in pairs]
    rows = []
    for first in range(0, len(stream), seq_len):
        row: list[tuple[int, list[tuple[int, int]]]] = []
        for document, pair in stream[first : first + seq_len]:
            if not row or row[-1][0] != document:
                row.append((document, []))
            row[-1][1].append(pair)
        rows.append(row)
    return reference(rows, seq_len)


def pad_reference(documents: list[list[int]], seq_len: int, bos: int) -> Batch:
    rows = [
        [(d, pairs[first : first + seq_len])]
        for d, pairs in enumerate(predictions(documents, bos))
        for first in range(0, len(pairs), seq_len)
    ]
    return reference(rows, seq_len)


def assert_same(got: Batch, want: Batch) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


LENGTHS = {
    "ragged": np.random.default_rng(0).integers(1, 40, 60).tolist(),
    "tiny": [1] * 30,
    "long": [100, 1, 33, 15, 16, 17],
    "one": [3],
    "fits": [15, 15, 15],  # with EOS exactly T
}


@pytest.fixture(params=LENGTHS)
def documents(request: pytest.FixtureRequest) -> list[list[int]]:
    return numbered(LENGTHS[request.param])


@pytest.mark.parametrize("bos", [BOS, EOS], ids=["bos", "bos is eos"])
@pytest.mark.parametrize(("name", "oracle"), [("concat", concat_reference), ("pad", pad_reference)])
@pytest.mark.parametrize("seq_len", [1, 7, 16])
def test_equals_reference(tmp_path: Path, documents, name: str, oracle, seq_len: int, bos: int):
    store = store_of(tmp_path / "s", documents)
    plan = packing.make_plan(store, name, seq_len, seed=0)
    assert_same(all_rows(store, plan, seq_len, bos), oracle(documents, seq_len, bos))


def test_bos_that_is_eos_gives_one_shifted_stream(tmp_path: Path):
    documents = numbered(LENGTHS["ragged"])
    store = store_of(tmp_path / "s", documents)
    batch = all_rows(store, packing.make_plan(store, "concat", 16, seed=0), 16, bos=EOS)
    real = batch["weights"].ravel() == 1
    stream = [EOS, *(t for d in documents for t in (*d, EOS))]  # <sep> d <sep> d <sep>
    np.testing.assert_array_equal(batch["tokens"].ravel()[real], stream[:-1])
    np.testing.assert_array_equal(batch["targets"].ravel()[real], stream[1:])


@pytest.mark.parametrize("name", packing.PACKINGS)
@pytest.mark.parametrize("seed", range(8))
def test_every_token_is_predicted_once_and_nothing_leaks(tmp_path: Path, name: str, seed: int):
    rng = np.random.default_rng(seed)
    seq_len = int(rng.integers(1, 24))
    documents = numbered(rng.integers(1, rng.integers(2, 60), rng.integers(1, 50)).tolist())
    store = store_of(tmp_path / "s", documents, shard_documents=int(rng.integers(1, 9)))
    batch = all_rows(store, packing.make_plan(store, name, seq_len, seed), seq_len)
    real = batch["weights"] == 1
    counts = collections.Counter(batch["targets"][real].tolist())
    tokens = [t for d in documents for t in d]
    assert counts == {**dict.fromkeys(tokens, 1), EOS: len(documents)}
    np.testing.assert_array_equal(real, batch["segments"] > 0)
    document_of = {t: i for i, d in enumerate(documents) for t in d}
    starts = {d[0] for d in documents}
    for r, t in zip(*np.nonzero(real), strict=True):
        token, target = batch["tokens"][r, t], batch["targets"][r, t]
        if token == BOS:
            assert target in starts
            assert batch["positions"][r, t] == 0
        elif target == EOS:
            assert token == documents[document_of[int(token)]][-1]
        else:
            assert token == target - 1
            assert document_of[int(token)] == document_of[int(target)]
        same = t > 0 and batch["segments"][r, t] == batch["segments"][r, t - 1]
        assert batch["positions"][r, t] == (batch["positions"][r, t - 1] + 1 if same else 0)
        if same:  # within a segment, the input is the target before it
            assert token == batch["targets"][r, t - 1]
        elif t > 0:
            assert batch["segments"][r, t] == batch["segments"][r, t - 1] + 1
    # Padding stands at the end of a row only, and says nothing.
    assert not (real[:, 1:] & ~real[:, :-1]).any()
    for field in batch.values():
        assert not field[~real].any()


def naive_best_fit(sizes: list[int], capacity: int) -> list[int]:
    """The fill of the rows when each piece, longest first, goes into the fullest row that takes it."""
    fills: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [f for f in fills if f + size <= capacity]
        if fitting:
            fills[fills.index(max(fitting))] += size
        else:
            fills.append(size)
    return sorted(fills)


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_equals_the_naive_one(seed: int):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 30))
    sizes = rng.integers(1, capacity + 1, rng.integers(1, 200))
    row_of = packing.best_fit(sizes, capacity, seed)
    fills = np.bincount(row_of, weights=sizes).astype(int)
    assert fills.min() > 0
    assert sorted(fills.tolist()) == naive_best_fit(sizes.tolist(), capacity)


def test_first_fit_fills_rows_better_than_pad_and_depends_on_the_seed(tmp_path: Path):
    store = store_of(tmp_path / "s", numbered(np.random.default_rng(0).integers(1, 12, 400).tolist()))
    fit = packing.make_plan(store, "first_fit", 16, seed=0)
    assert store.num_tokens / (fit.num_rows * 16) > 0.98
    assert packing.make_plan(store, "pad", 16, seed=0).num_rows > 1.5 * fit.num_rows
    assert [fit.pieces(r) for r in range(5)] == [
        packing.make_plan(store, "first_fit", 16, 0).pieces(r) for r in range(5)
    ]
    other = packing.make_plan(store, "first_fit", 16, seed=1)
    assert other.num_rows == fit.num_rows
    assert any(fit.pieces(r) != other.pieces(r) for r in range(fit.num_rows))


def test_a_million_documents_in_seconds():
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 1.5, 1_000_000).astype(np.int64) + 2, 50_000)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    began = time.perf_counter()
    plan = packing.FitPlan(starts, 1024, seed=0)
    assert time.perf_counter() - began < 15  # 0.6 s on a quiet core
    assert starts[-1] / (plan.num_rows * 1024) > 0.99
    assert sum(b - a for r in range(1000) for a, b in plan.pieces(r)) <= 1000 * 1024
    assert plan.nbytes < 20 * len(plan._starts)


@pytest.mark.parametrize("name", packing.PACKINGS)
@pytest.mark.parametrize("limit", [1, 5, 37, 10_000])
def test_limit_takes_the_first_targets(tmp_path: Path, name: str, limit: int):
    documents = numbered([9, 20, 3, 8])
    store = store_of(tmp_path / "s", documents)
    batch = all_rows(store, packing.make_plan(store, name, 16, 0, limit), 16)
    stream = [t for d in documents for t in (*d, EOS)]
    got = batch["targets"][batch["weights"] == 1].tolist()
    assert collections.Counter(got) == collections.Counter(stream[:limit])


def test_unknown_packing(tmp_path: Path):
    store = store_of(tmp_path / "s", numbered([3]))
    with pytest.raises(UserError, match="did you mean 'first_fit'"):
        packing.make_plan(store, "firstfit", 8, 0)
