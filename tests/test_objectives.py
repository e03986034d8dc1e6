"""The chunked loss against plain log-softmax: values, gradients, memory, and sums that add up."""

import math
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.objectives.lm import LossConfig, cross_entropy, make_lm_objective, token_nll
from jaxlm.sharding import MeshConfig, make_layout, use

B, T, D, V = 3, 10, 8, 24
TOKEN_BYTES_V = np.arange(V, dtype=np.float32) % 5


def untied(params, hidden_BTD):
    return (hidden_BTD @ params["head"]["w"]).astype(jnp.float32)


def tied(params, hidden_BTD):
    return jnp.einsum("BTD,VD->BTV", hidden_BTD, params["embed"]["table"]).astype(jnp.float32)


def softcapped(params, hidden_BTD):
    return 3.0 * jnp.tanh(untied(params, hidden_BTD) / 3.0)


def half(params, hidden_BTD):
    x, w = hidden_BTD.astype(jnp.bfloat16), params["head"]["w"].astype(jnp.bfloat16)
    return jnp.einsum("BTD,DV->BTV", x, w, preferred_element_type=jnp.float32)


def apply(params, batch, key):
    hidden_BTD = jnp.tanh(params["embed"]["table"][batch["tokens"]] @ params["mix"]["w"])
    count = jnp.sum(batch["weights"] > 0).astype(jnp.float32)
    share = jnp.sum(jnp.square(hidden_BTD))
    return hidden_BTD, {"loss": 0.01 * share, "moe/load_balance": (share, count)}


def make_params(seed: int = 0, dtype=jnp.float32) -> dict:
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "embed": {"table": draw(V, D)},
        "mix": {"w": draw(D, D)},
        "head": {"w": draw(D, V)},
        "unused": {"w": draw(5)},
    }


def make_batch(seed: int = 1, rows: int = B, columns: int = T) -> dict:
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 2.0, (rows, columns)) * (rng.uniform(size=(rows, columns)) > 0.3)
    return {
        "tokens": jnp.asarray(rng.integers(0, V, (rows, columns))),
        "targets": jnp.asarray(rng.integers(0, V, (rows, columns))),
        "weights": jnp.asarray(weights, jnp.float32),
        "positions": jnp.asarray(rng.integers(0, columns, (rows, columns))),
    }


def oracle(cfg: LossConfig, unembed, params, hidden_BTD, targets_BT, weights_BT):
    """The loss by log-softmax of all logits, with smoothed targets written out as distributions."""
    logits_BTV = unembed(params, hidden_BTD)
    vocabulary = logits_BTV.shape[-1]
    wanted_BTV = (1 - cfg.label_smoothing) * jax.nn.one_hot(targets_BT, vocabulary)
    wanted_BTV += cfg.label_smoothing / vocabulary
    cost_BT = -jnp.sum(wanted_BTV * jax.nn.log_softmax(logits_BTV), -1)
    cost_BT += cfg.z_loss * jax.nn.logsumexp(logits_BTV, -1) ** 2
    return jnp.sum(weights_BT * cost_BT)


def hidden_and_batch(dtype=jnp.float32):
    batch = make_batch()
    hidden_BTD = jnp.asarray(np.random.default_rng(2).normal(size=(B, T, D)), dtype)
    return hidden_BTD, batch["targets"], batch["weights"]


def assert_close(got, wanted, tolerance: float):
    for (path, a), (_, b) in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree_util.tree_leaves_with_path(wanted), strict=True
    ):
        scale = float(jnp.max(jnp.abs(b))) + 1e-30
        error = float(jnp.max(jnp.abs(a - b))) / scale
        assert error < tolerance, (jax.tree_util.keystr(path), error)


# --- Values and gradients ---


def gradients(loss, *args):
    """Value and gradients of `loss(params, hidden)`."""
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*args)


@pytest.mark.parametrize(
    ("unembed", "chunk"),
    [
        *((untied, chunk) for chunk in (0, 1, 3, 5, 64)),
        (tied, 0),
        (tied, 4),
        (softcapped, 0),
        (softcapped, 4),
    ],
)
def test_loss_and_every_gradient_equal_log_softmax(unembed, chunk):
    cfg = LossConfig(z_loss=0.03, label_smoothing=0.1, chunk=chunk)
    params, (hidden_BTD, *rest) = make_params(), hidden_and_batch()
    got = gradients(lambda p, h: cross_entropy(cfg, unembed, p, h, *rest)[0], params, hidden_BTD)
    wanted = gradients(lambda p, h: oracle(cfg, unembed, p, h, *rest), params, hidden_BTD)
    assert_close(got, wanted, 2e-6)


@pytest.mark.parametrize("cfg", [LossConfig(chunk=4), LossConfig(z_loss=0.1, chunk=4)])
def test_a_multiple_of_the_loss_has_that_multiple_of_the_gradient(cfg):
    params, (hidden_BTD, *rest) = make_params(), hidden_and_batch()
    got = gradients(lambda p, h: 2.5 * cross_entropy(cfg, untied, p, h, *rest)[0], params, hidden_BTD)
    wanted = gradients(lambda p, h: 2.5 * oracle(cfg, untied, p, h, *rest), params, hidden_BTD)
    assert_close(got, wanted, 2e-6)


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_bf16_products_and_parameters(param_dtype):
    cfg, params = LossConfig(z_loss=0.01, chunk=4), make_params(dtype=param_dtype)
    hidden_BTD, *rest = hidden_and_batch(jnp.bfloat16)
    got = gradients(lambda p, h: cross_entropy(cfg, half, p, h, *rest)[0], params, hidden_BTD)
    assert jax.tree.map(lambda x: x.dtype, got[1]) == jax.tree.map(lambda x: x.dtype, (params, hidden_BTD))
    assert got[0].dtype == jnp.float32
    single = jax.tree.map(lambda x: x.astype(jnp.float32), (params, hidden_BTD))
    wanted = gradients(lambda p, h: oracle(cfg, untied, p, h, *rest), *single)
    assert_close(jax.tree.map(lambda x: x.astype(jnp.float32), got), wanted, 0.01)


def test_gradients_by_finite_differences_in_float64():
    with jax.enable_x64(True):
        cfg = LossConfig(z_loss=0.05, label_smoothing=0.2, chunk=4)
        rng = np.random.default_rng(0)
        point = np.concatenate([rng.normal(size=3 * 5), rng.normal(size=2 * 6 * 3)])
        targets_BT = jnp.asarray(rng.integers(0, 5, (2, 6)))
        weights_BT = jnp.asarray(rng.uniform(size=(2, 6)))

        def loss(flat):
            w_DV, hidden_BTD = flat[:15].reshape(3, 5), flat[15:].reshape(2, 6, 3)
            return cross_entropy(
                cfg, lambda w, h: 2.0 * jnp.tanh(h @ w), w_DV, hidden_BTD, targets_BT, weights_BT
            )[0]

        steps = 1e-6 * np.eye(point.size)
        losses = jax.jit(jax.vmap(loss))
        slopes = (losses(point + steps) - losses(point - steps)) / 2e-6
        assert slopes.dtype == jnp.float64
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(point), slopes, atol=1e-8, rtol=1e-7)


def test_weight_zero_tokens_have_no_influence():
    cfg, params = LossConfig(z_loss=0.1, label_smoothing=0.1, chunk=4), make_params()
    hidden_BTD, targets_BT, weights_BT = hidden_and_batch()
    dead_BT = weights_BT == 0
    assert dead_BT.any()

    @jax.jit
    @jax.value_and_grad
    def grad(hidden_BTD, targets_BT, weights_BT):
        return cross_entropy(cfg, untied, params, hidden_BTD, targets_BT, weights_BT)[0]

    loss, d_hidden_BTD = grad(hidden_BTD, targets_BT, weights_BT)
    assert not np.any(np.asarray(d_hidden_BTD)[np.asarray(dead_BT)])
    other, _ = grad(
        jnp.where(dead_BT[..., None], 9.0, hidden_BTD), jnp.where(dead_BT, 1, targets_BT), weights_BT
    )
    assert loss == other
    nothing, zeros = grad(hidden_BTD, targets_BT, 0 * weights_BT)
    assert nothing == 0
    assert not zeros.any()


@pytest.mark.parametrize("chunk", [0, 4])
def test_large_logits_do_not_overflow(chunk):
    hidden_BTD, *rest = hidden_and_batch()
    cfg = LossConfig(chunk=chunk)
    out = gradients(lambda p, h: cross_entropy(cfg, untied, p, h, *rest)[0], make_params(), 1e4 * hidden_BTD)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(out))


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_target_outside_the_vocabulary_is_loud(tensor):
    """A negative one too, and where the vocabulary is split over devices."""
    hidden_BTD, targets_BT, weights_BT = hidden_and_batch()
    with use(make_layout(MeshConfig(data=1, tensor=tensor))):
        run = jax.jit(partial(cross_entropy, LossConfig(chunk=4), untied))
        for wrong in (targets_BT + V, targets_BT - V):
            loss, _ = run(make_params(), hidden_BTD, wrong, weights_BT)
            assert jnp.isnan(loss)


@pytest.mark.parametrize("chunk", [0, 4])
def test_token_nll_ignores_training_only_terms(chunk):
    hidden_BTD, targets_BT, _ = hidden_and_batch()
    cfg, params = LossConfig(z_loss=1.0, label_smoothing=0.5, chunk=chunk), make_params()
    wanted_BTV = -jax.nn.log_softmax(untied(params, hidden_BTD))
    wanted_BT = jnp.take_along_axis(wanted_BTV, targets_BT[..., None], -1)[..., 0]
    got_BT = token_nll(cfg, untied, params, hidden_BTD, targets_BT)
    assert got_BT.dtype == jnp.float32
    np.testing.assert_allclose(got_BT, wanted_BT, rtol=1e-5, atol=1e-6)


# --- Memory and work ---


def equations(jaxpr) -> Iterator:
    """All equations of a jaxpr, in loops and calls, too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(value, "jaxpr"):
                value = value.jaxpr
            if hasattr(value, "eqns"):
                yield from equations(value)


def largest_fp32(fn, *args) -> int:
    """Elements of the largest fp32 intermediate."""
    outs = (var.aval for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr) for var in eqn.outvars)
    return max(math.prod(aval.shape) for aval in outs if getattr(aval, "dtype", None) == jnp.float32)


def products(fn, *args) -> float:
    """Multiplications in all matrix products, loops counted once for each turn."""

    def count(jaxpr, turns: int) -> int:
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                contracted = eqn.params["dimension_numbers"][0][0]
                depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
                total += turns * depth * math.prod(eqn.outvars[0].aval.shape)
            inner = turns * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else turns
            for value in eqn.params.values():
                value = getattr(value, "jaxpr", value)
                if hasattr(value, "eqns"):
                    total += count(value, inner)
        return total

    return count(jax.make_jaxpr(fn)(*args).jaxpr, 1)


def big_case():
    rows, columns, width, vocabulary = 4, 32, 8, 512
    rng = np.random.default_rng(0)
    params = {"head": {"w": jnp.asarray(rng.normal(size=(width, vocabulary)), jnp.float32)}}
    hidden_BTD = jnp.asarray(rng.normal(size=(rows, columns, width)), jnp.float32)
    targets_BT = jnp.asarray(rng.integers(0, vocabulary, (rows, columns)))
    return rows * columns * vocabulary, params, hidden_BTD, targets_BT, jnp.ones((rows, columns))


def test_logits_of_the_whole_batch_never_exist():
    whole, *args = big_case()

    def grad(chunk):
        cfg = LossConfig(chunk=chunk, z_loss=0.1, label_smoothing=0.1)
        return jax.grad(
            lambda p, h, y, w: cross_entropy(cfg, untied, p, h, y, w)[0],
            argnums=(0, 1),
        )

    assert largest_fp32(grad(0), *args) == whole  # the ruler measures
    assert largest_fp32(grad(8), *args) == whole // 4
    temp = {
        chunk: jax.jit(grad(chunk)).lower(*args).compile().memory_analysis().temp_size_in_bytes
        for chunk in (0, 2)
    }
    assert temp[0] > 4 * whole
    assert temp[2] < whole  # a quarter of what fp32 logits alone would take


def test_gradient_costs_three_products_and_evaluation_one():
    whole, *args = big_case()
    width = args[0]["head"]["w"].shape[0]

    def loss(p, h, y, w):
        return cross_entropy(LossConfig(chunk=8), untied, p, h, y, w)[0]

    assert products(loss, *args) == whole * width
    assert products(jax.grad(loss, argnums=(0, 1)), *args) == 3 * whole * width


def test_parameters_that_unembed_does_not_read_stay_out_of_the_loop():
    hidden_BTD, targets_BT, weights_BT = hidden_and_batch()
    params = make_params() | {"blocks": {"w": jnp.ones((50, 50))}}
    fn = jax.jit(
        jax.grad(
            lambda p: cross_entropy(LossConfig(chunk=2), untied, p, hidden_BTD, targets_BT, weights_BT)[0]
        )
    )
    loops = [eqn for eqn in equations(jax.make_jaxpr(fn)(params).jaxpr) if eqn.primitive.name == "scan"]
    assert loops
    for loop in loops:
        assert all(var.aval.shape != (50, 50) for var in (*loop.invars, *loop.outvars))
    assert not fn(params)["blocks"]["w"].any()


# --- The objective ---


def model(unembed=untied):
    return SimpleNamespace(apply=apply, unembed=unembed)


def jitted(cfg: LossConfig, token_bytes_V=None):
    """The objective without a key, as one program: `(params, batch) -> sums`."""
    objective = make_lm_objective(model(), cfg, token_bytes_V)
    return jax.jit(lambda params, batch: objective(params, batch, None))


def test_total_is_the_sum_of_its_parts():
    cfg, params, batch = LossConfig(z_loss=0.02, chunk=4), make_params(), make_batch()
    loss, weight, metrics = jitted(cfg, TOKEN_BYTES_V)(params, batch)
    hidden_BTD, aux = apply(params, batch, None)
    nll_BT = token_nll(cfg, untied, params, hidden_BTD, batch["targets"])
    np.testing.assert_allclose(metrics["nll"][0], jnp.sum(nll_BT * batch["weights"]), rtol=1e-6)
    np.testing.assert_allclose(loss, metrics["nll"][0] + metrics["z_loss"][0] + aux["loss"], rtol=1e-6)
    assert metrics["total"][0] == loss
    np.testing.assert_allclose(weight, batch["weights"].sum(), rtol=1e-6)
    assert all(metrics[name][1] == weight for name in ("nll", "z_loss", "accuracy", "total"))
    assert metrics["moe/load_balance"] == aux["moe/load_balance"]
    assert "loss" not in metrics
    bits, text = metrics["bpb"]
    np.testing.assert_allclose(bits, metrics["nll"][0] / np.log(2), rtol=1e-6)
    np.testing.assert_allclose(text, np.sum(TOKEN_BYTES_V[batch["targets"]] * batch["weights"]), rtol=1e-6)


def test_smoothing_changes_the_total_and_not_the_nll():
    params, batch = make_params(), make_batch()
    plain = jitted(LossConfig(chunk=4))(params, batch)
    smooth = jitted(LossConfig(chunk=4, label_smoothing=0.2))(params, batch)
    assert plain[2]["nll"][0] == smooth[2]["nll"][0]
    assert abs(plain[0] - smooth[0]) > 0.5
    assert "bpb" not in plain[2]


def test_the_auxiliary_loss_reaches_the_gradient_and_metrics_do_not():
    params, batch = make_params(), make_batch()
    objective = make_lm_objective(model(), LossConfig(chunk=4))
    silent = make_lm_objective(
        SimpleNamespace(apply=lambda *a: (apply(*a)[0], {}), unembed=untied), LossConfig(chunk=4)
    )
    with_aux = jax.jit(jax.grad(lambda p: objective(p, batch, None)[0]))(params)
    without = jax.jit(jax.grad(lambda p: silent(p, batch, None)[0]))(params)
    alone = jax.jit(jax.grad(lambda p: apply(p, batch, None)[1]["loss"]))(params)
    assert_close(with_aux, jax.tree.map(jnp.add, without, alone), 1e-5)
    through = jax.jit(jax.grad(lambda p: sum(s for s, _ in objective(p, batch, None)[2].values())))(params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(through))


def test_accuracy_counts_largest_logits():
    params, batch = make_params(), make_batch()
    hidden_BTD, _ = apply(params, batch, None)
    right_BT = jnp.argmax(untied(params, hidden_BTD), -1) == batch["targets"]
    objective = jitted(LossConfig(chunk=3))
    _, _, metrics = objective(params, batch)
    np.testing.assert_allclose(metrics["accuracy"][0], jnp.sum(right_BT * batch["weights"]), rtol=1e-6)
    best = batch | {"targets": jnp.argmax(untied(params, hidden_BTD), -1)}
    _, weight, metrics = objective(params, best)
    assert metrics["accuracy"][0] == weight


@pytest.mark.parametrize("chunk", [0, 4])
def test_sums_of_two_halves_are_the_sums_of_the_whole(chunk):
    cfg = LossConfig(z_loss=0.02, label_smoothing=0.1, chunk=chunk, per_position=True)
    params, batch = make_params(), make_batch(rows=4)
    objective = make_lm_objective(model(), cfg, TOKEN_BYTES_V)

    @jax.jit
    def everything(params, batch):
        return objective(params, batch, None), jax.grad(lambda p: objective(p, batch, None)[0])(params)

    # The halves differ in weight, so a mean of means would not pass.
    halves = [{name: x[rows] for name, x in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
    parts = [everything(params, half) for half in halves]
    assert_close(jax.tree.map(jnp.add, *parts), everything(params, batch), 5e-6)


def test_loss_by_position_follows_the_documents():
    cfg, params, batch = LossConfig(chunk=4, per_position=True), make_params(), make_batch()
    objective = jitted(cfg)
    _, _, metrics = objective(params, batch)
    nll_BT = token_nll(cfg, untied, params, apply(params, batch, None)[0], batch["targets"])
    sums_T, weights_T = np.zeros(T), np.zeros(T)
    for b in range(B):
        for t in range(T):
            at = int(batch["positions"][b, t])
            sums_T[at] += float(batch["weights"][b, t] * nll_BT[b, t])
            weights_T[at] += float(batch["weights"][b, t])
    np.testing.assert_allclose(metrics["nll_position"][0], sums_T, rtol=1e-5)
    np.testing.assert_allclose(metrics["nll_position"][1], weights_T, rtol=1e-5)
    np.testing.assert_allclose(metrics["nll_position"][0].sum(), metrics["nll"][0], rtol=1e-5)
    columns = {name: x for name, x in batch.items() if name != "positions"}
    _, _, metrics = objective(params, columns)
    np.testing.assert_allclose(metrics["nll_position"][1], batch["weights"].sum(0), rtol=1e-6)


def test_microbatches_under_scan_equal_one_batch():
    cfg, params, batch = LossConfig(chunk=4, z_loss=0.1), make_params(), make_batch(rows=4)
    objective = make_lm_objective(model(), cfg)
    grad = jax.jit(jax.value_and_grad(lambda p, b: objective(p, b, None)[0]))

    @jax.jit
    def scanned(params):
        pairs = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), batch)
        zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros([]), params))
        return jax.lax.scan(lambda s, b: (jax.tree.map(jnp.add, s, grad(params, b)), None), zeros, pairs)[0]

    assert_close(scanned(params), grad(params, batch), 5e-6)


def test_rows_split_over_devices_keep_their_logits_at_home():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))

    def place(x, *axes):
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P(*axes)))

    _, params, hidden_BTD, targets_BT, weights_BT = big_case()

    def fn(p, h, y, w):
        return cross_entropy(LossConfig(chunk=8), untied, p, h, y, w)[0]

    grad = jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))
    wanted = grad(params, hidden_BTD, targets_BT, weights_BT)
    split = (
        {"head": {"w": place(params["head"]["w"], None, "tensor")}},
        place(hidden_BTD, "data"),
        place(targets_BT, "data"),
        place(weights_BT, "data"),
    )
    assert_close(grad(*split), wanted, 5e-6)
    text = grad.lower(*split).compile().as_text()
    assert "all-reduce" in text
    assert "f32[2,8,256]" in text  # a device's logits: half of the rows, half of the vocabulary
    assert "f32[4,8," not in text  # and nowhere the block's logits of all rows
    assert "f32[2,8,512]" not in text  # or of the whole vocabulary


@pytest.mark.parametrize(
    "wrong", [{"z_loss": -1.0}, {"label_smoothing": 1.0}, {"chunk": -1}, {"z_loss": math.nan}]
)
def test_bad_values_are_named(wrong):
    with pytest.raises(UserError, match=f"loss.{next(iter(wrong))}={next(iter(wrong.values()))}"):
        LossConfig(**wrong)
