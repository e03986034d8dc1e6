"""Disentangled attention: scores of contents against distances beside those of contents against contents.

With rows r_d of one table for the distances d = query - key, and an H-wide head,

    score = (q k + q (r_d W_k) + k (r_d W_q)) / sqrt(H (1 + number of terms))

The second product is the term `c2p`, the third `p2c`; W_k and W_q are the layer's own projections of keys and
queries, or further ones. Far distances share a row of logarithmic width. He et al. 2021, arXiv:2006.03654 and
arXiv:2111.09543.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.errors import check, check_choice
from jaxlm.weights import einsum

TERMS = ("c2p", "p2c")


@dataclasses.dataclass(frozen=True)
class DisentangledConfig:
    """Which terms there are, and how distances are told apart."""

    span: int = 0  # distances to either side that are told apart, at least nearly; 0 = no such attention
    terms: tuple[str, ...] = TERMS  # c2p: content of the query, p2c: of the key, each against the distance
    buckets: int = 0  # rows to either side, half of them for the nearest distances; 0 = one a distance
    shared: bool = True  # distances go through the projections of keys and queries, not their own
    norm: bool = False  # the table is normalised

    def __post_init__(self) -> None:
        for name in ("span", "buckets"):
            value = getattr(self, name)
            check(value >= 0, f"model.disentangled.{name}={value} must not be negative")
        for term in self.terms:
            check_choice(term, TERMS, "model.disentangled.terms")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check(
                self.span > 0 or value == field.default,
                f"model.disentangled.{field.name}={value!r} without attention to distances: set "
                "model.disentangled.span",
            )
        check(
            0 < len(set(self.terms)) == len(self.terms),
            f"model.disentangled.terms={self.terms!r} must name one term or both, each once",
        )
        check(
            self.buckets != 1 and self.buckets <= self.span,
            f"model.disentangled.buckets={self.buckets} must lie between 2 and model.disentangled.span="
            f"{self.span}, or be 0 for one a distance",
        )

    @property
    def rows(self) -> int:
        """R, of the table."""
        return 2 * (self.buckets or self.span)

    def scale(self, head_dim: int) -> float:
        """Of all scores."""
        return (head_dim * (1 + len(self.terms if self.span else ()))) ** -0.5

    def row(self, distance: Int[Array, "*B"]) -> Int[Array, "*B"]:
        """Row of the table for each distance query - key.

        >>> DisentangledConfig(span=32, buckets=8).row(jnp.array([0, 1, -4, 5, 12, -31, 99])).tolist()
        [8, 9, 4, 13, 14, 1, 15]
        """
        size = self.buckets or self.span
        if self.buckets:
            table = jnp.asarray(_buckets(self.buckets, self.span))
            far = jnp.minimum(jnp.abs(distance), table.shape[0] - 1)
            distance = jnp.sign(distance) * table[far]
        return jnp.clip(distance + size, 0, 2 * size - 1)


def _buckets(buckets: int, span: int) -> np.ndarray:
    """Bucket of each distance >= 0, up to one from which on all share a bucket."""
    near, ratio = buckets // 2, (span - 1) / (buckets // 2)
    if near == 1 or ratio <= 1:
        return np.arange(near + 1, dtype=np.int32)
    last = math.ceil(near * ratio ** (near / (near - 1))) + 1
    far = np.maximum(np.arange(last + 1), near).astype(np.float32)
    # In float32, as the published models were trained: some distances lie on the border of two buckets.
    logs = np.log(far / np.float32(near)) / np.log(np.float32(ratio))
    far = np.ceil(logs * np.float32(near - 1)).astype(np.int32) + near
    return np.where(np.arange(last + 1) <= near, np.arange(last + 1), far).astype(np.int32)


def disentangled_scores(
    q_BTNH: Float[Array, "B T N H"],
    k_BSNH: Float[Array, "B S N H"],
    tables: Mapping[str, Float[Array, "R N H"]],
    row_BTS: Int[Array, "#B T S"],
    *,
    dtype: str,
    accum: str,
) -> Float[Array, "B N T S"]:
    """The further terms, to be scaled like the products of queries and keys and added to them.

    Args:
        q_BTNH, k_BSNH: queries and keys.
        tables: term -> what the rows of distances became as keys (c2p) or as queries (p2c).
        row_BTS: the row of each query's distance from each key.
        dtype, accum: of the products' operands and of their sums.
    """
    row_B1TS = row_BTS[:, None]
    total_BNTS = jnp.zeros((1, 1, 1, 1), accum)
    if "c2p" in tables:
        all_BNTR = einsum("BTNH,RNH->BNTR", q_BTNH, tables["c2p"], dtype, accum)
        total_BNTS += jnp.take_along_axis(all_BNTR, row_B1TS, axis=3)
    if "p2c" in tables:
        all_BNRS = einsum("BSNH,RNH->BNRS", k_BSNH, tables["p2c"], dtype, accum)
        total_BNTS += jnp.take_along_axis(all_BNRS, row_B1TS, axis=2)
    return total_BNTS
