"""The recurrent encoder-decoder against a loop in numpy, its masks, its cache, and a task that it learns."""

import dataclasses
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.model import lstm
from jaxlm.model.lstm_attention import attention_weights
from jaxlm.model.recurrence import LSTMConfig, LSTMEncoderConfig
from jaxlm.objectives.lm import LossConfig, make_lm_objective
from jaxlm.optim import OptimConfig, make_optimizer, make_schedule
from jaxlm.train.state import create_state
from jaxlm.train.step import make_step

CFG = LSTMConfig(vocab_size=19, num_layers=2, encoder=LSTMEncoderConfig(2), model_dim=8)
B, S, T = 2, 7, 6
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1] * 6], np.int32)
INPUT_SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 0], [1, 1, 1, 0, 0, 0, 0]], np.int32)


def random_params(cfg, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(0, 0.4, s.shape), s.dtype), lstm.abstract_params(cfg)
    )


def tokens_of(seed, *shape):
    return np.random.default_rng(seed).integers(0, CFG.vocab_size, shape).astype(np.int32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def one_cell(weights, x, h, c, extra=0.0):
    i, f, g, o = (x @ weights["w_input"] + h @ weights["w_state"]).reshape(4, -1) + weights["bias"] + extra
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def pair_loop(params, inputs, tokens):
    """One pair without padding: (outputs [T, D], attention weights [T, S])."""
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    a, table = w["additive"], w["embed"]["table"]
    x = table[inputs]
    for n in range(CFG.encoder.num_layers):
        both = []
        for way, order in (("forward", range(len(inputs))), ("backward", reversed(range(len(inputs))))):
            weights = {name: leaf[n] for name, leaf in w["encoder"]["blocks"][way]["lstm"].items()}
            h = c = np.zeros(CFG.model_dim // 2)
            out = np.zeros((len(inputs), CFG.model_dim // 2))
            for s in order:
                h, c = one_cell(weights, x[s], h, c)
                out[s] = h
            both.append(out)
        x = np.concatenate(both, axis=1)
    memory = x
    h, c = np.zeros((CFG.num_layers, CFG.model_dim)), np.zeros((CFG.num_layers, CFG.model_dim))
    outputs, attended = [], []
    for token in tokens:
        scores = [a["v"] @ np.tanh(h[-1] @ a["w_query"] + m @ a["w_memory"]) for m in memory]
        probabilities = np.exp(scores) / np.exp(scores).sum()
        context, below = probabilities @ memory, table[token]
        for n in range(CFG.num_layers):
            weights = {name: leaf[n] for name, leaf in w["blocks"]["lstm"].items()}
            extra = (context @ a["w_context"]).reshape(4, -1) if n == 0 else 0.0
            h[n], c[n] = one_cell(weights, below, h[n], c[n], extra)
            below = h[n]
        outputs.append(np.tanh(h[-1] @ a["w_out"][0] + context @ a["w_out"][1]))
        attended.append(probabilities)
    return np.array(outputs), np.array(attended)


@jax.jit
def packed(params, inputs, tokens):
    memory = lstm.encode(CFG, params, inputs, segments_BS=INPUT_SEGMENTS)
    documents = dict(segments_BT=SEGMENTS, memory_segments_BS=INPUT_SEGMENTS)
    return lstm.apply(CFG, params, tokens, memory_BSD=memory, **documents)[0]


def test_every_pair_of_a_packed_batch_is_the_loop():
    params, inputs, tokens = random_params(CFG), tokens_of(1, B, S), tokens_of(2, B, T)
    hidden = packed(params, inputs, tokens)
    seen = 0
    for b, document in ((0, 1), (0, 2), (1, 1)):
        own, own_inputs = SEGMENTS[b] == document, INPUT_SEGMENTS[b] == document
        expected, attended = pair_loop(params, inputs[b, own_inputs], tokens[b, own])
        np.testing.assert_allclose(hidden[b, own], expected, atol=2e-6)
        seen += attended.max() > attended.min() + 1e-3
    assert seen == 3  # the attention was not even, so that its weights show
    # What is padding, or another pair's, does not matter.
    other = np.where(INPUT_SEGMENTS == 0, 0, inputs)
    np.testing.assert_array_equal(packed(params, other, tokens)[SEGMENTS != 0], hidden[SEGMENTS != 0])
    changed = packed(params, np.where(INPUT_SEGMENTS == 2, 0, inputs), tokens)
    assert np.abs(changed - hidden)[SEGMENTS == 1].max() == 0 < np.abs(changed - hidden)[SEGMENTS == 2].max()


def test_remat_computes_layers_and_columns_again():
    """Gradients as without; the scores of a column, [B, S, D], are computed again in either."""
    params, inputs, tokens = random_params(CFG), tokens_of(1, B, S), tokens_of(2, B, T)
    where = dict(segments_BT=SEGMENTS, memory_segments_BS=INPUT_SEGMENTS)

    def loss(params, cfg):
        memory = lstm.encode(cfg, params, inputs, segments_BS=INPUT_SEGMENTS)
        hidden = lstm.apply(cfg, params, tokens, memory_BSD=memory, **where)[0]
        return jnp.sum(jnp.sin(hidden))

    full = dataclasses.replace(CFG, remat="full")
    counts = [str(jax.make_jaxpr(partial(loss, cfg=cfg))(params)).count("remat") for cfg in (CFG, full)]
    assert counts[1] > counts[0] > 0
    kept, again = (jax.jit(jax.grad(partial(loss, cfg=cfg)))(params) for cfg in (CFG, full))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), kept, again)


def test_attention_weights():
    rng = np.random.default_rng(0)
    query, keys, v = rng.normal(size=(3, 4)), rng.normal(size=(3, 5, 4)), rng.normal(size=4)
    visible = np.array([[1, 1, 1, 1, 1], [0, 1, 0, 1, 0], [0] * 5], bool)
    weights = np.asarray(attention_weights(query, keys, jnp.asarray(v), visible))
    for b in (0, 1):
        scores = np.array([v @ np.tanh(query[b] + key) for key in keys[b]])
        expected = np.where(visible[b], np.exp(scores), 0)
        np.testing.assert_allclose(weights[b], expected / expected.sum(), rtol=1e-5)
    assert (weights[2] == 0).all()
    gradient = jax.grad(lambda k: attention_weights(query, k, jnp.asarray(v), visible)[:, 1].sum())
    assert np.isfinite(gradient(jnp.asarray(keys))).all()


def test_a_cache_goes_on_where_it_stood():
    """The first call brings the memory, later ones find it: one column at a time is all at once."""
    params, inputs, tokens = random_params(CFG), tokens_of(1, B, S), tokens_of(2, B, T)
    real = (INPUT_SEGMENTS != 0).astype(np.int32)
    memory = lstm.encode(CFG, params, inputs, segments_BS=real)
    whole = lstm.apply(CFG, params, tokens, memory_BSD=memory, memory_segments_BS=real)[0]
    cache, given = lstm.init_cache(CFG, B, T, S), {"memory_BSD": memory, "memory_segments_BS": real}
    for t in range(T):
        cached = lstm.apply(
            CFG, params, tokens[:, t : t + 1], segments_BT=np.ones((B, 1)), cache=cache, **given
        )
        assert jax.tree.map(jnp.shape, cached[1]) == jax.tree.map(jnp.shape, cache)
        np.testing.assert_allclose(cached[0][:, 0], whole[:, t], atol=2e-6)
        cache, given = cached[1], {}


def test_what_is_refused():
    with pytest.raises(UserError, match="needs inputs to attend to"):
        lstm.apply(CFG, random_params(CFG), tokens_of(2, B, T))
    with pytest.raises(UserError, match="model_dim=7 must be even"):
        dataclasses.replace(CFG, model_dim=7)


@pytest.mark.slow
def test_it_learns_to_reverse():
    """Strings of 3 to 6 letters, packed two to a row, written backwards: exact in nine of ten unseen ones."""
    cfg, start, end = (
        LSTMConfig(vocab_size=12, num_layers=1, encoder=LSTMEncoderConfig(1), model_dim=64),
        10,
        11,
    )

    def batch(seed, rows=32):
        rng = np.random.default_rng(seed)
        names = ("tokens", "targets", "segments", "inputs", "input_segments")
        out = {name: np.zeros((rows, 14), np.int32) for name in names}
        for b in range(rows):
            at, at_input = 0, 0
            for document in (1, 2):
                word = rng.integers(0, 10, rng.integers(3, 7))
                n = len(word)
                out["inputs"][b, at_input : at_input + n] = word
                out["input_segments"][b, at_input : at_input + n] = document
                out["tokens"][b, at : at + n + 1] = [start, *word[::-1]]
                out["targets"][b, at : at + n + 1] = [*word[::-1], end]
                out["segments"][b, at : at + n + 1] = document
                at, at_input = at + n + 1, at_input + n
        return out | {"weights": (out["segments"] != 0).astype(np.float32)}

    def apply(params, batch, key):
        memory = lstm.encode(cfg, params, batch["inputs"], segments_BS=batch["input_segments"])
        documents = dict(segments_BT=batch["segments"], memory_segments_BS=batch["input_segments"])
        return lstm.apply(cfg, params, batch["tokens"], memory_BSD=memory, **documents)[0], {}

    def unembed(params, hidden):
        return lstm.unembed(cfg, params, hidden)

    model = types.SimpleNamespace(apply=apply, unembed=unembed)
    optim = OptimConfig(lr=1e-2, warmup=0.1, weight_decay=0.0, b2=0.99)
    optimizer = make_optimizer(optim, make_schedule(optim, 300))
    state, _ = create_state(lambda key: lstm.init(cfg, key), optimizer, 0)
    step = make_step(make_lm_objective(model, LossConfig()), optimizer)
    for n in range(300):
        state, _ = step(state, None, batch(n))
    unseen = batch(10_000)
    picked = np.asarray(jnp.argmax(unembed(state.params, apply(state.params, unseen, None)[0]), axis=-1))
    right = (picked == unseen["targets"]) | (unseen["segments"] == 0)
    pairs = [right[b, unseen["segments"][b] == document].all() for b in range(32) for document in (1, 2)]
    assert np.mean(pairs) > 0.9
