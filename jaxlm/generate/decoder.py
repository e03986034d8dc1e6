"""A model as generation sees it: pure functions, whatever the family."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from jaxtyping import Array

from jaxlm.errors import UserError
from jaxlm.model import encoder_decoder
from jaxlm.model.config import TransformerConfig, encoder_of
from jaxlm.model.models import ModelConfig, functions

Cache = Any


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model as the decode loop sees it: pure functions, whatever the family."""

    # (params, tokens_BT, segments_BT, positions_BT, cache) -> (hidden_BTD, cache); segment 0 is not written.
    # With an encoder, the first call has the memory and its segments as a sixth argument and keeps them.
    apply: Callable[..., tuple[Array, Cache]]
    unembed: Callable[[Any, Array], Array]  # (params, hidden_BTD) -> logits_BTV, fp32
    # (rows, positions a row can hold) -> empty cache; with an encoder also the inputs that a row can hold
    init_cache: Callable[..., Cache]
    vocab_size: int
    max_length: int = 0  # positions that the model knows; 0 = no limit
    encode: Callable[[Any, Array, Array], Array] | None = (
        None  # (params, inputs_BS, segments_BS) -> memory_BSD
    )
    input_vocab_size: int = 0  # of the encoder


def decoder(cfg: ModelConfig) -> Decoder:
    """The `Decoder` of a model, with or without an encoder.

    Experts are dropless here, whatever the dispatch in training, with buffers for all choices: capacity is a
    share of a padded row, and a smaller buffer one of all rows', so a text would depend on those beside it.

    Raises:
        UserError: the model is not causal.
    """
    if not cfg.causal:
        raise UserError("model.causal=False: only a causal model can generate text")
    longest, input_vocab_size = 0, cfg.vocab_size if cfg.has_encoder else 0
    if isinstance(cfg, TransformerConfig):
        cfg = dataclasses.replace(
            cfg, moe=dataclasses.replace(cfg.moe, dispatch="dropless", buffer_factor=0.0)
        )
        longest = cfg.position.max_length if cfg.position.kind == "learned" else 0
        input_vocab_size = encoder_of(cfg).vocab_size if cfg.has_encoder else 0
    model = functions(cfg)

    def apply(params, tokens_BT, segments_BT, positions_BT, cache, memory=(None, None)):
        hidden_BTD, cache, _ = model.apply(
            cfg,
            params,
            tokens_BT,
            segments_BT=segments_BT,
            positions_BT=positions_BT,
            memory_BSD=memory[0],
            memory_segments_BS=memory[1],
            cache=cache,
        )
        return hidden_BTD, cache

    def encode(params, inputs_BS, segments_BS):
        return encoder_decoder.encode(cfg, params, inputs_BS, segments_BS=segments_BS)[0]

    return Decoder(
        apply=apply,
        unembed=partial(model.unembed, cfg),
        init_cache=partial(model.init_cache, cfg),
        vocab_size=cfg.vocab_size,
        max_length=longest,
        encode=encode if cfg.has_encoder else None,
        input_vocab_size=input_vocab_size,
    )
