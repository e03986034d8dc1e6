"""Kneser-Ney against a literal dict implementation, a hand-worked example and the axioms of probability."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from jaxlm.model.ngram import KneserNey, bits_per_byte, discounts

BOUNDARY = "<s>"


class Textbook:
    """Interpolated modified Kneser-Ney as the papers write it: tuples, dicts and recursion."""

    def __init__(self, documents, order, vocab_size, eos_id):
        self.order, self.vocab_size = order, vocab_size
        tail = [] if eos_id is None else [eos_id]
        occurrences = {k: Counter() for k in range(1, order + 1)}
        for document in documents:
            text = [BOUNDARY, *document, *tail]
            for end in range(1, len(text)):
                for k in range(1, min(order, end + 1) + 1):
                    occurrences[k][tuple(text[end - k + 1 : end + 1])] += 1
        self.count, self.discount = {}, {}
        self.followers = {k: defaultdict(dict) for k in range(1, order + 1)}
        for k in range(1, order + 1):
            left = defaultdict(set)
            if k < order:
                for ngram in occurrences[k + 1]:
                    left[ngram[1:]].add(ngram[0])
            self.count[k] = {
                g: c if k == order or g[0] == BOUNDARY else len(left[g]) for g, c in occurrences[k].items()
            }
            n = Counter(self.count[k].values())
            y = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.0
            self.discount[k] = {0: 0.0}
            for j in (1, 2, 3):
                estimate = j - (j + 1) * y * n[j + 1] / n[j] if n[j] else 0.0
                self.discount[k][j] = estimate if 0 < estimate < j else j / 2
            for g, c in self.count[k].items():
                self.followers[k][g[:-1]][g[-1]] = c

    def prob(self, word, history):
        """p(word | history), history a list of tokens after the boundary."""
        context = tuple([BOUNDARY, *history][-(self.order - 1) :]) if self.order > 1 else ()
        return self._prob(word, context)

    def _prob(self, word, context):
        k = len(context) + 1
        lower = self._prob(word, context[1:]) if context else 1 / self.vocab_size
        seen = self.followers[k].get(context)
        if not seen:
            return lower
        total = sum(seen.values())
        removed = {w: self.discount[k][min(c, 3)] for w, c in seen.items()}
        own = (seen[word] - removed[word]) / total if word in seen else 0.0
        return own + sum(removed.values()) / total * lower


def zipf_documents(seed, vocab_size, lengths):
    """Documents with skewed unigrams and some structure, so that every count of counts occurs."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, vocab_size + 1) ** 1.1
    weights /= weights.sum()
    documents = []
    for length in lengths:
        text = [0]
        for _ in range(length):
            step = rng.choice(vocab_size, p=weights)
            text.append(int((text[-1] * 3 + step) % vocab_size) if rng.random() < 0.7 else int(step))
        documents.append(text[1:])
    return documents


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("eos_id", [None, 0, 11])
@pytest.mark.parametrize(("vocab_size", "lengths"), [(12, (40, 3, 1, 60)), (40, (400, 0, 250)), (12, (1, 2))])
def test_equals_the_textbook(order, eos_id, vocab_size, lengths):
    train = zipf_documents(1, vocab_size, lengths)
    held_out = zipf_documents(2, vocab_size, (50, 0, 7, 30))
    model = KneserNey.fit(train, order=order, vocab_size=vocab_size, eos_id=eos_id)
    book = Textbook(train, order, vocab_size, eos_id)
    tail = [] if eos_id is None else [eos_id]
    expected = [
        math.log(book.prob(text[i], text[:i]))
        for text in ([*document, *tail] for document in held_out)
        for i in range(len(text))
    ]
    got = model.log_prob(held_out)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
    for prefix in ([], held_out[0][:1], held_out[0][:3], held_out[0][:20], train[0][:9]):
        expected = [book.prob(w, prefix) for w in range(vocab_size)]
        np.testing.assert_allclose(model.next_probs(prefix), expected, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one_and_none_is_zero(order):
    vocab_size = 30
    train = zipf_documents(3, vocab_size - 5, (300, 200))  # five ids are never seen
    model = KneserNey.fit(train, order=order, vocab_size=vocab_size, eos_id=vocab_size - 6)
    rng = np.random.default_rng(0)
    prefixes = [[], [29], [28, 29, 27, 26], *(train[0][:n] for n in range(1, 40))]
    prefixes += [rng.integers(0, vocab_size, size=n).tolist() for n in range(1, 30)]
    for prefix in prefixes:
        probs = model.next_probs(prefix)
        assert abs(probs.sum() - 1) < 1e-12
        assert probs.min() > 0


def test_worked_example():
    # Document "a a b" (a=0, b=1) as bigrams with V = 4, no EOS. Bigrams <s>a, aa, ab, each once:
    # n = (3, 0, ..), Y = 1, D1 = 1 - 2*0/3 = 1 is not below 1, so D1 = 1/2.
    # Unigram continuations: a follows {<s>, a}, 2; b follows {a}, 1:
    # n = (1, 1, ..), Y = 1/3, D1 = 1 - 2/3 = 1/3, D2 = 2 - 0 is not below 2, so D2 = 1.
    model = KneserNey.fit([[0, 0, 1]], order=2, vocab_size=4)
    assert model.orders[1].discounts == (0.5, 1.0, 1.5)
    assert model.orders[0].discounts == pytest.approx((1 / 3, 1.0, 1.5))
    rest = (1 + 1 / 3) / 3 / 4  # unigram mass left over, shared by four ids
    unigram = np.array([1 / 3 + rest, (2 / 3) / 3 + rest, rest, rest])
    np.testing.assert_allclose(model.next_probs([0]), [0.25, 0.25, 0, 0] + 0.5 * unigram, rtol=1e-14)
    np.testing.assert_allclose(model.next_probs([]), [0.5, 0, 0, 0] + 0.5 * unigram, rtol=1e-14)
    np.testing.assert_allclose(model.next_probs([0, 0, 1]), unigram, rtol=1e-14)  # nothing ever followed b


@pytest.mark.parametrize("eos_id", [None, 0])
def test_documents_do_not_leak(eos_id):
    a, b, c = zipf_documents(4, 15, (80, 50, 60))
    forward = KneserNey.fit([a, b], order=4, vocab_size=15, eos_id=eos_id)
    backward = KneserNey.fit([b, a], order=4, vocab_size=15, eos_id=eos_id)
    joined = KneserNey.fit([a + b], order=4, vocab_size=15, eos_id=eos_id)
    np.testing.assert_array_equal(forward.log_prob([c]), backward.log_prob([c]))
    assert not np.array_equal(forward.log_prob([c]), joined.log_prob([c]))
    apart = np.concatenate([forward.log_prob([c]), forward.log_prob([b]), forward.log_prob([])])
    np.testing.assert_array_equal(forward.log_prob([c, b]), apart)


def test_flat_sequence_is_one_document():
    tokens = zipf_documents(5, 15, (100,))[0]
    nested = KneserNey.fit([tokens], order=3, vocab_size=15, eos_id=2)
    flat = KneserNey.fit(np.array(tokens, np.uint16), order=3, vocab_size=15, eos_id=2)
    np.testing.assert_array_equal(nested.log_prob([tokens]), flat.log_prob(np.array(tokens)))
    assert len(flat.log_prob(tokens)) == 101


def test_longer_context_helps_where_there_is_structure():
    train, held_out = zipf_documents(6, 8, (20000,)), zipf_documents(7, 8, (3000,))
    nll = [-KneserNey.fit(train, order=k, vocab_size=8).log_prob(held_out).mean() for k in (1, 2, 3)]
    assert nll[1] < nll[0] - 0.1
    assert nll[2] < nll[1] + 0.02  # the source has order 2: a third token must cost next to nothing


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([1] * 8 + [2] * 4 + [3] * 2 + [4] + [9], (0.5, 1.25, 2.0)),  # Y = 1/2: 1 - 1/2, 2 - 3/4, 3 - 1
        ([], (0.5, 1.0, 1.5)),
        ([0, 0, 7, 8], (0.5, 1.0, 1.5)),  # nothing seen once
        ([1, 1, 1], (0.5, 1.0, 1.5)),  # D1 = 1 would take everything from every n-gram
        ([1] + [2] * 4 + [3] * 9, (1 / 9, 1.25, 1.5)),  # Y = 1/9: 1 - 8/9, 2 - 3/4, D3 = 3 has no estimate
        ([1] * 2 + [2] * 1 + [3] * 9, (0.5, 1.0, 1.5)),  # D2 = 2 - 3*9/2 < 0
    ],
)
def test_discounts(counts, expected):
    assert discounts(np.array(counts, np.int64)) == pytest.approx(expected)


def test_bits_per_byte():
    assert bits_per_byte(np.log(np.full(10, 1 / 16)), 20) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("documents", "order", "message"),
    [
        ([[1, 2]], 0, "order 0"),
        ([[1, 9]], 2, "token id 9 .*0..7"),
        ([[1, -3]], 2, "token id -3"),
        ([], 2, "every document is empty"),
        ([[], []], 2, "every document is empty"),
    ],
)
def test_bad_input(documents, order, message):
    with pytest.raises(ValueError, match=message):
        KneserNey.fit(documents, order=order, vocab_size=8)
