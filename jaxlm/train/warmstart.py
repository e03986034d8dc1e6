"""Warm start: parameters alone, from a checkpoint of this model or of another one."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import orbax.checkpoint as ocp

from jaxlm.errors import UserError, nearest
from jaxlm.train.checkpoint import (
    MANIFEST,
    CheckpointError,
    nested,
    newest_valid,
    print_warning,
    saved_leaves,
    verify,
)
from jaxlm.train.state import Params
from jaxlm.tree import map_named, named_leaves


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """Which leaves a warm start filled, and which it did not."""

    path: Path
    loaded: tuple[str, ...]  # names in the model
    renamed: tuple[tuple[str, str], ...]  # (name in the checkpoint, name in the model)
    missing: tuple[str, ...]  # in the model only
    surplus: tuple[str, ...]  # in the checkpoint only

    def text(self) -> str:
        """The report, one line per leaf that was not simply copied."""
        lines = [f"warm start from {self.path}: {len(self.loaded)} leaves loaded"]
        lines += [f"  renamed  {old} -> {new}" for old, new in self.renamed]
        lines += [f"  missing  {name} (keeps its fresh value)" for name in self.missing]
        lines += [f"  surplus  {name} (not used)" for name in self.surplus]
        return "\n".join(lines)


def _find(path: Path, step: int | None, warn: Callable[[str], None]) -> Path:
    """The checkpoint that a path means: one itself, or the newest of a run or checkpoint directory."""
    if (path / MANIFEST).is_file() and step is None:
        verify(path)
        return path
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found, _ = newest_valid(directory, warn, step)
    if found is None:
        raise CheckpointError(
            f"{path} holds no checkpoint (expected a run directory, its checkpoints/ or one of them)"
        )
    return found


def _compile(pattern: str, where: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is not a regular expression ({error})") from error


def load_params(
    path: str | Path,
    target: Params,
    *,
    rename: Sequence[tuple[str, str]] = (),
    allow_missing: Sequence[str] = (),
    step: int | None = None,
    warn: Callable[[str], None] = print_warning,
) -> tuple[Params, WarmStart]:
    """Parameters alone, from a checkpoint of this or of another model.

    Args:
        path: run directory, its `checkpoints/`, or one checkpoint.
        target: `ShapeDtypeStruct`s with shardings; saved values are cast to their dtypes.
        rename: (regex, replacement) pairs, applied in order with `re.sub` to the names in the checkpoint.
        allow_missing: regexes; leaves of the model found by one of them may be missing in the checkpoint.
        step: which checkpoint of a run; default the newest intact one.
        warn: gets the text of every warning.

    Returns:
        `(params, report)`; missing leaves are None in `params`: `combine(params, fresh)` fills them.

    Raises:
        UserError: leaves missing or misshapen, a rename that finds nothing or maps two leaves to one name.
    """
    found = _find(Path(path).absolute(), step, warn)
    saved = saved_leaves(found / "params")
    new_names = {name: name for name in saved}
    for pattern, replacement in rename:
        regex = _compile(pattern, "rename")
        changed = {old: regex.sub(replacement, new) for old, new in new_names.items()}
        if not any(regex.search(new) for new in new_names.values()):
            raise UserError(
                f"rename: {pattern!r} is found in no leaf of {found}, such as {next(iter(saved), None)!r}"
            )
        new_names = changed
    source: dict[str, str] = {}
    for old, new in new_names.items():
        if new in source:
            raise UserError(f"rename: {source[new]!r} and {old!r} would both become {new!r}")
        source[new] = old

    want = dict(named_leaves(target))
    missing = [name for name in want if name not in source]
    optional = [_compile(pattern, "allow_missing") for pattern in allow_missing]
    lines = [
        f"{name} is not in the checkpoint{nearest(name, source)}"
        for name in missing
        if not any(regex.search(name) for regex in optional)
    ]
    lines += [
        f"{name} has shape {list(saved[source[name]].shape)} in the checkpoint, "
        f"{list(leaf.shape)} in the model"
        for name, leaf in want.items()
        if name in source and tuple(saved[source[name]].shape) != tuple(leaf.shape)
    ]
    if lines:
        shown = lines[:10] + (["..."] if len(lines) > 10 else [])
        raise UserError(f"{found} does not fit the model:\n  " + "\n  ".join(shown))

    wanted = nested({source[name]: leaf for name, leaf in want.items() if name in source})
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        got = reader.restore(
            found / "params",
            args=ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            ),
        )
    values = dict(named_leaves(got))
    params = map_named(lambda name, _: values[source[name]] if name in source else None, target)
    report = WarmStart(
        path=found,
        loaded=tuple(name for name in want if name in source),
        renamed=tuple((old, new) for old, new in new_names.items() if old != new and new in want),
        missing=tuple(missing),
        surplus=tuple(old for old, new in new_names.items() if new not in want),
    )
    return params, report
