"""The import law: rooms see only what stands to their left, wherever in a file the import is written."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxlm"

# Room -> rooms that it may import besides itself. Left to right: L0, L1, L2, L3, L4.
L0 = {
    "__init__",
    "chips",
    "master_weights",
    "errors",
    "tree",
    "weights",
    "sharding",
    "stack",
    "transforms",
    "layerwise",
    "mesh_rules",
    "pipeline",
    "distributed",
    "quant",
}
L1 = {"model", "data", "optim"}
L2 = {"objectives", "generate", "scaling"}
HF = {"hf"}  # between L2 and L3: what it loads can also generate
L3 = {"evaluate", "train"}
ALLOWED = {
    **dict.fromkeys(L0 | L1, L0),
    **dict.fromkeys(L2, L0 | L1),
    **dict.fromkeys(HF, L0 | L1 | {"generate"}),
    **dict.fromkeys(L3, L0 | L1 | L2 | L3),
}
# The assembler, what reads a run directory, the configs, sweeps, preflights and the command see every room.
TOP = {
    "config",
    "train/run",
    "train/trained",
    "train/branch",
    "train/checks",
    "cli",
    "verbs",
    "lab_verbs",
    "preflight_verbs",
    "hf_verbs",
    "train/imported",
    "__main__",
}
TOP |= {f"{name}/{path.stem}" for name in ("sweep", "preflight") for path in (PACKAGE / name).glob("*.py")}
# The rest of scaling, which fits laws to tables, runs on numpy and scipy and sees only itself and the errors.
WITH_JAX = {"scaling/counting", "scaling/count_tables"}
WITH_JAX |= {"scaling/memory", "scaling/recurrent", "scaling/working_set"}
FOREIGN = {"experiments", "tools", "tests"}


def modules() -> dict[str, Path]:
    """'train/step' -> file."""
    return {str(p.relative_to(PACKAGE).with_suffix("")): p for p in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere in it, functions included; TYPE_CHECKING blocks too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full, not relative ones"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(name: str, known: dict[str, Path]) -> str | None:
    """The module of ours that a dotted import reads: 'jaxlm.train.step.make_step' -> 'train/step'."""
    parts = name.split(".")
    if parts[0] != "jaxlm":
        return None
    for end in range(len(parts), 1, -1):
        path = "/".join(parts[1:end])
        if path in known:
            return path
        if f"{path}/__init__" in known:
            return f"{path}/__init__"
    return "__init__"


def edges() -> dict[str, set[str]]:
    known = modules()
    return {m: {module_of(name, known) for name in imports(path)} - {None, m} for m, path in known.items()}


def test_fitting_laws_needs_no_jax():
    graph = edges()
    fit_side = {m for m in graph if room(m) == "scaling"} - WITH_JAX
    bad = {m: graph[m] - fit_side - {"__init__", "errors"} for m in fit_side}
    assert not any(bad.values()), bad
    code = (
        "import sys; import jaxlm.scaling.fit_table, jaxlm.scaling.report, jaxlm.scaling.selftest\n"
        "heavy = {'jax', 'flax', 'orbax', 'grain'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def room(module: str) -> str:
    return module.split("/")[0]


def violations(graph: dict[str, set[str]]) -> list[str]:
    out = []
    for module, targets in graph.items():
        if module in TOP:
            continue
        for target in targets:
            same_room = room(target) == room(module) and target not in TOP
            if not same_room and (target in TOP or room(target) not in ALLOWED[room(module)]):
                out.append(f"{module} imports {target}")
    return sorted(out)


def test_every_module_has_a_place():
    homeless = {m for m in modules() if m not in TOP and room(m) not in ALLOWED}
    assert not homeless, f"say in ALLOWED what {homeless} may import"


def test_imports_point_left():
    assert violations(edges()) == []


def test_there_is_no_cycle_of_modules():
    graphlib.TopologicalSorter(edges()).prepare()


def test_nothing_in_the_library_imports_experiments_or_tools():
    bad = [
        f"{module}: {name}"
        for module, path in modules().items()
        for name in imports(path)
        if name.split(".")[0] in FOREIGN
    ]
    assert bad == []


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("model/attention", "data/loader"),
        ("optim", "model/transformer"),
        ("sharding", "model/transformer"),
        ("objectives/lm", "train/step"),
        ("train/loop", "train/run"),
        ("model/transformer", "config"),
        ("train/loop", "sweep/plan"),
        ("scaling/counting", "train/loop"),
    ],
)
def test_the_law_sees_a_violation(module, target):
    graph = edges()
    assert module in graph
    assert target in graph
    assert violations({**graph, module: graph[module] | {target}}) == [f"{module} imports {target}"]


def test_help_needs_no_jax():
    """`jaxlm VERB --help` and a misspelt flag answer before anything heavy is imported."""
    code = (
        "import sys; from jaxlm.cli import main\n"
        "assert main(['train', '--help']) == 0 and main(['train', '--workdri=x']) == 2\n"
        "heavy = {'jax', 'flax', 'orbax', 'grain', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
