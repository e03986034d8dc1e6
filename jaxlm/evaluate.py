"""Negative log-likelihood, accuracy and bits per byte of a pinned set of text, each prediction exactly once.

A row's sums are made on the device in fp32 and added up over rows on the host in float64, in the order of the
rows. Where a row lies in a batch, or on a mesh, therefore does not show beyond the rounding of that row.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlm import sharding
from jaxlm.data.config import FORMATS
from jaxlm.errors import UserError
from jaxlm.objectives.formats import RowModel, as_given, label_losses
from jaxlm.objectives.lm import Batch, LanguageModel, LossConfig, Params, cross_entropy


class RowSums(NamedTuple):
    """What one batch adds to the result, fp32; a row of padding is all zeros."""

    nll_B: Float[Array, "B"]  # sum of w nll, nats
    weight_B: Float[Array, "B"]  # sum of w
    hits_B: Float[Array, "B"]  # sum of w [target has the largest logit]
    bytes_B: Float[Array, "B"]  # sum of w bytes
    nll_BT: Float[Array, "B T"] | None  # w nll, with `LossConfig.per_position`
    weight_BT: Float[Array, "B T"] | None
    positions_BT: Float[Array, "B T"] | None
    # of labels beside tokens: w nll, w and w [hit]
    labels_3B: Float[Array, "3 B"] | None = None
    exact_B: Float[Array, "B"] | None = None  # of pairs: 1 where every target has the largest logit


EvalStep = Callable[[Params, Batch], RowSums]


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """A model's score on a set of text."""

    nll: float  # nats per token that is predicted, end-of-sequence tokens included, or per label
    perplexity: float  # exp(nll)
    bpb: float  # bits per byte of text: sum of nll / ln 2 / bytes; NaN if the bytes are not known
    accuracy: float  # share of tokens, or of labels, that have the largest logit
    standard_error: float  # of nll, nats per token, see `evaluate`; NaN with fewer than two rows
    tokens: int  # sum of the weights
    bytes: int  # of the text; 0 if not known
    rows: int  # that hold a token
    label_nll: float | None = None  # nats per label, where there are labels beside tokens
    label_accuracy: float | None = None
    # share of pairs whose targets all have the largest logit: what greedy decoding gets right to the end
    exact: float | None = None
    # [T] nats per token by position in the document, NaN where none is; with `LossConfig.per_position`
    nll_by_position: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

    def metrics(self, prefix: str = "eval/") -> dict[str, float]:
        """The numbers of the result by name; bits per byte only of text whose bytes are known.

        >>> EvalResult(1.0, 2.7, 1.4, 0.5, 0.1, 10, 10, 2).metrics()["eval/nll"]
        1.0
        """
        left_out = {"nll_by_position"} | (set() if self.bytes else {"bpb", "bytes"})
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}
        return {f"{prefix}{name}": value for name, value in values.items() if value is not None}


def make_eval_step(
    model: LanguageModel | RowModel,
    cfg: LossConfig,
    token_bytes_V: Float[np.ndarray, "V"] | None = None,
    data_format: str = "lm",
) -> EvalStep:
    """The jitted `eval_step(params, batch) -> RowSums`: no gradient, no dropout, logits in chunks.

    Trace it (call it first) under the `sharding.use(layout)` of the parameters.

    Args:
        model: functions `apply` and `unembed`, as for the training objective.
        cfg: `chunk` and `per_position` matter; z-loss and smoothing are not part of a likelihood.
        token_bytes_V: bytes of text that each token stands for; read by 'lm' alone.
        data_format: what the batches ask of the model, see `jaxlm.objectives.formats`.
    """
    likelihood = dataclasses.replace(cfg, z_loss=0.0, label_smoothing=0.0)
    whole = dataclasses.replace(likelihood, chunk=0)
    if data_format != "lm":
        token_bytes_V = None

    def label_sums(params: Params, batch: Batch, hidden_BTD: Array) -> tuple[Array, Array, Array]:
        weights_B = batch["label_weights"].astype(jnp.float32)
        logits_BC = model.classify(params, batch, hidden_BTD, None)
        _, label = label_losses(likelihood, logits_BC, batch["labels"], weights_B)
        nll_B, hits_B = (jnp.where(weights_B > 0, weights_B * x_B, 0.0) for x_B in (label.nll, label.hit))
        return nll_B, weights_B, hits_B

    @jax.jit
    def eval_step(params: Params, batch: Batch) -> RowSums:
        hidden_BTD, _ = model.apply(params, batch, None)
        labels = label_sums(params, batch, hidden_BTD) if FORMATS[data_format].labels else None
        if data_format == "classification":
            return everywhere(RowSums(*labels, jnp.zeros_like(labels[0]), None, None, None))
        targets_BT, weight_BT = batch["targets"], batch["weights"].astype(jnp.float32)
        if FORMATS[data_format].tags:
            logits_BTC = model.classify(params, batch, hidden_BTD, None)
            _, token = cross_entropy(whole, as_given, {}, logits_BTC, targets_BT, weight_BT)
        else:
            _, token = cross_entropy(cfg, model.unembed, params, hidden_BTD, targets_BT, weight_BT)
        bytes_BT = 0.0 if token_bytes_V is None else jnp.asarray(token_bytes_V, jnp.float32)[targets_BT]

        def weighted(x_BT: Array | float) -> Array:
            # A column of padding has no meaning, so not even NaN times zero may come of it.
            return jnp.where(weight_BT > 0, weight_BT * x_BT, 0.0)

        nll_BT = weighted(token.nll)
        columns_BT = (nll_BT, weight_BT, batch["positions"]) if cfg.per_position else (None,) * 3
        sums = RowSums(
            nll_BT.sum(1),
            weight_BT.sum(1),
            weighted(token.hit).sum(1),
            weighted(bytes_BT).sum(1),
            *columns_BT,
            None if labels is None else jnp.stack(labels),
            jnp.all((weight_BT == 0) | (token.hit > 0), axis=1) if data_format == "seq2seq" else None,
        )
        return everywhere(sums)

    def everywhere(sums: RowSums) -> RowSums:
        """Replicated: every host adds up the same rows."""
        return jax.tree.map(lambda x: sharding.constrain(x, *[None] * x.ndim), sums)

    return eval_step


def evaluate(
    eval_step: EvalStep,
    params: Params,
    batches: Iterable[Batch],
    *,
    place: Callable[[Batch], Batch] | None = None,
    num_tokens: int | None = None,
    num_bytes: int | None = None,
) -> EvalResult:
    """Score `params` on all batches of a finite set.

        nll = sum_r y_r / sum_r w_r
        standard error = sqrt(n / (n - 1) sum_r (y_r - nll w_r)^2) / sum_r w_r

    with y_r and w_r the sums of w nll and w of row r, over the n rows that hold a token: the error of a ratio
    if rows are drawn independently (Cochran 1977, section 6.4). Where a document runs over several rows, they
    are not quite independent, and the true error is somewhat larger.

    Args:
        eval_step: from `make_eval_step`.
        params: all parameters.
        batches: rows may be filled up with weight 0; such as `jaxlm.data.loader.eval_batches`.
        place: puts a batch on the devices.
        num_tokens: the weight that the set is known to hold; checked.
        num_bytes: bytes of its text; default the sum of the tokens' bytes.

    Raises:
        UserError: no tokens, or not as many as `num_tokens`.
    """
    rows: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    exact: list[np.ndarray] = []
    by_position: np.ndarray | None = None  # [2, T]: sums of w nll and of w

    def take(sums: RowSums) -> None:
        nonlocal by_position
        sums = jax.device_get(sums)
        rows.append(np.stack(sums[:4]).astype(np.float64))
        if sums.labels_3B is not None:
            labels.append(sums.labels_3B.astype(np.float64))
        if sums.exact_B is not None:
            exact.append(sums.exact_B[sums.weight_B > 0])
        if sums.nll_BT is not None:
            if by_position is None:
                by_position = np.zeros((2, sums.nll_BT.shape[1]))
            for total_T, x_BT in zip(by_position, (sums.nll_BT, sums.weight_BT), strict=True):
                np.add.at(total_T, sums.positions_BT, x_BT.astype(np.float64))

    waiting = None
    for batch in batches:
        running = eval_step(params, batch if place is None else place(batch))
        # Read one batch late, so that the device has the next one while the host adds.
        if waiting is not None:
            take(waiting)
        waiting = running
    if waiting is not None:
        take(waiting)
    table_4R = np.concatenate(rows, axis=1) if rows else np.zeros((4, 0))
    table_4R = table_4R[:, table_4R[1] > 0]
    if not table_4R.size:
        raise UserError("evaluate: the batches hold no token with a weight above 0")
    nll_R, weight_R, hits_R, bytes_R = table_4R
    nll, weight, hits, size = map(math.fsum, (nll_R, weight_R, hits_R, bytes_R))
    if num_tokens is not None and weight != num_tokens:
        raise UserError(f"evaluate: the batches hold {weight:.12g} tokens, but the set has {num_tokens}")
    if num_bytes is not None:
        size = num_bytes
    mean, n = nll / weight, len(nll_R)
    squares = math.fsum((nll_R - mean * weight_R) ** 2)
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(np.float64(mean)))
    if by_position is not None:
        with np.errstate(invalid="ignore"):
            by_position = by_position[0] / by_position[1]
    label_nll, label_weight, label_hits = map(math.fsum, np.concatenate(labels, 1) if labels else [()] * 3)
    return EvalResult(
        nll=mean,
        perplexity=perplexity,
        bpb=nll / math.log(2.0) / size if size else math.nan,
        accuracy=hits / weight,
        standard_error=math.sqrt(squares * n / (n - 1)) / weight if n > 1 else math.nan,
        tokens=round(weight),
        bytes=round(size),
        rows=n,
        label_nll=label_nll / label_weight if label_weight else None,
        label_accuracy=label_hits / label_weight if label_weight else None,
        exact=float(np.concatenate(exact).mean()) if exact else None,
        nll_by_position=by_position,
    )
