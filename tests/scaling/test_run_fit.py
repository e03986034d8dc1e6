"""Fits of surfaces: recovery, published numbers, coverage of the intervals, and the command."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.scaling.fit import run_fit
from jaxlm.scaling.fit_table import fit_command
from jaxlm.scaling.lines import percentiles
from jaxlm.scaling.problem import make_problem
from jaxlm.scaling.record import load_fit, optimum, predict_loss
from jaxlm.scaling.table import Points
from jaxlm.scaling.uncertainty import bootstrap, tail_share

TRUTH = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
LIGHT = dict(draws=0, profile=False, starts=4)


def design() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nine budgets of nine sizes around the truth's optimum, 8x to each side: N, D, C = 6 N D."""
    alpha, beta = TRUTH["alpha"], TRUTH["beta"]
    C = np.repeat(np.geomspace(1e18, 1e22, 9), 9)
    G = (alpha * TRUTH["A"] / (beta * TRUTH["B"])) ** (1 / (alpha + beta))
    N = G * (C / 6) ** (beta / (alpha + beta)) * np.tile(np.geomspace(1 / 8, 8, 9), 9)
    return N, C / 6 / N, C


def sweep(sigma: float = 0.0, seed: int = 0) -> Points:
    N, D, C = design()
    loss = TRUTH["E"] + TRUTH["A"] * N ** -TRUTH["alpha"] + TRUTH["B"] * D ** -TRUTH["beta"]
    return Points(N, D, C, loss * np.exp(np.random.default_rng(seed).normal(0, sigma, len(N))))


def write(path: Path, points: Points, **columns) -> Path:
    rows = zip(points.N, points.C, points.L, *columns.values(), strict=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["params", "train_flop", "loss_nats", *columns])
        writer.writerows([[repr(float(x)) if isinstance(x, float) else x for x in row] for row in rows])
    return path


@pytest.mark.parametrize("method", ["surface", "varpro"])
@pytest.mark.parametrize("objective", ["huber", "lad", "mse", "log_mse"])
def test_recovers_a_noise_free_surface(method, objective):
    fit = run_fit(sweep(), "chinchilla", method, objective, **LIGHT)
    for name, value in TRUTH.items():
        assert fit.parameters[name] == pytest.approx(
            value, rel=1e-4 if name in "AB" else 1e-5 if objective == "lad" else 1e-6
        ), name
    N, D, _ = design()
    np.testing.assert_allclose(predict_loss(fit, N, D), sweep().L, rtol=1e-8)
    n, d, _ = optimum(fit, 1e23)
    assert 6 * n * d == pytest.approx(1e23)
    assert fit.derived["a"] == pytest.approx(TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"]), rel=1e-6)


def test_every_start_reaches_the_same_optimum():
    fit = run_fit(sweep(0.01), "chinchilla", starts=16, draws=0, profile=False)
    assert len(fit.starts) == 16
    assert all(start["converged"] and abs(start["gap"]) < 1e-8 for start in fit.starts)
    assert len({tuple(np.ravel(list(start["start"].values()))) for start in fit.starts}) == 16


def test_the_two_surface_methods_and_the_profile_agree():
    points = sweep(0.005, seed=3)
    one = run_fit(points, method="surface", draws=100, starts=4)
    two = run_fit(points, method="varpro", draws=0, profile=False)
    assert one.value == pytest.approx(two.value, rel=1e-6)
    for name in TRUTH:
        low, high = one.profile[name]["interval"]
        assert low < one.parameters[name] < high
        ends = np.interp([low, high], one.profile[name]["grid"], one.profile[name]["value"])
        np.testing.assert_allclose(ends - one.value, one.profile[name]["cutoff"] - one.value, rtol=0.3)
        widths = [np.ptp(np.log(one.intervals[name][kind])) for kind in ("bootstrap", "sandwich", "profile")]
        assert max(widths) < 2.5 * min(widths), (name, widths)


def test_no_number_of_starts_is_all_of_them():
    fit = run_fit(sweep(0.002), "kaplan", starts=0, draws=0, profile=False)
    assert len(fit.starts) == fit.settings["start_grid"] > 16
    few = run_fit(sweep(0.002), "kaplan", **LIGHT)
    assert len(few.starts) == 4
    assert fit.value == pytest.approx(few.value, rel=1e-8)


def test_constraints():
    points = sweep(0.002)
    tied = run_fit(points, ties=("alpha=beta",), **LIGHT)
    assert tied.parameters["alpha"] == tied.parameters["beta"]
    fixed = run_fit(points, fixed={"E": 1.69}, **LIGHT)
    assert fixed.parameters["E"] == 1.69
    assert "E" not in fixed.names
    assert min(tied.value, fixed.value) > run_fit(points, **LIGHT).value
    for wrong in (
        dict(fixed={"Q": 1.0}),
        dict(ties=("alpha=gamma",)),
        dict(method="parabola", fixed={"E": 1}),
    ):
        with pytest.raises(UserError):
            run_fit(points, **LIGHT | wrong)
    with pytest.raises(UserError, match="points"):
        run_fit(points.take(np.arange(4)), **LIGHT)


def test_the_command_writes_what_it_found(tmp_path, capsys):
    points = sweep(0.002)
    labels = ["a" if i % 2 else "b" for i in range(81)]
    table = write(tmp_path / "runs.csv", points, corpus=labels)
    columns = "N=params,C=train_flop,loss=loss_nats"
    options = dict(columns=columns, draws=30, starts=3, plots=False)
    assert len(fit_command(table, out=tmp_path / "fit", drop_highest=5, where="params > 1e7", **options)) == 1
    fit = load_fit(tmp_path / "fit")
    raw = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert raw["parameters"] == fit.parameters
    assert {row["rule"] for row in fit.excluded} == {"drop_highest"}
    assert fit.data["used"] == len(fit.points["L"]) == 76
    assert len(fit.draws) == 30
    assert any("C/(6N)" in note for note in fit.notes)
    shown = capsys.readouterr().out
    assert "drop_highest" in shown
    assert "alpha" in shown
    fit_command(table, out=tmp_path / "by", group="corpus", **options)
    assert {path.parent.name for path in (tmp_path / "by").rglob("fit.json")} == {"a", "b"}
    with pytest.raises(UserError, match="did you mean 'params'"):
        fit_command(
            table, out=tmp_path / "no", **options | dict(columns="N=param,C=train_flop,loss=loss_nats")
        )
    assert not (tmp_path / "no").exists()


CHINCHILLA = os.environ.get("JAXLM_CHINCHILLA_CSV", "")


@pytest.mark.skipif(not CHINCHILLA, reason="JAXLM_CHINCHILLA_CSV does not name the digitised runs")
def test_published_fits_of_the_digitised_chinchilla_runs(tmp_path):
    """Besiroglu et al. 2024 (arXiv:2404.10102): 245 runs, the five highest losses left out."""
    options = dict(columns="N=params,C=train_flop,loss=loss_nats", drop_highest=5, plots=False)
    fit_command(CHINCHILLA, out=tmp_path / "huber", **options)
    huber = load_fit(tmp_path / "huber")
    assert huber.value == pytest.approx(1.018274e-3, abs=5e-10)
    wanted = {"E": (1.8172, 5e-5), "A": (478, 0.5), "B": (2143, 0.6), "alpha": (0.3473, 5e-5)}
    for name, (value, error) in (wanted | {"beta": (0.3672, 5e-5)}).items():
        assert huber.parameters[name] == pytest.approx(value, abs=error)
    assert all(abs(start["gap"]) < 1e-8 for start in huber.starts)
    draws = np.array(huber.draws)
    errors = dict(zip(huber.names, draws.std(0), strict=True))
    for name, value in {"E": 0.026, "alpha": 0.0154, "beta": 0.0206}.items():
        assert errors[name] == pytest.approx(value, rel=0.15)
    fit_command(CHINCHILLA, out=tmp_path / "lad", objective="lad", draws=0, profile=False, **options)
    lad = load_fit(tmp_path / "lad").parameters
    wanted = {"A": (482.0, 0.05), "B": (2085.4, 0.05), "E": (1.8169, 5e-5), "alpha": (0.34781, 5e-6)}
    for name, (value, error) in (wanted | {"beta": (0.36585, 5e-6)}).items():
        assert lad[name] == pytest.approx(value, abs=error)


@pytest.mark.parametrize("seed", [0, 1])
def test_intervals_are_those_whose_coverage_is_tested(seed):
    """The percentiles of `uncertainty.bootstrap` from the optimum; test_uncertainty.py has their coverage."""
    points = sweep(0.002, seed)
    fit = run_fit(points, starts=2, draws=120, seed=seed, profile=False)
    problem = make_problem(points, "chinchilla", "huber")
    z = np.array([fit.parameters[name] for name in TRUTH])
    z[1:3] = np.log(z[1:3])
    found = bootstrap(problem, problem.free(z), draws=120, seed=seed)
    tail = tail_share(0.95, 0, found.calibration)
    assert tail != 0.025
    assert fit.bootstrap["calibration"] == pytest.approx(found.calibration, rel=1e-2)
    for i, name in enumerate(TRUTH):
        wanted = percentiles(found.draws[:, i], tail)
        np.testing.assert_allclose(fit.intervals[name]["bootstrap"], wanted, rtol=1e-4)
