"""Attention over split columns is attention: values and all gradients, in every way to do it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.model import context_parallel as cp
from jaxlm.model.attention import AttentionConfig
from jaxlm.model.backends import attend
from jaxlm.model.config import TransformerConfig
from jaxlm.model.masks import Mask
from jaxlm.model.moe import MoEConfig
from jaxlm.model.positions import PositionConfig
from jaxlm.model.transformer import abstract_params, apply
from jaxlm.sharding import MeshConfig, make_layout, use

B, T, N, K, H = 2, 32, 8, 4, 4

# name -> (mode, causal, window, softcap, sinks, documents whose positions grow along the columns)
VARIANTS = {
    "gather": ("gather", True, 7, 3.0, True, True),
    "ulysses": ("ulysses", True, 7, 3.0, True, True),
    "ring": ("ring", True, 0, 3.0, True, True),
    "ring_window": ("ring", True, 7, 0.0, False, True),
    "ring_both_ways": ("ring", False, 0, 0.0, True, True),
    "ring_any_order": ("ring", True, 0, 0.0, False, False),
}


def inputs(ordered):
    rng = np.random.default_rng(0)
    q, g = (jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(B, T, K, H)), jnp.float32) for _ in range(2))
    sinks = jnp.asarray(rng.normal(size=N), jnp.float32)
    segments, positions = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    segments[1, 11:], positions[1, 11:] = 2, np.arange(T - 11)
    segments[1, 29:] = 0
    if not ordered:
        positions = rng.permuted(positions, axis=1)
    return (q, k, v, sinks), g, jnp.asarray(positions), jnp.asarray(segments)


def outcome(variant, split):
    """Values at real columns, and gradients in q, k, v and sinks, of attention on one device or on many."""
    context, causal, window, softcap, with_sinks, ordered = VARIANTS[variant]
    arrays, g, positions, segments = inputs(ordered)
    zigzag = split and context == "ring" and causal and ordered

    def run(q, k, v, sinks):
        order = cp.zigzag if zigzag else lambda x: x
        at, doc = order(positions), order(segments)
        mask = Mask(at, at, doc, doc, causal, window, ordered=ordered and not zigzag)
        options = dict(scale=H**-0.5, bias_BNTS=None, softcap=softcap, sinks_N=sinks if with_sinks else None)
        q, k, v = order(q), order(k), order(v)
        if split:
            out = cp.attend_split(attend, q, k, v, mask, context=context, zigzag=zigzag, **options,
                                  dtype="float32", accum="float32")  # fmt: skip
        else:
            out = attend(q, k, v, mask, backend="reference", **options)
        out = cp.zigzag(out, back=True) if zigzag else out
        out = jnp.where((segments != 0)[..., None, None], out, 0)
        return jnp.sum(out * g), out

    grads, out = jax.grad(run, argnums=(0, 1, 2, 3), has_aux=True)(*arrays)
    return out, grads


def test_every_mode_equals_attention_on_one_device(monkeypatch):
    monkeypatch.setattr(cp, "QUERIES", 2)  # several blocks of queries in each hop
    want = jax.jit(lambda: {name: outcome(name, split=False) for name in VARIANTS})()
    with use(make_layout(MeshConfig(data=1, sequence=4, tensor=1))):
        program = jax.jit(lambda: {name: outcome(name, split=True) for name in VARIANTS}).lower().compile()
        got = program()
    text = program.as_text()
    assert all(kind in text for kind in ("all-gather", "all-to-all", "collective-permute"))
    for name in VARIANTS:
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(want[name]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max() + 1e-9, rtol=1e-4, err_msg=name)


def test_the_zigzag_gives_each_device_an_early_and_a_late_chunk_and_back():
    x = jnp.arange(24).reshape(1, 24)
    with use(make_layout(MeshConfig(data=1, sequence=3))):
        there = jax.jit(cp.zigzag)(x)
        back = jax.jit(lambda x: cp.zigzag(x, back=True))(there)
    chunks = np.asarray(there)[0, ::4] // 4
    np.testing.assert_array_equal(chunks, [0, 5, 1, 4, 2, 3])
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(cp.zigzag(x), x)


def tiny(**attention):
    return TransformerConfig(
        vocab_size=16, num_layers=1, model_dim=16, attention=AttentionConfig(num_heads=4, **attention)
    )


def test_what_a_mode_cannot_do_is_refused_with_the_alternative():
    with pytest.raises(UserError, match=r"context='rings' is not one of .*did you mean 'ring'"):
        tiny(context="rings")
    with pytest.raises(UserError, match="context='ring' has no bias; use 'gather' or 'ulysses'"):
        dataclasses.replace(tiny(context="ring"), position=PositionConfig(kind="alibi"))
    with pytest.raises(UserError, match=r"'capacity' drops tokens; use context 'gather' or 'ulysses'"):
        dataclasses.replace(
            tiny(context="ring"), mlp_pattern=("moe",), moe=MoEConfig(num_experts=2, dispatch="capacity")
        )

    def trace(cfg, length):
        with use(make_layout(MeshConfig(data=1, sequence=4))):
            tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
            jax.eval_shape(lambda p, t: apply(cfg, p, t)[0], abstract_params(cfg), tokens)

    with pytest.raises(UserError, match=r"18 columns do not divide into 4 equal chunks.*nearest.*16"):
        trace(tiny(), 18)
    with pytest.raises(UserError, match=r"20 columns do not divide into 8 equal chunks.*ring"):
        trace(tiny(context="ring"), 20)
    with pytest.raises(UserError, match=r"does not divide the 2 key heads.*use 'ring' or 'gather'"):
        trace(tiny(context="ulysses", num_kv_heads=2), 16)
