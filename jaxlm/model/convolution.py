"""A convolution beside the first layer, of DeBERTa-v2's larger models (arXiv:2006.03654, section 5).

x_1 = norm(layer_1(e) + act(b + sum over d of e shifted by d times w_d)),   e the embeddings

convolution/w [W, D, D], convolution/b [D], convolution_norm
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.errors import check, check_choice
from jaxlm.model.axes import AXES
from jaxlm.model.layers import ACTIVATIONS, Norm, normal_init
from jaxlm.sharding import current
from jaxlm.weights import lay_out, matmul


@dataclasses.dataclass(frozen=True)
class ConvolutionConfig:
    """How far the convolution beside the first layer sees, of a model that is not causal."""

    width: int = 0  # W, tokens that it sees, half of them on either side; odd; 0 = no convolution
    activation: str = "tanh"  # name in jaxlm.model.layers.ACTIVATIONS

    def __post_init__(self) -> None:
        check(
            self.width >= 0 and (self.width == 0 or self.width % 2 == 1),
            f"model.convolution.width={self.width} must be odd, such as {max(self.width, 0) + 1}, or 0",
        )
        plain = [name for name, (_, gated) in ACTIVATIONS.items() if not gated]
        check_choice(self.activation, plain, "model.convolution.activation")
        check(
            self.width > 0 or self.activation == "tanh",
            f"model.convolution.activation={self.activation!r} without a convolution: set "
            "model.convolution.width",
        )


def convolution_init(
    cfg: ConvolutionConfig, dim: int, std: float, key: Array, param_dtype: str
) -> dict[str, Array]:
    """`convolution` of the parameters."""
    w_WDD = normal_init(std)(key, (cfg.width, dim, dim), param_dtype)
    return {"w": w_WDD, "b": jnp.zeros((dim,), param_dtype)}


def after_layer(
    cfg: ConvolutionConfig,
    params: dict[str, Any],
    norm: Norm,
    x_BTD: Float[Array, "B T D"],
    segments_BT: Int[Array, "B T"] | None,
    dtype: str,
    accum: str,
) -> Callable[[Array, Array], Array]:
    """What becomes of the stream after each layer, from (stream, index): the convolution joins the first.

    Raises:
        UserError: the stack is split into stages.
    """
    if not cfg.width:
        return lambda x_BTD, index: x_BTD
    layout = current()
    check(
        layout is None or layout.stages == 1,
        f"model.convolution.width={cfg.width} stands beside the first layer of one stack; use mesh.pipe=1",
    )
    own = lay_out({"convolution": params["convolution"]}, AXES, dtype)["convolution"]
    beside_BTD = convolved(cfg, own, x_BTD, segments_BT, dtype=dtype, accum=accum)
    scale = {"params": params.get("convolution_norm", {})}
    return lambda x_BTD, index: jnp.where(index == 0, norm.apply(scale, x_BTD + beside_BTD), x_BTD)


def convolved(
    cfg: ConvolutionConfig,
    params: dict[str, Any],
    x_BTD: Float[Array, "B T D"],
    segments_BT: Int[Array, "B T"] | None,
    *,
    dtype: str,
    accum: str,
) -> Float[Array, "B T D"]:
    """The convolution and its activation; a token sees those of its own document."""
    if segments_BT is None:
        segments_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
    T, half = x_BTD.shape[1], cfg.width // 2
    pad = lambda a: jnp.pad(a, ((0, 0), (half, half), *[(0, 0)] * (a.ndim - 2)))  # noqa: E731
    padded_BUD, padded_BU = pad(x_BTD), pad(segments_BT)
    y_BTD = jnp.broadcast_to(params["b"].astype(dtype), x_BTD.shape)
    for d in range(cfg.width):
        seen_BT = (padded_BU[:, d : d + T] == segments_BT) & (segments_BT != 0)
        shifted_BTD = padded_BUD[:, d : d + T] * seen_BT[:, :, None].astype(x_BTD.dtype)
        out = ("batch", "length", "activation")
        y_BTD += matmul("BTD,DE->BTE", shifted_BTD, params["w"][d], out=out, dtype=dtype, accum=accum)
    return ACTIVATIONS[cfg.activation][0](y_BTD)
