"""From a checkpoint of other tools to a run directory, and back."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxlm.config import RunConfig, TrainConfig, config_hash, diff, to_dict
from jaxlm.data.loader import DataConfig
from jaxlm.errors import UserError, check_choice
from jaxlm.hf.families import FAMILIES, family_of
from jaxlm.hf.family import Family, HFConfig, write_config
from jaxlm.hf.files import TOKENIZER_FILES, read_json
from jaxlm.hf.gguf_files import write_tokenizer
from jaxlm.hf.pretrained import Pretrained, load, save
from jaxlm.model.config import TransformerConfig
from jaxlm.model.models import check_transformer
from jaxlm.sharding import MeshConfig, make_layout
from jaxlm.train.checkpoint import Checkpointer, step_dirs
from jaxlm.train.rundir import RunLock, open_run_dir, write_json
from jaxlm.train.state import TrainState
from jaxlm.train.trained import load_trained
from jaxlm.tree import size

KEPT = ("hf", "config.json")  # where a run directory keeps the config.json that it came with


@dataclasses.dataclass(frozen=True)
class Imported:
    """What an import made."""

    family: str
    workdir: Path
    parameters: int
    tokenizer: bool  # the checkpoint had one
    left: tuple[str, ...] = ()  # tensors of heads of other classes, which stayed in its files

    def text(self) -> str:
        """For people."""
        lines = [f"{self.workdir}: a {self.family} model of {self.parameters:,} parameters"]
        if not self.tokenizer:
            lines.append("no tokenizer file came with it: put tokenizer.json into its folder tokenizer/")
        if self.left:
            lines.append(
                "left in the file, heads of other classes than config.json names: " + ", ".join(self.left)
            )
        return "\n".join(lines)


def import_model(
    path: str | Path,
    workdir: str | Path,
    *,
    dtype: str = "float32",
    param_dtype: str = "",
    mesh: MeshConfig | None = None,
) -> Imported:
    """Make a run directory of a checkpoint: its verbs then work on it, and training can start from it.

    Args:
        path: as for `jaxlm.hf.load`.
        workdir: a new run directory; its one checkpoint has seen 0 updates.
        dtype: in which the model will compute.
        param_dtype: in which the weights are kept; '' = as in the files.
        mesh: where to put the weights on their way; kept in the run's config.

    Raises:
        UserError: the directory holds a checkpoint already; or as `jaxlm.hf.load`.
    """
    path, workdir = Path(path), Path(workdir).absolute()
    if step_dirs(workdir / "checkpoints"):
        raise UserError(f"{workdir} holds a run already; choose another directory")
    mesh = MeshConfig() if mesh is None else mesh
    model = load(path, dtype=dtype, param_dtype=param_dtype, layout=make_layout(mesh))
    workdir.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        has_tokenizer = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    else:
        has_tokenizer = write_tokenizer(path, workdir / "tokenizer")
    data = DataConfig(
        tokenizer=str(workdir / "tokenizer") if has_tokenizer else DataConfig.tokenizer,
        **_rows(model.cfg, model.config),
    )
    prompts = TrainConfig.sample_prompts if data.format == "lm" else ()
    cfg = RunConfig(model=model.cfg, data=data, mesh=mesh, train=TrainConfig(sample_prompts=prompts))
    open_run_dir(workdir, to_dict(cfg), sha256=config_hash(cfg), diff=diff)
    with RunLock(workdir):
        if path.is_dir():
            _copy(path, workdir / "tokenizer")
        workdir.joinpath(*KEPT).parent.mkdir(exist_ok=True)
        write_json(workdir.joinpath(*KEPT), model.config)
        state = TrainState(jnp.zeros((), jnp.int32), model.params, (), jnp.zeros((2,), jnp.uint32))
        with Checkpointer(workdir / "checkpoints") as saver:
            saver.save(0, state, config=to_dict(cfg))
    return Imported(model.family.model_type, workdir, size(model.params), has_tokenizer, model.left)


def _rows(model: TransformerConfig, hf: HFConfig) -> dict[str, Any]:
    """Format and lengths of the rows that such a model can learn from."""
    length = int(hf.get("max_position_embeddings") or 1024)
    length = min(length, model.position.max_length or length, 1024)
    if not model.has_encoder:
        return dict(format="lm" if model.causal else "mlm", seq_len=length)
    ids = {name: hf.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    start = hf.get("decoder_start_token_id")
    named = next((name for name, i in ids.items() if i == start and i is not None), "bos")
    return dict(format="denoise", seq_len=length, input_len=length, decoder_start=named)


def export_model(
    workdir: str | Path,
    out: str | Path,
    *,
    family: str = "",
    dtype: str = "",
    step: int | None = None,
    ema: bool = False,
) -> str:
    """Write the model of a run as a folder that `transformers` loads; returns its family.

    Args:
        workdir: a run directory, imported or trained.
        out: folder to write.
        family: a model_type; '' = the one it was imported from, else the first that can express the model.
        dtype: of the weights; '' = as the run keeps them.
        step, ema: see `load_trained`.

    Raises:
        UserError: no family, or not the given one, has such a model; `out` is not empty.
    """
    workdir, out = Path(workdir).absolute(), Path(out)
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another folder")
    trained = load_trained(workdir, step=step, ema=ema)
    check_transformer(trained.cfg.model, "jaxlm hf export")
    file = _kept_config(workdir, trained.cfg)
    kept = read_json(file) if file else {}
    if family:
        check_choice(family, FAMILIES, "--family")
        kept = kept if kept.get("model_type") == family else {}
        chosen = FAMILIES[family]
    else:
        chosen = family_of(kept) if kept else _first_family(trained.cfg.model)
    if not kept:
        kept = _fresh(chosen, trained.cfg, trained.tokenizer)
    save(Pretrained(trained.cfg.model, trained.params, chosen, kept, trained.layout), out, dtype=dtype)
    _copy(workdir / "tokenizer", out)
    return chosen.model_type


def _kept_config(workdir: Path, cfg: RunConfig) -> Path | None:
    """config.json of the checkpoint that the run is, or that it started from."""
    places = [workdir, *([Path(cfg.train.warm_start)] if cfg.train.warm_start else [])]
    return next((p.joinpath(*KEPT) for p in places if p.joinpath(*KEPT).is_file()), None)


def _first_family(cfg: TransformerConfig) -> Family:
    for family in FAMILIES.values():
        try:
            write_config(family, cfg, {})
        except UserError:
            continue
        return family
    raise UserError(
        "no family has a model with this run's fields; name the nearest with --family to see what differs: "
        + ", ".join(FAMILIES)
    )


def _fresh(family: Family, cfg: RunConfig, tokenizer: Any) -> HFConfig:
    """A config.json for a model that never had one: special tokens and the length that it was trained on."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    hf = write_config(family, cfg.model, {})
    length = {} if "max_position_embeddings" in hf else {"max_position_embeddings": cfg.data.seq_len}
    return {**hf, **ids, **length}


def _copy(source: Path, target: Path) -> None:
    """Tokenizer files, those that are there."""
    found = [name for name in (*TOKENIZER_FILES, "generation_config.json") if (source / name).is_file()]
    if found:
        target.mkdir(parents=True, exist_ok=True)
    for name in found:
        shutil.copyfile(source / name, target / name)
