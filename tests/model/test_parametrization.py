"""Multipliers by role: each against the same thing done by hand on the standard model."""

import dataclasses
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.model import transformer as tf
from jaxlm.model.activations import activations
from jaxlm.model.attention import AttentionConfig, LatentConfig
from jaxlm.model.axes import AXES
from jaxlm.model.config import EncoderConfig, ReadoutConfig
from jaxlm.model.convolution import ConvolutionConfig
from jaxlm.model.disentangled import DisentangledConfig
from jaxlm.model.moe import MoEConfig
from jaxlm.model.parametrization import LEAVES, attention_config, optimizer_options, rules
from jaxlm.model.positions import PositionConfig
from jaxlm.optim import OPTIMIZERS, OptimConfig, is_decayed, make_optimizer, takes_muon
from jaxlm.transforms import matrix_axes
from jaxlm.tree import map_named, named_leaves

V, T = 31, 8
BASE = tf.TransformerConfig(
    vocab_size=V,
    num_layers=2,
    model_dim=16,
    mlp_dim=32,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
)
MOE = MoEConfig(num_experts=4, expert_dim=16, shared_experts=1, bias_balancing=True)
RICH = dataclasses.replace(
    BASE,
    num_layers=3,
    mlp_pattern=("dense", "moe"),
    moe=MOE,
    mlp_bias=True,
    norm="layernorm",
    position=PositionConfig(kind="learned", max_length=T),
    attention=dataclasses.replace(BASE.attention, qk_norm=True, sinks=True, qkv_bias=True, out_bias=True),
)
T5 = dataclasses.replace(
    BASE, position=PositionConfig(kind="t5"), norm_position="sandwich", tie_embeddings=True
)
TOKENS = np.random.default_rng(0).integers(0, V, (2, T))


def wider(cfg, times, kind="mup", **fields):
    """More heads of the same size, and a wider MLP; `cfg` is the base."""
    a = cfg.attention
    attention = dataclasses.replace(a, num_heads=times * a.num_heads, num_kv_heads=times * a.num_kv_heads)
    sizes = dict(model_dim=times * cfg.model_dim, mlp_dim=times * cfg.mlp_dim, attention=attention)
    base = dict(base_width=cfg.model_dim, base_depth=cfg.num_layers)
    return dataclasses.replace(cfg, parametrization=kind, **{**sizes, **base, **fields})


@pytest.fixture(scope="module")
def params_of():
    made = {}

    def get(cfg):
        if cfg not in made:
            made[cfg] = jax.jit(partial(tf.init, cfg))(jax.random.key(1))
        return made[cfg]

    return get


@partial(jax.jit, static_argnums=0)
def logits_of(cfg, params):
    hidden, _, _ = tf.apply(cfg, params, TOKENS)
    return tf.unembed(cfg, params, hidden)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# Models that together have every leaf there is.
READER = dataclasses.replace(
    RICH,
    num_layers=1,
    embed_dim=12,
    embed_norm=True,
    head_bias=True,
    head_transform=True,
    token_types=2,
    causal=False,
    norm_position="sandwich",
    mlp_pattern=("dense",),
    moe=MoEConfig(),
    attention=AttentionConfig(num_heads=2, qkv_bias=True),
    disentangled=DisentangledConfig(span=4, shared=False, norm=True),
    convolution=ConvolutionConfig(3),
    readout=ReadoutConfig(classes=3, dense="tanh"),
)
PAIR = dataclasses.replace(
    RICH,
    num_layers=1,
    mlp_pattern=("dense",),
    moe=MoEConfig(),
    norm_position="sandwich",
    position=PositionConfig(kind="t5"),
    attention=dataclasses.replace(RICH.attention, qk_norm_kind="layernorm"),
    encoder=EncoderConfig(num_layers=1, vocab_size=37),
)
LATENT = dataclasses.replace(
    BASE,
    num_layers=3,
    first_dense=1,
    mlp_pattern=("moe",),
    moe=dataclasses.replace(MOE, bias=True, shared_gate=True),
    attention=AttentionConfig(
        num_heads=2,
        qkv_bias=True,
        latent=LatentConfig(kv_rank=6, q_rank=5, nope_dim=4, rope_dim=4, value_dim=3),
    ),
)
# Leaf -> axes, from the right, of its matrices' rows and columns; by hand, not by the code under test.
IN, OUT, PLAIN = ((-3,), (-2, -1)), ((-3, -2), (-1,)), ((-2,), (-1,))
WHOLE = {
    "embedding": dict.fromkeys(("embed/table", "embed/positions", "embed/types"), PLAIN),
    "hidden": {
        **{f"{kind}attention/w{name}": IN for name in "qkv" for kind in ("", "cross_")},
        **dict.fromkeys(("attention/wo", "cross_attention/wo"), OUT),
        **{f"attention/w{name}": IN for name in ("q_rel", "k_rel", "q_up", "k_up", "v_up")},
        **{f"attention/w{name}_down": PLAIN for name in ("q", "kv")},
        **{f"{kind}/w_{name}": PLAIN for name in ("up", "gate", "down") for kind in ("mlp", "moe")},
        **{f"moe/shared_w_{name}": PLAIN for name in ("up", "gate", "down")},
        **{f"{name}/w": PLAIN for name in ("transform", "pooler", "projection", "convolution")},
    },
    "head": dict.fromkeys(("head/w", "classifier/w"), PLAIN),
    "router": dict.fromkeys(("moe/router_w", "moe/shared_gate"), PLAIN),
}


def test_every_leaf_has_one_role_and_is_decayed_and_orthogonalised_by_it():
    cfg, seen = OptimConfig(name="muon"), set()
    by_hand = {leaf: (role, axes) for role, leaves in WHOLE.items() for leaf, axes in leaves.items()}
    for model in (RICH, READER, PAIR, LATENT):
        for name, leaf in named_leaves(tf.abstract_params(model)):
            found = [role for role, pattern in LEAVES.items() if re.search(pattern, name)]
            last = "/".join(name.split("/")[-2:])
            seen.add(last)
            # What is no matrix is a vector, but for biases of heads and of those that balance experts.
            other = {"head/b": ["head"], "classifier/b": ["head"], "moe/router_bias": []}
            role, axes = by_hand.get(last, (None, None))
            assert found == ([role] if role else other.get(last, ["vector"])), name
            assert matrix_axes(name, leaf.ndim) == axes, name
            assert is_decayed(cfg, name, leaf.ndim) == (axes is not None), name
            assert takes_muon(cfg, name, leaf.ndim) == (role == "hidden"), name
    # No model has the bias: the norm of keys and values has none.
    assert seen == set(AXES) - {"kv_norm/bias"}


FAN_IN = dict(init_std=0.0, scale_embeddings=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cfg", "kind"),
    [
        pytest.param(RICH, "completep", id="rich"),
        pytest.param(dataclasses.replace(T5, **FAN_IN), "mup", id="t5-fan_in"),
        pytest.param(RICH, "mup", id="rich-mup", marks=pytest.mark.slow),
        pytest.param(T5, "completep", id="t5-completep", marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(BASE, **FAN_IN), "completep", id="base", marks=pytest.mark.slow),
    ],
)
def test_the_base_model_is_the_standard_one_to_the_bit(cfg, kind, params_of):
    same = wider(cfg, 1, kind)
    assert same != cfg
    assert bits(params_of(same)) == bits(params_of(cfg))
    assert bits(logits_of(same, params_of(cfg))) == bits(logits_of(cfg, params_of(cfg)))
    for name in OPTIMIZERS:
        if (kind, name) != ("completep", "sgd"):
            assert not any(optimizer_options(same, OptimConfig(name=name)).values())


@pytest.mark.slow
@pytest.mark.parametrize("init_std", [0.02, 0.0])
def test_initial_sizes(init_std, params_of):
    m = 4
    small, wide = (dataclasses.replace(RICH, init_std=init_std, model_dim=d, mlp_dim=d) for d in (32, 128))
    wide = dataclasses.replace(wide, parametrization="mup", base_width=32)
    sizes = [
        {name: np.asarray(leaf).std() for name, leaf in named_leaves(params_of(cfg))} for cfg in (small, wide)
    ]
    drawn = [name for name, std in sizes[0].items() if std > 0]
    assert len(drawn) > 20
    for name in drawn:
        hidden = re.search(LEAVES["hidden"], name)
        # Attention's output and the experts have a fixed fan in here, and an expert's is no multiple of D.
        if (
            init_std == 0.0
            and hidden
            and not re.search("w[qkv]$|mlp/w|moe/w_(up|gate)|shared_w_(up|gate)", name)
        ):
            continue
        factor = m**-0.5 if hidden else 1.0
        assert sizes[1][name] == pytest.approx(factor * sizes[0][name], rel=0.15), name


def test_logits_are_divided_by_the_width_ratio(params_of):
    for tied in (False, True):
        wide = dataclasses.replace(wider(BASE, 2), tie_embeddings=tied)
        plain = dataclasses.replace(wide, parametrization="standard")
        params = params_of(plain)
        np.testing.assert_allclose(logits_of(wide, params), logits_of(plain, params) / 2, rtol=1e-5)


def test_scores_fall_with_the_head_dim_and_agree_at_the_bases(params_of):
    scale = lambda **fields: (  # noqa: E731
        attention_config(
            dataclasses.replace(
                BASE,
                parametrization="mup",
                base_width=16,
                attention=AttentionConfig(**{"num_heads": 2, **fields.pop("attention", {})}),
                **fields,
            )
        ).scale
    )
    assert scale() == 0.0  # the standard one, 8 ** -0.5
    assert scale(model_dim=64, base_head_dim=8) == pytest.approx(8**-0.5 * 8 / 32)
    assert scale(model_dim=128, base_head_dim=8) == pytest.approx(8**-0.5 * 8 / 64)
    assert scale(model_dim=64, attention={"num_heads": 8, "head_dim": 8}) == 0.0
    assert scale(model_dim=64, base_head_dim=8, attention={"scale": 0.5}) == pytest.approx(0.5 / 4)
    wide = dataclasses.replace(wider(BASE, 1), base_head_dim=4)
    plain = dataclasses.replace(BASE, attention=dataclasses.replace(BASE.attention, scale=4**0.5 / 8))
    params = params_of(BASE)
    assert bits(logits_of(wide, params)) == bits(logits_of(plain, params))
    assert bits(logits_of(wide, params)) != bits(logits_of(BASE, params))


@pytest.mark.parametrize(
    "position", ["sandwich", *(pytest.param(p, marks=pytest.mark.slow) for p in ("pre", "parallel"))]
)
def test_residual_branches_are_divided_by_the_depth_ratio(position, params_of):
    fields = dict(parallel_block=True) if position == "parallel" else dict(norm_position=position)
    plain = dataclasses.replace(BASE, num_layers=4, **fields)
    deep = dataclasses.replace(plain, parametrization="completep", base_width=16, base_depth=2)
    params = params_of(plain)
    last = r"post_norm/scale$" if position == "sandwich" else r"/(wo|w_down)$"
    halved = map_named(lambda name, p: p / 2 if re.search(last, name) else p, params)
    got, wanted = logits_of(deep, params), logits_of(plain, halved)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    assert not np.allclose(got, logits_of(plain, params), rtol=1e-3)
    # The base's depth, not the model's own, sets how small output projections start.
    stds = [np.asarray(params_of(cfg)["blocks"]["0"]["attention"]["wo"]).std() for cfg in (deep, plain)]
    assert stds[0] / stds[1] == pytest.approx(2**0.5, rel=1e-5)


def test_a_router_is_a_head(params_of):
    wide = dataclasses.replace(
        wider(dataclasses.replace(RICH, moe=dataclasses.replace(MOE, bias_balancing=False)), 2),
        mlp_pattern=("moe",),
        num_layers=1,
    )
    plain = dataclasses.replace(wide, parametrization="standard")
    params = params_of(wide)
    halved = map_named(lambda name, p: p / 2 if re.search("router_w$|head/", name) else p, params)
    np.testing.assert_allclose(logits_of(wide, params), logits_of(plain, halved), rtol=1e-4, atol=1e-6)


def test_scaled_embeddings_keep_the_bases_scale(params_of):
    for cfg in (dataclasses.replace(BASE, scale_embeddings=True), BASE):
        wide = wider(cfg, 4)
        x = tf.embed(wide, params_of(wide), TOKENS, None)
        scale = 4.0 if cfg.scale_embeddings else 1.0
        np.testing.assert_allclose(x, scale * params_of(wide)["embed"]["table"][TOKENS], rtol=1e-6)


# One leaf of each role, in and outside the blocks.
LEAF = {
    "embedding": ("embed", "table"),
    "hidden": ("blocks", "attention", "wq"),
    "vector": ("blocks", "attention_norm", "scale"),
    "head": ("head", "w"),
    "router": ("blocks", "moe", "router_w"),
    "last": ("final_norm", "scale"),
}


def leaves(value):
    """A tree with those leaves, and `value(role)` in each."""
    tree = {}
    for role, (*path, last) in LEAF.items():
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value(role)
    return tree


def moved(optim, grads, **options):
    """How far each role's leaf goes in two updates from a matrix of random numbers."""
    params = leaves(lambda role: np.random.default_rng(1).normal(size=(1, 6, 6)).astype(np.float32))
    optimizer = make_optimizer(optim, lambda _: 0.01, **options)

    @jax.jit
    def run(params, grads):
        state, now = optimizer.init(params), params
        for _ in range(2):
            updates, state = optimizer.update(grads, state, now)
            now = jax.tree.map(jnp.add, now, updates)
        return jax.tree.map(jnp.subtract, now, params)

    end = dict(named_leaves(run(params, grads)))
    return {role: end["/".join(path)] for role, path in LEAF.items()}


# What each role's learning rate is multiplied by at m = 4: hidden, all others.
RATES = {"adamw": (1 / 4, 1), "lion": (1 / 4, 1), "adafactor": (1 / 4, 1), "sgd": (1, 4), "muon": (1 / 2, 1)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rates_by_role(name):
    wide = wider(RICH, 4)
    grads = leaves(lambda role: np.random.default_rng(len(role)).normal(size=(1, 6, 6)).astype(np.float32))
    optim = OptimConfig(name=name, weight_decay=0.0, clip_norm=0.0)
    options = optimizer_options(wide, optim)
    assert not options["decay_multipliers"]
    assert "eps_multipliers" not in options
    got, plain = moved(optim, grads, **options), moved(optim, grads)
    for role in LEAF:
        factor = RATES[name][role != "hidden"]
        np.testing.assert_allclose(got[role], factor * plain[role], rtol=2e-3, atol=1e-5, err_msg=role)
    if name == "muon":
        assert rules(wide)["hidden"].lr == 1 / 4  # the table's is AdamW's
        assert not optimizer_options(wide, OptimConfig(name=name, muon_rms=0.0))["multipliers"]


def test_completep_keeps_the_decay_per_step_and_scales_epsilon():
    wide = wider(RICH, 4, "completep", base_depth=1)  # of three layers
    zeros = leaves(lambda role: np.zeros((1, 6, 6), np.float32))
    optim = OptimConfig(weight_decay=0.5, clip_norm=0.0)
    options = optimizer_options(wide, optim)
    got, plain = moved(optim, zeros, **options), moved(optim, zeros)
    assert np.abs(got["hidden"]).max() > 0
    for role in LEAF:
        np.testing.assert_allclose(got[role], plain[role], rtol=1e-5, atol=1e-7, err_msg=role)

    # With gradients far below epsilon an update is lr g / eps, so that it tells epsilon's factor.
    optim = OptimConfig(weight_decay=0.0, clip_norm=0.0, eps=1.0)
    grads = leaves(lambda role: np.full((1, 6, 6), 1e-2, np.float32))
    got, plain = moved(optim, grads, **options), moved(optim, grads)
    for role in LEAF:
        eps = 1 / 12 if LEAF[role][0] == "blocks" else 1 / 4
        factor = (1 / 4 if role == "hidden" else 1) / eps
        np.testing.assert_allclose(np.mean(got[role] / plain[role]), factor, rtol=0.1, err_msg=role)


def test_refusals():
    replace = partial(dataclasses.replace, BASE)
    with pytest.raises(UserError, match="did you mean 'mup'"):
        replace(parametrization="mop")
    with pytest.raises(UserError, match=r"needs model\.base_width.*this one's is 16"):
        replace(parametrization="mup")
    with pytest.raises(UserError, match=r"needs model\.base_depth.*this one's is 2"):
        replace(parametrization="completep", base_width=16)
    with pytest.raises(UserError, match=r"attention\.head_dim=16 if .* model\.base_head_dim=8 if"):
        replace(parametrization="mup", base_width=16, model_dim=32, attention=AttentionConfig(num_heads=2))
    for kind in ("mup", "completep"):
        with pytest.raises(UserError, match=rf"'{kind}' has no rule for model\.embed_dim=8"):
            wider(BASE, 2, kind, embed_dim=8)
    complete = wider(BASE, 2, "completep")
    with pytest.raises(UserError, match=r"no rule for optim\.name='sgd'"):
        optimizer_options(complete, OptimConfig(name="sgd"))
    with pytest.raises(UserError, match="parameter_scale"):
        optimizer_options(complete, OptimConfig(name="adafactor", parameter_scale=True))
    for skip in ("embed/", r"(^|/)(embed|head)/|router_w$|attention/wq"):
        with pytest.raises(UserError, match="muon_skip"):
            optimizer_options(complete, OptimConfig(name="muon", muon_skip=skip))
    before = OptimConfig(name="muon", muon_skip=r"(^|/)(embed|head)/|(^|/)router_w$")
    optimizer_options(complete, before)
    for fields in (
        dict(readout=ReadoutConfig(classes=2)),
        dict(mlp_pattern=("moe",), moe=dataclasses.replace(MOE, shared_gate=True)),
    ):
        with pytest.raises(UserError, match="heads, router and shared_gate"):
            optimizer_options(dataclasses.replace(complete, **fields), before)
    assert optimizer_options(BASE, SimpleNamespace()) == {}


@pytest.mark.parametrize("cfg", [BASE, RICH], ids=["base", "rich"])
def test_activations_are_those_of_the_model(cfg, params_of):
    cfg = wider(cfg, 2, "completep", base_depth=1)
    params = params_of(cfg)
    seen = jax.device_get(jax.jit(partial(activations, cfg))(params, TOKENS))
    np.testing.assert_allclose(seen["logits"], logits_of(cfg, params), rtol=1e-4, atol=1e-5)
    stream = np.stack([seen["embedding"], *seen["residual"]])
    branches = (seen["attention"] + seen["mlp"]) / cfg.num_layers
    np.testing.assert_allclose(np.diff(stream, axis=0), branches, rtol=1e-4, atol=1e-6)


def test_activations_of_a_quantised_model_are_quantised(params_of):
    rounded, params = dataclasses.replace(BASE, quant="int8"), params_of(BASE)
    seen = jax.jit(partial(activations, rounded))(params, TOKENS)["logits"]
    want, plain = logits_of(rounded, params), logits_of(BASE, params)
    assert np.abs(seen - want).max() < 0.1 * np.abs(plain - want).max()
