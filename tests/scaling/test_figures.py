"""Figures show the fit's own numbers, their words do not overlap, and the caller's style does not matter."""

import itertools
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from scipy import stats

from jaxlm.errors import UserError
from jaxlm.scaling import comparisons, curve_figures, figures
from jaxlm.scaling.annealing import curve_loss
from jaxlm.scaling.comparisons import HeldOut, Row
from jaxlm.scaling.curves import Curve
from jaxlm.scaling.fit import run_fit
from jaxlm.scaling.optima import fit_isoflop
from jaxlm.scaling.record import optimum
from jaxlm.scaling.style import _log_ticks, count_text, png, power_text, save_figure
from jaxlm.scaling.table import Points

TRUTH = {"E": 1.2, "A": 70.0, "B": 130.0, "alpha": 0.36, "beta": 0.33}


def sweep(budgets=(3e11, 1e12, 3e12, 1e13), sizes=6, noise=0.003) -> Points:
    """Runs about the known surface's optimum at each budget."""
    p, rng = TRUTH, np.random.default_rng(0)
    total = p["alpha"] + p["beta"]
    g = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / total)
    c = np.repeat(budgets, sizes)
    n = g * (c / 6) ** (p["beta"] / total) * np.tile(6.0 ** np.linspace(-1, 1, sizes), len(budgets))
    d = c / (6 * n)
    loss = p["E"] + p["A"] * n ** -p["alpha"] + p["B"] * d ** -p["beta"]
    loss = loss * np.exp(noise * rng.normal(size=len(n)))
    return Points(N=n, D=d, C=c, L=loss, extra={"budget": c}, rows=np.arange(len(n)))


@pytest.fixture(scope="module")
def line_fit():
    return fit_isoflop(sweep(), draws=60)


@pytest.fixture(scope="module")
def surface_fit():
    return run_fit(sweep(), draws=40, starts=4, objective="log_mse", profile=True)


def clashes(figure) -> list[tuple[str, str]]:
    """Pairs of words that overlap, and words that reach out of the picture."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    words = []
    for axis in figure.axes:
        if not axis.get_visible():
            continue
        for one, limits in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            ticks = [t for t in one.get_major_ticks() if min(limits) <= t.get_loc() <= max(limits)]
            words += [t.label1 for t in ticks] + [t.label2 for t in ticks] + [one.label]
        words += [axis.title, axis._left_title, *axis.texts]
    for legend in figure.legends:
        words += legend.get_texts()
    boxes = [
        (t.get_text(), t.get_window_extent(renderer))
        for t in words
        if t.get_visible() and t.get_text().strip()
    ]
    width, height = figure.canvas.get_width_height()
    out = [
        (text, "edge") for text, b in boxes if b.x0 < -1 or b.y0 < -1 or b.x1 > width + 1 or b.y1 > height + 1
    ]
    for (one, a), (two, b) in itertools.combinations(boxes, 2):
        wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        if wide > 1 and high > 1:
            out.append((one, two))
    return out


def curves_of(axis, points: int = 100) -> list[np.ndarray]:
    return [np.array(line.get_data()) for line in axis.lines if len(line.get_xdata()) >= points]


def test_isoflop_curves_have_their_minima_at_the_fitted_vertices(line_fit):
    axis = figures.isoflop(line_fit).axes[0]
    drawn = curves_of(axis)
    assert len(drawn) == len(line_fit.optima) == 4
    for (n, loss), o in zip(drawn, line_fit.optima, strict=True):
        assert n[np.argmin(loss)] == pytest.approx(o["N"], rel=0.03)
        assert loss.min() == pytest.approx(o["L"], rel=1e-4)


def test_optimum_lines_have_the_fitted_slopes(line_fit, surface_fit):
    figure = figures.optimum_lines({"lines": line_fit, "surface": surface_fit}, 4e13)
    for axis, name in zip(figure.axes, "ab", strict=True):
        for (c, y), fit in zip(curves_of(axis, 20), (line_fit, surface_fit), strict=True):
            slope = np.polyfit(np.log(c), np.log(y), 1)[0]
            assert slope == pytest.approx({**fit.derived, **fit.parameters}[name], abs=1e-6)
            assert c[-1] == pytest.approx(4e13)
    assert any("extrapolated" in t.get_text() for t in figure.axes[0].texts)
    np.testing.assert_allclose(
        curves_of(figures.tokens_per_parameter({"s": surface_fit}).axes[0], 20)[0][1][-1],
        np.divide(*optimum(surface_fit, 1e13)[1::-1]),
        rtol=1e-6,
    )


def test_residuals_are_the_fit_s(surface_fit):
    axis = figures.residuals(surface_fit).axes[0]
    drawn = next(line for line in axis.lines if len(line.get_xdata()) == 24)
    np.testing.assert_allclose(drawn.get_ydata(), 100 * np.array(surface_fit.residuals))


def held(error: float = 0.0, c: float = 4e13) -> HeldOut:
    return HeldOut("r", 5e5, c / 3e6, c, 2.4 * (1 + error), 2.4, 2.4 * 0.98, 2.4 * 1.02)


def test_a_held_out_run_is_judged_by_its_interval():
    assert held(0.019).inside
    assert not held(0.021).inside
    assert held(0.02).nominal(0.95) == pytest.approx(0.95, abs=1e-3)
    one_sigma = np.expm1(np.log(1.02) / stats.norm.ppf(0.975))
    assert held(one_sigma).nominal(0.95) == pytest.approx(0.6827, abs=1e-3)
    assert held().nominal(0.95) == 0.0


def made_up_curve(lr: np.ndarray) -> Curve:
    law = {"L0": 2.0, "A": 1.3, "alpha": 0.5, "C": 0.6, "lambda": 0.99}
    step = np.arange(10, len(lr) + 1, 10)
    return Curve("run", lr, step, curve_loss(law, lr)[step - 1])


def pictures(line_fit, surface_fit) -> dict:
    both = {"surface (huber), all runs": surface_fit, "iso-FLOP parabola": line_fit}
    rate = np.full(2000, 3e-3)
    branch = rate[:1000] * np.minimum(1, (1000 - np.arange(1000)) / 200)
    trunk = {"41k parameters": (made_up_curve(rate), [made_up_curve(branch)])}
    rows = [Row("main", 0.48, (0.46, 0.5)), Row("Kaplan: C = 6 N D, N = non-embedding", 0.6, (0.5, 0.7), "c")]
    return {
        "isoflop": figures.isoflop(line_fit),
        "isoflop of a surface": figures.isoflop(surface_fit),
        "optimum": figures.optimum_lines(both, 4e13),
        "tokens": figures.tokens_per_parameter(both, 4e13),
        "surface": figures.surface(surface_fit),
        "residuals": figures.residuals(surface_fit),
        "profiles": figures.profiles(surface_fit),
        "holdout": comparisons.holdout(surface_fit, [held(), held(0.05), held(-0.01)]),
        "calibration": comparisons.calibration(surface_fit, [held()]),
        "forest": comparisons.forest(rows, "exponent $a$"),
        "trunks": curve_figures.trunks(trunk, 512),
        "curves": curve_figures.loss_curves([made_up_curve(rate)] * 2, [1e4, 2e4], [512, 512]),
    }


def test_no_words_overlap_or_leave_the_picture(line_fit, surface_fit):
    found = {name: clashes(figure) for name, figure in pictures(line_fit, surface_fit).items()}
    assert {name: pairs for name, pairs in found.items() if pairs} == {}


def test_the_caller_s_style_neither_matters_nor_changes(line_fit):
    plain = png(figures.isoflop(line_fit))
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        assert png(figures.isoflop(line_fit)) == plain
        assert dict(matplotlib.rcParams) == before


@pytest.mark.slow
def test_draw_fit_draws_what_makes_sense(line_fit, surface_fit, tmp_path):
    names = {p.stem for p in figures.draw_fit(surface_fit, tmp_path / "s")}
    assert names == {"residuals", "isoflop", "surface", "optimum", "tokens_per_parameter", "profiles"}
    names = {p.stem for p in figures.draw_fit(line_fit, tmp_path / "l")}
    assert names == {"residuals", "isoflop", "optimum", "tokens_per_parameter"}
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in tmp_path.glob("*/*.png"))
    assert not list(tmp_path.glob("*/.*"))  # no half-written file is left


def test_vector_files(line_fit, tmp_path):
    figure = figures.tokens_per_parameter({"x": line_fit})
    assert save_figure(figure, tmp_path / "a.pdf").read_bytes()[:5] == b"%PDF-"
    assert b"<svg" in save_figure(figure, tmp_path / "a.svg").read_bytes()


def test_refuses_what_cannot_be_drawn(line_fit):
    with pytest.raises(UserError, match="no surface"):
        figures.surface(line_fit)
    with pytest.raises(UserError, match="no held-out runs"):
        comparisons.holdout(line_fit, [])


@pytest.mark.parametrize(
    ("low", "high"), [(8e3, 2e6), (1e11, 1e13), (2.6e11, 5e13), (9, 37), (1e5, 1e22), (1.0, 1.3)]
)
def test_log_ticks_are_few_and_round(low, high):
    major, minor = _log_ticks(low, high, 4)
    assert 3 <= len(major) <= 12
    assert all(low <= t <= high for t in major + minor)
    assert len({count_text(t) for t in major}) == len(major)  # no two labels read the same
    assert not {round(np.log(t), 9) for t in major} & {round(np.log(t), 9) for t in minor}


def test_numbers_in_words():
    assert [count_text(x) for x in (0.5, 12_345, 999.6e3, 2e13)] == ["0.5", "12.3k", "1M", "20T"]
    assert [power_text(x) for x in (1e12, 2.5e11, 40)] == ["$10^{12}$", r"$2.5\times10^{11}$", "40"]


def test_needs_no_jax():
    code = "import sys, jaxlm.scaling.figures, jaxlm.scaling.report; assert 'jax' not in sys.modules, 'jax'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
