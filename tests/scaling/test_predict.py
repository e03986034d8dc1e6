"""Intervals of N*, D*, L* at a budget, and the choice of the next runs."""

import dataclasses
import json
import math

import numpy as np
import pytest

from jaxlm.cli import main
from jaxlm.errors import UserError
from jaxlm.scaling import predict as predict_module
from jaxlm.scaling.answers import predict_command
from jaxlm.scaling.fit import run_fit
from jaxlm.scaling.laws import LAWS, features, get_law, to_coordinates, to_parameters
from jaxlm.scaling.laws import optimum as law_optimum
from jaxlm.scaling.laws import predict as law_value
from jaxlm.scaling.lines import Refusal
from jaxlm.scaling.optima import fit_isoflop
from jaxlm.scaling.predict import (
    _at,
    candidates,
    extrapolation,
    loss_interval,
    next_runs,
    optima,
    predict,
    surface,
    value_at,
)
from jaxlm.scaling.problem import make_problem
from jaxlm.scaling.record import Fit, flops_per_param_token, optimum, predict_loss, save_fit
from jaxlm.scaling.solve import refit
from jaxlm.scaling.table import Points
from jaxlm.scaling.uncertainty import bootstrap

P = dict(E=1.8172, A=482.0, B=2085.0, alpha=0.35, beta=0.36)
BUDGETS = np.geomspace(1e18, 1e20, 5)


def loss(n, d, p=P):
    return p["E"] + p["A"] * n ** -p["alpha"] + p["B"] * d ** -p["beta"]


def best(c, p=P):
    al, be = p["alpha"], p["beta"]
    return (al * p["A"] / (be * p["B"])) ** (1 / (al + be)) * (c / 6) ** (be / (al + be))


def sweep(noise=0.003, seed=0, budgets=BUDGETS, sizes=7, width=6.0):
    c = np.repeat(budgets, sizes)
    n = best(c) * np.exp(np.tile(np.linspace(-1, 1, sizes) * math.log(width), len(budgets)))
    d = c / 6 / n
    return Points(n, d, c, loss(n, d) * np.exp(np.random.default_rng(seed).normal(0, noise, len(n))))


def fitted(points, draws=100, seed=0, **options):
    options = dict(objective="log_mse", starts=4, profile=False) | options
    return run_fit(points, "chinchilla", "surface", draws=draws, seed=seed, **options)


def constrained(fit):
    """The fit as one of the data-constrained law, with far more unique tokens than it needs."""
    limits = {"R_D": 1e9, "R_N": 1e9}
    return dataclasses.replace(
        fit,
        law="data_constrained",
        parameters=fit.parameters | limits,
        names=(*fit.names, "R_D", "R_N"),
        draws=[[*row, 1e9, 1e9] for row in fit.draws],
    )


@pytest.fixture(scope="module")
def fit():
    return fitted(sweep())


@pytest.fixture(scope="module")
def line():
    return fit_isoflop(sweep(), draws=100)


def test_a_surface_predicts_its_closed_form(fit):
    c = 1e21
    result = predict(fit, c)
    n, d, low = (float(v) for v in optimum(fit, c))
    assert result.N.value == pytest.approx(n, rel=1e-9)
    assert result.D.value == pytest.approx(d, rel=1e-9)
    assert result.L.value == pytest.approx(low, rel=1e-9)
    assert result.tokens_per_param.value == pytest.approx(d / n, rel=1e-9)
    assert result.N.value * result.D.value * 6 == pytest.approx(c, rel=1e-9)
    for estimate in (result.N, result.D, result.L, result.L_law, result.tokens_per_param):
        assert estimate.lo < estimate.value < estimate.hi
    assert result.L.hi - result.L.lo > result.L_law.hi - result.L_law.lo
    assert result.N.lo < best(c) < result.N.hi


def test_a_line_predicts_itself(line):
    c = 1e21
    p = line.parameters
    result = predict(line, c)
    assert result.N.value == pytest.approx(math.exp(p["log_kN"]) * c ** p["a"])
    assert result.D.value == pytest.approx(math.exp(p["log_kD"]) * c ** p["b"])
    assert result.L.value == pytest.approx(p["E_L"] + math.exp(p["log_kL"]) * c ** -p["c"])
    assert result.N.lo < best(c) < result.N.hi


def test_the_curve_runs_from_the_smallest_compute_to_the_budget(fit):
    curve = predict(fit, 1e21).curve
    assert curve[0]["budget"] == pytest.approx(1e18)
    assert curve[-1]["budget"] == pytest.approx(1e21)
    for row in curve:
        assert row["tokens_per_param"] == pytest.approx(row["D"] / row["N"])
        assert row["tokens_per_param_lo"] < row["tokens_per_param"] < row["tokens_per_param_hi"]
    widths = [math.log(row["N_hi"] / row["N_lo"]) for row in curve]
    assert widths[-1] > min(widths)


def test_a_wider_level_and_a_longer_reach_widen_the_interval(fit):
    def width(c, level):
        estimate = predict(fit, c, level).N
        return math.log(estimate.hi / estimate.lo)

    assert width(1e21, 0.8) < width(1e21, 0.95) < width(1e23, 0.95)


def test_numeric_and_closed_optima_agree(fit):
    """A data-constrained law with far more unique tokens than it needs is Chinchilla's."""
    closed = optima(fit, 1e20)[0]
    numeric = optima(constrained(fit), 1e20, U=1e12)[0]
    assert numeric == pytest.approx(closed, abs=1e-3)
    with pytest.raises(UserError, match="U"):
        optima(constrained(fit), 1e20)


def test_the_surface_of_the_estimate_and_of_the_draws(fit):
    n, d = np.array([1e8, 1e9]), np.array([1e10, 1e10])
    rows = surface(fit, n, d)
    assert rows.shape == (101, 2)
    assert rows[0] == pytest.approx(predict_loss(fit, n, d))
    moved = dataclasses.replace(fit, parameters=dict(zip(fit.names, fit.draws[3], strict=True)))
    assert rows[4] == pytest.approx(predict_loss(moved, n, d))


def test_the_interval_of_a_held_out_run_holds_noise_and_law(fit):
    one = loss_interval(fit, [1e8], [1e10])[0]
    wide = loss_interval(dataclasses.replace(fit, sigma=10 * fit.sigma), [1e8], [1e10])[0]
    assert one.lo < loss(1e8, 1e10) < one.hi
    assert wide.hi - wide.lo > 5 * (one.hi - one.lo)
    z = 1.96 * fit.sigma * one.value
    assert one.hi - one.lo > 1.9 * z


def test_extrapolation_is_named(fit):
    assert extrapolation(fit, 1e19) == []
    near, far = extrapolation(fit, 9e21)[0], extrapolation(fit, 1.1e22)[0]
    assert (near["name"], near["level"]) == ("extrapolation", "note")
    assert (far["name"], far["level"]) == ("extrapolation", "warning")
    assert far["value"] == pytest.approx(110)
    scarce = dataclasses.replace(fit, points=fit.points | {"U": [1e9] * len(fit.points["C"])})
    assert [a["name"] for a in predict(scarce, 1e20).diagnostics] == ["multi_epoch"]


def test_flops_in_another_unit_keep_their_ratio(fit):
    """C in exaFLOP beside counted N and D: 6e-18 FLOPs a parameter and token, not none."""
    exa = dataclasses.replace(fit, points=fit.points | {"C": [1e-18 * c for c in fit.points["C"]]})
    assert flops_per_param_token(exa) == pytest.approx(6e-18)
    assert predict(exa, 1e3).N.value == pytest.approx(predict(fit, 1e21).N.value)


def test_no_silent_number(fit, line):
    with pytest.raises(Refusal) as caught:
        predict(dataclasses.replace(fit, draws=[]), 1e21)
    assert caught.value.name == "no_interval"
    with pytest.raises(Refusal) as caught:
        next_runs(line, 1e21)
    assert caught.value.name == "no_surface"
    with pytest.raises(Refusal) as caught:
        next_runs(dataclasses.replace(fit, sigma=0.0), 1e21)
    assert caught.value.name == "no_noise"
    for budget in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="budget"):
            predict(fit, budget)
    with pytest.raises(UserError, match="level"):
        predict(fit, 1e20, level=95.0)


def test_draws_without_an_optimum_are_counted(fit):
    draws = np.array(fit.draws)
    draws[:7, fit.names.index("A")] = np.nan
    result = predict(dataclasses.replace(fit, draws=draws.tolist()), 1e20)
    assert result.draws == 93
    assert "draws_without_optimum" in [a["name"] for a in result.diagnostics]


def test_further_inputs_are_named_and_in_range(fit):
    one = constrained(fit)
    assert predict(one, 1e20, U=1e12).N.value == pytest.approx(predict(fit, 1e20).N.value, rel=1e-3)
    with pytest.raises(UserError, match=r"has no input 'u'.*takes U"):
        predict(one, 1e20, u=1e12)
    with pytest.raises(UserError, match="U=-1"):
        predict(one, 1e20, U=-1)


def test_a_curve_leaves_out_what_has_no_optimum_and_says_so(fit, monkeypatch):
    """A numeric law may have none at small budgets, which says nothing about the one that was asked for."""
    real = predict_module.optima

    def none_below(fit, budget, **extra):
        log_n, log_d = real(fit, budget, **extra)
        return (log_n, log_d) if budget > 1e19 else (np.full_like(log_n, np.nan), log_d)

    whole = predict(fit, 1e21)
    monkeypatch.setattr(predict_module, "optima", none_below)
    result = predict(fit, 1e21)
    assert result.N == whole.N
    assert result.curve == [row for row in whole.curve if row["budget"] > 1e19]
    missing = next(a for a in result.diagnostics if a["name"] == "curve_without_optimum")
    assert missing["value"] == len(whole.curve) - len(result.curve) > 0
    with pytest.raises(Refusal, match="no interior optimum"):
        predict(fit, 1e18)


def test_a_table_in_billions_has_the_same_optima(fit):
    """Sizes and tokens below 1 are sizes and tokens: nothing is clipped at one parameter or token."""
    unit = 1e-10
    a, alpha, b, beta = (fit.names.index(name) for name in ("A", "alpha", "B", "beta"))
    draws = np.array(fit.draws)
    draws[:, a] *= unit ** draws[:, alpha]
    draws[:, b] *= unit ** draws[:, beta]
    p = fit.parameters
    scaled = {"A": p["A"] * unit ** p["alpha"], "B": p["B"] * unit ** p["beta"]}
    columns = {name: [unit * v for v in fit.points[name]] for name in "ND"}
    small = dataclasses.replace(fit, parameters=p | scaled, draws=draws.tolist(), points=fit.points | columns)
    one, other = constrained(fit), constrained(small)
    got, want = predict(other, 1e20, U=unit * 1e12), predict(one, 1e20, U=1e12)
    assert got.N.value == pytest.approx(unit * want.N.value, rel=1e-9)
    assert pytest.approx(want.L, rel=1e-9) == got.L
    assert min(row["N"] for row in got.curve) < 1
    assert len(got.curve) == len(want.curve) == 25


# --- The law at its inputs ---


INPUTS = dict(N=2e8, D=3e9, C=4e18, U=1e9, sparsity=0.5, granularity=4.0, E=8.0, batch=500.0, L=2.5)


def made(name, noise=0.01):
    """A fit of this law whose draws scatter about made-up parameters, around runs at INPUTS."""
    law, spread = LAWS[name], np.array([0.5, 0.8, 1.25, 2.0])
    runs = {i: np.full(4, INPUTS[i]) * (1.0 if i in ("sparsity", "E") else spread) for i in law.inputs}
    x = features(runs)
    z = np.asarray(law.starts(x, np.array([2.9, 2.7, 2.5, 2.3])), float)[0]
    p = to_parameters(law, z, x)
    rng = np.random.default_rng(0)
    draws = to_parameters(law, z * (1 + 1e-4 * rng.normal(size=(60, len(z)))), x)
    return Fit(
        law=name,
        method="surface",
        objective="huber",
        delta=1e-3,
        parameters=dict(zip(law.names, map(float, p), strict=True)),
        names=law.names,
        draws=draws.tolist(),
        sigma=noise,
        points={i: [math.nan] * 4 for i in "NDCL"} | {i: v.tolist() for i, v in runs.items()},
    )


@pytest.mark.parametrize("name", LAWS)
def test_every_law_is_evaluated_at_its_inputs(name, tmp_path, capsys):
    fit, law = made(name), LAWS[name]
    at = {i: INPUTS[i] for i in law.inputs}
    path = save_fit(fit, tmp_path)
    flags = [f"--at={i}={v!r}" for i, v in at.items()]
    assert main(["predict", f"--fit={path}", *flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    want = float(law_value(law, fit.parameters, at))
    assert told["at"] == at
    assert told["target"] == law.target
    assert told["value"]["value"] == told["value_law"]["value"] == pytest.approx(want, rel=1e-12)
    of_draws = [float(law_value(law, dict(zip(law.names, d, strict=True)), at)) for d in fit.draws]
    for end in ("lo", "hi"):
        assert min(of_draws) - 1e-12 <= told["value_law"][end] <= max(of_draws) + 1e-12
    assert told["value"]["lo"] < told["value_law"]["lo"] <= told["value_law"]["hi"] < told["value"]["hi"]
    assert told["diagnostics"] == []
    assert main(["predict", f"--fit={path}", "--at=" + ",".join(f"{i}={v!r}" for i, v in at.items())]) == 0
    text = capsys.readouterr().out
    assert f"{want:.6g}" in text
    assert "95% from" in text


def test_a_table_of_best_rates_is_fitted_drawn_and_asked(tmp_path, capsys):
    """From a table that holds C and lr alone to the rate of a larger run."""
    rng = np.random.default_rng(0)
    rows = [(c, 0.3118 * c**-0.125 * math.exp(rng.normal(0, 0.02))) for c in np.geomspace(1e17, 1e20, 12)]
    table = tmp_path / "rates.csv"
    table.write_text("C,lr\n" + "".join(f"{c!r},{lr!r}\n" for c, lr in np.array(rows).tolist()))
    given = ["fit", f"--table={table}", "--columns=C=C,lr=lr", "--law=lr_compute", "--noprofile"]
    assert main([*given, "--draws=100", f"--out={tmp_path / 'fit'}"]) == 0
    assert [path.name for path in (tmp_path / "fit").glob("*.png")] == ["residuals.png"]
    capsys.readouterr()
    assert main(["predict", f"--fit={tmp_path / 'fit'}", "--at=C=1e22", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["target"] == "lr"
    assert told["value_law"]["lo"] < 0.3118 * 1e22**-0.125 < told["value_law"]["hi"]


def test_the_value_at_inputs_is_that_of_a_held_out_run(fit):
    """`--at` gives what `loss_interval` gives; an over-trained run's C is k N D."""
    answer = value_at(fit, {"N": 1e8, "D": 1e10})
    assert answer.value == loss_interval(fit, [1e8], [1e10])[0]
    assert value_at(fit, {"N": 1e8, "D": 1e10}, 0.5).value.lo > answer.value.lo
    trained = made("over_training")
    k = flops_per_param_token(trained)
    assert value_at(trained, {"N": 2e8, "D": 3e9}).at["C"] == k * 2e8 * 3e9
    assert value_at(trained, {"N": 2e8, "D": 3e9}).value == loss_interval(trained, [2e8], [3e9])[0]


def test_inputs_outside_of_the_runs_are_named():
    """By how much, and as a warning beyond two decades; a loss outside is warned of at once."""
    far = value_at(made("lr_power"), {"N": 8e8, "D": 6.6e11}).diagnostics
    assert [(a["name"], a["level"]) for a in far] == [("extrapolation", "note"), ("extrapolation", "warning")]
    assert [a["value"] for a in far] == pytest.approx([2.0, 110.0])
    low = value_at(made("loss_to_accuracy"), {"L": 1.0}).diagnostics
    assert [(a["name"], a["level"]) for a in low] == [("extrapolation", "warning")]
    below = value_at(made("loss_c"), {"C": 8.8e20}).diagnostics
    assert [(a["name"], a["level"], a["value"]) for a in below] == [
        ("extrapolation", "warning", pytest.approx(110.0))
    ]


def test_what_an_answer_needs_is_said(fit, line, tmp_path, capsys):
    path = save_fit(fit, tmp_path / "surface")
    lines = save_fit(line, tmp_path / "lines")
    rate = save_fit(made("lr_compute"), tmp_path / "rate")
    for flags, said in (
        ([f"--fit={path}"], "--budget, or --at for L = E + A N^-alpha + B D^-beta"),
        ([f"--fit={path}", "--at=N=1e9"], "needs D too"),
        ([f"--fit={path}", "--at=N=1e9,D=-1"], "D=-1.0 is outside"),
        ([f"--fit={path}", "--at=N=1e9,D=1e10,U=1e9"], "has no input 'U'"),
        ([f"--fit={path}", "--at=N=1e9,D=1e10", "--next=2"], "give --budget"),
        ([f"--fit={path}", "--at=N=1e9", "--budget=1e21"], "without a budget"),
        ([f"--fit={lines}"], "needs --budget"),
        ([f"--fit={lines}", "--at=C=1e21"], "no input besides the budget"),
        ([f"--fit={rate}", "--budget=1e22"], "Ask for its value at C (jaxlm predict --at)"),
    ):
        assert main(["predict", *flags]) == 2, flags
        assert said in capsys.readouterr().err, flags


# --- The next runs ---


def test_next_runs_are_within_the_candidates_and_cut_the_variance(fit):
    runs = next_runs(fit, 1e22, k=3)
    choice = {(float(n), float(d)) for n, d in candidates(fit)}
    assert len(runs) == 3
    for run in runs:
        assert (run.N, run.D) in choice
        flops = run.C
        assert flops == pytest.approx(6 * run.N * run.D)
        assert flops < 1e20 * (1 + 1e-9)
        assert 0 < run.reduction < 1
        assert run.sd_after < run.sd_before
    assert runs[1].sd_before == pytest.approx(runs[0].sd_after)
    with pytest.raises(UserError, match="k="):
        next_runs(fit, 1e22, k=0)
    with pytest.raises(UserError, match="positive"):
        next_runs(fit, 1e22, [(1e8, -1.0)])


def test_the_first_run_is_the_best_single_one(fit):
    choice = candidates(fit)
    noisy = dataclasses.replace(fit, sigma=0.1 * fit.sigma)
    for one in (fit, noisy):
        alone = [next_runs(one, 1e22, [pair], k=1)[0].reduction for pair in choice]
        first = next_runs(one, 1e22, choice, k=1)[0]
        assert first.reduction == pytest.approx(max(alone))
        assert choice[int(np.argmax(alone))].tolist() == [first.N, first.D]
    before = float(np.var(optima(fit, 1e22)[0][1:]))
    assert first.sd_before**2 == pytest.approx(before, rel=0.1)


def test_the_update_is_that_of_linear_gaussian_estimation():
    """Draws of a linear model: the formula is exact, and a candidate that says nothing gains nothing."""
    fit = fitted(sweep())
    rng = np.random.default_rng(0)
    order = fit.names.index("E")
    draws = np.tile([fit.parameters[n] for n in fit.names], (400, 1))
    draws[:, order] *= np.exp(rng.normal(0, 0.01, 400))  # E alone is uncertain: it does not move N*
    runs = next_runs(dataclasses.replace(fit, draws=draws.tolist()), 1e21, k=1)
    assert runs[0].sd_before == pytest.approx(0, abs=1e-12)


def test_the_next_runs_serve_the_inputs_that_were_asked_for(fit, tmp_path, capsys):
    """Target and candidates are at the unique tokens of `--at`, not at the most that any run had."""
    columns = fit.points | {"U": [1e13] * len(fit.points["C"])}
    one = dataclasses.replace(constrained(fit), points=columns)
    one = dataclasses.replace(
        one,
        parameters=one.parameters | {"R_D": 15.4, "R_N": 5.3},
        draws=[[*row, 15.4, 5.3] for row in fit.draws],
    )
    path, first = save_fit(one, tmp_path), {}
    for unique in (1e9, 1e13):
        run = next_runs(one, 1e21, k=1, U=unique)[0]
        spread = float(np.std(optima(one, 1e21, U=unique)[0][1:]))
        assert run.sd_before == pytest.approx(spread, rel=0.1)
        assert (run.N, run.D) in {(float(n), float(d)) for n, d in candidates(one, U=unique)}
        assert (
            main(["predict", f"--fit={path}", "--budget=1e20,1e21", f"--at=U={unique}", "--next=1", "--json"])
            == 0
        )
        told = json.loads(capsys.readouterr().out)[1]["next"]
        assert told == [dataclasses.asdict(run)]
        first[unique] = run
    assert first[1e9].N != first[1e13].N
    predict_command(path, [1e21], at={"U": 1e9}, next_count=1)
    assert "N* at C = 1e+21, U = 1e+09 most" in capsys.readouterr().out
    with pytest.raises(UserError, match="needs U"):
        next_runs(one, 1e21)
    with pytest.raises(UserError, match="no input 'u'"):
        next_runs(one, 1e21, U=1e9, u=1e9)


def spread_after(extra, trials, seed=0):
    """Standard deviation of log N* over refits of the sweep and of the same with extra runs."""
    rng = np.random.default_rng(seed)
    base = sweep(noise=0.0)
    n = np.r_[base.N, [r[0] for r in extra]]
    d = np.r_[base.D, [r[1] for r in extra]]
    law, out = get_law("chinchilla"), []
    for _ in range(trials):
        points = Points(n, d, 6 * n * d, loss(n, d) * np.exp(rng.normal(0, 0.003, len(n))))
        problem = make_problem(points, "chinchilla", "log_mse")
        truth = to_coordinates(law, np.array([P[name] for name in law.names]), problem.x)
        phi = refit(problem, problem.free(truth)[None])[0]
        found = dict(zip(law.names, problem.parameters(phi)[0], strict=True))
        out.append(math.log(law_optimum(law, found, 1e22)[0]))
    return float(np.std(out))


@pytest.mark.slow
def test_the_recommended_runs_cut_the_variance_by_what_was_promised():
    fit = fitted(sweep(), draws=400)
    promised = next_runs(fit, 1e22, k=3)
    before = spread_after([], 300)
    after = spread_after([(r.N, r.D) for r in promised], 300)
    want = promised[-1].sd_after / promised[0].sd_before
    assert after / before == pytest.approx(want, abs=0.15)
    top = 1e20
    centre = [(best(top), top / 6 / best(top))] * 3
    assert after < 0.95 * spread_after(centre, 300)  # three more runs at the best size say less


# --- The command ---


def test_the_command_prints_a_table_and_json(fit, tmp_path, capsys):
    path = save_fit(fit, tmp_path)
    path = path if path is not None else tmp_path / "fit.json"
    predict_command(path, [1e21], next_count=2)
    text = capsys.readouterr().out
    for word in ("N*, parameters", "tokens per parameter", "95% from", "variance removed", "extrapolation"):
        assert word in text, word
    predict_command(path, [1e21], next_count=1, as_json=True, level=0.9)
    record = json.loads(capsys.readouterr().out)
    assert record["budget"] == 1e21
    assert record["N"]["lo"] < record["N"]["value"] < record["N"]["hi"]
    assert len(record["next"]) == 1
    assert len(record["curve"]) == 25


def test_several_budgets_are_answered_in_turn(fit, tmp_path, capsys):
    path = str(save_fit(fit, tmp_path))
    assert main(["predict", f"--fit={path}", "--budget=1e20,1e21", "--budget=1e22", "--json"]) == 0
    assert [record["budget"] for record in json.loads(capsys.readouterr().out)] == [1e20, 1e21, 1e22]
    assert main(["predict", f"--fit={path}", "--budget=1e20,1e21"]) == 0
    text = capsys.readouterr().out
    assert text.count("N*, parameters") == 2
    assert "in the table's unit" in text
    for budget in ("--budget=1e20,high", "--budget=1e20,", "--budget=nan", "--budget=0"):
        assert main(["predict", f"--fit={path}", budget]) == 2
        assert "budget" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("at", "said"),
    [
        ("level=.5", "has no input 'level'"),
        ("budget=5", "has no input 'budget'"),
        ("N=1e9", "has no input 'N'"),
        ("U=1e9", "has no input 'U': it takes no input besides the budget"),
        ("fit=3", "has no input 'fit'"),
    ],
)
def test_an_input_that_the_law_does_not_read_is_refused(fit, tmp_path, capsys, at, said):
    path = save_fit(fit, tmp_path)
    assert main(["predict", f"--fit={path}", "--budget=1e20", f"--at={at}"]) == 2
    assert said in capsys.readouterr().err
    name, _, value = at.partition("=")
    if name not in ("level", "budget", "fit"):
        with pytest.raises(UserError, match="has no input"):
            predict(fit, 1e20, **{name: float(value)})


# --- Coverage ---


def redone(fit, points, seed, draws):
    """The same fit of other losses at the same runs: what `run_fit` does, without the search for a start."""
    law = get_law("chinchilla")
    problem = make_problem(points, "chinchilla", "log_mse")
    truth = to_coordinates(law, np.array([P[name] for name in law.names]), problem.x)
    phi = refit(problem, problem.free(truth)[None])[0][0]
    residuals = -problem.residuals(phi)[0]
    return dataclasses.replace(
        fit,
        parameters=dict(zip(law.names, map(float, problem.parameters(phi)), strict=True)),
        draws=bootstrap(problem, phi, draws=draws, seed=seed).draws.tolist(),
        sigma=float(np.sqrt((residuals**2).sum() / (len(points) - len(phi)))),
        residuals=residuals.tolist(),
    )


def test_a_fit_redone_is_the_fit(fit):
    again = redone(fit, sweep(), 0, 100)
    for name, value in fit.parameters.items():
        assert again.parameters[name] == pytest.approx(value, rel=1e-5)
    assert again.sigma == pytest.approx(fit.sigma)
    assert np.array(again.draws) == pytest.approx(np.array(fit.draws), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [7, 4])
def test_intervals_at_ten_times_the_compute_cover(fit, sizes):
    """Over 600 made-up sweeps of 35 and 20 runs: N*, D* and the loss of a new run at 10x the compute."""
    c = 10 * BUDGETS[-1]
    truth = (best(c), c / 6 / best(c))
    rng = np.random.default_rng(1)
    hits = []
    template = fitted(sweep(sizes=sizes), draws=0)
    for seed in range(600):
        one = redone(template, sweep(seed=seed, sizes=sizes), seed, 200)
        here = _at(one, c, 0.95, {})[0]
        run = loss(here["N"].value, here["D"].value) * math.exp(rng.normal(0, 0.003))
        values = (*truth, run)
        hits.append([here[k].lo < v < here[k].hi for k, v in zip("NDL", values, strict=True)])
    share = np.mean(hits, 0)
    print(f"coverage of N*, D*, loss at 10x, {len(template.residuals)} runs:", share)
    assert (share >= 0.92).all(), share
    assert (share <= 0.98).all(), share
