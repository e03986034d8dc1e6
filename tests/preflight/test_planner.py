"""The analytic model: closed forms, the choice of a mesh, and the search around the compiler."""

import dataclasses
import json
import math
import types

import pytest

from jaxlm.chips import CHIPS
from jaxlm.cli import main
from jaxlm.config import build, load_experiment
from jaxlm.errors import UserError
from jaxlm.preflight import command
from jaxlm.preflight.compiled import DeviceMemory, Facts, Row, Shortage
from jaxlm.preflight.planner import (
    HEADROOM,
    axis_traffic,
    choose_mesh,
    estimate,
    meshes,
    ranked,
    resolve_mesh,
)
from jaxlm.preflight.search import Candidate, retiled, search, tiles, variants
from jaxlm.preflight.topology import parse_topology
from jaxlm.sharding import MeshConfig
from jaxlm.train.run import plan

V5P = CHIPS["v5p"]


@pytest.fixture(scope="module")
def llama():
    return build(load_experiment("experiments/llama_8b.py"))


def on(cfg, mesh, **train):
    return dataclasses.replace(cfg, mesh=MeshConfig(**mesh), train=dataclasses.replace(cfg.train, **train))


def test_traffic_of_storage_is_two_gathers_and_a_scatter(llama):
    """Over two axes as over one; but the one that fills the torus sends twice as much."""
    both = dict(data=16, fsdp=4, rules=(("embed", "data fsdp"),))
    narrow = estimate(on(llama, both | dict(reduce_dtype="bfloat16")), V5P, 64).traffic
    parameters = 8_030_261_248
    whole = 63 / 64 * parameters  # norms are whole
    assert narrow["data"] + narrow["fsdp"] == pytest.approx(whole * (2 + 2 + 2), rel=5e-3)
    assert narrow["fsdp"] == pytest.approx(3 / 4 * parameters / 16 * 6, rel=5e-3)
    made = estimate(on(llama, dict(data=1, fsdp=64)), V5P, 64)
    assert made.traffic["fsdp"] == pytest.approx(2 * whole * (2 + 2 + 4), rel=5e-3)
    assert {axis for axis, sent in made.traffic.items() if sent} == {"fsdp"}
    few = estimate(on(llama, dict(data=1, fsdp=16)), V5P, 16).traffic  # 16 chips close no torus
    assert few["fsdp"] == pytest.approx(15 / 16 * parameters * (2 + 2 + 4), rel=5e-3)
    twice = estimate(on(llama, dict(data=1, fsdp=32, tensor=2), microbatches=2), V5P, 64).traffic
    assert twice["fsdp"] == pytest.approx(2 * 31 / 32 * parameters / 2 * 8, rel=5e-3)


def test_traffic_of_the_other_axes(llama):
    mesh = dict(pipe=2, data=2, fsdp=2, expert=1, sequence=2, tensor=4)
    sent = axis_traffic(llama, mesh, params=1000)
    x = 64 / 4 * 8192 / 2 * 4096 * 2
    assert sent["data"] == 2 * 0.5 * 250 * 4
    assert sent["tensor"] == 2 * 0.75 * 6 * 16 * x
    assert sent["sequence"] == 6 * 16 * x * (8 / 32) / 4
    assert sent["pipe"] == 2 * x
    assert sent["expert"] == 0


def test_slices_send_over_the_network_between_them(llama):
    mesh = dict(data=2, fsdp=64)
    cfg = dataclasses.replace(llama, data=dataclasses.replace(llama.data, batch_size=128))
    one, two = (estimate(on(cfg, mesh), V5P, 128, slices) for slices in (1, 2))
    assert one.dcn == 0
    assert two.dcn == pytest.approx(two.traffic["data"] / V5P.network.beyond)


def test_the_chosen_mesh_fits_and_is_the_fastest(llama):
    mesh = choose_mesh(llama, V5P, 64)
    assert (mesh.data, mesh.fsdp, mesh.tensor) == (8, 8, 1)
    assert dict(mesh.rules)["embed"] == "data fsdp"
    chosen = estimate(dataclasses.replace(llama, mesh=mesh), V5P, 64)
    tried = ranked((dataclasses.replace(llama, mesh=m) for m in meshes(llama, 64)), V5P, 64)
    assert chosen.fits
    assert chosen.seconds == min(made.seconds for _, made in tried)
    two = choose_mesh(llama, V5P, 128, slices=2)
    assert two.data % 2 == 0
    assert "data" not in dict(two.rules).get("embed", "").split()  # weights are not gathered between slices


def test_more_devices_than_rows_take_another_axis(llama):
    few = dataclasses.replace(llama, data=dataclasses.replace(llama.data, batch_size=16))
    mesh = choose_mesh(few, V5P, 64)
    assert mesh.tensor * mesh.sequence >= 4


def test_nothing_fits(llama):
    with pytest.raises(UserError, match="take more chips"):
        choose_mesh(llama, CHIPS["v5e"], 2)


def shape(layers, dim, mlp, heads, kv_heads, vocab, **changes):
    attention = dict(num_heads=heads, num_kv_heads=kv_heads, backend="splash")
    sizes = dict(num_layers=layers, model_dim=dim, mlp_dim=mlp, vocab_size=vocab, attention=attention)
    return dict(dtype="bfloat16", remat="full") | sizes | changes


TWO_AXES = dict(rules=(("embed", "data fsdp"),), reduce_dtype="bfloat16")
SMALL = shape(8, 2048, 5632, 16, 4, 32_000)
EXPERTS = dict(mlp_pattern=("moe",), moe=dict(num_experts=8, top_k=2))
# What libtpu 0.0.42.1 said is in use at one time (peak) and what it reserves, GiB:
# (model, mesh, rows, T, devices, peak, reserved).
PEAKS = {
    "7B": (shape(32, 4096, 11_008, 32, 32, 32_000), dict(data=16, fsdp=16), 512, 4096, 256, 4.34, 6.0),
    "8B": (shape(32, 4096, 14_336, 32, 8, 128_256), dict(data=16, fsdp=4), 256, 8192, 64, 17.84, 27.8),
    "70B": (shape(80, 8192, 28_672, 64, 8, 128_256), dict(data=64, fsdp=8), 1024, 8192, 512, 34.2, 47.4),
    "8x7B": (
        shape(32, 4096, 14_336, 32, 8, 32_000, **EXPERTS),
        dict(data=16, fsdp=4),
        512,
        4096,
        64,
        42.5,
        54.7,
    ),
    "small": (SMALL, dict(data=1, fsdp=4, rules=(), reduce_dtype="float32"), 16, 2048, 4, 2.88, 3.6),
    "minimal": (
        SMALL | dict(remat="minimal"),
        dict(data=1, fsdp=4, rules=(), reduce_dtype="float32"),
        16,
        2048,
        4,
        4.98,
        6.1,
    ),
}


@pytest.mark.parametrize("name", PEAKS)
def test_memory_is_what_the_compiler_needs(name):
    """And what fits by the estimate, with its headroom, fits by what the compiler reserves."""
    model, mesh, rows, length, devices, peak, reserved = PEAKS[name]
    cfg = build(dict(model=model, mesh=TWO_AXES | mesh, data=dict(seq_len=length, batch_size=rows)))
    total = plan(cfg, num_devices=devices).memory.total / 2**30
    assert total == pytest.approx(peak, rel=0.1)
    assert reserved <= total / HEADROOM


def test_a_mesh_that_is_left_to_us(llama):
    """The planner's where the links have numbers, the table's elsewhere; no sizes before that."""
    auto = dataclasses.replace(llama, mesh=MeshConfig(auto=True, reduce_dtype="bfloat16"))
    with pytest.raises(UserError, match="no sizes are chosen"):
        estimate(auto, V5P, 64)
    assert resolve_mesh(llama, "TPU v5", 64) is llama
    narrow = dataclasses.replace(llama, mesh=MeshConfig(reduce_dtype="bfloat16"))
    for kind, chip, count, slices in (("TPU v5", V5P, 64, 1), ("TPU v6 lite", CHIPS["v6e"], 512, 2)):
        rows = dataclasses.replace(llama.data, batch_size=count)
        cfg, same = (dataclasses.replace(c, data=rows) for c in (auto, narrow))
        mesh = resolve_mesh(cfg, kind, count, slices).mesh
        assert mesh == choose_mesh(same, chip, count, slices)
        assert (mesh.slices, mesh.reduce_dtype, mesh.auto) == (slices, "bfloat16", False)
    assert resolve_mesh(auto, "cpu", 8).mesh.shape(8) == MeshConfig(data=8).shape(8)
    hosts = resolve_mesh(auto, "NVIDIA H100 80GB HBM3", 16, slices=2).mesh
    assert (hosts.data, hosts.fsdp) == (-1, 8)
    with pytest.raises(UserError, match="no mesh rule matches 'abacus x 3'"):
        resolve_mesh(auto, "abacus", 3)


# ----------------------------------------------------------------------------------------------------- search


def facts(cfg, hardware):
    """As if the compiler had said so: what needs no remat does not fit, and tensor sends much."""
    mesh = dict(
        zip(("pipe", "data", "fsdp", "expert", "sequence", "tensor"), cfg.mesh.shape(64), strict=True)
    )
    fits = cfg.model.remat == "full"
    row = Row("all-gather", "fsdp", 64, 6, 1, 1e9, 1e9 * mesh["tensor"] ** 4, 0.0, "")
    return Facts(
        topology=str(hardware),
        mesh=mesh,
        state=dict(params=1, gradients=1, opt_state=1, batch=1),
        host=0,
        largest_replicated=("", 0),
        memory=DeviceMemory(1, 1, 1, 2**30, 1, 2**30) if fits else None,
        shortage=None if fits else Shortage(2e11, 1e11, "RESOURCE_EXHAUSTED"),
        collectives=(row,) if fits else None,
        unreadable="",
        kernels={},
        cycles=0.0,
        unknown_loops=0,
        replicated=(),
        seconds={"compile": 1.0},
        versions={"jax": "0"},
    )


def test_the_search_compiles_the_best_and_ranks_them(llama):
    hardware, asked = parse_topology("v5p:4x4x4"), []

    def compile_one(cfg):
        asked.append(cfg)
        return facts(cfg, hardware)

    compiled, estimated = search(llama, hardware, compile_one, max_compiles=6)
    assert len(compiled) == len(asked) == 6
    assert len(set(asked)) == 6
    fits = [each.report.fits for each in compiled]
    assert fits == sorted(fits, reverse=True)
    good = [each.score for each in compiled if each.report.fits]
    assert good == sorted(good)
    best = [each.estimate.seconds for each in estimated]
    assert best == sorted(best)
    assert max(each.estimate.seconds for each in compiled) <= best[0]
    assert all(each.estimate.fits for each in (*compiled, *estimated))


def test_variants_change_nothing_else(llama):
    hardware = parse_topology("v5p:4x4x4")
    for cfg in variants(llama, hardware):
        model, train = llama.model, llama.train
        same = dataclasses.replace(
            cfg,
            mesh=llama.mesh,
            model=dataclasses.replace(cfg.model, remat=model.remat),
            train=dataclasses.replace(cfg.train, microbatches=train.microbatches),
        )
        assert same == llama


def test_the_command_writes_the_overrides(tmp_path, capsys, monkeypatch):
    asked = []

    def facts_of(cfg, hardware, *_):
        asked.append(cfg)
        return facts(cfg, hardware), False

    monkeypatch.setattr(command, "facts_of", facts_of)
    monkeypatch.setattr(command, "versions", lambda hardware: {})
    out = tmp_path / "best.json"
    flags = ["--config=experiments/llama_8b.py", "--topology=v5p:4x4x4", "--search", f"--out={out}"]
    assert main(["preflight", *flags, "--max_compiles=40"]) == 0
    shown = capsys.readouterr().out
    assert len(asked) == len(set(asked))  # the best is not compiled again for its report
    overrides = json.loads(out.read_text())
    assert overrides["model.remat"] == "full"
    assert f"--config.mesh.fsdp={overrides['mesh.fsdp']}" in shown
    assert "layouts, best first" in shown
    assert main(["preflight", *flags, "--max_compiles=40", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["overrides"] == overrides
    assert tree["ranking"][0].items() >= overrides.items()


def piped(cfg, **mesh):
    return dataclasses.replace(cfg, mesh=MeshConfig(pipe=2, pipe_microbatches=2, **mesh))


def test_a_search_keeps_the_stages(llama):
    """Around `pipe` as given, also where it crosses the slices; a message that names it if it cannot be."""
    hardware = parse_topology("v5p:4x4x4")
    for cfg, slices, data in (
        (piped(llama), 1, 1),
        (piped(llama, dcn="pipe"), 2, 1),
        (piped(llama), 2, 2),
    ):
        tried = list(meshes(cfg, 64 * slices, slices))
        assert {mesh.pipe for mesh in tried} == {2}
        assert min(mesh.data for mesh in tried) == data
        assert all(math.prod(mesh.shape(64 * slices)) == 64 * slices for mesh in tried)
        assert len({(mesh.fsdp, mesh.tensor) for mesh in tried}) > 3
    compiled, _ = search(piped(llama), hardware, lambda cfg: facts(cfg, hardware), max_compiles=2)
    assert compiled[0].overrides["mesh.pipe"] == 2
    assert choose_mesh(piped(llama), V5P, 64).pipe == 2
    assert resolve_mesh(piped(llama, auto=True), "cpu", 8).mesh.shape(8)[:2] == (2, 4)
    for cfg, message in (
        (
            dataclasses.replace(llama, mesh=MeshConfig(data=1, pipe=-1)),
            "mesh.pipe=-1: stages are not searched",
        ),
        (piped(llama, dcn="pipe", slices=4), r"mesh.pipe=2 stages.* in 4 slice\(s\) with mesh.dcn='pipe'"),
        (dataclasses.replace(llama, mesh=MeshConfig(pipe=3)), "mesh.pipe=3 stages.* 64 devices in 1 slice"),
    ):
        with pytest.raises(UserError, match=message):
            search(cfg, parse_topology("v5p:4x4x4", cfg.mesh.slices), types.SimpleNamespace, max_compiles=1)


def test_stages_wait_while_a_pipeline_fills(llama):
    flat, deep = on(llama, dict(data=1, fsdp=64)), on(llama, dict(data=1, fsdp=32, pipe=2))
    assert estimate(deep, V5P, 64).compute == pytest.approx(1.5 * estimate(flat, V5P, 64).compute)


def test_a_search_that_finds_nothing_says_why(llama):
    hardware = parse_topology("v5e:2x2")
    with pytest.raises(UserError, match=r"the smallest needs \d+\.\d GiB .* take more chips"):
        search(llama, hardware, types.SimpleNamespace, max_compiles=1)
    odd = dataclasses.replace(llama, data=dataclasses.replace(llama.data, batch_size=3, seq_len=8191))
    with pytest.raises(UserError, match=r"none divides .* refused so: .*batch_size=3 is not divisible"):
        search(odd, parse_topology("v5p:4x4x4"), types.SimpleNamespace, max_compiles=1)


def test_a_search_passes_over_what_is_refused(llama):
    hardware, asked = parse_topology("v5p:4x4x4"), []

    def compile_one(cfg, refuse=3):
        asked.append(cfg)
        if len(asked) <= refuse:
            raise UserError(f"refusal {len(asked)}")
        return facts(cfg, hardware)

    compiled, estimated = search(llama, hardware, compile_one, max_compiles=2)
    assert len(asked) == 5
    assert {each.cfg for each in compiled} == set(asked[3:])
    assert not {each.cfg for each in estimated} & set(asked)
    asked.clear()
    with pytest.raises(UserError, match=r"none of \d+ layouts .* can be compiled; the best: refusal 1"):
        search(llama, hardware, lambda cfg: compile_one(cfg, refuse=10**6), max_compiles=2)


def test_a_search_tries_other_tiles_of_the_best(llama):
    """Half and twice the kernel's own, and they must win clearly; a backend without tiles has none."""
    hardware, asked = parse_topology("v5p:4x4x4"), []
    attention = dataclasses.replace(llama.model.attention, backend="splash")
    cfg = dataclasses.replace(llama, model=dataclasses.replace(llama.model, attention=attention))

    def compile_one(cfg, own_fits=True):
        asked.append(cfg)
        found, own = facts(cfg, hardware), cfg.model.attention.tile_q == 0
        return dataclasses.replace(found, shortage=None if own_fits or not own else Shortage(2e11, 1e11, ""))

    compiled, _ = search(cfg, hardware, compile_one, max_compiles=40)
    assert [tiles(each) for each in asked[:40]] == [(512, 512)] * 40
    assert [tiles(each) for each in asked[40:]] == [(256, 256), (1024, 1024)]
    best, *others = compiled
    assert best.overrides.items() >= {"model.attention.tile_q": 0, "model.attention.tile_k": 0}.items()
    half = next(each for each in others if tiles(each.cfg) == (256, 256))
    assert half.cfg.mesh == best.cfg.mesh
    assert half.report.hardware_flops < best.report.hardware_flops  # fewer hidden scores
    assert half.score < best.score  # by less than what counts
    only = search(cfg, hardware, lambda cfg: compile_one(cfg, own_fits=False), max_compiles=40)[0][0]
    assert only.overrides["model.attention.tile_q"] in (256, 1024)
    written = dataclasses.replace(attention, backend="reference")
    plain = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, attention=written))
    assert list(retiled(plain, 64)) == []
    assert "model.attention.tile_q" not in Candidate(plain, best.estimate).overrides
    split = dataclasses.replace(best.cfg, mesh=MeshConfig(data=1, fsdp=4, sequence=16))
    assert [tiles(each) for each in retiled(split, 64)] == [(256, 256)]  # of 512 columns a device


def test_a_search_needs_numbers_of_the_chip(llama):
    with pytest.raises(UserError, match="needs a chip's numbers"):
        search(llama, parse_topology("cpu:8"), types.SimpleNamespace, max_compiles=1)
