"""The LSTM language model: a stack of recurrent layers, with the functions that a transformer has.

    embed/table [V, D]
    blocks/lstm/w_input [L, 4, D, D], w_state [L, 4, D, D], bias [L, 4, D]     gates i, f, g, o
    head/w [D, V]                                                              untied models
    encoder/..., additive/...                          of models with an encoder, see `lstm_attention`

Dropout is on what goes up, never on what goes on in time (Zaremba et al. 2014, arXiv:1409.2329). A document
starts from a state of zeros.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.errors import check
from jaxlm.model import lstm_attention
from jaxlm.model.layers import dropout, normal_init
from jaxlm.model.recurrence import AXES, LSTMConfig, Params, State, init_cell, layer, starts
from jaxlm.sharding import constrain
from jaxlm.stack import unstack
from jaxlm.weights import gather, lay_out, matmul


def init(cfg: LSTMConfig, key: Array) -> Params:
    """Fresh parameters, a function of the key alone."""
    table_key, block_key, head_key, encoder_key = jax.random.split(key, 4)
    V, D = cfg.vocab_size, cfg.model_dim
    normal = normal_init(cfg.init_std or D**-0.5)
    layer_keys = jax.vmap(lambda index: jax.random.fold_in(block_key, index))(jnp.arange(cfg.num_layers))
    params: Params = {
        "embed": {"table": normal(table_key, (V, D), cfg.param_dtype)},
        "blocks": {"lstm": jax.vmap(lambda key: init_cell(cfg, key, D, D))(layer_keys)},
    }
    if not cfg.tie_embeddings:
        params["head"] = {"w": normal(head_key, (D, V), cfg.param_dtype)}
    if cfg.has_encoder:
        params |= lstm_attention.init(cfg, encoder_key)
    return params


def abstract_params(cfg: LSTMConfig) -> Params:
    """Shapes and dtypes of the parameters, without computing any."""
    return jax.eval_shape(lambda: init(cfg, jax.random.key(0)))


def embed(cfg: LSTMConfig, params: Params, tokens_BT: Array, key: Array | None) -> Float[Array, "B T D"]:
    """Embedded tokens, after dropout."""
    x_BTD = gather(params["embed"]["table"], tokens_BT, AXES["embed/table"], dtype=cfg.dtype)
    return dropout(constrain(x_BTD, "batch", "length", None), cfg.dropout, key)


def encode(
    cfg: LSTMConfig,
    params: Params,
    inputs_BS: Int[Array, "B S"],
    *,
    segments_BS: Int[Array, "B S"] | None = None,
    key: Array | None = None,
) -> Float[Array, "B S D"]:
    """What the encoder makes of the inputs, for the decoder to attend to; they share one embedding table.

    Args:
        cfg: a model with an encoder.
        params: as made by `init`.
        inputs_BS: token ids in [0, V).
        segments_BS: document number of each input, 0 = padding; documents are read apart.
        key: for dropout; None = none.
    """
    embed_key, stack_key = (None, None) if key is None else jax.random.split(key)
    segments_BS = jnp.ones_like(inputs_BS) if segments_BS is None else segments_BS
    return lstm_attention.encode(
        cfg, params, embed(cfg, params, inputs_BS, embed_key), segments_BS, stack_key
    )


def apply(
    cfg: LSTMConfig,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    *,
    segments_BT: Int[Array, "B T"] | None = None,
    positions_BT: Int[Array, "B T"] | None = None,
    memory_BSD: Float[Array, "B S D"] | None = None,
    memory_segments_BS: Int[Array, "B S"] | None = None,
    cache: Params | None = None,
    key: Array | None = None,
) -> tuple[Float[Array, "B T D"], Params | None, dict[str, Any]]:
    """Hidden states before the unembedding.

    Args:
        cfg: the model.
        params: as made by `init`.
        tokens_BT: token ids in [0, V).
        segments_BT: document number of each token, 0 = padding; each document starts from a state of zeros.
            With a cache, 0 marks columns that are not read; a row of a cache is one document.
        positions_BT: not read: an LSTM counts for itself.
        memory_BSD: what `encode` made of the inputs, for a model with an encoder; a call with a cache that
            holds it already goes without.
        memory_segments_BS: its documents; a token attends to those of its own number, with a cache to all
            that are not 0. Default: all of its row.
        cache: as made by `init_cache`; the columns go on from there.
        key: for dropout; None = none.

    Returns:
        (hidden_BTD in `cfg.dtype`, the new cache or None, {}).
    """
    B, T = tokens_BT.shape
    real_BT, fresh_BT = jnp.ones((B, T), bool), jnp.zeros((B, T), bool)
    if segments_BT is not None:
        real_BT = segments_BT != 0
        fresh_BT = fresh_BT if cache is not None else starts(segments_BT)
    states = init_cache(cfg, B, T)["states"] if cache is None else cache["states"]
    embed_key, stack_key = (None, None) if key is None else jax.random.split(key)
    x_BTD = embed(cfg, params, tokens_BT, embed_key)
    if not cfg.has_encoder:
        states, y_BTD = _stack(cfg, params, x_BTD, states, (real_BT, fresh_BT), stack_key)
        return y_BTD, None if cache is None else {"states": states}, {}

    check(memory_BSD is not None or cache is not None, "a model with an encoder needs inputs to attend to")
    if memory_BSD is None:
        memory_BSD, visible_BS = cache["memory"], cache["visible"]
    elif memory_segments_BS is None:
        visible_BS = jnp.ones(memory_BSD.shape[:2], bool)
    else:
        visible_BS = memory_segments_BS != 0
    visible_BTS = jnp.broadcast_to(visible_BS[:, None], (B, T, visible_BS.shape[1]))
    if cache is None and memory_segments_BS is not None and segments_BT is not None:
        visible_BTS = visible_BTS & (segments_BT[:, :, None] == memory_segments_BS[:, None])
    layers_key, last_key = (None, None) if stack_key is None else jax.random.split(stack_key)
    rows = (real_BT, fresh_BT)
    states, y_BTD = lstm_attention.decode(
        cfg, params, x_BTD, memory_BSD, states, rows, visible_BTS, layers_key
    )
    new_cache = {"states": states, "memory": memory_BSD, "visible": visible_BS}
    return dropout(y_BTD, cfg.dropout, last_key), None if cache is None else new_cache, {}


def _stack(
    cfg: LSTMConfig,
    params: Params,
    x_BTD: Array,
    states: State,
    rows: tuple[Array, Array],
    key: Array | None,
) -> tuple[State, Float[Array, "B T D"]]:
    """The layers of a language model, each over all columns; `states` has leaves [L, B, D]."""
    keys = [None] * cfg.num_layers if key is None else jax.random.split(key, cfg.num_layers)
    one_layer = partial(layer, cfg)
    if cfg.remat == "full":
        one_layer = jax.checkpoint(one_layer)
    ends = []
    for index, params_l in enumerate(unstack(params["blocks"]["lstm"])):
        state = jax.tree.map(lambda x, i=index: x[i], states)
        end, x_BTD = one_layer(params_l, x_BTD, state, *rows)
        x_BTD = dropout(x_BTD, cfg.dropout, keys[index])
        ends.append(end)
    return jax.tree.map(lambda *x: jnp.stack(x), *ends), x_BTD


def unembed(cfg: LSTMConfig, params: Params, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Logits, in fp32."""
    names = ("embed",) if cfg.tie_embeddings else ("head",)
    part = lay_out({name: params[name] for name in names}, AXES, cfg.dtype)
    dtypes = dict(dtype=cfg.dtype, accum=cfg.accum_dtype, result="float32", out=("batch", "length", "vocab"))
    with jax.named_scope("unembed"):
        if cfg.tie_embeddings:
            return matmul("BTD,VD->BTV", hidden_BTD, part["embed"]["table"], **dtypes)
        return matmul("BTD,DV->BTV", hidden_BTD, part["head"]["w"], **dtypes)


def init_cache(cfg: LSTMConfig, batch: int, length: int, memory_length: int = 0) -> Params:
    """States of zeros for `batch` rows; they hold any `length`.

    Of a model with an encoder also room for what `encode` made of `memory_length` inputs a row, which the
    first call fills in.
    """
    del length
    zeros_LBF = constrain(
        jnp.zeros((cfg.num_layers, batch, cfg.model_dim), cfg.accum_dtype), None, "batch", None
    )
    cache: Params = {"states": State(zeros_LBF, zeros_LBF)}
    if cfg.has_encoder:
        cache["memory"] = jnp.zeros((batch, memory_length, cfg.model_dim), cfg.dtype)
        cache["visible"] = jnp.zeros((batch, memory_length), bool)
    return cache
