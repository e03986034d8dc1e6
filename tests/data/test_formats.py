"""Every format through the loader: the agreed arrays, hosts, seeking, epochs, and what is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jaxlm.config import build
from jaxlm.data.config import FORMATS, NoiseConfig
from jaxlm.data.loader import DataConfig, Dataset, Loader, eval_batches, make_dataset
from jaxlm.data.packing import Batch
from jaxlm.data.prepare import prepare
from jaxlm.data.sources import iter_documents
from jaxlm.data.tokenizer import ByteTokenizer, train_sentencepiece
from jaxlm.errors import UserError

from .conftest import words

TOKENIZER = ByteTokenizer()
VOCAB = 320  # 64 ids beyond the bytes
ENCODER = dict(input_len=48, packing="pad")
KNOBS: dict[str, dict] = {
    "prefix_lm": dict(packing="first_fit"),
    "mlm": dict(noise=NoiseConfig(whole_words=True, max_predictions=7)),
    "nsp": dict(packing="pad"),
    "sop": dict(packing="pad"),
    "span_corruption": dict(input_len=48, decoder_start="pad"),
    "denoise": dict(ENCODER, with_bos=True, noise=NoiseConfig(0.3, permute=True, delete=0.1, rotate=0.5)),
    "seq2seq": dict(ENCODER, text_key="question", target_key="answer"),
    "classification": dict(packing="pad", text_key="question", target_key="kind", classes=("short", "long")),
    "tags": dict(packing="pad", text_key="question", target_key="tags", classes=("A", "B", "C")),
}


def tag_of(word: str) -> str:
    return "ABC"[len(word) % 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of many lengths, and records with two texts and a label."""
    folder = tmp_path_factory.mktemp("formats")
    rng = np.random.default_rng(1)
    texts = [words(rng, int(n)).replace(" the ", ". ") for n in rng.integers(1, 60, 24)]
    documents = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "documents.jsonl").write_text(documents)
    records = [
        {
            "question": t,
            "answer": t[::-1][:40],
            "kind": "long" if len(t) > 99 else "short",
            "tags": " ".join(tag_of(word) for word in t.split()),
        }
        for t in texts
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def config(name: str, folder: Path, **changes) -> DataConfig:
    file = "documents" if FORMATS[name].text == "documents" else "records"
    path = str(folder / f"{file}.jsonl")
    fields = dict(train=path, eval=path, seq_len=32, batch_size=8, seed=3, cache_dir=str(folder / "cache"))
    return DataConfig(**fields | KNOBS[name] | dict(format=name) | changes)


def dataset(cfg: DataConfig, split: str = "train") -> Dataset:
    return make_dataset(cfg, TOKENIZER, split=split, vocab_size=VOCAB)


def assert_equal(a: Batch, b: Batch) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def joined(batches: list[Batch]) -> Batch:
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


def changed(a: Batch, b: Batch) -> bool:
    return any(not np.array_equal(a[name], b[name]) for name in a)


DECODER = dict.fromkeys(("tokens", "targets", "weights", "segments", "positions"), (32,))
INPUTS = dict.fromkeys(("inputs", "input_segments", "input_positions"), (48,))
LABEL = {"labels": (), "label_weights": ()}
ARRAYS = {
    "prefix_lm": DECODER | {"prefix": (32,)},
    "mlm": DECODER,
    "nsp": DECODER | {"types": (32,)} | LABEL,
    "sop": DECODER | {"types": (32,)} | LABEL,
    "span_corruption": DECODER | INPUTS,
    "denoise": DECODER | INPUTS,
    "seq2seq": DECODER | INPUTS,
    "classification": dict.fromkeys(("tokens", "segments", "positions"), (32,)) | LABEL,
    "tags": DECODER,
}


@pytest.mark.parametrize("name", KNOBS)
def test_batch_has_the_agreed_form(folder: Path, name: str):
    cfg = config(name, folder)
    batch = Loader(dataset(cfg), cfg)(0)
    assert {n: a.shape[1:] for n, a in batch.items()} == ARRAYS[name]
    for n, array in batch.items():
        assert array.dtype == (np.float32 if n.endswith("weights") else np.int32), n
        assert array.shape[0] == 8
    for tokens, segments in (("tokens", "segments"), ("inputs", "input_segments")):
        if tokens in batch:
            assert (batch[tokens][batch[segments] == 0] == TOKENIZER.pad_id).all()
            assert batch[tokens].min() >= 0
            assert batch[tokens].max() < VOCAB
    if "weights" in batch:
        assert not batch["weights"][batch["segments"] == 0].any()
        assert batch["weights"].sum() > 0
        assert batch["targets"].max() < VOCAB


@pytest.mark.parametrize("name", KNOBS)
def test_hosts_seeking_and_sizes_do_not_show(folder: Path, name: str):
    cfg = config(name, folder)
    data = dataset(cfg)
    alone, again = Loader(data, cfg), Loader(dataset(cfg), cfg)
    for step in (0, 5, 10**9):
        for hosts in (2, 8):
            each = [Loader(data, cfg, rows=np.arange(8).reshape(hosts, -1)[i]) for i in range(hosts)]
            assert_equal(joined([host(step) for host in each]), alone(step))
    walked = [alone(step) for step in range(8)]
    for step in (7, 0, 3):
        assert_equal(again(step), walked[step])
    small = dataclasses.replace(cfg, batch_size=4)
    halves = Loader(data, small)
    assert_equal(joined([halves(0), halves(1)]), walked[0])


@pytest.mark.parametrize("name", [n for n in KNOBS if "noise.variants" in FORMATS[n].reads])
def test_each_epoch_draws_anew_unless_variants_are_few(folder: Path, name: str):
    noise = dataclasses.replace(KNOBS[name].get("noise", NoiseConfig()), variants=2)
    fresh, twice = config(name, folder), config(name, folder, noise=noise)
    data, few = dataset(fresh), dataset(twice)
    by_epoch = [data.batch([(0, row, epoch) for row in range(8)]) for epoch in range(4)]
    assert all(changed(by_epoch[e], by_epoch[0]) for e in (1, 2, 3))
    of_two = [few.batch([(0, row, epoch) for row in range(8)]) for epoch in range(4)]
    assert_equal(of_two[0], of_two[2])
    assert_equal(of_two[1], of_two[3])
    assert changed(of_two[0], of_two[1])
    other = dataset(dataclasses.replace(fresh, seed=4, packing=fresh.packing))
    assert changed(other.batch([(0, row, 0) for row in range(8)]), by_epoch[0])


@pytest.mark.parametrize("name", KNOBS)
def test_eval_is_the_same_at_every_batch_size_and_seed(folder: Path, name: str):
    made = []
    for size, seed in ((1, 0), (5, 1), (64, 2)):
        batches = eval_batches(config(name, folder, seed=seed), TOKENIZER, size, vocab_size=VOCAB)
        assert batches.num_tokens is batches.num_bytes is None  # nothing here stands for the bytes of a text
        rows = joined(list(batches))
        made.append({n: a[: batches.dataset.num_rows] for n, a in rows.items()})
        weights = rows.get("label_weights", rows.get("weights"))
        assert not weights[batches.dataset.num_rows :].any()
    assert_equal(made[1], made[0])
    assert_equal(made[2], made[0])


def test_fingerprints_tell_formats_apart(folder: Path):
    prints = {name: dataset(config(name, folder)).fingerprint for name in KNOBS}
    prints["rate"] = dataset(config("mlm", folder, noise=NoiseConfig(0.2))).fingerprint
    prints["plain"] = dataset(config("mlm", folder, noise=NoiseConfig())).fingerprint
    prints["vocab"] = make_dataset(config("mlm", folder), TOKENIZER, vocab_size=VOCAB + 1).fingerprint
    assert len(set(prints.values())) == len(prints)
    again = dataset(config("mlm", folder, batch_size=2, prefetch=7)).fingerprint
    assert again == prints["mlm"]


# What stands in the rows.


def test_published_counts_through_the_loader(tmp_path: Path):
    (tmp_path / "long.txt").write_text("all work and no play makes a dull text. " * 500)
    shared = dict(train=str(tmp_path / "long.txt"), cache_dir=str(tmp_path / "cache"), batch_size=4)
    bert = DataConfig(format="mlm", seq_len=128, noise=NoiseConfig(max_predictions=20), **shared)
    assert set(Loader(dataset(bert), bert)(0)["weights"].sum(1)) == {19}
    t5 = DataConfig(format="span_corruption", seq_len=114, input_len=512, **shared)
    data = dataset(t5)
    assert data.format.raw_len == 568
    batch = Loader(data, t5)(0)
    assert set((batch["input_segments"] != 0).sum(1)) == {512}
    assert set(batch["weights"].sum(1)) == {114}
    sentinels = batch["inputs"][0][batch["inputs"][0] >= 256]
    assert sentinels.tolist() == list(range(VOCAB - 1, VOCAB - 29, -1))
    with pytest.raises(
        UserError, match=r"568 tokens become 512 inputs and 114 targets; set data.seq_len=114"
    ):
        dataset(dataclasses.replace(t5, seq_len=100))


def test_masked_rows_say_what_stood_there(folder: Path):
    plain = config("mlm", folder, noise=NoiseConfig(), packing="pad")
    data = dataset(plain)
    batch = data.batch([(0, row, 0) for row in range(8)])
    texts = [d.text.encode() for d in iter_documents(folder / "documents.jsonl")]
    starts = {bytes(row[1:][row[1:] > 0].astype(np.uint8)) for row in batch["targets"]}
    assert all(any(start in text for text in texts) for start in starts)
    shown = batch["weights"] == 0
    np.testing.assert_array_equal(batch["tokens"][shown], batch["targets"][shown])
    assert (batch["tokens"] == VOCAB - 1).sum() > 0
    assert (batch["targets"][batch["weights"] == 1] > 0).all()  # BOS and EOS are never hidden


def test_pairs_of_segments(folder: Path):
    for name in ("nsp", "sop"):
        data = dataset(config(name, folder))
        batch = joined([data.batch([(0, row, e) for row in range(data.num_rows)]) for e in range(4)])
        labels = batch["labels"][batch["label_weights"] == 1]
        assert 0.35 < labels.mean() < 0.65
        for tokens, types, segments in zip(batch["targets"], batch["types"], batch["segments"], strict=True):
            used = int(segments.sum())
            assert tokens[0] == tokens[used - 1] == 0
            assert np.flatnonzero(tokens[:used] == 0).shape == (3,)  # [BOS] a [EOS] b [EOS]
            second = np.flatnonzero(tokens[:used] == 0)[1] + 1
            assert types[:used].tolist() == [0] * second + [1] * (used - second)


def test_random_next_sentences_are_of_another_document(tmp_path: Path):
    texts = ["aaaa. aaaa. aaaa. aaaa", "bbbb. bbbb. bbbb. bbbb", "cccc. cccc. cccc"]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    cfg = DataConfig(
        train=str(tmp_path / "d.jsonl"), cache_dir=str(tmp_path), format="nsp", packing="pad", seq_len=32
    )
    data = dataset(cfg)
    seen = set()
    for epoch in range(100):
        batch = data.batch([(0, row, epoch) for row in range(3)])
        for r, (targets, types, label) in enumerate(
            zip(batch["targets"], batch["types"], batch["labels"], strict=True)
        ):
            letters = set(bytes(targets[types == 1].astype(np.uint8)).decode()) - set(". \0")
            assert len(letters) == 1
            assert (letters == {"abc"[r]}) == (label == 0)
            seen.add((r, *letters))
    assert len(seen) == 9


def test_an_evaluation_inside_one_document_has_no_other_to_draw_from(folder: Path):
    with pytest.raises(UserError, match=r"the first 2 tokens of .* are of one document"):
        dataset(config("nsp", folder, eval_tokens=2), "eval")


def test_prefixes(folder: Path):
    cfg = config("prefix_lm", folder)
    plain = make_dataset(dataclasses.replace(cfg, format="lm"), TOKENIZER)
    data = dataset(cfg)
    assert data.num_rows == plain.num_rows
    shares = []
    for row in range(data.num_rows):
        marked, whole = data.batch([(0, row, 0)]), plain.batch([(0, row, 0)])
        for name in ("tokens", "targets", "segments", "positions"):
            np.testing.assert_array_equal(marked[name], whole[name])
        segments, prefix, weights = (marked[n][0] for n in ("segments", "prefix", "weights"))
        for s in range(1, segments.max() + 1):
            columns = np.flatnonzero(segments == s)
            n = int(prefix[columns].sum())
            assert 1 <= n <= len(columns)
            assert prefix[columns].tolist() == [1] * n + [0] * (len(columns) - n)
            assert weights[columns].tolist() == [0.0] * (n - 1) + [1.0] * (len(columns) - n + 1)
            shares.append(n / len(columns))
        assert not prefix[segments == 0].any()
    assert 0.3 < np.mean(shares) < 0.8


def test_denoising_targets_are_the_text(folder: Path):
    data = dataset(config("denoise", folder))
    text = b"\0".join(d.text.encode() for d in iter_documents(folder / "documents.jsonl"))
    batch = data.batch([(0, row, 0) for row in range(8)])
    for r in range(8):
        targets = batch["targets"][r][batch["segments"][r] > 0]
        assert targets[0] == targets[-1] == 0  # with_bos
        assert bytes(targets[1:-1].astype(np.uint8)) in text
        assert batch["tokens"][r][1] == targets[0]
        inputs = batch["inputs"][r][batch["input_segments"][r] > 0]
        assert inputs[0] == inputs[-1] == 0
        assert len(targets) < 4 or (inputs == VOCAB - 1).sum() > 0


@pytest.mark.parametrize("name", ["span_corruption", "denoise"])
def test_a_row_of_a_last_eos_is_no_example(tmp_path: Path, name: str):
    """A text that fills its row leaves its EOS to the next, from which there is nothing to learn."""
    cfg = config(name, tmp_path, packing="pad")
    (tmp_path / "documents.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    room = dataset(cfg).format.raw_len
    texts = ["x" * room, "y" * (room - 1)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    data = dataset(dataclasses.replace(cfg, cache_dir=str(tmp_path / "again")))
    weights = [data.batch([(0, row, 0)])["weights"].sum() for row in range(data.num_rows)]
    assert [w > 0 for w in weights] == [True, False, True]


def pairs_of(batch: Batch) -> list[tuple[str, str]]:
    out = []
    for r in range(len(batch["inputs"])):
        source = batch["inputs"][r][batch["input_segments"][r] > 0]
        target = batch["targets"][r][batch["segments"][r] > 0]
        out.append((TOKENIZER.decode(source), TOKENIZER.decode(target)))
    return out


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "numbers", "aligned", "parquet", "prepared"])
def test_parallel_text_from_every_kind_of_file(tmp_path: Path, kind: str):
    texts = [(f"word {i}, and {'more ' * (i % 5)}", f"{i} drow") for i in range(30)]
    keys = ("en", "de")
    path = tmp_path / f"a.{kind}"
    if kind in ("jsonl", "prepared"):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(dict(zip(keys, t, strict=True))) + "\n" for t in texts))
    elif kind == "csv":
        path.write_text("id,de,en\n" + "".join(f'{i},{b},"{a}"\n' for i, (a, b) in enumerate(texts)))
    elif kind == "tsv":
        path.write_text("en\tde\n" + "".join(f"{a}\t{b}\n" for a, b in texts))
    elif kind == "numbers":
        path, keys = tmp_path / "a.tsv", ("1", "0")
        path.write_text("".join(f"{b}\t{a}\n" for a, b in texts))
    elif kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        columns = {k: [t[i] for t in texts] for i, k in enumerate(keys)}
        parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    else:
        path, keys = tmp_path / "a.en", ("text", ".de")
        path.write_text("".join(a + "\n" for a, _ in texts))
        (tmp_path / "a.de").write_text("".join(b + "\n" for _, b in texts))
    if kind == "prepared":
        prepare(str(path), tmp_path / "out", "byte", text_key="en,de", shard_tokens=100, workers=1)
        path = tmp_path / "out"
    cfg = DataConfig(
        train=str(path),
        cache_dir=str(tmp_path / "cache"),
        format="seq2seq",
        packing="pad",
        text_key=keys[0],
        target_key=keys[1],
        input_len=48,
        seq_len=16,
    )
    data = dataset(cfg)
    assert data.num_rows == 30
    assert sorted(pairs_of(data.batch([(0, row, 0) for row in range(30)]))) == sorted(texts)
    assert (data.describe()[0]["cut"], data.cut()) == (0, {})
    shorter = dataset(dataclasses.replace(cfg, seq_len=7))
    assert shorter.describe()[0]["cut"] == 20  # '10 drow' and EOS are 8
    assert shorter.cut() == {str(path): {"cut": 20, "pairs": 30}}


def test_labels_are_numbers_of_classes(folder: Path):
    cfg = config("classification", folder)
    data = dataset(cfg)
    batch = data.batch([(0, row, 0) for row in range(data.num_rows)])
    texts = [d.text for d in iter_documents(folder / "records.jsonl", "question")]
    assert batch["labels"].tolist() == [int(len(text) > 99) for text in texts]
    assert TOKENIZER.decode(batch["tokens"][0]) == texts[0][:30]
    assert data.cut()[cfg.train]["cut"] == sum(len(text) > 30 for text in texts) > 0
    reverse = dataset(dataclasses.replace(cfg, classes=("long", "short")))
    assert reverse.batch([(0, 0, 0)])["labels"] == 1 - batch["labels"][0]
    with pytest.raises(
        UserError, match=r"the label of pair \d+ .* is none of data.classes=\('short', 'tall'\)"
    ):
        dataset(dataclasses.replace(cfg, classes=("short", "tall")))
    (folder / "numbers.jsonl").write_text('{"question": "a", "kind": 0}\n{"question": "b", "kind": 1}\n')
    numbers = dataclasses.replace(cfg, train=str(folder / "numbers.jsonl"), classes=("1", "0"))
    assert dataset(numbers).batch([(0, 0, 0), (0, 1, 0)])["labels"].tolist() == [1, 0]


@pytest.mark.parametrize("pieces", [False, True])
def test_the_first_token_of_a_word_has_its_tag(folder: Path, tmp_path: Path, pieces: bool):
    """With bytes and with pieces of several letters, some of them longer than a word, and a cut text."""
    cfg, tokenizer = dataclasses.replace(config("tags", folder), seq_len=40), TOKENIZER
    texts = [d.text for d in iter_documents(folder / "records.jsonl", "question")]
    if pieces:
        tokenizer = train_sentencepiece(texts, tmp_path / "a.model", 300)
    data = make_dataset(cfg, tokenizer)
    batch = data.batch([(0, row, 0) for row in range(data.num_rows)])
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert data.cut()[cfg.train]["cut"] == sum(n > 38 for n in lengths) > 0
    several = 0
    for text, targets, weights in zip(texts, batch["targets"], batch["weights"], strict=True):
        ids = tokenizer.encode(text)
        words = [len(tokenizer.decode(ids[:n]).encode().split()) for n in range(len(ids) + 1)]
        begins = np.flatnonzero(np.diff(words))  # the token with which a word more is seen
        classes = ["ABC".index(tag_of(word)) for word in text.split()]
        columns = np.flatnonzero(weights)
        np.testing.assert_array_equal(columns, begins[begins < 38] + 1)
        np.testing.assert_array_equal(targets[columns], classes[: len(columns)])
        assert not targets[weights == 0].any()
        several += len(ids) > len(begins) > len(columns) > 0
    assert several > 5


def test_tags_that_do_not_fit_their_words(folder: Path, tmp_path: Path):
    def refused(message: str, text: str, tags: str, **changes) -> None:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text(json.dumps({"question": text, "tags": tags}) + "\n")
        with pytest.raises(UserError, match=message):
            dataset(config("tags", folder, train=str(path), **changes))

    refused(r"pair 0 \(from 0\) has 2 words and 3 tags", "two words", "A B C")
    refused("the tag 'D' is none of data.classes=", "two words", "A D")
    refused("'NOUM' is none of .*; did you mean 'NOUN'", "one", "NOUM", classes=("NOUN", "VERB"))
    with pytest.raises(UserError, match=r"needs data.target_key, the field of the tags"):
        config("tags", folder, target_key="")

    wordy = ByteTokenizer()  # as WordPiece, its tokens leave spaces out
    wordy.token_bytes = np.where(np.arange(256) == 32, 0, 1)
    with pytest.raises(UserError, match=r"its tokens stand for .* not 'byte'"):
        make_dataset(config("tags", folder), wordy)


# Refusals.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(format="bert"), "data.format='bert' is not one of"),
        (
            dict(format="lm", noise=dict(rate=0.3)),
            "data.noise.rate=0.3 is not read by data.format='lm', but by",
        ),
        (dict(format="mlm", noise=dict(mean_span=2.0)), "data.noise.mean_span=2.0 is not read by"),
        (dict(format="mlm", input_len=4), "data.input_len=4 is not read by .*span_corruption"),
        (
            dict(format="mlm", packing="first_fit"),
            "no packing 'first_fit'; set data.packing to one of: concat, pad",
        ),
        (dict(format="nsp"), "set data.packing to one of: pad"),
        (dict(format="denoise"), "needs data.input_len"),
        (
            dict(format="seq2seq", packing="pad", input_len=4),
            "needs data.target_key, the field of the target",
        ),
        (dict(format="classification", packing="pad", target_key="y"), r"data.classes=\(\) must name two"),
        (dict(format="classification", packing="pad", target_key="y", classes=("a", "a")), "more than once"),
        (dict(noise=dict(rate=1.0)), "data.noise.rate=1.0 must lie between 0 and 1"),
        (dict(decoder_start="sep"), "data.decoder_start='sep' is not one of"),
    ],
)
def test_bad_settings(fields: dict, message: str):
    with pytest.raises(UserError, match=message):
        build(fields, DataConfig, "data")


def test_ids_that_are_not_there(folder: Path):
    with pytest.raises(UserError, match=r"needs a mask token, .* set model.vocab_size to 257 or more"):
        make_dataset(config("mlm", folder), TOKENIZER, vocab_size=256)
    spans_of = config("span_corruption", folder)
    with pytest.raises(
        UserError, match=r"needs 3 sentinels, .* set model.vocab_size to 259 or more.*it has 2"
    ):
        make_dataset(spans_of, TOKENIZER, vocab_size=258)
    assert make_dataset(spans_of, TOKENIZER, vocab_size=259).num_rows > 0


def test_text_of_the_wrong_kind(folder: Path, tmp_path: Path):
    def refused(message: str, cfg: DataConfig) -> None:
        with pytest.raises(UserError, match=message):
            dataset(cfg)

    single, paired = config("mlm", folder), config("seq2seq", folder)
    prepare(single.train, tmp_path / "single", "byte", workers=1)
    prepare(paired.train, tmp_path / "paired", "byte", text_key="question,answer", workers=1)
    refused(
        "holds documents, not pairs: prepare it", dataclasses.replace(paired, train=str(tmp_path / "single"))
    )
    refused("was prepared as pairs", dataclasses.replace(single, train=str(tmp_path / "paired")))
    (tmp_path / "one.txt").write_text("a single document")
    refused("holds one document", config("nsp", folder, train=str(tmp_path / "one.txt")))
    aligned = dataclasses.replace(paired, text_key="text", target_key=".de")
    (tmp_path / "a.en").write_text("one\ntwo\n")
    refused("has no file 'a.de' beside it", dataclasses.replace(aligned, train=str(tmp_path / "a.en")))
    (tmp_path / "a.de").write_text("eins\n")
    refused("a.en has 2 lines but .*a.de has 1", dataclasses.replace(aligned, train=str(tmp_path / "a.en")))
    (tmp_path / "a.de").write_text("eins\n\n")
    refused(
        "a.de:2: one half of the pair is empty", dataclasses.replace(aligned, train=str(tmp_path / "a.en"))
    )
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    refused("has no column 'question'", dataclasses.replace(paired, train=str(tmp_path / "a.csv")))
