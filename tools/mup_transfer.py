"""Does the best learning rate of a narrow model stay the best when it gets wider? Standard against muP.

    python tools/mup_transfer.py --out runs/mup_transfer

Trains a byte-level transformer on the source code of Python's standard library with every learning rate of a
grid, at each width, under both parametrisations: the same steps on the same batches. The narrowest width is
the base, where the two are one model. Prints a table and one line of JSON, and writes `mup_transfer.json` and
`mup_transfer.png`. About 5 minutes on two idle cores.

Last run (experiments/scaling/results/mup/mup_transfer.png): from width 64 to 256 the best rate of the
standard parametrisation moves by two steps of the grid, 2^-7 to 2^-9, and keeping it costs .26 nats; muP's
stays. Both end at 1.97 nats per byte.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import sysconfig
import time
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import optax

from jaxlm.data.loader import DataConfig, Loader, make_dataset
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.errors import UserError, check
from jaxlm.model import transformer
from jaxlm.model.attention import AttentionConfig
from jaxlm.model.config import TransformerConfig
from jaxlm.model.parametrization import optimizer_options
from jaxlm.objectives.lm import LossConfig, make_lm_objective
from jaxlm.optim import OptimConfig, make_optimizer, make_schedule

KINDS = ("standard", "mup")


def load_batches(out: pathlib.Path, steps: int, rows: int, columns: int) -> list[dict]:
    """The first `steps` batches of the library's source code, byte by byte."""
    library = sysconfig.get_paths()["stdlib"]
    cfg = DataConfig(
        train=f"{library}/*.py,{library}/[a-s]*/*.py", seq_len=columns, batch_size=rows, workers=1
    )
    dataset = make_dataset(cfg, load_tokenizer("byte"), cache_dir=out / "data_cache")
    check(
        dataset.num_rows >= steps * rows,
        f"{steps} steps of {rows} rows are more than the {dataset.num_rows:,} rows of {columns} bytes there",
    )
    loader = Loader(dataset, cfg)
    return [loader(step) for step in range(steps)]


def make_model(kind: str, width: int, base: int) -> TransformerConfig:
    """Two layers, heads of 16."""
    return TransformerConfig(
        vocab_size=load_tokenizer("byte").vocab_size,
        num_layers=2,
        model_dim=width,
        init_std=0.0,  # fan_in ** -0.5: .02 would be small at width 64, and a wide model would learn late
        parametrization=kind,
        base_width=base,
        attention=AttentionConfig(num_heads=width // 16, head_dim=16),
    )


def train_grid(cfg: TransformerConfig, lrs: list[float], batches: list[dict]) -> list[np.ndarray]:
    """The training loss (nats per byte) after every step, for each learning rate; one compilation."""
    optim = OptimConfig(schedule="linear", final=0.0, warmup=0.1, b2=0.98, weight_decay=0.0)
    options = optimizer_options(cfg, optim)

    def apply(params, batch, key):
        hidden, _, aux = transformer.apply(
            cfg, params, batch["tokens"], segments_BT=batch["segments"], positions_BT=batch["positions"]
        )
        return hidden, aux

    model = SimpleNamespace(apply=apply, unembed=partial(transformer.unembed, cfg))
    objective = make_lm_objective(model, LossConfig())

    def optimizer(lr):
        return make_optimizer(optim, make_schedule(optim, len(batches), lr=lr), **options)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch, lr):
        def loss(params):
            total, weight, _ = objective(params, batch, None)
            return total / weight

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer(lr).update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    @jax.jit
    def start():
        params = transformer.init(cfg, jax.random.key(0))
        return params, optimizer(0.0).init(params)

    curves = []
    for lr in lrs:
        params, opt_state = start()
        values = []
        for batch in batches:
            params, opt_state, value = step(params, opt_state, batch, np.float32(lr))
            values.append(value)
        curves.append(np.array(jax.device_get(values)))
    return curves


def optimum(lrs: list[float], losses: list[float]) -> float:
    """Learning rate at the vertex of the parabola (in log lr) through the best point and its neighbours."""
    k = int(np.argmin(losses))
    if k in (0, len(lrs) - 1):
        return lrs[k]
    a, b, _ = np.polyfit(np.log(lrs[k - 1 : k + 2]), losses[k - 1 : k + 2], 2)
    return float(np.exp(-b / (2 * a)))


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Final losses of one grid."""

    lrs: list[float]
    losses: dict[str, dict[int, list[float]]]  # kind -> width -> loss of each learning rate

    def best(self, kind: str, width: int) -> int:
        """Index of the best learning rate."""
        return int(np.argmin(self.losses[kind][width]))

    def moves(self, kind: str) -> int:
        """Grid steps between the best learning rates of the narrowest and the widest model."""
        widths = sorted(self.losses[kind])
        return self.best(kind, widths[-1]) - self.best(kind, widths[0])

    def excess(self, kind: str) -> float:
        """Loss that the widest model gives away with the narrowest one's best learning rate."""
        widths = sorted(self.losses[kind])
        wide = self.losses[kind][widths[-1]]
        return wide[self.best(kind, widths[0])] - min(wide)

    def on_edge(self) -> list[str]:
        """Models whose best learning rate has no neighbour on one side: how far it moved is not known."""
        ends = (0, len(self.lrs) - 1)
        return [f"{kind} {w}" for kind, x in self.losses.items() for w in x if self.best(kind, w) in ends]

    def summary(self) -> dict:
        """What the line of JSON says."""
        out = {"lrs": self.lrs, "on_edge": self.on_edge()}
        for kind, by_width in self.losses.items():
            out[kind] = {
                "loss": {str(width): [round(x, 5) for x in losses] for width, losses in by_width.items()},
                "best_lr": {str(width): self.lrs[self.best(kind, width)] for width in by_width},
                "optimum": {str(w): round(optimum(self.lrs, x), 6) for w, x in by_width.items()},
                "grid_steps_moved": self.moves(kind),
                "loss_given_away": round(self.excess(kind), 5),
            }
        return out

    def text(self) -> str:
        """A table of losses, the best of each line marked."""
        head = "".join(f"{lr:>11.2g}" for lr in self.lrs)
        lines = [f"{'final loss':16}{head}  parabola"]
        for kind, by_width in self.losses.items():
            for width, losses in by_width.items():
                marked = (
                    f"{x:.4f}{'*' if k == self.best(kind, width) else ' '}" for k, x in enumerate(losses)
                )
                row = "".join(f"{cell:>11}" for cell in marked)
                lines.append(f"{kind:9}{width:6} {row}  {optimum(self.lrs, losses):.2g}")
        for kind in self.losses:
            lines.append(
                f"{kind}: the best lr moves by {self.moves(kind):+d} grid steps; the narrow model's costs "
                f"the wide one {self.excess(kind):.4f} nats"
            )
        if edge := self.on_edge():
            lines.append(
                f"WARNING: the best lr is at the edge of the grid for {', '.join(edge)}: widen --grid"
            )
        return "\n".join(lines)


def plot(result: Transfer, out: pathlib.Path) -> None:
    """Loss against learning rate, a panel for each parametrisation and a curve for each width."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(result.losses), sharey=True)
    low = min(min(x) for by_width in result.losses.values() for x in by_width.values())
    mids = [np.nanmedian(x) for by_width in result.losses.values() for x in by_width.values()]
    for panel, (kind, by_width) in zip(panels, result.losses.items(), strict=True):
        for width, color in zip(sorted(by_width), ("#8fb8de", "#2a6fbb", "#123f73", "#0a2544"), strict=False):
            losses, k = by_width[width], result.best(kind, width)
            panel.plot(
                result.lrs, losses, "o-", color=color, markersize=4, linewidth=1.6, label=f"width {width}"
            )
            panel.plot(result.lrs[k], losses[k], "*", color="#d1571e", markersize=14, zorder=3)
        base = result.lrs[result.best(kind, min(by_width))]
        panel.axvline(base, color="#5b6470", linestyle=":", linewidth=1.2)
        panel.set_xscale("log", base=2)
        panel.set_ylim(low - 0.05, max(mids) + 2.0 * (max(mids) - low))
        panel.set_title(
            f"{kind}: best lr moves {result.moves(kind):+d} grid steps",
            loc="left",
            fontsize=11,
            color="#5b6470",
        )
        panel.set_xlabel("learning rate (dotted: the best of the narrowest)")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#e3e6ea", linewidth=0.7)
        panel.legend(frameon=False)
    panels[0].set_ylabel("final training loss (nats per byte)")
    part = out.with_name(f".{out.name}.part")
    figure.savefig(part, format="png")
    part.replace(out)


def main(argv: list[str] | None = None) -> int:
    """Parses the flags, trains the grids, prints and draws the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/mup_transfer"), help="folder")
    parser.add_argument("--widths", default="64,256", help="multiples of 16; the smallest is the base")
    parser.add_argument("--grid", default="-11:-5", help="lowest and highest log2 of the learning rate")
    parser.add_argument("--per_octave", type=int, default=1, help="learning rates for each factor of 2")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch")
    parser.add_argument("--columns", type=int, default=64, help="bytes of a row")
    args = parser.parse_args(argv)
    began = time.perf_counter()
    try:
        widths = sorted(int(width) for width in args.widths.split(","))
        check(len(widths) > 1, f"--widths={args.widths}: a transfer needs two widths or more")
        check(all(w % 16 == 0 for w in widths), f"--widths={args.widths}: widths are multiples of 16")
        check(args.steps >= 20, f"--steps={args.steps} must be at least 20")
        low, high = (int(x) for x in args.grid.split(":"))
        lrs = [float(2.0**e) for e in np.arange(low, high + 1e-9, 1 / args.per_octave)]
        args.out.mkdir(parents=True, exist_ok=True)
        batches = load_batches(args.out, args.steps, args.rows, args.columns)
    except UserError as error:
        print(f"mup_transfer: {error}", file=sys.stderr)
        return 2
    losses: dict[str, dict[int, list[float]]] = {kind: {} for kind in KINDS}
    for width in widths:
        for kind in KINDS:
            if kind == "mup" and width == widths[0]:  # the base: the standard model to the bit
                losses[kind][width] = losses["standard"][width]
                continue
            curves = train_grid(make_model(kind, width, widths[0]), lrs, batches)
            # The last fifth of the steps, on the same batches for all.
            losses[kind][width] = [float(curve[-(args.steps // 5) :].mean()) for curve in curves]
            print(f"{kind} {width}: {time.perf_counter() - began:.0f} s", flush=True)
    result = Transfer(lrs, losses)
    plot(result, args.out / "mup_transfer.png")
    line = json.dumps(
        {**result.summary(), "steps": args.steps, "seconds": round(time.perf_counter() - began)}
    )
    part = args.out / ".mup_transfer.json.part"
    part.write_text(line + "\n")
    part.replace(args.out / "mup_transfer.json")
    print(result.text())
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
