"""Heads beside the vocabulary's: what is said of a row of tokens, or of each of them.

    pooler/w [D, D], pooler/b [D]            if `readout.dense` names an activation
    classifier/w [D, C], classifier/b [C]    if there are `readout.classes`

One head is next-sentence prediction (2 classes of the first token, through a dense layer and tanh),
classification of a row by its first token or its last, and of every token, according to `cfg.readout`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.errors import check
from jaxlm.model.axes import AXES
from jaxlm.model.config import TransformerConfig
from jaxlm.model.layers import ACTIVATIONS, dropout, normal_init
from jaxlm.model.parametrization import initial_std, rules
from jaxlm.weights import lay_out, matmul

Params = dict[str, Any]


def init(cfg: TransformerConfig, key: Array) -> Params:
    """`pooler` and `classifier`, those that `cfg.readout` asks for."""
    D, C = cfg.model_dim, cfg.readout.classes
    params: Params = {}
    if cfg.readout.dense:
        params["pooler"] = dense_init(cfg, jax.random.fold_in(key, 2), D, D)
    if C:
        draw = normal_init(initial_std(cfg, "head", D))
        params["classifier"] = {"w": draw(jax.random.fold_in(key, 3), (D, C), cfg.param_dtype)}
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
    return jnp.take_along_axis(hidden_BTD, column_B[:, None, None], axis=1)


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
        x_BUD = dense(cfg, lay_out(params["pooler"], AXES, cfg.dtype), x_BUD)
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
    w = lay_out(params["classifier"], AXES, cfg.dtype)
    dtypes = dict(dtype=cfg.dtype, accum=cfg.accum_dtype, result="float32")
    logits_BUC = matmul("BTD,DC->BTC", x_BUD, w["w"], out=("batch", "length", None), **dtypes)
    logits_BUC = logits_BUC * rules(cfg)["head"].output
    if cfg.readout.bias:
        logits_BUC = logits_BUC + w["b"].astype(jnp.float32)
    return logits_BUC if cfg.readout.of == "each" else logits_BUC[:, 0]
