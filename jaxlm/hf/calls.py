"""What the calls of a loaded model share: rows as `transformers` shapes them, and settings of generation."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxlm.errors import UserError, check
from jaxlm.generate.decode import Generator
from jaxlm.generate.decoder import decoder
from jaxlm.model.activations import activations
from jaxlm.model.config import TransformerConfig
from jaxlm.sharding import Layout

Ids = Int[np.ndarray, "B T"]


def ids_of(ids: Any, name: str = "input_ids") -> Ids:
    """Ids as an array of rows.

    Raises:
        UserError: another number of axes than two.
    """
    ids = np.asarray(ids)
    check(ids.ndim == 2, f"{name} has shape {list(ids.shape)}, expected [batch, columns]")
    return ids


def beside(ids: Ids, x: Any, name: str, ids_name: str = "input_ids") -> Int[np.ndarray, "B T"] | None:
    """An array that goes with ids (their mask, positions, types), i32; None stays None.

    Raises:
        UserError: of another shape than the ids.
    """
    if x is None:
        return None
    x = np.asarray(x)
    check(x.shape == ids.shape, f"{name} has shape {list(x.shape)}, expected {list(ids.shape)} as {ids_name}")
    return x.astype(np.int32)


def masked(
    ids: Any, mask: Any, ids_name: str = "input_ids", mask_name: str = "attention_mask"
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Ids and their mask, i32; without one all are tokens."""
    ids = ids_of(ids, ids_name)
    mask = beside(ids, mask, mask_name, ids_name)
    return ids.astype(np.int32), np.ones(ids.shape, np.int32) if mask is None else mask


def unpadded(ids: Ids, mask: Int[np.ndarray, "B T"]) -> list[list[int]]:
    """The tokens of each row.

    >>> unpadded(np.array([[0, 5], [6, 7]]), np.array([[0, 1], [1, 1]]))
    [[5], [6, 7]]
    """
    return [[int(t) for t in row[real != 0]] for row, real in zip(ids, mask, strict=True)]


def continued(ids: Ids, new: Sequence[list[int]], pad: int) -> Ids:
    """The rows as they were given, and what follows each, filled up to the longest.

    >>> continued(np.array([[1], [2]]), [[3, 4], [5]], 0).tolist()
    [[1, 3, 4], [2, 5, 0]]
    """
    longest = max(map(len, new))
    filled = [row + [pad] * (longest - len(row)) for row in new]
    return np.concatenate([ids, np.asarray(filled, ids.dtype).reshape(len(ids), longest)], axis=1)


def counted(mask_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions: tokens of a row are counted from 0, padding is not."""
    return jnp.maximum(jnp.cumsum(mask_BT, axis=1) - 1, 0)


def streams(cfg: TransformerConfig, params: Any, ids_BT: jax.Array, **where: Any) -> list[jax.Array]:
    """The `hidden_states` of `transformers`: embeddings, after each layer, the last after the last norm."""
    seen = activations(cfg, params, ids_BT, **where)
    return [seen["embedding"], *seen["residual"][:-1], seen["hidden"]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What generation_config.json says; without such a file, what config.json does."""

    generation: Mapping[str, Any]
    config: Mapping[str, Any]

    def get(self, name: str, given: Any = None) -> Any:
        """A setting: the one given, else the file's, None if that has none."""
        return (self.generation or self.config).get(name) if given is None else given

    def several(self, name: str, given: Any = None) -> tuple[int, ...]:
        """A setting of one token, several or none."""
        ids = self.get(name, given)
        return () if ids is None else (int(ids),) if np.ndim(ids) == 0 else tuple(map(int, ids))

    def pad(self, given: int | None, eos: tuple[int, ...]) -> int:
        """The token that fills rows: without one the first end token, else 0."""
        pad = self.get("pad_token_id", given)
        return int(pad) if pad is not None else eos[0] if eos else 0

    def banned(self) -> tuple[int, ...]:
        """Tokens that are never drawn.

        Raises:
            UserError: `bad_words_ids` of several tokens.
        """
        words = self.get("bad_words_ids") or []
        if any(len(word) != 1 for word in words):
            raise UserError(f"bad_words_ids={words} of several tokens are not supported, only of one")
        return (*(word[0] for word in words), *(self.get("suppress_tokens") or ()))

    def penalty(self, given: float | None) -> float:
        """The repetition penalty, 1 = none."""
        penalty = self.get("repetition_penalty", given)
        return 1.0 if penalty is None else float(penalty)


def generators(
    cfg: TransformerConfig, layout: Layout | None
) -> Callable[[tuple[int, ...], tuple[int, ...]], Generator]:
    """`(end tokens, tokens never drawn) -> Generator`, which keeps the last few with their programs."""
    model = decoder(cfg)

    @functools.lru_cache(maxsize=4)
    def generator(eos: tuple[int, ...], banned: tuple[int, ...]) -> Generator:
        def unembed(params: Any, hidden_BTD: jax.Array) -> jax.Array:
            return model.unembed(params, hidden_BTD).at[..., np.asarray(banned)].set(-jnp.inf)

        chosen = dataclasses.replace(model, unembed=unembed) if banned else model
        return Generator(chosen, layout=layout, eos_ids=eos)

    return generator
