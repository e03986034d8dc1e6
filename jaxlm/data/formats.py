"""Formats: what the rows of a plan become in a batch, for every objective but plain next-token prediction.

| format | a row of the plan | arrays of a row beside `segments` and `positions` |
|---|---|---|
| lm | T targets, see `packing` | tokens, targets, weights |
| prefix_lm | the same | and `prefix`, 1 where a document's columns are seen by all of it; no loss in there |
| mlm | [BOS] T - 2 tokens [EOS] | tokens with some hidden, targets, weights (1 where hidden) |
| nsp, sop | [BOS] a [EOS] b [EOS] of one document | and `types` (0 1), a label |
| span_corruption | as many tokens as fill S with sentinels | inputs [S]; tokens, targets, weights |
| denoise | T - 1 tokens, noised | the same |
| seq2seq | a pair | the same |
| classification | [BOS] text [EOS] | tokens, a label |
| tags | [BOS] text [EOS] | tokens, targets (classes), weights (1 where a word begins) |

A label is `labels` i32[B] and `label_weights` f32[B], of weight 0 in a row that has none. A row is a pure
function of (its tokens, a generator), and the generator of (data.seed, source, epoch, row): the same on every
host, at every resume, in every batch size. All arrays have fixed shapes; the rest of a row has weight and
segment 0.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxlm.data import corruption, noise, packing, pairs, pieces, spans
from jaxlm.data.config import INPUTS, DataConfig, batch_columns, column_dtype
from jaxlm.data.packing import Batch, PadPlan, Plan
from jaxlm.data.shards import TokenStore
from jaxlm.data.tags import Tags, read_tags
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import check

Example = Mapping[str, Any]  # name -> the first columns of its row, or a number


class Row(NamedTuple):
    """Where a row of a batch comes from."""

    source: int  # of the mixture; -1 = a row of padding
    row: int  # of its plan
    epoch: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """One part of a mixture."""

    glob: str
    share: int  # of the sum of the shares of all sources
    store: TokenStore
    plan: Plan
    classes: Int[np.ndarray, "rows"] | None = None  # of labelled text
    cut: int = 0  # pairs of which a row holds only the beginning
    tags: Tags | None = None  # of tagged text

    def text(self, row: int, eos: int, piece: int = 0) -> Int[np.ndarray, "n"]:
        """A piece of a row, int32, without an EOS at its end."""
        tokens = self.store.read(*self.plan.pieces(row)[piece]).astype(np.int32)
        return tokens[:-1] if tokens[-1] == eos else tokens


@dataclasses.dataclass(frozen=True)
class Format:
    """How a row of a plan becomes a row of a batch."""

    columns: Mapping[str, int]  # array -> its columns; 0 = one number a row
    raw_len: int  # targets of the store in a row of the plan
    example: Callable[[Source, int, np.random.Generator], Example]
    variants: int  # as in NoiseConfig
    identity: Mapping[str, Any]  # all that decides an example beside its tokens and the generator
    ids: tuple[str, ...]  # arrays of token ids, which are filled up with that of padding

    def batch(self, sources: Sequence[Source], rows: Sequence[Row], seed: int, pad_id: int) -> Batch:
        """The batch of these rows."""
        batch = {name: self._empty(name, len(rows), pad_id) for name in self.columns}
        for r, (source, row, epoch) in enumerate(rows):
            if source < 0:
                continue
            rng = generator(seed, source, epoch % self.variants if self.variants else epoch, row)
            for name, values in self.example(sources[source], row, rng).items():
                if self.columns[name]:
                    batch[name][r, : len(values)] = values
                else:
                    batch[name][r] = values
        return batch

    def _empty(self, name: str, rows: int, pad_id: int) -> np.ndarray:
        shape = (rows, self.columns[name]) if self.columns[name] else (rows,)
        return np.full(shape, pad_id if name in self.ids else 0, column_dtype(name))


def generator(seed: int, source: int, epoch: int, row: int) -> np.random.Generator:
    """The draws of one example; neighbours in any of the four share nothing."""
    digest = hashlib.sha256(f"noise {seed} {source} {epoch} {row}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def probe() -> list[int]:
    """A few draws of each kind, which tell if numpy's streams, and so the noise, have changed."""
    rng = generator(0, 0, 0, 0)
    draws = [
        rng.permutation(7),
        rng.integers(0, 1 << 30, 3),
        rng.choice(50, 5, replace=False),
        rng.poisson(3, 5),
    ]
    return [*np.concatenate(draws).tolist(), int(rng.random() * 2**40)]


def make_format(cfg: DataConfig, tokenizer: Tokenizer, vocab_size: int) -> Format | None:
    """The format of a config; None for 'lm', whose rows `packing` makes.

    Args:
        cfg: see `DataConfig`.
        tokenizer: its tokenizer.
        vocab_size: of the model, which may have ids that the tokenizer leaves free.

    Raises:
        UserError: no id for a mask token or for sentinels; a row of a length that the format cannot fill.
    """
    if cfg.format == "lm":
        return None
    ids = pieces.specials(tokenizer, vocab_size)
    build = {
        "prefix_lm": _prefix_lm,
        "mlm": _masked,
        "nsp": _two_segments,
        "sop": _two_segments,
        "span_corruption": _spans,
        "denoise": _denoise,
        "seq2seq": _seq2seq,
        "classification": _classification,
        "tags": _tags,
    }[cfg.format]
    raw_len, example = build(cfg, tokenizer, ids)
    identity = {
        "format": cfg.format,
        "fields": {name: _field(cfg, name) for name in cfg.facts.reads},
        "raw_len": raw_len,
        "ids": dataclasses.astuple(ids),
        "probe": probe(),
    }
    identity = json.loads(json.dumps(identity))
    of_tokens = ("tokens", "inputs") if cfg.facts.tags else ("tokens", "inputs", "targets")
    return Format(batch_columns(cfg), raw_len, example, cfg.noise.variants, identity, of_tokens)


def _field(cfg: DataConfig, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), cfg)


Built = tuple[int, Callable[[Source, int, np.random.Generator], Example]]


def _row(tokens: Sequence[int]) -> dict[str, Any]:
    """Segments and positions of one document at the start of a row."""
    return {"segments": np.ones(len(tokens), np.int32), "positions": np.arange(len(tokens), dtype=np.int32)}


def _join(*parts: Any) -> Int[np.ndarray, "n"]:
    return np.concatenate([np.atleast_1d(part) for part in parts]).astype(np.int32)


def _make_hide(cfg: DataConfig, tokenizer: Tokenizer, ids: pieces.Specials) -> Callable[..., Example]:
    """`hide(tokens, text, rng)`: a row with some of its columns of text hidden."""
    mask_id = ids.need_mask()
    starts_V = pieces.word_starts(tokenizer) if cfg.noise.whole_words else None

    def hide(tokens: np.ndarray, is_text: np.ndarray, rng: np.random.Generator) -> Example:
        count = corruption.num_predictions(len(tokens), cfg.noise.rate, cfg.noise.max_predictions)
        begins = None if starts_V is None else pieces.of_tokens(starts_V, tokens)
        columns = corruption.choose(is_text, count, rng, begins)
        shown, weights = corruption.hide(tokens, columns, rng, mask_id=mask_id, text_ids=ids.text_ids)
        return {"tokens": shown, "targets": tokens, "weights": weights, **_row(tokens)}

    return hide


def _masked(cfg: DataConfig, tokenizer: Tokenizer, ids: pieces.Specials) -> Built:
    check(cfg.seq_len > 2, f"data.seq_len={cfg.seq_len} leaves no column for text between BOS and EOS")
    hide = _make_hide(cfg, tokenizer, ids)

    def example(source: Source, row: int, rng: np.random.Generator) -> Example:
        text = source.text(row, ids.eos)
        return hide(_join(ids.bos, text, ids.eos), _join(False, text != ids.eos, False).astype(bool), rng)

    return cfg.seq_len - 2, example


def _two_segments(cfg: DataConfig, tokenizer: Tokenizer, ids: pieces.Specials) -> Built:
    check(cfg.seq_len > 4, f"data.seq_len={cfg.seq_len} leaves no columns for two texts")
    hide, ends_V, room = _make_hide(cfg, tokenizer, ids), pieces.sentence_ends(tokenizer), cfg.seq_len - 3

    def elsewhere(source: Source, row: int, rng: np.random.Generator) -> np.ndarray:
        plan = source.plan
        if not isinstance(plan, PadPlan):
            raise TypeError(f"pairs are of documents, not of a {type(plan).__name__}")
        own, count = plan.document(row), plan.num_documents
        check(
            count > 1, "data.format='nsp' takes a text's wrong successor from another document; there is one"
        )
        rows = plan.rows_of((own + 1 + int(rng.integers(count - 1))) % count)
        text = source.text(int(rng.integers(rows.start, rows.stop)), ids.eos)
        starts = np.concatenate([[0], np.flatnonzero(pieces.of_tokens(ends_V, text)[:-1]) + 1])
        return text[int(rng.choice(starts)) :]

    def example(source: Source, row: int, rng: np.random.Generator) -> Example:
        text = source.text(row, ids.eos)
        ends = pieces.of_tokens(ends_V, text)
        if cfg.format == "nsp":
            a, b, label = pairs.next_sentence(text, ends, room, lambda r: elsewhere(source, row, r), rng)
        elif len(text) > 1:
            a, b, label = pairs.sentence_order(text, ends, rng)
        else:
            a, b, label = text, text[:0], 0
        tokens = _join(ids.bos, a, ids.eos, b, ids.eos)
        is_text = np.ones(len(tokens), bool)
        is_text[[0, len(a) + 1, -1]] = False
        types = (np.arange(len(tokens)) > len(a) + 1).astype(np.int32)
        return {
            **hide(tokens, is_text, rng),
            "types": types,
            "labels": label,
            "label_weights": float(min(len(a), len(b)) > 0),
        }

    return room, example


def _make_pair(cfg: DataConfig, ids: pieces.Specials) -> Callable[[np.ndarray, np.ndarray], Example]:
    """`pair(input, target)`: what encoder and decoder get; both end in EOS, which a text too long loses."""
    start = {"bos": ids.bos, "eos": ids.eos, "pad": ids.pad}[cfg.decoder_start]
    bos = [ids.bos] if cfg.with_bos else []

    def pair(source: np.ndarray, target: np.ndarray) -> Example:
        inputs = _join(bos, source, ids.eos)[: cfg.input_len]
        targets = _join(bos, target, ids.eos)[: cfg.seq_len]
        encoder = zip(INPUTS[1:], _row(inputs).values(), strict=True)
        weights = np.ones(len(targets), np.float32)
        tokens = _join(start, targets[:-1])
        decoder = {"tokens": tokens, "targets": targets, "weights": weights, **_row(targets)}
        return {"inputs": inputs, **dict(encoder), **decoder}

    return pair


def _silent(example: Example) -> Example:
    """What no loss is taken of: a row with the EOS of a text that ended with the row before."""
    return {**example, "weights": np.zeros_like(example["weights"])}


def _spans(cfg: DataConfig, tokenizer: Tokenizer, ids: pieces.Specials) -> Built:
    rate, mean, bos = cfg.noise.rate, cfg.noise.mean_span, int(cfg.with_bos)
    check(
        cfg.input_len > 3 + bos,
        f"data.input_len={cfg.input_len} is too short for a span and what surrounds it",
    )
    raw = spans.raw_length(cfg.input_len - bos, rate, mean)
    longest = spans.lengths(raw, rate, mean)[1] + bos
    check(
        longest <= cfg.seq_len,
        f"data.seq_len={cfg.seq_len} cannot hold the targets of data.input_len={cfg.input_len}: {raw} tokens "
        f"become {cfg.input_len} inputs and {longest} targets; set data.seq_len={longest}",
    )
    sentinel = ids.need_sentinels(spans.counts(raw, rate, mean)[1])
    pair = _make_pair(cfg, ids)

    def example(source: Source, row: int, rng: np.random.Generator) -> Example:
        text = source.text(row, ids.eos)
        if not len(text):
            return _silent(pair(text, text))
        hidden = spans.noise_mask(len(text), rng, rate, mean) if len(text) > 1 else np.zeros(len(text), bool)
        return pair(*spans.corrupt(text, hidden, sentinel))

    return raw, example


def _denoise(cfg: DataConfig, tokenizer: Tokenizer, ids: pieces.Specials) -> Built:
    options, mask_id, ends_V = cfg.noise, ids.need_mask(), pieces.sentence_ends(tokenizer)
    raw = min(cfg.seq_len, cfg.input_len) - 1 - int(cfg.with_bos)
    check(raw > 0, f"data.seq_len={cfg.seq_len} and data.input_len={cfg.input_len} leave no column for text")
    pair = _make_pair(cfg, ids)

    def example(source: Source, row: int, rng: np.random.Generator) -> Example:
        text = noisy = source.text(row, ids.eos)
        if not len(text):
            return _silent(pair(text, text))
        if options.permute:
            noisy = noise.permute(noisy, pieces.of_tokens(ends_V, noisy), rng)
        if options.delete:
            noisy = noise.delete(noisy, options.delete, rng)
        noisy = noise.infill(noisy, options.rate, options.mean_span, mask_id, rng)
        if rng.random() < options.rotate:
            noisy = noise.rotate(noisy, rng)
        return pair(noisy, text)

    return raw, example


def _prefix_lm(cfg: DataConfig, tokenizer: Tokenizer, ids: pieces.Specials) -> Built:
    T = cfg.seq_len

    def example(source: Source, row: int, rng: np.random.Generator) -> Example:
        batch, begins_BT = packing.empty_batch(1, T, ids.pad), np.zeros((1, T), np.int32)
        arrays = batch["tokens"][0], batch["targets"][0], begins_BT[0]
        used = packing.fill_row(source.store, source.plan.pieces(row), ids.bos, *arrays)
        packing.finish_batch(batch, begins_BT, np.array([used]))
        out = {name: array[0] for name, array in batch.items()}
        prefix, weights = prefixes(out["segments"], out["positions"], rng)
        return {**out, "prefix": prefix, "weights": out["weights"] * weights}

    return T, example


def prefixes(
    segments_T: Int[np.ndarray, "T"], positions_T: Int[np.ndarray, "T"], rng: np.random.Generator
) -> tuple[Int[np.ndarray, "T"], Float[np.ndarray, "T"]]:
    """(1 in the prefix of each document, 0 where the next token lies in it).

    A document with n columns here gets a prefix of 1 to n of them, all equally likely.

    >>> segments, positions = np.array([1, 1, 1, 2, 0]), np.array([0, 1, 2, 0, 0])
    >>> [part.tolist() for part in prefixes(segments, positions, np.random.default_rng(0))]
    [[1, 1, 1, 1, 0], [0.0, 0.0, 1.0, 1.0, 1.0]]
    """
    sizes_N = np.bincount(segments_T)[1:]
    drawn_N = np.concatenate([[0], rng.integers(1, sizes_N + 1)])
    prefix_T = positions_T < drawn_N[segments_T]
    return prefix_T.astype(np.int32), (positions_T >= drawn_N[segments_T] - 1).astype(np.float32)


def _seq2seq(cfg: DataConfig, tokenizer: Tokenizer, ids: pieces.Specials) -> Built:
    pair = _make_pair(cfg, ids)

    def example(source: Source, row: int, rng: np.random.Generator) -> Example:
        return pair(source.text(row, ids.eos), source.text(row, ids.eos, 1))

    return cfg.seq_len, example


def _classification(cfg: DataConfig, tokenizer: Tokenizer, ids: pieces.Specials) -> Built:
    check(cfg.seq_len > 2, f"data.seq_len={cfg.seq_len} leaves no column for text between BOS and EOS")

    def example(source: Source, row: int, rng: np.random.Generator) -> Example:
        tokens = _join(ids.bos, source.text(row, ids.eos)[: cfg.seq_len - 2], ids.eos)
        return {"tokens": tokens, **_row(tokens), "labels": source.classes[row], "label_weights": 1.0}

    return cfg.seq_len, example


def _tags(cfg: DataConfig, tokenizer: Tokenizer, ids: pieces.Specials) -> Built:
    check(cfg.seq_len > 2, f"data.seq_len={cfg.seq_len} leaves no column for text between BOS and EOS")

    def example(source: Source, row: int, rng: np.random.Generator) -> Example:
        tokens = _join(ids.bos, source.text(row, ids.eos)[: cfg.seq_len - 2], ids.eos)
        columns, classes = source.tags.of_row(row)
        shown = columns < len(tokens) - 2
        targets, weights = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.float32)
        targets[columns[shown] + 1], weights[columns[shown] + 1] = classes[shown], 1.0
        return {"tokens": tokens, "targets": targets, "weights": weights, **_row(tokens)}

    return cfg.seq_len, example


def make_source(
    cfg: DataConfig,
    form: Format | None,
    tokenizer: Tokenizer,
    store: TokenStore,
    glob: str,
    *,
    share: int,
    seed: int,
    limit: int,
) -> Source:
    """A store and the rows of one epoch of it, as the format wants them.

    Args:
        cfg, form, tokenizer: the data, its format and its tokenizer.
        store, glob, share: see `Source`.
        seed: of `packing.make_plan`.
        limit: only the first so many tokens; 0 = all.

    Raises:
        UserError: a store of pairs where documents are wanted, or the reverse; a label that is not known;
            tags that do not fit their words; a single document, where two are needed.
    """
    if cfg.facts.text == "documents":
        check(
            not any("," in key for key in store.text_keys),
            f"{glob} was prepared as pairs, which data.format={cfg.format!r} cannot read; prepare it with "
            "one text_key",
        )
        length = cfg.seq_len if form is None else form.raw_len
        plan = packing.make_plan(store, cfg.packing, length, seed, limit)
        alone = cfg.format == "nsp" and isinstance(plan, PadPlan) and plan.num_documents < 2
        where = f"the first {limit} tokens of {glob} are of" if limit else f"{glob} holds"
        check(not alone, f"{where} one document; data.format='nsp' draws from another one")
        return Source(glob, share, store, plan)
    plan = pairs.make_pair_plan(store, cfg.keys, glob, limit)
    sizes_R2 = plan.sizes() - 1
    if cfg.facts.tags:
        tags = read_tags(store, plan, tokenizer, cfg.classes, glob)
        return Source(glob, share, store, plan, cut=int(np.sum(sizes_R2[:, 0] > cfg.seq_len - 2)), tags=tags)
    if cfg.facts.labels:
        labels = tuple(tokenizer.encode(label) for label in cfg.classes)
        classes_R = pairs.class_of_rows(store, plan, labels, cfg.classes, glob)
        return Source(glob, share, store, plan, classes_R, int(np.sum(sizes_R2[:, 0] > cfg.seq_len - 2)))
    room = np.array([cfg.input_len, cfg.seq_len]) - 1 - int(cfg.with_bos)
    return Source(glob, share, store, plan, cut=int(np.sum((sizes_R2 > room).any(1))))
