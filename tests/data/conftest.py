"""A small corpus with everything that breaks tokenizers, and shards made from it."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxlm.data import shards
from jaxlm.data.prepare import prepare
from jaxlm.data.shards import TokenStore

TRICKY = (
    "plain text",
    "two  spaces,   three   and a tab\t.",
    "  leading and trailing  ",
    "line\nline\n\n\nblank lines\n",
    "carriage\r\nreturn\r",
    " ",
    "\n",
    "caf\u00e9 cafe\u0301 \ufb01 \uff21 \u00bd \u2126",  # composed, decomposed, compatibility
    "\u65e5\u672c\u8a9e \U0001f389\U0001f469\u200d\U0001f680 \u0645\u0631\u062d\u0628\u0627",
    "a \u2581 literal \u2581\u2581 escape",
    "zero\u200bwidth \u2028 separators \ufeff",
    "<s> </s> <unk> <0x0A> <|endoftext|> [SEP]",
    "control \x01\x02\x1f\x7f",
)

_SYLLABLES = ("ha", "sto", "mir", "lan", "que", "fi", "dor", "be", "wu")


def store_of(folder: Path, documents: list[list[int]], eos: int = 1, shard_documents: int = 7) -> TokenStore:
    """A store of exactly these documents, `shard_documents` to a shard."""
    folder.mkdir()
    entries = []
    for s in range(0, len(documents), shard_documents):
        part = documents[s : s + shard_documents]
        name = f"shard-{len(entries)}"
        np.array([t for d in part for t in (*d, eos)], "<u4").tofile(folder / f"{name}.bin")
        np.cumsum([0, *(len(d) + 1 for d in part)], dtype="<i8").tofile(folder / f"{name}.idx")
        entry = {"name": name, "tokens": sum(len(d) + 1 for d in part), "documents": len(part), "bytes": 0}
        for suffix in (".bin", ".idx"):
            entry[f"sha256{suffix}"] = shards.file_sha256(folder / (name + suffix))
        entries.append(entry)
    tokenizer = {"name": "numbers", "fingerprint": "f" * 64}
    index = {"version": shards.VERSION, "dtype": "<u4", "tokenizer": tokenizer, "shards": entries}
    (folder / shards.INDEX).write_text(json.dumps(index))
    return TokenStore([folder])


def words(rng: np.random.Generator, count: int) -> str:
    """A text of about `count` words."""
    stock = [
        "\n",
        "the",
        "of",
        "whale",
        *(a + b + c for a in _SYLLABLES for b in _SYLLABLES for c in ("", "s", "ing")),
    ]
    share = 1 / np.arange(1, len(stock) + 1)
    return " ".join(rng.choice(stock, count, p=share / share.sum()))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine text files of 1 to 400 words."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i, count in enumerate((1, 400, 30, 5, 200, 3, 80, 1, 150)):
        (folder / f"{i}.txt").write_text(words(rng, count), newline="")
    return folder


@pytest.fixture(scope="session")
def store(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """The corpus in bytes, in shards of about 600 tokens, so that rows and documents meet shard ends."""
    out = tmp_path_factory.mktemp("shards") / "bytes"
    made = prepare(str(corpus / "*.txt"), out, "byte", shard_tokens=600, workers=1)
    assert made.complete
    assert made.units >= 4
    return TokenStore([out])
