"""Attention: its config, what every block reads, and the module with projections, rotation and cache."""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.errors import check, check_choice
from jaxlm.model.backends import BACKENDS, attend
from jaxlm.model.cache import LayerCache, MemoryCache, write
from jaxlm.model.context_parallel import CONTEXTS, attend_split
from jaxlm.model.disentangled import DisentangledConfig, disentangled_scores
from jaxlm.model.layers import NORMS, Norm, normal_init
from jaxlm.model.masks import Mask
from jaxlm.model.positions import rotate
from jaxlm.sharding import constrain, split_axes
from jaxlm.weights import matmul

KINDS = ("global", "local", "nope")  # nope: sees everything, and its heads are not rotated


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Sizes of multi-head latent attention, see jaxlm.model.latent_attention."""

    kv_rank: int = (
        0  # R, numbers a token from which keys and values of all heads are made; 0 = plain attention
    )
    q_rank: int = 0  # likewise of the queries; 0 = they are made of the stream itself
    nope_dim: int = 0  # of a query or key head, does not rotate
    rope_dim: int = 0  # of a query head, rotates; the keys of all heads share theirs
    value_dim: int = 0  # of a value head
    norm_eps: float = 1e-6  # of the norms of both ranks

    def __post_init__(self) -> None:
        for name in ("kv_rank", "q_rank", "nope_dim", "rope_dim", "value_dim"):
            size = getattr(self, name)
            check(size >= 0, f"model.attention.latent.{name}={size} must not be negative")
            check(
                self.kv_rank > 0 or size == 0,
                f"model.attention.latent.{name}={size} without latent attention: set "
                "model.attention.latent.kv_rank",
            )
        for name in ("nope_dim", "rope_dim", "value_dim"):
            size = getattr(self, name)
            check(
                self.kv_rank == 0 or size > 0,
                f"model.attention.latent.{name}={size} must be positive with kv_rank={self.kv_rank}",
            )

    @property
    def key_dim(self) -> int:
        """Of a query or key head."""
        return self.nope_dim + self.rope_dim


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Heads, pattern and variations of the attention layers."""

    num_heads: int = 4  # query heads N
    num_kv_heads: int = 0  # key/value heads K, a divisor of num_heads (1 = MQA); 0 = num_heads
    head_dim: int = 0  # H; 0 = model_dim / num_heads
    pattern: tuple[str, ...] = ("global",)  # one period of layers, each 'global', 'local' or 'nope'
    window: int = 0  # tokens that a local layer sees, itself included
    softcap: float = 0.0  # scores become c tanh(scores / c); 0 = off (Gemma 2)
    qk_norm: bool = False  # normalise queries and keys before the rotation
    qk_norm_kind: str = "rmsnorm"  # name in jaxlm.model.layers.NORMS
    qk_norm_over: str = "head"  # head | heads (each with a scale of its own) | all (of them together)
    clip_qkv: float = 0.0  # queries, keys and values, normalised ones too, are clipped to this size; 0 = off
    sinks: bool = False  # one learned extra logit a head that takes weight and gives nothing (GPT-OSS)
    qkv_bias: bool = False  # biases on the query, key and value projections
    out_bias: bool = False  # bias on the output projection
    scale: float = 0.0  # of the scores; 0 = head_dim ** -0.5
    backend: str = "blocked"  # name in jaxlm.model.backends.BACKENDS
    tile_q: int = 0  # splash: queries of a tile, a multiple of 128; 0 = by rule
    tile_k: int = 0  # splash: keys of a tile, likewise
    context: str = "gather"  # over columns that mesh.sequence splits: gather | ring | ulysses
    latent: LatentConfig = LatentConfig()  # keys and values from a narrow vector a token (DeepSeek-V2)

    def __post_init__(self) -> None:
        if self.latent.kv_rank:
            self._check_latent()
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
        for name in ("softcap", "clip_qkv"):
            check(
                getattr(self, name) >= 0.0,
                f"model.attention.{name}={getattr(self, name)} must not be negative",
            )
        check_choice(self.qk_norm_kind, NORMS, "model.attention.qk_norm_kind")
        check_choice(self.qk_norm_over, ("head", "heads", "all"), "model.attention.qk_norm_over")
        check_choice(self.backend, BACKENDS, "model.attention.backend")
        for name in ("tile_q", "tile_k"):
            size = getattr(self, name)
            check(
                size >= 0 and size % 128 == 0,
                f"model.attention.{name}={size} must be a multiple of 128, or 0 for the backend's own rule",
            )
        check_choice(self.context, CONTEXTS, "model.attention.context")

    def _check_latent(self) -> None:
        wanted = {"num_kv_heads": (0, self.num_heads), "head_dim": (0, self.latent.key_dim)}
        for name, values in {**wanted, "qk_norm": (False,), "clip_qkv": (0.0,)}.items():
            given = getattr(self, name)
            check(
                given in values,
                f"model.attention.{name}={given!r} with model.attention.latent.kv_rank="
                f"{self.latent.kv_rank}: latent attention has only {' or '.join(map(repr, values))}",
            )

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_kv_heads or self.num_heads


@dataclasses.dataclass(frozen=True)
class Context:
    """What every block reads: positions, segments, position tables, and the memory of cross-attention."""

    positions_BT: Int[Array, "B T"]
    segments_BT: Int[Array, "B T"] | None = None
    allowed_BTS: Bool[Array, "B T S"] | None = None  # a further mask, for example of a prefix LM
    rotation: dict[str, tuple[Array, Array]] | None = None  # layer kind -> (cos, sin)
    bias: Callable[[Array, Array], Array] | None = None  # (q positions, k positions) -> bias_BNTS
    distances_RD: Float[Array, "R D"] | None = None  # table of disentangled attention
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
    rotates: bool  # queries and keys turn with their positions, where the model has a rotation
    interleaved: bool  # pairing of the rotation
    norm_eps: float
    norm_offset: bool
    init_std: Callable[[int], float]
    out_scale: float
    dtype: str
    param_dtype: str
    accum_dtype: str
    disentangled: DisentangledConfig = DisentangledConfig()

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], ctx: Context, cache: LayerCache | MemoryCache | None = None
    ) -> tuple[Float[Array, "B T D"], LayerCache | MemoryCache | None]:
        cfg, H, N, K = self.cfg, self.head_dim, self.cfg.num_heads, self.cfg.kv_heads
        D = x_BTD.shape[-1]
        dtypes = dict(dtype=self.dtype, accum=self.accum_dtype)
        init = normal_init(self.init_std(D))

        @functools.cache
        def weights(name: str, heads: int) -> tuple[Array, Array | None]:
            w_DNH = self.param(f"w{name}", init, (D, heads, H), self.param_dtype)
            if not cfg.qkv_bias:
                return w_DNH, None
            return w_DNH, self.param(f"b{name}", nn.initializers.zeros, (heads, H), self.param_dtype)

        def project(name: str, source: Array, heads: int) -> Array:
            axis = "heads" if name[0] == "q" else "kv_heads"
            w_DNH, b_NH = weights(name, heads)
            y = matmul("BTD,DNH->BTNH", source, w_DNH, out=("batch", "length", axis, "head_dim"), **dtypes)
            if b_NH is not None:
                y = y + b_NH.astype(self.dtype)
            if cfg.qk_norm and name != "v":
                y = normalised(name, y)
            return jnp.clip(y, -cfg.clip_qkv, cfg.clip_qkv) if cfg.clip_qkv else y

        def normalised(name: str, x_BTNH: Array) -> Array:
            heads = x_BTNH.shape[2]
            rows = heads if cfg.qk_norm_over == "heads" else 1
            norm = Norm(
                cfg.qk_norm_kind, self.norm_eps, self.param_dtype, self.norm_offset, rows, name=f"{name}_norm"
            )
            if cfg.qk_norm_over == "all":
                return norm(x_BTNH.reshape(*x_BTNH.shape[:2], heads * H)).reshape(x_BTNH.shape)
            return norm(x_BTNH)

        source = ctx.memory_BSD if self.cross else x_BTD
        with jax.named_scope("qkv"):
            q_BTNH = project("q", x_BTD, N)
            if source is not None:
                k_BSKH, v_BSKH = project("k", source, K), project("v", source, K)
        if ctx.rotation is not None and self.rotates:
            with jax.named_scope("rope"):
                cos, sin = ctx.rotation["local" if self.window else "global"]
                q_BTNH = rotate(q_BTNH, cos, sin, self.interleaved)
                k_BSKH = rotate(k_BSKH, cos, sin, self.interleaved)

        if self.cross:
            segments_BS = ctx.memory_segments_BS
            if source is None:
                k_BSKH, v_BSKH, segments_BS = cache
            elif cache is not None:
                if segments_BS is None:
                    segments_BS = jnp.ones(source.shape[:2], jnp.int32)
                cache = MemoryCache(
                    k_BSKH.astype(cache.k_BSKH.dtype), v_BSKH.astype(cache.v_BSKH.dtype), segments_BS
                )
            S = k_BSKH.shape[1]
            mask = Mask(
                ctx.positions_BT,
                jnp.broadcast_to(jnp.arange(S), (x_BTD.shape[0], S)),
                ctx.segments_BT,
                segments_BS,
                causal=False,
            )
        elif cache is None:
            mask = own_mask(ctx, self.causal, self.window)
        else:
            k_BSKH, v_BSKH, mask, cache = through_cache(k_BSKH, v_BSKH, ctx, cache, self.causal, self.window)

        sinks_N = self.param("sinks", nn.initializers.zeros, (N,), self.param_dtype) if cfg.sinks else None
        scale = cfg.scale or self.disentangled.scale(H)
        if self.disentangled.span and not self.cross:
            suffix = "" if self.disentangled.shared else "_rel"
            names = {"c2p": f"k{suffix}", "p2c": f"q{suffix}"}
            rows = {
                term: project(names[term], ctx.distances_RD[None], N)[0] for term in self.disentangled.terms
            }

            def bias(q_positions_BT: Array, k_positions_BS: Array) -> Array:
                row_BTS = self.disentangled.row(q_positions_BT[:, :, None] - k_positions_BS[:, None, :])
                return scale * disentangled_scores(q_BTNH, k_BSKH, rows, row_BTS, **dtypes)

            ctx = dataclasses.replace(ctx, bias=bias)
        how = dict(cached=cache is not None, plain=self.is_initializing(), cross=self.cross, **dtypes)
        out_BTNH = attend_own(cfg, q_BTNH, k_BSKH, v_BSKH, mask, ctx, scale=scale, sinks_N=sinks_N, **how)
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


def own_mask(ctx: Context, causal: bool, window: int) -> Mask:
    """What the columns of a call may see of each other."""
    return Mask(
        ctx.positions_BT,
        ctx.positions_BT,
        ctx.segments_BT,
        ctx.segments_BT,
        causal,
        window,
        ctx.allowed_BTS,
        ordered=ctx.ordered,
    )


def through_cache(
    k_BTKH: Array, v_BTKH: Array, ctx: Context, cache: LayerCache, causal: bool, window: int
) -> tuple[Array, Array, Mask, LayerCache]:
    """Keys and values to attend to, their mask, and the cache with the new ones written."""
    real_BT = jnp.ones(ctx.positions_BT.shape, bool) if ctx.segments_BT is None else ctx.segments_BT != 0
    written = write(cache, k_BTKH, v_BTKH, ctx.positions_BT, real_BT)
    if window and ctx.positions_BT.shape[1] > 1:
        # Later columns of this call overwrite slots that its earlier ones still see: attend to old and
        # new apart.
        k = jnp.concatenate([cache.k_BSKH, k_BTKH.astype(cache.k_BSKH.dtype)], axis=1)
        v = jnp.concatenate([cache.v_BSKH, v_BTKH.astype(cache.v_BSKH.dtype)], axis=1)
        positions = jnp.concatenate([cache.positions_BS, jnp.where(real_BT, ctx.positions_BT, -1)], axis=1)
    else:
        k, v, positions = written
    # A slot that holds nothing is padding; a row of a cache is one document.
    mask = Mask(
        ctx.positions_BT,
        positions,
        k_segments_BS=(positions >= 0).astype(jnp.int32),
        causal=causal,
        window=window,
    )
    return k, v, mask, written


def attend_own(
    cfg: AttentionConfig,
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    mask: Mask,
    ctx: Context,
    *,
    scale: float,
    sinks_N: Array | None,
    cached: bool,
    plain: bool,
    cross: bool = False,
    **dtypes: str,
) -> Array:
    """`attend` as the config says, over columns that the mesh may split.

    Args:
        cfg: backend, tiles, softcap and context are read.
        q_BTNH, k_BSKH, v_BSKH, mask, scale, sinks_N, dtypes: as for `attend`.
        ctx: its bias is added, but for a cross-attention.
        cached: keys come from a cache.
        plain: by products written out, whatever the backend: where parameters are made, which do not depend
            on the kernel, it may not run.
        cross: queries and keys are different columns.
    """
    bias = ctx.bias(mask.q_positions_BT, mask.k_positions_BS) if ctx.bias and not cross else None
    backend = "reference" if plain else cfg.backend
    if cached:
        backend = BACKENDS[backend].cached or backend
    tiles = (cfg.tile_q, cfg.tile_k) if BACKENDS[backend].tiled else (0, 0)
    options = dict(scale=scale, bias_BNTS=bias, softcap=cfg.softcap, sinks_N=sinks_N, **dtypes)
    one = partial(attend, backend=backend, tiles=tiles)
    if not cached and not cross and split_axes("length"):
        one = partial(attend_split, one, context=cfg.context, zigzag=ctx.zigzag)
    return constrain(one(q_BTNH, k_BSKH, v_BSKH, mask, **options), "batch", "length", "heads", "head_dim")
