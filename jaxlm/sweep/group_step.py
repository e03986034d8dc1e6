"""The programs of a group: those of a lone run, over a leading cell axis."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxlm.model import transformer
from jaxlm.objectives.lm import LossConfig
from jaxlm.optim import OptimConfig
from jaxlm.sharding import MeshConfig, make_mesh
from jaxlm.sweep.groups import Member
from jaxlm.train.programs import Numbers, optimizer_of, programs, shape_of
from jaxlm.train.state import TrainState, _builder, _run_once, _seed_key
from jaxlm.train.step import Batch

CELL = "cell/"  # in front of the names of metrics that have a cell axis


@dataclasses.dataclass(frozen=True)
class GroupPrograms:
    """As `jaxlm.train.programs.Programs`; every leaf of the state but `step` has a leading cell axis."""

    target: TrainState  # of `ShapeDtypeStruct`s with shardings
    new_state: Callable[[Sequence[Member]], TrainState]
    step: Callable[[TrainState, None, tuple[Batch, Numbers]], tuple[TrainState, dict]]  # donates the state
    eval_step: Callable[[Any, Batch], Any]  # (parameters of all cells, one batch) -> `RowSums` of all cells


def over_cells(fn: Callable[[Any, Any], Any], width: int) -> Callable[[Any, Any], Any]:
    """`fn(shared, own)` for every slice of `own` along its leading axis, `width` of them at a time (0 = all).

    With all of them each operation runs once, over a batch of cells; with one, a loop runs the operations of
    a lone run cell after cell; between them, the loop is over vmapped parts.

    >>> over_cells(lambda shared, own: shared + own, 2)(1, jnp.arange(5)).tolist()
    [1, 2, 3, 4, 5]
    """

    def apply(shared: Any, own: Any) -> Any:
        if width == 0:
            return jax.vmap(partial(fn, shared))(own)
        return jax.lax.map(partial(fn, shared), own, batch_size=width if width > 1 else None)

    return apply


def own_metrics(pairs: Mapping[str, Any], c: int) -> dict[str, tuple[Any, Any]]:
    """The metrics of one cell out of those of the group's step."""
    own = {name.removeprefix(CELL): pair for name, pair in pairs.items() if name.startswith(CELL)}
    return {name: (total[c], weight[c]) for name, (total, weight) in own.items()}


def group_programs(
    model: transformer.TransformerConfig,
    loss: LossConfig,
    optim: OptimConfig,
    mesh: MeshConfig,
    *,
    microbatches: int,
    token_bytes: Float[np.ndarray, " V"],
    cells: int,
    width: int,
    shared: bool,
) -> GroupPrograms:
    """The programs of a group, those of an earlier group in this process if they are the same.

    The step takes a lone run's step for each cell: `(batch, numbers)` with numbers of shape [C]. Its metrics
    are `nonfinite` (cells whose update was not finite) and, under `cell/...`, the lone step's with a cell
    axis.

    Args:
        model, loss, optim, mesh, microbatches, token_bytes: of any cell, as for `programs`.
        cells: C.
        width: see `over_cells`.
        shared: all cells see the same batches, which then have no cell axis.
    """
    table = tuple(np.asarray(token_bytes, np.float32).tolist())
    return _group_programs(model, loss, shape_of(optim), mesh, microbatches, table, cells, width, shared)


@functools.lru_cache(maxsize=4)
def _group_programs(
    model: transformer.TransformerConfig,
    loss: LossConfig,
    optim: OptimConfig,
    mesh: MeshConfig,
    microbatches: int,
    token_bytes: tuple[float, ...],
    cells: int,
    width: int,
    shared: bool,
) -> GroupPrograms:
    lone = programs(model, loss, optim, mesh, microbatches=microbatches, token_bytes=np.array(token_bytes))
    whole = NamedSharding(make_mesh(mesh), PartitionSpec())
    optimizer = optimizer_of(model, optim, lambda count: 0.0)

    def build(keys_C: Array, scales_C: Float[Array, " C"]) -> TrainState:
        def one(_: None, own: tuple) -> TrainState:
            init = partial(transformer.init, model, init_scale=own[1])
            return _builder(init, optimizer, None)(own[0])[0]

        state = over_cells(one, width)(None, (keys_C, scales_C))
        return dataclasses.replace(state, step=state.step[0])

    keys_C = jax.eval_shape(lambda: jnp.stack([_seed_key(0)] * cells))
    shapes = jax.eval_shape(build, keys_C, jax.ShapeDtypeStruct((cells,), jnp.float32))
    shardings = jax.tree.map(lambda _: whole, shapes)

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def group_step(state: TrainState, frozen: None, fed: tuple[Batch, Numbers]) -> tuple[TrainState, dict]:
        def one(common: tuple, own: tuple) -> tuple:
            (params, opt_state, key), rows, numbers = own
            step, batch = common
            cell = TrainState(step, params, opt_state, key)
            cell, metrics = lone.step(cell, frozen, (batch if shared else rows, numbers))
            return (cell.params, cell.opt_state, cell.key), metrics

        batch, numbers = fed
        common, rows = ((state.step, batch), None) if shared else ((state.step, None), batch)
        own = ((state.params, state.opt_state, state.key), rows, numbers)
        leaves, metrics = over_cells(one, width)(common, own)
        bad = jnp.sum(metrics["nonfinite"][0])
        pairs = {CELL + name: pair for name, pair in metrics.items()}
        return TrainState(state.step + 1, *leaves), {"nonfinite": (bad, jnp.ones(())), **pairs}

    @jax.jit
    def group_eval_step(params: Any, batch: Batch) -> Any:
        return over_cells(lambda batch, params: lone.eval_step(params, batch), width)(batch, params)

    fresh = jax.jit(build, out_shardings=shardings, compiler_options=_run_once())

    def new_state(members: Sequence[Member]) -> TrainState:
        # Of a fan-in's weights (init_std = 0) nobody asks for another factor than 1.
        scales = [member.init_std / model.init_std if model.init_std else 1.0 for member in members]
        keys_C = jnp.stack([_seed_key(member.seed) for member in members])
        return fresh(keys_C, jnp.array(scales, jnp.float32))

    return GroupPrograms(
        target=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes),
        new_state=new_state,
        step=group_step,
        eval_step=group_eval_step,
    )
