"""8-bit products against a quantiser written in numpy, with their gradients, and training with them."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlm.config import build, load_experiment
from jaxlm.errors import UserError
from jaxlm.model import transformer as tf
from jaxlm.model.attention import AttentionConfig
from jaxlm.model.moe import MoEConfig
from jaxlm.objectives.lm import LossConfig, make_lm_objective
from jaxlm.optim import OptimConfig, make_optimizer, make_schedule
from jaxlm.quant import FORMATS, LEAVES, Quantized, mark, quantize
from jaxlm.train.metrics import read_rows
from jaxlm.train.programs import Model
from jaxlm.train.run import train
from jaxlm.train.state import create_state
from jaxlm.train.step import make_step
from jaxlm.tree import named_leaves
from jaxlm.weights import matmul

TOP = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def near(x, axis, dtype):
    """What the quantiser takes `x` for, with one scale along `axis`."""
    top = np.abs(x).max(axis, keepdims=True)
    scale = (np.where(top > 0, top, 1.0) / TOP[dtype]).astype(np.float32)
    y = x / scale
    y = np.rint(y) if dtype == "int8" else y.astype(getattr(ml_dtypes, dtype)).astype(np.float32)
    return np.clip(y, -TOP[dtype], TOP[dtype]) * scale


def operands(seed=0):
    """An activation with a dominant row and a row of zeros, a weight with a dominant column, a gradient."""
    rng = np.random.default_rng(seed)
    x, w, g = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 6, 8), (8, 3, 4), (2, 6, 3, 4)))
    x[0, 0] *= 100
    x[1, 2] = 0
    w[:, 1, 2] *= 50
    return x, w, g


@pytest.mark.parametrize("name", FORMATS)
def test_products_and_gradients_equal_the_quantiser_in_numpy(name):
    """Per-row and per-column scales; gradients pass through the rounding."""
    x, w, g = operands()
    eqn, kind, gradient = "BTD,DNH->BTNH", FORMATS[name].forward, FORMATS[name].gradient
    product = lambda x, w: matmul(eqn, x, Quantized(w, name))  # noqa: E731
    y, back = jax.vjp(product, x, w)
    near_x, near_w = near(x, 2, kind), near(w, 0, kind)
    want = np.einsum(eqn, near_x, near_w)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    assert 1e-4 < np.abs(y - np.einsum(eqn, x, w)).max() / np.abs(want).max() < 0.1  # it did round
    dx, dw = back(g)
    if gradient:
        want_x = np.einsum("BTNH,DNH->BTD", near(g, (2, 3), gradient), near(w, (1, 2), kind))
        want_w = np.einsum("BTD,BTNH->DNH", near(x, (0, 1), kind), near(g, (0, 1), gradient))
    else:
        want_x, want_w = np.einsum("BTNH,DNH->BTD", g, near_w), np.einsum("BTD,BTNH->DNH", near_x, g)
    for got, expected in ((dx, want_x), (dw, want_w)):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_the_largest_number_is_kept_and_rounding_is_to_nearest():
    x, *_ = operands()
    for dtype in TOP:
        q, scale = quantize(x, (2,), dtype)
        assert q.dtype == jnp.dtype(dtype)
        assert float(jnp.abs(q.astype(jnp.float32)).max()) == TOP[dtype]
        np.testing.assert_array_equal(q[1, 2], 0)
        error = np.abs(np.asarray(q, np.float32) * np.asarray(scale) - x)
        step = 0.5 if dtype == "int8" else TOP[dtype] / (16 if "e4m3" in dtype else 8)
        assert (error <= step * np.asarray(scale) * 1.0001).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(name, bad):
    """In values and gradients, of an activation as of an incoming gradient: a guard must see it."""
    x, w, g = operands()
    product = lambda x: matmul("BTD,DNH->BTNH", x, Quantized(w, name))  # noqa: E731
    y, back = jax.vjp(product, x)
    assert np.isfinite(y).all()
    x[1, 4, 3] = g[0, 2, 1, 1] = bad
    assert not np.isfinite(product(x)[1, 4]).any()
    assert np.isfinite(product(x)[1, 5]).all()
    assert not np.isfinite(back(g)[0][0, 2]).all()


def test_the_products_reach_the_compiler_in_eight_bits():
    x, w, g = operands()
    loss = lambda x, w: jnp.sum(matmul("BTD,DNH->BTNH", x, Quantized(w, "int8_full")) * g)  # noqa: E731
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, w).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 2  # the value of a sum is not needed for its gradient
    assert all("xi8>" in line and "xi32>" in line for line in dots), dots


CFG = tf.TransformerConfig(
    vocab_size=32,
    num_layers=2,
    model_dim=32,
    mlp_dim=64,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
)


def test_layers_are_marked_and_tables_and_norms_are_not():
    params = mark(tf.abstract_params(CFG), "int8")
    is_mark = lambda x: isinstance(x, Quantized)  # noqa: E731
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_mark)
        if is_mark(leaf)
    ]
    assert {"/".join(name.split("/")[-2:]) for name in names} == {n for n in LEAVES if "cross" not in n}
    assert mark(params, "none") is params
    # The parameters themselves, their names and their gradients stay what they were.
    plain, quantised = (tf.abstract_params(dataclasses.replace(CFG, quant=q)) for q in ("none", "fp8"))
    assert [name for name, _ in named_leaves(plain)] == [name for name, _ in named_leaves(quantised)]


def losses(cfg, steps=60):
    """Training losses on a language in which the next token is a function of the last two, with noise."""
    rng = np.random.default_rng(0)
    table = rng.integers(0, 32, (32, 32))
    objective = make_lm_objective(Model(cfg), LossConfig(), None)
    optim = OptimConfig(lr=1e-2, warmup=5.0, warmup_unit="steps")
    optimizer = make_optimizer(optim, make_schedule(optim, steps))
    state, _ = create_state(partial(tf.init, cfg), optimizer, 0)
    step, out = make_step(objective, optimizer), []
    for _ in range(steps):
        tokens = rng.integers(0, 32, (16, 33)).astype(np.int32)
        for t in range(2, 33):
            follows = rng.random(16) < 0.9
            tokens[:, t] = np.where(follows, table[tokens[:, t - 1] % 4, tokens[:, t - 2] % 4], tokens[:, t])
        shape = (16, 32)
        batch = dict(
            tokens=tokens[:, :-1],
            targets=tokens[:, 1:],
            weights=np.ones(shape, np.float32),
            segments=np.ones(shape, np.int32),
            positions=np.tile(np.arange(32, dtype=np.int32), (16, 1)),
        )
        state, metrics = step(state, None, batch)
        out.append(float(metrics["total"][0] / metrics["total"][1]))
    return np.array(out)


@pytest.fixture(scope="module")
def exact():
    return losses(CFG)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_training_in_eight_bits_keeps_up_with_fp32(name, exact):
    """The last ten losses lie within 0.02 nats of fp32's, which has learned by then; and differ from them."""
    got = losses(dataclasses.replace(CFG, quant=name))
    assert exact[-10:].mean() < exact[0] - 0.8
    gap = got[-10:].mean() - exact[-10:].mean()
    print(f"{name}: {exact[0]:.3f} to {exact[-10:].mean():.4f} in fp32, gap {gap:+.4f}")
    assert abs(gap) < 0.02
    assert (got != exact).all()


@pytest.mark.slow
def test_the_quickstart_in_eight_bits_keeps_up_with_fp32(tmp_path):
    """The quickstart's small model, 60 updates on Python's source: held-out loss within 0.5% of fp32's."""
    cfg = build(load_experiment("experiments/quickstart.py:smoke"))
    often = dict(num_steps=60, eval_every=60, save_every=0, sample_every=0, sample_prompts=(), log_every=60)
    one = dataclasses.replace(cfg.mesh, data=1)  # emulated devices would wait for each other
    data = dataclasses.replace(cfg.data, eval_tokens=8192)
    cfg = dataclasses.replace(cfg, mesh=one, data=data, train=dataclasses.replace(cfg.train, **often))

    def held_out(name):
        model = dataclasses.replace(cfg.model, quant=name)
        train(dataclasses.replace(cfg, model=model), tmp_path / name, bar=False)
        rows = [row for row in read_rows(tmp_path / name / "metrics.jsonl") if "eval/nll" in row]
        return rows[-1]["eval/nll"]

    want = held_out("none")
    assert want < np.log(256) - 1.5  # it has learned
    for name in FORMATS:
        got = held_out(name)
        print(f"{name}: {want:.4f} in fp32, {got:.4f}, {got / want - 1:+.2%}")
        assert got != want
        assert got == pytest.approx(want, rel=0.005)


def test_experts_are_refused():
    moe = MoEConfig(num_experts=4, expert_dim=16)
    with pytest.raises(UserError, match=r"model\.quant='int8': the products of experts are not quantised"):
        dataclasses.replace(CFG, quant="int8", mlp_pattern=("dense", "moe"), moe=moe)
    with pytest.raises(
        UserError, match=r"model.quant='int4' is not one of 'none', 'int8', 'int8_full', 'fp8'"
    ):
        dataclasses.replace(CFG, quant="int4")
