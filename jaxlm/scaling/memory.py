"""Memory of a training step: state by exact sums over leaves, the rest by closed forms.

What a step holds beside its state and the activations that it keeps is `jaxlm.scaling.working_set`'s.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxlm.model.backends import keeps_scores
from jaxlm.model.config import encoder_of
from jaxlm.model.layers import ACTIVATIONS
from jaxlm.model.transformer import AXES, TransformerConfig, abstract_params, init_cache
from jaxlm.scaling.working_set import head_bytes, layer_bytes, mlp_width, score_keys
from jaxlm.sharding import HOST, RULES, Layout, tree_shardings
from jaxlm.transforms import stacked
from jaxlm.tree import named_leaves, nbytes

Axes = Mapping[str, tuple[str | None, ...]]

RINGS = 64  # chips of the smallest torus that is closed in all its dimensions


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device of a training step, estimated; `kv_cache` is generation's and not in the total."""

    params: int
    grads: int  # the gradient, and with several microbatches its fp32 sum
    opt_state: int
    activations: int  # kept for the backward pass, all layers
    casts: int  # the blocks' weights in the compute dtype, as stored
    layer: int  # one layer in the middle of its backward pass
    head_grad: int  # gradient of the unembedding, whole
    logits: int
    head: int  # what else the loss needs: the gathered unembedding, hidden states
    update: int  # what the update holds beside state and gradient
    kv_cache: int
    host: int = 0  # of the state, in the host's memory (`mesh.offload`): in no other number here

    @property
    def state(self) -> int:
        """What outlives the step."""
        return self.params + self.opt_state

    @property
    def total(self) -> int:
        """Peak of a training step: the state, and the fullest of loss, backward pass and update."""
        held = self.activations + self.casts + self.head_grad
        loss = held + self.logits + self.head + max(0, self.grads - self.params)
        return self.state + max(loss, held + self.grads + self.layer, self.grads + self.update)

    def to_dict(self) -> dict[str, int]:
        """Plain numbers, for `result.json`."""
        return {**dataclasses.asdict(self), "total": self.total}


def memory(
    cfg: TransformerConfig,
    *,
    batch_size: int,
    seq_len: int,
    layout: Layout | None = None,
    opt_state: Any = None,
    microbatches: int = 1,
    logit_tokens: int = 0,
    input_len: int = 0,
) -> Memory:
    """Estimated bytes per device.

    Parameters, gradients, optimizer state and cache are exact sums over leaves; what `mesh.offload` keeps in
    the host's memory stands apart. Activations are those kept for the backward pass, in bytes per layer and
    token:

        none     s (d D / r + (2 N + 2 K) H / t + a F / t + 2 k D) + 12 n D / r + 8 S N / t
        minimal  s (e D / r + (N + 2 K) H / t + m F / t + k D)
        full     s D / r / layers of a period

    with s the bytes of the compute dtype, t the ways that heads and MLP are split and r those of the stream
    between blocks, F the MLP width that a token passes through, a = 4 and m = 1 (gated: 6 and 2), d = 2
    (parallel block: 1), e = d (3 where a norm follows the branch), n norms (2; sandwich 4, parallel 1), k
    chosen experts (0 if dense), and S keys that a query's scores are computed for; with latent attention, its
    own widths of heads and the narrow vectors besides. Norms and probabilities are kept in fp32, the latter
    twice by a backend that writes them out; a kernel keeps (s H + 4) N / t in their place, under `minimal`
    too. ReLU keeps less. The rest is `scaling.working_set`, where the layers of a period count together if
    they are rematerialised together; the `memory_analysis` of the compiled step has the last word.

    Args:
        cfg: the model.
        batch_size: rows of the whole batch, over all devices.
        seq_len: T; also the length of the cache.
        layout: mesh and rules; None = one device.
        opt_state: abstract optimizer state; its leaves' shardings are read if they have any. None: two fp32
            copies of the parameters (Adam), where the layout keeps them.
        microbatches: M; with more than one the gradient is summed in fp32.
        logit_tokens: tokens whose logits a device holds at once (the loss's chunk); 0 = all of a microbatch.
        input_len: S, inputs of a row, of a model with an encoder; 0 = as many as tokens.
    """
    params = _abstract_params(dataclasses.replace(cfg, remat="none"))
    split = leaf_sizes(params, AXES, layout)
    state = state_bytes(params, split, layout=layout, opt_state=opt_state, microbatches=microbatches)
    shards = {axis: 1 if layout is None else layout.shards(axis) for axis in RULES}
    rows = math.ceil(batch_size / (microbatches * shards["batch"]))
    tokens = rows * math.ceil(seq_len / shards["length"])
    summed = "float32" if layout is None else layout.reduce_dtype
    moved = layout is not None and shards["embed"] > 1
    where = dict(tokens=tokens, shards=shards)
    layers = {
        kind: layer_bytes(cfg, kind, seq_len=seq_len, moved=moved, wire=np.dtype(summed).itemsize, **where)
        for kind in set(cfg.layer_kinds)
    }
    period = cfg.layer_kinds[cfg.first_dense : cfg.first_dense + cfg.period] if cfg.remat != "none" else ()
    fullest = max([*layers.values(), sum(layers[kind] for kind in period)])
    logit_tokens = min(logit_tokens or tokens, tokens)
    filled = layout is not None and RINGS <= layout.mesh.size == shards["embed"]
    head_grad, logits, head = head_bytes(cfg, logit_tokens=logit_tokens, filled=filled, **where)
    narrow = np.dtype(cfg.dtype).itemsize
    cast = [
        count * narrow * (narrow < itemsize)
        for (name, _), (count, itemsize) in zip(named_leaves(params), split, strict=True)
        if name.split("/")[0] not in ("embed", "head")
    ]
    input_len = input_len or seq_len
    held_rows = math.ceil(batch_size / shards["batch"])
    cache = jax.eval_shape(lambda: init_cache(cfg, held_rows, seq_len, input_len))
    kept = tokens * _activation_bytes(cfg, seq_len, shards)
    if cfg.has_encoder:
        inputs = rows * math.ceil(input_len / shards["length"])
        kept += tokens * _cross_bytes(cfg, input_len, shards)
        kept += inputs * _activation_bytes(encoder_of(cfg), input_len, shards)
    return Memory(
        **state,
        activations=round(kept),
        casts=sum(cast),
        layer=round(fullest),
        head_grad=round(head_grad),
        logits=round(logits),
        head=round(head),
        kv_cache=nbytes(cache) // (1 if cfg.attention.latent.kv_rank else shards["kv_heads"]),
    )


@functools.lru_cache(maxsize=64)  # a search asks for the same model on many meshes
def _abstract_params(cfg: TransformerConfig) -> Any:
    return abstract_params(cfg)


def leaf_sizes(params: Any, axes: Axes, layout: Layout | None) -> list[tuple[int, int]]:
    """(elements on one device, bytes of one) of every leaf of abstract parameters.

    Args:
        params: abstract parameters.
        axes: their table of logical axes.
        layout: as for `memory`.
    """
    return _sizes(params, None if layout is None else tree_shardings(layout, params, axes))


def state_bytes(
    params: Any,
    split: Sequence[tuple[int, int]],
    *,
    layout: Layout | None,
    opt_state: Any,
    microbatches: int,
) -> dict[str, int]:
    """The fields of `Memory` that follow from the leaves alone: params, grads, opt_state, update and host.

    With the optimizer's state in the host's memory the update holds that of one layer, or of one leaf outside
    the stack, old and new; its result takes the gradient's place. Layers kept there too are fetched for it.

    Args:
        params: abstract parameters.
        split: of the parameters, as `leaf_sizes` gives it.
        layout, opt_state, microbatches: as for `memory`.
    """
    offload = "none" if layout is None else layout.offload
    leaves = [
        (name, leaf.shape, *size) for (name, leaf), size in zip(named_leaves(params), split, strict=True)
    ]
    elements, held = sum(n for _, _, n, _ in leaves), sum(n * itemsize for _, _, n, itemsize in leaves)
    stages = 1 if layout is None else layout.shards("layers")
    layers = sum(n * itemsize for name, _, n, itemsize in leaves if offload == "all" and stacked(name))
    if opt_state is None:
        here, there = (8 * elements, 0) if offload == "none" else (0, 8 * elements)
    else:
        pairs = list(zip(jax.tree.leaves(opt_state), _sizes(opt_state, None), strict=True))
        there = sum(n * itemsize for leaf, (n, itemsize) in pairs if _in_host(leaf))
        here = sum(n * itemsize for _, (n, itemsize) in pairs) - there
    largest = max(
        sum(n * stages // shape[0] for name, shape, n, _ in leaves if stacked(name)),
        max((n for name, _, n, _ in leaves if not stacked(name)), default=0),
    )
    update = layers + 2 * there * largest // elements if there else 4 * elements
    grads = held + (4 * elements if microbatches > 1 else 0)
    return dict(params=held - layers, grads=grads, opt_state=here, update=update, host=there + layers)


def _in_host(leaf: Any) -> bool:
    sharding = getattr(leaf, "sharding", None)
    return sharding is not None and sharding.memory_kind == HOST


def _sizes(tree: Any, shardings: Any) -> list[tuple[int, int]]:
    """(elements on one device, bytes of one) of every leaf; `shardings` None: the leaves' own, if any."""
    leaves, places = jax.tree.leaves(tree), jax.tree.leaves(shardings)
    places = places or [getattr(leaf, "sharding", None) for leaf in leaves]
    shapes = [x.shape if p is None else p.shard_shape(x.shape) for x, p in zip(leaves, places, strict=True)]
    return [(math.prod(shape), np.dtype(x.dtype).itemsize) for x, shape in zip(leaves, shapes, strict=True)]


def _activation_bytes(cfg: TransformerConfig, seq_len: int, shards: Mapping[str, int]) -> float:
    """Bytes per token that the layers keep for the backward pass; see `memory`."""
    s = np.dtype(cfg.dtype).itemsize
    D, N, K, H = cfg.model_dim, cfg.attention.num_heads, cfg.attention.kv_heads, cfg.head_dim
    n, k, D_r = N / shards["heads"], K / shards["kv_heads"], D * shards["length"] / shards["residual"]
    both, latent = H + cfg.value_dim, cfg.attention.latent
    narrow = latent.q_rank + latent.kv_rank + latent.rope_dim
    gated = ACTIVATIONS[cfg.activation][1]
    inputs, norms = (1, 1) if cfg.parallel_block else (2, 4 if cfg.norm_position == "sandwich" else 2)
    outputs = inputs + (cfg.norm_position != "pre")
    written = keeps_scores(cfg.attention.backend)  # else a result and an fp32 logsumexp a query

    def whole(kind: tuple[str, str]) -> float:
        width, sent = mlp_width(cfg, kind[1], shards)
        kept = inputs * D_r + 2 * sent * D + (n + k) * both + 2 * narrow + (6 if gated else 4) * width
        scores = 8 * score_keys(cfg, kind[0], seq_len) if written else s * H + 4
        return s * kept + 12 * (norms * D_r + latent.q_rank + latent.kv_rank) + scores * n

    def products(kind: tuple[str, str]) -> float:
        width, sent = mlp_width(cfg, kind[1], shards)
        attended = 0 if written else (s * H + 4) * n
        heads = n * H + k * both + narrow
        return s * (outputs * D_r + sent * D + heads + (2 if gated else 1) * width) + attended

    kinds, P = cfg.layer_kinds, cfg.period
    if cfg.remat == "none":
        return sum(map(whole, kinds))
    units = cfg.num_layers - cfg.repeats * (P - 1)  # a layer beside the stack is a unit of its own
    kept = {"minimal": sum(map(products, kinds)), "full": units * s * D_r}
    return kept.get(cfg.remat, 0)  # else on the host


def _cross_bytes(cfg: TransformerConfig, input_len: int, shards: Mapping[str, int]) -> float:
    """Bytes per token that cross-attention keeps beside; keys and values of S inputs, as if of T tokens."""
    s, D, H = np.dtype(cfg.dtype).itemsize, cfg.model_dim, cfg.head_dim
    n, k = cfg.attention.num_heads / shards["heads"], cfg.attention.kv_heads / shards["kv_heads"]
    written = keeps_scores(cfg.attention.backend)
    scores = (8 * input_len if written else s * H + 4) * n
    outputs = 1 + (cfg.norm_position != "pre")
    whole = s * (D + 2 * (n + k) * H) + 12 * D + scores
    products = s * (outputs * D + (n + 2 * k) * H) + (0 if written else scores)
    kept = {"none": whole, "minimal": products}.get(cfg.remat, 0.0)
    return cfg.num_layers * kept + (0.0 if cfg.remat == "none" else cfg.period * whole)
