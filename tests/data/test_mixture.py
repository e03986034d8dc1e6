"""The order of rows: exact proportions, permutations, and the same answer for any row asked alone."""

import numpy as np
import pytest

from jaxlm.data import mixture
from jaxlm.errors import UserError

WEIGHTS = [
    (1.0,),
    (1.0, 1.0),
    (0.7, 0.3),
    (5, 1, 1),
    (0.5, 0.3, 0.15, 0.05),
    (1e-9, 1.0),
    tuple(range(1, 40)),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_each_source_is_drawn_in_order_and_in_proportion(weights: tuple[float, ...]):
    shares = mixture.shares(weights)
    rows = np.arange(20_000)
    sources, draws = mixture.draw(rows, shares)
    for s, weight in enumerate(weights):
        mine = sources == s
        np.testing.assert_array_equal(draws[mine], np.arange(mine.sum()))  # 0, 1, 2, ... without a gap
        expected = (rows + 1) * weight / sum(weights)
        assert np.abs(np.cumsum(mine) - expected).max() < 1.5 + len(weights) ** 0.5


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_any_row_alone_and_far_away(weights: tuple[float, ...]):
    shares = mixture.shares(weights)
    for first in (0, 12345, 2**40):
        sources, draws = mixture.draw(np.arange(first, first + 64), shares)
        for i in (0, 17, 63):
            one, draw = mixture.draw(np.array([first + i]), shares)
            assert (one[0], draw[0]) == (sources[i], draws[i])
        assert (draws >= 0).all()
        np.testing.assert_allclose(
            draws, first * np.array(shares)[sources] / sum(shares), atol=64 + len(shares)
        )


def test_shares():
    assert mixture.shares([1, 1]) == mixture.shares([0.5, 0.5]) == mixture.shares([7, 7])
    exact = np.array(mixture.shares([0.7, 0.3]))
    np.testing.assert_allclose(exact / exact.sum(), [0.7, 0.3], atol=1e-6)
    assert min(mixture.shares([1e-12, 1.0])) == 1


# 8192 rows are the most that have a table; more go through the index shuffle.
@pytest.mark.parametrize("size", [1, 2, 3, 10, 8192, 8193])
def test_epochs_are_permutations_of_their_own(size: int):
    def epoch(e: int, seed: int = 0, source: int = 0) -> list[int]:
        return [mixture.permute(e * size + i, size, seed, source) for i in range(size)]

    for e in (0, 1, 7):
        assert sorted(epoch(e)) == list(range(size))
    if size >= 10:
        orders = [epoch(0), epoch(1), epoch(0, seed=1), epoch(1, seed=1), epoch(0, source=1)]
        assert len({tuple(o) for o in orders}) == 5
        assert epoch(0) == orders[0]


@pytest.mark.parametrize("size", [4096, 10_000])
def test_permutation_mixes(size: int):
    order = np.array([mixture.permute(i, size, 3, 0) for i in range(size)])
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
    assert (np.diff(order) == 1).mean() < 0.01


def test_order_is_pinned():
    """A change of these numbers changes the order of every run: it must be meant."""
    assert mixture.order_probe() == [631, 25, 192021, 577350]


@pytest.mark.parametrize(
    ("spec", "pairs"),
    [
        ("a/*.txt", (("a/*.txt", 1.0),)),
        ("a/*.txt=2, b=0.5", (("a/*.txt", 2.0), ("b", 0.5))),
        ("day=2024-01-01/*.parquet", (("day=2024-01-01/*.parquet", 1.0),)),
        ((("a", 1), ("b", 3.5)), (("a", 1.0), ("b", 3.5))),
        (["a", ["b", 2]], (("a", 1.0), ("b", 2.0))),
    ],
)
def test_parse_mixture(spec, pairs):
    assert mixture.parse_mixture(spec) == pairs


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "data.train names no files"),
        ((), "data.train names no files"),
        ((("a", 0),), "the weight of 'a' is 0, not a positive number"),
        ((("a", -1.0),), "not a positive number"),
        ((("a", "x"),), "not a positive number"),
        ("a=nan", "not a positive number"),
        ("a=inf", "not a positive number"),
        ((("a", 1, 2),), "is not a .glob, weight. pair"),
    ],
)
def test_bad_mixtures(spec, message: str):
    with pytest.raises(UserError, match=message):
        mixture.parse_mixture(spec)


def test_too_many_rows():
    mixture.check_rows(2**32, "x")
    with pytest.raises(UserError, match="at most 4294967296 can be shuffled"):
        mixture.check_rows(2**32 + 1, "x")
