"""Mixture of experts against a plain loop over rows, tokens and choices."""

import dataclasses
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.model.moe import MoEConfig, capacity, route
from jaxlm.tree import named_leaves

sys.path.insert(0, str(Path(__file__).parent))
from moe_cases import (
    BASE,
    DISPATCHES,
    VARIANTS,
    B,
    D,
    E,
    T,
    assert_trees_close,
    batch,
    gradients,
    layer,
    params_of,
    routed,
    run,
)

# --- The oracle: one row, one token, one choice at a time ---


def silu(z):
    return z / (1 + np.exp(-z))


def naive(cfg, params, x_BTD, mask_BT):
    """y, kept choices as {(row, token): [experts]}, dropped choices, and the sums behind the losses."""
    p = {k: np.asarray(v, np.float64) for k, v in params["params"].items()}
    x_BTD, mask_BT = np.asarray(x_BTD, np.float64), np.asarray(mask_BT)
    y_BTD = np.zeros_like(x_BTD)
    kept, dropped, balance, z, max_load = {}, 0, 0.0, 0.0, 0.0
    load_E = np.zeros(E)
    expert = ("w_gate", "w_up", "w_down", *(("b_gate", "b_up", "b_down") if cfg.bias else ()))
    room = capacity(cfg, T) if cfg.dispatch == "capacity" else T

    def mlp(x, gate, up, down, b_gate=0, b_up=0, b_down=0):
        return (silu(x @ gate + b_gate) * (x @ up + b_up)) @ down + b_down

    for b in range(x_BTD.shape[0]):
        taken, row_load, row_share, n = [0] * E, [0] * E, np.zeros(E), int(mask_BT[b].sum())
        for t in range(T):
            x = x_BTD[b, t]
            if cfg.shared_experts:
                y_BTD[b, t] += mlp(x, *(p[f"shared_{w}"] for w in ("w_gate", "w_up", "w_down")))
            if not mask_BT[b, t]:
                continue
            logits = x @ p["router_w"] + (p["router_b"] if cfg.bias else 0)
            if cfg.router == "softmax":
                scores = np.exp(logits - logits.max())
                scores = scores / scores.sum()
            else:
                scores = 1 / (1 + np.exp(-logits))
            ranked = scores + (p["router_bias"] if cfg.bias_balancing else 0)
            members = np.split(np.arange(E), cfg.groups)
            score = lambda group: sum(sorted(ranked[group])[-cfg.group_best :])  # noqa: B023, E731
            able = np.concatenate(sorted(members, key=score)[-cfg.top_groups :])
            chosen = sorted(able, key=lambda e: -ranked[e])[: cfg.top_k]
            total = sum(scores[e] for e in chosen) if cfg.normalize else 1.0
            row_share += scores / scores.sum()
            z += np.log(np.exp(logits).sum()) ** 2
            for e in chosen:
                row_load[e] += 1
                if taken[e] == room:
                    dropped += 1
                    continue
                taken[e] += 1
                kept.setdefault((b, t), []).append(e)
                weight = cfg.routed_scale * scores[e] / total
                y_BTD[b, t] += weight * mlp(x, *(p[w][e] for w in expert))
        load_E += row_load
        max_load += n * max(row_load) / (cfg.top_k * n / E)
        balance += n * E * sum(row_load[e] / (cfg.top_k * n) * row_share[e] / n for e in range(E))
    return y_BTD, kept, dropped, dict(balance=balance, z=z, max_load=max_load, load_E=load_E)


@pytest.mark.parametrize(
    ("variant", "dispatch"),
    [(v, "dense") for v in VARIANTS]
    + [("sigmoid", d) for d in DISPATCHES if d != "dense"]
    + [("top1", "dropping")]
    + [("biases", d) for d in ("loop", "ragged", "capacity")],
)
def test_equals_a_loop_over_tokens_and_experts(variant, dispatch):
    cfg = dataclasses.replace(VARIANTS[variant], **DISPATCHES[dispatch])
    params, (x_BTD, mask_BT) = params_of(cfg), batch()
    y_BTD, aux = run(cfg, params, x_BTD, mask_BT)
    want_BTD, _, dropped, sums = naive(cfg, params, x_BTD, mask_BT)
    real = np.asarray(mask_BT)
    np.testing.assert_allclose(np.asarray(y_BTD)[real], want_BTD[real], rtol=2e-5, atol=2e-5)
    if not cfg.shared_experts:
        assert not np.asarray(y_BTD)[~real].any()
    tokens = real.sum()
    want = {
        "moe/load_balance": (sums["balance"], tokens),
        "moe/router_z": (sums["z"], tokens),
        "moe/max_load": (sums["max_load"], tokens),
        "moe/dropped": (dropped, tokens * cfg.top_k),
    }
    for name, pair in want.items():
        np.testing.assert_allclose(aux[name], pair, rtol=1e-5, err_msg=name)
    loss = cfg.load_balance * sums["balance"] + cfg.router_z * sums["z"]
    np.testing.assert_allclose(aux["loss"], loss, rtol=1e-5)
    assert set(aux) == {*want, "loss"}
    assert (dropped > 0) == (dispatch == "dropping")


@pytest.mark.parametrize("activation", ["relu2", "geglu"])
def test_other_activations_gated_or_not(activation):
    params, (x_BTD, mask_BT) = params_of(BASE, activation=activation), batch()
    assert ("w_gate" in params["params"]) == (activation == "geglu")
    outs = [
        run(dataclasses.replace(BASE, **DISPATCHES[d]), params, x_BTD, mask_BT, activation=activation)[0]
        for d in ("dense", "loop", "capacity")
    ]
    np.testing.assert_allclose(outs[1], outs[0], atol=1e-5)
    np.testing.assert_allclose(outs[2], outs[0], atol=1e-5)


# --- Gradients ---


@pytest.mark.parametrize("dispatch", ["loop", "ragged", "capacity"])
def test_every_dispatch_has_the_same_gradients_when_nothing_is_dropped(dispatch):
    params, (x_BTD, mask_BT) = params_of(routed("dense")), batch()
    (got, aux), got_grads = gradients(routed(dispatch), params, x_BTD, mask_BT)
    (want, _), want_grads = gradients(routed("dense"), params, x_BTD, mask_BT)
    assert float(aux["moe/dropped"][0]) == 0
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert_trees_close(got_grads, want_grads)
    assert all(np.abs(g).max() > 0 for _, g in named_leaves(want_grads))


def test_rounds_change_the_buffers_and_not_the_values():
    once, cfg = routed("loop"), routed("loop", rounds=4)
    params, (x_BTD, mask_BT) = params_of(cfg), batch()
    programs = [str(jax.make_jaxpr(layer(c).apply)(params, x_BTD, mask_BT)) for c in (once, cfg)]
    assert ["length=4" in text for text in programs] == [False, True]
    got, want = (gradients(c, params, x_BTD, mask_BT) for c in (cfg, once))
    assert_trees_close(got, want)


@pytest.mark.parametrize("dispatch", ["dense", "loop", "dropping"])
def test_gradient_of_inputs_is_the_numerical_one(dispatch):
    cfg = routed(dispatch)
    params, (x_BTD, mask_BT) = params_of(cfg), batch()
    (_, _), (_, dx_BTD) = gradients(cfg, params, x_BTD, mask_BT)
    direction_BTD = jax.random.normal(jax.random.key(3), x_BTD.shape) * 1e-3
    up, down = (float(gradients(cfg, params, x_BTD + s * direction_BTD, mask_BT)[0][0]) for s in (1, -1))
    assert (up - down) / 2 == pytest.approx(float(jnp.vdot(dx_BTD, direction_BTD)), rel=2e-2, abs=1e-5)


@pytest.mark.parametrize("dispatch", ["dense", "loop", "dropping"])
def test_padding_is_inert(dispatch):
    cfg = routed(dispatch)
    params, (x_BTD, mask_BT) = params_of(cfg), batch()
    other_BTD = jnp.where(mask_BT[..., None], x_BTD, jax.random.normal(jax.random.key(5), x_BTD.shape))
    (a, aux_a), (grads_a, dx_BTD) = gradients(cfg, params, x_BTD, mask_BT)
    (b, aux_b), (grads_b, _) = gradients(cfg, params, other_BTD, mask_BT)
    assert float(a) == pytest.approx(float(b), rel=1e-6)
    assert_trees_close(aux_a, aux_b)
    assert_trees_close(grads_a, grads_b)
    assert not np.asarray(dx_BTD)[~np.asarray(mask_BT)].any()


@pytest.mark.parametrize("dispatch", ["loop", "dropping"])
def test_sums_and_gradients_add_up_over_rows(dispatch):
    cfg = routed(dispatch)
    params, (x_BTD, mask_BT) = params_of(cfg), batch(rows=4)
    (whole, aux), (grads, _) = gradients(cfg, params, x_BTD, mask_BT)
    parts = [gradients(cfg, params, x_BTD[i : i + 2], mask_BT[i : i + 2]) for i in (0, 2)]
    assert float(whole) == pytest.approx(sum(float(p[0][0]) for p in parts), rel=1e-5)
    assert_trees_close(aux, jax.tree.map(jnp.add, *(p[0][1] for p in parts)))
    assert_trees_close(grads, jax.tree.map(jnp.add, *(p[1][0] for p in parts)))


# --- Capacity ---


def test_which_tokens_are_dropped_and_that_dropping_is_causal():
    cfg = dataclasses.replace(BASE, top_k=1, normalize=False, dispatch="capacity", capacity_factor=1.0)
    params, (x_BTD, mask_BT) = params_of(cfg), batch()
    params["params"]["router_w"] = jnp.zeros((D, E)).at[0, 1].set(1.0)  # expert 1 takes every x_0 > 0
    x_BTD = x_BTD.at[..., 0].set(jnp.abs(x_BTD[..., 0]) + 0.1)
    y_BTD, aux = run(cfg, params, x_BTD, mask_BT)
    room = math.ceil(T / E)
    for b in range(B):
        real = np.flatnonzero(mask_BT[b])
        served = np.flatnonzero(np.abs(np.asarray(y_BTD[b])).sum(-1))
        np.testing.assert_array_equal(served, real[:room])  # padding took no place, later tokens go without
    assert float(aux["moe/dropped"][0]) == float(aux["moe/dropped"][1]) - B * room
    changed_BTD = x_BTD.at[:, 6:].multiply(-1.0)  # later tokens now choose other experts
    np.testing.assert_allclose(run(cfg, params, changed_BTD, mask_BT)[0][:, :6], y_BTD[:, :6], atol=1e-6)


def test_ties_go_to_the_lower_expert_as_in_top_k():
    logits_BTE = jnp.round(jax.random.normal(jax.random.key(0), (2, 32, 8)))
    cfg = MoEConfig(num_experts=8, top_k=3)
    got = route(cfg, logits_BTE, jnp.ones((2, 32), bool)).experts_BTK
    np.testing.assert_array_equal(got, jax.lax.top_k(jax.nn.softmax(logits_BTE), 3)[1])


def test_capacity_formula():
    cfg = MoEConfig(num_experts=8, top_k=2, dispatch="capacity", capacity_factor=1.25)
    assert capacity(cfg, 256) == 80
    assert capacity(cfg, 1) == 1  # decoding never drops
    assert capacity(cfg, 10) == math.ceil(1.25 * 10 * 2 / 8)
    assert capacity(dataclasses.replace(cfg, capacity_factor=100.0), 256) == 256


# --- Routing and balancing ---


def test_bias_changes_selection_and_not_weights():
    cfg = dataclasses.replace(VARIANTS["sigmoid-raw"], bias_balancing=True)
    logits_BTE = jax.random.normal(jax.random.key(0), (1, 6, E))
    bias_E = jnp.array([0.0, 0.0, 0.0, 10.0])
    mask_BT = jnp.ones((1, 6), bool)
    plain, moved = route(cfg, logits_BTE, mask_BT), route(cfg, logits_BTE, mask_BT, bias_E)
    assert (np.asarray(moved.experts_BTK)[..., 0] == 3).all()
    assert not (np.asarray(plain.experts_BTK)[..., 0] == 3).all()
    scores = jnp.take_along_axis(jax.nn.sigmoid(logits_BTE), moved.experts_BTK, axis=-1)
    np.testing.assert_allclose(moved.weights_BTK, scores, rtol=1e-6)
    np.testing.assert_array_equal(moved.probs_BTE, plain.probs_BTE)


def test_gradient_of_the_bias_is_load_minus_mean_and_its_value_is_zero():
    cfg = routed("dense")
    params, (x_BTD, mask_BT) = params_of(cfg), batch()
    (_, aux), (grads, _) = gradients(cfg, params, x_BTD, mask_BT)
    losses = cfg.load_balance * aux["moe/load_balance"][0] + cfg.router_z * aux["moe/router_z"][0]
    assert float(aux["loss"]) == pytest.approx(float(losses), rel=1e-6)
    load_E = naive(cfg, params, x_BTD, mask_BT)[3]["load_E"]
    assert np.ptp(load_E) > 0
    np.testing.assert_allclose(grads["params"]["router_bias"], load_E - load_E.mean(), rtol=1e-6)


def test_sign_steps_on_the_bias_level_a_skewed_router():
    cfg = dataclasses.replace(VARIANTS["sigmoid"], load_balance=0.0, router_z=0.0)
    params = params_of(cfg)["params"]
    x_BTD = jax.random.normal(jax.random.key(0), (4, 64, D)) + 0.4
    params["router_w"] = params["router_w"] + jnp.arange(E) * 0.3  # the last expert is the favourite
    mask_BT = jnp.ones((4, 64), bool)

    def loss(bias_E):
        _, aux = layer(cfg).apply({"params": {**params, "router_bias": bias_E}}, x_BTD, mask_BT)
        return aux["loss"], aux["moe/max_load"][0] / aux["moe/max_load"][1]

    @jax.jit
    def train(bias_E):
        def step(_, carry):
            bias_E, _ = carry
            excess_E, max_load = jax.grad(loss, has_aux=True)(bias_E)
            return bias_E - 0.003 * jnp.sign(excess_E), max_load

        return jax.lax.fori_loop(0, 300, step, (bias_E, jnp.zeros(())))

    before = float(jax.jit(loss)(jnp.zeros(E))[1])
    bias_E, after = train(jnp.zeros(E))
    assert before > 1.5
    assert float(after) < 1.2
    assert float(bias_E[-1]) < float(bias_E[0])


def test_load_balance_is_one_per_token_when_even_and_e_over_k_at_worst():
    cfg = dataclasses.replace(BASE, top_k=1, normalize=False)
    params, (x_BTD, _) = params_of(cfg), batch()
    mask_BT = jnp.ones((B, T), bool)
    params["params"]["router_w"] = jnp.zeros((D, E)).at[:, 2].set(100.0)
    _, aux = run(cfg, params, jnp.abs(x_BTD) + 1, mask_BT)
    assert float(aux["moe/load_balance"][0]) / (B * T) == pytest.approx(E)
    assert float(aux["moe/max_load"][0]) / (B * T) == pytest.approx(E)
    params["params"]["router_w"] = jnp.eye(D, E) * 100.0
    x_BTD = jnp.tile(jnp.eye(E, D), (B, 2, 1))  # tokens choose experts 0, 1, 2, 3, 0, 1..
    _, aux = run(cfg, params, x_BTD, jnp.ones((B, 8), bool))
    assert float(aux["moe/load_balance"][0]) / (B * 8) == pytest.approx(1.0, rel=1e-4)
    assert float(aux["moe/max_load"][0]) / (B * 8) == pytest.approx(1.0)


# --- Precision ---


@pytest.mark.parametrize(
    "dispatch",
    ["loop", "capacity", *(pytest.param(d, marks=pytest.mark.slow) for d in ("dense", "ragged"))],
)
def test_bf16_stays_near_fp32(dispatch):
    cfg = routed(dispatch)
    params, (x_BTD, mask_BT) = params_of(cfg), batch()
    x_BTD = x_BTD.astype(jnp.bfloat16).astype(jnp.float32)  # the router reads what bf16 holds: same choices
    y_BTD, _ = run(cfg, params, x_BTD, mask_BT, dtype="bfloat16")
    assert y_BTD.dtype == jnp.bfloat16
    want_BTD, _ = run(cfg, params, x_BTD, mask_BT)
    np.testing.assert_allclose(
        y_BTD.astype(jnp.float32), want_BTD, atol=0.03 * float(jnp.abs(want_BTD).max())
    )
    (_, _), (grads, _) = gradients(cfg, params, x_BTD, mask_BT, dtype="bfloat16")
    assert all(g.dtype == jnp.float32 and bool(jnp.isfinite(g).all()) for _, g in named_leaves(grads))


# --- Bad input ---


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(router="softmx"), "did you mean 'softmax'"),
        (dict(dispatch="dropples"), "did you mean 'dropless'"),
        (dict(dropless_backend="raged"), "did you mean 'ragged'"),
        (dict(num_experts=4, top_k=5), r"moe.top_k=5 must be between 1 and moe.num_experts=4; nearest is 4"),
        (dict(num_experts=4, top_k=0), r"moe.top_k=0 .* nearest is 1"),
        (dict(num_experts=4, top_k=1), r"set moe.normalize=False"),
        (dict(capacity_factor=0.0), r"moe.capacity_factor=0.0 must be > 0"),
        (dict(rounds=0), r"moe.rounds=0 must be >= 1"),
        (dict(rounds=2, dispatch="capacity"), r"moe.rounds=2 is for moe.dispatch='dropless'"),
        (dict(load_balance=-1.0), r"moe.load_balance=-1.0 must be >= 0"),
        (dict(shared_dim=8), r"moe.shared_dim=8 without shared experts"),
        (dict(shared_gate=True), r"moe.shared_gate=True without shared experts"),
        (dict(num_experts=4, group_best=2), r"moe.group_best=2 with one group"),
        (
            dict(exchange="padded", dispatch="capacity"),
            r"moe.exchange='padded' is for moe.dispatch='dropless'",
        ),
        (
            dict(buffer_factor=2.0, dropless_backend="dense"),
            r"moe.buffer_factor=2.0 is for .* other than 'dense'",
        ),
        (dict(rounds=2, dropless_backend="dense"), r"moe.rounds=2 is for moe.dispatch='dropless'"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message):
        MoEConfig(**fields)
