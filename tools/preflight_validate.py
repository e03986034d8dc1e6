"""How far the analytic memory model is from the compiler, case by case, as a Markdown table.

    python tools/preflight_validate.py --backend=splash --cache=runs/preflight

Cases are the pods of `preflight_pods.py` and models of 8 layers on four chips. Each is compiled once (some
minutes on one core) and kept in the cache. The model predicts the most that is in use at one time; beside
the compiler's figure for it stands what it reserves, which is more as its allocator leaves holes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from preflight_pods import PODS, chosen, pod

from jaxlm.config import RunConfig, build
from jaxlm.errors import UserError
from jaxlm.preflight.compiled import default_cache, facts_of
from jaxlm.preflight.report import GiB, make_report
from jaxlm.preflight.topology import Topology, parse_topology

DENSE = dict(vocab_size=32_000, num_layers=8, model_dim=2048, mlp_dim=5632, dtype="bfloat16", remat="full")
DENSE |= dict(attention=dict(num_heads=16, num_kv_heads=4))
MOE = DENSE | dict(mlp_dim=2816, mlp_pattern=("moe",), moe=dict(num_experts=8, top_k=2))
FSDP = dict(data=1, fsdp=4)

# name -> (model, changes to it, mesh, rows, T, microbatches), on four chips
SMALL: dict[str, tuple] = {
    "dense": (DENSE, {}, FSDP, 16, 2048, 1),
    "dense, minimal remat": (DENSE, dict(remat="minimal"), FSDP, 16, 2048, 1),
    "dense, no remat": (DENSE, dict(remat="none"), FSDP, 4, 2048, 1),
    "dense, 4 microbatches": (DENSE, {}, FSDP, 64, 2048, 4),
    "dense, data": (DENSE, {}, dict(data=4), 16, 2048, 1),
    "dense, fsdp x tensor": (DENSE, {}, dict(data=1, fsdp=2, tensor=2), 16, 2048, 1),
    "long, T 32,768": (DENSE, {}, FSDP, 4, 32_768, 1),
    "long, fsdp x tensor": (DENSE, {}, dict(data=1, fsdp=2, tensor=2), 2, 32_768, 1),
    "experts": (MOE, {}, FSDP, 16, 2048, 1),
    "experts over expert": (MOE, {}, dict(data=1, fsdp=2, expert=2), 16, 2048, 1),
}


def case(name: str, backend: str) -> tuple[RunConfig, Topology]:
    """The run and the hardware of a case."""
    if name in PODS:
        return pod(name, backend)
    model, changes, mesh, rows, length, microbatches = SMALL[name]
    model = {**model, **changes}
    model["attention"] = {**model["attention"], **({"backend": backend} if backend else {})}
    tree = dict(model=model, mesh=mesh, data=dict(seq_len=length, batch_size=rows))
    return build({**tree, "train": dict(microbatches=microbatches)}), parse_topology("v5p:2x2x1")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a case is off by more than --within."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", default="", help="folder of facts; empty = the default one")
    parser.add_argument("--backend", default="", help="attention backend; empty = the config's default")
    parser.add_argument("--within", type=float, default=0.1, help="largest relative error that passes")
    parser.add_argument("--only", default="", help="names of cases, separated by ';'; empty = all")
    args = parser.parse_args(argv)
    try:
        names = chosen(args.only, (*PODS, *SMALL))
    except UserError as error:
        parser.error(str(error))
    jax.config.update("jax_platforms", "cpu")
    cache = Path(args.cache) if args.cache else default_cache()
    heads = ["case", "pod", "mesh", "tokens a chip", "model GiB", "peak GiB", "error", "reserved GiB"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|", flush=True)
    worst = 0.0
    for name in names:
        cfg, hardware = case(name, args.backend)
        facts, _ = facts_of(cfg, hardware, cache)
        report = make_report(cfg, hardware, facts)
        mesh = " x ".join(f"{axis} {n}" for axis, n in facts.mesh.items() if n > 1)
        cells = [name, report.topology, mesh, f"{report.tokens_per_step // report.chips:,}"]
        cells.append(f"{report.estimate.total / GiB:.2f}")
        if facts.memory is None:
            cells += ["does not fit", "", ""]
        else:
            error = report.estimate.total / facts.memory.peak - 1
            worst = max(worst, abs(error))
            cells += [
                f"{facts.memory.peak / GiB:.2f}",
                f"{error:+.0%}",
                f"{facts.memory.allocated / GiB:.2f}",
            ]
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\nworst error {worst:.0%}")
    return int(worst > args.within)


if __name__ == "__main__":
    sys.exit(main())
