"""Compiling for hardware: emulated devices for what is checked by hand, TPUs where libtpu is installed."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlm.cli import main
from jaxlm.config import build
from jaxlm.errors import UserError
from jaxlm.preflight import compiled, topology
from jaxlm.preflight.collectives import schedule, traffic
from jaxlm.preflight.compiled import Row, facts_of, parse_shortage
from jaxlm.preflight.hlo import parse
from jaxlm.preflight.report import make_report, sums
from jaxlm.preflight.topology import make_topology_mesh, parse_topology, positions
from jaxlm.sharding import MeshConfig

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'jaxlm[preflight]'",
)
TINY = dict(vocab_size=64, num_layers=3, model_dim=16, mlp_dim=32, remat="full")
TINY |= dict(attention=dict(num_heads=2, num_kv_heads=2))


def run(mesh=None, model=None, **data):
    tree = dict(model={**TINY, **(model or {})}, mesh=mesh or {}, data=dict(seq_len=16, batch_size=8) | data)
    return build(tree)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("preflight")


@pytest.fixture(scope="module")
def pods():
    """The module tools/preflight_pods.py."""
    path = Path(__file__).parents[2] / "tools" / "preflight_pods.py"
    spec = importlib.util.spec_from_file_location("tools_preflight_pods", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fsdp(cache):
    """Facts of a tiny model on eight emulated devices."""
    cfg, hardware = run(dict(data=1, fsdp=8)), parse_topology("cpu:8")
    facts, cached = facts_of(cfg, hardware, cache)
    assert not cached
    return cfg, hardware, facts


# ----------------------------------------------------------------------------------------------- closed forms


def test_traffic_of_pure_fsdp_is_the_closed_form():
    """L layers of D x D: a gather forward, one backward (remat), and the reduction of the gradient."""
    L, D, n = 6, 32, 8
    mesh = jax.make_mesh((n,), ("fsdp",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((None, "fsdp"), (None, None)))

    def step(w_LDD, x_BD):
        def layer(x_BD, w_DD):
            return jnp.tanh(x_BD @ jax.lax.with_sharding_constraint(w_DD, whole)), None

        def loss(w_LDD):
            return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x_BD, w_LDD)[0] ** 2)

        return w_LDD - jax.grad(loss)(w_LDD)

    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    arguments = [
        jax.ShapeDtypeStruct((L, D, D), jnp.float32, sharding=split),
        jax.ShapeDtypeStruct((16, D), jnp.float32, sharding=rows),
    ]
    program = jax.jit(step, out_shardings=split).lower(*arguments).compile()
    found = schedule(parse(program.as_text()))
    sent = {}
    for each in found.collectives:
        assert each.trips == L
        sent[each.kind] = sent.get(each.kind, 0) + each.trips * traffic(each, np.zeros(n, int)).ici
    weights = L * D * D * 4
    assert sent == {"all-gather": 2 * weights * (n - 1) / n, "all-reduce": 2 * weights * (n - 1) / n}
    assert found.unknown_loops == 0


def test_facts_of_a_step(fsdp):
    cfg, hardware, facts = fsdp
    report = make_report(cfg, hardware, facts)
    assert report.fits
    assert report.time is None  # a CPU has no roofline
    assert facts.memory.arguments >= facts.state["params"] + facts.state["opt_state"] + facts.state["batch"]
    assert facts.state["params"] == report.estimate.params
    assert facts.state["opt_state"] == report.estimate.opt_state
    total = sums(facts.collectives)
    assert total["all"]["ici"] == pytest.approx(sum(row.ici for row in facts.collectives))
    gathers = [
        row for row in facts.collectives if row.kind == "all-gather" and row.count % 3 == 0
    ]  # of three layers
    assert gathers
    assert all(row.axes == "fsdp" and row.size == 8 for row in gathers)
    assert all(row.dcn == 0 for row in facts.collectives)


def test_state_in_the_hosts_memory_is_told_apart(fsdp, cache):
    facts, _ = facts_of(run(dict(data=1, fsdp=8, offload="optimizer")), parse_topology("cpu:8"), cache)
    plain = fsdp[2]
    assert plain.host == 0
    assert facts.host + facts.state["opt_state"] == plain.state["opt_state"]
    assert 0 < facts.state["opt_state"] < 100  # counts of updates stay
    assert facts.state["params"] == plain.state["params"]
    assert "lie in the host's memory" in judged(fsdp, [], host=2**30).warnings[0]


def test_every_axis_is_named(cache):
    cfg = run(dict(data=2, fsdp=2, tensor=2))
    facts, _ = facts_of(cfg, parse_topology("cpu:8", slices=2), cache)
    axes = {row.axes for row in facts.collectives}
    assert {"fsdp", "tensor"} <= axes
    crossing = {row.axes for row in facts.collectives if row.dcn}
    assert crossing
    assert all("data" in axis.split() for axis in crossing)  # only data lies across the two slices
    assert all(row.dcn for row in facts.collectives if "data" in row.axes.split())


# ----------------------------------------------------------------------------------------------- the command


def test_the_second_call_compiles_nothing(fsdp, cache, monkeypatch):
    cfg, hardware, facts = fsdp
    monkeypatch.setattr(compiled, "compile_step", None)
    again, cached = facts_of(cfg, hardware, cache)
    assert cached
    assert again == facts
    longer = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, num_steps=7), seed=3)
    assert facts_of(longer, hardware, cache)[1]  # the step is the same
    with pytest.raises(TypeError):
        facts_of(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, mlp_dim=64)), hardware, cache)


def test_a_damaged_cache_file_is_written_again(fsdp, tmp_path, monkeypatch):
    cfg, hardware, facts = fsdp
    monkeypatch.setattr(compiled, "compile_step", lambda *_: facts)
    facts_of(cfg, hardware, tmp_path)
    (path,) = tmp_path.glob("*.json")
    path.write_text("{")
    assert facts_of(cfg, hardware, tmp_path) == (facts, False)
    assert facts_of(cfg, hardware, tmp_path) == (facts, True)


def test_the_command_prints_tables_and_json(fsdp, cache, monkeypatch, capsys):
    monkeypatch.setattr(compiled, "compile_step", lambda *_: fsdp[2])
    flags = ["--config=experiments/quickstart.py:smoke", "--topology=cpu:8", f"--cache={cache}"]
    assert main(["preflight", *flags]) == 0
    shown = capsys.readouterr().out
    assert "collectives of a step" in shown
    assert "optimal" not in shown
    assert main(["preflight", *flags, "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["fits"]
    assert tree["cached"]
    assert tree["facts"]["collectives"]
    assert tree["sums"]["all"]["ici"] > 0


def test_bad_input_is_refused():
    for text, message in [
        ("v5q:2x2", "did you mean 'v5"),
        ("v5p:4x4", "wired in 3 dimensions, write it like v5p:4x4x4"),
        ("v5e:4x4x4", "wired in 2 dimensions"),
        ("v5p:4x0x4", "write it like"),
        ("v6e", "write it like v6e:8x8"),
        ("h100:2x8", r"write it like h100:8 \(hosts are --slices\)"),
    ]:
        with pytest.raises(UserError, match=message):
            parse_topology(text)
    with pytest.raises(UserError, match="slices=3 does not divide"):
        parse_topology("cpu:8", slices=3)
    assert len(jax.devices()) == 8  # the backend runs
    with pytest.raises(UserError, match="has 8 CPU devices"):
        topology.devices(parse_topology("cpu:64"))
    eight = topology.devices(parse_topology("cpu:8"))
    with pytest.raises(UserError, match="mesh of 4 devices"):
        make_topology_mesh(MeshConfig(data=4), parse_topology("cpu:8"), eight)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jaxlm\[preflight\]'"):
        topology.devices(parse_topology("v5e:2x2"))


def test_gpus_of_several_hosts():
    hosts = parse_topology("h200:8", slices=4)
    assert (hosts.platform, hosts.num_devices, hosts.chip.kind) == ("gpu", 32, "NVIDIA H200")


@pytest.mark.slow
def test_lowering_does_not_grow_with_the_layers(pods):
    """The 405B model's 126 layers are one scan: as much text as 8 of them."""
    model, _, _, mesh, _, length = pods.PODS["llama3-405B"]

    def lowered(layers):
        cfg = run(mesh | dict(fsdp=4, tensor=2, expert=1), {**model, "num_layers": layers}, seq_len=length)
        return compiled.lower_step(cfg, parse_topology("cpu:8"))

    lowered(4)  # what is imported and traced once
    few, many = lowered(8), lowered(126)
    text, longer = few.program.as_text(), many.program.as_text()
    assert "126x" in longer  # the stacks of layers
    assert longer.count("\n") == text.count("\n")
    took, long_took = (sum(each.seconds.values()) for each in (few, many))
    print(f"traced and lowered: 8 layers {took:.2f} s, 126 layers {long_took:.2f} s")


# -------------------------------------------------------------------------------------------------- judgement


def test_messages_of_an_overflow():
    old = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    old += "(17.06G) exceeds available HBM (15.75G)."
    new = "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required "
    new += "for HLO temporaries (2.38T) exceeds available HBM (15.75G). HLO module: jit_step."
    assert parse_shortage(old).needed == pytest.approx(17.06 * 2**30)
    assert parse_shortage(new).needed == pytest.approx(2.38 * 2**40)
    assert parse_shortage("RESOURCE_EXHAUSTED: something new").needed == 0
    assert parse_shortage("INTERNAL: a bug") is None


def judged(fsdp, rows, text="v5p:2x2x2", mesh=None, **changes):
    cfg = run(mesh or dict(data=1, fsdp=8))
    facts = dataclasses.replace(fsdp[2], collectives=rows, **changes)
    return make_report(cfg, parse_topology(text), facts, price=2.0)


def row(kind="all-gather", axes="fsdp", nbytes=1e9, ici=1e9, dcn=0.0, where="x/dot_general", **changes):
    return Row(
        **(
            dict(kind=kind, axes=axes, size=8, links=2, count=1, nbytes=nbytes, ici=ici, dcn=dcn, where=where)
            | changes
        )
    )


def test_the_roofline(fsdp):
    report = judged(fsdp, [row(ici=2e11), row("all-reduce", "data", 1e9, 0.0, dcn=6.25e9)])
    time = report.time
    assert time.ici == pytest.approx(1.0)  # 200 GB over two links of 100 GB/s
    assert time.dcn == pytest.approx(1.0)
    tokens = 8 * 16 / 8
    assert time.compute == pytest.approx(report.counts.flops_hardware * tokens / 459e12)
    assert time.bound == pytest.approx(1.0)
    assert time.serial == pytest.approx(2.0, rel=1e-3)
    assert time.mfu == pytest.approx(report.counts.flops_train * tokens / 459e12)
    assert time.mfu_serial == pytest.approx(time.mfu / 2, rel=1e-3)
    assert report.chip_hours == pytest.approx(8 * 1000 / 3600)
    assert report.to_dict()["cost"] == pytest.approx(2 * report.chip_hours)


def test_two_devices_of_a_chip_share_its_links(fsdp):
    whole = judged(fsdp, [row(ici=1e11)]).time.ici
    assert judged(fsdp, [row(ici=1e11)], "tpu7x:2x2x1").time.ici == pytest.approx(2 * whole)


def test_warnings(fsdp):
    def warned(rows, **changes):
        return " | ".join(judged(fsdp, rows, **changes).warnings)

    assert warned([]) == ""
    assert "replicated" in warned([], largest_replicated=("blocks/0/mlp/w_up", 2**30))
    assert "2 loops of unknown length" in warned([], unknown_loops=2)
    assert "replicates an operand of gather f32[8]" in warned([], replicated=("gather f32[8]",))
    assert "cannot be read" in warned(None, unreadable="RET_CHECK")
    assert "collectives along tensor take" in warned([row(axes="tensor")])
    assert "too small to hide the gathers" in warned([row()])
    assert "a reshard that the compiler inserted: all-to-all" in warned([row("all-to-all", where="a/gather")])
    assert "reshard" not in warned([row("all-to-all", where="moe/all_to_all")])
    assert "reshard" in warned([row("collective-permute", where="a/gather")])
    assert "reshard" not in warned([row("collective-permute", where="mlp/BTD,BTF->DF/dot_general")])
    assert "whole all-reduces along fsdp" in warned([row("all-reduce")])
    assert "fills its torus" in warned([row("all-reduce")])
    assert "would send half" in warned([row("all-reduce")], text="h100:8")
    assert "torus" not in warned([row("all-reduce")], text="h100:8")
    assert "whole all-reduces" not in warned([row("reduce-scatter")])
    assert "between slices takes" in warned([row(dcn=1e9)])


# ------------------------------------------------------------------------------------------------------- TPUs


@pytest.mark.parametrize(
    ("text", "slices"), [("v5p:4x4x4", 1), ("v5e:4x4", 2), ("tpu7x:2x2x1", 1), ("v4:2x2x4", 1)]
)
@needs_libtpu
def test_topologies(text, slices):
    hardware = parse_topology(text, slices)
    found = topology.devices(hardware)
    assert len(found) == hardware.num_devices
    assert found[0].device_kind == hardware.chip.kind
    mesh = make_topology_mesh(MeshConfig(data=slices, fsdp=-1, slices=slices), hardware, found)
    where, coordinates = positions(hardware, mesh)
    assert np.bincount(where).tolist() == [hardware.num_devices // slices] * slices
    assert (coordinates.max(0) + 1).tolist() == list(hardware.shape)
    assert os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"


@pytest.mark.slow
@needs_libtpu
def test_a_tpu_step_gathers_and_scatters_in_compute_and_parameter_dtype(tmp_path):
    """fsdp over 4: every block gradient leaves once as a reduce-scatter of fp32; gathers are of bf16."""
    model = dict(vocab_size=1024, num_layers=3, model_dim=512, mlp_dim=512, dtype="bfloat16")
    model |= dict(attention=dict(num_heads=4, num_kv_heads=4))
    cfg = run(dict(data=1, fsdp=4), model, seq_len=128)
    facts, _ = facts_of(cfg, parse_topology("v5p:2x2x1"), tmp_path)
    report = make_report(cfg, parse_topology("v5p:2x2x1"), facts)
    assert report.fits
    assert report.time.mfu > 0
    assert facts.cycles > 0
    assert facts.unknown_loops == 0
    D, F, L = 512, 512, 3
    weights = L * (4 * D * D + 3 * D * F)
    head = 4 * D * 1024  # bytes of its gradient, which leaves once for every chunk of the loss
    scattered = sum(r.ici for r in facts.collectives if r.kind == "reduce-scatter" and r.nbytes != head)
    assert scattered == pytest.approx(4 * weights * 3 / 4)
    gathered = sum(r.ici for r in facts.collectives if r.kind == "all-gather" and r.count % L == 0)
    assert 2 * (2 * weights) * 3 / 4 <= gathered <= 3 * (2 * weights) * 3 / 4


@pytest.mark.slow
@needs_libtpu
def test_a_pod_fits_with_splash_attention_and_gathers_nothing_whole(pods, tmp_path):
    """Two layers of the 8B model on 64 chips of v6e: what every row of the README's table of pods claims."""
    cfg, hardware = pods.pod("llama3-8B on v6e", "splash")
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, num_layers=2))
    facts, _ = facts_of(cfg, hardware, tmp_path)
    report = make_report(cfg, hardware, facts)
    assert report.fits
    assert facts.unknown_loops == 0
    assert any("splash" in name for name in facts.kernels)
    tokens = report.tokens_per_step // hardware.num_devices
    assert tokens == 16_384
    V, D = cfg.model.vocab_size, cfg.model.model_dim
    head, logits, parameters = 2 * V * D, 2 * tokens * V, 2 * report.counts.n_total  # bytes, bfloat16
    layer = (parameters - 2 * head) // cfg.model.num_layers
    largest = max(row.nbytes for row in facts.collectives)
    assert layer < head < parameters / 2 < logits
    assert largest <= 1.01 * head  # one layer's weights at a time, and once the head
    assert facts.memory.temporaries < logits  # nor are there full logits on a chip
    gathered = sum(row.nbytes * row.count for row in facts.collectives if row.kind == "all-gather")
    assert gathered <= 1.05 * (3 * head + 2 * 2 * layer)  # forward and backward; not once more


@pytest.mark.slow
@needs_libtpu
def test_two_preflights_at_once(tmp_path):
    """libtpu locks itself unless told not to; both processes load it, compile and share a cache."""
    flags = [
        "--config=experiments/quickstart.py:smoke",
        "--topology=v5e:2x2",
        f"--cache={tmp_path}",
        "--json",
    ]
    sizes = ["--config.data.seq_len=128", "--config.data.batch_size=4"]
    command = [sys.executable, "-m", "jaxlm", "preflight", *flags, *sizes]
    both = [
        subprocess.Popen([*command, f"--config.model.num_layers={n}"], stdout=subprocess.PIPE, text=True)
        for n in (1, 2)
    ]
    trees = [json.loads(each.communicate(timeout=600)[0]) for each in both]
    assert [each.returncode for each in both] == [0, 0]
    assert trees[0]["facts"]["state"]["params"] < trees[1]["facts"]["state"]["params"]
    assert len(list(tmp_path.glob("*.json"))) == 2


@pytest.mark.slow
@needs_libtpu
def test_what_does_not_fit_says_by_how_much(tmp_path, capsys):
    flags = [
        "--config=experiments/llama_8b.py",
        "--topology=v5e:2x2",
        f"--cache={tmp_path}",
        "--config.mesh.tensor=1",
    ]
    flags += ["--config.model.num_layers=2"]
    assert main(["preflight", *flags]) == 1
    shown = capsys.readouterr().out
    assert "DOES NOT FIT by" in shown
    assert "MISSING" in shown


# ------------------------------------------------------------------------------------------------------- GPUs


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="the CUDA plugin is not installed: pip install 'jaxlm[cuda]'",
)
def test_a_gpu_step_is_compiled_without_one(tmp_path):
    model = dict(vocab_size=1024, num_layers=3, model_dim=512, mlp_dim=512, dtype="bfloat16")
    model |= dict(attention=dict(num_heads=4, num_kv_heads=4, backend="cudnn"))
    facts, _ = facts_of(run(dict(data=1, fsdp=4), model, seq_len=128), parse_topology("h100:4"), tmp_path)
    assert facts.shortage is None
    assert facts.memory.temporaries > 0
    assert {"all-gather", "reduce-scatter"} <= {row.kind for row in facts.collectives}
    attention = {name: runs for name, runs in facts.kernels.items() if name.startswith("__cudnn")}
    # Three layers, forward twice by remat; segments go in as a bias.
    assert attention == {"__cudnn$fmhaScaleBiasSoftmax": 6, "__cudnn$fmhaScaleBiasSoftmaxBackward": 3}
