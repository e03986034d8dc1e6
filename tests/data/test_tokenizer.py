"""One conformance suite for every kind of tokenizer, and what each refuses."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from jaxlm.data.tokenizer import (
    ByteTokenizer,
    Tokenizer,
    _special_names,
    check_vocabulary,
    load_tokenizer,
    tokenizer_report,
    train_sentencepiece,
)
from jaxlm.errors import UserError

from .conftest import TRICKY, words

MODEL_TYPES = ("bpe", "unigram", "word", "char")
LOSSLESS = ("byte", *MODEL_TYPES, "hf")


def byte_level_json(path: Path, special: str = "<|endoftext|>") -> None:
    tokenizers = pytest.importorskip("tokenizers")
    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[special],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    hf.train_from_iterator([words(np.random.default_rng(1), 2000), *TRICKY], trainer)
    hf.save(str(path))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    text = words(np.random.default_rng(1), 2000)
    for kind in MODEL_TYPES:
        # The trickiest characters are kept out of training, so that they must fall back to bytes.
        train_sentencepiece([text, *TRICKY[:4]], folder / f"{kind}.model", 330, kind)
    byte_level_json(folder / "hf.json")
    return folder


@pytest.fixture(params=LOSSLESS)
def tokenizer(request: pytest.FixtureRequest, folder: Path) -> Tokenizer:
    kind = request.param
    return load_tokenizer(
        kind if kind == "byte" else str(folder / f"{kind}.{'json' if kind == 'hf' else 'model'}")
    )


def random_texts() -> list[str]:
    rng = random.Random(0)
    ranges = (
        (1, 128),
        (32, 127),
        (0x80, 0x3000),
        (0x4E00, 0x9FFF),
        (0xE000, 0x110000),
        (0x2581, 0x2582),
        (32, 33),
    )
    return ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(40)) for _ in range(100)]


def test_protocol(tokenizer: Tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert re.fullmatch("[0-9a-f]{64}", tokenizer.fingerprint)
    for special in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id):
        assert 0 <= special < tokenizer.vocab_size


def test_round_trip_and_bytes_are_exact(tokenizer: Tokenizer):
    for text in (*TRICKY, *random_texts()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert 0 <= min(ids) <= max(ids) < tokenizer.vocab_size


def test_text_cannot_forge_a_special_token(tokenizer: Tokenizer):
    for text in TRICKY:
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode(text))


def test_batch_is_each_text_alone(tokenizer: Tokenizer):
    texts = [*TRICKY, ""]
    arrays = tokenizer.encode_batch(texts)
    assert [a.dtype for a in arrays] == [np.int32] * len(texts)
    assert [a.tolist() for a in arrays] == [tokenizer.encode(t) for t in texts]


def test_specials_stand_for_nothing(tokenizer: Tokenizer):
    ids = tokenizer.encode("whale")
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "whale"
    assert tokenizer.decode(np.array([*ids, tokenizer.vocab_size + 5])) == "whale"  # of a padded model
    assert tokenizer.token_bytes[tokenizer.bos_id] == tokenizer.token_bytes[tokenizer.eos_id] == 0
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes.dtype == np.float32


def test_report(tokenizer: Tokenizer):
    report = tokenizer_report(tokenizer, "the whale  and the sea")
    assert report["lossless"]
    assert report["exact_bytes"]
    assert report["bytes"] == 22
    assert report["bytes_per_token"] == 22 / report["tokens"]
    assert len(report["sample"]) == report["tokens"]
    assert report["specials"]["eos"][0] == tokenizer.eos_id


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_training_is_deterministic_and_fingerprint_is_of_content(folder: Path, tmp_path: Path, kind: str):
    text = words(np.random.default_rng(1), 2000)
    again = train_sentencepiece(iter([text, *TRICKY[:4]]), tmp_path / "again.model", 330, kind)
    assert again.fingerprint == load_tokenizer(str(folder / f"{kind}.model")).fingerprint
    assert list(tmp_path.iterdir()) == [tmp_path / "again.model"]


def test_model_types_differ(folder: Path):
    assert len({load_tokenizer(str(folder / f"{k}.model")).fingerprint for k in MODEL_TYPES}) == len(
        MODEL_TYPES
    )


def test_subwords_compress(folder: Path):
    text = words(np.random.default_rng(2), 300)
    assert len(load_tokenizer(str(folder / "bpe.model")).encode(text)) < len(text) / 2


def test_foreign_sentencepiece_with_dummy_prefix_is_reported_inexact(tmp_path: Path):
    import sentencepiece

    path = tmp_path / "llama.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter([words(np.random.default_rng(0), 500)]),
            model_writer=file,
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
        )
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.decode(tokenizer.encode("the whale")) == "the whale"
    assert tokenizer.token_bytes[tokenizer.encode("the whale")].sum() == len("the whale") + 1
    assert not tokenizer_report(tokenizer)["exact_bytes"]


def test_hf_word_piece_is_approximate_and_says_so(tmp_path: Path):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "the": 3, "wh": 4, "##ale": 5}
    hf = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    hf.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    hf.decoder = tokenizers.decoders.WordPiece()
    hf.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    hf.save(str(tmp_path / "bert.json"))
    tokenizer = load_tokenizer(str(tmp_path / "bert.json"))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.decode(tokenizer.encode("the whale")) == "the whale"
    assert tokenizer.token_bytes.tolist() == [0, 0, 0, 3, 2, 3]
    assert not tokenizer_report(tokenizer, "the whale")["exact_bytes"]  # the space is in no token


def test_hf_byte_fallback_counts(tmp_path: Path):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"<s>": 0, "</s>": 1, "\u2581the": 2, **{f"<0x{b:02X}>": 3 + b for b in range(256)}}
    hf = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True))
    hf.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    hf.add_special_tokens(["<s>", "</s>"])
    hf.save(str(tmp_path / "llama.json"))
    tokenizer = load_tokenizer(str(tmp_path / "llama.json"))
    assert tokenizer.token_bytes[[0, 1, 2, 3 + 65]].tolist() == [0, 0, 4, 1]
    assert tokenizer.token_bytes[tokenizer.encode("\u00e9")].sum() == 2


def test_hf_specials_come_from_the_config_beside_it(tmp_path: Path):
    byte_level_json(tmp_path / "tokenizer.json", special="<stop>")
    with pytest.raises(UserError, match="no special token that ends a document"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.piece(tokenizer.eos_id) == "<stop>"
    assert tokenizer.bos_id == tokenizer.eos_id


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.model", b"", "empty"),
        ("a.model", b"this is not a model", "not a SentencePiece model"),
        ("a.json", b"{", "not a tokenizer.json"),
        ("a.json", b"\xff\xfe\x00", "not a tokenizer.json"),
        ("a.json", b"[1, 2]", "no 'model' object"),
        ("a.json", b'{"model": {"type": "nonsense"}}', "not a tokenizer.json"),
    ],
)
def test_a_file_that_is_no_tokenizer(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(str(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


def test_missing_files(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"does not exist; did you mean .*bpe\.model"):
        load_tokenizer(str(folder / "bpee.model"))
    with pytest.raises(UserError, match="did you mean 'byte'"):
        load_tokenizer("bytes")
    with pytest.raises(UserError, match="folder without"):
        load_tokenizer(str(tmp_path))


def test_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"jaxlm\[hf\]"):
        load_tokenizer(str(folder / "hf.json"))


def test_nul_is_refused_in_bytes():
    with pytest.raises(UserError, match=r"NUL .* at character 2"):
        ByteTokenizer().encode("\u00e9b\0c")


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [([], 400, "no text"), (["abc"], 5000, "too high"), (["abcdef"], 100, "smaller than required")],
)
def test_training_that_cannot_be(tmp_path: Path, texts: list[str], size: int, message: str):
    with pytest.raises(UserError, match=message):
        train_sentencepiece(texts, tmp_path / "a.model", size)
    assert list(tmp_path.iterdir()) == []


def test_training_passes_on_the_error_of_its_texts(tmp_path: Path):
    def texts():
        yield "fine"
        raise UserError("corpus/7.jsonl:3 is not JSON")

    with pytest.raises(UserError, match=r"pieces: corpus/7.jsonl:3 is not JSON$"):
        train_sentencepiece(texts(), tmp_path / "a.model", 300)


def test_training_choices(tmp_path: Path):
    with pytest.raises(UserError, match="did you mean 'unigram'"):
        train_sentencepiece(["a"], tmp_path / "a.model", 300, "unigrams")
    with pytest.raises(UserError, match=r"must end in \.model"):
        train_sentencepiece(["a"], tmp_path / "a.txt", 300)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        train_sentencepiece([words(np.random.default_rng(0), 500)], tmp_path / "file" / "a.model", 290)


def test_check_vocabulary():
    check_vocabulary(ByteTokenizer(), 256)
    check_vocabulary(ByteTokenizer(), 512)
    with pytest.raises(UserError, match="256 tokens, but the model's vocab_size is 255"):
        check_vocabulary(ByteTokenizer(), 255)


def test_a_list_of_special_tokens_is_refused_by_name(tmp_path):
    path = tmp_path / "tokenizer_config.json"
    path.write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer_config.json holds no JSON object"):
        _special_names(path)
