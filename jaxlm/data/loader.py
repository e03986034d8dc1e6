"""From globs to batches: the datasets of a run and the loader whose order is a pure function of the step.

Text is prepared into token shards once, in the cache, and from then on every source is a store of shards.
"""

import dataclasses
import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data import formats, mixture, packing, shards, sources
from jaxlm.data.config import DataConfig
from jaxlm.data.formats import Format, Row, Source
from jaxlm.data.packing import Batch
from jaxlm.data.prepare import Progress, plan_fingerprint, prepare
from jaxlm.data.shards import TokenStore
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError, check, check_choice


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A mixture of token stores, cut into rows.

    Attributes:
        num_tokens, num_bytes: None where the predictions of an epoch are not the tokens of its text.
        fingerprint: sha256 of everything that decides which tokens stand in global row r: the content, the
            weights, the packing, the format, the seed and the permutation itself. A checkpoint keeps it, and
            a resume compares it.
    """

    sources: tuple[Source, ...]
    seq_len: int
    seed: int
    bos_id: int
    pad_id: int
    num_tokens: int | None  # targets of one epoch of every source (of the eval set, after eval_tokens)
    num_bytes: int | None  # UTF-8 bytes that those targets stand for
    fingerprint: str
    format: Format | None = None  # None = next-token rows

    @property
    def num_rows(self) -> int:
        """Rows of one epoch of every source."""
        return sum(source.plan.num_rows for source in self.sources)

    @property
    def nbytes(self) -> int:
        """Resident bytes of the packing plans; tokens are memory mapped and reclaimable."""
        return sum(source.plan.nbytes for source in self.sources)

    def describe(self) -> list[dict[str, Any]]:
        """For each source: glob, share of the rows, tokens, documents, bytes, rows, fill, pairs cut short."""
        total = sum(source.share for source in self.sources)
        return [
            {
                "glob": s.glob,
                "share": s.share / total,
                "tokens": s.store.num_tokens,
                "documents": s.store.num_documents,
                "bytes": s.store.num_bytes,
                "rows": s.plan.num_rows,
                "fill": min(1.0, s.store.num_tokens / (s.plan.num_rows * self.seq_len)),
                "cut": s.cut,
            }
            for s in self.sources
        ]

    def cut(self) -> dict[str, dict[str, int]]:
        """By glob: `pairs`, and how many of them are `cut` to the beginning that a row holds, if any is."""
        return {s.glob: {"cut": s.cut, "pairs": s.plan.num_rows} for s in self.sources if s.cut}

    def batch(self, rows: Sequence[Row]) -> Batch:
        """The batch of these rows; source -1 is a row of padding."""
        if self.format is not None:
            return self.format.batch(self.sources, rows, self.seed, self.pad_id)
        batch = packing.empty_batch(len(rows), self.seq_len, self.pad_id)
        begins_BT = np.zeros((len(rows), self.seq_len), np.int32)
        used_B = np.zeros(len(rows), np.int32)
        for r, (s, row, _) in enumerate(rows):
            if s >= 0:
                source = self.sources[s]
                tokens_T, targets_T = batch["tokens"][r], batch["targets"][r]
                pieces = source.plan.pieces(row)
                used_B[r] = packing.fill_row(
                    source.store, pieces, self.bos_id, tokens_T, targets_T, begins_BT[r]
                )
        packing.finish_batch(batch, begins_BT, used_B)
        return batch


def make_dataset(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    *,
    cache_dir: str | Path = "",
    split: str = "train",
    vocab_size: int = 0,
    progress: Progress | None = None,
) -> Dataset:
    """Open what `cfg.train` or `cfg.eval` names; raw text is prepared into the cache first.

    A glob may match text files (see `sources`), or folders that `prepare` made (or their index.json).

    Args:
        cache_dir: where prepared text is kept, unless cfg.cache_dir says otherwise.
        split: 'train' or 'eval'. The eval set is one source, of which the first cfg.eval_tokens tokens are
            used.
        vocab_size: of the model, whose ids beyond the tokenizer's may stand for masks; 0 = the tokenizer's.
        progress: told how preparation goes, see `prepare`.

    Raises:
        UserError: a glob without files, a corrupt shard, or shards made with another tokenizer.
    """
    check_choice(split, ("train", "eval"), "split")
    if split == "train":
        globs = mixture.parse_mixture(cfg.train)
    else:
        check(cfg.eval.strip() != "", "data.eval names no files: give a glob such as 'corpus/eval/*.txt'")
        globs = ((cfg.eval, 1.0),)
    # The eval set is the same whatever is trained on it, and in whichever order.
    seed, limit = (cfg.seed, 0) if split == "train" else (0, cfg.eval_tokens)
    form, found = formats.make_format(cfg, tokenizer, vocab_size or tokenizer.vocab_size), []
    for (glob, _), share in zip(globs, mixture.shares([w for _, w in globs]), strict=True):
        store = _open(glob, cfg, tokenizer, cfg.cache_dir or cache_dir, progress)
        options = dict(share=share, seed=seed, limit=limit)
        found.append(formats.make_source(cfg, form, tokenizer, store, glob, **options))
        mixture.check_rows(found[-1].plan.num_rows, glob)
    num_tokens = num_bytes = None
    if form is None:
        num_tokens = sum(s.store.num_tokens for s in found)
        num_bytes = sum(s.store.num_bytes for s in found)
        if limit and limit < num_tokens:
            num_tokens = limit
            num_bytes = _count_bytes(found[0].store, tokenizer, limit)
    identity = {
        "sources": [(s.store.fingerprint, s.share) for s in found],
        "seq_len": cfg.seq_len,
        "packing": cfg.packing,
        "seed": seed,
        "limit": limit,
        "order": mixture.order_probe(),
    }
    if form is not None:
        identity["format"] = form.identity
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Dataset(
        tuple(found),
        cfg.seq_len,
        seed,
        tokenizer.bos_id,
        tokenizer.pad_id,
        num_tokens,
        num_bytes,
        fingerprint,
        form,
    )


def _open(
    glob: str, cfg: DataConfig, tokenizer: Tokenizer, cache_dir: str | Path, progress: Progress | None
) -> TokenStore:
    """The token store of a glob; text goes through the cache."""
    paths = sources.expand(glob)
    folders = [p if p.is_dir() else p.parent for p in paths if p.name == shards.INDEX or _is_prepared(p)]
    if not folders:
        check(
            str(cache_dir) != "",
            f"{glob!r} is raw text: set data.cache_dir, where its token shards are to be kept",
        )
        key = plan_fingerprint(glob, tokenizer, cfg.keys)
        folder = Path(cache_dir) / f"tokens-{key[:16]}"
        if not (folder / shards.INDEX).is_file():
            prepare(glob, folder, tokenizer.name, text_key=cfg.keys, workers=cfg.workers, progress=progress)
        folders = [folder]
    elif len(folders) < len(paths):
        odd = next(p for p in paths if p.name != shards.INDEX and not _is_prepared(p))
        raise UserError(
            f"{glob!r} matches prepared shards ({folders[0]}) and other files ({odd}): name one or the other"
        )
    store = TokenStore(list(dict.fromkeys(folders)))
    if store.tokenizer["fingerprint"] != tokenizer.fingerprint:
        raise UserError(
            f"{folders[0]} was prepared with tokenizer {store.tokenizer['name']!r} "
            f"({store.tokenizer['fingerprint'][:8]}), but data.tokenizer is {tokenizer.name!r} "
            f"({tokenizer.fingerprint[:8]})"
        )
    return store


def _is_prepared(path: Path) -> bool:
    return (path / shards.INDEX).is_file() or (path / shards.PLAN).is_file()


def _count_bytes(store: TokenStore, tokenizer: Tokenizer, limit: int) -> int:
    """Text bytes of the first `limit` tokens, by token_bytes."""
    total = 0.0
    for start in range(0, limit, 1 << 20):
        tokens = store.read(start, min(start + (1 << 20), limit))
        total += float(tokenizer.token_bytes[tokens].sum(dtype=np.float64))
    return int(total)


class Loader:
    """`loader(step)` is the batch of that step, the same whenever and wherever it is asked for.

    Step n has the global rows [n * B, (n + 1) * B), and each process those that lie on its devices: together
    they are the batch that one process would have.
    """

    def __init__(self, dataset: Dataset, cfg: DataConfig, *, rows: Sequence[int] | None = None):
        """Make the `rows` (in [0, B), default all) of every batch; of `cfg` only batch_size is read."""
        self.dataset = dataset
        self.batch_size = cfg.batch_size
        self._rows = _rows(cfg.batch_size, rows)
        self._shares = tuple(s.share for s in dataset.sources)

    def __call__(self, step: int) -> Batch:
        rows_B = step * self.batch_size + self._rows
        found_B, draws_B = mixture.draw(rows_B, self._shares)
        rows = []
        for s, k in zip(found_B.tolist(), draws_B.tolist(), strict=True):
            size = self.dataset.sources[s].plan.num_rows
            rows.append(Row(s, mixture.permute(k, size, self.dataset.seed, s), k // size))
        return self.dataset.batch(rows)

    def epochs(self, step: int) -> dict[str, float]:
        """How many times each source has been read, by glob, before step `step`."""
        rows = step * self.batch_size
        total = sum(self._shares)
        return {s.glob: rows * s.share / total / s.plan.num_rows for s in self.dataset.sources}


def _rows(batch_size: int, rows: Sequence[int] | None) -> np.ndarray:
    """Which rows of a global batch to make."""
    chosen = np.arange(batch_size) if rows is None else np.asarray(rows)
    inside = chosen.size > 0 and chosen.min() >= 0 and chosen.max() < batch_size
    check(inside, f"rows={chosen.tolist()} are not rows of a batch of {batch_size}")
    return chosen


class EvalBatches:
    """Batches that hold every token of the eval set exactly once; iterate as often as you like.

    The rows are the same for every batch size; the last batch is filled up with rows of weight 0.

    Attributes:
        num_tokens: targets, which is the sum of all weights; None if it is not known beforehand.
        num_bytes: UTF-8 bytes of the text, for bits per byte; None where there are no such bits.
        fingerprint: of the set and its rows.
    """

    def __init__(self, dataset: Dataset, batch_size: int, *, rows: Sequence[int] | None = None):
        check(batch_size > 0, f"eval batch_size={batch_size} must be positive")
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_tokens = dataset.num_tokens
        self.num_bytes = dataset.num_bytes
        self.fingerprint = dataset.fingerprint
        self._rows = _rows(batch_size, rows)

    def __len__(self) -> int:
        return -(-self.dataset.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, self.dataset.num_rows, self.batch_size):
            rows = (first + self._rows).tolist()
            inside = self.dataset.num_rows
            yield self.dataset.batch([Row(0, r) if r < inside else Row(-1, 0) for r in rows])


def eval_batches(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    batch_size: int = 0,
    *,
    cache_dir: str | Path = "",
    rows: Sequence[int] | None = None,
    vocab_size: int = 0,
    progress: Progress | None = None,
) -> EvalBatches:
    """The eval set of `cfg`, with rows of cfg.seq_len packed as cfg.packing says.

    Args:
        batch_size: rows of a batch over all hosts; 0 = cfg.batch_size. The result of an evaluation does not
            depend on it.
        rows: which rows of every batch to make; default all.
        vocab_size: as for `make_dataset`.
    """
    options = dict(cache_dir=cache_dir, vocab_size=vocab_size, progress=progress)
    dataset = make_dataset(cfg, tokenizer, split="eval", **options)
    return EvalBatches(dataset, batch_size or cfg.batch_size, rows=rows)


class prefetch:
    """Batches from `start_step` on, made ahead in a thread; leaving the `with` block, or close(), stops it.

    Memory: `size` + 1 batches beside the one in use.

    Attributes:
        seconds_waited: how long the consumer has stood waiting for data.

    >>> with prefetch(lambda step: {"step": step}, start_step=3, size=2) as batches:
    ...     next(batches), next(batches)
    ({'step': 3}, {'step': 4})
    """

    def __init__(
        self,
        loader: Callable[[int], Any],
        start_step: int,
        size: int = 2,
        place: Callable[[Any], Any] | None = None,
    ):
        """Start the thread.

        Args:
            loader: step -> batch.
            start_step: of the first batch.
            size: batches that wait at most.
            place: what to do with each batch in the thread, such as sending it to the device.
        """
        check(size >= 1, f"prefetch size={size} must be at least 1")
        self.seconds_waited = 0.0
        self._ready: deque[Any] = deque()
        self._size = size
        self._changed = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._work, args=(loader, start_step, place), name="prefetch", daemon=True
        )
        self._thread.start()

    def _work(self, loader: Callable[[int], Any], step: int, place: Callable[[Any], Any] | None) -> None:
        try:
            while True:
                batch = loader(step)
                if place is not None:
                    batch = place(batch)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < self._size)
                    if self._closed:
                        return
                    self._ready.append(batch)
                    self._changed.notify_all()
                step += 1
        except BaseException as error:  # whatever it is, it belongs to the consumer, who raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def __iter__(self) -> "prefetch":
        return self

    def __next__(self) -> Any:
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error or self._closed)
            self.seconds_waited += time.perf_counter() - began
            if self._ready and not self._closed:
                batch = self._ready.popleft()
                self._changed.notify_all()
                return batch
            if self._error is not None and not self._closed:
                raise self._error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and drop what is ready; safe to call twice."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> "prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
