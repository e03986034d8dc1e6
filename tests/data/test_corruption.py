"""The published counts of masking, span corruption and BART's noise, and what each must leave intact."""

import numpy as np
import pytest

from jaxlm.data import corruption, noise, pairs, spans


def draws(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# BERT's masks.


def test_a_row_of_128_has_19_predictions_and_80_10_10_of_them():
    """BERT: 15 % of 128 columns, at most 20."""
    tokens, text = np.arange(1000, 1128), np.ones(128, bool)
    text[[0, 127]] = False
    shown_as = np.zeros(3)
    for seed in range(2000):
        rng = draws(seed)
        columns = corruption.choose(text, corruption.num_predictions(128, 0.15, 20), rng)
        shown, weights = corruption.hide(tokens, columns, rng, mask_id=5, text_ids=900)
        assert weights.sum() == 19
        assert not weights[[0, 127]].any()
        np.testing.assert_array_equal(shown[weights == 0], tokens[weights == 0])
        hidden = shown[weights == 1]
        kept = hidden == tokens[weights == 1]
        shown_as += ((hidden == 5).sum(), kept.sum(), ((hidden != 5) & ~kept).sum())
    np.testing.assert_allclose(shown_as / shown_as.sum(), (0.8, 0.1, 0.1), atol=0.005)


def test_whole_words_are_hidden_whole():
    begins = np.array([1, 1, 0, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 1, 1], bool)
    text = np.ones(16, bool)
    text[[0, 11, 15]] = False  # a special token ends a word too
    word = np.cumsum(begins)
    seen = set()
    for seed in range(200):
        columns = corruption.choose(text, 4, draws(seed), begins)
        assert len(columns) <= 4
        assert text[columns].all()
        for w in set(word[columns].tolist()):
            assert set(np.flatnonzero((word == w) & text)) <= set(columns.tolist())
        seen |= set(columns.tolist())
    assert seen == set(np.flatnonzero(text).tolist())
    alone = [corruption.choose(text, 4, draws(seed)) for seed in range(20)]
    assert all(len(columns) == 4 for columns in alone)
    assert any(len(set(word[columns])) == 4 and 1 in columns for columns in alone)  # words are torn


def test_choosing_from_nothing():
    assert corruption.choose(np.zeros(4, bool), 2, draws()).tolist() == []
    assert corruption.choose(np.zeros(4, bool), 2, draws(), np.ones(4, bool)).tolist() == []


# T5's spans.


def test_published_lengths():
    """512 inputs at 15 % and spans of 3 are made of 568 tokens, and give 114 targets."""
    assert spans.raw_length(512, 0.15, 3.0) == 568
    assert spans.lengths(568, 0.15, 3.0) == (512, 114)
    assert spans.lengths(569, 0.15, 3.0)[0] > 512


@pytest.mark.parametrize(
    ("length", "rate", "mean"), [(568, 0.15, 3.0), (2, 0.15, 3.0), (50, 0.5, 1.0), (9, 0.9, 3.0)]
)
def test_spans_can_be_put_back(length: int, rate: float, mean: float):
    tokens, sentinel = np.arange(length), 10_000
    hidden_count, span_count = spans.counts(length, rate, mean)
    at = np.zeros(length)
    for seed in range(50):
        hidden = spans.noise_mask(length, draws(seed), rate, mean)
        at += hidden
        assert hidden.sum() == hidden_count
        inputs, targets = spans.corrupt(tokens, hidden, sentinel)
        marks = sentinel - np.arange(span_count)  # descending from the end of the vocabulary
        assert inputs[inputs > length].tolist() == targets[targets > length].tolist() == marks.tolist()
        assert (len(inputs) + 1, len(targets) + 1) == spans.lengths(length, rate, mean)
        pieces = np.split(targets, np.flatnonzero(targets > length))[1:]
        behind = {piece[0]: piece[1:].tolist() for piece in pieces}
        restored = [t for i in inputs.tolist() for t in behind.get(i, [i])]
        assert restored == tokens.tolist()
    assert length < 50 or 0 < at[1:].min() < at.max() < 50 or at[0] == 0


def test_all_cuts_are_equally_likely():
    cuts = [tuple(spans.segmentation(5, 3, draws(seed)).tolist()) for seed in range(3000)]
    kinds = {cut: cuts.count(cut) for cut in set(cuts)}
    assert len(kinds) == 6
    assert all(sum(cut) == 5 for cut in kinds)
    assert 400 < min(kinds.values()) < max(kinds.values()) < 600


# BART's noise.


def test_infilling_hides_the_share_in_poisson_spans():
    tokens, mask = np.arange(1, 1001), 0
    sizes = []
    for seed in range(100):
        noisy = noise.infill(tokens, 0.3, 3.0, mask, draws(seed))
        shown = noisy[noisy != mask]
        assert len(shown) == 700  # 30 % are gone
        assert (np.diff(shown) > 0).all()  # in their order
        sizes += noise.span_sizes(300, 3.0, draws(seed)).tolist()
    masks = [np.sum(noise.infill(tokens, 0.3, 3.0, mask, draws(seed)) == mask) for seed in range(100)]
    assert np.mean(masks) == pytest.approx(101, abs=3)  # 300 tokens, a mask for every three
    counts = np.bincount(sizes, minlength=6)[:6] / len(sizes)
    poisson = np.exp(-3) * np.array([1, 3, 9 / 2, 27 / 6, 81 / 24, 243 / 120])
    np.testing.assert_allclose(counts, poisson, atol=0.015)


def test_a_text_with_its_masks_is_no_longer_than_before():
    tokens = np.arange(1, 21)
    drawn = [noise.infill(tokens, 0.5, 0.2, 0, draws(seed)) for seed in range(200)]
    assert max(map(len, drawn)) == 20  # where most sizes that are drawn are 0
    assert all((noisy > 0).sum() == 10 for noisy in drawn)


def test_a_span_stands_anywhere():
    first = [
        np.flatnonzero(noise.infill(np.arange(1, 7), 0.2, 50.0, 0, draws(s)) == 0)[0] for s in range(600)
    ]
    assert np.bincount(first).min() > 60  # of 6 places
    assert len(np.bincount(first)) == 6


def test_sentences_stay_whole_in_another_order():
    tokens = np.arange(12)
    ends = np.isin(tokens, (2, 3, 8))
    orders = set()
    for seed in range(400):
        mixed = noise.permute(tokens, ends, draws(seed)).tolist()
        sentences = [tuple(range(a, b)) for a, b in ((0, 3), (3, 4), (4, 9), (9, 12))]
        found = []
        while mixed:
            sentence = next(s for s in sentences if s[0] == mixed[0])
            assert mixed[: len(sentence)] == list(sentence)
            mixed = mixed[len(sentence) :]
            found.append(sentence)
        assert sorted(found) == sentences
        orders.add(tuple(found))
    assert len(orders) == 24


def test_deletion_and_rotation():
    tokens = np.arange(100)
    short = noise.delete(tokens, 0.15, draws())
    assert len(short) == 85
    assert (np.diff(short) > 0).all()
    assert noise.delete(tokens[:1], 0.9, draws()).tolist() == [0]
    turned = [noise.rotate(tokens, draws(seed)) for seed in range(50)]
    assert all(np.unique(np.diff(t) % 100).tolist() == [1] for t in turned)
    assert len({t[0] for t in turned}) > 20


# NSP and SOP.


def test_next_sentences_are_next_half_of_the_time():
    tokens, ends = np.arange(20), np.isin(np.arange(20), (4, 9, 14, 19))
    elsewhere = np.arange(100, 150)
    labels = []
    for seed in range(2000):
        a, b, label = pairs.next_sentence(tokens, ends, 25, lambda rng: elsewhere, draws(seed))
        labels.append(label)
        assert len(a) in (5, 10, 15)  # cut after a sentence
        assert len(a) + len(b) <= 25
        if label:
            assert b.tolist() == elsewhere[: 25 - len(a)].tolist()
        else:
            assert np.concatenate([a, b]).tolist() == tokens.tolist()
    assert np.mean(labels) == pytest.approx(0.5, abs=0.04)
    assert pairs.next_sentence(tokens[:1], ends[:1], 25, lambda rng: elsewhere, draws())[2] == 1


def test_sentence_order_swaps_half_of_the_time():
    tokens, ends = np.arange(20), np.zeros(20, bool)
    labels = []
    for seed in range(2000):
        a, b, label = pairs.sentence_order(tokens, ends, draws(seed))
        labels.append(label)
        assert min(len(a), len(b)) > 0
        assert np.concatenate([b, a] if label else [a, b]).tolist() == tokens.tolist()
    assert np.mean(labels) == pytest.approx(0.5, abs=0.04)
