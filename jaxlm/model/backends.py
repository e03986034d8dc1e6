"""The attention backends: what each can honour, and `attend`, the one entry to them.

A backend states what it can do in its row of `BACKENDS`; asking for more is an error that names a backend
which can, never a silent fallback.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.errors import UserError, check
from jaxlm.model import splash as splash_kernel
from jaxlm.model.cudnn import cudnn
from jaxlm.model.dense_attention import blocked, query_blocks, reference, xla
from jaxlm.model.masks import Mask
from jaxlm.model.splash import splash
from jaxlm.sharding import platform


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to compute attention and what it can honour beyond segments, windows and grouped heads."""

    fn: Callable[..., Array]
    softcap: bool
    sinks: bool
    bias: bool
    allowed: bool = True  # a mask of any form beside positions and segments
    unordered: bool = True  # causal or windowed masks over any positions, not only `Mask.ordered` ones
    tiled: bool = False  # reads `tile_q` and `tile_k`
    platform: str = ""  # where it runs; '' = everywhere
    widths: bool = False  # values may be wider or narrower than keys; others get them padded with zeros
    cached: str = ""  # backend of the calls through a cache, if it cannot make them itself
    dtypes: tuple[str, ...] = ()  # of the operands; none named = all
    accum: str = ""  # dtype of its sums, if it has but one
    head_dims: tuple[int, int] = (1, 0)  # multiples of the first, up to the second; 0 = no bound


_KERNEL = dict(bias=False, allowed=False, unordered=False, cached="blocked")
_SPLASH = dict(softcap=True, sinks=True, tiled=True, accum="float32", **_KERNEL)
BACKENDS: dict[str, Backend] = {
    "blocked": Backend(blocked, softcap=True, sinks=True, bias=True, widths=True),
    "reference": Backend(reference, softcap=True, sinks=True, bias=True, widths=True),
    "xla": Backend(xla, softcap=False, sinks=False, bias=True),
    # A TPU's matrix unit would round fp32 to bf16 inside the kernel, in the backward pass too.
    "splash": Backend(splash, **_SPLASH, platform="tpu", dtypes=("bfloat16",)),
    "splash_interpret": Backend(
        partial(splash, interpret=True), **_SPLASH
    ),  # for tests: slow, on any platform
    "cudnn": Backend(
        cudnn,
        softcap=False,
        sinks=False,
        **_KERNEL,
        platform="gpu",
        dtypes=("bfloat16", "float16"),
        accum="float32",
        head_dims=(8, 256),  # 256 on Hopper and later; 128 before, which JAX checks
    ),
}
NAMES = {
    "bias": "additive bias (alibi, t5)",
    "allowed": "mask beyond positions and segments",
    "unordered": "mask over positions in any order",
    "tiled": "tiles to choose (tile_q, tile_k)",
}


def check_backend(name: str, **wanted: bool) -> None:
    """Raise `UserError` if the backend cannot honour what is asked; the message names those that can.

    Args:
        name: key of `BACKENDS`.
        wanted: field of `Backend` that says yes or no -> whether that is asked for.
    """
    needs = [what for what, on in wanted.items() if on]
    lacking = [NAMES.get(what, what) for what in needs if not getattr(BACKENDS[name], what)]
    if lacking:
        able = [n for n, b in BACKENDS.items() if all(getattr(b, what) for what in needs)]
        advice = f"use {' or '.join(map(repr, able))}" if able else "no backend has all that is asked for"
        raise UserError(f"model.attention.backend={name!r} has no {' and no '.join(lacking)}; {advice}")


def check_limits(name: str, *, dtype: str, accum: str, head_dim: int) -> None:
    """Raise `UserError` if the backend does not take operands of that dtype or heads of that size."""
    row = BACKENDS[name]
    check(
        not row.dtypes or dtype in row.dtypes,
        f"model.dtype={dtype!r}: backend {name!r} multiplies in {' or '.join(row.dtypes)}; use that, or "
        "model.attention.backend='blocked'",
    )
    check(
        not row.accum or accum == row.accum,
        f"model.accum_dtype={accum!r}: backend {name!r} sums in {row.accum}",
    )
    unit, most = row.head_dims
    check(
        head_dim % unit == 0 and (not most or head_dim <= most),
        f"head_dim={head_dim}: backend {name!r} takes multiples of {unit} up to {most}; use 'blocked'",
    )


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    *,
    backend: str = "blocked",
    scale: float | None = None,
    bias_BNTS: Float[Array, "#B N T S"] | None = None,
    softcap: float = 0.0,
    sinks_N: Float[Array, " N"] | None = None,
    dtype: str = "float32",
    accum: str = "float32",
    tiles: tuple[int, int] = (0, 0),
) -> Float[Array, "B T N H"]:
    """softmax(scale q k^T + bias, where visible) v, with N a multiple of K (grouped heads).

    Args:
        q_BTNH, k_BSKH, v_BSKH: projections, any float dtype.
        mask: what each query may see.
        backend: name in `BACKENDS`.
        scale: of the scores; default H ** -0.5.
        bias_BNTS: added to the scaled scores (ALiBi, T5).
        softcap: c tanh(scores / c) before bias and mask; 0 = off.
        sinks_N: an extra logit a head.
        dtype, accum: of the products' operands and of their sums.
        tiles: queries and keys of a kernel's tile; 0 = by its own rule.

    Returns:
        `[B, T, N, H]`, H of the values, in `dtype`. A query that sees nothing gets finite numbers
        without meaning.

    Raises:
        UserError: the backend does not offer what is asked, or does not run on this platform.
    """
    check_backend(
        backend,
        softcap=softcap > 0,
        sinks=sinks_N is not None,
        bias=bias_BNTS is not None,
        allowed=mask.allowed_BTS is not None,
        unordered=not mask.ordered and (mask.causal or mask.window > 0),
        tiled=any(tiles),
    )
    row = BACKENDS[backend]
    if row.platform and platform() != row.platform:
        raise UserError(
            f"model.attention.backend={backend!r} runs on a {row.platform.upper()}, and this is a "
            f"{platform().upper()}; use 'blocked', which runs everywhere"
        )
    check_limits(backend, dtype=dtype, accum=accum, head_dim=q_BTNH.shape[-1])
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    options = dict(
        scale=scale, bias_BNTS=bias_BNTS, softcap=softcap, sinks_N=sinks_N, dtype=dtype, accum=accum
    )
    if any(tiles):
        options |= dict(tile_q=tiles[0], tile_k=tiles[1])
    with jax.named_scope("attend"):
        width, value_width = q_BTNH.shape[-1], v_BSKH.shape[-1]
        if row.widths or width == value_width:
            return row.fn(q_BTNH, k_BSKH, v_BSKH, mask, **options)
        padded = [_widened(x, max(width, value_width)) for x in (q_BTNH, k_BSKH, v_BSKH)]
        return row.fn(*padded, mask, **options)[..., :value_width]


def _widened(x: Array, width: int) -> Array:
    """Zeros after the last axis's numbers: in keys they add nothing to scores, in values they come out."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def executed_keys(
    backend: str, length: int, *, causal: bool, window: int = 0, tiles: tuple[int, int] = (0, 0)
) -> float:
    """Mean number of keys per query whose scores a backend computes in training, hidden ones included.

    >>> executed_keys("reference", 96, causal=True), executed_keys("blocked", 256, causal=True)
    (96.0, 192.0)
    """
    if BACKENDS[backend].fn is blocked:
        blocks = query_blocks(length, causal=causal, window=window)
        return sum((rows.stop - rows.start) * (keys.stop - keys.start) for rows, keys in blocks) / length
    if BACKENDS[backend].tiled:
        sizes = dict(tile_q=tiles[0], tile_k=tiles[1])
        return splash_kernel.executed_keys(length, causal=causal, window=window, **sizes)
    return float(length)


def keeps_scores(backend: str) -> bool:
    """Whether the backward pass reads written-out probabilities, not a logsumexp a query.

    >>> keeps_scores("blocked"), keeps_scores("splash")
    (True, False)
    """
    return not BACKENDS[backend].cached
