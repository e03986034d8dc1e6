"""What stands on hidden states, layers that share parameters, and attention to distances."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.model import heads, transformer
from jaxlm.model.attention import AttentionConfig
from jaxlm.model.axes import AXES
from jaxlm.model.config import EncoderConfig, ReadoutConfig, TransformerConfig
from jaxlm.model.convolution import ConvolutionConfig, convolved
from jaxlm.model.disentangled import DisentangledConfig, disentangled_scores
from jaxlm.model.positions import PositionConfig
from jaxlm.sharding import MeshConfig, make_layout, tree_shardings, use
from jaxlm.tree import named_leaves

BASE = TransformerConfig(
    vocab_size=31,
    num_layers=4,
    model_dim=24,
    mlp_dim=40,
    causal=False,
    attention=AttentionConfig(num_heads=3, backend="reference"),
    position=PositionConfig(kind="none"),
)
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 31)
SEGMENTS = jnp.array([[1] * 9, [0, 0] + [1] * 5 + [0] * 2])


@partial(jax.jit, static_argnums=0)
def hidden(cfg, params):
    return transformer.apply(cfg, params, TOKENS, segments_BT=SEGMENTS)[0]


@pytest.mark.parametrize(
    ("of", "column"), [("first", (0, 2)), ("last", (8, 6)), ("mean", None), ("each", None)]
)
def test_classes_are_read_from_the_tokens_they_are_said_to_be(of, column):
    cfg = dataclasses.replace(BASE, num_layers=1, readout=ReadoutConfig(5, of, "tanh"))
    params = transformer.init(cfg, jax.random.key(0))
    params["classifier"]["b"] = jnp.arange(5.0)
    x_BTD = hidden(cfg, params)
    got = heads.class_logits(cfg, params, x_BTD, SEGMENTS)
    if of == "each":
        rows = x_BTD
    elif of == "mean":
        rows = jnp.stack([x_BTD[0].mean(0), x_BTD[1, 2:7].mean(0)])
    else:
        rows = jnp.stack([x_BTD[0, column[0]], x_BTD[1, column[1]]])
    dense, last = params["pooler"], params["classifier"]
    want = jnp.tanh(rows @ dense["w"] + dense["b"]) @ last["w"] + last["b"]
    assert got.shape == ((2, 9, 5) if of == "each" else (2, 5))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_model_without_classes_says_so():
    with pytest.raises(UserError, match=r"readout\.classes=0"):
        heads.class_logits(BASE, {}, jnp.zeros((1, 1, 24)))


@pytest.mark.slow
def test_shared_layers_are_copies_whose_gradients_add_up():
    cfg = dataclasses.replace(BASE, shared_layers=2, embed_dim=16, remat="full", init_std=0.3)
    apart = dataclasses.replace(cfg, shared_layers=1, scan=False, remat="none")
    params = transformer.init(cfg, jax.random.key(0))
    copies = {**params, "blocks": jax.tree.map(lambda a: jnp.repeat(a, 2, axis=0), params["blocks"])}
    assert jax.tree.leaves(params["blocks"])[0].shape[0] == 2

    @partial(jax.jit, static_argnums=0)
    @partial(jax.value_and_grad, argnums=1)
    def loss(cfg, params):
        return jnp.sum(jnp.sin(transformer.unembed(cfg, params, hidden(cfg, params))))

    def run(cfg, params, *, scanned):
        fn = loss.trace(cfg, params)
        assert ("length=2" in str(fn.jaxpr)) == scanned
        assert ("remat" in str(fn.jaxpr)) == (cfg.remat != "none")
        return fn.lower().compile()(params)

    one, grads = run(cfg, params, scanned=True)
    two, apart_grads = run(apart, copies, scanned=False)
    loop, _ = run(dataclasses.replace(cfg, scan=False, remat="none"), params, scanned=False)
    np.testing.assert_allclose([one, loop], [two, two], rtol=1e-5)
    summed = lambda a: a.reshape(2, 2, *a.shape[1:]).sum(1)  # noqa: E731
    want = {**apart_grads, "blocks": jax.tree.map(summed, apart_grads["blocks"])}
    for (name, a), (_, b) in zip(named_leaves(grads), named_leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()), err_msg=name)
    with pytest.raises(UserError, match="shared_layers=3"):
        dataclasses.replace(cfg, shared_layers=3)


def test_shared_layers_decode_as_they_apply():
    cfg = dataclasses.replace(BASE, shared_layers=4, causal=True)
    params = transformer.init(cfg, jax.random.key(0))
    whole, _, _ = transformer.apply(cfg, params, TOKENS)
    cache, columns = transformer.init_cache(cfg, 2, 9), []

    @jax.jit
    def step(tokens_B1, t, cache):
        positions_B1 = jnp.full((2, 1), t)
        return transformer.apply(cfg, params, tokens_B1, positions_BT=positions_B1, cache=cache)[:2]

    for t in range(9):
        x, cache = step(TOKENS[:, t : t + 1], t, cache)
        columns.append(x)
    np.testing.assert_allclose(jnp.concatenate(columns, 1), whole, atol=1e-5)


def test_scores_of_distances_are_sums_over_a_loop():
    cfg = DisentangledConfig(span=12, buckets=6)
    key = jax.random.key(0)
    q, k = (jax.random.normal(jax.random.fold_in(key, i), (1, 30, 2, 4)) for i in range(2))
    tables = {
        name: jax.random.normal(jax.random.fold_in(key, i), (cfg.rows, 2, 4))
        for i, name in enumerate(cfg.terms, 2)
    }
    columns = jnp.arange(30)
    row = cfg.row(columns[:, None] - columns[None])[None]
    got = disentangled_scores(q, k, tables, row, dtype="float32", accum="float32")
    for t, s in ((0, 0), (3, 29), (29, 0), (17, 13)):
        r = int(cfg.row(jnp.asarray(t - s)))
        want = (q[0, t] * tables["c2p"][r] + k[0, s] * tables["p2c"][r]).sum(-1)
        np.testing.assert_allclose(got[0, :, t, s], want, atol=1e-5)
    assert (int(row.min()), int(row.max())) == (0, cfg.rows - 1)


def test_attention_to_distances_sees_the_order_of_tokens():
    cfg = dataclasses.replace(BASE, num_layers=1, disentangled=DisentangledConfig(span=8, shared=False))
    params = transformer.init(cfg, jax.random.key(0))
    params = jax.tree.map(lambda p: p * 5, params)
    order = jnp.arange(8, -1, -1)
    apply = jax.jit(lambda c, tokens: transformer.apply(c, params, tokens)[0], static_argnums=0)
    for c, knows in ((cfg, True), (dataclasses.replace(cfg, disentangled=DisentangledConfig()), False)):
        there, back = apply(c, TOKENS), apply(c, TOKENS[:, order])
        assert (float(jnp.abs(there - back[:, order]).max()) > 1e-3) == knows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": PositionConfig()}, r"position\.kind='rope' with model\.disentangled\.span=8: .*'none'"),
        ({"position": PositionConfig(kind="alibi")}, r"position\.kind='alibi' with"),
        ({"position": PositionConfig(kind="t5")}, r"position\.kind='t5' with"),
        (
            {"causal": True, "encoder": EncoderConfig(num_layers=2)},
            r"disentangled\.span=8 with model\.encoder",
        ),
    ],
)
def test_what_attention_to_distances_does_not_go_with_is_refused(changes, message):
    model = dataclasses.replace(BASE, disentangled=DisentangledConfig(span=8))
    with pytest.raises(UserError, match=message):
        dataclasses.replace(model, **changes)
    for kind in ("learned", "sinusoidal"):
        dataclasses.replace(model, position=PositionConfig(kind=kind, max_length=16))


def test_a_convolution_joins_the_first_layer_and_keeps_to_its_document():
    cfg = ConvolutionConfig(3)
    key = jax.random.key(0)
    x_BTD = jax.random.normal(key, (1, 6, 4))
    params = {"w": jax.random.normal(jax.random.fold_in(key, 1), (3, 4, 4)), "b": jnp.arange(4.0)}
    segments_BT = jnp.array([[1, 1, 1, 2, 2, 0]])
    got = convolved(cfg, params, x_BTD, segments_BT, dtype="float32", accum="float32")
    for t, seen in ((0, (0, 1)), (2, (1, 2)), (3, (3, 4))):
        want = sum(x_BTD[0, s] @ params["w"][s - t + 1] for s in seen) + params["b"]
        np.testing.assert_allclose(got[0, t], jnp.tanh(want), atol=1e-5)
    model = dataclasses.replace(BASE, num_layers=2, norm_position="post", convolution=cfg)
    params = transformer.init(model, jax.random.key(0))
    assert params["convolution"]["w"].shape == (3, 24, 24)
    without = hidden(dataclasses.replace(model, convolution=ConvolutionConfig()), params)
    assert float(jnp.abs(hidden(model, params) - without).max()) > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"causal": True},
            r"convolution\.width=3 with model\.causal=True: a convolution sees the tokens after its own",
        ),
        ({"encoder": EncoderConfig(num_layers=2), "causal": True}, r"convolution\.width=3 with"),
    ],
)
def test_a_causal_model_has_no_convolution(changes, message):
    model = dataclasses.replace(BASE, convolution=ConvolutionConfig(3))
    with pytest.raises(UserError, match=message):
        dataclasses.replace(model, **changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(buckets=4), r"buckets=4 without attention to distances: set model\.disentangled\.span"),
        (dict(terms=("c2p",)), r"terms=\('c2p',\) without"),
        (dict(shared=False), "shared=False without"),
        (dict(norm=True), "norm=True without"),
        (dict(span=8, terms=()), r"terms=\(\) must name one term or both"),
        (dict(span=8, terms=("p2c", "p2c")), "each once"),
        (dict(span=8, buckets=9), r"buckets=9 must lie between 2 and model\.disentangled\.span=8"),
        (dict(span=8, buckets=1), "buckets=1 must lie between 2"),
    ],
)
def test_fields_of_disentangled_attention_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        DisentangledConfig(**fields)


def test_an_activation_without_a_convolution_is_refused():
    with pytest.raises(UserError, match=r"activation='gelu' without a convolution"):
        ConvolutionConfig(activation="gelu")


@pytest.mark.parametrize("width", [-3, -2, 4])
def test_a_convolution_has_a_middle(width):
    with pytest.raises(
        UserError, match=rf"convolution\.width={width} must be odd, such as {max(width, 0) + 1},"
    ):
        ConvolutionConfig(width)


def test_classes_and_a_convolution_on_a_mesh_are_those_of_one_device():
    cfg = dataclasses.replace(
        BASE,
        vocab_size=32,
        num_layers=2,
        model_dim=16,
        attention=AttentionConfig(num_heads=2, backend="reference"),
        readout=ReadoutConfig(classes=3, dense="tanh"),
        convolution=ConvolutionConfig(width=3),
    )
    params = transformer.init(cfg, jax.random.key(0))
    tokens_BT = jax.random.randint(jax.random.key(1), (4, 8), 1, 31)

    def logits(params):
        hidden_BTD, _, _ = transformer.apply(cfg, params, tokens_BT)
        return heads.class_logits(cfg, params, hidden_BTD)

    want = jax.jit(logits)(params)
    layout = make_layout(MeshConfig(data=1, fsdp=4, tensor=2))
    with use(layout):
        placed = jax.device_put(params, tree_shardings(layout, params, AXES))
        assert len(placed["classifier"]["w"].sharding.device_set) == 8
        assert placed["pooler"]["w"].addressable_shards[0].data.size < placed["pooler"]["w"].size
        np.testing.assert_allclose(jax.jit(logits)(placed), want, rtol=1e-4, atol=1e-5)
