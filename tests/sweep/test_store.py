"""Stores and claims: one maker of a file, whole files only, and claims that no clock can spoil."""

import dataclasses
import json
import subprocess
import sys
import threading

import pytest

from jaxlm.errors import UserError
from jaxlm.sweep import claims as claiming
from jaxlm.sweep.claims import ClaimLost, Claims, Owner, is_gone, this_process
from jaxlm.sweep.store import LocalStore, open_store
from jaxlm.train.checkpoint import write_manifest


@pytest.fixture(params=["local", "file", "memory"])
def store(request, tmp_path):
    url = {
        "local": str(tmp_path / "S"),
        "file": f"file://{tmp_path}/S",
        "memory": f"memory://sweeps{tmp_path}/S",
    }[request.param]
    if request.param == "memory":
        pytest.importorskip("fsspec")
    return open_store(url, scratch=tmp_path / "scratch")


# -------------------------------------------------------------------------------------------------- the store


def test_files_come_and_go_whole(store):
    assert store.read("a/b") is None
    assert store.names("a") == []
    store.write("a/b", b"one")
    store.write("a/b", b"two")
    store.append("a/log", b"1\n")
    store.append("a/log", b"2\n")
    assert store.read("a/b") == b"two"
    assert store.read("a/log") == b"1\n2\n"
    assert store.names("a") == ["b", "log"]
    assert store.tail("a/log", 3) == b"\n2\n"
    assert store.tail("a/log", 99) == b"1\n2\n"
    assert store.tail("a/none", 9) == b""
    store.remove("a/b")
    store.remove("a/b")
    assert store.names("a") == ["log"]


def test_a_file_has_one_maker(store):
    """Many threads at once, each with its own content."""
    made = []
    barrier = threading.Barrier(8)

    def make(i):
        barrier.wait()
        if store.create("claims/x", b"%d" % i):
            made.append(i)

    threads = [threading.Thread(target=make, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if isinstance(store, LocalStore):
        assert len(made) == 1
    # Where the file system does not promise one maker, one finds its own content there.
    assert sum(store.read("claims/x") == b"%d" % i for i in range(8)) == 1
    assert made
    assert not store.create("claims/x", b"late")


def test_a_full_disk_leaves_no_empty_claim(tmp_path, monkeypatch):
    store = open_store(str(tmp_path / "S"), scratch=tmp_path / "scratch")

    def full(file, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxlm.sweep.store._put", full)
    with pytest.raises(OSError, match="No space left"):
        store.create("claims/x", b"mine")
    with pytest.raises(OSError, match="No space left"):
        store.write("claims/y", b"mine")
    monkeypatch.undo()
    assert store.names("claims") == []
    assert not list((store.folder / "claims").iterdir())


def test_an_unknown_scheme_is_refused():
    pytest.importorskip("fsspec")
    with pytest.raises(UserError, match="--workdir=nowhere://x"):
        open_store("nowhere://x")


def run_dir(folder, steps, rows=1):
    """A run directory with checkpoints of a few bytes."""
    for step in steps:
        path = folder / "checkpoints" / f"{step:08d}"
        (path / "params").mkdir(parents=True, exist_ok=True)
        (path / "params" / "w").write_text(f"weights of {step}")
        write_manifest(path)
    (folder / "config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("row\n" * rows)
    (folder / "run.lock").write_text("here")


@pytest.fixture
def two(tmp_path):
    """Two machines that share a URL."""
    pytest.importorskip("fsspec")
    url = f"memory://mirror{tmp_path}/S"
    return [open_store(url, scratch=tmp_path / name) for name in ("one", "other")]


def test_a_run_goes_on_on_another_machine(two):
    one, other = two
    run_dir(one.folder / "runs" / "a", [5, 10])
    one.push_run("runs/a")
    path = other.pull_run("runs/a")
    assert (path / "checkpoints" / "00000010" / "params" / "w").read_text() == "weights of 10"
    assert not (path / "run.lock").exists()
    # It gets further there, drops an old checkpoint, and comes back.
    run_dir(path, [15], rows=3)
    for file in sorted((path / "checkpoints" / "00000005").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    (path / "checkpoints" / "00000005").rmdir()
    other.push_run("runs/a")
    assert other.names("runs/a/checkpoints") == ["00000010", "00000015"]
    back = one.pull_run("runs/a")
    assert sorted(p.name for p in (back / "checkpoints").iterdir()) == ["00000010", "00000015"]
    assert (back / "metrics.jsonl").read_text() == "row\n" * 3


def test_a_checkpoint_whose_upload_was_cut_off_is_none(two):
    one, other = two
    run_dir(one.folder / "runs" / "a", [5, 10])
    one.push_run("runs/a")
    one.remove("runs/a/checkpoints/00000010/manifest.json")
    path = other.pull_run("runs/a")
    assert [p.name for p in (path / "checkpoints").iterdir()] == ["00000005"]


def test_the_manifest_and_the_result_go_last(two, monkeypatch):
    one, _ = two
    folder = one.folder / "runs" / "a"
    run_dir(folder, [5])
    (folder / "result.json").write_text("{}")
    order = []
    write = type(one).write
    monkeypatch.setattr(
        type(one), "write", lambda self, name, data: (order.append(name), write(self, name, data))
    )
    one.push_run("runs/a")
    checkpoint = [name for name in order if "checkpoints" in name]
    assert checkpoint[-1].endswith("manifest.json")
    assert order[-1] == "runs/a/result.json"
    order.clear()
    one.push_run("runs/a")
    assert order == []  # nothing is new


def test_what_a_branch_fetched_of_its_trunk_is_not_taken_for_the_trunk(two):
    """Else the machine would upload a trunk without its other checkpoints and rows."""
    one, other = two
    run_dir(one.folder / "runs" / "trunk", [5, 10])
    one.push_run("runs/trunk")
    other.pull("runs/trunk/config.json")
    other.pull("runs/trunk/checkpoints/00000010")
    assert sorted(p.name for p in (other.folder / "runs" / "trunk").iterdir()) == [
        "checkpoints",
        "config.json",
    ]
    path = other.pull_run("runs/trunk")
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["00000005", "00000010"]
    assert (path / "metrics.jsonl").exists()


# ------------------------------------------------------------------------------------------------- the claims


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def worker(store, name, **fields):
    """Claims of a worker on a machine of its own, with a clock of its own, that beats when it is told to."""
    owner = Owner(name, f"host-{name}", f"boot-{name}", 7, "1", **fields)
    return Claims(store, owner, heartbeat=1e9, stale_after=60.0, clock=Clock())


def test_a_claim_is_held_renewed_and_given_back(store):
    a, b = worker(store, "a"), worker(store, "b")
    claim = a.take("run", a.look(["run"])["run"])
    assert b.look(["run"])["run"].state == "held"
    assert b.take("run", dataclasses.replace(b.look(["run"])["run"], generation=0)) is None
    claim.release()
    seen = b.look(["run"])["run"]
    assert (seen.state, seen.generation) == ("free", 1)
    assert b.take("run", seen).generation == 2
    with pytest.raises(ClaimLost):
        claim.check(sure=True)


def test_a_silent_claim_goes_stale_by_the_observers_clock(store):
    a, b = worker(store, "a"), worker(store, "b")
    claim = a.take("run", a.look(["run"])["run"])
    for _ in range(10):
        assert b.look(["run"])["run"].state == "held"
        b.clock.now += 50.0
        claim.renew()  # in time, each time
    assert b.look(["run"])["run"].state == "held"
    b.clock.now += 61.0
    seen = b.look(["run"])["run"]
    assert (seen.state, seen.silent) == ("stale", 61.0)


@pytest.mark.parametrize("written", ["1970-01-01T00:00:00", "2999-01-01T00:00:00"])
def test_times_of_another_machine_mean_nothing(store, monkeypatch, written):
    """A worker whose clock is wrong by decades keeps its claim while it beats, and no longer."""
    monkeypatch.setattr(claiming.time, "strftime", lambda form: written)
    a, b = worker(store, "a"), worker(store, "b")
    a.clock.now = -1e12 if written < "2000" else 1e12
    claim = a.take("run", a.look(["run"])["run"])
    assert json.loads(store.read("claims/run.1.json"))["time"] == written
    b.look(["run"])
    b.clock.now += 59.0
    assert b.look(["run"])["run"].state == "held"
    assert claim.renew()
    b.clock.now += 59.0
    assert b.look(["run"])["run"].state == "held"
    b.clock.now += 61.0
    assert b.look(["run"])["run"].state == "stale"


def test_one_of_many_takes_a_stale_claim_over(store):
    a = worker(store, "a")
    claim = a.take("run", a.look(["run"])["run"])
    others = [worker(store, str(i)) for i in range(6)]
    for other in others:
        other.look(["run"])
        other.clock.now += 100.0
    taken, barrier = [], threading.Barrier(len(others))

    def take(other):
        seen = other.look(["run"])["run"]
        assert seen.state == "stale"
        barrier.wait()
        taken.append((other, other.take("run", seen)))

    threads = [threading.Thread(target=take, args=(other,)) for other in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = []
    for _, new in taken:
        if new is not None and new.renew():
            kept.append(new)
    assert len(kept) == 1
    if isinstance(store, LocalStore):
        assert sum(new is not None for _, new in taken) == 1
    # The first owner wakes up, and finds out before it writes anything.
    with pytest.raises(ClaimLost, match="another worker has taken it over"):
        claim.check(sure=True)
    before = store.read("claims/run.2.json")
    claim.release()
    assert not claim.renew()
    assert store.read("claims/run.2.json") == before


def test_a_claim_that_another_maker_overwrote_is_lost(store):
    """Where exclusive creation is no promise, two may believe that they made the file: one finds out."""
    a, b = worker(store, "a"), worker(store, "b")
    claim = a.take("run", a.look(["run"])["run"])
    store.remove("claims/run.1.json")
    other = b.take("run", b.look(["run"])["run"])
    with pytest.raises(ClaimLost, match="now belongs to host-b"):
        claim.check(sure=True)
    other.check(sure=True)


def test_an_old_sleeper_cannot_come_back(store):
    """Its claim was taken over, the taker finished and let go, and somebody else claimed again."""
    a, b, c = (worker(store, name) for name in "abc")
    claim = a.take("run", a.look(["run"])["run"])
    b.look(["run"])
    b.clock.now += 100.0
    b.take("run", b.look(["run"])["run"]).release()
    last = c.take("run", c.look(["run"])["run"])
    with pytest.raises(ClaimLost):
        claim.check(sure=True)
    assert last.renew()
    last.check(sure=True)


def test_a_claim_that_cannot_be_renewed_is_given_up_before_others_take_it(store, monkeypatch, capsys):
    a = worker(store, "a")
    claim = a.take("run", a.look(["run"])["run"])

    def unreachable(self, name, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(store), "write", unreachable)
    a.clock.now += 29.0
    claim.check()  # a hiccup
    a.clock.now += 2.0
    with pytest.raises(ClaimLost, match="could not be renewed for 30 seconds"):
        claim.check()
    assert "No space left" in capsys.readouterr().err
    monkeypatch.undo()
    with pytest.raises(ClaimLost):
        claim.check(sure=True)  # given up is given up


def test_torn_content_counts_as_held_until_it_is_old(store):
    store.write("claims/run.3.json", b'{"uuid": "a", ')
    b = worker(store, "b")
    assert b.look(["run"])["run"].state == "held"
    b.clock.now += 61.0
    seen = b.look(["run"])["run"]
    assert (seen.state, seen.generation) == ("stale", 3)
    assert b.take("run", seen).generation == 4


def test_heartbeats_renew_by_themselves(store):
    owner = this_process()
    a = Claims(store, owner, heartbeat=0.02, stale_after=60.0)
    claim = a.take("run", a.look(["run"])["run"])
    for _ in range(200):
        if json.loads(store.read("claims/run.1.json"))["beat"] >= 3:
            break
        threading.Event().wait(0.02)
    assert json.loads(store.read("claims/run.1.json"))["beat"] >= 3
    claim.release()
    a.close()
    assert json.loads(store.read("claims/run.1.json"))["state"] == "released"


def test_a_process_of_this_machine_that_is_gone_is_known_at_once():
    here = this_process()
    if not here.machine:
        pytest.skip("this system tells no boot id")
    assert not is_gone(dataclasses.asdict(here), here)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = claiming._started(process.pid)
    other = dataclasses.asdict(dataclasses.replace(here, pid=process.pid, started=started))
    assert not is_gone(other, here)
    process.kill()
    for _ in range(500):
        if is_gone(other, here):
            break
        threading.Event().wait(0.01)
    assert is_gone(other, here)  # a zombie as yet
    process.wait()
    assert is_gone(other, here)
    # Of another machine, or with a number that is used again, nothing is concluded.
    assert not is_gone({**other, "machine": "elsewhere"}, here)
    assert is_gone({**dataclasses.asdict(here), "started": "1"}, here)
