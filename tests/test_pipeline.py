"""A pipelined stack equals a scanned one: values, per-layer sums and every gradient leaf, in float32."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.model import transformer as tf
from jaxlm.model.attention import AttentionConfig
from jaxlm.model.moe import MoEConfig
from jaxlm.model.positions import PositionConfig
from jaxlm.pipeline import bubble_fraction, run_layers
from jaxlm.sharding import MeshConfig, make_layout, tree_shardings, use
from jaxlm.tree import named_leaves

B, T, V, D = 8, 16, 32, 16

DENSE = tf.TransformerConfig(
    vocab_size=V,
    num_layers=4,
    model_dim=D,
    mlp_dim=32,
    init_std=0.0,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
)
MODELS = {
    "dense": DENSE,
    "mixed": dataclasses.replace(  # two periods of two layers, a tail of one, experts and a learned bias
        DENSE,
        num_layers=5,
        attention=dataclasses.replace(DENSE.attention, pattern=("local", "global"), window=5),
        mlp_pattern=("dense", "moe"),
        moe=MoEConfig(num_experts=4, expert_dim=16, router="sigmoid", bias_balancing=True),
        position=PositionConfig(kind="t5"),
        remat="full",
    ),
}


def batch(B=B, T=T):
    rng = np.random.default_rng(0)
    segments = np.ones((B, T), np.int32)
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    for row in range(B):  # every row its own documents, so that a row with another's context is seen
        segments[row, 3 + row :], positions[row, 3 + row :] = 2, np.arange(T - 3 - row)
    segments[5:, 14:] = 0
    return jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32), jnp.asarray(segments), jnp.asarray(positions)


def values(cfg, mesh, key=None, shape=(B, T)):
    """(hidden states, auxiliary values, gradients), and the program."""
    layout = make_layout(mesh)

    def loss(params, tokens, segments, positions):
        hidden, _, aux = tf.apply(cfg, params, tokens, segments_BT=segments, positions_BT=positions, key=key)
        probe = jnp.sin(jnp.arange(hidden.size, dtype=jnp.float32)).reshape(hidden.shape)
        real = jnp.where(segments[..., None] != 0, hidden * probe, 0)
        return real.sum() + aux.get("loss", 0.0), (hidden, aux)

    with use(layout):
        shardings = tree_shardings(layout, tf.abstract_params(cfg), tf.AXES)
        params = jax.jit(partial(tf.init, cfg), out_shardings=shardings)(jax.random.key(0))
        rows = [jax.device_put(x, layout.sharding(("batch", "length"))) for x in batch(*shape)]
        step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, *rows).compile()
        (_, (hidden, aux)), grads = step(params, *rows)
    return jax.device_get((hidden, aux, grads)), step.as_text(), params


_scanned = {}


def assert_equal(name, mesh, shape=(B, T)):
    cfg = MODELS[name]
    if name not in _scanned:
        _scanned[name] = values(cfg, MeshConfig(data=1), shape=shape)[:2]
    (want, want_aux, want_grads), plain = _scanned[name]
    (got, aux, grads), program, params = values(cfg, mesh, shape=shape)
    assert "collective-permute" in program
    assert "collective-permute" not in plain
    wq = params["blocks"]["0"]["attention"]["wq"]
    assert wq.addressable_shards[0].data.shape[0] == wq.shape[0] // mesh.pipe
    real = np.asarray(batch(*shape)[1]) != 0
    np.testing.assert_allclose(got[real], want[real], rtol=2e-5, atol=2e-5)
    for leaf, a in named_leaves(want_aux):
        np.testing.assert_allclose(dict(named_leaves(aux))[leaf], a, rtol=1e-5, err_msg=leaf)
    for (leaf, a), (_, b) in zip(named_leaves(grads), named_leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * np.abs(b).max() + 1e-9, err_msg=leaf)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("mixed", MeshConfig(data=2, pipe=2, tensor=2)),
        ("dense", MeshConfig(data=1, pipe=2, pipe_repeats=2, pipe_microbatches=4)),
        pytest.param("dense", MeshConfig(data=1, pipe=4, fsdp=2), marks=pytest.mark.slow),
        pytest.param("dense", MeshConfig(data=1, pipe=2, pipe_repeats=2), marks=pytest.mark.slow),
        pytest.param("dense", MeshConfig(data=1, pipe=2, pipe_microbatches=8), marks=pytest.mark.slow),
        pytest.param("mixed", MeshConfig(data=1, pipe=2, fsdp=2, expert=2), marks=pytest.mark.slow),
    ],
)
def test_a_pipeline_equals_a_scan_in_values_sums_and_every_gradient_leaf(name, mesh):
    assert_equal(name, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("context", ["gather", "ulysses"])
def test_a_kernel_sees_its_part_of_the_columns_inside_a_stage(context):
    attention = dataclasses.replace(DENSE.attention, backend="splash_interpret", context=context)
    MODELS[context] = dataclasses.replace(DENSE, num_layers=2, attention=attention)
    assert_equal(context, MeshConfig(data=1, pipe=2, sequence=2), shape=(2, 256))


def test_dropout_is_drawn_for_every_microbatch_and_layer():
    """Four microbatches through two stages are four batches run one by one, each with its own key."""
    cfg = dataclasses.replace(DENSE, dropout=0.5, position=PositionConfig(kind="none"))
    layout = make_layout(MeshConfig(data=1, pipe=2, pipe_microbatches=4))
    params = jax.jit(partial(tf.init, cfg))(jax.random.key(0))
    tokens, segments, positions = batch()
    key = jax.random.key(7)
    apply = partial(tf.apply, cfg, segments_BT=segments, positions_BT=positions, key=key)
    with use(layout):
        got = jax.device_get(jax.jit(lambda p: apply(p, tokens)[0])(params))
    stream = jax.random.split(key)[1]
    masks = {}
    for part in range(4):
        home, slot = divmod(part, 2)  # stage s starts with rows 4 s to 4 s + 3, every other one together
        masks[part] = np.arange(B).reshape(2, 2, 2)[home, :, slot], jax.random.fold_in(stream, part)
    whole = jax.random.split(key)[0]
    kept = jax.random.bernoulli(whole, 0.5, (B, T, D))
    embedded = jnp.where(kept, 2 * tf.embed(cfg, params, tokens, positions), 0)
    blocks = tf.blocks_of(cfg)
    for rows, part_key in masks.values():
        x, ctx = embedded[rows], tf.make_context(cfg, positions[rows], segments[rows], None, None)
        for i in range(cfg.num_layers):
            layer = jax.tree.map(lambda a, i=i: a[i], params["blocks"]["0"])
            layer_key = jax.random.fold_in(part_key, i)
            x = blocks[0].apply({"params": layer}, x, ctx, None, layer_key)[0]
        x = tf.last_norm(cfg, params, x)
        real = np.asarray(segments[rows]) != 0
        np.testing.assert_allclose(got[rows][real], np.asarray(x)[real], rtol=2e-5, atol=2e-5)


def test_a_cache_is_read_and_written_under_a_pipeline_too():
    layout = make_layout(MeshConfig(data=1, pipe=2))
    params = jax.jit(partial(tf.init, DENSE))(jax.random.key(0))
    tokens = batch()[0]
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))

    def decode(params):
        cache = tf.init_cache(DENSE, B, T)
        first, cache, _ = tf.apply(DENSE, params, tokens[:, :9], positions_BT=positions[:, :9], cache=cache)
        rest, _, _ = tf.apply(DENSE, params, tokens[:, 9:], positions_BT=positions[:, 9:], cache=cache)
        return jnp.concatenate([first, rest], axis=1)

    want = jax.jit(lambda p: tf.apply(DENSE, p, tokens)[0])(params)
    with use(layout):
        shardings = tree_shardings(layout, tf.abstract_params(DENSE), tf.AXES)
        got = jax.jit(decode)(jax.device_put(params, shardings))
    np.testing.assert_allclose(jax.device_get(got), want, rtol=2e-5, atol=2e-5)


def test_what_cannot_be_split_is_refused_with_what_can():
    with pytest.raises(UserError, match=r"pipe_microbatches=3 is not a multiple of mesh.pipe=2; .*: 4"):
        make_layout(MeshConfig(data=1, pipe=2, pipe_microbatches=3))
    with pytest.raises(UserError, match="pipe_repeats=0 must be at least 1"):
        MeshConfig(pipe_repeats=0)

    def run(layers, **mesh):
        w_LD = jnp.ones((layers, 4))
        make = lambda rows, shared, part: lambda w, x, _: (x * w, None)  # noqa: E731
        with use(make_layout(MeshConfig(data=1, **mesh))):
            return run_layers(make, w_LD, jnp.ones((8, 4)), None, ())

    with pytest.raises(UserError, match=r"6 scanned layers .* possible: mesh.pipe_repeats=1 or 3"):
        run(6, pipe=2, pipe_repeats=2)
    with pytest.raises(UserError, match=r"3 scanned layers .* possible: mesh.pipe in \[3\]"):
        run(3, pipe=2)
    with pytest.raises(UserError, match=r"8 rows .* 6 micro.* x 2 mesh devices; .*microbatches=2 or 4, or a"):
        run(4, pipe=2, pipe_microbatches=6, fsdp=2)


def test_the_bubble_is_counted_in_ticks():
    """Stage s works from tick s to tick s + R M - 1; the rest of the R M + S - 1 ticks it waits."""
    for stages, parts, repeats in ((2, 2, 1), (4, 8, 1), (4, 4, 3)):
        ticks = range(repeats * parts + stages - 1)
        idle = [t for s in range(stages) for t in ticks if not 0 <= t - s < repeats * parts]
        assert bubble_fraction(stages, parts, repeats) == pytest.approx(len(idle) / len(ticks) / stages)
