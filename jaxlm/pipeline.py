"""Layers split into stages over the mesh axis `pipe`, which microbatches of rows pass one after another.

With S stages and R repeats, stage s holds R blocks of L / (S R) consecutive layers: blocks s, S + s, 2 S + s,
and so on. At every tick each stage runs one block on one microbatch and passes the result on to the next
stage; the last passes it back to the first, for the next round. R = 1 is GPipe (arXiv:1811.06965), R > 1 the
circular or interleaved schedule (arXiv:2104.04473). Autodiff turns the loop around, so that the backward pass
is the same schedule reversed. Embedding and head stay outside, their rows split over the stages like over
replicas. Knows no transformer.

What it costs per chip and pass, x being the activations of one microbatch: an x to the next stage and one to
the previous at each of R M + S - 1 ticks; with R > 1 also M - S kept copies of x (none if M = S), and the
layers themselves once, because they are stored in order (stage s has the layers from s L / S on).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxlm.errors import UserError
from jaxlm.sharding import Layout, current
from jaxlm.stack import Block, run_stack

MakeBlock = Callable[[Any, Any, Array | None], Block]


def bubble_fraction(stages: int, microbatches: int, repeats: int = 1) -> float:
    """Share of a pipelined stack's time in which a stage has no work: (S - 1) / (R M + S - 1).

    >>> bubble_fraction(4, 4), bubble_fraction(4, 16), round(bubble_fraction(4, 4, repeats=4), 3)
    (0.42857142857142855, 0.15789473684210525, 0.158)
    """
    return (stages - 1) / (repeats * microbatches + stages - 1)


def run_layers(
    make_block: MakeBlock,
    params: Any,
    carry: Any,
    xs: Any,
    rows: Any,
    shared: Any = None,
    *,
    scan: bool = True,
    remat: str = "none",
    uses: int = 1,
) -> tuple[Any, Any]:
    """`run_stack`, through the stages of the layout in use if it has any.

    Args:
        make_block: `(rows, shared, part) -> block`, where `block` is as for `run_stack`. `rows` are all rows
            and `part` is None without a pipeline; else the rows of microbatch `part`, a traced integer.
            Blocks read arrays from `rows` and `shared`: those that they close over have the wrong layout.
        params: tree with leaves stacked along a leading axis of length L / uses.
        carry: tree of [B, ...] leaves that flow from layer to layer.
        xs: further per-layer inputs, stacked along an axis of length L.
        rows: tree of [B, ...] leaves that the layers of a row read, and that have no gradient.
        shared: tree of arrays that all layers and rows read.
        scan, remat, uses: as for `run_stack`.

    Returns:
        The last carry, and the per-layer outputs stacked along a leading axis of length L. Through a pipeline
        these are added up over the microbatches: they have to be sums over rows.

    Raises:
        UserError: S x R does not divide L / uses, or M microbatches do not divide B.
    """
    layout = current()
    if layout is None or layout.stages == 1:
        how = dict(scan=scan, remat=remat, uses=uses)
        return run_stack(make_block(rows, shared, None), params, carry, xs, **how)
    length = jax.tree.leaves(params)[0].shape[0]
    _check(layout, length, jax.tree.leaves(carry)[0].shape[0])
    S, M, R = layout.stages, layout.pipeline_parts, layout.pipe_repeats

    def stages(params: Any, xs: Any, carry: Any, rows: Any, shared: Any) -> tuple[Any, Any]:
        stage = jax.lax.axis_index("pipe")
        feed = jax.tree.map(lambda x: _parts(layout, x, M // S), carry)
        # Every stage holds the rows (a few integers a token) of all microbatches.
        rows = jax.tree.map(lambda x: jax.lax.all_gather(_parts(layout, x, M // S), "pipe", tiled=True), rows)

        def tick(state: tuple, t: Array) -> tuple[tuple, Any]:
            feed, arrived, waiting = state
            age = t - stage  # of this stage's work: the first microbatch arrives at age 0
            rnd, part = jnp.clip(age // M, 0, R - 1), age % M
            incoming = _at(feed, t % (M // S))
            first = incoming
            if R > 1:
                again = _at(waiting, t % (M - S)) if M > S else arrived
                waiting = _put(waiting, t % (M - S), arrived) if M > S else waiting
                first = _where(t < M, incoming, again)
            x = _where(stage == 0, first, arrived)
            block = make_block(_at(rows, part), shared, part)
            x, ys = run_stack(block, _at(params, rnd), x, _at(xs, rnd), scan=scan, remat=remat, uses=uses)
            # Slot t mod M/S moves one stage down; results enter it at the last stage, and are at home when
            # the last of them is done.
            down = _send(incoming, [(s, s - 1) for s in range(1, S)])
            feed = _put(feed, t % (M // S), _where(stage == S - 1, x, down))
            return (feed, _send(x, [(s, (s + 1) % S) for s in range(S)]), waiting), ys

        arrived = jax.tree.map(lambda x: jnp.zeros_like(x[0]), feed)
        waiting = jax.tree.map(lambda x: jnp.zeros((M - S, *x.shape[1:]), x.dtype), feed) if R > 1 else ()
        ticks = jnp.arange(R * M + S - 1)
        (feed, _, _), ys = jax.lax.scan(tick, (feed, arrived, waiting), ticks)
        round_of = (ticks - stage) // M  # -1 and R: no work, only the time of others
        ys = jax.tree.map(lambda y: jnp.stack([_sum_where(round_of == r, y) for r in range(R)]), ys)
        return jax.tree.map(lambda x: _joined(jnp.roll(x, 1 - S, axis=0)), feed), ys

    by_round = lambda tree: jax.tree.map(lambda x: x.reshape(R, x.shape[0] // R, *x.shape[1:]), tree)  # noqa: E731
    run = jax.shard_map(
        stages,
        mesh=None,
        in_specs=(P(None, "pipe"), P(None, "pipe"), P("pipe"), P("pipe"), P()),
        out_specs=(P("pipe"), P(None, "pipe")),
        axis_names={"pipe"},
        check_vma=False,
    )
    carry, ys = run(by_round(params), by_round(xs), carry, rows, shared)
    return carry, jax.tree.map(lambda y: y.reshape(length * uses, *y.shape[2:]), ys)


def _check(layout: Layout, length: int, batch: int) -> None:
    S, M, R = layout.stages, layout.pipeline_parts, layout.pipe_repeats
    if length % (S * R):
        fits = [r for r in range(1, length + 1) if length % (S * r) == 0]
        able = [s for s in range(2, length + 1) if length % s == 0]
        advice = f"mesh.pipe_repeats={' or '.join(map(str, fits))}" if fits else f"mesh.pipe in {able}"
        raise UserError(
            f"{length} scanned layers (periods of the layer pattern) cannot be split into mesh.pipe={S} "
            f"stages x mesh.pipe_repeats={R}; possible: {advice}"
        )
    if batch % layout.row_multiple:
        devices = layout.row_multiple // M
        parts = [m for m in range(S, batch + 1, S) if batch % (m * devices) == 0]
        advice = f"mesh.pipe_microbatches={' or '.join(map(str, parts))}, or " if parts else ""
        raise UserError(
            f"{batch} rows cannot be split into {M} microbatches in the pipeline x {devices} mesh devices; "
            f"possible: {advice}a multiple of {layout.row_multiple} rows"
        )


def _parts(layout: Layout, x: Array, parts: int) -> Array:
    """`[b, ...]` as `[parts, b / parts, ...]`: every parts-th row, so that no row changes its device."""
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    rows, free = layout.fitting(x.shape[:2], (None, "batch")), [P.UNCONSTRAINED] * (x.ndim - 2)
    return jax.lax.with_sharding_constraint(x, P(*rows, *free))


def _joined(x: Array) -> Array:
    """The inverse of `_parts`."""
    return x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _at(tree: Any, index: Array) -> Any:
    def one(x: Array) -> Array:
        return x[0] if x.shape[0] == 1 else jax.lax.dynamic_index_in_dim(x, index, keepdims=False)

    return jax.tree.map(one, tree)


def _put(tree: Any, index: Array, values: Any) -> Any:
    return jax.tree.map(
        lambda x, value: jax.lax.dynamic_update_index_in_dim(x, value, index, 0), tree, values
    )


def _where(condition: Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _send(tree: Any, pairs: list[tuple[int, int]]) -> Any:
    return jax.tree.map(lambda x: jax.lax.ppermute(x, "pipe", pairs), tree)


def _sum_where(chosen: Array, y: Array) -> Array:
    """Sum of the chosen ticks' values; what the others computed may be anything."""
    return jnp.where(chosen.reshape(-1, *[1] * (y.ndim - 1)), y, 0).sum(0)
