"""What a query may see."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def prefix_visible(prefix_BT: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Which columns each column of a prefix LM sees in its document: those before it, and the whole prefix.

    >>> prefix_visible(jnp.array([[1, 1, 0]])).astype(int).tolist()
    [[[1, 1, 0], [1, 1, 0], [1, 1, 1]]]
    """
    columns_T = jnp.arange(prefix_BT.shape[1])
    return (columns_T[:, None] >= columns_T) | (prefix_BT != 0)[:, None, :]


@dataclasses.dataclass(frozen=True)
class Mask:
    """What a query may see: same segment, not later (if causal), within the window, and allowed.

    Segment 0 is padding: nobody sees it. Without segments every key is real. Positions count from the start
    of a segment, and `window` counts the query itself. `ordered` promises that query i and key i are one
    token and that positions grow along a segment: then nothing after column i is visible to a causal query,
    and nothing `window` columns before it, and a backend may leave those keys out unseen. With a `part` the
    queries are but a part of those columns, inside a `shard_map` that splits them: of so many equal ones, the
    one of that number.
    """

    q_positions_BT: Int[Array, "B T"]
    k_positions_BS: Int[Array, "B S"]
    q_segments_BT: Int[Array, "B T"] | None = None
    k_segments_BS: Int[Array, "B S"] | None = None
    causal: bool = True
    window: int = 0
    allowed_BTS: Bool[Array, "B T S"] | None = None
    ordered: bool = False
    part: tuple[Int[Array, ""], int] | None = None  # (which, of how many)

    def visible_BTS(self) -> Bool[Array, "#B T S"]:
        """The mask written out."""
        distance_BTS = self.q_positions_BT[:, :, None] - self.k_positions_BS[:, None, :]
        seen = jnp.ones(distance_BTS.shape, bool)
        if self.causal:
            seen &= distance_BTS >= 0
        if self.window:
            seen &= distance_BTS < self.window
            if not self.causal:
                seen &= distance_BTS > -self.window
        if self.k_segments_BS is not None:
            seen &= (self.k_segments_BS != 0)[:, None, :]
            if self.q_segments_BT is not None:
                seen &= self.q_segments_BT[:, :, None] == self.k_segments_BS[:, None, :]
        if self.allowed_BTS is not None:
            seen &= self.allowed_BTS
        return seen
