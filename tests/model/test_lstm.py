"""The LSTM against a loop in numpy, its gradient, its state across columns and documents, its FLOPs."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.model import lstm, recurrence
from jaxlm.model.recurrence import LSTMConfig

CFG = LSTMConfig(vocab_size=23, num_layers=2, model_dim=8)
B, T = 3, 11


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def params_of(cfg, seed=0):
    """Random biases too, so that a bias that is dropped shows."""
    rng = np.random.default_rng(seed)
    shapes = lstm.abstract_params(cfg)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.5, s.shape), s.dtype), shapes)


def loop(params, tokens, segments):
    """One row, one column, one layer at a time."""
    table = np.asarray(params["embed"]["table"], np.float64)
    cells = {name: np.asarray(x, np.float64) for name, x in params["blocks"]["lstm"].items()}
    L, _, D, _ = cells["w_input"].shape
    out = np.zeros((*tokens.shape, D))
    for b, (row, documents) in enumerate(zip(tokens, segments, strict=True)):
        h, c, before = np.zeros((L, D)), np.zeros((L, D)), documents[0]
        for t, (token, document) in enumerate(zip(row, documents, strict=True)):
            if document != before:
                h, c, before = np.zeros((L, D)), np.zeros((L, D)), document
            x = table[token]
            for n in range(L):
                i, f, g, o = (
                    x @ cells["w_input"][n, k] + h[n] @ cells["w_state"][n, k] + cells["bias"][n, k]
                    for k in range(4)
                )
                c[n] = sigmoid(f) * c[n] + sigmoid(i) * np.tanh(g)
                x = h[n] = sigmoid(o) * np.tanh(c[n])
            out[b, t] = x
    return out


def batch(seed=1):
    tokens = np.random.default_rng(seed).integers(0, CFG.vocab_size, (B, T))
    segments = np.array([[1] * T, [1] * 4 + [2] * 5 + [0] * 2, [1, 2, 2] + [3] * 8])
    return tokens.astype(np.int32), segments.astype(np.int32)


def test_it_is_the_loop():
    params, (tokens, segments) = params_of(CFG), batch()
    hidden, cache, aux = lstm.apply(CFG, params, tokens, segments_BT=segments)
    assert (cache, aux) == (None, {})
    real = segments != 0
    np.testing.assert_allclose(hidden[real], loop(params, tokens, segments)[real], atol=2e-6)
    # Documents are apart: without them the state runs on.
    on = lstm.apply(CFG, params, tokens)[0]
    np.testing.assert_allclose(on, loop(params, tokens, np.ones_like(segments)), atol=2e-6)
    assert np.abs(on - hidden)[1, 4:9].max() > 1e-2
    logits = lstm.unembed(CFG, params, hidden)
    np.testing.assert_allclose(logits, np.asarray(hidden) @ np.asarray(params["head"]["w"]), atol=1e-5)
    tied = dataclasses.replace(CFG, tie_embeddings=True)
    assert set(lstm.abstract_params(tied)) == {"embed", "blocks"}
    logits = lstm.unembed(tied, params_of(tied), hidden)
    table = np.asarray(params_of(tied)["embed"]["table"])
    np.testing.assert_allclose(logits, np.asarray(hidden) @ table.T, atol=1e-5)


def test_it_is_the_one_of_torch():
    torch = pytest.importorskip("torch")
    params, (tokens, _) = params_of(CFG), batch()
    theirs = torch.nn.LSTM(CFG.model_dim, CFG.model_dim, CFG.num_layers, batch_first=True)
    stacked = params["blocks"]["lstm"]
    with torch.no_grad():
        for n in range(CFG.num_layers):
            for ours, name in (("w_input", "weight_ih"), ("w_state", "weight_hh")):
                w = np.concatenate([np.asarray(w).T for w in stacked[ours][n]])
                getattr(theirs, f"{name}_l{n}").copy_(torch.tensor(w))
            getattr(theirs, f"bias_ih_l{n}").copy_(torch.tensor(np.asarray(stacked["bias"][n]).reshape(-1)))
            getattr(theirs, f"bias_hh_l{n}").zero_()
        x = torch.tensor(np.asarray(params["embed"]["table"])[tokens])
        expected = theirs(x)[0].numpy()
    np.testing.assert_allclose(lstm.apply(CFG, params, tokens)[0], expected, atol=2e-6)


def test_its_gradient_is_that_of_plain_autodiff():
    params, (tokens, segments) = params_of(CFG), batch()
    weights = np.random.default_rng(3).normal(size=(B, T, CFG.model_dim)) * (segments != 0)[..., None]

    def loss(params, cfg=CFG):
        return jnp.sum(weights * lstm.apply(cfg, params, tokens, segments_BT=segments)[0])

    ours = jax.jit(jax.grad(loss))(params)
    again_loss = partial(loss, cfg=dataclasses.replace(CFG, remat="full"))
    assert "remat" in str(jax.make_jaxpr(again_loss)(params))
    assert "remat" not in str(jax.make_jaxpr(loss)(params))
    again = jax.jit(jax.grad(again_loss))(params)
    own, calls = recurrence.recur, []
    try:
        recurrence.recur = lambda *args: calls.append(1) or recurrence._scan(*args)
        plain = jax.jit(jax.grad(loss))(params)
    finally:
        recurrence.recur = own
    assert len(calls) == CFG.num_layers
    for expected in (plain, again):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, expected)
    # And of the function itself: finite differences along one direction.
    step = params_of(CFG, seed=9)
    at = lambda e: jax.jit(loss)(jax.tree.map(lambda p, s: p + e * s, params, step))  # noqa: E731
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, s: jnp.sum(g * s), ours, step)))
    assert (at(1e-2) - at(-1e-2)) / 2e-2 == pytest.approx(float(slope), rel=2e-2)


def test_a_cache_goes_on_where_it_stood():
    """Prompts of different lengths, then one column at a time: as if read at once."""
    params, (tokens, _) = params_of(CFG), batch()
    whole = lstm.apply(CFG, params, tokens)[0]
    lengths = np.array([1, 4, 6])
    real = (np.arange(6) < lengths[:, None]).astype(np.int32)
    padded = np.where(real, tokens[:, :6], 0)
    _, cache, _ = lstm.apply(CFG, params, padded, segments_BT=real, cache=lstm.init_cache(CFG, B, T))
    for _ in range(3):
        column = tokens[np.arange(B), lengths][:, None]
        hidden, cache, _ = lstm.apply(CFG, params, column, segments_BT=np.ones((B, 1), np.int32), cache=cache)
        np.testing.assert_allclose(hidden[:, 0], whole[np.arange(B), lengths], atol=2e-6)
        lengths = lengths + 1
    same = lstm.apply(CFG, params, tokens[:, :1], segments_BT=np.zeros((B, 1), np.int32), cache=cache)[1]
    jax.tree.map(np.testing.assert_array_equal, same, cache)


def test_dropout_is_on_what_goes_up():
    cfg = dataclasses.replace(CFG, dropout=0.5)
    params, (tokens, _) = params_of(cfg), batch()
    still = lstm.apply(cfg, params, tokens)[0]
    np.testing.assert_array_equal(still, lstm.apply(CFG, params, tokens)[0])
    dropped = lstm.apply(cfg, params, tokens, key=jax.random.key(0))[0]
    assert 0.3 < np.mean(np.asarray(dropped) == 0) < 0.7


def test_initial_values():
    params = lstm.init(dataclasses.replace(CFG, model_dim=64), jax.random.key(0))
    bias = np.asarray(params["blocks"]["lstm"]["bias"])
    assert bias.shape == (2, 4, 64)
    assert (bias[:, recurrence.GATES.index("f")] == 1).all()
    assert np.abs(np.delete(bias, recurrence.GATES.index("f"), axis=1)).max() == 0
    assert np.std(params["blocks"]["lstm"]["w_state"]) == pytest.approx(64**-0.5, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "gru"}, "model.kind='gru'"),
        ({"dropout": 1.0}, r"model.dropout=1.0 must be in \[0, 1\)"),
        ({"remat": "minimal"}, "model.remat='minimal' is not one of 'none', 'full'"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CFG, **changes)
