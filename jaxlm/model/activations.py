"""What every layer computes on a batch: for looking at a model, not for training it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.model.attention import Attention
from jaxlm.model.config import TransformerConfig
from jaxlm.model.convolution import after_layer
from jaxlm.model.heads import norm, unembed
from jaxlm.model.latent_attention import LatentAttention
from jaxlm.model.layers import MLP
from jaxlm.model.moe import MoE
from jaxlm.model.transformer import (
    Params,
    blocks_of,
    embed,
    in_use,
    last_norm,
    make_context,
    position_table,
)


def activations(
    cfg: TransformerConfig,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    *,
    segments_BT: Int[Array, "B T"] | None = None,
    positions_BT: Int[Array, "B T"] | None = None,
    types_BT: Int[Array, "B T"] | None = None,
    memory_BSD: Float[Array, "B S D"] | None = None,
    memory_segments_BS: Int[Array, "B S"] | None = None,
) -> dict[str, Float[Array, "..."]]:
    """The branches and the stream of every layer, as `apply` computes them without dropout.

    Args:
        cfg, params, tokens_BT, segments_BT, positions_BT, types_BT, memory_BSD, memory_segments_BS: as for
            `apply`.

    Returns:
        `embedding` [B, T, D]; `attention`, `mlp` and `residual` [L, B, T, D]: each layer's branches before
        they are added, and the stream after it; `hidden` [B, T, D], what `apply` returns; `logits` [B, T, V],
        if there is a head for them.
    """
    B, T = tokens_BT.shape
    ordered = positions_BT is None
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    ctx = make_context(cfg, positions_BT, segments_BT, None, position_table(cfg, params))
    memory = dict(memory_BSD=memory_BSD, memory_segments_BS=memory_segments_BS)
    ctx = dataclasses.replace(ctx, ordered=ordered, **memory)
    x_BTD = embed(cfg, params, tokens_BT, positions_BT, types_BT)
    after = after_layer(cfg.convolution, params, norm(cfg), x_BTD, segments_BT, cfg.dtype, cfg.accum_dtype)
    seen: dict[str, Any] = {"embedding": x_BTD, "attention": [], "mlp": [], "residual": []}
    branch = lambda module, _: isinstance(module, Attention | LatentAttention | MLP | MoE)  # noqa: E731
    for i, block in enumerate(blocks_of(cfg)):
        where, row = cfg.place(i)
        part, key = where.split("/")
        params_l = params[part][key]
        if row is not None:
            params_l = jax.tree.map(lambda a, row=row: a[row], params_l)
        (x_BTD, _, _), captured = block.apply(
            {"params": in_use(cfg, params_l)},
            x_BTD,
            ctx,
            capture_intermediates=branch,
            mutable=["intermediates"],
        )
        x_BTD = after(x_BTD, jnp.asarray(i))
        outputs = {name: calls["__call__"][0] for name, calls in captured["intermediates"].items()}
        mlp = outputs["mlp"] if "mlp" in outputs else outputs["moe"][0]
        for name, x in (("attention", outputs["attention"][0]), ("mlp", mlp), ("residual", x_BTD)):
            seen[name].append(x)
    x_BTD = last_norm(cfg, params, x_BTD)
    seen = {name: jnp.stack(x) if isinstance(x, list) else x for name, x in seen.items()}
    logits = {"logits": unembed(cfg, params, x_BTD)} if cfg.unembeds else {}
    return {**seen, "hidden": x_BTD, **logits}
