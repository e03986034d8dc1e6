"""Multi-head latent attention: keys and values of all heads are made of one narrow vector a token.

With R = `kv_rank`, norms of their own, and queries that pass through a narrow vector too if `q_rank` is set:

    c = norm((x W)[:R])          r = rotate((x W)[R:])        one for all heads: R + rope_dim numbers a token
    q_h = [q_nope_h, rotate(q_rope_h)]     k_h = [c Wk_h, r]     v_h = c Wv_h

A cache holds c and r alone. Calls through it do not expand them: Wk is carried over to the queries and Wv to
the result, so that attention is multi-query over keys [c, r] and values c,

    scores = (q_nope_h Wk_h^T) c + rotate(q_rope_h) r        out_h = (probs c) Wv_h

which costs R + rope_dim a key in place of nope_dim + rope_dim, and reads N times fewer bytes. Training
and whole rows expand. Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.model.attention import AttentionConfig, Context, attend_own, own_mask, through_cache
from jaxlm.model.cache import LayerCache
from jaxlm.model.layers import Norm, normal_init
from jaxlm.model.positions import rotate
from jaxlm.weights import matmul


class LatentAttention(nn.Module):
    """Attention with `cfg.latent`; otherwise as `jaxlm.model.attention.Attention`."""

    cfg: AttentionConfig
    window: int  # 0 = sees everything
    causal: bool
    rotates: bool
    interleaved: bool
    norm_offset: bool
    init_std: Callable[[int], float]
    out_scale: float
    dtype: str
    param_dtype: str
    accum_dtype: str

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], ctx: Context, cache: LayerCache | None = None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        cfg, part, N = self.cfg, self.cfg.latent, self.cfg.num_heads
        D, R, H = x_BTD.shape[-1], part.kv_rank, part.nope_dim
        dtypes = dict(dtype=self.dtype, accum=self.accum_dtype)
        by_head = ("batch", "length", "heads", "head_dim")

        def weight(name: str, *shape: int, scale: float = 1.0, inputs: int = 1) -> Array:
            fan_in = shape[0] if inputs == 1 else shape[0] * shape[1]
            return self.param(name, normal_init(self.init_std(fan_in) * scale), shape, self.param_dtype)

        def narrow(name: str, width: int) -> Array:
            y_BTR = matmul("BTD,DR->BTR", x_BTD, weight(f"w{name}_down", D, width), **dtypes)
            if cfg.qkv_bias:
                y_BTR = y_BTR + self.param(
                    f"b_{name}", nn.initializers.zeros, (width,), self.param_dtype
                ).astype(self.dtype)
            return y_BTR

        def normalised(name: str, y_BTR: Array) -> Array:
            return Norm("rmsnorm", part.norm_eps, self.param_dtype, self.norm_offset, name=name)(y_BTR)

        def turned(x_BTNH: Array) -> Array:
            if ctx.rotation is None or not self.rotates:
                return x_BTNH
            return rotate(x_BTNH, *ctx.rotation["local" if self.window else "global"], self.interleaved)

        with jax.named_scope("qkv"):
            if part.q_rank:
                q_BTR = normalised("q_norm", narrow("q", part.q_rank))
                q_BTNH = matmul(
                    "BTR,RNH->BTNH",
                    q_BTR,
                    weight("wq_up", part.q_rank, N, part.key_dim),
                    out=by_head,
                    **dtypes,
                )
            else:
                q_BTNH = matmul(
                    "BTD,DNH->BTNH", x_BTD, weight("wq", D, N, part.key_dim), out=by_head, **dtypes
                )
            both_BTR = narrow("kv", R + part.rope_dim)
            c_BTR = normalised("kv_norm", both_BTR[..., :R])
            wk_RNH, wv_RNH = weight("wk_up", R, N, H), weight("wv_up", R, N, part.value_dim)
        with jax.named_scope("rope"):
            nope_BTNH, rope_BTNH = q_BTNH[..., :H], turned(q_BTNH[..., H:])
            r_BT1H = turned(both_BTR[:, :, None, R:])

        if cache is None:
            with jax.named_scope("expand"):
                k_BTNH = matmul("BTR,RNH->BTNH", c_BTR, wk_RNH, out=by_head, **dtypes)
                v_BTNH = matmul("BTR,RNH->BTNH", c_BTR, wv_RNH, out=by_head, **dtypes)
            r_BTNH = jnp.broadcast_to(r_BT1H, (*r_BT1H.shape[:2], N, part.rope_dim))
            q_BTNH = jnp.concatenate([nope_BTNH, rope_BTNH], axis=-1)
            k_BTNH = jnp.concatenate([k_BTNH, r_BTNH.astype(k_BTNH.dtype)], axis=-1)
            mask = own_mask(ctx, self.causal, self.window)
        else:
            kept_BT1R = jnp.concatenate([c_BTR[:, :, None], r_BT1H.astype(c_BTR.dtype)], axis=-1)
            nothing = jnp.zeros((*kept_BT1R.shape[:3], 0), kept_BT1R.dtype)
            k_BTNH, _, mask, cache = through_cache(kept_BT1R, nothing, ctx, cache, self.causal, self.window)
            v_BTNH = k_BTNH[..., :R]
            with jax.named_scope("absorb"):
                absorbed_BTNR = matmul("BTNH,RNH->BTNR", nope_BTNH, wk_RNH, **dtypes)
            q_BTNH = jnp.concatenate([absorbed_BTNR, rope_BTNH.astype(absorbed_BTNR.dtype)], axis=-1)

        sinks_N = self.param("sinks", nn.initializers.zeros, (N,), self.param_dtype) if cfg.sinks else None
        out_BTNH = attend_own(
            cfg,
            q_BTNH,
            k_BTNH,
            v_BTNH,
            mask,
            ctx,
            scale=cfg.scale or part.key_dim**-0.5,
            sinks_N=sinks_N,
            cached=cache is not None,
            plain=self.is_initializing(),
            **dtypes,
        )
        if cache is not None:
            with jax.named_scope("absorb"):
                out_BTNH = matmul("BTNR,RNH->BTNH", out_BTNH, wv_RNH, **dtypes)
        wo_NHD = weight("wo", N, part.value_dim, D, scale=self.out_scale, inputs=2)
        with jax.named_scope("out"):
            y_BTD = matmul(
                "BTNH,NHD->BTD", out_BTNH, wo_NHD, out=("batch", "residual", "activation"), **dtypes
            )
            if cfg.out_bias:
                b_D = self.param("bo", nn.initializers.zeros, (D,), self.param_dtype)
                y_BTD = y_BTD + b_D.astype(self.dtype)
        return y_BTD, cache
