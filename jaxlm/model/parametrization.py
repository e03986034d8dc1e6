"""How a wider or deeper model must differ from the one that was tuned: one table of multipliers by role.

The base model has width `base_width`, depth `base_depth` and heads of `base_head_dim`; with m = model_dim /
base_width, l = num_layers / base_depth and h = head_dim / base_head_dim, and for optimizers whose updates do
not depend on the gradient's size (AdamW, Lion, Adafactor):

    role        init std   learning rate   decay   epsilon    output
    embedding   1          1               1       (1/m)      1
    hidden      m^-1/2     1/m             (m)     (1/m 1/l)  1
    vector      1          1               1       (1/m 1/l)  1            biases, norms; the last norm 1/m
    head        1          1               1       (1/m)      1/m          the logits
    router      1          1               1       (1/m 1/l)  1/m          a head with few outputs
    residual                                                  (1/l)        each branch before it is added
    attention                                                 1/h          times base_head_dim^-1/2

`mup` has what stands without brackets, `completep` everything; its learning rates' factor l^(alpha - 1) is 1.
At m = l = h = 1 all are 1, so that the base model is the standard one to the bit: scores are multiplied by
base_head_dim^-1/2 (base_head_dim / head_dim), which falls like 1 / head_dim and is head_dim^-1/2 at the base.
With `init_std` = 0 the standard deviation is fan_in^-1/2, which falls with the width by itself: hidden
matrices keep it, and all others have it at the base's width. Every width that a hidden matrix reads must grow
with the model's: the MLP's, the experts', heads times their size, and the ranks of latent attention.

A tied table is an embedding whose logits are multiplied by 1/m: its learning rate stays, as the embedding's
does and as the head's with this multiplier does. Embeddings scaled by sqrt(D) are scaled by sqrt(base_width).

Hidden learning rates of the others: SGD 1 and m for all other roles (mup only; CompleteP is an AdamW rule);
Muon m^-1/2 where updates are scaled to a given RMS and 1 where they are not. Its AdamW half is as above.

Sources: arXiv:2203.03466 (muP, Table 8), arXiv:2505.01618 (CompleteP, Table 1 and Equation 40, alpha = 1),
github.com/EleutherAI/nanoGPT-mup.
"""

import dataclasses
import re
from typing import Protocol

from jaxlm.errors import check
from jaxlm.model.attention import AttentionConfig
from jaxlm.model.config import TransformerConfig

# Role -> regex of its leaves' names. Every leaf has one role; `router_bias` moves by its own rule.
LEAVES: dict[str, str] = {
    "embedding": r"(^|/)embed/",
    "hidden": r"(^|/)((cross_)?attention/w\w+|mlp/w_\w+|moe/(shared_)?w_\w+)$"
    r"|(^|/)(transform|pooler|projection|convolution)/w$",
    "vector": r"(^|/)(scale|bias|sinks|router_b|b[qkvo](_rel)?|b_\w+)$"
    r"|(^|/)(position_bias/|distances/|(transform|pooler|projection|convolution)/b$)",
    "head": r"(^|/)(head|classifier)/",
    "router": r"(^|/)(router_w|shared_gate)$",
}
IN_BLOCKS = r"(^|/)(first|blocks|tail)/"

Multipliers = tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """What one role's numbers are multiplied by."""

    init_std: float = 1.0  # of a fixed `init_std`
    lr: float = 1.0  # learning rate, for AdamW
    decay: float = 1.0  # weight decay, which is multiplied by the learning rate as well
    eps: float = 1.0  # AdamW's epsilon
    output: float = 1.0  # in the forward pass


class Optimizer(Protocol):
    """The fields of an optimizer's config that decide the learning rates."""

    name: str
    muon_rms: float
    muon_skip: str
    parameter_scale: bool


def ratios(cfg: TransformerConfig) -> tuple[float, float, float]:
    """(m, l, h): width, depth and head dim over the base model's; 1 where the parametrisation ignores it."""
    if cfg.parametrization == "standard":
        return 1.0, 1.0, 1.0
    depth = cfg.num_layers / cfg.base_depth if cfg.parametrization == "completep" else 1.0
    head_dim = cfg.head_dim / cfg.base_head_dim if cfg.base_head_dim else 1.0
    return cfg.model_dim / cfg.base_width, depth, head_dim


def rules(cfg: TransformerConfig) -> dict[str, Rule]:
    """The table above for one model, with AdamW's learning rates.

    >>> cfg = TransformerConfig(model_dim=512, parametrization="mup", base_width=128, base_head_dim=32)
    >>> hidden, head = rules(cfg)["hidden"], rules(cfg)["head"]
    >>> (hidden.init_std, hidden.lr, head.lr, head.output), rules(cfg)["attention"].output
    ((0.5, 0.25, 1.0, 0.25), 0.25)
    """
    m, l, h = ratios(cfg)  # noqa: E741
    complete = cfg.parametrization == "completep"
    outside, inside = (1 / m, 1 / (m * l)) if complete else (1.0, 1.0)
    return {
        "embedding": Rule(eps=outside, output=m**-0.5 if cfg.scale_embeddings else 1.0),
        "hidden": Rule(init_std=m**-0.5, lr=1 / m, decay=m if complete else 1.0, eps=inside),
        "vector": Rule(eps=inside),
        "head": Rule(eps=outside, output=1 / m),
        "router": Rule(eps=inside, output=1 / m),
        "residual": Rule(output=1 / l),
        "attention": Rule(output=1 / h),
    }


def initial_std(cfg: TransformerConfig, role: str, fan_in: int) -> float:
    """Standard deviation of an initial weight of that role."""
    if cfg.init_std:
        return cfg.init_std * rules(cfg)[role].init_std
    return fan_in**-0.5 * (1.0 if role == "hidden" else ratios(cfg)[0] ** 0.5)


def out_scale(cfg: TransformerConfig) -> float:
    """Further factor on the initial output projections of residual branches: (2 L)^-1/2, L of the base."""
    return (2 * (cfg.base_depth if cfg.parametrization == "completep" else cfg.num_layers)) ** -0.5


def attention_config(cfg: TransformerConfig) -> AttentionConfig:
    """`cfg.attention` with the scale of its scores written out where it is not the standard one."""
    output = rules(cfg)["attention"].output
    if output == 1.0:
        return cfg.attention
    scale = (cfg.attention.scale or cfg.disentangled.scale(cfg.base_head_dim)) * output
    return dataclasses.replace(cfg.attention, scale=scale)


def optimizer_options(cfg: TransformerConfig, optimizer: Optimizer) -> dict[str, Multipliers]:
    """Keyword arguments for `make_optimizer`: (regex, factor) pairs; none for the standard parametrisation.

    Args:
        cfg: the model.
        optimizer: an `OptimConfig`, or anything with its fields.

    Raises:
        UserError: there is no rule for this optimizer with these settings.

    >>> from types import SimpleNamespace
    >>> cfg = TransformerConfig(model_dim=512, parametrization="mup", base_width=128, base_head_dim=32)
    >>> optimizer_options(cfg, SimpleNamespace(name="lion", parameter_scale=False))["multipliers"][0][1]
    0.25
    """
    if cfg.parametrization == "standard":
        return {}
    kind, name, (m, l, _) = cfg.parametrization, optimizer.name, ratios(cfg)  # noqa: E741
    table = rules(cfg)
    lr = {role: table[role].lr for role in LEAVES}
    if name == "sgd":
        check(
            kind == "mup",
            f"model.parametrization={kind!r} has no rule for optim.name='sgd'; use 'mup' or 'adamw'",
        )
        lr = {role: 1.0 if role == "hidden" else m for role in LEAVES}
    elif name == "muon":
        _check_muon_skip(cfg, optimizer.muon_skip)
        lr["hidden"] = m**-0.5 if optimizer.muon_rms else 1.0
    check(
        name != "adafactor" or not optimizer.parameter_scale,
        f"model.parametrization={kind!r} has no rule for optim.parameter_scale=True, which multiplies "
        "updates by the size of the parameters that the parametrisation sets",
    )
    decay = dict.fromkeys(LEAVES, 1.0)
    if kind == "completep":
        decay["hidden"] = 1 / lr["hidden"]  # lr * decay is the base model's
    there = {"head": not cfg.tie_embeddings or cfg.readout.classes > 0, "router": cfg.num_moe_layers > 0}

    def pairs(factors: dict[str, float]) -> Multipliers:
        return tuple((LEAVES[role], x) for role, x in factors.items() if x != 1.0 and there.get(role, True))

    out = {"multipliers": pairs(lr), "decay_multipliers": pairs(decay)}
    if kind == "completep" and name in ("adamw", "muon"):
        eps = ((".", 1 / m), (IN_BLOCKS, 1 / l))  # both act on what is in the blocks
        out["eps_multipliers"] = tuple(pair for pair in eps if pair[1] != 1.0)
    return out


def _check_muon_skip(cfg: TransformerConfig, skip: str) -> None:
    """The rule of a leaf depends on which half of Muon it takes: only the usual division has one."""
    hidden = ("attention/wq", "attention/wo", "mlp/w_up", "mlp/w_down", "moe/w_up", "moe/w_down")
    by_adam = ["embed/table", "embed/positions", "head/w", "blocks/0/moe/router_w"]
    by_adam += ["classifier/w"] * (cfg.readout.classes > 0) + [
        "blocks/0/moe/shared_gate"
    ] * cfg.moe.shared_gate
    usual = not any(re.search(skip, f"blocks/0/{name}") for name in hidden)
    check(
        usual and all(re.search(skip, name) for name in by_adam),
        f"model.parametrization={cfg.parametrization!r} has no rule for optim.muon_skip={skip!r}; it must "
        "match embeddings, heads, router and shared_gate, and no hidden matrix",
    )
