"""The console command, called in this process: help, nearest names, one line and exit code 2 on bad input."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxlm import cli
from jaxlm.cli import main
from jaxlm.config import build, config_hash, load_experiment
from jaxlm.train.rundir import RunLock
from jaxlm.verbs import VERBS

ROOT = Path(__file__).parents[1]
SMOKE = f"--config={ROOT}/experiments/base.py:smoke"


@pytest.fixture
def run(capsys):
    """`run(*words)` -> (exit code, stdout, stderr)."""

    def call(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def refused(run, tmp_path):
    """Runs a command that must be refused: exit code 2, one message, no traceback; returns the message."""

    def call(*words):
        code, out, err = run(*words)
        assert code == 2, (out, err)
        message = err.split("jaxlm: ")[-1]
        assert err.count("jaxlm: ") == 1
        assert "Traceback" not in err
        return message.strip()

    return call


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        text = " ".join(rng.choice(["the", "cat", "sat", "on", "mats"], 3000))
        (tmp_path / f"{name}.txt").write_text(text)
    return tmp_path


# ------------------------------------------------------------------------------------------------------ help


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_the_overview_lists_every_verb(run, words):
    code, out, _ = run(*words)
    assert code == 0
    for name, verb in VERBS.items():
        assert name in out
        assert verb.summary in out


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_fits_a_screen_and_shows_its_flags(run, verb):
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert out.startswith(f"usage: jaxlm {verb} ")
    assert "example:\n  jaxlm " in out
    assert len(out.splitlines()) < 40
    assert max(map(len, out.splitlines())) <= 120
    from absl import flags

    values = flags.FlagValues()
    VERBS[verb].define(values)
    for name in values:
        assert f"--{name}" in out or f"--[no]{name}" in out


def test_the_version_is_printed(run):
    code, out, _ = run("--version")
    assert (code, out.count(".")) == (0, 2)


# ------------------------------------------------------------------------------------ names, before any work


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trian",), "there is no verb 'trian'; did you mean 'train'?"),
        (("train", "--wrkdir=x"), "jaxlm train has no flag --wrkdir; did you mean 'workdir'?"),
        (("train", SMOKE), "jaxlm train needs --workdir"),
        (("train", SMOKE, "--workdir=x", "word"), "jaxlm train takes flags only, got 'word'"),
        (("train", "--config=nowhere/x.py", "--workdir=x"), "there is no file nowhere/x.py"),
        (("train", f"--config={ROOT}/experiments/bse.py"), "base.py'"),
        (("train", "--config"), "--config needs a value"),
        (
            ("train", SMOKE.replace("smoke", "smok")),
            "'smok' is not one of 'full', 'smoke'; did you mean 'smoke'?",
        ),
        (("train", SMOKE, "--config.model.num_layrs=3"), "model.num_layrs; did you mean 'model.num_layers'?"),
        (("train", SMOKE, "--config.lr=3"), "unknown key lr; did you mean 'optim.lr'?"),
        (
            ("train", SMOKE, "--config.model.num_layers=three"),
            "config.model.num_layers=three: invalid literal for int()",
        ),
        (
            ("train", SMOKE, "--config.optim.lr=fast"),
            "config.optim.lr=fast: could not convert string to float",
        ),
        (("train", SMOKE, "--config.model.scan=maybe"), "config.model.scan=maybe"),
        (("sample", "--config.seed=1"), "jaxlm sample takes no config"),
        (("sample",), "jaxlm sample needs --workdir"),
        (("sample", "--workdir=/nowhere"), "/nowhere is not a run directory"),
        (("evaluate", "--workdir=/nowhere"), "/nowhere is not a run directory"),
        (("evaluate", "--batch_size=-1", "--workdir=x"), "batch_size=-1"),
        (
            ("train", SMOKE, "--config.model.forget_bias=2"),
            "this experiment's model has no field 'forget_bias'",
        ),
        (("evaluate", "--mesh=fdsp=2", "--workdir=x"), "unknown key --mesh.fdsp; did you mean 'fsdp'?"),
        (("evaluate", "--mesh=fsdp=two", "--workdir=x"), "--mesh.fsdp: expected int, got 'two'"),
        (("config", "--devices=0"), "devices=0"),
        (("config", "--devices=8", "--preset=TPU v5 x 64"), "--devices=8: --preset says how many"),
        (("config", SMOKE, "--config.seed=-1"), "seed=-1 must be in [0, 2**32)"),
        (("sample", "--workdir=x", "--prompt=a\udcff"), "is not UTF-8"),
        (("tokenizer",), "needs one of 'train' and 'inspect', got nothing"),
        (("tokenizer", "inspekt"), "got inspekt; did you mean 'inspect'?"),
        (("tokenizer", "inspect"), "jaxlm tokenizer inspect needs --tokenizer"),
        (("prepare", "--out=x", "--tokenizer=byte"), "jaxlm prepare needs --input"),
    ],
)
def test_a_wrong_word_is_refused_with_the_nearest(refused, words, message):
    found = refused(*words)
    assert message in found
    assert "\n" not in found


# --------------------------------------------------------------------------- bad input, before work is spent


def bad_tokenizer(folder):
    (folder / "tokenizer.model").write_text("this is no protocol buffer")


def empty_text(folder):
    (folder / "empty.txt").write_text("")


def corrupt_shard(folder):
    assert main(["prepare", f"--input={folder}/a.txt", f"--out={folder}/shards", "--tokenizer=byte"]) == 0
    (shard,) = (folder / "shards").glob("*.bin")
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize(
    ("prepare", "words", "message"),
    [
        (None, ("model.attention.num_kv_heads=3",), "num_kv_heads=3 must divide num_heads=4; valid: 1, 2, 4"),
        (None, ("model.model_dim=66",), "model.model_dim=66 is not divisible by model.attention.num_heads=4"),
        (
            None,
            ("data.batch_size=12", "mesh.data=8"),
            "data.batch_size=12 is not divisible by train.microbatches=1 x 8",
        ),
        (None, ("mesh.data=2", "mesh.fsdp=8"), "mesh data=2 x fsdp=8 needs 16 devices"),
        (None, ("mesh.data=1", "mesh.tensor=8"), "which the mesh (tensor=8) does not divide"),
        (
            None,
            ("model.vocab_size=255",),
            "tokenizer 'byte' has 256 tokens, but the model's vocab_size is 255",
        ),
        (None, ("data.train={}/c.txt",), "c.txt"),
        (None, ("data.eval={}/nothing/*.txt",), "nothing/*.txt"),
        (empty_text, ("data.train={}/empty.txt",), "no documents"),
        (corrupt_shard, ("data.train={}/shards",), "shards"),
        (
            bad_tokenizer,
            ("data.tokenizer={}/tokenizer.model",),
            "tokenizer.model is not a SentencePiece model",
        ),
        (
            None,
            ("data.tokenizer=byt",),
            "'byt' is not 'byte', a SentencePiece *.model or a Hugging Face *.json; did you",
        ),
        (
            None,
            ("model.mlp_pattern=('dense','moee')",),
            "'moee' is not one of 'dense', 'moe'; did you mean 'moe'?",
        ),
    ],
)
def test_bad_input_is_refused(refused, corpus, capsys, prepare, words, message):
    if prepare is not None:
        prepare(corpus)
        capsys.readouterr()
    overrides = [f"--config.{word.format(corpus)}" for word in words]
    base = [f"--config.data.train={corpus}/a.txt", f"--config.data.eval={corpus}/b.txt"]
    found = refused("train", SMOKE, f"--workdir={corpus}/run", *base, *overrides)
    assert message in found
    assert len(found.splitlines()) == 1
    assert not (corpus / "run" / "checkpoints").exists()


def test_a_directory_that_cannot_be_written_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write to" in refused("train", SMOKE, f"--workdir={tmp_path}/file/run")


def test_a_full_disk_is_refused(refused, tmp_path, monkeypatch):
    """The disk must take one checkpoint at least: known before the first step."""
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    found = refused("train", SMOKE, f"--workdir={tmp_path}/run")
    assert "the disk has 0.00 GB free, one checkpoint needs" in found


def test_a_second_process_in_the_directory_is_refused(refused, tmp_path):
    (tmp_path / "run").mkdir()
    with RunLock(tmp_path / "run"):
        assert "is in use by process" in refused("train", SMOKE, f"--workdir={tmp_path}/run")


def test_another_config_is_refused_with_the_diff(refused, tmp_path):
    from jaxlm.config import to_dict
    from jaxlm.train.rundir import open_run_dir

    cfg = build(load_experiment(SMOKE.removeprefix("--config=")))
    workdir = open_run_dir(tmp_path / "run", to_dict(cfg), sha256=config_hash(cfg), diff=lambda old, new: [])
    (workdir / "metrics.jsonl").write_text('{"step": 1}\n')
    found = refused(
        "train", SMOKE, f"--workdir={workdir}", "--config.optim.lr=0.5", "--config.train.log_every=3"
    )
    assert "optim.lr: 0.002 -> 0.5" in found
    assert "log_every" not in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "x.py:1: invalid syntax"),
        ("import nosuch", "cannot be imported: No module named"),
    ],
)
def test_an_experiment_that_is_not_python_is_refused(refused, tmp_path, text, message):
    (tmp_path / "x.py").write_text(text)
    assert message in refused("config", f"--config={tmp_path}/x.py")


def test_a_folder_of_other_files_is_no_run_directory(refused, corpus):
    assert "is not a run directory, but holds 'a.txt' and 1 more" in refused(
        "train", SMOKE, f"--workdir={corpus}", f"--config.data.train={corpus}/*.txt"
    )
    assert sorted(p.name for p in corpus.iterdir() if p.suffix) == ["a.txt", "b.txt", "run.lock"]


def test_debug_shows_the_traceback(run):
    code, _, err = run("train", SMOKE, "--workdir=x", "--config.model.num_layrs=3", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert err.strip().splitlines()[-1].startswith("jaxlm: config: unknown key")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_cpu_process_restarts_once_with_huge_pages(monkeypatch, tmp_path):
    calls = []
    policy = tmp_path / "enabled"
    policy.write_text("always [madvise] never")
    monkeypatch.setattr(cli, "_HUGE_PAGES", policy)
    monkeypatch.setattr(cli.os, "execve", lambda *args: calls.append(args))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.rtld.nns=5")
    for words in (["train", "--help"], ["config"], [], ["prepare", "train"]):
        cli._restart_with_huge_pages(words)
    assert calls == []
    cli._restart_with_huge_pages(["train", "--workdir=x"])
    ((program, words, env),) = calls
    assert program == words[0] == sys.executable
    assert words[1:] == sys.orig_argv[1:]
    assert env["GLIBC_TUNABLES"] == f"glibc.rtld.nns=5:{cli.MALLOC}"
    monkeypatch.setenv("GLIBC_TUNABLES", env["GLIBC_TUNABLES"])
    cli._restart_with_huge_pages(["train", "--workdir=x"])
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    policy.write_text("always madvise [never]")
    cli._restart_with_huge_pages(["train", "--workdir=x"])
    assert len(calls) == 1


# -------------------------------------------------------------------------------------- verbs that only look


def test_config_prints_the_run_and_its_cost(run):
    code, out, _ = run(
        "config", f"--config={ROOT}/experiments/llama_8b.py", "--devices=64", "--sharding", "--config.seed=7"
    )
    assert code == 0
    for part in (
        "seed = 7",
        "8,030,261,248",
        "51,470,401,536",
        "opt_state",
        "fsdp=32 x tensor=2",
        "hash ",
    ):
        assert part in out
    (row,) = [line for line in out.splitlines() if "blocks/0/mlp/w_down" in line]
    for cell in ("32 x 14336 x 4096", "layers mlp embed", "-, tensor, fsdp", "117,440,512"):
        assert cell in row


def test_config_as_json_is_the_config(run):
    code, out, _ = run("config", SMOKE, "--json", "--config.optim.lr=0.25")
    assert code == 0
    cfg = build(json.loads(out))
    assert cfg.optim.lr == 0.25
    assert cfg.model.num_layers == 2


def test_a_preset_is_applied_and_printed_as_overrides_and_json_is_json_alone(run):
    words = ("config", SMOKE, "--preset=TPU v5 x 4", "--config.data.batch_size=4")
    code, out, _ = run(*words)
    assert code == 0
    assert "--config.mesh.fsdp=-1" in out.splitlines()
    assert "mesh fsdp=4; " in out
    code, out, _ = run(*words, "--json")
    assert code == 0
    assert build(json.loads(out)).model.remat == "full"


@pytest.mark.parametrize("words", [("--config.mesh=auto",), ("--config.mesh", "auto")])
def test_a_mesh_left_to_the_command_is_resolved(run, words):
    code, out, _ = run("config", SMOKE, *words)
    assert code == 0
    assert "mesh.auto = False" in out
    assert "mesh data=8; " in out
    code, _, err = run("config", SMOKE, "--config.mesh=auto", "--preset=TPU v5 x 4")
    assert code == 2
    assert "both choose a mesh" in err


def test_overrides_take_every_kind_of_value(run):
    words = [
        "model.attention.window=8",
        "model.attention.pattern=('local','global')",
        "model.mlp_pattern=dense,dense",
        "model.tie_embeddings=true",
    ]
    words += [
        "data.train=a/*.txt=2,b/*.txt=1",
        "sample.stop=END",
        "optim.lr=1",
        "model.attention.num_heads 8",
    ]
    flags = [part for word in words for part in f"--config.{word}".split(" ")]
    code, out, _ = run("config", "--json", *flags, "--noconfig.model.scan")
    assert code == 0
    cfg = build(json.loads(out))
    assert cfg.model.attention.pattern == ("local", "global")
    assert cfg.model.mlp_pattern == ("dense", "dense")
    assert (cfg.model.attention.window, cfg.model.attention.num_heads) == (8, 8)
    assert cfg.model.tie_embeddings
    assert not cfg.model.scan
    assert cfg.data.train == "a/*.txt=2,b/*.txt=1"
    assert cfg.sample.stop == ("END",)
    assert cfg.optim.lr == 1.0


def test_a_tokenizer_is_trained_and_inspected(run, corpus):
    path = corpus / "t.model"
    code, out, _ = run("tokenizer", "train", f"--input={corpus}/*.txt", f"--out={path}", "--vocab_size=280")
    assert code == 0
    trained = json.loads(out)
    assert trained["lossless"]
    code, out, _ = run("tokenizer", "inspect", f"--tokenizer={path}", "--text=the cat")
    assert code == 0
    report = json.loads(out)
    assert report["fingerprint"] == trained["fingerprint"]
    assert report["bytes"] == 7
    assert report["tokens"] < 7


def test_text_is_prepared_into_shards(run, corpus):
    code, out, err = run("prepare", f"--input={corpus}/*.txt", f"--out={corpus}/shards", "--tokenizer=byte")
    assert code == 0
    assert "2 documents" in out
    assert "complete" in out
    assert "1/1 shards" in err
    code, out, err = run("prepare", f"--input={corpus}/*.txt", f"--out={corpus}/shards", "--tokenizer=byte")
    assert (code, err) == (0, "")


# ----------------------------------------------------------------------------------------------- a whole run


@pytest.fixture
def finished(run, corpus):
    """A run of a few steps, made through the command line."""
    words = ["train", SMOKE, f"--workdir={corpus}/run", f"--config.data.train={corpus}/a.txt", "--nobar"]
    words += [f"--config.data.eval={corpus}/b.txt", "--config.train.num_steps=4", "--config.mesh.data=1"]
    words += ["--config.model.num_layers=1", "--config.train.sample_prompts=()"]
    code, out, err = run(*words)
    assert code == 0, err
    assert "finished at step 4" in out
    assert "eval/nll" in out
    return corpus / "run"


def test_train_evaluate_sample(run, finished, corpus):
    result = json.loads((finished / "result.json").read_text())
    code, out, _ = run("evaluate", f"--workdir={finished}", "--batch_size=4", "--per_position")
    assert code == 0
    scored = json.loads(out)
    assert scored["step"] == result["steps"]
    assert scored["nll"] == pytest.approx(result["eval/nll"], rel=1e-6)
    assert len(scored["nll_by_position"]) == 64
    code, out, _ = run("evaluate", f"--workdir={finished}", f"--data={corpus}/a.txt")
    assert code == 0
    assert json.loads(out)["bytes"] == len((corpus / "a.txt").read_text())
    words = [
        "--prompt=the",
        "--prompt=a cat",
        "--num=2",
        "--max_new_tokens=6",
        "--temperature=0",
        "--mesh=data=1",
    ]
    code, out, _ = run("sample", f"--workdir={finished}", *words)
    assert code == 0
    texts = out.split("--- ")[1:]
    assert len(texts) == 4
    assert texts[0].split("\n", 1)[1].strip() == texts[1].split("\n", 1)[1].strip()
    assert texts[2].splitlines()[1].startswith("a cat")
