"""Which runs can train as one program, and where their common state is kept.

S/groups/<members>/    group.json, run.lock, and checkpoints/ of all cells together while they train
"""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxlm.config import RunConfig, canonical_json, config_hash, diff, flatten
from jaxlm.errors import UserError, check
from jaxlm.train.checkpoint import step_dirs
from jaxlm.train.rundir import LockedError, RunLock, probe_writable, write_json

# The numbers in which the cells of a group may differ.
FREE = ("seed", "data.seed", "optim.lr", "optim.weight_decay", "optim.b2", "model.init_std")
FORMAT = 1


def why_not(config: RunConfig) -> str:
    """Why a run cannot train in a group; '' if it can."""
    try:
        devices = math.prod(config.mesh.shape(jax.device_count()))
    except UserError as error:
        return str(error)
    train = config.train
    if devices > 1:
        return f"its mesh has {devices} devices, a group has one: set mesh.data=1"
    if config.mesh.offload != "none":
        return f"mesh.offload={config.mesh.offload!r}: a group keeps its state on the device"
    if config.data.format != "lm":
        return f"data.format={config.data.format!r}: a group predicts next tokens"
    for name, what in {
        "warm_start": "a group starts all its cells from scratch",
        "branch_from": "a group starts all its cells from scratch",
        "save_steps": "a group keeps the last checkpoint of a cell alone",
        "profile_start": "a profile shows one run",
        "noise_scale_every": "a group does not measure it",
    }.items():
        if getattr(train, name):
            return f"train.{name}={getattr(train, name)!r}: {what}"
    return ""


def group_key(config: RunConfig) -> str:
    """Equal for runs that can train as one program: those that differ in `FREE` alone.

    An `init_std` of 0 means that the fan-in decides, which no factor on another run's weights can give.

    Returns:
        12 hexadecimal digits, or '' for a run that has to train alone (`why_not` says why).
    """
    if why_not(config):
        return ""
    tree = {name: x for name, x in flatten(config).items() if name not in FREE}
    tree["model.init_std"] = config.model.init_std > 0
    return hashlib.sha256(canonical_json(tree).encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Member:
    """What makes a cell this one among those of its group."""

    hash: str  # of the config
    seed: int
    data_seed: int
    lr: float
    weight_decay: float
    b2: float
    init_std: float

    @classmethod
    def of(cls, cfg: RunConfig) -> "Member":
        """The cell that trains `cfg`."""
        o = cfg.optim
        return cls(config_hash(cfg), cfg.seed, cfg.data.seed, o.lr, o.weight_decay, o.b2, cfg.model.init_std)


def check_group(cells: Sequence[tuple[RunConfig, Path]]) -> None:
    """Refuse what cannot train together."""
    check(len(cells) > 0, "train_group: there are no cells")
    first, first_dir = cells[0]
    for cfg, workdir in cells:
        reason = why_not(cfg)
        check(not reason, f"{workdir} cannot train in a group: {reason}")
        if group_key(cfg) != group_key(first):
            lines = [x for x in diff(first, cfg) if x.split(":", 1)[0] not in FREE]
            lines = lines or ["model.init_std: 0 in one of them, which means fan_in ** -0.5"]
            raise UserError(
                f"{first_dir} and {workdir} cannot train in one group, whose cells differ in "
                f"{', '.join(FREE)} alone:\n" + "\n".join(f"  {line}" for line in lines)
            )
    for what, keys in {
        "run": [config_hash(cfg) for cfg, _ in cells],
        "directory": [str(Path(path).absolute()) for _, path in cells],
    }.items():
        for i, key in enumerate(keys):
            check(key not in keys[:i], f"train_group: two cells have one {what}, {cells[i][1]}")


def _saved(folder: Path) -> list[tuple[int, Path, list[Member]]]:
    """Groups with a common checkpoint: its step, the group's directory, and who is aboard."""
    found = []
    for path in folder.glob("*/group.json"):
        tree, steps = json.loads(path.read_text()), step_dirs(path.parent / "checkpoints")
        if steps and tree["format"] == FORMAT:
            found.append((max(steps), path.parent, [Member(**fields) for fields in tree["members"]]))
    return found


def saved_step(folder: Path, run_hash: str) -> int:
    """Updates in the newest common checkpoint of any group that holds this run; 0 = there is none.

    Args:
        folder: where groups keep their states.
        run_hash: `config_hash` of the run's config.
    """
    return max((n for n, _, aboard in _saved(folder) if run_hash in {m.hash for m in aboard}), default=0)


def open_group(
    folder: Path, members: Sequence[Member], stack: contextlib.ExitStack
) -> tuple[Path, list[Member]]:
    """The locked directory of a group that holds `members`, and all that it holds, in the order of its state.

    A group that was interrupted may hold cells that were finished since; it goes on with them aboard. Of
    several that hold all of `members`, the one that got furthest counts; without any, a new one is made.
    """
    wanted = {member.hash for member in members}
    found = [group for group in _saved(folder) if wanted <= {member.hash for member in group[2]}]
    for _, path, aboard in sorted(found, key=lambda g: (-g[0], len(g[2]), g[1])):
        try:
            stack.enter_context(RunLock(path))
        except LockedError:
            continue  # others train the rest of it
        return path, aboard
    name = hashlib.sha256("".join(sorted(wanted)).encode()).hexdigest()[:12]
    path = probe_writable(folder / name)
    stack.enter_context(RunLock(path))
    tree = {"format": FORMAT, "members": [dataclasses.asdict(member) for member in members]}
    write_json(path / "group.json", tree)
    return path, list(members)
