"""Recurrent layers: the config of an LSTM, its cell, and the loop of one layer over the columns of a batch.

    i, f, o = sigmoid(w x_t + u h_{t-1} + b),  g = tanh(w x_t + u h_{t-1} + b)
    c_t = f c_{t-1} + i g,  h_t = o tanh(c_t)

Products with the input are made for all columns at once; only those with the state wait for each other.

Sources: Hochreiter & Schmidhuber 1997, "Long short-term memory"; the forget gate's bias of 1: Jozefowicz et
al. 2015, "An empirical exploration of recurrent network architectures".
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.errors import check, check_choice
from jaxlm.model.config import DTYPES
from jaxlm.model.layers import normal_init
from jaxlm.sharding import constrain
from jaxlm.weights import einsum, lay_out, matmul, product

Params = dict[str, Any]
GATES = ("i", "f", "g", "o")

# The last two components of a leaf's name -> the logical axes of its dimensions.
AXES: dict[str, tuple[str | None, ...]] = {
    "embed/table": ("vocab", "embed"),
    "lstm/w_input": (None, "embed", None),
    "lstm/w_state": (None, "embed", None),
    "lstm/bias": (None, "norm"),
    "additive/w_query": ("embed", None),
    "additive/w_memory": ("embed", None),
    "additive/v": ("norm",),
    "additive/w_context": (None, "embed", None),
    "additive/w_out": (None, "embed", None),
    "head/w": ("embed", "vocab"),
}


@dataclasses.dataclass(frozen=True)
class LSTMEncoderConfig:
    """The stack that reads an encoder-decoder's inputs in both directions; as wide as the decoder."""

    num_layers: int = 0  # 0 = the model has no encoder

    def __post_init__(self) -> None:
        check(self.num_layers >= 0, f"model.encoder.num_layers={self.num_layers} must not be negative")


@dataclasses.dataclass(frozen=True)
class LSTMConfig:
    """Shape of an LSTM language model; one width throughout, so that the head can be tied."""

    kind: str = "lstm"  # tells this group of a config from a transformer's
    vocab_size: int = 256  # V
    num_layers: int = 2  # L
    model_dim: int = 128  # D, of embeddings and of every state
    tie_embeddings: bool = False  # the head is the embedding table
    forget_bias: float = 1.0  # initial bias of the forget gates
    dropout: float = 0.0  # of the embeddings and of what each layer passes up
    init_std: float = 0.0  # of weights; 0 = fan_in ** -0.5, or model_dim ** -0.5 of all in `additive`
    remat: str = "none"  # none | full: the backward pass computes a layer's gates again
    dtype: str = "float32"  # operands of products, and activations; states and gates are in accum_dtype
    param_dtype: str = "float32"  # stored parameters
    accum_dtype: str = "float32"  # sums inside products
    encoder: LSTMEncoderConfig = LSTMEncoderConfig()

    def __post_init__(self) -> None:
        check_choice(self.kind, ("lstm",), "model.kind")
        for name in ("vocab_size", "num_layers", "model_dim"):
            check(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1")
        check(
            not self.has_encoder or self.model_dim % 2 == 0,
            f"model.model_dim={self.model_dim} must be even: each direction of the encoder has half of it",
        )
        check(0.0 <= self.dropout < 1.0, f"model.dropout={self.dropout} must be in [0, 1)")
        check(self.init_std >= 0.0, f"model.init_std={self.init_std} must not be negative")
        check_choice(self.remat, ("none", "full"), "model.remat")
        for name in ("dtype", "param_dtype", "accum_dtype"):
            check_choice(getattr(self, name), DTYPES, f"model.{name}")

    @property
    def has_encoder(self) -> bool:
        """Whether it is an encoder-decoder."""
        return self.encoder.num_layers > 0

    @property
    def causal(self) -> bool:
        """True: a column sees those before it."""
        return True


class State(NamedTuple):
    """What one layer knows of the columns that it has read."""

    h_BF: Float[Array, "B F"]
    c_BF: Float[Array, "B F"]


# --- One layer ---


def init_cell(cfg: LSTMConfig, key: Array, inputs: int, units: int) -> Params:
    """Weights of one layer that reads `inputs` numbers a column and keeps `units`."""
    input_key, state_key = jax.random.split(key)
    draw = lambda key, rows: normal_init(cfg.init_std or rows**-0.5)(key, (4, rows, units), cfg.param_dtype)  # noqa: E731
    bias_GF = jnp.zeros((4, units)).at[GATES.index("f")].set(cfg.forget_bias)
    return {
        "w_input": draw(input_key, inputs),
        "w_state": draw(state_key, units),
        "bias": bias_GF.astype(cfg.param_dtype),
    }


def cell(gates_BGF: Float[Array, "B 4 F"], c_BF: Float[Array, "B F"]) -> State:
    """The state after a column whose gates, before their functions, are these."""
    i_BF, f_BF, g_BF, o_BF = jnp.moveaxis(gates_BGF, 1, 0)
    c_BF = jax.nn.sigmoid(f_BF) * c_BF + jax.nn.sigmoid(i_BF) * jnp.tanh(g_BF)
    return State(jax.nn.sigmoid(o_BF) * jnp.tanh(c_BF), c_BF)


def choose(mask_B: Bool[Array, "B"], yes: Any, no: Any) -> Any:
    """Of two trees of arrays [B, ...], the first where the mask holds."""
    return jax.tree.map(lambda a, b: jnp.where(mask_B[:, None], a, b), yes, no)


Rows = tuple[Bool[Array, "T B"], Bool[Array, "T B"]]  # columns that are read; that start from zeros


def _scan(gates_TBGF: Array, w_state: Array, start: State, rows: Rows, dtypes: tuple[str, str]):
    def step(state: State, column: tuple) -> tuple[State, Array]:
        gates_BGF, real_B, fresh_B = column
        state = choose(fresh_B, jax.tree.map(jnp.zeros_like, state), state)
        gates_BGF = gates_BGF + product("BF,GFH->BGH", state.h_BF, w_state, *dtypes, dtypes[1])
        state = choose(real_B, cell(gates_BGF, state.c_BF), state)
        return state, state.h_BF

    return jax.lax.scan(step, start, (gates_TBGF, *rows))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def recur(
    gates_TBGF: Float[Array, "T B 4 F"],
    w_state_GFH: Float[Array, "4 F F"],
    start: State,
    rows: Rows,
    dtypes: tuple[str, str],
) -> tuple[State, Float[Array, "T B F"]]:
    """The state after the last column, and `h` of every column.

    The gradient of `w_state` is one product over all columns, after the loop; autodiff would add T outer
    products up inside it.
    """
    return _scan(gates_TBGF, w_state_GFH, start, rows, dtypes)


def _recur_fwd(gates_TBGF, w_state_GFH, start, rows, dtypes):
    def run(gates_TBGF, start):
        return _scan(gates_TBGF, w_state_GFH, start, rows, dtypes)

    (end, h_TBF), pull = jax.vjp(run, gates_TBGF, start)
    return (end, h_TBF), (pull, h_TBF, w_state_GFH, start, rows)


def _recur_bwd(dtypes, saved, g):
    pull, h_TBF, w_state_GFH, start, (_, fresh_TB) = saved
    dgates_TBGF, dstart = pull(g)
    before_TBF = jnp.concatenate([start.h_BF[None], h_TBF[:-1]])
    before_TBF = jnp.where(fresh_TB[..., None], 0.0, before_TBF)
    dw_GFH = einsum("TBF,TBGH->GFH", before_TBF, dgates_TBGF, *dtypes)
    return dgates_TBGF, dw_GFH.astype(w_state_GFH.dtype), dstart, None


recur.defvjp(_recur_fwd, _recur_bwd)


def empty_state(cfg: LSTMConfig, batch: int, units: int) -> State:
    """A state of zeros."""
    zeros_BF = constrain(jnp.zeros((batch, units), cfg.accum_dtype), "batch", None)
    return State(zeros_BF, zeros_BF)


def starts(segments_BT: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Columns whose document is not that of the column before; the first column is none."""
    changed_Bt = segments_BT[:, 1:] != segments_BT[:, :-1]
    return jnp.pad(changed_Bt, ((0, 0), (1, 0)))


def layer(
    cfg: LSTMConfig,
    params: Params,
    x_BTD: Float[Array, "B T D"],
    state: State,
    real_BT: Bool[Array, "B T"],
    fresh_BT: Bool[Array, "B T"],
) -> tuple[State, Float[Array, "B T F"]]:
    """One layer over all columns.

    Args:
        cfg: the model.
        params: as made by `init_cell`.
        x_BTD: its input.
        state: before the first column.
        real_BT: columns to read; the others leave the state alone.
        fresh_BT: columns before which the state is set to zero.
    """
    params = lay_out({"lstm": params}, AXES, cfg.dtype)["lstm"]
    dtypes = dict(dtype=cfg.dtype, accum=cfg.accum_dtype)
    with jax.named_scope("gates"):
        gates_BTGF = matmul("BTD,GDF->BTGF", x_BTD, params["w_input"], result=cfg.accum_dtype, **dtypes)
        gates_BTGF = gates_BTGF + params["bias"].astype(cfg.accum_dtype)
        gates_TBGF = constrain(jnp.swapaxes(gates_BTGF, 0, 1), None, "batch", None, None)
    with jax.named_scope("recur"):
        rows = (real_BT.T, fresh_BT.T)
        end, h_TBF = recur(gates_TBGF, params["w_state"], state, rows, (cfg.dtype, cfg.accum_dtype))
    return end, constrain(jnp.swapaxes(h_TBF, 0, 1).astype(cfg.dtype), "batch", None, None)
