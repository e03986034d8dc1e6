"""How tokens choose experts: the config, scores, choices, and what is counted and lost on the way."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from jaxlm.errors import check, check_choice

BACKENDS = ("auto", "dense", "loop", "ragged")
EXCHANGES = ("auto", "ragged", "padded")

Aux = dict[str, Float32[Array, ""] | tuple[Float32[Array, ""], Float32[Array, ""]]]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """How tokens choose experts, and how the choice is carried out."""

    num_experts: int = 0  # E; 0 = the model has no MoE layers
    top_k: int = 2  # experts per token
    expert_dim: int = 0  # width of each expert; 0 = mlp_dim
    shared_experts: int = 0  # experts that every token passes through, each expert_dim wide
    shared_dim: int = 0  # width of all shared experts together; 0 = shared_experts times an expert's
    bias: bool = False  # biases on the router's logits and on the experts' projections (GPT-OSS)
    shared_gate: bool = False  # their output times sigmoid(x w), a number per token (Qwen2-MoE)
    router: str = "softmax"  # scores: softmax over experts | sigmoid of each (DeepSeek-V3)
    groups: int = 1  # equal groups of neighbouring experts, of which a token may use the best `top_groups`
    top_groups: int = 1  # those with the largest scores (DeepSeek-V2: n_group, topk_group)
    group_best: int = 1  # a group's score is the sum of its so many best experts' (DeepSeek-V3: 2)
    normalize: bool = True  # weights of the chosen experts sum to 1 (times routed_scale)
    routed_scale: float = 1.0  # multiplies the weights
    dispatch: str = "dropless"  # dropless | capacity
    capacity_factor: float = 1.25  # C = ceil(this * T * top_k / E) tokens per expert and row (capacity)
    dropless_backend: str = "auto"  # auto | dense | loop | ragged, see `dropless_backend`
    exchange: str = "auto"  # dropless, between devices: auto | ragged | padded, see jaxlm.model.dispatch
    buffer_factor: float = 0.0  # dropless: choices a device can receive, over its fair share; 0 = all
    rounds: int = 1  # dropless: a device's tokens go to their experts in that many parts: smaller buffers
    load_balance: float = 0.01  # coefficient of the load-balance loss
    router_z: float = 0.001  # coefficient of the router z-loss
    bias_balancing: bool = False  # loss-free balancing: a learned bias per expert that moves selection only

    def __post_init__(self) -> None:
        check_choice(self.router, ("softmax", "sigmoid"), "moe.router")
        check_choice(self.dispatch, ("dropless", "capacity"), "moe.dispatch")
        check_choice(self.dropless_backend, BACKENDS, "moe.dropless_backend")
        check_choice(self.exchange, EXCHANGES, "moe.exchange")
        at_least_0 = (
            "num_experts",
            "expert_dim",
            "shared_experts",
            "shared_dim",
            "load_balance",
            "router_z",
            "buffer_factor",
        )
        for name in at_least_0:
            check(getattr(self, name) >= 0, f"moe.{name}={getattr(self, name)!r} must be >= 0")
        check(self.rounds >= 1, f"moe.rounds={self.rounds!r} must be >= 1")
        sent = self.dispatch == "dropless" and self.dropless_backend != "dense"
        for name, unset in {"exchange": "auto", "buffer_factor": 0.0, "rounds": 1}.items():
            check(
                sent or getattr(self, name) == unset,
                f"moe.{name}={getattr(self, name)!r} is for moe.dispatch='dropless' with a "
                "moe.dropless_backend other than 'dense'",
            )
        for name in ("shared_dim", "shared_gate"):
            check(
                self.shared_experts > 0 or not getattr(self, name),
                f"moe.{name}={getattr(self, name)} without shared experts: set moe.shared_experts",
            )
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
            self.groups >= 1 and self.num_experts % self.groups == 0,
            f"moe.groups={self.groups} must divide moe.num_experts={self.num_experts}",
        )
        within = self.num_experts // self.groups
        check(
            1 <= self.top_groups <= self.groups and self.top_k <= self.top_groups * within,
            f"moe.top_groups={self.top_groups} must be between 1 and moe.groups={self.groups} and leave at "
            f"least moe.top_k={self.top_k} experts of {within} each",
        )
        check(
            1 <= self.group_best <= within,
            f"moe.group_best={self.group_best} must be between 1 and {within}, the experts of a group",
        )
        check(
            self.groups > 1 or self.group_best == 1,
            f"moe.group_best={self.group_best} with one group: set moe.groups",
        )
        check(
            self.top_k > 1 or self.num_experts == 1 or not self.normalize,
            "moe.normalize=True with moe.top_k=1 makes every weight 1, so the router would get no gradient "
            "from the loss; set moe.normalize=False",
        )


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


def _in_best_groups(cfg: MoEConfig, ranked_BTE: Array) -> Array:
    """-inf for experts outside the token's best groups (arXiv:2405.04434, section 2.2.2)."""
    if cfg.top_groups == cfg.groups:
        return ranked_BTE
    ranked_BTGE = ranked_BTE.reshape(*ranked_BTE.shape[:-1], cfg.groups, -1)
    best_BTGE = jnp.take_along_axis(ranked_BTGE, _top_k(ranked_BTGE, cfg.group_best), axis=-1)
    chosen_BTE = jax.nn.one_hot(_top_k(best_BTGE.sum(-1), cfg.top_groups), cfg.groups, dtype=bool).any(-2)
    return jnp.where(chosen_BTE[..., None], ranked_BTGE, -jnp.inf).reshape(ranked_BTE.shape)


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
        cfg: router, top_k, groups, normalize and routed_scale are read.
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
    experts_BTK = _top_k(_in_best_groups(cfg, ranked_BTE), cfg.top_k)
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
