"""Tokens to experts and back, on one device or between the devices that share the experts out.

Every device has its own tokens and, along the mesh axes of `experts`, its own experts. It sorts the choices
of its tokens by expert and sends each to the expert's owner: what travels per device and direction is
tokens x top_k x D, whatever the number of experts. If the owners' group has no rows of its own (a decoded
row or two), its devices all have the same tokens: each computes what its experts give, and they add up.

Two ways for choices to travel. `capacity`: an all-to-all of fixed buffers, C slots for each expert and row.
`dropless`: all of them, in one of two exchanges, because how many go where is known only at run time:

    ragged  `jax.lax.ragged_all_to_all`: only the rows that there are; TPU and GPU. A device can receive
            `buffer` rows: by default all that its group could send, n N min(top_k, E / n) for n devices of
            N tokens
    padded  `jax.lax.all_to_all` of a part of `buffer` / n rows for each pair of devices: anywhere, but the
            padding travels too

A `buffer_factor` bounds the buffer at that multiple of a device's fair share (N top_k rows). Choices beyond
it are dropped, counted, and are others on another mesh; by default nothing is ever dropped. The config's
`rounds` lets a device's tokens through in that many parts, one after another: the buffers are those of one.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from jaxlm.model.grouped import take_rows

Mlp = Callable[[Array, Array], Array]  # (rows sorted by local expert, group sizes) -> rows


@dataclasses.dataclass(frozen=True)
class Group:
    """The devices that share out the experts, as one of them sees it."""

    axes: tuple[str, ...] = ()  # mesh axes; none: one device has all experts
    size: int = 1  # n
    own_tokens: bool = True  # False: its devices all have the same tokens

    def index(self) -> Array | int:
        """Which of them this device is."""
        return jax.lax.axis_index(self.axes) if self.axes else 0


# --- Capacity ---


def by_capacity(
    x_BTD: Float[Array, "B T D"],
    experts_BTK: Int32[Array, "B T K"],
    kept_BTK: Bool[Array, "B T K"],
    weights_BTK: Float32[Array, "B T K"],
    mlp: Callable[[Array], Array],
    *,
    group: Group,
    num_experts: int,
    slots: int,
) -> Float32[Array, "B T D"]:
    """The kept choices through their experts, in `slots` places for each expert and row.

    Args:
        x_BTD: this device's rows and columns.
        experts_BTK: experts chosen.
        kept_BTK: whether a choice has a place; at most `slots` of an expert and row may.
        weights_BTK: weights of the choices.
        mlp: [E / n, M, D] -> [E / n, M, D], the local experts on their rows.
        group: who has the experts.
        num_experts: E.
        slots: C, or fewer where the columns of a row are split over devices.
    """
    (B, T, D), K, n = x_BTD.shape, experts_BTK.shape[2], group.size
    local = num_experts // n
    if not group.own_tokens:
        experts_BTK = experts_BTK - group.index() * local
        kept_BTK = kept_BTK & (experts_BTK >= 0) & (experts_BTK < local)
        num_experts = local
    E, C = num_experts, slots
    with jax.named_scope("dispatch"):
        chosen_BTKE = jax.nn.one_hot(jnp.where(kept_BTK, experts_BTK, E), E, dtype=jnp.int32)
        before_BTE = jnp.cumsum(chosen_BTKE.sum(2), axis=1) - chosen_BTKE.sum(2)
        place_BTK = jnp.take_along_axis(before_BTE, jnp.clip(experts_BTK, 0, E - 1), axis=-1)
        # Slot e C + place of each choice, and choice t K + k of each slot; E C and T K stand for none.
        slot_BTK = jnp.where(kept_BTK, experts_BTK * C + place_BTK, E * C)
        none_BS = jnp.full((B, E * C), T * K, jnp.int32)
        fill = jax.vmap(lambda choice, slot: choice.at[slot].set(jnp.arange(T * K), mode="drop"))
        choice_BS = fill(none_BS, slot_BTK.reshape(B, T * K))
        x_BSD = take_rows(x_BTD, choice_BS // K, slot_BTK)
        x_EMD = x_BSD.reshape(B, E, C, D).swapaxes(0, 1).reshape(E, B * C, D)
        if group.own_tokens and n > 1:  # [n, E / n, M, D] by owner, then by sender
            x_EMD = _swap(x_EMD.reshape(n, local, B * C, D), group).swapaxes(0, 1).reshape(local, -1, D)
    y_EMD = mlp(x_EMD)
    with jax.named_scope("combine"):
        if group.own_tokens and n > 1:
            y_EMD = _swap(y_EMD.reshape(local, n, B * C, D).swapaxes(0, 1), group).reshape(E, B * C, D)
        y_BSD = y_EMD.reshape(E, B, C, D).swapaxes(0, 1).reshape(B, E * C, D)
        y_BXD = take_rows(y_BSD, slot_BTK.reshape(B, T * K), choice_BS[..., None])
        return combine(y_BXD.reshape(B, T, K, D), weights_BTK)


def combine(y_BTKD: Array, weights_BTK: Array) -> Float32[Array, "B T D"]:
    """Weighted sum over choices: a product and a sum, as a TPU would round fp32 einsum operands to bf16."""
    return (y_BTKD.astype(jnp.float32) * weights_BTK[..., None]).sum(2)


def _swap(x: Array, group: Group) -> Array:
    """Entry i of the leading axis goes to device i, and what device i sent arrives there."""
    return jax.lax.all_to_all(x, group.axes, 0, 0, tiled=True)


# --- Dropless ---


def dropless(
    x_BTD: Float[Array, "B T D"],
    experts_BTK: Int32[Array, "B T K"],
    mask_BT: Bool[Array, "B T"],
    weights_BTK: Float32[Array, "B T K"],
    mlp: Mlp,
    *,
    group: Group,
    num_experts: int,
    exchange: str = "padded",
    buffer_factor: float = 0.0,
) -> tuple[Float32[Array, "B T D"], Int32[Array, ""]]:
    """All choices through their experts.

    Args:
        x_BTD: this device's rows and columns.
        experts_BTK: experts chosen.
        mask_BT: False = padding, which goes nowhere.
        weights_BTK: weights of the choices.
        mlp: rows sorted by local expert and how many each has -> rows; those after the last group are none.
        group: who has the experts.
        num_experts: E.
        exchange: `ragged` or `padded`.
        buffer_factor: see above; 0 = room for everything.

    Returns:
        The weighted sums, and how many choices found no room.
    """
    (B, T, D), K, n = x_BTD.shape, experts_BTK.shape[2], group.size
    N, local = B * T, num_experts // n
    x_1ND, expert_M = x_BTD.reshape(1, N, D), experts_BTK.reshape(N * K)
    real_M = jnp.repeat(mask_BT.reshape(N), K)
    if not group.own_tokens:
        expert_M = expert_M - group.index() * local
        real_M = real_M & (expert_M >= 0) & (expert_M < local)
        num_experts = local
    expert_M = jnp.where(real_M, expert_M, num_experts)
    if n == 1 or not group.own_tokens:
        with jax.named_scope("dispatch"):
            order_M, place_M, sizes_E = sort_by(expert_M, num_experts)
            x_MD = take_rows(x_1ND, order_M[None] // K, place_M.reshape(1, N, K))[0]
        y_MD = mlp(x_MD, sizes_E)
        with jax.named_scope("combine"):
            y_XD = take_rows(y_MD[None], place_M[None], order_M[None, :, None])
            return combine(y_XD.reshape(B, T, K, D), weights_BTK), jnp.zeros((), jnp.int32)

    fair = math.ceil(buffer_factor * N * K / n) if buffer_factor else N * K
    room = min(N * min(K, local), fair)  # rows for each pair of devices
    with jax.named_scope("dispatch"):
        order_M, place_M, sizes_E = sort_by(expert_M, num_experts)
        plan = _plan(sizes_E, group, room, ragged=exchange == "ragged")
        # Rank of a choice among those to its destination; without room it goes nowhere.
        owner_M = jnp.clip(expert_M // local, 0, n - 1)
        rank_M = place_M - plan.first_S[owner_M]
        sent_M = (expert_M < num_experts) & (rank_M < plan.sent_S[owner_M])
        if exchange == "ragged":
            x_MD = take_rows(x_1ND, order_M[None] // K, place_M.reshape(1, N, K))[0]
            x_RD = _ragged(x_MD, plan, group.axes, n * room)
        else:
            slot_M = jnp.where(sent_M, owner_M * room + rank_M, n * room)
            choice_R = jnp.full(n * room, N * K, jnp.int32).at[slot_M].set(jnp.arange(N * K), mode="drop")
            x_RD = take_rows(x_1ND, choice_R[None] // K, slot_M.reshape(1, N, K))
            x_RD = _swap(x_RD.reshape(n, room, D), group).reshape(n * room, D)
        order_R, place_R, sizes_L = sort_by(plan.expert_R, local)
        x_RD = take_rows(x_RD[None], order_R[None], place_R[None, :, None])[0]
    y_RD = mlp(x_RD, sizes_L)
    with jax.named_scope("combine"):
        y_RD = take_rows(y_RD[None], place_R[None], order_R[None, :, None])[0]
        if exchange == "ragged":
            y_MD = _ragged_back(y_RD, plan, group.axes, N * K)
            place_M = jnp.where(sent_M, place_M, N * K)
            y_XD = take_rows(y_MD[None], place_M[None], order_M[None, :, None])
        else:
            y_RD = _swap(y_RD.reshape(n, room, D), group).reshape(1, n * room, D)
            y_XD = take_rows(y_RD, slot_M[None], choice_R[None, :, None])
        dropped = jnp.sum((expert_M < num_experts) & ~sent_M, dtype=jnp.int32)
        return combine(y_XD.reshape(B, T, K, D), weights_BTK), dropped


def sort_by(
    group_M: Int[Array, " M"], groups: int
) -> tuple[Int32[Array, " M"], Int32[Array, " M"], Int32[Array, " E"]]:
    """(row at each place, place of each row, sizes) of rows sorted by group; group `groups` = none.

    Rows of no group have place M, and places after the last group hold row M.
    """
    M = group_M.shape[0]
    order_M = jnp.argsort(group_M)
    ends_E = jnp.searchsorted(group_M[order_M], jnp.arange(groups), side="right").astype(jnp.int32)
    place_M = jnp.zeros(M, jnp.int32).at[order_M].set(jnp.arange(M, dtype=jnp.int32), unique_indices=True)
    place_M = jnp.where(group_M < groups, place_M, M)
    order_M = jnp.where(jnp.arange(M) < ends_E[-1], order_M, M).astype(jnp.int32)
    return order_M, place_M, jnp.diff(ends_E, prepend=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """How many rows go where; S counts the devices of the group."""

    first_S: Int32[Array, " S"]  # of my sorted rows, the first for device s
    sent_S: Int32[Array, " S"]  # rows that I send to s
    there_S: Int32[Array, " S"]  # where my rows begin in what s receives
    begin_S: Int32[Array, " S"]  # where the rows of s begin in what I receive
    received_S: Int32[Array, " S"]  # rows that s sends me
    home_S: Int32[Array, " S"]  # where my rows begin in the sorted rows of s
    expert_R: Int32[Array, " R"]  # local expert of each row that I receive; E / n = none


def _plan(sizes_E: Array, group: Group, room: int, *, ragged: bool) -> Plan:
    n, me = group.size, group.index()
    local = sizes_E.shape[0] // n
    sizes_SSL = jax.lax.all_gather(sizes_E, group.axes).reshape(n, n, local)  # by sender and owner
    first_SS = jnp.cumsum(sizes_SSL.sum(2), axis=1) - sizes_SSL.sum(2)
    # Where the rows end for each expert, from the sender's first for this owner on.
    ends_SSL = jnp.cumsum(sizes_SSL, axis=2)
    if ragged:  # senders in order, until the owner's buffer is full
        before_SS = jnp.cumsum(ends_SSL[..., -1], axis=0) - ends_SSL[..., -1]
        ends_SSL = jnp.clip(ends_SSL, 0, jnp.maximum(n * room - before_SS, 0)[..., None])
    else:
        ends_SSL = jnp.minimum(ends_SSL, room)
    sent_SS = ends_SSL[..., -1]
    there_SS = jnp.cumsum(sent_SS, axis=0) - sent_SS if ragged else jnp.arange(n)[:, None] * room
    there_SS = jnp.broadcast_to(there_SS, (n, n))
    # The row's sender, then its expert among those of this sender.
    row_R = jnp.arange(n * room)
    sender_R = jnp.searchsorted(there_SS[:, me], row_R, side="right") - 1
    rank_R = row_R - there_SS[sender_R, me]
    expert_R = (rank_R[:, None] >= ends_SSL[sender_R, me]).sum(1, dtype=jnp.int32)
    return Plan(
        first_S=first_SS[me],
        sent_S=sent_SS[me],
        there_S=there_SS[me],
        begin_S=there_SS[:, me],
        received_S=sent_SS[:, me],
        home_S=first_SS[:, me],
        expert_R=expert_R,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _ragged(x_MD: Array, plan: Plan, axes: tuple[str, ...], rows: int) -> Array:
    """My sorted rows to their owners; what arrives, by sender, in a buffer of that many rows."""
    out_RD = jnp.zeros((rows, x_MD.shape[1]), x_MD.dtype)
    where = (plan.first_S, plan.sent_S, plan.there_S, plan.received_S)
    return jax.lax.ragged_all_to_all(x_MD, out_RD, *where, axis_name=axes)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _ragged_back(y_RD: Array, plan: Plan, axes: tuple[str, ...], rows: int) -> Array:
    """The way back of `_ragged`, which is also its transpose."""
    out_MD = jnp.zeros((rows, y_RD.shape[1]), y_RD.dtype)
    where = (plan.begin_S, plan.received_S, plan.home_S, plan.sent_S)
    return jax.lax.ragged_all_to_all(y_RD, out_MD, *where, axis_name=axes)


def _no_gradient(plan: Plan) -> Plan:
    return jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), plan)


_ragged.defvjp(
    lambda x, plan, axes, rows: (_ragged(x, plan, axes, rows), (plan, x.shape[0])),
    lambda axes, rows, saved, g: (_ragged_back(g, saved[0], axes, saved[1]), _no_gradient(saved[0])),
)
_ragged_back.defvjp(
    lambda y, plan, axes, rows: (_ragged_back(y, plan, axes, rows), (plan, y.shape[0])),
    lambda axes, rows, saved, g: (_ragged(g, saved[0], axes, saved[1]), _no_gradient(saved[0])),
)
