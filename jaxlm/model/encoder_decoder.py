"""Sequence to sequence: an encoder reads the inputs, and every layer of the decoder attends to what it made.

Both are stacks of the one transformer. The decoder is the model's own config; `encoder_of` derives the
encoder's from it, whose parameters stand under `encoder`. They share the embedding table unless
`encoder.vocab_size` gives the encoder one of its own. A recurrent model brings an encoder of its kind.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.errors import check
from jaxlm.model import lstm, transformer
from jaxlm.model.config import TransformerConfig, encoder_of
from jaxlm.model.models import ModelConfig, functions
from jaxlm.model.recurrence import LSTMConfig
from jaxlm.model.transformer import Aux, Params
from jaxlm.sharding import current


def encoder_params(cfg: TransformerConfig, params: Params) -> Params:
    """The encoder's parameters as those of a model of its own, with the decoder's table if that is shared."""
    own = params["encoder"]
    if cfg.encoder.vocab_size:
        return own
    return {**own, "embed": {**own.get("embed", {}), "table": params["embed"]["table"]}}


def encode(
    cfg: ModelConfig,
    params: Params,
    inputs_BS: Int[Array, "B S"],
    *,
    segments_BS: Int[Array, "B S"] | None = None,
    positions_BS: Int[Array, "B S"] | None = None,
    key: Array | None = None,
) -> tuple[Float[Array, "B S D"], Aux]:
    """What the encoder makes of the inputs, for the decoder to attend to.

    Args:
        cfg: a model with an encoder.
        params: as made by `transformer.init`, the decoder's too.
        inputs_BS: token ids of the encoder's vocabulary.
        segments_BS, positions_BS, key: as for `transformer.apply`; every input sees its whole document.

    Returns:
        (memory_BSD, aux) as `transformer.apply` returns them.

    Raises:
        UserError: a mesh with pipeline stages.
    """
    layout = current()
    check(
        layout is None or layout.stages == 1,
        f"mesh.pipe={layout and layout.stages}: a model with an encoder is not split into stages; use "
        "mesh.fsdp or mesh.tensor",
    )
    if isinstance(cfg, LSTMConfig):
        return lstm.encode(cfg, params, inputs_BS, segments_BS=segments_BS, key=key), {}
    memory_BSD, _, aux = transformer.apply(
        encoder_of(cfg),
        encoder_params(cfg, params),
        inputs_BS,
        segments_BT=segments_BS,
        positions_BT=positions_BS,
        key=key,
    )
    return memory_BSD, aux


def apply(
    cfg: ModelConfig,
    params: Params,
    inputs_BS: Int[Array, "B S"],
    tokens_BT: Int[Array, "B T"],
    *,
    input_segments_BS: Int[Array, "B S"] | None = None,
    input_positions_BS: Int[Array, "B S"] | None = None,
    segments_BT: Int[Array, "B T"] | None = None,
    positions_BT: Int[Array, "B T"] | None = None,
    key: Array | None = None,
) -> tuple[Float[Array, "B T D"], Aux]:
    """Hidden states of the decoder before the unembedding.

    Args:
        cfg, params, inputs_BS: as for `encode`.
        tokens_BT: what the decoder has read, one token behind its targets.
        input_segments_BS, segments_BT: documents; a token attends to inputs of its own number only, so that
            several pairs can be packed into a row. 0 = padding.
        input_positions_BS, positions_BT: as for `transformer.apply`.
        key: for dropout; None = none.

    Returns:
        (hidden_BTD, aux); of routed layers `aux["loss"]` is the mean over both stacks.
    """
    encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
    memory_BSD, encoder_aux = encode(
        cfg,
        params,
        inputs_BS,
        segments_BS=input_segments_BS,
        positions_BS=input_positions_BS,
        key=encoder_key,
    )
    hidden_BTD, _, aux = functions(cfg).apply(
        cfg,
        params,
        tokens_BT,
        segments_BT=segments_BT,
        positions_BT=positions_BT,
        memory_BSD=memory_BSD,
        memory_segments_BS=input_segments_BS,
        key=decoder_key,
    )
    return hidden_BTD, _both(cfg, encoder_aux, aux)


def _both(cfg: ModelConfig, encoder_aux: Aux, aux: Aux) -> Aux:
    if not aux:
        return encoder_aux
    if not encoder_aux:
        return aux
    layers = (encoder_of(cfg).num_moe_layers, cfg.num_moe_layers)
    losses = jnp.stack([encoder_aux.pop("loss"), aux.pop("loss")])
    summed = jax.tree.map(jnp.add, encoder_aux, aux)
    return {**summed, "loss": jnp.dot(losses, jnp.asarray(layers, losses.dtype)) / sum(layers)}
