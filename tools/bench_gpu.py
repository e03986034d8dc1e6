"""Speed of jaxlm's training step on one NVIDIA GPU, in bf16 with cuDNN attention, against PyTorch.

    python tools/bench_gpu.py                                   # all models, two rounds: about ten minutes
    python tools/bench_gpu.py --models 1.3B --rounds 3 --torch_python ~/torch/bin/python
    python tools/bench_gpu.py --tiny                            # tiny shapes on any machine: measures nothing

Every measurement is a process of its own, which has the GPU to itself: jaxlm, then PyTorch, for each model in
each round. Rows of 2,048 tokens, one document each, AdamW in fp32, fp32 parameters, bf16 products. PyTorch is
tools/plain_torch.py under autocast: scaled_dot_product_attention, torch.compile, fused AdamW. It has no
experts of its own, so the small MoE stands alone.

Prints one JSON line: for every model tokens per second (median and range over the rounds), MFU by the exact
count of FLOPs over the GPU's dense bf16 peak, whether cuDNN's attention stands in the compiled program, and
the ratio to PyTorch, taken within a round. Exit code 2 where there is no GPU.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np

TOOLS = pathlib.Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and its batch."""

    layers: int
    model_dim: int
    heads: int
    mlp_dim: int
    batch: int
    length: int = 2048
    vocab: int = 50304
    experts: int = 0  # top 2 of them in every layer; 0 = dense
    remat: str = "minimal"


MODELS = {
    "125M": Shape(layers=12, model_dim=768, heads=12, mlp_dim=2048, batch=32),
    "350M": Shape(layers=24, model_dim=1024, heads=16, mlp_dim=2816, batch=16),
    "1.3B": Shape(layers=24, model_dim=2048, heads=16, mlp_dim=5504, batch=8),
    "moe": Shape(layers=12, model_dim=768, heads=12, mlp_dim=1024, batch=16, experts=8),
}


def tiny(shape: Shape) -> Shape:
    """The same kind of model, small enough for a CPU."""
    small = dict(layers=2, model_dim=32, heads=2, mlp_dim=32, batch=2, length=32, vocab=64)
    return dataclasses.replace(shape, **small, experts=min(shape.experts, 4))


def tokens_of(shape: Shape) -> np.ndarray:
    """One batch, i32[B, T + 1]."""
    rng = np.random.default_rng(0)
    return rng.integers(0, shape.vocab, (shape.batch, shape.length + 1), dtype=np.int32)


def timed(step, steps: int) -> float:
    """Seconds of a step, the median; `step()` returns when the device is done."""
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def run_jaxlm(shape: Shape, steps: int, backend: str) -> dict:
    """Tokens per second, FLOPs per token and the attention that was compiled, of the library's own step."""
    from functools import partial

    import jax

    from jaxlm.chips import peak_flops
    from jaxlm.model import transformer
    from jaxlm.model.attention import AttentionConfig
    from jaxlm.model.moe import MoEConfig
    from jaxlm.objectives.lm import LossConfig, make_lm_objective
    from jaxlm.optim import OptimConfig, make_optimizer, make_schedule
    from jaxlm.scaling.counting import count
    from jaxlm.train.state import create_state
    from jaxlm.train.step import make_step

    cfg = transformer.TransformerConfig(
        vocab_size=shape.vocab,
        num_layers=shape.layers,
        model_dim=shape.model_dim,
        mlp_dim=shape.mlp_dim,
        mlp_pattern=("moe",) if shape.experts else ("dense",),
        moe=MoEConfig(num_experts=shape.experts, expert_dim=shape.mlp_dim if shape.experts else 0),
        dtype="bfloat16",
        remat=shape.remat,
        attention=AttentionConfig(num_heads=shape.heads, backend=backend),
    )

    class OneDocument:
        """The model on rows that hold one document each: no segments to tell apart."""

        def apply(self, params, batch, key):
            hidden_BTD, _, aux = transformer.apply(cfg, params, batch["tokens"], key=key)
            return hidden_BTD, aux

        unembed = staticmethod(partial(transformer.unembed, cfg))

    optim = OptimConfig(lr=3e-4)
    optimizer = make_optimizer(optim, make_schedule(optim, 10**6, shape.batch * shape.length))
    state, _ = create_state(partial(transformer.init, cfg), optimizer, 0)
    ids = tokens_of(shape)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:]}
    batch["weights"] = np.ones(batch["tokens"].shape, np.float32)
    batch = jax.device_put(batch)
    objective = make_lm_objective(OneDocument(), LossConfig(chunk=min(512, shape.length)), None)
    step = make_step(objective, optimizer).lower(state, None, batch).compile()
    carry = [state]

    def once() -> float:
        carry[0], metrics = step(carry[0], None, batch)
        total, weight = jax.device_get(metrics["total"])
        return float(total / weight)

    first, _ = once(), once()
    seconds = timed(once, steps)
    kind = jax.devices()[0].device_kind
    flops, peak = count(cfg, shape.length).flops_train, peak_flops(kind)
    speed = shape.batch * shape.length / seconds
    return {
        "tokens_per_second": speed,
        "mfu": speed * flops / peak if peak else None,
        "parameters": count(cfg, shape.length).n_total,
        "cudnn_attention": "__cudnn$fmha" in step.as_text(),
        "loss": [first, once()],
        "device": kind,
    }


def run_torch(shape: Shape, steps: int, device: str) -> dict:
    """Tokens per second of tools/plain_torch.py's loss under autocast, compiled."""
    import torch

    spec = importlib.util.spec_from_file_location("plain_torch", TOOLS / "plain_torch.py")
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    torch.set_default_device(device)
    torch.set_float32_matmul_precision("high")
    D, F, V = shape.model_dim, shape.mlp_dim, shape.vocab
    sizes = {"embed": (V, D), "head": (D, V), "norm": (D,)}
    layer = {"wq": (D, D), "wk": (D, D), "wv": (D, D), "wo": (D, D), "w_gate": (D, F), "w_up": (D, F)}
    layer |= {"w_down": (F, D), "attention_norm": (D,), "mlp_norm": (D,)}
    sizes |= {f"layers/{n}/{name}": size for n in range(shape.layers) for name, size in layer.items()}
    params = {
        name: (torch.ones(size) if len(size) == 1 else 0.02 * torch.randn(size)).requires_grad_()
        for name, size in sizes.items()
    }
    matrices = [leaf for leaf in params.values() if leaf.ndim > 1]
    vectors = [leaf for leaf in params.values() if leaf.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": plain.WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, fused=True, **plain.OPTIMIZER)
    options = dict(layers=shape.layers, heads=shape.heads, rope_theta=10000.0, norm_eps=1e-6)
    compiled = torch.compile(lambda tokens, targets: plain.loss(params, tokens, targets, **options))
    ids = torch.as_tensor(tokens_of(shape), dtype=torch.long, device=device)

    def once() -> float:
        with torch.autocast(device, dtype=torch.bfloat16):
            value = compiled(ids[:, :-1], ids[:, 1:])
        value.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), plain.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    first, _ = once(), once()
    return {"tokens_per_second": shape.batch * shape.length / timed(once, steps), "loss": [first, once()]}


def worker(python: str, *words: str) -> dict:
    """What one measuring process prints."""
    paths = os.pathsep.join(filter(None, (str(TOOLS.parent), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "PYTHONPATH": paths}
    command = [python, str(TOOLS / "bench_gpu.py"), *words]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench_gpu: {' '.join(words)} failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float]) -> dict:
    """Median and range."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def summary(jaxlm: list[dict], torch: list[dict]) -> dict:
    """One model's part of the result, from its measurements by round.

    >>> pair = summary([{"tokens_per_second": 30.0, "mfu": 0.5}], [{"tokens_per_second": 20.0}])
    >>> pair["mfu"]["median"], pair["over_torch"]["median"]
    (0.5, 1.5)
    """
    told = {name: x for name, x in jaxlm[0].items() if name not in ("tokens_per_second", "mfu")}
    out = {**told, "tokens_per_second": spread([m["tokens_per_second"] for m in jaxlm])}
    out["mfu"] = None if jaxlm[0]["mfu"] is None else spread([m["mfu"] for m in jaxlm])
    if torch:
        out["torch_tokens_per_second"] = spread([m["tokens_per_second"] for m in torch])
        pairs = zip(jaxlm, torch, strict=True)
        out["over_torch"] = spread([a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs])
    return out


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), help="which, separated by commas")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a measurement")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each")
    parser.add_argument(
        "--torch_python", default=sys.executable, help="interpreter that has PyTorch; '' = none"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on any machine: shows that it runs")
    parser.add_argument("--worker", default="", choices=("", "jaxlm", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    unknown = [name for name in args.models.split(",") if name not in MODELS]
    if unknown:
        parser.error(f"--models: there is no {unknown[0]!r} (models: {', '.join(MODELS)})")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    names = args.models.split(",")
    if args.worker:
        shape = tiny(MODELS[names[0]]) if args.tiny else MODELS[names[0]]
        if args.worker == "torch":
            print(json.dumps(run_torch(shape, args.steps, "cpu" if args.tiny else "cuda")))
            return 0
        import jax

        if not args.tiny and jax.default_backend() != "gpu":
            print(
                f"bench_gpu: this needs an NVIDIA GPU, and JAX sees a {jax.default_backend()}",
                file=sys.stderr,
            )
            return 2
        print(json.dumps(run_jaxlm(shape, args.steps, "blocked" if args.tiny else "cudnn")))
        return 0
    if not args.tiny and not list(pathlib.Path("/dev").glob("nvidia[0-9]*")):
        print(
            "bench_gpu: this needs an NVIDIA GPU, and there is none (/dev/nvidia*); --tiny tries it without",
            file=sys.stderr,
        )
        return 2
    if args.torch_python:
        found = subprocess.run([args.torch_python, "-c", "import torch"], capture_output=True, check=False)
        if found.returncode:
            print(
                f"bench_gpu: {args.torch_python} has no PyTorch; give --torch_python=PATH, or '' for none",
                file=sys.stderr,
            )
            return 2
    common = ["--steps", str(args.steps), *(["--tiny"] if args.tiny else [])]
    result = {}
    for name in names:
        jaxlm, torch = [], []
        for _ in range(args.rounds):
            jaxlm.append(worker(sys.executable, "--worker", "jaxlm", "--models", name, *common))
            if args.torch_python and not MODELS[name].experts:
                torch.append(worker(args.torch_python, "--worker", "torch", "--models", name, *common))
        result[name] = summary(jaxlm, torch)
        print(f"{name}: {json.dumps(result[name])}", file=sys.stderr, flush=True)
        if not args.tiny and not result[name]["cudnn_attention"]:
            raise SystemExit(f"bench_gpu: {name} was compiled without cuDNN's attention")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
