"""How one tensor of a checkpoint holds one or more leaves of ours: pairs of a reader and a writer.

Both are reshapes, transposes, cuts and joins: what is written is bit for bit what was read.

PyTorch's linear layers keep [out, in], GPT-2's keep [in, out]; ours keep the dimensions apart, inputs first.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxlm.model.config import TransformerConfig

Array = Any  # numpy, jax or a tracer: shapes are found by tracing a writer
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Packing:
    """`read` gives the leaves of a tensor, `write` makes the tensor of them again."""

    leaves: tuple[str, ...]
    read: Callable[[TransformerConfig, Array, Sequence[Shape]], list[Array]]
    write: Callable[
        [TransformerConfig, Any, Sequence[Array]], Array
    ]  # the second argument: numpy or jax.numpy


def same(leaf: str) -> Packing:
    """A table or a vector; heads are joined."""
    return Packing(
        (leaf,),
        lambda cfg, t, shapes: [t.reshape(shapes[0])],
        lambda cfg, xp, leaves: leaves[0].reshape(-1) if leaf.split("/")[-1] in _HEAD_BIASES else leaves[0],
    )


def row(leaf: str) -> Packing:
    """A vector that is kept as a matrix of one row."""
    return Packing(
        (leaf,),
        lambda cfg, t, shapes: [t.reshape(shapes[0])],
        lambda cfg, xp, leaves: leaves[0].reshape(1, -1),
    )


_HEAD_BIASES = ("bq", "bk", "bv", "bk_rel", "bq_rel")


def linear(leaf: str, *, inputs: int = 1, torch: bool = True) -> Packing:
    """A matrix whose leaf has `inputs` leading dimensions of input; `torch` = stored as [out, in]."""

    def read(cfg: TransformerConfig, t: Array, shapes: Sequence[Shape]) -> list[Array]:
        return [(t.T if torch else t).reshape(shapes[0])]

    def write(cfg: TransformerConfig, xp: Any, leaves: Sequence[Array]) -> Array:
        (w,) = leaves
        w = w.reshape(math.prod(w.shape[:inputs]), -1)
        return w.T if torch else w

    return Packing((leaf,), read, write)


def convolution(leaf: str) -> Packing:
    """A convolution of ours, [width, inputs, outputs], kept as [outputs, inputs, width]."""
    return Packing(
        (leaf,),
        lambda cfg, t, shapes: [t.transpose(2, 1, 0)],
        lambda cfg, xp, leaves: leaves[0].transpose(2, 1, 0),
    )


def head_rows(leaf: str) -> Packing:
    """A vector of ours, [N H], kept as [N, H]."""
    return Packing(
        (leaf,),
        lambda cfg, t, shapes: [t.reshape(shapes[0])],
        lambda cfg, xp, leaves: leaves[0].reshape(-1, cfg.head_dim),
    )


def alternating(first: str, second: str) -> Packing:
    """Two leaves in one tensor, of whose last dimension every other number is the second's."""

    def write(cfg: TransformerConfig, xp: Any, leaves: Sequence[Array]) -> Array:
        a, b = leaves
        return xp.stack([a, b], axis=-1).reshape(*a.shape[:-1], -1)

    return Packing((first, second), lambda cfg, t, shapes: [t[..., ::2], t[..., 1::2]], write)


def split_heads(first: str, second: str) -> Packing:
    """Matrices [R, N, ...] stored as one [out, in], a head's part of the first before that of the second."""

    def read(cfg: TransformerConfig, t: Array, shapes: Sequence[Shape]) -> list[Array]:
        rank, heads, width = shapes[0]
        t = t.T.reshape(rank, heads, -1)
        return [t[..., :width], t[..., width:]]

    def write(cfg: TransformerConfig, xp: Any, leaves: Sequence[Array]) -> Array:
        joined = xp.concatenate(leaves, axis=-1)
        return joined.reshape(joined.shape[0], -1).T

    return Packing((first, second), read, write)


def joined_qkv(*, bias: bool = False, torch: bool = True, grouped: bool = False) -> Packing:
    """Queries, keys and values in one matrix or one bias.

    Joined whole (all of q, of k, of v) or, `grouped`, by key heads: each one's G query heads, key and value.
    """
    names = ("bq", "bk", "bv") if bias else ("wq", "wk", "wv")

    def read(cfg: TransformerConfig, t: Array, shapes: Sequence[Shape]) -> list[Array]:
        t = t.reshape(1, -1) if bias else t.T if torch else t
        H, K = cfg.head_dim, cfg.attention.kv_heads
        N = cfg.attention.num_heads
        if grouped:
            t = t.reshape(t.shape[0], K, N // K + 2, H)
            parts = t[:, :, :-2], t[:, :, -2], t[:, :, -1]
        else:
            parts = t[:, : N * H], t[:, N * H : (N + K) * H], t[:, (N + K) * H :]
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def write(cfg: TransformerConfig, xp: Any, leaves: Sequence[Array]) -> Array:
        D = 1 if bias else leaves[0].shape[0]
        H, K = cfg.head_dim, cfg.attention.kv_heads
        if grouped:
            t = xp.concatenate([x.reshape(D, K, -1, H) for x in leaves], axis=2).reshape(D, -1)
        else:
            t = xp.concatenate([x.reshape(D, -1) for x in leaves], axis=1)
        return t.reshape(-1) if bias else t.T if torch else t

    return Packing(tuple(f"attention/{name}" for name in names), read, write)
