"""Every alarm fires on a made-up case and is silent on a healthy one."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.scaling import design_checks, diagnostics, downstream, fit_checks, line_checks, optima, predict
from jaxlm.scaling.diagnostics import Refusal, compare, examine, require, two_step
from jaxlm.scaling.fit import run_fit
from jaxlm.scaling.optima import fit_envelope, fit_isoflop
from jaxlm.scaling.table import Points, read_table, select

P = dict(E=1.8172, A=482.0, B=2085.0, alpha=0.35, beta=0.35)
BUDGETS = np.geomspace(1e18, 1e21, 5)


def loss(n, d, p=P):
    return p["E"] + p["A"] * n ** -p["alpha"] + p["B"] * d ** -p["beta"]


def best(c, p=P):
    al, be = p["alpha"], p["beta"]
    return (al * p["A"] / (be * p["B"])) ** (1 / (al + be)) * (c / 6) ** (be / (al + be))


def sweep(p=P, budgets=BUDGETS, sizes=7, width=4.0, noise=0.003, seed=0, drift=0.0, **extra):
    """Iso-FLOP runs within `width` of N* exp(drift log C / C_0)."""
    c = np.repeat(np.asarray(budgets, float), sizes)
    offsets = np.tile(np.linspace(-1, 1, sizes) * math.log(width), len(budgets))
    n = best(c, p) * np.exp(offsets + drift * np.log(c / budgets[0]))
    d = c / 6 / n
    shocks = np.random.default_rng(seed).normal(0, noise, len(n))
    return Points(
        n, d, c, loss(n, d, p) * np.exp(shocks), extra={k: np.asarray(v, float) for k, v in extra.items()}
    )


def names(found, *levels):
    return [f["name"] for f in found if not levels or f["level"] in levels]


def with_(points, **changes):
    extra = dict(points.extra) | changes.pop("extra", {})
    return dataclasses.replace(points, extra=extra, **changes)


HEALTHY = sweep()


@pytest.fixture(scope="module")
def surface():
    """A healthy fit and its points."""
    return run_fit(
        HEALTHY, "chinchilla", "surface", "log_mse", draws=100, starts=8, ties=("alpha=beta",)
    ), HEALTHY


@pytest.fixture(scope="module")
def lines():
    return fit_isoflop(HEALTHY, draws=100), HEALTHY


def changed(fit, **fields):
    return dataclasses.replace(fit, **fields)


# --- The healthy cases ---


def test_a_healthy_surface_has_no_warning(surface):
    assert names(examine(*surface), "warning", "refusal") == []


@pytest.mark.parametrize("variant", ["parabola", "akima", "robust"])
def test_a_healthy_line_has_no_warning(variant):
    points = sweep(budgets=np.geomspace(1e18, 1e21, 7), sizes=9)
    assert names(examine(fit_isoflop(points, variant=variant, draws=100), points), "warning") == []


def test_a_diagnostic_has_name_level_text_and_value(surface):
    for alarm in examine(*surface):
        assert set(alarm) == {"name", "level", "text", "value"}
        assert alarm["level"] in ("note", "warning", "refusal")
        assert alarm["text"].isprintable()


# --- The design ---


def design(points, law="chinchilla"):
    return [alarm for check in design_checks.CHECKS for alarm in check(points, law)]


def test_multi_epoch_points_in_a_single_epoch_law():
    unique = np.full(len(HEALTHY), np.sort(HEALTHY.D)[-3])
    points = with_(HEALTHY, extra={"U": unique})
    alarm = next(a for a in design(points) if a["name"] == "multi_epoch")
    assert alarm["value"] == 2
    assert "multi_epoch" not in names(design(points, "data_constrained"))
    assert "multi_epoch" not in names(design(with_(HEALTHY, extra={"U": 2 * HEALTHY.D})))
    assert "multi_epoch" in names(design(with_(HEALTHY, extra={"epochs": HEALTHY.D / unique})))


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        (dict(C=1e-18), "C is 1e-18 times"),
        (dict(N=1e-6), "C is 1e+06 times"),
        (dict(D=1e-9), "C is 1e+09 times"),
        (dict(C=1e-18, D=1e-18), "D is"),  # exaFLOP in a table without tokens: D = C/(6N)
        (dict(N=1e-8, D=1e8), "N is"),
        (dict(N=1, D=1, C=0.5), ""),
        (dict(N=1, D=1, C=4), ""),
    ],
)
def test_counts_in_another_unit(factors, said):
    points = with_(HEALTHY, **{name: getattr(HEALTHY, name) * factor for name, factor in factors.items()})
    alarms = [alarm for alarm in design(points) if alarm["name"] == "odd_units"]
    assert [said in alarm["text"] for alarm in alarms] == [True] * bool(said)


def test_copies_of_runs():
    """Another seed is no copy."""
    index = [*range(len(HEALTHY)), 3, 5]
    (alarm,) = (a for a in design(HEALTHY.take(np.array(index))) if a["name"] == "duplicate_rows")
    assert (alarm["value"], alarm["level"]) == (2, "warning")
    assert "rows 3, 5" in alarm["text"]
    again = HEALTHY.take(np.array(index))
    again = with_(again, L=again.L * (1 + 1e-6 * np.arange(len(again))))
    assert "duplicate_rows" not in names(design(again))


def lr_grid(rates, optimum, noise=0.0):
    """Every size of the sweep at every rate, with a quadratic cost in log lr around `optimum`."""
    many = HEALTHY.take(np.repeat(np.arange(len(HEALTHY)), len(rates)))
    lr = np.tile(rates, len(HEALTHY))
    cost = 1 + 0.01 * np.log(lr / optimum) ** 2
    return with_(many, L=loss(many.N, many.D) * cost, extra={"lr": lr})


def test_the_best_learning_rate_at_the_edge():
    rates = np.array([1e-3, 2e-3, 4e-3])
    inside = design(lr_grid(rates, 2e-3))
    assert "lr_edge" not in names(inside)
    assert "lr_in_cells" in names(inside)
    edge = next(a for a in design(lr_grid(rates, 8e-3)) if a["name"] == "lr_edge")
    assert edge["value"] == len(HEALTHY)


def test_best_of_grid_selection():
    rates = np.array([1e-3, 2e-3, 4e-3])
    whole = lr_grid(rates, 2e-3)
    assert "best_of_grid" not in names(design(whole))
    ragged = whole.take(np.r_[1, 3 : len(whole)])
    assert "best_of_grid" in names(design(ragged))  # one cell has lost its other rates
    rng = np.random.default_rng(0)
    picked = with_(HEALTHY, extra={"lr": rng.choice(rates, len(HEALTHY))})
    assert "best_of_grid" in names(design(picked))
    rule = 3e-3 * (HEALTHY.N / HEALTHY.N.min()) ** -0.3
    assert "best_of_grid" not in names(design(with_(HEALTHY, extra={"lr": rule})))
    rounded = 2.0 ** np.round(np.log2(rule))
    assert "best_of_grid" not in names(design(with_(HEALTHY, extra={"lr": rounded})))
    counted = with_(HEALTHY, extra={"lr": rule, "candidates": np.full(len(HEALTHY), 3.0)})
    assert "best_of_grid" in names(design(counted))


def test_one_learning_rate_for_all_sizes_is_noted():
    assert "one_lr" in names(design(with_(HEALTHY, extra={"lr": np.full(len(HEALTHY), 4e-3)})), "note")
    assert "one_lr" not in names(design(HEALTHY))


def test_checkpoints_of_one_run():
    run = np.arange(len(HEALTHY), dtype=float)
    assert "checkpoints_as_runs" not in names(design(with_(HEALTHY, extra={"run": run})))
    run[:3] = 0
    alarm = next(a for a in design(with_(HEALTHY, extra={"run": run})) if a["name"] == "checkpoints_as_runs")
    assert alarm["value"] == 1


def test_long_warmup_and_low_beta2():
    n = len(HEALTHY)
    short = with_(
        HEALTHY, extra={"warmup_tokens": 0.05 * HEALTHY.D, "b2": np.full(n, 0.99), "batch": np.full(n, 1e5)}
    )
    assert not {"long_warmup", "low_beta2"} & set(names(design(short)))
    long = with_(HEALTHY, extra={"warmup_tokens": np.full(n, HEALTHY.D.max() / 3)})
    assert "long_warmup" in names(design(long), "warning")
    low = with_(short, extra={"b2": np.full(n, 0.95)})
    assert "low_beta2" in names(design(low))
    assert "low_beta2" not in names(design(with_(low, extra={"batch": np.full(n, 1e6)})))


def test_the_noise_of_a_run():
    assert "no_seed_noise" in names(design(HEALTHY), "note")
    twice = HEALTHY.take(np.r_[0, np.arange(len(HEALTHY))])
    assert "no_seed_noise" not in names(design(twice))
    assert "no_seed_noise" not in names(design(with_(HEALTHY, sigma=0.003 * HEALTHY.L)))
    seeds = HEALTHY.take(np.repeat(np.arange(10), 3))
    noisy = with_(
        seeds, L=seeds.L * np.exp(np.random.default_rng(0).normal(0, 0.003, 30)), sigma=0.003 * seeds.L
    )
    assert "sigma_too_small" not in names(design(noisy))
    alarm = next(a for a in design(with_(noisy, sigma=noisy.sigma / 5)) if a["name"] == "sigma_too_small")
    assert 3 < alarm["value"] < 7


def test_narrow_ranges_and_flops_by_identity():
    assert "narrow_range" not in names(design(HEALTHY))
    narrow = HEALTHY.take((HEALTHY.N > 5e8) & (HEALTHY.N < 2e9))
    assert "narrow_range" in names(design(narrow), "warning")
    assert "flops_by_6nd" in names(design(HEALTHY), "note")
    assert "flops_by_6nd" not in names(design(with_(HEALTHY, C=HEALTHY.C * (1 + 1e8 / HEALTHY.N))))


# --- Lines ---


def test_no_interior_minimum_and_vertices_at_the_edge(lines):
    assert not {"no_interior_minimum", "vertex_at_edge", "few_optima"} & set(names(examine(*lines)))
    c = HEALTHY.C
    n = np.where(c < 1.1e18, HEALTHY.N * 40, HEALTHY.N)
    points = Points(n, c / 6 / n, c, loss(n, c / 6 / n))
    found = examine(fit_isoflop(points, draws=50), points)
    alarm = next(a for a in found if a["name"] == "no_interior_minimum")
    assert alarm["value"] == pytest.approx([1e18])
    n = np.where(c < 1.1e18, HEALTHY.N * 3.5, HEALTHY.N)
    points = Points(n, c / 6 / n, c, loss(n, c / 6 / n))
    found = examine(fit_isoflop(points, draws=50), points)
    assert "vertex_at_edge" in names(found, "warning")


def test_a_drifting_centre(lines):
    assert "drifting_centre" not in names(examine(*lines))
    points = sweep(width=16.0, sizes=11, drift=0.15)
    alarm = next(a for a in examine(fit_isoflop(points, draws=50), points) if a["name"] == "drifting_centre")
    assert alarm["value"] == pytest.approx(0.15, abs=0.04)


def test_the_parabola_bias_is_reported_with_its_size(lines):
    notes = [a for a in examine(*lines) if a["name"] == "parabola_bias"]
    assert [a["level"] for a in notes] == ["note"]
    skewed = P | dict(alpha=0.34, beta=0.28)
    points = sweep(skewed, width=16.0, sizes=15, noise=1e-5)
    found = examine(fit_isoflop(points, draws=50), points)
    alarm = next(a for a in found if a["name"] == "parabola_bias")
    assert alarm["level"] == "warning"
    assert alarm["value"] == pytest.approx(0.0227 * math.log(10), abs=0.001)
    assert "D* -5.1%" in alarm["text"]
    assert "parabola_bias" not in names(examine(fit_isoflop(points, variant="akima", draws=50), points))


def test_vertices_that_scatter_more_than_the_noise_explains(lines):
    assert "scattered_vertices" not in names(examine(*lines))
    rough = np.repeat(np.random.default_rng(1).normal(0, 0.5, 7), 9)
    points = sweep(budgets=np.geomspace(1e18, 1e21, 7), sizes=9, width=8.0, noise=0.001)
    moved = loss(points.N * np.exp(rough), points.D * np.exp(-rough))  # each budget's optimum is elsewhere
    points = with_(points, L=moved * np.exp(np.random.default_rng(2).normal(0, 0.001, len(moved))))
    assert "scattered_vertices" in names(examine(fit_isoflop(points, draws=100), points), "warning")


def test_budgets_of_uneven_flops_and_too_few_of_them(lines):
    assert "budget_spread" not in names(examine(*lines))
    rng = np.random.default_rng(0)
    rough = HEALTHY.C * np.exp(rng.uniform(-0.06, 0.06, len(HEALTHY)))
    points = with_(HEALTHY, C=rough)
    assert "budget_spread" in names(examine(fit_isoflop(points, draws=50), points), "warning")
    two = sweep(budgets=BUDGETS[:2])
    assert "few_optima" in names(examine(fit_isoflop(two, draws=50), two), "warning")


def test_a_line_without_noise_estimate_has_no_interval():
    three = sweep(sizes=3)
    assert "no_interval" in names(examine(fit_isoflop(three), three), "warning")


def test_exponents_that_do_not_add_to_one(lines):
    assert "exponents_do_not_add" not in names(examine(*lines))
    d = HEALTHY.D * (HEALTHY.C / 1e18) ** 0.1  # tokens got cheaper with scale
    points = with_(HEALTHY, D=d)
    alarm = next(
        a for a in examine(fit_isoflop(points, draws=50), points) if a["name"] == "exponents_do_not_add"
    )
    assert alarm["value"] == pytest.approx(1.1, abs=0.02)


def test_envelopes_are_examined_too():
    n = np.repeat(np.geomspace(1e7, 1e10, 12), 30)
    c = (n / best(1.0)) ** 2 * np.tile(np.geomspace(0.02, 50, 30), 12)
    points = Points(n, c / 6 / n, c, loss(n, c / 6 / n))
    found = examine(fit_envelope(points, draws=30), points)
    assert names(found, "warning") == []


# --- Laws ---


def test_too_few_points_are_refused_and_small_samples_named(surface):
    with pytest.raises(Refusal, match="needs 5 at least") as caught:
        require(4, 4, "over_training")
    assert caught.value.name == "too_few_points"
    assert isinstance(caught.value, UserError)
    require(5, 4, "over_training")
    fit, points = surface
    assert "few_points" not in names(examine(fit, points))
    few = points.take(np.arange(0, len(points), 4))
    assert "few_points" in names(examine(changed(fit, residuals=fit.residuals[::4]), few), "warning")


def test_starts_that_end_elsewhere(surface):
    fit, points = surface
    assert "start_scatter" not in names(examine(fit, points), "warning")
    starts = [dict(s, gap=0.01 * fit.value * (i % 4 > 0)) for i, s in enumerate(fit.starts)]
    alarm = next(a for a in examine(changed(fit, starts=starts), points) if a["name"] == "start_scatter")
    assert alarm["level"] == "warning"
    assert "no sampling error" in alarm["text"]
    bad = [dict(s, converged=False) for s in fit.starts]
    assert "not_converged" in names(examine(changed(fit, starts=bad), points), "warning")


def test_rounding_is_measured(surface):
    fit, points = surface
    exact = changed(fit, parameters=fit.parameters | dict(E=1.82, A=482.0, B=2080.0, alpha=0.35, beta=0.35))
    assert "rounding" not in names(examine(exact, points))
    rough = changed(
        fit, parameters=fit.parameters | dict(E=1.8172, A=482.0, B=2085.0, alpha=0.3449, beta=0.3449)
    )
    alarm = next(a for a in examine(rough, points) if a["name"] == "rounding")
    rounded = loss(points.N, points.D, dict(E=1.82, A=482.0, B=2080.0, alpha=0.34, beta=0.34))
    want = np.mean(np.log(rounded / loss(points.N, points.D, rough.parameters)))
    assert alarm["value"] == pytest.approx(want, rel=1e-6)
    assert alarm["level"] == "note"


def test_heavy_tails_and_trends(surface):
    fit, points = surface
    assert not {"heavy_tails", "residual_trend"} & set(names(examine(fit, points)))
    r = np.array(fit.residuals)
    r[[3, 20]] = 0.05
    alarm = next(a for a in examine(changed(fit, residuals=r.tolist()), points) if a["name"] == "heavy_tails")
    assert alarm["value"] == 2
    tilted = np.array(fit.residuals) + 0.004 * (np.log(points.C) - np.log(points.C).mean())
    found = examine(changed(fit, residuals=tilted.tolist()), points)
    trend = [a for a in found if a["name"] == "residual_trend"]
    assert any("largest C" in a["text"] for a in trend)
    assert trend[0]["value"] == pytest.approx(0.004 * math.log(1e3), rel=0.3)


def test_a_floor_that_is_not_identified(surface):
    fit, points = surface
    assert "E_not_identified" not in names(examine(fit, points))
    wide = changed(fit, profile={}, intervals=fit.intervals | {"E": {"bootstrap": [0.0, 2.0]}})
    assert "E_not_identified" in names(examine(wide, points), "warning")
    zero = changed(fit, parameters=fit.parameters | {"E": 0.0})
    assert "E_not_identified" in names(examine(zero, points), "warning")
    fixed = changed(wide, names=tuple(n for n in fit.names if n != "E"), draws=[])
    assert "E_not_identified" not in names(examine(fixed, points))


def test_the_widest_interval_decides(surface):
    """Reports print the bootstrap: a narrow profile beside it makes neither E nor an exponent identified."""
    fit, points = surface
    for name, wide, alarm in (("E", [0.0, 2.0], "E_not_identified"), ("alpha", [0.1, 0.7], "flat_ridge")):
        narrow = {"profile": [v * fit.parameters[name] for v in (0.99, 1.01)]}
        quiet = changed(fit, intervals=fit.intervals | {name: narrow})
        assert alarm not in names(examine(quiet, points))
        loud = changed(fit, intervals=fit.intervals | {name: narrow | {"bootstrap": wide}})
        told = next(a for a in examine(loud, points) if a["name"] == alarm)
        assert f"{wide[1]:.4g}" in told["text"]


def test_the_small_sweep_of_the_quickstart_has_no_floor():
    """Its E is 1.15: the bootstrap, which its report prints, says to a third; the profile to two thirds."""
    table = read_table(Path(__file__).parents[2] / "experiments/scaling/results/smoke/table.csv")
    fit = run_fit(select(table, {})[0], ties=("alpha=beta",), starts=4, draws=200)
    widths = {kind: ends[1] - ends[0] for kind, ends in fit.intervals["E"].items()}
    assert widths["bootstrap"] < 0.4 * fit.parameters["E"] < 0.5 * fit.parameters["E"] < widths["profile"]
    assert "E_not_identified" in names(fit.diagnostics, "warning")


def test_a_flat_ridge(surface):
    fit, points = surface
    assert "flat_ridge" not in names(examine(fit, points))
    alpha = fit.parameters["alpha"]
    profile = {"alpha": {"grid": [0.1, alpha, 0.9], "value": [1.0, 0.9, 1.0], "interval": [0.1, 0.5]}}
    alarm = next(a for a in examine(changed(fit, profile=profile), points) if a["name"] == "flat_ridge")
    assert alarm["value"][0] == "alpha"
    wide = changed(fit, profile={}, intervals=fit.intervals | {"alpha": {"bootstrap": [0.1, 0.7]}})
    assert "flat_ridge" in names(examine(wide, points), "warning")


def test_failed_draws_and_intervals_that_theory_does_not_confirm(surface):
    fit, points = surface
    assert not {"failed_draws", "intervals_disagree"} & set(names(examine(fit, points)))
    failed = changed(fit, bootstrap=fit.bootstrap | {"asked": 100, "failed": 10})
    assert "failed_draws" in names(examine(failed, points), "warning")
    draws = np.array(fit.draws)
    draws[:, fit.names.index("alpha")] = fit.parameters["alpha"] + 0.1 * (
        draws[:, fit.names.index("alpha")] - 0.35
    )
    alarm = [
        a for a in examine(changed(fit, draws=draws.tolist()), points) if a["name"] == "intervals_disagree"
    ]
    assert [a["value"][0] for a in alarm] == ["alpha"]


def test_influential_points():
    points = sweep(noise=0.002, sizes=9)
    healthy = run_fit(points, "chinchilla", "surface", "log_mse", draws=60, starts=4, profile=False)
    assert "influential_points" not in names(examine(healthy, points))
    spoilt = points.L.copy()
    spoilt[-1] *= 1.06  # the largest model of the largest budget
    points = with_(points, L=spoilt)
    fit = run_fit(points, "chinchilla", "surface", "log_mse", draws=60, starts=4, profile=False)
    found = [a for a in examine(fit, points) if a["name"] == "influential_points"]
    assert found
    assert "44" in found[0]["text"]


# --- Several fits ---


def test_methods_that_disagree_beyond_the_joint_interval(surface, lines):
    same = [changed(surface[0], data={}), changed(lines[0], data={})]
    assert names(compare(same)) == []
    log_n = [predict.optima(fit, BUDGETS[-1])[0] for fit in same]
    joint = math.hypot(*(v[1:].std() for v in log_n))

    def moved(by):
        """The line with log N* `by` joint errors above the surface's at the largest compute."""
        shift = log_n[0][0] - log_n[1][0] + by * joint
        draws = np.array(lines[0].draws)
        draws[:, lines[0].names.index("log_kN")] += shift
        p = lines[0].parameters
        return changed(same[1], parameters=p | {"log_kN": p["log_kN"] + shift}, draws=draws.tolist())

    assert "methods_disagree" not in names(compare([same[0], moved(1.0)]))
    alarm = next(a for a in compare([same[0], moved(3.0)]) if a["name"] == "methods_disagree")
    assert alarm["level"] == "warning"
    assert alarm["value"] == pytest.approx(3 * joint)


def test_objectives_tables_and_columns_that_differ(surface):
    fit = changed(surface[0], data={"sha256": "a", "columns": {"N": "n_total"}})
    other = changed(
        fit, objective="huber", parameters=fit.parameters | {"alpha": fit.parameters["alpha"] + 0.1}
    )
    assert "objective_matters" in names(compare([fit, other]), "warning")
    assert names(compare([fit, changed(fit, objective="huber")])) == []
    assert names(compare([fit, changed(fit, data=fit.data | {"sha256": "b"})])) == ["different_tables"]
    assert "different_columns" in names(
        compare([fit, changed(fit, data=fit.data | {"columns": {"N": "n_active"}})])
    )


def test_two_steps_whose_errors_cancel(surface):
    fit, points = surface
    shown = points.take(np.arange(0, len(points), 6))
    measured = loss(shown.N, shown.D)
    curve = dict(a=0.7, b=0.25, k=4.0, L0=2.4)
    step_2 = changed(fit, law="loss_to_accuracy", parameters=curve, names=("a", "b", "k", "L0"))

    def accuracy(values):
        return curve["b"] + curve["a"] / (1 + np.exp(curve["k"] * (values - curve["L0"])))

    runs = Points(shown.N, shown.D, shown.C, measured)
    rows, found = two_step(fit, step_2, runs, accuracy(measured))
    assert found == []
    assert all(abs(row["step_2"]) < 1e-12 for row in rows)
    rows, found = two_step(fit, step_2, with_(runs, L=measured * 1.1), accuracy(measured))
    assert names(found) == ["cancelling_errors"]
    for row in rows:
        assert row["chained"] == pytest.approx(row["step_1"] + row["step_2"])


def test_every_pitfall_has_its_line():
    text = diagnostics.__doc__
    assert [str(i) for i in range(1, 18)] == [
        line.split()[0] for line in text.splitlines() if line[:5].strip().isdigit()
    ]


def test_the_documented_names_exist():
    """No name in the table of pitfalls that nothing raises."""
    modules = (design_checks, line_checks, fit_checks, diagnostics, predict, optima, downstream)
    source = "".join(Path(module.__file__).read_text() for module in modules)
    named = set(re.findall(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b", diagnostics.__doc__)) | {
        "extrapolation",
        "rounding",
    }
    for name in named - {"two_step"}:
        assert f'"{name}"' in source, name
