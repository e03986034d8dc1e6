"""Interpolated modified Kneser-Ney n-gram language models over token ids, in vectorised numpy.

The classical baseline that a neural model on the same tokens has to beat. For an n-gram `u w` of length k
(context `u`, token `w`), with `u'` the context without its oldest token:

    p_k(w | u) = (c(u w) - D_k(c(u w))) / c(u .) + gamma(u) p_{k-1}(w | u')        p_0(w) = 1 / V
    gamma(u)   = (D1 N1(u .) + D2 N2(u .) + D3 N3+(u .)) / c(u .)

`c` is the number of occurrences at the highest order, and below it the number of distinct tokens seen to the
left of the n-gram (continuation count). `N1, N2, N3+` count the distinct `w` with `c(u w)` = 1, 2, 3 or more.
An unseen context passes the lower order through (gamma = 1).

Documents are apart: each starts after a boundary symbol that is context but is never predicted, and no n-gram
spans two documents. N-grams that start at the boundary have nothing to their left, so they keep their
occurrence count at every order (as in SRILM and KenLM). The boundary is an internal symbol, not an id of the
vocabulary.

Counting is by sorting. Each order is one sorted array of int64 keys `context_id * (V + 1) + token`, where
`context_id` is the place of the context in the array of the order below; lookup is a binary search. Memory
while fitting is about 100 bytes a token, and afterwards 24 bytes a distinct n-gram.

Source: Chen & Goodman 1998, "An empirical study of smoothing techniques for language modeling" (TR-10-98),
section 3; boundary n-grams: Heafield et al. 2013, "Scalable modified Kneser-Ney language model estimation".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

Documents = Sequence[int] | Sequence[Sequence[int]] | Int[np.ndarray, " T"]


@dataclass(frozen=True)
class Order:
    """One n-gram length k: its distinct n-grams, and the weights of the contexts of length k - 1."""

    keys: Int[np.ndarray, " n"]  # sorted, context_id * (vocab_size + 1) + token
    alpha: Float[np.ndarray, " n"]  # discounted share of each n-gram: (c - D(c)) / c(context)
    gamma: Float[
        np.ndarray, " contexts"
    ]  # weight of the lower order in each context; 1 where nothing follows
    discounts: tuple[float, float, float]  # D1, D2, D3+

    def find(self, keys: Int[np.ndarray, " T"]) -> Int[np.ndarray, " T"]:
        """Place of each key in `self.keys`, -1 where it is absent."""
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[place] == keys, place, -1)


@dataclass(frozen=True)
class KneserNey:
    """A fitted model; make one with `KneserNey.fit`."""

    vocab_size: int
    eos_id: int | None  # predicted at the end of every document; None: the end is not predicted
    orders: tuple[Order, ...]  # orders[k - 1] holds the n-grams of length k

    @classmethod
    def fit(
        cls, documents: Documents, *, order: int, vocab_size: int, eos_id: int | None = None
    ) -> "KneserNey":
        """Counts the n-grams of `documents` and estimates every order's discounts.

        Args:
          documents: token ids of each document without BOS and EOS; a flat sequence is one document.
          order: longest n-gram, 1 or more (5: four tokens of context).
          vocab_size: V; ids are 0..V-1.
          eos_id: id appended to every document and predicted there.

        Raises:
          ValueError: order below 1, an id outside the vocabulary, or nothing to count.
        """
        if order < 1:
            raise ValueError(f"n-gram order {order}: the shortest is 1")
        tokens, depth = _stream(documents, vocab_size, eos_id)
        if not np.any(depth):
            raise ValueError("no tokens to fit an n-gram model on: every document is empty")
        base = vocab_size + 1
        keys, counts, at_start = [], [], []  # of the distinct n-grams of each order
        places = np.zeros(len(tokens), np.int64)  # of the n-gram of the last order that ends at each position
        for k in range(1, order + 1):
            ends = np.flatnonzero(depth >= k - 1)
            if not len(ends):  # every document is shorter: the model is the one of order k - 1
                break
            context = places[ends - 1] if k > 1 else 0
            distinct, first, inverse, occurrences = np.unique(
                context * base + tokens[ends], return_index=True, return_inverse=True, return_counts=True
            )
            first = ends[first]
            if k > 1:
                # The order below is not the highest: count the distinct k-grams that end with its n-grams.
                left = np.bincount(places[first], minlength=len(keys[-1]))
                counts[-1] = np.where(at_start[-1], counts[-1], left)
            else:
                occurrences[distinct == vocab_size] = 0  # the boundary is context only
            places = np.full(len(tokens), -1, np.int64)
            places[ends] = inverse
            keys.append(distinct)
            counts.append(occurrences)
            at_start.append(depth[first] == k - 1)
        num_contexts = [1, *map(len, keys)]
        orders = (_estimate(*table, base) for table in zip(keys, counts, num_contexts, strict=False))
        return cls(vocab_size, eos_id, tuple(orders))

    def log_prob(self, documents: Documents) -> Float[np.ndarray, " T"]:
        """Natural log-probability of every token (and EOS, if the model has one), in reading order.

        Args:
          documents: as in `fit`; a document never sees another one.

        Returns:
          Float64, one value for each predicted token, documents one after another.

        Raises:
          ValueError: an id outside the vocabulary.
        """
        tokens, depth = _stream(documents, self.vocab_size, self.eos_id)
        context = np.zeros(len(tokens), np.int64)  # place of the context of length k - 1 before each position
        prob = np.full(len(tokens), 1.0 / self.vocab_size)
        for k, level in enumerate(self.orders, 1):
            prob, ngram = self._interpolate(level, context, tokens, prob)
            context = np.empty_like(ngram)
            context[1:] = ngram[:-1]
            context[depth < k] = -1  # the k tokens before would reach past the document's boundary
        return np.log(prob[depth > 0])

    def next_probs(self, prefix: Sequence[int]) -> Float[np.ndarray, " V"]:
        """Distribution of the token that follows `prefix`, the beginning of a document.

        >>> model = KneserNey.fit([[0, 1, 0, 1, 2]], order=3, vocab_size=3)
        >>> float(model.next_probs([0, 1]).sum().round(12))
        1.0
        """
        tokens, _ = _stream([prefix], self.vocab_size, None)
        candidates = np.arange(self.vocab_size)
        prob = np.full(self.vocab_size, 1.0 / self.vocab_size)
        for k, level in enumerate(self.orders[: len(tokens) + 1], 1):
            context = self._place(tokens[len(tokens) - (k - 1) :])
            prob, _ = self._interpolate(level, np.full(self.vocab_size, context), candidates, prob)
        return prob

    def _place(self, ngram: Int[np.ndarray, " k"]) -> int:
        """Place of one n-gram among those of its length, -1 if unseen."""
        place = 0
        for level, token in zip(self.orders, ngram, strict=False):
            if place >= 0:
                place = int(level.find(np.array([place * (self.vocab_size + 1) + token]))[0])
        return place

    def _interpolate(
        self,
        level: Order,
        context: Int[np.ndarray, " T"],
        tokens: Int[np.ndarray, " T"],
        lower: Float[np.ndarray, " T"],
    ) -> tuple[Float[np.ndarray, " T"], Int[np.ndarray, " T"]]:
        """One step of the recursion: (p_k, place of the n-gram or -1), from its context and p_{k-1}."""
        ngram = np.where(context >= 0, level.find(context * (self.vocab_size + 1) + tokens), -1)
        share = np.where(ngram >= 0, level.alpha[ngram], 0.0)
        return np.where(context >= 0, share + level.gamma[context] * lower, lower), ngram


def bits_per_byte(log_probs: Float[np.ndarray, " T"], num_bytes: int) -> float:
    """-sum(log p) / (ln 2 * bytes): nats of all predicted tokens, EOS included, over the bytes of the text.

    >>> bits_per_byte(np.log([0.5, 0.25]), 3)
    1.0
    """
    return float(-np.sum(log_probs) / (np.log(2.0) * num_bytes))


def discounts(counts: Int[np.ndarray, " n"]) -> tuple[float, float, float]:
    """D1, D2, D3+ from the counts of counts n_j: Y = n1 / (n1 + 2 n2), D_j = j - (j + 1) Y n_{j+1} / n_j.

    The estimate needs n_j > 0 and a value strictly between 0 and j. Where a small or very skewed table has no
    such value (a byte vocabulary has hardly any unigram that is seen once), D_j = j / 2 is used, KenLM's
    fallback: the mass stays proper, positive for unseen tokens, and no n-gram loses all of its own.

    Args:
      counts: adjusted counts of the n-grams of one order; zeros are ignored.

    Source: Chen & Goodman 1998.

    >>> discounts(np.array([1, 1, 1, 1, 2, 2, 3]))
    (0.5, 1.25, 1.5)
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(np.float64)
    y = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.0
    estimates = [j - (j + 1) * y * n[j + 1] / n[j] if n[j] else 0.0 for j in (1, 2, 3)]
    d1, d2, d3 = (float(d) if 0.0 < d < j else j / 2 for j, d in enumerate(estimates, 1))
    return d1, d2, d3


def _estimate(
    keys: Int[np.ndarray, " n"], counts: Int[np.ndarray, " n"], num_contexts: int, base: int
) -> Order:
    """Shares and lower-order weights of one order from its adjusted counts."""
    table = discounts(counts)
    removed = np.array([0.0, *table])[np.minimum(counts, 3)]
    context = keys // base
    total = np.bincount(context, weights=counts, minlength=num_contexts)
    mass = np.bincount(context, weights=removed, minlength=num_contexts)
    followed = total > 0
    gamma = np.where(followed, mass / np.where(followed, total, 1.0), 1.0)
    alpha = np.where(counts > 0, (counts - removed) / np.where(counts > 0, total[context], 1.0), 0.0)
    return Order(keys, alpha, gamma, table)


def _stream(
    documents: Documents, vocab_size: int, eos_id: int | None
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """(tokens, depth): each document after one boundary symbol (id V); depth = distance to that boundary."""
    if len(documents) and np.ndim(documents[0]) == 0:
        documents = [documents]
    tail = [] if eos_id is None else [eos_id]
    pieces, lengths = [], []
    for document in documents:
        ids = np.concatenate([np.asarray(document, np.int64).reshape(-1), np.array(tail, np.int64)])
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(
                f"token id {bad} is outside the vocabulary of {vocab_size} ids (0..{vocab_size - 1})"
            )
        pieces += [np.array([vocab_size], np.int64), ids]
        lengths.append(1 + len(ids))
    if not pieces:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    starts = np.cumsum(lengths) - lengths
    return np.concatenate(pieces), np.arange(sum(lengths)) - np.repeat(starts, lengths)
