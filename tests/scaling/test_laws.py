"""The laws: gradients, optima, limits in which one law is another, and recovery of known parameters."""

import dataclasses
import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from jaxlm.errors import UserError
from jaxlm.scaling.fit import run_fit
from jaxlm.scaling.laws import LAWS, features, get_law, optimum, predict, to_coordinates, to_parameters
from jaxlm.scaling.problem import OBJECTIVES, make_problem
from jaxlm.scaling.solve import solve
from jaxlm.scaling.table import Points
from jaxlm.scaling.varpro import nnls, solve_varpro

# Published values where a paper gives them.
TRUTH = {
    "chinchilla": dict(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
    "kaplan": dict(N_c=6.4e13, D_c=1.8e13, alpha_N=0.076, alpha_D=0.103),
    "data_constrained": dict(
        E=math.exp(0.6254804),
        A=math.exp(6.255414),
        B=math.exp(7.3049974),
        alpha=0.3526596,
        beta=0.3526596,
        R_D=15.387756,
        R_N=5.309743,
    ),
    "over_training": dict(E=1.5, A=120.0, B=180.0, eta=0.14),
    "farseer": dict(
        a1=-0.124, b1=0.424, alpha=0.123, a2=88.01, b2=-6.287, beta=-0.1, a3=-0.021, b3=0.091, gamma=0.169
    ),
    "moe_sparsity": {
        **dict(E=0.94, A=16612.5, B=5455.67, c=0.4598, d=17.26),
        **{"alpha": 0.5962, "beta": 0.3954, "lambda": -0.1666, "delta": 0.1603, "gamma": 0.1595},
    },
    "moe_granularity": dict(E=0.47, A=18.1, B=30.8, g=2.1, alpha=0.115, beta=0.147, gamma=0.58),
    "moe_routed": dict(a=-0.082, b=-0.108, c=0.009, d=1.104, E_s=1.847, E_m=314.478),
    "loss_n": dict(E=1.7, A=400.0, alpha=0.34),
    "loss_d": dict(E=1.7, A=400.0, alpha=0.34),
    "loss_c": dict(E=1.7, A=2000.0, alpha=0.16),
    "lr_power": dict(c=1.79, a=-0.713, b=0.307),
    "lr_compute": dict(c=0.3118, a=-0.125),
    "batch_power": dict(c=0.58, a=0.01, b=0.571),
    "batch_compute": dict(c=0.292, a=0.3271),
    "critical_batch_loss": dict(c=2e8, a=1 / 0.21),
    "critical_batch_data": dict(c=20.0, a=0.47),
    "critical_batch": dict(S_min=3000.0, E_min=5e8),
    "loss_to_accuracy": dict(a=0.75, b=0.25, k=3.0, L0=2.4),
    "loss_to_error": dict(eps=0.85, k=2.5, gamma=0.7),
}


def runs(law: str, count: int = 100, seed: int = 1) -> Points:
    """Made-up runs that follow the law exactly."""
    rng = np.random.default_rng(seed)
    n, d = 10 ** rng.uniform(7, 10.3, count), 10 ** rng.uniform(8.5, 11.5, count)
    columns = {
        "N": n,
        "D": d,
        "C": 6 * n * d,
        "U": 10 ** rng.uniform(8, 10.7, count),
        "L": rng.uniform(1.8, 3.6, count),
        "sparsity": rng.choice([0, 0.5, 0.75, 0.9, 0.95, 0.98], count),
        "granularity": 2.0 ** rng.integers(0, 5, count),
        "E": 2.0 ** rng.integers(0, 10, count),
        "batch": 2.0 ** rng.integers(13, 22, count),
    }
    form = LAWS[law]
    columns[form.target] = predict(form, TRUTH[law], {name: columns[name] for name in form.inputs})
    extra = {name: v for name, v in columns.items() if name not in ("N", "D", "C", "L")}
    return Points(N=n, D=d, C=columns["C"], L=columns["L"], extra=extra)


def test_every_law_has_a_truth_here():
    assert set(TRUTH) == set(LAWS)


@pytest.mark.parametrize("law", LAWS)
def test_gradient_is_that_of_the_value(law):
    problem = make_problem(runs(law, 12), law)
    truth = to_coordinates(problem.law, np.array([TRUTH[law][n] for n in problem.law.names]), problem.x)
    rng = np.random.default_rng(0)
    z = truth + 0.03 * rng.standard_normal((6, len(truth))) * np.minimum(np.abs(truth), 1.0)
    value, jac = problem.law.form(z, problem.x)
    assert jac.shape == (6, 12, len(truth))
    for k, step in enumerate(1e-6 * np.eye(len(truth))):
        up, down = (problem.law.form(z + s * step, problem.x)[0] for s in (1, -1))
        np.testing.assert_allclose(
            jac[..., k], (up - down) / 2e-6, rtol=2e-6, atol=1e-7 * np.abs(value).max()
        )


@pytest.mark.parametrize("law", LAWS)
def test_parameters_survive_the_coordinates(law):
    form = LAWS[law]
    points = runs(law, 12)
    given = {"N": points.N, "D": points.D, "C": points.C, "L": points.L, **points.extra}
    x = features({name: given[name] for name in form.inputs})
    p = np.array([TRUTH[law][n] for n in form.names])
    np.testing.assert_allclose(to_parameters(form, to_coordinates(form, p, x), x), p, rtol=1e-12)


def recover(law: str, objective: str, starts: int) -> dict[str, float]:
    problem = make_problem(runs(law), law, objective)
    grid = problem.law.starts(problem.x, problem.y)
    chosen = np.random.default_rng(3).choice(len(grid), min(starts, len(grid)), replace=False)
    found = solve(problem, grid[chosen])
    assert found.value < 1e-11
    return dict(zip(problem.law.names, problem.parameters(found.phi), strict=True))


@pytest.mark.parametrize("law", LAWS)
def test_exact_runs_give_the_parameters_back(law):
    got = recover(law, "log_mse", 8 if law == "moe_sparsity" else 4)
    assert got == pytest.approx(TRUTH[law], rel=1e-7)


@pytest.mark.parametrize("law", LAWS)
def test_an_interval_holds_its_estimate(law):
    """Of every kind, of parameters and of derived numbers, though a law's limits are of its coordinates."""
    points, target = runs(law, 60), LAWS[law].target
    noise = np.exp(np.random.default_rng(2).normal(0, 0.002, len(points)))
    moved = points.L * noise if target == "L" else points.extra[target] * noise
    extra = dict(points.extra) if target == "L" else {**points.extra, target: moved}
    points = dataclasses.replace(points, extra=extra, **({"L": moved} if target == "L" else {}))
    fit = run_fit(points, law, objective="log_mse", starts=4, draws=0, profile=False)
    kinds = [(name, kind, ends) for name, found in fit.intervals.items() for kind, ends in found.items()]
    assert {kind for _, kind, _ in kinds} == {"gauss_newton", "sandwich"}
    for name, kind, (low, high) in kinds:
        value = {**fit.parameters, **fit.derived}[name]
        assert low <= value <= high, (name, kind, low, value, high)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("law", LAWS)
def test_exact_runs_give_the_parameters_back_under_every_objective(law, objective):
    got = recover(law, objective, 12 if law in ("moe_sparsity", "farseer") else 6)
    assert got == pytest.approx(TRUTH[law], rel=1e-7)


@pytest.mark.parametrize("law", ["chinchilla", "over_training", "loss_n"])
def test_variable_projection_gives_the_parameters_back(law):
    problem = make_problem(runs(law), law, "huber")
    found = solve_varpro(problem, law)
    got = dict(zip(problem.law.names, problem.parameters(found.phi), strict=True))
    assert got == pytest.approx(TRUTH[law], rel=1e-6)


@pytest.mark.parametrize(("scale_n", "scale_d"), [(1e-6, 1e-9), (1e-3, 1.0), (100.0, 100.0)])
def test_units_change_the_coefficients_and_nothing_else(scale_n, scale_d):
    """Parameters from 1e1 to 1e12, tokens from 1 to 1e14."""
    points, truth = runs("chinchilla"), TRUTH["chinchilla"]
    moved = Points(points.N * scale_n, points.D * scale_d, points.C, points.L)
    problem = make_problem(moved, "chinchilla", "huber")
    found = solve(problem, problem.law.starts(problem.x, problem.y)[::900])
    want = truth | {"A": truth["A"] * scale_n ** truth["alpha"], "B": truth["B"] * scale_d ** truth["beta"]}
    got = dict(zip(problem.law.names, problem.parameters(found.phi), strict=True))
    assert got == pytest.approx(want, rel=1e-7)


@pytest.mark.parametrize("law", [name for name, law in LAWS.items() if law.compute])
@pytest.mark.parametrize("k", [6.0, 7.3])
def test_optimum_has_the_least_loss_of_its_compute(law, k):
    form, p, c = LAWS[law], TRUTH[law], 3e20
    extra = {
        name: v for name, v in dict(U=2e10, sparsity=0.75, granularity=4.0).items() if name in form.inputs
    }
    n, d = optimum(form, p, c, k, extra)
    assert float(k * n * d) == pytest.approx(c, rel=1e-12)
    others = {name: np.array(v) for name, v in extra.items()}

    def loss(log_n):
        size = np.exp(log_n)
        # C of over_training is part of the law: the budget, by whichever convention.
        inputs = {"N": size, "D": c / k / size, "C": k / 6 * 6 * size * (c / k / size), **others}
        return float(predict(form, p, {name: inputs[name] for name in form.inputs}))

    found = minimize_scalar(
        loss, bounds=(np.log(n) - 3, np.log(n) + 3), method="bounded", options={"xatol": 1e-9}
    )
    assert float(np.log(n)) == pytest.approx(found.x, abs=2e-6)


def test_shares_at_the_chinchilla_optimum_are_as_the_exponents():
    """A N^-alpha : B D^-beta = beta : alpha, a + b = 1, and the reducible loss falls as C^-c."""
    p, form = TRUTH["chinchilla"], LAWS["chinchilla"]
    n, d = optimum(form, p, np.array([1e18, 1e24]))
    first, second = p["A"] * n ** -p["alpha"], p["B"] * d ** -p["beta"]
    np.testing.assert_allclose(first / second, p["beta"] / p["alpha"], rtol=1e-12)
    derived = form.derived(p)
    assert derived["a"] + derived["b"] == pytest.approx(1)
    assert derived["a"] == pytest.approx(0.5126, abs=1e-4)
    assert np.log((first + second)[0] / (first + second)[1]) / np.log(1e6) == pytest.approx(derived["c"])


def test_kaplan_exponents():
    """N* ~ C^.575 of the joint fit's own exponents, a + b = 1."""
    derived = LAWS["kaplan"].derived(TRUTH["kaplan"])
    assert derived["a"] == pytest.approx(0.103 / (0.076 + 0.103))
    assert derived["a"] + derived["b"] == pytest.approx(1)


def test_data_constrained_is_chinchilla_within_one_epoch_and_saturates_beyond():
    p = TRUTH["data_constrained"]
    one, many = LAWS["chinchilla"], LAWS["data_constrained"]
    n, d = np.array([1e7, 5e8]), np.array([1e9, 2e10])
    base = {name: p[name] for name in one.names}
    # With U = D unique tokens and N below N*(U) nothing repeats.
    np.testing.assert_allclose(
        predict(many, p, {"N": n, "D": d, "U": d}), predict(one, base, {"N": n, "D": d}), rtol=1e-14
    )
    # Four epochs are almost as good as fresh data, a thousand add little to a hundred.
    u = np.full(4, 1e9)
    loss = predict(many, p, {"N": np.full(4, 1e7), "D": u * [1, 4, 100, 1000], "U": u})
    fresh = predict(one, base, {"N": 1e7, "D": 4e9})
    assert loss[1] - fresh < 0.1 * (loss[0] - fresh)
    assert loss[2] - loss[3] < 0.01 * (loss[0] - loss[3])


def test_muennighoff_repeated_tokens_are_worth_what_the_formula_says():
    p = TRUTH["data_constrained"]
    epochs, u = 10.0, 1e9
    worth = u * (1 + p["R_D"] * (1 - math.exp(-(epochs - 1) / p["R_D"])))
    n = 1e7  # below N*(U): its own effective size
    want = p["E"] + p["A"] * n ** -p["alpha"] + p["B"] * worth ** -p["beta"]
    assert predict(LAWS["data_constrained"], p, {"N": n, "D": epochs * u, "U": u}) == pytest.approx(want)


def test_over_training_is_chinchilla_with_tied_exponents():
    p = TRUTH["over_training"]
    two_eta = 2 * p["eta"]
    same = dict(E=p["E"], A=p["A"] * 6 ** -p["eta"], B=p["B"] * 6 ** -p["eta"], alpha=two_eta, beta=two_eta)
    n, d = np.array([1e8, 3e9]), np.array([1e11, 2e10])
    np.testing.assert_allclose(
        predict(LAWS["over_training"], p, {"N": n, "D": d, "C": 6 * n * d}),
        predict(LAWS["chinchilla"], same, {"N": n, "D": d}),
        rtol=1e-12,
    )
    for c in (1e20, 1e23):
        np.testing.assert_allclose(
            optimum(LAWS["over_training"], p, c), optimum(LAWS["chinchilla"], same, c), rtol=1e-12
        )


def test_mccandlish_curve():
    """(S/S_min - 1)(E/E_min - 1) = 1, and at the critical batch both are twice their least."""
    p, batch = TRUTH["critical_batch"], np.array([1e4, 1e5, 1e6])
    steps = predict(LAWS["critical_batch"], p, {"batch": batch})
    np.testing.assert_allclose((steps / p["S_min"] - 1) * (steps * batch / p["E_min"] - 1), 1)
    at = LAWS["critical_batch"].derived(p)["B_crit"]
    assert predict(LAWS["critical_batch"], p, {"batch": at}) == pytest.approx(2 * p["S_min"])


def test_laws_refuse_what_they_cannot_take():
    with pytest.raises(UserError, match="did you mean 'chinchilla'"):
        get_law("chinchila")
    with pytest.raises(UserError, match="needs U"):
        predict(LAWS["data_constrained"], TRUTH["data_constrained"], {"N": 1e8, "D": 1e9})
    with pytest.raises(UserError, match="outside"):
        predict(LAWS["chinchilla"], TRUTH["chinchilla"], {"N": 1e8, "D": -1.0})
    with pytest.raises(UserError, match="no compute optimum"):
        optimum(LAWS["moe_routed"], TRUTH["moe_routed"], 1e20)
    with pytest.raises(UserError, match="positive FLOPs"):
        optimum(LAWS["chinchilla"], TRUTH["chinchilla"], float("nan"))
    bare = TRUTH["moe_granularity"] | {"A": 1e-200, "g": 1e-200}  # no size is too small
    with pytest.raises(UserError, match="no interior optimum"):
        optimum(LAWS["moe_granularity"], bare, 1e20, extra={"granularity": 1})


def test_nnls_agrees_with_scipy():
    from scipy.optimize import nnls as reference

    rng = np.random.default_rng(0)
    columns, weights = rng.uniform(0.1, 2, (40, 15, 3)), rng.uniform(0.5, 2, 15)
    y = rng.standard_normal((40, 15)) + columns @ np.array([1.0, -0.5, 0.3])
    got = nnls(columns, y, weights)
    root = np.sqrt(weights)
    want = [reference(c * root[:, None], b * root)[0] for c, b in zip(columns, y, strict=True)]
    np.testing.assert_allclose(got, want, atol=1e-10)
    assert (got == 0).any()
    assert (got > 0).all(-1).any()
