"""Weak scaling in the compiled program: bytes that a chip sends per step, 8B from 16 to 4,096 chips of v5p.

    python tools/weak_scaling.py --cache=runs/preflight --plot=weak_scaling.png

Every chip keeps 2,048 tokens: what weights send does not depend on it, the exchange of embeddings grows with
it. Weights, gradients and optimizer state are split over at most 64 chips (`fsdp` x `expert`, which a dense
model has no other use for) and copied over the rest (`data`), so that what a chip sends stays the same but
for the sums over copies. Each size is compiled whole, all 32 layers, some minutes on one core, and kept in
the cache; beside what the program sends stands the closed form of that layout.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from preflight_pods import LLAMA3_8B

from jaxlm.config import RunConfig, build
from jaxlm.errors import UserError, check_choice
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
ROWS, LENGTH = 4, 512  # of a chip
RING = 4  # chips in a row that v5p closes to a ring, and multiples


def scaled(chips: int, backend: str) -> tuple[RunConfig, Topology]:
    """The run on so many chips."""
    topology, data, fsdp, expert = SIZES[chips]
    mesh = dict(data=data, fsdp=fsdp, expert=expert, rules=(("embed", "fsdp expert"),))
    model = {**LLAMA3_8B, "attention": {**LLAMA3_8B["attention"], "backend": backend}}
    data = dict(seq_len=LENGTH, batch_size=ROWS * chips)
    return build(dict(model=model, mesh=mesh | dict(reduce_dtype="bfloat16"), data=data)), parse_topology(
        topology
    )


def closed_form(cfg: RunConfig, hardware: Topology) -> dict[str, float]:
    """Bytes that a chip sends in a step by kind of collective, from shapes alone.

    With p = a b the chips that share one copy of the weights (a `fsdp`, b `expert`), d `data` copies, w bytes
    of the blocks' weights in bfloat16, h those of the unembedding:

        gathered    2 (p - 1) / p w, forward and backward, and (p - 1) / p h unless p fills a torus of rings
        scattered   (a - 1) / a w, and (b - 1) / b w / a if there is one copy
        summed      2 (b d - 1) / (b d) w / a if there are several: over copies and the inner axis at once;
                    2 (p d - 1) / (p d) h for its gradient, 2 (p - 1) / p h where it is gathered by a sum;
                    2 (d - 1) / d of an embedding's part in float32
        exchanged   an embedding's rows, to and fro along both axes

    The second step of a scatter whose part is narrower than 128 lanes is a sum too.
    """
    model, mesh = cfg.model, cfg.mesh
    a, b, d = mesh.fsdp, mesh.expert, mesh.data
    p = a * b

    def part(n: int) -> float:
        return (n - 1) / n

    out = dict.fromkeys(KINDS, 0.0)
    for name, leaf in named_leaves(abstract_params(model)):
        logical, size = leaf_axes(name, len(leaf.shape), AXES), 2.0 * math.prod(leaf.shape)
        if "embed" not in logical:  # norms
            continue
        if name.startswith("embed"):
            out["all-reduce"] += 2 * part(d) * 2 * size / p
        elif name.startswith("head"):
            filled = p == hardware.num_chips and all(n % RING == 0 for n in hardware.shape)
            out["all-reduce" if filled else "all-gather"] += (2 if filled else 1) * part(p) * size
            out["all-reduce"] += 2 * part(p * d) * size
        else:
            out["all-gather"] += 2 * part(p) * size
            out["reduce-scatter"] += part(a) * size
            narrow = logical[-1] == "embed" and model.model_dim / p < LANES
            summed = d > 1 or narrow
            out["all-reduce" if summed else "reduce-scatter"] += (2 if summed else 1) * part(b * d) * size / a
    tokens = ROWS * LENGTH * model.model_dim * np.dtype(model.dtype).itemsize
    out["all-to-all"] = 2 * (part(a) + part(b)) * tokens
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
    axis.set_xlabel("chips (TPU v5p)")
    axis.set_ylabel("GB that a chip sends in a step")
    axis.set_title("8B, weights over 64 chips at most: weak scaling in the compiled program", fontsize=10)
    axis.set_ylim(0, max(bottom.max(), max(form)) * 1.3)
    axis.legend(ncols=3, frameon=False, loc="upper left", markerscale=0.6)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a kind of collective is off by more than --within, or a size tells nothing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", default="", help="sizes, separated by commas; empty = all")
    parser.add_argument("--backend", default="splash", help="attention backend")
    parser.add_argument("--cache", default="", help="folder of facts; empty = the default one")
    parser.add_argument("--plot", default="", help="PNG to write")
    parser.add_argument("--within", type=float, default=0.05, help="largest relative error that passes")
    args = parser.parse_args(argv)
    chosen = [n.strip() for n in args.chips.split(",")] if args.chips else [str(n) for n in SIZES]
    try:
        for chips in chosen:
            check_choice(chips, [str(n) for n in SIZES], "--chips")
    except UserError as error:
        parser.error(str(error))
    jax.config.update("jax_platforms", "cpu")
    cache = Path(args.cache) if args.cache else default_cache()
    print("| chips | mesh | peak GiB | " + " | ".join(KINDS) + " | all | closed form | worst kind off by |")
    print("|---" * (6 + len(KINDS)) + "|", flush=True)
    rows, worst, told = {}, 0.0, True
    for chips in map(int, chosen):
        cfg, hardware = scaled(chips, args.backend)
        facts, _ = facts_of(cfg, hardware, cache)
        if facts.memory is None or facts.collectives is None:
            why = f"the program cannot be read: {facts.unreadable}" if facts.memory else "does not fit"
            print(f"| {chips:,} | {why} |", flush=True)
            told = False
            continue
        real, guess = measured(facts), closed_form(cfg, hardware)
        rows[chips] = (real, guess)
        errors = {kind: abs(real[kind] / guess[kind] - 1) for kind in KINDS}
        worst = max(worst, *errors.values())
        mesh = " x ".join(f"{axis} {n}" for axis, n in facts.mesh.items() if n > 1)
        cells = [f"{real[kind] / 1e9:.2f} ({guess[kind] / 1e9:.2f})" for kind in KINDS]
        cells += [f"{sum(x.values()) / 1e9:.2f}" for x in (real, guess)]
        head = f"| {chips:,} | {mesh} | {facts.memory.peak / 2**30:.1f} | "
        print(f"{head}{' | '.join(cells)} | {max(errors.values()):.1%} |", flush=True)
    if args.plot and rows:
        plot(rows, Path(args.plot))
    return int(worst > args.within or not told)


if __name__ == "__main__":
    sys.exit(main())
