"""Runs per hour of small models: cells trained as one program against the same cells one after another.

    python tools/bench_vectorize.py                       # minutes, on a quiet machine
    python tools/bench_vectorize.py --dims 16 --rounds 5
    python tools/bench_vectorize.py --quick               # tiny: shows that it runs, measures nothing

A turn trains `--cells` runs that differ in seed and learning rate, from empty run directories to final
checkpoints. Sides: `alone` (`jaxlm.train.run.train`, one run after another), `all` (one program, each
operation over all cells: vmap), `one` (one program that loops over the cells), `two`, `four` (it loops over
pairs, over fours).

For each model dimension every side is a process of its own with its own compilation cache. Its first turn is
reported as `cold`: it traces and compiles (imports are left out). Then the sides take turns: A, B, A, B, ...,
so that a busy machine slows all of them alike; these turns find everything compiled, as the second group of a
sweep does. In every round the cells' held-out losses must agree between the sides: it is the same work.

Prints one JSON line. For each dimension and side: `cold_runs_per_hour` and `runs_per_hour` (whole turns),
`step_ms` (of one cell, in the loop alone), and seconds by cause of a warm turn; `gain` and `step_gain` are
ratios to `alone`, taken within a round: median and range over the rounds.
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

TOOLS = pathlib.Path(__file__).resolve().parent
SIDES = {"alone": None, "all": 0, "one": 1, "two": 2, "four": 4}  # name -> width of `train_group`
TOLERANCE = 2e-3  # of a held-out loss at the end: training amplifies the order of sums


def write_texts(folder: pathlib.Path, seed: int = 0) -> None:
    """Bytes of a learnable language: a word follows its fixed successor half of the time."""
    rng = np.random.default_rng(seed)
    words = ["".join(chr(c) for c in rng.integers(97, 123, rng.integers(2, 8))) for _ in range(400)]
    successor = rng.permutation(len(words))
    for name, count in {"train": 200_000, "eval": 1_500}.items():
        ids = rng.zipf(1.3, count) % len(words)
        follows = rng.random(count) < 0.5
        for i in np.flatnonzero(follows[1:]) + 1:
            ids[i] = successor[ids[i - 1]]
        (folder / f"{name}.txt").write_text(" ".join(words[i] for i in ids) + "\n")


def make_cells(flags: argparse.Namespace, turn: int) -> list:
    """Configs of one turn."""
    from jaxlm.config import build

    return [
        build(
            {
                "seed": 1000 * turn + i,
                "model": {
                    "num_layers": 2,
                    "model_dim": flags.measure,
                    "attention": {"num_heads": max(1, flags.measure // 16)},
                },
                "data": {
                    "train": str(flags.folder / "train.txt"),
                    "eval": str(flags.folder / "eval.txt"),
                    "seq_len": flags.seq_len,
                    "batch_size": flags.batch_size,
                },
                "optim": {"lr": 1e-3 * 1.2**i},
                "train": {"num_steps": flags.steps, "log_every": 10, "sample_prompts": []},
                "mesh": {"data": 1},
            }
        )
        for i in range(flags.cells)
    ]


def work(flags: argparse.Namespace) -> None:
    """A worker: each line of stdin is a turn's number, and is answered with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    sys.path.insert(0, str(TOOLS.parent))
    from jaxlm.sweep.vectorized import train_group
    from jaxlm.train.metrics import read_rows
    from jaxlm.train.run import train

    width, root = SIDES[flags.side], flags.folder / f"{flags.measure}-{flags.side}"
    for line in sys.stdin:
        runs = root / "runs"
        cells = [(cfg, runs / f"{int(line)}-{i}") for i, cfg in enumerate(make_cells(flags, int(line)))]
        began = time.perf_counter()
        if width is None:
            results = [train(cfg, path, bar=False) for cfg, path in cells]
            clocks = [result.seconds for result in results]
        else:
            results = train_group(cells, root / "groups", bar=False, width=width)
            clocks = [results[0].seconds]
        seconds = time.perf_counter() - began
        causes = {cause for clock in clocks for cause in clock}
        steps = [
            row["perf/step_seconds"] for _, path in cells for row in read_rows(path / "metrics.jsonl")[2:]
        ]
        share = 1 if width is None else len(cells)  # of a group's step that one cell is
        answer = {
            "seconds": seconds,
            "step_ms": 1e3 * statistics.median(steps) / share,
            "causes": {cause: round(sum(clock.get(cause, 0.0) for clock in clocks), 2) for cause in causes},
            "nll": [result.metrics["eval/nll"] for result in results],
        }
        answers.write(json.dumps(answer) + "\n")
        for _, path in cells:
            shutil.rmtree(path)


class Worker:
    """One side at one dimension, in its own process."""

    def __init__(self, side: str, dim: int, folder: pathlib.Path, flags: argparse.Namespace) -> None:
        self.side, self.turns = side, []
        sys.path.insert(0, str(TOOLS.parent))
        from jaxlm.cli import MALLOC  # what `jaxlm sweep` starts itself again with, for both sides

        command = [sys.executable, str(TOOLS / "bench_vectorize.py"), "--measure", str(dim), "--side", side]
        command += ["--folder", str(folder)]
        for option in ("cells", "steps", "seq_len", "batch_size"):
            command += [f"--{option}", str(getattr(flags, option))]
        environment = {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": MALLOC, "JAX_COMPILATION_CACHE_DIR": ""}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if flags.silent else None,
            text=True,
            env={**os.environ, **environment},
        )

    def turn(self, number: int) -> None:
        """Trains the cells of a turn."""
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"error: the side {self.side!r} ended with exit code {self._process.wait()}")
        self.turns.append(json.loads(answer))

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def check_losses(workers: list[Worker]) -> None:
    """Stops unless the cells of the last turn ended with the losses of the first side's."""
    first = workers[0].turns[-1]["nll"]
    for worker in workers[1:]:
        for cell, (a, b) in enumerate(zip(first, worker.turns[-1]["nll"], strict=True)):
            if not abs(a - b) <= TOLERANCE * a:
                raise SystemExit(
                    f"error: not the same work: cell {cell} ends at {a:.6f} nats for {workers[0].side!r}, at "
                    f"{b:.6f} for {worker.side!r}"
                )


def summary(values: list[float], digits: int) -> dict[str, float]:
    """Median and range over the rounds."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def compare(dim: int, folder: pathlib.Path, flags: argparse.Namespace) -> dict:
    """All sides at one dimension."""
    workers = [Worker(side, dim, folder, flags) for side in flags.sides]
    try:
        for turn in range(flags.rounds + 1):
            for worker in workers:
                worker.turn(turn)
            check_losses(workers)
            line = ", ".join(f"{w.side} {w.turns[-1]['seconds']:.1f} s" for w in workers)
            print(f"D {dim}, {f'round {turn}' if turn else 'cold'}: {line}", file=sys.stderr, flush=True)
    finally:
        for worker in workers:
            worker.close()
    base, found = workers[0].turns, {}
    for worker in workers:
        cold, *warm = worker.turns
        rates = [3600 * flags.cells / turn["seconds"] for turn in (cold, *warm)]
        found[worker.side] = {
            "cold_runs_per_hour": round(rates[0]),
            "runs_per_hour": summary(rates[1:], 0),
            "step_ms": summary([turn["step_ms"] for turn in warm], 3),
            "cold_gain": round(base[0]["seconds"] / cold["seconds"], 2),
            "gain": summary([a["seconds"] / b["seconds"] for a, b in zip(base[1:], warm, strict=True)], 2),
            "step_gain": summary(
                [a["step_ms"] / b["step_ms"] for a, b in zip(base[1:], warm, strict=True)], 2
            ),
            "seconds": dict(sorted(warm[-1]["causes"].items(), key=lambda item: -item[1])),
        }
    return found


def main() -> None:
    """Parses the flags, lets the sides take turns, prints one JSON line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--dims", default="16,32,64", help="model dimensions, comma separated")
    parser.add_argument("--sides", default="alone,all,one,two,four", help="'alone' comes first")
    parser.add_argument("--cells", type=int, default=8, help="runs of a turn")
    parser.add_argument("--steps", type=int, default=100, help="updates of a run")
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="warm turns of every side")
    parser.add_argument("--quick", action="store_true", help="one small dimension, two cells, one round")
    parser.add_argument("--silent", action="store_true", help="keep the runs' own lines off stderr")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        work(flags)
        return
    if flags.quick:
        flags.dims, flags.sides, flags.cells, flags.steps = "16", "alone,all", 2, 20
        flags.rounds, flags.silent, flags.seq_len = 1, True, 16
    flags.sides = flags.sides.split(",")
    if unknown := set(flags.sides) - set(SIDES):
        parser.error(f"no side {', '.join(sorted(unknown))}; there are {', '.join(SIDES)}")
    if flags.sides[0] != "alone" or flags.rounds < 1:
        parser.error("the first side must be 'alone', and there must be a round: gains are ratios to it")
    report = {"benchmark": "vectorize", "cells": flags.cells, "steps": flags.steps, "layers": 2}
    report |= {"seq_len": flags.seq_len, "batch_size": flags.batch_size, "rounds": flags.rounds}
    report |= {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), "dims": {}}
    with tempfile.TemporaryDirectory(prefix="bench_vectorize-") as name:
        write_texts(pathlib.Path(name))
        for dim in map(int, flags.dims.split(",")):
            report["dims"][dim] = compare(dim, pathlib.Path(name), flags)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
