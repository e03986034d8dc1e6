"""What `jaxlm preflight` says of wrong flags, odd hardware and an unusable cache: one line, code 2."""

import dataclasses
import json

import pytest

from jaxlm.cli import main
from jaxlm.config import build
from jaxlm.errors import UserError
from jaxlm.preflight import command, compiled, topology
from jaxlm.preflight.compiled import Facts, cache_key, facts_of
from jaxlm.preflight.planner import choose_mesh
from jaxlm.preflight.report import lines, make_report
from jaxlm.preflight.search import search
from jaxlm.preflight.topology import has_compiler, likely_topology, parse_topology

SMOKE = "--config=experiments/quickstart.py:smoke"
CFG = build(dict(mesh=dict(data=1, fsdp=8), data=dict(seq_len=16, batch_size=8)))


def made_up(cfg, hardware, announce=lambda: None):
    """Facts without a compiler."""
    announce()
    return Facts(
        topology=str(hardware),
        mesh=dict(fsdp=8),
        state=dict(params=1, gradients=1, opt_state=1, batch=1),
        host=0,
        largest_replicated=("", 0),
        memory=compiled.DeviceMemory(1, 1, 1, 1, 1, 1),
        shortage=None,
        collectives=(),
        unreadable="",
        kernels={},
        cycles=0.0,
        unknown_loops=0,
        replicated=(),
        seconds={"compile": 81.0},
        versions={},
    )


def refusal(capsys, *flags):
    """What the command says on stderr, in one line."""
    assert main(["preflight", SMOKE, "--cache=", *flags]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("jaxlm: ")
    assert not any("Traceback" in line for line in said)
    return said[-1]


def test_odd_hardware_names_the_nearest():
    for text, message in [
        ("v5p:3x5x7", "first two dimensions are 1 or even; the nearest: v5p:4x6x7"),
        ("v6e:2x3", "the nearest: v6e:2x4"),
        ("v5e:32x16", "has 512 chips, a slice of v5e 256 at most; join several by --slices"),
        ("v5p:99999x99999x99999", "a slice of v5p 8,960 at most"),
        ("h100:16", "a host has 8 GPUs at most, write h100:8"),
        ("cpu:1000000000", "at most 4096 devices are emulated"),
        ("v5p-128", "'v5p-128' is not one of .*; did you mean 'v5p'"),
    ]:
        with pytest.raises(UserError, match=message):
            parse_topology(text)
    with pytest.raises(UserError, match="--slices=6 does not divide --topology=cpu:8; --slices=4 does"):
        parse_topology("cpu:8", 6)
    assert parse_topology("V5P:4X4X4") == parse_topology("v5p:4x4x4")
    for text in ("v5e:1x1", "v5p:2x1x1", "tpu7x:1x1x3", "v6e:1x4", "h200:7"):
        assert parse_topology(text).name == text
    assert likely_topology("v5p", 1).name == "v5p:1x1x1"
    assert likely_topology("v5p", 6).name == "v5p:6x1x1"
    assert likely_topology("v5p", 3) is None
    assert likely_topology("v5p", 10**12) is None  # at once


@pytest.mark.skipif(not has_compiler(parse_topology("v5e:1x1")), reason="libtpu is not installed")
def test_slices_smaller_than_a_host_have_devices():
    for text in ("v5e:1x1", "v5p:2x1x1", "v6e:1x4"):
        hardware = parse_topology(text)
        assert len(topology.devices(hardware)) == hardware.num_devices


def test_flags_that_do_nothing_or_make_no_sense(capsys, tmp_path, monkeypatch):
    eight = "--topology=cpu:8"
    assert "--out=x.json is what a search writes: add --search" in refusal(capsys, eight, "--out=x.json")
    assert "--max_compiles=2 is how many" in refusal(capsys, eight, "--max_compiles=2")
    for price in ("nan", "inf", "-3"):
        assert f"--price={price} must be a number" in refusal(capsys, eight, f"--price={price}")
    said = refusal(capsys, eight, "--config.mesh.slices=2")
    assert "mesh.slices=2, but --slices=1: make them equal" in said
    flags = ["--topology=v5e:2x2", "--search"]
    monkeypatch.setattr(command, "versions", lambda hardware: {})
    assert "is a folder; name a file in it" in refusal(capsys, *flags, f"--out={tmp_path}")
    (tmp_path / "file").write_text("")
    # Before anything is compiled.
    assert "cannot write to" in refusal(capsys, *flags, f"--out={tmp_path}/file/x.json")


def test_what_does_not_divide_or_is_absurd_is_refused_before_it_is_compiled(capsys):
    for flag, message in [
        ("--config.mesh.tensor=8", "kv_heads has size 4, which the mesh (tensor=8) does not divide"),
        ("--config.data.batch_size=12", "the nearest that is: 16"),
        ("--config.data.batch_size=1000000000000000", "data.batch_size=1000000000000000, data.seq_len="),
        ("--config.model.vocab_size=100000000000000", "model.vocab_size=100000000000000"),
    ]:
        assert main(["preflight", SMOKE, "--cache=", "--topology=cpu:8", flag]) == 2
        (said,) = capsys.readouterr().err.splitlines()  # nothing of minutes of compiling
        assert message in said


def test_gpus_of_several_hosts_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(topology, "has_compiler", lambda hardware: True)
    with pytest.raises(UserError, match="--slices=2: the CUDA plugin numbers the GPUs of several hosts"):
        topology.devices(parse_topology("h100:8", 2))


# ------------------------------------------------------------------------------------------------ the cache


def test_facts_survive_a_cache_that_cannot_be_used(tmp_path, monkeypatch, capsys):
    """A file in its place, a folder in the file's: neither read nor written, and nothing is lost."""
    monkeypatch.setattr(compiled, "compile_step", made_up)
    hardware = parse_topology("cpu:8")
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        facts, cached = facts_of(CFG, hardware, place)
        assert (facts.topology, cached) == ("cpu:8", False)
        assert f"WARNING: --cache={place} keeps nothing" in capsys.readouterr().err
    (tmp_path / "c" / f"{cache_key(CFG, hardware)}.json").mkdir(parents=True)
    assert not facts_of(CFG, hardware, tmp_path / "c")[1]
    assert "keeps nothing" in capsys.readouterr().err
    for damaged in (b"\xff\xfe", b"[]", b'{"topology": 3}'):
        path = tmp_path / "d" / f"{cache_key(CFG, hardware)}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(damaged)
        assert not facts_of(CFG, hardware, path.parent)[1]
        assert facts_of(CFG, hardware, path.parent)[1]


def test_a_cached_report_does_not_pass_its_seconds_off_as_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compiled, "compile_step", made_up)
    flags = ["preflight", SMOKE, "--topology=cpu:8", f"--cache={tmp_path}"]
    assert main(flags) == 0
    first = capsys.readouterr().out
    assert "compile 81.0 s" in first
    assert "from the cache" not in first
    assert main(flags) == 0
    assert "from the cache; the call that compiled it took: compile 81.0 s" in capsys.readouterr().out
    assert main([*flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cached"]
    report = make_report(CFG, parse_topology("cpu:8"), made_up(CFG, parse_topology("cpu:8")))
    assert lines(report, parse_topology("cpu:8")) != lines(report, parse_topology("cpu:8"), cached=True)


def test_the_compilers_flags_are_part_of_the_key(monkeypatch):
    hardware = parse_topology("cpu:8")
    keys = {cache_key(CFG, hardware)}
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        monkeypatch.setenv(name, "--some_flag=1")
        keys.add(cache_key(CFG, hardware))
    assert len(keys) == 3
    longer = dataclasses.replace(CFG, train=dataclasses.replace(CFG.train, num_steps=7))
    assert cache_key(longer, hardware) in keys


# --------------------------------------------------------------------------------------------------- advice


def test_advice_names_only_what_was_not_tried():
    large = dict(vocab_size=64, num_layers=64, model_dim=16384, mlp_dim=65536)
    data = dict(seq_len=2048, batch_size=64)
    cfg = build(dict(model=large | dict(attention=dict(num_heads=8)), data=data))
    hardware = parse_topology("v5e:2x2")
    with pytest.raises(UserError) as told:
        search(cfg, hardware, made_up, max_compiles=1)
    advice = str(told.value).partition("take ")[2]
    assert advice == "more chips or mesh.offload='optimizer' or train.microbatches above 16"
    with pytest.raises(UserError) as told:
        choose_mesh(cfg, hardware.chip, 4)
    advice = str(told.value).partition("take ")[2]
    options = "model.remat='full' or mesh.offload='optimizer' or train.microbatches above 1"
    assert advice.startswith(f"more chips or {options};")
    full = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat="full"))
    with pytest.raises(UserError) as told:
        choose_mesh(full, hardware.chip, 4)
    assert "remat" not in str(told.value)


def test_the_place_for_overrides_is_proven_before_the_search(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "search", None)
    monkeypatch.setattr(command, "versions", lambda hardware: {})
    flags = ["--topology=v5e:2x2", "--search", f"--out={tmp_path}/new/x.json"]
    with pytest.raises(TypeError):  # gets as far as the search
        main(["preflight", SMOKE, *flags])
    assert (tmp_path / "new").is_dir()
