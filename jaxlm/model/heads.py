"""Heads: logits of the vocabulary, and what else is said of a row of tokens or of each of them.

    head/w [D, V], head/b [V]                untied models; `head_bias`
    transform/w [D, E], transform/b [E]      `head_transform`, with `transform_norm`; the head is then [E, V]
    pooler/w [D, D], pooler/b [D]            if `readout.dense` names an activation
    classifier/w [D, C], classifier/b [C]    if there are `readout.classes`

One readout is next-sentence prediction (2 classes of the first token, through a dense layer and tanh),
classification of a row by its first token or its last, and of every token, according to `cfg.readout`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.errors import check
from jaxlm.model.axes import AXES
from jaxlm.model.config import TransformerConfig
from jaxlm.model.layers import ACTIVATIONS, Norm, dropout, normal_init
from jaxlm.model.parametrization import initial_std, rules
from jaxlm.weights import lay_out, matmul

Params = dict[str, Any]


def norm(cfg: TransformerConfig, name: str | None = None) -> Norm:
    """A norm of the model's kind."""
    return Norm(cfg.norm, cfg.norm_eps, cfg.param_dtype, cfg.norm_offset, name=name)


def init(cfg: TransformerConfig, key: Array) -> Params:
    """`head`, `transform`, `pooler` and `classifier`, those that the model has."""
    D, E, V, C = cfg.model_dim, cfg.embed_width, cfg.vocab_size, cfg.readout.classes
    params: Params = {}

    def matrix(key: Array, inputs: int, outputs: int) -> Params:
        draw = normal_init(initial_std(cfg, "head", inputs))
        return {"w": draw(key, (inputs, outputs), cfg.param_dtype)}

    if not cfg.tie_embeddings:
        params["head"] = matrix(key, E if cfg.head_transform else D, V)
    if cfg.head_bias:
        params.setdefault("head", {})["b"] = jnp.zeros((V,), cfg.param_dtype)
    if cfg.head_transform:
        params["transform"] = dense_init(cfg, jax.random.fold_in(key, 1), D, E)
        if scale := norm(cfg).init(key, jnp.zeros((1, E), cfg.dtype)):
            params["transform_norm"] = scale["params"]
    if cfg.readout.dense:
        params["pooler"] = dense_init(cfg, jax.random.fold_in(key, 2), D, D)
    if C:
        params["classifier"] = matrix(jax.random.fold_in(key, 3), D, C)
        if cfg.readout.bias:
            params["classifier"]["b"] = jnp.zeros((C,), cfg.param_dtype)
    return params


def dense_init(cfg: TransformerConfig, key: Array, inputs: int, outputs: int) -> Params:
    """Weight and bias of a layer outside the blocks."""
    draw = normal_init(initial_std(cfg, "hidden", inputs))
    return {"w": draw(key, (inputs, outputs), cfg.param_dtype), "b": jnp.zeros((outputs,), cfg.param_dtype)}


def dense(cfg: TransformerConfig, params: Params, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
    """x w + b, of a layer outside the blocks."""
    dtypes = dict(dtype=cfg.dtype, accum=cfg.accum_dtype)
    y_BTE = matmul("BTD,DE->BTE", x_BTD, params["w"], out=("batch", "length", "activation"), **dtypes)
    return y_BTE + params["b"].astype(cfg.dtype)


def head(cfg: TransformerConfig, params: Params) -> Params:
    """The part of the parameters that `unembed` reads, laid out for use."""
    part = {name: params[name] for name in ("head", "transform", "transform_norm") if name in params}
    if cfg.tie_embeddings:
        part["embed"] = {"table": params["embed"]["table"]}
    return lay_out(part, AXES, cfg.dtype)


def unembed(
    cfg: TransformerConfig, params: Params, hidden_BTD: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
    """Logits, in fp32. Reads only what `head` gives."""
    check(
        cfg.unembeds,
        f"model.embed_dim={cfg.embed_dim}: a tied table of that width needs model.head_transform=True to "
        f"give logits of hidden states of width {cfg.model_dim}",
    )
    dtypes = dict(dtype=cfg.dtype, accum=cfg.accum_dtype, result="float32", out=("batch", "length", "vocab"))
    params = head(cfg, params)
    if cfg.head_transform:
        hidden_BTD = dense(cfg, params["transform"], hidden_BTD)
        hidden_BTD = ACTIVATIONS[cfg.activation][0](hidden_BTD)
        hidden_BTD = norm(cfg).apply({"params": params.get("transform_norm", {})}, hidden_BTD)
    with jax.named_scope("unembed"):
        if cfg.tie_embeddings:
            logits_BTV = matmul("BTD,VD->BTV", hidden_BTD, params["embed"]["table"], **dtypes)
        else:
            logits_BTV = matmul("BTD,DV->BTV", hidden_BTD, params["head"]["w"], **dtypes)
    if cfg.head_bias:
        logits_BTV = logits_BTV + params["head"]["b"].astype(jnp.float32)
    if (scale := cfg.logit_scale * rules(cfg)["head"].output) != 1.0:
        logits_BTV = logits_BTV * scale
    if cfg.logit_softcap:
        logits_BTV = cfg.logit_softcap * jnp.tanh(logits_BTV / cfg.logit_softcap)
    return logits_BTV


def taken(
    of: str, hidden_BTD: Float[Array, "B T D"], segments_BT: Int[Array, "B T"] | None = None
) -> Float[Array, "B U D"]:
    """What stands for a row: one vector (U = 1), or every token's own (U = T).

    Args:
        of: first | last | mean | each; of the row's tokens, wherever its padding stands.
        hidden_BTD: hidden states.
        segments_BT: 0 = padding; None = there is none. A row of several documents counts as one.

    >>> x_BTD = jnp.arange(4.0)[None, :, None]
    >>> [taken(of, x_BTD, jnp.array([[0, 1, 1, 0]])).item() for of in ("first", "last", "mean")]
    [1.0, 2.0, 1.5]
    """
    if of == "each":
        return hidden_BTD
    real_BT = jnp.ones(hidden_BTD.shape[:2], bool) if segments_BT is None else segments_BT != 0
    if of == "mean":
        total_BUD = jnp.sum(hidden_BTD.astype(jnp.float32) * real_BT[:, :, None], axis=1, keepdims=True)
        mean_BUD = total_BUD / jnp.maximum(jnp.sum(real_BT, axis=1), 1)[:, None, None]
        return mean_BUD.astype(hidden_BTD.dtype)
    column_B = jnp.argmax(real_BT, axis=1)
    if of == "last":
        column_B = real_BT.shape[1] - 1 - jnp.argmax(real_BT[:, ::-1], axis=1)
    # Not a gather: where a mesh splits the columns and a device has one row, jaxlib 0.10.2 gets its gradient,
    # a scatter, wrong inside a scan over microbatches. All terms of the sum but one are zero.
    chosen_BT = jnp.arange(real_BT.shape[1]) == column_B[:, None]
    return jnp.sum(jnp.where(chosen_BT[:, :, None], hidden_BTD, 0), axis=1, keepdims=True)


def pool(
    cfg: TransformerConfig,
    params: Params,
    hidden_BTD: Float[Array, "B T D"],
    segments_BT: Int[Array, "B T"] | None = None,
) -> Float[Array, "B U D"]:
    """What the classes are read from: `taken`, through the dense layer and its activation if there are any.

    Returns:
        [B, 1, D], or [B, T, D] of a readout of each token, in `cfg.dtype`.
    """
    x_BUD = taken(cfg.readout.of, hidden_BTD, segments_BT)
    if cfg.readout.dense:
        x_BUD = dense(cfg, lay_out({"pooler": params["pooler"]}, AXES, cfg.dtype)["pooler"], x_BUD)
        x_BUD = ACTIVATIONS[cfg.readout.dense][0](x_BUD)
    return x_BUD


def class_logits(
    cfg: TransformerConfig,
    params: Params,
    hidden_BTD: Float[Array, "B T D"],
    segments_BT: Int[Array, "B T"] | None = None,
    *,
    key: Array | None = None,
) -> Float[Array, "B ..."]:
    """Logits of the classes.

    Args:
        cfg, params: the whole model's; reads `pooler` and `classifier`.
        hidden_BTD: as `transformer.apply` gives them.
        segments_BT: 0 = padding; None = there is none.
        key: for dropout of what the classes are read from; None = none.

    Returns:
        [B, C], or [B, T, C] of a readout of each token, in fp32.

    Raises:
        UserError: the model has no classes.
    """
    check(cfg.readout.classes > 0, "model.readout.classes=0: this model has no classes to predict")
    x_BUD = dropout(pool(cfg, params, hidden_BTD, segments_BT), cfg.dropout, key)
    w = lay_out({"classifier": params["classifier"]}, AXES, cfg.dtype)["classifier"]
    dtypes = dict(dtype=cfg.dtype, accum=cfg.accum_dtype, result="float32")
    logits_BUC = matmul("BTD,DC->BTC", x_BUD, w["w"], out=("batch", "length", None), **dtypes)
    logits_BUC = logits_BUC * rules(cfg)["head"].output
    if cfg.readout.bias:
        logits_BUC = logits_BUC + w["b"].astype(jnp.float32)
    return logits_BUC if cfg.readout.of == "each" else logits_BUC[:, 0]
