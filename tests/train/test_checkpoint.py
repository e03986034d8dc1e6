import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jaxlm.errors import UserError
from jaxlm.sharding import use
from jaxlm.train.checkpoint import MANIFEST, Checkpointer, CheckpointError, nested, step_dirs, verify
from jaxlm.train.loop import Every, train_loop
from jaxlm.train.state import TrainState, abstract_state, create_state
from jaxlm.train.step import make_step
from jaxlm.train.warmstart import load_params
from jaxlm.tree import combine, map_named, named_leaves


def host(tree):
    return {name: np.array(leaf) for name, leaf in named_leaves(tree)}


def assert_bits(a, b):
    a, b = host(a), host(b)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


def assert_same_layout(a, b):
    for (name, x), (_, y) in zip(named_leaves(a), named_leaves(b), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim), name


@pytest.fixture(scope="module")
def small(toy):
    """An optimizer with every kind of state, its abstract state, and a fresh one."""
    optimizer = toy.optimizer(ema=0.9)
    target, _ = abstract_state(toy.init, optimizer)
    return optimizer, target, lambda: create_state(toy.init, optimizer, 0)[0]


def save_steps(directory, state, steps, **fields):
    with Checkpointer(directory, **fields) as checkpoints:
        for step in steps:
            marked = dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))
            checkpoints.save(step, marked, data={"step": step}, config={"a": [1, 2]})


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    """Checkpoints of steps 10, 20 and 30, to be copied."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_steps(directory, small[2](), [10, 20, 30], keep_last=3)
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run" / "checkpoints"))


def one_leaf(size):
    """An abstract state with one large parameter."""

    def leaf(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(jax.devices()[0]))

    params, opt_state = {"w": leaf((size,), jnp.float32)}, {"count": leaf((), jnp.int32)}
    return TrainState(leaf((), jnp.int32), params, opt_state, leaf((2,), jnp.uint32))


# ------------------------------------------------------------------------------------------- save and restore


def test_everything_comes_back_to_the_bit(toy, small, tmp_path):
    optimizer, target, fresh = small
    state = fresh()
    step = make_step(toy.objective, optimizer)
    for n in range(3):
        state, _ = step(state, None, toy.batch(n))
    data = {"step": 3, "fingerprint": "abc", "positions": [1, 2**40]}
    with Checkpointer(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(target) is None
        checkpoints.save(3, state, data=data, config={"model": {"dim": 4, "x": None}})
        checkpoints.wait()
        got = checkpoints.restore(target)
    assert_bits(state, got.state)
    assert jax.tree.structure(state) == jax.tree.structure(got.state)
    assert_same_layout(state, got.state)
    assert (got.step, got.data, got.config, got.skipped) == (3, data, {"model": {"dim": 4, "x": None}}, ())
    assert got.path == tmp_path / "c" / "00000003"


def test_a_save_does_not_see_later_updates(tmp_path):
    """The state is donated, and its memory written over, while the files are written behind."""
    size = 4_000_000
    overwrite = jax.jit(
        lambda s: dataclasses.replace(s, step=s.step + 1, params={"w": s.params["w"] + 1}), donate_argnums=0
    )
    target = one_leaf(size)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), target)
    with Checkpointer(tmp_path / "c", keep_last=9) as checkpoints:
        for n in (0, 3):
            checkpoints.save(n, state)
            for _ in range(3):
                state = overwrite(state)
            jax.block_until_ready(state)
        checkpoints.wait()
        for n in (0, 3):
            got = checkpoints.restore(target, step=n).state
            assert int(got.step) == n
            np.testing.assert_array_equal(got.params["w"], float(n))


def test_bf16_and_frozen_holes_survive(toy, tmp_path):
    optimizer = toy.optimizer()
    init = lambda key: jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy.init(key))  # noqa: E731
    chosen = {"trainable": lambda name, _: "mlp" in name}
    state, _ = create_state(init, optimizer, 0, **chosen)
    target, _ = abstract_state(init, optimizer, **chosen)
    with Checkpointer(tmp_path / "c") as checkpoints:
        checkpoints.save(0, state)
        checkpoints.wait()
        got = checkpoints.restore(target)
    assert got.state.params["head"]["w"] is None
    assert_bits(state, got.state)


@pytest.mark.parametrize(
    ("here", "there"), [({"fsdp": 8}, {"data": 2, "tensor": 4}), ({"tensor": 4}, {"fsdp": 2})], ids=str
)
def test_saved_on_one_mesh_resumed_on_another(toy, tmp_path, here, there):
    optimizer = toy.optimizer(name="sgd", lr=0.1, num_steps=10)

    def go(state, layout, first, last):
        with use(layout):
            step = make_step(toy.objective, optimizer, shardings=jax.tree.map(lambda x: x.sharding, state))
            for n in range(first, last):
                state, _ = step(state, None, jax.device_put(toy.batch(n), layout.sharding(("batch",))))
        return state

    first, second = toy.layout(**here), toy.layout(**there)
    state, _ = create_state(toy.init, optimizer, 0, layout=first, table=toy.AXES)
    state = go(state, first, 0, 2)
    with Checkpointer(tmp_path / "c") as checkpoints:
        checkpoints.save(2, state)
        checkpoints.wait()
        target, _ = abstract_state(toy.init, optimizer, layout=second, table=toy.AXES)
        got = checkpoints.restore(target).state
    assert_bits(state, got)
    assert_same_layout(got, target)
    assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(got.params))
    straight, moved = go(state, first, 2, 4), go(got, second, 2, 4)
    for name, leaf in host(straight.params).items():
        np.testing.assert_allclose(leaf, host(moved.params)[name], rtol=2e-5, atol=1e-6, err_msg=name)


def test_resume_at_any_step_is_the_uninterrupted_run_to_the_bit(toy, small, tmp_path):
    optimizer, target, fresh = small
    step = make_step(toy.objective, optimizer, microbatches=2)
    total = 4

    def train(directory, state, start, num_steps):
        with Checkpointer(directory, keep_last=1) as checkpoints:
            losses = {}
            save = Every(1, lambda n, s: checkpoints.save(n, s, data={"next": n}), after_report=True)

            def report(row):
                losses[row.step] = tuple(map(float, row.metrics["nll"]))

            def source(n, state):
                return toy.batch(n, dropout=True)

            steps = {"num_steps": num_steps, "start": start, "log_every": 1}
            result = train_loop(state, None, step, source, [save], report=report, **steps)
        return result.state, losses

    straight, wanted = train(tmp_path / "straight", fresh(), 0, total)
    for cut in range(1, total):
        directory = tmp_path / f"cut{cut}"
        _, before = train(directory, fresh(), 0, cut)
        got = Checkpointer(directory).restore(target)
        assert got.step == got.data["next"] == cut
        resumed, after = train(directory, got.state, got.data["next"], total)
        assert_bits(straight, resumed)
        assert before | after == wanted
    # Dropout is on and differs by step, so the key is part of what came back.
    assert len(set(wanted.values())) == total


def test_another_models_state_is_refused_with_the_leaves(toy, small, copy):
    _, target, _ = small
    plain, _ = abstract_state(toy.init, toy.optimizer(name="sgd"))
    with pytest.raises(
        CheckpointError, match=r"optimizer is another model's.*\n.*(.*\n)*.*mu/.*: only in the checkpoint"
    ):
        Checkpointer(copy).restore(plain)
    wide = jax.tree.map(lambda x: x, target)
    wide.params["head"]["w"] = jax.ShapeDtypeStruct((16, 9), jnp.float32)
    with pytest.raises(
        CheckpointError, match=r"head/w: float32\[16, 8\] in the checkpoint, float32\[16, 9\] in this run"
    ):
        Checkpointer(copy).restore(wide)


# ------------------------------------------------------------------------------------------------- corruption


def every_file(directory):
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def damage(path, how):
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def why_not(directory):
    try:
        verify(directory)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("how", ["delete", "truncate", "flip"])
def test_damage_to_any_file_is_found_and_the_previous_one_is_used(saved, small, tmp_path, how):
    _, target, _ = small
    newest = saved / "00000030"
    files = every_file(newest)
    assert len(files) > 8
    warnings, harmless = [], set()
    for number, name in enumerate(files):
        run = tmp_path / str(number)
        shutil.copytree(saved / "00000020", run / "00000020")
        shutil.copytree(newest, run / "00000030")
        damage(run / "00000030" / name, how)
        reason = why_not(run / "00000030")
        if reason:
            assert name == MANIFEST or Path(name).name in reason
            if number % 5 == 0 or name == MANIFEST:
                got = Checkpointer(run, warn=warnings.append).restore(target)
                assert got.step == 20
                assert [path.name for path, _ in got.skipped] == ["00000030"]
                assert "00000030 is damaged" in warnings[-2]
                assert warnings[-1] == "WARNING: going back to checkpoint 00000020"
        else:
            # Orbax rewrites these when it renames the directory; a restore reads neither.
            harmless.add(name)
            got = Checkpointer(run, warn=warnings.append).restore(target)
            assert got.step == 30
    assert harmless <= {"_CHECKPOINT_METADATA", "commit_success.txt"}


def test_the_warning_is_loud(copy, small, capfd):
    damage(next((copy / "00000030" / "params" / "d").iterdir()), "flip")
    assert Checkpointer(copy).restore(small[1]).step == 20
    assert "WARNING: checkpoint 00000030 is damaged and is not used" in capfd.readouterr().err


def test_two_damaged_ones_are_passed_over_and_all_damaged_is_an_error(copy, small):
    quiet = Checkpointer(copy, warn=lambda text: None)
    (copy / "00000030" / MANIFEST).unlink()
    damage(copy / "00000020" / "data" / "metadata", "flip")
    got = quiet.restore(small[1])
    assert (got.step, len(got.skipped)) == (10, 2)
    damage(copy / "00000010" / MANIFEST, "truncate")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint can be used:\n.*00000030.*\n.*00000020.*\n.*00000010"
    ):
        quiet.restore(small[1])


def test_an_edited_manifest_does_not_hide_damage(copy):
    manifest = copy / "00000030" / MANIFEST
    tree = json.loads(manifest.read_text())
    for broken in ([], {"files": {}}, {"files": {"x": 3}}, {}):
        manifest.write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match="damaged"):
            verify(copy / "00000030")
    manifest.write_text(json.dumps(tree))
    verify(copy / "00000030")


def test_a_damaged_step_can_be_saved_again_after_quarantine(copy, small):
    _, target, fresh = small
    damage(copy / "00000030" / "config" / "metadata", "delete")
    checkpoints = Checkpointer(copy, keep_last=3, warn=lambda text: None)
    got = checkpoints.restore(target, quarantine=True)
    assert checkpoints.steps() == [10, 20]
    assert len(list(copy.glob("damaged-00000030-*"))) == 1
    checkpoints.save(30, dataclasses.replace(fresh(), step=jnp.asarray(30, jnp.int32)), data={"step": 30})
    checkpoints.close()
    assert checkpoints.steps() == [10, 20, 30]
    again = Checkpointer(copy).restore(target)
    assert (got.step, again.step, again.skipped) == (20, 30, ())


def test_one_step_by_name(copy, small):
    checkpoints = Checkpointer(copy)
    assert checkpoints.restore(small[1], step=10).step == 10
    with pytest.raises(CheckpointError, match="no checkpoint of step 15; there are: 10, 20, 30"):
        checkpoints.restore(small[1], step=15)


def test_without_checksums_sizes_are_checked(small, tmp_path):
    save_steps(tmp_path / "c", small[2](), [1], checksums=False)
    directory = tmp_path / "c" / "00000001"
    verify(directory)
    damage(next((directory / "params" / "d").iterdir()), "truncate")
    with pytest.raises(CheckpointError, match="bytes"):
        verify(directory)


# ------------------------------------------------------------------------------------------- keeping, failing


def test_keep_policy(small, tmp_path):
    state, scores = small[2](), {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: 6.0, 6: 7.0, 7: None}

    def save(directory, **keep):
        with Checkpointer(directory, **keep) as checkpoints:
            for step, nll in scores.items():
                checkpoints.save(
                    step, state, metrics=None if nll is None else {"eval/nll": nll, "eval/bpb": 9.0}
                )
        return checkpoints.steps()

    assert save(tmp_path / "last", keep_last=2, keep_best=0) == [6, 7]
    assert save(tmp_path / "best", keep_last=1, keep_best=2) == [2, 4, 7]
    assert save(tmp_path / "period", keep_last=1, keep_best=0, keep_period=3) == [3, 6, 7]
    # The scores are on disk: another process goes on keeping the best.
    with Checkpointer(tmp_path / "best", keep_last=1, keep_best=2) as checkpoints:
        checkpoints.save(8, state, metrics={"eval/nll": 2.0})
    assert checkpoints.steps() == [2, 8]
    with pytest.raises(UserError, match="keep_last=0"):
        Checkpointer(tmp_path, keep_last=0)


def test_the_same_step_twice_is_saved_once(small, tmp_path):
    state = small[2]()
    with Checkpointer(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state, data="first")
        checkpoints.save(1, state, data="second")
        assert checkpoints.restore(small[1]).data == "first"


def test_what_a_crash_left_half_written_is_ignored_and_swept(copy, small):
    _, target, fresh = small
    half = copy / "00000035.orbax-checkpoint-tmp"
    shutil.copytree(copy / "00000030", half)
    assert list(step_dirs(copy)) == [10, 20, 30]
    assert Checkpointer(copy).restore(target).step == 30
    with Checkpointer(copy, keep_last=4) as checkpoints:
        checkpoints.save(40, fresh())
    assert not half.exists()
    assert checkpoints.steps() == [10, 20, 30, 40]


def test_a_file_in_the_way_is_a_clear_error(small, tmp_path):
    (tmp_path / "c").write_text("")
    with (
        pytest.raises(CheckpointError, match="checkpoint of step 1 could not be written to"),
        Checkpointer(tmp_path / "c") as checkpoints,
    ):
        checkpoints.save(1, small[2]())


SAVER = """
import resource, signal, sys
import jax
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp
from jaxlm.train.checkpoint import Checkpointer, CheckpointError
from jaxlm.train.state import TrainState

def state(n):
    key = jax.random.key(n)
    params = {"w": jax.random.normal(key, (int(sys.argv[2]),))}
    return TrainState(jnp.asarray(n, jnp.int32), params, {"count": jnp.asarray(n)}, jax.random.key_data(key))

checkpoints = Checkpointer(sys.argv[1], keep_last=2)
checkpoints.save(1, state(1), data={"n": 1})
checkpoints.wait()
print("one", flush=True)
if sys.argv[3] == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        checkpoints.save(2, state(2))
        checkpoints.close()
    except CheckpointError as error:
        print("error:", error, flush=True)
    checkpoints.close()
for n in range(2, 10_000):
    checkpoints.save(n, state(n), data={"n": n})
    print(n, flush=True)
"""


def saver(directory, size, mode):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SAVER, str(directory), str(size), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)


@pytest.mark.slow
def test_kill_9_during_a_save_leaves_a_whole_checkpoint(tmp_path):
    size, killed_half_way = 3_000_000, 0
    for attempt in range(3):
        directory = tmp_path / str(attempt)
        process = saver(directory, size, "go")
        try:
            for _ in range(2 + attempt):
                assert process.stdout.readline()
            time.sleep(0.03 * attempt)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        killed_half_way += any(directory.glob("*tmp*"))
        warnings = []
        got = Checkpointer(directory, warn=warnings.append).restore(one_leaf(size))
        assert got.step == got.data["n"] >= 1
        assert warnings == []
        wanted = jax.random.normal(jax.random.key(got.step), (size,))
        assert np.array(got.state.params["w"]).tobytes() == np.array(wanted).tobytes()
    assert killed_half_way > 0


@pytest.mark.slow
def test_a_full_disk_is_a_clear_error_and_the_previous_checkpoint_stays(tmp_path):
    process = saver(tmp_path / "c", 500_000, "limit")
    assert process.stdout.readline() == "one\n"
    told = process.stdout.readline()
    process.kill()
    process.wait()
    assert told.startswith("error: the checkpoint of step 2 could not be written to")
    assert Checkpointer(tmp_path / "c").restore(one_leaf(500_000)).step == 1


# ------------------------------------------------------------------------------------------------- warm start


@pytest.fixture(scope="module")
def model(toy):
    params = jax.eval_shape(toy.init, jax.random.key(0))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), params)


def test_params_alone_from_a_run_its_checkpoints_or_one_of_them(toy, saved, small, model, copy):
    wanted = small[2]().params
    for path in (copy.parent, copy, copy / "00000010"):
        params, report = load_params(path, model)
        assert_bits(params, wanted)
        assert (report.renamed, report.missing, report.surplus) == ((), (), ())
        assert len(report.loaded) == 4
    assert report.path.name == "00000010"
    assert load_params(copy, model, step=20)[1].path.name == "00000020"


def test_params_are_cast_and_laid_out_as_asked(toy, copy, small):
    layout = toy.layout(fsdp=4, tensor=2)
    init = lambda key: jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy.init(key))  # noqa: E731
    target, _ = abstract_state(init, toy.optimizer(), layout=layout, table=toy.AXES)
    params, _ = load_params(copy, target.params)
    assert_same_layout(params, target.params)
    assert_bits(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), small[2]().params))


def test_renamed_missing_and_surplus_leaves_are_reported(toy, copy, model, small):
    block = model["blocks"]["0"]
    other = {
        "layers": {"ffn": {"up": block["mlp"]["w_up"], "down": block["mlp"]["w_down"]}},
        "value_head": {"w": jax.ShapeDtypeStruct((16, 1), jnp.float32)},
    }
    rename = ((r"^blocks/0/mlp/w_", "layers/ffn/"),)
    params, report = load_params(copy, other, rename=rename, allow_missing=("value_head",))
    assert report.renamed == (
        ("blocks/0/mlp/w_down", "layers/ffn/down"),
        ("blocks/0/mlp/w_up", "layers/ffn/up"),
    )
    assert report.missing == ("value_head/w",)
    assert set(report.surplus) == {"blocks/0/norm/scale", "head/w"}
    fresh = map_named(lambda name, leaf: jnp.full(leaf.shape, 7.0), other)
    whole = combine(params, fresh)
    np.testing.assert_array_equal(whole["value_head"]["w"], 7.0)
    np.testing.assert_array_equal(
        whole["layers"]["ffn"]["up"], small[2]().params["blocks"]["0"]["mlp"]["w_up"]
    )
    text = report.text()
    for line in ("renamed  blocks/0/mlp/w_up -> layers/ffn/up", "missing  value_head/w", "surplus  head/w"):
        assert line in text


def test_what_does_not_fit_is_refused_by_name(copy, model, tmp_path):
    wide = map_named(lambda name, x: jax.ShapeDtypeStruct((16, 9), x.dtype) if name == "head/w" else x, model)
    with pytest.raises(
        UserError, match=r"head/w has shape \[16, 8\] in the checkpoint, \[16, 9\] in the model"
    ):
        load_params(copy, wide)
    extra = {**model, "haed": {"w": model["head"]["w"]}}
    with pytest.raises(UserError, match="haed/w is not in the checkpoint; did you mean 'head/w'"):
        load_params(copy, extra)
    with pytest.raises(UserError, match="rename: 'wq' is found in no leaf"):
        load_params(copy, model, rename=(("wq", "wk"),))
    with pytest.raises(UserError, match="would both become"):
        load_params(copy, model, rename=(("w_up", "w_down"),))
    with pytest.raises(UserError, match="is not a regular expression"):
        load_params(copy, model, rename=(("(", ""),))
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_params(tmp_path / "nowhere", model)


def test_warm_start_reads_past_a_damaged_checkpoint(copy, model):
    damage(copy / "00000030" / "params" / "_METADATA", "truncate")
    warnings = []
    _, report = load_params(copy, model, warn=warnings.append)
    assert report.path.name == "00000020"
    assert len(warnings) == 2


def test_names_make_nested_dicts(small):
    leaves = dict(named_leaves(small[1].opt_state))
    assert dict(named_leaves(nested(leaves))) == leaves
