"""Which runs a grid holds: their configs, roles and labels, before anything is counted or priced.

isoflop     budgets x sizes; the sizes of a budget are given, or lie around a centre (given, or a fit's N*)
ladder      tokens-per-parameter ratios x sizes
rectangle   sizes x tokens
lr_batch    learning rates x batches, at a shape; its cells tune and are no points of a fit
trunks      one run at constant learning rate per size, and cooldowns that branch off it
product     every combination of values of any fields of the run

Every cell ends its own schedule (pitfall: a checkpoint inside a decay is no run of that length). The trunk of
`trunks` is the exception, and its role says so.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxlm.config import RunConfig, build, check_name, config_hash, to_dict
from jaxlm.errors import UserError, check, check_choice
from jaxlm.model.parametrization import LEAVES
from jaxlm.scaling.counting import count
from jaxlm.sweep.shapes import MEASURES, ShapeConfig, closest_shapes

KINDS = ("isoflop", "ladder", "rectangle", "lr_batch", "trunks", "product")
LR_RULES = ("fixed", "width", "param")
ID_DIGITS = 12
MOST_RUNS = 100_000  # of a product: beyond, a value has slipped


@dataclasses.dataclass(frozen=True)
class GridConfig:
    """What varies over a sweep. FLOPs are exact training FLOPs; tokens are positions, steps * B * T."""

    kind: str = "isoflop"  # isoflop | ladder | rectangle | lr_batch | trunks | product
    role: str = ""  # of the cells: grid | tune | holdout; '' = tune for lr_batch, else grid
    shape: ShapeConfig = dataclasses.field(default_factory=ShapeConfig)
    size_by: str = "n_total"  # what sizes are: n_total | n_non_embedding | n_active | n_products | flops
    budgets: tuple[float, ...] = ()  # isoflop; lr_batch and product if set: training FLOPs of a run
    sizes: tuple[float, ...] = ()  # of every budget, ratio or token count; lr_batch: none = run.model
    centers: tuple[float, ...] = ()  # isoflop, in place of sizes: the middle size of each budget
    center_fit: str = ""  # or a fit.json whose N*(budget) is the middle; relative to the sweep directory
    span: float = 4.0  # with a centre: sizes from centre / span to centre * span, evenly in their logarithm
    sizes_per_budget: int = 5  # with a centre: how many; 1 = the centre alone
    tokens: tuple[float, ...] = ()  # rectangle; lr_batch if set; trunks: at the end of each branch
    ratios: tuple[float, ...] = ()  # ladder: tokens per unit of size
    standalone: tuple[float, ...] = ()  # trunks: tokens at which every size is trained on its own, too
    product: tuple[tuple[str, tuple], ...] = ()  # (field or 'field,field', values) pairs, dotted names
    lrs: tuple[float, ...] = ()  # values of optim.lr for every cell; none = the run's
    batches: tuple[int, ...] = ()  # lr_batch: values of data.batch_size; none = the run's
    seeds: tuple[int, ...] = ()  # the middle size of each budget once more with these seeds (and data.seed)
    lr_rule: str = "fixed"  # fixed | width: hidden matrices x lr_base_dim / D | param: model.parametrization
    lr_base_dim: int = 64  # width: model_dim at which all matrices learn at optim.lr
    reference_size: float = 0.0  # size N0 at which optim.lr and data.batch_size hold as they stand
    lr_exponent: float = 0.0  # optim.lr times (N / N0)**this
    batch_exponent: float = 0.0  # data.batch_size times (N / N0)**this, rounded to batch_multiple
    batch_multiple: int = 1  # rows
    tolerance: float = 0.01  # largest relative deviation of a run's FLOPs or tokens from what is asked
    allow_epochs: bool = False  # accept runs that read their data more than once

    def __post_init__(self) -> None:
        check_choice(self.kind, KINDS, "grid.kind")
        check_choice(self.role, ("", "grid", "tune", "holdout"), "grid.role")
        check_choice(self.size_by, MEASURES, "grid.size_by")
        check_choice(self.lr_rule, LR_RULES, "grid.lr_rule")
        for name in ("budgets", "sizes", "centers", "tokens", "ratios", "standalone", "lrs", "batches"):
            values = getattr(self, name)
            check(all(v > 0 for v in values), f"grid.{name}={values} must be positive")
            check(
                len(set(values)) == len(values) or name == "centers", f"grid.{name}={values} repeats a value"
            )
        check(self.span >= 1, f"grid.span={self.span:g} must be at least 1")
        check(self.sizes_per_budget >= 1, f"grid.sizes_per_budget={self.sizes_per_budget} must be at least 1")
        check(self.batch_multiple >= 1, f"grid.batch_multiple={self.batch_multiple} must be at least 1")
        check(0 < self.tolerance < 1, f"grid.tolerance={self.tolerance:g} must lie in (0, 1)")
        if self.lr_exponent or self.batch_exponent:
            check(
                self.reference_size > 0, "grid.reference_size must be set for lr_exponent or batch_exponent"
            )
        _check_fields(self)


# Which fields each kind reads beyond those of all kinds, and which it cannot do without.
_READS = {
    "isoflop": {"budgets", "sizes", "centers", "center_fit", "lrs", "seeds"},
    "ladder": {"ratios", "sizes", "lrs", "seeds"},
    "rectangle": {"sizes", "tokens", "lrs", "seeds"},
    "lr_batch": {"budgets", "tokens", "sizes", "lrs", "batches"},
    "trunks": {"sizes", "tokens", "standalone"},
    "product": {"product", "budgets"},
}
_NEEDS = {
    "isoflop": ("budgets",),
    "ladder": ("ratios", "sizes"),
    "rectangle": ("sizes", "tokens"),
    "lr_batch": ("lrs",),
    "trunks": ("sizes", "tokens"),
    "product": ("product",),
}
_VARYING = set().union(*_READS.values())


def _check_fields(grid: GridConfig) -> None:
    """Every field that is set is read by the kind, and nothing that it needs is missing."""
    for name in sorted(_VARYING - _READS[grid.kind]):
        readers = [kind for kind, names in _READS.items() if name in names]
        check(
            not getattr(grid, name),
            f"grid.{name} is not read by grid.kind={grid.kind!r} (by {', '.join(readers)})",
        )
    # The defaults have an empty grid: what is missing is said when it is planned, see `expand`.
    if grid.kind == "isoflop":
        chosen = [name for name in ("sizes", "centers", "center_fit") if getattr(grid, name)]
        check(len(chosen) <= 1, f"grid.{' and grid.'.join(chosen)} exclude each other: keep one")
    if grid.kind == "lr_batch":
        check(not (grid.budgets and grid.tokens), "grid.budgets and grid.tokens exclude each other: keep one")
    check(
        not (grid.seeds and grid.lrs),
        "grid.seeds repeats the middle size of each budget, which has several learning rates (grid.lrs): "
        "plan the seeds under another --name once the learning rate is known",
    )


@dataclasses.dataclass(frozen=True)
class Draft:
    """A run as the grid wants it."""

    config: RunConfig
    role: str  # grid | tune | holdout | seed | trunk | branch
    budget: float = 0.0  # FLOPs asked for; 0 if none were
    labels: Mapping[str, float | int | str] = dataclasses.field(default_factory=dict)
    parent: str = ""  # id of the trunk
    branch_step: int = 0

    @property
    def id(self) -> str:
        """Name of the run: the first digits of its config's hash."""
        return config_hash(self.config)[:ID_DIGITS]


def expand(run: RunConfig, grid: GridConfig, center: Callable[[float], float] | None = None) -> list[Draft]:
    """All runs of a grid, trunks before their branches.

    Args:
        run: what every cell starts from.
        grid: what varies.
        center: budget -> middle size, in units of grid.size_by; for grid.center_fit.

    Raises:
        UserError: a field that the kind needs is empty; a size that no shape comes near; FLOPs or tokens that
            whole steps miss by more than the tolerance.
    """
    for name in _NEEDS[grid.kind]:
        check(len(getattr(grid, name)) > 0, f"grid.kind={grid.kind!r} needs grid.{name}")
    _check_rule(run, grid)
    drafts = _EXPAND[grid.kind](run, grid, center)
    for draft in drafts if grid.kind == "product" else ():
        _check_rule(draft.config, grid)  # the parametrisation may be one of its axes
    role = grid.role or ("tune" if grid.kind == "lr_batch" else "grid")
    return [dataclasses.replace(d, role=role) if d.role == "grid" else d for d in drafts]


def _check_rule(run: RunConfig, grid: GridConfig) -> None:
    """`lr_rule='param'` needs a parametrisation that transfers; the others must not be added to one."""
    parametrization = run.model.parametrization
    if grid.lr_rule == "param":
        check(
            parametrization != "standard",
            "grid.lr_rule='param' leaves the learning rates to the parametrisation, but "
            f"run.model.parametrization={parametrization!r} has one rate for all widths: choose 'mup', or "
            "grid.lr_rule='width'",
        )
    if grid.lr_rule == "width":
        check(
            parametrization == "standard",
            f"grid.lr_rule='width' on top of run.model.parametrization={parametrization!r} would slow hidden "
            "matrices down twice: set grid.lr_rule='param'",
        )
    head_dims = {head_dim for _, head_dim in grid.shape.head_dims}
    check(
        parametrization == "standard" or run.model.base_head_dim > 0 or len(head_dims) == 1,
        f"grid.shape.head_dims={grid.shape.head_dims} changes the head size with the width, and "
        f"run.model.parametrization={parametrization!r} scales attention from that of the base model: set "
        "run.model.base_head_dim",
    )


# ------------------------------------------------------------------------------------------- one cell's rules


def _shaped(run: RunConfig, grid: GridConfig, sizes: Sequence[float]) -> list[RunConfig]:
    """The run at the shape closest to each size, with the learning rate and batch that the rules give it."""
    models = closest_shapes(run.model, grid.shape, sizes, by=grid.size_by, seq_len=run.data.seq_len)
    return [_ruled(dataclasses.replace(run, model=model), grid) for model in models]


def _ruled(run: RunConfig, grid: GridConfig) -> RunConfig:
    optim, data = run.optim, run.data
    if grid.lr_rule == "width":
        factor = grid.lr_base_dim / run.model.model_dim
        optim = dataclasses.replace(optim, multipliers=(*optim.multipliers, (LEAVES["hidden"], factor)))
    ratio = _size(run, grid) / grid.reference_size if grid.reference_size else 1.0
    if grid.lr_exponent:
        optim = dataclasses.replace(optim, lr=float(f"{optim.lr * ratio**grid.lr_exponent:.6g}"))
    if grid.batch_exponent:
        rows = data.batch_size * ratio**grid.batch_exponent / grid.batch_multiple
        data = dataclasses.replace(data, batch_size=max(1, round(rows)) * grid.batch_multiple)
    return dataclasses.replace(run, optim=optim, data=data)


def _size(run: RunConfig, grid: GridConfig) -> float:
    return MEASURES[grid.size_by](run.model, run.data.seq_len)


def _tokens_per_step(run: RunConfig) -> int:
    return run.data.batch_size * run.data.seq_len


def _with_steps(run: RunConfig, steps: int) -> RunConfig:
    return dataclasses.replace(run, train=dataclasses.replace(run.train, num_steps=steps))


def _for_amount(run: RunConfig, grid: GridConfig, amount: float, per_step: float, unit: str) -> RunConfig:
    """The run with the whole number of steps that comes closest to `amount`."""
    steps = max(1, round(amount / per_step))
    deviation = steps * per_step / amount - 1
    if abs(deviation) > grid.tolerance:
        raise UserError(
            f"{amount:.4g} {unit} at D={run.model.model_dim}, L={run.model.num_layers}: a step of "
            f"{run.data.batch_size} x {run.data.seq_len} tokens has {per_step:.4g}, so {steps} "
            f"step{'s' * (steps > 1)} miss it by {deviation:+.1%}; "
            f"lower run.data.batch_size or raise grid.tolerance={grid.tolerance:g}"
        )
    return _with_steps(run, steps)


def _for_budget(run: RunConfig, grid: GridConfig, budget: float) -> RunConfig:
    per_token = count(run.model, run.data.seq_len).flops_train
    return _for_amount(run, grid, budget, per_token * _tokens_per_step(run), "FLOPs")


def _for_tokens(run: RunConfig, grid: GridConfig, tokens: float) -> RunConfig:
    return _for_amount(run, grid, tokens, _tokens_per_step(run), "tokens")


def _with_lr(run: RunConfig, lr: float) -> RunConfig:
    return dataclasses.replace(run, optim=dataclasses.replace(run.optim, lr=lr))


def _inner_lrs(run: RunConfig, grid: GridConfig, draft: Draft) -> Iterable[Draft]:
    """The draft at every learning rate; grid.lrs are rates at the reference size, as optim.lr is."""
    if not grid.lrs:
        return [draft]
    check(run.optim.lr > 0, "run.optim.lr=0: a rule multiplies it")
    scale = draft.config.optim.lr / run.optim.lr
    return [
        dataclasses.replace(
            draft,
            config=_with_lr(draft.config, float(f"{lr * scale:.6g}")),
            labels={**draft.labels, "lr": lr},
        )
        for lr in grid.lrs
    ]


def _with_seeds(grid: GridConfig, row: list[Draft], center: float | None) -> list[Draft]:
    """A row of sizes, and the middle one again with every extra seed."""
    if not grid.seeds:
        return row
    sizes = [_size(draft.config, grid) for draft in row]
    middle = center or math.sqrt(min(sizes) * max(sizes))
    chosen = row[min(range(len(row)), key=lambda i: abs(math.log(sizes[i] / middle)))]
    out = list(row)
    for seed in grid.seeds:
        check(
            seed != chosen.config.seed,
            f"grid.seeds={grid.seeds}: {seed} is run.seed, which the grid has already",
        )
        data = dataclasses.replace(chosen.config.data, seed=seed)
        config = dataclasses.replace(chosen.config, seed=seed, data=data)
        out.append(Draft(config, "seed", chosen.budget, {**chosen.labels, "seed": seed}))
    return out


def _distinct(drafts: Iterable[Draft]) -> list[Draft]:
    """Each run once: neighbouring sizes may ask for the same shape of a coarse family."""
    return list({draft.id: draft for draft in reversed(list(drafts))}.values())[::-1]


# -------------------------------------------------------------------------------------------------- the kinds


def _isoflop(run: RunConfig, grid: GridConfig, center: Callable[[float], float] | None) -> list[Draft]:
    if grid.centers:
        check(
            len(grid.centers) == len(grid.budgets),
            f"grid.centers has {len(grid.centers)} sizes for {len(grid.budgets)} budgets: give one each",
        )
        middles = dict(zip(grid.budgets, grid.centers, strict=True))
    elif grid.center_fit:
        assert center is not None, "grid.center_fit needs the function `center`"
        middles = {budget: center(budget) for budget in grid.budgets}
    else:
        check(len(grid.sizes) > 0, "grid.kind='isoflop' needs grid.sizes, grid.centers or grid.center_fit")
        middles = {}
    out = []
    for budget in grid.budgets:
        middle, n = middles.get(budget), grid.sizes_per_budget
        sizes = grid.sizes
        if middle is not None:
            sizes = [middle * grid.span ** (2 * i / (n - 1) - 1) for i in range(n)] if n > 1 else [middle]
        row = []
        for size, base in zip(sizes, _shaped(run, grid, sizes), strict=True):
            config = _for_budget(base, grid, budget)
            row += _inner_lrs(run, grid, Draft(config, "grid", budget, {"budget": budget, "size": size}))
        out += _with_seeds(grid, _distinct(row), middle)
    return out


def _ladder(run: RunConfig, grid: GridConfig, center: Any) -> list[Draft]:
    out = []
    bases = _shaped(run, grid, grid.sizes)
    for ratio in grid.ratios:
        row = []
        for size, base in zip(grid.sizes, bases, strict=True):
            config = _for_tokens(base, grid, ratio * _size(base, grid))
            row += _inner_lrs(run, grid, Draft(config, "grid", labels={"ratio": ratio, "size": size}))
        out += _with_seeds(grid, _distinct(row), None)
    return out


def _rectangle(run: RunConfig, grid: GridConfig, center: Any) -> list[Draft]:
    out = []
    bases = _shaped(run, grid, grid.sizes)
    for tokens in grid.tokens:
        row = []
        for size, base in zip(grid.sizes, bases, strict=True):
            config = _for_tokens(base, grid, tokens)
            row += _inner_lrs(run, grid, Draft(config, "grid", labels={"tokens": tokens, "size": size}))
        out += _with_seeds(grid, _distinct(row), None)
    return out


def _lr_batch(run: RunConfig, grid: GridConfig, center: Any) -> list[Draft]:
    # Without budget and tokens every batch size sees as many tokens as the run itself.
    whole = run.train.num_steps * _tokens_per_step(run)
    amounts = [("budget", b) for b in grid.budgets] or [("tokens", t) for t in grid.tokens]
    bases = list(zip(grid.sizes, _shaped(run, grid, grid.sizes), strict=True)) if grid.sizes else []
    out = []
    for (unit, amount), (size, config), batch in itertools.product(
        amounts or [("tokens", whole)], bases or [(0.0, _ruled(run, grid))], grid.batches or (0,)
    ):
        if batch:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch))
        fill = _for_budget if unit == "budget" else _for_tokens
        labels = {unit: amount, **({"size": size} if size else {}), "batch": config.data.batch_size}
        budget = amount if unit == "budget" else 0.0
        out += _inner_lrs(run, grid, Draft(fill(config, grid, amount), "grid", budget, labels))
    return _distinct(out)


def _trunks(run: RunConfig, grid: GridConfig, center: Any) -> list[Draft]:
    """For each size a trunk at constant rate and, off it, a WSD run for each token count.

    A branch is the tail of the WSD run of its length: schedule and data are functions of the step, so trunk
    and branch together are that run to the bit. All branches of a size warm up alike: for `optim.warmup` as a
    share of the shortest, in steps. The trunk ends where the longest branch leaves it.
    """
    out = []
    for size, base in zip(grid.sizes, _shaped(run, grid, grid.sizes), strict=True):
        ends = {t: _for_tokens(base, grid, t).train.num_steps for t in sorted(grid.tokens)}
        check(
            len(set(ends.values())) == len(ends),
            f"grid.tokens={grid.tokens}: two branches of D={base.model.model_dim} have equal steps",
        )
        steps = {end: end - cooldown_steps(base, end) for end in ends.values()}
        unit = {"steps": 1.0, "tokens": 1.0 / _tokens_per_step(base), "fraction": float(min(steps))}
        warm = math.ceil(round(base.optim.warmup * unit[base.optim.warmup_unit], 6))
        check(
            warm < min(steps.values()),
            f"the warm-up of {warm} steps is not over where the shortest branch of D={base.model.model_dim} "
            f"leaves its trunk (step {min(steps.values())}): lower run.optim.warmup",
        )
        optim = dataclasses.replace(base.optim, warmup=float(warm), warmup_unit="steps")
        trunk = _with_steps(base, max(steps.values()))
        trunk = dataclasses.replace(
            trunk,
            optim=dataclasses.replace(optim, schedule="constant"),
            train=dataclasses.replace(trunk.train, save_steps=tuple(sorted(steps.values()))),
        )
        first = Draft(trunk, "trunk", labels={"size": size})
        out.append(first)
        for tokens, end in ends.items():
            branch = dataclasses.replace(
                _with_steps(base, end), optim=dataclasses.replace(optim, schedule="wsd")
            )
            from_here = dict(branch_from=first.id, branch_step=steps[end])
            branch = dataclasses.replace(branch, train=dataclasses.replace(branch.train, **from_here))
            labels = {"size": size, "tokens": tokens}
            out.append(Draft(branch, "branch", labels=labels, parent=first.id, branch_step=steps[end]))
        for tokens in grid.standalone:
            labels = {"size": size, "tokens": tokens, "standalone": 1}
            out.append(Draft(_for_tokens(base, grid, tokens), "grid", labels=labels))
    return _distinct(out)


def cooldown_steps(run: RunConfig, num_steps: int) -> int:
    """Updates of the cooldown of a WSD run, as `optim.make_schedule` rounds them."""
    return math.ceil(round(run.optim.cooldown * num_steps, 6))


def _product(run: RunConfig, grid: GridConfig, center: Any) -> list[Draft]:
    axes = []
    for names, values in grid.product:
        fields = [name.strip() for name in names.split(",")]
        for name in fields:
            check_name(name, RunConfig)
            check(
                not (grid.budgets and name == "train.num_steps"),
                "grid.product varies train.num_steps, which grid.budgets decides: drop one of them",
            )
        check(len(values) > 0, f"grid.product: {names!r} has no values")
        rows = []
        for value in values:
            whole = (value,) if len(fields) == 1 else value
            check(
                isinstance(whole, tuple) and len(whole) == len(fields),
                f"grid.product: {value!r} is not one value for each of {names!r}",
            )
            rows.append(dict(zip(fields, whole, strict=True)))
        axes.append(rows)
    total = math.prod(map(len, axes)) * max(1, len(grid.budgets))
    check(total <= MOST_RUNS, f"grid.product asks for {total:,} runs; {MOST_RUNS:,} are planned at most")
    out = []
    for budget, *rows in itertools.product(grid.budgets or (0.0,), *axes):
        changes = {name: value for row in rows for name, value in row.items()}
        tree = to_dict(run)
        for name, value in changes.items():
            *groups, field = name.split(".")
            group = tree
            for part in groups:
                group = group[part]
            group[field] = value
        config = _ruled(build(tree, RunConfig), grid)
        labels = {k: v if isinstance(v, int | float | str) else repr(v) for k, v in changes.items()}
        if budget:
            config, labels = _for_budget(config, grid, budget), {"budget": budget, **labels}
        out.append(Draft(config, "grid", budget, labels))
    return _distinct(out)


_EXPAND: dict[str, Callable[..., list[Draft]]] = {
    "isoflop": _isoflop,
    "ladder": _ladder,
    "rectangle": _rectangle,
    "lr_batch": _lr_batch,
    "trunks": _trunks,
    "product": _product,
}
