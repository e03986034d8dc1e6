"""From logits to the next token: pure functions, vectorised over rows, each row with parameters of its own.

The order is the field's (and that of Hugging Face's logits processors):
repetition penalty -> temperature -> top-k -> top-p -> min-p -> draw.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from jaxlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How one request is continued; the defaults sample from the model's own distribution."""

    max_new_tokens: int = 128  # at most this many tokens, the end-of-sequence token included
    temperature: float = 1.0  # logits are divided by it; 0 = greedy
    top_k: int = 0  # keep the k most likely tokens (all that tie with the k-th); 0 = off
    top_p: float = 1.0  # keep the smallest set of most likely tokens of at least this probability; 1 = off
    min_p: float = 0.0  # keep tokens at least this share of the likeliest one's probability; 0 = off
    repetition_penalty: float = (
        1.0  # tokens of prompt and text: logit / penalty if positive, else * penalty; 1 = off
    )
    stop: tuple[str, ...] = ()  # text ends before the first of these strings
    ignore_eos: bool = False  # go on after the end-of-sequence token
    seed: int = 0  # the request's own seed: its text does not depend on the batch it is in

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature < math.inf, "0 (greedy) or a positive number"),
            ("top_k", self.top_k >= 0, "0 (off) or a positive number of tokens"),
            ("top_p", 0.0 <= self.top_p <= 1.0, "between 0 and 1 (off)"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 (off) and 1"),
            ("repetition_penalty", 0.0 < self.repetition_penalty < math.inf, "a positive number; 1 = off"),
            ("seed", 0 <= self.seed < 2**32, "between 0 and 2**32 - 1"),
            (
                "stop",
                not isinstance(self.stop, str) and all(self.stop),
                "a tuple of strings that are not empty",
            ),
        )
        for name, holds, wanted in rules:
            if not holds:
                raise UserError(f"sample.{name}={getattr(self, name)!r} must be {wanted}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The parameters of B requests as arrays, so that one compiled program serves any mix of them."""

    temperature_B: Float[Array, "B"]
    top_k_B: Int[Array, "B"]
    top_p_B: Float[Array, "B"]
    min_p_B: Float[Array, "B"]
    repetition_penalty_B: Float[Array, "B"]
    max_new_tokens_B: Int[Array, "B"]
    ignore_eos_B: Bool[Array, "B"]
    seed_B: UInt[Array, "B"]


def stack_rows(configs: Sequence[SampleConfig]) -> Rows:
    """One array per parameter from one config per request."""

    def column(name: str, dtype: type) -> np.ndarray:
        return np.asarray([getattr(cfg, name) for cfg in configs], dtype)

    return Rows(
        temperature_B=column("temperature", np.float32),
        top_k_B=column("top_k", np.int32),
        top_p_B=column("top_p", np.float32),
        min_p_B=column("min_p", np.float32),
        repetition_penalty_B=column("repetition_penalty", np.float32),
        max_new_tokens_B=column("max_new_tokens", np.int32),
        ignore_eos_B=column("ignore_eos", np.bool_),
        seed_B=column("seed", np.uint32),
    )


def penalize_repeats(
    logits_BV: Float[Array, "B V"], counts_BV: Int[Array, "B V"], penalty_B: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Make tokens that were seen less likely (Keskar et al. 2019, with the sign rule of Hugging Face).

    `logit / penalty` where the logit is positive, `logit * penalty` where it is not, for tokens with a count
    above zero; how often a token was seen makes no difference.

    >>> penalize_repeats(jnp.array([[2.0, -2.0, 1.0]]), jnp.array([[1, 3, 0]]), jnp.array([2.0])).tolist()
    [[1.0, -4.0, 1.0]]
    """
    penalty_B1 = penalty_B[:, None]
    penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(counts_BV > 0, penalized_BV, logits_BV)


def scale_temperature(
    logits_BV: Float[Array, "B V"], temperature_B: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Logits over temperature; 0 gives all mass to the largest logit (the lowest id among equals).

    >>> scale_temperature(jnp.array([[1.0, 3.0, 3.0], [1.0, 2.0, 3.0]]), jnp.array([0.0, 0.5])).tolist()
    [[-inf, 0.0, -inf], [2.0, 4.0, 6.0]]
    """
    greedy_B1 = temperature_B[:, None] == 0
    best_B1 = jnp.argmax(logits_BV, axis=-1, keepdims=True)
    point_BV = jnp.where(jnp.arange(logits_BV.shape[-1])[None, :] == best_B1, 0.0, -jnp.inf)
    return jnp.where(greedy_B1, point_BV, logits_BV / jnp.where(greedy_B1, 1.0, temperature_B[:, None]))


def keep_top_k_p(
    logits_BV: Float[Array, "B V"], k_B: Int[Array, "B"], p_B: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Top-k, then top-p (nucleus) on what is left, as one sort; other tokens become -inf.

    Top-k keeps every token whose logit is at least the k-th largest, so ties with it stay. Top-p goes through
    the tokens from the likeliest down (the lowest id first among equals) and keeps each one before which less
    than `p` of the probability has gone by: the smallest such set that reaches `p`, never empty.
    (Holtzman et al. 2020)

    Args:
        logits_BV: fp32.
        k_B: tokens to keep, 0 = all.
        p_B: probability to keep, 1 = all.

    >>> keep_top_k_p(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), jnp.array([0]), jnp.array([0.6])) > -jnp.inf
    Array([[ True,  True, False]], dtype=bool)
    """
    vocab = logits_BV.shape[-1]
    ids_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)

    def truncate(logits_BV: Array) -> Array:
        # Keeping a prefix of the order (logit down, id up) is all that both rules do, so the result is two
        # numbers a row: the logit and the id of the last token kept.
        falling_BV, order_BV = jax.lax.sort((-logits_BV, ids_BV), dimension=1, num_keys=2)
        sorted_BV = -falling_BV
        kth_B1 = jnp.take_along_axis(sorted_BV, jnp.clip(k_B - 1, 0, vocab - 1)[:, None], axis=1)
        in_k_BV = (k_B[:, None] == 0) | (sorted_BV >= kth_B1)
        probs_BV = jax.nn.softmax(jnp.where(in_k_BV, sorted_BV, -jnp.inf), axis=-1)
        before_BV = jnp.pad(jnp.cumsum(probs_BV, axis=-1)[:, :-1], ((0, 0), (1, 0)))
        # Sums may reach 1 early by rounding: p = 1 must still keep everything.
        in_p_BV = (p_B[:, None] >= 1) | (before_BV < p_B[:, None])
        kept_B1 = jnp.sum(in_k_BV & in_p_BV, axis=-1, keepdims=True)
        last_B1 = jnp.maximum(kept_B1 - 1, 0)
        last_logit_B1 = jnp.take_along_axis(sorted_BV, last_B1, axis=1)
        last_id_B1 = jnp.take_along_axis(order_BV, last_B1, axis=1)
        keep_BV = (logits_BV > last_logit_B1) | ((logits_BV == last_logit_B1) & (ids_BV <= last_id_B1))
        return jnp.where(keep_BV, logits_BV, -jnp.inf)

    # The sort costs more than all other steps together, so batches that ask for neither rule skip it.
    return jax.lax.cond(jnp.any((k_B > 0) | (p_B < 1)), truncate, lambda logits: logits, logits_BV)


def keep_min_p(logits_BV: Float[Array, "B V"], p_B: Float[Array, "B"]) -> Float[Array, "B V"]:
    """Keep tokens whose probability is at least `p` times the likeliest one's; others become -inf.

    In logits: `z >= max z + log p`. (Nguyen et al. 2024)

    >>> keep_min_p(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), jnp.array([0.5])) > -jnp.inf
    Array([[ True,  True, False]], dtype=bool)
    """
    floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(p_B)[:, None]
    return jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)


def process_logits(
    logits_BV: Float[Array, "B V"], rows: Rows, counts_BV: Int[Array, "B V"] | None = None
) -> Float[Array, "B V"]:
    """The logits of the distribution that is drawn from, -inf for what was cut off.

    Args:
        logits_BV: the model's, any float dtype; worked on in fp32.
        rows: parameters of each row.
        counts_BV: how often each token stands in the row's prompt and text; None = no row asks for a penalty.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if counts_BV is not None:
        logits_BV = penalize_repeats(logits_BV, counts_BV, rows.repetition_penalty_B)
    logits_BV = scale_temperature(logits_BV, rows.temperature_B)
    logits_BV = keep_top_k_p(logits_BV, rows.top_k_B, rows.top_p_B)
    return keep_min_p(logits_BV, rows.min_p_B)


def row_keys(seed_B: UInt[Array, "B"], index_B: Int[Array, "B"]) -> Key[Array, "B"]:
    """A key for each row from its seed and the index of the token in its text, and from nothing else.

    Args:
        seed_B: the request's seed.
        index_B: 0 for the first token after the prompt.
    """
    # threefry by name: another default generator would make the text depend on the mesh.
    return jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), index))(
        seed_B, index_B
    )


def sample_token(
    logits_BV: Float[Array, "B V"],
    key_B: Key[Array, "B"],
    rows: Rows,
    counts_BV: Int[Array, "B V"] | None = None,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draw a token for each row.

    Args:
        logits_BV: the model's.
        key_B: one key a row, from `row_keys`.
        rows: parameters of each row.
        counts_BV: as for `process_logits`.

    Returns:
        The tokens, i32, and their log-probabilities under the model itself: before penalty, temperature, cut.
    """
    processed_BV = process_logits(logits_BV, rows, counts_BV)
    # Noise belongs to token ids, not ranks. Mode 'low' would draw the rarest tokens too seldom.
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, processed_BV.shape[1:], mode="high"))(key_B)
    token_B = jnp.argmax(processed_BV + noise_BV, axis=-1).astype(jnp.int32)
    logprobs_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32), axis=-1)
    return token_B, jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=1)[:, 0]
