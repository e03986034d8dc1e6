"""Masked language modelling: which tokens of a row are hidden, and behind what.

Source: Devlin et al. (2018), https://arxiv.org/abs/1810.04805, and the whole-word option of its code.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

_KEPT, _RANDOM = 0.1, 0.1  # shares of the hidden tokens that show themselves, or another token


def num_predictions(length: int, rate: float, limit: int = 0) -> int:
    """How many tokens of a row of `length` columns, special ones included, are hidden.

    >>> num_predictions(128, 0.15, limit=20), num_predictions(512, 0.15), num_predictions(3, 0.15)
    (19, 77, 1)
    """
    count = max(1, round(length * rate))
    return min(count, limit) if limit else count


def choose(
    hideable_T: Bool[np.ndarray, "T"],
    count: int,
    rng: np.random.Generator,
    begins_T: Bool[np.ndarray, "T"] | None = None,
) -> Int[np.ndarray, "N"]:
    """Columns to hide, `count` of them if there are as many.

    With whole words there may be fewer: words are drawn one after another, and one that no longer fits is
    passed over.

    Args:
        hideable_T: columns that may be hidden.
        count: how many.
        rng: draws.
        begins_T: where words begin, for whole words; a word goes on up to the next beginning or to a column
            that may not be hidden. None = each column by itself.
    """
    columns = np.flatnonzero(hideable_T)
    if begins_T is None:
        return np.sort(rng.permutation(columns)[:count])
    after_gap = np.diff(columns, prepend=-2) > 1
    words = np.split(columns, np.flatnonzero(begins_T[columns] | after_gap)[1:]) if len(columns) else []
    taken: list[int] = []
    for w in rng.permutation(len(words)):
        if len(taken) >= count:
            break
        if len(taken) + len(words[w]) <= count:
            taken += words[w].tolist()
    return np.sort(np.array(taken, np.int64))


def hide(
    tokens_T: Int[np.ndarray, "T"],
    columns_N: Int[np.ndarray, "N"],
    rng: np.random.Generator,
    *,
    mask_id: int,
    text_ids: int,
) -> tuple[Int[np.ndarray, "T"], Float[np.ndarray, "T"]]:
    """The tokens as a model gets them, and weights that are 1 where it is to say what stood there.

    Of the columns to hide, 80 in 100 show the mask token, 10 a random token and 10 what they hold.

    Args:
        tokens_T: the row.
        columns_N: columns to hide.
        rng: draws.
        mask_id: the mask token.
        text_ids: random tokens are drawn below this.
    """
    shown_T, weights_T = tokens_T.copy(), np.zeros(len(tokens_T), np.float32)
    draw_N = rng.random(len(columns_N))
    random_N = rng.integers(0, text_ids, len(columns_N))
    hidden_N = np.where(draw_N < _RANDOM, random_N, mask_id)
    shown_T[columns_N] = np.where(draw_N >= 1 - _KEPT, tokens_T[columns_N], hidden_N)
    weights_T[columns_N] = 1.0
    return shown_T, weights_T
