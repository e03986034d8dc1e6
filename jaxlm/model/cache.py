"""The key/value cache of one attention layer: a ring of slots per row, with the position each slot holds.

A layer that sees everything has one slot per position; a layer with a window has `window` slots and position
p lives in slot p mod window. Rows advance independently, so a batch may be ragged.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class LayerCache(NamedTuple):
    """Keys and values of one layer; `positions_BS` is -1 where a slot is empty.

    Latent attention keeps its narrow vector and the shared rotated key as the key of one head, and values
    without width.
    """

    k_BSKH: Float[Array, "B S K H"]
    v_BSKH: Float[Array, "B S K V"]
    positions_BS: Int[Array, "B S"]


def empty(
    batch: int, slots: int, num_kv_heads: int, head_dim: int, dtype: str, *, value_dim: int | None = None
) -> LayerCache:
    """A cache with no position written; values are as wide as keys unless `value_dim` says otherwise."""
    k, v = (
        jnp.zeros((batch, slots, num_kv_heads, width), dtype)
        for width in (head_dim, head_dim if value_dim is None else value_dim)
    )
    return LayerCache(k, v, jnp.full((batch, slots), -1, jnp.int32))


class MemoryCache(NamedTuple):
    """Keys and values of one layer's cross-attention: of what the encoder made, computed once a text."""

    k_BSKH: Float[Array, "B S K H"]
    v_BSKH: Float[Array, "B S K H"]
    segments_BS: Int[Array, "B S"]  # 0 = padding


def empty_memory(batch: int, length: int, num_kv_heads: int, head_dim: int, dtype: str) -> MemoryCache:
    """A cache of a memory that is all padding."""
    shape = (batch, length, num_kv_heads, head_dim)
    return MemoryCache(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, length), jnp.int32)
    )


def write(
    cache: LayerCache,
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    positions_BT: Int[Array, "B T"],
    valid_BT: Bool[Array, "B T"],
) -> LayerCache:
    """Put new keys and values in their slots; of two positions that share one the later is kept.

    Invalid columns are dropped. Positions of a row must increase along T."""
    slots = cache.k_BSKH.shape[1]
    last_B1 = jnp.max(jnp.where(valid_BT, positions_BT, -1), axis=1, keepdims=True)
    keep_BT = valid_BT & (positions_BT > last_B1 - slots)
    slot_BT = jnp.where(keep_BT, positions_BT % slots, slots)  # index `slots` is out of range, so dropped
    rows_B1 = jnp.arange(k_BTKH.shape[0])[:, None]
    return LayerCache(
        cache.k_BSKH.at[rows_B1, slot_BT].set(k_BTKH.astype(cache.k_BSKH.dtype), mode="drop"),
        cache.v_BSKH.at[rows_B1, slot_BT].set(v_BTKH.astype(cache.v_BSKH.dtype), mode="drop"),
        cache.positions_BS.at[rows_B1, slot_BT].set(positions_BT.astype(jnp.int32), mode="drop"),
    )
