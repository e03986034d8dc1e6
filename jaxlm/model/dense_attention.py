"""Attention by plain products, on every platform: written out, in blocks of queries, and XLA's own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.errors import check
from jaxlm.model.masks import Mask
from jaxlm.weights import product

_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # not -inf: a row that sees nothing must not become NaN


def reference(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
    bias_BNTS: Float[Array, "#B N T S"] | None = None,
    softcap: float = 0.0,
    sinks_N: Float[Array, " N"] | None = None,
    dtype: str = "float32",
    accum: str = "float32",
) -> Float[Array, "B T N H"]:
    """Attention written out, scores and softmax in fp32: the other backends' oracle."""
    options = dict(scale=scale, softcap=softcap, sinks_N=sinks_N, dtype=dtype, accum=accum)
    whole = [(slice(0, q_BTNH.shape[1]), slice(0, k_BSKH.shape[1]))]
    return _attend_blocks(whole, q_BTNH, k_BSKH, v_BSKH, mask, bias_BNTS, **options)


def blocked(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    *,
    bias_BNTS: Float[Array, "#B N T S"] | None = None,
    **options,
) -> Float[Array, "B T N H"]:
    """The same, a block of queries at a time against the keys that it can reach; see `query_blocks`.

    It skips up to half of the scores' work (more in a window). At 256 tokens, two blocks, forward and
    backward take 0.7 of the time of one on a CPU. A mask that is not `ordered` makes one block.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    blocks = [(slice(0, T), slice(0, S))]
    if mask.ordered and T == S:
        blocks = query_blocks(T, causal=mask.causal, window=mask.window)
    return _attend_blocks(blocks, q_BTNH, k_BSKH, v_BSKH, mask, bias_BNTS, **options)


BLOCKS, BLOCK_LENGTH = 8, 128  # at most that many blocks, each at least that long: the program stays short


def query_blocks(length: int, *, causal: bool, window: int = 0) -> list[tuple[slice, slice]]:
    """Blocks of queries, and the keys that a block can reach, when queries and keys are the same tokens.

    >>> query_blocks(300, causal=True, window=20)
    [(slice(0, 128, None), slice(0, 128, None)), (slice(128, 256, None), slice(109, 256, None)),
     (slice(256, 300, None), slice(237, 300, None))]
    """
    if not causal and not window:
        return [(slice(0, length), slice(0, length))]
    size = max(BLOCK_LENGTH, -(-length // BLOCKS))
    blocks = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = max(0, start - window + 1) if window else 0
        last = stop if causal else min(length, stop + window - 1)
        blocks.append((slice(start, stop), slice(first, last)))
    return blocks


def _attend_blocks(
    blocks: list[tuple[slice, slice]],
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    mask: Mask,
    bias_BNTS: Array | None,
    *,
    scale: float,
    softcap: float,
    sinks_N: Array | None,
    dtype: str,
    accum: str,
) -> Array:
    """Attention of each slice of queries to its slice of keys, joined along T, which the slices tile."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    G = N // K
    # Heads before time: small matrix products over contiguous [T, H] blocks, about twice as fast on a CPU.
    q_BKGTH = (q_BTNH * scale).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    seen_BTS, outs = mask.visible_BTS(), []
    for rows, keys in blocks:
        q, k, v = q_BKGTH[:, :, :, rows], k_BKSH[:, :, keys], v_BKSH[:, :, keys]
        scores = product("BKGTH,BKSH->BKGTS", q, k, dtype, accum, "float32")
        if softcap:
            scores = softcap * jnp.tanh(scores / softcap)
        if bias_BNTS is not None:
            bias_BNts = bias_BNTS[..., rows, keys].astype(jnp.float32)
            scores += bias_BNts.reshape(-1, K, G, *bias_BNts.shape[2:])
        scores = jnp.where(seen_BTS[:, None, None, rows, keys], scores, _HIDDEN)
        if sinks_N is None:
            probs = jax.nn.softmax(scores, axis=-1)
        else:
            sink = sinks_N.astype(jnp.float32).reshape(1, K, G, 1, 1)
            top = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sink))
            weights = jnp.exp(scores - top)
            probs = weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - top))
        outs.append(product("BKGTS,BKSH->BKGTH", probs, v, dtype, accum, dtype))
    out = outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)


def xla(q_BTNH, k_BSKH, v_BSKH, mask: Mask, *, scale, bias_BNTS, softcap, sinks_N, dtype, accum):
    """`jax.nn.dot_product_attention`, XLA's own lowering on every platform; it sums scores in fp32."""
    assert not softcap, "check_backend lets no softcap through"
    assert sinks_N is None, "check_backend lets no sinks through"
    check(accum == "float32", f"model.accum_dtype={accum!r}: backend 'xla' sums in float32; use 'reference'")
    q, k, v = (a.astype(dtype) for a in (q_BTNH, k_BSKH, v_BSKH))
    seen = mask.visible_BTS()[:, None]
    return jax.nn.dot_product_attention(q, k, v, bias=bias_BNTS, mask=seen, scale=scale, implementation="xla")
