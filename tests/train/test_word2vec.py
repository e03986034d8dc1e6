"""Word2Vec: pairs, noise and gradients against plain loops; vectors that answer what they should."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.model import word2vec
from jaxlm.model.word2vec import Corpus, Vectors, Word2VecConfig, analogies, read_questions
from jaxlm.train.word2vec import train_vectors


def test_counts_and_subsampling():
    corpus = Corpus.of([["a"] * 6 + ["b"] * 3 + ["rare"], ["c", "b", "c", "c"], ["rare"]], min_count=3)
    assert corpus.words == ("a", "b", "c")
    assert corpus.counts.tolist() == [6, 4, 3]
    assert [d.tolist() for d in corpus.documents] == [[0] * 6 + [1] * 3, [2, 1, 2, 2]]
    assert word2vec.keep_probability(corpus.counts, 0).tolist() == [1, 1, 1]
    with pytest.raises(UserError, match="min_count=7 leaves 0 of 4 words"):
        Corpus.of([["a"] * 6 + ["b"] * 3 + ["rare"], ["c", "b", "c", "c"]], min_count=7)


def test_pairs_are_those_of_a_loop():
    rng = np.random.default_rng(3)
    ids, documents = rng.integers(0, 9, 40), np.repeat([0, 1, 2], [3, 20, 17])
    got = word2vec.pairs(ids, documents, 4, np.random.default_rng(7))
    reach = np.random.default_rng(7).integers(1, 5, 40)
    expected = [
        [ids[i], ids[j]]
        for i in range(40)
        for j in range(max(0, i - reach[i]), min(40, i + reach[i] + 1))
        if i != j and documents[i] == documents[j]
    ]
    assert sorted(got.tolist()) == sorted(map(list, expected))
    assert len(set(reach)) == 4


def test_batches_are_a_function_of_seed_and_epoch():
    rng = np.random.default_rng(0)
    corpus = Corpus.of([[f"w{i}" for i in rng.zipf(1.5, 4000) if i < 50]], min_count=5)
    cfg = Word2VecConfig(sample=0, window=2, negatives=3)
    first, again, other = (list(word2vec.epoch_batches(cfg, corpus, 512, 0, epoch)) for epoch in (0, 0, 1))
    assert all((a[name] == b[name]).all() for a, b in zip(first, again, strict=True) for name in a)
    assert (first[0]["centers"] != other[0]["centers"]).any()
    real = np.concatenate([b["weights"] for b in first]) > 0
    centers = np.concatenate([b["centers"] for b in first])[real]
    # A window of 1 or 2: three pairs a word, but at the ends.
    assert np.bincount(centers).sum() == pytest.approx(3 * corpus.counts.sum(), rel=0.02)
    noise = np.bincount(np.concatenate([b["negatives"].ravel() for b in first]), minlength=len(corpus.words))
    wanted = corpus.counts**0.75 / (corpus.counts**0.75).sum()
    assert np.abs(noise / noise.sum() - wanted).max() < 0.01
    assert np.abs(corpus.counts / corpus.counts.sum() - wanted).max() > 0.05


def test_gradients_are_those_of_the_paper():

    rng = np.random.default_rng(1)
    V, D, B, K = 7, 5, 6, 3
    params = {name: {"table": rng.normal(size=(V, D)).astype(np.float32)} for name in ("embed", "context")}
    batch = {
        "centers": rng.integers(0, V, B),
        "contexts": rng.integers(0, V, B),
        "negatives": rng.integers(0, V, (B, K)),
        "weights": np.array([1, 1, 1, 1, 1, 0], np.float32),
    }
    batch["negatives"][0, 0] = batch["contexts"][0]  # noise that is no noise
    (loss, (weight, _)), grads = jax.value_and_grad(
        lambda p: (lambda total, weight, metrics: (total, (weight, metrics)))(
            *word2vec.objective(p, batch, None)
        ),
        has_aux=True,
    )(params)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    v, u = (params[name]["table"].astype(np.float64) for name in ("embed", "context"))
    total, dv, du = 0.0, np.zeros((V, D)), np.zeros((V, D))
    for c, o, noise in list(zip(batch["centers"], batch["contexts"], batch["negatives"], strict=True))[:5]:
        total -= np.log(sigmoid(v[c] @ u[o]))
        dv[c] += (sigmoid(v[c] @ u[o]) - 1) * u[o]
        du[o] += (sigmoid(v[c] @ u[o]) - 1) * v[c]
        for k in noise:
            if k != o:
                total -= np.log(sigmoid(-v[c] @ u[k]))
                dv[c] += sigmoid(v[c] @ u[k]) * u[k]
                du[k] += sigmoid(v[c] @ u[k]) * v[c]
    assert weight == 5
    assert loss == pytest.approx(total, rel=1e-5)
    np.testing.assert_allclose(grads["embed"]["table"], dv, atol=1e-5)
    np.testing.assert_allclose(grads["context"]["table"], du, atol=1e-5)


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([["a"], ["b"], ["a"], ["b"]], {}, "no two words beside each other"),
        ([["a", "b"]] * 9, {"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_texts_and_sizes_that_give_no_pairs_are_refused(documents, options, message):
    with pytest.raises(UserError, match=message):
        train_vectors(documents, Word2VecConfig(min_count=1, dim=4), **options)


def test_analogies_are_counted(tmp_path):
    """Vectors that are sums of two parts answer every question; words without one are skipped."""
    rng = np.random.default_rng(0)
    kinds, things = rng.normal(size=(3, 16)), rng.normal(size=(5, 16))
    words = [f"k{i}t{j}" for i in range(3) for j in range(5)]
    vectors = Vectors.of(words, (kinds[:, None] + things[None]).reshape(15, 16))
    lines = [": sums", *(f"k0t{j} k1t{j} K0T{k} K1T{k}" for j in range(5) for k in range(5) if j != k)]
    lines += ["", ": wrong", "k0t0 k1t0 k0t1 k2t3", "k0t0 k1t0 nowhere k1t1"]
    (tmp_path / "questions.txt").write_text("\n".join(lines))
    scores = analogies(vectors, read_questions(tmp_path / "questions.txt"))
    assert scores["sums"].accuracy == 1.0
    assert (scores["wrong"].right, scores["wrong"].asked, scores["wrong"].skipped) == (0, 1, 1)
    assert (scores["total"].right, scores["total"].asked, scores["total"].skipped) == (20, 21, 1)
    vectors.save(tmp_path / "vectors.txt")
    loaded = Vectors.load(tmp_path / "vectors.txt")
    assert loaded.words == vectors.words
    np.testing.assert_allclose(loaded.unit_VD, vectors.unit_VD, atol=1e-5)
    assert loaded.most_similar("k0t0", 2) == [
        (w, pytest.approx(c, abs=1e-5)) for w, c in vectors.most_similar("k0t0", 2)
    ]
    with pytest.raises(UserError, match="no vector for 'nowhere'"):
        vectors.most_similar("nowhere")
    (tmp_path / "questions.txt").write_text(": a\none two three\n")
    with pytest.raises(UserError, match=r"questions\.txt:2: expected four words"):
        read_questions(tmp_path / "questions.txt")
    with pytest.raises(UserError, match="no file of word vectors"):
        Vectors.load(tmp_path / "questions.txt")


def test_words_of_one_kind_become_neighbours():
    """Words of three kinds in sentences `a b c`: what stands in the same places has the same neighbours."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 6, (1500, 3))
    documents = [[f"{kind}{i}" for kind, i in zip("abc", row, strict=True)] for row in drawn]
    cfg = Word2VecConfig(dim=16, window=2, sample=0)
    told = []
    trained = train_vectors(documents, cfg, epochs=12, batch_size=512, tick=told.append)
    assert (trained.vocabulary, trained.tokens, len(told)) == (18, 4500, 12)
    assert trained.losses[-1] < trained.losses[0] - 0.2
    for word in trained.vectors.words:
        nearest = [other for other, _ in trained.vectors.most_similar(word, 4)]
        assert {other[0] for other in nearest} == {word[0]}, (word, nearest)
    again = train_vectors(documents, cfg, epochs=12, batch_size=512)
    np.testing.assert_array_equal(again.vectors.unit_VD, trained.vectors.unit_VD)


def test_the_tool_trains_reads_back_and_answers(tmp_path, capsys):
    path = Path(__file__).parents[2] / "tools" / "word2vec.py"
    spec = importlib.util.spec_from_file_location("tool_word2vec", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    drawn = np.random.default_rng(0).integers(0, 6, (400, 3))
    for n, part in enumerate(np.array_split(drawn, 2)):
        lines = [" ".join(f"{kind}{'xyzuvw'[i]}" for kind, i in zip("abc", row, strict=True)) for row in part]
        (tmp_path / f"{n}.txt").write_text("\n".join(lines))
    out = ["--out", str(tmp_path / "out")]
    small = ["--dim=8", "--window=2", "--sample=0", "--epochs=2", "--batch_size=256"]
    assert tool.main([*out, f"--input={tmp_path}/*.txt", *small, "--words=ax"]) == 0
    assert "18 words, 1,200 occurrences" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "result.json").read_text())["config"]["dim"] == 8
    (tmp_path / "questions").write_text(": kinds\nax bx ay by\nax bx ay king\n: none\na b c d\n")
    assert tool.main([*out, "--words=ax", f"--questions={tmp_path / 'questions'}"]) == 0
    assert "of 1, 1 skipped" in capsys.readouterr().out
    assert tool.main([*out, "--input=nowhere/*.txt"]) == 2
    assert "--input=nowhere/*.txt: no file" in capsys.readouterr().err
