"""Trains an LSTM and a transformer with equal compute and sets them beside an n-gram, on one held-out set.

    python tools/compare_baselines.py --out=runs/baselines --budgets=1e12,4e12

The models are those of experiments/families/baselines.py. Each trains for the same number of exact training
FLOPs; the n-gram is fitted on all of the training text, once. Runs that are there are not made again. Writes
`baselines.json`, `baselines.md` and `baselines.png` into --out, beside the runs.
"""

import argparse
import json
import pathlib
import sys

import matplotlib
from compare_ngram import compare

from jaxlm.config import build, load_experiment
from jaxlm.errors import UserError
from jaxlm.train.run import train

EXPERIMENT = pathlib.Path(__file__).parents[1] / "experiments" / "families" / "baselines.py"
MODELS = ("lstm", "transformer")
NAMES = {"lstm": "LSTM", "transformer": "transformer"}


def run_all(out: pathlib.Path, budgets: list[str], changes: dict) -> list[dict]:
    """One row for every model and budget, the n-gram's first."""
    rows = []
    for budget in budgets:
        for model in MODELS:
            config = load_experiment(f"{EXPERIMENT}:{model}:{budget}")
            config.update_from_flattened_dict(changes)
            result = train(build(config), out / f"{model}_{budget}", bar=False)
            if result.status != "finished":
                raise UserError(f"{result.workdir}: {result.status} ({result.reason})")
            counts, seconds = result.counts, result.seconds
            rows.append(
                {
                    "model": NAMES[model],
                    "parameters": counts["n_total"],
                    "flops_per_token": counts["flops_train"],
                    "tokens": result.tokens,
                    "flops": result.flops,
                    "bpb": result.metrics["eval/bpb"],
                    "seconds": seconds["step"],
                }
            )
    ngram = compare(out / f"{MODELS[0]}_{budgets[0]}", order=5)
    first = {"model": "Kneser-Ney 5-gram", "parameters": None, "flops_per_token": None, "flops": None}
    return [
        first | {"tokens": ngram["train_tokens"], "bpb": ngram["ngram_bpb"], "seconds": ngram["seconds"]},
        *rows,
    ]


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| model | training FLOPs | parameters | tokens seen | bits per byte | seconds |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        flops = "-" if row["flops"] is None else f"{row['flops']:.2e}"
        parameters = "-" if row["parameters"] is None else f"{row['parameters']:,}"
        cells = (
            row["model"],
            flops,
            parameters,
            f"{row['tokens']:,}",
            f"{row['bpb']:.3f}",
            f"{row['seconds']:.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """Bits per byte over training FLOPs; the n-gram is a line."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for model, marker in zip(NAMES.values(), "so", strict=True):
        own = [row for row in rows if row["model"] == model]
        axes.plot([r["flops"] for r in own], [r["bpb"] for r in own], marker=marker, label=model)
    axes.axhline(rows[0]["bpb"], color="grey", linestyle="--", label=rows[0]["model"])
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="bits per byte, held out")
    budgets = sorted({float(f"{row['flops']:.0e}") for row in rows[1:]})
    axes.set_xticks(budgets, [f"{budget:.0e}".replace("e+", "e") for budget in budgets])
    axes.minorticks_off()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Parses the flags, trains, prints and writes."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the runs")
    parser.add_argument("--budgets", default="1e12,4e12", help="training FLOPs, separated by commas")
    parser.add_argument("--data", type=pathlib.Path, help="folder with tokenizer.model and tokens/")
    args = parser.parse_args(argv)
    changes = {}
    if args.data:
        changes = {"data.tokenizer": str(args.data / "tokenizer.model")}
        changes |= {
            f"data.{a}": str(args.data / "tokens" / b) for a, b in (("train", "train"), ("eval", "heldout"))
        }
    try:
        rows = run_all(args.out, args.budgets.split(","), changes)
    except UserError as error:
        print(f"compare_baselines: {error}", file=sys.stderr)
        return 2
    (args.out / "baselines.json").write_text(json.dumps(rows, indent=1) + "\n")
    (args.out / "baselines.md").write_text(table(rows))
    draw(rows, args.out / "baselines.png")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
