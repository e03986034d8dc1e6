"""Coordinate check: do activations change equally fast in wide and narrow, deep and shallow models?

A few training steps on one batch; after each, the change of every activation since the start,

    rms(a_t - a_0) over batch, positions, channels (and layers, for the branches),

is drawn against the width (or depth) on logarithmic axes. In a parametrisation under which a learning rate
transfers, none of these changes grows or shrinks with the size: every slope is near 0. Under the standard
one the logits and the hidden activations change faster the wider the model. Losses cannot show this as early.

Sources: arXiv:2203.03466, Appendix D.1 (width); arXiv:2505.01618, Figure 7 (depth).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from jaxlm.errors import UserError, check
from jaxlm.model import transformer
from jaxlm.model.activations import activations
from jaxlm.model.config import TransformerConfig
from jaxlm.model.models import check_transformer
from jaxlm.model.parametrization import optimizer_options
from jaxlm.objectives.lm import LossConfig, make_lm_objective
from jaxlm.optim import OptimConfig, make_optimizer
from jaxlm.train.state import create_state
from jaxlm.train.step import Batch, make_step

WIDTHS, DEPTHS = (64, 128, 256, 512, 1024), (2, 4, 8, 16)

# Slopes of log rms against log size that pass, (lowest, highest). Below 0 there is more room: a transient
# that dies out with the width is a finite-width effect, growth is what breaks the transfer.
LIMITS: dict[str, tuple[float, float]] = {
    "embedding": (-0.2, 0.2),
    "attention": (-0.25, 0.2),
    "mlp": (-0.25, 0.2),
    "stream": (-0.2, 0.2),
    "logits": (-0.25, 0.2),
}


@dataclasses.dataclass(frozen=True)
class CoordCheck:
    """One parametrisation measured over widths or depths."""

    parametrization: str
    axis: str  # 'width' | 'depth'
    sizes: tuple[int, ...]
    change: dict[str, np.ndarray]  # role -> rms of the change [sizes, steps], steps 1, 2, ...

    def slope(self, role: str, step: int = -1) -> float:
        """d log(rms of the change) / d log(size) at a step; default the last."""
        return float(np.polyfit(np.log(self.sizes), np.log(self.change[role][:, step]), 1)[0])

    def limits(self, role: str) -> tuple[float, float]:
        """Slopes that pass."""
        return LIMITS[role.split()[0]]

    def passes(self, role: str) -> bool:
        """Whether the change at the last step is finite and its slope lies within the limits."""
        low, high = self.limits(role)
        return bool(np.isfinite(self.change[role]).all()) and low <= self.slope(role) <= high

    @property
    def passed(self) -> bool:
        """Whether every role passes."""
        return all(self.passes(role) for role in self.change)

    def text(self) -> str:
        """A table: one role a line, its change at the last step for every size, its slope and verdict."""
        steps = next(iter(self.change.values())).shape[1]
        head = f"{self.parametrization}: rms of the change after {steps} steps, by {self.axis}"
        columns = "".join(f"{size:>10}" for size in self.sizes)
        lines = [head, f"{'':14}{columns}{'slope':>9}  {'allowed':14}"]
        for role, change in self.change.items():
            low, high = self.limits(role)
            values = "".join(f"{x:10.3g}" for x in change[:, -1])
            verdict = "pass" if self.passes(role) else "FAIL"
            lines.append(f"{role:14}{values}{self.slope(role):+9.2f}  [{low:+.2f}, {high:+.2f}] {verdict}")
        return "\n".join([*lines, f"{self.parametrization}: {'PASS' if self.passed else 'FAIL'}"])


def resize(cfg: TransformerConfig, axis: str, size: int) -> TransformerConfig:
    """The model at another width or depth: wider ones have more heads of the same size, and wider MLPs.

    Args:
        cfg: the model; its own size counts for nothing but proportions.
        axis: 'width' or 'depth'.
        size: its new `model_dim` or `num_layers`.

    Raises:
        UserError: the width is no whole number of heads, key/value heads or MLP units.
    """
    if axis == "depth":
        return dataclasses.replace(cfg, num_layers=size)

    def scaled(value: int, what: str) -> int:
        if value * size % cfg.model_dim:
            step = cfg.model_dim // math.gcd(value, cfg.model_dim)
            raise UserError(
                f"--widths: {size} is not divisible by {step}, so that {what} would be no whole number; "
                f"the nearest that is: {max(step, round(size / step) * step)}"
            )
        return value * size // cfg.model_dim

    a = cfg.attention
    attention = dataclasses.replace(
        a,
        head_dim=cfg.head_dim,
        num_heads=scaled(a.num_heads, "model.attention.num_heads"),
        num_kv_heads=scaled(a.num_kv_heads, "model.attention.num_kv_heads"),
    )
    return dataclasses.replace(
        cfg,
        model_dim=size,
        mlp_dim=scaled(cfg.mlp_dim, "model.mlp_dim"),
        moe=dataclasses.replace(cfg.moe, expert_dim=scaled(cfg.moe.expert_dim, "model.moe.expert_dim")),
        attention=attention,
    )


def parametrised(
    cfg: TransformerConfig, kind: str, widths: Sequence[int], depths: Sequence[int]
) -> TransformerConfig:
    """The model in that parametrisation; the smallest size is the base where the config names none."""
    return dataclasses.replace(
        cfg,
        parametrization=kind,
        base_width=cfg.base_width or min(widths, default=cfg.model_dim),
        base_depth=cfg.base_depth or min(depths, default=cfg.num_layers),
        attention=dataclasses.replace(cfg.attention, head_dim=cfg.head_dim),
    )


def markov_batch(vocab_size: int, rows: int, columns: int, seed: int) -> Batch:
    """Text to learn from: a Markov chain over 32 tokens, each with four successors drawn by Zipf's law.

    Few tokens, each seen often, as in text: the gradients of tokens seen once are of random directions, whose
    effect on the logits dies out with the width.
    """
    rng, symbols = np.random.default_rng([seed, vocab_size]), min(vocab_size, 32)
    successors = rng.integers(0, symbols, (symbols, 4))
    share = 1.0 / np.arange(1, 5)
    text = np.empty((rows, columns + 1), np.int32)
    text[:, 0] = rng.integers(0, symbols, rows)
    for t in range(columns):
        text[:, t + 1] = successors[text[:, t], rng.choice(4, rows, p=share / share.sum())]
    weights = np.ones((rows, columns), np.float32)
    return {"tokens": text[:, :-1], "targets": text[:, 1:], "weights": weights}


def _roles(cfg: TransformerConfig, axis: str) -> dict[str, Callable[[dict], np.ndarray]]:
    """Role -> its part of what `activations` returns."""
    L = cfg.num_layers
    # Models of several depths have only the halves in common.
    marks = {f"stream {k + 1}": k for k in range(L)}
    if axis == "depth":
        marks = {"stream 1/2": L // 2 - 1, "stream 1/1": L - 1}
    return {
        "embedding": lambda seen: seen["embedding"],
        "attention": lambda seen: seen["attention"],
        "mlp": lambda seen: seen["mlp"],
        **{name: lambda seen, k=k: seen["residual"][k] for name, k in marks.items()},
        "logits": lambda seen: seen["logits"],
    }


def _changes(
    cfg: TransformerConfig, optim: OptimConfig, axis: str, batch: Batch, steps: int, seeds: Sequence[int]
) -> dict[str, np.ndarray]:
    """Role -> rms of the change after steps 1, 2, ... of one model, averaged geometrically over seeds."""

    def apply(params: Any, batch: Batch, key: Any) -> tuple[jax.Array, dict]:
        hidden, _, aux = transformer.apply(cfg, params, batch["tokens"])
        return hidden, aux

    model = SimpleNamespace(apply=apply, unembed=partial(transformer.unembed, cfg))
    optimizer = make_optimizer(optim, lambda _: optim.lr, **optimizer_options(cfg, optim))
    step = make_step(make_lm_objective(model, LossConfig(chunk=0)), optimizer, norms=False)
    measure = jax.jit(partial(activations, cfg))

    def look(params: Any) -> dict[str, np.ndarray]:
        seen = jax.device_get(measure(params, batch["tokens"]))
        return {name: x.astype(np.float32) for name, x in seen.items()}

    roles = _roles(cfg, axis)

    def rms(now: dict, then: dict) -> dict[str, float]:
        return {
            role: float(np.sqrt(np.mean(np.square(part(now) - part(then), dtype=np.float64))))
            for role, part in roles.items()
        }

    runs = []
    for seed in seeds:
        state, _ = create_state(partial(transformer.init, cfg), optimizer, seed)
        first, rows = look(state.params), []
        for _ in range(steps):
            state, _ = step(state, None, batch)
            rows.append(rms(look(state.params), first))
        runs.append({role: [row[role] for row in rows] for role in roles})
    return {role: np.exp(np.mean([np.log(run[role]) for run in runs], axis=0)) for role in roles}


def coordinate_check(
    model: TransformerConfig,
    optim: OptimConfig,
    *,
    axis: str,
    sizes: Sequence[int],
    steps: int = 5,
    seeds: int = 2,
    rows: int = 8,
    columns: int = 64,
    seed: int = 0,
    tick: Callable[[str], None] = lambda text: None,
) -> CoordCheck:
    """Measure a parametrisation.

    Args:
        model: whose parametrisation, variations and proportions to take.
        optim: optimizer; its learning rate is held constant.
        axis: 'width' or 'depth'.
        sizes: at least two widths or (even) depths.
        steps: updates, all on one batch of a random Markov chain.
        seeds: models a size; rms are averaged geometrically over them.
        rows, columns: of the batch.
        seed: of the first model and of the batch.
        tick: told what is measured next.

    Raises:
        UserError: sizes that the model cannot have; a parametrisation without a rule for the optimizer.
    """
    sizes = tuple(sorted(sizes))
    check(len(set(sizes)) >= 2, f"--{axis}s={','.join(map(str, sizes))}: a slope needs two sizes or more")
    check(steps >= 1 and seeds >= 1, f"--steps={steps} and --seeds={seeds} must be at least 1")
    check(
        axis == "width" or all(size % 2 == 0 for size in sizes),
        f"--depths={','.join(map(str, sizes))} must be even numbers, as the stream is looked at half-way",
    )
    models = [resize(model, axis, size) for size in sizes]
    if model.position.kind == "learned":
        columns = min(columns, model.position.max_length)
    batch = markov_batch(model.vocab_size, rows, columns, seed)
    changes = []
    for size, cfg in zip(sizes, models, strict=True):
        tick(f"{model.parametrization}: {axis} {size}")
        changes.append(_changes(cfg, optim, axis, batch, steps, range(seed, seed + seeds)))
    change = {role: np.array([of_size[role] for of_size in changes]) for role in changes[0]}
    return CoordCheck(model.parametrization, axis, sizes, change)


def plot_check(checks: Sequence[CoordCheck], out: str | Path) -> Path:
    """Draw the changes against the size, a panel for each role and a row for each check; PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    columns = max(len(check.change) for check in checks)
    figure = Figure(figsize=(2.3 * columns + 0.8, 2.5 * len(checks) + 0.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(checks), columns, squeeze=False)
    for line, result in zip(panels, checks, strict=True):
        steps = next(iter(result.change.values())).shape[1]
        pale = [0.8 * (1 - (t + 1) / steps) for t in range(steps)]
        shades = [(0.16 + 0.84 * p, 0.44 + 0.56 * p, 0.73 + 0.27 * p) for p in pale]
        for panel, (role, change) in zip(line, result.change.items(), strict=False):
            for t in range(steps):
                panel.plot(result.sizes, change[:, t], "o-", color=shades[t], markersize=3, linewidth=1.3)
            passes = result.passes(role)
            panel.set_title(
                f"{role}   {result.slope(role):+.2f}", fontsize=9, color="#1d7a46" if passes else "#c0281c"
            )
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            # At least the same range everywhere, so that slopes of different panels can be compared.
            middle = math.exp(np.log(change).mean())
            reach = max(8.0, 1.3 * float(np.exp(np.abs(np.log(change / middle)).max())))
            panel.set_ylim(middle / reach, middle * reach)
            panel.set_xticks(result.sizes, [str(size) for size in result.sizes], fontsize=7)
            panel.xaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.tick_params(axis="y", labelsize=7)
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(color="#e3e6ea", linewidth=0.6)
            panel.set_axisbelow(True)
        for panel in line[len(result.change) :]:
            panel.set_visible(False)
        verdict = "pass" if result.passed else "fail"
        line[0].set_ylabel(f"{result.parametrization} ({verdict})\nrms of the change", fontsize=9)
        line[0].annotate(
            f"steps 1 (light) to {steps} (dark)", (0.03, 0.03), xycoords="axes fraction", fontsize=6
        )
        for panel in line:
            panel.set_xlabel(result.axis, fontsize=8)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    figure.savefig(part, format="png")
    part.replace(out)
    return out


def coordcheck_command(
    model: TransformerConfig,
    optim: OptimConfig,
    *,
    parametrizations: Sequence[str] = (),
    widths: Sequence[int] = WIDTHS,
    depths: Sequence[int] = (),
    steps: int = 5,
    seeds: int = 2,
    out: str | Path = "coordcheck.png",
) -> bool:
    """What `jaxlm coordcheck` does: measure over widths and depths, print the tables, draw the picture.

    Args:
        model, optim: see `coordinate_check`.
        parametrizations: to set beside each other; default that of the model alone.
        widths, depths: to measure over; none = not along this axis.
        steps, seeds: see `coordinate_check`.
        out: PNG.

    Returns:
        Whether everything passed; the standard parametrisation, which promises nothing, counts if it is
        alone.

    Raises:
        UserError: before anything is measured, if some model cannot be made.
    """
    check_transformer(model, "jaxlm coordcheck")
    asked = {axis: sizes for axis, sizes in (("width", widths), ("depth", depths)) if sizes}
    check(bool(asked), "jaxlm coordcheck needs --widths or --depths")
    kinds = tuple(parametrizations) or (model.parametrization,)
    models = [parametrised(model, kind, widths, depths) for kind in kinds]
    for cfg in models:
        optimizer_options(cfg, optim)
        for axis, sizes in asked.items():
            for size in sizes:
                resize(cfg, axis, size)
    print(
        f"{optim.name} at constant lr {optim.lr:g}, {steps} steps on one batch of a random Markov chain, "
        f"{seeds} seed{'s' * (seeds > 1)}"
    )
    options = dict(steps=steps, seeds=seeds, tick=lambda text: print(f"  {text}", flush=True))
    checks = []
    for cfg in models:
        for axis, sizes in asked.items():
            checks.append(coordinate_check(cfg, optim, axis=axis, sizes=sizes, **options))
            print(checks[-1].text())
    print(f"picture: {plot_check(checks, out)}")
    counted = [result for result in checks if result.parametrization != "standard"] or checks
    return all(result.passed for result in counted)
