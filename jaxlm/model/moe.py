"""Mixture of experts: a router picks `top_k` of E expert MLPs for each token; every row is routed by itself.

Two dispatches. `capacity`: each expert takes at most C tokens of a row, in token order, and the rest get
nothing from it; experts split over the mesh. `dropless`: every token gets every expert it chose.
Losses and statistics are sums over rows and tokens, so that splitting a batch leaves them unchanged.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from jaxlm.errors import check, check_choice
from jaxlm.model.layers import ACTIVATIONS, normal_init
from jaxlm.sharding import constrain
from jaxlm.weights import PRODUCT, matmul

BACKENDS = ("auto", "dense", "loop", "ragged")

Aux = dict[str, Float32[Array, ""] | tuple[Float32[Array, ""], Float32[Array, ""]]]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """How tokens choose experts, and how the choice is carried out."""

    num_experts: int = 0  # E; 0 = the model has no MoE layers
    top_k: int = 2  # experts per token
    expert_dim: int = 0  # width of each expert; 0 = mlp_dim
    shared_experts: int = 0  # experts that every token passes through, each expert_dim wide
    router: str = "softmax"  # scores: softmax over experts | sigmoid of each (DeepSeek-V3)
    normalize: bool = True  # weights of the chosen experts sum to 1 (times routed_scale)
    routed_scale: float = 1.0  # multiplies the weights
    dispatch: str = "dropless"  # dropless | capacity
    capacity_factor: float = 1.25  # C = ceil(this * T * top_k / E) tokens per expert and row (capacity)
    dropless_backend: str = "auto"  # auto | dense | loop | ragged, see `dropless_backend`
    load_balance: float = 0.01  # coefficient of the load-balance loss
    router_z: float = 0.001  # coefficient of the router z-loss
    bias_balancing: bool = False  # loss-free balancing: a learned bias per expert that moves selection only

    def __post_init__(self) -> None:
        check_choice(self.router, ("softmax", "sigmoid"), "moe.router")
        check_choice(self.dispatch, ("dropless", "capacity"), "moe.dispatch")
        check_choice(self.dropless_backend, BACKENDS, "moe.dropless_backend")
        for name in ("num_experts", "expert_dim", "shared_experts", "load_balance", "router_z"):
            check(getattr(self, name) >= 0, f"moe.{name}={getattr(self, name)!r} must be >= 0")
        for name in ("routed_scale", "capacity_factor"):
            check(getattr(self, name) > 0, f"moe.{name}={getattr(self, name)!r} must be > 0")
        if self.num_experts == 0:
            return
        check(
            1 <= self.top_k <= self.num_experts,
            f"moe.top_k={self.top_k} must be between 1 and moe.num_experts={self.num_experts}; "
            f"nearest is {min(max(self.top_k, 1), self.num_experts)}",
        )
        check(
            self.top_k > 1 or self.num_experts == 1 or not self.normalize,
            "moe.normalize=True with moe.top_k=1 makes every weight 1, so the router would get no gradient "
            "from the loss; set moe.normalize=False",
        )


def capacity(cfg: MoEConfig, length: int) -> int:
    """Tokens C that an expert takes from a row of T = `length`: ceil(capacity_factor * T * k / E), at most T.

    >>> capacity(MoEConfig(num_experts=8, top_k=2, capacity_factor=1.25), 256)
    80
    """
    share = cfg.capacity_factor * length * cfg.top_k / cfg.num_experts
    return min(length, max(1, math.ceil(share - 1e-9)))


def dropless_backend(cfg: MoEConfig) -> str:
    """The backend that dropless dispatch will use here and now, with `auto` resolved.

    dense   every expert on every token, unchosen ones weighted 0: E / k times the FLOPs, but plain einsums
            that split over any mesh
    loop    tokens sorted by expert, one product per block of an expert's rows: exact FLOPs up to padding; CPU
    ragged  tokens sorted by expert, `jax.lax.ragged_dot`: accelerators (on a CPU, XLA makes it dense)

    `auto` is `dense` on a mesh of several devices (the sorted forms are right there too, but gather all
    tokens), else `loop` on CPU and `ragged` elsewhere. All three give the same values up to rounding.
    """
    if cfg.dropless_backend != "auto":
        return cfg.dropless_backend
    if jax.sharding.get_abstract_mesh().size > 1:
        return "dense"
    return "loop" if jax.default_backend() == "cpu" else "ragged"


# --- Routing ---


@dataclasses.dataclass(frozen=True)
class Routing:
    """Which experts each token uses, and with what weight."""

    experts_BTK: Int32[Array, "B T K"]  # distinct per token, best first; meaningless on padding
    weights_BTK: Float32[Array, "B T K"]  # 0 on padding
    chosen_BTE: Int32[Array, "B T E"]  # 1 where chosen; 0 on padding
    probs_BTE: Float32[Array, "B T E"]  # scores as shares that sum to 1, for the load-balance loss
    logits_BTE: Float32[Array, "B T E"]


def _top_k(ranked_BTE: Array, k: int) -> Array:
    """Indices of the k largest, ties to the lower one. For `lax.top_k` XLA gathers all rows everywhere."""
    experts = []
    for _ in range(k):
        experts.append(jnp.argmax(ranked_BTE, axis=-1))
        taken_BTE = jax.nn.one_hot(experts[-1], ranked_BTE.shape[-1], dtype=bool)
        ranked_BTE = jnp.where(taken_BTE, -jnp.inf, ranked_BTE)
    return jnp.stack(experts, axis=-1).astype(jnp.int32)


def route(
    cfg: MoEConfig,
    logits_BTE: Float32[Array, "B T E"],
    mask_BT: Bool[Array, "B T"],
    bias_E: Float32[Array, " E"] | None = None,
) -> Routing:
    """Top-k experts by score plus bias; weights from the scores alone.

    softmax: s = softmax(logits) (arXiv:1701.06538; normalised over the chosen: Mixtral, arXiv:2401.04088).
    sigmoid: s = sigmoid(logits), shares s / sum s (DeepSeek-V3, arXiv:2412.19437, equations 12-19).

    Args:
        cfg: router, top_k, normalize and routed_scale are read.
        logits_BTE: router logits.
        mask_BT: False = padding.
        bias_E: added to the scores for selection only, or None.
    """
    if cfg.router == "softmax":
        probs_BTE = scores_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    else:
        scores_BTE = jax.nn.sigmoid(logits_BTE)
        probs_BTE = scores_BTE / (scores_BTE.sum(-1, keepdims=True) + 1e-20)
    ranked_BTE = scores_BTE if bias_E is None else scores_BTE + bias_E
    experts_BTK = _top_k(ranked_BTE, cfg.top_k)
    weights_BTK = jnp.take_along_axis(scores_BTE, experts_BTK, axis=-1)
    if cfg.normalize:
        weights_BTK = weights_BTK / (weights_BTK.sum(-1, keepdims=True) + 1e-20)
    real_BT1 = mask_BT[..., None]
    chosen_BTE = jnp.where(real_BT1, jax.nn.one_hot(experts_BTK, cfg.num_experts, dtype=jnp.int32).sum(2), 0)
    weights_BTK = jnp.where(real_BT1, weights_BTK * cfg.routed_scale, 0.0)
    return Routing(experts_BTK, weights_BTK, chosen_BTE, probs_BTE, logits_BTE)


def auxiliary(
    cfg: MoEConfig,
    routing: Routing,
    mask_BT: Bool[Array, "B T"],
    dropped: Float32[Array, ""],
    bias_E: Float32[Array, " E"] | None,
) -> Aux:
    """Losses and statistics of one MoE layer, all additive over rows.

    Per row of n real tokens, with c_e choices of expert e and P_e its mean share of the scores:

        moe/load_balance  n * E * sum_e c_e / (k n) * P_e: n when balanced (arXiv:2101.03961; over each row,
                          as in arXiv:2412.19437, so that rows add up)
        moe/router_z      sum over tokens of logsumexp(logits) ** 2 (arXiv:2202.08906)
        moe/max_load      n * max_e c_e / (k n / E): load of the row's busiest expert over the mean load
        moe/dropped       dropped choices; its weight is the number of choices

    Returns:
        name -> (sum, weight), weight = real tokens but for moe/dropped, and `loss`: the sum to add to the
        loss, coefficients applied. With a bias, `loss` carries a term of value 0 whose gradient in bias_e is
        expert e's load minus the mean load, in choices (loss-free balancing, arXiv:2408.15664).
    """
    experts = cfg.num_experts
    real_BT = mask_BT.astype(jnp.float32)
    n_B = real_BT.sum(-1)
    count_BE = routing.chosen_BTE.sum(1).astype(jnp.float32)
    share_BE = jnp.sum(routing.probs_BTE * real_BT[..., None], axis=1)
    safe_B = jnp.maximum(n_B, 1.0)
    balance = jnp.sum(experts / cfg.top_k * (count_BE * share_BE).sum(-1) / safe_B)
    z_BT = jnp.square(jax.nn.logsumexp(routing.logits_BTE, axis=-1))
    z = jnp.sum(z_BT * real_BT)
    tokens = n_B.sum()
    loss = cfg.load_balance * balance + cfg.router_z * z
    if bias_E is not None:
        load_E = count_BE.sum(0)
        pull = jnp.sum(bias_E * jax.lax.stop_gradient(load_E - load_E.mean()))
        loss = loss + pull - jax.lax.stop_gradient(pull)
    return {
        "loss": loss,
        "moe/load_balance": (balance, tokens),
        "moe/router_z": (z, tokens),
        "moe/max_load": (jnp.sum(count_BE.max(-1)) * experts / cfg.top_k, tokens),
        "moe/dropped": (dropped, tokens * cfg.top_k),
    }


# --- Moving rows ---


def _rows(x_BND: Array, index_BM: Array) -> Array:
    """x[b, index[b, m]], zero where the index is N."""
    return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))(x_BND, index_BM)


@jax.custom_vjp
def take_rows(
    x_BND: Float[Array, "B N D"], index_BM: Int[Array, "B M"], inverse_BNJ: Int[Array, "B N J"]
) -> Float[Array, "B M D"]:
    """Rows of x by index; N means a row of zeros.

    The caller gives the inverse too: row n of x went to `inverse_BNJ[b, n, :]` (M = nowhere). So the gradient
    is a gather and a short sum, not a scatter-add, which is slow on TPU and has no fixed order on GPU.
    """
    return _rows(x_BND, index_BM)


def _take_rows_bwd(inverse_BNJ: Array, g_BMD: Array):
    batch, n, j = inverse_BNJ.shape
    g = _rows(g_BMD, inverse_BNJ.reshape(batch, n * j)).reshape(batch, n, j, -1)
    return g.sum(2, dtype=jnp.float32).astype(g_BMD.dtype) if j > 1 else g[:, :, 0], None, None


take_rows.defvjp(lambda x, index, inverse: (_rows(x, index), inverse), _take_rows_bwd)


# --- Grouped products ---


def _block_rows(rows: int, groups: int) -> int:
    """Rows per block of the loop: near the mean group, at least 8 and at most 128."""
    return min(128, max(8, 1 << max(0, (rows // groups) - 1).bit_length()))


def _loop_blocks(sizes_E: Array, block: int, body: Callable, init: Array) -> Array:
    """Fold `body(carry, expert, first row, rows)` over the blocks of every group, in row order."""
    blocks_E = -(-sizes_E // block)
    last_E, end_E = jnp.cumsum(blocks_E), jnp.cumsum(sizes_E)

    def step(i, carry):
        e = jnp.searchsorted(last_E, i, side="right")
        first = end_E[e] - sizes_E[e] + (i - (last_E[e] - blocks_E[e])) * block
        return body(carry, e, first, end_E[e] - first)

    return jax.lax.fori_loop(0, last_E[-1], step, init)


def _block(x_MD: Array, first: Array, rows: Array, block: int) -> Array:
    """`block` rows from `first` on, zero from `rows` on."""
    x = jax.lax.dynamic_slice_in_dim(x_MD, first, block)
    return jnp.where(jnp.arange(block)[:, None] < rows, x, 0)


def _loop_product(x_MD: Array, w_EDF: Array, sizes_E: Array, accum: str) -> Array:
    rows, block = x_MD.shape[0], _block_rows(x_MD.shape[0], w_EDF.shape[0])
    x_MD = jnp.pad(x_MD, ((0, block), (0, 0)))

    def body(y_MF, e, first, n):
        # Rows after the group's end are written as zeros here and by their own group's block later.
        y = jnp.dot(_block(x_MD, first, n, block), w_EDF[e], preferred_element_type=accum)
        return jax.lax.dynamic_update_slice_in_dim(y_MF, y, first, 0)

    y_MF = jnp.zeros((rows + block, w_EDF.shape[2]), accum)
    return _loop_blocks(sizes_E, block, body, y_MF)[:rows]


def _loop_weight_gradient(x_MD: Array, g_MF: Array, sizes_E: Array, accum: str) -> Array:
    experts, block = sizes_E.shape[0], _block_rows(x_MD.shape[0], sizes_E.shape[0])
    x_MD, g_MF = (jnp.pad(a, ((0, block), (0, 0))) for a in (x_MD, g_MF))

    def body(dw_EDF, e, first, n):
        x = _block(x_MD, first, n, block)
        g = jax.lax.dynamic_slice_in_dim(g_MF, first, block)
        return dw_EDF.at[e].add(jnp.einsum("MD,MF->DF", x, g, preferred_element_type=accum))

    return _loop_blocks(sizes_E, block, body, jnp.zeros((experts, x_MD.shape[1], g_MF.shape[1]), accum))


_SUM_OVER_GROUP = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=()
)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _grouped(
    x_MD: Array, w_EDF: Array, sizes_E: Array, backend: str, dtype: str, accum: str, result: str
) -> Array:
    x_MD, w_EDF = x_MD.astype(dtype), w_EDF.astype(dtype)
    if backend == "loop":
        y_MF = _loop_product(x_MD, w_EDF, sizes_E, accum)
    else:
        y_MF = jax.lax.ragged_dot(x_MD, w_EDF, sizes_E, preferred_element_type=accum)
    return y_MF.astype(result)


def _grouped_fwd(x_MD, w_EDF, sizes_E, backend, dtype, accum, result):
    return _grouped(x_MD, w_EDF, sizes_E, backend, dtype, accum, result), (x_MD, w_EDF, sizes_E)


def _grouped_bwd(backend, dtype, accum, result, saved, g_MF):
    # As in `weights.matmul`: both gradients are products of `dtype` operands summed in `accum`.
    x_MD, w_EDF, sizes_E = saved
    w_EFD = jnp.swapaxes(w_EDF, 1, 2)
    dx_MD = _grouped(g_MF, w_EFD, sizes_E, backend, dtype, accum, str(x_MD.dtype))
    x, g = x_MD.astype(dtype), g_MF.astype(dtype)
    if backend == "loop":
        dw_EDF = _loop_weight_gradient(x, g, sizes_E, accum)
    else:
        dw_EDF = jax.lax.ragged_dot_general(x, g, sizes_E, _SUM_OVER_GROUP, preferred_element_type=accum)
    return dx_MD, dw_EDF.astype(w_EDF.dtype), None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def grouped_matmul(
    x_MD: Float[Array, "M D"],
    w_EDF: Float[Array, "E D F"],
    group_sizes_E: Int32[Array, " E"],
    *,
    backend: str,
    dtype: str = "float32",
    accum: str = "float32",
    result: str | None = None,
) -> Float[Array, "M F"]:
    """Multiply each group of rows by its own matrix: the first group_sizes[0] rows by w[0], and so on.

    Rows after the last group come out undefined; they take no gradient if the caller never reads them.

    Args:
        x_MD: rows sorted by group.
        w_EDF: one matrix per group.
        group_sizes_E: rows of each group; their sum is at most M.
        backend: `loop` or `ragged`, see `dropless_backend`.
        dtype: compute dtype.
        accum: dtype of the sums.
        result: dtype of the result; default `dtype`.
    """
    check_choice(backend, ("loop", "ragged"), "grouped_matmul: backend")
    y_MF = _grouped(x_MD, w_EDF, group_sizes_E, backend, str(dtype), str(accum), str(result or dtype))
    return checkpoint_name(y_MF, PRODUCT)


# --- The layer ---


class MoE(nn.Module):
    """sum over chosen experts e of weight_e * MLP_e(x), plus the shared experts' MLP(x)."""

    cfg: MoEConfig
    mlp_dim: int  # width of an expert where cfg.expert_dim is 0
    activation: str
    init_std: Callable[[int], float]  # fan in -> standard deviation
    out_scale: float  # of the initial output projections
    dtype: str
    param_dtype: str
    accum_dtype: str
    router_std: float = 0.0  # of the router's initial weights; 0 = init_std(D)
    router_scale: float = 1.0  # of the router's logits

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], mask_BT: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Aux]:
        """Route, dispatch and combine.

        Args:
            x_BTD: activations.
            mask_BT: True for real tokens; padding is not routed, takes no capacity and is not counted.

        Returns:
            y_BTD in the compute dtype, and the losses and statistics of `auxiliary`.
        """
        cfg, dim = self.cfg, x_BTD.shape[-1]
        width = cfg.expert_dim or self.mlp_dim
        x_BTD = x_BTD.astype(self.dtype)
        mask_BT = mask_BT.astype(bool)
        router_init = normal_init(self.router_std or self.init_std(dim))
        with jax.named_scope("route"):
            router_DE = self.param("router_w", router_init, (dim, cfg.num_experts), self.param_dtype)
            bias_E = None
            if cfg.bias_balancing:  # moved by small equal steps, which a bf16 parameter would swallow
                bias_E = self.param("router_bias", nn.initializers.zeros, (cfg.num_experts,), "float32")
            logits_BTE = matmul("BTD,DE->BTE", x_BTD, router_DE, out=("batch", "length", None))
            routing = route(cfg, self.router_scale * logits_BTE, mask_BT, bias_E)
        experts = self._parameters("", (cfg.num_experts,), dim, width)
        dropped = jnp.zeros((), jnp.float32)
        if cfg.dispatch == "capacity":
            y_BTD, dropped = self._capacity(x_BTD, mask_BT, routing, experts)
        elif (backend := dropless_backend(cfg)) == "dense":
            y_BTD = self._dense(x_BTD, routing, experts)
        else:
            y_BTD = self._sorted(x_BTD, mask_BT, routing, experts, backend)
        if cfg.shared_experts:
            shared = self._parameters("shared_", (), dim, cfg.shared_experts * width)
            with jax.named_scope("shared_experts"):
                y_BTD = y_BTD + self._mlp(
                    shared,
                    lambda w_DF: self._matmul("BTD,DF->BTF", x_BTD, w_DF, ("batch", "length", "mlp")),
                    lambda h_BTF, w_FD: self._matmul("BTF,FD->BTD", h_BTF, w_FD),
                )
        return y_BTD, auxiliary(cfg, routing, mask_BT, dropped, bias_E)

    def _parameters(self, prefix: str, lead: tuple[int, ...], dim: int, width: int) -> dict[str, Array]:
        """w_up, w_gate (if the activation is gated) and w_down, with `lead` dimensions in front."""
        up_init = normal_init(self.init_std(dim))
        down_init = normal_init(self.init_std(width) * self.out_scale)
        names = ("w_up", "w_gate") if ACTIVATIONS[self.activation][1] else ("w_up",)
        weights = {n: self.param(prefix + n, up_init, (*lead, dim, width), self.param_dtype) for n in names}
        weights["w_down"] = self.param(prefix + "w_down", down_init, (*lead, width, dim), self.param_dtype)
        return weights

    def _matmul(self, eqn: str, x: Array, w: Array, out: tuple[str | None, ...] | None = None) -> Array:
        return matmul(eqn, x, w, dtype=self.dtype, accum=self.accum_dtype, out=out)

    def _mlp(self, weights: dict[str, Array], up: Callable, down: Callable) -> Array:
        """`down(act(up(w_up)))` or, gated, `down(act(up(w_gate)) * up(w_up))`."""
        fn, gated = ACTIVATIONS[self.activation]
        with jax.named_scope("experts_up"):
            h = fn(up(weights["w_gate"])) * up(weights["w_up"]) if gated else fn(up(weights["w_up"]))
        with jax.named_scope("experts_down"):
            return down(h, weights["w_down"])

    def _combine(self, y_BTKD: Array, weights_BTK: Array) -> Array:
        # A product and a sum, not an einsum: a TPU would round fp32 einsum operands to bf16.
        return (y_BTKD.astype(jnp.float32) * weights_BTK[..., None]).sum(2).astype(self.dtype)

    def _capacity(
        self, x_BTD: Array, mask_BT: Array, routing: Routing, weights: dict[str, Array]
    ) -> tuple[Array, Array]:
        """Each expert's first C tokens of every row, in token order, whichever choice of theirs it is.

        Token order and not first choices first: a later token then never displaces an earlier one, so that
        dropping is causal.
        """
        B, T, D = x_BTD.shape
        E, K, C = self.cfg.num_experts, self.cfg.top_k, capacity(self.cfg, T)
        with jax.named_scope("dispatch"):
            before_BTE = jnp.cumsum(routing.chosen_BTE, axis=1) - routing.chosen_BTE
            place_BTK = jnp.take_along_axis(before_BTE, routing.experts_BTK, axis=-1)
            kept_BTK = (place_BTK < C) & mask_BT[..., None]
            # Slot e C + place of each choice, and choice t K + k of each slot; E C and T K stand for none.
            slot_BTK = jnp.where(kept_BTK, routing.experts_BTK * C + place_BTK, E * C)
            none_BS = jnp.full((B, E * C), T * K, jnp.int32)
            fill = jax.vmap(lambda choice, slot: choice.at[slot].set(jnp.arange(T * K), mode="drop"))
            choice_BS = fill(none_BS, slot_BTK.reshape(B, T * K))
            x_BSD = constrain(take_rows(x_BTD, choice_BS // K, slot_BTK), "batch", None, "activation")
            # Rows are split over the expert axis too: here every device sends slots to their expert's owner.
            x_EBCD = x_BSD.reshape(B, E, C, D).swapaxes(0, 1)
            x_EBCD = constrain(x_EBCD, "experts", "expert_batch", None, "activation")
            x_EMD = x_EBCD.reshape(E, B * C, D)  # one batch dimension: XLA:CPU has no bf16 product for two
        hidden = ("experts", "expert_batch", "expert_mlp")
        y_EMD = self._mlp(
            weights,
            lambda w_EDF: self._matmul("EMD,EDF->EMF", x_EMD, w_EDF, hidden),
            lambda h_EMF, w_EFD: self._matmul("EMF,EFD->EMD", h_EMF, w_EFD),
        )
        with jax.named_scope("combine"):
            y_EBCD = constrain(y_EMD.reshape(E, B, C, D), "experts", "expert_batch", None, "activation")
            y_BSD = constrain(y_EBCD.swapaxes(0, 1).reshape(B, E * C, D), "batch", None, "activation")
            y_BXD = take_rows(y_BSD, slot_BTK.reshape(B, T * K), choice_BS[..., None])
            y_BTD = self._combine(y_BXD.reshape(B, T, K, D), routing.weights_BTK)
        dropped_BTK = mask_BT[..., None] & ~kept_BTK
        return y_BTD, dropped_BTK.sum().astype(jnp.float32)

    def _dense(self, x_BTD: Array, routing: Routing, weights: dict[str, Array]) -> Array:
        """Every expert on every token; the weighted sum over experts is part of the last product."""
        onehot_BTKE = jax.nn.one_hot(routing.experts_BTK, self.cfg.num_experts, dtype=jnp.float32)
        share_BET = (routing.weights_BTK[..., None] * onehot_BTKE).sum(2).swapaxes(1, 2).astype(self.dtype)
        hidden = ("expert_batch", "experts", None, "expert_mlp")
        return self._mlp(
            weights,
            lambda w_EDF: self._matmul("BTD,EDF->BETF", x_BTD, w_EDF, hidden),
            lambda h_BETF, w_EFD: self._matmul("BETF,EFD->BTD", h_BETF * share_BET[..., None], w_EFD),
        )

    def _sorted(
        self, x_BTD: Array, mask_BT: Array, routing: Routing, weights: dict[str, Array], backend: str
    ) -> Array:
        """All choices of all rows sorted by expert, padding last, then one grouped product per weight."""
        B, T, D = x_BTD.shape
        K = self.cfg.top_k
        M = B * T * K
        with jax.named_scope("dispatch"):
            expert_M = jnp.where(mask_BT[..., None], routing.experts_BTK, self.cfg.num_experts).reshape(M)
            order_M = jnp.argsort(expert_M)
            place_M = jnp.zeros(M, jnp.int32).at[order_M].set(jnp.arange(M), unique_indices=True)
            place_M = jnp.where(expert_M < self.cfg.num_experts, place_M, M)
            sizes_E = routing.chosen_BTE.sum((0, 1))
            order_M = jnp.where(jnp.arange(M) < sizes_E.sum(), order_M, M)
            x_MD = take_rows(x_BTD.reshape(1, B * T, D), order_M[None] // K, place_M.reshape(1, B * T, K))[0]
        product = partial(
            grouped_matmul, group_sizes_E=sizes_E, backend=backend, dtype=self.dtype, accum=self.accum_dtype
        )
        y_MD = self._mlp(weights, lambda w_EDF: product(x_MD, w_EDF), product)
        with jax.named_scope("combine"):
            y_MD = take_rows(y_MD[None], place_M[None], order_M[None, :, None])[0]
            return self._combine(y_MD.reshape(B, T, K, D), routing.weights_BTK)
