"""Compile well-known models for pods and print one Markdown row each: memory, traffic, roofline.

    python tools/preflight_pods.py --only=llama3-8B --backend=splash --cache=runs/preflight
    python tools/preflight_pods.py --only=llama3-405B --backend=splash --lower   # seconds before the compiler

Bytes are those of one chip and step; see jaxlm/preflight/README.md for what the columns are. A row takes one
core some minutes and is kept in the cache.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

from jaxlm.config import RunConfig, build
from jaxlm.errors import UserError, check_choice
from jaxlm.preflight.collectives import KINDS
from jaxlm.preflight.compiled import default_cache, facts_of, lower_step
from jaxlm.preflight.report import GiB, Report, make_report, sums
from jaxlm.preflight.topology import Topology, parse_topology


def llama(layers: int, dim: int, mlp: int, heads: int, kv_heads: int, vocab: int = 128_256) -> dict:
    """A Llama's shape in bf16 with full rematerialisation."""
    shape = dict(
        vocab_size=vocab, num_layers=layers, model_dim=dim, mlp_dim=mlp, dtype="bfloat16", remat="full"
    )
    return shape | dict(attention=dict(num_heads=heads, num_kv_heads=kv_heads), norm_eps=1e-5)


LLAMA2_7B = llama(32, 4096, 11_008, 32, 32, 32_000)
LLAMA3_8B = llama(32, 4096, 14_336, 32, 8)
LLAMA3_70B = llama(80, 8192, 28_672, 64, 8)
LLAMA3_405B = llama(126, 16_384, 53_248, 128, 8)
MIXTRAL = llama(32, 4096, 14_336, 32, 8, 32_000)
MIXTRAL |= dict(mlp_pattern=("moe",), moe=dict(num_experts=8, top_k=2, rounds=16))
# DeepSeek-V3's widths, router and experts, with experts in every layer, and grouped heads (128 of 128, 8 key
# heads) in place of its latent attention.
DEEPSEEK = llama(61, 7168, 18_432, 128, 8, 129_280)
DEEPSEEK["attention"]["head_dim"] = 128
DEEPSEEK |= dict(mlp_pattern=("moe",), moe=dict(num_experts=256, top_k=8, expert_dim=2048, shared_experts=1))
DEEPSEEK["moe"] |= dict(router="sigmoid", routed_scale=2.5, bias_balancing=True, rounds=16)
# The same as its report has it (arXiv:2412.19437), but for the prediction of further tokens.
DEEPSEEK_V3 = {**DEEPSEEK, "first_dense": 3, "attention": dict(num_heads=128)}
DEEPSEEK_V3["attention"]["latent"] = dict(kv_rank=512, q_rank=1536, nope_dim=128, rope_dim=64, value_dim=128)
DEEPSEEK_V3["moe"] = {**DEEPSEEK["moe"], "groups": 8, "top_groups": 4, "group_best": 2}
LLAMA3_8B_LONG = {**LLAMA3_8B, "attention": {**LLAMA3_8B["attention"], "context": "ulysses"}}


def stored_over(outer: int, inner: int, axes: str = "data fsdp", **others: int) -> dict:
    """A mesh whose weights are stored split over two axes, gathered over one after the other.

    Neither fills the torus: over a group that does, the compiler would gather by all-reduce. Gradients travel
    in bfloat16. Where `data` is taken, a dense model may use `expert`, which it has no other use for.
    """
    sizes = dict(zip(axes.split(), (outer, inner), strict=True))
    return dict(data=1) | sizes | dict(rules=(("embed", axes),), reduce_dtype="bfloat16") | others


def shared_out(fsdp: int, expert: int) -> dict:
    """A mesh whose devices share out the experts; other weights are stored split over both axes."""
    return dict(data=1, fsdp=fsdp, expert=expert, rules=(("embed", "fsdp expert"),), reduce_dtype="bfloat16")


LONG = dict(data=8, fsdp=8, sequence=8, rules=(("embed", "fsdp sequence"),), reduce_dtype="bfloat16")


# name -> (model, topology, slices, mesh, rows, T)
PODS: dict[str, tuple[dict, str, int, dict, int, int]] = {
    "llama2-7B": (LLAMA2_7B, "v5e:16x16", 1, stored_over(16, 16), 512, 4096),
    "llama3-8B": (LLAMA3_8B, "v5p:4x4x4", 1, stored_over(16, 4), 256, 8192),
    "llama3-8B on v6e": (LLAMA3_8B, "v6e:8x8", 1, stored_over(8, 8), 128, 8192),
    "llama3-70B": (LLAMA3_70B, "v5p:8x8x8", 1, stored_over(64, 8), 1024, 8192),
    "llama3-405B": (LLAMA3_405B, "v5p:16x16x16", 1, stored_over(64, 8, "fsdp expert", tensor=8), 1024, 8192),
    "mixtral-8x7B": (MIXTRAL, "v5p:4x4x4", 1, shared_out(8, 8), 512, 4096),
    "deepseek-V3-shaped": (DEEPSEEK, "v5p:8x8x8", 1, shared_out(8, 64), 1024, 4096),
    "deepseek-V3": (DEEPSEEK_V3, "v5p:8x8x8", 1, shared_out(8, 64), 1024, 4096),
    "llama3-8B, T 131,072": (LLAMA3_8B_LONG, "v5p:8x8x8", 1, LONG, 64, 131_072),
    "llama3-70B, two slices": (
        LLAMA3_70B,
        "v6e:16x16",
        2,
        stored_over(16, 16, "fsdp expert", data=2),
        512,
        8192,
    ),
}


def pod(name: str, backend: str) -> tuple[RunConfig, Topology]:
    """The run and the hardware of a row."""
    model, topology, slices, mesh, rows, length = PODS[name]
    if backend:
        model = {**model, "attention": {**model["attention"], "backend": backend}}
    cfg = build(dict(model=model, mesh=mesh, data=dict(seq_len=length, batch_size=rows)))
    return cfg, parse_topology(topology, slices)


def chosen(only: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that `--only` asks for: whole names, separated by `;`; empty = all.

    Raises:
        UserError: a name that is none of them.
    """
    names = list(names)
    asked = [name.strip() for name in only.split(";")] if only else names
    for name in asked:
        check_choice(name, names, "--only")
    return asked


def row(name: str, report: Report) -> str:
    """One line of the table."""
    facts, totals = report.facts, sums(report.facts.collectives or ())
    mesh = " x ".join(f"{axis} {n}" for axis, n in facts.mesh.items() if n > 1)
    cells = [name, report.topology, mesh, f"{report.tokens_per_step / report.chips:,.0f}"]
    if facts.memory is None:
        short = facts.shortage
        return (
            "| "
            + " | ".join([*cells, f"lacks {(short.needed - short.available) / GiB:.2f} GiB", *[""] * 8])
            + " |"
        )
    every = totals.get("all", {"ici": 0.0, "dcn": 0.0})
    kinds = ", ".join(f"{kind} {totals[kind]['ici'] / 1e9:,.1f}" for kind in KINDS if kind in totals)
    cells += [
        f"{facts.memory.allocated / GiB:.1f}",
        f"{facts.memory.peak / GiB:.1f}",
        f"{report.limit / GiB:.2f}",
    ]
    kernels = ", ".join(f"{name} {runs:,}" for name, runs in facts.kernels.items())
    cells += [f"{every['ici'] / 1e9:,.1f}", f"{every['dcn'] / 1e9:,.1f}", kinds, kernels]
    cells += [f"{report.time.mfu:.0%} ({report.time.limited_by})", f"{facts.seconds['compile']:.0f}"]
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a pod does not fit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="names of rows, separated by ';'; empty = all")
    parser.add_argument("--backend", default="", help="attention backend; empty = the config's default")
    parser.add_argument("--cache", default="", help="folder of facts; empty = the default one")
    parser.add_argument("--lower", action="store_true", help="only trace and lower, and print the seconds")
    args = parser.parse_args(argv)
    try:
        names = chosen(args.only, PODS)
    except UserError as error:
        parser.error(str(error))
    jax.config.update("jax_platforms", "cpu")
    cache = Path(args.cache) if args.cache else default_cache()
    if args.lower:
        for name in names:
            took = lower_step(*pod(name, args.backend)).seconds
            print(f"{name}: traced in {took['trace']:.2f} s, lowered in {took['lower']:.2f} s", flush=True)
        return 0
    heads = (
        "model,pod,mesh,tokens a chip,allocated GiB,peak GiB,limit GiB,GB on ICI,GB on DCN,of which,kernels"
    )
    heads = [*heads.split(","), "MFU at most", "compile s"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|", flush=True)
    fits = True
    for name in names:
        cfg, hardware = pod(name, args.backend)
        facts, _ = facts_of(cfg, hardware, cache)
        report = make_report(cfg, hardware, facts)
        fits &= report.fits
        print(row(name, report), flush=True)
        for warning in report.warnings:
            print(f"  {name}: {warning}", file=sys.stderr, flush=True)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
