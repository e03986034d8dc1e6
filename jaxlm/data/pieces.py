"""What the pieces of a vocabulary say of words, of sentences, and of ids that stand for no text."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import check

_SPACES = ("\u2581", "\u0120", "\u010a", "\u0109")  # a space, and byte-level space, line end and tab
_MASKS = ("[MASK]", "<mask>", "<|mask|>")
_FIRST_SENTINEL = "<extra_id_0>"
_SENTENCE_ENDS = ".!?\n\u010a\u3002\uff01\uff1f"


@dataclasses.dataclass(frozen=True)
class Specials:
    """Ids that stand for no text."""

    bos: int
    eos: int
    pad: int
    text_ids: int  # ids below this come from text: random replacements are drawn among them
    mask: int  # -1 = there is none
    sentinel: int  # the first; the others descend from it
    num_sentinels: int

    def need_mask(self) -> int:
        """The id of the mask token, or a `UserError` if there is none."""
        check(self.mask >= 0, _no_room("a mask token", 1, self.text_ids))
        return self.mask

    def need_sentinels(self, count: int) -> int:
        """The first sentinel, or a `UserError` if there are fewer than `count`."""
        more = count - self.num_sentinels
        known = f"; it has {self.num_sentinels}" if self.num_sentinels else ""
        check(more <= 0, _no_room(f"{count} sentinels", more, self.sentinel + 1) + known)
        return self.sentinel


def _no_room(what: str, more: int, size: int) -> str:
    return (
        f"this data.format needs {what}, which data.tokenizer has no ids for: set model.vocab_size to "
        f"{size + more} or more, so that there are ids beyond those of text"
    )


def specials(tokenizer: Tokenizer, vocab_size: int) -> Specials:
    """The special ids of a tokenizer in a model of `vocab_size` ids.

    What the tokenizer has no token for takes ids that it leaves free, descending from the end of the
    vocabulary: the mask token, and T5's sentinels.
    """
    V = tokenizer.vocab_size
    free = max(0, vocab_size - V)
    named = (tokenizer.token_id(name) for name in _MASKS)
    mask = next((i for i in named if i is not None), vocab_size - 1 if free else -1)
    sentinel, count = tokenizer.token_id(_FIRST_SENTINEL), 0
    if sentinel is None:
        sentinel, count = vocab_size - 1, free
    else:
        while tokenizer.token_id(f"<extra_id_{count}>") == sentinel - count:
            count += 1
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    return Specials(*ids, text_ids=V, mask=mask, sentinel=sentinel, num_sentinels=count)


def word_starts(tokenizer: Tokenizer) -> Bool[np.ndarray, "V"]:
    """Whether a token begins a word.

    WordPiece marks those that do not (##), byte-level BPE and SentencePiece those that follow a space. Bytes
    mark nothing: there, and for punctuation everywhere, what is no letter or digit begins a word.
    """
    return _word_starts([tokenizer.piece(i) for i in range(tokenizer.vocab_size)])


def _word_starts(pieces: Sequence[str]) -> Bool[np.ndarray, "V"]:
    """
    >>> _word_starts(["play", "##ing", "."]).tolist()
    [True, False, True]
    >>> _word_starts(["\u2581play", "ing", ".", "s"]).tolist()
    [True, False, True, False]
    """
    if any(piece.startswith("##") for piece in pieces):
        return np.array([not piece.startswith("##") for piece in pieces])
    return np.array([piece.startswith(_SPACES) or not _first(piece).isalnum() for piece in pieces])


def _first(piece: str) -> str:
    """The first character of a piece; a byte beyond ASCII, <0xE3>, is a part of a letter."""
    if len(piece) == 6 and piece.startswith("<0x"):
        code = int(piece[3:5], 16)
        return chr(code) if code < 128 else "a"
    return piece[:1]


def sentence_ends(tokenizer: Tokenizer) -> Bool[np.ndarray, "V"]:
    """Whether a token ends a sentence: its last character is a full stop, a mark or a line end."""
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
    return np.array([(p[-1:] != "" and p[-1] in _SENTENCE_ENDS) or p == "<0x0A>" for p in pieces])


def of_tokens(table_V: Bool[np.ndarray, "V"], tokens_T: Int[np.ndarray, "T"]) -> Bool[np.ndarray, "T"]:
    """A table's entry for each token; ids beyond the table stand for no text and have none."""
    inside_T = tokens_T < len(table_V)
    return table_V[np.where(inside_T, tokens_T, 0)] & inside_T
