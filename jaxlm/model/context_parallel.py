"""Attention over columns that are split over devices (context parallelism), in three ways.

    gather   every device gathers all keys and values and attends with its own queries; any backend
    ring     keys and values travel from device to device while partial results are summed (arXiv:2310.01889)
    ulysses  heads are traded for columns, so that a device has some heads of whole rows (arXiv:2309.14509)

Under a causal mask the last queries see most keys, so that consecutive columns would leave the first devices
idle. `ring` therefore cuts the columns into two chunks per device and gives device i of P the chunks i and
2 P - 1 - i (`zigzag`): every hop is then the same work everywhere, and half of all scores is never computed.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxlm.errors import UserError, check
from jaxlm.sharding import Layout, current, manual_axes, spec_axes
from jaxlm.weights import product

QUERIES = 512  # of a hop whose scores exist at a time
_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


@dataclasses.dataclass(frozen=True)
class ContextMode:
    """A way to attend over split columns; what it honours beyond segments, windows, softcap and sinks."""

    bias: bool  # a bias on the scores (ALiBi, T5)
    allowed: bool  # a further mask written out
    zigzag: bool  # wants causal rows in the order of `zigzag`


CONTEXTS: dict[str, ContextMode] = {
    "gather": ContextMode(bias=True, allowed=True, zigzag=False),
    "ring": ContextMode(bias=False, allowed=False, zigzag=True),
    "ulysses": ContextMode(bias=True, allowed=True, zigzag=False),
}


def check_context(name: str, *, bias: bool = False, allowed: bool = False) -> None:
    """Raise `UserError` if the mode cannot honour what is asked; the message names those that can."""
    wanted = {"bias": bias, "allowed": allowed}
    lacking = [what for what, on in wanted.items() if on and not getattr(CONTEXTS[name], what)]
    if lacking:
        able = [n for n, mode in CONTEXTS.items() if all(getattr(mode, what) for what in lacking)]
        choices = " or ".join(map(repr, able))
        raise UserError(f"model.attention.context={name!r} has no {' and no '.join(lacking)}; use {choices}")


def check_columns(length: int, layout: Layout | None, *, zigzag: bool) -> None:
    """Raise `UserError` if the mesh does not divide the columns of a batch."""
    parts = 1 if layout is None else layout.size(layout.mesh_axes("length", compute=True))
    unit = 2 * parts if zigzag and parts > 1 else parts
    check(
        length % unit == 0,
        f"{length} columns do not divide into {unit} equal chunks, as mesh.sequence={parts} asks"
        f"{' with attention.context=ring (two a device)' if unit > parts else ''}; "
        f"the nearest length that does: {max(unit, round(length / unit) * unit)}",
    )


def attend_split(
    attend: Callable[..., Array],
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    mask: Any,
    *,
    context: str,
    zigzag: bool,
    bias_BNTS: Array | None,
    sinks_N: Array | None,
    softcap: float,
    **options: Any,
) -> Float[Array, "B T N H"]:
    """Self-attention whose columns the mesh in use splits; the values are those of `attend`.

    Args:
        attend: `(q, k, v, mask, *, bias_BNTS, sinks_N, softcap, **options)` on one device.
        q_BTNH, k_BTKH, v_BTKH: projections.
        mask: a `jaxlm.model.masks.Mask` of queries and keys that are the same columns.
        context: name in `CONTEXTS`.
        zigzag: the columns lie in that order and the mask is causal.
        bias_BNTS, sinks_N, softcap, options: as for `jaxlm.model.backends.attend`.

    Raises:
        UserError: heads that do not divide as the mode needs, or an option that it does not offer.
    """
    check_context(context, bias=bias_BNTS is not None, allowed=mask.allowed_BTS is not None)
    layout = current()
    K, parts = k_BTKH.shape[2], layout.size(layout.mesh_axes("length", compute=True))
    rows, columns = layout.fitting(q_BTNH.shape[:2], ("batch", "length"))
    heads = layout.mesh_axes("heads", compute=True)
    if heads != layout.mesh_axes("kv_heads", compute=True):
        raise UserError(
            f"mesh.sequence={parts} needs query and key heads split alike: give mesh.rules the same mesh "
            "axes for 'heads' and 'kv_heads'"
        )
    share = K // layout.size(heads)
    if context == "ulysses" and share % parts:
        raise UserError(
            f"model.attention.context='ulysses' trades heads for columns, and mesh.sequence={parts} does not "
            f"divide the {share} key heads of a device; use 'ring' or 'gather'"
        )
    options |= dict(softcap=softcap)
    over = (*heads, *spec_axes(columns)) if context == "ulysses" else heads
    over = over or None
    # Of what has columns twice, one side is gathered: that of the keys, and with all columns both.
    side = None if context == "ulysses" else columns
    specs = {
        "q": P(rows, columns, heads or None),
        "k": P(rows, columns, heads or None),
        "v": P(rows, columns, heads or None),
        "positions": P(rows, columns),
        "segments": P(rows, columns),
        "allowed": P(rows, side),
        "bias": P(None if bias_BNTS is None or bias_BNTS.shape[0] == 1 else rows, over, side),
        "sinks": P(over),
        "here": P(columns),
    }
    arrays = {
        "q": q_BTNH,
        "k": k_BTKH,
        "v": v_BTKH,
        "positions": mask.q_positions_BT,
        "segments": mask.q_segments_BT,
        "allowed": mask.allowed_BTS,
        "bias": bias_BNTS,
        "sinks": sinks_N,
        # Not `axis_index`: work that depends on nothing else would be moved in front of a pipeline's loop,
        # into a `shard_map` without operands, which XLA refuses inside another one.
        "here": jnp.arange(parts),
    }
    arrays = {name: x for name, x in arrays.items() if x is not None}
    axis = spec_axes(columns)

    def own(a: dict[str, Array]) -> Array:
        q, k, v = a["q"], a["k"], a["v"]
        positions, segments = a["positions"], a.get("segments")
        extra = dict(bias_BNTS=a.get("bias"), sinks_N=a.get("sinks"))
        if context == "ring":
            how = Ring(axis, parts, zigzag, mask.causal, mask.window, **options)
            return ring(how, type(mask), q, k, v, (positions, segments), a.get("sinks"), a["here"][0])

        def whole(x: Array | None) -> Array | None:
            return None if x is None else jax.lax.all_gather(x, axis, axis=1, tiled=True)

        seen = dataclasses.replace(
            mask,
            q_positions_BT=positions,
            k_positions_BS=whole(positions),
            q_segments_BT=segments,
            k_segments_BS=whole(segments),
            allowed_BTS=a.get("allowed"),
        )
        if context == "gather":
            seen = dataclasses.replace(seen, part=(a["here"][0], parts))
            return attend(q, whole(k), whole(v), seen, **extra, **options)
        trade = partial(jax.lax.all_to_all, axis_name=axis, split_axis=2, concat_axis=1, tiled=True)
        seen = dataclasses.replace(seen, q_positions_BT=seen.k_positions_BS, q_segments_BT=seen.k_segments_BS)
        out = attend(trade(q), trade(k), trade(v), seen, **extra, **options)
        return jax.lax.all_to_all(out, axis, 1, 2, tiled=True)

    by_hand = set(layout.mesh.axis_names) - manual_axes()
    return jax.shard_map(
        own,
        in_specs=({name: specs[name] for name in arrays},),
        out_specs=specs["q"],
        axis_names=by_hand,
        check_vma=False,
    )(arrays)


# --- Order of the columns ---


def zigzag(x_BT: Array, *, back: bool = False) -> Array:
    """Columns of [B, T, ...] in the order that gives every device an early and a late chunk, or back.

    Cut into 2 P chunks for P devices, device i gets the chunks i and 2 P - 1 - i. Each device sends two
    halves and gets two. Without a split of columns, `x_BT` as it is.
    """
    layout = current()
    axis = () if layout is None else layout.mesh_axes("length", compute=True)
    if not axis:
        return x_BT
    parts = layout.size(axis)
    home = [c if c < parts else 2 * parts - 1 - c for c in range(2 * parts)]
    evens, odds = ([(i, home[2 * i + odd]) for i in range(parts)] for odd in (0, 1))

    def own(x: Array) -> Array:
        first, second = jnp.split(x, 2, axis=1)
        even_first = (
            jax.lax.axis_index(axis) % 2 == 0
        )  # device i keeps chunk i first, and one of the two is even
        if back:
            even, odd = jnp.where(even_first, first, second), jnp.where(even_first, second, first)
            even = jax.lax.ppermute(even, axis, [(b, a) for a, b in evens])
            odd = jax.lax.ppermute(odd, axis, [(b, a) for a, b in odds])
            return jnp.concatenate([even, odd], axis=1)
        even, odd = jax.lax.ppermute(first, axis, evens), jax.lax.ppermute(second, axis, odds)
        halves = jnp.where(even_first, even, odd), jnp.where(even_first, odd, even)
        return jnp.concatenate(halves, axis=1)

    spec = layout.fitting(x_BT.shape[:2], ("batch", "length"))
    by_hand = set(layout.mesh.axis_names) - manual_axes()
    return jax.shard_map(own, in_specs=spec, out_specs=spec, axis_names=by_hand, check_vma=False)(x_BT)


# --- Ring ---


@dataclasses.dataclass(frozen=True)
class Ring:
    """What a ring knows before it sees an array."""

    axis: tuple[str, ...]
    size: int
    zigzag: bool
    causal: bool
    window: int
    scale: float
    softcap: float
    dtype: str
    accum: str


Where = tuple[Array, Array | None]  # positions [B, T] and segments [B, T] of columns


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def ring(
    how: Ring,
    mask: Callable[..., Any],
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    where: Where,
    sinks_N: Array | None,
    here: Array,
) -> Array:
    """Attention of this device's queries to the keys of all devices of a ring; softmax summed as they pass.

    The backward pass sends keys and values around once more, with their gradients beside them.

    Args:
        how: mesh axis and options.
        mask: the class of masks.
        q_BTNH, k_BSKH, v_BSKH: this device's columns.
        where: their positions and segments.
        sinks_N: an extra logit a head.
        here: number of this device in the ring.
    """
    return _ring_forward(how, mask, q_BTNH, k_BSKH, v_BSKH, where, sinks_N, here)[0]


def _pass_on(how: Ring, tree: Any) -> Any:
    """What the device before this one holds."""
    onward = [(i, (i + 1) % how.size) for i in range(how.size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, how.axis, onward), tree)


def _scores(how: Ring, mask: Callable[..., Any], q: Array, k: Array, at_q: Where, at_k: Where) -> Array:
    """`[B, K, G, T, S]`, hidden ones very negative."""
    scores = product("BKGTH,BKSH->BKGTS", q, k, how.dtype, how.accum, "float32")
    if how.softcap:
        scores = how.softcap * jnp.tanh(scores / how.softcap)
    seen = mask(at_q[0], at_k[0], at_q[1], at_k[1], how.causal, how.window).visible_BTS()
    return jnp.where(seen[:, None, None], scores, _HIDDEN)


def _blocks(tree: Any, axis: int) -> Any:
    """Queries along `axis` in blocks of `QUERIES` along a new leading axis, or in one if not divisible."""

    def cut(x: Array, axis: int) -> Array:
        length = x.shape[axis]
        n = length // QUERIES if length % QUERIES == 0 else 1
        x = x.reshape(*x.shape[:axis], n, length // n, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    return jax.tree.map(lambda x: cut(x, axis), tree)


def _unblock(x: Array, axis: int) -> Array:
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _hops(
    how: Ring, visit: Callable[..., Any], carry: Any, travelling: Any, T: int, here: Array
) -> tuple[Any, Any]:
    """Fold `visit(carry, travelling, rows, keys)` over all hops, own columns first; what travels comes home.

    `rows` and `keys` are the slices of queries and of keys that can see each other.
    """
    everything, half = slice(0, T), T // 2
    carry, travelling = visit(carry, travelling, everything, everything)

    def hop(state: Any, j: Array) -> tuple[Any, None]:
        carry, travelling = state
        travelling = _pass_on(how, travelling)
        if not how.zigzag:
            return visit(carry, travelling, everything, everything), None
        # From an earlier device, its early chunk is seen by both of mine and its late one by neither; from a
        # later device, both are seen by my late chunk alone.
        early = lambda c, t: visit(c, t, everything, slice(0, half))  # noqa: E731
        late = lambda c, t: visit(c, t, slice(half, T), everything)  # noqa: E731
        return jax.lax.cond(here >= j, early, late, carry, travelling), None

    (carry, travelling), _ = jax.lax.scan(hop, (carry, travelling), jnp.arange(1, how.size))
    return carry, _pass_on(how, travelling)


def _heads_first(q_BTNH: Array, K: int) -> Array:
    B, T, N, H = q_BTNH.shape
    return q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _at(where: Where, part: slice) -> Where:
    return where[0][:, part], None if where[1] is None else where[1][:, part]


def _ring_forward(how: Ring, mask: Callable[..., Any], q_BTNH, k_BSKH, v_BSKH, where, sinks_N, here):
    (B, T, N, _), K = q_BTNH.shape, k_BSKH.shape[2]
    q = _heads_first(q_BTNH * how.scale, K)
    k, v = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)

    def visit(carry: tuple, travelling: tuple, rows: slice, keys: slice) -> tuple:
        k, v, at = travelling
        k, v, at = k[:, :, keys], v[:, :, keys], _at(at, keys)

        def block(xs: tuple) -> tuple:
            q, at_q, (out, top, total) = xs
            scores = _scores(how, mask, q, k, at_q, at)
            new = jnp.maximum(top, scores.max(-1))
            weights, old = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
            out = out * old[..., None] + product(
                "BKGTS,BKSH->BKGTH", weights, v, how.dtype, how.accum, "float32"
            )
            return out, new, total * old + weights.sum(-1)

        part = jax.tree.map(lambda x: x[:, :, :, rows], carry)
        new = jax.lax.map(
            block, (_blocks(q[:, :, :, rows], 3), _blocks(_at(where, rows), 1), _blocks(part, 3))
        )
        new = jax.tree.map(lambda x: _unblock(x, 3), new)
        return jax.tree.map(lambda c, n: c.at[:, :, :, rows].set(n), carry, new), travelling

    top = jnp.full((B, K, N // K, T), _HIDDEN, jnp.float32)
    total = jnp.zeros_like(top)
    if sinks_N is not None:  # a key without a value
        top, total = jnp.broadcast_to(_per_head(sinks_N, K), top.shape), jnp.ones_like(top)
    carry = jnp.zeros((*top.shape, v.shape[-1]), jnp.float32), top, total
    (out, top, total), _ = _hops(how, visit, carry, (k, v, where), T, here)
    out = (out / total[..., None]).astype(how.dtype)
    out_BTNH = out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)
    saved = (q_BTNH, k_BSKH, v_BSKH, where, sinks_N, here, out_BTNH, top + jnp.log(total))
    return out_BTNH, saved


def _per_head(sinks_N: Array, K: int) -> Array:
    return sinks_N.astype(jnp.float32).reshape(1, K, -1, 1)


def _ring_backward(how: Ring, mask: Callable[..., Any], saved: tuple, g_BTNH: Array) -> tuple:
    q_BTNH, k_BSKH, v_BSKH, where, sinks_N, here, out_BTNH, lse = saved
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    q, g, out = (_heads_first(x, K) for x in (q_BTNH * how.scale, g_BTNH, out_BTNH))
    k, v = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1)
    dot = partial(product, dtype=how.dtype, accum=how.accum, result="float32")

    def visit(dq: Array, travelling: tuple, rows: slice, keys: slice) -> tuple:
        (all_k, all_v, all_at), (dk, dv) = travelling
        k, v, at = all_k[:, :, keys], all_v[:, :, keys], _at(all_at, keys)

        def block(sums: tuple, xs: tuple) -> tuple:
            q, g, at_q, lse, delta = xs
            scores = _scores(how, mask, q, k, at_q, at)
            weights = jnp.exp(scores - lse[..., None])
            d_scores = weights * (dot("BKGTH,BKSH->BKGTS", g, v) - delta[..., None])
            if how.softcap:
                capped = jnp.clip(scores / how.softcap, -1, 1)  # hidden scores have weight 0
                d_scores *= 1 - jnp.square(capped)
            dk, dv = sums
            dk = dk + dot("BKGTS,BKGTH->BKSH", d_scores, q)
            dv = dv + dot("BKGTS,BKGTH->BKSH", weights, g)
            return (dk, dv), dot("BKGTS,BKSH->BKGTH", d_scores, k)

        xs = tuple(_blocks(x[:, :, :, rows], 3) for x in (q, g))
        xs += (_blocks(_at(where, rows), 1), *(_blocks(x[:, :, :, rows], 3) for x in (lse, delta)))
        (dk_part, dv_part), dq_part = jax.lax.scan(block, (dk[:, :, keys], dv[:, :, keys]), xs)
        dq = dq.at[:, :, :, rows].add(_unblock(dq_part, 3))
        dk, dv = dk.at[:, :, keys].set(dk_part), dv.at[:, :, keys].set(dv_part)
        return dq, ((all_k, all_v, all_at), (dk, dv))

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dq, (_, (dk, dv)) = _hops(how, visit, jnp.zeros(q.shape, jnp.float32), ((k, v, where), zeros), T, here)
    dq_BTNH = (dq * how.scale).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)
    dk, dv = (d.transpose(0, 2, 1, 3).astype(like.dtype) for d, like in ((dk, k_BSKH), (dv, v_BSKH)))
    d_sinks = None
    if sinks_N is not None:
        share = jnp.exp(_per_head(sinks_N, K) - lse)
        d_sinks = -jnp.sum(share * delta, axis=(0, 3)).reshape(N).astype(sinks_N.dtype)
    return dq_BTNH, dk, dv, None, d_sinks, None


ring.defvjp(_ring_forward, _ring_backward)
