import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.errors import UserError
from jaxlm.train.rundir import RunLock, environment, open_run_dir, probe_writable, write_json, write_text

HOLD = """
import sys, time
from jaxlm.train.rundir import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def diff(old, new):
    return [
        f"{name}: {old.get(name)} -> {new.get(name)}"
        for name in sorted(old | new)
        if old.get(name) != new.get(name)
    ]


def test_another_process_is_kept_out_until_it_dies(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"is in use by process {other.pid} on host .+ since"):
            RunLock(tmp_path).__enter__()
    finally:
        other.kill()
        other.wait()
    with RunLock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} "):
        RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        pass


def test_the_same_config_reopens_and_every_start_is_recorded(tmp_path):
    run = tmp_path / "deep" / "run"
    for _ in range(2):
        assert open_run_dir(run, {"a": 1, "b": [1, 2]}, sha256="x", diff=diff) == run
    record = json.loads((run / "config.json").read_text())
    assert (record["config"], record["hash"]) == ({"a": 1, "b": [1, 2]}, "x")
    assert len(record["starts"]) == 2
    start = record["starts"][0]
    assert start["packages"]["jax"]
    assert start["pid"] == os.getpid()
    assert sorted(p.name for p in run.iterdir()) == ["config.json"]


def test_another_config_is_refused_with_the_diff_and_changes_nothing(tmp_path):
    open_run_dir(tmp_path, {"layers": 2, "dim": 8}, sha256="x", diff=diff)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError, match=r"another config.*\n  layers: 2 -> 3$"):
        open_run_dir(tmp_path, {"layers": 3, "dim": 8}, sha256="y", diff=diff)
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize("text", ["", "{}", '{"config": 1', "[]", '{"hash": "x"}'])
def test_a_config_json_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="not the config of a run"):
        open_run_dir(tmp_path, {}, sha256="x", diff=diff)
    assert (tmp_path / "config.json").read_text() == text


def test_unwritable_places_are_found_before_work_is_spent(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/run"):
        probe_writable(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="cannot write to /proc/run"):
        open_run_dir("/proc/run", {}, sha256="x", diff=diff)
    with pytest.raises(UserError, match=r"GB free, one checkpoint needs 1000000000\.00 GB"):
        probe_writable(tmp_path, need_bytes=10**18)
    assert probe_writable(tmp_path / "new") == tmp_path / "new"
    assert list((tmp_path / "new").iterdir()) == []


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"x": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert json.loads(path.read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_environment_names_what_numbers_depend_on():
    found = environment()
    assert {"time", "command", "git", "packages", "python", "host", "pid"} == found.keys()
    json.dumps(found)
    assert found["git"] is None or len(found["git"]["commit"]) == 40
