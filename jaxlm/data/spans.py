"""T5's span corruption: spans give way to sentinels, and the target says what stood behind each.

    Thank you <X> me to your party <Y> week </s>        inputs
    <X> for inviting <Y> last </s>                      targets

Source: Raffel et al. (2019), https://arxiv.org/abs/1910.10683, and `random_spans_noise_mask` of its code.
"""

import numpy as np
from jaxtyping import Bool, Int


def counts(length: int, rate: float, mean_span: float) -> tuple[int, int]:
    """(hidden tokens, spans) of a row of `length` tokens.

    >>> counts(568, 0.15, 3.0)
    (85, 28)
    """
    hidden = min(max(round(length * rate), 1), length - 1)
    return hidden, max(1, min(round(hidden / mean_span), hidden, length - hidden))


def lengths(tokens: int, rate: float, mean_span: float) -> tuple[int, int]:
    """Columns of the inputs and of the targets that a row of `tokens` becomes, EOS included.

    >>> lengths(568, 0.15, 3.0)
    (512, 114)
    """
    hidden, spans = counts(tokens, rate, mean_span)
    return tokens - hidden + spans + 1, hidden + spans + 1


def raw_length(inputs: int, rate: float, mean_span: float) -> int:
    """The longest row whose inputs, and those of every shorter one, fit into so many columns.

    >>> raw_length(512, 0.15, 3.0)
    568
    """
    tokens = max(1, inputs - 1)
    while lengths(tokens + 1, rate, mean_span)[0] <= inputs:
        tokens += 1
    return tokens


def segmentation(items: int, parts: int, rng: np.random.Generator) -> Int[np.ndarray, "parts"]:
    """Sizes, at least 1 each, of a random cut of `items` into `parts`; all cuts are equally likely."""
    cuts = np.sort(rng.choice(items - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=items)


def noise_mask(length: int, rng: np.random.Generator, rate: float, mean_span: float) -> Bool[np.ndarray, "T"]:
    """Which tokens are hidden: spans and what stands between them take turns, and a row ends in a span."""
    hidden, spans = counts(length, rate, mean_span)
    sizes = np.stack([segmentation(length - hidden, spans, rng), segmentation(hidden, spans, rng)], 1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, sizes.reshape(-1))


def corrupt(
    tokens_T: Int[np.ndarray, "T"], hidden_T: Bool[np.ndarray, "T"], sentinel: int
) -> tuple[Int[np.ndarray, "S"], Int[np.ndarray, "R"]]:
    """Inputs and targets, neither with EOS.

    Args:
        tokens_T: the row.
        hidden_T: which tokens are hidden; each run of them is a span.
        sentinel: the first; that of span i is `sentinel - i`.

    >>> hidden = np.array([False, True, True, False, True])
    >>> [part.tolist() for part in corrupt(np.arange(5), hidden, sentinel=99)]
    [[0, 99, 3, 98], [99, 1, 2, 98, 4]]
    """
    begins_T = hidden_T & ~np.concatenate([[False], hidden_T[:-1]])
    marks_T = sentinel + 1 - np.cumsum(begins_T)
    inputs_S = np.where(hidden_T, marks_T, tokens_T)[~hidden_T | begins_T]
    at = np.flatnonzero(begins_T)
    shown_before = at - np.concatenate([[0], np.cumsum(hidden_T)])[at]
    return inputs_S, np.insert(tokens_T[hidden_T], at - shown_before, marks_T[at])
