"""The transformer: its block, the table of layouts, and init / apply / unembed.

Linen stops at the block. Above it everything is plain JAX over a nested dict of arrays:

    embed/table [V, D]
    first/I/...                   the `first_dense` leading layers, unstacked
    blocks/J/... [L / P, ...]     one stacked tree per layer J of the period of P layers
    tail/J/...                    the layers that are left when P does not divide L, unstacked
    final_norm/scale [D]
    head/w [D, V]                 untied models
    encoder/...                   the same again, of the stack that `encoder_of` gives, see `encoder_decoder`
    pooler, classifier            see jaxlm.model.heads
"""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.errors import UserError, check
from jaxlm.model import heads
from jaxlm.model import positions as pos
from jaxlm.model.attention import Attention, Context
from jaxlm.model.axes import AXES, BY_HAND, EXACT, STREAM
from jaxlm.model.cache import LayerCache, MemoryCache, empty, empty_memory
from jaxlm.model.config import TransformerConfig, encoder_of
from jaxlm.model.context_parallel import CONTEXTS, check_columns
from jaxlm.model.context_parallel import zigzag as in_zigzag
from jaxlm.model.convolution import after_layer, convolution_init
from jaxlm.model.heads import norm as _norm
from jaxlm.model.heads import unembed as unembed  # beside `init` and `apply`
from jaxlm.model.latent_attention import LatentAttention
from jaxlm.model.layers import MLP, dropout, normal_init
from jaxlm.model.moe import MoE
from jaxlm.model.parametrization import attention_config, initial_std, out_scale, rules
from jaxlm.pipeline import run_layers
from jaxlm.quant import mark
from jaxlm.sharding import constrain, current, split_axes, use
from jaxlm.stack import rematerialised, run_stack
from jaxlm.tree import map_named
from jaxlm.weights import gather, lay_out

Params = dict[str, Any]
Aux = dict[str, Any]


class Block(nn.Module):
    """One layer: self-attention, cross-attention if asked, an MLP dense or routed; each in a residual branch.

    A function of (params, x, context, cache) that returns (x, cache, aux); it holds no state.
    """

    cfg: TransformerConfig
    attention: str = "global"  # global | local | nope
    mlp: str = "dense"  # dense | moe
    cross: bool = False  # attend to ctx.memory_BSD after attending to itself

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        ctx: Context,
        cache: LayerCache | tuple[LayerCache, MemoryCache] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | tuple[LayerCache, MemoryCache] | None, Aux]:
        cfg = self.cfg
        dtypes = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, accum_dtype=cfg.accum_dtype)
        shared = dict(init_std=partial(initial_std, cfg, "hidden"), out_scale=out_scale(cfg), **dtypes)
        rule = rules(cfg)
        keys = [None] * 3 if key is None else list(jax.random.split(key, 3))
        aux: Aux = {}

        def norm(name: str, x: Array) -> Array:
            return _norm(cfg, name=name)(x)

        def before(name: str, x: Array) -> Array:
            x = norm(f"{name}_norm", x) if cfg.norm_position in ("pre", "sandwich") else x
            # Here the columns of the stream come together; what flows back is summed into parts again.
            return constrain(x, *STREAM[:1], "length", *STREAM[2:], gradient=STREAM)

        def add(name: str, x: Array, branch: Array, key: Array | None) -> Array:
            if cfg.norm_position in ("sandwich", "branch"):
                branch = norm(f"{name}_post_norm", branch)
            if rule["residual"].output != 1.0:
                branch = branch * rule["residual"].output
            x = x + dropout(branch, cfg.dropout, key)
            if cfg.norm_position == "post":
                x = norm(f"{name}_norm", x)
            return constrain(x, *STREAM)

        def attention(name: str, x: Array, cache: LayerCache | None, *, cross: bool):
            same = dict(
                window=cfg.attention.window if self.attention == "local" and not cross else 0,
                causal=cfg.causal,
                rotates=self.attention != "nope" and not cross,
                interleaved=cfg.position.interleaved,
                norm_offset=cfg.norm_offset,
                name=name,
                **shared,
            )
            if cfg.attention.latent.kv_rank and not cross:
                return LatentAttention(attention_config(cfg), **same)(x, ctx, cache)
            own = dict(head_dim=cfg.head_dim, cross=cross, norm_eps=cfg.norm_eps)
            own["disentangled"] = cfg.disentangled
            return Attention(attention_config(cfg), **own, **same)(x, ctx, cache)

        def feed_forward(x: Array) -> tuple[Array, Aux]:
            if self.mlp == "dense":
                sizes = (cfg.mlp_width, cfg.activation, cfg.mlp_bias)
                mlp = MLP(*sizes, gate_limit=cfg.gate_limit, name="mlp", **shared)
                return mlp(x), {}
            real_BT = jnp.ones(x.shape[:2], bool) if ctx.segments_BT is None else ctx.segments_BT != 0
            router = dict(
                router_std=initial_std(cfg, "router", cfg.model_dim), router_scale=rule["router"].output
            )
            sizes = (cfg.moe, cfg.mlp_width, cfg.activation)
            moe = MoE(*sizes, gate_limit=cfg.gate_limit, name="moe", **router, **shared)
            return moe(x, real_BT)

        if cfg.parallel_block:
            y_BTD = before("attention", x_BTD)
            attended, cache = attention("attention", y_BTD, cache, cross=False)
            fed, aux = feed_forward(before("mlp", x_BTD) if cfg.parallel_norms else y_BTD)
            return add("attention", x_BTD, attended + fed, keys[0]), cache, aux
        own, memory = cache if self.cross and cache is not None else (cache, None)
        attended, own = attention("attention", before("attention", x_BTD), own, cross=False)
        x_BTD = add("attention", x_BTD, attended, keys[0])
        if self.cross:
            attended, memory = attention("cross_attention", before("cross", x_BTD), memory, cross=True)
            x_BTD = add("cross", x_BTD, attended, keys[1])
        cache = own if memory is None else (own, memory)
        fed, aux = feed_forward(before("mlp", x_BTD))
        return add("mlp", x_BTD, fed, keys[2]), cache, aux


def blocks_of(cfg: TransformerConfig) -> list[Block]:
    """The blocks of all layers."""
    return [Block(cfg, *kinds, cross=cfg.has_encoder) for kinds in cfg.layer_kinds]


def init(cfg: TransformerConfig, key: Array, *, init_scale: Float[Array, ""] | float = 1.0) -> Params:
    """Parameters of the model.

    Every layer's key is folded from the key and its index, and its leaves' from that and their paths; what
    stands beside the layers has keys of its own. So the values depend neither on the mesh nor on whether the
    layers will be scanned.

    Args:
        cfg: the model.
        key: a threefry key.
        init_scale: multiplies every weight that is drawn, traced if one likes: as `cfg.init_std` does.

    Returns:
        Nested dict as in the module's docstring, in `cfg.param_dtype`.
    """
    table_key, position_key, block_key, head_key = jax.random.split(key, 4)
    V, D, E = cfg.vocab_size, cfg.model_dim, cfg.embed_width
    ones_BT = jnp.ones((1, 1), jnp.int32)
    x_BTD, e_BTE = jnp.zeros((1, 1, D), cfg.dtype), jnp.zeros((1, 1, E), cfg.dtype)
    distances_RD = jnp.zeros((cfg.disentangled.rows, D), cfg.dtype)

    def layer(block: Block, index: Array) -> Params:
        ctx = make_context(cfg, ones_BT - 1, ones_BT, None, None)
        memory_BSD = x_BTD if cfg.has_encoder else None
        ctx = dataclasses.replace(ctx, distances_RD=distances_RD, memory_BSD=memory_BSD)
        with use(None):  # the single dummy token is not to be spread over a mesh
            return block.init(jax.random.fold_in(block_key, index), x_BTD, ctx)["params"]

    embedding_init = normal_init(initial_std(cfg, "embedding", E))
    blocks, P, first = blocks_of(cfg), cfg.period, cfg.first_dense
    last, step = first + cfg.repeats * P, P * cfg.shared_layers
    params: Params = {
        "embed": {"table": embedding_init(table_key, (V, E), cfg.param_dtype)},
        "blocks": {
            str(j): jax.vmap(lambda i, b=blocks[first + j]: layer(b, i))(jnp.arange(first + j, last, step))
            for j in range(P)
        },
    }
    for name, start, stop in (("first", 0, first), ("tail", last, cfg.num_layers)):
        if stop > start:
            loose = range(start, stop)
            params[name] = {str(i - start): layer(blocks[i], jnp.asarray(i)) for i in loose}
    if cfg.position.kind == "learned":
        shape = (cfg.position.offset + cfg.position.max_length, E)
        params["embed"]["positions"] = embedding_init(position_key, shape, cfg.param_dtype)
    if cfg.position.kind == "t5":
        shape = (cfg.position.num_buckets, cfg.attention.num_heads)
        params["position_bias"] = {
            "table": normal_init(initial_std(cfg, "vector", D))(position_key, shape, cfg.param_dtype)
        }
    if (norm := _norm(cfg).init(head_key, x_BTD)) and cfg.norm_position != "post":
        params["final_norm"] = norm["params"]
    if cfg.disentangled.span:
        vectors = normal_init(initial_std(cfg, "vector", D))
        rows_RD = vectors(jax.random.fold_in(position_key, 2), distances_RD.shape, cfg.param_dtype)
        params["distances"] = {"table": rows_RD}
        if norm and cfg.disentangled.norm:
            params["distances_norm"] = norm["params"]
    if cfg.convolution.width:
        std = initial_std(cfg, "hidden", cfg.convolution.width * D)
        kernel = convolution_init(cfg.convolution, D, std, jax.random.fold_in(table_key, 2), cfg.param_dtype)
        params |= {"convolution": kernel, **({"convolution_norm": norm["params"]} if norm else {})}
    if cfg.embed_dim:
        params["projection"] = heads.dense_init(cfg, jax.random.fold_in(table_key, 1), E, D)
    if norm and cfg.embed_norm:
        params["embed_norm"] = _norm(cfg).init(head_key, e_BTE)["params"]
    params |= heads.init(cfg, head_key)
    if cfg.token_types:
        types = embedding_init(jax.random.fold_in(position_key, 1), (cfg.token_types, E), cfg.param_dtype)
        params["embed"]["types"] = types
    if cfg.has_encoder:
        encoder = init(encoder_of(cfg), jax.random.fold_in(head_key, 3))
        own = {n: x for n, x in encoder.pop("embed").items() if n != "table" or cfg.encoder.vocab_size}
        params["encoder"] = {**encoder, "embed": own} if own else encoder
    if isinstance(init_scale, float) and init_scale == 1.0:
        return params
    # Norms start at 1 and are not drawn; biases start at 0.
    rescaled = lambda p: (p.astype(jnp.float32) * init_scale).astype(p.dtype)  # noqa: E731
    return map_named(lambda name, p: p if name.endswith("/scale") else rescaled(p), params)


def abstract_params(cfg: TransformerConfig) -> Params:
    """Shapes and dtypes of the parameters, without computing any."""
    return jax.eval_shape(lambda: init(cfg, jax.random.key(0)))


def make_context(
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
            frequencies, factor = pos.rope_frequencies(p, cfg.rope_dim, local=kind == "local")
            if p.scaling in pos.BY_LENGTH:
                frequencies = pos.dynamic_frequencies(p, cfg.rope_dim, positions_BT)
            rotation[kind] = pos.rope_tables(positions_BT, frequencies, factor)
    elif p.kind == "alibi":
        slopes_N = pos.alibi_slopes(cfg.attention.num_heads) * p.bias_scale
        bias = lambda q, k: pos.alibi_bias(q, k, slopes_N)  # noqa: E731
    elif p.kind == "t5" and position_table is not None:  # else parameters are being made

        def bias(q: Array, k: Array) -> Array:
            buckets_BTS = pos.t5_buckets(
                q, k, bidirectional=not cfg.causal, num_buckets=p.num_buckets, max_distance=p.max_distance
            )
            return jnp.moveaxis(position_table[buckets_BTS], -1, 1)

    distances_RD = position_table if cfg.disentangled.span else None
    return Context(positions_BT, segments_BT, allowed_BTS, rotation, bias, distances_RD)


def position_table(cfg: TransformerConfig, params: Params) -> Array | None:
    """What all layers look positions up in, for `make_context`."""
    if cfg.position.kind == "t5":
        return params["position_bias"]["table"]
    if not cfg.disentangled.span:
        return None
    rows_RD = params["distances"]["table"].astype(cfg.dtype)
    if cfg.disentangled.norm:
        rows_RD = _norm(cfg).apply({"params": params.get("distances_norm", {})}, rows_RD)
    return rows_RD


def embed(
    cfg: TransformerConfig,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    types_BT: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Token embeddings, scaled if asked, plus types and absolute positions if the model has them."""
    x_BTD = gather(params["embed"]["table"], tokens_BT, AXES["embed/table"], dtype=cfg.dtype)
    if cfg.scale_embeddings:
        scale = cfg.embed_width**0.5 * rules(cfg)["embedding"].output
        x_BTD = x_BTD * jnp.asarray(scale, x_BTD.dtype)
    if cfg.position.kind == "learned":
        rows_BT = positions_BT + cfg.position.offset
        x_BTD = x_BTD + gather(
            params["embed"]["positions"], rows_BT, AXES["embed/positions"], dtype=cfg.dtype
        )
    elif cfg.position.kind == "sinusoidal":
        rows_BT = positions_BT + cfg.position.offset
        x_BTD = x_BTD + pos.sinusoidal(rows_BT, cfg.embed_width, cfg.position.sines).astype(cfg.dtype)
    if cfg.token_types:
        types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
        x_BTD = x_BTD + gather(params["embed"]["types"], types_BT, AXES["embed/types"], dtype=cfg.dtype)
    if cfg.embed_norm:
        x_BTD = _norm(cfg).apply({"params": params.get("embed_norm", {})}, x_BTD)
    if cfg.embed_dim:
        projection = lay_out({"projection": params["projection"]}, AXES, cfg.dtype)["projection"]
        x_BTD = heads.dense(cfg, projection, x_BTD)
    return constrain(x_BTD, *STREAM)


def apply(
    cfg: TransformerConfig,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    *,
    segments_BT: Int[Array, "B T"] | None = None,
    positions_BT: Int[Array, "B T"] | None = None,
    allowed_BTS: Bool[Array, "B T S"] | None = None,
    types_BT: Int[Array, "B T"] | None = None,
    memory_BSD: Float[Array, "B S D"] | None = None,
    memory_segments_BS: Int[Array, "B S"] | None = None,
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
        positions_BT: position in the document, from 0; default the column. With segments they must grow along
            a document: a causal query is not compared with later columns then.
        allowed_BTS: a further mask, of a call without a cache.
        types_BT: kind of each token, in [0, cfg.token_types); default 0 (BERT's first and second sentence).
        memory_BSD: what an encoder made of the inputs, for a model that has one; a call with a cache that
            holds it already goes without.
        memory_segments_BS: its documents; a token sees those of its own number. Default: all of its row.
        cache: as made by `init_cache`; the call's keys and values are written at `positions_BT`.
        key: for dropout; None = none. A ring draws in its own order of columns and a pipeline by microbatch:
            other masks than on one device, as likely.

    Returns:
        (hidden_BTD in `cfg.dtype`, the new cache or None, aux). `aux` is empty without experts; else `loss`
        is a sum to be added to the loss sum, and the rest are metrics as (sum, weight).

    Raises:
        UserError: more columns than learned positions, no inputs for a model with an encoder, a further mask
            beside a cache, or columns that the mesh does not divide.
    """
    B, T = tokens_BT.shape
    ordered = positions_BT is None or segments_BT is not None  # rows without documents may hold any positions
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    if cfg.position.kind == "learned" and cfg.position.max_length < T:
        raise UserError(
            f"{T} columns, but model.position.max_length={cfg.position.max_length} learned positions"
        )
    if cfg.has_encoder:
        check(
            memory_BSD is not None or cache is not None, "a model with an encoder needs inputs to attend to"
        )
    check(
        cache is None or allowed_BTS is None,
        "allowed_BTS is a mask of a call's own columns, and this call reads a cache; leave one of them out",
    )
    zigzag = CONTEXTS[cfg.attention.context].zigzag and ordered and cfg.causal and cache is None
    if cache is None:
        check_columns(T, current(), zigzag=zigzag)
    if zigzag := zigzag and bool(split_axes("length")):
        tokens_BT, positions_BT = in_zigzag(tokens_BT), in_zigzag(positions_BT)
        segments_BT = None if segments_BT is None else in_zigzag(segments_BT)
    embed_key, stack_key = (None, None) if key is None else jax.random.split(key)
    rows = {"positions_BT": positions_BT, "segments_BT": segments_BT, "allowed_BTS": allowed_BTS}
    memory = {"memory_BSD": memory_BSD, "memory_segments_BS": memory_segments_BS}
    shared = {"position_table": position_table(cfg, params), "key": stack_key, **memory}
    x_BTD = dropout(embed(cfg, params, tokens_BT, positions_BT, types_BT), cfg.dropout, embed_key)
    after = after_layer(cfg.convolution, params, _norm(cfg), x_BTD, segments_BT, cfg.dtype, cfg.accum_dtype)

    blocks, P, first_dense = blocks_of(cfg), cfg.period, cfg.first_dense
    scanned = range(first_dense, first_dense + cfg.repeats * P)

    def layer_of(rows: Params, shared: Params, part: Array | None = None):
        """What one layer does with these rows; `part` is their microbatch in a pipeline."""
        ctx = make_context(cfg, **rows, position_table=shared["position_table"])
        given = {name: shared[name] for name in memory}
        ctx = dataclasses.replace(ctx, ordered=ordered and not zigzag, zigzag=zigzag, **given)
        key = shared["key"]
        if key is not None and part is not None:
            key = jax.random.fold_in(key, part)

        def layer(block: Block, params_l: Params, x: Array, cache_l: LayerCache | None, index: Array):
            layer_key = None if key is None else jax.random.fold_in(key, index)
            x, cache_l, aux = block.apply({"params": params_l}, x, ctx, cache_l, layer_key)
            return after(x, index), cache_l, aux

        return layer

    def unit_of(rows: Params, shared: Params, part: Array | None = None):
        layer = layer_of(rows, shared, part)

        def unit(params_u: Params, x: Array, xs: tuple[Params, Array]):
            params_u = in_use(cfg, params_u)
            caches, first = xs
            new_caches, auxes = {}, []
            for j, block in enumerate(blocks[first_dense : first_dense + P]):
                x, new_caches[str(j)], aux = layer(block, params_u[str(j)], x, caches.get(str(j)), first + j)
                auxes.append(aux)
            return x, (new_caches, _sum_aux(auxes))

        return unit

    auxes, new_cache, layer = [], {}, layer_of(rows, shared)

    def loose(part: str, start: int, x: Array) -> Array:
        """The layers beside the scanned ones."""
        for j, params_l in sorted(params.get(part, {}).items(), key=lambda item: int(item[0])):
            index = start + int(j)
            cache_l = None if cache is None else cache[part][j]

            def one(params_l: Params, *rest: Any, block: Block = blocks[index]):
                return layer(block, in_use(cfg, params_l), *rest)

            run = rematerialised(one, cfg.remat, scan=False)
            x, cache_l, aux = run(params_l, x, cache_l, jnp.asarray(index))
            auxes.append(aux)
            new_cache.setdefault(part, {})[j] = cache_l
        return x

    x_BTD = loose("first", 0, x_BTD)
    xs = ({}, jnp.arange(scanned.start, scanned.stop, P))
    how = dict(scan=cfg.scan, remat=cfg.remat, uses=cfg.shared_layers)
    if cache is None:
        x_BTD, (new_blocks, aux) = run_layers(unit_of, params["blocks"], x_BTD, xs, rows, shared, **how)
    else:  # under a pipeline too, where each device then reads every stage's layers: slow, and right
        xs = (cache["blocks"], xs[1])
        x_BTD, (new_blocks, aux) = run_stack(unit_of(rows, shared), params["blocks"], x_BTD, xs, **how)
    auxes.append(jax.tree.map(lambda a: jnp.sum(a, axis=0), aux))
    new_cache["blocks"] = new_blocks
    x_BTD = loose("tail", scanned.stop, x_BTD)
    x_BTD = last_norm(cfg, params, x_BTD)
    if zigzag:
        x_BTD = in_zigzag(x_BTD, back=True)
    aux = _sum_aux(auxes)
    if "loss" in aux:
        aux["loss"] = aux["loss"] / cfg.num_moe_layers
    return x_BTD, None if cache is None else new_cache, aux


def in_use(cfg: TransformerConfig, params: Params) -> Params:
    """The parameters of a layer, or of several, as its products read them."""
    return mark(lay_out(params, AXES, cfg.dtype, exact=EXACT, left=BY_HAND), cfg.quant)


def last_norm(cfg: TransformerConfig, params: Params, x_BTD: Array) -> Array:
    """The norm after the last layer, which a stack whose layers end in one does without."""
    if cfg.norm_position == "post":
        return x_BTD
    return _norm(cfg).apply({"params": params.get("final_norm", {})}, x_BTD)


def _sum_aux(auxes: list[Aux]) -> Aux:
    """Sum of several layers' auxiliary values; dense layers have none."""
    routed = [aux for aux in auxes if aux]
    return jax.tree.map(lambda *a: sum(a[1:], a[0]), *routed) if routed else {}


def init_cache(cfg: TransformerConfig, batch: int, length: int, memory_length: int = 0) -> Params:
    """An empty cache for `batch` rows of up to `length` positions; local layers keep `window` slots.

    Of a model with an encoder it also has room for the keys and values of `memory_length` inputs a row, which
    the first call fills in.

    Raises:
        UserError: more positions than the model has learned embeddings for.
    """
    if cfg.position.kind == "learned":
        check(
            length <= cfg.position.max_length,
            f"{length} positions, but model.position.max_length={cfg.position.max_length} learned positions",
        )

    latent = cfg.attention.latent

    def layer(i: int) -> LayerCache | tuple[LayerCache, MemoryCache]:
        slots = min(cfg.attention.window, length) if cfg.layer_kinds[i][0] == "local" else length
        if latent.kv_rank:
            return empty(batch, slots, 1, latent.kv_rank + latent.rope_dim, cfg.dtype, value_dim=0)
        sizes = dict(num_kv_heads=cfg.attention.kv_heads, head_dim=cfg.head_dim, dtype=cfg.dtype)
        own = empty(batch, slots, **sizes)
        return (own, empty_memory(batch, memory_length, **sizes)) if cfg.has_encoder else own

    cache: Params = {}
    stack = lambda tree: jax.tree.map(lambda a: jnp.broadcast_to(a, (cfg.repeats, *a.shape)), tree)  # noqa: E731
    for i in range(cfg.num_layers):
        where, row = cfg.place(i)
        part, j = where.split("/")
        if row in (None, 0):
            cache.setdefault(part, {})[j] = layer(i) if row is None else stack(layer(i))
    return cache
