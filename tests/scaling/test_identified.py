"""What the runs cannot tell: few values of an input, bounds, ridges, draws that stop half way, poor fits."""

import dataclasses
import warnings

import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.scaling.fit import run_fit
from jaxlm.scaling.fit_checks import identification
from jaxlm.scaling.fit_table import fit_command
from jaxlm.scaling.laws import LAWS, predict, to_coordinates
from jaxlm.scaling.lines import Refusal
from jaxlm.scaling.problem import make_problem
from jaxlm.scaling.solve import newton, refit
from jaxlm.scaling.table import Points
from jaxlm.scaling.uncertainty import bootstrap

TRUTH = dict(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
ABNAR = dict(E=0.94, A=16612.5, B=5455.67, c=0.4598, d=17.26, alpha=0.5962, beta=0.3954) | {
    **{"lambda": -0.1666, "delta": 0.1603, "gamma": 0.1595}
}
LIGHT = dict(draws=0, profile=False, starts=4)


def grid(*axes):
    return [v.ravel() for v in np.meshgrid(*axes)]


def made_up(law, truth, sigma=0.003, seed=0, **inputs) -> Points:
    """Runs of a law at these N, D and further inputs, with noise of the log."""
    clean = predict(LAWS[law], truth, inputs)
    y = clean * np.exp(np.random.default_rng(seed).normal(0, sigma, len(clean)))
    n, d = inputs.pop("N"), inputs.pop("D")
    return Points(n, d, 6 * n * d, y, extra=inputs)


def rectangle(sizes=8, tokens=6, **options) -> Points:
    n, d = grid(np.geomspace(5e7, 5e9, sizes), np.geomspace(1e9, 3e11, tokens))
    return made_up("chinchilla", TRUTH, N=n, D=d, **options)


# --- Too few values of an input ---


@pytest.mark.parametrize("role", ["N", "D"])
@pytest.mark.parametrize("values", [1, 2])
def test_too_few_values_of_one_input_are_refused(role, values):
    """Runs are many and (N, D) pairs differ; yet two levels cannot give a coefficient, an exponent and E."""
    points = rectangle(*((values, 24) if role == "N" else (24, values)))
    assert len(np.unique(getattr(points, role))) == values
    with pytest.raises(
        Refusal, match=rf"^too_few_{role}: .* 3 different {role} .* these runs have {values}: "
    ):
        run_fit(points, **LIGHT)
    with pytest.raises(Refusal, match="--law=loss_n" if role == "D" else "--law=loss_d"):
        run_fit(points, **LIGHT)
    held = {"E": 1.8172} | ({} if values == 2 else {"alpha" if role == "N" else "beta": 0.35})
    assert run_fit(points, fixed=held, **LIGHT).value > 0
    assert run_fit(points, law="loss_n" if role == "D" else "loss_d", **LIGHT).value > 0


def test_inputs_that_move_together_are_not_called_too_few():
    """Repeats that no run has: no number of U would bring them, and none is asked for."""
    n, u = grid(np.geomspace(5e7, 5e9, 6), np.geomspace(1e9, 1e11, 4))
    truth = TRUTH | dict(R_D=15.4, R_N=5.3)
    points = made_up("data_constrained", truth, N=n, D=u / 2, U=u)
    assert len(np.unique(points.extra["U"])) == 4
    assert np.isfinite(run_fit(points, "data_constrained", **LIGHT).value)


def test_enough_values_are_not_refused():
    for sizes, tokens in ((3, 8), (8, 3), (3, 3)):
        assert run_fit(rectangle(sizes, tokens), **LIGHT).value > 0
    n, d, s = grid(np.geomspace(1e8, 1e10, 4), np.geomspace(2e9, 1e11, 4), [0.5])
    points = made_up("moe_sparsity", ABNAR, N=n, D=d, sparsity=s)
    with pytest.raises(Refusal, match=r"^too_few_sparsity: .* these runs have 1: "):
        run_fit(points, law="moe_sparsity", **LIGHT)


# --- Draws ---


def test_draws_of_a_bent_valley_converge():
    """The sparsity law's E, c and lambda trade along a valley that 200 steps do not follow to its end."""
    n, d, s = grid(np.geomspace(1e8, 1e10, 6), np.geomspace(2e9, 1e11, 5), [0, 0.5, 0.75, 0.9, 0.95])
    problem = make_problem(made_up("moe_sparsity", ABNAR, N=n, D=d, sparsity=s), "moe_sparsity")
    start = to_coordinates(problem.law, np.array([ABNAR[k] for k in problem.law.names]), problem.x)
    phi = refit(problem, problem.free(start)[None])[0][0]
    times = np.random.default_rng(0).multinomial(len(n), np.full(len(n), 1 / len(n)), 40).astype(float)
    early, more, few, _ = newton(problem, np.repeat(phi[None], 40, 0), times, iterations=200)
    late, least, done, _ = newton(problem, np.repeat(phi[None], 40, 0), times)
    assert few.mean() < 0.9 < done.mean() == 1
    assert (least <= more * (1 + 1e-12)).all()
    wide, narrow = (np.ptp(problem.parameters(x)[:, problem.law.names.index("E")]) for x in (late, early))
    assert wide > 1.2 * narrow
    assert bootstrap(problem, phi, draws=40).failed == 0


def test_a_point_that_no_step_leaves_is_no_solution():
    """Where every step is uphill, however short, and the gradient says downhill, nothing has converged."""
    problem = make_problem(rectangle(), "chinchilla", "log_mse")
    start = problem.free(to_coordinates(problem.law, np.array(list(TRUTH.values())) * 1.3, problem.x))
    assert newton(problem, start[None])[2].all()
    here = problem.coordinates(start[None])
    value, slope = problem.law.form(here, problem.x)

    def pit(z, x):
        return value + 9.0 * (z != here).any(-1)[..., None], np.broadcast_to(
            slope, (len(z), *slope.shape[1:])
        )

    trapped = dataclasses.replace(problem, law=dataclasses.replace(problem.law, form=pit))
    phi, _, done, _ = newton(trapped, start[None])
    np.testing.assert_array_equal(phi[0], start)
    assert not done.any()


@pytest.mark.slow
def test_intervals_of_the_sparsity_law_cover_the_truth():
    """Sweeps of 150 runs: of forty, 92.5% (B, beta) to 100% (E, c, lambda) of the intervals hold it."""
    n, d, s = grid(np.geomspace(1e8, 1e10, 6), np.geomspace(2e9, 1e11, 5), [0, 0.5, 0.75, 0.9, 0.95])
    hits, failed = [], 0
    for seed in range(24):
        points = made_up("moe_sparsity", ABNAR, seed=seed, N=n, D=d, sparsity=s)
        problem = make_problem(points, "moe_sparsity")
        truth = np.array([ABNAR[k] for k in problem.law.names])
        start = problem.free(to_coordinates(problem.law, truth, problem.x))
        found = bootstrap(problem, refit(problem, start[None])[0][0], draws=100, seed=seed)
        failed += found.failed
        low, high = np.quantile(found.draws, [0.025, 0.975], axis=0)
        hits.append((low <= truth) & (truth <= high))
    covered = np.mean(hits, 0)
    print(dict(zip(problem.law.names, covered, strict=True)), failed)
    assert failed <= 24
    assert (covered >= 0.875).all()


# --- Alarms ---


def alarms(fit, *levels):
    return {d["name"] for d in fit.diagnostics if not levels or d["level"] in levels}


def accuracies(unit=1.0, seed=0):
    loss = np.linspace(2.2, 3.4, 40)
    noise = np.random.default_rng(seed).normal(0, 0.005, 40)
    nothing = np.full(40, np.nan)
    share = 0.25 + 0.6 / (1 + np.exp(4 * (loss - 2.6))) + noise
    return Points(nothing, nothing, nothing, loss, extra={"accuracy": unit * share})


def test_percent_is_refused_and_shares_are_not():
    with pytest.raises(UserError, match=r"accuracy of point 0 is 7.*above 1.*Divide percent by 100"):
        run_fit(accuracies(100), law="loss_to_accuracy", **LIGHT)
    fit = run_fit(accuracies(), law="loss_to_accuracy", **LIGHT)
    assert fit.parameters["b"] == pytest.approx(0.25, abs=0.02)
    assert not {"at_bound", "poor_fit"} & alarms(fit)


def test_a_parameter_at_its_bound_is_an_alarm():
    """Losses without a floor: E ends at 0, which is the law's own bound; a bound of the user is a note."""
    points = rectangle()
    fit = run_fit(dataclasses.replace(points, L=points.L - TRUTH["E"] - 0.05), **LIGHT)
    assert fit.parameters["E"] == 0
    told = [d for d in fit.diagnostics if d["name"] == "at_bound"]
    assert [(d["level"], d["value"]) for d in told] == [("warning", "E")]
    assert "gauss_newton" not in fit.intervals["E"]  # no interval of no width
    bounded = run_fit(rectangle(), bounds={"alpha": (0.4, 1.0)}, **LIGHT | {"starts": 12})
    assert [(d["level"], d["value"]) for d in bounded.diagnostics if d["name"] == "at_bound"] == [
        ("note", "alpha")
    ]
    assert "at_bound" not in alarms(run_fit(rectangle(), **LIGHT))


def test_a_law_that_does_not_describe_the_table_is_an_alarm():
    points = rectangle()
    shuffled = dataclasses.replace(points, L=np.random.default_rng(0).permutation(points.L))
    assert "poor_fit" in alarms(run_fit(shuffled, **LIGHT), "warning")
    assert "poor_fit" not in alarms(run_fit(points, **LIGHT))


def test_repeats_that_say_nothing_are_a_ridge():
    """R_N is a scale, but no level of a power: one that may be anything has to be said."""
    whole = rectangle()
    truth = TRUTH | {"R_D": 15.0, "R_N": 1e4}
    unique = whole.D / np.tile([1, 1, 2, 4, 8, 16], 8)
    points = made_up("data_constrained", truth, N=whole.N, D=whole.D, U=unique)
    fit = run_fit(points, law="data_constrained", draws=60, starts=4, profile=False)
    ridges = {d["value"][0] for d in fit.diagnostics if d["name"] == "flat_ridge"}
    low, high = fit.intervals["R_N"]["bootstrap"]
    assert high > 10 * low
    assert "R_N" in ridges
    assert not ridges & {"A", "B"}


def test_without_a_profile_the_covariance_counts():
    """A bootstrap beside it must not hide what the covariance knows."""
    points = rectangle()
    fit = run_fit(points, draws=40, starts=4, profile=False)
    assert not {"E_not_identified", "flat_ridge"} & alarms(fit)
    for name, ends, alarm in (("E", [0.0, 4.0], "E_not_identified"), ("alpha", [-1.0, 2.0], "flat_ridge")):
        wide = fit.intervals | {name: fit.intervals[name] | {"gauss_newton": ends}}
        told = identification(dataclasses.replace(fit, intervals=wide), points)
        assert [d["name"] for d in told] == [alarm]
        profiled = wide | {name: wide[name] | {"profile": fit.intervals[name]["bootstrap"]}}
        assert not identification(dataclasses.replace(fit, intervals=profiled), points)


# --- The command ---


@pytest.fixture
def csv(tmp_path):
    def write(**columns):
        path = tmp_path / "t.csv"
        rows = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
        path.write_text("\n".join(rows) + "\n")
        return str(path)

    return write


def test_a_refusal_says_what_was_left_out(csv, tmp_path):
    points = rectangle()
    loss = [x if i % 12 == 0 else "" for i, x in enumerate(points.L)]
    path = csv(n=points.N, d=points.D, loss=loss)
    said = r"^too_few_points: .*Of 48 rows 44 were left out: 44 by the rule 'value' \(row 2: L=nan\)$"
    with pytest.raises(Refusal, match=said):
        fit_command(path, "N=n,D=d", out=str(tmp_path / "o"), plots=False)


def test_all_methods_warn_in_words_and_count_their_points(csv, tmp_path, capsys):
    """No warning of numpy reaches the user, and no method reports 0 points of a table that it has fitted."""
    c, ratio = grid(np.geomspace(1e18, 1e21, 5), np.geomspace(1 / 6, 6, 7))
    n = 0.1 * np.sqrt(c / 6) * ratio
    points = made_up("chinchilla", TRUTH, N=n, D=c / 6 / n)
    path = csv(n=points.N, c=c, loss=points.L)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        fit_command(
            path,
            "N=n,C=c",
            out=str(tmp_path / "o"),
            method="all",
            draws=20,
            starts=2,
            profile=False,
            plots=False,
        )
    text = capsys.readouterr().out
    assert "35 points, left out" in text
    assert " 0 points" not in text.replace("\n", " ")
