"""The recurrent encoder-decoder with additive attention.

    encoder/blocks/forward/lstm/..., backward/lstm/...     D / 2 units each, both ways over the inputs
    additive/w_query [D, D], w_memory [D, D], v [D]        scores
    additive/w_context [4, D, D]                           into the gates of the decoder's first layer
    additive/w_out [2, D, D]                               state and context to what is unembedded

Before a column is read, the decoder's last state looks at the inputs:

    score_s = v . tanh(w_query h_{t-1} + w_memory m_s),  context_t = sum_s softmax(score)_s m_s

and the context joins the column's embedding. A column's output is tanh(w_out [h_t; context_t]). A decoder
starts from a state of zeros, for several pairs may share a row.

Source: Bahdanau, Cho & Bengio 2015, arXiv:1409.0473 (there with GRUs, a maxout before the logits, and a start
from the encoder's last state).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.model.layers import dropout, normal_init
from jaxlm.model.recurrence import (
    AXES,
    LSTMConfig,
    Params,
    State,
    cell,
    choose,
    empty_state,
    init_cell,
    layer,
    starts,
)
from jaxlm.sharding import constrain
from jaxlm.stack import unstack
from jaxlm.weights import lay_out, matmul, product


def init(cfg: LSTMConfig, key: Array) -> Params:
    """What an encoder-decoder has beside a language model's parameters."""
    encoder_key, additive_key = jax.random.split(key)
    D, L = cfg.model_dim, cfg.encoder.num_layers
    keys = jax.random.split(encoder_key, (2, L))
    cells = jax.vmap(jax.vmap(lambda key: init_cell(cfg, key, D, D // 2)))(keys)
    forward, backward = ({"lstm": jax.tree.map(lambda x, way=way: x[way], cells)} for way in (0, 1))
    shapes = {"w_query": (D, D), "w_memory": (D, D), "v": (D,), "w_context": (4, D, D), "w_out": (2, D, D)}
    draw = normal_init(cfg.init_std or D**-0.5)
    drawn = jax.random.split(additive_key, len(shapes))
    additive = {
        n: draw(key, shape, cfg.param_dtype) for key, (n, shape) in zip(drawn, shapes.items(), strict=True)
    }
    return {"encoder": {"blocks": {"forward": forward, "backward": backward}}, "additive": additive}


def encode(
    cfg: LSTMConfig,
    params: Params,
    x_BSD: Float[Array, "B S D"],
    segments_BS: Int[Array, "B S"],
    key: Array | None = None,
) -> Float[Array, "B S D"]:
    """What both directions of every encoder layer make of the embedded inputs.

    Args:
        cfg: a model with an encoder.
        params: of the whole model.
        x_BSD: embedded inputs.
        segments_BS: documents, which are read apart; 0 = padding.
        key: for dropout; None = none.
    """
    keys = [None] * cfg.encoder.num_layers if key is None else jax.random.split(key, cfg.encoder.num_layers)
    blocks = params["encoder"]["blocks"]
    ways = zip(*(unstack(blocks[way]["lstm"]) for way in ("forward", "backward")), strict=True)
    state = empty_state(cfg, x_BSD.shape[0], cfg.model_dim // 2)
    back_BS = segments_BS[:, ::-1]
    one_layer = partial(layer, cfg)
    if cfg.remat == "full":
        one_layer = jax.checkpoint(one_layer)
    for layer_key, (forward, backward) in zip(keys, ways, strict=True):
        _, h_BSF = one_layer(forward, x_BSD, state, segments_BS != 0, starts(segments_BS))
        _, b_BSF = one_layer(backward, x_BSD[:, ::-1], state, back_BS != 0, starts(back_BS))
        x_BSD = dropout(jnp.concatenate([h_BSF, b_BSF[:, ::-1]], axis=-1), cfg.dropout, layer_key)
    return x_BSD


def attention_weights(
    query_BA: Float[Array, "B A"],
    keys_BSA: Float[Array, "B S A"],
    v_A: Float[Array, "A"],
    visible_BS: Bool[Array, "B S"],
) -> Float[Array, "B S"]:
    """softmax_s(v . tanh(query + key_s)) over the visible inputs, fp32; zeros where a row sees none."""
    scores_BS = jnp.sum(v_A.astype(jnp.float32) * jnp.tanh(query_BA[:, None] + keys_BSA), axis=-1)
    scores_BS = jnp.where(visible_BS, scores_BS, -1e30)
    largest_B1 = jax.lax.stop_gradient(jnp.max(scores_BS, axis=1, keepdims=True))
    exp_BS = jnp.where(visible_BS, jnp.exp(scores_BS - largest_B1), 0.0)
    return exp_BS / jnp.maximum(exp_BS.sum(1, keepdims=True), 1e-30)


def decode(
    cfg: LSTMConfig,
    params: Params,
    x_BTD: Float[Array, "B T D"],
    memory_BSD: Float[Array, "B S D"],
    states: State,
    rows: tuple[Bool[Array, "B T"], Bool[Array, "B T"]],
    visible_BTS: Bool[Array, "B T S"],
    key: Array | None = None,
) -> tuple[State, Float[Array, "B T D"]]:
    """The decoder's layers over all columns, one column after the other.

    Args:
        cfg: a model with an encoder.
        params: of the whole model.
        x_BTD: embedded tokens.
        memory_BSD: what `encode` made.
        states: before the first column, every leaf [L, B, D].
        rows: columns that are read; columns before which the states are set to zero.
        visible_BTS: inputs that a column may look at.
        key: for dropout between layers; None = none.

    Returns:
        The states after the last column, and what is to be unembedded.
    """
    compute = dict(dtype=cfg.dtype, accum=cfg.accum_dtype)
    dtypes = (cfg.dtype, cfg.accum_dtype, cfg.accum_dtype)
    laid_out = lay_out({"lstm": params["blocks"]["lstm"], "additive": params["additive"]}, AXES, cfg.dtype)
    w, (first, *above) = laid_out["additive"], unstack(laid_out["lstm"])
    keys_BSA = matmul("BSD,DA->BSA", memory_BSD, w["w_memory"], result=cfg.accum_dtype, **compute)
    gates_BTGF = matmul("BTD,GDF->BTGF", x_BTD, first["w_input"], result=cfg.accum_dtype, **compute)
    gates_BTGF = gates_BTGF + first["bias"].astype(cfg.accum_dtype)
    B, T, D = x_BTD.shape
    dropped = key is not None and cfg.dropout > 0
    ones_TLBD = jnp.ones((T, len(above), B if dropped else 1, D if dropped else 1), cfg.accum_dtype)
    kept_TLBD = dropout(ones_TLBD, cfg.dropout, key if dropped else None)
    # The backward pass makes tanh(query + keys) of a column again: all columns' would be [T, B, S, D].
    look = jax.checkpoint(attention_weights, prevent_cse=False)

    def step(states: State, column: tuple) -> tuple[State, tuple[Array, Array]]:
        gates_BGF, real_B, fresh_B, visible_BS, kept_LBD = column
        old = [State(h, c) for h, c in zip(*states, strict=True)]
        before = [choose(fresh_B, jax.tree.map(jnp.zeros_like, s), s) for s in old]
        with jax.named_scope("attend"):
            query_BA = product("BD,DA->BA", before[-1].h_BF, w["w_query"], *dtypes)
            weights_BS = look(query_BA, keys_BSA, w["v"], visible_BS)
            context_BD = jnp.einsum("BS,BSD->BD", weights_BS, memory_BSD.astype(jnp.float32))
        gates_BGF = gates_BGF + product("BD,GDF->BGF", context_BD, w["w_context"], *dtypes)
        gates_BGF = gates_BGF + product("BF,GFH->BGH", before[0].h_BF, first["w_state"], *dtypes)
        new = [cell(gates_BGF, before[0].c_BF)]
        for layer_w, state, kept_BD in zip(above, before[1:], kept_LBD, strict=True):
            gates_BGF = product("BD,GDF->BGF", new[-1].h_BF * kept_BD, layer_w["w_input"], *dtypes)
            gates_BGF = gates_BGF + product("BF,GFH->BGH", state.h_BF, layer_w["w_state"], *dtypes)
            new.append(cell(gates_BGF + layer_w["bias"].astype(cfg.accum_dtype), state.c_BF))
        new = [choose(real_B, n, s) for n, s in zip(new, before, strict=True)]
        return jax.tree.map(lambda *x: jnp.stack(x), *new), (new[-1].h_BF, context_BD)

    columns = (gates_BTGF, *rows, visible_BTS)
    columns = (*jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), columns), kept_TLBD)
    with jax.named_scope("recur"):
        one_column = jax.checkpoint(step, prevent_cse=False) if cfg.remat == "full" else step
        states, outputs = jax.lax.scan(one_column, states, columns)
    both_BTKD = jnp.stack([jnp.swapaxes(x, 0, 1) for x in outputs], axis=2)
    y_BTD = jnp.tanh(matmul("BTKD,KDE->BTE", both_BTKD, w["w_out"], result=cfg.accum_dtype, **compute))
    return states, constrain(y_BTD.astype(cfg.dtype), "batch", "length", None)
