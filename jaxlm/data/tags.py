"""Tags of words: in which column of a row each word begins, and the class of its tag.

A pair is a text and its tags, both with ASCII white space between their words. The tokenizer cuts the text as
it likes; the first token that holds a part of a word stands for it (Devlin et al. 2018, section 5.3,
https://arxiv.org/abs/1810.04805), the others have no tag.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxlm.data.pairs import PairPlan
from jaxlm.data.shards import TokenStore
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError, check, nearest


@dataclasses.dataclass(frozen=True)
class Tags:
    """The tags of all words of a store, row by row."""

    starts_R: Int[np.ndarray, "rows+1"]  # number of words before each row
    columns_W: Int[np.ndarray, "words"]  # token of the row's text in which a word begins
    classes_W: Int[np.ndarray, "words"]

    def of_row(self, row: int) -> tuple[Int[np.ndarray, "words"], Int[np.ndarray, "words"]]:
        """Columns and classes of a row's words."""
        words = slice(*self.starts_R[row : row + 2].tolist())
        return self.columns_W[words], self.classes_W[words]


def first_tokens(sizes_T: Float[np.ndarray, "T"], text: bytes) -> Int[np.ndarray, "words"]:
    """The token in which each word of a text begins; two words may begin in one.

    Args:
        sizes_T: bytes that each token stands for: those of the text, after what the tokenizer puts before it.
        text: UTF-8.

    >>> first_tokens(np.array([3, 3, 3, 1]), b"the baker.").tolist()  # 'the', ' ba', 'ker', '.'
    [0, 1]
    """
    ends_T = np.cumsum(np.asarray(sizes_T, np.int64))
    before = ends_T[-1] - len(text)
    begins_W = np.array([word.start() for word in re.finditer(rb"\S+", text)], np.int64)
    return np.searchsorted(ends_T, begins_W + before, side="right").astype(np.int32)


def read_tags(
    store: TokenStore, plan: PairPlan, tokenizer: Tokenizer, names: Sequence[str], where: str
) -> Tags:
    """The tags of every row of a plan, whose second documents are the tags.

    Args:
        store, plan: the pairs.
        tokenizer: theirs.
        names: the tags that there are.
        where: the glob, for messages.

    Raises:
        UserError: not one tag for each word; a tag that is not known; a tokenizer whose tokens do not spell
            the text (WordPiece), or one of which begins two words.
    """
    known = {name.encode(): c for c, name in enumerate(names)}
    columns, classes, starts_R = [], [], np.zeros(plan.num_rows + 1, np.int64)
    for row in range(plan.num_rows):
        pieces = [store.read(start, stop - 1) for start, stop in plan.pieces(row)]  # without EOS
        text, tags = (tokenizer.decode(tokens).encode() for tokens in pieces)
        sizes_T, place = tokenizer.token_bytes[pieces[0]], f"{where}: pair {row} (from 0)"
        check(
            int(sizes_T.sum()) - len(text) in (0, 1),  # a space before the text
            f"{place}: its tokens stand for {int(sizes_T.sum())} bytes, but the text has {len(text)}; tags "
            "need a data.tokenizer whose tokens spell the text (byte, SentencePiece, byte-level BPE), not "
            f"{tokenizer.name!r}",
        )
        columns_W, tags = first_tokens(sizes_T, text), tags.split()
        check(len(tags) == len(columns_W), f"{place} has {len(columns_W)} words and {len(tags)} tags")
        alone = bool((np.diff(columns_W) > 0).all())
        check(alone, f"{place}: a token of data.tokenizer={tokenizer.name!r} begins two words")
        for tag in set(tags) - known.keys():
            name = tag.decode()
            raise UserError(
                f"{place}: the tag {name!r} is none of data.classes={tuple(names)}{nearest(name, names)}"
            )
        columns.append(columns_W)
        classes += [known[tag] for tag in tags]
        starts_R[row + 1] = starts_R[row] + len(tags)
    return Tags(starts_R, np.concatenate(columns), np.array(classes, np.int32))
