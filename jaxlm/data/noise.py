"""BART's noise: sentences in another order, another beginning, tokens gone, spans behind one mask each.

Source: Lewis et al. (2019), https://arxiv.org/abs/1910.13461. Where its code lets the spans that it draws
overlap, these lie beside each other, so that the share of hidden tokens is exactly what was asked for.
"""

import numpy as np
from jaxtyping import Bool, Int


def permute(
    tokens_T: Int[np.ndarray, "T"], ends_T: Bool[np.ndarray, "T"], rng: np.random.Generator
) -> Int[np.ndarray, "T"]:
    """The sentences in a random order; what stands after the last end is a sentence too.

    >>> ends = np.array([False, True, True, False])
    >>> permute(np.arange(4), ends, np.random.default_rng(0)).tolist()
    [3, 0, 1, 2]
    """
    sentences = np.split(tokens_T, np.flatnonzero(ends_T[:-1]) + 1)
    return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])


def rotate(tokens_T: Int[np.ndarray, "T"], rng: np.random.Generator) -> Int[np.ndarray, "T"]:
    """The text from a random token on, and then what stood before it."""
    return np.roll(tokens_T, -int(rng.integers(len(tokens_T))))


def delete(tokens_T: Int[np.ndarray, "T"], rate: float, rng: np.random.Generator) -> Int[np.ndarray, "R"]:
    """A random `rate` of the tokens is gone, one always stays."""
    gone = min(round(len(tokens_T) * rate), len(tokens_T) - 1)
    return np.delete(tokens_T, rng.permutation(len(tokens_T))[:gone])


def span_sizes(hidden: int, mean: float, rng: np.random.Generator) -> Int[np.ndarray, "N"]:
    """Poisson sizes that sum to `hidden`: the last is cut; those of 0 put a mask where nothing is hidden.

    Of these as many are left out as would make the text longer than it was.

    >>> span_sizes(4, 0.1, np.random.default_rng(0)).tolist()
    [1, 1, 0, 2]
    """
    sizes: list[int] = []
    left = hidden
    while left > 0:
        sizes.append(min(int(rng.poisson(mean)), left))
        left -= sizes[-1]
    surplus = max(len(sizes) - hidden, 0)
    return np.delete(np.array(sizes, np.int64), np.flatnonzero(np.equal(sizes, 0))[:surplus])


def infill(
    tokens_T: Int[np.ndarray, "T"], rate: float, mean: float, mask_id: int, rng: np.random.Generator
) -> Int[np.ndarray, "R"]:
    """Spans of Poisson sizes, a `rate` of the tokens together, each behind one mask token.

    Args:
        tokens_T: the text.
        rate: share of the tokens that are hidden.
        mean: of the sizes.
        mask_id: the mask token.
        rng: draws.
    """
    hidden = round(len(tokens_T) * rate)
    sizes = span_sizes(hidden, mean, rng)
    shown = len(tokens_T) - hidden
    # Spans and the tokens between them in a random order: all layouts are equally likely.
    is_span = rng.permutation(np.arange(shown + len(sizes)) < len(sizes))
    widths = np.ones(len(is_span), np.int64)
    widths[is_span] = sizes
    first = np.minimum(np.cumsum(widths) - widths, max(len(tokens_T) - 1, 0))
    return np.where(is_span, mask_id, tokens_T[first])
