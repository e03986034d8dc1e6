"""Prompts to texts: prefill once, then a jitted loop of decode steps over a key/value cache.

    prompts --start--> cache --decode_chunk--> up to `chunk` more tokens a row --host--> all rows done?
                                  ^---------------------------------------------- no ------'

Prompts of one batch may differ in length, parameters and seed. What a row says depends on its own prompt,
config and seed only (up to the rounding of matrix products at another batch size), not on the rows beside it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlm import sharding
from jaxlm.errors import UserError
from jaxlm.generate.decoder import Cache, Decoder
from jaxlm.generate.sampling import Rows, SampleConfig, row_keys, sample_token, stack_rows

Inputs = tuple[Int[Array, "B S"], Int[Array, "B S"]]  # of an encoder, and their segments


class Tokenizer(Protocol):
    """What text generation needs of a tokenizer."""

    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Where B rows stand between two decode steps."""

    cache: Cache  # holds every position before `position_B`
    token_B: Int[Array, "B"]  # the newest token of the row, not yet fed to the model
    position_B: Int[Array, "B"]  # where that token stands
    index_B: Int[Array, "B"]  # tokens drawn so far
    done_B: Bool[Array, "B"]
    counts_BV: Int[Array, "B V"] | None  # of prompt and text; None = no row asks for a repetition penalty


def decode_step(
    model: Decoder,
    params: Any,
    cache: Cache,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    active_BT: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T V"], Cache]:
    """Logits after each of T further tokens a row (1 in plain decoding), and the cache that now holds them.

    Args:
        model: the model's functions.
        params: its parameters.
        cache: holds the positions before these.
        tokens_BT: i32.
        positions_BT: i32, increasing along T.
        active_BT: columns to read and write; the others leave the cache alone and get logits without meaning.
    """
    hidden_BTD, cache = model.apply(params, tokens_BT, active_BT.astype(jnp.int32), positions_BT, cache)
    return model.unembed(params, hidden_BTD), cache


def prefill(
    model: Decoder,
    params: Any,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, "B"],
    cache_length: int,
    inputs: Inputs | None = None,
) -> Cache:
    """A cache of `cache_length` positions that holds the first `lengths_B` tokens of each row.

    Of a model with an encoder it also holds the keys and values of what that makes of the inputs.

    Args:
        model: the model's functions.
        params: its parameters.
        tokens_BT: i32; columns from the row's length on are not read.
        lengths_B: i32, may be 0.
        cache_length: positions that a row of the cache can hold.
        inputs: for the encoder, and their segments: 1, and 0 for padding.
    """
    B, T = tokens_BT.shape
    column_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    real_BT = column_BT < lengths_B[:, None]
    tokens_BT = sharding.constrain(tokens_BT, "batch", "length")
    positions_BT = jnp.where(real_BT, column_BT, 0)
    where = (tokens_BT, real_BT.astype(jnp.int32), positions_BT)
    if inputs is None:
        return model.apply(params, *where, model.init_cache(B, cache_length))[1]
    inputs_BS, segments_BS = (sharding.constrain(x, "batch", "length") for x in inputs)
    memory_BSD = model.encode(params, inputs_BS, segments_BS)
    cache = model.init_cache(B, cache_length, inputs_BS.shape[1])
    return model.apply(params, *where, cache, (memory_BSD, segments_BS))[1]


def start(
    model: Decoder,
    params: Any,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, "B"],
    *,
    cache_length: int,
    count: bool,
    inputs: Inputs | None = None,
) -> DecodeState:
    """The state in which each row has read its prompt but for the last token, which the first step will feed.

    Logits, and the drawing of tokens, thus stand in one program only, that of the loop.

    Args:
        model: the model's functions.
        params: its parameters.
        tokens_BT: i32 prompts, padded on the right.
        lengths_B: i32, tokens of each prompt, at least 1.
        cache_length: positions that a row of the cache can hold.
        count: keep token counts, for the repetition penalty.
        inputs: as for `prefill`.
    """
    B, T = tokens_BT.shape
    counts_BV = None
    if count:
        real_BT = (jnp.arange(T) < lengths_B[:, None]).astype(jnp.int32)
        zeros_BV = jnp.zeros((B, model.vocab_size), jnp.int32)
        counts_BV = zeros_BV.at[jnp.arange(B)[:, None], tokens_BT].add(real_BT)
        counts_BV = sharding.constrain(counts_BV, "batch", None)
    last_B = lengths_B - 1
    return DecodeState(
        cache=prefill(model, params, tokens_BT, last_B, cache_length, inputs),
        token_B=jnp.take_along_axis(tokens_BT, last_B[:, None], axis=1)[:, 0],
        position_B=last_B,
        index_B=sharding.constrain(jnp.zeros(B, jnp.int32), None),
        done_B=sharding.constrain(jnp.zeros(B, bool), None),
        counts_BV=counts_BV,
    )


def decode_chunk(
    model: Decoder, params: Any, state: DecodeState, rows: Rows, eos_M: Int[Array, "M"], *, steps: int
) -> tuple[DecodeState, Int[Array, "B K"], Float[Array, "B K"]]:
    """Up to K = `steps` more tokens for each row that is not done; ends early when all are.

    Args:
        model: the model's functions.
        params: its parameters.
        state: from `start` or an earlier chunk.
        rows: parameters of each row.
        eos_M: tokens that end a text.
        steps: K.

    Returns:
        The state, the tokens and their log-probabilities. A row's new tokens are its first
        `new index - old index` columns; the rest has no meaning.
    """
    B = state.token_B.shape[0]

    def more(carry):
        step, state, *_ = carry
        return (step < steps) & ~jnp.all(state.done_B)

    def body(carry):
        step, state, tokens_BK, logprobs_BK = carry
        active_B = ~state.done_B
        logits_B1V, cache = decode_step(
            model, params, state.cache, state.token_B[:, None], state.position_B[:, None], active_B[:, None]
        )
        logits_BV = sharding.constrain(logits_B1V[:, 0], "batch", None)
        keys_B = row_keys(rows.seed_B, state.index_B)
        token_B, logprob_B = sample_token(logits_BV, keys_B, rows, state.counts_BV)
        counts_BV = state.counts_BV
        if counts_BV is not None:
            counts_BV = counts_BV.at[jnp.arange(B), token_B].add(active_B.astype(counts_BV.dtype))
        index_B = state.index_B + active_B
        ended_B = jnp.any(token_B[:, None] == eos_M, axis=1) & ~rows.ignore_eos_B
        state = DecodeState(
            cache=cache,
            token_B=jnp.where(active_B, token_B, state.token_B),
            position_B=state.position_B + active_B,
            index_B=index_B,
            done_B=state.done_B | ended_B | (index_B >= rows.max_new_tokens_B),
            counts_BV=counts_BV,
        )
        return step + 1, state, tokens_BK.at[:, step].set(token_B), logprobs_BK.at[:, step].set(logprob_B)

    carry = (0, state, jnp.zeros((B, steps), jnp.int32), jnp.zeros((B, steps), jnp.float32))
    _, state, tokens_BK, logprobs_BK = jax.lax.while_loop(more, body, carry)
    # What the host looks at is replicated, so that every host of a mesh can.
    state = dataclasses.replace(
        state,
        index_B=sharding.constrain(state.index_B, None),
        done_B=sharding.constrain(state.done_B, None),
    )
    return state, sharding.constrain(tokens_BK, None, None), sharding.constrain(logprobs_BK, None, None)


@dataclasses.dataclass
class Result:
    """What became of one request."""

    prompt: list[int]
    tokens: list[int] = dataclasses.field(default_factory=list)  # with the token that ended it (EOS or stop)
    logprobs: list[float] = dataclasses.field(default_factory=list)  # of each token under the model, nats
    finish: Literal["", "eos", "stop", "length"] = ""  # why it ended
    text: str = ""  # without EOS, cut before the stop string; empty without a tokenizer


def bucket(n: int, smallest: int = 16) -> int:
    """The next size of the form 2^k or 3 * 2^k, so that programs are compiled for few sizes.

    >>> [bucket(n) for n in (1, 16, 17, 25, 33, 100, 700)]
    [16, 16, 24, 32, 48, 128, 768]
    """
    size = smallest
    while size < n:
        size, half = 2 * size, size + size // 2
        if half >= n:
            return half
    return size


def _pad(rows: Sequence[Sequence[int]], columns: int) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Rows padded on the right, and their lengths."""
    tokens_BT = np.zeros((len(rows), columns), np.int32)
    for padded, row in zip(tokens_BT, rows, strict=True):
        padded[: len(row)] = row
    return tokens_BT, np.asarray([len(row) for row in rows], np.int32)


class Generator:
    """Continues prompts with a model. Its compiled programs live as long as it does: make one and keep it.

    One program is compiled for each (rows, prompt bucket, cache bucket) and one decode loop for each
    (rows, cache bucket).

    Args:
        model: the model's functions, see `decoder`.
        tokenizer: needed for texts and stop strings.
        layout: mesh and rules under which the parameters live.
        eos_ids: tokens that end a text; default the tokenizer's.
        cache_length: positions a row can hold; 0 = as many as the requests need, rounded up to a bucket.
        batch_size: rows at a time; 0 = all requests at once.
        chunk: decode steps between two looks of the host at the text. Does not change the result.
        start_id: with an encoder, the token with which the decoder begins; default the tokenizer's BOS.
        with_bos: with an encoder, its inputs begin with BOS.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        layout: sharding.Layout | None = None,
        eos_ids: Sequence[int] | None = None,
        cache_length: int = 0,
        batch_size: int = 0,
        chunk: int = 32,
        start_id: int | None = None,
        with_bos: bool = False,
    ) -> None:
        if chunk < 1:
            raise UserError(f"chunk={chunk} must be at least 1")
        if model.max_length and cache_length > model.max_length:
            raise UserError(
                f"cache_length={cache_length} is more than the {model.max_length} positions of the model"
            )
        if eos_ids is None:
            eos_ids = () if tokenizer is None else (tokenizer.eos_id,)
        self.model, self.tokenizer, self.layout = model, tokenizer, layout
        self.cache_length, self.batch_size = cache_length, batch_size
        self.start_id, self.with_bos = start_id, with_bos
        self.eos_ids = tuple(eos_ids)
        self._start = jax.jit(partial(start, model), static_argnames=("cache_length", "count"))
        # The state is used up, so that the cache is updated in place.
        self._jit_chunk = partial(jax.jit, partial(decode_chunk, model, steps=chunk), donate_argnums=1)
        self._chunk = self._jit_chunk()
        self._pinned: dict[Any, Callable] = {}

    def generate_text(
        self, params: Any, texts: Sequence[str], sample: SampleConfig | Sequence[SampleConfig]
    ) -> list[Result]:
        """Continue texts; each is encoded and put after the beginning-of-sequence token.

        With an encoder a text is its input, with EOS behind it, and the decoder answers.

        Args:
            params: the model's parameters.
            texts: may be empty strings.
            sample: as for `generate`.
        """
        tokenizer = self._need_tokenizer("generate_text")
        bos = tokenizer.bos_id
        if self.model.encode is None:
            return self.generate(params, [[bos, *tokenizer.encode(text)] for text in texts], sample)
        lead = [bos] if self.with_bos else []
        inputs = [[*lead, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
        start = bos if self.start_id is None else self.start_id
        return self.generate(params, [[start]] * len(texts), sample, inputs)

    def generate(
        self,
        params: Any,
        prompts: Sequence[Sequence[int]],
        sample: SampleConfig | Sequence[SampleConfig],
        inputs: Sequence[Sequence[int]] | None = None,
    ) -> list[Result]:
        """Continue prompts of token ids.

        Args:
            params: the model's parameters.
            prompts: at least one token each.
            sample: one config for each prompt; or one for all, and then request i has the seed
                `sample.seed + i` (mod 2^32), so that equal prompts get different texts.
            inputs: for a model with an encoder, what it reads: at least one token for each prompt.

        Returns:
            One result for each prompt, in order.

        Raises:
            UserError: an empty prompt, a token outside the vocabulary, a request longer than the cache or the
                model's positions, or stop strings without a tokenizer.
        """
        if isinstance(sample, SampleConfig):
            sample = [
                dataclasses.replace(sample, seed=(sample.seed + i) % 2**32) for i in range(len(prompts))
            ]
        if len(sample) != len(prompts):
            raise UserError(f"{len(prompts)} prompts, but {len(sample)} sample configs")
        self._check_inputs(prompts, inputs)
        results = [Result([int(t) for t in prompt]) for prompt in prompts]
        for i, (result, cfg) in enumerate(zip(results, sample, strict=True)):
            self._check(i, result.prompt, cfg)
        size = self.batch_size or len(results)
        for first in range(0, len(results), max(size, 1)):
            rows = slice(first, first + size)
            read = None if inputs is None else inputs[rows]
            with sharding.use(self.layout):
                self._run(params, results[rows], sample[rows], read, size)
        return results

    def _check_inputs(self, prompts: Sequence[Any], inputs: Sequence[Sequence[int]] | None) -> None:
        wants = self.model.encode is not None
        if wants != (inputs is not None):
            raise UserError(
                f"a model {'with' if wants else 'without'} an encoder takes {'' if wants else 'no '}inputs"
            )
        if inputs is None:
            return
        if len(inputs) != len(prompts):
            raise UserError(f"{len(prompts)} prompts, but inputs for {len(inputs)}")
        for i, row in enumerate(inputs):
            wrong = [t for t in row if not 0 <= t < self.model.input_vocab_size]
            if wrong or not len(row):
                what = f"holds {wrong[0]}, outside the vocabulary" if wrong else "is empty"
                raise UserError(f"input {i} {what} (of {self.model.input_vocab_size} tokens)")
            if 0 < self.model.max_length < len(row):
                raise UserError(
                    f"input {i} has {len(row)} tokens, the model {self.model.max_length} positions"
                )

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(f"{what} needs a tokenizer: Generator(model, tokenizer)")
        return self.tokenizer

    def _check(self, i: int, prompt: list[int], cfg: SampleConfig) -> None:
        """Refuse what cannot be run, before anything is compiled."""
        if cfg.stop:
            self._need_tokenizer(f"prompt {i}: sample.stop={cfg.stop!r}")
        if not prompt:
            raise UserError(
                f"prompt {i} is empty: give at least one token, such as the beginning-of-sequence one"
            )
        wrong = [t for t in prompt if not 0 <= t < self.model.vocab_size]
        if wrong:
            raise UserError(
                f"prompt {i}: token {wrong[0]} is outside the vocabulary of {self.model.vocab_size}"
            )
        room = self.cache_length or self.model.max_length
        if room and len(prompt) + cfg.max_new_tokens > room:
            what = "cache_length" if self.cache_length else "the model's position table"
            left = room - len(prompt)
            raise UserError(
                f"prompt {i}: {len(prompt)} tokens + max_new_tokens={cfg.max_new_tokens} do not fit {what} "
                f"of {room} positions; "
                + (f"at most max_new_tokens={left} would" if left > 0 else "shorten the prompt")
            )

    def _run(
        self,
        params: Any,
        results: list[Result],
        sample: Sequence[SampleConfig],
        inputs: Sequence[Sequence[int]] | None,
        size: int,
    ) -> None:
        """Fill in the results of one batch of `size` rows or fewer."""
        if not results:
            return
        multiple = 1 if self.layout is None else self.layout.shards("batch")
        B = -(-size // multiple) * multiple
        room = self.model.max_length or 2**31
        T = min(bucket(max(len(r.prompt) for r in results)), room)
        need = max(len(r.prompt) + cfg.max_new_tokens for r, cfg in zip(results, sample, strict=True))
        cache_length = self.cache_length or min(bucket(need), room)
        # Rows that only fill the batch repeat the first prompt for one token.
        filler = B - len(results)
        prompts = [r.prompt for r in results] + [results[0].prompt] * filler
        rows = stack_rows([*sample, *[dataclasses.replace(sample[0], max_new_tokens=1)] * filler])
        tokens_BT, lengths_B = _pad(prompts, T)
        read = None
        if inputs is not None:
            inputs = [*inputs, *[inputs[0]] * filler]
            S = min(bucket(max(map(len, inputs))), room)
            inputs_BS, input_lengths_B = _pad(inputs, S)
            read = (inputs_BS, (np.arange(S) < input_lengths_B[:, None]).astype(np.int32))
        eos_M = np.asarray(self.eos_ids, np.int32)

        state = self._start(
            params,
            tokens_BT,
            lengths_B,
            cache_length=cache_length,
            count=any(cfg.repetition_penalty != 1.0 for cfg in sample),
            inputs=read,
        )
        chunk = self._chunk if self.layout is None else self._pin(state)
        done_B, seen_B = np.zeros(B, bool), np.zeros(B, np.int32)
        while not done_B.all():
            # Rows that the host ended, at a stop string, are done for the device as well.
            state = dataclasses.replace(state, done_B=state.done_B | done_B)
            state, *drawn = chunk(params, state, rows, eos_M)
            index_B, done_B, tokens_BK, logprobs_BK = map(
                np.array, jax.device_get((state.index_B, state.done_B, *drawn))
            )
            for b, (result, cfg) in enumerate(zip(results, sample, strict=True)):
                new = int(index_B[b] - seen_B[b])
                if not result.finish:
                    result.tokens += tokens_BK[b, :new].tolist()
                    result.logprobs += logprobs_BK[b, :new].tolist()
                    self._settle(result, cfg, new, bool(done_B[b]))
                    done_B[b] |= bool(result.finish)
            seen_B = index_B

    def _pin(self, state: DecodeState) -> Callable:
        """The loop that leaves its state where `state` lies on the mesh: every chunk finds it there."""
        shardings = jax.tree.map(lambda x: x.sharding, state)
        leaves, structure = jax.tree.flatten(shardings)
        key = (structure, *leaves)
        if key not in self._pinned:
            self._pinned[key] = self._jit_chunk(out_shardings=(shardings, None, None))
        return self._pinned[key]

    def _settle(self, result: Result, cfg: SampleConfig, new: int, done: bool) -> None:
        """Cut the row at a stop string that the last `new` tokens completed; else say why it ended, if so."""
        at_eos = done and not cfg.ignore_eos and result.tokens[-1] in self.eos_ids
        plain = len(result.tokens) - at_eos
        cut = self._find_stop(result, cfg.stop, len(result.tokens) - new, plain)
        if cut is not None:
            count, result.text = cut
            del result.tokens[count:], result.logprobs[count:]
            result.finish = "stop"
        elif done:
            result.finish = "eos" if at_eos else "length"
            if self.tokenizer is not None:
                result.text = self._text(result, plain)

    def _find_stop(self, result: Result, stop: tuple[str, ...], old: int, new: int) -> tuple[int, str] | None:
        """The fewest tokens, in (old, new], whose text holds a stop string, and the text before it."""
        if not stop or not any(s in self._text(result, new) for s in stop):
            return None
        for count in range(old + 1, new + 1):
            text = self._text(result, count)
            places = [text.find(s) for s in stop if s in text]
            if places:
                return count, text[: min(places)]
        return None

    def _text(self, result: Result, count: int) -> str:
        """Text of the first `count` tokens as it follows the prompt.

        Some tokenizers drop a space at the start of what they decode: the end of the prompt is decoded along.
        """
        before = result.prompt[-4:]
        lead = self.tokenizer.decode(before)
        text = self.tokenizer.decode(before + result.tokens[:count])
        # The prompt may end within a character.
        return text[len(lead) :] if text.startswith(lead) else self.tokenizer.decode(result.tokens[:count])
