"""Trains word vectors with the optimizer and the step of every other model."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import jax
import numpy as np

from jaxlm.errors import check
from jaxlm.model import word2vec
from jaxlm.model.word2vec import Corpus, Vectors, Word2VecConfig
from jaxlm.optim import OptimConfig, make_optimizer, make_schedule
from jaxlm.train.state import create_state
from jaxlm.train.step import make_step

CONFIG = Word2VecConfig()
# A batch stands for thousands of updates of the original code, which makes one a pair.
OPTIM = OptimConfig(
    lr=1e-2, schedule="linear", final=0.0, warmup=0.05, b2=0.99, weight_decay=0.0, clip_norm=0.0
)


@dataclasses.dataclass(frozen=True)
class Trained:
    """Vectors, and how the training went."""

    vectors: Vectors
    losses: tuple[float, ...]  # nats per pair, mean over each epoch
    steps: int
    tokens: int  # words of the text that have a vector
    vocabulary: int


def train_vectors(
    documents: Iterable[Sequence[str]],
    cfg: Word2VecConfig = CONFIG,
    *,
    epochs: int = 5,
    batch_size: int = 4096,
    optim: OptimConfig = OPTIM,
    seed: int = 0,
    tick: Callable[[str], None] = lambda text: None,
) -> Trained:
    """Learn a vector for every word that is frequent enough.

    Args:
        documents: words of each; no pair spans two.
        cfg: what is learned.
        epochs: passes over the text; each thins it out and draws windows and noise anew. There are as many
            updates as in that many first passes; a longer last one is cut off.
        batch_size: pairs an update.
        optim: optimizer and schedule.
        seed: of everything that is drawn.
        tick: told after every epoch.

    Raises:
        UserError: a text without two frequent words, or without a pair.
    """
    check(epochs >= 1, f"epochs={epochs} must be at least 1")
    check(batch_size >= 1, f"batch_size={batch_size} must be at least 1")
    corpus = Corpus.of(documents, cfg.min_count)
    check(bool(corpus.documents), "the text holds no two words beside each other that have a vector")
    batches = partial(word2vec.epoch_batches, cfg, corpus, batch_size, seed)
    # The schedule needs the number of updates before the first; that of a first pass is that of any, nearly.
    first = sum(1 for _ in batches(0))
    check(first > 0, "the text holds no two words beside each other that have a vector")
    num_steps = first * epochs
    optimizer = make_optimizer(optim, make_schedule(optim, num_steps, batch_size))
    state, _ = create_state(lambda key: word2vec.init(cfg, len(corpus.words), key), optimizer, seed)
    step = make_step(word2vec.objective, optimizer, norms=False)
    losses, done = [], 0
    for epoch in range(epochs):
        sums = []
        for batch in itertools.islice(batches(epoch), num_steps - done):
            state, metrics = step(state, None, batch)
            sums.append(metrics["nll"])
            done += 1
        if not sums:  # of a text so short that a pass may be thinned out to nothing
            continue
        total, weight = np.sum(jax.device_get(sums), axis=0, dtype=np.float64)
        losses.append(float(total / weight))
        tick(f"epoch {epoch + 1} of {epochs}: {losses[-1]:.4f} nats per pair, {weight:,.0f} pairs")
    vectors = Vectors.of(corpus.words, np.asarray(state.params["embed"]["table"]))
    return Trained(vectors, tuple(losses), done, int(corpus.counts.sum()), len(corpus.words))
