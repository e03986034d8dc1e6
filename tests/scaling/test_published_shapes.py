"""Made-up tables in the shapes in which others publish theirs: what a fit of each says and does not say."""

import dataclasses
import json

import numpy as np
import pytest

from jaxlm.scaling.design_checks import duplicate_rows, mixed_rows
from jaxlm.scaling.fit import run_fit
from jaxlm.scaling.fit_table import fit_command
from jaxlm.scaling.laws import LAWS, predict
from jaxlm.scaling.problem import make_problem
from jaxlm.scaling.solve import look_around, solve
from jaxlm.scaling.table import Points

P = dict(E=1.8, A=480.0, B=2000.0, alpha=0.34, beta=0.36)


def rectangle(noise=0.003, seed=0):
    """25 runs of five sizes and five lengths, losses with seed noise."""
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 5)))
    shocks = np.exp(np.random.default_rng(seed).normal(0, noise, len(n)))
    return n, d, predict(LAWS["chinchilla"], P, {"N": n, "D": d}) * shocks


def alarms(fit, *levels):
    return {d["name"]: d for d in fit.diagnostics if not levels or d["level"] in levels}


def quick(path, columns, out, **options):
    options = dict(draws=20, starts=4, profile=False, plots=False) | options
    return fit_command(str(path), columns, out=str(out), **options)


def test_a_long_table_of_two_metrics_is_not_fitted_in_silence(tmp_path):
    """One row for each run and metric; by group the two are apart, and each is its own."""
    n, d, loss = rectangle()
    rows = [
        dict(run=i, metric=kind, params=a, tokens=b, loss=c)
        for kind, values in (("nats", loss), ("bits", loss / np.log(2)))
        for i, (a, b, c) in enumerate(zip(n, d, values, strict=True))
    ]
    path = tmp_path / "long.json"
    path.write_text(json.dumps(rows))
    columns = "N=params,D=tokens,loss=loss"
    (both,) = quick(path, columns, tmp_path / "both")
    assert alarms(both, "warning")["mixed_rows"]["value"] == pytest.approx(-np.log(np.log(2)))
    apart = quick(path, columns, tmp_path / "apart", group="metric")
    assert [f.parameters["E"] for f in apart] == pytest.approx([1.8, 1.8 / np.log(2)], rel=0.1)
    assert not any("mixed_rows" in alarms(fit) for fit in apart)


def test_seeds_of_one_cell_are_no_mixture():
    n, d, loss = (np.tile(v, 2) for v in rectangle())
    loss = loss * np.exp(np.random.default_rng(1).normal(0, 0.01, len(loss)))
    fit = run_fit(Points(n, d, 6 * n * d, loss), draws=0, starts=4, profile=False)
    assert "mixed_rows" not in alarms(fit)
    twofold = Points(n, d, 6 * n * d, np.where(np.arange(50) < 25, 1, 2) * loss)
    for law in ("chinchilla", "power"):
        assert [alarm["name"] for alarm in mixed_rows(twofold, law)] == ["mixed_rows"]


@pytest.mark.parametrize("swapped", [False, True])
def test_unique_tokens_and_tokens_that_are_swapped(swapped):
    """A law of repeats on runs that repeat nothing: its R_D is no estimate."""
    n, unique, _ = rectangle()
    d = unique * np.tile([1.0, 4.0, 16.0, 40.0, 100.0], 5)[np.argsort(np.argsort(unique, kind="stable"))]
    p = P | dict(R_D=15.0, R_N=5.0)
    loss = predict(LAWS["data_constrained"], p, {"N": n, "D": d, "U": unique})
    loss = loss * np.exp(np.random.default_rng(0).normal(0, 0.003, len(n)))
    u, d = (d, unique) if swapped else (unique, d)
    points = Points(n, d, 6 * n * d, loss, extra={"U": u})
    held = dict(E=1.8, A=480.0, B=2000.0, alpha=0.34, beta=0.36)
    fit = run_fit(points, "data_constrained", fixed=held, draws=0, starts=4, profile=False)
    found = alarms(fit, "warning")
    assert ("no_repeats" in found) == swapped
    same = Points(*(np.ones(2) for _ in "NDCL"), extra={"U": np.arange(2) + 1.0})
    assert duplicate_rows(same, "data_constrained") == []
    assert len(duplicate_rows(same, "chinchilla")) == 1
    if swapped:
        assert "swapped?" in found["no_repeats"]["text"]
    else:
        assert fit.parameters["R_D"] == pytest.approx(15.0, rel=0.3)


def test_an_exact_table_says_that_it_is_no_measurement():
    n, d, loss = rectangle(noise=0)
    fit = run_fit(Points(n, d, 6 * n * d, loss), draws=20, starts=4)
    assert fit.parameters == pytest.approx(P, rel=1e-5)
    assert "no_noise" in alarms(fit, "note")
    assert not {"heavy_tails", "influential_points", "residual_trend"} & set(alarms(fit))
    noisy = run_fit(Points(n, d, 6 * n * d, rectangle()[2]), draws=0, starts=4, profile=False)
    assert "no_noise" not in alarms(noisy)


@pytest.mark.parametrize("power", [0.0, 0.1])
def test_an_exponent_of_a_single_power_is_a_trend_or_none(power):
    """A straight line has no ridge, however small the exponent; it may cross 0."""
    n, d, _ = rectangle()
    lr = 0.4 * n**-0.4 * d**power * np.exp(np.random.default_rng(0).normal(0, 0.2, len(n)))
    points = Points(n, d, 6 * n * d, np.full(len(n), np.nan), extra={"lr": lr})
    fit = run_fit(points, "lr_power", objective="log_mse", draws=50)
    found = alarms(fit)
    assert "flat_ridge" not in found
    assert ("no_trend" in found) == (power == 0)
    if power == 0:
        assert found["no_trend"]["value"][0] == "b"
    assert "predicted lr" in found["rounding"]["text"]


def test_shares_of_the_compute_stay_shares():
    """Twelve runs, five parameters: no interval of a leaves 0 to 1."""
    n, d, loss = (v[:12] for v in rectangle(noise=0.05))
    fit = run_fit(Points(n, d, 6 * n * d, loss), draws=0, starts=4, profile=False)
    for name in ("a", "b"):
        for low, high in fit.intervals[name].values():
            assert 0 <= low <= fit.derived[name] <= high <= 1


def test_flops_in_gigaflop_are_named(tmp_path):
    n, d, loss = rectangle()
    path = tmp_path / "logged.csv"
    lines = [
        f'"{a:.0f}","{b:.0f}","{6 * a * b / 1e9:.6f}","{c:.5f}"' for a, b, c in zip(n, d, loss, strict=True)
    ]
    head = '"parameter_count","throughput/total_tokens","throughput/total_gflops","eval/loss"'
    path.write_text("\n".join([head, *lines]))
    roles = "N=parameter_count,D=throughput/total_tokens,loss=eval/loss,C=throughput/total_gflops"
    (fit,) = quick(path, roles, tmp_path / "a")
    assert "in GFLOP: C=COLUMN*1e+09" in alarms(fit, "warning")["odd_units"]["text"]
    (fit,) = quick(path, roles + "*1e9", tmp_path / "b")
    assert "odd_units" not in alarms(fit)
    assert fit.data["columns"]["C"] == "throughput/total_gflops*1e9"


@pytest.mark.parametrize("law", ["lr_power", "lr_compute"])
def test_a_whole_grid_is_no_table_of_optima(law):
    """Every rate that was tried, not the best: the fit says so, and not of two optima by two seeds."""
    n, d, _ = rectangle()
    best = 0.4 * n**-0.4 * d**0.1
    rng = np.random.default_rng(0)
    for factors, told in (([0.25, 0.5, 1, 2, 4], True), ([0.9, 1.1], False)):
        lr = np.concatenate([best * f for f in factors]) * np.exp(rng.normal(0, 0.02, len(n) * len(factors)))
        a, b = (np.tile(v, len(factors)) for v in (n, d))
        points = Points(a, b, 6 * a * b, np.full(len(a), np.nan), extra={"lr": lr})
        found = alarms(run_fit(points, law, objective="log_mse", draws=0, profile=False), "warning")
        assert ("not_optima" in found) == told


def test_a_lower_optimum_beside_the_one_that_was_found_is_seen():
    """Two wells: the search from the start ends in the shallow one, a look around it finds the deep one."""

    def wells(z, x):
        alpha = z[..., 2, None]
        shallow, deep = (
            h * np.exp(-(((alpha - at) / 0.02) ** 2)) for h, at in ((0.010, 0.30), (0.015, 0.40))
        )
        r = 0.02 - shallow - deep + 0 * x["D"]
        slope = 2 / 0.02**2 * (shallow * (alpha - 0.30) + deep * (alpha - 0.40)) + 0 * x["D"]
        jac = np.zeros((*r.shape, 3))
        jac[..., 2] = np.exp(r) * slope
        return np.exp(r), jac

    d, one = np.geomspace(1e6, 1e9, 8), np.ones(8)
    problem = make_problem(Points(d, d, d, one), "loss_d", "huber", 1e-3, fixed=dict(E=0.5, A=1.0))
    problem = dataclasses.replace(problem, law=dataclasses.replace(problem.law, form=wells))
    found = solve(problem, np.array([[0.5, 0.0, 0.31]]), near=True)
    assert found.phi == pytest.approx([0.30], abs=1e-3)
    lower = look_around(problem, found.phi, np.array([[0.05**2]]), seed=0)
    assert lower == pytest.approx([0.40], abs=1e-3)
    assert look_around(problem, lower, np.array([[0.05**2]]), seed=0) is None
