"""The transformer: its config, its block, the table of layouts, and init / apply / unembed.

Linen stops at the block. Above it everything is plain JAX over a nested dict of arrays:

    embed/table [V, D]
    blocks/J/... [L / P, ...]     one stacked tree per layer J of the period of P layers
    tail/J/...                    the layers that are left when P does not divide L, unstacked
    final_norm/scale [D]
    head/w [D, V]                 untied models
"""

import dataclasses
import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.errors import UserError, check, check_choice
from jaxlm.model import positions as pos
from jaxlm.model.attention import Attention, AttentionConfig, Context, check_backend
from jaxlm.model.cache import LayerCache, empty
from jaxlm.model.layers import ACTIVATIONS, MLP, Norm, dropout, normal_init
from jaxlm.model.moe import MoE, MoEConfig
from jaxlm.model.positions import PositionConfig
from jaxlm.sharding import constrain, use
from jaxlm.stack import REMAT, rematerialised, run_stack
from jaxlm.weights import gather, matmul

Params = dict[str, Any]
Aux = dict[str, Any]

DTYPES = ("float32", "bfloat16", "float16")

# The last two components of a leaf's name -> the logical axes of its dimensions.
AXES: dict[str, tuple[str | None, ...]] = {
    "embed/table": ("vocab", "embed"),
    "embed/positions": (None, "embed"),
    "position_bias/table": (None, "heads"),
    "attention/wq": ("embed", "heads", "head_dim"),
    "attention/wk": ("embed", "kv_heads", "head_dim"),
    "attention/wv": ("embed", "kv_heads", "head_dim"),
    "attention/wo": ("heads", "head_dim", "embed"),
    "attention/bq": ("heads", "head_dim"),
    "attention/bk": ("kv_heads", "head_dim"),
    "attention/bv": ("kv_heads", "head_dim"),
    "attention/bo": ("norm",),
    "attention/sinks": ("heads",),
    "q_norm/scale": ("norm",),
    "k_norm/scale": ("norm",),
    "mlp/w_up": ("embed", "mlp"),
    "mlp/w_gate": ("embed", "mlp"),
    "mlp/w_down": ("mlp", "embed"),
    "mlp/b_up": ("mlp",),
    "mlp/b_down": ("norm",),
    "moe/router_w": ("embed", None),
    "moe/router_bias": (None,),
    "moe/w_gate": ("experts", "embed", "expert_mlp"),
    "moe/w_up": ("experts", "embed", "expert_mlp"),
    "moe/w_down": ("experts", "expert_mlp", "embed"),
    "moe/shared_w_gate": ("embed", "mlp"),
    "moe/shared_w_up": ("embed", "mlp"),
    "moe/shared_w_down": ("mlp", "embed"),
    "head/w": ("embed", "vocab"),
}
for _name in (
    "attention_norm",
    "attention_post_norm",
    "cross_norm",
    "cross_post_norm",
    "mlp_norm",
    "mlp_post_norm",
):
    AXES[f"{_name}/scale"] = AXES[f"{_name}/bias"] = ("norm",)
AXES["final_norm/scale"] = AXES["final_norm/bias"] = ("norm",)
for _leaf in ("wq", "wk", "wv", "wo", "bq", "bk", "bv", "bo", "sinks"):
    AXES[f"cross_attention/{_leaf}"] = AXES[f"attention/{_leaf}"]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and variations of a transformer stack."""

    vocab_size: int = 256  # V
    num_layers: int = 4  # L
    model_dim: int = 128  # D
    mlp_dim: int = 0  # F, width of a dense MLP; 0 = 4 D
    mlp_pattern: tuple[str, ...] = ("dense",)  # one period of layers, each 'dense' or 'moe'
    activation: str = "swiglu"  # name in jaxlm.model.layers.ACTIVATIONS
    mlp_bias: bool = False  # biases in the dense MLPs
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    norm_eps: float = 1e-6  # added to the variance
    norm_position: str = "pre"  # pre: x + f(n(x)) | post: n(x + f(x)) | sandwich: x + n(f(n(x)))
    parallel_block: bool = False  # x + attention(n(x)) + mlp(n(x)), one norm (GPT-J, PaLM)
    tie_embeddings: bool = False  # the head is the embedding table
    scale_embeddings: bool = False  # embeddings times sqrt(D) (Gemma)
    logit_softcap: float = 0.0  # logits become c tanh(logits / c); 0 = off
    dropout: float = 0.0  # of the embeddings and of each branch before it is added
    causal: bool = True  # False: every position sees its whole segment
    init_std: float = 0.02  # of weights; 0 = fan_in ** -0.5
    scan: bool = True  # lax.scan over the layers, or an unrolled loop
    remat: str = "none"  # none | minimal | full: name in jaxlm.stack.REMAT
    dtype: str = "float32"  # operands of products, and activations
    param_dtype: str = "float32"  # stored parameters
    accum_dtype: str = "float32"  # sums inside products
    attention: AttentionConfig = AttentionConfig()
    position: PositionConfig = PositionConfig()
    moe: MoEConfig = MoEConfig()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "model_dim"):
            check(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1")
        check(self.mlp_dim >= 0, f"model.mlp_dim={self.mlp_dim} must not be negative")
        check_choice(self.activation, ACTIVATIONS, "model.activation")
        check_choice(self.norm, ("rmsnorm", "layernorm"), "model.norm")
        check_choice(self.norm_position, ("pre", "post", "sandwich"), "model.norm_position")
        check_choice(self.remat, REMAT, "model.remat")
        for name in ("dtype", "param_dtype", "accum_dtype"):
            check_choice(getattr(self, name), DTYPES, f"model.{name}")
        check(0.0 <= self.dropout < 1.0, f"model.dropout={self.dropout} must be in [0, 1)")
        check(self.init_std >= 0.0, f"model.init_std={self.init_std} must not be negative")
        check(self.logit_softcap >= 0.0, f"model.logit_softcap={self.logit_softcap} must not be negative")
        check(len(self.mlp_pattern) > 0, "model.mlp_pattern must name at least one layer kind")
        for kind in self.mlp_pattern:
            check_choice(kind, ("dense", "moe"), "model.mlp_pattern")
        has_moe = "moe" in self.mlp_pattern
        check(
            has_moe == (self.moe.num_experts > 0),
            f"model.moe.num_experts={self.moe.num_experts} and model.mlp_pattern={self.mlp_pattern} "
            f"disagree: "
            "experts need 'moe' layers, and 'moe' layers need experts",
        )
        check(
            not (self.parallel_block and self.norm_position != "pre"),
            f"model.parallel_block needs norm_position='pre', got {self.norm_position!r}",
        )
        heads = self.attention.num_heads
        if not self.attention.head_dim and self.model_dim % heads:
            raise UserError(
                f"model.model_dim={self.model_dim} is not divisible by model.attention.num_heads={heads}; "
                f"the nearest that is: {max(heads, round(self.model_dim / heads) * heads)}, or set "
                f"attention.head_dim"
            )
        if self.position.kind == "rope":
            pos.rotary_dim(self.position, self.head_dim)  # refuses what cannot be paired
        check_backend(
            self.attention.backend,
            softcap=self.attention.softcap > 0,
            sinks=self.attention.sinks,
            bias=self.position.kind in ("alibi", "t5"),
        )

    @property
    def head_dim(self) -> int:
        """H."""
        return self.attention.head_dim or self.model_dim // self.attention.num_heads

    @property
    def mlp_width(self) -> int:
        """F."""
        return self.mlp_dim or 4 * self.model_dim

    @property
    def layer_kinds(self) -> tuple[tuple[str, str], ...]:
        """(attention kind, mlp kind) of every layer."""
        a, m = self.attention.pattern, self.mlp_pattern
        return tuple((a[i % len(a)], m[i % len(m)]) for i in range(self.num_layers))

    @property
    def period(self) -> int:
        """Layers in the unit that is scanned: the least common multiple of the two patterns, at most L."""
        return min(math.lcm(len(self.attention.pattern), len(self.mlp_pattern)), self.num_layers)

    @property
    def num_moe_layers(self) -> int:
        """How many layers route."""
        return sum(mlp == "moe" for _, mlp in self.layer_kinds)

    def std(self, fan_in: int) -> float:
        """Standard deviation of an initial weight."""
        return self.init_std or fan_in**-0.5


class Block(nn.Module):
    """One layer: self-attention, cross-attention if asked, and a dense or routed MLP, each in its residual
    branch.

    A function of (params, x, context, cache) that returns (x, cache, aux); it holds no state.
    """

    cfg: TransformerConfig
    attention: str = "global"  # global | local
    mlp: str = "dense"  # dense | moe
    cross: bool = False  # attend to ctx.memory_BSD after attending to itself

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        ctx: Context,
        cache: LayerCache | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None, Aux]:
        cfg = self.cfg
        dtypes = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, accum_dtype=cfg.accum_dtype)
        shared = dict(init_std=cfg.std, out_scale=(2 * cfg.num_layers) ** -0.5, **dtypes)
        keys = [None] * 3 if key is None else list(jax.random.split(key, 3))
        aux: Aux = {}

        def norm(name: str, x: Array) -> Array:
            return Norm(cfg.norm, cfg.norm_eps, cfg.param_dtype, name=name)(x)

        def before(name: str, x: Array) -> Array:
            return x if cfg.norm_position == "post" else norm(f"{name}_norm", x)

        def add(name: str, x: Array, branch: Array, key: Array | None) -> Array:
            if cfg.norm_position == "sandwich":
                branch = norm(f"{name}_post_norm", branch)
            x = x + dropout(branch, cfg.dropout, key)
            if cfg.norm_position == "post":
                x = norm(f"{name}_norm", x)
            return constrain(x, "batch", "length", "activation")

        def attention(name: str, x: Array, cache: LayerCache | None, *, cross: bool):
            module = Attention(
                cfg.attention,
                head_dim=cfg.head_dim,
                window=cfg.attention.window if self.attention == "local" and not cross else 0,
                causal=cfg.causal,
                cross=cross,
                interleaved=cfg.position.interleaved,
                norm_eps=cfg.norm_eps,
                name=name,
                **shared,
            )
            return module(x, ctx, cache)

        def feed_forward(x: Array) -> tuple[Array, Aux]:
            if self.mlp == "dense":
                mlp = MLP(cfg.mlp_width, cfg.activation, cfg.mlp_bias, name="mlp", **shared)
                return mlp(x), {}
            real_BT = jnp.ones(x.shape[:2], bool) if ctx.segments_BT is None else ctx.segments_BT != 0
            return MoE(cfg.moe, cfg.mlp_width, cfg.activation, name="moe", **shared)(x, real_BT)

        if cfg.parallel_block:
            y_BTD = norm("attention_norm", x_BTD)
            attended, cache = attention("attention", y_BTD, cache, cross=False)
            fed, aux = feed_forward(y_BTD)
            return add("attention", x_BTD, attended + fed, keys[0]), cache, aux
        attended, cache = attention("attention", before("attention", x_BTD), cache, cross=False)
        x_BTD = add("attention", x_BTD, attended, keys[0])
        if self.cross:
            attended, _ = attention("cross_attention", before("cross", x_BTD), None, cross=True)
            x_BTD = add("cross", x_BTD, attended, keys[1])
        fed, aux = feed_forward(before("mlp", x_BTD))
        return add("mlp", x_BTD, fed, keys[2]), cache, aux


def _blocks(cfg: TransformerConfig) -> list[Block]:
    """The blocks of one period."""
    return [Block(cfg, attention, mlp) for attention, mlp in cfg.layer_kinds[: cfg.period]]


def init(cfg: TransformerConfig, key: Array) -> Params:
    """Parameters of the model.

    Every leaf's key is folded from (key, its path, its layer), so the values do not depend on the mesh, nor
    on whether the layers will be scanned.

    Args:
        cfg: the model.
        key: a threefry key.

    Returns:
        Nested dict as in the module's docstring, in `cfg.param_dtype`.
    """
    table_key, position_key, block_key, head_key = jax.random.split(key, 4)
    V, D = cfg.vocab_size, cfg.model_dim
    ones_BT = jnp.ones((1, 1), jnp.int32)
    x_BTD = jnp.zeros((1, 1, D), cfg.dtype)

    def layer(block: Block, index: Array) -> Params:
        ctx = _context(cfg, ones_BT - 1, ones_BT, None, None)
        with use(None):  # the single dummy token is not to be spread over a mesh
            return block.init(jax.random.fold_in(block_key, index), x_BTD, ctx)["params"]

    blocks, P = _blocks(cfg), cfg.period
    repeats = cfg.num_layers // P
    params: Params = {
        "embed": {"table": normal_init(cfg.std(D))(table_key, (V, D), cfg.param_dtype)},
        "blocks": {
            str(j): jax.vmap(lambda i, b=block: layer(b, i))(jnp.arange(j, repeats * P, P))
            for j, block in enumerate(blocks)
        },
    }
    if cfg.num_layers % P:
        params["tail"] = {
            str(j): layer(blocks[j], jnp.asarray(repeats * P + j))
            for j in range(cfg.num_layers - repeats * P)
        }
    if cfg.position.kind == "learned":
        shape = (cfg.position.max_length, D)
        params["embed"]["positions"] = normal_init(cfg.std(D))(position_key, shape, cfg.param_dtype)
    if cfg.position.kind == "t5":
        shape = (cfg.position.num_buckets, cfg.attention.num_heads)
        params["position_bias"] = {"table": normal_init(cfg.std(D))(position_key, shape, cfg.param_dtype)}
    if cfg.norm_position != "post":
        norm = Norm(cfg.norm, cfg.norm_eps, cfg.param_dtype)
        params["final_norm"] = norm.init(head_key, x_BTD)["params"]
    if not cfg.tie_embeddings:
        params["head"] = {"w": normal_init(cfg.std(D))(head_key, (D, V), cfg.param_dtype)}
    return params


def abstract_params(cfg: TransformerConfig) -> Params:
    """Shapes and dtypes of the parameters, without computing any."""
    return jax.eval_shape(lambda: init(cfg, jax.random.key(0)))


def _context(
    cfg: TransformerConfig,
    positions_BT: Array,
    segments_BT: Array | None,
    allowed_BTS: Array | None,
    position_table: Array | None,
) -> Context:
    """Position tables computed once for all layers."""
    p = cfg.position
    rotation = bias = None
    if p.kind == "rope":
        rotation = {}
        for kind in set(cfg.attention.pattern):
            frequencies, factor = pos.rope_frequencies(p, cfg.head_dim, local=kind == "local")
            rotation[kind] = pos.rope_tables(positions_BT, frequencies, factor)
    elif p.kind == "alibi":
        slopes_N = pos.alibi_slopes(cfg.attention.num_heads)
        bias = lambda q, k: pos.alibi_bias(q, k, slopes_N)  # noqa: E731
    elif p.kind == "t5" and position_table is not None:

        def bias(q: Array, k: Array) -> Array:
            buckets_BTS = pos.t5_buckets(
                q, k, bidirectional=not cfg.causal, num_buckets=p.num_buckets, max_distance=p.max_distance
            )
            return jnp.moveaxis(position_table[buckets_BTS], -1, 1)

    return Context(positions_BT, segments_BT, allowed_BTS, rotation, bias)


def embed(
    cfg: TransformerConfig, params: Params, tokens_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Token embeddings, scaled if asked, plus absolute positions if the scheme has them."""
    x_BTD = gather(params["embed"]["table"], tokens_BT, dtype=cfg.dtype)
    if cfg.scale_embeddings:
        x_BTD = x_BTD * jnp.asarray(cfg.model_dim**0.5, x_BTD.dtype)
    if cfg.position.kind == "learned":
        x_BTD = x_BTD + gather(params["embed"]["positions"], positions_BT, dtype=cfg.dtype)
    elif cfg.position.kind == "sinusoidal":
        x_BTD = x_BTD + pos.sinusoidal(positions_BT, cfg.model_dim).astype(cfg.dtype)
    return constrain(x_BTD, "batch", "length", "activation")


def apply(
    cfg: TransformerConfig,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    *,
    segments_BT: Int[Array, "B T"] | None = None,
    positions_BT: Int[Array, "B T"] | None = None,
    allowed_BTS: Bool[Array, "B T S"] | None = None,
    cache: Params | None = None,
    key: Array | None = None,
) -> tuple[Float[Array, "B T D"], Params | None, Aux]:
    """Hidden states before the unembedding.

    Args:
        cfg: the model.
        params: as made by `init`.
        tokens_BT: token ids in [0, V).
        segments_BT: document number of each token, 0 = padding; tokens see their own document only. With a
        cache,
            0 marks columns that are not written; a row of a cache is one document.
        positions_BT: position in the document, from 0; default the column.
        allowed_BTS: a further mask (training and prefill without a cache).
        cache: as made by `init_cache`; the call's keys and values are written at `positions_BT`.
        key: for dropout; None = no dropout.

    Returns:
        (hidden_BTD in `cfg.dtype`, the new cache or None, aux). `aux` is empty without experts; else `loss`
        is a sum to be added to the loss sum, and the rest are metrics as (sum, weight).
    """
    B, T = tokens_BT.shape
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    if cfg.position.kind == "learned" and cfg.position.max_length < T:
        raise UserError(
            f"{T} columns, but model.position.max_length={cfg.position.max_length} learned positions"
        )
    bias_table = params["position_bias"]["table"] if cfg.position.kind == "t5" else None
    ctx = _context(cfg, positions_BT, segments_BT, allowed_BTS, bias_table)
    embed_key, stack_key = (None, None) if key is None else jax.random.split(key)
    x_BTD = dropout(embed(cfg, params, tokens_BT, positions_BT), cfg.dropout, embed_key)

    blocks, P = _blocks(cfg), cfg.period
    repeats = cfg.num_layers // P

    def layer(block: Block, params_l: Params, x: Array, cache_l: LayerCache | None, index: Array):
        layer_key = None if stack_key is None else jax.random.fold_in(stack_key, index)
        return block.apply({"params": params_l}, x, ctx, cache_l, layer_key)

    def unit(params_u: Params, x: Array, xs: tuple[Params, Array]):
        caches, first = xs
        new_caches, auxes = {}, []
        for j, block in enumerate(blocks):
            x, new_caches[str(j)], aux = layer(block, params_u[str(j)], x, caches.get(str(j)), first + j)
            auxes.append(aux)
        return x, (new_caches, _sum_aux(auxes))

    xs = ({} if cache is None else cache["blocks"], jnp.arange(0, repeats * P, P))
    x_BTD, (new_blocks, aux) = run_stack(unit, params["blocks"], x_BTD, xs, scan=cfg.scan, remat=cfg.remat)
    auxes = [jax.tree.map(lambda a: jnp.sum(a, axis=0), aux)]
    new_cache = None if cache is None else {"blocks": new_blocks}
    for j, params_l in sorted(params.get("tail", {}).items(), key=lambda item: int(item[0])):
        cache_l = None if cache is None else cache["tail"][j]
        index = jnp.asarray(repeats * P + int(j))
        one = rematerialised(partial(layer, blocks[int(j)]), cfg.remat, scan=False)
        x_BTD, cache_l, aux = one(params_l, x_BTD, cache_l, index)
        auxes.append(aux)
        if cache is not None:
            new_cache.setdefault("tail", {})[j] = cache_l
    if "final_norm" in params:
        x_BTD = Norm(cfg.norm, cfg.norm_eps, cfg.param_dtype).apply({"params": params["final_norm"]}, x_BTD)
    aux = _sum_aux(auxes)
    if "loss" in aux:
        aux["loss"] = aux["loss"] / cfg.num_moe_layers
    return x_BTD, new_cache, aux


def _sum_aux(auxes: list[Aux]) -> Aux:
    """Sum of several layers' auxiliary values; dense layers have none."""
    routed = [aux for aux in auxes if aux]
    return jax.tree.map(lambda *a: sum(a[1:], a[0]), *routed) if routed else {}


def unembed(
    cfg: TransformerConfig, params: Params, hidden_BTD: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
    """Logits, in fp32. Reads only `embed/table` or `head/w`."""
    dtypes = dict(dtype=cfg.dtype, accum=cfg.accum_dtype, result="float32", out=("batch", "length", "vocab"))
    with jax.named_scope("unembed"):
        if cfg.tie_embeddings:
            logits_BTV = matmul("BTD,VD->BTV", hidden_BTD, params["embed"]["table"], **dtypes)
        else:
            logits_BTV = matmul("BTD,DV->BTV", hidden_BTD, params["head"]["w"], **dtypes)
    if cfg.logit_softcap:
        logits_BTV = cfg.logit_softcap * jnp.tanh(logits_BTV / cfg.logit_softcap)
    return logits_BTV


def init_cache(cfg: TransformerConfig, batch: int, length: int) -> Params:
    """An empty cache for `batch` rows of up to `length` positions; local layers keep `window` slots.

    Raises:
        UserError: more positions than the model has learned embeddings for.
    """
    if cfg.position.kind == "learned":
        check(
            length <= cfg.position.max_length,
            f"{length} positions, but model.position.max_length={cfg.position.max_length} learned positions",
        )

    def layer(kind: str) -> LayerCache:
        slots = min(cfg.attention.window, length) if kind == "local" else length
        return empty(batch, slots, cfg.attention.kv_heads, cfg.head_dim, cfg.dtype)

    kinds, P = cfg.layer_kinds, cfg.period
    repeats = cfg.num_layers // P
    stack = lambda tree: jax.tree.map(lambda a: jnp.broadcast_to(a, (repeats, *a.shape)), tree)  # noqa: E731
    cache: Params = {"blocks": {str(j): stack(layer(kinds[j][0])) for j in range(P)}}
    if cfg.num_layers % P:
        tail = range(repeats * P, cfg.num_layers)
        cache["tail"] = {str(j): layer(kinds[i][0]) for j, i in enumerate(tail)}
    return cache
