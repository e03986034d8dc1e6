"""`jaxlm hf import` and `jaxlm hf export`: checkpoints of other tools as run directories, and back."""

from collections.abc import Sequence
from typing import Any

from absl import flags

from jaxlm.errors import UserError, nearest
from jaxlm.verbs import Verb, mesh_of, need


def _flags(values: flags.FlagValues) -> None:
    def string(name: str, default: str | None, text: str) -> None:
        flags.DEFINE_string(name, default, text, flag_values=values)

    string("model", None, "import: a folder with config.json and safetensors, or a GGUF file")
    string("workdir", None, "import: a new run directory; export: the run to write")
    string("out", None, "export: the folder to write")
    string("dtype", "", "import: in which to compute (default float32); export: of the weights")
    string("param_dtype", "", "import: in which to keep the weights; default as in the files")
    string("family", "", "export: model_type; default the one imported, else one that fits")
    string("mesh", "", "import: mesh to put the weights on, such as fsdp=4,tensor=2")
    flags.DEFINE_integer("step", None, "export: which checkpoint; default the newest", flag_values=values)
    flags.DEFINE_boolean("ema", False, "export: the averaged parameters", flag_values=values)


_OWN = {
    "import": ("model", "workdir", "dtype", "param_dtype", "mesh"),
    "export": ("workdir", "out", "dtype", "family", "step", "ema"),
}


def _run(values: flags.FlagValues, positional: Sequence[str], config: Any) -> int:
    from jaxlm.train.imported import export_model, import_model

    if len(positional) != 1 or positional[0] not in _OWN:
        got = " ".join(positional) or "nothing"
        raise UserError(f"jaxlm hf needs one of 'import' and 'export', got {got}{nearest(got, _OWN)}")
    what = positional[0]
    for name in values:
        if values[name].present and name not in _OWN[what]:
            raise UserError(f"jaxlm hf {what} takes no --{name}")
    if what == "import":
        need(values, "hf import", "model", "workdir")
        options = {"dtype": values.dtype} if values.dtype else {}
        mesh = mesh_of(values.mesh)
        done = import_model(
            values.model, values.workdir, param_dtype=values.param_dtype, mesh=mesh, **options
        )
        print(done.text())
        return 0
    need(values, "hf export", "workdir", "out")
    names = ("family", "dtype", "step", "ema")
    family = export_model(values.workdir, values.out, **{name: values[name].value for name in names})
    print(f"{values.out}: a {family} checkpoint")
    return 0


VERBS: dict[str, Verb] = {
    "hf": Verb(
        "Bring in a Hugging Face or GGUF checkpoint as a run directory, or write a run as one.",
        "import --model=DIR_OR_FILE --workdir=DIR | export --workdir=DIR --out=DIR",
        "jaxlm hf import --model=SmolLM2-135M --workdir=runs/smollm2\n"
        "jaxlm hf export --workdir=runs/smollm2 --out=exported",
        _flags,
        _run,
    )
}
