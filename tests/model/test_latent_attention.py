"""Latent attention against loops over tokens and heads, written as in the paper."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.model import transformer as tf
from jaxlm.model.attention import AttentionConfig, Context, LatentConfig
from jaxlm.model.latent_attention import LatentAttention
from jaxlm.model.positions import rope_frequencies, rope_tables
from jaxlm.scaling.memory import memory
from jaxlm.tree import map_named

B, T, D, N = 2, 7, 24, 3
SIZES = LatentConfig(kv_rank=10, q_rank=12, nope_dim=6, rope_dim=4, value_dim=5)
CFG = tf.TransformerConfig(
    vocab_size=31, num_layers=2, model_dim=D, attention=AttentionConfig(num_heads=N, latent=SIZES)
)


def layer(latent=SIZES, **fields):
    cfg = AttentionConfig(num_heads=N, latent=latent, **fields)
    how = dict(
        init_std=lambda n: n**-0.5, out_scale=1.0, norm_offset=False, rotates=True, causal=True, window=0
    )
    types = dict(dtype="float32", param_dtype="float32", accum_dtype="float32")
    return LatentAttention(cfg, interleaved=True, **how, **types)


def inputs():
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    tables = rope_tables(positions_BT, *rope_frequencies(CFG.position, SIZES.rope_dim))
    x_BTD = jax.random.normal(jax.random.key(0), (B, T, D))
    return x_BTD, Context(positions_BT, rotation={"global": tables})


def params_of(module, x_BTD, ctx):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x_BTD, ctx))
    return map_named(lambda name, s: jnp.asarray(rng.normal(size=s.shape) * s.shape[0] ** -0.5), shapes)


def rms(x, scale):
    return x / np.sqrt(np.mean(x**2) + 1e-6) * scale


def turn(x, position):
    """Pairs (0, 1), (2, 3) .. as complex numbers."""
    angle = position * 10000.0 ** (-np.arange(0, len(x), 2) / len(x))
    z = (x[0::2] + 1j * x[1::2]) * np.exp(1j * angle)
    return np.stack([z.real, z.imag], -1).reshape(-1)


def naive(params, x_BTD, scale, latent):
    p = {"/".join(k.key for k in path[1:]): np.asarray(v, np.float64) for path, v in
         jax.tree_util.tree_flatten_with_path(params)[0]}  # fmt: skip
    x_BTD, R = np.asarray(x_BTD, np.float64), latent.kv_rank
    y_BTD = np.zeros_like(x_BTD)
    for b in range(B):
        keys, values = [], []
        for t in range(T):
            x = x_BTD[b, t]
            both = x @ p["wkv_down"] + p.get("b_kv", 0)
            c, r = rms(both[:R], p["kv_norm/scale"]), turn(both[R:], t)
            keys.append([np.concatenate([c @ p["wk_up"][:, h], r]) for h in range(N)])
            values.append([c @ p["wv_up"][:, h] for h in range(N)])
            for h in range(N):
                if latent.q_rank:
                    narrow = rms(x @ p["wq_down"] + p.get("b_q", 0), p["q_norm/scale"])
                    q = narrow @ p["wq_up"][:, h]
                else:
                    q = x @ p["wq"][:, h]
                q = np.concatenate([q[: latent.nope_dim], turn(q[latent.nope_dim :], t)])
                weights = np.exp([scale * q @ k[h] for k in keys])
                mixed = sum(w * v[h] for w, v in zip(weights, values, strict=True)) / weights.sum()
                y_BTD[b, t] += mixed @ p["wo"][h]
            y_BTD[b, t] += p.get("bo", 0)
    return y_BTD


@pytest.mark.parametrize("q_rank", [0, 12])
def test_is_the_papers_equations(q_rank):
    latent = dataclasses.replace(SIZES, q_rank=q_rank)
    module, (x_BTD, ctx) = layer(latent, qkv_bias=True, out_bias=True), inputs()
    params = params_of(module, x_BTD, ctx)
    assert ("wq" in params["params"]) == (q_rank == 0)
    y_BTD, cache = module.apply(params, x_BTD, ctx)
    assert cache is None
    np.testing.assert_allclose(y_BTD, naive(params, x_BTD, 10**-0.5, latent), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["xla", "splash_interpret"])
def test_a_backend_of_one_width_gets_values_padded(backend):
    x_BTD, ctx = inputs()
    params = params_of(layer(), x_BTD, ctx)
    apply = lambda module: lambda params: module.apply(params, x_BTD, ctx)[0]  # noqa: E731
    plain, other = (str(jax.make_jaxpr(apply(m))(params)) for m in (layer(), layer(backend=backend)))
    assert "pad[" in other
    assert "pad[" not in plain
    assert ("pallas_call" in other) == backend.startswith("splash")
    want, got = apply(layer())(params), apply(layer(backend=backend))(params)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_the_cache_holds_the_narrow_vector_and_the_shared_key_alone():
    cache = tf.init_cache(CFG, B, 16)
    kept = cache["blocks"]["0"]
    assert kept.k_BSKH.shape == (2, B, 16, 1, SIZES.kv_rank + SIZES.rope_dim)
    assert kept.v_BSKH.size == 0
    by_token = (SIZES.kv_rank + SIZES.rope_dim) * 4 + 4  # and the position
    assert memory(CFG, batch_size=B, seq_len=16).kv_cache == 2 * B * 16 * by_token


def test_sizes_that_do_not_go_together_are_refused():
    for fields, words in (
        (dict(num_kv_heads=1), "num_kv_heads=1 with model.attention.latent.kv_rank=10"),
        (dict(qk_norm=True), "qk_norm=True"),
    ):
        with pytest.raises(UserError, match=words):
            AttentionConfig(num_heads=N, latent=SIZES, **fields)
    with pytest.raises(UserError, match="value_dim=0 must be positive"):
        LatentConfig(kv_rank=4, nope_dim=2, rope_dim=2)
    with pytest.raises(UserError, match="kind='alibi'"):
        dataclasses.replace(CFG, position=dataclasses.replace(CFG.position, kind="alibi"))
