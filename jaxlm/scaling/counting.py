"""Parameters and FLOPs of a model, under every convention that a scaling paper has used.

Parameters are counted on the abstract tree that `init` returns, leaf by leaf, so they cannot drift from the
model. FLOPs count products only (2 per weight and token; embeddings are gathers and cost none); training is
three times the forward pass. The exact count, which everything of ours uses:

    forward(T) = 2 (weights that meet a token, head included) + sum over layers of 2 N (H + V) keys(T)

with V the width of a value head, mostly H, and keys(T) the mean number of keys that a query sees: T / 2 if
causal, T if not, less in a window. Of the experts only the `top_k` chosen ones meet a token. `conventions`
gives the published alternatives, which differ by a factor of two for one and the same model: record them all,
and never derive one from another.

With an encoder all FLOPs are per token of the decoder. Rows hold S inputs beside T tokens: what meets an
input (the encoder, and the projections of its result to cross-attention's keys and values) counts S / T
times, and a token's cross-attention sees S keys. The conventions know no encoder: N is all of its weights.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxlm.model.config import encoder_of
from jaxlm.model.models import ModelConfig, functions
from jaxlm.model.recurrence import LSTMConfig
from jaxlm.scaling.working_set import score_keys
from jaxlm.tree import named_leaves

# What a leaf does with a token, by the last component of its name: a product (2 FLOPs per weight) or not.
PRODUCTS = ("wq", "wk", "wv", "wo", "wq_down", "wq_up", "wkv_down", "wk_up", "wv_up")
PRODUCTS += ("w_up", "w_gate", "w_down", "router_w", "w_input", "w_state", "w_query", "w_memory")
RELATIVE = ("wk_rel", "wq_rel", "bk_rel", "bq_rel")  # meet a table once a step, not every token
PRODUCTS += ("shared_gate", "shared_w_up", "shared_w_gate", "shared_w_down", "w", "w_context", "w_out")
LOOKUPS = ("table", "positions", "types")
VECTORS = ("scale", "bias", "sinks", "router_bias", "router_b", "b")
VECTORS += ("v", "bq", "bk", "bv", "bo", "b_q", "b_kv", "b_up", "b_gate", "b_down")
EXPERTS = ("moe/w_up", "moe/w_gate", "moe/w_down")  # leaves with a leading expert dimension
EXPERT_VECTORS = ("moe/b_up", "moe/b_gate", "moe/b_down")  # likewise
ROOMS = (
    "embed",
    "attention",
    "cross_attention",
    "mlp",
    "moe",
    "additive",
    "lstm",
    "position_bias",
    "distances",
    "projection",
    "convolution",
    "transform",
    "pooler",
    "classifier",
    "head",
)
READOUT = ("pooler", "classifier")  # one token of a row passes through them, or each


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of a model by what they do."""

    rooms: Mapping[str, int]  # every parameter, by the part of the model it stands in
    total: int
    embedding: int  # token and position tables; a tied head is this table and is counted here, once
    head: int  # of an untied model
    experts: int  # weights of all routed experts
    active: int  # total, with top_k instead of all experts
    body_products: (
        int  # weights of the blocks that one token is multiplied with (top_k experts, router, shared)
    )
    head_products: int  # D V, tied or not

    @property
    def non_embedding(self) -> int:
        """Everything but the tables and the head (norms and biases included)."""
        return self.total - self.embedding - self.head


@functools.lru_cache(maxsize=256)  # tracing `init` takes up to a second, and a plan counts many models
def weights(cfg: ModelConfig) -> Weights:
    """Counts the leaves of the model's abstract parameters.

    Raises:
        ValueError: a leaf whose name is in none of PRODUCTS, LOOKUPS, VECTORS.
    """
    rooms: dict[str, int] = {}
    shared = 1 if isinstance(cfg, LSTMConfig) else cfg.shared_layers
    embedding = head = experts = vectors = products = 0
    for name, leaf in named_leaves(functions(cfg).abstract_params(cfg)):
        parts, size = name.split("/"), math.prod(leaf.shape)
        room = next((part for part in parts if part in ROOMS), "norms")
        rooms[room] = rooms.get(room, 0) + size
        if parts[-1] not in (*PRODUCTS, *LOOKUPS, *VECTORS, *RELATIVE):
            raise ValueError(
                f"parameter {name!r} is not known to counting: is it a product, a lookup or a vector?"
            )
        if room == "embed":
            embedding += size
        elif room == "head":
            head += size
        elif "/".join(parts[-2:]) in EXPERTS:
            experts += size
        elif "/".join(parts[-2:]) in EXPERT_VECTORS:
            vectors += size
        elif parts[-1] in PRODUCTS and (room not in READOUT or cfg.readout.of == "each"):
            products += size * (shared if "blocks" in parts else 1)
    total = sum(rooms.values())
    of_chosen = lambda size: size // cfg.moe.num_experts * cfg.moe.top_k if size else 0  # noqa: E731
    chosen, experts_all = of_chosen(experts), experts + vectors
    projected = not isinstance(cfg, LSTMConfig) and cfg.head_transform
    return Weights(
        rooms=MappingProxyType(rooms),
        total=total,
        embedding=embedding,
        head=head,
        experts=experts_all,
        active=total - experts_all + of_chosen(experts_all),
        body_products=products + chosen * shared,
        head_products=(cfg.embed_width if projected else cfg.model_dim) * cfg.vocab_size,
    )


def mean_keys(seq_len: int, *, window: int = 0, causal: bool = True) -> float:
    """Mean number of keys that a query of a `seq_len`-token document sees.

    Causal: T / 2, and w - w^2 / (2 T) in a window of w < T. Not causal: T, and 2 w - w^2 / T. The diagonal
    counts half (T / 2 and not (T + 1) / 2), as in the literature.

    >>> mean_keys(1024), mean_keys(1024, window=256), mean_keys(1024, causal=False)
    (512.0, 224.0, 1024.0)
    """
    reach = min(window, seq_len) if window else seq_len
    keys = reach - reach * reach / (2 * seq_len)
    return keys if causal else 2 * keys


def forward_flops(cfg: ModelConfig, seq_len: int, *, executed: bool = False, input_len: int = 0) -> float:
    """Exact FLOPs per token of a forward pass over rows of `seq_len` tokens; training is 3 times that.

    Args:
        cfg: the model.
        seq_len: T.
        executed: count the scores that the attention backend computes, masked ones among them. MFU and
            scaling fits leave it False.
        input_len: S, inputs of a row, of a model with an encoder; 0 = as many as tokens.
    """
    head = 2.0 * weights(cfg).head_products
    return head + _body_flops(cfg, seq_len, input_len) + _score_flops(cfg, seq_len, executed, input_len)


def _body_flops(cfg: ModelConfig, seq_len: int, input_len: int) -> float:
    """FLOPs per token of the products of the blocks."""
    products = weights(cfg).body_products
    if isinstance(cfg, LSTMConfig):
        inputs = (6 * cfg.encoder.num_layers + cfg.has_encoder) * cfg.model_dim**2
        products += inputs * ((input_len or seq_len) / seq_len - 1)
    elif cfg.has_encoder:
        # Of both stacks' weights, these meet inputs and not tokens.
        memory = 2 * cfg.num_layers * cfg.model_dim * cfg.attention.kv_heads * cfg.head_dim
        inputs = weights(encoder_of(cfg)).body_products + memory
        products += inputs * ((input_len or seq_len) / seq_len - 1)
    return 2.0 * products


def _score_flops(cfg: ModelConfig, seq_len: int, executed: bool, input_len: int = 0) -> float:
    """FLOPs per token of scores and of probabilities times values, all layers."""
    if isinstance(cfg, LSTMConfig):
        return 4.0 * cfg.model_dim * (input_len or seq_len) * cfg.has_encoder
    keys = [
        score_keys(cfg, kind, seq_len)
        if executed
        else mean_keys(seq_len, window=cfg.attention.window if kind == "local" else 0, causal=cfg.causal)
        for kind, _ in cfg.layer_kinds
    ]
    distances = len(cfg.disentangled.terms) * cfg.disentangled.rows * cfg.num_layers
    sizes = (cfg.head_dim + cfg.value_dim) * sum(keys) + cfg.head_dim * distances
    flops = 2.0 * cfg.attention.num_heads * sizes
    if cfg.has_encoder:
        inputs = input_len or seq_len
        flops += 2.0 * cfg.attention.num_heads * (cfg.head_dim + cfg.value_dim) * inputs * cfg.num_layers
        flops += _score_flops(encoder_of(cfg), inputs, executed) * inputs / seq_len
    return flops


def hardware_flops(cfg: ModelConfig, seq_len: int, input_len: int = 0) -> float:
    """FLOPs per token that a training step executes: masked scores too, and what remat computes again.

    full: the products of the blocks once more. minimal: the scores once more. An upper bound: the compiler
    may drop a recomputed product that no gradient needs. Not in it: unchosen experts (the `dense` dropless
    backend: E / k times the experts' share), and the bubble of a pipeline.
    """
    scores = _score_flops(cfg, seq_len, True, input_len)
    again = {"none": 0.0, "minimal": scores, "full": scores + _body_flops(cfg, seq_len, input_len)}
    again |= {"offload": again["full"], "offload_minimal": again["minimal"]}
    return 3.0 * forward_flops(cfg, seq_len, executed=True, input_len=input_len) + again[cfg.remat]


@dataclasses.dataclass(frozen=True)
class Shape:
    """The plain numbers that published conventions are written in."""

    layers: int  # n
    heads: int  # h
    head_dim: int  # k
    model_dim: int  # d
    vocab_size: int  # V
    body: int  # product weights of all blocks that meet a token; 12 n d^2 in the standard shape

    @classmethod
    def standard(cls, layers: int, model_dim: int, heads: int, vocab_size: int, mlp_dim: int = 0) -> "Shape":
        """The shape of GPT-2: h k = d, two MLP matrices, width 4 d unless given."""
        per_layer = 4 * model_dim**2 + 2 * model_dim * (mlp_dim or 4 * model_dim)
        return cls(layers, heads, model_dim // heads, model_dim, vocab_size, layers * per_layer)

    @classmethod
    def of(cls, cfg: ModelConfig) -> "Shape":
        """The shape of a model; gated MLPs, grouped heads and experts enter through `body`."""
        body = weights(cfg).body_products
        heads = (0, 0) if isinstance(cfg, LSTMConfig) else (cfg.attention.num_heads, cfg.head_dim)
        return cls(cfg.num_layers, *heads, cfg.model_dim, cfg.vocab_size, body)


def conventions(shape: Shape, seq_len: int) -> dict[str, int]:
    """Training FLOPs per token as published papers count them. N_b = `shape.body`, N_h = V d, A = n T h k.

        kaplan              6 N_b                     arXiv:2001.08361, C = 6 N D
        kaplan_attention    6 N_b + 6 A               the same with its attention term (causal mean)
        6nd                 6 (N_b + N_h)             the common rule; Porian's "standard", arXiv:2406.19146
        porian_attention    6 (N_b + N_h) + 6 A       Porian's with attention: exact if dense and causal
        palm                6 (N_b + N_h) + 12 A      arXiv:2204.02311 appendix B
        deepseek            6 N_b + 12 A              arXiv:2401.02954 eq. 2: M = 72 n d^2 + 12 n d T
        chinchilla          3 (4 V d + 2 N_b + n (4 T h k + 3 h T))    arXiv:2203.15556 appendix F as printed
        chinchilla_table_a4 3 (2 N_b + n (4 T h k + 3 h T))            what the paper's table A4 was made with

    None of them knows windows or bidirectional attention; `forward_flops` does.

    >>> conventions(Shape.standard(layers=12, model_dim=768, heads=12, vocab_size=50257), 1024)["kaplan"]
    509607936
    """
    body, head = shape.body, shape.vocab_size * shape.model_dim
    scores = shape.layers * seq_len * shape.heads * shape.head_dim
    chinchilla_blocks = 2 * body + 4 * scores + 3 * shape.layers * shape.heads * seq_len
    return {
        "kaplan": 6 * body,
        "kaplan_attention": 6 * body + 6 * scores,
        "6nd": 6 * (body + head),
        "porian_attention": 6 * (body + head) + 6 * scores,
        "palm": 6 * (body + head) + 12 * scores,
        "deepseek": 6 * body + 12 * scores,
        "chinchilla": 3 * (4 * head + chinchilla_blocks),
        "chinchilla_table_a4": 3 * chinchilla_blocks,
    }


@dataclasses.dataclass(frozen=True)
class Counts:
    """Every count of one model at one sequence length; FLOPs are per token."""

    seq_len: int  # T
    n_total: int  # all parameters
    n_embedding: int  # token and position tables (a tied head is one of them)
    n_head: int  # untied head; 0 if tied
    n_non_embedding: int  # n_total - n_embedding - n_head
    n_active: int  # n_total with top_k of the experts
    n_products: int  # weights that one token is multiplied with, head included
    rooms: Mapping[str, int]  # parameters by part of the model
    flops_forward: float  # exact, forward
    flops_train: float  # exact, 3 x forward: the count for MFU and scaling fits
    flops_attention: float  # share of flops_train spent on scores
    flops_head: float  # share of flops_train spent on logits
    flops_hardware: float  # executed by a training step: masked scores and remat included
    conventions: Mapping[str, int]  # training FLOPs as others count them

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for `result.json`."""
        return dataclasses.asdict(self)


def count(cfg: ModelConfig, seq_len: int, input_len: int = 0) -> Counts:
    """Every count of `cfg` on documents of `seq_len` tokens, and `input_len` inputs if it has an encoder.

    Raises:
        ValueError: seq_len below 1.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len} must be at least 1")
    counted = weights(cfg)
    forward = forward_flops(cfg, seq_len, input_len=input_len)
    return Counts(
        seq_len=seq_len,
        n_total=counted.total,
        n_embedding=counted.embedding,
        n_head=counted.head,
        n_non_embedding=counted.non_embedding,
        n_active=counted.active,
        n_products=counted.body_products + counted.head_products,
        rooms=dict(counted.rooms),
        flops_forward=forward,
        flops_train=3 * forward,
        flops_attention=3 * _score_flops(cfg, seq_len, False, input_len),
        flops_head=6.0 * counted.head_products,
        flops_hardware=hardware_flops(cfg, seq_len, input_len),
        conventions=conventions(Shape.of(cfg), seq_len),
    )
