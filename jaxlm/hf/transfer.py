"""Tensors of a checkpoint into leaves on their devices, and back, one at a time."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UserError, check
from jaxlm.hf.family import Family, read_config
from jaxlm.hf.files import Source
from jaxlm.hf.packing import Packing
from jaxlm.model import transformer
from jaxlm.model.config import TransformerConfig, encoder_of
from jaxlm.sharding import Layout, tree_shardings
from jaxlm.tree import map_named, named_leaves


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a tensor's leaf stands: in leaf `path`, at `layer` of a stack, as `part` of its first axis."""

    path: str
    layer: int | None  # None: the leaf is not stacked
    part: int | None  # expert or head; None: all of it


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint."""

    packing: Packing
    slots: tuple[Slot, ...]  # one for each leaf of the packing
    shapes: tuple[tuple[int, ...], ...]  # of those leaves' parts
    shape: tuple[int, ...]  # of the tensor


_ENCODER = "encoder/"  # begins the leaves of a model's encoder


def layout_of(cfg: TransformerConfig, family: Family) -> dict[str, Entry]:
    """Every tensor that a checkpoint of this model holds, in the order of the layers."""
    leaves = dict(named_leaves(transformer.abstract_params(cfg)))
    table, entries, used = family.table(cfg), {}, set()
    for pattern, packing in table.items():
        inside = packing.leaves[0].startswith(_ENCODER)
        if inside and not cfg.has_encoder:
            continue
        stack, side = (encoder_of(cfg), _ENCODER) if inside else (cfg, "")
        # Of layers that share their parameters, the first.
        uses = [i for i in range(stack.num_layers) if i // stack.period % stack.shared_layers == 0]
        by_layer = "{i}" in pattern or "{unit}" in pattern
        for i, use in enumerate(uses if by_layer else (None,)):
            layer = None
            where = side
            if use is not None:
                place, layer = stack.place(use)
                where += f"{place}/"
            paths = [_find(where, leaf.removeprefix(side), leaves) for leaf in packing.leaves]
            if None in paths:
                continue
            used |= set(paths)
            whole = [leaves[path].shape[0 if layer is None else 1 :] for path in paths]
            parts, shapes = _parts(cfg, pattern, whole)
            for part in parts:
                name = pattern.format(i=i, unit=i // cfg.period, member=i % cfg.period, e=part, h=part)
                slots = tuple(Slot(path, layer, part) for path in paths)
                args = [jax.ShapeDtypeStruct(s, "float32") for s in shapes]
                made = jax.eval_shape(lambda *x, p=packing: p.write(cfg, jnp, x), *args)
                entries[name] = Entry(packing, slots, tuple(shapes), made.shape)
    lost = sorted(leaves.keys() - used)
    if lost:
        raise UserError(
            f"no tensor of a {family.model_type} checkpoint holds {', '.join(lost[:5])}: this model is not "
            "of that family"
        )
    return entries


def _find(where: str, leaf: str, leaves: dict[str, Any]) -> str | None:
    """A layer's leaf; the norms of queries and keys stand inside the attention."""
    return next((p for p in (f"{where}{leaf}", f"{where}attention/{leaf}") if p in leaves), None)


def _parts(
    cfg: TransformerConfig, pattern: str, shapes: list[tuple[int, ...]]
) -> tuple[list[int | None], list[tuple[int, ...]]]:
    """Which parts of its leaves' first axis the tensors of a pattern hold one by one, and their shapes."""
    if "{e}" in pattern:
        return list(range(shapes[0][0])), [shape[1:] for shape in shapes]
    if "{h}" in pattern:
        return list(range(shapes[0][0] // cfg.head_dim)), [(cfg.head_dim,)] * len(shapes)
    return [None], shapes


def settled(family: Family, source: Source) -> dict[str, Any]:
    """config.json with what only the tensors tell: a head beside the table that differs from it is untied.

    Source: `transformers`, which ties only what is equal or lacking, whatever `tie_word_embeddings` says.
    """
    hf = dict(family.settle(source.config, source.shapes))
    cfg = read_config(family, hf)
    if family.top.logits != "vocabulary" or not cfg.tie_embeddings:
        return hf
    rows = family.table(cfg)
    table, head = ([n for n in _holding(rows, leaf) if n in source.shapes] for leaf in (_TABLE, _HEAD))
    if table and head and not np.array_equal(source.read(table[0]), source.read(head[0])):
        return {**hf, "tie_word_embeddings": False}
    return hf


_TABLE, _HEAD = "embed/table", "head/w"
# Tensors that hold nothing learned, in files of any family: frequencies, counters, masks, a version.
_BUFFERS = (
    r"rotary_emb\.inv_freq$",
    r"position_ids$",
    r"\.(attn|attention|self_attention|self_attn)\.(masked_)?bias$",
    r"\.version$",
)


def _holding(rows: Mapping[str, Packing], leaf: str) -> list[str]:
    """The tensors that hold a leaf."""
    return [name for name, packing in rows.items() if packing.leaves == (leaf,)]


_TIED = r"(^|\.)(((generator_)?lm_head|embed_out|decoder|vocab_projector)\.weight|decoder\.bias)$"


def names_in(
    family: Family, entries: dict[str, Entry], source: Source
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Tensor of the table -> its name in the file, which may lack the prefix of the whole model.

    Returns:
        The names, and tensors of heads that other classes of the family have: they are left in the file.

    Raises:
        UserError: the file's tensors are not these; the message lists missing, surplus and misshapen ones,
            or names two that differ where the model has one.
    """
    bare = not any(name.startswith(family.prefix) for name in source.shapes)
    in_file = lambda name: name.removeprefix(family.prefix) if bare else name  # noqa: E731
    names, copies = {}, set()
    tied = not any(entry.packing.leaves == (_HEAD,) for entry in entries.values())
    for name, entry in entries.items():
        others = [in_file(other) for other in family.aliases.get(name, ())]
        found = [other for other in (in_file(name), *others) if other in source.shapes]
        for other in found[1:]:
            same = np.array_equal(source.read(found[0]), source.read(other))
            check(same, f"{source.path}: {found[0]} and {other} differ, and the config makes them one")
        if not found and tied and entry.packing.leaves == (_TABLE,):  # files may hold the head alone
            rows = {**family.tensors, **family.top.tensors}
            found = [head for head in _holding(rows, _HEAD) if head in source.shapes]
        names[name] = found[0] if found else in_file(name)
        copies |= set(others)
    known = set(names.values())
    ignored = [re.compile(pattern) for pattern in (*_BUFFERS, *family.ignored)]
    # What another class of the family puts on top: files of a base model often hold what it was trained with.
    heads = {in_file(name) for top in family.tops.values() for name in top.tensors}
    # A tied head is the table, whether or not the file holds it once more.
    spare = copies | {name for name in source.shapes if re.search(_TIED, name)}
    zeros = {names[name] for name in family.zeros if name in names}
    missing = [name for name in names.values() if name not in source.shapes and name not in zeros]
    surplus = [
        name
        for name in source.shapes
        if name not in known | spare | heads and not any(r.search(name) for r in ignored)
    ]
    left = tuple(name for name in source.shapes if name in heads - known - spare)
    wrong = [
        f"{name} has shape {list(source.shapes[name])}, the config asks for {list(entries[ours].shape)}"
        for ours, name in names.items()
        if name in source.shapes and source.shapes[name] != entries[ours].shape
    ]
    lines = []
    odd = [f"{name} is {source.odd[name]}" for name in names.values() if name in source.odd]
    faults = (
        ("missing", missing),
        ("surplus", surplus),
        ("misshapen", wrong),
        ("of a type that is not read", odd),
    )
    for title, found in faults:
        if found:
            lines += [f"{len(found)} {title}:", *[f"  {line}" for line in found[:20]]]
            lines += [f"  ... and {len(found) - 20} more"] if len(found) > 20 else []
    if lines:
        raise UserError(
            f"{source.path}: these are not the tensors that its config.json asks for\n" + "\n".join(lines)
        )
    return names, left


def read_params(
    cfg: TransformerConfig, family: Family, source: Source, *, layout: Layout | None = None
) -> tuple[transformer.Params, tuple[str, ...]]:
    """The parameters of a checkpoint, in `cfg.param_dtype`, each leaf on its own devices.

    A leaf is made of its tensors and placed before the next is read; of a leaf that is split over devices,
    each device's part is made by itself.

    Args:
        cfg: from `read_config`, with the dtypes that are wanted.
        family: whose tensors these are.
        source: an open checkpoint.
        layout: mesh and rules; None = the first device.

    Returns:
        The parameters, and the names of tensors of other heads that were left in the file.

    Raises:
        UserError: missing, surplus or misshapen tensors, all listed.
    """
    entries = layout_of(cfg, family)
    names, left = names_in(family, entries, source)
    holders: dict[str, dict[int | None, list[tuple[str, Entry, int]]]] = {}
    for name, entry in entries.items():
        for k, slot in enumerate(entry.slots):
            holders.setdefault(slot.path, {}).setdefault(slot.layer, []).append((name, entry, k))

    def one_layer(path: str, layer: int | None) -> np.ndarray:
        pieces = []
        for name, entry, k in holders[path][layer]:
            there = names[name] in source.shapes
            tensor = source.read(names[name]) if there else np.zeros(entry.shape, cfg.param_dtype)
            pieces.append(entry.packing.read(cfg, tensor, entry.shapes)[k])
        if holders[path][layer][0][1].slots[0].part is None:
            return pieces[0]
        return np.stack(pieces)

    def piece(path: str, leaf: jax.ShapeDtypeStruct, index: tuple[slice, ...]) -> np.ndarray:
        if None in holders[path]:
            return _in_dtype(one_layer(path, None).reshape(leaf.shape)[index], leaf.dtype)
        layers = range(*index[0].indices(leaf.shape[0]))
        sizes = [len(range(*i.indices(n))) for i, n in zip(index, leaf.shape, strict=True)]
        out = np.empty(sizes, leaf.dtype)
        for row, layer in enumerate(layers):
            out[row] = one_layer(path, layer).reshape(leaf.shape[1:])[index[1:]]
        return out

    abstract = transformer.abstract_params(cfg)
    if layout is None:
        device = jax.devices()[0]
        params = map_named(
            lambda path, leaf: jax.device_put(
                piece(path, leaf, (slice(None),) * len(leaf.shape)), device, may_alias=True
            ),
            abstract,
        )
        return params, left

    def spread(path: str, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
        devices: dict[Any, list[tuple[jax.Device, tuple[slice, ...]]]] = {}
        for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
            devices.setdefault(str(index), []).append((device, index))
        arrays = []
        for same in devices.values():  # a part is on its devices before the next is made
            x = piece(path, leaf, same[0][1])
            arrays += [jax.block_until_ready(jax.device_put(x, device)) for device, _ in same]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)

    return map_named(spread, abstract, tree_shardings(layout, abstract, transformer.AXES)), left


def _in_dtype(x: np.ndarray, dtype: Any) -> np.ndarray:
    return np.ascontiguousarray(x).astype(dtype, copy=False)


def tensors_of(
    cfg: TransformerConfig, family: Family, params: transformer.Params, *, dtype: str = ""
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """`(name, shape, function that makes it)` of every tensor; the inverse of `read_params`.

    With a `dtype` all are of that one, else each is of its leaf's in this model.
    """
    leaves = dict(named_leaves(params))
    own = {path: leaf.dtype for path, leaf in named_leaves(transformer.abstract_params(cfg))}
    for name, entry in layout_of(cfg, family).items():

        def make(entry: Entry = entry) -> np.ndarray:
            parts = []
            for slot, shape in zip(entry.slots, entry.shapes, strict=True):
                leaf = leaves[slot.path] if slot.layer is None else leaves[slot.path][slot.layer]
                x = np.asarray(leaf)
                parts.append(x if slot.part is None else x.reshape(-1, *shape)[slot.part])
            whole = np.asarray(entry.packing.write(cfg, np, parts))
            return whole.astype(dtype or own[entry.slots[0].path], copy=False)

        yield name, entry.shape, make
