"""Branches: a run that starts from the whole state of another one, its trunk.

A WSD trunk is trained once at a constant rate; each cooldown is a branch of it. The branch takes over
parameters, optimizer state, step, random key and the position in the data, and has a schedule of its own.
Where the two schedules agree up to the branch, trunk and branch together are the run that would have been
made in one piece.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import RunConfig, config_hash, diff, identity, load_config
from jaxlm.errors import UserError, check
from jaxlm.train.checkpoint import Checkpointer, step_dirs
from jaxlm.train.programs import learning_rates
from jaxlm.train.state import TrainState

# What may differ between trunk and branch; the learning rates up to the branch must agree all the same.
FREE = frozenset(
    {f"train.{name}" for name in ("num_steps", "branch_from", "branch_step")}
    | {f"train.{name}" for name in ("warm_start", "warm_start_rename", "warm_start_missing")}
    | {f"optim.{name}" for name in ("schedule", "final", "cooldown", "cooldown_shape")}
    | {f"optim.{name}" for name in ("lr", "warmup", "warmup_unit")}
)


@dataclasses.dataclass(frozen=True)
class Branch:
    """Where a run leaves its trunk."""

    trunk: Path  # its run directory
    step: int  # updates of the trunk
    config_hash: str  # of the trunk's config

    def to_dict(self) -> dict[str, Any]:
        """Plain values, kept in every checkpoint of the branch."""
        return {"from": str(self.trunk), "step": self.step, "config_hash": self.config_hash}

    def account(self, steps: int, tokens_per_step: int, flops_per_token: float) -> dict[str, Any]:
        """The same, and which part of the run's `steps` updates are its own: `result.json` counts both."""
        own = steps - self.step
        tokens = own * tokens_per_step
        spent = {"own_steps": own, "own_tokens": tokens, "own_flops": flops_per_token * tokens}
        return {**self.to_dict(), **spent}

    @classmethod
    def from_dict(cls, tree: dict[str, Any] | None) -> "Branch | None":
        """What `to_dict` made; None stays None."""
        return None if tree is None else cls(Path(tree["from"]), tree["step"], tree["config_hash"])


def trunk_dir(cfg: RunConfig, workdir: Path) -> Path:
    """The run directory that `train.branch_from` means; a relative one lies beside `workdir`."""
    return workdir.parent / cfg.train.branch_from


def find_branch(cfg: RunConfig, workdir: Path) -> Branch:
    """The place where the run of `cfg` in `workdir` leaves its trunk.

    Raises:
        UserError: there is no such run or checkpoint, or the two runs are not one up to the branch: another
            model, data, seed or optimizer, or other learning rates.
    """
    path, step = trunk_dir(cfg, workdir), cfg.train.branch_step
    where = f"train.branch_from={cfg.train.branch_from!r}"
    check(path.resolve() != workdir.resolve(), f"{where} is this run's own directory")
    trunk = load_config(path / "config.json")
    differences = [line for line in diff(identity(trunk), identity(cfg)) if line.split(":", 1)[0] not in FREE]
    if differences:
        listed = "\n".join(f"  {line}" for line in differences)
        raise UserError(f"{where}: a branch continues its trunk, but this run differs from it:\n{listed}")
    _check_rates(trunk, cfg, where)
    there = step_dirs(path / "checkpoints")
    if step not in there:
        raise UserError(
            f"{where} has no checkpoint of step {step}; there are: {', '.join(map(str, there)) or 'none'}. "
            f"Train it with train.save_steps=({step},)"
        )
    return Branch(path, step, config_hash(trunk))


def _check_rates(trunk: RunConfig, cfg: RunConfig, where: str) -> None:
    """Raise `UserError` unless both runs have the same learning rates up to the branch."""
    step, tokens = cfg.train.branch_step, cfg.data.batch_size * cfg.data.seq_len
    check(
        step <= trunk.train.num_steps,
        f"{where}: train.branch_step={step} lies beyond the trunk's {trunk.train.num_steps} steps",
    )
    old, new = (learning_rates(c.optim, c.train.num_steps, tokens)[:step] for c in (trunk, cfg))
    apart = np.flatnonzero(~np.isclose(old, new, rtol=1e-6, atol=0.0))
    if apart.size:
        n = int(apart[0])
        raise UserError(
            f"{where}: the learning rate of step {n + 1} is {old[n]:.6g} in the trunk and {new[n]:.6g} in "
            f"this run, but up to train.branch_step={step} they must agree. Give both the same optim.lr and "
            "a warm-up in steps or tokens (optim.warmup_unit), and let no decay begin before the branch"
        )


def restore_branch(branch: Branch, target: TrainState, fingerprint: str) -> TrainState:
    """The trunk's state at the branch, on the mesh of `target`.

    Raises:
        UserError: the checkpoint is damaged, holds another model's or optimizer's leaves, or was trained on
            other data than what has this `fingerprint`.
    """
    restored = Checkpointer(branch.trunk / "checkpoints").restore(target, step=branch.step)
    if restored.data["fingerprint"] != fingerprint:
        raise UserError(
            f"the training data is not what the trunk {branch.trunk} was trained on (fingerprint "
            f"{fingerprint[:12]}, then {restored.data['fingerprint'][:12]})"
        )
    return restored.state
