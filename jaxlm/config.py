"""The run's config: frozen dataclasses inside, a ConfigDict at the edge, JSON on disk.

An experiment edits `default_config()`, a ConfigDict made from the dataclasses' own defaults; `build` turns it
into a frozen `RunConfig` and is the only place where types and names are checked. Every room reads its frozen
config and nothing else, so a default stands once: in the dataclass field.
"""

import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import json
import math
import numbers
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from jaxlm.data.loader import DataConfig
from jaxlm.errors import UserError, check, nearest
from jaxlm.generate.sampling import SampleConfig
from jaxlm.model.config import TransformerConfig
from jaxlm.model.models import ModelConfig
from jaxlm.objectives.lm import LossConfig
from jaxlm.optim import OptimConfig
from jaxlm.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What the loop does and how often; steps count updates of the parameters."""

    num_steps: int = 1000  # updates in the whole run
    microbatches: int = (
        1  # parts into which a step's batch is cut, one after another; same update, less memory
    )
    log_every: int = 10  # steps between lines of metrics
    eval_every: int = 0  # steps between evaluations; 0 = at the end only
    sample_every: int = 0  # steps between samples; 0 = at the end only
    save_every: int = 0  # steps between checkpoints; 0 = at the end and on SIGTERM only
    keep_last: int = 2  # newest checkpoints kept
    keep_best: int = 1  # checkpoints with the lowest eval/nll kept beside them
    keep_period: int = 0  # checkpoints at multiples of this are kept for ever; 0 = none
    plot_every: int = 0  # steps between drawings of loss.png; 0 = at the end only
    max_nonfinite: int = 10  # this many skipped updates in a row stop the job; 0 = never
    noise_scale_every: int = 0  # steps between measurements of the gradient noise scale; 0 = never
    profile_start: int = 0  # first profiled step; 0 = no profile
    profile_steps: int = 3  # length of the profiled window
    peak_flops: float = 0.0  # peak FLOP/s of one device, for MFU; 0 = look the device up
    compilation_cache: bool = True  # keep compiled programs in the run directory's parent
    warm_start: str = ""  # run directory or checkpoint whose parameters to start from
    warm_start_rename: tuple[tuple[str, str], ...] = ()  # (regex, replacement) on the names of its leaves
    warm_start_missing: tuple[str, ...] = ()  # regexes; leaves of the model that it need not hold
    branch_from: str = ""  # run directory of a trunk whose whole state to start from; relative to our parent
    branch_step: int = 0  # updates of the trunk before the branch
    save_steps: tuple[int, ...] = ()  # checkpoints of these steps are written and kept for ever
    sample_prompts: tuple[str, ...] = (
        "",
    )  # prompts of the periodic samples; "" = from the start of a document

    def __post_init__(self) -> None:
        least = {"num_steps": 1, "microbatches": 1, "log_every": 1, "keep_last": 1, "profile_steps": 1}
        for field in dataclasses.fields(self):
            value, low = getattr(self, field.name), least.get(field.name, 0)
            if isinstance(value, int | float) and value < low:
                raise UserError(f"train.{field.name}={value} must be at least {low}")
        if self.branch_from:
            check(
                0 < self.branch_step < self.num_steps,
                f"train.branch_step={self.branch_step} must lie between 0 and train.num_steps="
                f"{self.num_steps}: it counts the updates of the trunk {self.branch_from}",
            )
            check(
                not self.warm_start,
                f"train.warm_start={self.warm_start!r} and train.branch_from={self.branch_from!r} both say "
                "where to start; choose one",
            )
        else:
            check(not self.branch_step, f"train.branch_step={self.branch_step} needs train.branch_from")
        for step in self.save_steps:
            check(
                self.branch_step < step <= self.num_steps,
                f"train.save_steps has {step}; this run makes steps {self.branch_step + 1} to "
                f"{self.num_steps}",
            )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run. One field per room."""

    seed: int = 0  # of parameters and dropout; the order of the data has its own, data.seed
    model: ModelConfig = dataclasses.field(default_factory=TransformerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        check(0 <= self.seed < 2**32, f"seed={self.seed} must be in [0, 2**32)")
        quant = self.model.quant if isinstance(self.model, TransformerConfig) else "none"
        check(
            quant == "none" or self.mesh.reduce_dtype == "float32",
            f"mesh.reduce_dtype={self.mesh.reduce_dtype!r} with model.quant={quant!r}: 8-bit "
            "products sum their gradients in float32",
        )


# How a run is executed, watched and kept, not what it computes: two configs that differ only here are one
# run, so a resume may change them (and the machine).
EXECUTION = frozenset(
    {"mesh", "sample", "data.prefetch", "data.workers", "data.cache_dir"}
    | {f"train.{name}" for name in ("log_every", "eval_every", "sample_every", "save_every", "plot_every")}
    | {
        f"train.{name}"
        for name in ("keep_last", "keep_best", "keep_period", "save_steps", "max_nonfinite", "sample_prompts")
    }
    | {f"train.{name}" for name in ("profile_start", "profile_steps", "peak_flops", "compilation_cache")}
    | {"train.noise_scale_every", "model.attention.tile_q", "model.attention.tile_k"}
)


def default_config(cls: type = RunConfig) -> ConfigDict:
    """The defaults of a dataclass and of those inside it, as a ConfigDict.

    A field that may be None or may have several types becomes a placeholder of that type; one that may hold
    several dataclasses becomes the first of them, in whose place the others' may be put:
    `config.model = default_config(LSTMConfig)`.
    """
    hints = typing.get_type_hints(cls)
    out = ConfigDict()
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if groups := _groups(hint):
            out[field.name] = default_config(groups[0])
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = None if default is dataclasses.MISSING else default
        kinds = [a for a in typing.get_args(hint) if a is not type(None)] if _is_union(hint) else [hint]
        if len(kinds) > 1:
            out[field.name] = config_dict.FieldReference(default, field_type=object)
        elif default is None:
            out[field.name] = config_dict.placeholder(typing.get_origin(kinds[0]) or kinds[0])
        else:
            out[field.name] = default
    return out


def config_dict_of(config: Any) -> ConfigDict:
    """A frozen config as a ConfigDict that can be overridden; the inverse of `build`."""
    out = default_config(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        out[field.name] = config_dict_of(value) if dataclasses.is_dataclass(value) else value
    return out


def build(config: ConfigDict | Mapping[str, Any], cls: type = RunConfig, path: str = "") -> Any:
    """The frozen dataclass that `config` describes; missing keys take the field's default.

    Args:
        config: nested mapping, as from an experiment or from `config.json`.
        cls: the dataclass; its sub-configs are built the same way.
        path: dotted place of `config` in the whole, for messages.

    Raises:
        UserError: an unknown key (with the nearest name), a wrong type, a value out of range.
    """
    where = path + "." if path else ""
    if not isinstance(config, Mapping | ConfigDict):
        raise UserError(f"config {path}: expected a group of fields, got {config!r}")
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    check(
        path != "" or "grid" in names or not {"run", "grid"} <= set(config),
        "config: this experiment is a sweep (`run` and `grid`): `jaxlm plan` and `jaxlm sweep` take it",
    )
    for key in config:
        if key not in names:
            raise UserError(f"config: unknown key {where}{key}{nearest(key, names)}{_elsewhere(key, names)}")
    values = {key: _convert(value, hints[key], where + key) for key, value in config.items()}
    try:
        return cls(**values)
    except ValueError as e:
        raise UserError(f"config: {_placed(str(e), path)}") from None


def _placed(message: str, path: str) -> str:
    """A room's message with the whole path in front: `position.kind=` becomes `model.position.kind=`."""
    group = path.rsplit(".", 1)[-1]
    if message.startswith(path):
        return message
    if message.startswith(group + "."):
        return path.removesuffix(group) + message
    return f"{path}: {message}"


def _elsewhere(key: str, names: list[str], cls: type | None = None) -> str:
    """Where else in a RunConfig a field of that name stands, when it is not misspelt but misplaced."""
    if difflib.get_close_matches(key, names, n=1, cutoff=0.6):
        return ""
    places = [name for name in field_names(cls or RunConfig) if name.rsplit(".", 1)[-1] == key]
    return f"; did you mean {' or '.join(repr(p) for p in places)}?" if places else ""


def field_names(cls: type = RunConfig, path: str = "") -> list[str]:
    """Dotted names of all fields, groups included: 'model', 'model.num_layers', ..."""
    hints = typing.get_type_hints(cls)
    out = []
    for field in dataclasses.fields(cls):
        name = f"{path}.{field.name}" if path else field.name
        out.append(name)
        for group in _groups(hints[field.name]):
            out += [inner for inner in field_names(group, name) if inner not in out]
    return out


def check_name(name: str, cls: type = RunConfig) -> None:
    """Raise `UserError` with the nearest name unless the dotted `name` is a field."""
    hints, parts = typing.get_type_hints(cls), name.split(".")
    for i, part in enumerate(parts):
        place = ".".join(parts[: i + 1])
        names = list(hints)
        if part not in names:
            close = difflib.get_close_matches(part, names, n=1, cutoff=0.6)
            near = "; did you mean " + repr(".".join([*parts[:i], close[0]])) + "?" if close else ""
            raise UserError(f"config: unknown key {place}{near or _elsewhere(part, names, cls)}")
        inner, groups = hints[part], _groups(hints[part])
        if i + 1 < len(parts) and not groups:
            raise UserError(
                f"config: {place} is of type {_type_name(inner)}, it has no field {parts[i + 1]!r}"
            )
        hints = {}
        for group in groups:
            hints = typing.get_type_hints(group) | hints


def _groups(hint: Any) -> tuple[type, ...]:
    """The dataclasses that a field may hold, the default's first; none for a field of plain values."""
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    return tuple(kind for kind in kinds if dataclasses.is_dataclass(kind))


def _choose_group(value: Any, groups: Sequence[type], path: str) -> type:
    """Of several dataclasses the one whose `kind` the group of fields names; without a `kind`, the first."""
    if len(groups) == 1 or not isinstance(value, Mapping | ConfigDict) or "kind" not in value:
        return groups[0]
    kinds = {group.kind: group for group in groups if hasattr(group, "kind")}
    if value["kind"] not in kinds:
        listed = ", ".join(map(repr, kinds))
        raise UserError(f"config {path}.kind={value['kind']!r} is not one of {listed}")
    return kinds[value["kind"]]


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as the field's type; integers may stand for floats and lists for tuples, nothing else."""
    if groups := _groups(hint):
        return build(value, _choose_group(value, groups, path), path)
    wrong = UserError(f"config {path}: expected {_type_name(hint)}, got {value!r} ({type(value).__name__})")
    if _is_union(hint):
        for kind in typing.get_args(hint):
            try:
                return _convert(value, kind, path)
            except UserError:
                continue
        raise wrong
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value not in args:
            listed = ", ".join(map(repr, args))
            raise UserError(
                f"config {path}={value!r} is not one of {listed}{nearest(str(value), map(str, args))}"
            )
        return value
    if hint is tuple or origin in (tuple, Sequence):
        if not isinstance(value, list | tuple):
            raise wrong
        if not args or origin is Sequence:
            return _tuples(value)
        kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise wrong
        return tuple(
            _convert(v, kind, f"{path}[{i}]") for i, (v, kind) in enumerate(zip(value, kinds, strict=True))
        )
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        check(math.isfinite(value), f"config {path}={value} is not a finite number")
        return float(value)
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if hint is type(None) and value is None:
        return None
    if hint in (bool, str) and isinstance(value, hint):
        return value
    raise wrong


def _tuples(value: Any) -> Any:
    """Lists inside lists as tuples inside tuples."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def to_dict(config: Any) -> dict[str, Any]:
    """A frozen config as nested dicts of plain values; tuples stay tuples."""
    return dataclasses.asdict(config)


def canonical_json(config: Any, *, indent: int | None = None) -> str:
    """JSON of a config (dataclass or dict) with sorted keys: equal configs give equal text.

    >>> canonical_json({"b": (1, 2), "a": 0.1})
    '{"a":0.1,"b":[1,2]}'
    """
    tree = to_dict(config) if dataclasses.is_dataclass(config) else config
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(tree, sort_keys=True, separators=separators, indent=indent, allow_nan=False)


def identity(config: Any) -> dict[str, Any]:
    """A config (dataclass or nested dict) without the fields of `EXECUTION`: what makes a run this run."""

    def keep(tree: Mapping[str, Any], path: str) -> dict[str, Any]:
        names = {key: f"{path}{key}" for key in tree if f"{path}{key}" not in EXECUTION}
        return {
            key: keep(tree[key], f"{name}.") if isinstance(tree[key], Mapping) else tree[key]
            for key, name in names.items()
        }

    tree = to_dict(config) if dataclasses.is_dataclass(config) else config
    # Of a mesh, what rounds the sums is the run's own.
    reduce_dtype = tree.get("mesh", {}).get("reduce_dtype", "float32")
    kept = {} if reduce_dtype == "float32" else {"mesh": {"reduce_dtype": reduce_dtype}}
    return keep(tree, "") | kept


def config_hash(config: Any) -> str:
    """sha256 of `canonical_json(identity(config))`, 64 hexadecimal digits; the first 12 are shown to people.

    >>> config_hash({"a": 1})[:12], config_hash({"a": 1, "mesh": {"data": 8}})[:12]
    ('015abd7f5cc5', '015abd7f5cc5')
    """
    return hashlib.sha256(canonical_json(identity(config)).encode()).hexdigest()


def flatten(config: Any, path: str = "") -> dict[str, Any]:
    """Dotted name -> value of every field of a config (dataclass or nested dict).

    >>> flatten({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': (2,)}
    """
    tree = to_dict(config) if dataclasses.is_dataclass(config) else config
    out = {}
    for key, value in tree.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            out |= flatten(value, name)
        else:
            out[name] = _tuples(value)
    return out


def diff(a: Any, b: Any) -> list[str]:
    """One line per field in which two configs differ: `name: a's value -> b's value`.

    >>> diff({"model": {"dim": 1, "layers": 2}}, {"model": {"dim": 3, "layers": 2}})
    ['model.dim: 1 -> 3']
    """
    left, right = flatten(a), flatten(b)
    lines = []
    for name in sorted(left.keys() | right.keys()):
        old = repr(left[name]) if name in left else "(absent)"
        new = repr(right[name]) if name in right else "(absent)"
        if old != new:
            lines.append(f"{name}: {old} -> {new}")
    return lines


def load_experiment(spec: str) -> ConfigDict:
    """The ConfigDict of `path/to/experiment.py` or `path/to/experiment.py:arg`, or a run directory's own.

    Raises:
        UserError: no such file (nearest name offered), no `get_config` in it, or it refuses its argument.
    """
    file, colon, arg = spec.partition(":")
    path = pathlib.Path(file)
    if (path / "config.json").is_file():
        check(not colon, f"--config={spec}: the config of a run directory takes no argument")
        return config_dict_of(load_config(path / "config.json"))
    if not path.is_file():
        beside = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise UserError(f"--config={spec}: there is no file {file}{nearest(file, beside)}")
    module_spec = importlib.util.spec_from_file_location(f"jaxlm_experiment_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config={spec}: {file} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except SyntaxError as e:
        raise UserError(f"--config={spec}: {e.filename}:{e.lineno}: {e.msg}") from e
    except ImportError as e:
        raise UserError(f"--config={spec}: {file} cannot be imported: {e}") from e
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={spec}: {file} has no function get_config(arg)")
    if colon and not inspect.signature(module.get_config).parameters:
        raise UserError(f"--config={spec}: get_config of {file} takes no argument")
    try:
        config = module.get_config(*([arg] if colon else []))
    except TypeError as e:  # a ConfigDict refuses a value of another type than the field's
        raise UserError(f"--config={spec}: {e}") from e
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config={spec}: get_config returned a {type(config).__name__}, expected a ConfigDict"
        )
    return config


def load_config(path: str | pathlib.Path) -> RunConfig:
    """The frozen config that a run directory's `config.json` holds."""
    path = pathlib.Path(path)
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not a run directory: it has no {path.name}") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{path} is not valid JSON ({e})") from None
    return build(tree.get("config", tree))
