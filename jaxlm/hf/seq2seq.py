"""A checkpoint with an encoder as a model to call: numpy arrays in and out, as those of `transformers`."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxlm.errors import check
from jaxlm.generate.sampling import SampleConfig
from jaxlm.hf.calls import Ids, Settings, continued, counted, generators, masked, streams, unpadded
from jaxlm.hf.family import Family
from jaxlm.model import encoder_decoder, transformer
from jaxlm.model.config import TransformerConfig, encoder_of
from jaxlm.sharding import Layout, use


@dataclasses.dataclass(frozen=True, eq=False)
class Seq2Seq:
    """A loaded model with an encoder and a decoder.

    Rows of either may be padded on either side; what comes out of padded columns means nothing.
    """

    cfg: TransformerConfig
    params: Any
    family: Family
    config: dict[str, Any]  # its config.json
    layout: Layout | None = None
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # its generation_config.json
    left: tuple[str, ...] = ()  # tensors of heads in its files that its class does not have

    def logits(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        decoder_input_ids: Ids | None = None,
        decoder_attention_mask: Ids | None = None,
    ) -> Float[np.ndarray, "B T V"]:
        """Logits after every token of the decoder, float32.

        Args:
            input_ids: [B, S], what the encoder reads.
            attention_mask: [B, S], 1 = a token, 0 = padding; default all tokens.
            decoder_input_ids: [B, T], the start token and what follows it; default the start token alone.
            decoder_attention_mask: [B, T] likewise; default all tokens.

        Raises:
            UserError: arrays of different shapes, or a class without a head.
        """
        named = (self.config.get("architectures") or [""])[0]
        check(named not in self.family.bare, f"{named} has no head: use hidden_states")
        given = self._given(input_ids, attention_mask, decoder_input_ids, decoder_attention_mask)
        with use(self.layout):
            return np.array(self._logits(self.params, *given))

    def hidden_states(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        decoder_input_ids: Ids | None = None,
        decoder_attention_mask: Ids | None = None,
    ) -> tuple[Float[np.ndarray, "B T D"], ...]:
        """The decoder's L + 1 arrays: embeddings, the stream after each layer, the last after the last norm.

        Arguments as for `logits`; these are the `decoder_hidden_states` of `transformers`.
        """
        given = self._given(input_ids, attention_mask, decoder_input_ids, decoder_attention_mask)
        with use(self.layout):
            return tuple(np.array(x) for x in self._states(self.params, *given))

    def encoder_hidden_states(
        self, input_ids: Ids, attention_mask: Ids | None = None
    ) -> tuple[Float[np.ndarray, "B S D"], ...]:
        """The same of the encoder; its `[-1]` is what the decoder attends to."""
        ids, mask = masked(input_ids, attention_mask)
        with use(self.layout):
            return tuple(np.array(x) for x in self._encoder_states(self.params, ids, mask))

    def generate(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        decoder_input_ids: Ids | None = None,
        *,
        max_new_tokens: int = 20,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float | None = None,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        decoder_start_token_id: int | None = None,
        forced_bos_token_id: int | None = None,
        forced_eos_token_id: int | Sequence[int] | None = None,
    ) -> Int[np.ndarray, "B T"]:
        """What the decoder says to the inputs, the start token first.

        Token ids and the penalty that are not given are those of generation_config.json, without one of
        config.json; so are `suppress_tokens` and `bad_words_ids` of one token, which are never drawn. Other
        settings there (beams, whether to draw) are not read.

        Args:
            input_ids, attention_mask: as for `logits`.
            decoder_input_ids: [B, T], where the text begins; default the start token.
            max_new_tokens: a row ends after as many, or with an end token.
            temperature: 0 = greedy.
            top_k, top_p: see `SampleConfig`.
            repetition_penalty: of tokens that the decoder has read or said; 1 = none.
            seed: row i draws with seed + i.
            eos_token_id: end tokens; () = none.
            pad_token_id: fills rows that ended.
            decoder_start_token_id: the first token.
            forced_bos_token_id: the token after it, such as a language; of texts that begin with it alone.
            forced_eos_token_id: the last token of a row that does not end before; () = none.

        Returns:
            [B, T + n], n = the longest continuation.

        Raises:
            UserError: no start token; `bad_words_ids` of several tokens.
        """
        ids, mask = masked(input_ids, attention_mask)
        start = self._starts(decoder_input_ids, len(ids), decoder_start_token_id)
        settings = self._settings
        eos = settings.several("eos_token_id", eos_token_id)
        last = settings.several("forced_eos_token_id", forced_eos_token_id)[:1]
        first = settings.get("forced_bos_token_id", forced_bos_token_id)
        lead = [] if first is None or start.shape[1] > 1 else [int(first)]
        lead = lead[: max_new_tokens - len(last)]
        count = max_new_tokens - len(lead) - len(last)
        rows = unpadded(ids, mask)
        new: list[list[int]] = [[] for _ in rows]
        if count:
            sample = SampleConfig(
                max_new_tokens=count,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                repetition_penalty=settings.penalty(repetition_penalty),
                seed=seed,
            )
            prompts = [[*map(int, row), *lead] for row in start]
            drawn = self._generator(eos, settings.banned()).generate(self.params, prompts, sample, rows)
            new = [result.tokens for result in drawn]
        new = [lead + row + ([] if row and row[-1] in eos else list(last)) for row in new]
        return continued(start, new, settings.pad(pad_token_id, eos))

    @property
    def _settings(self) -> Settings:
        return Settings(self.generation, self.config)

    def _starts(self, ids: Ids | None, batch: int, start: int | None = None) -> Ids:
        if ids is not None:
            ids = np.asarray(ids)
            check(
                ids.ndim == 2 and len(ids) == batch and ids.shape[1] > 0,
                f"decoder_input_ids has shape {list(ids.shape)}, expected [{batch}, columns]",
            )
            return ids
        places = (
            start,
            self._settings.get("decoder_start_token_id"),
            self.config.get("decoder_start_token_id"),
        )
        start = next((token for token in places if token is not None), self._settings.get("bos_token_id"))
        check(start is not None, "config.json has no decoder_start_token_id: give decoder_input_ids")
        return np.full((batch, 1), start, np.int64)

    def _given(self, ids: Any, mask: Any, decoder_ids: Any, decoder_mask: Any) -> tuple[np.ndarray, ...]:
        inputs = masked(ids, mask)
        start = self._starts(decoder_ids, len(inputs[0]))
        return *inputs, *masked(start, decoder_mask, "decoder_input_ids", "decoder_attention_mask")

    @functools.cached_property
    def _logits(self) -> Any:
        cfg = self.cfg

        def logits(params: Any, *given: jax.Array) -> jax.Array:
            inputs_BS, input_mask_BS, tokens_BT, mask_BT = given
            hidden_BTD, _ = encoder_decoder.apply(
                cfg,
                params,
                inputs_BS,
                tokens_BT,
                input_segments_BS=input_mask_BS,
                input_positions_BS=counted(input_mask_BS),
                segments_BT=mask_BT,
                positions_BT=counted(mask_BT),
            )
            return transformer.unembed(cfg, params, hidden_BTD)

        return jax.jit(logits)

    @functools.cached_property
    def _encoder_states(self) -> Any:
        cfg = self.cfg

        def states(params: Any, inputs_BS: jax.Array, mask_BS: jax.Array) -> list[jax.Array]:
            own = encoder_decoder.encoder_params(cfg, params)
            return streams(encoder_of(cfg), own, inputs_BS, **_where(mask_BS))

        return jax.jit(states)

    @functools.cached_property
    def _states(self) -> Any:
        cfg, encoder_states = self.cfg, self._encoder_states

        def states(params: Any, *given: jax.Array) -> list[jax.Array]:
            inputs_BS, input_mask_BS, tokens_BT, mask_BT = given
            memory_BSD = encoder_states(params, inputs_BS, input_mask_BS)[-1]
            memory = dict(memory_BSD=memory_BSD, memory_segments_BS=input_mask_BS)
            return streams(cfg, params, tokens_BT, **_where(mask_BT), **memory)

        return jax.jit(states)

    @functools.cached_property
    def _generator(self) -> Any:
        return generators(self.cfg, self.layout)


def _where(mask_BT: jax.Array) -> dict[str, jax.Array]:
    """Documents and positions of rows that may be padded on either side."""
    return {"segments_BT": mask_BT, "positions_BT": counted(mask_BT)}
