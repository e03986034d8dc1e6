"""Checkpoint files: config.json beside safetensors, one file or shards with an index."""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches numpy the bfloat16 of the files
import numpy as np

from jaxlm.errors import UserError, check

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
PACKED = "mxfp4"  # the quantisation that can be read, see jaxlm.hf.mxfp4
# What travels with the weights so that texts become ids and ids texts.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint whose tensors are read one at a time."""

    path: Path
    config: Mapping[str, Any]  # config.json
    shapes: Mapping[str, tuple[int, ...]]
    dtype: str  # of the weights
    read: Callable[[str], np.ndarray]  # one tensor, copied out of the file
    odd: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # tensors that are no floats -> their type


def _safe_open(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError(f"{path}: reading it needs the extra `pip install 'jaxlm[hf]'`") from error
    try:
        return safe_open(str(path), framework="numpy")
    except FileNotFoundError:
        raise UserError(f"{path} is missing, and the index names it") from None
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: it is missing or is not a JSON object.
    """
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    check(isinstance(tree, dict), f"{path} holds no JSON object")
    return tree


def _shards(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(read_json(folder / INDEX)["weight_map"].values()))]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    other = [path.name for pattern in ("*.bin", "*.pt", "*.gguf") for path in folder.glob(pattern)]
    hint = f"; it holds {other[0]!r}" if other else ""
    raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}")


def _modern(name: str) -> str:
    """A norm's parameters as they are called today; the first files of BERT have gamma and beta."""
    return re.sub(
        r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    )


@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[Source]:
    """A folder as `transformers` writes it.

    Raises:
        UserError: config.json or a shard is missing or damaged.
    """
    config = read_json(folder / "config.json")
    with contextlib.ExitStack() as stack:
        where, shapes, sizes, odd = {}, {}, {}, {}
        for path in _shards(folder):
            file = stack.enter_context(_safe_open(path))
            for there in file.keys():  # noqa: SIM118  the file is no mapping
                part, name = file.get_slice(there), _modern(there)
                where[name], shapes[name] = (file, there), tuple(part.get_shape())
                kind = part.get_dtype()
                if kind in _FLOATS:
                    sizes[kind] = sizes.get(kind, 0) + math.prod(shapes[name])
                else:  # masks that older files keep, or what is quantised
                    odd[name] = kind
        method = (config.get("quantization_config") or {}).get("quant_method")
        check(
            method in (None, PACKED),
            f"{folder}: weights quantised by {method!r} are not read, only {PACKED!r}; save them in bfloat16",
        )
        most = max(sizes, key=sizes.__getitem__, default="F32")
        read = lambda name: where[name][0].get_tensor(where[name][1])  # noqa: E731
        yield Source(folder, config, shapes, _FLOATS[most], read, odd)


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]],
    *,
    itemsize: int,
    shard_bytes: int = 4 << 30,
) -> None:
    """Write config.json and safetensors, a shard at a time.

    Args:
        folder: made if it is not there.
        config: what config.json is to hold.
        tensors: name -> (shape, function that makes it).
        itemsize: bytes of an element.
        shard_bytes: of a file, about; no more than that is held at a time.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (shape, _) in tensors.items():
        size = int(np.prod(shape)) * itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    many = len(shards) > 1
    where = {}
    for k, names in enumerate(shards):
        file = f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors" if many else SINGLE
        made = {name: np.ascontiguousarray(tensors[name][1]()) for name in names}
        save_file(made, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    if many:
        total = sum(int(np.prod(shape)) * itemsize for shape, _ in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2, default=list) + "\n")
