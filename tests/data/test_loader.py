"""The loader as a pure function of the step, over hosts, sources and epochs; the eval set; prefetching."""

import collections
import dataclasses
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jaxlm.data import loader as loader_module
from jaxlm.data.formats import Row
from jaxlm.data.loader import DataConfig, Dataset, EvalBatches, Loader, eval_batches, make_dataset, prefetch
from jaxlm.data.packing import PACKINGS, Batch
from jaxlm.data.prepare import prepare
from jaxlm.data.sources import iter_all
from jaxlm.data.tokenizer import ByteTokenizer, train_sentencepiece
from jaxlm.errors import UserError

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def mixed(corpus: Path) -> DataConfig:
    """Three sources of unequal size and weight."""
    train = (
        (str(corpus / "[01].txt"), 3.0),
        (str(corpus / "[2-5].txt"), 1.0),
        (str(corpus / "[6-8].txt"), 0.5),
    )
    return DataConfig(train=train, eval=str(corpus / "*.txt"), seq_len=32, batch_size=8, seed=3)


def dataset(cfg: DataConfig, cache: Path, split: str = "train") -> Dataset:
    return make_dataset(cfg, TOKENIZER, cache_dir=cache, split=split)


def assert_equal(a: Batch, b: Batch) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def joined(batches: list[Batch]) -> Batch:
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


@pytest.mark.parametrize("packing", PACKINGS)
def test_batch_has_the_agreed_form(mixed: DataConfig, cache: Path, packing: str):
    batch = Loader(dataset(dataclasses.replace(mixed, packing=packing), cache), mixed)(0)
    types = {"tokens": "i4", "targets": "i4", "weights": "f4", "segments": "i4", "positions": "i4"}
    assert {n: (a.dtype.str[1:], a.shape) for n, a in batch.items()} == {
        n: (t, (8, 32)) for n, t in types.items()
    }
    assert batch["weights"].sum() > 0


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_together_make_the_batch_of_one(mixed: DataConfig, cache: Path, packing: str, hosts: int):
    data = dataset(dataclasses.replace(mixed, packing=packing), cache)
    alone = Loader(data, mixed)
    each = [Loader(data, mixed, rows=np.arange(8).reshape(hosts, -1)[i]) for i in range(hosts)]
    for step in (0, 1, 57, 10**9):
        parts = [host(step) for host in each]
        assert {p["tokens"].shape[0] for p in parts} == {8 // hosts}
        assert_equal(joined(parts), alone(step))


def test_seeking_equals_iterating(mixed: DataConfig, cache: Path):
    first, second = (Loader(dataset(mixed, cache), mixed) for _ in range(2))
    walked = [first(step) for step in range(40)]
    for step in (39, 0, 7, 21, 7):
        assert_equal(second(step), walked[step])
    assert not np.array_equal(walked[0]["tokens"], walked[1]["tokens"])


def test_far_steps_cost_the_same(mixed: DataConfig, cache: Path):
    loader = Loader(dataset(mixed, cache), mixed)
    loader(0)
    began = time.perf_counter()
    loader(10**11)
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize("packing", PACKINGS)
def test_each_epoch_holds_every_token_once_in_an_order_of_its_own(corpus: Path, cache: Path, packing: str):
    cfg = DataConfig(train=str(corpus / "*.txt"), seq_len=32, batch_size=1, packing=packing)
    data = dataset(cfg, cache)
    loader = Loader(data, cfg)
    expected = collections.Counter(b"\0".join(d.text.encode() for d in iter_all(cfg.train)) + b"\0")
    epochs = []
    for epoch in range(3):
        rows = joined([loader(epoch * data.num_rows + i) for i in range(data.num_rows)])
        assert collections.Counter(rows["targets"][rows["weights"] == 1].tolist()) == expected
        assert int(rows["weights"].sum()) == data.num_tokens
        epochs.append(rows["targets"])
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])
    assert loader.epochs(2 * data.num_rows) == {cfg.train: 2.0}


def test_mixture_draws_rows_by_weight(mixed: DataConfig, cache: Path):
    data = dataset(mixed, cache)
    alone = [dataset(dataclasses.replace(mixed, train=glob), cache) for glob, _ in mixed.train]
    rows_of = [
        {tuple(r) for r in d.batch([Row(0, row) for row in range(d.num_rows)])["targets"].tolist()}
        for d in alone
    ]
    assert not rows_of[0] & rows_of[1]
    rows = joined([Loader(data, mixed)(step) for step in range(90)])["targets"].tolist()
    counts = [sum(tuple(r) in part for r in rows) for part in rows_of]
    np.testing.assert_allclose(counts, [480, 160, 80], atol=1)  # 3 : 1 : 0.5 of 720
    epochs = Loader(data, mixed).epochs(90)
    expected = [count / d.num_rows for count, d in zip((480, 160, 80), alone, strict=True)]
    np.testing.assert_allclose(list(epochs.values()), expected, rtol=1e-4)


def test_fingerprint_is_of_everything_that_decides_the_order(mixed: DataConfig, cache: Path, tmp_path: Path):
    base = dataset(mixed, cache).fingerprint
    assert dataset(mixed, tmp_path / "another cache").fingerprint == base
    assert dataset(dataclasses.replace(mixed, batch_size=4, prefetch=9, workers=1), cache).fingerprint == base
    (a, _), (b, _), (c, _) = mixed.train
    others = [
        dataclasses.replace(mixed, seed=4),
        dataclasses.replace(mixed, seq_len=33),
        dataclasses.replace(mixed, packing="pad"),
        dataclasses.replace(mixed, train=((a, 3.1), (b, 1.0), (c, 0.5))),
        dataclasses.replace(mixed, train=((b, 1.0), (a, 3.0), (c, 0.5))),
    ]
    assert len({base, *(dataset(cfg, cache).fingerprint for cfg in others)}) == 6
    assert (
        dataset(dataclasses.replace(mixed, train=((a, 6.0), (b, 2.0), (c, 1.0))), cache).fingerprint == base
    )


def test_seeds_give_other_orders(mixed: DataConfig, cache: Path):
    batches = []
    for seed in (3, 4):
        cfg = dataclasses.replace(mixed, seed=seed)
        batches.append(Loader(dataset(cfg, cache), cfg)(0))
    assert not np.array_equal(batches[0]["tokens"], batches[1]["tokens"])


def test_raw_text_is_prepared_once(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cfg = DataConfig(train=str(corpus / "*.txt"))
    first = dataset(cfg, tmp_path)
    monkeypatch.setattr(loader_module, "prepare", lambda *a, **k: pytest.fail("prepared again"))
    assert dataset(cfg, tmp_path).fingerprint == first.fingerprint
    assert len(list(tmp_path.iterdir())) == 1


def test_changed_text_is_prepared_anew(corpus: Path, tmp_path: Path):
    (tmp_path / "in").mkdir()
    text = tmp_path / "in" / "a.txt"
    text.write_text("one")
    cfg = DataConfig(train=str(text), cache_dir=str(tmp_path / "cache"))
    first = make_dataset(cfg, TOKENIZER)
    text.write_text("two")
    assert make_dataset(cfg, TOKENIZER).fingerprint != first.fingerprint


def test_prepared_folders_and_raw_text_give_the_same_batches(corpus: Path, cache: Path, tmp_path: Path):
    prepare(str(corpus / "*.txt"), tmp_path / "out", "byte", shard_tokens=500, workers=1)
    raw = DataConfig(train=str(corpus / "*.txt"))
    for glob in (tmp_path / "out", tmp_path / "o*", tmp_path / "*" / "index.json"):
        cfg = dataclasses.replace(raw, train=str(glob))
        for step in (0, 5):
            assert_equal(Loader(dataset(cfg, cache), cfg)(step), Loader(dataset(raw, cache), raw)(step))


def test_sources_that_cannot_be_used(corpus: Path, cache: Path, tmp_path: Path):
    def refused(
        message: str, tokenizer=TOKENIZER, cache_dir: Path | str = cache, split="train", **fields
    ) -> None:
        with pytest.raises(UserError, match=message):
            make_dataset(DataConfig(**fields), tokenizer, cache_dir=cache_dir, split=split)

    refused("data.train names no files")
    refused("data.eval names no files", split="eval")
    refused("no file matches", train=str(corpus / "*.jsonl"))
    refused("split='test' is not one of", split="test")
    refused("set data.cache_dir", train=str(corpus / "*.txt"), cache_dir="")
    prepare(str(corpus / "*.txt"), tmp_path / "out", "byte", workers=1)
    other = train_sentencepiece([(corpus / "1.txt").read_text()], tmp_path / "bpe.model", 300)
    refused(
        "out was prepared with tokenizer 'byte'.* but data.tokenizer is", other, train=str(tmp_path / "out")
    )
    refused("matches prepared shards .* and other files", train=str(tmp_path / "*"))
    next((tmp_path / "out").glob("*.bin")).write_bytes(b"x")
    refused("shard-00000-of-00001.bin is corrupt", train=str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"packing": "concatenate"}, r"data.packing='concatenate' is not one of"),
        ({"seq_len": 0}, "data.seq_len=0 must be a whole number >= 1"),
        ({"batch_size": 2.5}, "data.batch_size=2.5"),
        ({"prefetch": 0}, "data.prefetch=0"),
        ({"eval_tokens": -1}, "data.eval_tokens=-1"),
    ],
)
def test_bad_settings(fields: dict, message: str):
    with pytest.raises(UserError, match=message):
        DataConfig(**fields)


def test_rows_apart_from_each_other_and_rows_outside_the_batch(mixed: DataConfig, cache: Path):
    data = dataset(mixed, cache)
    whole, some = Loader(data, mixed)(3), Loader(data, mixed, rows=[0, 1, 4, 5])(3)
    assert_equal(some, {name: x[[0, 1, 4, 5]] for name, x in whole.items()})
    with pytest.raises(UserError, match=r"rows=\[7, 8\] are not rows of a batch of 8"):
        Loader(data, mixed, rows=[7, 8])


def test_describe(mixed: DataConfig, cache: Path):
    data = dataset(mixed, cache)
    rows = data.describe()
    assert [r["share"] for r in rows] == pytest.approx([3 / 4.5, 1 / 4.5, 0.5 / 4.5], abs=1e-5)
    assert sum(r["tokens"] for r in rows) == data.num_tokens
    assert sum(r["bytes"] for r in rows) == data.num_bytes
    assert data.nbytes == 0  # concat needs no plan
    assert dataset(dataclasses.replace(mixed, packing="pad"), cache).nbytes > 0


# The eval set.


@pytest.mark.parametrize("packing", PACKINGS)
def test_eval_holds_every_token_once_at_every_batch_size(mixed: DataConfig, cache: Path, packing: str):
    cfg = dataclasses.replace(mixed, packing=packing)
    texts = [d.text for d in iter_all(cfg.eval)]
    expected = collections.Counter(b"".join(t.encode() + b"\0" for t in texts))
    real_rows = []
    for size in (1, 5, 8, 1000):
        batches = eval_batches(cfg, TOKENIZER, size, cache_dir=cache)
        got = list(batches)
        assert len(got) == len(batches)
        assert {b["tokens"].shape for b in got} == {(size, 32)}
        rows = joined(got)
        assert collections.Counter(rows["targets"][rows["weights"] == 1].tolist()) == expected
        assert rows["weights"].sum() == batches.num_tokens
        assert batches.num_bytes == sum(len(t.encode()) for t in texts)
        assert batches.num_bytes == TOKENIZER.token_bytes[rows["targets"]][rows["weights"] == 1].sum()
        real_rows.append({n: a[: batches.dataset.num_rows] for n, a in rows.items()})
        assert not rows["weights"][batches.dataset.num_rows :].any()
    for other in real_rows[1:]:
        assert_equal(other, real_rows[0])


def test_eval_repeats_and_defaults_to_the_batch_size(mixed: DataConfig, cache: Path):
    batches = eval_batches(mixed, TOKENIZER, cache_dir=cache)
    assert batches.batch_size == mixed.batch_size
    assert_equal(joined(list(batches)), joined(list(batches)))


def test_eval_over_hosts(mixed: DataConfig, cache: Path):
    alone = list(eval_batches(mixed, TOKENIZER, 8, cache_dir=cache))
    hosts = [
        list(eval_batches(mixed, TOKENIZER, 8, cache_dir=cache, rows=[2 * i, 2 * i + 1])) for i in range(4)
    ]
    for step, batch in enumerate(alone):
        assert_equal(joined([h[step] for h in hosts]), batch)


@pytest.mark.parametrize("packing", PACKINGS)
def test_eval_limit(mixed: DataConfig, cache: Path, packing: str):
    cfg = dataclasses.replace(mixed, packing=packing, eval_tokens=777)
    batches = eval_batches(cfg, TOKENIZER, 4, cache_dir=cache)
    rows = joined(list(batches))
    real = rows["weights"] == 1
    assert real.sum() == batches.num_tokens == 777
    assert TOKENIZER.token_bytes[rows["targets"]][real].sum() == batches.num_bytes
    whole = eval_batches(dataclasses.replace(cfg, eval_tokens=10**9), TOKENIZER, 4, cache_dir=cache)
    assert whole.num_tokens == dataset(mixed, cache, "eval").num_tokens
    assert whole.num_bytes == dataset(mixed, cache, "eval").num_bytes


@pytest.mark.parametrize("packing", PACKINGS)
def test_eval_does_not_depend_on_the_seed(mixed: DataConfig, cache: Path, packing: str):
    cfgs = [dataclasses.replace(mixed, packing=packing, seed=seed) for seed in (1, 2)]
    a, b = (eval_batches(cfg, TOKENIZER, 4, cache_dir=cache) for cfg in cfgs)
    assert a.fingerprint == b.fingerprint
    assert_equal(joined(list(a)), joined(list(b)))
    assert isinstance(a, EvalBatches)


# Prefetching.


def threads() -> int:
    return sum(t.name == "prefetch" for t in threading.enumerate())


@pytest.mark.parametrize("size", [1, 2, 7])
def test_prefetch_equals_the_loader_from_any_step(mixed: DataConfig, cache: Path, size: int):
    loader = Loader(dataset(mixed, cache), mixed)
    with prefetch(loader, start_step=11, size=size) as batches:
        for step in range(11, 20):
            assert_equal(next(batches), loader(step))
    assert threads() == 0


def test_prefetch_is_bounded_and_closes_while_waiting():
    made = []
    batches = prefetch(lambda step: made.append(step) or step, 0, size=3)
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]  # three ready and one in hand
    assert next(batches) == 0
    batches.close()
    batches.close()
    assert threads() == 0
    with pytest.raises(StopIteration):
        next(batches)


def test_prefetch_passes_errors_on_after_the_batches_before_them():
    def loader(step: int) -> int:
        if step == 2:
            raise OSError("disk is gone")
        return step

    with prefetch(loader, 0, size=4) as batches:
        assert [next(batches), next(batches)] == [0, 1]
        for _ in range(2):  # and again, if asked again
            with pytest.raises(OSError, match="disk is gone"):
                next(batches)
    assert threads() == 0


def test_prefetch_closes_when_the_consumer_fails():
    def consume() -> None:
        with prefetch(lambda step: step, 0, size=2) as batches:
            raise KeyError(next(batches))

    with pytest.raises(KeyError, match="0"):
        consume()
    assert threads() == 0


def test_prefetch_places_in_its_thread_and_counts_the_wait():
    names = []

    def place(batch: int) -> int:
        names.append(threading.current_thread().name)
        time.sleep(0.05)
        return -batch

    with prefetch(lambda step: step, 5, size=1, place=place) as batches:
        assert [next(batches) for _ in range(3)] == [-5, -6, -7]
        assert 0.05 < batches.seconds_waited < 10
    assert set(names) == {"prefetch"}


def test_prefetch_size():
    with pytest.raises(UserError, match="prefetch size=0"):
        prefetch(lambda step: step, 0, size=0)
