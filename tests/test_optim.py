"""Optimizers against a few lines of numpy, a conformance suite over all of them, schedules in closed form."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.errors import UserError
from jaxlm.optim import (
    OPTIMIZERS,
    OptimConfig,
    ema_params,
    grad_norm,
    is_decayed,
    learning_rate,
    make_optimizer,
    make_schedule,
    nonfinite_counts,
)
from jaxlm.transforms import matrix_axes
from jaxlm.tree import map_named, named_leaves

# Two stacked layers (leading 2). Kept by hand, not derived from the code under test: the matrices in a leaf
# (inputs x outputs); the leaves that have one are those that decay.
SHAPES = {
    "embed/table": (12, 8),
    "blocks/0/attention/wq": (2, 8, 2, 4),
    "blocks/0/attention/wk": (2, 8, 1, 4),
    "blocks/0/attention/wo": (2, 2, 4, 8),
    "blocks/0/attention/bq": (2, 2, 4),
    "blocks/0/attention/q_norm/scale": (2, 4),
    "blocks/0/attention_norm/scale": (2, 8),
    "blocks/0/mlp/w_up": (2, 8, 6),
    "blocks/0/mlp/b_up": (2, 6),
    "blocks/0/moe/router_w": (2, 8, 3),
    "blocks/0/moe/router_bias": (2, 3),
    "blocks/0/moe/w_up": (2, 3, 8, 5),
    "final_norm/scale": (8,),
    "head/w": (8, 12),
}
MATRICES = {
    "embed/table": (12, 8),
    "blocks/0/attention/wq": (8, 8),
    "blocks/0/attention/wk": (8, 4),
    "blocks/0/attention/wo": (8, 8),
    "blocks/0/mlp/w_up": (8, 6),
    "blocks/0/moe/router_w": (8, 3),
    "blocks/0/moe/w_up": (8, 5),
    "head/w": (8, 12),
}
BY_ADAM = ("embed/table", "head/w", "blocks/0/moe/router_w")
# One leaf of each kind, for tests that need no more.
SMALL = {
    n: SHAPES[n]
    for n in (
        "embed/table",
        "blocks/0/attention/wq",
        "blocks/0/attention/bq",
        "blocks/0/moe/router_bias",
        "blocks/0/moe/w_up",
        "final_norm/scale",
    )
}
IDLE = 3  # the update of the conformance suite whose learning rate is 0
ROUTER_BIAS = "blocks/0/moe/router_bias"
WIDE = {"adafactor": {"factor_min": 4}}


def nest(flat: dict) -> dict:
    tree = {}
    for name, leaf in flat.items():
        *path, last = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def draw(seed: int, scale: float = 1.0, shapes=SMALL) -> dict:
    rng = np.random.default_rng(seed)
    return nest({n: jnp.asarray(scale * rng.normal(size=s), jnp.float32) for n, s in shapes.items()})


@functools.cache
def stepper(optimizer):
    """One compiled update for all tests that share an optimizer."""

    @jax.jit
    def step(params, state, g):
        updates, state = optimizer.update(g, state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(optimizer, params, grads):
    """Parameters and state after one update for each of `grads`."""
    state = optimizer.init(params)
    for g in grads:
        params, state = stepper(optimizer)(params, state, g)
    return params, state


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# --- Against numpy ---


def adam(m, state, t, b1=0.8, b2=0.9, eps=1e-8):
    state["mu"] = b1 * state.get("mu", 0) + (1 - b1) * m
    state["nu"] = b2 * state.get("nu", 0) + (1 - b2) * m * m
    return state["mu"] / (1 - b1**t) / (np.sqrt(state["nu"] / (1 - b2**t)) + eps)


def adamw_rule(name, g, p, state, t):
    return adam(g, state, t)


def lion_rule(name, g, p, state, t):
    mu = state.get("mu", 0 * g)
    state["mu"] = 0.9 * mu + 0.1 * g
    return np.sign(0.8 * mu + 0.2 * g)


def sgd_rule(name, g, p, state, t):
    state["trace"] = 0.7 * state.get("trace", 0) + g
    return state["trace"]


def adafactor_rule(name, g, p, state, t):
    b, square = 1 - t**-0.8, g * g + 1e-30
    if name in MATRICES and min(g.shape) >= 4:
        state["r"] = b * state.get("r", 0) + (1 - b) * square.mean(1)
        state["c"] = b * state.get("c", 0) + (1 - b) * square.mean(0)
        v = np.outer(state["r"], state["c"]) / state["r"].mean()
    else:
        v = state["v"] = b * state.get("v", 0) + (1 - b) * square
    u = g / np.sqrt(v)
    u = u / max(1.0, np.sqrt((u * u).mean()))
    return u * max(1e-3, np.sqrt((p * p).mean()))


def newton_schulz(x):
    x = x.T if (tall := x.shape[0] > x.shape[1]) else x
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


def muon_rule(name, g, p, state, t, b=0.7):
    if name in BY_ADAM or name not in MATRICES:
        return adam(g, state, t)
    mu = state["mu"] = b * state.get("mu", 0) + (1 - b) * g
    ahead = b * mu / (1 - b ** (t + 1)) + (1 - b) * g / (1 - b**t)
    return 0.2 * math.sqrt(max(g.shape)) * newton_schulz(ahead)


RULES = {
    "adamw": (adamw_rule, {}),
    "lion": (lion_rule, {"b2": 0.9}),
    "sgd": (sgd_rule, {}),
    "adafactor": (adafactor_rule, {"factor_min": 4, "parameter_scale": True}),
    "muon": (muon_rule, {}),
}


def numpy_run(rule, params, grads, lr, decay, clip, rate):
    """One matrix (or one layer's vector) at a time, in float64."""
    params = {name: np.array(leaf, np.float64) for name, leaf in named_leaves(params)}
    memory = {}
    for t, tree in enumerate(grads, start=1):
        g = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(tree)}
        norm = math.sqrt(sum((x * x).sum() for name, x in g.items() if name != ROUTER_BIAS))
        for name, p in params.items():
            if name == ROUTER_BIAS:
                p -= rate * np.sign(g[name])
                continue
            shape = MATRICES.get(name, p.shape[1:] if name.startswith("blocks") else p.shape)
            parts = p.reshape(-1, *shape)
            for i, (part, gradient) in enumerate(zip(parts, g[name].reshape(parts.shape), strict=True)):
                state = memory.setdefault((name, i), {})
                u = rule(name, gradient * min(1.0, clip / norm), part, state, t)
                part -= lr(t - 1) * (u + (decay if name in MATRICES else 0.0) * part)
    return params


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_equal_numpy(name):
    rule, options = RULES[name]
    cfg = OptimConfig(
        name=name, b1=0.8, **{"b2": 0.9, **options}, momentum=0.7, weight_decay=0.3, clip_norm=20.0,
        router_bias_rate=0.02,
    )  # fmt: skip
    params = draw(0, shapes=SHAPES)
    # Some gradients are above the clip norm and some below.
    grads = [draw(seed, scale, SHAPES) for seed, scale in ((1, 2.0), (2, 0.3), (3, 3.0), (4, 0.1))]
    norms = [float(optax.tree.norm(g)) for g in grads]
    assert min(norms) < 15 < 25 < max(norms)
    got, state = run(make_optimizer(cfg, lambda n: 0.1 / (1.0 + n)), params, grads)
    wanted = numpy_run(rule, params, grads, lambda n: 0.1 / (1 + n), 0.3, 20.0, 0.02)
    for leaf_name, leaf in named_leaves(got):
        np.testing.assert_allclose(leaf, wanted[leaf_name], rtol=2e-5, atol=2e-5, err_msg=leaf_name)
    without = [leaf for leaf_name, leaf in named_leaves(grads[-1]) if leaf_name != ROUTER_BIAS]
    np.testing.assert_allclose(grad_norm(state), optax.tree.norm(without), rtol=1e-6)
    np.testing.assert_allclose(learning_rate(state), 0.1 / 4, rtol=1e-6)


def test_muon_orthogonalises_each_layer_and_all_heads_together():
    cfg = OptimConfig(name="muon", weight_decay=0.0, clip_norm=0.0, muon_rms=0.0)
    names = ("blocks/0/attention/wq", "blocks/0/attention/wo", "blocks/0/moe/w_up", "embed/table")
    params, grads = (draw(seed, shapes={n: SHAPES[n] for n in names}) for seed in (0, 1))
    got, _ = run(make_optimizer(cfg, lambda n: 1.0), params, [grads])
    moved = dict(named_leaves(jax.tree.map(jnp.subtract, params, got)))
    for name in names[:3]:
        for matrix in moved[name].reshape(-1, *MATRICES[name]):
            singular = np.linalg.svd(matrix, compute_uv=False)
            assert 0.5 < singular.min() <= singular.max() < 1.5, name
    by_adam = np.linalg.svd(moved["embed/table"], compute_uv=False)
    assert by_adam.max() > 2.0  # the first step of AdamW is a matrix of signs


def test_adafactor_keeps_rows_and_columns_of_matrices_and_not_of_layers():
    shapes = {
        "blocks/0/attention/wq": (300, 160, 2, 80),
        "blocks/0/mlp/w_up": (300, 200, 4),
        "head/w": (128, 130),
    }
    params = nest({name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()})
    state = jax.eval_shape(make_optimizer(OptimConfig(name="adafactor"), lambda n: 0.1).init, params)
    kept = {name: leaf.shape for name, leaf in named_leaves(state) if leaf.ndim}
    assert sorted(kept.values()) == sorted(
        [(300, 160, 1, 1), (300, 1, 2, 80), (300, 200, 4), (128, 1), (1, 130)]
    ), kept


# --- Conformance ---


@functools.cache
def conforming(name: str, **changes) -> optax.GradientTransformation:
    options = {"ema": 0.5, "clip_norm": 0.0} | WIDE.get(name, {}) | changes
    return make_optimizer(OptimConfig(name=name, **options), lambda n: 0.02 * (n != IDLE))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_quadratic_decreases(name):
    target, params = draw(5), draw(6)
    optimizer = conforming(name, weight_decay=0.0, momentum=0.5)

    def loss(params):
        parts = jax.tree.map(lambda p, q: jnp.sum((p - q) ** 2), params, target)
        del parts["blocks"]["0"]["moe"]["router_bias"]  # moves by its own rule
        return sum(jax.tree.leaves(parts))

    @jax.jit
    def descend(params):
        def body(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(body, (params, optimizer.init(params)), length=120)[1]

    values = descend(params)
    assert values[-1] < 0.6 * values[0]
    assert (values[10::10] < values[:-10:10]).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_float32_and_named_and_shaped_after_parameters(name):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), draw(0))
    optimizer = conforming(name)
    before = optimizer.init(params)
    after, state = run(optimizer, params, [jax.tree.map(lambda p: p.astype(jnp.bfloat16), draw(1))])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(after))
    owned = 0
    for path, leaf in named_leaves(state):
        owners = [n for n in SMALL if path.endswith("/" + n)]
        if owners:
            assert leaf.dtype == jnp.float32, path
            assert leaf.ndim == len(SHAPES[owners[0]]), path
            assert all(a in (1, b) for a, b in zip(leaf.shape, SHAPES[owners[0]], strict=True)), path
            owned += 1
        else:
            assert leaf.size <= 3, path  # counts, rates, Newton-Schulz coefficients
    assert owned >= len(SMALL)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_runs_agree_to_the_bit(name):
    grads = [draw(1), draw(2)]
    assert bits(run(conforming(name), draw(0), grads)) == bits(run(conforming(name), draw(0), grads))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rate_zero_changes_no_parameter(name):
    params, state = run(conforming(name), draw(0), [draw(n) for n in range(IDLE)])
    after, after_state = stepper(conforming(name))(params, state, draw(9))
    assert learning_rate(after_state) == 0
    assert bits(after_state) != bits(state)
    for tree in (params, after):
        del tree["blocks"]["0"]["moe"]["router_bias"]  # has no learning rate
    assert bits(after) == bits(params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_layers_equal_separate_layers(name):
    """Leaves under `tail` have no leading dimension over layers; each layer must move as if it were alone."""
    optimizer = conforming(name)
    shapes = {n: s for n, s in SMALL.items() if n.startswith("blocks")}
    stacked, _ = run(optimizer, draw(0, shapes=shapes), [draw(s, shapes=shapes) for s in (1, 2)])
    for layer in range(2):
        alone = [
            {"tail": jax.tree.map(lambda x, layer=layer: x[layer], draw(s, shapes=shapes)["blocks"])}
            for s in range(3)
        ]
        got, _ = run(optimizer, alone[0], alone[1:])
        for leaf_name, leaf in named_leaves(got["tail"]):
            wanted = dict(named_leaves(stacked["blocks"]))[leaf_name][layer]
            np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-6, err_msg=leaf_name)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_split_parameters_move_as_whole_ones(name):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tensor"))
    specs = {
        "embed/table": ("tensor", "fsdp"),
        "blocks/0/attention/wq": (None, "fsdp", "tensor"),
        "blocks/0/moe/w_up": (None, None, "fsdp"),
    }

    def place(tree):
        layouts = map_named(lambda n, x: jax.NamedSharding(mesh, jax.P(*specs.get(n, ()))), tree)
        return jax.device_put(tree, layouts)

    optimizer = conforming(name)
    whole, state = run(optimizer, draw(0), [draw(1), draw(2)])
    got, got_state = run(optimizer, place(draw(0)), [place(draw(1)), place(draw(2))])
    for a, b in zip(jax.tree.leaves((got, got_state)), jax.tree.leaves((whole, state)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_non_finite_gradient_is_skipped_and_counted(name):
    optimizer = conforming(name)
    step, params = stepper(optimizer), draw(0)
    params["embed"]["table"] = params["embed"]["table"].at[0, 0].set(-0.0)
    _, state = step(params, optimizer.init(params), draw(1))
    assert [int(n) for n in nonfinite_counts(state)] == [0, 0]
    poisons = [
        ("embed/table", math.nan),
        ("blocks/0/attention/bq", -math.inf),
        (ROUTER_BIAS, math.nan),
        ("embed/table", 1e38),
    ]
    for count, (where, value) in enumerate(poisons, start=1):
        bad = map_named(lambda n, g, w=where, v=value: g.at[(0,) * g.ndim].set(v) if n == w else g, draw(2))
        moved, after = step(params, state, bad)
        assert [int(n) for n in nonfinite_counts(after)] == [count, count], where
        assert bits(after.inner) == bits(state.inner), where
        assert bits(moved) == bits(params), where
        state = after
    moved, after = step(params, state, draw(3))
    assert [int(n) for n in nonfinite_counts(after)] == [len(poisons), 0]
    assert bits(after.inner) != bits(state.inner)
    assert bits(moved) != bits(params)


def test_other_optimizers_have_no_counts():
    assert nonfinite_counts(optax.sgd(0.1).init(draw(0))) is None


def test_state_and_parameters_share_no_buffer():
    optimizer, params = conforming("adamw"), draw(0)
    state = optimizer.init(params)
    step = jax.jit(lambda params, state, g: optimizer.update(g, state, params), donate_argnums=(0, 1))
    _, state = step(params, state, draw(1))
    assert jnp.isfinite(grad_norm(state))


# --- Parts ---


def test_clipping_scales_by_the_global_norm_and_leaves_small_gradients_alone():
    optimizer = make_optimizer(
        OptimConfig(name="sgd", momentum=0.0, weight_decay=0.0, clip_norm=5.0), lambda n: 1.0
    )
    params = {"head": {"w": jnp.zeros((1, 2))}}
    for grad, moved, norm in (([6.0, 8.0], [-3.0, -4.0], 10.0), ([0.3, 0.4], [-0.3, -0.4], 0.5)):
        after, state = run(optimizer, params, [{"head": {"w": jnp.array([grad])}}])
        np.testing.assert_allclose(after["head"]["w"], [moved], rtol=1e-6)
        np.testing.assert_allclose(grad_norm(state), norm, rtol=1e-6)


def test_router_bias_moves_by_its_sign_alone():
    cfg = OptimConfig(weight_decay=9.0, clip_norm=1e-3, router_bias_rate=0.25, multipliers=((".", 7.0),))
    params, grads = draw(0), draw(1)
    huge = map_named(lambda n, g: (1e6 * g).at[0, 0].set(0.0) if n == ROUTER_BIAS else g, grads)
    after, state = run(make_optimizer(cfg, lambda n: 0.1), params, [huge])
    plain, plain_state = run(make_optimizer(cfg, lambda n: 0.1), params, [grads])
    get = lambda tree: tree["blocks"]["0"]["moe"]["router_bias"]  # noqa: E731
    np.testing.assert_allclose(get(after), get(params) - 0.25 * np.sign(get(huge)), rtol=1e-6)
    assert get(after)[0, 0] == get(params)[0, 0]
    assert grad_norm(state) == grad_norm(plain_state)
    assert bits(after["embed"]) == bits(plain["embed"])


def test_ema_in_closed_form():
    optimizer, decay = conforming("adamw"), 0.5
    seen, grads = [draw(0)], [draw(1), draw(2), draw(3)]
    for n in range(1, 4):
        params, state = run(optimizer, draw(0), grads[:n])
        seen.append(params)
    shares = [decay**3, (1 - decay) * decay**2, (1 - decay) * decay, 1 - decay]
    wanted = jax.tree.map(lambda *ps: sum(s * p for s, p in zip(shares, ps, strict=True)), *seen)
    for a, b in zip(jax.tree.leaves(ema_params(state)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_ema_follows_the_float32_copy_of_rounded_parameters():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), draw(0))
    after, state = run(conforming("adamw"), params, [draw(1)])
    trees = (ema_params(state), params, after, state.inner.master)
    for ema, a, rounded, b in zip(*map(jax.tree.leaves, trees), strict=True):
        assert ema.dtype == jnp.float32
        np.testing.assert_array_equal(rounded, b.astype(jnp.bfloat16))
        np.testing.assert_allclose(ema, 0.5 * a.astype(jnp.float32) + 0.5 * b, rtol=1e-6)


def test_ema_is_absent_by_default():
    assert ema_params(make_optimizer(OptimConfig(), lambda n: 0.1).init(draw(0))) is None


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_multipliers_scale_the_learning_rate_of_the_leaves_they_match(name):
    options = dict(name=name, weight_decay=0.3, router_bias_rate=0.0)
    base, _ = run(make_optimizer(OptimConfig(**options), lambda n: 0.01), draw(0), [draw(1)])
    cfg = OptimConfig(**options, multipliers=(("^embed/", 3.0), ("/w", 2.0)))
    scaled = make_optimizer(cfg, lambda n: 0.01, multipliers=(("moe/w_up$", 5.0),))
    got, _ = run(scaled, draw(0), [draw(1)])
    factors = {"embed/table": 3.0, "blocks/0/attention/wq": 2.0, "blocks/0/moe/w_up": 10.0}
    start = dict(named_leaves(draw(0)))
    for (leaf, a), (_, b) in zip(named_leaves(got), named_leaves(base), strict=True):
        wanted = factors.get(leaf, 1.0) * (b - start[leaf])
        np.testing.assert_allclose(a - start[leaf], wanted, rtol=1e-3, atol=1e-6, err_msg=leaf)


def test_decay_multipliers_scale_the_decay_of_the_leaves_they_match():
    cfg, zeros = OptimConfig(weight_decay=0.3, router_bias_rate=0.0), jax.tree.map(jnp.zeros_like, draw(0))
    pairs = (("^embed/", 3.0), ("/w", 2.0), ("moe/w_up$", 0.0))
    got, _ = run(make_optimizer(cfg, lambda n: 0.01, decay_multipliers=pairs), draw(0), [zeros])
    start, factors = dict(named_leaves(draw(0))), {"embed/table": 3.0, "blocks/0/attention/wq": 2.0}
    for leaf, a in named_leaves(got):
        wanted = start[leaf] * (1 - 0.01 * 0.3 * factors.get(leaf, 0.0))
        np.testing.assert_allclose(a, wanted, rtol=1e-6, err_msg=leaf)


def test_eps_multipliers_scale_the_epsilon_of_adam():
    cfg = OptimConfig(b1=0.8, b2=0.9, eps=0.5, weight_decay=0.0, clip_norm=0.0, router_bias_rate=0.0)
    pairs = (("^embed/", 3.0), ("attention", 0.25), ("q$", 8.0))
    grads = [draw(1), draw(2)]
    got, _ = run(make_optimizer(cfg, lambda n: 1.0, eps_multipliers=pairs), draw(0), grads)
    factors = {"embed/table": 3.0, "blocks/0/attention/wq": 2.0, "blocks/0/attention/bq": 2.0}
    for leaf, wanted in named_leaves(draw(0)):
        state = {}
        for t, tree in enumerate(grads, start=1):
            eps = 0.5 * factors.get(leaf, 1.0)
            wanted = wanted - adam(np.float64(dict(named_leaves(tree))[leaf]), state, t, eps=eps)
        if leaf != ROUTER_BIAS:
            np.testing.assert_allclose(dict(named_leaves(got))[leaf], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_traced_numbers_stand_for_those_of_the_config(name):
    """One program for two configs equals two programs."""
    values = {"lr": (0.01, 0.02), "weight_decay": (0.3, 0.0), "b2": (0.9, 0.99)}
    plain, grads = OptimConfig(name=name, schedule="linear"), [draw(1), draw(2)]

    @jax.jit
    @jax.vmap
    def together(numbers):
        schedule = make_schedule(plain, 5, lr=numbers.pop("lr"))
        optimizer, params = make_optimizer(plain, schedule, numbers=numbers), draw(0)
        state = optimizer.init(params)
        for g in grads:
            updates, state = optimizer.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return params

    got = together({name: jnp.array(x) for name, x in values.items()})
    for i in range(2):
        cfg = OptimConfig(name=name, schedule="linear", **{field: x[i] for field, x in values.items()})
        alone, _ = run(make_optimizer(cfg, make_schedule(cfg, 5)), draw(0), grads)
        for (leaf, a), (_, b) in zip(named_leaves(got), named_leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6, err_msg=leaf)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_frozen_leaves_are_holes(name):
    params, grads = draw(0), draw(1)
    params["embed"]["table"] = grads["embed"]["table"] = None
    after, _ = run(conforming(name), params, [grads])
    assert after["embed"]["table"] is None


def test_names_decide_what_decays_and_what_is_a_matrix():
    cfg = OptimConfig()
    for name, shape in SHAPES.items():
        assert is_decayed(cfg, name, len(shape)) == (name in MATRICES), name
        axes = matrix_axes(name, len(shape))
        assert (axes is not None) == (name in MATRICES), name
        if axes:
            assert tuple(math.prod(shape[i] for i in group) for group in axes) == MATRICES[name]
    others = {
        "blocks/0/attention/sinks": 2,
        "blocks/1/new/gain": 2,
        "tail/0/attention/bk": 2,
        "position_bias/table": 2,
    }
    assert not any(is_decayed(cfg, *leaf) for leaf in others.items())
    assert not is_decayed(OptimConfig(no_decay="embed"), "embed/table", 2)
    assert is_decayed(OptimConfig(no_decay="embed"), "blocks/0/attention/bq", 3)


# --- Schedules ---


def lrs(num_steps, tokens_per_step=0, **options):
    schedule = make_schedule(OptimConfig(lr=2.0, **options), num_steps, tokens_per_step)
    return np.array(jax.jit(jax.vmap(schedule))(jnp.arange(num_steps + 3)))


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_schedules_in_closed_form(final):
    n, w = 40, 8
    step = np.arange(n + 3)
    warm = np.minimum(1.0, (step + 1) / w)
    x = np.clip((step - w) / (n - w), 0, 1)
    y = np.clip((step - 30) / 10, 0, 1)
    wanted = {
        ("constant", ""): warm,
        ("cosine", ""): np.where(step < w, warm, final + (1 - final) * (1 + np.cos(np.pi * x)) / 2),
        ("linear", ""): np.where(step < w, warm, 1 - (1 - final) * x),
        ("inverse_sqrt", ""): np.where(step < w, warm, np.maximum(final, np.sqrt(w / (step + 1)))),
        ("wsd", "1-sqrt"): np.where(step < w, warm, 1 - (1 - final) * np.sqrt(y)),
        ("wsd", "linear"): np.where(step < w, warm, 1 - (1 - final) * y),
    }
    for (name, shape), curve in wanted.items():
        options = {"cooldown_shape": shape} if shape else {}
        got = lrs(n, schedule=name, final=final, warmup=w, warmup_unit="steps", cooldown=0.25, **options)
        np.testing.assert_allclose(got, 2.0 * curve, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("warmup", "unit", "steps"),
    [
        (7, "steps", 7),
        (0, "steps", 0),
        (7000, "tokens", 7),
        (7001, "tokens", 8),
        (0.07, "fraction", 7),
        (0.071, "fraction", 8),
    ],
)
def test_warmup_units(warmup, unit, steps):
    got = lrs(100, 1000, schedule="constant", warmup=warmup, warmup_unit=unit)
    np.testing.assert_allclose(got, 2.0 * np.minimum(1, np.arange(1, 104) / max(steps, 1)), rtol=1e-6)


def test_boundaries():
    for name in ("constant", "cosine", "linear", "wsd", "inverse_sqrt"):
        assert np.isfinite(lrs(1, schedule=name, warmup=0)).all()
        assert lrs(10, schedule=name, warmup=0)[0] == 2.0
        everything = lrs(10, schedule=name, warmup=10, warmup_unit="steps", cooldown=0.0)
        np.testing.assert_allclose(everything[:10], 0.2 * np.arange(1, 11), rtol=1e-6)
    assert (lrs(10, schedule="wsd", cooldown=0.0, warmup=0)[:10] == 2.0).all()
    all_cooldown = lrs(10, schedule="wsd", cooldown=1.0, cooldown_shape="linear", warmup=0, final=0.0)
    np.testing.assert_allclose(all_cooldown[:10], 2.0 - 0.2 * np.arange(10), rtol=1e-6)


def test_skipped_updates_do_not_advance_the_schedule():
    schedule = make_schedule(OptimConfig(lr=1.0, schedule="linear", warmup=0, final=0.0), 4)
    bad = jax.tree.map(lambda g: g * jnp.nan, draw(1))
    optimizer = make_optimizer(OptimConfig(), schedule)
    _, state = run(optimizer, draw(0), [draw(1), bad, bad])
    assert learning_rate(state) == 1.0
    _, state = run(optimizer, draw(0), [draw(1), bad, bad, draw(2)])
    assert learning_rate(state) == 0.75


# --- Bad input ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adamW"}, "optim.name='adamW' is not one of .*; did you mean 'adamw'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"warmup_unit": "step"}, "did you mean 'steps'"),
        ({"cooldown_shape": "sqrt"}, "did you mean '1-sqrt'"),
        ({"lr": -1.0}, r"optim.lr=-1.0 must lie in \[0, inf\)"),
        ({"lr": math.nan}, "optim.lr=nan"),
        ({"b2": 1.0}, r"optim.b2=1.0 must lie in \[0, 1\)"),
        ({"final": 1.5}, r"optim.final=1.5 must lie in \[0, 1\]"),
        ({"clip_norm": math.inf}, "optim.clip_norm=inf"),
        ({"warmup": 100.0}, "optim.warmup=100 must be a share below 1, or set optim.warmup_unit='steps'"),
        ({"no_decay": "("}, "optim.no_decay='\\(' is not a regular expression"),
        ({"multipliers": (("embed", -1.0),)}, "optim.multipliers has"),
        ({"multipliers": ("embed",)}, "optim.multipliers has 'embed'"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(UserError, match=message):
        OptimConfig(**options)


def test_what_does_not_fit_in_the_run_is_refused():
    with pytest.raises(UserError, match=r"optim.warmup=50 steps \(50 steps\) .* the run of 40"):
        make_schedule(OptimConfig(warmup=50, warmup_unit="steps"), 40)
    with pytest.raises(UserError, match="cooldown of 30 steps do not fit in the run of 40"):
        make_schedule(OptimConfig(schedule="wsd", warmup=11, warmup_unit="steps", cooldown=0.75), 40)
    with pytest.raises(UserError, match="needs the number of tokens per step"):
        make_schedule(OptimConfig(warmup=1e6, warmup_unit="tokens"), 40)


def test_a_multiplier_for_no_leaf_is_refused():
    optimizer = make_optimizer(OptimConfig(multipliers=(("embedding", 2.0),)), lambda n: 0.1)
    with pytest.raises(UserError, match="'embedding' is found in no leaf name, such as blocks/0/"):
        optimizer.init(draw(0))
    for kind in ("decay_multipliers", "eps_multipliers"):
        optimizer = make_optimizer(OptimConfig(name="muon"), lambda n: 0.1, **{kind: (("embedding", 2.0),)})
        with pytest.raises(UserError, match=f"{kind}: 'embedding' is found in no leaf name"):
            optimizer.init(draw(0))


def test_options_without_a_meaning_are_refused():
    make = functools.partial(make_optimizer, schedule=lambda n: 0.1)
    with pytest.raises(UserError, match="numbers='lr' is not one of 'weight_decay', 'b2'"):
        make(OptimConfig(), numbers={"lr": 0.1})
    with pytest.raises(UserError, match=r"optim\.name='lion' has no epsilon"):
        make(OptimConfig(name="lion"), eps_multipliers=((".", 0.5),))
    with pytest.raises(UserError, match="decay_multipliers has"):
        make(OptimConfig(), decay_multipliers=((".", -0.5),))
