"""Tokenizers: raw bytes, SentencePiece and Hugging Face `tokenizer.json`, behind one small protocol.

A document is a Python string. `encode` never adds special tokens: packing puts BOS and EOS where they belong.
Special-looking text (`</s>`, `<|endoftext|>`) inside a document is ordinary text, so a document cannot forge
a boundary.
"""

import functools
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import sentencepiece
from jaxtyping import Float

from jaxlm.data import shards
from jaxlm.errors import UserError, check, check_choice, nearest

_SPACE = "\u2581"  # what SentencePiece and Metaspace write for a space
# A round trip of this text shows whether a tokenizer is lossless and whether its token_bytes are exact:
# spaces at both ends, runs of spaces, line ends, composed, decomposed and compatibility characters, and an
# emoji.
_PROBE = "  a  b\n\n\tc \r\n\u00e9 e\u0301 \ufb01 \uff21 \u00bd \u65e5\u672c\U0001f389 <s> </s> "


@runtime_checkable
class Tokenizer(Protocol):
    """What the other rooms may ask of a tokenizer."""

    name: str  # the spec it was loaded from
    vocab_size: int  # ids are 0 .. vocab_size - 1
    bos_id: int  # what the first token of a document is predicted from; equals eos_id where there is only one
    eos_id: int  # predicted at the end of every document
    pad_id: int  # fills columns of weight 0
    fingerprint: str  # sha256 of the content

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without special tokens."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array of ids for each text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens, and ids beyond this vocabulary, are left out."""
        ...

    def piece(self, token: int) -> str:
        """How one token is written, for people."""
        ...

    def token_id(self, piece: str) -> int | None:
        """The id of the token that is written so, such as '[MASK]'; None if there is none."""
        ...

    @property
    def token_bytes(self) -> Float[np.ndarray, "V"]:
        """The number of UTF-8 bytes that each token stands for; special tokens 0."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte; byte 0 is BOS and EOS, so a text holding NUL is refused.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("hé")
    [104, 195, 169]
    >>> tokenizer.decode([104, 195, 169, 0])
    'hé'
    """

    name = "byte"
    vocab_size = 256
    bos_id = eos_id = pad_id = 0
    fingerprint = hashlib.sha256(b"jaxlm byte tokenizer 1").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(self._bytes(text))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(self._bytes(text), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if 0 < i < 256).decode("utf-8", errors="replace")

    def piece(self, token: int) -> str:
        return "<eos>" if token == 0 else chr(token) if 32 < token < 127 else f"<0x{token:02X}>"

    def token_id(self, piece: str) -> int | None:
        return next((i for i in range(256) if self.piece(i) == piece), None)

    @functools.cached_property
    def token_bytes(self) -> Float[np.ndarray, "V"]:
        counts = np.ones(256, np.float32)
        counts[0] = 0
        return counts

    @staticmethod
    def _bytes(text: str) -> bytes:
        data = text.encode("utf-8")
        if b"\0" in data:
            raise UserError(
                f"the text holds a NUL (byte 0) at character {text.index(chr(0))}: the byte tokenizer keeps "
                "byte 0 for the end of a document; remove it or choose another tokenizer"
            )
        return data


class SentencePieceTokenizer:
    """A SentencePiece model (`*.model`).

    A model with byte fallback and no dummy prefix (the defaults of `train_sentencepiece`) is lossless. Two
    gaps of SentencePiece are closed for it here: a literal U+2581, which it reads as a space, is spelled in
    bytes, and the escaped space before an unknown word of a `word` model, which it spells as the bytes of
    U+2581, becomes byte 32.

    `token_bytes` is exact for such models. With a dummy prefix (Llama 2) every document counts one byte too
    many; without byte fallback, or with a normaliser that changes the text, it is approximate (an unknown
    token counts 0).
    """

    def __init__(self, model: bytes, name: str):
        check(len(model) > 0, f"{name} is not a SentencePiece model: the file is empty")
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{name} is not a SentencePiece model: {error}") from error
        sp = self._sp
        self.name = name
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size = sp.vocab_size()
        check(self.vocab_size > 0, f"{name} is not a SentencePiece model: it holds no pieces")
        bos, eos = sp.bos_id(), sp.eos_id()
        check(
            max(bos, eos) >= 0, f"{name} has neither a BOS nor an EOS token, so documents cannot be separated"
        )
        self.bos_id = bos if bos >= 0 else eos
        self.eos_id = eos if eos >= 0 else bos
        self.pad_id = max(sp.pad_id(), 0)
        byte_ids = [sp.piece_to_id(f"<0x{b:02X}>") for b in range(256)]
        fallback = all(sp.is_byte(i) for i in byte_ids)
        # Cutting a text in two is only harmless where no dummy space is added to each part.
        self._mends = fallback and not any(_SPACE in p for p in sp.encode("a", out_type=str))
        self._literal = [byte_ids[b] for b in _SPACE.encode()]
        self._space = byte_ids[ord(" ")]

    def encode(self, text: str) -> list[int]:
        if not self._mends:
            return self._sp.encode(text)
        parts = [self._unescape(ids) for ids in self._sp.encode(text.split(_SPACE), num_threads=1)]
        ids = parts[0]
        for part in parts[1:]:
            ids = ids + self._literal + part
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(self.encode(text), np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return self._sp.decode([i for i in map(int, ids) if i < self.vocab_size])

    def piece(self, token: int) -> str:
        return self._sp.id_to_piece(int(token))

    def token_id(self, piece: str) -> int | None:
        token = self._sp.piece_to_id(piece)
        return token if self._sp.id_to_piece(token) == piece else None

    @functools.cached_property
    def token_bytes(self) -> Float[np.ndarray, "V"]:
        sp = self._sp
        counts = np.zeros(self.vocab_size, np.float32)
        for i in range(self.vocab_size):
            if sp.is_byte(i):
                counts[i] = 1
            elif not (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)):
                counts[i] = len(sp.id_to_piece(i).replace(_SPACE, " ").encode())
        return counts

    def _unescape(self, ids: list[int]) -> list[int]:
        """Turn each spelled-out escaped space into byte 32; `ids` come from a text without U+2581."""
        a, b, c = self._literal
        if a not in ids:
            return ids
        out, i = [], 0
        while i < len(ids):
            if ids[i] == a and ids[i + 1 : i + 3] == [b, c]:
                out.append(self._space)
                i += 3
            else:
                out.append(ids[i])
                i += 1
        return out


class HFTokenizer:
    """A Hugging Face `tokenizer.json`, through the `tokenizers` library.

    BOS and EOS come from `tokenizer_config.json` beside it, else from the usual names among its special
    tokens.

    `token_bytes` follows the decoder: byte-level BPE writes one character per byte; `<0xAB>` tokens are one
    byte and U+2581 is a space. Both are exact but for a space that some models put before every document. All
    others, WordPiece among them, count the UTF-8 size of the piece, which is approximate.
    """

    def __init__(self, path: Path, name: str):
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f"{name}: reading tokenizer.json needs the extra `pip install 'jaxlm[hf]'`"
            ) from error
        data = path.read_bytes()
        try:
            self._spec = json.loads(data)
        except ValueError as error:  # a JSON or a UTF-8 error
            raise UserError(f"{name} is not a tokenizer.json: {error}") from error
        if not (isinstance(self._spec, dict) and isinstance(self._spec.get("model"), dict)):
            raise UserError(f"{name} is not a tokenizer.json: it has no 'model' object")
        try:
            self._hf = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises the bare class, so nothing narrower can be caught
            if type(error) is not Exception:
                raise
            raise UserError(f"{name} is not a tokenizer.json: {error}") from error
        self._hf.encode_special_tokens = True  # '<|endoftext|>' in a document is text
        self._hf.no_truncation()
        self._hf.no_padding()
        self.name = name
        vocab = self._hf.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1  # ids may have holes
        self._specials = {i for i, t in self._hf.get_added_tokens_decoder().items() if t.special}
        named = _special_names(path.with_name("tokenizer_config.json"))
        special_vocab = {token: i for token, i in vocab.items() if i in self._specials}
        bos = _pick(named.get("bos_token"), vocab, special_vocab, _BOS_NAMES)
        eos = _pick(named.get("eos_token"), vocab, special_vocab, _EOS_NAMES)
        if bos is None and eos is None:
            raise UserError(
                f"{name} has no special token that ends a document (of {', '.join(_EOS_NAMES)}); name "
                "one as eos_token in tokenizer_config.json beside it"
            )
        self.eos_id = bos if eos is None else eos
        self.bos_id = self.eos_id if bos is None else bos
        self.pad_id = _pick(named.get("pad_token"), vocab, special_vocab, ("<pad>", "[PAD]")) or 0
        identity = hashlib.sha256(data)
        identity.update(f"{self.bos_id} {self.eos_id}".encode())
        self.fingerprint = identity.hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._hf.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self._hf.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(e.ids, np.int32) for e in found]

    def decode(self, ids: Iterable[int]) -> str:
        return self._hf.decode([int(i) for i in ids], skip_special_tokens=True)

    def piece(self, token: int) -> str:
        return self._hf.id_to_token(int(token)) or f"<unused {token}>"

    def token_id(self, piece: str) -> int | None:
        return self._hf.token_to_id(piece)

    @functools.cached_property
    def token_bytes(self) -> Float[np.ndarray, "V"]:
        byte_level = "ByteLevel" in _kinds(self._spec.get("decoder"))
        continuing = self._spec["model"].get("continuing_subword_prefix") or ""
        added = set(self._hf.get_added_tokens_decoder())
        counts = np.zeros(self.vocab_size, np.float32)
        for token, i in self._hf.get_vocab(with_added_tokens=True).items():
            if i in self._specials or token == self._spec["model"].get("unk_token"):
                continue
            if i in added:  # added tokens are matched in the text as they are written
                counts[i] = len(token.encode())
            elif byte_level:
                counts[i] = len(token)
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                counts[i] = 1
            else:
                counts[i] = len(token.removeprefix(continuing).replace(_SPACE, " ").encode())
        return counts


_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "[CLS]")
_EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "[SEP]")


def _pick(
    name: str | None, vocab: dict[str, int], specials: dict[str, int], usual: Sequence[str]
) -> int | None:
    """The id of the token called `name`, else of the first usual name among the special tokens."""
    if name is not None:
        return vocab.get(name)
    return next((specials[n] for n in usual if n in specials), None)


def _special_names(path: Path) -> dict[str, str]:
    """bos_token, eos_token and pad_token of a tokenizer_config.json, where there is one."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    check(isinstance(config, dict), f"{path} holds no JSON object, where the special tokens are named")
    names = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[key] = value
    return names


def _kinds(node: Any) -> set[str]:
    """Every `type` in a decoder description, which may be a sequence."""
    if not isinstance(node, dict):
        return set()
    inner = [kind for part in node.get("decoders", []) for kind in _kinds(part)]
    return {node.get("type", ""), *inner}


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer called `spec`.

    Args:
        spec: 'byte', a SentencePiece `*.model`, a Hugging Face `*.json`, or a folder that holds
            tokenizer.json or tokenizer.model.

    Raises:
        UserError: the file is missing or is not a tokenizer.
    """
    if spec == "byte":
        return ByteTokenizer()
    path = Path(spec)
    if path.is_dir():
        found = [path / n for n in ("tokenizer.json", "tokenizer.model") if (path / n).is_file()]
        check(bool(found), f"tokenizer {spec!r} is a folder without tokenizer.json or tokenizer.model")
        path = found[0]
    if path.suffix not in (".model", ".json"):
        raise UserError(
            f"tokenizer {spec!r} is not 'byte', a SentencePiece *.model or a Hugging Face *.json"
            + nearest(spec, ["byte"])
        )
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob(f"*{path.suffix}")] if path.parent.is_dir() else []
        raise UserError(f"tokenizer {spec!r} does not exist{nearest(spec, siblings)}")
    if path.suffix == ".json":
        return HFTokenizer(path, spec)
    return SentencePieceTokenizer(path.read_bytes(), spec)


def train_sentencepiece(
    texts: Iterable[str],
    out_path: str | os.PathLike,
    vocab_size: int,
    model_type: str = "bpe",
    *,
    sentences: int = 2_000_000,
    character_coverage: float = 0.9995,
    threads: int = 0,
) -> SentencePieceTokenizer:
    """Train a lossless SentencePiece model on `texts` and write it to `out_path`.

    Nothing is normalised, no space is added or removed, and what the vocabulary lacks falls back to bytes.

    Args:
        texts: documents, such as `(d.text for d in sources.iter_all(globs))`; cut at line ends for the
            trainer.
        out_path: the `*.model` file.
        vocab_size: pieces, with the 256 bytes and 3 specials among them. `char` and `word` models may get
            fewer.
        model_type: 'bpe', 'unigram', 'word' or 'char'.
        sentences: lines that are sampled, uniformly, from a larger corpus.
        character_coverage: share of the characters that get a piece of their own.
        threads: 0 = all cores.

    Raises:
        UserError: no text, or a vocabulary that this text cannot fill or that cannot hold its characters.

    Source: Kudo and Richardson (2018), https://arxiv.org/abs/1808.06226.
    """
    check_choice(model_type, ("bpe", "unigram", "word", "char"), "model_type")
    out_path = Path(out_path)
    check(out_path.suffix == ".model", f"out_path {str(out_path)!r} must end in .model")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            input_sentence_size=sentences,
            shuffle_input_sentence=True,
            character_coverage=character_coverage,
            num_threads=threads or os.cpu_count() or 1,
            normalization_rule_name="identity",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=_MAX_SENTENCE * 4,
            minloglevel=2,
        )
    except RuntimeError as error:
        message = str(error)
        if "UserError: " in message:  # raised by the iterator of texts and wrapped on its way through C++
            message = message.split("UserError: ", 1)[1].split("\n\nAt:")[0]
        elif "!sentences_.empty()" in message:
            message = "there is no text to train on"
        elif "] " in message:
            message = message.split("] ", 1)[1]
        raise UserError(
            f"cannot train a {model_type} tokenizer of {vocab_size} pieces: {message.strip()}"
        ) from error
    try:
        out_path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise shards.cannot_write(out_path, error) from error
    shards.write_atomic(out_path, model.getvalue())
    return SentencePieceTokenizer(model.getvalue(), str(out_path))


_MAX_SENTENCE = 4096  # characters; the trainer drops longer lines, so they are cut


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _MAX_SENTENCE):
                yield line[start : start + _MAX_SENTENCE]


def tokenizer_report(tokenizer: Tokenizer, text: str = _PROBE) -> dict[str, Any]:
    """What a person wants to know of a tokenizer, measured on `text`.

    Returns:
        name, kind, vocab_size, fingerprint, specials (name -> id and piece), tokens, bytes, bytes_per_token,
        lossless (`text` survives a round trip), exact_bytes (token_bytes sums to the size of `text`) and
        sample, the first pieces of `text`.
    """
    ids = tokenizer.encode(text)
    size = len(text.encode())
    return {
        "name": tokenizer.name,
        "kind": type(tokenizer).__name__,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "specials": {
            name: (i, tokenizer.piece(i))
            for name, i in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("pad", tokenizer.pad_id))
        },
        "tokens": len(ids),
        "bytes": size,
        "bytes_per_token": size / max(len(ids), 1),
        "lossless": tokenizer.decode(ids) == text,
        "exact_bytes": float(tokenizer.token_bytes[ids].sum()) == size,
        "sample": [tokenizer.piece(i) for i in ids[:64]],
    }


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raise `UserError` if the tokenizer makes ids that the model has no embedding for."""
    if tokenizer.vocab_size > model_vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens, but the model's vocab_size is "
            f"{model_vocab_size}: set it to {tokenizer.vocab_size} or more"
        )
