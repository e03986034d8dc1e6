"""Counts of an LSTM: parameters and FLOPs in closed form, FLOPs by XLA, and what autodiff keeps."""

import dataclasses
import functools
import importlib.metadata

import jax
import jax.numpy as jnp
import pytest

from jaxlm.model import lstm
from jaxlm.model.recurrence import LSTMConfig
from jaxlm.scaling.counting import count, forward_flops, hardware_flops
from jaxlm.scaling.recurrent import memory
from jaxlm.tree import nbytes

CFG = LSTMConfig(vocab_size=1000, num_layers=3, model_dim=256)


def test_closed_form():
    D, L, V = 256, 3, 1000
    counts = count(CFG, 64)
    assert counts.n_total == 2 * V * D + L * (8 * D * D + 4 * D)
    assert counts.flops_train == 6 * (L * 8 * D * D + D * V)
    assert (counts.flops_attention, counts.n_embedding, counts.n_head) == (0, V * D, V * D)
    assert counts.conventions["6nd"] == counts.conventions["palm"] == counts.flops_train
    assert counts.flops_train == count(CFG, 4096).flops_train


def loss(cfg, params, tokens_BT):
    logits_BTV = lstm.unembed(cfg, params, lstm.apply(cfg, params, tokens_BT)[0])
    return jnp.sum(jax.nn.logsumexp(logits_BTV, axis=-1))


@pytest.mark.slow
def test_flops_agree_with_xla(monkeypatch):
    """With the loop over columns unrolled, as XLA counts its body once; elementwise work takes under 2%."""
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    tokens, params = jax.ShapeDtypeStruct((4, 6), jnp.int32), lstm.abstract_params(CFG)
    full = dataclasses.replace(CFG, remat="full")
    # As a user compiles it: without these passes, which other tests leave out, repeated products are merged.
    old = importlib.metadata.version("jaxlib").startswith("0.10.")
    options = {"xla_cpu_use_fusion_emitters": True} if old else None
    for cfg, expected in ((CFG, 3 * forward_flops(CFG, 6)), (full, hardware_flops(full, 6))):
        program = jax.jit(jax.grad(functools.partial(loss, cfg))).lower(params, tokens)
        program = program.compile(compiler_options=options)
        measured = program.cost_analysis()["flops"] / (4 * 6)
        # The state before the first column needs no gradient, nor the last column's products a second time.
        assert 0.92 < measured / expected < 1.02
    assert hardware_flops(full, 6) > 1.2 * 3 * forward_flops(cfg, 6)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_activations_are_what_autodiff_keeps(remat):
    cfg = dataclasses.replace(CFG, num_layers=5, remat=remat, dtype="bfloat16")
    B, T = 4, 32

    def vjp(params, tokens_BT):
        return jax.vjp(lambda params: lstm.apply(cfg, params, tokens_BT)[0], params)[1]

    params = lstm.abstract_params(cfg)
    kept = jax.tree.leaves(jax.eval_shape(vjp, params, jax.ShapeDtypeStruct((B, T), jnp.int32)))
    columns = [x for x in kept if x.ndim > 2 and sorted(x.shape[:2]) == [B, T]]
    estimate = memory(cfg, batch_size=B, seq_len=T).activations
    assert nbytes(columns) == pytest.approx(estimate, rel=0.1)
