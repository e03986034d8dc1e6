"""How far the analytic memory model is from the compiler, case by case, as a Markdown table.

    python tools/preflight_validate.py --topology=v5p:2x2x1 --cache=runs/preflight

Every configuration is compiled once (a minute or more each on one core) and kept in the cache. The model
predicts arguments and temporaries; the compiler's are beside it, and the peak that is in use at one time.
"""

import argparse
import sys
from pathlib import Path

from jaxlm.config import RunConfig, build
from jaxlm.preflight.compiled import facts_of
from jaxlm.preflight.report import GiB, make_report
from jaxlm.preflight.topology import parse_topology, versions

DENSE = dict(vocab_size=32_000, num_layers=8, model_dim=2048, mlp_dim=5632, dtype="bfloat16", remat="full")
DENSE |= dict(attention=dict(num_heads=16, num_kv_heads=4))
MOE = DENSE | dict(mlp_dim=2816, mlp_pattern=("moe",), moe=dict(num_experts=8, top_k=2))
FSDP = dict(data=1, fsdp=4)

# name -> (model, changes to it, mesh, rows, T, microbatches)
CASES: dict[str, tuple] = {
    "dense": (DENSE, {}, FSDP, 16, 2048, 1),
    "dense, minimal remat": (DENSE, dict(remat="minimal"), FSDP, 16, 2048, 1),
    "dense, no remat": (DENSE, dict(remat="none"), FSDP, 4, 2048, 1),
    "dense, 4 microbatches": (DENSE, {}, FSDP, 64, 2048, 4),
    "dense, twice as deep": (DENSE, dict(num_layers=16), FSDP, 16, 2048, 1),
    "dense, data": (DENSE, {}, dict(data=4), 16, 2048, 1),
    "dense, fsdp x tensor": (DENSE, {}, dict(data=1, fsdp=2, tensor=2), 16, 2048, 1),
    "dense, large vocabulary": (DENSE, dict(vocab_size=128_000), FSDP, 16, 2048, 1),
    "long, T 16,384": (DENSE, {}, FSDP, 4, 16_384, 1),
    "long, T 32,768": (DENSE, {}, FSDP, 4, 32_768, 1),
    "long, fsdp x tensor": (DENSE, {}, dict(data=1, fsdp=2, tensor=2), 2, 32_768, 1),
    "experts": (MOE, {}, FSDP, 16, 2048, 1),
    "experts over expert": (MOE, {}, dict(data=1, fsdp=2, expert=2), 16, 2048, 1),
    "experts, minimal remat": (MOE, dict(remat="minimal"), FSDP, 8, 2048, 1),
}


def config(name: str, backend: str) -> RunConfig:
    """The run of a case."""
    model, changes, mesh, rows, length, microbatches = CASES[name]
    model = {**model, **changes}
    model["attention"] = {**model["attention"], **({"backend": backend} if backend else {})}
    tree = dict(model=model, mesh=mesh, data=dict(seq_len=length, batch_size=rows))
    return build({**tree, "train": dict(microbatches=microbatches)})


def main() -> int:
    """Print the table; 1 if a case is off by more than --within."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5p:2x2x1", help="of four devices")
    parser.add_argument("--cache", default="", help="folder of facts; empty = the default one")
    parser.add_argument("--backend", default="", help="attention backend; empty = the config's default")
    parser.add_argument("--within", type=float, default=0.1, help="largest relative error that passes")
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    args = parser.parse_args()
    import jax

    from jaxlm.preflight.compiled import default_cache

    jax.config.update("jax_platforms", "cpu")
    hardware = parse_topology(args.topology)
    cache = Path(args.cache) if args.cache else default_cache()
    print("| case | mesh | rows x T | model GiB | compiler GiB | error | peak GiB |\n" + "|---" * 7 + "|")
    worst = 0.0
    for name in (n for n in CASES if args.only in n):
        cfg = config(name, args.backend)
        facts, _ = facts_of(cfg, hardware, cache)
        report = make_report(cfg, hardware, facts)
        mesh = " ".join(f"{axis}={n}" for axis, n in facts.mesh.items() if n > 1)
        head = f"| {name} | {mesh} | {cfg.data.batch_size} x {cfg.data.seq_len:,}"
        guess = report.estimate.total / GiB
        if facts.memory is None:
            print(f"{head} | {guess:.2f} | does not fit | | |", flush=True)
            continue
        real = (facts.memory.arguments + facts.memory.temporaries) / GiB
        error = guess / real - 1
        worst = max(worst, abs(error))
        print(
            f"{head} | {guess:.2f} | {real:.2f} | {error:+.0%} | {facts.memory.peak / GiB:.2f} |", flush=True
        )
    print(f"\nworst error {worst:.0%}; {', '.join(f'{k} {v}' for k, v in versions(hardware).items())}")
    return int(worst > args.within)


if __name__ == "__main__":
    sys.exit(main())
