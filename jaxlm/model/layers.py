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
    "tanh": (jnp.tanh, False),
    "quick_gelu": (lambda x: x * jax.nn.sigmoid(1.702 * x), False),
    "swiglu": (jax.nn.silu, True),
    "geglu": (partial(jax.nn.gelu, approximate=True), True),
    "geglu_exact": (partial(jax.nn.gelu, approximate=False), True),
    "reglu": (jax.nn.relu, True),
    "quick_geglu": (lambda x: x * jax.nn.sigmoid(1.702 * x), True),
}
# name -> (subtracts the mean, has a scale, has a bias)
NORMS: dict[str, tuple[bool, bool, bool]] = {
    "rmsnorm": (False, True, False),
    "layernorm": (True, True, True),
    "layernorm_scale": (True, True, False),
    "layernorm_plain": (True, False, False),
}

Initializer = Callable[..., Array]


def gate(activation: str, g: Array, h: Array, limit: float = 0.0) -> Array:
    """act(g) h of a gated MLP; with a limit c, act(min(g, c)) (clip(h, -c, c) + 1), as in GPT-OSS.

    >>> gate("reglu", jnp.array([9.0, -1.0]), jnp.array([-8.0, 1.0]), limit=7.0).tolist()
    [-42.0, 0.0]
    """
    fn, _ = ACTIVATIONS[activation]
    if not limit:
        return fn(g) * h
    return fn(jnp.minimum(g, limit)) * (jnp.clip(h, -limit, limit) + 1.0)


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

    kind: str  # name in `NORMS`
    eps: float
    param_dtype: str = "float32"
    offset: bool = False  # the factor is 1 + scale
    rows: int = 1  # scale and bias hold a row for each index of the last axis but one

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        centred, scaled, biased = NORMS[self.kind]
        y = x.astype(jnp.float32)
        if centred:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        if scaled:
            start = nn.initializers.zeros if self.offset else nn.initializers.ones
            y = y * (self._vector("scale", start, x) + (1.0 if self.offset else 0.0))
        if biased:
            y = y + self._vector("bias", nn.initializers.zeros, x)
        return y.astype(x.dtype)

    def _vector(self, name: str, init: Initializer, x: Array) -> Array:
        v = self.param(name, init, (self.rows * x.shape[-1],), self.param_dtype)
        return (v if self.rows == 1 else v.reshape(self.rows, x.shape[-1])).astype(jnp.float32)


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
    gate_limit: float = 0.0  # see `gate`

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
                g_BTF = matmul("BTD,DF->BTF", x_BTD, w_gate_DF, out=hidden_axes, **dtypes)
                if self.bias:
                    b_gate_F = self.param("b_gate", nn.initializers.zeros, (self.mlp_dim,), self.param_dtype)
                    g_BTF = g_BTF + b_gate_F.astype(self.dtype)
                h_BTF = gate(self.activation, g_BTF, h_BTF, self.gate_limit)
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
