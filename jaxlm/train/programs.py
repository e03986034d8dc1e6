"""The compiled programs of a run: fresh state, training step, evaluation step.

Runs of one shape share them. What differs between such runs (seed, learning rate, schedule, number of steps,
weight decay, beta2) is an argument of the step and no constant in it: the persistent cache then holds one
program for all of them, and within a process not even its tracing is done again.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxlm.errors import check
from jaxlm.evaluate import EvalStep, make_eval_step
from jaxlm.model import encoder_decoder, heads
from jaxlm.model.config import TransformerConfig
from jaxlm.model.masks import prefix_visible
from jaxlm.model.models import ModelConfig, functions
from jaxlm.model.parametrization import optimizer_options
from jaxlm.objectives.formats import make_objective
from jaxlm.objectives.lm import LossConfig
from jaxlm.optim import OptimConfig, make_optimizer, make_schedule
from jaxlm.sharding import Layout, MeshConfig, make_layout
from jaxlm.train.state import Params, TrainState, abstract_state, state_program
from jaxlm.train.step import Batch, Objective, make_step

Numbers = Mapping[str, Any]  # 'lr' of one update, 'weight_decay', 'b2'


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as the objective sees it."""

    cfg: ModelConfig

    def apply(self, params: Any, batch: Batch, key: Any) -> tuple[jax.Array, dict[str, Any]]:
        """Hidden states and auxiliary values.

        A model with an encoder reads `inputs`, `input_segments` and `input_positions` [B, S] beside the
        decoder's [B, T]; tokens attend to the inputs of their own segment. `types` and `prefix` [B, T] are
        read where a batch has them.
        """
        segments, positions = batch["segments"], batch["positions"]
        if self.cfg.has_encoder:
            check("inputs" in batch, f"a model with an encoder needs batches with inputs, not {list(batch)}")
            return encoder_decoder.apply(
                self.cfg,
                params,
                batch["inputs"],
                batch["tokens"],
                input_segments_BS=batch["input_segments"],
                input_positions_BS=batch["input_positions"],
                segments_BT=segments,
                positions_BT=positions,
                key=key,
            )
        more = {} if "types" not in batch else {"types_BT": batch["types"]}
        if "prefix" in batch:
            more["allowed_BTS"] = prefix_visible(batch["prefix"])
        hidden_BTD, _, aux = functions(self.cfg).apply(
            self.cfg,
            params,
            batch["tokens"],
            segments_BT=segments,
            positions_BT=positions,
            key=key,
            **more,
        )
        return hidden_BTD, aux

    def unembed(self, params: Any, hidden_BTD: jax.Array) -> jax.Array:
        """Logits."""
        return functions(self.cfg).unembed(self.cfg, params, hidden_BTD)

    def classify(self, params: Any, batch: Batch, hidden_BTD: jax.Array, key: Any) -> jax.Array:
        """Logits of the classes of every row."""
        return heads.class_logits(self.cfg, params, hidden_BTD, batch["segments"], key=key)


def optimizer_of(
    model: ModelConfig,
    optim: OptimConfig,
    schedule: Callable[[Any], Float[Array, ""]],
    numbers: Mapping[str, Any] | None = None,
) -> Any:
    """The optimizer of a run: `make_optimizer` with what the model's parametrisation asks for."""
    rules = optimizer_options(model, optim) if isinstance(model, TransformerConfig) else {}
    return make_optimizer(optim, schedule, numbers=numbers, **rules)


def learning_rates(optim: OptimConfig, num_steps: int, tokens_per_step: int) -> Float[np.ndarray, " steps"]:
    """The learning rate of every update of a run, before multipliers.

    Raises:
        UserError: warm-up and cooldown do not fit in the run.
    """
    schedule = make_schedule(optim, num_steps, tokens_per_step)
    return np.asarray(jax.jit(schedule)(np.arange(num_steps, dtype=np.int32)), np.float32)


def numbers_of(optim: OptimConfig, rates: Float[np.ndarray, " steps"], n: int) -> Numbers:
    """What the step that follows `n` others is given beside its batch."""
    return {"lr": rates[n], "weight_decay": np.float32(optim.weight_decay), "b2": np.float32(optim.b2)}


@dataclasses.dataclass(frozen=True)
class Programs:
    """The functions that the device runs, jitted; trace them (call them first) under `sharding.use`."""

    target: TrainState  # of `ShapeDtypeStruct`s with shardings
    new_state: Callable[[int], tuple[TrainState, Params | None]]  # from the seed
    step: Callable[[TrainState, None, tuple[Batch, Numbers]], tuple[TrainState, dict]]  # donates the state
    eval_step: EvalStep
    objective: Objective  # what the step minimises


def shape_of(optim: OptimConfig) -> OptimConfig:
    """The optimizer without what the step is given as numbers: equal for runs that share their programs."""
    free = ("lr", "schedule", "final", "warmup", "warmup_unit", "cooldown", "cooldown_shape")
    default = OptimConfig()
    return dataclasses.replace(
        optim, **{name: getattr(default, name) for name in (*free, "weight_decay", "b2")}
    )


def programs(
    model: ModelConfig,
    loss: LossConfig,
    optim: OptimConfig,
    mesh: MeshConfig,
    *,
    microbatches: int,
    token_bytes: Float[np.ndarray, " V"] | None,
    data_format: str = "lm",
) -> Programs:
    """The programs of a run, those of an earlier run in this process if they are the same.

    Args:
        model, loss, optim: the run's.
        mesh: where it runs, on the devices of this process.
        microbatches: as for `make_step`.
        token_bytes: bytes of text that each token stands for.
        data_format: what the batches ask of the model, see `jaxlm.objectives.formats`.

    Raises:
        UserError: a mesh that does not fit the machine or divide the model.
    """
    table = None if token_bytes is None else tuple(np.asarray(token_bytes, np.float32).tolist())
    return _programs(model, loss, shape_of(optim), mesh, microbatches, table, data_format)


@functools.lru_cache(maxsize=4)
def _programs(
    model: ModelConfig,
    loss: LossConfig,
    optim: OptimConfig,
    mesh: MeshConfig,
    microbatches: int,
    token_bytes: tuple[float, ...] | None,
    data_format: str,
) -> Programs:
    layout = make_layout(mesh)
    shared = dict(microbatches=microbatches, token_bytes=token_bytes, data_format=data_format)
    return programs_on(layout, model, loss, optim, dict(mesh.compiler_options), **shared)


def programs_on(
    layout: Layout,
    model_cfg: ModelConfig,
    loss: LossConfig,
    optim: OptimConfig,
    compiler_options: Mapping[str, str],
    *,
    microbatches: int,
    token_bytes: Sequence[float] | None,
    data_format: str = "lm",
) -> Programs:
    """`programs` on a mesh that is made already, of devices that need not be there: nothing runs here."""
    model, init = Model(model_cfg), partial(functions(model_cfg).init, model_cfg)
    token_bytes_V = None if token_bytes is None else np.asarray(token_bytes, np.float32)
    objective = make_objective(data_format, model, loss, token_bytes_V)
    # Its rate is never asked for here: only the structure of its state.
    optimizer = optimizer_of(model_cfg, optim, lambda count: 0.0)
    where = dict(layout=layout, table=functions(model_cfg).AXES)
    target, _ = abstract_state(init, optimizer, **where)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)

    options = compiler_options or None

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)
    def step(state: TrainState, frozen: None, fed: tuple[Batch, Numbers]) -> tuple[TrainState, dict]:
        batch, numbers = fed
        traced = {name: x for name, x in numbers.items() if name != "lr"}
        rated = optimizer_of(model_cfg, optim, lambda count: numbers["lr"], traced)
        update = make_step(objective, rated, microbatches=microbatches, shardings=shardings)
        return update(state, frozen, batch)

    return Programs(
        target=target,
        new_state=state_program(init, optimizer, **where),
        step=step,
        eval_step=make_eval_step(model, loss, token_bytes_V, data_format),
        objective=objective,
    )
