"""Next-token loss from hidden states: unembeds a few columns at a time and returns sums.

A batch has B rows and T columns. The logits of all of it, B*T*V in fp32, would be the largest array of a
training step by far, so they never exist: the loss walks over blocks of `LossConfig.chunk` columns, all rows
at once (a batch split over devices stays split), and forms a block's gradient beside its logits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.errors import check
from jaxlm.sharding import constrain, on_own_part, split_axes

Params = Any
Batch = dict[str, Array]
Pairs = dict[str, tuple[Array, Array]]
Unembed = Callable[[Params, Float[Array, "B T D"]], Float[Array, "B T V"]]
Objective = Callable[[Params, Batch, Any], tuple[Float[Array, ""], Float[Array, ""], Pairs]]


@dataclass(frozen=True)
class LossConfig:
    """What is added to the negative log-likelihood, and how much of it is computed at a time."""

    z_loss: float = 0.0  # weight of logsumexp(logits)^2, which keeps logits near normalised (PaLM: 1e-4)
    label_smoothing: float = 0.0  # share of each target that is spread evenly over the vocabulary
    chunk: int = 64  # columns of the batch, all rows, whose logits exist at a time; 0 = all, by autodiff
    per_position: bool = False  # report the loss at each position in its document, too

    def __post_init__(self) -> None:
        check(0 <= self.z_loss < math.inf, f"loss.z_loss={self.z_loss} must be finite and at least 0")
        check(
            0 <= self.label_smoothing < 1, f"loss.label_smoothing={self.label_smoothing} must lie in [0, 1)"
        )
        check(self.chunk >= 0, f"loss.chunk={self.chunk} must be at least 0 (0 = no chunks)")


class LanguageModel(Protocol):
    """What the objective needs of a model; any object with these two functions will do."""

    def apply(self, params: Params, batch: Batch, key: Any) -> tuple[Float[Array, "B T D"], Pairs]:
        """Hidden states; and auxiliary values: name -> (sum, weight), and `loss`, a sum to add."""
        ...

    def unembed(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """fp32 logits; each position on its own."""
        ...


class TokenLosses(NamedTuple):
    """Per-token values, fp32. They carry no gradient."""

    nll: Float[Array, "B T"]  # -log softmax(logits)[target], nats
    z: Float[Array, "B T"]  # logsumexp(logits)^2
    hit: Float[Array, "B T"]  # 1 where no logit exceeds the target's


def _block(
    cfg: LossConfig, logits_BTV: Array, targets_BT: Array, weights_BT: Array
) -> tuple[Array, Array, TokenLosses]:
    """`(loss_sum, logsumexp, per-token values)` of one block of columns."""
    logits_BTV = logits_BTV.astype(jnp.promote_types(logits_BTV.dtype, jnp.float32))
    max_BT = jax.lax.stop_gradient(logits_BTV.max(-1))
    lse_BT = max_BT + jnp.log(jnp.sum(jnp.exp(logits_BTV - max_BT[..., None]), -1))
    if split_axes("vocab"):  # each device picks from its part of the vocabulary; indices would gather it
        picked_BTV = jnp.where(_onehot(targets_BT, logits_BTV), logits_BTV, 0.0)
        target_BT = picked_BTV.sum(-1)
    else:
        target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], -1, mode="clip")[..., 0]
    known_BT = (targets_BT >= 0) & (targets_BT < logits_BTV.shape[-1])
    target_BT = jnp.where(known_BT, target_BT, jnp.nan)
    nll_BT, z_BT = lse_BT - target_BT, jnp.square(lse_BT)
    loss_BT = nll_BT
    if cfg.label_smoothing:
        spread_BT = lse_BT - logits_BTV.mean(-1)
        loss_BT = (1 - cfg.label_smoothing) * nll_BT + cfg.label_smoothing * spread_BT
    if cfg.z_loss:
        loss_BT = loss_BT + cfg.z_loss * z_BT
    hit_BT = (target_BT >= max_BT).astype(nll_BT.dtype)
    losses = jax.lax.stop_gradient(TokenLosses(nll_BT, z_BT, hit_BT))
    return jnp.sum(weights_BT * loss_BT), lse_BT, losses


def _onehot(targets_BT: Array, logits_BTV: Array) -> Array:
    return jax.lax.broadcasted_iota(targets_BT.dtype, logits_BTV.shape, 2) == targets_BT[..., None]


def _logits_gradient(
    cfg: LossConfig, logits_BTV: Array, lse_BT: Array, targets_BT: Array, weights_BT: Array
) -> Float[Array, "B T V"]:
    """d loss_sum / d logits = w ((1 + 2 z_loss lse) softmax - (1 - e) onehot - e / V), e = smoothing."""
    softmax_BTV = jnp.exp(logits_BTV - lse_BT[..., None])
    onehot_BTV = _onehot(targets_BT, logits_BTV)
    e = cfg.label_smoothing
    g_BTV = (1 + 2 * cfg.z_loss * lse_BT)[..., None] * softmax_BTV - jnp.where(onehot_BTV, 1 - e, 0.0)
    if e:
        g_BTV = g_BTV - e / logits_BTV.shape[-1]
    return weights_BT[..., None] * g_BTV


def _chunks(x_BT: Array, columns: int) -> Array:
    """`[B, T, ...]` as `[T / columns, B, columns, ...]`, the last block filled up with zeros."""
    fill = [(0, 0), (0, -x_BT.shape[1] % columns)] + [(0, 0)] * (x_BT.ndim - 2)
    x_BT = jnp.pad(x_BT, fill)
    return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], -1, columns, *x_BT.shape[2:]), 1, 0)


def _join(x_NBC: Array, length: int) -> Array:
    """The inverse of `_chunks`."""
    x_BNC = jnp.moveaxis(x_NBC, 0, 1)
    return x_BNC.reshape(x_BNC.shape[0], -1, *x_BNC.shape[3:])[:, :length]


def _read_leaves(unembed: Unembed, params: Params, hidden_BTD: Array) -> list[bool]:
    """Which leaves of `params` take part in `unembed`.

    The others stay out of the scan over blocks, which would sum their zero gradients, as large as the model.
    """
    traced = jax.make_jaxpr(unembed)(params, hidden_BTD).jaxpr
    used = {id(var) for equation in traced.eqns for var in equation.invars}
    return [id(var) in used for var in traced.invars[:-1]]


def cross_entropy(
    cfg: LossConfig,
    unembed: Unembed,
    params: Params,
    hidden_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> tuple[Float[Array, ""], TokenLosses]:
    """Weighted sum of the training loss over all tokens, differentiable in `params` and `hidden_BTD`.

        sum_BT w ((1 - e) nll + e (lse - mean_V logits) + z_loss lse^2),  nll = lse - logits[target]

    with lse = logsumexp(logits) and e = label smoothing. With `cfg.chunk` = 0 this is plain autodiff (of any
    order) through all logits at once. Otherwise the gradient of a block with respect to its hidden states and
    the parameters of `unembed` is computed right after its logits, in the forward pass, and the backward pass
    only multiplies by the cotangent: unlike under `jax.checkpoint`, no product is computed twice. Without
    differentiation only the forward half runs. Parameter gradients are summed over blocks in fp32, on every
    device for its own part of the batch, and over devices once, after the last block. Weights carry no
    gradient.

    Args:
        cfg: see `LossConfig`.
        unembed: `(params, hidden) -> logits`, each position on its own.
        params: any pytree; only leaves that `unembed` reads take part.
        hidden_BTD: any float dtype.
        targets_BT: ids in [0, V), also where the weight is 0; others give NaN.
        weights_BT: any weights at least 0.

    Returns:
        The sum, and the per-token values.
    """
    weights_BT = jax.lax.stop_gradient(weights_BT)
    if not cfg.chunk or not hidden_BTD.shape[1]:
        loss, _, losses = _block(cfg, unembed(params, hidden_BTD), targets_BT, weights_BT)
        return loss, losses
    leaves, structure = jax.tree.flatten(params)
    is_read = _read_leaves(unembed, params, hidden_BTD[:, :1])

    def head(read: list[Array], hidden: Array) -> Array:
        rest = iter(read)
        merged = [next(rest) if r else leaf for r, leaf in zip(is_read, leaves, strict=True)]
        return unembed(jax.tree.unflatten(structure, merged), hidden)

    def blocks(*arrays: Array) -> tuple:
        # As few blocks as `chunk` allows, of even size: 100 columns by 64 are 50 + 50.
        length = arrays[0].shape[1]
        columns = -(-length // -(-length // cfg.chunk))
        return tuple(_chunks(x, columns) for x in arrays)

    dtypes = [leaf.dtype for r, leaf in zip(is_read, leaves, strict=True) if r]

    def wide(read: list[Array]) -> list[Array]:
        return [w.astype(dtype) for w, dtype in zip(read, dtypes, strict=True)]

    def values(read, hidden_BTD, targets_BT, weights_BT):
        def body(loss, block):
            h, targets, weights = block
            block_loss, _, losses = _block(cfg, head(wide(read), h), targets, weights)
            return loss + block_loss, losses

        loss, losses = jax.lax.scan(body, jnp.zeros([]), blocks(hidden_BTD, targets_BT, weights_BT))
        return loss, jax.tree.map(lambda x: _join(x, hidden_BTD.shape[1]), losses)

    def values_and_gradients(read, hidden_BTD, targets_BT, weights_BT):
        def body(carry, block):
            h, targets, weights = block
            # The casts cost nothing, for the product casts back, and leave its weight gradient unrounded.
            logits, pull = jax.vjp(head, wide(read), h)
            block_loss, lse, losses = _block(cfg, logits, targets, weights)
            g = _logits_gradient(cfg, logits, lse, targets, weights)
            d_read, d_h = pull(g.astype(logits.dtype))
            loss, sums = carry
            return (loss + block_loss, jax.tree.map(lambda a, b: a + b, sums, d_read)), (losses, d_h)

        zeros = [
            jnp.zeros(w.shape, jnp.promote_types(dtype, jnp.float32))
            for w, dtype in zip(read, dtypes, strict=True)
        ]
        carry = (jnp.zeros([]), zeros)
        sums, columns = jax.lax.scan(body, carry, blocks(hidden_BTD, targets_BT, weights_BT))
        return sums, jax.tree.map(lambda x: _join(x, hidden_BTD.shape[1]), columns)

    @jax.custom_vjp
    def total(read, hidden_BTD, targets_BT, weights_BT):
        return on_own_part(values, read, hidden_BTD, targets_BT, weights_BT)

    def forward(read, hidden_BTD, targets_BT, weights_BT):
        sums, columns = on_own_part(values_and_gradients, read, hidden_BTD, targets_BT, weights_BT)
        (loss, d_read), (losses, d_h) = sums, columns
        d_read = jax.tree.map(lambda d, p: d.astype(p.dtype), d_read, read)
        return (loss, losses), (d_read, d_h)

    def backward(saved, cotangents):
        d_read, d_hidden = jax.tree.map(lambda d: (d * cotangents[0]).astype(d.dtype), saved)
        return d_read, d_hidden, None, None

    total.defvjp(forward, backward)
    read = [leaf for r, leaf in zip(is_read, leaves, strict=True) if r]
    hidden_BTD = constrain(hidden_BTD, "batch", "length", "activation")
    return total(read, hidden_BTD, targets_BT, weights_BT)


def token_nll(
    cfg: LossConfig,
    unembed: Unembed,
    params: Params,
    hidden_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    """Negative log-likelihood of every target, in nats, fp32, chunked like the training loss."""
    _, losses = cross_entropy(cfg, unembed, params, hidden_BTD, targets_BT, jnp.ones(targets_BT.shape))
    return losses.nll


def make_lm_objective(
    model: LanguageModel, cfg: LossConfig, token_bytes_V: Float[Array, " V"] | None = None
) -> Objective:
    """The language-model objective `(params, batch, key) -> (loss_sum, weight_sum, metrics)`, all sums.

    The batch holds `targets` int[B, T], `weights` float[B, T], optionally `positions` int[B, T], and what
    `model.apply` reads. Metrics are (sum, weight) pairs that add up over batches, microbatches, devices:

        nll           w nll (nats); smoothing, z-loss and auxiliary losses are not in it
        z_loss        w z_loss logsumexp(logits)^2, as it stands in the total
        accuracy      w [target has the largest logit]
        total         everything that is minimised
        bpb           w nll / ln 2 over w bytes, with `token_bytes_V`; a token of 0 bytes (EOS) only costs
        nll_position  with `cfg.per_position`: [T] sums and weights by position in the document
                      (`batch['positions']`, else the column)
        moe/...       the model's auxiliary pairs under their own names; `aux['loss']` is added to the loss

    Args:
        model: see `LanguageModel`.
        cfg: see `LossConfig`.
        token_bytes_V: bytes of text that each token stands for; 0 for special tokens.
    """

    def objective(params: Params, batch: Batch, key: Any) -> tuple[Float[Array, ""], Float[Array, ""], Pairs]:
        hidden_BTD, aux = model.apply(params, batch, key)
        return token_sums(cfg, model.unembed, params, batch, hidden_BTD, aux, token_bytes_V)

    return objective


def token_sums(
    cfg: LossConfig,
    unembed: Unembed,
    params: Params,
    batch: Batch,
    hidden_BTD: Float[Array, "B T D"],
    aux: Pairs,
    token_bytes_V: Float[Array, " V"] | None,
) -> tuple[Float[Array, ""], Float[Array, ""], Pairs]:
    """What `make_lm_objective` returns, from hidden states that are there already."""
    targets_BT, weights_BT = batch["targets"], batch["weights"].astype(jnp.float32)
    loss, token = cross_entropy(cfg, unembed, params, hidden_BTD, targets_BT, weights_BT)
    loss = loss + aux.get("loss", 0.0)
    weight = weights_BT.sum()
    nll_BT = weights_BT * token.nll
    metrics = {
        "nll": (nll_BT.sum(), weight),
        "z_loss": (cfg.z_loss * jnp.sum(weights_BT * token.z), weight),
        "accuracy": (jnp.sum(weights_BT * token.hit), weight),
        "total": (loss, weight),
    }
    if token_bytes_V is not None:
        text_BT = weights_BT * jnp.asarray(token_bytes_V, jnp.float32)[targets_BT]
        metrics["bpb"] = (nll_BT.sum() / math.log(2.0), text_BT.sum())
    if cfg.per_position:
        columns_BT = jnp.broadcast_to(jnp.arange(targets_BT.shape[1]), targets_BT.shape)
        positions_BT = batch.get("positions", columns_BT)
        zeros_T = jnp.zeros(targets_BT.shape[1], jnp.float32)
        sums = (zeros_T.at[positions_BT].add(x_BT) for x_BT in (nll_BT, weights_BT))
        metrics["nll_position"] = tuple(sums)
    metrics |= {name: pair for name, pair in aux.items() if name != "loss"}
    return loss, weight, jax.lax.stop_gradient(metrics)
