"""Draws one metric of several runs over their steps, with what they have to beat as a line across.

    python tools/plot_runs.py --metric=eval/accuracy --line=majority=0.69 --out=a.png runs/spam runs/scratch

Each run is named by its directory; `NAME:DIR` names it otherwise.
"""

import argparse
import pathlib
import sys

from jaxlm.errors import UserError
from jaxlm.train.metrics import read_rows

COLOURS = ("#2a6fbb", "#d1571e", "#3b8c5a", "#8a4fb0", "#5b6470")


def series(workdir: pathlib.Path, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a run.

    Raises:
        UserError: no row of its metrics.jsonl has the metric.
    """
    file = workdir / "metrics.jsonl"
    rows = read_rows(file) if file.is_file() else []
    points = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    if not points:
        known = sorted({name for row in rows for name in row if "/" in name})
        raise UserError(f"{file} has no {metric!r}; it has: {', '.join(known) or 'nothing'}")
    steps, values = zip(*points, strict=True)
    return list(steps), list(values)


def draw(
    runs: dict[str, pathlib.Path], metric: str, lines: dict[str, float], label: str, out: pathlib.Path
) -> None:
    """One curve a run, one dashed line a number; the legend has the last value of each curve."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for (name, workdir), colour in zip(runs.items(), COLOURS, strict=False):
        steps, values = series(workdir, metric)
        marker = "o" if len(steps) < 60 else None
        ended = f"{name}, {values[-1]:.3f} in the end"
        axis.plot(steps, values, color=colour, linewidth=1.8, marker=marker, markersize=4, label=ended)
    for name, value in lines.items():
        axis.axhline(value, color="#5b6470", linestyle="--", linewidth=1.2)
        axis.text(
            0.5, value, f"{name} {value:.3f}", transform=axis.get_yaxis_transform(), va="bottom", fontsize=9
        )
    axis.set_xlabel("step")
    axis.set_ylabel(label or metric)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e3e6ea", linewidth=0.7)
    axis.margins(x=0.03)
    axis.legend(frameon=False)
    figure.savefig(out, format="png")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="DIR or NAME:DIR")
    parser.add_argument("--metric", required=True, help="as in metrics.jsonl, such as eval/nll")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument(
        "--line", action="append", default=[], help="NAME=VALUE, a line across; may be repeated"
    )
    parser.add_argument("--label", default="", help="of the vertical axis; default: the metric")
    args = parser.parse_args(argv)
    runs = {}
    for run in args.runs:
        name, _, folder = run.rpartition(":")
        runs[name or pathlib.Path(folder).name] = pathlib.Path(folder)
    try:
        if len(runs) < len(args.runs) or len(runs) > len(COLOURS):
            raise UserError(f"{' '.join(args.runs)}: give 1 to {len(COLOURS)} runs of different names")
        lines = {}
        for line in args.line:
            name, _, value = line.rpartition("=")
            try:
                lines[name] = float(value)
            except ValueError:
                raise UserError(f"--line={line!r} is not NAME=NUMBER") from None
        draw(runs, args.metric, lines, args.label, args.out)
    except UserError as error:
        print(f"plot_runs.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
