"""Two steps from compute to a task: the loss by a law, the accuracy by a sigmoid of the loss."""

import dataclasses
import json

import numpy as np
import pytest

from jaxlm.cli import main
from jaxlm.errors import UserError
from jaxlm.scaling.downstream import IDEAL, WINDOW, averaged, chain, smoothed
from jaxlm.scaling.predict import law_rows, loss_interval, value_at
from jaxlm.scaling.record import load_fit
from jaxlm.scaling.table import Points

SIZES, RATIOS = (2e8, 4e8, 8e8, 1.6e9), (20, 40, 80, 160)
BIG = (6e9, 6e11)
NOISE, SCATTER, EVALUATIONS = 0.002, 0.004, 60


def loss(n, d):
    return 0.4 + 120 * n**-0.3 + 200 * d**-0.3


def accuracy(x):
    return 0.25 + 0.75 / (1 + np.exp(4 * (x - 1.1)))


def write(path, names, rows):
    lines = [
        ",".join(names),
        *(",".join(v if isinstance(v, str) else repr(float(v)) for v in r) for r in rows),
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    """Both steps as a user fits them: the runs' last losses, and all of their evaluations."""
    folder, rng = tmp_path_factory.mktemp("steps"), np.random.default_rng(0)
    runs, evaluations = [], []
    for i, (n, ratio) in enumerate((n, r) for n in SIZES for r in RATIOS):
        end = loss(n, n * ratio) * np.exp(rng.normal(0, NOISE))
        path = end + 1.5 * np.exp(-np.linspace(0, 6, EVALUATIONS))
        got = accuracy(path) * np.exp(rng.normal(0, SCATTER, EVALUATIONS))
        runs.append((n, n * ratio, end))
        evaluations += [(f"run{i}", x, y) for x, y in zip(path, got, strict=True)]
    first = write(folder / "runs.csv", ("N", "D", "loss"), runs)
    second = write(folder / "evaluations.csv", ("run", "loss", "accuracy"), evaluations)
    common = ["--draws=100", "--noprofile", "--starts=4"]
    columns = "--columns=N=N,D=D,loss=loss"
    assert main(["fit", f"--table={first}", columns, *common, f"--out={folder / 'loss'}"]) == 0
    given = ["--law=loss_to_accuracy", "--objective=mse", "--block=run", "--evaluations"]
    given += ["--columns=loss=loss,accuracy=accuracy"]
    assert main(["fit", f"--table={second}", *given, *common, f"--out={folder / 'accuracy'}"]) == 0
    return folder / "loss", folder / "accuracy"


def test_running_averages_of_every_run_and_the_ideal_point():
    x = np.concatenate([np.linspace(3, 1, 20), np.linspace(2, 1, 10)])
    block = np.repeat([1, 0], [20, 10])
    nothing = np.full(30, np.nan)
    got = averaged(Points(nothing, nothing, nothing, x, block=block, extra={"accuracy": x / 4}))
    want = [smoothed(x[20:]), smoothed(x[:20]), [IDEAL]]
    np.testing.assert_allclose(got.L, np.concatenate(want))
    np.testing.assert_allclose(got.extra["accuracy"], np.r_[got.L[:-1] / 4, 1.0])
    assert [len(part) for part in want] == [10 - 1 - WINDOW + 1, 20 - 2 - WINDOW + 1, 1]
    assert np.bincount(got.block).tolist() == [len(part) for part in want]
    assert got.rows[[0, 4, 5, -2, -1]].tolist() == [25, 29, 6, 19, -1]


def test_two_steps_give_the_accuracy_of_a_larger_model(fits, capsys):
    first, second = fits
    step1, step2 = load_fit(first), load_fit(second)
    assert step2.bootstrap["blocks"] == len(SIZES) * len(RATIOS) + 1
    assert any("running averages" in note for note in step2.notes)
    assert [path.name for path in second.glob("*.png")] == ["residuals.png"]  # of loss alone: no surface
    at = f"--at=N={BIG[0]},D={BIG[1]}"
    assert main(["predict", f"--fit={first}", f"--then={second}", at, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (got,) = told["predicted"]
    true = loss(*BIG)
    assert abs(got["loss"]["value"] / true - 1) < 0.01
    assert got["loss"] == loss_interval(step1, [BIG[0]], [BIG[1]])[0]._asdict()
    assert got["value"]["lo"] < accuracy(true) < got["value"]["hi"]
    assert abs(got["value"]["value"] / accuracy(true) - 1) < 0.02
    at_loss = value_at(step2, {"L": got["loss"]["value"]})
    assert got["value"]["value"] == pytest.approx(at_loss.value.value, rel=1e-12)
    width = {name: got[name]["hi"] - got[name]["lo"] for name in ("value", "value_law", "of_loss", "of_step")}
    assert width["value"] == max(width.values())
    assert min(width.values()) > 0
    assert [a["name"] for a in told["diagnostics"]] == ["steps_unchecked"]


def test_each_step_alone_is_the_chain_with_the_other_known(fits):
    """With draws of the other step that do not move, and no scatter of its own, only one step is left."""
    step1, step2 = (load_fit(path) for path in fits)
    rows = law_rows(step1, {"N": np.array([BIG[0]]), "D": np.array([BIG[1]])})[:, 0]
    quiet = dataclasses.replace(step2, sigma=0.0, draws=[[step2.parameters[n] for n in step2.names]] * 30)
    both, alone = chain(step1, step2, rows), chain(step1, quiet, rows)
    assert alone.value == pytest.approx(both.of_loss, rel=0.01)
    known = dataclasses.replace(step1, sigma=0.0)
    still = np.full_like(rows, rows[0])
    assert chain(known, step2, still).value_law == pytest.approx(both.of_step, rel=0.01)
    with pytest.raises(UserError, match="law of the loss"):
        chain(step1, step1, rows)


def test_budgets_are_chained_and_an_unseen_loss_is_named(fits, capsys):
    first, second = fits
    assert main(["predict", f"--fit={first}", f"--then={second}", "--budget=1e21,1e25"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in ("at C = 1e+21 FLOPs", "accuracy of the run", "if the loss were known exactly"):
        assert word in text, word
    assert "warning: extrapolation: L = 0." in text
    assert "note: steps_unchecked" in text


def test_held_out_runs_show_errors_that_cancel(fits, tmp_path, capsys):
    """Losses 5% above what step 1 predicts, an accuracy as if they were not: only the steps err."""
    first, second = fits
    names = ("params", "tokens", "nll", "acc")
    columns = "--columns=N=params,D=tokens,loss=nll,accuracy=acc"
    n, d = np.array([1.2e9, 2.4e9]), np.array([6e10, 1.2e11])
    for shift, want in ((1.0, []), (1.05, ["cancelling_errors"])):
        table = write(
            tmp_path / f"{shift}.csv", names, zip(n, d, shift * loss(n, d), accuracy(loss(n, d)), strict=True)
        )
        given = ["predict", f"--fit={first}", f"--then={second}", f"--measured={table}", columns]
        assert main([*given, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert [a["name"] for a in told["diagnostics"]] == want
        for row in told["held_out"]:
            assert row["chained"] == pytest.approx(row["step_1"] + row["step_2"])
            assert abs(row["chained"]) < 0.01
            assert row["loss_error"] == pytest.approx(1 / shift - 1, abs=0.005)
    assert main(given) == 0
    text = capsys.readouterr().out
    assert "errors by step" in text
    assert "cancelling_errors" in text


def test_two_steps_ask_for_what_they_need(fits, capsys):
    first, second = fits
    for flags, said in (
        ([f"--then={second}"], "--then needs --budget, --at or --measured"),
        (["--measured=x.csv", "--budget=1e21"], "--then"),
        (["--columns=N=n", "--budget=1e21"], "--measured"),
        ([f"--then={second}", "--budget=1e21", "--next=1"], "without --then"),
        ([f"--then={first}", "--budget=1e21"], "law of the loss"),
        ([f"--then={first}", "--measured=x.csv"], "law of the loss"),
        ([f"--fit={second}", f"--then={second}", "--at=L=2.5"], "must be a law that gives the loss"),
        ([f"--then={second}", "--at=N=1e9"], "needs D too"),
    ):
        assert main(["predict", f"--fit={first}", *flags]) == 2, flags
        assert said in capsys.readouterr().err, flags
    assert main(["fit", "--table=x.csv", "--law=chinchilla", "--evaluations", "--out=x"]) == 2
    assert "loss_to_accuracy" in capsys.readouterr().err
