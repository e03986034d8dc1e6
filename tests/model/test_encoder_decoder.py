"""Encoder-decoder models: packing, causality, caches, layouts of the loop, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.generate.decode import Generator
from jaxlm.generate.decoder import decoder
from jaxlm.generate.sampling import SampleConfig
from jaxlm.model import encoder_decoder as ed
from jaxlm.model import transformer as tf
from jaxlm.model.attention import AttentionConfig
from jaxlm.model.config import EncoderConfig, TransformerConfig, encoder_of
from jaxlm.model.positions import PositionConfig
from jaxlm.objectives.lm import LossConfig, make_lm_objective
from jaxlm.sharding import MeshConfig, make_layout, make_mesh, use
from jaxlm.train.programs import Model
from jaxlm.tree import named_leaves

CFG = TransformerConfig(
    vocab_size=31,
    num_layers=3,
    model_dim=16,
    mlp_dim=24,
    init_std=0.0,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, pattern=("local", "global"), window=3),
    position=PositionConfig(kind="t5", num_buckets=8, max_distance=12),
    encoder=EncoderConfig(num_layers=2, num_heads=2, mlp_dim=40),
)
S, T = 9, 8
FORWARD = jax.jit(lambda params, *rows: ed.apply(CFG, params, *rows)[0])


def params_of(cfg, seed=0):
    """Parameters none of which is zero or one."""
    params = jax.jit(lambda key: tf.init(cfg, key))(jax.random.key(seed))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(
        structure, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


@pytest.fixture(scope="module")
def params():
    return params_of(CFG)


def ids(seed, shape):
    return np.random.default_rng(seed).integers(0, 31, shape).astype(np.int32)


def packed():
    """Two pairs in row 0, one and padding in row 1."""
    segments, inputs = (
        np.array([[1] * 5 + [2] * 3, [1] * 6 + [0] * 2]),
        np.array([[1] * 4 + [2] * 5, [1] * 9]),
    )
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 0]])
    return dict(
        inputs=ids(0, (2, S)),
        tokens=ids(1, (2, T)),
        input_segments=inputs.astype(np.int32),
        input_positions=np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4], list(range(9))], np.int32),
        segments=segments.astype(np.int32),
        positions=positions.astype(np.int32),
        targets=ids(2, (2, T)),
        weights=(segments != 0).astype(np.float32),
    )


def test_pairs_packed_into_a_row_are_what_they_are_alone(params):
    batch = packed()
    hidden, _ = jax.jit(Model(CFG).apply)(params, batch, None)
    for row, segment in ((0, 1), (0, 2), (1, 1)):
        out, into = batch["segments"][row] == segment, batch["input_segments"][row] == segment
        alone = FORWARD(params, batch["inputs"][row, into][None], batch["tokens"][row, out][None])
        np.testing.assert_allclose(hidden[row, out], alone[0], atol=2e-5)


def test_a_token_depends_on_its_own_inputs_and_on_no_later_token(params):
    inputs, tokens = ids(0, (1, 5)), ids(1, (1, 4))

    def loss(shift_S, shift_T, t):
        # Tokens are integers: their embeddings' gradients stand for theirs.
        table = params["embed"]["table"]
        wide = jnp.concatenate([table, table[inputs[0]] + shift_S, table[tokens[0]] + shift_T])
        cfg = dataclasses.replace(CFG, vocab_size=31 + 9)
        own = {**params, "embed": {"table": wide}}
        hidden, _ = ed.apply(cfg, own, 31 + jnp.arange(5)[None], 36 + jnp.arange(4)[None])
        return jnp.sum(hidden[0, t] * jnp.arange(16))

    gradients = jax.jit(jax.grad(loss, (0, 1)))
    for t in range(4):
        by_input, by_token = gradients(jnp.zeros((5, 16)), jnp.zeros((4, 16)), t)
        assert (np.abs(by_input).max(1) > 1e-6).all()
        seen = np.abs(by_token).max(1)
        assert seen[t] > 1e-6
        assert (seen[t + 1 :] == 0).all()


def test_steps_through_the_caches_are_the_forward_pass(params):
    inputs, tokens = ids(0, (2, S)), ids(1, (2, T))
    segments = np.ones((2, S), np.int32)
    segments[1, 6:] = 0
    forward = jax.jit(lambda p, *rows: ed.apply(CFG, p, *rows, input_segments_BS=segments)[0])
    want = forward(params, inputs, tokens)
    memory = jax.jit(lambda p: ed.encode(CFG, p, inputs, segments_BS=segments)[0])(params)
    cache = tf.init_cache(CFG, 2, T, S)
    assert {x.shape[-3] for x in jax.tree.leaves(cache) if x.ndim >= 4} == {S, T, 3}
    given = dict(memory_BSD=memory, memory_segments_BS=segments)
    hidden, cache = jax.jit(lambda c: tf.apply(CFG, params, tokens[:, :3], cache=c, **given)[:2])(cache)
    parts = [hidden]
    broken = jax.tree.map(lambda x: x, params)
    for name in ("wk", "wv"):  # not read again: the cache has what they made
        for block in broken["blocks"].values():
            block["cross_attention"][name] = block["cross_attention"][name] * jnp.nan
        broken["tail"]["0"]["cross_attention"][name] = jnp.nan * broken["tail"]["0"]["cross_attention"][name]
    step = jax.jit(lambda t, p, c: tf.apply(CFG, broken, t, positions_BT=p, cache=c)[:2])
    for t in range(3, T):
        hidden, cache = step(tokens[:, t : t + 1], np.full((2, 1), t, np.int32), cache)
        parts.append(hidden)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), want, atol=2e-5)


@pytest.mark.slow
def test_scan_loop_and_remat_are_the_same_training_step():
    batch, key = packed(), jax.random.key(3)
    attention = dataclasses.replace(CFG.attention, pattern=("local",))
    cfg = dataclasses.replace(CFG, dropout=0.2, num_layers=2, attention=attention)
    params, found = params_of(cfg), []
    for changes in ({}, {"scan": False}, {"remat": "full"}):
        objective = make_lm_objective(Model(dataclasses.replace(cfg, **changes)), LossConfig(chunk=3))
        step = jax.jit(jax.value_and_grad(lambda p, f=objective: f(p, batch, key)[0])).trace(params)
        # Both stacks have two layers; the loss takes three chunks, and tells its parts apart by no remat.
        assert ("length=2" in str(step.jaxpr)) == ("scan" not in changes)
        assert ("remat" in str(step.jaxpr)) == ("remat" in changes)
        found.append(step.lower().compile()(params))
    for loss, grads in found[1:]:
        np.testing.assert_allclose(loss, found[0][0], rtol=1e-6)
        for (name, a), (_, b) in zip(named_leaves(grads), named_leaves(found[0][1]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max() + 1e-7, err_msg=name)
            assert np.abs(b).max() > 0, name


@pytest.mark.slow
def test_the_table_is_shared_unless_the_encoder_has_a_vocabulary():
    shared = dict(named_leaves(tf.abstract_params(CFG)))
    cfg = dataclasses.replace(CFG, encoder=dataclasses.replace(CFG.encoder, vocab_size=57))
    split = dict(named_leaves(tf.abstract_params(cfg)))
    assert split.keys() - shared.keys() == {"encoder/embed/table"}
    assert split["encoder/embed/table"].shape == (57, 16)
    assert split["encoder/position_bias/table"].shape == (8, 2)
    alone = jax.jit(lambda: tf.init(dataclasses.replace(CFG, encoder=EncoderConfig()), jax.random.key(0)))()
    own = dict(named_leaves(jax.jit(lambda: tf.init(CFG, jax.random.key(0)))()))
    for name, leaf in named_leaves(alone):  # an encoder changes no leaf of the decoder
        np.testing.assert_array_equal(leaf, own[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"causal": False}, r"model.causal=False with model.encoder.num_layers=2"),
        ({"parallel_block": True}, r"needs parallel_block=False"),
        (
            {"encoder": EncoderConfig(num_layers=2, num_heads=3)},
            r"encoder cannot have model\.encoder\.num_layers=2, num_heads=3: .*num_kv_heads=2 must divide",
        ),
        (
            {"attention": AttentionConfig(), "encoder": EncoderConfig(num_layers=2, num_heads=5)},
            r"encoder cannot have model\.encoder\.num_layers=2, num_heads=5: .*model_dim=16 is not divisible",
        ),
        (
            {"shared_layers": 3, "attention": AttentionConfig(), "encoder": EncoderConfig(num_layers=4)},
            r"encoder cannot have model\.encoder\.num_layers=4: .*shared_layers=3",
        ),
        (
            {"position": PositionConfig(), "encoder": EncoderConfig(num_layers=2, num_heads=2, head_dim=5)},
            r"encoder cannot have model\.encoder\.num_layers=2, num_heads=2, head_dim=5: .*",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CFG, **changes)


def test_sizes_without_an_encoder_and_a_decoder_without_inputs_are_refused(params):
    with pytest.raises(UserError, match=r"encoder.mlp_dim=8 without an encoder"):
        EncoderConfig(mlp_dim=8)
    with pytest.raises(UserError, match="needs inputs to attend to"):
        tf.apply(CFG, params, ids(0, (1, 4)))
    with pytest.raises(UserError, match="needs batches with inputs"):
        Model(CFG).apply(params, {"tokens": None, "segments": None, "positions": None}, None)
    assert encoder_of(CFG).attention.num_heads == 2


@pytest.mark.slow
def test_texts_depend_on_their_own_inputs_and_greedy_ones_are_the_forward_pass(params):
    generator = Generator(decoder(CFG), eos_ids=())
    inputs, prompts = [[5, 7, 2, 9, 9, 1, 4], [3, 8], [30]], [[1], [1, 6, 6], [1]]
    greedy = SampleConfig(max_new_tokens=6, temperature=0.0)
    together = generator.generate(params, prompts, greedy, inputs)
    for result, prompt, read in zip(together, prompts, inputs, strict=True):
        assert generator.generate(params, [prompt], greedy, [read])[0].tokens == result.tokens
        text = np.array([prompt + result.tokens])
        best = np.argmax(tf.unembed(CFG, params, FORWARD(params, np.array([read]), text))[0], axis=-1)
        assert best[len(prompt) - 1 : -1].tolist() == result.tokens
    other = generator.generate(params, prompts[:1], greedy, [[6, 6, 6]])
    assert other[0].tokens != together[0].tokens
    drawn = SampleConfig(max_new_tokens=6, seed=3)
    pair = [generator.generate(params, prompts, drawn, inputs) for _ in range(2)]
    assert [r.tokens for r in pair[0]] == [r.tokens for r in pair[1]] != [r.tokens for r in together]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, "with an encoder takes inputs"),
        ([[1], [2]], "1 prompts, but inputs for 2"),
        ([[]], "input 0 is empty"),
        ([[31]], "input 0 holds 31, outside the vocabulary"),
    ],
)
def test_inputs_that_cannot_be_are_refused(params, inputs, message):
    with pytest.raises(UserError, match=message):
        Generator(decoder(CFG)).generate(params, [[1]], SampleConfig(), inputs)


def test_stages_of_a_pipeline_are_refused(params):
    layout = make_layout(MeshConfig(data=1, pipe=3), make_mesh(MeshConfig(data=1, pipe=3), jax.devices()[:3]))
    with use(layout), pytest.raises(UserError, match=r"mesh.pipe=3: .* use mesh.fsdp or mesh.tensor"):
        ed.apply(
            dataclasses.replace(CFG, attention=AttentionConfig()), params, ids(0, (1, 4)), ids(0, (1, 4))
        )
