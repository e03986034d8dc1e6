"""Cells that differ only in numbers, trained as one program over a leading cell axis.

A small model leaves a device idle between operations, and a run of it is mostly start: imports, tracing,
compilation, opening the data. Cells that differ in nothing but `FREE` share all of that. Each of them gets
the run directory that it would have alone, and in it the numbers that it would have alone, up to the order of
fp32 sums.

S/runs/<id>/           config.json, metrics.jsonl, result.json and the final checkpoint of every cell
S/groups/<members>/    group.json, run.lock, and checkpoints/ of all cells together while they train

What a cell's rows and result share with its group is time: `seconds`, `perf/step_seconds` and
`perf/data_wait` are the group's, `perf/tokens_per_second` and `perf/mfu` are one cell's share of it. There is
no loss.png, no TensorBoard file and no sample of a cell; the verbs make them from its directory.
"""

import contextlib
import dataclasses
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.chips import peak_flops
from jaxlm.config import RunConfig, config_hash, diff, identity, to_dict
from jaxlm.data.loader import Dataset, Loader, eval_batches, make_dataset, prefetch
from jaxlm.data.tokenizer import check_vocabulary, load_tokenizer
from jaxlm.evaluate import evaluate
from jaxlm.optim import ema_params
from jaxlm.scaling import counting
from jaxlm.sharding import make_layout, use
from jaxlm.sweep.group_step import CELL, group_programs, own_metrics
from jaxlm.sweep.groups import Member, check_group, group_key, open_group, why_not
from jaxlm.train import run as alone
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.checks import check_shapes
from jaxlm.train.compilation import counted_compilations
from jaxlm.train.loop import Every, NonFiniteError, StopSignals, train_loop
from jaxlm.train.metrics import Clock, Console, JsonlWriter, Reporter, StepReport, read_rows
from jaxlm.train.metrics import value as value_of
from jaxlm.train.programs import learning_rates
from jaxlm.train.run import Result
from jaxlm.train.rundir import RunLock, open_run_dir, probe_writable, write_json
from jaxlm.train.state import TrainState
from jaxlm.train.step import Batch
from jaxlm.tree import nbytes

__all__ = ["group_key", "train_group", "why_not"]


@dataclasses.dataclass
class _Standing:
    """How a cell stands; kept in the group's checkpoint."""

    fingerprint: str  # of its data
    bad: int = 0  # non-finite updates in a row up to now
    failed_at: int = 0  # the update at which it was given up; 0 = it was not
    reason: str = ""


@dataclasses.dataclass
class _Cell:
    """A cell that was asked for: its config, its directory, its place on the cell axis and its rows."""

    cfg: RunConfig
    workdir: Path
    index: int
    reporter: Reporter
    reported: int  # step of the newest row
    scored: dict[str, float] = dataclasses.field(default_factory=dict)
    scored_at: int = -1  # the step of these scores


class _Watch:
    """Runs the step, and counts the non-finite updates of every cell when the loop has waited for them."""

    def __init__(
        self,
        step: Callable[..., tuple[TrainState, dict]],
        standing: Sequence[_Standing],
        limit: int,
        start: int,
        give_up: Callable[[int, dict], None],
    ) -> None:
        self._step, self._standing, self._limit, self._give_up = step, standing, limit, give_up
        self._done = start
        self._unseen: list[tuple[int, dict]] = []

    def step(self, state: TrainState, frozen: None, fed: Any) -> tuple[TrainState, dict]:
        """The group's step."""
        state, metrics = self._step(state, frozen, fed)
        self._done += 1
        self._unseen.append((self._done, metrics))
        return state, metrics

    def look(self, upto: int) -> None:
        """Read how the updates up to this one went; a cell that fails is given up with its metrics."""
        while self._unseen and self._unseen[0][0] <= upto:
            done, metrics = self._unseen.pop(0)
            bad_C = np.asarray(metrics[f"{CELL}nonfinite"][0]) > 0
            for c, cell in enumerate(self._standing):
                cell.bad = cell.bad + 1 if bad_C[c] else 0
                if self._limit and cell.bad >= self._limit and not cell.failed_at:
                    cell.failed_at, cell.reason = done, str(NonFiniteError(done, cell.bad))
                    self._give_up(c, jax.device_get(metrics))


def _loader(
    cfg: RunConfig, members: Sequence[Member], datasets: Mapping[int, Dataset]
) -> Callable[[int], Batch]:
    """`step -> batch`; with a leading cell axis if the cells differ in `data.seed`."""
    loaders = {seed: Loader(dataset, cfg.data) for seed, dataset in datasets.items()}
    if len(loaders) == 1:
        (loader,) = loaders.values()
        return loader

    def load(step: int) -> Batch:
        made = {seed: loader(step) for seed, loader in loaders.items()}
        rows = [made[member.data_seed] for member in members]
        return {name: np.stack([batch[name] for batch in rows]) for name in rows[0]}

    return load


def train_group(
    cells: Sequence[tuple[RunConfig, Path]],
    group_dir: Path,
    *,
    stop: Callable[[int], str] | None = None,
    bar: bool | None = None,
    progress: Callable[[int], None] | None = None,
    width: int | None = None,
) -> list[Result]:
    """Train the runs of `cells` as one program, or go on with what `group_dir` holds of them.

    Every cell ends as `jaxlm.train.run.train` would end it, up to the order of fp32 sums: losses and norms
    within 2e-5 relative over the first updates; training amplifies such differences as time goes on. A cell
    with too many non-finite updates in a row ends as 'failed', and the others do not notice. Finished runs
    are not run again. All state is saved every `train.save_every` updates in `group_dir`, and after a kill
    the same call goes on there, to the bit.

    Args:
        cells: config and run directory of every cell; equal `group_key`s.
        group_dir: where groups keep their states, for all groups of a sweep.
        stop: as for `jaxlm.train.run.train`; SIGINT and SIGTERM stop as well.
        bar: draw a progress bar; default: on a terminal.
        progress: called with the number of updates at every step.
        width: cells that one operation takes at a time; 0 = all. Default: all on an accelerator; 1 on a CPU,
            whose caches hold the activations of one small model and not those of eight.

    Returns:
        One result for each of `cells`. `group/cells` among its metrics is the number of runs that share the
        `seconds` (of wall time).

    Raises:
        UserError: cells that cannot train together, a directory that is in use or holds another run.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # as for a lone run
    check_group(cells)
    ask = stop or (lambda step: "")
    cells = [(cfg, Path(path).absolute()) for cfg, path in cells]
    clock, group_dir = Clock(), Path(group_dir).absolute()
    results: dict[Path, Result] = {}
    run, starting = contextlib.ExitStack(), contextlib.ExitStack()
    with run, starting:
        starting.enter_context(clock.spend("init"))

        # ----------------------------------------------------------------------------------- run directories
        for cfg, workdir in cells:
            probe_writable(workdir)
            run.enter_context(RunLock(workdir))
            alone._forget_unstarted(workdir)
            same = lambda old, new: diff(identity(old), identity(new))  # noqa: E731
            open_run_dir(workdir, to_dict(cfg), sha256=config_hash(cfg), diff=same)
            ended = alone._read_result(workdir)
            if ended is not None and ended.status == "finished":
                print(f"{workdir} holds this run, and it is finished", file=sys.stderr)
                results[workdir] = ended
        wanted = [(cfg, workdir) for cfg, workdir in cells if workdir not in results]
        if not wanted:
            return [results[workdir] for _, workdir in cells]
        cfg, workdir = wanted[0]
        cache_dir = workdir.parent / "compilation_cache" if cfg.train.compilation_cache else None
        compiled = run.enter_context(counted_compilations(cache_dir))
        folder, members = open_group(group_dir, [Member.of(cfg) for cfg, _ in wanted], run)
        places = {member.hash: c for c, member in enumerate(members)}

        # ------------------------------------------------------------------------------------------ programs
        layout = make_layout(cfg.mesh)
        run.enter_context(use(layout))
        check_shapes(cfg, layout)
        whole = NamedSharding(layout.mesh, PartitionSpec())
        tokenizer = load_tokenizer(cfg.data.tokenizer)
        check_vocabulary(tokenizer, cfg.model.vocab_size)
        loss = dataclasses.replace(cfg.loss, per_position=False)
        if width is None:
            width = 1 if jax.default_backend() == "cpu" else 0
        device = group_programs(
            dataclasses.replace(cfg.model, init_std=members[0].init_std),
            loss,
            cfg.optim,
            cfg.mesh,
            microbatches=cfg.train.microbatches,
            token_bytes=tokenizer.token_bytes,
            cells=len(members),
            width=width,
            shared=len({member.data_seed for member in members}) == 1,
        )
        probe_writable(folder, need_bytes=nbytes(device.target))
        for _, path in wanted:
            probe_writable(path, need_bytes=nbytes(device.target) // len(members))
        counts = counting.count(cfg.model, cfg.data.seq_len)
        tokens_per_step = cfg.data.batch_size * cfg.data.seq_len
        # A learning rate is a share of the peak, the same for all cells.
        plain = dataclasses.replace(cfg.optim, lr=1.0)
        shares_S = learning_rates(plain, cfg.train.num_steps, tokens_per_step)
        numbers_C = {
            name: np.array([getattr(member, name) for member in members], np.float32)
            for name in ("lr", "weight_decay", "b2")
        }

        # ---------------------------------------------------------------------------------------------- data
        cached = dict(cache_dir=workdir.parent / "data_cache", progress=alone._print_preparation)
        with clock.spend("prepare"):
            datasets = {
                seed: make_dataset(dataclasses.replace(cfg.data, seed=seed), tokenizer, **cached)
                for seed in {member.data_seed for member in members}
            }
            held_out = eval_batches(cfg.data, tokenizer, **cached) if cfg.data.eval else None
        for _, path in wanted:
            alone._keep_tokenizer(cfg.data.tokenizer, path / "tokenizer")
        loader = _loader(cfg, members, datasets)
        place = partial(jax.device_put, device=whole)

        # --------------------------------------------------------------------------------------------- state
        saver = run.enter_context(Checkpointer(folder / "checkpoints", keep_best=0))
        standing = [_Standing(datasets[member.data_seed].fingerprint) for member in members]
        restored = saver.restore(device.target, quarantine=True)
        if restored is not None:
            state, start = restored.state, restored.step
            for now, then in zip(standing, restored.data["cells"], strict=True):
                alone._check_same_data(then, now.fingerprint, folder)
            standing = [_Standing(**then) for then in restored.data["cells"]]
        else:
            state, start = device.new_state(members), 0

        # ----------------------------------------------------------------------------------------- reporting
        console = Console(cfg.train.num_steps, start, bar=bar)
        run.callback(console.close)
        aboard: list[_Cell] = []
        for own, path in wanted:
            writer = JsonlWriter(path / "metrics.jsonl", start)
            reporter = Reporter(
                [writer],
                tokens_per_step=tokens_per_step,
                flops_per_token=counts.flops_train,
                peak=cfg.train.peak_flops or peak_flops(jax.devices()[0].device_kind),
            )
            run.callback(reporter.close)
            for row in read_rows(path / "metrics.jsonl"):
                reporter.last |= {name: math.nan if x is None else x for name, x in row.items()}
            aboard.append(_Cell(own, path, places[config_hash(own)], reporter, start))
        console.log(
            f"{len(members)} cells ({folder.name}): {counts.n_total:,} parameters, {tokens_per_step:,} "
            f"tokens a step each, {jax.devices()[0].device_kind}; the nll shown is the best one's"
            + (f"; going on at step {start} of {cfg.train.num_steps}" if start else "")
        )

        def alive() -> list[_Cell]:
            return [cell for cell in aboard if not standing[cell.index].failed_at]

        def report(row: StepReport) -> None:
            for cell in alive():
                own = {name: x for name, x in row.extra.items() if name.startswith(f"{cell.index}/")}
                extra = {name.split("/", 1)[1]: x for name, x in own.items()}
                metrics = own_metrics(row.metrics, cell.index)
                cell.reporter(dataclasses.replace(row, metrics=metrics, extra=extra))
                cell.reported = row.step
            best = [value_of(own_metrics(row.metrics, c.index)["nll"]) for c in alive() if row.metrics]
            if best and row.seconds > 0:
                rate = len(members) * row.steps * tokens_per_step / row.seconds
                console.write(row.step, {"train/nll": min(best), "perf/tokens_per_second": rate})

        def close(cell: _Cell, status: str, reason: str, steps: int) -> None:
            """Write how a cell ended."""
            metrics = {name: alone._finite(x) for name, x in cell.reporter.last.items() if "/" in name}
            results[cell.workdir] = Result(
                status=status,
                reason=reason,
                workdir=str(cell.workdir),
                config_hash=config_hash(cell.cfg),
                steps=steps,
                tokens=steps * tokens_per_step,
                flops=counts.flops_train * steps * tokens_per_step,
                metrics=metrics | {"group/cells": float(len(members))},
                counts=counts.to_dict(),
                mesh=dict(layout.mesh.shape),
                device=jax.devices()[0].device_kind,
                seconds={cause: round(s, 3) for cause, s in clock.seconds().items()},
                compilation=compiled.to_dict(),
                peak_rss_bytes=alone._peak_rss(),
            )
            write_json(cell.workdir / "result.json", results[cell.workdir].to_dict())

        def give_up(c: int, metrics: dict) -> None:
            """Write the last row and the result of a cell that has just failed."""
            for cell in (cell for cell in aboard if cell.index == c):
                failed_at, reason = standing[c].failed_at, standing[c].reason
                if cell.reported < failed_at:
                    cell.reporter(StepReport(failed_at, own_metrics(metrics, c), {}, 0, 0.0, 0.0))
                console.log(f"{cell.workdir.name} failed: {reason}")
                close(cell, "failed", reason, failed_at)

        watch = _Watch(device.step, standing, cfg.train.max_nonfinite, start, give_up)

        # ------------------------------------------------------------------------------------- periodic work
        def evaluate_now(done: int, state: TrainState) -> dict[str, float]:
            watch.look(done)
            models = {"eval/": state.params}
            if cfg.optim.ema:
                models["eval_ema/"] = ema_params(state.opt_state)
            sizes = dict(num_tokens=held_out.num_tokens, num_bytes=held_out.num_bytes)
            pick = lambda c, sums: jax.tree.map(lambda x: x[c], sums)  # noqa: E731
            for cell in alive():
                cell.scored, cell.scored_at = {}, done
            for prefix, params in models.items():
                # A batch is made once for all cells; what remains is small.
                sums = [jax.device_get(device.eval_step(params, place(batch))) for batch in held_out]
                for cell in alive():
                    cell.scored |= evaluate(pick, cell.index, sums, **sizes).metrics(prefix)
            return {f"{cell.index}/{name}": x for cell in alive() for name, x in cell.scored.items()}

        def save(done: int, state: TrainState) -> None:
            watch.look(done)
            saver.save(done, state, data={"cells": [dataclasses.asdict(cell) for cell in standing]})

        every = cfg.train
        at_end = dict(last=True, stop=True, after_report=True)
        periodic = [Every(every.save_every, save, "save", cause="checkpoint", **at_end)]
        if held_out is not None:
            periodic.append(Every(every.eval_every, evaluate_now, "eval", cause="eval", last=True))

        # ---------------------------------------------------------------------------------------------- loop
        starting.close()
        signals = run.enter_context(StopSignals(warn=console.log))
        batches = run.enter_context(prefetch(loader, start, cfg.data.prefetch, place))

        def asked(done: int) -> str:
            watch.look(done - 1)
            return ask(done) or signals(done) or ("" if alive() else "every cell failed")

        def tick(done: int) -> None:
            console.tick(done)
            if progress is not None:
                progress(done)

        ended = train_loop(
            state,
            None,
            watch.step,
            lambda n, state: (next(batches), numbers_C | {"lr": numbers_C["lr"] * shares_S[n]}),
            periodic,
            num_steps=every.num_steps,
            start=start,
            report=report,
            log_every=every.log_every,
            tick=tick,
            stop=asked,
            clock=clock,
            nonfinite_limit=0,  # counted here for each cell
        )
        watch.look(ended.step)

        # -------------------------------------------------------------------------------------------- endings
        with clock.spend("checkpoint"):
            saver.wait()
            if ended.status == "finished":
                _save_cells(alive(), ended.state, ended.step, standing, whole)
        ask(ended.step)
        for cell in aboard:
            how = standing[cell.index]
            if how.failed_at:
                close(cell, "failed", how.reason, how.failed_at)
            else:
                close(cell, ended.status, ended.reason, ended.step)
        over = {config_hash(cfg) for cfg, path in cells if results[path].status in ("finished", "failed")}
        if over >= places.keys():
            # Each cell has its own checkpoint now. Without one, this is a group that was never started.
            saver.close()
            shutil.rmtree(folder / "checkpoints")
    return [results[workdir] for _, workdir in cells]


def _save_cells(
    cells: Sequence[_Cell], state: TrainState, done: int, standing: Sequence[_Standing], whole: NamedSharding
) -> None:
    """The final checkpoint of every cell, as a lone run writes it; all are written at the same time."""
    host = jax.device_get(state)
    with contextlib.ExitStack() as writing:
        for cell in cells:
            leaves = (host.params, host.opt_state, host.key)
            own = jax.tree.map(lambda x, c=cell.index: jax.device_put(x[c], whole), leaves)
            position = {"step": done, "fingerprint": standing[cell.index].fingerprint, "branch": None}
            metrics = cell.scored if cell.scored_at == done else None
            train = cell.cfg.train
            keep = dict(keep_last=train.keep_last, keep_best=train.keep_best, keep_period=train.keep_period)
            saver = writing.enter_context(Checkpointer(cell.workdir / "checkpoints", **keep))
            lone = TrainState(jax.device_put(host.step, whole), *own)
            saver.save(done, lone, data=position, config=to_dict(cell.cfg), metrics=metrics)
