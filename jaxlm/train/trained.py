"""From a run directory back to its model: load, sample, evaluate."""

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxlm import evaluate as evaluation
from jaxlm.config import RunConfig, load_config
from jaxlm.data.loader import eval_batches
from jaxlm.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from jaxlm.errors import UserError, check
from jaxlm.generate import decode
from jaxlm.model.models import functions
from jaxlm.objectives.formats import check_model
from jaxlm.optim import ema_params, make_schedule
from jaxlm.sharding import Layout, MeshConfig, make_layout, use
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.compilation import counted_compilations
from jaxlm.train.feed import place_batch
from jaxlm.train.periodic import text_generator
from jaxlm.train.programs import Model, optimizer_of
from jaxlm.train.state import abstract_state
from jaxlm.train.warmstart import load_params


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model out of a run directory."""

    cfg: RunConfig
    tokenizer: Tokenizer
    layout: Layout
    params: Any
    step: int  # updates that the parameters have seen
    workdir: Path


def load_trained(
    workdir: str | Path, *, step: int | None = None, mesh: MeshConfig | None = None, ema: bool = False
) -> Trained:
    """Config, tokenizer and parameters of a run.

    Args:
        workdir: a run directory.
        step: which checkpoint; default the newest intact one.
        mesh: where to put the parameters; default the run's own mesh.
        ema: the averaged parameters of a run with `optim.ema`.

    Raises:
        UserError: not a run directory, no (intact) checkpoint, or a mesh larger than the machine.
    """
    workdir = Path(workdir).absolute()
    cfg = load_config(workdir / "config.json")
    kept = workdir / "tokenizer"
    tokenizer = load_tokenizer(str(kept) if kept.is_dir() else cfg.data.tokenizer)
    check_vocabulary(tokenizer, cfg.model.vocab_size)
    mesh = cfg.mesh if mesh is None else mesh
    layout = make_layout(mesh)
    model = functions(cfg.model)
    init = partial(model.init, cfg.model)
    tokens = cfg.data.batch_size * cfg.data.seq_len
    optimizer = optimizer_of(cfg.model, cfg.optim, make_schedule(cfg.optim, cfg.train.num_steps, tokens))
    target, _ = abstract_state(init, optimizer, layout=layout, table=model.AXES)
    if ema:
        check(cfg.optim.ema > 0, f"{workdir} keeps no averaged parameters (optim.ema=0)")
        restored = Checkpointer(workdir / "checkpoints").restore(target, step=step)
        if restored is None:
            raise UserError(f"{workdir} has no checkpoint")
        return Trained(cfg, tokenizer, layout, ema_params(restored.state.opt_state), restored.step, workdir)
    params, report = load_params(workdir, target.params, step=step)
    return Trained(cfg, tokenizer, layout, params, int(report.path.name), workdir)


def sample(
    workdir: str | Path,
    prompts: Sequence[str],
    *,
    step: int | None = None,
    mesh: MeshConfig | None = None,
    ema: bool = False,
    **changes: Any,
) -> list[decode.Result]:
    """Continue `prompts` with the model of a run.

    Args:
        workdir, step, mesh, ema: see `load_trained`.
        prompts: texts; '' starts a document. With an encoder, what it reads: the result is the answer.
        changes: fields of `SampleConfig` that differ from the run's `sample`. Text i has the seed `seed + i`.
    """
    trained = load_trained(workdir, step=step, mesh=mesh, ema=ema)
    if "stop" in changes:
        changes["stop"] = tuple(changes["stop"])
    cfg = dataclasses.replace(trained.cfg.sample, **changes)
    run = trained.cfg
    generator = text_generator(run.model, run.data, trained.tokenizer, trained.layout)
    with _cache_beside(trained):
        return generator.generate_text(trained.params, list(prompts), cfg)


def evaluate(
    workdir: str | Path,
    *,
    data: str = "",
    batch_size: int = 0,
    per_position: bool = False,
    step: int | None = None,
    mesh: MeshConfig | None = None,
    ema: bool = False,
) -> evaluation.EvalResult:
    """Score the model of a run on held-out text.

    Args:
        workdir, step, mesh, ema: see `load_trained`.
        data: glob of the text, all of it; default the run's `data.eval`.
        batch_size: rows at a time, does not change the result; 0 = the run's, made to fit the mesh.
        per_position: also the loss by position in the document; so does the run's `loss.per_position`.
    """
    trained = load_trained(workdir, step=step, mesh=mesh, ema=ema)
    return score(trained, data=data, batch_size=batch_size, per_position=per_position)


def score(
    trained: Trained, *, data: str = "", batch_size: int = 0, per_position: bool = False
) -> evaluation.EvalResult:
    """Score a loaded model; arguments as of `evaluate`."""
    cfg, layout, tokenizer = trained.cfg, trained.layout, trained.tokenizer
    check_model(cfg.model, cfg.data)
    multiple = layout.row_multiple
    if batch_size % multiple:
        raise UserError(
            f"batch_size={batch_size} is not divisible by the {multiple} mesh devices along the batch"
            + (" times the pipeline's microbatches a device" if layout.stages > 1 else "")
        )
    rows = batch_size or -(-cfg.data.batch_size // multiple) * multiple
    chosen = dataclasses.replace(cfg.data, eval=data, eval_tokens=0) if data else cfg.data
    with use(layout), _cache_beside(trained):
        cached = dict(cache_dir=trained.workdir.parent / "data_cache", vocab_size=cfg.model.vocab_size)
        batches = eval_batches(chosen, tokenizer, rows, **cached)
        loss = dataclasses.replace(cfg.loss, per_position=per_position or cfg.loss.per_position)
        what = (tokenizer.token_bytes, cfg.data.format)
        eval_step = evaluation.make_eval_step(Model(cfg.model), loss, *what)
        return evaluation.evaluate(
            eval_step,
            trained.params,
            batches,
            place=partial(place_batch, layout),
            num_tokens=batches.num_tokens,
            num_bytes=batches.num_bytes,
        )


def _cache_beside(trained: Trained) -> contextlib.AbstractContextManager:
    """The compilation cache that training used, if it did."""
    used = trained.cfg.train.compilation_cache
    return counted_compilations(trained.workdir.parent / "compilation_cache" if used else None)
