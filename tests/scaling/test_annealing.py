"""The annealing law: areas by definition, recovery from whole curves, prediction, reading."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxlm.cli import main
from jaxlm.errors import UserError
from jaxlm.scaling.annealing import (
    NAMES,
    annealing_command,
    curve_loss,
    fit_annealing,
    load_annealing,
    predict_curve,
)
from jaxlm.scaling.curves import Curve, areas, moving_mean, read_curve, warmup_steps

TRUTH = {"L0": 2.1, "A": 1.3, "alpha": 0.52, "C": 0.9, "lambda": 0.995}
STEPS, WARM, PEAK = 1500, 40, 3e-3


def schedule(kind: str, steps: int = STEPS) -> np.ndarray:
    """Learning rate of updates 1 .. steps."""
    s = np.arange(1, steps + 1)
    x = np.clip((s - WARM) / (steps - WARM), 0, 1)
    share = {
        "constant": np.ones(steps),
        "cosine": 0.1 + 0.45 * (1 + np.cos(np.pi * x)),
        "wsd": 1 - np.sqrt(np.clip((s - 0.8 * steps) / (0.2 * steps), 0, 1)),
        "linear": 1 - x,
    }[kind]
    return PEAK * np.minimum(s / WARM, 1) * share


def curve(kind: str, noise: float = 0.0, seed: int = 0, every: int = 10, steps: int = STEPS) -> Curve:
    lr = schedule(kind, steps)
    step = np.arange(60, steps + 1, every)
    shocks = np.random.default_rng(seed).normal(size=len(step))
    return Curve(kind, lr, step, curve_loss(TRUTH, lr)[step - 1] * np.exp(noise * shocks))


def test_areas_are_their_definition():
    lr = np.array([0.2, 0.6, 1.0, 1.0, 0.7, 0.3, 0.3, 0.1])
    lam = 0.8
    s1, s2, slope = areas(lr, lam)
    np.testing.assert_allclose(s1, np.cumsum(lr))
    want = np.zeros(len(lr))
    for s in range(len(lr)):
        for i in range(s + 1):
            # the rise of the warm-up (up to index 2) is no annealing
            want[s] += sum((lr[k - 1] - lr[k]) * lam ** (i - k) for k in range(3, i + 1))
    np.testing.assert_allclose(s2, want, atol=1e-15)
    h = 1e-6
    numeric = (areas(lr, lam + h)[1] - areas(lr, lam - h)[1]) / (2 * h)
    np.testing.assert_allclose(slope, numeric, atol=1e-9)


def test_a_second_rise_is_negative_annealing():
    lr = np.array([1.0, 1.0, 0.5, 1.0])
    assert warmup_steps(lr) == 0
    assert areas(lr, 0.0)[1].tolist() == [0.0, 0.0, 0.5, 0.0]


def test_recovers_the_law_from_a_constant_rate_and_one_cooldown():
    fit = fit_annealing([curve("constant"), curve("wsd")], draws=0)
    for name in NAMES:
        assert fit.parameters[name] == pytest.approx(TRUTH[name], rel=1e-6), name
    assert max(s["gap"] for s in fit.starts) < 1e-8
    assert all(s["converged"] for s in fit.starts)
    # and so another schedule's whole curve is known
    cosine = schedule("cosine")
    np.testing.assert_allclose(
        curve_loss(fit.parameters, cosine)[20:], curve_loss(TRUTH, cosine)[20:], rtol=1e-6
    )


def test_predicts_a_schedule_that_it_has_not_seen_within_its_interval():
    fit = fit_annealing([curve("constant", 0.003, 1), curve("wsd", 0.003, 2)], draws=60)
    assert fit.resample == "block"
    assert fit.sigma == pytest.approx(0.003, rel=0.2)
    for kind in ("cosine", "linear"):
        lr = schedule(kind)
        centre, low, high = predict_curve(fit, lr)
        truth = curve_loss(TRUTH, lr)
        assert abs(centre[-1] / truth[-1] - 1) < 0.02
        inside = (low <= truth) & (truth <= high)
        assert inside[60:].mean() > 0.95
        assert np.all(high[60:] / low[60:] > 1.005)  # an interval never narrower than a run's own noise


@pytest.mark.slow
def test_intervals_cover_the_truth():
    """20 made-up pairs of runs: 5 parameters x 20 intervals of 90%, of which 70 to 100 should hold it."""
    hits = np.zeros(len(NAMES))
    for seed in range(20):
        pair = [curve("constant", 0.004, 100 + seed, 20), curve("wsd", 0.004, 200 + seed, 20)]
        fit = fit_annealing(pair, draws=30, level=0.9, seed=seed)
        hits += [fit.intervals[n][0] <= TRUTH[n] <= fit.intervals[n][1] for n in NAMES]
    assert 70 <= hits.sum() <= 100
    assert hits.min() >= 12


def test_runs_are_resampled_whole_when_there_are_many():
    kinds = ("constant", "wsd", "cosine", "linear", "wsd")
    fit = fit_annealing([curve(k, 0.002, i, 20) for i, k in enumerate(kinds)], draws=15)
    assert fit.resample == "run"
    assert len(fit.draws) + fit.failed == 15
    # draws differ from each other, and are a function of the seed
    again = fit_annealing([curve(k, 0.002, i, 20) for i, k in enumerate(kinds)], draws=15)
    assert again.draws == fit.draws
    assert len({tuple(d) for d in fit.draws}) > 5


def test_a_fixed_lambda_stays():
    fit = fit_annealing([curve("constant"), curve("wsd")], fixed={"lambda": 0.99}, draws=5)
    assert fit.parameters["lambda"] == pytest.approx(0.99, rel=1e-12)
    assert fit.value > 1e-6  # not the truth's lambda
    assert np.ptp(np.array(fit.draws)[:, NAMES.index("lambda")]) < 1e-12


def test_refusals():
    with pytest.raises(UserError, match=r"falls in none of the curves.*'constant'"):
        fit_annealing([curve("constant")])
    with pytest.raises(UserError, match="no curves"):
        fit_annealing([])
    with pytest.raises(UserError, match="alpha"):
        fit_annealing([curve("wsd")], fixed={"alpa": 0.5})
    with pytest.raises(UserError, match="too few to resample"):
        fit_annealing([curve("wsd"), curve("constant")], resample="run")
    with pytest.raises(UserError, match="need at least 10"):
        fit_annealing([curve("wsd", every=400)])
    with pytest.raises(UserError, match="steps do not grow"):
        Curve("x", np.ones(3), np.array([2, 2]), np.ones(2))
    with pytest.raises(UserError, match="updates 1 to 3"):
        Curve("x", np.ones(3), np.array([2, 4]), np.ones(2))


def test_says_what_the_curves_do_not_identify():
    fit = fit_annealing([curve("constant", 0.003, 1), curve("wsd", 0.003, 2)], draws=0)
    assert any("rest on it alone" in note for note in fit.notes)
    flat = {**TRUTH, "C": 0.0}
    lr = schedule("wsd")
    step = np.arange(60, STEPS + 1, 10)
    losses = curve_loss(flat, lr)[step - 1] * np.exp(0.003 * np.random.default_rng(3).normal(size=len(step)))
    none = fit_annealing([curve("constant", 0.003, 1), Curve("wsd", lr, step, losses)], draws=20)
    assert any("no gain from annealing" in note for note in none.notes)


def test_smoothing_has_no_lag_and_widens_the_blocks():
    line = np.arange(50.0)
    np.testing.assert_allclose(moving_mean(line, 7), line)  # a straight line stays
    wide = [Curve(c.name, c.lr, c.step, moving_mean(c.loss, 6), 6) for c in (curve("constant"), curve("wsd"))]
    assert fit_annealing(wide, draws=2).block == 26


# --- Files ---


def write_run(path: Path, lr: np.ndarray, every: int = 10, first: int = 1, branch_from: str = "") -> Path:
    """A run directory as training leaves it: rows at its first step, every `every`-th, and the last."""
    loss = curve_loss(TRUTH, lr)
    steps = sorted({first, *range(every * (-(-first // every)), len(lr) + 1, every), len(lr)})
    rows = []
    for s in steps:
        row = {"step": s, "tokens": s * 512, "train/nll": loss[s - 1], "train/lr": lr[s - 1]}
        rows.append(json.dumps(row | ({"eval/nll": loss[s - 1]} if s == len(lr) else {})))
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 99')  # torn by a crash
    config = {"config": {"train": {"branch_from": branch_from}}, "hash": "0" * 64, "starts": []}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_reads_runs_and_joins_a_branch_to_its_trunk(tmp_path):
    trunk = write_run(tmp_path / "runs/trunk", schedule("constant"))
    lr = schedule("wsd", 1000)
    branch = write_run(tmp_path / "runs/branch", lr, first=801, branch_from="trunk")
    got = read_curve(branch)
    np.testing.assert_allclose(got.lr, lr, rtol=0.03, atol=2e-5)  # 1-sqrt is curved between rows
    np.testing.assert_allclose(got.lr[:800], schedule("constant")[:800], rtol=1e-12)
    assert got.step[0] == 801
    whole = read_curve(trunk, skip=100)
    np.testing.assert_allclose(whole.lr, schedule("constant"), rtol=1e-12)
    assert whole.step[0] > 100
    assert read_curve(trunk, column="eval/nll").step.tolist() == [STEPS]


def test_reading_refuses_what_is_no_run(tmp_path):
    trunk = write_run(tmp_path / "trunk", schedule("constant", 300))
    with pytest.raises(UserError, match="did you mean 'eval/nll'"):
        read_curve(trunk, column="eval/nl")
    with pytest.raises(UserError, match="a run directory"):
        read_curve(tmp_path / "nothing")
    orphan = write_run(tmp_path / "orphan", schedule("wsd", 1000), first=801)
    with pytest.raises(UserError, match="no branch"):
        read_curve(orphan)
    far = write_run(tmp_path / "far", schedule("wsd", 1000), first=801, branch_from="trunk")
    with pytest.raises(UserError, match="only 300 updates"):
        read_curve(far)
    (trunk / "metrics.jsonl").write_text('{"step": 1, "train/nll": 3.0}\n')
    with pytest.raises(UserError, match="train/lr"):
        read_curve(trunk)
    (trunk / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match="not a file of metrics"):
        read_curve(trunk)


def test_the_command_writes_the_fit_and_its_picture(tmp_path, capsys):
    runs = [write_run(tmp_path / kind, schedule(kind)) for kind in ("constant", "wsd", "cosine")]
    fit = annealing_command(runs[:2], tmp_path / "out", predict=runs[2:], skip=60, draws=10)
    said = " ".join(capsys.readouterr().out.split())
    assert "predicted cosine" in said
    assert "one curve has a falling rate" in said
    assert load_annealing(tmp_path / "out/annealing.json") == fit
    assert (tmp_path / "out/annealing.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert fit.parameters["alpha"] == pytest.approx(
        TRUTH["alpha"], rel=0.02
    )  # rates between rows are guessed
    (tmp_path / "out/annealing.json").write_text("{}")
    with pytest.raises(UserError, match="not a fitted annealing law"):
        load_annealing(tmp_path / "out/annealing.json")


def test_the_verb(tmp_path, capsys):
    runs = [write_run(tmp_path / kind, schedule(kind)) for kind in ("constant", "wsd")]
    words = [*(f"--run={run}" for run in runs), f"--out={tmp_path / 'out'}", "--skip=60", "--draws=0"]
    assert main(["anneal", *words]) == 0
    assert "fitted wsd" in capsys.readouterr().out
    assert load_annealing(tmp_path / "out/annealing.json").parameters["alpha"] > 0
    assert main(["anneal", f"--out={tmp_path}"]) == 2
    assert "needs --run" in capsys.readouterr().err


def test_needs_no_jax():
    code = "import sys, jaxlm.scaling.annealing; assert 'jax' not in sys.modules, 'jax'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
