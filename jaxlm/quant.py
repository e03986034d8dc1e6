"""Products of 8-bit operands for training: int8 or fp8, with scales made anew for every product.

A product sum_k a_ik b_kj becomes s_i t_j sum_k q(a_ik / s_i) q(b_kj / t_j): one fp32 scale for each row
of `a` and each column of `b`, so that the largest entry of each is the largest number of its 8-bit type.
Rounding is to nearest, and gradients pass straight through it:

    format      y = x w          dx = g w', dw = x' g
    int8        int8, int8       compute dtype, with the rounded x and w
    int8_full   int8, int8       int8, int8
    fp8         e4m3, e4m3       e5m2 for g, e4m3 for x and w

Sums are int32 or fp32. Parameters, their gradients and everything else keep their dtypes; a weight is marked
as quantised by wrapping it in `Quantized`, whose product `weights.matmul` takes. Sources: arXiv:2209.05433
(fp8 formats), arXiv:2105.03536 (int8 training of transformers, AQT).
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxlm.tree import map_named
from jaxlm.weights import einsum


@dataclasses.dataclass(frozen=True)
class Format:
    """8-bit types of a product's operands."""

    forward: str  # of activation and weight, in both directions
    gradient: str  # of the incoming gradient; '' = the backward pass is not quantised


FORMATS: dict[str, Format] = {
    "int8": Format("int8", ""),
    "int8_full": Format("int8", "int8"),
    "fp8": Format("float8_e4m3fn", "float8_e5m2"),
}
# Leaves that are quantised: the weights of dense layers. Embedding and head stay as they are.
LEAVES = {f"attention/w{x}" for x in "qkvo"} | {f"cross_attention/w{x}" for x in "qkvo"}
LEAVES |= {f"mlp/w_{x}" for x in ("up", "gate", "down")}


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["format"])
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight whose products are of 8-bit operands; the weight itself is stored as it was."""

    array: Array
    format: str  # key of `FORMATS`

    def product(self, eqn: str, x: Array, dtype: str, accum: str, result: str) -> Array:
        """The product that `weights.matmul` asks a leaf type for."""
        return quantized_product(eqn, x, self.array, self.format, dtype, accum, result)


def mark(params: Any, format: str) -> Any:
    """The parameters with those of `LEAVES` wrapped, or as they are for the format 'none'."""
    if format == "none":
        return params

    def one(name: str, leaf: Array) -> Any:
        return Quantized(leaf, format) if "/".join(name.split("/")[-2:]) in LEAVES else leaf

    return map_named(one, params)


def largest(dtype: str) -> float:
    """The largest number of an 8-bit type; int8 is used symmetrically.

    >>> largest("int8"), largest("float8_e4m3fn"), largest("float8_e5m2")
    (127.0, 448.0, 57344.0)
    """
    return 127.0 if dtype == "int8" else float(jnp.finfo(dtype).max)


def quantize(x: Array, axes: Sequence[int], dtype: str) -> tuple[Array, Array]:
    """`(q, scale)` with q scale about x, and one scale, fp32, for all that lies along `axes` (kept, size 1).

    >>> q, scale = quantize(jnp.array([[0.5, -1.0], [0.0, 0.0]]), (1,), "int8")
    >>> q.tolist(), round(float(scale[0, 0]) * 127, 6)
    ([[64, -127], [0, 0]], 1.0)
    """
    x = x.astype(jnp.float32)
    top = jnp.max(jnp.abs(x), axis=tuple(axes), keepdims=True)
    # A row of zeros has no scale of its own; any does. That of NaN is NaN: as int8, NaN itself would be 0.
    scale = jnp.where(top == 0, 1.0, top) / largest(dtype)
    y = jnp.clip(x / scale, -largest(dtype), largest(dtype))
    return (jnp.round(y) if dtype == "int8" else y).astype(dtype), scale


def rounded_product(eqn: str, a: Array, b: Array, a_dtype: str, b_dtype: str) -> Array:
    """einsum of both operands quantised along what is summed over; fp32."""
    inputs, out = eqn.split("->")
    a_axes, b_axes = inputs.split(",")
    summed = [c for c in a_axes if c in b_axes and c not in out]
    shared = [c for c in a_axes if c in b_axes and c in out]
    (qa, sa), (qb, sb) = (
        quantize(x, [axes.index(c) for c in summed], dtype)
        for x, axes, dtype in ((a, a_axes, a_dtype), (b, b_axes, b_dtype))
    )
    where = lambda letters: tuple(tuple(axes.index(c) for c in letters) for axes in (a_axes, b_axes))  # noqa: E731
    made = shared + [c for axes in (a_axes, b_axes) for c in axes if c not in summed + shared]
    sums = jnp.int32 if a_dtype == "int8" else jnp.float32
    y = jax.lax.dot_general(qa, qb, (where(summed), where(shared)), preferred_element_type=sums)
    y = y.astype(jnp.float32).transpose([made.index(c) for c in out])
    for scale, axes in ((sa, a_axes), (sb, b_axes)):
        kept = [c for c in out if c in axes]
        scale = jnp.einsum(f"{axes}->{''.join(kept)}", scale)
        y = y * jnp.expand_dims(scale, [i for i, c in enumerate(out) if c not in axes])
    return y


@partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5, 6))
def quantized_product(
    eqn: str, x: Array, w: Array, format: str, dtype: str, accum: str, result: str
) -> Array:
    """`weights.product` of 8-bit operands, with the gradients of the table above."""
    kind = FORMATS[format].forward
    return rounded_product(eqn, x, w, kind, kind).astype(result)


def _forward(eqn, x, w, format, dtype, accum, result):
    return quantized_product(eqn, x, w, format, dtype, accum, result), (x, w)


def _backward(eqn, format, dtype, accum, result, saved, g):
    x, w = saved
    (x_axes, w_axes), out = eqn.split("->")[0].split(","), eqn.split("->")[1]
    to_x, to_w = f"{out},{w_axes}->{x_axes}", f"{x_axes},{out}->{w_axes}"
    kind, gradient = FORMATS[format].forward, FORMATS[format].gradient
    if gradient:
        dx = rounded_product(to_x, g, w, gradient, kind)
        dw = rounded_product(to_w, x, g, kind, gradient)
    else:
        summed = [c for c in x_axes if c in w_axes and c not in out]
        near_x, near_w = (
            _near(a, [axes.index(c) for c in summed], kind) for a, axes in ((x, x_axes), (w, w_axes))
        )
        dx, dw = einsum(to_x, g, near_w, dtype, accum), einsum(to_w, near_x, g, dtype, accum)
    return dx.astype(x.dtype), dw.astype(w.dtype)


def _near(x: Array, axes: Sequence[int], dtype: str) -> Array:
    """What `x` is taken for."""
    q, scale = quantize(x, axes, dtype)
    return q.astype(jnp.float32) * scale


quantized_product.defvjp(_forward, _backward)
