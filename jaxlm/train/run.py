"""The assembler: from a frozen config to a trained model, and from a run directory back to its model.

runs/name/config.json      the config, its hash, and one entry per start: commit, packages, host, command
          metrics.jsonl    one JSON object per logged step
          events/          the same for TensorBoard
          checkpoints/     see jaxlm.train.checkpoint
          samples.txt      texts written along the way
          loss.png         the curve
          result.json      how it ended: `Result`
runs/data_cache/           token shards of raw text, for all runs beside each other
runs/compilation_cache/    compiled programs, likewise
"""

import contextlib
import dataclasses
import functools
import json
import math
import resource
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from jaxlm.chips import peak_flops
from jaxlm.config import RunConfig, config_hash, diff, identity, to_dict
from jaxlm.data.loader import Loader, eval_batches, make_dataset, prefetch
from jaxlm.data.tokenizer import check_vocabulary, load_tokenizer
from jaxlm.distributed import AgreedStop, chief_first, from_chief, is_chief
from jaxlm.errors import UserError
from jaxlm.evaluate import evaluate
from jaxlm.model.models import ModelConfig, functions
from jaxlm.model.recurrence import LSTMConfig
from jaxlm.optim import OptimConfig, ema_params, make_schedule
from jaxlm.scaling import counting, recurrent
from jaxlm.scaling.memory import Memory
from jaxlm.scaling.memory import memory as transformer_memory
from jaxlm.sharding import MESH_AXES, Layout, LeafLayout, MeshConfig, describe, make_layout, use
from jaxlm.train.branch import Branch, find_branch, restore_branch
from jaxlm.train.checkpoint import Checkpointer, step_dirs
from jaxlm.train.checks import check_shapes, check_tokens
from jaxlm.train.compilation import counted_compilations
from jaxlm.train.feed import own_rows, place_batch
from jaxlm.train.loop import Every, NonFiniteError, StopSignals, train_loop
from jaxlm.train.metrics import (
    Clock,
    Console,
    JsonlWriter,
    Reporter,
    TensorBoardWriter,
    format_seconds,
    read_rows,
)
from jaxlm.train.noise_scale import NoiseScale, choose_parts, make_part_squares
from jaxlm.train.periodic import Profile, Samples, text_generator
from jaxlm.train.plot import plot_loss
from jaxlm.train.programs import learning_rates, numbers_of, optimizer_of, programs, shape_of
from jaxlm.train.rundir import RunLock, open_run_dir, probe_writable, write_json
from jaxlm.train.state import TrainState, abstract_state, replace_params
from jaxlm.train.warmstart import load_params
from jaxlm.tree import combine, nbytes


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run stands when `train` returns; `result.json` holds the same."""

    status: str  # finished | stopped (by a signal; the same command goes on) | failed
    reason: str  # why it did not finish
    workdir: str
    config_hash: str
    steps: int  # updates of the parameters, those of earlier starts and of the trunk included
    tokens: int  # positions that they saw: steps * B * T
    flops: float  # exact training FLOPs of those tokens
    metrics: Mapping[
        str, float | None
    ]  # the newest value of every metric: eval/nll, eval/bpb, train/nll, ...
    counts: Mapping[str, Any]  # parameters and FLOPs per token under every convention, see counting.Counts
    mesh: Mapping[str, int]
    device: str
    seconds: Mapping[str, float]  # wall time of this start by cause: init, compile, step, eval, ...
    compilation: Mapping[str, Any]  # programs, seconds, hits of the persistent cache
    peak_rss_bytes: int  # of this process
    branch: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # see `Branch.account`; {} = none
    cut: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of both sets, see `Dataset.cut`

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `eval/nll` and the other metrics stand at the top level."""
        tree = dataclasses.asdict(self)
        return {**{k: v for k, v in tree.items() if k != "metrics"}, **tree["metrics"]}

    def text(self) -> str:
        """What a person wants to know at the end."""
        head = f"{self.status} at step {self.steps:,} after {self.tokens:,} tokens"
        lines = [head + (f" ({self.reason})" if self.reason else "")]
        of_text = not {"eval/bpb", "train/bpb"}.isdisjoint(self.metrics)
        nats = f"nats per {'token' if of_text else 'prediction'}"
        units = {"eval/nll": nats, "eval/bpb": "bits per byte", "train/nll": nats}
        if not of_text:
            units |= {"eval/accuracy": "of them right", "eval/label_accuracy": "of the labels right"}
            units |= {"eval/exact": "of the answers right to the end"}
        known = {name: self.metrics[name] for name in units if self.metrics.get(name) is not None}
        lines += [f"{name:9} {value:.4f} {units[name]}" for name, value in known.items()]
        spent = sorted(self.seconds.items(), key=lambda item: -item[1])
        shares = [f"{cause} {format_seconds(seconds)}" for cause, seconds in spent if seconds >= 0.5]
        lines.append(f"time      {', '.join(shares)}")
        names = ("checkpoints", "metrics.jsonl", "samples.txt", "loss.png", "result.json")
        there = [name for name in names if (Path(self.workdir) / name).exists()]
        lines.append(f"files     {self.workdir}/ ({', '.join(there)})")
        return "\n".join(lines)


def train(
    cfg: RunConfig,
    workdir: str | Path,
    *,
    bar: bool | None = None,
    stop: Callable[[int], str] = lambda step: "",
) -> Result:
    """Train the model that `cfg` describes, or go on with the run that `workdir` holds.

    Args:
        cfg: the whole run; `jaxlm.config.build` makes it.
        workdir: the run directory; made if it is not there.
        bar: draw a progress bar; default: on a terminal.
        stop: asked after every step, and once more before the result is written: a reason ends the run like a
            signal, with a checkpoint; what it raises ends it at once, and no result is written.

    Raises:
        UserError: bad input, before any work is spent; a directory that is in use or holds another run.
        NonFiniteError: too many updates in a row were not finite.
    """
    # On a CPU the host's cores are the device: a step that runs while the host queues the next one is a tenth
    # slower. Read when the backend starts, so it comes first; other platforms do not know it.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    clock, workdir, chief = Clock(), Path(workdir).absolute(), is_chief()
    run, starting = contextlib.ExitStack(), contextlib.ExitStack()
    with run, starting:
        starting.enter_context(clock.spend("init"))

        # ------------------------------------------------------------------------------------- run directory
        def take() -> tuple[Result | None, Branch | None]:
            probe_writable(workdir)
            run.enter_context(RunLock(workdir))
            _forget_unstarted(workdir)
            same = lambda old, new: diff(identity(old), identity(new))  # noqa: E731
            open_run_dir(workdir, to_dict(cfg), sha256=config_hash(cfg), diff=same)
            ended = _read_result(workdir)
            if ended is not None and ended.status == "finished":
                print(f"{workdir} holds this run, and it is finished", file=sys.stderr)
                return ended, None
            fresh = cfg.train.branch_from and not step_dirs(workdir / "checkpoints")
            return None, find_branch(cfg, workdir) if fresh else None

        ended, branch = from_chief(take)
        if ended is not None:
            return ended
        cache_dir = workdir.parent / "compilation_cache" if cfg.train.compilation_cache else None
        compiled = run.enter_context(counted_compilations(cache_dir))

        # ---------------------------------------------------------------------------------------------- mesh
        layout = make_layout(cfg.mesh)
        run.enter_context(use(layout))
        check_shapes(cfg, layout)
        rows = own_rows(layout, cfg.data.batch_size)
        place = partial(place_batch, layout, batch_size=cfg.data.batch_size, rows=rows)

        # ----------------------------------------------------------------------------------------- programs
        # Shapes alone, so that what does not fit is refused before any text is tokenised.
        tokenizer = chief_first(lambda: load_tokenizer(cfg.data.tokenizer))
        check_vocabulary(tokenizer, cfg.model.vocab_size)
        check_tokens(cfg, tokenizer)
        # Loss by position is a question for `evaluate`: the rows of a run hold numbers.
        loss = dataclasses.replace(cfg.loss, per_position=False)
        shared = dict(
            microbatches=cfg.train.microbatches,
            token_bytes=tokenizer.token_bytes,
            data_format=cfg.data.format,
        )
        device = programs(cfg.model, loss, cfg.optim, cfg.mesh, **shared)
        counts = counting.count(cfg.model, cfg.data.seq_len, cfg.data.input_len)
        tokens_per_step = cfg.data.batch_size * cfg.data.seq_len
        rates = learning_rates(cfg.optim, cfg.train.num_steps, tokens_per_step)
        from_chief(lambda: probe_writable(workdir, need_bytes=nbytes(device.target)))

        # ---------------------------------------------------------------------------------------------- data
        if chief:
            _keep_tokenizer(cfg.data.tokenizer, workdir / "tokenizer")
        cached = dict(
            cache_dir=workdir.parent / "data_cache",
            vocab_size=cfg.model.vocab_size,
            progress=_print_preparation,
        )
        with clock.spend("prepare"):
            dataset = chief_first(lambda: make_dataset(cfg.data, tokenizer, **cached))
            held_out = None
            if cfg.data.eval:
                held_out = chief_first(lambda: eval_batches(cfg.data, tokenizer, rows=rows, **cached))
        cut = dataset.cut() | (held_out.dataset.cut() if held_out else {})
        loader = Loader(dataset, cfg.data, rows=rows)

        # --------------------------------------------------------------------------------------------- state
        saver = run.enter_context(
            Checkpointer(
                workdir / "checkpoints",
                keep_last=cfg.train.keep_last,
                keep_best=cfg.train.keep_best,
                keep_period=cfg.train.keep_period,
                keep_steps=cfg.train.save_steps,
            )
        )
        restored = saver.restore(device.target, quarantine=chief)
        if restored is not None:
            state, start = restored.state, restored.step
            _check_same_data(restored.data, dataset.fingerprint, workdir)
            branch = Branch.from_dict(restored.data.get("branch"))
        elif branch is not None:
            state, start = restore_branch(branch, device.target, dataset.fingerprint), branch.step
        else:
            (state, _), start = device.new_state(cfg.seed), 0
            if cfg.train.warm_start:
                params, report = load_params(
                    cfg.train.warm_start,
                    device.target.params,
                    rename=cfg.train.warm_start_rename,
                    allow_missing=cfg.train.warm_start_missing,
                )
                if chief:
                    print(report.text(), file=sys.stderr)
                optimizer = optimizer_of(cfg.model, cfg.optim, lambda count: 0.0)
                state = replace_params(state, combine(params, state.params), optimizer)

        # ----------------------------------------------------------------------------------------- reporting
        console = Console(cfg.train.num_steps, start, bar=bar, quiet=not chief)
        writers = [console]
        if chief:
            writers.append(JsonlWriter(workdir / "metrics.jsonl", start))
            writers.append(TensorBoardWriter(workdir / "events", start))
            earlier = read_rows(workdir / "metrics.jsonl")  # of earlier starts, up to the checkpoint
        reporter = Reporter(
            writers,
            tokens_per_step=tokens_per_step,
            flops_per_token=counts.flops_train,
            peak=cfg.train.peak_flops or peak_flops(jax.devices()[0].device_kind),
            num_devices=layout.mesh.size,
        )
        run.callback(reporter.close)
        for row in earlier if chief else ():
            reporter.last |= {name: math.nan if x is None else x for name, x in row.items()}
        console.log(
            f"{workdir.name} (config {config_hash(cfg)[:12]}): {counts.n_total:,} parameters, "
            f"{tokens_per_step:,} tokens a step, {layout.mesh.size} x {jax.devices()[0].device_kind}"
            + (f"; going on at step {start} of {cfg.train.num_steps}" if start else "")
        )
        for glob, n in cut.items():
            console.log(f"{glob}: {n['cut']:,} of {n['pairs']:,} rows hold only the beginning of their text")

        # ------------------------------------------------------------------------------------- periodic work
        scored, scored_at = {}, -1  # by the newest evaluation, and after which step that was

        def evaluate_now(done: int, state: TrainState) -> dict[str, float]:
            nonlocal scored, scored_at
            models = {"eval/": state.params}
            if cfg.optim.ema:
                models["eval_ema/"] = ema_params(state.opt_state)
            sizes = dict(num_tokens=held_out.num_tokens, num_bytes=held_out.num_bytes)
            scored, scored_at = {}, done
            for prefix, params in models.items():
                scored |= evaluate(device.eval_step, params, held_out, place=place, **sizes).metrics(prefix)
            return scored

        def save(done: int, state: TrainState) -> None:
            left = None if branch is None else branch.to_dict()
            position = {"step": done, "fingerprint": dataset.fingerprint, "branch": left}
            metrics = scored if scored_at == done else None
            saver.save(done, state, data=position, config=to_dict(cfg), metrics=metrics)

        def plot(done: int, state: TrainState) -> None:
            plot_loss(workdir / "metrics.jsonl", workdir / "loss.png", title=workdir.name)

        t, at_every_end = cfg.train, dict(last=True, stop=True, after_report=True)
        at = frozenset(t.save_steps)
        periodic = [Every(t.save_every, save, "save", cause="checkpoint", at=at, **at_every_end)]
        if held_out is not None:
            periodic.append(Every(t.eval_every, evaluate_now, "eval", cause="eval", last=True))
        if t.noise_scale_every:
            parts = choose_parts(cfg.data.batch_size, layout.row_multiple, max(t.microbatches, 8))
            noise = NoiseScale(
                make_part_squares(device.objective, parts),
                lambda done: place(loader(done)),
                tokens_per_step=tokens_per_step,
                dropout=cfg.model.dropout > 0,
                history=earlier if chief else (),
            )
            periodic.append(Every(t.noise_scale_every, noise, "noise", cause="noise"))
        if t.sample_prompts:
            generator = text_generator(cfg.model, cfg.data, tokenizer, layout)
            texts = workdir / "samples.txt" if chief else None
            samples = Samples(texts, generator, t.sample_prompts, cfg.sample, start)
            periodic.append(Every(t.sample_every, samples, "sample", cause="sample", last=True))
        if chief:
            periodic.append(Every(t.plot_every, plot, "plot", cause="plot", **at_every_end))
        if t.profile_start and chief:
            periodic += Profile(workdir / "profile", t.profile_start, t.profile_steps).jobs()

        # ---------------------------------------------------------------------------------------------- loop
        starting.close()
        signals = run.enter_context(StopSignals(warn=console.log))
        batches = run.enter_context(prefetch(loader, start, cfg.data.prefetch, place))

        def asked(done: int) -> str:
            return stop(done) or signals(done)

        def result(status: str, reason: str, steps: int) -> Result:
            return Result(
                status=status,
                reason=reason,
                workdir=str(workdir),
                config_hash=config_hash(cfg),
                steps=steps,
                tokens=steps * tokens_per_step,
                flops=counts.flops_train * steps * tokens_per_step,
                metrics={name: _finite(x) for name, x in reporter.last.items() if "/" in name},
                counts=counts.to_dict(),
                mesh=dict(layout.mesh.shape),
                device=jax.devices()[0].device_kind,
                seconds={cause: round(s, 3) for cause, s in clock.seconds().items()},
                compilation=compiled.to_dict(),
                peak_rss_bytes=_peak_rss(),
                branch=branch.account(steps, tokens_per_step, counts.flops_train) if branch else {},
                cut=cut,
            )

        try:
            ended = train_loop(
                state,
                None,
                device.step,
                lambda n, state: (next(batches), numbers_of(cfg.optim, rates, n)),
                periodic,
                num_steps=cfg.train.num_steps,
                start=start,
                report=reporter,
                log_every=cfg.train.log_every,
                tick=console.tick,
                stop=asked if jax.process_count() == 1 else AgreedStop(asked, layout.mesh),
                clock=clock,
                nonfinite_limit=cfg.train.max_nonfinite,
            )
        except NonFiniteError as error:
            if chief:
                write_json(workdir / "result.json", result("failed", str(error), error.step).to_dict())
            raise
        with clock.spend("checkpoint"):
            saver.wait()
        stop(ended.step)
        summary = result(ended.status, ended.reason, ended.step)
        if chief:
            write_json(workdir / "result.json", summary.to_dict())
    return summary


def _peak_rss() -> int:
    """Largest resident memory of this process so far; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _finite(x: float) -> float | None:
    """None for NaN and infinity, which JSON does not have."""
    return x if math.isfinite(x) else None


def _keep_tokenizer(spec: str, folder: Path) -> None:
    """Copy the tokenizer into the run directory, so that the run can be moved and still be sampled."""
    path = Path(spec)
    if spec == "byte":
        return
    folder.mkdir(exist_ok=True)
    if path.is_dir():
        files = [path / name for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")]
    else:
        files = [path, path.with_name("tokenizer_config.json")]
    for file in files:
        if file.is_file():
            name = file.name if file.name == "tokenizer_config.json" else f"tokenizer{file.suffix}"
            shutil.copyfile(file, folder / name)


def _check_same_data(saved: Any, fingerprint: str, workdir: Path) -> None:
    if saved["fingerprint"] != fingerprint:
        raise UserError(
            f"the training data is not what {workdir} was trained on (fingerprint {fingerprint[:12]}, then "
            f"{saved['fingerprint'][:12]}): bring the files back, or start another run"
        )


def _print_preparation(done: int, units: int, tokens: int, size: int) -> None:
    print(f"tokenising: {done}/{units} shards, {tokens:,} tokens", file=sys.stderr, flush=True)


def _forget_unstarted(workdir: Path) -> None:
    """A directory whose run was refused before its first step holds no run: its config may be mended."""
    rows = workdir / "metrics.jsonl"
    started = step_dirs(workdir / "checkpoints") or (rows.exists() and rows.stat().st_size)
    if not started:
        (workdir / "config.json").unlink(missing_ok=True)


def _read_result(workdir: Path) -> Result | None:
    """What `result.json` holds, if it is there; one that cannot be read is written again at the end."""
    path = workdir / "result.json"
    if not path.exists():
        return None
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        print(f"WARNING: {path} is damaged ({error}); the run goes on without it", file=sys.stderr)
        return None
    names = {field.name for field in dataclasses.fields(Result)} - {"metrics"}
    if not names <= tree.keys():
        return None  # written by another version
    result = Result(
        metrics={name: x for name, x in tree.items() if name not in names},
        **{name: tree[name] for name in names},
    )
    return dataclasses.replace(result, workdir=str(workdir))  # it may have been moved


# ----------------------------------------------------------------------------------------- what it will cost


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs, without running any of it."""

    mesh_shape: Mapping[str, int]
    counts: counting.Counts
    memory: Memory  # bytes per device, estimated
    leaves: Sequence[LeafLayout]  # of the parameters
    tokens_per_step: int
    tokens: int  # of the whole run


def _planned_layout(mesh: MeshConfig, num_devices: int) -> Layout:
    """A mesh of devices that need not be there."""
    sizes, types = mesh.shape(num_devices), (AxisType.Auto,) * len(MESH_AXES)
    return make_layout(mesh, AbstractMesh(sizes, MESH_AXES, axis_types=types))


@functools.lru_cache(maxsize=64)  # a search plans runs that differ in batch and remat alone
def _planned_state(model: ModelConfig, optim: OptimConfig, mesh: MeshConfig, num_devices: int) -> TrainState:
    """Shapes and shardings of a run's state; tracing it takes most of a plan's time."""
    init, optimizer = partial(functions(model).init, model), optimizer_of(model, optim, lambda count: 0.0)
    where = dict(layout=_planned_layout(mesh, num_devices), table=functions(model).AXES)
    return abstract_state(init, optimizer, **where)[0]


def plan(cfg: RunConfig, *, num_devices: int | None = None) -> Plan:
    """Parameters, FLOPs, memory per device and layout of a run, on this machine or a larger one.

    Args:
        cfg: the run.
        num_devices: devices to plan for; default those of this machine. None of them need be there.

    Raises:
        UserError: shapes that do not fit together or that the mesh does not divide.
    """
    num_devices = num_devices or jax.device_count()
    layout = _planned_layout(cfg.mesh, num_devices)
    check_shapes(cfg, layout)
    tokens = cfg.data.batch_size * cfg.data.seq_len
    make_schedule(cfg.optim, cfg.train.num_steps, tokens)  # refuses one that does not fit in the run
    model = dataclasses.replace(cfg.model, remat="none")
    state = _planned_state(model, shape_of(cfg.optim), cfg.mesh, num_devices)
    rows = cfg.data.batch_size // (cfg.train.microbatches * layout.shards("batch"))
    columns = cfg.data.seq_len // layout.shards("length")
    memory_of = recurrent.memory if isinstance(cfg.model, LSTMConfig) else transformer_memory
    memory = memory_of(
        cfg.model,
        batch_size=cfg.data.batch_size,
        seq_len=cfg.data.seq_len,
        input_len=cfg.data.input_len,
        layout=layout,
        opt_state=state.opt_state,
        microbatches=cfg.train.microbatches,
        logit_tokens=rows * min(cfg.loss.chunk or columns, columns),
    )
    return Plan(
        mesh_shape=dict(layout.mesh.shape),
        counts=counting.count(cfg.model, cfg.data.seq_len, cfg.data.input_len),
        memory=memory,
        leaves=describe(layout, state.params, functions(model).AXES),
        tokens_per_step=tokens,
        tokens=tokens * cfg.train.num_steps,
    )
