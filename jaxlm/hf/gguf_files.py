"""GGUF files of the llama family, read as if they were the Hugging Face folder that they were made from.

llama.cpp keeps the rows of queries and keys in the order of interleaved rotary pairs; here they move back.
Quantised blocks (Q4_0, Q4_1, Q8_0, the K-quants, ...) become float32 through the `gguf` package.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.errors import UserError, check, check_choice
from jaxlm.hf.files import Source
from jaxlm.model.positions import PositionConfig, rope_frequencies

# Name in the file -> name in the folder; {i} is a layer.
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    **{
        f"blk.{{i}}.{theirs}.weight": f"model.layers.{{i}}.{ours}.weight"
        for theirs, ours in {
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }.items()
    },
}
_FACTORS = "rope_freqs.weight"  # Llama 3.1 and later: what each pair's frequency is divided by
_WIDE = {"F16": "float16", "BF16": "bfloat16"}


@contextlib.contextmanager
def open_gguf(path: Path) -> Iterator[Source]:
    """A GGUF file, its tensors under the names of a llama folder.

    Raises:
        UserError: the `gguf` package is missing, the file is damaged, or its architecture is not llama.
    """
    reader = _reader(path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    check_choice(meta.get("general.architecture"), ("llama",), f"{path}: general.architecture")
    check(not meta.get("llama.expert_count"), f"{path}: experts in a GGUF file are not supported")
    tensors = {}
    for tensor in reader.tensors:
        layer = tensor.name.split(".")[1] if tensor.name.startswith("blk.") else ""
        pattern = tensor.name.replace(f"blk.{layer}.", "blk.{i}.", 1) if layer else tensor.name
        tensors[_NAMES.get(pattern, tensor.name).replace("{i}", layer)] = tensor
    factors = tensors.pop(_FACTORS, None)
    config = _config(path, meta, tied="lm_head.weight" not in tensors, vocab=_shape(tensors, path)[0])
    if factors is not None:
        config["rope_scaling"] = _llama3(path, config, np.asarray(factors.data, np.float32))
    types = {tensor.tensor_type.name for name, tensor in tensors.items() if "norm" not in name}
    dtype = _WIDE.get(next(iter(types)), "float32") if len(types) == 1 else "float32"
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    def read(name: str) -> np.ndarray:
        from gguf import dequantize

        tensor = tensors[name]
        x = dequantize(tensor.data, tensor.tensor_type)
        for kind, count in heads.items():
            if f"self_attn.{kind}.weight" in name:
                x = x.reshape(count, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
        return x

    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in tensors.items()}
    yield Source(path, config, shapes, dtype, read)


def _reader(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"{path}: reading GGUF needs the extra `pip install 'jaxlm[hf]'`") from error
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} is not a GGUF file: {error}") from error


def _shape(tensors: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    table = tensors.get("model.embed_tokens.weight")
    check(table is not None, f"{path} has no token_embd.weight")
    return tuple(int(n) for n in reversed(table.shape))


def _config(path: Path, meta: Mapping[str, Any], *, tied: bool, vocab: int) -> dict[str, Any]:
    """config.json of the folder that it was made from, as far as the file tells."""
    need = {
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "intermediate_size": "feed_forward_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "max_position_embeddings": "context_length",
    }
    missing = [f"llama.{name}" for name in need.values() if f"llama.{name}" not in meta]
    check(not missing, f"{path} lacks {', '.join(missing)}")
    config = {ours: meta[f"llama.{theirs}"] for ours, theirs in need.items()}
    heads = config["num_attention_heads"]
    head_dim = meta.get("llama.attention.key_length", config["hidden_size"] // heads)
    rotated = meta.get("llama.rope.dimension_count", head_dim)
    check(rotated == head_dim, f"{path}: {rotated} of {head_dim} dimensions of a head rotate, not all")
    config |= {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_theta": float(meta.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": _scaling(path, meta),
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        # The file keeps it in single precision.
        "rms_norm_eps": float(f"{config['rms_norm_eps']:.6g}"),
    }
    for name, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = meta.get(f"tokenizer.ggml.{theirs}_token_id")
    return config


def _scaling(path: Path, meta: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = meta.get("llama.rope.scaling.type", "none")
    if kind == "none":
        return None
    check_choice(kind, ("none", "linear", "yarn"), f"{path}: llama.rope.scaling.type")
    scaling = {"rope_type": kind, "factor": float(meta["llama.rope.scaling.factor"])}
    if length := meta.get("llama.rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = int(length)
    return scaling


def _llama3(path: Path, config: Mapping[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """The scaling whose divisors the file holds: one of those that were released."""
    theta, head_dim = config["rope_theta"], config["head_dim"]
    plain, _ = rope_frequencies(PositionConfig(theta=theta), head_dim)
    for factor in (8.0, 32.0, 16.0, 4.0, 2.0):
        scaled = PositionConfig(theta=theta, scaling="llama3", factor=factor, original_length=8192)
        if np.allclose(plain / rope_frequencies(scaled, head_dim)[0], factors, rtol=1e-3):
            lengths = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
            return {
                "rope_type": "llama3",
                "factor": factor,
                **lengths,
                "original_max_position_embeddings": 8192,
            }
    raise UserError(f"{path}: {_FACTORS} is no scaling of Llama 3")


# ----------------------------------------------------------------------------------------------- tokenizer

_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(regex: str) -> list[dict[str, Any]]:
    cut = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return [cut, {**_GPT2, "use_regex": False}]


# tokenizer.ggml.pre -> how a text is cut before its pieces are merged.
_CUTS = {
    "default": [_GPT2],
    "gpt-2": [_GPT2],
    "smollm": [_DIGITS, _GPT2],
    "llama-bpe": _split(_LLAMA3),
}


def write_tokenizer(path: Path, folder: Path) -> bool:
    """Write tokenizer.json and tokenizer_config.json of a GGUF file's byte-level BPE.

    Returns:
        False if the file has a tokenizer of another kind, which is not converted.
    """
    meta = {name: field.contents() for name, field in _reader(path).fields.items()}
    cuts = _CUTS.get(meta.get("tokenizer.ggml.pre", "default"))
    if meta.get("tokenizer.ggml.model") != "gpt2" or cuts is None:
        return False
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    added = [
        {"id": i, "content": token, "special": kind == 3}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (3, 4)  # control tokens, and words that are never cut
    ]
    merges = [merge.split(" ", 1) for merge in meta["tokenizer.ggml.merges"]]
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "post_processor": None,
        "decoder": _GPT2,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": meta.get("tokenizer.ggml.pre") == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    names = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for ours, theirs in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        if (i := meta.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            names[ours] = tokens[i]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
    return True
