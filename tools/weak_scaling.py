"""Weak scaling in the compiled program: bytes that a chip sends per step, 8B from 16 to 4,096 chips of v5p.

    python tools/weak_scaling.py --cache=runs/preflight --plot=weak_scaling.png

Every chip keeps 32,768 tokens. Weights, gradients and optimizer state are split over at most 64 chips (`fsdp`
x `expert`, which a dense model has no other use for) and copied over the rest (`data`), so that what a chip
sends stays the same but for the sums over copies. Each size is compiled whole, all 32 layers, some minutes on
one core, and kept in the cache; beside what the program sends stands the closed form of that layout.
"""

import argparse
import math
import sys
from pathlib import Path

import jax
import numpy as np
from preflight_pods import LLAMA3_8B

from jaxlm.config import RunConfig, build
from jaxlm.model.splash import LANES
from jaxlm.model.transformer import AXES, abstract_params
from jaxlm.preflight.compiled import Facts, default_cache, facts_of
from jaxlm.preflight.report import sums
from jaxlm.preflight.topology import Topology, parse_topology
from jaxlm.sharding import leaf_axes
from jaxlm.tree import named_leaves

# chips -> (topology, data, fsdp, expert)
SIZES = {
    16: ("v5p:2x2x4", 1, 4, 4),
    64: ("v5p:4x4x4", 1, 16, 4),
    256: ("v5p:4x8x8", 4, 16, 4),
    1024: ("v5p:8x8x16", 16, 16, 4),
    4096: ("v5p:16x16x16", 64, 16, 4),
}
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
ROWS, LENGTH = 4, 8192  # of a chip


def scaled(chips: int, backend: str) -> tuple[RunConfig, Topology]:
    """The run on so many chips."""
    topology, data, fsdp, expert = SIZES[chips]
    mesh = dict(data=data, fsdp=fsdp, expert=expert, rules=(("embed", "fsdp expert"),))
    model = {**LLAMA3_8B, "attention": {**LLAMA3_8B["attention"], "backend": backend}}
    data = dict(seq_len=LENGTH, batch_size=ROWS * chips)
    return build(dict(model=model, mesh=mesh | dict(reduce_dtype="bfloat16"), data=data)), parse_topology(
        topology
    )


def closed_form(cfg: RunConfig, slice_chips: int) -> dict[str, float]:
    """Bytes that a chip sends in a step by kind of collective, from shapes alone.

    With p the chips that share one copy of the weights, d = `data` copies, w the bytes of the weights in
    bfloat16: a block's weights are gathered forward and backward, 2 (p - 1) / p w, and their gradients
    scattered, (p - 1) / p w, one mesh axis after the other. The last step of a scatter whose part is narrower
    than 128 lanes is a sum of the whole, twice the bytes. The unembedding is gathered once, its gradient
    scattered once, over all p at once: as sums, twice the bytes, where p fills the torus. Gradients are then
    summed over copies, 2 (d - 1) / d w / p. Embeddings travel to and fro, an exchange along each axis.
    """
    model, mesh = cfg.model, cfg.mesh
    axes = {name: n for name, n in (("fsdp", mesh.fsdp), ("expert", mesh.expert)) if n > 1}
    p, d = math.prod(axes.values()), mesh.data
    out, total = dict.fromkeys(KINDS, 0.0), 0.0
    for name, leaf in named_leaves(abstract_params(model)):
        logical, size = leaf_axes(name, len(leaf.shape), AXES), 2.0 * math.prod(leaf.shape)
        if "embed" not in logical:  # norms
            continue
        total += size
        if name.startswith("head"):
            sums_alone = p == slice_chips
            out["all-reduce" if sums_alone else "all-gather"] += (1 + sums_alone) * (p - 1) / p * size
            out["all-reduce" if sums_alone else "reduce-scatter"] += (1 + sums_alone) * (p - 1) / p * size
        elif not name.startswith("embed"):
            out["all-gather"] += 2 * (p - 1) / p * size
            parts = 1
            for n in axes.values():
                sent, parts = (n - 1) / n * size / parts, parts * n
                narrow = logical[-1] == "embed" and model.model_dim / parts < LANES
                out["all-reduce" if narrow else "reduce-scatter"] += (1 + narrow) * sent
    out["all-reduce"] += 2 * (d - 1) / d * total / p
    tokens = ROWS * LENGTH * model.model_dim * np.dtype(model.dtype).itemsize
    out["all-to-all"] = 2 * sum((n - 1) / n for n in axes.values()) * tokens
    return out


def measured(facts: Facts) -> dict[str, float]:
    """The same from the compiled program."""
    totals = sums(facts.collectives)
    return {kind: totals.get(kind, {"ici": 0.0})["ici"] for kind in KINDS}


def plot(rows: dict[int, tuple[dict[str, float], dict[str, float]]], path: Path) -> None:
    """Gigabytes a chip sends against chips: bars of the program, marks of the closed form."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    at, bottom = np.arange(len(rows)), np.zeros(len(rows))
    for kind in KINDS:
        sent = np.array([real[kind] / 1e9 for real, _ in rows.values()])
        axis.bar(at, sent, 0.6, bottom=bottom, label=kind)
        bottom += sent
    form = [sum(guess.values()) / 1e9 for _, guess in rows.values()]
    axis.plot(at, form, "k_", markersize=34, markeredgewidth=2, label="closed form")
    axis.set_xticks(at, [f"{chips:,}" for chips in rows])
    axis.set_xlabel("chips (TPU v5p), 32,768 tokens each")
    axis.set_ylabel("GB that a chip sends in a step")
    axis.set_title("8B, weights over 64 chips at most: weak scaling in the compiled program", fontsize=10)
    axis.set_ylim(0, max(bottom.max(), max(form)) * 1.3)
    axis.legend(ncols=3, frameon=False, loc="upper left")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> int:
    """Print the table; 1 if a kind of collective is off by more than --within."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", default="", help="sizes, separated by commas; empty = all")
    parser.add_argument("--backend", default="splash", help="attention backend")
    parser.add_argument("--cache", default="", help="folder of facts; empty = the default one")
    parser.add_argument("--plot", default="", help="PNG to write")
    parser.add_argument("--within", type=float, default=0.05, help="largest relative error that passes")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    cache = Path(args.cache) if args.cache else default_cache()
    chosen = [int(n) for n in args.chips.split(",")] if args.chips else list(SIZES)
    print("| chips | mesh | peak GiB | " + " | ".join(KINDS) + " | all | closed form | worst kind off by |")
    print("|---" * (6 + len(KINDS)) + "|", flush=True)
    rows, worst = {}, 0.0
    for chips in chosen:
        cfg, hardware = scaled(chips, args.backend)
        facts, _ = facts_of(cfg, hardware, cache)
        real, guess = measured(facts), closed_form(cfg, hardware.num_chips)
        rows[chips] = (real, guess)
        errors = {kind: abs(real[kind] / guess[kind] - 1) for kind in KINDS}
        worst = max(worst, *errors.values())
        mesh = " x ".join(f"{axis} {n}" for axis, n in facts.mesh.items() if n > 1)
        cells = [f"{real[kind] / 1e9:.2f} ({guess[kind] / 1e9:.2f})" for kind in KINDS]
        cells += [f"{sum(x.values()) / 1e9:.2f}" for x in (real, guess)]
        head = f"| {chips:,} | {mesh} | {facts.memory.peak / 2**30:.1f} | "
        print(f"{head}{' | '.join(cells)} | {max(errors.values()):.1%} |", flush=True)
    if args.plot:
        plot(rows, Path(args.plot))
    return int(worst > args.within)


if __name__ == "__main__":
    sys.exit(main())
