"""cuDNN's fused attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.errors import check
from jaxlm.model.device_kernels import per_device
from jaxlm.model.masks import Mask


def cudnn(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
    bias_BNTS: Array | None,
    softcap: float,
    sinks_N: Array | None,
    dtype: str,
    accum: str,
) -> Float[Array, "B T N H"]:
    """cuDNN's attention on every device's own rows and heads; it sums in fp32.

    Causality and a causal window go by columns (positions must count up by one inside a segment) and are left
    to the kernel, which skips what they hide. JAX hands cuDNN no segments: they go in as a mask written out,
    [B, 1, T, S], which the kernel reads as a bias. Scores are never kept, but that mask grows with T S.

    Raises:
        UserError: rows that the kernel does not take.
    """
    assert not softcap, "check_backend lets no softcap through"
    assert sinks_N is None, "check_backend lets no sinks through"
    assert bias_BNTS is None, "check_backend lets no bias through"
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    check(mask.part is None, "backend 'cudnn' takes whole rows, not parts of their columns; use 'blocked'")
    check(T % 2 == 0 and S % 2 == 0, f"{T} queries, {S} keys: backend 'cudnn' takes even numbers of columns")

    def on_device(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, _):
        seen_BTS = None
        if k_segments_BS is not None:
            if q_segments_BT is None:
                seen_BTS = jnp.broadcast_to((k_segments_BS != 0)[:, None, :], (len(k_segments_BS), T, S))
            else:
                # Padding sees padding: a row that saw nothing would depend on the kernel's softmax of it.
                seen_BTS = q_segments_BT[:, :, None] == k_segments_BS[:, None, :]
        if mask.window and not mask.causal:
            distance_TS = jnp.arange(T)[:, None] - jnp.arange(S)
            near_1TS = (jnp.abs(distance_TS) < mask.window)[None]
            seen_BTS = near_1TS if seen_BTS is None else seen_BTS & near_1TS
        return jax.nn.dot_product_attention(
            *(x.astype(dtype) for x in (q_BTNH, k_BSKH, v_BSKH)),
            mask=None if seen_BTS is None else seen_BTS[:, None],
            scale=scale,
            is_causal=mask.causal,
            local_window_size=(mask.window - 1, 0) if mask.window and mask.causal else None,
            implementation="cudnn",
        )

    return per_device(on_device, q_BTNH, k_BSKH, v_BSKH, mask.q_segments_BT, mask.k_segments_BS, None)
