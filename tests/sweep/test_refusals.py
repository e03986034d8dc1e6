"""What plan, sweep and collect say of wrong flags and damaged files: one line, code 2, nothing lost."""

import json

import pytest

from jaxlm.cli import main
from jaxlm.errors import UserError
from jaxlm.sweep import chips
from jaxlm.sweep.claims import Claims, this_process
from jaxlm.sweep.grids import GridConfig, expand
from jaxlm.sweep.plan_file import load_plans
from jaxlm.sweep.shapes import ShapeConfig, closest_shapes
from jaxlm.sweep.status import survey
from jaxlm.sweep.store import open_store

SMOKE = "--config=experiments/scaling/smoke.py:tiny"


@pytest.fixture
def folder(tiny, tmp_path):
    """A sweep directory of one run."""
    return tiny.make(tmp_path / "S", [tiny.cell(tiny.config(tiny.texts))])


def refusal(capsys, verb, *flags):
    """The one line that the command says on stderr."""
    assert main([verb, *flags]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("jaxlm: ")
    return said


def test_plan_refuses_numbers_that_no_estimate_is_made_from(capsys, tmp_path):
    for flag, message in [
        ("--gflops=nan", "--gflops=nan must be a number, 0 or more"),
        ("--gflops=inf", "--gflops=inf must be"),
        ("--price=inf", "--price=inf must be"),
        ("--mfu=0.4", "--mfu=0.4 is read with --chip, and not with --gflops"),
        (
            "--preflight",
            "--preflight compiles for a slice (of GPUs: a host) of v4, v5e, v5p, v6e, v7x, h100, h200",
        ),
        ("--name=a/b", "--name='a/b'"),
        ("--chip=V5P", "did you mean 'v5p'"),
    ]:
        assert message in refusal(capsys, "plan", SMOKE, f"--workdir={tmp_path}/S", flag)
    odd = ["--chip=v5p", "--num_chips=3", "--preflight"]
    assert "--chip=v5p --num_chips=3 makes none" in refusal(
        capsys, "plan", SMOKE, f"--workdir={tmp_path}/S", *odd
    )
    one = "--config=experiments/quickstart.py:smoke"
    assert "is a sweep (`run` and `grid`): `jaxlm plan`" in refusal(
        capsys, "preflight", SMOKE, "--topology=cpu:8", "--cache="
    )
    assert "is that of one run; a sweep's" in refusal(capsys, "plan", one, f"--workdir={tmp_path}/S")
    assert not (tmp_path / "S").exists()


def test_the_mesh_of_a_sweep_is_left_to_the_planner_as_that_of_a_run_is(capsys, tiny, tmp_path):
    data = [f"--config.run.data.{name}={tiny.texts}/{name}.txt" for name in ("train", "eval")]
    flags = [*data, "--config.grid.allow_epochs=True", "--config.run.data.batch_size=4", "--dry_run"]
    flags += ["--config.grid.tolerance=0.5", "--chip=v5p", "--num_chips=4", f"--workdir={tmp_path}/S"]
    for auto in (["--config.run.mesh=auto"], ["--config.run.mesh", "auto"]):
        assert main(["plan", SMOKE, *flags, *auto]) == 0
        assert "4 x TPU v5 a run" in capsys.readouterr().out


def test_grids_of_a_slipped_number_are_refused_at_once(tiny):
    run = tiny.config(tiny.texts)
    with pytest.raises(UserError, match=r"shape\.dim_max=1000000000 is beyond 1048576"):
        ShapeConfig(dim_max=10**9)
    family = ShapeConfig(dim_min=8, dim_max=64, dim_step=8, head_dims=((0, 8),))
    with pytest.raises(UserError, match="too few shapes for 100000 different ones"):
        closest_shapes(run.model, family, [1e4] * 100_000, seq_len=16)
    many = tuple(range(1, 1001))
    axes = (("seed", many), ("data.seed", many), ("train.num_steps", many))
    with pytest.raises(UserError, match="asks for 1,000,000,000 runs; 100,000 are planned at most"):
        expand(run, GridConfig(kind="product", product=axes))


def test_sweep_and_collect_refuse_what_is_not_there(capsys, folder):
    where = f"--workdir={folder}"
    assert "--workers=0" in refusal(capsys, "sweep", where, "--workers=0")
    assert "--index=1: the sweep has 1 runs, 0 to 0" in refusal(capsys, "sweep", where, "--index=1")
    assert "did you mean 'grid'" in refusal(capsys, "sweep", where, "--name=grib")
    for verb in ("sweep", "collect"):
        assert "it has no plan.json" in refusal(capsys, verb, f"--workdir={folder}/elsewhere")
        assert "Not a directory" in refusal(capsys, verb, f"--workdir={folder}/plan.json")


def test_a_damaged_plan_is_said_and_left_alone(capsys, folder):
    good = json.loads((folder / "plan.json").read_text())

    def changed(change):
        tree = json.loads(json.dumps(good))
        change(tree["plans"]["grid"])
        return json.dumps(tree)

    for text, message in [
        ('{"format": 1}', "damaged, or of another version: KeyError: 'plans'"),
        ('{"format": 1, "plans": []}', "damaged"),
        ('{"format": 1, "plans": {}}', "holds no plan; `jaxlm plan` adds one"),
        ('{"format": 1, "plans": {"grid": {}}}', "KeyError: 'config'"),
        (changed(lambda plan: plan.update(cells=3)), "damaged"),
        (changed(lambda plan: plan["cells"][0].pop("steps")), "'steps'"),
        (changed(lambda plan: plan["cells"][0].update(role="gird")), "did you mean 'grid'"),
        (
            changed(lambda plan: plan["config"]["run"].update(seeds=1)),
            "plan.json is damaged.*unknown key run.seeds",
        ),
    ]:
        (folder / "plan.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load_plans(folder)
        refusal(capsys, "collect", f"--workdir={folder}")
        assert (folder / "plan.json").read_text() == text


@pytest.mark.parametrize("text", ["[]", "3", '{"x": 3}', '{"x": {"speed": 1.0}}', "{"])
def test_a_damaged_calibration_is_said(tiny, tmp_path, text):
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"calibration.json is damaged .* remove it"):
        chips.calibrate([tiny.config(tiny.texts)], path)


def test_damaged_claims_neither_stop_a_sweep_nor_are_believed(folder):
    """They count as an unknown worker's: shown, waited for, and taken over when they stay silent."""
    (cell,) = load_plans(folder)["grid"].cells
    store = open_store(folder)
    claims = Claims(store, this_process())
    (folder / "claims").mkdir()
    for content in (
        "{",
        "[]",
        "null",
        "{}",
        '{"pid": "x", "host": 3}',
        '{"pid": 1, "host": "h", "step": "x"}',
    ):
        (folder / "claims" / f"{cell.id}.1.json").write_text(content)
        claims.clock = lambda: 0.0
        assert survey(store, [cell], claims)[cell.id].text == "an unknown process"
        claims.clock = lambda: 91.0
        assert survey(store, [cell], claims)[cell.id].state == "waiting"
    assert claims.take(cell.id, claims.look([cell.id])[cell.id]).generation == 2
    claims.close()
