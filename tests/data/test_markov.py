"""The Markov source against brute force: its stationary law, its entropies, its samples."""

import itertools
import json

import numpy as np
import pytest

from jaxlm.data.markov import FIRST, MarkovConfig, MarkovSource, make_source, write_corpus
from jaxlm.errors import UserError


def pair_chain(source):
    """The V^2 x V^2 transition matrix of pairs."""
    p = source.probabilities
    V = len(p)
    matrix = np.zeros((V * V, V * V))
    for a, b, c in itertools.product(range(V), repeat=3):
        matrix[a * V + b, b * V + c] = p[a, b, c]
    return matrix


def test_the_entropy_rate_is_that_of_the_pair_chain():
    source = make_source(MarkovConfig(symbols=5, seed=3))
    matrix = pair_chain(source)
    values, vectors = np.linalg.eig(matrix.T)
    pi = np.real(vectors[:, np.argmax(np.real(values))])
    pi /= pi.sum()
    np.testing.assert_allclose(source.stationary.ravel(), pi, atol=1e-12)
    rate = -sum(pi[i] * p * np.log(p) for i, row in enumerate(matrix) for p in row if p > 0)
    assert source.entropy_rate == pytest.approx(rate, abs=1e-12)
    marginal = pi.reshape(5, 5).sum(0)
    np.testing.assert_allclose(marginal, pi.reshape(5, 5).sum(1), atol=1e-12)
    entropy = lambda p: -np.sum(p * np.log(p))  # noqa: E731
    assert source.zeroth_order == pytest.approx(entropy(marginal))
    assert source.first_order == pytest.approx(entropy(pi) - entropy(marginal))
    assert source.entropy_rate < source.first_order < source.zeroth_order
    expected = (7 * source.entropy_rate + source.first_order) / 8
    assert source.floor(8) == pytest.approx(expected, abs=1e-15)


def test_block_entropies_grow_by_the_rate():
    """H(X1..Xn) - H(X1..Xn-1) = h from n = 3 on, by enumeration of all words."""
    source = make_source(MarkovConfig(symbols=3, seed=1))

    def block_entropy(n):
        words = source.stationary
        for _ in range(n - 2):
            words = words[..., None] * np.broadcast_to(source.probabilities, (*words.shape, 3))
        return -np.sum(words * np.log(words))

    assert block_entropy(2) - source.zeroth_order == pytest.approx(source.first_order)
    for n in (3, 4, 7):
        assert block_entropy(n) - block_entropy(n - 1) == pytest.approx(source.entropy_rate, abs=1e-12)


def test_a_periodic_chain_converges():
    p = np.zeros((2, 2, 2))
    p[:, 0, 1] = p[:, 1, 0] = 1.0  # 0 1 0 1 ...
    source = MarkovSource(p)
    np.testing.assert_allclose(source.stationary, [[0, 0.5], [0.5, 0]], atol=1e-12)
    assert source.entropy_rate == 0.0


def test_every_row_is_a_zipf_law():
    cfg = MarkovConfig(symbols=12, exponent_low=0.7, exponent_high=1.9, seed=5)
    rows = np.sort(make_source(cfg).probabilities, axis=-1)[..., ::-1].reshape(-1, 12)
    np.testing.assert_allclose(rows.sum(1), 1.0)
    slopes = np.log(rows[:, 0] / rows[:, -1]) / np.log(12)
    assert slopes.min() > 0.7
    assert slopes.max() < 1.9
    ranks = np.log(np.arange(1, 13))
    np.testing.assert_allclose(np.log(rows[:, :1] / rows), slopes[:, None] * ranks, atol=1e-9)
    alike = make_source(MarkovConfig(symbols=12, spread=3.0)).stationary.sum(0)
    even = make_source(MarkovConfig(symbols=12, spread=0.0)).stationary.sum(0)
    assert alike.max() > 2 * even.max()


def test_rankings_of_rare_pairs_are_alike():
    """Mean rank distance to the order of symbols falls with (a + 1)(b + 1), and does not without decay."""
    V = 30
    rarity = np.outer(np.arange(1, V + 1), np.arange(1, V + 1))
    common, rare = rarity < 10, rarity > 300

    def disorder(decay):
        source = make_source(MarkovConfig(symbols=V, decay=decay))
        ranks = np.argsort(np.argsort(-source.probabilities, axis=-1), axis=-1)
        return np.abs(ranks - np.arange(V)).mean(-1)

    falling, level = disorder(0.3), disorder(0.0)
    assert falling[rare].mean() < 0.5 * falling[common].mean()
    assert level[rare].mean() == pytest.approx(level[common].mean(), rel=0.1)


def excess_of_counting(source, length):
    """What a predictor from the counts of `length` symbols, shrunk to those of one symbol before, loses."""
    random, V = np.random.default_rng(0), len(source.probabilities)
    n = random.poisson(length * source.stationary[..., None] * source.probabilities)
    zeroth = (n.sum((0, 1)) + 0.5) / (n.sum() + 0.5 * V)
    first = (n.sum(0) + 30 * zeroth) / (n.sum((0, 2))[:, None] + 30)
    q = (n + 10 * first) / (n.sum(-1, keepdims=True) + 10)
    return np.sum(source.stationary[..., None] * source.probabilities * np.log(source.probabilities / q))


def test_counting_nears_the_floor_by_a_power_of_the_data():
    """And not faster and faster, as where the rows are few enough to be learned to the end."""

    def exponents(cfg):
        source = make_source(cfg)
        excess = np.array([excess_of_counting(source, length) for length in (3e5, 1e6, 3e6, 1e7)])
        return -np.diff(np.log(excess)) / np.diff(np.log((3e5, 1e6, 3e6, 1e7)))

    straight = exponents(MarkovConfig())
    bent = exponents(MarkovConfig(symbols=40, exponent_low=1.0, exponent_high=2.0, spread=0.8, decay=0.0))
    assert np.ptp(straight) < 0.15
    assert np.ptp(bent) > 0.2
    assert bent.min() > straight.max()


def test_a_sample_has_the_frequencies_of_the_source_and_grows_at_its_end():
    source = make_source(MarkovConfig(symbols=4, seed=2))
    sample = source.sample(200_000, seed=7).astype(int)
    triples = np.bincount(sample[:-2] * 16 + sample[1:-1] * 4 + sample[2:], minlength=64) / (len(sample) - 2)
    expected = (source.stationary[..., None] * source.probabilities).ravel()
    np.testing.assert_allclose(triples, expected, atol=6 * np.sqrt(0.25 / len(sample)))
    # The plug-in code length of the true model is the entropy rate.
    spent = -np.log(source.probabilities[sample[:-2], sample[1:-1], sample[2:]])
    assert spent.mean() == pytest.approx(source.entropy_rate, abs=5 * spent.std() / len(spent) ** 0.5)
    np.testing.assert_array_equal(source.sample(100_000, seed=7), sample[:100_000])
    assert (source.sample(1000, seed=8) != sample[:1000]).mean() > 0.3


def test_the_corpus_is_a_function_of_its_settings(tmp_path):
    cfg = MarkovConfig(symbols=6, seed=4)
    facts = write_corpus(tmp_path / "a", cfg, 5000, 1000, seq_len=16)
    again = write_corpus(tmp_path / "b", cfg, 5000, 1000, seq_len=16)
    assert facts == again == json.loads((tmp_path / "a" / "markov.json").read_text())
    text = (tmp_path / "a" / "train" / "markov.txt").read_bytes()
    assert len(text) == 5000
    assert set(text) <= set(range(FIRST, FIRST + 6))
    assert len((tmp_path / "a" / "heldout" / "markov.txt").read_bytes()) == 1000
    assert facts["floor"] == make_source(cfg).floor(16)
    (tmp_path / "a" / "train" / "markov.txt").write_bytes(b"kept")  # it is there: not made again
    assert write_corpus(tmp_path / "a", cfg, 5000, 1000, seq_len=16) == facts
    assert (tmp_path / "a" / "train" / "markov.txt").read_bytes() == b"kept"
    with pytest.raises(UserError, match="holds another corpus"):
        write_corpus(tmp_path / "a", cfg, 5001, 1000, seq_len=16)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not touched"):
        write_corpus(tmp_path / "c", cfg, 5000)
    with pytest.raises(UserError, match="printable"):
        MarkovConfig(symbols=95)
