"""Word2Vec: skip-gram with negative sampling, its batches, and what word vectors are judged by.

For a centre word c, a word o beside it and K words k drawn from the noise distribution, with v the rows of
`embed/table` (the vectors that are kept) and u those of `context/table`:

    loss = -log sigmoid(v_c . u_o) - sum_k log sigmoid(-v_c . u_k)

The noise is the unigram distribution to the power of 3/4. Frequent words are left out at random: a word that
is a share f of the text stays with probability min(1, sqrt(s / f) + s / f), s = `sample`. The window of each
centre is drawn from 1..`window`, so that near words count more.

Source: Mikolov et al. 2013, arXiv:1301.3781 and arXiv:1310.4546; the probability to stay is their code's.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.errors import UserError, check
from jaxlm.model.layers import normal_init

Params = dict[str, Any]
Batch = dict[str, Any]
WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")

# The last two components of a leaf's name -> the logical axes of its dimensions.


@dataclasses.dataclass(frozen=True)
class Word2VecConfig:
    """What is learned, and from what pairs of words."""

    dim: int = 100  # D
    window: int = 5  # words to either side at most
    negatives: int = 5  # K, noise words a pair
    min_count: int = 5  # rarer words are left out, as if they were not there
    sample: float = 1e-3  # share of the text from which on a word is thinned out; 0 = none is
    power: float = 0.75  # of the unigram distribution that noise is drawn from

    def __post_init__(self) -> None:
        for name in ("dim", "window", "negatives", "min_count"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("sample", "power"):
            check(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")


def split_words(text: str) -> list[str]:
    """Lower-case words of letters, apostrophes inside them included.

    >>> split_words("O Romeo, Romeo! wherefore art thou Romeo? 'Tis but thy name: th' enemy's 2")
    ['o', 'romeo', 'romeo', 'wherefore', 'art', 'thou', 'romeo', 'tis', 'but', 'thy', 'name', 'th', "enemy's"]
    """
    return WORD.findall(text.lower())


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents as word ids, the most frequent word first."""

    words: tuple[str, ...]  # V of them
    counts: Int[np.ndarray, " V"]  # occurrences in the text
    documents: tuple[Int[np.ndarray, " T"], ...]

    @classmethod
    def of(cls, documents: Iterable[Sequence[str]], min_count: int) -> "Corpus":
        """Counts words and leaves out those that are rarer than `min_count`.

        Raises:
            UserError: fewer than two words are left.
        """
        documents = [list(words) for words in documents]
        counted = Counter(word for words in documents for word in words)
        kept = sorted((w for w, n in counted.items() if n >= min_count), key=lambda w: (-counted[w], w))
        check(len(kept) > 1, f"min_count={min_count} leaves {len(kept)} of {len(counted)} words")
        index = {word: i for i, word in enumerate(kept)}
        ids = (np.array([index[w] for w in words if w in index], np.int32) for words in documents)
        return cls(tuple(kept), np.array([counted[w] for w in kept]), tuple(d for d in ids if len(d) > 1))


def keep_probability(counts: Int[np.ndarray, " V"], sample: float) -> Float[np.ndarray, " V"]:
    """With what probability an occurrence of each word stays in the text.

    >>> keep_probability(np.array([900, 99, 1]), 1e-2).round(3).tolist()
    [0.117, 0.419, 1.0]
    """
    if not sample:
        return np.ones(len(counts))
    share = sample / (counts / counts.sum())
    return np.minimum(1.0, np.sqrt(share) + share)


def noise_cdf(counts: Int[np.ndarray, " V"], power: float) -> Float[np.ndarray, " V"]:
    """The cumulated noise distribution: a uniform number's place in it is a noise word."""
    weights = counts.astype(np.float64) ** power
    return np.cumsum(weights) / weights.sum()


def pairs(
    ids_T: Int[np.ndarray, " T"], document_T: Int[np.ndarray, " T"], window: int, rng: np.random.Generator
) -> Int[np.ndarray, "P 2"]:
    """Every (centre, word beside it) of a text whose centres have windows drawn from 1..`window`.

    >>> flat, rng = np.array([5, 6, 7]), np.random.default_rng(0)
    >>> pairs(flat, np.array([0, 0, 1]), 1, rng).tolist()
    [[5, 6], [6, 5]]
    """
    reach_T, found = rng.integers(1, window + 1, len(ids_T)), []
    for distance in range(1, min(window, len(ids_T) - 1) + 1):
        left, right = slice(None, -distance), slice(distance, None)
        together = document_T[left] == document_T[right]
        for centre, other in ((left, right), (right, left)):
            chosen = together & (reach_T[centre] >= distance)
            found.append(np.stack([ids_T[centre][chosen], ids_T[other][chosen]], axis=1))
    return np.concatenate(found) if found else np.zeros((0, 2), ids_T.dtype)


def epoch_batches(
    cfg: Word2VecConfig, corpus: Corpus, batch_size: int, seed: int, epoch: int
) -> Iterator[Batch]:
    """The batches of one pass: a function of (seed, epoch). The last one is filled up with weight 0.

    Yields:
        centers [B], contexts [B], negatives [B, K], int32; weights [B], fp32.
    """
    rng = np.random.default_rng([seed, epoch])
    ids_T = np.concatenate(corpus.documents)
    document_T = np.repeat(np.arange(len(corpus.documents)), [len(d) for d in corpus.documents])
    kept = rng.random(len(ids_T)) < keep_probability(corpus.counts, cfg.sample)[ids_T]
    pairs_P2 = pairs(ids_T[kept], document_T[kept], cfg.window, rng)
    rng.shuffle(pairs_P2)
    cdf_V = noise_cdf(corpus.counts, cfg.power)
    for first in range(0, len(pairs_P2), batch_size):
        rows = pairs_P2[first : first + batch_size]
        weights_B = (np.arange(batch_size) < len(rows)).astype(np.float32)
        rows = np.pad(rows, ((0, batch_size - len(rows)), (0, 0)))
        noise_BK = np.searchsorted(cdf_V, rng.random((batch_size, cfg.negatives)), side="right")
        yield {
            "centers": rows[:, 0].astype(np.int32),
            "contexts": rows[:, 1].astype(np.int32),
            "negatives": np.minimum(noise_BK, len(cdf_V) - 1).astype(np.int32),
            "weights": weights_B,
        }


def init(cfg: Word2VecConfig, vocab_size: int, key: Array) -> Params:
    """Vectors of about length 1; context vectors of zeros, so that every pair starts at probability 1/2."""
    shape = (vocab_size, cfg.dim)
    return {
        "embed": {"table": normal_init(cfg.dim**-0.5)(key, shape)},
        "context": {"table": jnp.zeros(shape)},
    }


def objective(params: Params, batch: Batch, key: Any) -> tuple[Array, Array, dict[str, tuple[Array, Array]]]:
    """(loss sum, weight sum, metrics) over the pairs of a batch; noise that is the context is left out."""
    del key
    v_BD = params["embed"]["table"][batch["centers"]]
    words_BK = jnp.concatenate([batch["contexts"][:, None], batch["negatives"]], axis=1)
    logits_BK = jnp.einsum("BD,BKD->BK", v_BD, params["context"]["table"][words_BK])
    is_noise_BK = batch["negatives"] != batch["contexts"][:, None]
    loss_B = jax.nn.softplus(-logits_BK[:, 0])
    loss_B = loss_B + jnp.sum(is_noise_BK * jax.nn.softplus(logits_BK[:, 1:]), axis=1)
    weights_B = batch["weights"]
    loss, weight = jnp.sum(weights_B * loss_B), jnp.sum(weights_B)
    return loss, weight, {"nll": (loss, weight)}


# --- What vectors are judged by ---


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Words and their vectors, of length 1."""

    words: tuple[str, ...]
    unit_VD: Float[np.ndarray, "V D"]

    @classmethod
    def of(cls, words: Sequence[str], table_VD: Float[np.ndarray, "V D"]) -> "Vectors":
        """Scales rows to length 1."""
        table_VD = np.asarray(table_VD, np.float32)
        return cls(
            tuple(words), table_VD / np.maximum(np.linalg.norm(table_VD, axis=1, keepdims=True), 1e-12)
        )

    def most_similar(self, word: str, count: int = 10) -> list[tuple[str, float]]:
        """The words with the largest cosine, nearest first.

        Raises:
            UserError: a word without a vector.
        """
        if word not in self.words:
            raise UserError(f"there is no vector for {word!r}: too rare, or not in the text")
        centre = self.words.index(word)
        cosine_V = self.unit_VD @ self.unit_VD[centre]
        cosine_V[centre] = -np.inf
        return [(self.words[i], float(cosine_V[i])) for i in np.argsort(-cosine_V)[:count]]

    def save(self, path: str | Path) -> None:
        """Writes word2vec's text format: a line `V D`, then a word and its numbers a line."""
        with Path(path).open("w", encoding="utf-8") as file:
            print(*self.unit_VD.shape, file=file)
            for word, row in zip(self.words, self.unit_VD, strict=True):
                print(word, *(f"{x:.6g}" for x in row), file=file)

    @classmethod
    def load(cls, path: str | Path) -> "Vectors":
        """Reads what `save` or another tool wrote in that format.

        Raises:
            UserError: not such a file.
        """
        try:
            first, *lines = Path(path).read_text(encoding="utf-8").splitlines()
            V, D = map(int, first.split())
            parts = [line.rstrip().split(" ") for line in lines]
            table_VD = np.array([row[1:] for row in parts], np.float32).reshape(V, D)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is no file of word vectors in text format: {error}") from None
        return cls.of([row[0] for row in parts], table_VD)


@dataclasses.dataclass(frozen=True)
class Score:
    """How many of a section's questions were answered rightly, and how many could not be asked."""

    right: int
    asked: int
    skipped: int  # a word without a vector

    @property
    def accuracy(self) -> float:
        """Of the questions asked; NaN if there were none."""
        return self.right / self.asked if self.asked else float("nan")


def read_questions(path: str | Path) -> dict[str, list[tuple[str, ...]]]:
    """Analogies by section, in the format of questions-words.txt: `: section`, then `a b c d` a line.

    Raises:
        UserError: a line of another number of words, or a question before the first section.
    """
    sections: dict[str, list[tuple[str, ...]]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        words = line.lower().split()
        if not words:
            continue
        if words[0] == ":":
            current = sections.setdefault(" ".join(words[1:]), [])
            continue
        check(bool(sections), f"{path}:{number}: a question before the first ': section'")
        check(len(words) == 4, f"{path}:{number}: expected four words 'a b c d', got {line!r}")
        current.append(tuple(words))
    return sections


def analogies(vectors: Vectors, questions: dict[str, list[tuple[str, ...]]]) -> dict[str, Score]:
    """a is to b as c is to d: d should be the word nearest to b - a + c (3CosAdd), those three left out.

    Args:
        vectors: to judge.
        questions: as from `read_questions`; those with a word that has no vector are skipped, and counted.

    Returns:
        A score for each section, and for all under 'total'.
    """
    index, scores = {word: i for i, word in enumerate(vectors.words)}, {}
    for section, asked in questions.items():
        answerable = [[index[w] for w in q] for q in asked if all(w in index for w in q)]
        known = np.array(answerable, np.int64).reshape(-1, 4)
        right = 0
        for part in np.array_split(known, max(1, len(known) // 512)):
            a_QD, b_QD, c_QD = (vectors.unit_VD[part[:, i]] for i in range(3))
            cosine_QV = (b_QD - a_QD + c_QD) @ vectors.unit_VD.T
            np.put_along_axis(cosine_QV, part[:, :3], -np.inf, axis=1)
            right += int((cosine_QV.argmax(axis=1) == part[:, 3]).sum()) if len(part) else 0
        scores[section] = Score(right, len(known), len(asked) - len(known))
    sums = [sum(getattr(s, f.name) for s in scores.values()) for f in dataclasses.fields(Score)]
    return {**scores, "total": Score(*sums)}
