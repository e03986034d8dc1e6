"""Optimizers: a frozen config becomes one Optax transformation and one learning-rate schedule.

    gradients -> guard(norm, clip, skip) -> weights: scale_by_<name>, decay, multiplier, learning rate -> ema
                                         -> router_bias: -rate * sign

Everything is decided by leaf NAME (`blocks/0/attention/wq`), never by rank alone: leaves under `blocks` are
stacked over layers, and that leading dimension is no part of a matrix. All state is float32 whatever the
parameters' dtype. A state array that belongs to a parameter has the parameter's name at the end of its path
and the parameter's rank, each dimension equal to the parameter's or 1, so that layouts derive from names.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxlm.errors import UserError, check, check_choice
from jaxlm.master_weights import keep_master
from jaxlm.tree import combine, map_named, named_leaves, partition

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd")
SCHEDULES = ("constant", "cosine", "linear", "wsd", "inverse_sqrt")
WARMUP_UNITS = ("steps", "tokens", "fraction")
COOLDOWNS = ("1-sqrt", "linear")

# Gains, offsets and other per-channel leaves: no matrices, however many dimensions they have.
VECTORS = r"(^|/)(scale|bias|sinks|router_bias|b[qkvo]|b_\w+|\w*norm)$|(^|/)position_bias/"

Transform = optax.GradientTransformation
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
    muon_skip: str = r"(^|/)(embed|head)/|(^|/)router_w$"  # Muon: matrices that take AdamW, as all vectors do
    factor_min: int = 128  # Adafactor: matrices with fewer rows or columns keep a whole second moment
    parameter_scale: bool = False  # Adafactor: multiply each update by its parameter's RMS (at least 1e-3)
    router_bias_rate: float = 1e-3  # step of loss-free expert balancing; has no schedule

    def __post_init__(self) -> None:
        check_choice(self.name, OPTIMIZERS, "optim.name")
        check_choice(self.schedule, SCHEDULES, "optim.schedule")
        check_choice(self.warmup_unit, WARMUP_UNITS, "optim.warmup_unit")
        check_choice(self.cooldown_shape, COOLDOWNS, "optim.cooldown_shape")
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


def _check_multipliers(multipliers: Multipliers) -> None:
    for pair in multipliers:
        check(
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], int | float) and pair[1] >= 0,
            f"optim.multipliers has {pair!r}; each entry is a pair (regex, factor >= 0)",
        )
        _check_regex(pair[0], "optim.multipliers")


# --- Schedule ---


def make_schedule(cfg: OptimConfig, num_steps: int, tokens_per_step: int = 0) -> Schedule:
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
    drop = 1.0 - cfg.final

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
        return cfg.lr * jnp.where(step < warm, (step + 1) / max(warm, 1), share)

    return schedule


# --- Names ---


def _stacked(name: str) -> bool:
    """Whether the leaf has a leading dimension over layers."""
    return "blocks" in name.split("/")


def matrix_axes(name: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Axes, from the right, that are rows (inputs) and columns (outputs) of its matrices; None for vectors.

    All other axes (layers, experts) count matrices. Attention's input projections [D, N, H] are D x (N H) and
    its output projection [N, H, D] is (N H) x D.

    >>> matrix_axes("blocks/0/attention/wq", 4), matrix_axes("blocks/0/attention/wo", 4)
    (((-3,), (-2, -1)), ((-3, -2), (-1,)))
    >>> matrix_axes("blocks/0/moe/w_up", 4), matrix_axes("blocks/0/mlp_norm/scale", 2)
    (((-2,), (-1,)), None)
    """
    if re.search(VECTORS, name) or ndim - _stacked(name) < 2:
        return None
    leaf = name.rsplit("/", 1)[-1]
    if leaf in ("wq", "wk", "wv"):
        return (-3,), (-2, -1)
    if leaf == "wo":
        return (-3, -2), (-1,)
    return (-2,), (-1,)


def is_decayed(cfg: OptimConfig, name: str, ndim: int) -> bool:
    """Whether weight decay acts on a leaf: not `no_decay`, and two dimensions or more without the layers'."""
    return ndim - _stacked(name) >= 2 and not re.search(cfg.no_decay, name)


def _is_router_bias(name: str, leaf: Any) -> bool:
    return name.rsplit("/", 1)[-1] == "router_bias"


# --- Transforms ---


class SplitState(NamedTuple):
    """States of two transformations that share a tree; either has holes (None) where the other has leaves."""

    yes: Any
    no: Any


def split(predicate: Callable[[str, Any], bool], yes: Transform, no: Transform) -> Transform:
    """Send the leaves for which `predicate(name, leaf)` holds through `yes` and the others through `no`."""

    def init(params):
        chosen, others = partition(params, predicate)
        return SplitState(yes.init(chosen), no.init(others))

    def update(grads, state, params=None):
        chosen, others = partition(grads, predicate)
        chosen_params, other_params = partition(params, predicate)
        chosen, yes_state = yes.update(chosen, state.yes, chosen_params)
        others, no_state = no.update(others, state.no, other_params)
        return combine(chosen, others), SplitState(yes_state, no_state)

    return optax.GradientTransformation(init, update)


class FactoredState(NamedTuple):
    """Adafactor's second moments: `v_row` and `v_col` of factored leaves, `v` of the rest; else None."""

    count: Int[Array, ""]
    v_row: Any
    v_col: Any
    v: Any


def scale_by_adafactor(factor_min: int = 128, parameter_scale: bool = False) -> Transform:
    """Divide by a root second moment that is kept, for each matrix, as row and column means.

        b = 1 - t^-0.8;  R = b R + (1 - b) mean_columns(g^2 + 1e-30);  C likewise over rows
        u = g / sqrt(R C / mean(R));  u / max(1, RMS(u));  with `parameter_scale`, * max(1e-3, RMS(parameter))

    Optax's own factors the two largest dimensions of an array, which may be the stacked layers, and takes its
    RMS over all layers at once. Here rows and columns are `matrix_axes`, and each RMS is one layer's (one
    expert's). Means keep dimensions: for a [L, D, N, H] leaf `v_row` is [L, D, 1, 1], `v_col` [L, 1, N, H].

    Source: arXiv:1804.04235, without its relative step size and momentum. Arguments: see `OptimConfig`.
    """

    def averaged(name: str, leaf: Array) -> tuple[tuple[int, ...] | None, ...]:
        """Axes averaged away in `v_row`, `v_col` and `v`; None where the leaf has no such moment."""
        axes = matrix_axes(name, leaf.ndim)
        if axes and min(math.prod(leaf.shape[axis] for axis in group) for group in axes) >= factor_min:
            return axes[1], axes[0], None
        return None, None, ()

    def init(params):
        def zeros(part: int):
            def leaf_zeros(name, p):
                if (axes := averaged(name, p)[part]) is not None:
                    return jnp.zeros(
                        [1 if i - p.ndim in axes else n for i, n in enumerate(p.shape)], jnp.float32
                    )

            return map_named(leaf_zeros, params)

        return FactoredState(jnp.zeros([], jnp.int32), zeros(0), zeros(1), zeros(2))

    def update(grads, state, params=None):
        count = optax.safe_increment(state.count)
        b = 1.0 - count.astype(jnp.float32) ** -0.8

        def moments(part: int):
            def moment(name, g, old):
                if old is not None:
                    return b * old + (1.0 - b) * jnp.mean(
                        g * g + 1e-30, averaged(name, g)[part], keepdims=True
                    )

            return map_named(moment, grads, state[1 + part])

        v_row, v_col, v = moments(0), moments(1), moments(2)

        def direction(name, g, row, col, whole, param):
            axes = matrix_axes(name, g.ndim)
            if row is None:
                u = g * jax.lax.rsqrt(whole)
            else:
                u = g * jax.lax.rsqrt(row / jnp.mean(row, axes[0], keepdims=True)) * jax.lax.rsqrt(col)
            block = axes[0] + axes[1] if axes else tuple(range(int(_stacked(name)), g.ndim))
            u = u / jnp.maximum(1.0, jnp.sqrt(jnp.mean(u * u, block, keepdims=True)))
            if parameter_scale:
                p = param.astype(jnp.float32)
                u = u * jnp.maximum(1e-3, jnp.sqrt(jnp.mean(p * p, block, keepdims=True)))
            return u

        updates = map_named(direction, grads, v_row, v_col, v, params)
        return updates, FactoredState(count, v_row, v_col, v)

    return optax.GradientTransformation(init, update)


def scale_matrices(rms: float) -> Transform:
    """Multiply r x c orthogonalised updates by rms * sqrt(max(r, c)), or by sqrt(max(1, c / r)) if rms is 0.

    An orthogonal matrix has RMS 1 / sqrt(max(r, c)), so the first gives every matrix the same RMS and lets
    Muon share AdamW's learning rate and decay. Sources: arXiv:2502.16982; github.com/KellerJordan/Muon.
    """

    def scale(name: str, u: Array) -> Array:
        rows, columns = (math.prod(u.shape[axis] for axis in group) for group in matrix_axes(name, u.ndim))
        return u * (rms * math.sqrt(max(rows, columns)) if rms else math.sqrt(max(1.0, columns / rows)))

    return optax.stateless(lambda updates, params: map_named(scale, updates))


class RateState(NamedTuple):
    """`count` applied updates, the last of them with learning rate `lr`."""

    count: Int[Array, ""]
    lr: Float[Array, ""]


def apply_rate(cfg: OptimConfig, schedule: Schedule, multipliers: Multipliers) -> Transform:
    """-schedule(count) * multiplier * (direction + weight_decay * parameter), decay where `is_decayed`."""

    def factor(name: str) -> float:
        return math.prod(value for pattern, value in multipliers if re.search(pattern, name))

    def init(params):
        names = [name for name, _ in named_leaves(params)]
        for pattern, _ in multipliers:
            check(
                any(re.search(pattern, name) for name in names),
                f"optim.multipliers: {pattern!r} is found in no leaf name, such as {', '.join(names[:3])}",
            )
        return RateState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32))

    def update(updates, state, params=None):
        lr = jnp.asarray(schedule(state.count), jnp.float32)

        def step(name, u, p):
            if cfg.weight_decay and is_decayed(cfg, name, u.ndim):
                u = u + cfg.weight_decay * p.astype(jnp.float32)
            return -(lr * factor(name)) * u

        return map_named(step, updates, params), RateState(optax.safe_increment(state.count), lr)

    return optax.GradientTransformation(init, update)


class EmaState(NamedTuple):
    """Average of the parameters, float32."""

    ema: Any


def average_params(decay: float) -> Transform:
    """Keep ema = decay * ema + (1 - decay) * (parameters after this update), starting from the first."""

    def init(params):
        # A copy: parameters and optimizer state are both donated, so they must not share a buffer.
        return EmaState(jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params))

    def update(updates, state, params=None):
        new = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p.astype(jnp.float32), state.ema, new)
        return updates, EmaState(ema)

    return optax.GradientTransformation(init, update)


class GuardState(NamedTuple):
    """The last gradient's norm before clipping, and updates skipped in total and in a row."""

    grad_norm: Float[Array, ""]
    nonfinite: Int[Array, ""]
    nonfinite_run: Int[Array, ""]
    inner: Any


def guard(inner: optax.GradientTransformation, clip_norm: float) -> Transform:
    """Clip by global norm, and skip the update when the norm is not finite.

    The norm, computed once in float32, serves clipping (g * min(1, clip_norm / norm)), the metric and the
    check, since one NaN or infinity makes it non-finite. `router_bias` leaves are checked, but are no part of
    it.

    A skipped update leaves parameters and inner state unchanged to the bit (the schedule's count, too).
    Unlike `optax.apply_if_finite`, this reads gradients once and never applies a bad update: the caller stops
    on `nonfinite_counts`. It is a `lax.cond`: with a select between old and new state, XLA:CPU copies both
    moments, which takes an update of AdamW a third longer.

    Args:
        inner: gets float32 gradients and the parameters.
        clip_norm: largest global norm; 0 = no clipping.
    """

    def init(params):
        norm, total, run = jnp.zeros([], jnp.float32), jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        return GuardState(norm, total, run, inner.init(params))

    def update(grads, state, params=None):
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        biases, weights = partition(grads, _is_router_bias)
        norm = optax.tree.norm(weights)
        ok = jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(biases))
        scale = clip_norm / jnp.maximum(norm, clip_norm) if clip_norm else 1.0

        def apply():
            clipped = combine(biases, jax.tree.map(lambda g: g * scale, weights))
            return inner.update(clipped, state.inner, params)

        def skip():
            # -0.0 is the zero that leaves every number's bits alone: -0.0 + 0.0 would be 0.0.
            return jax.tree.map(lambda g: jnp.full_like(g, -0.0), grads), state.inner

        updates, new_inner = jax.lax.cond(ok, apply, skip)
        return updates, GuardState(
            grad_norm=norm,
            nonfinite=jnp.where(ok, state.nonfinite, optax.safe_increment(state.nonfinite)),
            nonfinite_run=jnp.where(ok, 0, optax.safe_increment(state.nonfinite_run)),
            inner=new_inner,
        )

    return optax.GradientTransformation(init, update)


# --- Assembly ---


def _direction(cfg: OptimConfig) -> Transform:
    """The transformation that gives `cfg.name` its name, without learning rate or decay."""
    adam = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
    if cfg.name == "adamw":
        return adam
    if cfg.name == "lion":
        return optax.scale_by_lion(cfg.b1, cfg.b2)
    if cfg.name == "sgd":
        return optax.trace(cfg.momentum) if cfg.momentum else optax.identity()
    if cfg.name == "adafactor":
        return scale_by_adafactor(cfg.factor_min, cfg.parameter_scale)

    def dimension_numbers(updates):
        return map_named(lambda name, u: MuonDimensionNumbers(*matrix_axes(name, u.ndim)), updates)

    def takes_muon(name: str, leaf: Any) -> bool:
        return matrix_axes(name, leaf.ndim) is not None and not re.search(cfg.muon_skip, name)

    muon = scale_by_muon(beta=cfg.momentum, weight_dimension_numbers=dimension_numbers)
    return split(takes_muon, optax.chain(muon, scale_matrices(cfg.muon_rms)), adam)


def make_optimizer(cfg: OptimConfig, schedule: Schedule, *, multipliers: Multipliers = ()) -> Transform:
    """The whole optimizer of `cfg`, as one Optax transformation. Its `update` needs `params`.

    Args:
        schedule: applied updates so far -> learning rate.
        multipliers: more (regex, factor) pairs besides `cfg.multipliers`, such as a parametrisation gives.

    Raises:
        UserError: in `init`, when a multiplier's regex is found in no leaf name.

    >>> cfg = OptimConfig(name="sgd", momentum=0.0, clip_norm=0.0, weight_decay=0.0)
    >>> optimizer = make_optimizer(cfg, lambda count: 0.5)
    >>> params = {"head": {"w": jnp.ones((1, 2))}}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)
    >>> updates["head"]["w"].tolist(), float(learning_rate(state))
    ([[-0.5, -0.5]], 0.5)
    """
    _check_multipliers(multipliers)
    rate = apply_rate(cfg, schedule, tuple(cfg.multipliers) + tuple(multipliers))
    balance = optax.chain(optax.scale_by_sign(), optax.scale(-cfg.router_bias_rate))
    chain = split(_is_router_bias, balance, optax.chain(_direction(cfg), rate))
    if cfg.ema:
        chain = optax.chain(chain, average_params(cfg.ema))
    return guard(keep_master(chain), cfg.clip_norm)


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
