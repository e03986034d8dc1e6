"""Evaluation: exactly once per token, whatever the batch size and the mesh."""

import math

import jax
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.data.loader import DataConfig, eval_batches
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.errors import UserError
from jaxlm.evaluate import evaluate, make_eval_step
from jaxlm.model import transformer
from jaxlm.model.transformer import TransformerConfig
from jaxlm.objectives.lm import LossConfig
from jaxlm.tree import map_named

CFG = TransformerConfig(vocab_size=256, num_layers=2, model_dim=16, mlp_dim=24)
T = 24


class Model:
    """The transformer as the objectives see it."""

    @staticmethod
    def apply(params, batch, key):
        assert key is None  # no dropout
        hidden_BTD, _, aux = transformer.apply(
            CFG, params, batch["tokens"], segments_BT=batch["segments"], positions_BT=batch["positions"]
        )
        return hidden_BTD, aux

    @staticmethod
    def unembed(params, hidden_BTD):
        return transformer.unembed(CFG, params, hidden_BTD)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return map_named(
        lambda name, like: rng.normal(0, 0.3, like.shape).astype(np.float32), transformer.abstract_params(CFG)
    )


DOCUMENTS = [
    "a short one",
    "é",
    "another line of text that runs over two rows at least, says the test",
    "x" * 50,
]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    for i, text in enumerate(DOCUMENTS * 5):
        (folder / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    tokenizer = load_tokenizer("byte")
    cfg = DataConfig(eval=str(folder / "*.txt"), train=str(folder / "*.txt"), seq_len=T, packing="first_fit")
    return lambda rows: eval_batches(cfg, tokenizer, rows, cache_dir=folder / "cache"), tokenizer


@pytest.fixture(scope="module")
def oracle(params, held_out):
    """(nll, row, position in its document) of every token, by log-softmax of all logits in float64."""
    (batch,) = list(held_out[0](64))
    logits_BTV = np.asarray(Model.unembed(params, Model.apply(params, batch, None)[0]), np.float64)
    lse_BT = np.log(np.exp(logits_BTV).sum(-1))
    nll_BT = lse_BT - np.take_along_axis(logits_BTV, batch["targets"][..., None], -1)[..., 0]
    real = batch["weights"] > 0
    return nll_BT[real], np.nonzero(real)[0], batch["positions"][real]


@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_every_batch_size_gives_the_oracles_result(params, held_out, oracle, rows, chunk):
    make, tokenizer = held_out
    batches = make(rows)
    step = make_eval_step(
        Model, LossConfig(chunk=chunk, z_loss=0.1, label_smoothing=0.2), tokenizer.token_bytes
    )
    result = evaluate(step, params, batches, num_tokens=batches.num_tokens)
    size = sum(len(text.encode()) for text in DOCUMENTS) * 5
    nll_N, row_N, _ = oracle
    assert (
        (result.tokens, result.bytes) == (size + 5 * len(DOCUMENTS), size) == (len(nll_N), batches.num_bytes)
    )
    assert result.nll == pytest.approx(nll_N.mean(), rel=1e-6)
    assert result.perplexity == pytest.approx(np.exp(nll_N.mean()), rel=1e-5)
    assert result.bpb == pytest.approx(nll_N.sum() / math.log(2) / size, rel=1e-6)
    # The jackknife over rows agrees with the linearised error of a ratio up to terms of order 1/n.
    n = row_N.max() + 1
    assert result.rows == n
    left_out = np.array([nll_N[row_N != r].mean() for r in range(n)])
    jackknife = math.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
    assert result.standard_error == pytest.approx(jackknife, rel=0.1)


def test_batch_sizes_agree_to_a_part_in_a_million(params, held_out):
    make, tokenizer = held_out
    step = make_eval_step(Model, LossConfig(), tokenizer.token_bytes)
    one, *others = [evaluate(step, params, make(rows)) for rows in (1, 3, 8, 64)]
    for other in others:
        for field in ("nll", "bpb", "perplexity"):
            assert getattr(other, field) == pytest.approx(getattr(one, field), rel=1e-6)
        assert other.standard_error == pytest.approx(one.standard_error, rel=1e-5)  # made of differences
        for field in ("tokens", "bytes", "rows", "accuracy"):
            assert getattr(other, field) == getattr(one, field)


@pytest.mark.parametrize("mesh", [dict(data=8), dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_the_mesh_does_not_show(params, held_out, mesh):
    make, tokenizer = held_out
    expected = evaluate(make_eval_step(Model, LossConfig(), tokenizer.token_bytes), params, make(8))
    layout = sharding.Layout(sharding.make_mesh(sharding.MeshConfig(**mesh)))
    placed = jax.device_put(params, sharding.tree_shardings(layout, params, transformer.AXES))
    rows = layout.sharding(("batch", "length"))
    with sharding.use(layout):
        step = make_eval_step(Model, LossConfig(), tokenizer.token_bytes)
        place = lambda batch: jax.device_put(batch, rows)  # noqa: E731
        result = evaluate(step, placed, make(8), place=place)
        sums = step(placed, place(next(iter(make(8)))))
    assert len(sums.nll_B.sharding.device_set) == 8
    assert sums.nll_B.is_fully_replicated
    assert result.tokens == expected.tokens
    assert result.accuracy == expected.accuracy
    assert result.nll == pytest.approx(expected.nll, rel=1e-6)
    assert result.standard_error == pytest.approx(expected.standard_error, rel=1e-5)


def test_loss_by_position(params, held_out, oracle):
    make, _ = held_out
    step = make_eval_step(Model, LossConfig(per_position=True))
    result = evaluate(step, params, make(3))
    nll_N, _, position_N = oracle
    expected_T = np.array(
        [nll_N[position_N == t].mean() if (position_N == t).any() else np.nan for t in range(T)]
    )
    np.testing.assert_allclose(result.nll_by_position, expected_T, rtol=1e-6)
    assert math.isnan(result.bpb)  # no bytes were given
    assert "eval/nll_by_position" not in result.metrics()


def test_weights_weigh_and_padding_cannot_poison(params, held_out):
    """Fractional weights count as such; NaN hidden states in columns of weight 0 do no harm."""
    make, _ = held_out
    (batch,) = list(make(64))
    step = make_eval_step(Model, LossConfig())
    plain = evaluate(step, params, [batch])
    half = batch | {"weights": batch["weights"] * 0.5}
    assert evaluate(step, params, [half]).nll == pytest.approx(plain.nll, rel=1e-6)
    twice = evaluate(step, params, [batch, half])
    assert twice.nll == pytest.approx(plain.nll, rel=1e-6)
    assert twice.tokens == round(1.5 * plain.tokens)

    class Poisoned(Model):
        @staticmethod
        def apply(params, batch, key):
            hidden_BTD, aux = Model.apply(params, batch, key)
            return jax.numpy.where(batch["weights"][..., None] > 0, hidden_BTD, jax.numpy.nan), aux

    poisoned = evaluate(make_eval_step(Poisoned, LossConfig()), params, [batch])
    assert (poisoned.nll, poisoned.tokens, poisoned.accuracy) == (plain.nll, plain.tokens, plain.accuracy)


def test_bytes_of_the_set_come_first(params, held_out):
    make, tokenizer = held_out
    step = make_eval_step(Model, LossConfig(), tokenizer.token_bytes)
    result = evaluate(step, params, make(8), num_bytes=1000)
    assert result.bytes == 1000
    assert result.bpb == pytest.approx(result.nll * result.tokens / math.log(2) / 1000)


def test_one_row_has_no_error(params, held_out):
    make, _ = held_out
    result = evaluate(make_eval_step(Model, LossConfig()), params, [next(iter(make(1)))])
    assert result.rows == 1
    assert math.isnan(result.standard_error)


@pytest.mark.parametrize("found", ["none", "padding", "too few"])
def test_missing_tokens_are_refused(params, held_out, found):
    make, _ = held_out
    batches = list(make(8))
    empty = batches[0] | {"weights": np.zeros_like(batches[0]["weights"])}
    given = {"none": [], "padding": [empty], "too few": batches[:1]}[found]
    message = "but the set has 9999" if found == "too few" else "no token"
    with pytest.raises(UserError, match=message):
        evaluate(make_eval_step(Model, LossConfig()), params, given, num_tokens=9999)
