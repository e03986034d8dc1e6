"""Plans: counted, checked and priced by independent arithmetic; kept whole, or refused."""

import ast
import dataclasses
import json
import math
import re
from functools import partial
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from jaxlm.chips import CHIPS, find_chip, peak_flops
from jaxlm.config import build, config_hash, default_config, load_experiment
from jaxlm.errors import UserError
from jaxlm.preflight import compiled
from jaxlm.preflight.topology import likely_topology
from jaxlm.scaling import record
from jaxlm.scaling.counting import count
from jaxlm.sharding import make_layout
from jaxlm.sweep import chips, plan, preflights
from jaxlm.sweep.collect import collect
from jaxlm.sweep.plan import Hardware, SweepConfig, make_plan
from jaxlm.sweep.plan_file import all_cells, load_plans, run_dir, save_plan
from jaxlm.sweep.preview import plan_command, plan_totals
from jaxlm.train import programs
from jaxlm.train.run import plan as plan_run
from jaxlm.train.run import train

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted((ROOT / "experiments" / "scaling").glob("*.py"))
UNTIMED = Hardware(measure=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """24,000 bytes to train on (and an EOS), 600 to evaluate on."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text("the cat sat on the mat. " * 1000)
    (folder / "eval.txt").write_text("a dog lay by the door. " * 26)
    return folder


def sweep_config(text, **fields):
    """Two budgets of two sizes, 64 tokens a step; `run__optim__lr=...` and `grid__...` change it."""
    config = default_config(SweepConfig)
    config.run.model.activation = "gelu"
    config.run.data.train, config.run.data.eval = f"{text}/train.txt", f"{text}/eval.txt"
    config.run.data.seq_len, config.run.data.batch_size = 32, 2
    config.run.optim.b2, config.run.optim.schedule, config.run.optim.final = 0.98, "linear", 0.0
    config.run.mesh.data = 1
    shape, grid = config.grid.shape, config.grid
    shape.dim_min, shape.dim_max, shape.dim_step, shape.head_dims = 8, 64, 8, ((0, 8),)
    shape.depth = 1
    grid.budgets, grid.sizes, grid.lr_rule = (2e8, 4e8), (5e3, 10e3), "width"
    for name, value in fields.items():
        *groups, field = name.split("__")
        place = config
        for group in groups:
            place = place[group]
        place[field] = value
    return config


def made(text, folder, name="grid", hardware=UNTIMED, dry_run=False, **fields):
    config = build(sweep_config(text, **fields), SweepConfig)
    return make_plan(config, folder, name, hardware=hardware, dry_run=dry_run)


@pytest.fixture(scope="module")
def plain(text, tmp_path_factory):
    """The plan of `sweep_config` as it stands."""
    return made(text, tmp_path_factory.mktemp("S"))


# ---------------------------------------------------------------------------------------------- numbers


def test_every_cell_is_counted(text, tmp_path):
    found = made(text, tmp_path, grid__seeds=(3,))
    assert [cell.role for cell in found.cells] == ["grid", "grid", "seed"] * 2
    for cell in found.cells:
        counts = count(cell.config.model, 32)
        assert cell.id == config_hash(cell.config)[:12]
        assert cell.plan == "grid"
        assert cell.steps == cell.config.train.num_steps
        assert cell.tokens == cell.steps * 64
        assert cell.flops == counts.flops_train * cell.tokens == cell.own_flops
        assert abs(cell.flops / cell.budget - 1) < 0.01
        assert cell.counts == counts.to_dict()
        rows = math.ceil(cell.unique_tokens / 32)
        assert cell.unique_tokens == 24_001
        assert cell.epochs == pytest.approx(cell.steps * 2 / rows)
        assert cell.memory_bytes == plan_run(cell.config, num_devices=1).memory.total
        assert cell.seconds == 0.0


def test_more_than_one_epoch_is_refused_unless_allowed(text, tmp_path):
    big = dict(grid__budgets=(2e8, 1e9), grid__tolerance=0.05)
    with pytest.raises(UserError, match=r"1 of 4 runs.*24,001 \(2\.\d\d epochs\).*grid\.allow_epochs=True"):
        made(text, tmp_path, **big)
    found = made(text, tmp_path, **big, grid__allow_epochs=True)
    over = [cell for cell in found.cells if cell.epochs > 1]
    assert len(over) == 1
    assert any("no point of a single-epoch law" in w for w in over[0].warnings)


def test_a_dry_run_is_the_same_plan_and_leaves_nothing(text, tmp_path):
    (tmp_path / "S").mkdir()
    dry = made(text, tmp_path / "S", dry_run=True)
    assert list((tmp_path / "S").iterdir()) == []
    wet = made(text, tmp_path / "S")
    assert dry == wet
    prepared = sorted(p.name for p in (tmp_path / "S" / "runs" / "data_cache").iterdir())
    assert len(prepared) == 2
    assert made(text, tmp_path / "S", dry_run=True) == wet  # now from what is prepared
    assert sorted(p.name for p in (tmp_path / "S" / "runs" / "data_cache").iterdir()) == prepared


def test_what_train_would_refuse_is_refused_here(text, tmp_path):
    with pytest.raises(UserError, match="scored on one held-out set"):
        made(text, tmp_path, run__data__eval="")
    with pytest.raises(UserError, match="no file matches"):
        made(text, tmp_path, run__data__eval=f"{text}/evil.txt")
    with pytest.raises(UserError, match="vocab"):
        made(text, tmp_path, run__model__vocab_size=100)
    with pytest.raises(UserError, match="do not fit in the run"):
        made(text, tmp_path, run__optim__warmup=1e6, run__optim__warmup_unit="steps")
    with pytest.raises(UserError, match="not divisible"):
        made(text, tmp_path, run__train__microbatches=3)
    with pytest.raises(UserError, match="--name='a/b'"):
        made(text, tmp_path, name="a/b")
    assert not (tmp_path / "plan.json").exists()


# ---------------------------------------------------------------------------------------------- the price


def test_every_chip_has_a_peak():
    for name, chip in CHIPS.items():
        assert peak_flops(chip.kind), name
        assert chip.peak == peak_flops(chip.kind) * chip.devices
        assert 0 < chip.mfu <= 0.5
    with pytest.raises(UserError, match="did you mean 'v5p'"):
        find_chip("v5pp")


def test_the_time_on_a_chip_is_the_longer_of_compute_and_traffic(text, tmp_path):
    found = made(text, tmp_path, hardware=Hardware(CHIPS["v5p"]))
    for cell in found.cells:
        memory = plan_run(cell.config, num_devices=1).memory
        compute = cell.flops / (459e12 * 0.4)
        traffic = cell.steps * 2 * (memory.params + memory.grads + memory.opt_state) / 2.765e12
        assert cell.seconds == pytest.approx(max(compute, traffic))
        assert traffic > compute  # such small models wait for memory
    fields = dict(flops=1e18, steps=10, memory=plan_run(found.cells[0].config, num_devices=1).memory)
    assert chips.chip_seconds(CHIPS["v5p"], 4, 0.5, **fields) == pytest.approx(1e18 / (4 * 459e12 * 0.5))
    # A v3 chip is two devices: one of them has half of it.
    assert chips.chip_seconds(CHIPS["v3"], 1, 0.5, **fields) == pytest.approx(1e18 / (61.5e12 * 0.5))
    idle = made(text, tmp_path, hardware=Hardware(CHIPS["v5p"], count=4))
    assert all("takes 1 of 4 devices" in " ".join(cell.warnings) for cell in idle.cells)


def test_chip_hours_and_money(text, tmp_path):
    hardware = Hardware(gflops=0.001, price=3.0)
    found = made(text, tmp_path, hardware=hardware)
    assert [cell.seconds for cell in found.cells] == pytest.approx([c.flops / 1e6 for c in found.cells])
    hours = sum(cell.flops for cell in found.cells) / 1e6 / 3600
    lines = "\n".join(plan_totals(found, hardware))
    assert f"{hours:.3g} chip-hours" in lines
    assert f"{3 * hours:,.2f} at 3 a chip-hour" in lines
    with pytest.raises(UserError, match=r"--mfu=1\.5"):
        chips.check_rate(0, 1.5, 0, 1)


def test_this_machine_is_timed_once(text, tmp_path, monkeypatch):
    timed = []

    def fake(cfg, seconds):
        timed.append(cfg.model.model_dim)
        per_token = count(cfg.model, 32).flops_train
        return chips.Timing(per_token, 1e9, 2.0)

    monkeypatch.setattr(chips, "_time", fake)
    sizes = dict(grid__sizes=(5e3, 10e3, 15e3), grid__budgets=(4e8,), grid__tolerance=0.05)
    found = made(text, tmp_path, hardware=Hardware(), **sizes)
    dims = [cell.config.model.model_dim for cell in found.cells]
    assert timed == dims
    for cell in found.cells:
        held_out = 26 * 23 + 1
        expected = 2.0 + (cell.flops + held_out * cell.counts["flops_train"] / 3) / 1e9
        assert cell.seconds == pytest.approx(expected)
    again = made(text, tmp_path, hardware=Hardware(), **sizes)
    assert again == found
    assert len(timed) == 3
    made(text, tmp_path, hardware=Hardware(), dry_run=True, **sizes)  # prints the same, so it reads the file
    assert len(timed) == 3
    made(text, tmp_path / "elsewhere", hardware=Hardware(), dry_run=True, **sizes)
    assert len(timed) == 6
    assert not (tmp_path / "elsewhere").exists()
    monkeypatch.setattr(chips, "MOST_STEP_FLOPS", 1.0)
    none = made(text, tmp_path, hardware=Hardware(), **sizes)
    assert all(cell.seconds == 0 for cell in none.cells)
    assert "too large to be timed here" in plan_totals(none, Hardware())[-1]


def test_a_mesh_that_is_left_to_us_is_chosen_before_it_is_timed(text, tmp_path, monkeypatch):
    timed = []

    def fake(cfg, seconds):
        timed.append(make_layout(cfg.mesh).mesh.size)
        return chips.Timing(count(cfg.model, 32).flops_train, 1e9, 2.0)

    monkeypatch.setattr(chips, "_time", fake)
    fields = dict(run__mesh__data=-1, run__mesh__auto=True, run__data__batch_size=8, grid__tolerance=0.5)
    found = made(text, tmp_path, hardware=Hardware(), **fields)
    assert set(timed) == {jax.device_count()}
    assert all(cell.config.mesh.auto and cell.seconds > 0 for cell in found.cells)


@pytest.mark.slow
def test_a_measurement_is_near_the_truth_within_an_order_of_magnitude(text):
    cfg = build(sweep_config(text), SweepConfig).run
    (timing,) = chips.calibrate([cfg], seconds=0.2)
    assert timing.flops_per_token == count(cfg.model, 32).flops_train
    assert 1e7 < timing.flops_per_second < 1e15
    assert timing.compile_seconds > 0.05


@pytest.fixture
def no_cache():
    """Nobody has chosen a compilation cache, as the suite has."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    reset_cache()


@pytest.mark.slow
def test_a_run_need_not_compile_what_its_plan_has_timed(text, tmp_path, no_cache):
    shape = dict(grid__budgets=(2e8,), grid__sizes=(5e3,))
    (cell,) = made(text, tmp_path, hardware=Hardware(), **shape).cells
    assert list((tmp_path / "runs" / "compilation_cache").iterdir())
    programs._programs.cache_clear()  # as in a new process
    jax.clear_caches()
    compiled = train(cell.config, run_dir(tmp_path, cell)).compilation
    assert compiled["cache_hits"] >= 2
    assert compiled["programs"].keys() >= {"build", "step"}


# -------------------------------------------------------------------------------------- warnings and notes


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.5, None), (0.8, r"more than 60% of its .* so that it may not fit"), (1.5, "a device, which has")],
)
def test_what_the_planner_would_refuse_is_warned_of(text, tmp_path, plain, share, words):
    most = max(cell.memory_bytes for cell in plain.cells)
    chip = dataclasses.replace(CHIPS["v5p"], memory=most / share, usable=0)
    warned = " ".join(w for c in made(text, tmp_path, hardware=Hardware(chip)).cells for w in c.warnings)
    assert re.search(words, warned) if words else "GB a device" not in warned


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(run__optim__warmup=0.2), "warm-up takes 20% of the run"),
        (dict(run__optim__warmup=60.0, run__optim__warmup_unit="steps"), "more than a tenth bends the fit"),
        (dict(run__optim__schedule="constant"), "does not decay to a tenth"),
        (dict(run__optim__final=0.5), "does not decay to a tenth"),
        (dict(run__optim__b2=0.95), r"optim\.b2=0\.95 is too low for 2 rows"),
        (
            dict(run__data__batch_size=256, grid__tolerance=0.9, grid__allow_epochs=True),
            "batch of 8,192 tokens is larger than",
        ),
    ],
)
def test_what_bends_a_law_is_warned_of(text, plain, tmp_path, fields, words):
    assert not re.search(words, " ".join(w for cell in plain.cells for w in cell.warnings))
    assert re.search(
        words, " ".join(w for cell in made(text, tmp_path, **fields).cells for w in cell.warnings)
    )


def test_short_runs_are_warned_of(plain):
    assert {cell.steps < 300 for cell in plain.cells} == {True, False}
    for cell in plain.cells:
        assert any("fewer than 300" in w for w in cell.warnings) == (cell.steps < 300)


def test_notes_on_the_whole_grid(text, plain, tmp_path):
    notes = " ".join(plain.notes)
    assert "fewer than 4 sizes at 2e+08, 4e+08" in notes
    assert "a line over budgets and its error need 3" in notes
    assert "no run is repeated with another seed" in notes
    assert "exponents depend on what is counted" in notes
    assert "one learning rate for all sizes" not in notes
    assert "one learning rate for all sizes" in " ".join(made(text, tmp_path, grid__lr_rule="fixed").notes)
    assert "another seed" not in " ".join(made(text, tmp_path, grid__seeds=(1,)).notes)


# ---------------------------------------------------------------------------------------------- on disk


def test_plans_are_kept_whole_and_refused_with_the_difference(text, plain, tmp_path):
    first = plain
    save_plan(tmp_path, first)
    assert load_plans(tmp_path) == {"grid": first}
    save_plan(tmp_path, first)  # the same: nothing to refuse
    before = (tmp_path / "plan.json").read_bytes()
    other = made(text, tmp_path, run__optim__lr=1e-3, grid__budgets=(2e8,))
    with pytest.raises(UserError, match="with another grid") as refusal:
        save_plan(tmp_path, other)
    for line in ("optim.lr: 0.0003 -> 0.001", "grid.budgets: (200000000.0, 400000000.0) -> (200000000.0,)"):
        assert line in str(refusal.value)
    assert f"- {first.cells[0].id}" in str(refusal.value)
    assert f"+ {other.cells[0].id}" in str(refusal.value)
    assert (tmp_path / "plan.json").read_bytes() == before
    second = dataclasses.replace(other, name="other")
    save_plan(tmp_path, second)
    assert load_plans(tmp_path) == {"grid": first, "other": second}
    assert json.loads((tmp_path / "plan.json").read_text())["format"] == 1
    # What only concerns execution is another machine's business, not another plan.
    save_plan(tmp_path, made(text, tmp_path, run__train__log_every=3))
    assert load_plans(tmp_path)["grid"].cells[0].config.train.log_every == 3


def test_a_damaged_or_missing_plan_is_said(tmp_path):
    with pytest.raises(UserError, match="is no sweep directory"):
        load_plans(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_plans(tmp_path)
    (tmp_path / "plan.json").write_text('{"format": 2, "plans": {}}')
    with pytest.raises(UserError, match="has format 2, this version reads 1"):
        load_plans(tmp_path)


def test_identical_runs_of_two_plans_are_one(text, tmp_path):
    trunks = dict(grid__kind="trunks", grid__budgets=(), grid__sizes=(5e3,), run__optim__cooldown=0.2)
    trunks |= dict(run__optim__warmup=0.1)
    one = made(text, tmp_path, "one", grid__tokens=(6400.0, 12800.0), **trunks)
    warm = one.cells[0].config.optim.warmup
    fixed = dict(run__optim__warmup=warm, run__optim__warmup_unit="steps")
    two = made(text, tmp_path, "two", grid__tokens=(9600.0, 12800.0), **{**trunks, **fixed})
    cells = all_cells({"one": one, "two": two})
    assert [cell.role for cell in cells] == ["trunk", "branch", "branch", "branch"]
    assert len({cell.id for cell in cells}) == 4
    assert {cell.parent for cell in cells[1:]} == {cells[0].id}
    assert cells[0].config.train.save_steps == tuple(sorted(cell.branch_step for cell in cells[1:]))
    branch = cells[1]
    assert branch.own_flops == pytest.approx(branch.flops * (1 - branch.branch_step / branch.steps))
    assert not any("warm-up takes" in text for cell in cells for text in cell.warnings)
    assert branch.own_flops == pytest.approx(0.2 * branch.flops, rel=0.02)


def test_a_fit_must_count_as_the_grid_does(text, tmp_path, monkeypatch):
    columns = {"N": "n_total", "C": "flops_exact"}
    fit = record.Fit("chinchilla", "surface", "huber", 1e-3, {}, data={"columns": columns})
    asked = []
    monkeypatch.setattr(record, "load_fit", lambda path: asked.append(path) or fit, raising=False)
    monkeypatch.setattr(record, "optimum", lambda fit, budget: (5e3, 0.0, 0.0), raising=False)
    fields = dict(grid__sizes=(), grid__center_fit="fits/a/fit.json", grid__sizes_per_budget=1)
    fields |= dict(grid__role="holdout")
    found = made(text, tmp_path, **fields)
    assert asked == [tmp_path / "fits" / "a" / "fit.json"]
    assert [cell.role for cell in found.cells] == ["holdout", "holdout"]
    columns["N"] = "n_non_embedding"
    with pytest.raises(UserError, match=r"N=n_non_embedding, this grid has N=n_total.*grid\.size_by='n_non_"):
        made(text, tmp_path, **fields)
    columns |= {"N": "n_total", "C": "flops_6nd"}
    with pytest.raises(UserError, match="C=flops_6nd, this grid has C=flops_exact"):
        made(text, tmp_path, **fields)


def test_the_command_prints_the_grid_and_keeps_it(text, tmp_path, capsys):
    config = sweep_config(text)
    options = dict(gflops=1.0, price=2.0)
    assert plan_command(config, tmp_path / "S", dry_run=True, **options) == 0
    dry = capsys.readouterr().out
    assert not (tmp_path / "S").exists()
    assert plan_command(config, tmp_path / "S", **options) == 0
    wet = capsys.readouterr().out
    assert dry.splitlines()[:-1] == wet.splitlines()[:-1]
    plan_of = load_plans(tmp_path / "S")["grid"]
    for cell in plan_of.cells:
        (line,) = [line for line in wet.splitlines() if cell.id in line]
        for number in (f"{cell.tokens:,}", f"{cell.counts['n_head']:,}", f"{cell.epochs:.2f}"):
            assert number in line
    assert "chip-hours (1 GFLOP/s as given)" in wet
    assert "note: " in wet


def test_what_was_compiled_takes_the_place_of_estimates(text, tmp_path, monkeypatch):
    """From the cache of preflights, where a shape is there; with `preflight`, what is not is compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "versions", lambda topology: {})
    monkeypatch.setattr(preflights, "has_compiler", lambda topology: True)
    asked, empty = [], dict(largest_replicated=("", 0), unreadable="", kernels={}, cycles=0.0, replicated=())
    sent = compiled.Row("all-gather", "fsdp", 4, 2, 1, 1e9, 2e11, 0.0, "")  # a second over two links

    def compile_step(cfg, topology, announce, fits=True):
        asked.append(cfg)
        memory = compiled.DeviceMemory(1, 1, 1, 2**20 + cfg.model.model_dim, 0, 0) if fits else None
        shortage = None if fits else compiled.Shortage(2e11, 1e11, "RESOURCE_EXHAUSTED")
        state = dict(params=1, gradients=1, opt_state=1, batch=1)
        said = dict(memory=memory, shortage=shortage, collectives=[sent] if fits else None, state=state)
        more = dict(host=0, unknown_loops=0, seconds={}, versions={}, mesh={}, topology=str(topology))
        return compiled.Facts(**said, **more, **empty)

    hardware = Hardware(CHIPS["v5p"], 4, topology=likely_topology("v5p", 4))
    fields = dict(run__mesh__data=-1, run__data__batch_size=4)
    estimated = made(text, tmp_path, hardware=hardware, **fields)
    shapes = {plan._shape_key(cell.config): cell.config for cell in estimated.cells}
    monkeypatch.setattr(compiled, "compile_step", compile_step)
    one = compiled.facts_of(next(iter(shapes.values())), hardware.topology, compiled.default_cache())[0]
    some = made(text, tmp_path, hardware=hardware, **fields)
    assert len(asked) == 1
    assert (
        f"of 1 shape(s) are the compiler's for v5p:2x2x1, those of the other {len(shapes) - 1}"
        in some.notes[-1]
    )
    assert some.cells[0].memory_bytes == one.memory.allocated != estimated.cells[0].memory_bytes
    assert some.cells[0].seconds == some.cells[0].steps  # one second of sending a step
    shape = [plan._shape_key(cell.config) for cell in some.cells]
    same = [a == b for a, b in zip(some.cells, estimated.cells, strict=True)]
    assert same == [key != shape[0] for key in shape]
    everything = dataclasses.replace(hardware, preflight=True)
    found = made(text, tmp_path, hardware=everything, **fields)
    assert len(asked) == len(shapes) > 1
    assert [c.memory_bytes for c in found.cells] == [
        2**20 + 1 + c.config.model.model_dim for c in found.cells
    ]
    assert made(text, tmp_path, hardware=hardware, **fields) == found  # the cache is full
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(compiled, "compile_step", partial(compile_step, fits=False))
    large = made(text, tmp_path, hardware=everything, **fields)
    assert all("by the compiler" in " ".join(cell.warnings) for cell in large.cells)
    assert {cell.memory_bytes for cell in large.cells} == {int(2e11)}
    with pytest.raises(UserError, match=r"--preflight compiles for a slice .* of v4"):
        plan_command(sweep_config(text), tmp_path / "S", preflight=True)


# -------------------------------------------------------------------------------------------- experiments


@pytest.mark.parametrize("path", EXPERIMENTS, ids=[path.stem for path in EXPERIMENTS])
def test_scaling_experiments_say_what_they_show_and_fill_their_grid(path, tmp_path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    for part in ("Claim:", "Command:", "Hardware:", "Expected:", "Last run:"):
        assert docstring.count(f"\n{part}") == 1, part
    named = re.findall(r"--config=(\S+?\.py)", docstring)
    assert set(named) == {f"experiments/scaling/{path.name}"}
    expected, last = re.search(r"Expected: (.*?)\nLast run: (.*)", docstring, re.DOTALL).groups()
    assert expected.startswith("not run yet") == last.startswith("none")
    for part in re.findall(rf"{path.name}:(\w+)", docstring):
        build(load_experiment(f"{path}:{part}"), SweepConfig)
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        load_experiment(f"{path}:tin")
    tiny = build(load_experiment(f"{path}:tiny"), SweepConfig)
    full = build(load_experiment(str(path)), SweepConfig)
    assert tiny.run.optim == full.run.optim
    assert tiny.grid.shape == full.grid.shape
    found = make_plan(tiny, tmp_path, hardware=UNTIMED)
    assert sum(cell.own_flops for cell in found.cells) < 3e10  # seconds
    assert plan.expand(full.run, full.grid)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smoke", "trunks"])
def test_the_tiny_size_trains(name, tmp_path):
    config = load_experiment(f"{ROOT / 'experiments' / 'scaling' / name}.py:tiny")
    save_plan(tmp_path, make_plan(build(config, SweepConfig), tmp_path, hardware=UNTIMED))
    cells = all_cells(load_plans(tmp_path))
    smallest = min(cell.counts["n_total"] for cell in cells)
    chosen = [cell for cell in cells if cell.counts["n_total"] == smallest]
    for cell in chosen:
        result = train(cell.config, run_dir(tmp_path, cell), bar=False)
        assert result.status == "finished"
        assert result.flops == cell.flops
    rows = {row["id"]: row for row in collect(tmp_path)}
    for cell in chosen:
        assert rows[cell.id]["status"] == "finished"
        assert rows[cell.id]["exclude"] == ("trunk" if cell.role == "trunk" else "")
        assert 1.0 < rows[cell.id]["bpb"] < 7.0
    assert name != "trunks" or [cell.role for cell in chosen] == ["trunk", "grid", "branch", "branch"]


def test_every_full_grid_of_the_smoke_sweep_fits_the_standard_library():
    """One epoch of 11.4 MB, as its docstring says."""
    config = build(load_experiment(str(ROOT / "experiments" / "scaling" / "smoke.py")), SweepConfig)
    drafts = plan.expand(config.run, config.grid)
    tokens = [d.config.train.num_steps * 512 for d in drafts]
    assert len(drafts) == 15
    assert max(tokens) < 7e6
