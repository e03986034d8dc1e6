"""Memory of a training step of a recurrent model; its parameters and FLOPs are `counting.count`'s."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from jaxlm.model import lstm
from jaxlm.model.recurrence import LSTMConfig
from jaxlm.scaling.memory import Memory, leaf_sizes, state_bytes
from jaxlm.sharding import Layout
from jaxlm.tree import nbytes


def memory(
    cfg: LSTMConfig,
    *,
    batch_size: int,
    seq_len: int,
    layout: Layout | None = None,
    opt_state: Any = None,
    microbatches: int = 1,
    logit_tokens: int = 0,
    input_len: int = 0,
) -> Memory:
    """Estimated bytes per device; arguments as of `scaling.memory.memory`.

    A layer keeps s D + (13 a + 4) D a token for the backward pass, s and a the bytes of the compute dtype and
    of the states; under `full` remat s D, and the rest of one layer at a time. Both directions of an
    encoder's layer count as one.
    """
    params = lstm.abstract_params(dataclasses.replace(cfg, remat="none"))
    split = leaf_sizes(params, lstm.AXES, layout)
    state = state_bytes(params, split, layout=layout, opt_state=opt_state, microbatches=microbatches)
    elements = sum(n for n, _ in split)
    ways = 1 if layout is None else layout.shards("batch")
    rows, own_rows = math.ceil(batch_size / (microbatches * ways)), math.ceil(batch_size / ways)
    s, a = (np.dtype(dtype).itemsize for dtype in (cfg.dtype, cfg.accum_dtype))
    input_len, states = input_len or seq_len, (13 * a + 4) * cfg.model_dim
    columns = cfg.num_layers * seq_len + cfg.encoder.num_layers * input_len
    kept = rows * columns * s * cfg.model_dim
    one = rows * max(seq_len, input_len if cfg.has_encoder else 0) * states
    tokens = rows * seq_len
    head, V = cfg.vocab_size * cfg.model_dim, cfg.vocab_size
    return Memory(
        **state,
        activations=kept + (rows * columns * states if cfg.remat == "none" else 0),
        casts=elements * s * (s < np.dtype(cfg.param_dtype).itemsize),
        layer=one,
        head_grad=4 * head,
        logits=8 * min(logit_tokens or tokens, tokens) * V,
        head=s * (head + tokens * cfg.model_dim),
        kv_cache=nbytes(jax.eval_shape(lambda: lstm.init_cache(cfg, own_rows, seq_len, input_len))),
    )
