"""Envelope and iso-FLOP lines against surfaces whose optimum is known in closed form."""

import dataclasses
import math

import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.scaling.lines import Refusal, line, loss_line
from jaxlm.scaling.optima import fit_envelope, fit_isoflop
from jaxlm.scaling.table import Points
from jaxlm.scaling.vertices import VARIANTS, akima, find_budgets, parabola, parabola_bias, size_labels

E, A, B = 1.8172, 482.0, 2085.0


def loss(n, d, alpha, beta):
    return E + A * n**-alpha + B * d**-beta


def best(c, alpha, beta):
    """N* under C = 6 N D."""
    return (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (c / 6) ** (beta / (alpha + beta))


def isoflop(alpha, beta, budgets, sizes=9, width=4.0, noise=0.0, seed=0, shift=0.0, **columns):
    """Runs at sizes within `width` of N*, off centre by exp(shift)."""
    c = np.repeat(budgets, sizes)
    offsets = np.tile(np.linspace(-1, 1, sizes) * math.log(width), len(budgets)) + shift
    n = best(c, alpha, beta) * np.exp(offsets)
    d = c / 6 / n
    shocks = np.random.default_rng(seed).normal(0, noise, len(n)) if noise else 0.0
    return Points(n, d, c, loss(n, d, alpha, beta) * np.exp(shocks), **columns)


BUDGETS = np.geomspace(1e18, 1e21, 7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_isoflop_is_exact_where_alpha_is_beta(variant):
    fit = fit_isoflop(isoflop(0.35, 0.35, BUDGETS), variant=variant, draws=20)
    p = fit.parameters
    assert p["a"] == pytest.approx(0.5, abs=1e-6)
    assert p["b"] == pytest.approx(0.5, abs=1e-6)
    log_g = math.log(A / B) / 0.7
    assert p["log_kN"] == pytest.approx(log_g - 0.5 * math.log(6), abs=1e-5)
    assert p["log_kD"] == pytest.approx(-log_g - 0.5 * math.log(6), abs=1e-5)
    assert p["c"] == pytest.approx(0.175, abs=1e-5)
    assert p["E_L"] == pytest.approx(E, abs=1e-4)
    assert (fit.law, fit.method) == ("power", variant)


def test_an_off_centre_grid_keeps_the_exponent_and_reports_the_distance():
    fit = fit_isoflop(isoflop(0.35, 0.35, BUDGETS, shift=math.log(1.5)), draws=20)
    assert fit.parameters["a"] == pytest.approx(0.5, abs=1e-9)
    for optimum in fit.optima:
        assert optimum["distance"] == pytest.approx(math.log(optimum["centre"] / optimum["N"]))
        assert 0.2 < optimum["distance"] < 0.45
        assert optimum["inside"]
        assert not optimum["edge"]


def test_parabolas_of_unequal_exponents_are_off_by_the_computed_bias():
    alpha, beta, width, sizes = 0.34, 0.28, 16.0, 15
    fit = fit_isoflop(isoflop(alpha, beta, BUDGETS, sizes=sizes, width=width), draws=20)
    assert fit.parameters["a"] == pytest.approx(beta / (alpha + beta), abs=1e-9)
    bias = parabola_bias(alpha, beta, np.linspace(-1, 1, sizes) * math.log(width))
    for optimum in fit.optima:
        assert math.log(optimum["N"] / best(optimum["budget"], alpha, beta)) == pytest.approx(bias, abs=1e-9)
        off = math.log(optimum["D"] / (optimum["budget"] / 6 / best(optimum["budget"], alpha, beta)))
        assert off == pytest.approx(-bias, abs=1e-9)


def test_the_published_biases():
    """Chinchilla's surface, 15 sizes within 16x: log10 k_D -.5781, for -.5554 (5%); exponents 3:1: 23%."""
    grid = np.linspace(-1, 1, 15) * math.log(16)
    a, b, alpha, beta = 406.4, 410.7, 0.34, 0.28
    true = -math.log10((alpha * a / (beta * b)) ** (1 / (alpha + beta))) - alpha / (
        alpha + beta
    ) * math.log10(6)
    assert true == pytest.approx(-0.5554, abs=5e-5)
    assert true - parabola_bias(alpha, beta, grid) / math.log(10) == pytest.approx(-0.5781, abs=5e-5)
    assert math.exp(-parabola_bias(0.465, 0.155, grid)) == pytest.approx(0.77, abs=0.005)
    assert parabola_bias(0.31, 0.31, grid) == pytest.approx(0, abs=1e-12)
    narrow = np.linspace(-1, 1, 15) * math.log(4)
    assert abs(parabola_bias(alpha, beta, narrow)) < 0.3 * abs(parabola_bias(alpha, beta, grid))


def test_akima_has_less_bias_than_the_parabola():
    points = isoflop(0.465, 0.155, BUDGETS, sizes=15, width=16.0)
    errors = [
        abs(math.log(fit.optima[0]["N"] / best(fit.optima[0]["budget"], 0.465, 0.155)))
        for fit in (fit_isoflop(points, variant=v, draws=20) for v in ("akima", "parabola"))
    ]
    assert errors[0] < 0.02
    assert errors[1] > 0.2


def test_the_robust_quadratic_shrugs_off_an_outlier():
    points = isoflop(0.35, 0.35, BUDGETS, noise=0.002)
    spoilt = points.L.copy()
    spoilt[[2, 30]] *= 1.15
    points = Points(points.N, points.D, points.C, spoilt)
    off = {
        v: abs(fit_isoflop(points, variant=v, draws=20).parameters["a"] - 0.5) for v in ("robust", "parabola")
    }
    assert off["robust"] < 0.005
    assert off["parabola"] > 3 * off["robust"]


def test_a_budget_without_a_minimum_is_left_out_and_named():
    points = isoflop(0.35, 0.35, BUDGETS)
    at = points.C < 1.1e18
    worse = points.N[at] * 40  # far to the right of the optimum: the loss only rises
    n = points.N.copy()
    n[at] = worse
    d = points.C / 6 / n
    fit = fit_isoflop(Points(n, d, points.C, loss(n, d, 0.35, 0.35)), draws=20)
    first = fit.optima[0]
    assert not first["used"]
    assert first["edge"]
    assert "vertex is outside" in first["reason"] or "no minimum" in first["reason"]
    assert len(fit.excluded) == at.sum()
    assert {e["rule"] for e in fit.excluded} == {"no_interior_minimum"}
    assert sorted(e["row"] for e in fit.excluded) == np.flatnonzero(at).tolist()
    assert fit.parameters["a"] == pytest.approx(0.5, abs=1e-9)
    assert len(fit.points["C"]) == len(fit.residuals) == (~at).sum()


def test_no_minimum_anywhere_is_refused():
    n = np.tile(np.geomspace(1e8, 1e9, 5), 3)
    c = np.repeat([1e15, 1e16, 1e17], 5)  # far too little for such sizes
    points = Points(n, c / 6 / n, c, loss(n, c / 6 / n, 0.35, 0.35))
    with pytest.raises(Refusal, match="minimum inside") as caught:
        fit_isoflop(points)
    assert caught.value.name == "no_interior_minimum"
    assert isinstance(caught.value, UserError)


def test_too_few_points_are_refused():
    with pytest.raises(Refusal) as caught:
        fit_isoflop(isoflop(0.35, 0.35, BUDGETS, sizes=2))
    assert caught.value.name == "too_few_points"
    with pytest.raises(Refusal) as caught:
        fit_isoflop(isoflop(0.35, 0.35, BUDGETS[:1]))
    assert caught.value.name == "too_few_points"
    with pytest.raises(Refusal) as caught:
        fit_envelope(isoflop(0.35, 0.35, BUDGETS[:1]))  # no size twice
    assert caught.value.name == "too_few_points"


def test_two_budgets_give_a_line_without_a_floor_and_three_sizes_no_interval():
    fit = fit_isoflop(isoflop(0.35, 0.35, BUDGETS[:2], sizes=3))
    assert fit.parameters["a"] == pytest.approx(0.5)
    assert fit.parameters["E_L"] == 0.0
    assert "E_L" not in fit.names
    assert fit.draws == []
    assert fit.intervals == {}


def test_bad_choices_are_refused_by_name():
    points = isoflop(0.35, 0.35, BUDGETS)
    with pytest.raises(UserError, match="parabola"):
        fit_isoflop(points, variant="parabla")
    with pytest.raises(UserError, match="block column"):
        fit_isoflop(points, bootstrap="block")


def test_budgets_come_from_the_column_or_from_windows():
    rng = np.random.default_rng(0)
    exact = isoflop(0.35, 0.35, np.array([1e18, 3e18, 1e19]), sizes=5)
    rough = Points(exact.N, exact.D, exact.C * np.exp(rng.uniform(-0.03, 0.03, 15)), exact.L)
    groups, how = find_budgets(rough)
    assert [len(g.index) for g in groups] == [5, 5, 5]
    assert "windows" in how
    assert [g.flops for g in groups] == pytest.approx([1e18, 3e18, 1e19], rel=0.03)
    asked = np.repeat([1e18, 0.0, 1e19], 5)
    groups, how = find_budgets(Points(rough.N, rough.D, rough.C, rough.L, extra={"budget": asked}))
    assert [g.index.tolist() for g in groups] == [list(range(5)), list(range(10, 15))]
    assert "column" in how


def test_runs_between_budgets_are_in_none():
    """Three stray sizes between budgets of nine make no budget, where no column says so."""
    exact = isoflop(0.35, 0.35, np.array([1e18, 1e19]), sizes=12)
    n = np.r_[exact.N, 1e8, 2e8, 4e8]
    c = np.r_[exact.C, 3e18, 3.1e18, 3.2e18]
    d = c / 6 / n
    points = Points(n, d, c, loss(n, d, 0.35, 0.35))
    assert [len(g.index) for g in find_budgets(points)[0]] == [12, 12]
    fit = fit_isoflop(points, draws=20)
    assert [(e["row"], e["rule"]) for e in fit.excluded] == [
        (24, "no_budget"),
        (25, "no_budget"),
        (26, "no_budget"),
    ]


def test_sizes_that_were_digitised_are_one():
    assert size_labels(np.array([5.0, 1.0, 1.005, 5.02, 2.0])).tolist() == [2, 0, 0, 2, 1]


def test_vertices_of_a_cubic_free_curve_and_of_many_rows():
    x = np.linspace(0, 2, 7)
    rows = np.stack([3 + (x - 0.8) ** 2, 1 + 2 * (x - 1.3) ** 2, 5 - (x - 1) ** 2])
    at, low, bend, values = parabola(x, rows, np.ones_like(rows))
    assert at[:2] == pytest.approx([0.8, 1.3])
    assert low[:2] == pytest.approx([3, 1])
    assert bend == pytest.approx([2, 4, -2])
    assert values == pytest.approx(rows)
    at, low, _ = akima(x, np.exp(rows), np.ones_like(rows))
    assert at[:2] == pytest.approx([0.8, 1.3], abs=0.02)
    assert np.isnan(at[2])


def test_akima_takes_the_mean_of_runs_of_one_size_and_leaves_out_what_a_bootstrap_did():
    x = np.array([0, 1, 1, 2, 3, 4.0])
    y = np.exp(np.array([[4, 1.5, 1.5, 0.9, 1.2, 3.0]]))
    shifted = y.copy()
    shifted[0, [1, 2]] += [0.5, -0.5]
    same = akima(x, shifted, np.ones_like(y))
    assert same[0] == pytest.approx(akima(x, y, np.ones_like(y))[0])
    weight = np.array([[1, 1, 0, 1, 1, 1.0]])
    assert akima(x, np.where(weight > 0, y, 99.0), weight)[0] == pytest.approx(same[0])


def test_lines_by_rows():
    x = np.array([[0.0, 1, 2, 3]] * 2)
    y = np.array([[1.0, 3, 5, 99], [0, 0, 1, 1]])
    weight = np.array([[1.0, 1, 1, 0], [1, 1, 1, 1]])
    intercept, slope = line(x, y, weight)
    assert intercept == pytest.approx([1, np.polyfit(x[1], y[1], 1)[1]])
    assert slope == pytest.approx([2, np.polyfit(x[1], y[1], 1)[0]])


@pytest.mark.parametrize(("floor", "c"), [(1.7, 0.15), (0.0, 0.05), (2.2, 0.6)])
def test_the_loss_line_finds_floor_and_exponent(floor, c):
    x = np.log(np.geomspace(1e15, 1e18, 5))[None]
    y = floor + np.exp(20 * c - c * (x - x.mean()))
    found = loss_line(x, y, np.ones_like(x), True)
    assert [float(v[0]) for v in found] == pytest.approx([floor, 20 * c + c * x.mean(), c], abs=2e-5)


def test_a_weighted_vertex_counts_less():
    """The line weighs by 1/sigma^2: one budget with ten times the noise hardly moves it."""
    points = isoflop(0.35, 0.35, BUDGETS, noise=0.0005)
    noisy = points.C > 9e20
    sigma = np.where(noisy, 0.05, 0.001) * points.L
    spoilt = points.L * np.exp(np.where(noisy, np.random.default_rng(1).normal(0, 0.03, len(noisy)), 0))
    plain = fit_isoflop(Points(points.N, points.D, points.C, spoilt, sigma=sigma), draws=200)
    assert plain.optima[-1]["sigma_log_N"] > 5 * plain.optima[0]["sigma_log_N"]
    assert plain.parameters["a"] == pytest.approx(0.5, abs=0.01)
    assert plain.settings["noise"] == "sigma column"


# --- Envelope ---


def curves(alpha, beta, sizes, steps, low=1e7, high=1e10, noise=0.0):
    """Every size from 1/50 to 50 times the compute at which it is best."""
    n = np.repeat(np.geomspace(low, high, sizes), steps)
    a = beta / (alpha + beta)
    c = (n / best(1.0, alpha, beta)) ** (1 / a) * np.tile(np.geomspace(0.02, 50, steps), sizes)
    d = c / 6 / n
    shocks = np.random.default_rng(0).normal(0, noise, len(n)) if noise else 0.0
    return Points(n, d, c, loss(n, d, alpha, beta) * np.exp(shocks))


@pytest.mark.parametrize(("alpha", "beta"), [(0.35, 0.35), (0.34, 0.28), (0.3, 0.5)])
def test_the_envelope_recovers_exponents_to_1e_5_with_40_sizes(alpha, beta):
    fit = fit_envelope(curves(alpha, beta, 40, 200), draws=2)
    assert fit.parameters["a"] == pytest.approx(beta / (alpha + beta), abs=1e-5)
    assert fit.parameters["b"] == pytest.approx(alpha / (alpha + beta), abs=1e-5)
    assert fit.parameters["c"] == pytest.approx(alpha * beta / (alpha + beta), abs=1e-5)
    assert fit.parameters["E_L"] == pytest.approx(E, abs=1e-4)
    assert len(fit.optima) == 38


def test_the_envelope_ignores_changes_where_a_curve_only_ends():
    points = curves(0.34, 0.28, 12, 60)
    middle = np.median(points.C)
    early = middle > points.C
    small = points.N < 1e8
    cut = points.take(~small | early)  # small sizes stop early: their successors win by default there
    assert fit_envelope(cut, draws=2).parameters["a"] == pytest.approx(0.28 / 0.62, abs=2e-3)


def test_stretches_of_the_largest_size_are_dropped():
    points = curves(0.34, 0.28, 10, 60)
    largest = np.flatnonzero(np.isclose(points.N, points.N.max()))
    dip = points.L.copy()
    dip[largest[20:23]] *= 0.6  # best there by accident, in the middle of another size's stretch
    spoilt = dataclasses.replace(points, L=dip)
    assert len(fit_envelope(points, draws=2).optima) == 8
    own = [o for o in fit_envelope(spoilt, draws=2).optima if o["L"] < 0.8 * points.L[largest].max()]
    low, high = (float(c) for c in points.C[largest[[20, 22]]])
    assert not [o for o in own if low < o["budget"] < high]


def test_the_envelope_of_one_best_size_is_refused():
    n = np.repeat([1e7, 2e7, 4e7], 8)
    c = np.tile(np.geomspace(1e12, 1e13, 8), 3)  # the smallest is best everywhere
    with pytest.raises(Refusal) as caught:
        fit_envelope(Points(n, c / 6 / n, c, loss(n, c / 6 / n, 0.34, 0.28)))
    assert caught.value.name == "no_envelope"


def test_the_envelope_resamples_sizes():
    fit = fit_envelope(curves(0.34, 0.28, 12, 30, noise=0.002), draws=40)
    assert fit.bootstrap["kind"] == "block"
    low, high = fit.intervals["a"]["bootstrap"]
    assert low < 0.28 / 0.62 < high
    assert 0.002 < high - low < 0.1


# --- Draws ---


def covered(variant, trials, alpha=0.35, beta=0.35, budgets=4, sizes=7, noise=0.004):
    """Share of made-up sweeps whose 95% intervals hold a, b and log N* at ten times the compute."""
    c = BUDGETS[:budgets]
    true = np.array([beta, alpha, 0.0]) / (alpha + beta)
    target = math.log(10 * c[-1])
    true[2] = math.log(best(10 * c[-1], alpha, beta))
    hits = []
    for seed in range(trials):
        points = isoflop(alpha, beta, c, sizes=sizes, noise=noise, seed=seed)
        fit = fit_isoflop(points, variant=variant, draws=150, seed=seed)
        draws = np.array(fit.draws)
        a, b, k = (draws[:, fit.names.index(name)] for name in ("a", "b", "log_kN"))
        ends = [np.percentile(v, [2.5, 97.5]) for v in (a, b, k + a * target)]
        hits.append([low <= t <= high for (low, high), t in zip(ends, true, strict=True)])
    return np.mean(hits, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "trials", "most"), [("parabola", 200, 0.98), ("akima", 200, 0.995), ("robust", 100, 0.99)]
)
def test_intervals_of_isoflop_lines_cover(variant, trials, most):
    share = covered(variant, trials)
    print(variant, share)
    assert (share >= 0.92).all(), share
    assert (share <= most).all(), share


def test_case_draws_are_wider_than_residual_ones():
    points = isoflop(0.35, 0.35, BUDGETS[:4], sizes=6, noise=0.004)
    width = {}
    for kind in ("residual", "case"):
        low, high = fit_isoflop(points, bootstrap=kind, draws=200).intervals["a"]["bootstrap"]
        width[kind] = high - low
    assert width["case"] > 1.5 * width["residual"]


def test_block_draws_resample_the_blocks():
    points = isoflop(0.35, 0.35, BUDGETS, noise=0.003)
    blocks = np.tile(np.arange(9), len(BUDGETS))
    points = Points(points.N, points.D, points.C, points.L, block=blocks)
    fit = fit_isoflop(points, bootstrap="block", draws=100)
    assert fit.bootstrap["kind"] == "block"
    assert fit.bootstrap["asked"] == 100
    assert len(fit.draws) == 100 - fit.bootstrap["failed"]
    assert fit.points["block"] == blocks.tolist()


def test_draws_are_a_function_of_the_seed():
    points = isoflop(0.35, 0.35, BUDGETS, noise=0.003)
    one, two, other = (fit_isoflop(points, draws=30, seed=s).draws for s in (0, 0, 1))
    assert one == two
    assert one != other


def test_the_scatter_of_few_vertices_is_known_badly():
    """Vertices that scatter by 20%, not by noise: intervals of a hold the truth as often as they claim."""
    budgets, inside, scattered = np.geomspace(1e18, 1e22, 4), 0, 0
    plain = isoflop(0.35, 0.35, budgets, noise=0.0005)
    for seed in range(60):
        shift = np.exp(np.repeat(np.random.default_rng(seed).normal(0, 0.2, len(budgets)), 9))
        moved = dataclasses.replace(plain, L=loss(plain.N * shift, plain.D / shift, 0.35, 0.35))
        noisy = np.exp(np.random.default_rng([seed, 1]).normal(0, 0.0005, len(moved)))
        fit = fit_isoflop(dataclasses.replace(moved, L=moved.L * noisy), draws=100, seed=seed)
        low, high = fit.intervals["a"]["bootstrap"]
        scattered += fit.settings["excess_scatter"] > 0
        inside += (low <= 0.5 <= high) and fit.settings["excess_scatter"] > 0
    assert scattered > 40
    assert inside / scattered > 0.9  # .68 where the scatter counts as known


def test_vertices_off_their_line_count_alike_and_widen_the_intervals():
    """Budgets of few, wide sizes are as far off as the others where it is not noise that moves them."""
    budgets = np.geomspace(1e18, 1e22, 8)
    off = np.random.default_rng(3).normal(0, 0.2, len(budgets))
    plain = isoflop(0.35, 0.35, budgets, noise=0.0005)
    moved = isoflop(0.35, 0.35, budgets, noise=0.0005)
    shift = np.exp(np.repeat(off, 9))
    moved = dataclasses.replace(moved, L=loss(moved.N * shift, moved.D / shift, 0.35, 0.35))
    keep = np.tile(np.arange(9) % 4 == 0, len(budgets)) | (moved.C < 9e21)
    one, two = (fit_isoflop(p.take(keep), draws=200) for p in (plain, moved))
    assert one.settings["excess_scatter"] == 0
    rest = off - np.polyval(np.polyfit(np.log(budgets), off, 1), np.log(budgets))
    assert two.settings["excess_scatter"] == pytest.approx(math.sqrt((rest**2).sum() / 6), rel=0.1)
    width = [np.subtract(*f.intervals["a"]["bootstrap"][::-1]) for f in (one, two)]
    assert width[1] > 5 * width[0]
    x, y = (np.log([[o[name] for o in two.optima]]) for name in ("budget", "N"))
    assert two.parameters["a"] == pytest.approx(float(line(x, y, np.ones_like(x))[1][0]), rel=1e-12)
    akima = fit_isoflop(moved.take(keep), variant="akima", draws=200)
    assert akima.settings["line_weights"] != two.settings["line_weights"] == "equal"
    assert akima.parameters["a"] != pytest.approx(two.parameters["a"], rel=1e-6)
