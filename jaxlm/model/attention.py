"""Attention: what a query may see, the backends that compute it, and the module with its projections.

`attend` is the one entry. A backend states what it can honour in its row of `BACKENDS`; asking for more is
an error that names a backend which can, never a silent fallback.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.errors import UserError, check, check_choice
from jaxlm.model.cache import LayerCache, write
from jaxlm.model.context_parallel import CONTEXTS, attend_split
from jaxlm.model.layers import Norm, normal_init
from jaxlm.model.positions import rotate
from jaxlm.sharding import constrain, split_axes
from jaxlm.weights import matmul, product

KINDS = ("global", "local")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Heads, pattern and variations of the attention layers."""

    num_heads: int = 4  # query heads N
    num_kv_heads: int = 0  # key/value heads K, a divisor of num_heads (1 = MQA); 0 = num_heads
    head_dim: int = 0  # H; 0 = model_dim / num_heads
    pattern: tuple[str, ...] = ("global",)  # one period of layers, each 'global' or 'local'
    window: int = 0  # tokens that a local layer sees, itself included
    softcap: float = 0.0  # scores become c tanh(scores / c); 0 = off (Gemma 2)
    qk_norm: bool = False  # RMSNorm of each query and key head before the rotation
    sinks: bool = False  # one learned extra logit a head that takes weight and gives nothing (GPT-OSS)
    qkv_bias: bool = False  # biases on the query, key and value projections
    out_bias: bool = False  # bias on the output projection
    scale: float = 0.0  # of the scores; 0 = head_dim ** -0.5
    backend: str = "blocked"  # name in jaxlm.model.attention.BACKENDS
    context: str = "gather"  # over columns that mesh.sequence splits: gather | ring | ulysses

    def __post_init__(self) -> None:
        check(self.num_heads >= 1, f"model.attention.num_heads={self.num_heads} must be at least 1")
        check(
            self.num_kv_heads >= 0 and (self.num_kv_heads == 0 or self.num_heads % self.num_kv_heads == 0),
            f"model.attention.num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}; "
            f"valid: {', '.join(str(k) for k in range(1, self.num_heads + 1) if self.num_heads % k == 0)}",
        )
        check(len(self.pattern) > 0, "model.attention.pattern must name at least one layer kind")
        for kind in self.pattern:
            check_choice(kind, KINDS, "model.attention.pattern")
        check(
            "local" not in self.pattern or self.window >= 1,
            f"model.attention.window={self.window} must be at least 1, as the pattern has local layers",
        )
        check(self.softcap >= 0.0, f"model.attention.softcap={self.softcap} must not be negative")
        check_choice(self.backend, BACKENDS, "model.attention.backend")
        check_choice(self.context, CONTEXTS, "model.attention.context")

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_kv_heads or self.num_heads


@dataclasses.dataclass(frozen=True)
class Mask:
    """What a query may see: same segment, not later (if causal), within the window, and allowed.

    Segment 0 is padding: nobody sees it. Without segments every key is real. Positions count from the start
    of a segment, and `window` counts the query itself. `ordered` promises that query i and key i are one
    token and that positions grow along a segment: then nothing after column i is visible to a causal query,
    and nothing `window` columns before it, and a backend may leave those keys out unseen.
    """

    q_positions_BT: Int[Array, "B T"]
    k_positions_BS: Int[Array, "B S"]
    q_segments_BT: Int[Array, "B T"] | None = None
    k_segments_BS: Int[Array, "B S"] | None = None
    causal: bool = True
    window: int = 0
    allowed_BTS: Bool[Array, "B T S"] | None = None
    ordered: bool = False

    def visible_BTS(self) -> Bool[Array, "#B T S"]:
        """The mask written out."""
        distance_BTS = self.q_positions_BT[:, :, None] - self.k_positions_BS[:, None, :]
        seen = jnp.ones(distance_BTS.shape, bool)
        if self.causal:
            seen &= distance_BTS >= 0
        if self.window:
            seen &= distance_BTS < self.window
            if not self.causal:
                seen &= distance_BTS > -self.window
        if self.k_segments_BS is not None:
            seen &= (self.k_segments_BS != 0)[:, None, :]
            if self.q_segments_BT is not None:
                seen &= self.q_segments_BT[:, :, None] == self.k_segments_BS[:, None, :]
        if self.allowed_BTS is not None:
            seen &= self.allowed_BTS
        return seen


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


def executed_keys(backend: str, length: int, *, causal: bool, window: int = 0) -> float:
    """Mean number of keys per query whose scores a backend computes in training, hidden ones included.

    >>> executed_keys("reference", 96, causal=True), executed_keys("blocked", 256, causal=True)
    (96.0, 192.0)
    """
    if backend != "blocked":
        return float(length)
    blocks = query_blocks(length, causal=causal, window=window)
    return sum((rows.stop - rows.start) * (keys.stop - keys.start) for rows, keys in blocks) / length


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
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def xla(q_BTNH, k_BSKH, v_BSKH, mask: Mask, *, scale, bias_BNTS, softcap, sinks_N, dtype, accum):
    """`jax.nn.dot_product_attention`, XLA's own lowering on every platform; it sums scores in fp32."""
    assert not softcap, "check_backend lets no softcap through"
    assert sinks_N is None, "check_backend lets no sinks through"
    check(accum == "float32", f"model.accum_dtype={accum!r}: backend 'xla' sums in float32; use 'reference'")
    q, k, v = (a.astype(dtype) for a in (q_BTNH, k_BSKH, v_BSKH))
    seen = mask.visible_BTS()[:, None]
    return jax.nn.dot_product_attention(q, k, v, bias=bias_BNTS, mask=seen, scale=scale, implementation="xla")


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to compute attention and what it can honour beyond masks and grouped heads."""

    fn: Callable[..., Array]
    softcap: bool
    sinks: bool
    bias: bool


BACKENDS: dict[str, Backend] = {
    "blocked": Backend(blocked, softcap=True, sinks=True, bias=True),
    "reference": Backend(reference, softcap=True, sinks=True, bias=True),
    "xla": Backend(xla, softcap=False, sinks=False, bias=True),
}


def check_backend(name: str, *, softcap: bool, sinks: bool, bias: bool) -> None:
    """Raise `UserError` if the backend cannot honour what is asked; the message names those that can."""
    wanted = {"softcap": softcap, "sinks": sinks, "bias": bias}
    lacking = [what for what, on in wanted.items() if on and not getattr(BACKENDS[name], what)]
    if lacking:
        able = [n for n, b in BACKENDS.items() if all(getattr(b, what) for what, on in wanted.items() if on)]
        choices = " or ".join(map(repr, able))
        raise UserError(f"model.attention.backend={name!r} has no {' and no '.join(lacking)}; use {choices}")


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

    Returns:
        `[B, T, N, H]` in `dtype`. A query that sees nothing gets finite numbers without meaning.

    Raises:
        UserError: the backend does not offer what is asked.
    """
    check_backend(backend, softcap=softcap > 0, sinks=sinks_N is not None, bias=bias_BNTS is not None)
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    options = dict(
        scale=scale, bias_BNTS=bias_BNTS, softcap=softcap, sinks_N=sinks_N, dtype=dtype, accum=accum
    )
    with jax.named_scope("attend"):
        return BACKENDS[backend].fn(q_BTNH, k_BSKH, v_BSKH, mask, **options)


@dataclasses.dataclass(frozen=True)
class Context:
    """What every block reads: positions, segments, position tables, and the memory of cross-attention."""

    positions_BT: Int[Array, "B T"]
    segments_BT: Int[Array, "B T"] | None = None
    allowed_BTS: Bool[Array, "B T S"] | None = None  # a further mask, for example of a prefix LM
    rotation: dict[str, tuple[Array, Array]] | None = None  # layer kind -> (cos, sin)
    bias: Callable[[Array, Array], Array] | None = None  # (q positions, k positions) -> bias_BNTS
    ordered: bool = True  # positions grow along every document, see `Mask`
    zigzag: bool = False  # columns lie in the order of `context_parallel.zigzag`
    memory_BSD: Float[Array, "B S D"] | None = None
    memory_segments_BS: Int[Array, "B S"] | None = None


class Attention(nn.Module):
    """Projections, rotation, cache and `attend`; with a memory in place of itself it is cross-attention."""

    cfg: AttentionConfig
    head_dim: int
    window: int  # 0 = sees everything
    causal: bool
    cross: bool
    interleaved: bool  # pairing of the rotation
    norm_eps: float
    init_std: Callable[[int], float]
    out_scale: float
    dtype: str
    param_dtype: str
    accum_dtype: str

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], ctx: Context, cache: LayerCache | None = None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        cfg, H, N, K = self.cfg, self.head_dim, self.cfg.num_heads, self.cfg.kv_heads
        D = x_BTD.shape[-1]
        dtypes = dict(dtype=self.dtype, accum=self.accum_dtype)
        init = normal_init(self.init_std(D))

        def project(name: str, source: Array, heads: int) -> Array:
            axis = "heads" if name == "q" else "kv_heads"
            w_DNH = self.param(f"w{name}", init, (D, heads, H), self.param_dtype)
            y = matmul("BTD,DNH->BTNH", source, w_DNH, out=("batch", "length", axis, "head_dim"), **dtypes)
            if cfg.qkv_bias:
                b_NH = self.param(f"b{name}", nn.initializers.zeros, (heads, H), self.param_dtype)
                y = y + b_NH.astype(self.dtype)
            return y

        source = ctx.memory_BSD if self.cross else x_BTD
        with jax.named_scope("qkv"):
            q_BTNH, k_BSKH, v_BSKH = project("q", x_BTD, N), project("k", source, K), project("v", source, K)
        if cfg.qk_norm:
            q_BTNH = Norm("rmsnorm", self.norm_eps, self.param_dtype, name="q_norm")(q_BTNH)
            k_BSKH = Norm("rmsnorm", self.norm_eps, self.param_dtype, name="k_norm")(k_BSKH)
        if ctx.rotation is not None and not self.cross:
            with jax.named_scope("rope"):
                cos, sin = ctx.rotation["local" if self.window else "global"]
                q_BTNH = rotate(q_BTNH, cos, sin, self.interleaved)
                k_BSKH = rotate(k_BSKH, cos, sin, self.interleaved)

        if self.cross:
            S = k_BSKH.shape[1]
            mask = Mask(
                ctx.positions_BT,
                jnp.broadcast_to(jnp.arange(S), (x_BTD.shape[0], S)),
                k_segments_BS=ctx.memory_segments_BS,
                causal=False,
            )
        elif cache is None:
            mask = Mask(
                ctx.positions_BT,
                ctx.positions_BT,
                ctx.segments_BT,
                ctx.segments_BT,
                self.causal,
                self.window,
                ctx.allowed_BTS,
                ordered=ctx.ordered,
            )
        else:
            k_BSKH, v_BSKH, mask, cache = self._through_cache(k_BSKH, v_BSKH, ctx, cache)

        sinks_N = self.param("sinks", nn.initializers.zeros, (N,), self.param_dtype) if cfg.sinks else None
        bias = ctx.bias(mask.q_positions_BT, mask.k_positions_BS) if ctx.bias and not self.cross else None
        options = dict(scale=cfg.scale or H**-0.5, bias_BNTS=bias, softcap=cfg.softcap, sinks_N=sinks_N)
        one = partial(attend, backend=cfg.backend)
        if cache is None and not self.cross and split_axes("length"):
            one = partial(attend_split, one, context=cfg.context, zigzag=ctx.zigzag)
        out_BTNH = one(q_BTNH, k_BSKH, v_BSKH, mask, **options, **dtypes)
        out_BTNH = constrain(out_BTNH, "batch", "length", "heads", "head_dim")
        out_init = normal_init(self.init_std(N * H) * self.out_scale)
        wo_NHD = self.param("wo", out_init, (N, H, D), self.param_dtype)
        with jax.named_scope("out"):
            out = ("batch", "residual", "activation")
            y_BTD = matmul("BTNH,NHD->BTD", out_BTNH, wo_NHD, out=out, **dtypes)
            if cfg.out_bias:
                y_BTD = y_BTD + self.param("bo", nn.initializers.zeros, (D,), self.param_dtype).astype(
                    self.dtype
                )
        return y_BTD, cache

    def _through_cache(self, k_BTKH: Array, v_BTKH: Array, ctx: Context, cache: LayerCache):
        """Keys and values to attend to, their mask, and the cache with the new ones written."""
        real_BT = jnp.ones(ctx.positions_BT.shape, bool) if ctx.segments_BT is None else ctx.segments_BT != 0
        written = write(cache, k_BTKH, v_BTKH, ctx.positions_BT, real_BT)
        if self.window and ctx.positions_BT.shape[1] > 1:
            # Later columns of this call overwrite slots that its earlier ones still see: attend to old and
            # new apart.
            k = jnp.concatenate([cache.k_BSKH, k_BTKH.astype(cache.k_BSKH.dtype)], axis=1)
            v = jnp.concatenate([cache.v_BSKH, v_BTKH.astype(cache.v_BSKH.dtype)], axis=1)
            positions = jnp.concatenate(
                [cache.positions_BS, jnp.where(real_BT, ctx.positions_BT, -1)], axis=1
            )
        else:
            k, v, positions = written
        # A slot that holds nothing is padding; a row of a cache is one document.
        mask = Mask(
            ctx.positions_BT,
            positions,
            k_segments_BS=(positions >= 0).astype(jnp.int32),
            causal=self.causal,
            window=self.window,
        )
        return k, v, mask, written
