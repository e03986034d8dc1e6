"""The one door through which a parameter meets an activation.

Every contraction of a weight goes through `matmul`, so that dtypes, layout and, later, leaf types with a
product of their own (LoRA, int8) are settled in one place.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxlm.sharding import constrain

# The name by which a remat policy finds the results of `matmul`.
PRODUCT = "matmul"
# Likewise the result and the logsumexp of an attention kernel: with both it need not run again.
ATTENDED = "attended"


def _split(eqn: str) -> tuple[str, str, str]:
    inputs, out = eqn.split("->")
    x, w = inputs.split(",")
    return x, w, out


def einsum(eqn: str, a: Array, b: Array, dtype: str, accum: str) -> Array:
    """Operands cast to `dtype`, sums in `accum`; gradients are autodiff's, unlike those of `product`."""
    # fp32 means fp32: the default precision of a TPU would round such operands to bf16, of a GPU to TF32.
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    return jnp.einsum(
        eqn, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=accum
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5))
def product(eqn: str, x: Array, w: Array, dtype: str, accum: str, result: str) -> Array:
    """einsum with both operands cast to `dtype`, sums kept in `accum`, returned in `result`.

    Its gradients are products of the same kind. Parameters go through `matmul`; attention uses this directly.
    """
    return einsum(eqn, x, w, dtype, accum).astype(result)


def _product_fwd(eqn: str, x: Array, w: Array, dtype: str, accum: str, result: str):
    # The cast weight is not kept: casting again costs less than holding a second copy of every weight.
    return product(eqn, x, w, dtype, accum, result), (x, w)


def _product_bwd(eqn: str, dtype: str, accum: str, result: str, saved: tuple[Array, Array], g: Array):
    # Autodiff would transpose the product into one whose result type is the operand's (bf16), which is both
    # slower
    # on a CPU (measured 0.6 of fp32 against 1.6) and rounds weight gradients before they are summed.
    x, w = saved
    x_axes, w_axes, out_axes = _split(eqn)
    dx = einsum(f"{out_axes},{w_axes}->{x_axes}", g, w, dtype, accum)
    dw = einsum(f"{x_axes},{out_axes}->{w_axes}", x, g, dtype, accum)
    return dx.astype(x.dtype), dw.astype(w.dtype)


product.defvjp(_product_fwd, _product_bwd)


def matmul(
    eqn: str,
    x: Array,
    w: Array,
    *,
    dtype: str = "float32",
    accum: str = "float32",
    result: str | None = None,
    out: tuple[str | None, ...] | None = None,
) -> Array:
    """Contract activation `x` with weight `w`.

    Operands are cast to `dtype`, products are summed in `accum`, and the result is returned in `result`. Both
    gradients are products of the same kind; the weight's arrives in the weight's own dtype, unrounded in
    between.

    Args:
        eqn: einsum equation `x,w->out`; each letter stands in at least two of the three terms.
        x: activation, any dtype.
        w: weight, any dtype; or a leaf type with a method `product(eqn, x, dtype, accum, result)` of its own.
        dtype: compute dtype.
        accum: dtype of the sums.
        result: dtype of the result; default `dtype`.
        out: logical axes of the result, to constrain its layout.

    >>> x, w = jnp.ones((2, 3)), jnp.ones((3, 4))
    >>> matmul("BD,DF->BF", x, w, dtype="bfloat16").dtype.name
    'bfloat16'
    """
    dtypes = str(dtype), str(accum), str(result or dtype)
    y = w.product(eqn, x, *dtypes) if hasattr(w, "product") else product(eqn, x, w, *dtypes)
    y = checkpoint_name(y, PRODUCT)
    return y if out is None else constrain(y, *out)


def gather(
    table_VD: Float[Array, "V D"], ids: Int[Array, "*S"], *, dtype: str = "float32"
) -> Float[Array, "*S D"]:
    """Rows of an embedding table, in the compute dtype."""
    return jnp.take(table_VD, ids, axis=0, mode="clip").astype(dtype)
