"""What a training step holds beside its state and kept activations: closed forms for one device.

Found by reading which arrays are alive at the fullest moment of programs that the TPU compiler made. All are
bytes, with s those of the compute dtype, t the tokens of a device and microbatch, n and k its heads and kv
heads, f its MLP width:

    casts   s a weight: blocks are cast to the compute dtype once, before the loop over layers
    layer   t (4 f s + (2 n H + 2 k H + D) s + 512 n) + s (2 D f + (2 n + 2 k) H D) + r D f
    head    4 V D + s V D + 8 t' V + 3 t D s, and s V D more where it is gathered over a whole torus
    update  4 a parameter: the updates, until their norm is known

`layer` is a dense layer in the middle of its backward pass: what its MLP computes and the gradients of that,
queries, keys, values, attention's result, and a logsumexp a query that the splash kernel writes on 128 lanes
in fp32; two of three MLP matrices gathered, and the gradient of one whole before it is scattered (r bytes a
weight). A backend that writes scores out holds them, in fp32 and twice, where a kernel holds its logsumexp.
Where `tensor` splits the stream between blocks, six arrays of all its columns are there and not one: what
both branches are given and return, gathered, and their gradients.

Of a mixture of experts f is the width of the k experts of a token together: three products of it in fp32 and
in the compute dtype, the rows that are sent twice, and all matrices of all own experts, gathered. In rounds,
rows are fewer, matrices there twice, and their gradients summed in fp32.

`head` is the loss: the gradient of the unembedding, whole and in fp32 (it may stay until the backward pass is
over), the gathered matrix (and what a sum gathers it from), the logits of t' tokens and their gradient, and
hidden states in three copies.
"""

from collections.abc import Mapping

import numpy as np

from jaxlm.model.backends import executed_keys, keeps_scores
from jaxlm.model.layers import ACTIVATIONS
from jaxlm.model.transformer import TransformerConfig

LANES = 128  # of a TPU's vector registers: a kernel's logsumexp of a query is written on all of them


def mlp_width(cfg: TransformerConfig, kind: str, shards: Mapping[str, int]) -> tuple[float, int]:
    """(MLP width on one device that a token passes through, experts it is sent to); kind: dense | moe."""
    if kind == "dense":
        return cfg.mlp_width / shards["mlp"], 0
    expert = cfg.moe.expert_dim or cfg.mlp_width
    shared = cfg.moe.shared_dim if cfg.moe.shared_experts else 0
    width = expert * cfg.moe.top_k + (shared or expert * cfg.moe.shared_experts)
    return width / shards["mlp"], cfg.moe.top_k


def score_keys(cfg: TransformerConfig, kind: str, seq_len: int) -> float:
    """Keys per query whose scores a layer of that kind (global | local) computes."""
    window = cfg.attention.window if kind == "local" else 0
    tiles = (cfg.attention.tile_q, cfg.attention.tile_k)
    return executed_keys(cfg.attention.backend, seq_len, causal=cfg.causal, window=window, tiles=tiles)


def layer_bytes(
    cfg: TransformerConfig,
    kind: tuple[str, str],
    *,
    tokens: int,
    seq_len: int,
    shards: Mapping[str, int],
    moved: bool,
    wire: int,
) -> float:
    """The most that a layer needs at a time in its backward pass, beside what is kept.

    Args:
        cfg: the model.
        kind: (attention, MLP) of the layer.
        tokens: of a device and microbatch.
        seq_len: T, of whole rows.
        shards: logical axis -> parts.
        moved: weights lie otherwise where they are stored, and are gathered.
        wire: bytes of a weight's gradient on its way to other devices.
    """
    s, D, H = np.dtype(cfg.dtype).itemsize, cfg.model_dim, cfg.head_dim
    n = cfg.attention.num_heads / shards["heads"]
    k = cfg.attention.kv_heads / shards["kv_heads"]
    (f, sent), gated = mlp_width(cfg, kind[1], shards), ACTIVATIONS[cfg.activation][1]
    if keeps_scores(cfg.attention.backend):
        scores = 8 * score_keys(cfg, kind[0], seq_len) * n
    else:
        scores = 4 * LANES * n
    width = (n + k) * (H + cfg.value_dim)  # of queries, keys, values and the result
    streams = 6 if shards["residual"] > shards["length"] else 1
    attention = s * (width + streams * D) + scores
    matrices, heads = 3 if gated else 2, s * width * D
    if kind[1] == "dense":
        mlp, gathered = s * (matrices + 1) * f, s * (matrices - 1) * D * f + heads
        return tokens * (attention + mlp) + (gathered + wire * D * f if moved else 4 * D * f)
    owners, expert = shards["experts"], (cfg.moe.expert_dim or cfg.mlp_width) / shards["mlp"]
    local, shared = cfg.moe.num_experts // owners, f - sent * expert
    whole = s * matrices * D * local * expert
    # Products are summed in fp32, and then cast; where tokens travel there is room for more than they need.
    rows = sent * ((4 + s) * matrices * expert + 2 * s * D)
    room = cfg.moe.buffer_factor or owners * min(sent, local) / sent if owners > 1 else 1
    other, rounds = attention + s * ((matrices + 1) * shared + D), cfg.moe.rounds
    gathered = (whole + heads if moved else 0) + (whole * (1 + 4 / s) if rounds > 1 else 0)
    return tokens * (other + room * rows / rounds) + gathered


def head_bytes(
    cfg: TransformerConfig, *, tokens: int, logit_tokens: int, shards: Mapping[str, int], filled: bool
) -> tuple[float, float, float]:
    """`(whole gradient of the unembedding, logits, the rest)` of the loss.

    Args:
        cfg: the model.
        tokens: of a device and microbatch.
        logit_tokens: of those whose logits exist at a time.
        shards: logical axis -> parts.
        filled: the matrix is gathered over a whole torus, by a sum.
    """
    s, parts = np.dtype(cfg.dtype).itemsize, shards["vocab"]
    matrix = cfg.vocab_size * cfg.model_dim / parts
    gathered = (2 if filled else 1) * s * matrix if shards["embed"] > 1 else 0.0
    return 4 * matrix, 8 * logit_tokens * cfg.vocab_size / parts, gathered + 3 * tokens * cfg.model_dim * s
