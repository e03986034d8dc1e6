"""The objective of each data format: of tokens, of a label for each row, or of both.

| data.format | what is minimised |
|---|---|
| lm | nll of the next token; bits per byte stand beside it, as in no other format |
| prefix_lm, span_corruption, denoise, seq2seq | nll of the targets that have a weight |
| mlm | nll of the hidden tokens |
| nsp, sop | the same, and the nll of a row's label, which counts as much as all hidden tokens of its row |
| classification | nll of a row's label |
| tags | nll of the tags of a row's words |

A label's share is tied to its row, not to the batch, so that all of it stays a sum: with equally many hidden
tokens in each row it is BERT's loss, the mean of the tokens plus the mean of the labels.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.data.config import FORMATS, DataConfig
from jaxlm.errors import check
from jaxlm.model.backends import check_backend
from jaxlm.model.config import TransformerConfig
from jaxlm.model.context_parallel import check_context
from jaxlm.model.models import ModelConfig
from jaxlm.objectives.lm import (
    Batch,
    LanguageModel,
    LossConfig,
    Objective,
    Pairs,
    Params,
    TokenLosses,
    cross_entropy,
    make_lm_objective,
    token_sums,
)


class RowModel(Protocol):
    """A `LanguageModel` that also says what a whole row is."""

    def apply(self, params: Params, batch: Batch, key: Any) -> tuple[Float[Array, "B T D"], Pairs]:
        """As of `LanguageModel`."""
        ...

    def unembed(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """As of `LanguageModel`."""
        ...

    def classify(
        self, params: Params, batch: Batch, hidden: Float[Array, "B T D"], key: Any
    ) -> Float[Array, "B *C"]:
        """fp32 logits of the classes, [B, C] or [B, T, C]; the key is for dropout."""
        ...


def check_model(model: ModelConfig, data: DataConfig) -> None:
    """Raise `UserError` unless the model can learn, or be scored, from rows of the data's format.

    Args:
        model: its config; a recurrent one has no readout for labels.
        data: whose format it is.
    """
    name, facts = data.format, data.facts
    with_encoder = [other for other, its in FORMATS.items() if its.encoder]
    check(
        model.has_encoder or not facts.encoder,
        f"data.format={name!r} gives inputs to an encoder, and the model has none: set "
        "model.encoder.num_layers",
    )
    check(
        facts.encoder or not model.has_encoder,
        f"model.encoder.num_layers={model.encoder.num_layers}, but data.format={name!r} has no inputs for an "
        f"encoder; formats that do: {', '.join(with_encoder)}",
    )
    reasons = {
        "lm": "every column would see the token that it is to predict",
        "mlm": "a hidden token is told from both sides",
        "nsp": "a hidden token is told from both sides",
        "sop": "a hidden token is told from both sides",
        "prefix_lm": "a prefix is seen from all of it, and the format hides what comes later",
    }
    if facts.causal is not None:
        check(
            model.causal == facts.causal,
            f"data.format={name!r} with model.causal={model.causal}: {reasons[name]}; set "
            f"model.causal={facts.causal}, or choose another data.format",
        )
    if not isinstance(model, TransformerConfig):
        check(
            not (facts.labels or facts.tags),
            f"data.format={name!r} needs a transformer, which has a readout; model.kind is {model.kind!r}",
        )
        return
    if name == "prefix_lm":
        check_backend(model.attention.backend, allowed=True)
        check_context(model.attention.context, allowed=True)
    if facts.labels or facts.tags:
        _check_readout(model, len(data.classes) or 2, name)
    # Theirs are sums over all tokens of a row; of one, only the tokens that the loss counts divide them.
    few = model.moe.num_experts > 0 and name in ("mlm", "nsp", "sop", "classification", "tags")
    for field in ("load_balance", "router_z") if few else ():
        value = getattr(model.moe, field)
        check(
            value == 0,
            f"model.moe.{field}={value}, but the loss of data.format={name!r} counts few of a row's tokens, "
            "and this one all: it would weigh many times as much; set it to 0 (model.moe.bias_balancing=True "
            "balances without a loss)",
        )
    check(
        model.token_types != 1 or name not in ("nsp", "sop"),
        f"model.token_types=1, but data.format={name!r} has two types of tokens; set it to 2, or to 0 = none",
    )
    longest = model.position.max_length
    check(
        model.position.kind != "learned" or data.input_len <= longest,
        f"data.input_len={data.input_len} is longer than model.position.max_length={longest}",
    )


def _check_readout(model: TransformerConfig, classes: int, name: str) -> None:
    readout = model.readout
    check(
        readout.classes == classes,
        f"model.readout.classes={readout.classes}, but data.format={name!r} has rows of {classes} classes",
    )
    if FORMATS[name].tags:
        check(
            readout.of == "each",
            f"model.readout.of={readout.of!r} says one thing of a row, but data.format={name!r} has a tag "
            "for each word; use 'each'",
        )
        return
    check(
        readout.of != "each",
        f"model.readout.of='each' reads out every token, but data.format={name!r} has one label a row; use "
        "'first', 'last' or 'mean'",
    )
    check(
        readout.of != "first" or not model.causal,
        "model.readout.of='first' of a causal model reads a token that has seen nothing; use 'last'",
    )


def make_objective(
    data_format: str,
    model: LanguageModel | RowModel,
    cfg: LossConfig,
    token_bytes_V: Float[Array, " V"] | None = None,
) -> Objective:
    """The objective of a format, `(params, batch, key) -> (loss_sum, weight_sum, metrics)`, all sums.

    Metrics are those of `make_lm_objective`, of tokens; with labels beside tokens also `label_nll` and
    `label_accuracy`; with labels alone `nll`, `accuracy`, `z_loss` and `total` are those of the labels, and
    with tags those of the tags.

    Args:
        data_format: name in `jaxlm.data.config.FORMATS`.
        model: with `classify`, if the format has labels.
        cfg: see `LossConfig`; smoothing and z-loss act on labels too.
        token_bytes_V: bytes of text that each token stands for; read by 'lm' alone.
    """
    if FORMATS[data_format].tags:
        return _tags_objective(model, cfg)
    if not FORMATS[data_format].labels:
        return make_lm_objective(model, cfg, token_bytes_V if data_format == "lm" else None)
    alone = data_format == "classification"

    def objective(params: Params, batch: Batch, key: Any) -> tuple[Float[Array, ""], Float[Array, ""], Pairs]:
        trunk_key, head_key = (None, None) if key is None else jax.random.split(key)
        hidden_BTD, aux = model.apply(params, batch, trunk_key)
        logits_BC = model.classify(params, batch, hidden_BTD, head_key)
        weights_B = batch["label_weights"].astype(jnp.float32)
        if alone:
            loss, label = label_losses(cfg, logits_BC, batch["labels"], weights_B)
            loss, weight = loss + aux.get("loss", 0.0), weights_B.sum()
            z_loss = cfg.z_loss * jnp.sum(weights_B * label.z)
            metrics = {**_pairs(label, weights_B), "z_loss": (z_loss, weight), "total": (loss, weight)}
            metrics |= {name: pair for name, pair in aux.items() if name != "loss"}
            return loss, weight, jax.lax.stop_gradient(metrics)
        loss, weight, metrics = token_sums(cfg, model.unembed, params, batch, hidden_BTD, aux, None)
        share_B = weights_B * batch["weights"].astype(jnp.float32).sum(1)
        more, label = label_losses(cfg, logits_BC, batch["labels"], share_B)
        loss = loss + more
        metrics |= {f"label_{name}": pair for name, pair in _pairs(label, weights_B).items()}
        return loss, weight, jax.lax.stop_gradient({**metrics, "total": (loss, weight)})

    return objective


def _tags_objective(model: RowModel, cfg: LossConfig) -> Objective:
    whole = dataclasses.replace(cfg, chunk=0)

    def objective(params: Params, batch: Batch, key: Any) -> tuple[Float[Array, ""], Float[Array, ""], Pairs]:
        trunk_key, head_key = (None, None) if key is None else jax.random.split(key)
        hidden_BTD, aux = model.apply(params, batch, trunk_key)
        logits_BTC = model.classify(params, batch, hidden_BTD, head_key)
        return token_sums(whole, as_given, {}, batch, logits_BTC, aux, None)

    return objective


def as_given(_: Params, logits: Array) -> Array:
    """The `unembed` of what are logits already."""
    return logits


def label_losses(
    cfg: LossConfig, logits_BC: Float[Array, "B C"], labels_B: Array, weights_B: Float[Array, " B"]
) -> tuple[Float[Array, ""], TokenLosses]:
    """Weighted sum of the training loss over rows, and the values of each row, [B]."""
    whole = dataclasses.replace(cfg, chunk=0)
    columns = (logits_BC[:, None], labels_B[:, None], weights_B[:, None])
    loss, losses = cross_entropy(whole, as_given, {}, *columns)
    return loss, jax.tree.map(lambda x_B1: x_B1[:, 0], losses)


def _pairs(label: TokenLosses, weights_B: Float[Array, " B"]) -> Pairs:
    sums = {"nll": label.nll, "accuracy": label.hit}
    return {name: (jnp.sum(weights_B * x_B), weights_B.sum()) for name, x_B in sums.items()}
