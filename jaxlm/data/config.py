"""The config of the data: what to read, how to cut it into rows, and what a row asks of the model."""

import dataclasses

import numpy as np

from jaxlm.data import mixture, packing
from jaxlm.errors import UserError, check, check_choice


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """How the formats that hide tokens do it; each reads the fields that `FORMATS` lists for it."""

    rate: float = 0.15  # share of a row's tokens that are hidden (BERT, T5: 0.15, BART: 0.3)
    mean_span: float = 3.0  # mean length of the hidden spans
    whole_words: bool = False  # words are hidden with all their tokens
    max_predictions: int = 0  # hidden tokens of a row at most; 0 = no limit (BERT: 20 of 128 columns)
    permute: bool = False  # sentences come in a random order
    delete: float = 0.0  # share of the tokens that are left out without a trace
    rotate: float = 0.0  # share of the rows that begin at a token drawn among theirs
    variants: int = 0  # in how many ways a row is drawn; 0 = anew in each epoch (RoBERTa), BERT: 10

    def __post_init__(self) -> None:
        check(0 < self.rate < 1, f"data.noise.rate={self.rate} must lie between 0 and 1")
        check(self.mean_span > 0, f"data.noise.mean_span={self.mean_span} must be positive")
        for name in ("delete", "rotate"):
            check(0 <= getattr(self, name) <= 1, f"data.noise.{name}={getattr(self, name)} must be in [0, 1]")
        for name in ("max_predictions", "variants"):
            check(getattr(self, name) >= 0, f"data.noise.{name}={getattr(self, name)} must not be negative")


@dataclasses.dataclass(frozen=True)
class FormatFacts:
    """What a format is made of, for the checks of a config; `jaxlm.data.formats` makes its rows."""

    text: str  # documents (any text) | pairs (input, target) | labelled (text, label) | tagged (text, tags)
    packings: tuple[str, ...]
    reads: tuple[str, ...] = ()  # fields of DataConfig and `noise.` ones that not every format reads
    encoder: bool = False  # rows have `inputs` for an encoder beside the decoder's tokens
    causal: bool | None = None  # what model.causal must be; None = either
    labels: bool = False  # rows have a label
    tags: bool = False  # targets are classes, of words


_MASKS = tuple(f"noise.{name}" for name in ("rate", "whole_words", "max_predictions", "variants"))
_FRAME = ("input_len", "decoder_start", "with_bos")
_SPANS = (*_FRAME, "noise.rate", "noise.mean_span", "noise.variants")
_BART = ("noise.permute", "noise.delete", "noise.rotate")
_MASKED = dict(text="documents", reads=_MASKS, causal=False)
FORMATS: dict[str, FormatFacts] = {
    "lm": FormatFacts("documents", packing.PACKINGS, causal=True),
    "prefix_lm": FormatFacts("documents", packing.PACKINGS, ("noise.variants",), causal=False),
    "mlm": FormatFacts(packings=("concat", "pad"), **_MASKED),
    "nsp": FormatFacts(packings=("pad",), labels=True, **_MASKED),
    "sop": FormatFacts(packings=("pad",), labels=True, **_MASKED),
    "span_corruption": FormatFacts("documents", ("concat", "pad"), _SPANS, encoder=True),
    "denoise": FormatFacts("documents", ("concat", "pad"), (*_SPANS, *_BART), encoder=True),
    "seq2seq": FormatFacts("pairs", ("pad",), (*_FRAME, "target_key"), encoder=True),
    "classification": FormatFacts("labelled", ("pad",), ("target_key", "classes"), labels=True),
    "tags": FormatFacts("tagged", ("pad",), ("target_key", "classes"), tags=True),
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on, in which order, and what to evaluate on."""

    tokenizer: str = "byte"  # 'byte', a SentencePiece *.model, a Hugging Face *.json or a folder with one
    train: mixture.Mixture = ""  # glob, 'glob=2,glob=1' or ((glob, 2), ...) of text or prepared folders
    eval: str = ""  # glob of the pinned eval set
    text_key: str = "text"  # JSON field or column of the text (seq2seq: of the input)
    target_key: str = ""  # field or column of target, label or tags, or '.de' = lines of the file beside
    classes: tuple[str, ...] = ()  # labels or tags, as the field `target_key` spells them
    format: str = "lm"  # what a row asks of the model: lm, mlm, ..., see jaxlm.data.formats
    seq_len: int = 256  # T, targets in a row
    input_len: int = 0  # S, columns of the encoder's input
    decoder_start: str = "bos"  # what a decoder's first target is predicted from: bos | eos (BART) | pad (T5)
    with_bos: bool = False  # inputs and targets of an encoder-decoder begin with BOS (BART)
    batch_size: int = 16  # B, rows of a step over all hosts
    packing: str = "concat"  # concat, first_fit or pad
    seed: int = 0  # of the order, and of the noise
    prefetch: int = 2  # batches made ahead of the step
    cache_dir: str = ""  # token shards of raw text; '' = beside the run directory
    workers: int = 0  # processes that tokenise raw text; 0 = all cores
    eval_tokens: int = 0  # evaluate on the first so many tokens; 0 = all
    noise: NoiseConfig = NoiseConfig()

    def __post_init__(self) -> None:
        check_choice(self.packing, packing.PACKINGS, "data.packing")
        least = {"seq_len": 1, "batch_size": 1, "seed": 0, "prefetch": 1, "workers": 0, "eval_tokens": 0}
        for name, low in {**least, "input_len": 0}.items():
            value = getattr(self, name)
            whole = isinstance(value, int) and value >= low
            check(whole, f"data.{name}={value!r} must be a whole number >= {low}")
        check_choice(self.decoder_start, ("bos", "eos", "pad"), "data.decoder_start")
        check_choice(self.format, FORMATS, "data.format")
        self._check_format()

    @property
    def facts(self) -> FormatFacts:
        """What its format is made of."""
        return FORMATS[self.format]

    @property
    def keys(self) -> str:
        """The `text_key` with which `sources` reads its text: of pairs, both keys."""
        return self.text_key if self.facts.text == "documents" else f"{self.text_key},{self.target_key}"

    def _check_format(self) -> None:
        """Refuse fields that the format does not read, and those that it cannot do without."""
        name, facts = self.format, self.facts
        for field, default in _defaults().items():
            value = getattr(self.noise if field.startswith("noise.") else self, field.split(".")[-1])
            readers = ", ".join(f for f, other in FORMATS.items() if field in other.reads)
            if value != default and field not in facts.reads:
                raise UserError(
                    f"data.{field}={value!r} is not read by data.format={name!r}, but by: {readers}"
                )
        check(
            self.packing in facts.packings,
            f"data.format={name!r} has no packing {self.packing!r}; set data.packing to one of: "
            + ", ".join(facts.packings),
        )
        if facts.encoder:
            check(self.input_len > 0, f"data.format={name!r} needs data.input_len, the encoder's columns")
        if facts.text != "documents":
            what = "label" if facts.labels else "tags" if facts.tags else "target"
            check(
                self.target_key != "", f"data.format={name!r} needs data.target_key, the field of the {what}"
            )
        if "classes" in facts.reads:
            check(len(self.classes) > 1, f"data.classes={self.classes} must name two labels or more")
            twice = sorted({label for label in self.classes if self.classes.count(label) > 1})
            check(not twice, f"data.classes names {twice} more than once")


TARGETS = ("tokens", "targets", "weights", "segments", "positions")
INPUTS = ("inputs", "input_segments", "input_positions")


def batch_columns(cfg: DataConfig) -> dict[str, int]:
    """Columns of every array of a batch; 0 = one number a row."""
    facts, names = cfg.facts, TARGETS
    if cfg.format == "classification":
        names = ("tokens", "segments", "positions")
    extra = {"prefix_lm": ("prefix",), "nsp": ("types",), "sop": ("types",)}.get(cfg.format, ())
    columns = dict.fromkeys((*names, *extra), cfg.seq_len)
    if facts.encoder:
        columns |= dict.fromkeys(INPUTS, cfg.input_len)
    if facts.labels:
        columns |= {"labels": 0, "label_weights": 0}
    return columns


def column_dtype(name: str) -> type[np.generic]:
    """Of the array called so: weights are fp32, all others are ids or counts."""
    return np.float32 if name.endswith("weights") else np.int32


def _defaults() -> dict[str, object]:
    """Default of every field that only some formats read."""
    names = dict.fromkeys(name for facts in FORMATS.values() for name in facts.reads)
    return {
        name: getattr(NoiseConfig if name.startswith("noise.") else DataConfig, name.split(".")[-1])
        for name in names
    }
