"""Pairs: two halves of one row for NSP and SOP, and the plan of a store whose documents come in twos.

Sources: next-sentence prediction, Devlin et al. (2018), https://arxiv.org/abs/1810.04805; sentence order,
Lan et al. (2019), https://arxiv.org/abs/1909.11942.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from jaxlm.data.shards import TokenStore
from jaxlm.errors import UserError, check

Tokens = Int[np.ndarray, "T"]


def cut(ends_T: Bool[np.ndarray, "T"], rng: np.random.Generator) -> int:
    """Where a row of 2 tokens or more is cut in two: after a random sentence but the last, else anywhere."""
    places = np.flatnonzero(ends_T[:-1]) + 1
    return int(rng.choice(places)) if len(places) else int(rng.integers(1, len(ends_T)))


def next_sentence(
    tokens_T: Tokens,
    ends_T: Bool[np.ndarray, "T"],
    room: int,
    other: Callable[[np.random.Generator], Tokens],
    rng: np.random.Generator,
) -> tuple[Tokens, Tokens, int]:
    """(a, b, label): b follows a in the text (label 0), or half of the time is from elsewhere (label 1).

    Args:
        tokens_T: the row.
        ends_T: where its sentences end.
        room: columns of a and b together.
        other: tokens of another document; called only if needed.
        rng: draws. A row of one token cannot be cut: what follows it is from elsewhere.
    """
    at = cut(ends_T, rng) if len(tokens_T) > 1 else 1
    a, b = tokens_T[:at], tokens_T[at:]
    if len(b) and rng.random() < 0.5:
        return a, b, 0
    a = a[: room - 1]
    return a, other(rng)[: room - len(a)], 1


def sentence_order(
    tokens_T: Tokens, ends_T: Bool[np.ndarray, "T"], rng: np.random.Generator
) -> tuple[Tokens, Tokens, int]:
    """(a, b, label): the two halves in their order (label 0), or half of the time swapped (label 1)."""
    at = cut(ends_T, rng)
    a, b = tokens_T[:at], tokens_T[at:]
    return (a, b, 0) if rng.random() < 0.5 else (b, a, 1)


class PairPlan:
    """Row i is the pair of the documents 2i and 2i + 1, each with its EOS."""

    def __init__(self, starts_E: Int[np.ndarray, "documents+1"]):
        self._starts = starts_E
        self.num_rows = (len(starts_E) - 1) // 2
        self.nbytes = starts_E.nbytes

    def pieces(self, row: int) -> Sequence[tuple[int, int]]:
        first, second, end = self._starts[2 * row : 2 * row + 3].tolist()
        return (first, second), (second, end)

    def sizes(self) -> Int[np.ndarray, "rows 2"]:
        """Tokens of every input and target, EOS included."""
        return np.diff(self._starts)[: 2 * self.num_rows].reshape(-1, 2)


def make_pair_plan(store: TokenStore, keys: str, where: str, num_tokens: int = 0) -> PairPlan:
    """The pairs of a store.

    Args:
        store: whose documents are inputs and targets by turns.
        keys: the two keys that it is to be prepared with, for the message.
        where: the glob, likewise.
        num_tokens: only pairs that lie in the first so many tokens, at least one; 0 = all.

    Raises:
        UserError: the store holds single documents.
    """
    if not all("," in key for key in store.text_keys):
        raise UserError(
            f"{where} holds documents, not pairs: prepare it with text_key {keys!r}, two fields with a comma "
            "between them"
        )
    starts = store.document_starts()
    if num_tokens:
        pairs = max(1, (int(np.searchsorted(starts, num_tokens, side="right")) - 1) // 2)
        starts = starts[: 2 * pairs + 1]
    return PairPlan(starts)


def class_of_rows(
    store: TokenStore, plan: PairPlan, classes: Sequence[Sequence[int]], names: Sequence[str], where: str
) -> Int[np.ndarray, "rows"]:
    """The class of every row: which of `classes`, each the tokens of a label, its second document is.

    Raises:
        UserError: a label that is none of them.
    """
    known = {tuple(tokens): c for c, tokens in enumerate(classes)}
    check(len(known) == len(classes), f"data.classes={tuple(names)}: two of them have the same tokens")
    out = np.empty(plan.num_rows, np.int32)
    for row in range(plan.num_rows):
        start, stop = plan.pieces(row)[1]
        label = tuple(store.read(start, stop - 1).tolist())
        if label not in known:
            raise UserError(
                f"{where}: the label of pair {row} (from 0) is none of data.classes={tuple(names)}; its "
                f"tokens are {list(label[:16])}"
            )
        out[row] = known[label]
    return out
