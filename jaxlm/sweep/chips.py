"""How long a run will take: on a named chip by its data sheet, on this machine by a short measurement.

Both are estimates for planning. A chip's is the longest of three times: exact training FLOPs at an assumed
share (MFU) of its bf16 peak, the traffic of parameters, gradients and optimizer state at its memory
bandwidth, and what several chips send each other over their links.
This machine's is measured: a few training steps of the smallest and the largest model of the plan that are
not too large to be timed here, interpolated in between.
"""

import dataclasses
import hashlib
import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxlm.chips import Chip
from jaxlm.config import RunConfig, canonical_json, to_dict
from jaxlm.data.packing import Batch, empty_batch, finish_batch
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.errors import UserError, check
from jaxlm.scaling.counting import count
from jaxlm.scaling.memory import Memory
from jaxlm.sharding import make_layout, use
from jaxlm.train.compilation import counted_compilations
from jaxlm.train.feed import place_batch
from jaxlm.train.programs import numbers_of, programs
from jaxlm.train.rundir import write_json


def chip_seconds(
    chip: Chip, devices: int, mfu: float, *, flops: float, steps: int, memory: Memory, sending: float = 0.0
) -> float:
    """Seconds of training on that many devices; compilation, evaluation and checkpoints are not in it.

    Args:
        chip: see CHIPS.
        devices: JAX devices that share one run evenly.
        mfu: share of the peak; 0 = the chip's assumed one.
        flops: exact training FLOPs of the run.
        steps: updates.
        memory: bytes per device of a step, of which parameters, gradients and optimizer state are read and
            written once a step.
        sending: seconds of a step's collectives, by the compiler's program or by an estimate.
    """
    compute = flops / (devices * chip.peak / chip.devices * (mfu or chip.mfu))
    traffic = 2 * (memory.params + memory.grads + memory.opt_state)
    return max(compute, steps * traffic / (chip.bandwidth / chip.devices), steps * sending)


# ----------------------------------------------------------------------------------------------- this machine

MOST_STEP_FLOPS = 2e12  # a larger step is not timed for a plan: it takes a minute on two CPU cores


@dataclasses.dataclass(frozen=True)
class Timing:
    """A measured shape."""

    flops_per_token: float  # training
    flops_per_second: float
    compile_seconds: float  # short where the program was kept already


def run_seconds(
    timings: Sequence[Timing], *, flops_per_token: float, flops: float, eval_tokens: int
) -> float:
    """Seconds of a run on this machine: compilation, training and one evaluation (a third of the FLOPs).

    >>> timings = [Timing(1e5, 1e10, 2.0), Timing(1e7, 4e10, 4.0)]
    >>> run_seconds(timings, flops_per_token=1e6, flops=2e12, eval_tokens=0)
    103.0
    """
    points = sorted(timings, key=lambda t: t.flops_per_token)
    at = [math.log(t.flops_per_token) for t in points]

    def between(values: list[float]) -> float:
        return float(np.interp(math.log(flops_per_token), at, values))

    rate = math.exp(between([math.log(t.flops_per_second) for t in points]))
    compiling = between([t.compile_seconds for t in points])
    return round(compiling + (flops + eval_tokens * flops_per_token / 3) / rate, 9)


def calibrate(
    configs: Sequence[RunConfig],
    path: Path | None = None,
    *,
    keep: bool = True,
    programs_dir: Path | None = None,
    seconds: float = 1.0,
) -> list[Timing]:
    """Time the smallest, the middle and the largest shape of a plan that this machine can be asked to time.

    Args:
        configs: of the plan, their meshes chosen.
        path: file of measurements, by machine and shape; None = measure all.
        keep: write what was measured to `path`.
        programs_dir: compilation cache of the plan's runs, which then need not compile these shapes again.
        seconds: of timed steps for each shape.

    Returns:
        A measurement for each shape; none if a step of every one is too large.
    """
    by_size = {_key(c): c for c in sorted(configs, key=_flops_per_token) if _can_be_timed(c)}
    keys = list(by_size)
    chosen = sorted({0, len(keys) // 2, len(keys) - 1}) if keys else []
    known: dict[str, Mapping[str, float]] = {}
    if path is not None and path.exists():
        try:
            known = json.loads(path.read_text())
            for each in known.values():
                Timing(**each)
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}): remove it, and it is measured again") from error
    found = []
    for key in (keys[i] for i in chosen):
        if key not in known:
            with counted_compilations(programs_dir if by_size[key].train.compilation_cache else None):
                known[key] = dataclasses.asdict(_time(by_size[key], seconds))
        found.append(Timing(**known[key]))
    if path is not None and keep and found:
        write_json(path, known)
    return found


def _flops_per_token(cfg: RunConfig) -> float:
    return count(cfg.model, cfg.data.seq_len).flops_train


def _can_be_timed(cfg: RunConfig) -> bool:
    tokens, counts = cfg.data.batch_size * cfg.data.seq_len, count(cfg.model, cfg.data.seq_len)
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return counts.flops_hardware * tokens <= MOST_STEP_FLOPS and 20 * counts.n_total < ram / 4


def _key(cfg: RunConfig) -> str:
    """Machine and shape of the step."""
    what = dict(
        model=to_dict(cfg.model), loss=to_dict(cfg.loss), mesh=to_dict(cfg.mesh), optim=cfg.optim.name
    )
    what |= dict(B=cfg.data.batch_size, T=cfg.data.seq_len, M=cfg.train.microbatches)
    digest = hashlib.sha256(canonical_json(what).encode()).hexdigest()[:12]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = jax.devices()[0].device_kind
    return f"{socket.gethostname()} {cores} cores, {jax.device_count()} x {kind}, {digest}"


def _time(cfg: RunConfig, seconds: float) -> Timing:
    """Compile the training step of `cfg` and run it on made-up tokens for that long, at least three times."""
    tokens = cfg.data.batch_size * cfg.data.seq_len
    layout, bytes_V = make_layout(cfg.mesh), load_tokenizer(cfg.data.tokenizer).token_bytes
    shared = dict(microbatches=cfg.train.microbatches, token_bytes=bytes_V)
    with use(layout):
        loss = dataclasses.replace(cfg.loss, per_position=False)  # as a run has it
        built = programs(cfg.model, loss, cfg.optim, cfg.mesh, **shared)
        numbers = numbers_of(cfg.optim, np.zeros(1, np.float32), 0)
        fed = (place_batch(layout, _made_up(cfg)), numbers)
        state, _ = built.new_state(cfg.seed)
        began = time.perf_counter()
        state, _ = jax.block_until_ready(built.step(state, None, fed))
        compiled = time.perf_counter()
        done = 0
        while done < 3 or time.perf_counter() - compiled < seconds:
            state, _ = jax.block_until_ready(built.step(state, None, fed))
            done += 1
        took = (time.perf_counter() - compiled) / done
    per_token = _flops_per_token(cfg)
    return Timing(per_token, per_token * tokens / took, max(0.0, compiled - began - took))


def _made_up(cfg: RunConfig) -> Batch:
    """A full batch of random tokens, one segment a row."""
    B, T = cfg.data.batch_size, cfg.data.seq_len
    batch = empty_batch(B, T, 0)
    draw = np.random.RandomState(0).randint(0, cfg.model.vocab_size, (B, T + 1), np.int32)
    batch["tokens"][:], batch["targets"][:] = draw[:, :-1], draw[:, 1:]
    begins_BT = np.zeros((B, T), np.int32)
    begins_BT[:, 0] = 1
    finish_batch(batch, begins_BT, np.full(B, T, np.int32))
    return batch


def check_rate(gflops: float, mfu: float, price: float, chips: int) -> None:
    """Refuse numbers that no estimate can be made from."""
    for name, value in (("gflops", gflops), ("price", price)):
        check(0 <= value < math.inf, f"--{name}={value:g} must be a number, 0 or more")
    check(0 <= mfu <= 1, f"--mfu={mfu:g} is a share of the peak: it must lie in [0, 1]")
    check(chips >= 1, f"--num_chips={chips} must be at least 1")
