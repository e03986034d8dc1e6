"""Every family of experiments/families: its published sizes as shapes, its smoke sizes as runs."""

import ast
import dataclasses
import functools
import importlib.util
from pathlib import Path

import jax
import pytest

from jaxlm.config import build, config_hash, load_experiment
from jaxlm.errors import UserError
from jaxlm.scaling.counting import count, weights
from jaxlm.sharding import MeshConfig
from jaxlm.train.run import train

FOLDER = Path(__file__).parents[1] / "experiments" / "families"


def module(name):
    spec = importlib.util.spec_from_file_location(f"families_{name}", FOLDER / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


FILES = ("decoders", "encoders", "pairs")
SHAPES = {(file, name): shape for file in FILES for name, shape in module(file).SHAPES.items()}
IDS = [f"{file}:{name}" for file, name in SHAPES]
QUICK = ("decoders:palm_8b", "encoders:bert_base", "baselines:lstm")

SMOKE = [*IDS, "baselines:lstm", "baselines:transformer"]


@functools.cache
def load(name, size=""):
    file, _, shape = name.partition(":")
    return build(load_experiment(f"{FOLDER / file}.py:{shape}{size}"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder for all runs: they share their tokens and compiled programs."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_the_docstring_says_claim_command_hardware_and_number(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    for part in ("Claim:", "Command:", "Hardware:", "Expected:", "Last run:"):
        assert text.count(f"\n{part}") == 1, part
    assert f"experiments/families/{path.name}" in text


@pytest.mark.parametrize("name", IDS)
def test_published_shapes_have_their_published_size(name):
    """To the digit, or within what the source rounds."""
    shape, cfg = SHAPES[tuple(name.split(":"))], load(name)
    total = weights(shape.config()).total
    assert abs(total - shape.parameters) <= shape.rounded * shape.parameters, f"{total:,}"
    assert shape.source
    assert dataclasses.replace(cfg.model, dtype="float32", remat="none", dropout=0.0) == shape.config()
    assert cfg.data.seq_len == shape.seq_len


def test_most_sizes_are_exact():
    inexact = {name for (_, name), shape in SHAPES.items() if shape.rounded}
    gpt3 = {"gpt3_125m", "gpt3_6_7b", "gpt3_175b"}
    assert inexact == gpt3 | {"palm_8b", "palm_540b", "deepseek_v3", "transformer_base"}


@pytest.mark.parametrize("name", IDS)
def test_the_smoke_size_keeps_the_variations(name):
    full, small = load(name).model, load(name, ":smoke").model
    sizes = ("vocab_size", "num_layers", "first_dense", "model_dim", "mlp_dim", "dtype", "remat", "dropout")
    sizes += ("embed_dim", "shared_layers")
    inside = {
        "attention": ("num_heads", "num_kv_heads", "head_dim", "window", "latent"),
        "position": ("max_length", "original_length", "fraction"),
        "encoder": ("num_layers", "num_heads", "head_dim", "mlp_dim"),
        "moe": ("num_experts", "top_k", "expert_dim", "shared_dim", "groups", "top_groups"),
        "disentangled": ("span", "buckets"),
    }
    for group, names in inside.items():
        own, theirs = getattr(small, group), getattr(full, group)
        assert dataclasses.replace(own, **{n: getattr(theirs, n) for n in names}) == theirs, group
        for n in names:  # what is off stays off
            assert bool(getattr(own, n)) == bool(getattr(theirs, n)), n
    assert bool(small.attention.latent.kv_rank) == bool(full.attention.latent.kv_rank)
    assert (small.embed_dim > 0, small.shared_layers > 1) == (full.embed_dim > 0, full.shared_layers > 1)
    groups = {group: getattr(full, group) for group in inside}
    assert dataclasses.replace(small, **{n: getattr(full, n) for n in sizes}, **groups) == full
    assert weights(small).total < 500_000
    assert small.num_layers >= small.period


def test_wrong_names_are_refused():
    with pytest.raises(UserError, match="did you mean 'llama3_8b'"):
        load("decoders:llama3_8")
    with pytest.raises(UserError, match="did you mean 'smoke'"):
        load("decoders:gpt2", ":smok")
    with pytest.raises(UserError, match="neither a number of FLOPs nor 'smoke'"):
        load("baselines:lstm", ":many")
    with pytest.raises(UserError, match="fewer than 20 steps"):
        load("baselines:lstm", ":1e9")


def test_baselines_have_equal_compute():
    spent = {}
    for name in ("lstm", "transformer"):
        cfg = load(f"baselines:{name}", ":4e12")
        tokens = cfg.train.num_steps * cfg.data.batch_size * cfg.data.seq_len
        spent[name] = tokens * count(cfg.model, cfg.data.seq_len).flops_train
    assert spent["lstm"] == pytest.approx(4e12, rel=0.01)
    assert spent["transformer"] == pytest.approx(4e12, rel=0.01)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SMOKE]
)
def test_the_smoke_size_trains(name, runs):
    """The quick ones on all devices, the others on one, as eight emulated ones take longer.

    A large member of a family is often a small one at smoke size, to the last field: one run serves both.
    """
    cfg = load(name, ":smoke")
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, sample_prompts=()))
    if name not in QUICK:
        cfg = dataclasses.replace(cfg, mesh=MeshConfig(data=1))
    result = train(cfg, runs / config_hash(cfg)[:12], bar=False)
    if name in QUICK:
        assert result.mesh["data"] == jax.device_count()
    assert (result.status, result.steps) == ("finished", cfg.train.num_steps)
    # Bytes of Python source: log2(256) = 8 bits before training, or 5.5 nats for a hidden one.
    if cfg.data.format == "lm":
        assert 1.0 < result.metrics["eval/bpb"] < 6.5
    else:
        assert 1.0 < result.metrics["eval/nll"] < 5.0
