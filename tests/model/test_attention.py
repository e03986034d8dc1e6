"""Attention backends against a literal loop, on packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.model import dense_attention
from jaxlm.model.backends import BACKENDS, attend
from jaxlm.model.cache import empty, write
from jaxlm.model.dense_attention import query_blocks
from jaxlm.model.masks import Mask

HERE = [name for name, row in BACKENDS.items() if not row.platform]  # those that run on this machine

B, T, N, K, H = 2, 9, 4, 2, 5


def literal(q, k, v, seen, scale, softcap=0.0, bias=None, sinks=None):
    out = np.zeros((B, T, N, H))
    for b in range(B):
        for n in range(N):
            for t in range(T):
                s = np.array([q[b, t, n] @ k[b, j, n // (N // K)] for j in range(T)]) * scale
                if softcap:
                    s = softcap * np.tanh(s / softcap)
                if bias is not None:
                    s = s + bias[b, n, t]
                s = np.where(seen[b, t], s, -np.inf)
                if not seen[b, t].any():
                    continue
                e = np.exp(s - s[seen[b, t]].max())
                total = e.sum() + (0 if sinks is None else np.exp(sinks[n] - s[seen[b, t]].max()))
                out[b, t, n] = (e / total) @ v[b, :, n // (N // K)]
    return out


def inputs():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, T, h, H)).astype(np.float32) for h in (N, K, K))
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 9])
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0], list(range(9))])
    return rng, q, k, v, segments, positions


def seen_by_hand(segments, positions, causal, window):
    seen = np.zeros((B, T, T), bool)
    for b in range(B):
        for t in range(T):
            for s in range(T):
                d = positions[b, t] - positions[b, s]
                ok = segments[b, t] == segments[b, s] != 0
                ok &= d >= 0 or not causal
                ok &= window == 0 or (d < window and d > -window)
                seen[b, t, s] = ok
    return seen


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("extra", ["none", "softcap", "sinks", "bias"])
def test_backends_equal_the_literal_loop_or_refuse(backend, causal, window, extra):
    rng, q, k, v, segments, positions = inputs()
    mask = Mask(positions, positions, segments, segments, causal, window, ordered=True)
    seen = seen_by_hand(segments, positions, causal, window)
    np.testing.assert_array_equal(mask.visible_BTS(), seen)
    options, literally = {}, {}
    if extra == "softcap":
        options = literally = dict(softcap=2.0)
    elif extra == "sinks":
        sinks = rng.normal(size=N).astype(np.float32)
        options, literally = dict(sinks_N=sinks), dict(sinks=sinks)
    elif extra == "bias":
        bias = rng.normal(size=(B, N, T, T)).astype(np.float32)
        options, literally = dict(bias_BNTS=bias), dict(bias=bias)
    run = lambda: attend(q, k, v, mask, backend=backend, scale=0.4, **options)  # noqa: E731
    if extra != "none" and not getattr(BACKENDS[backend], extra):
        with pytest.raises(UserError, match=rf"has no .*{extra}.*; use 'blocked' or 'reference'"):
            run()
        return
    got = run()
    assert bool(jnp.isfinite(got).all())
    real = segments != 0
    np.testing.assert_allclose(got[real], literal(q, k, v, seen, 0.4, **literally)[real], atol=2e-6)


def test_gradients_of_backends_agree():
    rng, q, k, v, segments, positions = inputs()
    mask = Mask(positions, positions, segments, segments, ordered=True)
    weight = rng.normal(size=(B, T, N, H)) * (segments != 0)[..., None, None]
    grads = [
        jax.grad(lambda *qkv, b=b: jnp.sum(attend(*qkv, mask, backend=b) * weight), argnums=(0, 1, 2))(
            q, k, v
        )
        for b in HERE
    ]
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 5, 40])
@pytest.mark.parametrize("length", [64, 100])
def test_blocks_of_queries_equal_the_whole(monkeypatch, causal, window, length):
    """Loss and gradients, with grouped heads, softcap, sinks, bias, and packed rows with padding."""
    monkeypatch.setattr(dense_attention, "BLOCK_LENGTH", 16)
    rng = np.random.default_rng(0)
    shapes = dict(q=(2, length, 4, 8), k=(2, length, 2, 8), v=(2, length, 2, 8), bias=(1, 4, length, length))
    inputs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    inputs["sinks"] = rng.normal(size=4).astype(np.float32)
    segments = np.array([[1] * 30 + [2] * (length - 40) + [0] * 10, [1] * length])
    positions = np.array([[*range(30), *range(length - 40), *[0] * 10], [*range(length)]])
    mask = Mask(positions, positions, segments, segments, causal, window, ordered=True)
    blocks = query_blocks(length, causal=causal, window=window)
    assert len(blocks) == (1 if not causal and not window else -(-length // 16))
    weight = rng.normal(size=(2, length, 4, 8)) * (segments != 0)[..., None, None]

    def loss(x, backend):
        options = dict(bias_BNTS=x["bias"], sinks_N=x["sinks"], softcap=3.0)
        return jnp.sum(attend(x["q"], x["k"], x["v"], mask, backend=backend, **options) * weight)

    whole, whole_grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(inputs, "reference")
    got, grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(inputs, "blocked")
    np.testing.assert_allclose(got, whole, rtol=1e-5)
    for name in inputs:
        np.testing.assert_allclose(grads[name], whole_grads[name], atol=2e-5, err_msg=name)


def test_the_ring_keeps_the_last_positions_of_every_row():
    cache = empty(2, 4, 1, 1, "float32")
    positions = np.array([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 0, 0]])
    valid = np.array([[True] * 6, [True] * 3 + [False] * 3])
    values = (100 * np.arange(2)[:, None] + positions)[..., None, None].astype(np.float32)
    cache = write(cache, values, -values, positions, valid)
    np.testing.assert_array_equal(cache.positions_BS, [[4, 5, 2, 3], [0, 1, 2, -1]])
    np.testing.assert_array_equal(cache.k_BSKH[..., 0, 0], [[4, 5, 2, 3], [100, 101, 102, 0]])
    np.testing.assert_array_equal(cache.v_BSKH[1, :3, 0, 0], [-100, -101, -102])
