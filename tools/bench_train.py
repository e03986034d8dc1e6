"""Speed of jaxlm's training step on the standard CPU workload, against plain JAX and PyTorch.

    python tools/bench_train.py                      # the whole comparison: minutes, on a quiet machine
    python tools/bench_train.py --variants jaxlm,plain --rounds 3
    python tools/bench_train.py --quick              # tiny shapes: shows that it runs, measures nothing

Every variant is a process of its own that compiles once and then takes turns: A, B, C, A, B, C, ... of some
steps each, so that a busy machine slows all of them alike. All start from the same weights and see the same
batches. Before anything is timed, their losses over the first steps (forward, gradient, clip and optimizer)
must agree, and at the end the losses are reported again: it is the same workload, not a similar one.

Variants: `jaxlm` (the real step: model, objective, optimizer and metrics of the library, unrolled, fp32),
`bf16` (the same with bf16 operands and fp32 accumulation), `scan` (the same, scanned and rematerialised),
`loop` (the real training loop around the `jaxlm` step: loader, prefetch, metrics files), `plain`
(tools/plain_jax.py), `torch` (tools/plain_torch.py; left out where torch is not installed).

Prints one JSON line: tokens per second of every variant, and ratios, each taken within a round, between turns
that stand next to each other; median and range over the rounds.
"""

import argparse
import atexit
import dataclasses
import functools
import importlib.util
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
import types
from collections.abc import Callable

import numpy as np

TOOLS = pathlib.Path(__file__).resolve().parent
CHECKED_STEPS = 3
# Largest relative difference of a loss over the first steps. fp32 variants differ in the order of sums only.
TOLERANCE = {"jaxlm": 2e-4, "scan": 2e-4, "loop": 2e-4, "plain": 2e-4, "torch": 2e-4, "bf16": 1e-2}
RATIOS = [("jaxlm", "plain"), ("jaxlm", "torch"), ("bf16", "jaxlm"), ("scan", "jaxlm"), ("loop", "jaxlm")]

Turn = Callable[[int], list[float]]  # runs that many steps, returns their losses


# ---------------------------------------------------------------------------------------------- the workload


def load_plain():
    """The module tools/plain_jax.py."""
    spec = importlib.util.spec_from_file_location("plain_jax", TOOLS / "plain_jax.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["plain_jax"] = module
    spec.loader.exec_module(module)
    return module


def make_tokens(batches: int, shape, seed: int = 0) -> np.ndarray:
    """i32[batches, B, T + 1] of a learnable language: a word follows its fixed successor half of the time."""
    rng = np.random.default_rng(seed)
    successor = rng.permutation(shape.vocab)
    ids = rng.zipf(1.2, size=(batches, shape.batch, shape.length + 1)) % shape.vocab
    follows = rng.random(ids.shape) < 0.5
    for t in range(1, ids.shape[-1]):
        ids[..., t] = np.where(follows[..., t], successor[ids[..., t - 1]], ids[..., t])
    return ids.astype(np.int32)


def flatten(tree, prefix: str = "") -> dict[str, np.ndarray]:
    """Nested dicts and lists as `layers/0/wq` -> array."""
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {name: leaf for key, sub in items for name, leaf in flatten(sub, f"{prefix}{key}/").items()}
    return {prefix[:-1]: np.asarray(tree)}


def unflatten(flat: dict[str, np.ndarray], layers: int) -> dict:
    """The tree of plain_jax.py again."""
    tree: dict = {"layers": [{} for _ in range(layers)]}
    for name, leaf in flat.items():
        parts = name.split("/")
        if parts[0] == "layers":
            tree["layers"][int(parts[1])][parts[2]] = leaf
        else:
            tree[name] = leaf
    return tree


def to_jaxlm(flat: dict[str, np.ndarray], layers: int) -> dict:
    """The same weights in the tree of jaxlm.model.transformer: layers stacked, one layer per period."""

    def stacked(name: str) -> np.ndarray:
        return np.stack([flat[f"layers/{n}/{name}"] for n in range(layers)])

    block = {
        "attention": {name: stacked(name) for name in ("wq", "wk", "wv", "wo")},
        "attention_norm": {"scale": stacked("attention_norm")},
        "mlp": {name: stacked(name) for name in ("w_gate", "w_up", "w_down")},
        "mlp_norm": {"scale": stacked("mlp_norm")},
    }
    return {
        "embed": {"table": flat["embed"]},
        "blocks": {"0": block},
        "final_norm": {"scale": flat["norm"]},
        "head": {"w": flat["head"]},
    }


# ---------------------------------------------------------------------------------------------- the variants


def plain_variant(shape, flat: dict[str, np.ndarray], tokens: np.ndarray) -> Turn:
    """tools/plain_jax.py, waited for at every step."""
    import jax

    plain = load_plain()
    params = jax.tree.map(jax.numpy.asarray, unflatten(flat, shape.layers))
    carry = [params, plain.optimizer().init(params), 0]
    step = plain.make_step(shape)

    def turn(steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            ids = tokens[carry[2] % len(tokens)]
            *carry[:2], value = step(carry[0], carry[1], ids[:, :-1], ids[:, 1:])
            losses.append(float(value))
            carry[2] += 1
        return losses

    return turn


def torch_variant(shape, flat: dict[str, np.ndarray], tokens: np.ndarray) -> Turn:
    """tools/plain_torch.py."""
    spec = importlib.util.spec_from_file_location("plain_torch", TOOLS / "plain_torch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = dict(layers=shape.layers, heads=shape.heads, rope_theta=shape.rope_theta, norm_eps=shape.norm_eps)
    step = module.make_step(module.load(flat), threads=len(os.sched_getaffinity(0)), **sizes)
    done = [0]

    def turn(steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            ids = tokens[done[0] % len(tokens)]
            losses.append(step(ids[:, :-1], ids[:, 1:]))
            done[0] += 1
        return losses

    return turn


def jaxlm_configs(shape, *, dtype: str = "float32", scan: bool = False, num_steps: int = 10**6):
    """The workload as jaxlm's frozen configs: (model, optimizer)."""
    from jaxlm.model.attention import AttentionConfig
    from jaxlm.model.positions import PositionConfig
    from jaxlm.model.transformer import TransformerConfig
    from jaxlm.optim import OptimConfig

    plain = load_plain()
    model = TransformerConfig(
        vocab_size=shape.vocab,
        num_layers=shape.layers,
        model_dim=shape.model_dim,
        mlp_dim=shape.mlp_dim,
        norm_eps=shape.norm_eps,
        scan=scan,
        remat="full" if scan else "none",
        dtype=dtype,
        attention=AttentionConfig(num_heads=shape.heads),
        position=PositionConfig(theta=shape.rope_theta),
    )
    settings = dict(plain.OPTIMIZER)
    optim = OptimConfig(
        name="adamw",
        lr=settings.pop("learning_rate"),
        schedule="constant",
        warmup=0.0,
        clip_norm=plain.CLIP,
        **settings,
    )
    return model, optim


def jaxlm_step(shape, flat: dict[str, np.ndarray], **options):
    """(state, step, layout) of the library with these weights, built of what `jaxlm train` is built of."""
    import jax

    from jaxlm.model import transformer
    from jaxlm.objectives.lm import LossConfig, make_lm_objective
    from jaxlm.optim import make_optimizer, make_schedule
    from jaxlm.sharding import Layout, MeshConfig, make_mesh
    from jaxlm.train.programs import Model
    from jaxlm.train.state import create_state
    from jaxlm.train.step import make_step

    cfg, optim = jaxlm_configs(shape, **options)

    objective = make_lm_objective(Model(cfg), LossConfig(), np.ones(shape.vocab, np.float32))
    schedule = make_schedule(optim, 10**6, shape.batch * shape.length)
    optimizer = make_optimizer(optim, schedule)
    layout = Layout(make_mesh(MeshConfig(), devices=jax.devices()[:1]))
    init = functools.partial(transformer.init, cfg)
    state, _ = create_state(init, optimizer, 0, layout=layout, table=transformer.AXES)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    params = jax.device_put(to_jaxlm(flat, shape.layers), shardings.params)
    return (
        dataclasses.replace(state, params=params),
        make_step(objective, optimizer, shardings=shardings),
        layout,
    )


def make_batch(ids: np.ndarray) -> dict[str, np.ndarray]:
    """A batch of jaxlm's data room: one document fills each row."""
    B, T = ids.shape[0], ids.shape[1] - 1
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": np.ones((B, T), np.float32),
        "segments": np.ones((B, T), np.int32),
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy(),
    }


def jaxlm_variant(shape, flat: dict[str, np.ndarray], tokens: np.ndarray, **options) -> Turn:
    """The library's step, waited for at every step."""
    import jax

    from jaxlm.sharding import use

    state, step, layout = jaxlm_step(shape, flat, **options)
    carry = [state, 0]

    def turn(steps: int) -> list[float]:
        losses = []
        with use(layout):
            for _ in range(steps):
                batch = make_batch(tokens[carry[1] % len(tokens)])
                carry[0], metrics = step(carry[0], None, batch)
                total, weight = jax.device_get(metrics["nll"])
                losses.append(float(total / weight))
                carry[1] += 1
        return losses

    return turn


def loop_variant(shape, flat: dict[str, np.ndarray], tokens: np.ndarray) -> Turn:
    """The training loop around the library's step: prefetch thread, console, metrics file, TensorBoard."""
    from jaxlm.data.loader import prefetch
    from jaxlm.sharding import use
    from jaxlm.train.feed import place_batch
    from jaxlm.train.loop import train_loop
    from jaxlm.train.metrics import Console, JsonlWriter, Reporter, TensorBoardWriter

    state, step, layout = jaxlm_step(shape, flat)
    carry = [state, 0]
    folder = pathlib.Path(tempfile.mkdtemp(prefix="bench_train-"))
    atexit.register(shutil.rmtree, folder)
    console = Console(10**6, stream=(folder / "console.txt").open("w"), bar=False)
    writers = [console, JsonlWriter(folder / "metrics.jsonl"), TensorBoardWriter(folder / "events")]
    reporter = Reporter(writers, tokens_per_step=shape.batch * shape.length)
    batches = prefetch(
        lambda n: make_batch(tokens[n % len(tokens)]), 0, place=functools.partial(place_batch, layout)
    )
    atexit.register(batches.close)

    def turn(steps: int) -> list[float]:
        losses = []

        def report(row) -> None:
            reporter(row)
            losses.append(reporter.last["train/nll"])

        start = carry[1]
        with use(layout):
            ended = train_loop(
                carry[0],
                None,
                step,
                lambda n, state: next(batches),
                num_steps=start + steps,
                start=start,
                report=report,
                tick=console.tick,
            )
        carry[:] = ended.state, ended.step
        return losses

    return turn


VARIANTS: dict[str, Callable[..., Turn]] = {
    "jaxlm": jaxlm_variant,
    "plain": plain_variant,
    "torch": torch_variant,
    "bf16": functools.partial(jaxlm_variant, dtype="bfloat16"),
    "scan": functools.partial(jaxlm_variant, scan=True),
    "loop": loop_variant,
}


# ----------------------------------------------------------------------------------- workers and their turns


def work(name: str, folder: pathlib.Path) -> None:
    """A worker: runs as many steps as each line of stdin says, and answers with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    shape = types.SimpleNamespace(**json.loads((folder / "shape.json").read_text()))
    with np.load(folder / "params.npz") as arrays:
        flat = dict(arrays)
    turn = VARIANTS[name](shape, flat, np.load(folder / "tokens.npy"))
    for line in sys.stdin:
        began = time.perf_counter()
        losses = turn(int(line))
        answers.write(json.dumps({"seconds": time.perf_counter() - began, "losses": losses}) + "\n")


class Worker:
    """A variant in its own process."""

    def __init__(self, name: str, folder: pathlib.Path, python: str) -> None:
        sys.path.insert(0, str(TOOLS.parent))
        from jaxlm.cli import MALLOC  # what `jaxlm train` starts itself again with; for every variant

        self.name, self.rates, self.losses = name, [], []
        environment = {
            "JAX_PLATFORMS": "cpu",
            "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false",  # as `jaxlm train` sets it
            "GLIBC_TUNABLES": MALLOC,
            "PYTHONPATH": str(TOOLS.parent),
        }
        self._process = subprocess.Popen(
            [python, str(TOOLS / "bench_train.py"), "--worker", name, "--folder", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def turn(self, steps: int) -> float:
        """Runs that many steps; returns the seconds that they took."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"error: the variant {self.name!r} ended with exit code {self._process.wait()}")
        answer = json.loads(answer)
        self.losses += answer["losses"]
        return answer["seconds"]

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def check_losses(workers: list[Worker]) -> None:
    """Stops unless every variant's losses over the first steps are those of the first one."""
    first = workers[0]
    for worker in workers[1:]:
        for step, (a, b) in enumerate(zip(first.losses, worker.losses, strict=True)):
            if not abs(a - b) <= TOLERANCE[worker.name] * a:
                raise SystemExit(
                    f"error: not the same workload: at step {step} the loss of {first.name!r} is {a:.6f}, "
                    f"that of {worker.name!r} is {b:.6f}"
                )


def compare(names: list[str], shape, *, rounds: int, steps: int, torch_python: str) -> dict:
    """Runs the variants in turns and returns what there is to report."""
    import jax

    plain = load_plain()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        flat = flatten(plain.init(shape, jax.random.key(0)))
        np.savez(folder / "params.npz", **flat)
        np.save(folder / "tokens.npy", make_tokens(64, shape))
        (folder / "shape.json").write_text(json.dumps(dataclasses.asdict(shape)))
        workers = [
            Worker(name, folder, torch_python if name == "torch" else sys.executable) for name in names
        ]
        try:
            compile_seconds = {worker.name: worker.turn(1) for worker in workers}
            for worker in workers:
                worker.turn(CHECKED_STEPS - 1)
            check_losses(workers)
            for number in range(rounds):
                for worker in workers:
                    worker.rates.append(steps * shape.batch * shape.length / worker.turn(steps))
                rates = ", ".join(f"{worker.name} {worker.rates[-1]:.0f}" for worker in workers)
                print(f"round {number + 1} of {rounds}, tokens/s: {rates}", file=sys.stderr)
        finally:
            for worker in workers:
                worker.close()
    rates = {worker.name: worker.rates for worker in workers}
    ratios = {}
    for name, base in RATIOS:
        if name in rates and base in rates:
            each = [a / b for a, b in zip(rates[name], rates[base], strict=True)]
            ratios[f"{name}/{base}"] = summary(each, 3)
    return {
        "benchmark": "train",
        "params": sum(leaf.size for leaf in flat.values()),
        "shape": dataclasses.asdict(shape),
        "tokens_per_second": {name: summary(each, 0) for name, each in rates.items()},
        "ratios": ratios,
        "first_step_seconds": {name: round(seconds, 2) for name, seconds in compile_seconds.items()},
        "final_loss": {worker.name: round(worker.losses[-1], 5) for worker in workers},
        "steps": CHECKED_STEPS + rounds * steps,
        "rounds": rounds,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def summary(values: list[float], digits: int) -> dict[str, float]:
    """Median and range over the rounds."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def has_torch(python: str) -> bool:
    """Whether that interpreter can import torch."""
    return subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0


def main() -> None:
    """Parses the flags, runs the comparison, prints one JSON line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--variants", default="", help="comma separated; default: all that can run here")
    parser.add_argument("--rounds", type=int, default=4, help="turns of every variant")
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round")
    parser.add_argument(
        "--torch-python", default=sys.executable, help="interpreter that has torch, if not this one"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        work(flags.worker, flags.folder)
        return
    names = flags.variants.split(",") if flags.variants else [name for name in VARIANTS if name != "torch"]
    unknown = set(names) - set(VARIANTS)
    if unknown:
        parser.error(f"no variant {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    if "torch" in names or not flags.variants:
        if has_torch(flags.torch_python):
            names = [name for name in VARIANTS if name in {*names, "torch"}]
        elif "torch" in names:
            parser.error(f"{flags.torch_python} has no torch")
        else:
            print("torch is not installed: compared without it", file=sys.stderr)
    os.environ["JAX_PLATFORMS"] = "cpu"
    shape = load_plain().Workload()
    if flags.quick:
        shape = dataclasses.replace(
            shape, layers=2, model_dim=64, heads=4, mlp_dim=128, vocab=512, length=32, batch=4
        )
        flags.rounds, flags.steps = 1, 2
    print(
        json.dumps(
            compare(names, shape, rounds=flags.rounds, steps=flags.steps, torch_python=flags.torch_python)
        )
    )


if __name__ == "__main__":
    main()
