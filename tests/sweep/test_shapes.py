"""The shape search against trying every shape of a family."""

import dataclasses
import math

import pytest

from jaxlm.errors import UserError
from jaxlm.model.config import TransformerConfig
from jaxlm.model.moe import MoEConfig
from jaxlm.scaling.counting import count
from jaxlm.sweep.shapes import MEASURES, ShapeConfig, closest_shapes, describe_shape, shape_at

BASE = TransformerConfig(activation="gelu")
SMALL = ShapeConfig(dim_min=8, dim_max=128, dim_step=8, head_dims=((0, 8), (64, 16)), depth=2)
DEEP = ShapeConfig(
    dim_min=64, dim_max=512, dim_step=64, aspect=48.0, depth_min=2, kv_ratio=2, head_dims=((0, 32),)
)


def closest(size, family=SMALL, **options):
    (found,) = closest_shapes(BASE, family, [size], seq_len=128, **options)
    return found


@pytest.mark.parametrize("by", MEASURES)
@pytest.mark.parametrize("family", [SMALL, DEEP], ids=["small", "deep"])
def test_the_search_finds_what_trying_all_finds(family, by):
    shapes = [shape_at(BASE, family, dim) for dim in family.dims()]
    sizes = [MEASURES[by](shape, 128) for shape in shapes]
    assert sizes == sorted(sizes)
    for factor in (0.95, 1.0, 1.2, 1.9, 4.3, sizes[-1] / sizes[0]):
        size = sizes[0] * factor
        best = min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i] / size)))
        assert closest(size, family, by=by) == shapes[best]


def test_flops_depend_on_the_context():
    long = closest_shapes(BASE, SMALL, [1e6], by="flops", seq_len=4096)[0]
    assert long.model_dim < closest(1e6, by="flops").model_dim
    assert count(long, 4096).flops_train == pytest.approx(1e6, rel=0.3)


def test_aspects_are_kept():
    for dim in DEEP.dims():
        shape = shape_at(BASE, DEEP, dim)
        assert shape.num_layers == max(2, math.floor(dim / 48 + 0.5))
        assert shape.mlp_width == 4 * dim
        assert shape.attention.num_heads * shape.head_dim == dim
        assert shape.attention.kv_heads * 2 == shape.attention.num_heads
    ratio = dataclasses.replace(DEEP, mlp_ratio=8 / 3, mlp_multiple=16)
    assert [shape_at(BASE, ratio, dim).mlp_width for dim in (64, 128)] == [176, 336]
    assert [(d, SMALL.head_dim(d)) for d in (56, 64)] == [(56, 8), (64, 16)]
    assert all(d % SMALL.head_dim(d) == 0 for d in SMALL.dims())
    # A family of one head a group says it as a hand-written config does: equal runs must have equal ids.
    assert shape_at(BASE, SMALL, 64).attention.num_kv_heads == 0


def test_a_row_of_sizes_has_as_many_shapes_and_keeps_its_centre():
    center = closest(41e3)
    row = closest_shapes(BASE, SMALL, [40e3, 40.5e3, 41e3, 41.5e3, 42e3], seq_len=128)
    dims = [shape.model_dim for shape in row]
    assert dims == [center.model_dim + 8 * k for k in (-2, -1, 0, 1, 2)]


def test_rows_are_in_the_order_asked_for():
    up = closest_shapes(BASE, SMALL, [15e3, 40e3, 130e3], seq_len=128)
    down = closest_shapes(BASE, SMALL, [130e3, 15e3, 40e3], seq_len=128)
    assert [down[1], down[2], down[0]] == up


def test_refusals_name_what_to_change():
    smallest = count(shape_at(BASE, SMALL, 8), 128).n_total
    assert closest(smallest / 1.2).model_dim == 8
    with pytest.raises(UserError, match=r"n_total=4000.*grid\.shape\.dim_min=8 the smallest has 5672"):
        closest(4000)
    with pytest.raises(UserError, match=r"grid\.shape\.dim_max=128 the largest has"):
        closest(1e8)
    with pytest.raises(UserError, match="too few shapes for 4 different ones"):
        closest_shapes(BASE, SMALL, [5.6e3, 5.7e3, 5.8e3, 5.9e3], seq_len=128)
    with pytest.raises(UserError, match="holds no shape"):
        closest(1e6, ShapeConfig(dim_min=65, dim_max=100))
    moe = dataclasses.replace(BASE, mlp_pattern=("moe",), moe=MoEConfig(num_experts=4, expert_dim=64))
    with pytest.raises(UserError, match="expert_dim=64 would stay the same"):
        closest_shapes(moe, SMALL, [1e5], seq_len=128)
    with pytest.raises(UserError, match="head_dims"):
        ShapeConfig(head_dims=((128, 64),))
    with pytest.raises(UserError, match="below shape"):
        ShapeConfig(dim_min=128, dim_max=64)


def test_a_shape_in_a_few_letters():
    shape = shape_at(BASE, DEEP, 128)
    assert describe_shape(shape) == "L3 D128 4/2x32 F512"
    moe = dataclasses.replace(BASE, mlp_pattern=("moe",), moe=MoEConfig(num_experts=8, top_k=2))
    assert describe_shape(moe) == "L4 D128 4x32 F512 E8k2"
