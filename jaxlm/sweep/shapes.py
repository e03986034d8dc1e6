"""Shapes of one family, and the one that comes closest to a size.

A family has one shape for each model_dim D: the depth follows D by a fixed aspect ratio (or is fixed), head
dimension, MLP width and key/value heads follow D. Sizes therefore grow with D alone, and the closest shape is
found by bisection.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from jaxlm.errors import UserError, check
from jaxlm.model.config import TransformerConfig
from jaxlm.scaling.counting import count

# What a size may be measured by; FLOPs are exact training FLOPs per token.
MEASURES: dict[str, Callable[[TransformerConfig, int], float]] = {
    "n_total": lambda cfg, seq_len: count(cfg, seq_len).n_total,
    "n_non_embedding": lambda cfg, seq_len: count(cfg, seq_len).n_non_embedding,
    "n_active": lambda cfg, seq_len: count(cfg, seq_len).n_active,
    "n_products": lambda cfg, seq_len: count(cfg, seq_len).n_products,
    "flops": lambda cfg, seq_len: count(cfg, seq_len).flops_train,
}
DIM_MOST = 2**20  # the widths of a family are listed
BEYOND = 1.25  # a size this far outside the family is refused, a nearer one takes its end


@dataclasses.dataclass(frozen=True)
class ShapeConfig:
    """A family of shapes: one for each model_dim. All other fields of the model stay those of `run.model`."""

    dim_min: int = 64  # smallest model_dim D
    dim_max: int = 8192  # largest
    dim_step: int = 64  # D is a multiple of this and of its head_dim
    head_dims: tuple[tuple[int, int], ...] = ((0, 64),)  # (from this D on, head_dim) pairs, D growing
    depth: int = 0  # layers of every shape; 0 = D / aspect
    depth_min: int = 1  # fewest layers that the aspect ratio may ask for
    aspect: float = 64.0  # D / layers, kept at every size (layers are rounded, half up)
    mlp_ratio: float = 4.0  # MLP width / D (a gated MLP of the same size: 8/3)
    mlp_multiple: int = 1  # MLP width is rounded to a multiple of this
    kv_ratio: int = 1  # query heads per key/value head

    def __post_init__(self) -> None:
        least = {"dim_min": 1, "dim_step": 1, "depth": 0, "depth_min": 1, "mlp_multiple": 1, "kv_ratio": 1}
        for name, low in least.items():
            check(getattr(self, name) >= low, f"shape.{name}={getattr(self, name)} must be at least {low}")
        check(
            self.dim_max >= self.dim_min,
            f"shape.dim_max={self.dim_max} is below shape.dim_min={self.dim_min}",
        )
        check(self.dim_max <= DIM_MOST, f"shape.dim_max={self.dim_max} is beyond {DIM_MOST}")
        check(self.aspect > 0, f"shape.aspect={self.aspect:g} must be positive")
        check(self.mlp_ratio > 0, f"shape.mlp_ratio={self.mlp_ratio:g} must be positive")
        starts = [start for start, _ in self.head_dims]
        check(
            len(starts) > 0 and starts[0] <= self.dim_min and starts == sorted(set(starts)),
            f"shape.head_dims={self.head_dims}: pairs (from this D on, head_dim) must grow and start at or "
            f"below dim_min={self.dim_min}",
        )
        check(all(h >= 1 for _, h in self.head_dims), f"shape.head_dims={self.head_dims}: a head_dim below 1")

    def head_dim(self, dim: int) -> int:
        """H of the shape with model_dim `dim`.

        >>> family = ShapeConfig(dim_min=16, head_dims=((0, 8), (64, 16)))
        >>> family.head_dim(56), family.head_dim(64)
        (8, 16)
        """
        return [h for start, h in self.head_dims if start <= dim][-1]

    def dims(self) -> list[int]:
        """Every model_dim of the family.

        >>> ShapeConfig(dim_min=40, dim_max=96, dim_step=8, head_dims=((0, 8), (64, 16))).dims()
        [40, 48, 56, 64, 80, 96]
        """
        first = -(-self.dim_min // self.dim_step) * self.dim_step
        steps = range(first, self.dim_max + 1, self.dim_step)
        return [d for d in steps if d % (self.head_dim(d) * self.kv_ratio) == 0]

    def layers(self, dim: int) -> int:
        """L of the shape with model_dim `dim`.

        >>> [ShapeConfig(aspect=32.0, depth_min=2).layers(d) for d in (16, 64, 80, 96, 112)]
        [2, 2, 3, 3, 4]
        """
        return self.depth or max(self.depth_min, math.floor(dim / self.aspect + 0.5))


def shape_at(base: TransformerConfig, family: ShapeConfig, dim: int) -> TransformerConfig:
    """`base` with the shape that the family has at model_dim `dim`."""
    head_dim = family.head_dim(dim)
    heads = dim // head_dim
    width = max(1, round(family.mlp_ratio * dim / family.mlp_multiple)) * family.mlp_multiple
    kv_heads = heads // family.kv_ratio if family.kv_ratio > 1 else 0  # 0 is how a config says: as many
    attention = dataclasses.replace(base.attention, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    return dataclasses.replace(
        base, model_dim=dim, num_layers=family.layers(dim), mlp_dim=width, attention=attention
    )


def closest_shapes(
    base: TransformerConfig,
    family: ShapeConfig,
    sizes: Sequence[float],
    *,
    by: str = "n_total",
    seq_len: int,
) -> list[TransformerConfig]:
    """For each size the shape of the family that is closest to it in its logarithm, all of them different.

    Where two sizes have the same closest shape, the one farther from the middle size takes the next shape
    outwards: a row of sizes keeps its centre and its number of points in a coarse family.

    Args:
        base: every field that is no matter of shape.
        family: see `ShapeConfig`.
        sizes: parameters or training FLOPs per token.
        by: name in MEASURES.
        seq_len: T, which FLOPs depend on.

    Raises:
        UserError: the family is empty or has too few shapes, or all of it is far below or above a size.
    """
    check(
        base.moe.expert_dim == 0,
        f"model.moe.expert_dim={base.moe.expert_dim} would stay the same at every size: leave it 0 (as wide "
        "as the MLP) and set grid.shape.mlp_ratio",
    )
    dims = family.dims()
    if not dims:
        raise UserError(
            f"grid.shape holds no shape: no D from {family.dim_min} to {family.dim_max} is a multiple of "
            f"dim_step={family.dim_step} and of kv_ratio={family.kv_ratio} heads of {family.head_dims}"
        )

    def measured(i: int) -> float:
        return MEASURES[by](shape_at(base, family, dims[i]), seq_len)

    def closest(size: float) -> int:
        low, high = 0, len(dims) - 1
        for end, wrong in ((low, size * BEYOND < measured(low)), (high, size > measured(high) * BEYOND)):
            if wrong:
                field, most = ("dim_min", "smallest") if end == low else ("dim_max", "largest")
                raise UserError(
                    f"no shape of the family comes near {by}={size:.4g}: with grid.shape.{field}="
                    f"{getattr(family, field)} the {most} has {measured(end):.4g}"
                )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if measured(middle) <= size else (low, middle)
        return min((low, high), key=lambda i: abs(math.log(measured(i) / size)))

    order = sorted(range(len(sizes)), key=lambda k: sizes[k])
    few = (
        f"the family has too few shapes for {len(sizes)} different ones from {by}={min(sizes):.4g} to "
        f"{max(sizes):.4g}: lower grid.shape.dim_step={family.dim_step} or ask for fewer sizes"
    )
    check(len(sizes) <= len(dims), few)
    places, middle = [closest(sizes[k]) for k in order], len(order) // 2
    for j in range(middle + 1, len(order)):
        places[j] = max(places[j], places[j - 1] + 1)
    for j in range(middle - 1, -1, -1):
        places[j] = min(places[j], places[j + 1] - 1)
    check(places[0] >= 0 and places[-1] < len(dims), few)
    place = dict(zip(order, places, strict=True))
    return [shape_at(base, family, dims[place[k]]) for k in range(len(sizes))]


def describe_shape(cfg: TransformerConfig) -> str:
    """A shape in a few letters: layers, model_dim, heads (/ key-value heads) x head_dim, MLP width, experts.

    >>> describe_shape(TransformerConfig(num_layers=2, model_dim=64, mlp_dim=256))
    'L2 D64 4x16 F256'
    """
    heads, kv = cfg.attention.num_heads, cfg.attention.kv_heads
    grouped = "" if kv == heads else f"/{kv}"
    experts = f" E{cfg.moe.num_experts}k{cfg.moe.top_k}" if cfg.moe.num_experts else ""
    return f"L{cfg.num_layers} D{cfg.model_dim} {heads}{grouped}x{cfg.head_dim} F{cfg.mlp_width}{experts}"
