"""The training state, and where each of its leaves lies on the mesh.

One rule lays out the optimizer state: a leaf whose name ends in a parameter's name (such as
`1/0/mu/blocks/0/mlp/w_up`) is split as that parameter is; everything else (counts, scalars) is replicated.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Int, UInt32

from jaxlm.errors import UserError
from jaxlm.sharding import HOST, Layout, tree_shardings
from jaxlm.transforms import owner_of, stacked
from jaxlm.tree import map_named, named_leaves, partition

Params = Any
Axes = Mapping[str, Sequence[str | None]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that one update reads and writes."""

    step: Int[Array, ""]  # updates done so far
    params: Params  # trainable parameters; frozen ones travel beside the state
    opt_state: optax.OptState
    key: UInt32[Array, "2"]  # threefry key data of the run; dropout folds in (step, microbatch)

    def next(self, params: Params, opt_state: optax.OptState) -> "TrainState":
        """The state after one more update."""
        return dataclasses.replace(self, step=self.step + 1, params=params, opt_state=opt_state)


def _builder(
    init: Callable[[jax.Array], Params],
    optimizer: optax.GradientTransformation,
    trainable: Callable[[str, Any], bool] | None,
) -> Callable[[jax.Array], tuple[TrainState, Params | None]]:
    """`key -> (state, frozen)`, a pure function to trace, lower or run under any mesh."""

    def build(key: jax.Array) -> tuple[TrainState, Params | None]:
        # Two independent streams: a dropout key folded from (step, ...) can never equal an init key.
        init_key, run_key = jax.random.split(key)
        params, frozen = init(init_key), None
        if trainable is not None:
            params, frozen = partition(params, trainable)
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            key=jax.random.key_data(run_key),
        )
        return state, frozen

    return build


def _seed_key(seed: int) -> jax.Array:
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} must be in [0, 2**32)")
    return jax.random.key(seed, impl="threefry2x32")


def _abstract_key() -> jax.ShapeDtypeStruct:
    """The type of a key: made without running anything, so also for devices that are not there."""
    return jax.eval_shape(lambda: _seed_key(0))


def follow_params(tree: Any, params: Params, shardings: Any, mesh: Any) -> Any:
    """Shardings for `tree`, each leaf laid out like the parameter whose name ends its own name.

    A leaf whose dimensions are those of its parameter or 1 (Adafactor's row and column statistics) is split
    where they agree; a leaf of any other shape is replicated.

    Args:
        tree: optimizer state (arrays or `ShapeDtypeStruct`s).
        params: the parameters that it belongs to.
        shardings: `NamedSharding` for every leaf of `params`.
        mesh: where replicated leaves lie.

    Returns:
        A tree of `NamedSharding` with the structure of `tree`.
    """
    layouts = {name: leaf.spec for name, leaf in named_leaves(shardings)}
    shapes = {name: tuple(leaf.shape) for name, leaf in named_leaves(params)}

    def one(name: str, leaf: Any) -> NamedSharding:
        owner = owner_of(name, shapes)
        if owner is None:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, _matching_spec(tuple(leaf.shape), shapes[owner], layouts[owner]))

    return map_named(one, tree)


def _matching_spec(shape: tuple[int, ...], owner: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec:
    """The part of a parameter's spec that fits an array of `shape`."""
    dims = tuple(spec) + (None,) * (len(owner) - len(spec))
    if len(shape) != len(owner) or any(n not in (1, whole) for n, whole in zip(shape, owner, strict=True)):
        return PartitionSpec()
    pairs = zip(shape, owner, dims, strict=True)
    return PartitionSpec(*[dim if n == whole else None for n, whole, dim in pairs])


def state_shardings(layout: Layout, state: TrainState, table: Axes) -> TrainState:
    """`NamedSharding` of every leaf of a (real or abstract) state, from the parameters' AXES table."""
    params = tree_shardings(layout, state.params, table)
    whole = NamedSharding(layout.mesh, PartitionSpec())
    opt_state = follow_params(state.opt_state, state.params, params, layout.mesh)
    if layout.offload != "none":  # counts, rates and the like stay
        names = {name for name, _ in named_leaves(state.params)}
        opt_state = map_named(
            lambda name, s: s.with_memory_kind(HOST) if owner_of(name, names) else s, opt_state
        )
    if layout.offload == "all":
        params = map_named(lambda name, s: s.with_memory_kind(HOST) if stacked(name) else s, params)
    return TrainState(step=whole, params=params, opt_state=opt_state, key=whole)


def _shardings(layout: Layout | None, table: Axes | None, abstract: tuple[TrainState, Params | None]) -> Any:
    state, frozen = abstract
    if layout is None:
        return jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), abstract)
    if table is None:
        raise ValueError("a layout needs the model's AXES table")
    return state_shardings(layout, state, table), tree_shardings(layout, frozen, table)


def abstract_state(
    init: Callable[[jax.Array], Params],
    optimizer: optax.GradientTransformation,
    *,
    layout: Layout | None = None,
    table: Axes | None = None,
    trainable: Callable[[str, Any], bool] | None = None,
) -> tuple[TrainState, Params | None]:
    """What `create_state` would return, as `ShapeDtypeStruct`s with shardings: no memory, no FLOPs.

    It is the target of a restore and the argument of an ahead-of-time `step.lower`.
    """
    abstract = jax.eval_shape(_builder(init, optimizer, trainable), _abstract_key())
    shardings = _shardings(layout, table, abstract)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def create_state(
    init: Callable[[jax.Array], Params],
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    layout: Layout | None = None,
    table: Axes | None = None,
    trainable: Callable[[str, Any], bool] | None = None,
) -> tuple[TrainState, Params | None]:
    """A fresh state, every leaf born on its own devices: no device ever holds an unsplit copy.

    Args:
        init: `key -> params`, pure.
        optimizer: an Optax transformation over the trainable parameters.
        seed: in [0, 2**32); gives the init key and the run's dropout key, independent of each other.
        layout: mesh and rules; None = the first device.
        table: the model's AXES table; needed with a layout.
        trainable: `(name, leaf) -> bool`; leaves where it is False go to `frozen`. None = train all.

    Returns:
        `(state, frozen)`; `frozen` is None without `trainable`, else a tree with None holes for `combine`.

    Raises:
        UserError: a leaf without an AXES entry, a size that the mesh does not divide, a seed out of range.
    """
    return state_program(init, optimizer, layout=layout, table=table, trainable=trainable)(seed)


def state_program(
    init: Callable[[jax.Array], Params],
    optimizer: optax.GradientTransformation,
    *,
    layout: Layout | None = None,
    table: Axes | None = None,
    trainable: Callable[[str, Any], bool] | None = None,
) -> Callable[[int], tuple[TrainState, Params | None]]:
    """`create_state` as a function of the seed alone, traced and compiled once for all seeds."""
    build = _builder(init, optimizer, trainable)
    shardings = _shardings(layout, table, jax.eval_shape(build, _abstract_key()))
    program = jax.jit(build, out_shardings=shardings, compiler_options=_run_once())
    return lambda seed: program(_seed_key(seed))


def _run_once() -> dict[str, int] | None:
    """Compiler options of a program that runs once: on a CPU optimising it takes longer than running it.

    The parameters of a model of 2 layers take 5.1 CPU seconds to compile, at level 1 2.1, and are the same
    to the bit. What XLA_FLAGS says of the level holds.
    """
    name = "xla_backend_optimization_level"
    quick = jax.default_backend() == "cpu" and name not in os.environ.get("XLA_FLAGS", "")
    return {name: 1} if quick else None


def replace_params(state: TrainState, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """`state` at step 0 with these parameters (a warm start) and an optimizer state made for them.

    The optimizer state is built again because some of it is a copy of the parameters (EMA).
    """
    shardings = jax.tree.map(lambda x: x.sharding, state.opt_state)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    return dataclasses.replace(state, step=jnp.zeros_like(state.step), params=params, opt_state=opt_state)
