"""What a family is: which fields of its config are which of ours, and which tensors are which leaves."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxlm.errors import UserError, check, check_choice
from jaxlm.hf.packing import Packing
from jaxlm.model.attention import AttentionConfig, LatentConfig
from jaxlm.model.config import EncoderConfig, ReadoutConfig, TransformerConfig, encoder_of
from jaxlm.model.convolution import ConvolutionConfig
from jaxlm.model.disentangled import DisentangledConfig
from jaxlm.model.moe import MoEConfig
from jaxlm.model.positions import PositionConfig

HFConfig = Mapping[str, Any]  # what config.json holds
Fields = dict[str, Any]  # dotted name in `TransformerConfig` -> value


@dataclasses.dataclass(frozen=True)
class Top:
    """What stands on a model's hidden states in one class of `transformers`."""

    logits: str = ""  # what its outputs call logits: vocabulary | classes; '' = it has none
    read: Callable[[HFConfig], Fields] = lambda hf: {}  # fields of ours, over the family's own
    tensors: Mapping[str, Packing] = dataclasses.field(default_factory=dict)  # beside the family's
    flat: bool = False  # its outputs have no axis for its one class
    pairs: bool = False  # its classes say how two sentences go together


@dataclasses.dataclass(frozen=True)
class Family:
    """One table: model_type in config.json, fields, tensors."""

    model_type: str
    architecture: str  # the class that `transformers` makes of it
    keys: Mapping[str, str]  # its field -> ours, dotted; an absent one, or null, is left at our default
    read: Callable[[HFConfig], Fields]  # our other fields from its config
    write: Callable[[TransformerConfig], dict[str, Any]]  # its other fields from ours, the inverse of `read`
    # Tensor -> packing. {i} is a layer ({unit} its period of the pattern, {member} its place there), {e} an
    # expert, {h} a head. Rows without leaves here do not count.
    tensors: Mapping[str, Packing]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of fields that files leave out
    # Another name of a field -> its name here; of both in one file the other counts, as in `transformers`.
    spellings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prefix: str = "model."  # of all tensors but the head's; files of the bare model go without it
    bare: tuple[str, ...] = ()  # classes whose files go without the prefix
    ignored: tuple[str, ...] = ()  # regexes of tensors that hold nothing learned, beside every family's
    zeros: tuple[str, ...] = ()  # tensors that are zero where files lack them
    alternatives: Callable[[TransformerConfig], Mapping[str, Packing]] | None = (
        None  # tensors that depend on cfg
    )
    tops: Mapping[str, Top] = dataclasses.field(default_factory=dict)  # class -> what stands on top in it
    # Tensor of the table -> other names under which files may hold it.
    aliases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    # (config, shapes of the tensors) -> the config with what only the tensors tell.
    settle: Callable[[HFConfig, Mapping[str, Any]], HFConfig] = lambda hf, shapes: hf

    def table(self, cfg: TransformerConfig) -> dict[str, Packing]:
        """All tensors that a model of this family, with its one top, may have."""
        alternatives = self.alternatives(cfg) if self.alternatives else {}
        return {**self.tensors, **self.top.tensors, **alternatives}

    @property
    def top(self) -> Top:
        """What stands on top in the class that is chosen."""
        return self.tops.get(self.architecture, Top("vocabulary"))

    def topped(self, hf: HFConfig) -> "Family":
        """The family with the class that a config.json names.

        Raises:
            UserError: none of its classes; the message names the nearest.
        """
        named = (hf.get("architectures") or [self.architecture])[0]
        alias = named.removesuffix("ForCausalLM").removesuffix("LMHeadModel") != named
        if not self.tops or (named not in self.tops and alias):
            return self
        check_choice(named, self.tops, "config.json: architectures")
        return dataclasses.replace(self, architecture=named)


GROUPS = {
    "attention": AttentionConfig,
    "attention.latent": LatentConfig,
    "position": PositionConfig,
    "moe": MoEConfig,
    "readout": ReadoutConfig,
    "encoder": EncoderConfig,
    "disentangled": DisentangledConfig,
    "convolution": ConvolutionConfig,
}
# How a model is run and trained, not what it computes.
_EXECUTION = {
    "": "dropout init_std scan remat dtype param_dtype accum_dtype parametrization base_width base_depth "
    "base_head_dim quant",
    "attention": "backend context tile_q tile_k",
    "moe": "dispatch capacity_factor dropless_backend exchange buffer_factor load_balance router_z",
}


def config_of(fields: Fields) -> TransformerConfig:
    """A config from dotted fields."""
    groups: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
    top = {}
    for name, value in fields.items():
        group, _, field = name.rpartition(".")
        (groups[group] if group else top)[field] = value
    if latent := groups.pop("attention.latent"):
        groups["attention"]["latent"] = LatentConfig(**latent)
    return TransformerConfig(**top, **{name: GROUPS[name](**values) for name, values in groups.items()})


def canonical(cfg: TransformerConfig) -> TransformerConfig:
    """The same model with every derived size written out, and how it is run and trained at the defaults."""

    def defaults(part: Any, group: str) -> dict[str, Any]:
        known = {field.name: field.default for field in dataclasses.fields(part)}
        return {name: known[name] for name in _EXECUTION[group].split() if name in known}

    def period(pattern: tuple[str, ...], layers: int = cfg.num_layers) -> tuple[str, ...]:
        return shortest([pattern[i % len(pattern)] for i in range(layers)])

    attention = dataclasses.replace(
        cfg.attention,
        window=cfg.attention.window if "local" in cfg.attention.pattern else 0,
        num_kv_heads=cfg.attention.kv_heads,
        head_dim=cfg.head_dim,
        # Of shared layers the pattern also says how many there are in a unit.
        pattern=cfg.attention.pattern if cfg.shared_layers > 1 else period(cfg.attention.pattern),
        scale=0.0 if cfg.attention.scale == cfg.disentangled.scale(cfg.head_dim) else cfg.attention.scale,
        **defaults(cfg.attention, "attention"),
    )
    readout = dataclasses.replace(cfg.readout, bias=cfg.readout.bias or not cfg.readout.classes)
    encoder = cfg.encoder
    if cfg.has_encoder:
        own = encoder_of(cfg)
        encoder = dataclasses.replace(
            encoder, num_heads=own.attention.num_heads, head_dim=own.head_dim, mlp_dim=own.mlp_width
        )
    return dataclasses.replace(
        cfg,
        attention=attention,
        convolution=cfg.convolution if cfg.convolution.width else ConvolutionConfig(),
        disentangled=cfg.disentangled if cfg.disentangled.span else DisentangledConfig(),
        readout=readout if readout.classes or readout.dense else ReadoutConfig(),
        encoder=encoder,
        moe=dataclasses.replace(cfg.moe, **defaults(cfg.moe, "moe")),
        mlp_dim=cfg.mlp_width,
        mlp_pattern=period(cfg.mlp_pattern, cfg.num_layers - cfg.first_dense),
        **defaults(cfg, ""),
    )


def shortest(kinds: list[str]) -> tuple[str, ...]:
    """The shortest pattern that, repeated, gives these layers.

    >>> shortest(["a", "b", "a"]), shortest(["a", "a"]), shortest(["a", "b", "b"])
    (('a', 'b'), ('a',), ('a', 'b', 'b'))
    """
    length = next(n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds)))
    return tuple(kinds[:length])


_ENCODER_SIZES = ("encoder.num_layers", "encoder.num_heads")
_SIZES = ("vocab_size", "model_dim", "num_layers", "attention.num_heads", *_ENCODER_SIZES)  # not guessed


def read_config(family: Family, hf: HFConfig) -> TransformerConfig:
    """Our config of a checkpoint.

    Raises:
        UserError: it asks for something that this library does not have, or lacks a size.
    """
    family = family.topped(hf)
    hf = {**family.defaults, **respelled(family, hf)}
    fields = {ours: hf[key] for key, ours in family.keys.items() if hf.get(key) is not None}
    try:
        fields = {**fields, **family.read(hf), **family.top.read(hf)}
    except KeyError as error:
        raise UserError(f"config.json of model_type {family.model_type!r} lacks {error}") from error
    lost = [key for key, ours in family.keys.items() if ours in _SIZES and ours not in fields]
    check(not lost, f"config.json of model_type {family.model_type!r} lacks {', '.join(map(repr, lost))}")
    return canonical(config_of(fields))


def respelled(family: Family, hf: HFConfig) -> dict[str, Any]:
    """A config.json with the names of fields that the family's table has."""
    others = {ours: hf[name] for name, ours in family.spellings.items() if hf.get(name) is not None}
    return {**{key: value for key, value in hf.items() if key not in family.spellings}, **others}


def write_config(family: Family, cfg: TransformerConfig, kept: HFConfig) -> dict[str, Any]:
    """config.json of a model.

    Args:
        family: whose tables to use.
        cfg: the model.
        kept: the config.json that it came with, or {}; its other fields stay.

    Raises:
        UserError: the family has no such model; the message names the fields.
    """
    check(
        cfg.parametrization == "standard",
        f"model.parametrization={cfg.parametrization!r}: its multipliers have no place in a checkpoint",
    )
    cfg = canonical(cfg)
    if kept and read_config(family, kept) == cfg:
        return {"model_type": family.model_type, "architectures": [family.architecture], **kept}
    if cfg.readout.classes not in (0, labels(kept)):
        kept = {key: value for key, value in kept.items() if key not in ("num_labels", "label2id")}
        kept["id2label"] = {str(i): f"LABEL_{i}" for i in range(cfg.readout.classes)}
    ours = {key: _at(cfg, name) for key, name in family.keys.items()}
    kept = {
        key: value
        for key, value in respelled(family, kept).items()
        if key not in ("rope_parameters", "rope_scaling")
    }
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # not their defaults' ids
    named = {"model_type": family.model_type}
    hf = {**tokens, **family.defaults, **kept, **named, **ours, **family.write(cfg)}
    hf["architectures"] = [_class_of(family, cfg, hf)]
    hf.pop("default_theta", None)
    again = read_config(family, hf)
    lines = [f"{name}: {a!r} here, {b!r} there" for name, a, b in _differences(cfg, again)]
    check(not lines, f"no {family.model_type} model has these fields:\n  " + "\n  ".join(lines))
    return hf


def labels(hf: HFConfig) -> int:
    """How many classes a config.json has; two if it does not say."""
    return int(hf.get("num_labels") or len(hf.get("id2label") or (0, 1)))


def _class_of(family: Family, cfg: TransformerConfig, hf: HFConfig) -> str:
    """The family's own class if that is what stands on the model, else the first of its classes that does."""
    if not family.tops:
        return family.architecture
    read = {name: top.read(hf) for name, top in family.tops.items()}
    parts = {"head_transform", *(f"readout.{field.name}" for field in dataclasses.fields(ReadoutConfig))}
    parts |= set.intersection(*map(set, read.values()))  # and what every class decides
    ours, bare = ({part: _at(c, part) for part in parts} for c in (cfg, TransformerConfig()))
    for name in (family.architecture, *family.tops):
        if {**bare, **read[name]}.items() >= ours.items():
            return name
    raise UserError(f"no {family.model_type} class has on top what this model has: {ours}")


def _at(cfg: TransformerConfig, name: str) -> Any:
    for part in name.split("."):
        cfg = getattr(cfg, part)
    return cfg


def _differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    out = []
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if dataclasses.is_dataclass(x):
            out += _differences(x, y, f"{path}{field.name}.")
        elif x != y:
            out.append((path + field.name, x, y))
    return out
