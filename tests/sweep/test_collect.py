"""The table: every run has a row, every rule its rows; numbers come back from the files as they were."""

import csv
import importlib.util
import json
import math
import statistics

import pytest

from jaxlm.config import RunConfig, build, default_config, to_dict
from jaxlm.errors import UserError
from jaxlm.scaling.counting import count
from jaxlm.sweep.collect import FAR, FLAGS, RULES, collect, collect_command, write_table
from jaxlm.sweep.grids import GridConfig, expand
from jaxlm.sweep.plan import Cell, Plan, SweepConfig
from jaxlm.sweep.plan_file import run_dir, save_plan
from jaxlm.sweep.shapes import ShapeConfig
from jaxlm.sweep.status import FAILED
from jaxlm.train.run import train

FAMILY = ShapeConfig(dim_min=8, dim_max=64, dim_step=8, head_dims=((0, 8),), depth=1)


def cells_of(grid, name="grid", run=None):
    """The cells of a grid, without data."""
    if run is None:
        config = default_config(RunConfig)
        config.data.seq_len, config.data.batch_size = 32, 2
        run = build(config)
    out = []
    for d in expand(run, grid):
        counts, steps = count(d.config.model, 32), d.config.train.num_steps
        fixed = dict(
            counts=counts.to_dict(), parent=d.parent, branch_step=d.branch_step, labels=dict(d.labels)
        )
        amounts = dict(tokens=steps * 64, flops=counts.flops_train * steps * 64, steps=steps)
        out.append(Cell(d.id, name, d.role, d.config, d.budget, **amounts, **fixed, epochs=0.5))
    return out


def save(workdir, cells, name="grid"):
    save_plan(workdir, Plan(name, SweepConfig(), "0" * 64, tuple(cells)))


def finish(workdir, cell, loss, **changes):
    """The files that a finished run leaves."""
    folder = run_dir(workdir, cell)
    folder.mkdir(parents=True, exist_ok=True)
    result = {"status": "finished", "reason": "", "config_hash": cell.id + "0" * 52, "steps": cell.steps}
    result |= {
        "eval/nll": loss,
        "eval/bpb": loss / math.log(2) if loss else loss,
        "eval/standard_error": 0.01,
    }
    result |= {"eval/tokens": 1000, "seconds": {"step": 3.0, "eval": 1.0}, "device": "cpu", **changes}
    (folder / "result.json").write_text(json.dumps(result))
    rows = [{"step": n, "train/nll": 5.5 - 4.0 * n / cell.steps} for n in range(1, cell.steps + 1)]
    rows.append({"step": cell.steps + 1, "eval/nll": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')
    start = {"git": {"commit": "abc", "changed": False}}
    (folder / "config.json").write_text(json.dumps({"config": to_dict(cell.config), "starts": [{}, start]}))


def isoflop(**fields):
    sizes = dict(budgets=(2e8, 4e8), sizes=(5e3, 10e3, 16e3), tolerance=0.05)
    return GridConfig(**{"shape": FAMILY, **sizes, **fields})


@pytest.fixture
def whole(tmp_path):
    """A finished sweep with an interior minimum at each budget."""
    cells = cells_of(isoflop())
    save(tmp_path, cells)
    for cell, loss in zip(cells, (3.1, 3.0, 3.2, 2.8, 2.6, 2.7), strict=True):
        finish(tmp_path, cell, loss)
    return tmp_path, cells


def test_a_row_has_every_count_and_convention(whole):
    workdir, cells = whole
    rows = collect(workdir)
    assert [row["id"] for row in rows] == [cell.id for cell in cells]
    for row, cell in zip(rows, cells, strict=True):
        counts = count(cell.config.model, 32)
        for name in ("n_total", "n_non_embedding", "n_embedding", "n_head", "n_active", "n_products"):
            assert row[name] == getattr(counts, name)
        for name, per_token in counts.conventions.items():
            assert row[f"flops_{name}"] == per_token * cell.tokens
        assert row["flops_exact"] == counts.flops_train * cell.tokens
        assert (row["status"], row["exclude"], row["flags"]) == ("finished", "", "")
        assert row["config_hash"].startswith(row["id"])
        assert row["seconds"] == 4.0
        assert row["label_size"] == cell.labels["size"]
        # The mean of 5.5 - 4 n / steps over the last 5% of the steps (five of them at least).
        late = max(5, cell.steps - math.floor(0.95 * cell.steps))
        assert row["loss_smooth"] == pytest.approx(1.5 + 4 * (late - 1) / 2 / cell.steps)
        assert row["commit"] == "abc"
    assert [row["loss"] for row in rows] == [3.1, 3.0, 3.2, 2.8, 2.6, 2.7]
    assert {row["loss_se"] for row in rows} == {0.01}
    needed = "id plan role status exclude seed budget tokens steps batch_tokens epochs unique_tokens lr"
    needed += " weight_decay b2 bpb model_dim num_layers parent branch_step device flops_6nd"
    assert set(needed.split()) <= set(rows[0])


def test_the_files_hold_the_same_to_the_last_bit(whole):
    workdir, _ = whole
    rows = collect(workdir)
    rows[0]["loss"] = 0.1 + 0.2  # 17 digits
    rows[1]["loss"] = None
    files = write_table(workdir, rows)
    with (workdir / "table.csv").open(newline="") as file:
        back = list(csv.DictReader(file))
    for row, read in zip(rows, back, strict=True):
        assert list(read) == list(row)
        for name, value in row.items():
            assert read[name] == "" if value is None else type(value)(read[name]) == value
    if importlib.util.find_spec("pyarrow") is None:
        assert files == ["table.csv"]
        return
    import pyarrow.parquet

    assert files == ["table.csv", "table.parquet"]
    assert pyarrow.parquet.read_table(workdir / "table.parquet").to_pylist() == rows


def test_runs_that_have_not_finished_are_rows_too(tmp_path, capsys):
    cells = cells_of(isoflop(budgets=(2e8,)))
    save(tmp_path, cells)
    finish(tmp_path, cells[0], 3.0, status="stopped", reason="SIGTERM")
    (run_dir(tmp_path, cells[1])).mkdir(parents=True)
    (run_dir(tmp_path, cells[1]) / FAILED).write_text('{"reason": "disk full", "attempts": []}')
    found = {row["id"]: (row["status"], row["exclude"], row["detail"]) for row in collect(tmp_path)}
    assert found == {
        cells[0].id: ("unfinished", "not_finished", "SIGTERM"),
        cells[1].id: ("failed", "not_finished", "disk full"),
        cells[2].id: ("missing", "not_finished", ""),
    }
    assert all(row["loss"] is None and row["seconds"] is None for row in collect(tmp_path))
    assert collect_command(tmp_path) == 0
    said = capsys.readouterr().out
    assert "3 runs: 1 unfinished, 1 failed, 1 missing" in said
    assert f"{cells[1].id} not_finished: disk full" in said
    assert "0 rows for a fit" in said
    # The result of another config is none of this run's.
    finish(tmp_path, cells[0], 3.0, config_hash="f" * 64)
    assert collect(tmp_path)[0]["status"] != "finished"


@pytest.mark.parametrize(
    ("at", "loss", "reason"),
    [
        (1, None, "not finite"),
        (1, 5.6, "not below the first training loss"),
        (1, FAR * 3.2 * 1.01, "1.26 times that of its neighbours"),
        (0, FAR * 3.0 * 1.01, "1.26 times"),
        (1, FAR * 3.2 * 0.99, ""),
        (0, FAR * 3.0 * 0.99, ""),
    ],
)
def test_divergence_has_a_rule(whole, at, loss, reason):
    workdir, cells = whole
    finish(workdir, cells[at], loss)
    rows = collect(workdir)
    assert [row["exclude"] for row in rows] == ["diverged" if reason and i == at else "" for i in range(6)]
    assert reason in rows[at]["detail"]
    assert str(FAR) in RULES["diverged"]


def test_one_divergence_does_not_hide_behind_another(whole):
    """All are judged before any is marked: a bad run makes nobody else diverge."""
    workdir, cells = whole
    finish(workdir, cells[3], 5.0)
    finish(workdir, cells[4], 2.6)
    rows = collect(workdir)
    assert [row["exclude"] for row in rows[3:]] == ["diverged", "", ""]


def test_roles_keep_runs_out_of_fits(tmp_path):
    base = default_config(RunConfig)
    base.data.seq_len, base.data.batch_size = 32, 2
    base.optim.warmup_unit, base.optim.warmup = "steps", 10.0
    run = build(base)
    trunks = GridConfig(kind="trunks", shape=FAMILY, sizes=(5e3,), tokens=(6400, 12800))
    held = isoflop(budgets=(8e8,), sizes=(10e3,), role="holdout")
    tune = isoflop(budgets=(2e8,), sizes=(10e3,), role="tune")
    for name, grid in {"trunks": trunks, "held": held, "tune": tune, "grid": isoflop()}.items():
        cells = cells_of(grid, name, run)
        save(tmp_path, cells, name)
        for cell in cells:
            finish(tmp_path, cell, 3.0)
    rows = collect(tmp_path)
    found = [(row["plan"], row["role"], row["exclude"]) for row in rows]
    assert found[:3] == [("trunks", "trunk", "trunk"), *[("trunks", "branch", "")] * 2]
    assert found[3] == ("held", "holdout", "holdout")
    # The tuned cell is one of the grid's: one run, one row, and a point of the fit.
    assert found[4] == ("tune+grid", "grid", "")
    assert len(rows) == 10
    assert [row["exclude"] for row in rows[4:]] == [""] * 6
    # A branch begins where its trunk has got to: that is no loss to start from.
    trunk, branch = rows[0], rows[1]
    assert branch["loss_first"] == trunk["loss_first"]
    cell = cells_of(trunks, "trunks", run)[1]
    curve = run_dir(tmp_path, cell) / "metrics.jsonl"
    curve.write_text(json.dumps({"step": cell.branch_step + 1, "train/nll": 2.9}) + "\n")
    assert collect(tmp_path)[1]["exclude"] == ""
    assert rows[1]["parent"] == rows[1]["block"] == rows[0]["block"] == rows[0]["id"]
    assert rows[4]["block"] == rows[4]["id"]
    assert all(row["loss_seed_sd"] is None for row in rows)
    assert rows[1]["flops_own"] == pytest.approx(0.2 * rows[1]["flops_exact"], rel=0.05)


def lr_sweep(tmp_path, losses, role=""):
    cells = cells_of(isoflop(budgets=(2e8,), sizes=(10e3,), lrs=(1e-3, 2e-3, 4e-3), role=role))
    save(tmp_path, cells)
    for cell, loss in zip(cells, losses, strict=True):
        if loss is not None:
            finish(tmp_path, cell, loss)
    return collect(tmp_path)


def test_the_best_learning_rate_is_kept_and_says_so(tmp_path):
    rows = lr_sweep(tmp_path, (3.1, 3.0, 3.2))
    assert [row["exclude"] for row in rows] == ["not_best_lr", "", "not_best_lr"]
    assert rows[1]["flags"] == "best_of_lr_grid"
    assert rows[0]["detail"] == "+0.1000 nats above lr 0.002"
    assert "one side only" in FLAGS["best_of_lr_grid"]


def test_the_edge_of_a_grid_of_learning_rates_is_flagged(tmp_path):
    rows = lr_sweep(tmp_path, (3.1, 3.0, 2.9))
    assert rows[2]["flags"] == "best_of_lr_grid,lr_edge"
    assert rows[2]["exclude"] == ""


def test_a_learning_rate_that_diverged_is_no_edge(tmp_path):
    rows = lr_sweep(tmp_path, (3.1, 3.0, 4.5))
    assert [row["exclude"] for row in rows] == ["not_best_lr", "", "diverged"]
    assert rows[1]["flags"] == "best_of_lr_grid"


def test_an_open_grid_of_learning_rates_is_flagged(tmp_path):
    rows = lr_sweep(tmp_path, (3.1, 3.0, None))
    assert rows[1]["flags"] == "best_of_lr_grid,lr_grid_open"
    assert [row["exclude"] for row in rows] == ["not_best_lr", "", "not_finished"]


def test_tuning_runs_say_which_is_best_and_stay_out(tmp_path):
    rows = lr_sweep(tmp_path, (3.1, 3.0, 2.9), role="tune")
    assert [row["exclude"] for row in rows] == ["tune"] * 3
    assert [row["flags"] for row in rows] == ["", "", "best_lr,lr_edge"]


def test_a_tuning_run_may_be_a_point_of_the_grid(tmp_path):
    """The grid that is planned with the rate that won holds the run that won."""
    base = default_config(RunConfig)
    base.data.seq_len, base.data.batch_size, base.optim.lr = 32, 2, 2e-3
    run = build(base)
    save(tmp_path, cells_of(isoflop(budgets=(2e8,), sizes=(10e3,)), run=run))
    tune = isoflop(budgets=(2e8,), sizes=(10e3,), lrs=(1e-3, 2e-3, 4e-3), role="tune")
    save(tmp_path, tuning := cells_of(tune, "tune", run), "tune")
    for cell, loss in zip(tuning, (3.1, 3.0, 3.2), strict=True):
        finish(tmp_path, cell, loss)
    found = {row["lr"]: (row["plan"], row["exclude"], row["flags"]) for row in collect(tmp_path)}
    assert found == {
        2e-3: ("grid+tune", "", "best_lr"),
        1e-3: ("tune", "tune", ""),
        4e-3: ("tune", "tune", ""),
    }
    # Where another rate wins, the grid's run is still the grid's.
    finish(tmp_path, tuning[2], 2.9)
    found = {row["lr"]: (row["exclude"], row["flags"]) for row in collect(tmp_path)}
    assert found == {2e-3: ("", ""), 1e-3: ("tune", ""), 4e-3: ("tune", "best_lr,lr_edge")}


def test_the_noise_of_the_seeds_is_measured_per_budget(tmp_path):
    base = default_config(RunConfig)
    base.data.seq_len, base.data.batch_size = 32, 2
    cells = cells_of(isoflop(seeds=(1, 2)), run=build(base))
    save(tmp_path, cells)
    for cell, loss in zip(cells, (3.1, 3.0, 3.2, 3.01, 3.05, 2.8, 2.6, 2.7, 2.6, 2.63), strict=True):
        finish(tmp_path, cell, loss)
    rows = collect(tmp_path)
    assert [row["role"] for row in rows] == (["grid"] * 3 + ["seed"] * 2) * 2
    assert [row["loss_seed_sd"] for row in rows[:5]] == pytest.approx(
        [statistics.stdev((3.0, 3.01, 3.05))] * 5
    )
    assert [row["loss_seed_sd"] for row in rows[5:]] == pytest.approx(
        [statistics.stdev((2.6, 2.6, 2.63))] * 5
    )
    finish(tmp_path, cells[3], None)  # diverged: no measure of noise
    assert collect(tmp_path)[0]["loss_seed_sd"] == pytest.approx(statistics.stdev((3.0, 3.05)))


def test_a_vectorised_run_is_charged_its_share(whole):
    workdir, cells = whole
    finish(workdir, cells[0], 3.0, **{"group/cells": 8.0})
    assert collect(workdir)[0]["seconds"] == 0.5


def test_more_than_one_epoch_is_flagged(tmp_path, capsys):
    cell = cells_of(isoflop(budgets=(2e8,), sizes=(10e3,)))[0]
    save(tmp_path, [Cell(**{**vars(cell), "epochs": 1.5})])
    finish(tmp_path, cell, 3.0)
    (row,) = collect(tmp_path)
    assert (row["exclude"], row["flags"], row["detail"]) == ("", "multi_epoch", "1.50 epochs")
    collect_command(tmp_path)
    said = capsys.readouterr().out
    assert "flagged: 1 multi_epoch" in said
    assert f"wrote {tmp_path}/table.csv" in said


def test_without_a_plan_there_is_no_table(tmp_path):
    with pytest.raises(UserError, match="no sweep directory"):
        collect(tmp_path)


@pytest.mark.slow
def test_real_runs_give_real_rows(tiny, tmp_path):
    cells = [tiny.cell(tiny.config(tiny.texts, seed=seed), epochs=0.1) for seed in (0, 1)]
    tiny.make(tmp_path, cells)
    results = [train(cell.config, run_dir(tmp_path, cell), bar=False) for cell in cells]
    rows = collect(tmp_path)
    for row, result in zip(rows, results, strict=True):
        assert row["status"] == "finished"
        assert row["exclude"] == ""
        assert row["loss"] == result.metrics["eval/nll"]
        assert row["bpb"] == result.metrics["eval/bpb"]
        assert row["loss_se"] == result.metrics["eval/standard_error"]
        assert row["flops_exact"] == result.flops
        assert row["tokens"] == result.tokens
        assert row["config_hash"] == result.config_hash
        assert 0 < row["seconds"] < 300
    assert rows[0]["loss"] != rows[1]["loss"]
