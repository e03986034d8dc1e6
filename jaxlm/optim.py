"""Optimizers: a frozen config becomes one Optax transformation and one learning-rate schedule.

    gradients -> guard(norm, clip, skip) -> weights: scale_by_<name>, decay, multiplier, learning rate -> ema
                                         -> router_bias: -rate * sign

Everything is decided by leaf NAME (`blocks/0/attention/wq`), never by rank alone: leaves under `blocks` are
stacked over layers, and that leading dimension is no part of a matrix. See `jaxlm.transforms` for the parts.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxlm.errors import UserError, check, check_choice
from jaxlm.layerwise import by_layer
from jaxlm.master_weights import keep_master, round_at_random
from jaxlm.transforms import (
    VECTORS,
    GuardState,
    Transform,
    average_params,
    guard,
    is_router_bias,
    matrix_axes,
    scale_by_adafactor,
    scale_matrices,
    split,
    stacked,
    with_eps_factors,
)
from jaxlm.tree import map_named, named_leaves

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd")
SCHEDULES = ("constant", "cosine", "linear", "wsd", "inverse_sqrt")
WARMUP_UNITS = ("steps", "tokens", "fraction")
COOLDOWNS = ("1-sqrt", "linear")
LOW_PRECISION = {
    "master": lambda chain: by_layer(keep_master(chain)),
    "stochastic": lambda chain: round_at_random(by_layer(chain)),  # random numbers of whole leaves
}
NUMBERS = ("weight_decay", "b2")  # of OptimConfig, that may be traced

Schedule = Callable[[Any], Float[Array, ""]]
Multipliers = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class OptimConfig:
    """How parameters are updated. Fractions are shares of the run, regexes are searched in leaf names."""

    name: str = "adamw"  # adamw | adafactor | lion | muon | sgd
    lr: float = 3e-4  # peak learning rate
    schedule: str = "cosine"  # constant | cosine | linear | wsd | inverse_sqrt, after the warm-up
    final: float = 0.1  # learning rate at the end of the run (floor of inverse_sqrt), as a share of lr
    warmup: float = 0.02  # length of the linear warm-up from 0, in warmup_unit
    warmup_unit: str = "fraction"  # steps | tokens | fraction (of the run)
    cooldown: float = 0.2  # wsd: share of the run spent going from lr to final
    cooldown_shape: str = "1-sqrt"  # wsd: 1-sqrt | linear
    b1: float = 0.9  # AdamW: decay of the first moment; Lion: momentum's share of the update's direction
    b2: float = 0.95  # AdamW: decay of the second moment; Lion: decay of the momentum (0.99 is usual)
    eps: float = 1e-8  # added to AdamW's root second moment
    momentum: float = 0.95  # SGD (heavy ball, 0 = none) and Muon (Nesterov)
    weight_decay: float = 0.1  # decoupled: each update subtracts lr * multiplier * weight_decay * parameter
    no_decay: str = VECTORS  # leaves that are not decayed; leaves of fewer than two dimensions never are
    clip_norm: float = 1.0  # largest global gradient norm; 0 = no clipping
    multipliers: Multipliers = ()  # (regex, factor) pairs on the learning rate; all that match multiply
    ema: float = 0.0  # decay of an average of the parameters kept beside them; 0 = none
    muon_rms: float = 0.2  # Muon: RMS of an update at lr 1; 0 = scale by sqrt(max(1, columns / rows))
    # Muon: matrices that take AdamW, as all vectors do
    muon_skip: str = r"(^|/)(embed|head|classifier)/|(^|/)(router_w|shared_gate)$"
    factor_min: int = 128  # Adafactor: matrices with fewer rows or columns keep a whole second moment
    parameter_scale: bool = False  # Adafactor: multiply each update by its parameter's RMS (at least 1e-3)
    low_precision: str = "master"  # bf16 parameters: master (float32 copies) | stochastic (random rounding)
    router_bias_rate: float = 1e-3  # step of loss-free expert balancing; has no schedule

    def __post_init__(self) -> None:
        check_choice(self.name, OPTIMIZERS, "optim.name")
        check_choice(self.schedule, SCHEDULES, "optim.schedule")
        check_choice(self.warmup_unit, WARMUP_UNITS, "optim.warmup_unit")
        check_choice(self.cooldown_shape, COOLDOWNS, "optim.cooldown_shape")
        check_choice(self.low_precision, LOW_PRECISION, "optim.low_precision")
        for name in (field.name for field in fields(self) if field.type in (int, float)):
            value, below = getattr(self, name), 1 if name in ("b1", "b2", "momentum", "ema") else math.inf
            check(0 <= value < below, f"optim.{name}={value} must lie in [0, {below:g})")
        for name in ("final", "cooldown"):
            check(getattr(self, name) <= 1, f"optim.{name}={getattr(self, name)} must lie in [0, 1]")
        check(
            self.warmup_unit != "fraction" or self.warmup < 1,
            f"optim.warmup={self.warmup:g} must be a share below 1, or set optim.warmup_unit='steps'",
        )
        _check_regex(self.no_decay, "optim.no_decay")
        _check_regex(self.muon_skip, "optim.muon_skip")
        _check_multipliers(self.multipliers)


def _check_regex(pattern: str, where: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise UserError(f"{where}={pattern!r} is not a regular expression: {error}") from error


def _check_multipliers(multipliers: Multipliers, where: str = "optim.multipliers") -> None:
    for pair in multipliers:
        check(
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], int | float) and pair[1] >= 0,
            f"{where} has {pair!r}; each entry is a pair (regex, factor >= 0)",
        )
        _check_regex(pair[0], where)


def _factor(multipliers: Multipliers, name: str) -> float:
    """Product of the factors whose regex is found in the name."""
    return math.prod(value for pattern, value in multipliers if re.search(pattern, name))


# --- Schedule ---


def make_schedule(
    cfg: OptimConfig, num_steps: int, tokens_per_step: int = 0, *, lr: Float[Array, ""] | None = None
) -> Schedule:
    """Learning rate of update number `step` = 0, 1, ..., num_steps - 1 (host integer or traced array).

    With w warm-up steps (rounded up), x = clip((step - w) / (num_steps - w), 0, 1) and f = `final`, lr times
        (step + 1) / w                                   while step < w, then
        constant      1
        cosine        f + (1 - f) (1 + cos(pi x)) / 2
        linear        1 - (1 - f) x
        inverse_sqrt  max(f, sqrt(w / max(step + 1, w)))
        wsd           1 - (1 - f) sqrt(y), or 1 - (1 - f) y for the linear shape; y stays 0 until the last
                      `cooldown` share of the run and goes from 0 to 1 over it.
    Neither the first nor the last update is wasted on a rate of 0: x = 1 is reached one step past the end.
    Sources: arXiv:1608.03983 (cosine), arXiv:1706.03762 (inverse_sqrt), arXiv:2404.06395 (WSD),
    arXiv:2405.18392 (1-sqrt cooldown).

    Args:
        cfg: names the schedule, see `OptimConfig`.
        num_steps: updates in the run.
        tokens_per_step: tokens (B*T) of one update; needed only when the warm-up is counted in tokens.
        lr: a number, traced if one likes, in place of `cfg.lr`.

    Raises:
        UserError: warm-up and cooldown do not fit in the run, or `tokens_per_step` is needed and 0.

    >>> cfg = OptimConfig(lr=1.0, schedule="linear", final=0.0, warmup=2, warmup_unit="steps")
    >>> schedule = make_schedule(cfg, num_steps=6)
    >>> [round(float(schedule(step)), 2) for step in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if cfg.warmup_unit == "tokens":
        check(tokens_per_step > 0, f"optim.warmup={cfg.warmup:g} tokens needs the number of tokens per step")
    unit = {"steps": 1.0, "tokens": 1.0 / max(tokens_per_step, 1), "fraction": num_steps}[cfg.warmup_unit]
    # Lengths are rounded up, but 0.07 * 100 = 7.000000000000001 steps are 7.
    warm = math.ceil(round(cfg.warmup * unit, 6))
    cool = math.ceil(round(cfg.cooldown * num_steps, 6)) if cfg.schedule == "wsd" else 0
    check(
        warm + cool <= num_steps,
        f"optim.warmup={cfg.warmup:g} {cfg.warmup_unit} ({warm} steps) and a cooldown of {cool} steps "
        f"do not fit in the run of {num_steps}",
    )
    start = num_steps - cool if cfg.schedule == "wsd" else warm
    drop, peak = 1.0 - cfg.final, cfg.lr if lr is None else lr

    def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        x = jnp.clip((step - start) / max(num_steps - start, 1), 0.0, 1.0)
        if cfg.schedule == "constant":
            share = jnp.ones_like(x)
        elif cfg.schedule == "cosine":
            share = cfg.final + drop * 0.5 * (1.0 + jnp.cos(jnp.pi * x))
        elif cfg.schedule == "inverse_sqrt":
            share = jnp.maximum(cfg.final, jnp.sqrt(max(warm, 1) / jnp.maximum(step + 1, max(warm, 1))))
        elif cfg.schedule == "wsd" and cfg.cooldown_shape == "1-sqrt":
            share = 1.0 - drop * jnp.sqrt(x)
        else:
            share = 1.0 - drop * x
        return peak * jnp.where(step < warm, (step + 1) / max(warm, 1), share)

    return schedule


# --- Names ---


def is_decayed(cfg: OptimConfig, name: str, ndim: int) -> bool:
    """Whether weight decay acts on a leaf: not `no_decay`, and two dimensions or more without the layers'."""
    return ndim - stacked(name) >= 2 and not re.search(cfg.no_decay, name)


def takes_muon(cfg: OptimConfig, name: str, ndim: int) -> bool:
    """Whether Muon moves a leaf, not its AdamW: the matrices but for `muon_skip`."""
    return matrix_axes(name, ndim) is not None and not re.search(cfg.muon_skip, name)


# --- Assembly ---


class RateState(NamedTuple):
    """`count` applied updates, the last of them with learning rate `lr`."""

    count: Int[Array, ""]
    lr: Float[Array, ""]


def apply_rate(
    cfg: OptimConfig,
    schedule: Schedule,
    multipliers: Multipliers,
    decay_multipliers: Multipliers = (),
    weight_decay: Float[Array, ""] | float | None = None,
) -> Transform:
    """-schedule(count) * multiplier * (direction + decay * parameter), decay where `is_decayed`.

    The decay is `weight_decay` (default: that of `cfg`) times the factors of `decay_multipliers`.
    """
    decay = cfg.weight_decay if weight_decay is None else weight_decay

    def init(params):
        return RateState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32))

    def update(updates, state, params=None):
        lr = jnp.asarray(schedule(state.count), jnp.float32)

        def step(name, u, p):
            if (weight_decay is not None or decay) and is_decayed(cfg, name, u.ndim):
                u = u + decay * _factor(decay_multipliers, name) * p.astype(jnp.float32)
            return -(lr * _factor(multipliers, name)) * u

        return map_named(step, updates, params), RateState(optax.safe_increment(state.count), lr)

    return optax.GradientTransformation(init, update)


def _checking_names(inner: Transform, patterns: list[tuple[str, str]]) -> Transform:
    """`inner`, whose `init` refuses a regex that is found in no leaf name."""

    def init(params):
        names = [name for name, _ in named_leaves(params)]
        for where, pattern in patterns:
            check(
                any(re.search(pattern, name) for name in names),
                f"{where}: {pattern!r} is found in no leaf name, such as {', '.join(names[:3])}",
            )
        return inner.init(params)

    return optax.GradientTransformation(init, inner.update)


def _direction(cfg: OptimConfig, b2: Float[Array, ""] | float, eps_multipliers: Multipliers) -> Transform:
    """The transformation that gives `cfg.name` its name, without learning rate or decay."""
    adam = optax.scale_by_adam(cfg.b1, b2, cfg.eps)
    if eps_multipliers:
        adam = with_eps_factors(adam, lambda name: _factor(eps_multipliers, name))
    if cfg.name == "adamw":
        return adam
    if cfg.name == "lion":
        return optax.scale_by_lion(cfg.b1, b2)
    if cfg.name == "sgd":
        return optax.trace(cfg.momentum) if cfg.momentum else optax.identity()
    if cfg.name == "adafactor":
        return scale_by_adafactor(cfg.factor_min, cfg.parameter_scale)

    def dimension_numbers(updates):
        return map_named(lambda name, u: MuonDimensionNumbers(*matrix_axes(name, u.ndim)), updates)

    muon = scale_by_muon(beta=cfg.momentum, weight_dimension_numbers=dimension_numbers)
    by_muon = lambda name, leaf: takes_muon(cfg, name, leaf.ndim)  # noqa: E731
    return split(by_muon, optax.chain(muon, scale_matrices(cfg.muon_rms)), adam)


def make_optimizer(
    cfg: OptimConfig,
    schedule: Schedule,
    *,
    multipliers: Multipliers = (),
    decay_multipliers: Multipliers = (),
    eps_multipliers: Multipliers = (),
    numbers: Mapping[str, Float[Array, ""]] | None = None,
) -> Transform:
    """The whole optimizer of `cfg`, as one Optax transformation. Its `update` needs `params`.

    Args:
        schedule: applied updates so far -> learning rate.
        multipliers: more (regex, factor) pairs besides `cfg.multipliers`, such as a parametrisation gives.
        decay_multipliers, eps_multipliers: the same on the weight decay and on AdamW's epsilon.
        numbers: values, traced if one likes, in place of those of `cfg` whose names are in `NUMBERS`.

    Raises:
        UserError: in `init`, when a multiplier's regex is found in no leaf name; at once, for numbers that
            are none of `NUMBERS` and epsilons of an optimizer that has none.

    >>> cfg = OptimConfig(name="sgd", momentum=0.0, clip_norm=0.0, weight_decay=0.0)
    >>> optimizer = make_optimizer(cfg, lambda count: 0.5)
    >>> params = {"head": {"w": jnp.ones((1, 2))}}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)
    >>> updates["head"]["w"].tolist(), float(learning_rate(state))
    ([[-0.5, -0.5]], 0.5)
    """
    numbers = dict(numbers or {})
    for name in numbers:
        check_choice(name, NUMBERS, "make_optimizer: numbers")
    check(
        not eps_multipliers or cfg.name in ("adamw", "muon"),
        f"optim.name={cfg.name!r} has no epsilon to multiply; 'adamw' and 'muon' have one",
    )
    given = {
        "optim.multipliers": (*cfg.multipliers, *multipliers),
        "decay_multipliers": decay_multipliers,
        "eps_multipliers": eps_multipliers,
    }
    for where, pairs in given.items():
        _check_multipliers(pairs, where)
    patterns = [(where, pattern) for where, pairs in given.items() for pattern, _ in pairs]
    direction = _direction(cfg, numbers.get("b2", cfg.b2), eps_multipliers)
    rate = apply_rate(
        cfg, schedule, given["optim.multipliers"], decay_multipliers, numbers.get("weight_decay")
    )
    balance = optax.chain(optax.scale_by_sign(), optax.scale(-cfg.router_bias_rate))
    weights = _checking_names(optax.chain(direction, rate), patterns)
    chain = split(is_router_bias, balance, weights)
    if cfg.ema:
        chain = optax.chain(chain, average_params(cfg.ema))
    return guard(LOW_PRECISION[cfg.low_precision](chain), cfg.clip_norm)


def grad_norm(opt_state: GuardState) -> Float[Array, ""]:
    """Global norm of the last gradient before clipping, without `router_bias`; not finite if skipped."""
    return opt_state.grad_norm


def nonfinite_counts(opt_state: Any) -> tuple[Int[Array, ""], Int[Array, ""]] | None:
    """Updates skipped for a non-finite gradient, in total and in a row up to now; None without `guard`."""
    return (opt_state.nonfinite, opt_state.nonfinite_run) if isinstance(opt_state, GuardState) else None


def learning_rate(opt_state: GuardState) -> Float[Array, ""]:
    """Learning rate of the last applied update, before multipliers."""
    return optax.tree.get(opt_state, "lr")


def ema_params(opt_state: GuardState) -> Any:
    """The averaged parameters (float32), or None without `OptimConfig.ema`."""
    return optax.tree.get(opt_state, "ema")
