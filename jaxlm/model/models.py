"""Which functions stand behind a config: one table of models, and what a run asks of each.

A model is a frozen config and a module with these functions and tables of it:

    AXES                                          how every leaf is laid out
    init(cfg, key), abstract_params(cfg)          parameters
    apply(cfg, params, tokens_BT, segments_BT=, positions_BT=, cache=, key=) -> (hidden_BTD, cache, aux)
    unembed(cfg, params, hidden_BTD)              logits, fp32
    init_cache(cfg, rows, length, inputs)         what decoding carries from column to column

One with an encoder takes `memory_BSD=` and `memory_segments_BS=` too, see `jaxlm.model.encoder_decoder`.
"""

from types import ModuleType

from jaxlm.errors import UserError, check
from jaxlm.model import lstm, transformer
from jaxlm.model.backends import BACKENDS
from jaxlm.model.config import TransformerConfig
from jaxlm.model.context_parallel import CONTEXTS, check_columns
from jaxlm.model.recurrence import LSTMConfig
from jaxlm.sharding import Layout

ModelConfig = TransformerConfig | LSTMConfig

_FUNCTIONS: dict[type, ModuleType] = {TransformerConfig: transformer, LSTMConfig: lstm}


def functions(cfg: ModelConfig) -> ModuleType:
    """The module whose functions take this config."""
    return _FUNCTIONS[type(cfg)]


def check_row(cfg: ModelConfig, seq_len: int, input_len: int, layout: Layout) -> None:
    """Refuse rows of a length, or a mesh, that the model cannot do.

    Raises:
        UserError: columns that the mesh does not divide, rows longer than learned positions, or a mesh that
            splits what a recurrent model has whole.
    """
    if isinstance(cfg, LSTMConfig):
        allowed = ("data", "fsdp")
        split = [m for m, size in layout.mesh.shape.items() if size > 1 and m not in allowed]
        if split:
            raise UserError(
                f"mesh.{split[0]}={layout.mesh.shape[split[0]]}: an LSTM's columns wait for each other and "
                "its gates read the whole state; use mesh.data and mesh.fsdp"
            )
        return
    alone = "an encoder" if cfg.has_encoder else "a convolution" if cfg.convolution.width else ""
    check(
        layout.stages == 1 or not alone,
        f"mesh.pipe={layout.stages}: a model with {alone} is not split into stages; use mesh.fsdp or tensor",
    )
    columns, backend = layout.mesh_axes("length", compute=True), cfg.attention.backend
    check(
        not cfg.has_encoder or layout.size(columns) == 1 or BACKENDS[backend].unordered,
        f"model.attention.backend={backend!r} of a model with an encoder sees whole rows of inputs, which "
        f"mesh.{'x'.join(columns)}={layout.size(columns)} splits; use 'blocked', or leave columns whole",
    )
    # XLA's partitioner (jaxlib 0.10.2) aborts the process on the lookup of distances, on most such meshes.
    check(
        not cfg.disentangled.span or layout.stages == 1 or layout.size(columns) == 1,
        f"mesh.pipe={layout.stages} with columns split over mesh.{' x '.join(columns)} does not go with "
        "model.disentangled; leave one of the two at 1",
    )
    check_columns(seq_len, layout, zigzag=CONTEXTS[cfg.attention.context].zigzag and cfg.causal)
    if input_len:
        check_columns(input_len, layout, zigzag=False)
    longest = cfg.position.max_length
    if cfg.position.kind == "learned":
        check(
            seq_len <= longest, f"data.seq_len={seq_len} is longer than model.position.max_length={longest}"
        )


def check_transformer(cfg: ModelConfig, what: str) -> None:
    """Raise `UserError` unless the model is a transformer, the only one that `what` knows."""
    if not isinstance(cfg, TransformerConfig):
        raise UserError(f"{what} knows transformers only, and model.kind is {cfg.kind!r}")
