"""Norms, MLPs and dropout."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.weights import matmul


def relu2(x: Array) -> Array:
    """Squared ReLU (So et al. 2021, arXiv:2109.08668)."""
    return jnp.square(jax.nn.relu(x))


# name -> (elementwise function, whether it gates a second projection; Shazeer 2020, arXiv:2002.05202)
ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], bool]] = {
    "gelu": (partial(jax.nn.gelu, approximate=False), False),
    "gelu_tanh": (partial(jax.nn.gelu, approximate=True), False),
    "relu": (jax.nn.relu, False),
    "relu2": (relu2, False),
    "silu": (jax.nn.silu, False),
    "swiglu": (jax.nn.silu, True),
    "geglu": (partial(jax.nn.gelu, approximate=True), True),
}

Initializer = Callable[..., Array]


def normal_init(std: float) -> Initializer:
    """Normal of this standard deviation, drawn in fp32 whatever the parameter's dtype."""

    def init(key: Array, shape: tuple[int, ...], dtype: str = "float32") -> Array:
        return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return init


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero elements with probability `rate` and scale the rest by 1/(1-rate); without a key, `x` as it is."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


class Norm(nn.Module):
    """RMSNorm x / rms(x) * scale (arXiv:1910.07467), or LayerNorm (x - mean) / std * scale + bias.

    Statistics in fp32; the result in the input's dtype. Normalises the last axis.
    """

    kind: str
    eps: float
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        dim = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (dim,), self.param_dtype)
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            bias = self.param("bias", nn.initializers.zeros, (dim,), self.param_dtype)
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        y = y * scale.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y + bias.astype(jnp.float32)
        return y.astype(x.dtype)


class MLP(nn.Module):
    """`w_down act(x w_up)`, or gated: `w_down (act(x w_gate) * (x w_up))`."""

    mlp_dim: int
    activation: str
    bias: bool
    init_std: Callable[[int], float]  # fan in -> standard deviation
    out_scale: float  # of the initial output projection
    dtype: str
    param_dtype: str
    accum_dtype: str

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        fn, gated = ACTIVATIONS[self.activation]
        dim = x_BTD.shape[-1]
        dtypes = dict(dtype=self.dtype, accum=self.accum_dtype)
        hidden_axes = ("batch", "length", "mlp")
        up_init = normal_init(self.init_std(dim))
        down_init = normal_init(self.init_std(self.mlp_dim) * self.out_scale)
        w_up_DF = self.param("w_up", up_init, (dim, self.mlp_dim), self.param_dtype)
        with jax.named_scope("mlp_up"):
            h_BTF = matmul("BTD,DF->BTF", x_BTD, w_up_DF, out=hidden_axes, **dtypes)
            if self.bias:
                b_up_F = self.param("b_up", nn.initializers.zeros, (self.mlp_dim,), self.param_dtype)
                h_BTF = h_BTF + b_up_F.astype(self.dtype)
            if gated:
                w_gate_DF = self.param("w_gate", up_init, (dim, self.mlp_dim), self.param_dtype)
                h_BTF = fn(matmul("BTD,DF->BTF", x_BTD, w_gate_DF, out=hidden_axes, **dtypes)) * h_BTF
            else:
                h_BTF = fn(h_BTF)
        w_down_FD = self.param("w_down", down_init, (self.mlp_dim, dim), self.param_dtype)
        with jax.named_scope("mlp_down"):
            out = ("batch", "residual", "activation")
            y_BTD = matmul("BTF,FD->BTD", h_BTF, w_down_FD, out=out, **dtypes)
            if self.bias:
                b_down_D = self.param("b_down", nn.initializers.zeros, (dim,), self.param_dtype)
                y_BTD = y_BTD + b_down_D.astype(self.dtype)
        return y_BTD
