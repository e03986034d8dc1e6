"""The gradient noise scale against a model whose gradient's mean and covariance are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.sharding import tree_shardings, use
from jaxlm.train.loop import Every, train_loop
from jaxlm.train.noise_scale import DECAY, NoiseScale, choose_parts, estimate, make_part_squares
from jaxlm.train.state import create_state
from jaxlm.train.step import make_step

# loss of a row = |theta - x|^2 / 2 with x ~ N(MU, diag(SIGMA)^2): gradient theta - x, so |G|^2 and tr(S) are
MU, SIGMA, THETA = np.array([0.3, -0.2, 0.0]), np.array([1.0, 0.5, 2.0]), np.array([0.8, 0.0, -0.4])
G2, TRACE = float(((THETA - MU) ** 2).sum()), float((SIGMA**2).sum())
ROWS = 48


def objective(params, batch, key):
    loss = 0.5 * jnp.sum(batch["weights"] * jnp.sum((params["w"] - batch["x"]) ** 2, -1))
    return loss, jnp.sum(batch["weights"]), {}


def draw(seed, weights=None):
    rng = np.random.default_rng(seed)
    weights = np.ones(ROWS) if weights is None else weights
    # A row of weight w is the mean of w draws: its noise is that of w tokens.
    x = MU + SIGMA * rng.normal(size=(ROWS, 3)) / np.sqrt(np.maximum(weights, 1e-9))[:, None]
    return {"x": x.astype(np.float32), "weights": weights.astype(np.float32)}


def estimates(parts, batches):
    squares = make_part_squares(objective, parts)
    params = {"w": jnp.asarray(THETA, jnp.float32)}
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    measure = jax.jit(jax.vmap(lambda batch: estimate(*squares(params, None, batch, None))))
    return np.stack(measure(stacked), axis=-1)  # [batches, 2]


RAGGED = np.random.default_rng(5).integers(0, 9, ROWS) * (
    np.arange(ROWS) % 6 > 0
)  # one of six parts is empty


@pytest.mark.parametrize("parts", [2, 6, 48])
@pytest.mark.parametrize("weights", [None, RAGGED], ids=["equal", "ragged"])
def test_both_estimates_are_unbiased_however_the_batch_is_cut(parts, weights):
    got = estimates(parts, [draw(seed, weights) for seed in range(600)])
    error = got.std(0) / np.sqrt(len(got))
    assert (error < [0.02, 0.4]).all()  # small enough to see a bias
    assert (np.abs(got.mean(0) - [G2, TRACE]) < 3.5 * error).all(), (got.mean(0), (G2, TRACE), error)


def test_equal_parts_give_the_two_batch_formula_and_the_sample_variance():
    batch, parts = draw(1), 6
    g2, trace = estimates(parts, [batch])[0]
    g = THETA - batch["x"].reshape(ROWS // parts, parts, 3).mean(0)  # part m has the rows m, m + M, ...
    small, big = ROWS / parts, ROWS
    gs, gb = (g**2).sum(-1).mean(), (g.mean(0) ** 2).sum()
    np.testing.assert_allclose(g2, (big * gb - small * gs) / (big - small), rtol=1e-4)
    np.testing.assert_allclose(trace, (gs - gb) / (1 / small - 1 / big), rtol=1e-4)
    np.testing.assert_allclose(trace, small * g.var(0, ddof=1).sum(), rtol=1e-4)


def test_padding_rows_change_nothing_and_a_single_part_tells_nothing():
    weights = (np.arange(ROWS) % 6 < 2) * 1.0
    padded = draw(3, weights)
    only = {
        name: x.reshape(-1, 6, *x.shape[1:])[:, :2].reshape(-1, *x.shape[1:]) for name, x in padded.items()
    }
    np.testing.assert_allclose(estimates(6, [padded]), estimates(2, [only]), rtol=1e-5)
    assert np.isnan(estimates(6, [draw(3, (np.arange(ROWS) % 6 == 2) * 1.0)])).all()


def measuring(toy, parts, tokens=64, **options):
    squares = make_part_squares(toy.objective, parts)
    return NoiseScale(squares, toy.batch, tokens_per_step=tokens, **options)


def test_averages_approach_the_noise_scale_and_go_on_after_a_restart():
    squares = make_part_squares(objective, 6)
    state = type("State", (), {"params": {"w": jnp.asarray(THETA, jnp.float32)}})()
    noise = NoiseScale(squares, draw, tokens_per_step=ROWS)
    rows = [noise(step, state) for step in range(150)]
    last = rows[-1]
    assert last["noise/b_simple"] == pytest.approx(TRACE / G2, rel=0.15)
    assert last["noise/steps_factor"] == pytest.approx(1 + last["noise/b_simple"] / ROWS)
    again = NoiseScale(squares, draw, tokens_per_step=ROWS, history=[*rows[:149], {"train/nll": 1.0}])
    assert again(149, state) == last
    fresh = NoiseScale(squares, draw, tokens_per_step=ROWS)
    assert fresh(149, state)["noise/b_simple"] != last["noise/b_simple"]
    shares = [(1 - DECAY) * DECAY ** (149 - n) for n in range(150)]
    wanted = np.array([[row["noise/trace"], row["noise/grad_square"]] for row in rows]).T @ shares
    assert last["noise/b_simple"] == pytest.approx(wanted[0] / wanted[1], rel=1e-9)


def test_drowned_gradients_give_no_number():
    lost = {"x": np.array([[9.0], [-9.0]], np.float32), "weights": np.ones(2, np.float32)}
    noise = NoiseScale(make_part_squares(objective, 2), lambda step: lost, tokens_per_step=2)
    row = noise(0, type("State", (), {"params": {"w": jnp.zeros(1)}})())
    assert row == {"noise/grad_square": pytest.approx(-81.0), "noise/trace": pytest.approx(162.0)}


def test_a_run_is_the_same_with_and_without_it(toy):
    optimizer = toy.optimizer(num_steps=6)
    step = make_step(toy.objective, optimizer)
    ends, seen = [], []
    for jobs in ((), (Every(2, measuring(toy, 4, dropout=True), "noise"),)):
        state, _ = create_state(toy.init, optimizer, 0)
        ended = train_loop(
            state, None, step, lambda n, _: toy.batch(n), jobs, num_steps=6, report=seen.append, log_every=1
        )
        ends.append(ended.state)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (ends[0].params, ends[1].params)), strict=True)
    )
    rows = [row for row in seen if "noise/trace" in row.extra]
    assert [row.step for row in rows] == [2, 4, 6]
    assert len({row.extra["noise/trace"] for row in rows}) == 3


def test_a_mesh_measures_the_same(toy):
    layout = toy.layout(data=2, fsdp=2)
    params, batch = toy.init(jax.random.key(0)), toy.batch(3)
    squares = make_part_squares(toy.objective, 4)
    alone = squares(params, None, batch, None)
    with use(layout):
        placed = jax.device_put(params, tree_shardings(layout, params, toy.AXES))
        rows = jax.device_put(batch, layout.sharding(("batch",)))
        split = make_part_squares(toy.objective, 4)(placed, None, rows, None)
    assert len(split[2].sharding.device_set) == 4
    for a, b in zip(alone, split, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_parts_are_whole_rows_for_every_device():
    assert choose_parts(32, most=16) == 16
    with pytest.raises(UserError, match=r"data\.batch_size=7 cannot be, 8 could"):
        choose_parts(7, shards=2)
