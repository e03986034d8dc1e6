"""Splash attention: JAX's TPU kernel, which computes no tile of scores that a static mask hides.

Queries and keys go through in tiles, so neither scores nor probabilities reach memory; sums are fp32. Kept
for the backward pass are the result and one logsumexp a query, under the name `ATTENDED`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.errors import check
from jaxlm.model.device_kernels import per_device
from jaxlm.model.masks import Mask
from jaxlm.weights import ATTENDED

LANES = 128  # of a TPU's vector registers: tiles are multiples of it
TILE = 512  # of queries and of keys, at most, unless the config says otherwise


def _library() -> tuple[Any, Any]:
    """JAX's kernels and masks: a third of a second to import, for those who use them."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    return splash_attention_kernel, splash_attention_mask


def tile_size(length: int, wanted: int = 0, name: str = "tile") -> int:
    """Rows of a tile: `wanted`, or the largest multiple of 128 up to `TILE` that divides the padded length.

    >>> tile_size(8192), tile_size(1152), tile_size(100), tile_size(8192, 2048)
    (512, 384, 128, 2048)
    """
    lanes = -(-length // LANES)
    if wanted:
        check(
            wanted % LANES == 0 and lanes * LANES % wanted == 0,
            f"model.attention.{name}={wanted} must be a multiple of {LANES} that divides the "
            f"{lanes * LANES} columns of a row; 0 chooses {tile_size(length)}",
        )
        return wanted
    return LANES * max(n for n in range(1, TILE // LANES + 1) if lanes % n == 0)


def executed_keys(length: int, *, causal: bool, window: int = 0, tile_q: int = 0, tile_k: int = 0) -> float:
    """Mean number of keys per query in the tiles that are computed, hidden ones included.

    >>> executed_keys(1024, causal=True), executed_keys(1024, causal=True, window=512)
    (768.0, 768.0)
    """
    rows, columns = tile_size(length, tile_q, "tile_q"), tile_size(length, tile_k, "tile_k")
    padded, computed = -(-length // LANES) * LANES, 0
    for start in range(0, padded, rows):
        first = max(0, start - window + 1) if window else 0
        last = start + rows if causal else min(padded, start + rows + window - 1) if window else padded
        computed += (-(-last // columns) - first // columns) * columns * rows
    return computed / length


def make_kernel(
    mask: Any,
    num_heads: int,
    tile_q: int,
    tile_k: int,
    *,
    parts: int = 1,
    softcap: float = 0.0,
    interpret: bool = False,
) -> Any:
    """The kernel `(q_NTH, k_KSH, v_KSH, segments, sinks) -> out_NTH` of one row; scores are not scaled.

    Args:
        mask: a lazy mask of `splash_attention_mask`, the same for every head.
        num_heads: N, a multiple of K.
        tile_q, tile_k: from `tile_size`.
        parts: into which the queries are split; see `own_part`.
        softcap: scores become c tanh(scores / c); 0 = off.
        interpret: run it by plain JAX operations, on any platform: slow, for tests.
    """
    kernels, masks = _library()
    passes = ("block_q", "block_q_dkv", "block_q_dq")
    tiles = dict.fromkeys(passes, tile_q) | dict.fromkeys((p.replace("_q", "_kv", 1) for p in passes), tile_k)
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * num_heads),
        block_sizes=kernels.BlockSizes(**tiles),
        head_shards=1,
        q_seq_shards=parts,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )


def own_part(kernel: Any, index: Array, parts: int) -> Any:
    """The kernel of one of the parts of the queries, by its number, which may be traced."""

    def take(x: Array | None, axis: int) -> Array | None:
        if x is None:
            return None
        size = x.shape[axis] // parts
        return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)

    def one(info: Any) -> Any:
        if info is None:
            return None
        tables = {name: take(getattr(info, name), 1) for name in ("data_next", "mask_next", "block_mask")}
        return info._replace(**tables, q_sequence=take(info.q_sequence, 0))

    infos = map(one, (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info))
    return type(kernel)(*infos, **kernel.kwargs)


def _lazy_mask(T: int, S: int, causal: bool, window: int) -> Any:
    _, masks = _library()
    if window:
        return masks.LocalMask((T, S), (window - 1, 0 if causal else window - 1), 0)
    return masks.CausalMask((T, S)) if causal else masks.FullMask((T, S))


def splash(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
    bias_BNTS: Array | None,
    softcap: float,
    sinks_N: Float[Array, " N"] | None,
    dtype: str,
    accum: str,
    tile_q: int = 0,
    tile_k: int = 0,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Splash attention on every device's own rows and heads; padding sees padding, which nobody reads.

    The mask is that of columns: with a window, positions must count up by one inside a segment. Rows are
    padded to a multiple of 128 columns, unless the queries are a part of them.

    Raises:
        UserError: tiles that do not fit the rows.
    """
    assert bias_BNTS is None, "check_backend lets no bias through"
    assert mask.allowed_BTS is None, "attend lets no further mask through"
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    tiles = tile_size(T, tile_q, "tile_q"), tile_size(S, tile_k, "tile_k")
    if mask.part is not None:
        check(
            T % LANES == 0 and T * mask.part[1] == S,
            f"{T} columns a device, {S} in all: backend 'splash' takes parts of a row that are multiples of "
            f"{LANES} columns",
        )
    q_segments_BT, k_segments_BS = mask.q_segments_BT, mask.k_segments_BS
    if k_segments_BS is not None and q_segments_BT is None:  # every query sees all that is not padding
        q_segments_BT = jnp.ones(q_BTNH.shape[:2], jnp.int32)
        k_segments_BS = (k_segments_BS != 0).astype(jnp.int32)
    if k_segments_BS is None and (T % LANES or S % LANES):
        q_segments_BT, k_segments_BS = (jnp.ones(x.shape[:2], jnp.int32) for x in (q_BTNH, k_BSKH))

    here, parts = mask.part or (None, 1)

    def on_device(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, sinks_N):
        q, k, v = (_pad(x.astype(dtype), LANES).swapaxes(1, 2) for x in (q_BTNH * scale, k_BSKH, v_BSKH))
        lazy = _lazy_mask(q.shape[2] * parts, k.shape[2], mask.causal, mask.window)
        options = dict(softcap=softcap, interpret=interpret)
        kernel = make_kernel(lazy, q.shape[1], *tiles, parts=parts, **options)
        if parts > 1:
            kernel = own_part(kernel, here, parts)
        segments = None
        if k_segments_BS is not None:
            segments = _library()[0].SegmentIds(_pad(q_segments_BT, LANES), _pad(k_segments_BS, LANES))
        out_BNTH = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(q, k, v, segments, sinks_N)
        return out_BNTH.swapaxes(1, 2)[:, :T]

    return per_device(on_device, q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, sinks_N)


def _pad(x: Array, multiple: int) -> Array:
    """Zeros behind the columns (axis 1) up to a multiple; in segments, 0 is padding."""
    missing = -x.shape[1] % multiple
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x
