"""The transformer against itself taken another way: by gradient, row, token and layer."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.model import transformer as tf
from jaxlm.model.attention import AttentionConfig, LatentConfig
from jaxlm.model.moe import MoEConfig
from jaxlm.model.positions import PositionConfig
from jaxlm.tree import map_named, named_leaves

V, T = 61, 12

POSITIONS = {
    "rope": PositionConfig(),
    "rope_partial": PositionConfig(fraction=0.5, interleaved=True),
    "rope_yarn": PositionConfig(scaling="yarn", factor=4.0, original_length=8),
    "alibi": PositionConfig(kind="alibi"),
    "learned": PositionConfig(kind="learned", max_length=16),
    "sinusoidal": PositionConfig(kind="sinusoidal"),
    "t5": PositionConfig(kind="t5", num_buckets=8, max_distance=16),
    "none": PositionConfig(kind="none"),
}

SMALL = tf.TransformerConfig(
    vocab_size=V,
    num_layers=2,
    model_dim=32,
    mlp_dim=48,
    init_std=0.0,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
)
MOE = MoEConfig(num_experts=4, top_k=2, expert_dim=16, dispatch="dropless")
VARIANTS = {
    **{f"position_{name}": dataclasses.replace(SMALL, position=p) for name, p in POSITIONS.items()},
    "mixed": dataclasses.replace(
        SMALL,
        num_layers=5,
        attention=AttentionConfig(num_heads=4, num_kv_heads=1, pattern=("local", "global"), window=3),
        position=PositionConfig(local_theta=100.0),
        norm_position="sandwich",
        scale_embeddings=True,
        logit_softcap=20.0,
    ),
    "everything": dataclasses.replace(
        SMALL,
        attention=AttentionConfig(
            num_heads=4,
            head_dim=10,
            softcap=5.0,
            qk_norm=True,
            sinks=True,
            qkv_bias=True,
            out_bias=True,
            scale=0.3,
        ),
        norm="layernorm",
        activation="gelu",
        mlp_bias=True,
        tie_embeddings=True,
    ),
    # GPT-3: every other layer sees a band.
    "banded": dataclasses.replace(
        SMALL,
        num_layers=4,
        norm="layernorm",
        activation="gelu_tanh",
        mlp_bias=True,
        tie_embeddings=True,
        attention=AttentionConfig(
            num_heads=4, qkv_bias=True, out_bias=True, pattern=("global", "local"), window=3
        ),
        position=POSITIONS["learned"],
    ),
    "post": dataclasses.replace(SMALL, norm_position="post", norm="layernorm", activation="relu2"),
    "parallel": dataclasses.replace(SMALL, parallel_block=True, activation="geglu"),
    "moe": dataclasses.replace(SMALL, num_layers=4, mlp_pattern=("dense", "moe"), moe=MOE),
    # A leading layer and two periods.
    "latent": dataclasses.replace(
        SMALL,
        num_layers=3,
        first_dense=1,
        mlp_pattern=("moe",),
        moe=dataclasses.replace(MOE, router="sigmoid", groups=2, group_best=2, bias=True),
        activation="quick_geglu",
        gate_limit=1.0,
        attention=AttentionConfig(
            num_heads=4,
            pattern=("local",),
            window=3,
            sinks=True,
            qkv_bias=True,
            out_bias=True,
            latent=LatentConfig(kv_rank=10, q_rank=12, nope_dim=6, rope_dim=4, value_dim=5),
        ),
        position=PositionConfig(interleaved=True),
    ),
}


# every variant is tested; those that others nearly cover are left to the whole suite
EXTRA = (
    "position_rope_yarn",
    "position_rope_partial",
    "position_sinusoidal",
    "position_none",
    "position_learned",
    "banded",
    "post",
    "parallel",
)


def _some_slow(names):
    return [pytest.param(n, marks=pytest.mark.slow) if n in EXTRA else n for n in names]


def make(cfg, seed=0):
    """Parameters, every leaf off its initial value: a bias at 0 or a scale at 1 could hide a wrong use."""
    rng = np.random.default_rng(seed)

    def draw(name, leaf):
        centre = 1.0 if name.endswith("scale") else 0.0
        fan_in = leaf.shape[1] if "blocks" in name and leaf.ndim > 2 else leaf.shape[0]
        return jnp.asarray(centre + rng.normal(size=leaf.shape) * max(fan_in, 8) ** -0.5, leaf.dtype)

    return map_named(draw, tf.abstract_params(cfg))


def tokens(shape, seed=2):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, shape), jnp.int32)


@partial(jax.jit, static_argnums=0)
def logits(cfg, params, tokens_BT, **inputs):
    hidden, _, _ = tf.apply(cfg, params, tokens_BT, **inputs)
    return tf.unembed(cfg, params, hidden)


@partial(jax.jit, static_argnums=0)
def hidden(cfg, params, tokens_BT, **inputs):
    return tf.apply(cfg, params, tokens_BT, **inputs)[0]


def losses(cfg, params, tokens_BT, targets_BT, **inputs):
    hidden_BTD, _, _ = tf.apply(cfg, params, tokens_BT, **inputs)
    logp = jax.nn.log_softmax(tf.unembed(cfg, params, hidden_BTD))
    return -jnp.take_along_axis(logp, targets_BT[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("name", _some_slow(VARIANTS))
def test_no_position_sees_a_later_one(name):
    cfg = VARIANTS[name]
    params = make(cfg)
    at = 6

    def out(table, position):
        # A table of one row a column makes the gradient by column that of the input embedding.
        swapped = {**params, "embed": {**params["embed"], "table": table}}
        hidden_BTD, _, _ = tf.apply(cfg, swapped, jnp.arange(T)[None])
        return jnp.sum(jnp.sin(jnp.arange(cfg.model_dim)) * hidden_BTD[0, position])

    influence_V = jnp.abs(jax.jit(jax.grad(partial(out, position=at)))(params["embed"]["table"])).sum(-1)
    assert jnp.all(influence_V[at + 1 : T] == 0), influence_V[:T]
    seen_from = at if cfg.attention.window == 0 else at - 2
    assert jnp.all(influence_V[seen_from : at + 1] > 0), influence_V[:T]


@pytest.mark.parametrize("name", _some_slow(VARIANTS))
def test_packed_documents_equal_separate_rows_in_loss_and_gradient(name):
    cfg = VARIANTS[name]
    params = make(cfg)
    tok, tgt = tokens((1, T)), tokens((1, T), seed=3)
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])  # two documents and padding
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]])

    def packed(p):
        return jnp.sum(
            losses(cfg, p, tok, tgt, segments_BT=segments, positions_BT=positions) * (segments != 0)
        )

    # the same documents, each alone in a row of its own
    rows = jnp.stack([jnp.pad(tok[0, :5], (0, 4)), jnp.pad(tok[0, 5:9], (0, 5))])
    row_targets = jnp.stack([jnp.pad(tgt[0, :5], (0, 4)), jnp.pad(tgt[0, 5:9], (0, 5))])
    real = jnp.arange(9) < jnp.array([[5], [4]])

    def separate(p):
        return jnp.sum(losses(cfg, p, rows, row_targets, segments_BT=real.astype(jnp.int32)) * real)

    got, got_grads = jax.jit(jax.value_and_grad(packed))(params)
    want, want_grads = jax.jit(jax.value_and_grad(separate))(params)
    np.testing.assert_allclose(got, want, rtol=2e-6)
    for (leaf, a), (_, b) in zip(named_leaves(got_grads), named_leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * float(jnp.abs(b).max()) + 1e-7, err_msg=leaf)
    # and the mask is what makes it so
    alone = hidden(cfg, params, tok, segments_BT=segments, positions_BT=positions)
    leaky = hidden(cfg, params, tok, segments_BT=jnp.ones_like(segments), positions_BT=positions)
    assert float(jnp.abs(alone - leaky)[0, 5:9].max()) > 1e-3


@pytest.mark.parametrize("name", _some_slow(VARIANTS))
def test_decoding_through_the_cache_equals_the_forward_pass(name):
    cfg = VARIANTS[name]
    params = make(cfg)
    tok = tokens((2, T))
    want = logits(cfg, params, tok)

    @jax.jit
    def step(tok, positions, cache):
        hidden_BTD, cache, _ = tf.apply(cfg, params, tok, positions_BT=positions, cache=cache)
        return tf.unembed(cfg, params, hidden_BTD), cache

    cache = tf.init_cache(cfg, 2, T)
    outs = []
    for start, stop in ((0, 5), (5, 10), (10, 11), (11, 12)):
        positions = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
        out, cache = step(tok[:, start:stop], positions, cache)
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "scan", "remat"),
    [
        ("mixed", False, "none"),
        ("mixed", True, "full"),
        pytest.param("latent", False, "minimal", marks=pytest.mark.slow),
        pytest.param("latent", True, "full", marks=pytest.mark.slow),
        pytest.param("moe", False, "minimal", marks=pytest.mark.slow),
        pytest.param("moe", True, "full", marks=pytest.mark.slow),
        pytest.param("everything", False, "full", marks=pytest.mark.slow),
        pytest.param("everything", True, "minimal", marks=pytest.mark.slow),
    ],
)
def test_scan_and_remat_change_nothing(name, scan, remat):
    tok, tgt = tokens((2, T)), tokens((2, T), seed=3)
    params = make(VARIANTS[name])

    def run(cfg):
        fn = jax.jit(jax.value_and_grad(lambda p: jnp.mean(losses(cfg, p, tok, tgt)))).trace(params)
        return fn.lower().compile()(params), str(fn.jaxpr)

    (want, want_grads), plain = run(VARIANTS[name])
    (got, grads), other = run(dataclasses.replace(VARIANTS[name], scan=scan, remat=remat))
    assert ("remat" in other or "checkpoint" in other) == (remat != "none")
    layers_scanned = "length=2"  # the layers make two periods; a loop over experts has another length
    assert layers_scanned in plain
    assert (layers_scanned in other) == scan
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for (leaf, a), (_, b) in zip(named_leaves(grads), named_leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=leaf)


def test_minimal_remat_keeps_weight_products_and_full_keeps_none():
    cfg = dataclasses.replace(SMALL, scan=False, num_layers=1)
    tok = tokens((2, T))

    def saved(remat):
        c = dataclasses.replace(cfg, remat=remat)
        fn = jax.grad(lambda p: jnp.mean(losses(c, p, tok, tok)))
        return str(jax.make_jaxpr(fn)(make(c))).count("dot_general")

    none, minimal, full = saved("none"), saved("minimal"), saved("full")
    assert none < minimal < full  # two attention products again; then the seven projections as well


def test_layers_are_initialised_apart_and_alike_whatever_the_stacking():
    cfg = VARIANTS["mixed"]
    init = lambda c: jax.jit(partial(tf.init, c))(jax.random.key(0))  # noqa: E731
    params = init(cfg)
    for (leaf, a), (_, b) in zip(
        named_leaves(params), named_leaves(init(dataclasses.replace(cfg, scan=False))), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=leaf)
    # the same five layers with no pattern: one stack of five
    plain = dataclasses.replace(cfg, attention=dataclasses.replace(cfg.attention, pattern=("global",)))
    stack_LDNH = init(plain)["blocks"]["0"]["attention"]["wq"]
    np.testing.assert_array_equal(stack_LDNH[0], params["blocks"]["0"]["attention"]["wq"][0])
    np.testing.assert_array_equal(stack_LDNH[3], params["blocks"]["1"]["attention"]["wq"][1])
    np.testing.assert_array_equal(stack_LDNH[4], params["tail"]["0"]["attention"]["wq"])
    assert len({float(x) for x in stack_LDNH[:, 0, 0, 0]}) == 5


def test_initial_scale_is_what_the_config_says():
    cfg = dataclasses.replace(SMALL, model_dim=256, mlp_dim=1024, init_std=0.02)
    params = jax.jit(partial(tf.init, cfg))(jax.random.key(0))
    for name, want in {
        "attention/wq": 0.02,
        "mlp/w_up": 0.02,
        "mlp/w_down": 0.02 / 2,
        "attention/wo": 0.02 / 2,
    }.items():
        module, leaf = name.split("/")
        assert float(jnp.std(params["blocks"]["0"][module][leaf])) == pytest.approx(want, rel=0.02), name
    fan_in = jax.jit(partial(tf.init, dataclasses.replace(cfg, init_std=0.0)))(jax.random.key(0))
    assert float(jnp.std(fan_in["blocks"]["0"]["mlp"]["w_up"])) == pytest.approx(256**-0.5, rel=0.02)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_follows_float32(param_dtype):
    tok, tgt = tokens((4, T)), tokens((4, T), seed=3)
    params = make(SMALL)
    low = dataclasses.replace(SMALL, dtype="bfloat16", param_dtype=param_dtype)
    low_params = jax.tree.map(lambda x: x.astype(param_dtype), params)
    assert hidden(low, low_params, tok).dtype == jnp.bfloat16
    assert logits(low, low_params, tok).dtype == jnp.float32
    fn = lambda c, p: jnp.mean(losses(c, p, tok, tgt))  # noqa: E731
    want, want_grads = jax.jit(jax.value_and_grad(partial(fn, SMALL)))(params)
    got, grads = jax.jit(jax.value_and_grad(partial(fn, low)))(low_params)
    assert float(got) == pytest.approx(float(want), rel=0.01)
    for (leaf, a), (_, b) in zip(named_leaves(grads), named_leaves(want_grads), strict=True):
        assert a.dtype == param_dtype
        a, b = np.asarray(a, np.float32).ravel(), np.asarray(b).ravel()
        assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) > 0.99, leaf


def test_dropout_needs_a_key_and_has_the_right_mean():
    cfg = dataclasses.replace(SMALL, dropout=0.25)
    params, tok = make(cfg), tokens((2, T))
    plain = hidden(cfg, params, tok)
    np.testing.assert_array_equal(plain, hidden(SMALL, params, tok))
    once = hidden(cfg, params, tok, key=jax.random.key(1))
    np.testing.assert_array_equal(once, hidden(cfg, params, tok, key=jax.random.key(1)))
    assert not np.allclose(once, hidden(cfg, params, tok, key=jax.random.key(2)))
    unrolled = hidden(dataclasses.replace(cfg, scan=False), params, tok, key=jax.random.key(1))
    np.testing.assert_allclose(once, unrolled, atol=1e-5)
    from jaxlm.model.layers import dropout

    x = jnp.ones((200, 200))
    y = dropout(x, 0.25, jax.random.key(0))
    assert float(jnp.mean(y)) == pytest.approx(1.0, abs=0.01)
    assert float(jnp.mean(y == 0)) == pytest.approx(0.25, abs=0.01)


def test_a_block_attends_to_a_memory():
    from jaxlm.model.attention import Context

    block = tf.Block(SMALL, cross=True)
    x, memory = (
        jax.random.normal(jax.random.key(0), (2, 5, 32)),
        jax.random.normal(jax.random.key(1), (2, 7, 32)),
    )
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    ctx = dataclasses.replace(
        tf.make_context(SMALL, positions, None, None, None),
        memory_BSD=memory,
        memory_segments_BS=jnp.array([[1] * 7, [1] * 4 + [0] * 3]),
    )
    assert isinstance(ctx, Context)
    params = jax.jit(lambda key: block.init(key, x, ctx))(jax.random.key(2))

    def out(memory):
        return block.apply(params, x, dataclasses.replace(ctx, memory_BSD=memory))[0]

    influence = jnp.abs(jax.jit(jax.grad(lambda m: jnp.sum(jnp.sin(out(m) * 3))))(memory)).sum(-1)
    assert jnp.all(influence[0] > 0)  # the memory is seen whole, not causally,
    assert jnp.all(influence[1, :4] > 0)
    assert jnp.all(influence[1, 4:] == 0)  # and its padding is not
    for name, leaf in named_leaves(params["params"]):
        tf_axes = tf.AXES["/".join(name.split("/")[-2:])]
        assert len(tf_axes) == leaf.ndim


def test_bidirectional_and_prefix_masks():
    cfg = dataclasses.replace(SMALL, causal=False)
    params, tok = make(cfg), tokens((1, T))
    first = logits(cfg, params, tok)[0, 0]
    changed = logits(cfg, params, tok.at[0, T - 1].add(1))[0, 0]
    assert not np.allclose(first, changed)
    # prefix LM: non-causal, with a mask that opens the first four columns to each other
    allowed = jnp.tril(jnp.ones((T, T), bool)).at[:4, :4].set(True)[None]
    out = lambda tok: logits(cfg, params, tok, allowed_BTS=allowed)  # noqa: E731
    base, later, inside = out(tok), out(tok.at[0, 8].add(1)), out(tok.at[0, 3].add(1))
    np.testing.assert_array_equal(base[0, :8], later[0, :8])
    assert not np.allclose(base[0, 0], inside[0, 0])


def test_a_further_mask_is_not_dropped_beside_a_cache():
    cache, shape = jax.eval_shape(lambda: tf.init_cache(SMALL, 1, T)), (1, T, T)
    with pytest.raises(UserError, match="allowed_BTS is a mask of a call's own columns"):
        tf.apply(SMALL, {}, tokens((1, T)), cache=cache, allowed_BTS=jnp.ones(shape, bool))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(model_dim=30), ["model.model_dim=30", "num_heads=4", "32"]),
        (dict(activation="swigul"), ["swigul", "did you mean 'swiglu'"]),
        (dict(mlp_pattern=("moe",)), ["num_experts=0", "moe"]),
        (dict(first_dense=2), ["first_dense=2", "num_layers=2"]),
        (dict(gate_limit=7.0, activation="gelu"), ["gate_limit=7.0", "gelu"]),
        (dict(norm_position="mid"), ["mid", "sandwich"]),
        (dict(dropout=1.0), ["dropout=1.0"]),
        (dict(remat="fulll"), ["did you mean 'full'"]),
    ],
)
def test_impossible_models_are_refused_by_name(change, words):
    with pytest.raises(UserError) as error:
        dataclasses.replace(SMALL, **change)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(num_heads=6, num_kv_heads=4), ["num_kv_heads=4", "num_heads=6", "1, 2, 3, 6"]),
        (dict(pattern=("local",)), ["window=0"]),
        (dict(pattern=("globl",)), ["did you mean 'global'"]),
        (dict(backend="xlaa"), ["did you mean 'xla'"]),
    ],
)
def test_impossible_attention_is_refused_by_name(change, words):
    with pytest.raises(UserError) as error:
        AttentionConfig(**change)
    for word in words:
        assert word in str(error.value)


def test_many_cotangents_at_once_give_the_gradients_of_one_by_one():
    """Of products of many small matrices, which XLA:CPU of jaxlib 0.10 gets wrong by default."""
    cfg = tf.TransformerConfig(
        vocab_size=50, num_layers=2, model_dim=16, attention=AttentionConfig(num_heads=2)
    )
    params = tf.init(cfg, jax.random.key(0))
    tokens_BT = jax.random.randint(jax.random.key(1), (8, 24), 0, 50)
    gradient = lambda c_T: jax.vjp(lambda p: tf.apply(cfg, p, tokens_BT)[0].sum(-1)[0], params)[1](c_T)[0]  # noqa: E731
    many = jax.jit(jax.vmap(gradient))(jnp.eye(24))
    one = jax.jit(gradient)(jnp.eye(24)[20])
    for (name, want), (_, got) in zip(named_leaves(one), named_leaves(many), strict=True):
        np.testing.assert_allclose(got[20], want, atol=1e-5 * float(jnp.abs(want).max() + 1e-6), err_msg=name)
