"""Checkpoints: written behind the training's back, checked before they are believed, readable on any mesh.

    checkpoints/00001000/params/      arrays by leaf name (Orbax)
                         optimizer/   step, opt_state, key
                         data/        position of the data, JSON integers
                         config/      the resolved config, JSON
                         manifest.json   size and sha256 of every other file

Orbax copies the state to the host, then writes in a thread to a temporary directory. When all is written,
the manifest is added and one rename makes the checkpoint visible. So a crash leaves either a whole
checkpoint or a temporary directory that nobody reads; what the disk loses later is found by the manifest,
and the previous one is used.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from jaxlm.distributed import from_chief, is_chief
from jaxlm.errors import UserError
from jaxlm.train.rundir import write_text
from jaxlm.train.state import TrainState
from jaxlm.tree import map_named, named_leaves

MANIFEST = "manifest.json"
# Orbax rewrites these two when it renames the directory; nothing that we restore is in them.
_UNCHECKED = ("_CHECKPOINT_METADATA", "commit_success.txt")
_DIGITS = 8


class CheckpointError(UserError):
    """A checkpoint that cannot be used, or could not be written."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint gave back."""

    step: int  # updates that the state has seen
    state: TrainState
    data: Any  # as given to `save`
    config: Any  # as given to `save`
    path: Path
    skipped: tuple[tuple[Path, str], ...]  # newer checkpoints that could not be used, and why


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from slash-joined names: files then know names only, not classes of optimizer states.

    >>> nested({"0/mu/w": 1, "0/count": 2})
    {'0': {'mu': {'w': 1}, 'count': 2}}
    """
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, last = name.split("/")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = leaf
    return tree


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
    """The two array items of a checkpoint; params stand apart so that they can be read alone."""
    rest = {"step": state.step, "opt_state": state.opt_state, "key": state.key}
    return {"params": nested(dict(named_leaves(state.params))), "optimizer": nested(dict(named_leaves(rest)))}


def _state(target: TrainState, items: Mapping[str, Any]) -> TrainState:
    """Put restored items into the structure of `target`."""
    params, rest = dict(named_leaves(items["params"])), dict(named_leaves(items["optimizer"]))
    return TrainState(
        step=rest["step"],
        params=map_named(lambda name, _: params[name], target.params),
        opt_state=map_named(lambda name, _: rest[f"opt_state/{name}"], target.opt_state),
        key=rest["key"],
    )


# ---------------------------------------------------------------------------------------------- integrity


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(directory: Path) -> list[Path]:
    outside = {directory / name for name in (MANIFEST, *_UNCHECKED)}
    return sorted(p for p in directory.rglob("*") if p.is_file() and p not in outside)


def write_manifest(directory: Path, checksums: bool = True) -> None:
    """Write size (and sha256) of every file of a finished checkpoint beside them."""
    files = {
        str(path.relative_to(directory)): {"size": path.stat().st_size}
        | ({"sha256": _digest(path)} if checksums else {})
        for path in _files(directory)
    }
    write_text(directory / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def verify(directory: str | Path) -> None:
    """Check a checkpoint directory against its manifest.

    Raises:
        CheckpointError: which file is missing, of the wrong size or altered.
    """
    directory = Path(directory)
    try:
        files = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
        entries = {name: (entry["size"], entry.get("sha256")) for name, entry in files.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {MANIFEST}: it was never finished") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{directory / MANIFEST} is damaged ({error!r})") from error
    if not entries:
        raise CheckpointError(f"{directory / MANIFEST} is damaged (it lists no files)")
    for name, (size, digest) in entries.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, {size} were written")
        if digest is not None and _digest(path) != digest:
            raise CheckpointError(f"{path} was altered: its sha256 is not the one that was written")


def step_dirs(directory: Path) -> dict[int, Path]:
    """Finished checkpoints by step, oldest first; temporary directories have other names."""
    if not directory.is_dir():
        return {}
    found = {int(p.name): p for p in directory.iterdir() if p.is_dir() and re.fullmatch(r"\d+", p.name)}
    return dict(sorted(found.items()))


def newest_valid(
    directory: Path, warn: Callable[[str], None], step: int | None = None
) -> tuple[Path | None, tuple[tuple[Path, str], ...]]:
    """The newest checkpoint that verifies (or the one of `step`), and those that had to be passed over.

    Returns:
        `(path, skipped)`; the path is None if the directory holds no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but none of them verifies, or there is none of `step`.
    """
    found = step_dirs(directory)
    if step is not None and step not in found:
        listed = ", ".join(map(str, found)) or "none"
        raise CheckpointError(f"{directory} has no checkpoint of step {step}; there are: {listed}")
    skipped: list[tuple[Path, str]] = []
    for path in reversed(found.values()) if step is None else [found[step]]:
        try:
            verify(path)
        except CheckpointError as error:
            skipped.append((path, str(error)))
            warn(f"WARNING: checkpoint {path.name} is damaged and is not used: {error}")
            continue
        if skipped:
            warn(f"WARNING: going back to checkpoint {path.name}")
        return path, tuple(skipped)
    if skipped:
        listed = "\n".join(f"  {reason}" for _, reason in skipped)
        raise CheckpointError(f"{directory}: no checkpoint can be used:\n{listed}")
    return None, ()


# ------------------------------------------------------------------------------------------ save and restore


def print_warning(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay, in the form that Orbax asks for."""

    last: int
    best: int
    period: int
    steps: frozenset[int]
    metric: str

    def score(self, metrics: Mapping[str, float] | None) -> float:
        """The lower the better; infinite without a (finite) metric."""
        x = (metrics or {}).get(self.metric, math.inf)
        return x if math.isfinite(x) else math.inf

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether each of the checkpoints (step, metrics), oldest first, is kept."""
        scores = [self.score(info.metrics) for info in checkpoints]
        scored = [i for i in range(len(scores)) if scores[i] < math.inf]
        kept = set(range(len(checkpoints))[-self.last :])
        kept |= set(sorted(scored, key=scores.__getitem__)[: self.best])
        return [
            i in kept or c.step in self.steps or bool(self.period and c.step % self.period == 0)
            for i, c in enumerate(checkpoints)
        ]


class Checkpointer:
    """Saves and restores the training state of one run.

    Args:
        directory: `<run>/checkpoints`; made at the first save.
        keep_last: newest checkpoints to keep.
        keep_best: those with the lowest `best_metric` to keep beside them.
        keep_period: multiples of this step are kept for ever; 0 = none.
        keep_steps: so are these.
        best_metric: name in the `metrics` given to `save`; lower is better.
        checksums: sha256 of every file in the manifest; without, only sizes are checked.
        warn: gets the text of every warning.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        keep_period: int = 0,
        keep_steps: Sequence[int] = (),
        best_metric: str = "eval/nll",
        checksums: bool = True,
        warn: Callable[[str], None] = print_warning,
    ) -> None:
        if keep_last < 1 or keep_best < 0 or keep_period < 0:
            raise UserError(
                f"keep_last={keep_last} must be at least 1, "
                f"keep_best={keep_best} and keep_period={keep_period} at least 0"
            )
        self.directory = Path(directory).absolute()
        self._keep = Keep(keep_last, keep_best, keep_period, frozenset(keep_steps), best_metric)
        self._checksums, self._warn = checksums, warn
        self._manager: ocp.CheckpointManager | None = None
        self._writing: int | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type | None, *exc: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints on disk, checked or not."""
        return list(step_dirs(self.directory))

    def _open(self) -> ocp.CheckpointManager:
        """The Orbax manager, made at the first save: it deletes what a crash left half written."""
        if self._manager is None:
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    step_format_fixed_length=_DIGITS,
                    best_fn=self._keep.score,  # makes Orbax store the metrics
                    preservation_policy=self._keep,
                    cleanup_tmp_directories=True,
                    save_root_metadata=False,
                    async_options=ocp.AsyncOptions(post_finalization_callback=self._add_manifest),
                ),
            )
        return self._manager

    def _add_manifest(self) -> None:
        """Runs in Orbax's thread when all files are in the temporary directory, before it is renamed."""
        if is_chief():
            (partial,) = self.directory.glob(f"{self._writing:0{_DIGITS}d}.*tmp*")
            write_manifest(partial, self._checksums)

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        data: Any = None,
        config: Any = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Save `state`; returns when it is copied to the host, and the files are written behind.

        Waits for the previous save first, if that is still being written. A step that is there already is
        kept.

        Args:
            step: `int(state.step)`.
            state: may be donated after the call.
            data: JSON values: where the data goes on.
            config: JSON values: the resolved config.
            metrics: may hold `best_metric`.

        Raises:
            CheckpointError: this or the previous checkpoint could not be written (disk full, say).
        """
        self.wait()
        if from_chief(lambda: step in self.steps()):
            return
        scored = {name: float(x) for name, x in (metrics or {}).items() if name == self._keep.metric}
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        json_items = {
            "data": ocp.args.JsonSave({"value": data}),
            "config": ocp.args.JsonSave({"value": config}),
        }
        self._writing = step
        with self._failures():
            self._open().save(
                step, args=ocp.args.Composite(**arrays, **json_items), metrics=scored, force=True
            )

    def wait(self) -> None:
        """Return when all that was saved is on disk.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._manager is not None:
            with self._failures():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then free Orbax's threads."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Orbax and TensorStore report a full or broken disk as OSError or as ValueError."""
        try:
            yield
        except (OSError, ValueError) as error:
            # The manager would raise the same again from every later call; what it left is swept by the
            # next one.
            self._manager = None
            raise CheckpointError(
                f"the checkpoint of step {self._writing} could not be written to {self.directory}: {error}"
            ) from error

    def restore(
        self, target: TrainState, *, step: int | None = None, quarantine: bool = False
    ) -> Restored | None:
        """The newest checkpoint that is intact, in the structure and on the mesh of `target`.

        Args:
            target: `ShapeDtypeStruct`s with shardings (`abstract_state`), of any mesh.
            step: this one and no other.
            quarantine: rename damaged ones to `damaged-<step>`, so that training can save those steps
                again. For the process that holds the run's lock.

        Returns:
            None if there is no checkpoint.

        Raises:
            CheckpointError: none is intact, or the leaves are not those of `target`.
        """
        path, skipped = from_chief(lambda: newest_valid(self.directory, self._warn, step))
        if path is None:
            return None
        want = _items(target)
        for item, tree in want.items():
            _check_leaves(path / item, dict(named_leaves(tree)))
        arrays = {item: ocp.args.StandardRestore(tree) for item, tree in want.items()}
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            got = reader.restore(
                path,
                args=ocp.args.Composite(**arrays, data=ocp.args.JsonRestore(), config=ocp.args.JsonRestore()),
            )
        if quarantine and is_chief():
            for bad, _ in skipped:
                bad.rename(bad.with_name(f"damaged-{bad.name}-{time.time_ns()}"))
        state = _state(target, got)
        return Restored(int(state.step), state, got["data"]["value"], got["config"]["value"], path, skipped)


def saved_leaves(directory: Path) -> dict[str, Any]:
    """Name -> metadata (shape, dtype) of the arrays in one item of a checkpoint."""
    tree = ocp.PyTreeCheckpointHandler().metadata(directory).tree
    return dict(named_leaves(tree))


def _check_leaves(directory: Path, want: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless the saved arrays have the names, shapes and dtypes of `want`."""
    saved = saved_leaves(directory)
    lines = []
    for name in want.keys() & saved.keys():
        old, new = (f"{x.dtype}{list(x.shape)}" for x in (saved[name], want[name]))
        if old != new:
            lines.append(f"{name}: {old} in the checkpoint, {new} in this run")
    lines = sorted(lines)[:5]
    lines += [f"{name}: only in this run" for name in sorted(want.keys() - saved.keys())[:5]]
    lines += [f"{name}: only in the checkpoint" for name in sorted(saved.keys() - want.keys())[:5]]
    if lines:
        raise CheckpointError(
            f"{directory} is another model's or optimizer's state:\n  " + "\n  ".join(lines)
        )
