"""Every experiment: what its docstring promises, its full size as shapes, its smoke size as a run."""

import ast
import dataclasses
import re
from pathlib import Path

import jax
import pytest

from jaxlm.config import RunConfig, build, diff, flatten, load_experiment
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.errors import UserError
from jaxlm.train.run import plan, train

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))
IDS = [path.stem for path in EXPERIMENTS]
SAMPLED = ("quickstart", "gpt2_small", "local_global", "mixtral_8x7b")
OBJECTIVES = sorted((ROOT / "experiments" / "objectives").glob("*.py"))

# Parameters of the published shapes, and the devices that the docstring asks for.
PUBLISHED = {
    "gpt2_small": (124_439_808, 8),
    "llama_1b": (1_235_814_400, 8),
    "llama_8b": (8_030_261_248, 64),
    "mixtral_8x7b": (46_702_792_704, 128),
    "local_global": (2_614_341_888, 16),
}


def docstring(path):
    return ast.get_docstring(ast.parse(path.read_text()))


def load(path, arg=""):
    return build(load_experiment(f"{path}:{arg}" if arg else str(path)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder for all runs: they share their tokens and compiled programs."""
    return tmp_path_factory.mktemp("runs")


def test_all_are_here():
    assert set(IDS) == {"base", "quickstart", *PUBLISHED}


@pytest.mark.parametrize("path", EXPERIMENTS + OBJECTIVES, ids=lambda path: path.stem)
def test_the_docstring_says_claim_command_hardware_and_number(path):
    text = docstring(path)
    for part in ("Claim:", "Command:", "Hardware:", "Expected:", "Last run:"):
        assert text.count(f"\n{part}") == 1, part
    named = re.findall(r"--config=(\S+?\.py)", text)
    assert named
    assert set(named) == {str(path.relative_to(ROOT))}
    # An expected number needs a run that gave it.
    expected, last = re.search(r"Expected: (.*?)\nLast run: (.*)", text, re.DOTALL).groups()
    assert expected.startswith("not run yet") == last.startswith("none")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=IDS)
def test_the_smoke_size_is_the_same_experiment_made_small(path):
    full, smoke = load(path), load(path, "smoke")
    assert smoke.model.num_layers <= 4
    assert plan(smoke, num_devices=8).counts.n_total < 1_000_000
    assert smoke.train.num_steps <= 50
    tokenizer = load_tokenizer(smoke.data.tokenizer)
    assert tokenizer.vocab_size == smoke.model.vocab_size
    kept = {"activation", "norm", "norm_position", "tie_embeddings", "mlp_pattern"} | {"attention.pattern"}
    for name in kept:
        assert flatten(full.model)[name] == flatten(smoke.model)[name], name
    with pytest.raises(UserError, match="did you mean 'smoke'"):
        load(path, "smok")


@pytest.mark.parametrize(("name", "expected"), PUBLISHED.items(), ids=PUBLISHED)
def test_published_shapes_have_their_published_size(name, expected):
    parameters, devices = expected
    path = ROOT / "experiments" / f"{name}.py"
    result = plan(load(path), num_devices=devices)
    assert result.counts.n_total == parameters
    assert f"{parameters:,}" in docstring(path)
    assert sum(row.bytes_per_device for row in result.leaves) == result.memory.params
    # The docstring's hardware holds the estimated peak, with a third to spare for what is not counted.
    count, gigabytes = re.search(r"Hardware: (\d+) accelerators of (\d+) GB", docstring(path)).groups()
    assert int(count) == devices
    assert result.memory.total * 4 / 3 < int(gigabytes) * 1e9
    split = [row for row in result.leaves if any(part is not None for part in row.spec)]
    assert (len(split) > 0) == (name != "gpt2_small")


def test_mixtral_uses_two_of_eight_experts():
    counts = plan(load(ROOT / "experiments" / "mixtral_8x7b.py"), num_devices=128).counts
    assert counts.n_active == 12_879_925_248


def test_base_lists_every_knob_with_its_default():
    path = ROOT / "experiments" / "base.py"
    assert diff(RunConfig(), load(path)) == []
    text = path.read_text()
    for name in flatten(RunConfig()):
        assert re.search(rf"^    (config\.)?{re.escape(name)} = ", text, re.MULTILINE), name


@pytest.mark.slow
@pytest.mark.parametrize("path", EXPERIMENTS, ids=IDS)
def test_the_smoke_size_trains(path, runs):
    cfg = load(path, "smoke")
    # A part of the held-out text; texts are sampled, on the mesh, from every kind of model, not from all.
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, eval_tokens=8192))
    if path.stem not in SAMPLED:
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, sample_prompts=()))
    result = train(cfg, runs / path.stem, bar=False)
    assert result.status == "finished"
    assert result.steps == cfg.train.num_steps
    assert result.mesh["data"] * result.mesh["fsdp"] * result.mesh["expert"] == jax.device_count()
    assert (runs / path.stem / "samples.txt").exists() == (path.stem in SAMPLED)
    # Bytes of Python source: log2(256) = 8 bits before training.
    assert 1.0 < result.metrics["eval/bpb"] < 6.5


@pytest.mark.slow
@pytest.mark.parametrize("path", OBJECTIVES, ids=lambda path: path.stem)
def test_other_objectives_train_at_their_smoke_size(path, runs):
    cfg = load(path, "smoke")
    result = train(cfg, runs / f"objective_{path.stem}", bar=False)
    assert result.status == "finished"
    assert plan(load(path)).counts.n_total > plan(cfg).counts.n_total
    assert 1.0 < result.metrics["eval/nll"] < 5.6  # ln 256 = 5.5 before training
    assert "eval/bpb" not in result.metrics
    assert ("eval/exact" in result.metrics) == (cfg.data.format == "seq2seq")
