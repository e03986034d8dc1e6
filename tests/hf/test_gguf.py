"""GGUF files against the folders that they were made from."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("gguf", reason="GGUF needs the extra `pip install 'jaxlm[hf]'`")
pytest.importorskip("safetensors")
import gguf
from safetensors.numpy import load_file, save_file

import jaxlm.hf
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.errors import UserError
from jaxlm.hf.families import FAMILIES
from jaxlm.hf.gguf_files import _NAMES, write_tokenizer
from jaxlm.hf.pretrained import Pretrained, save
from jaxlm.model import transformer
from jaxlm.model.attention import AttentionConfig
from jaxlm.model.config import TransformerConfig
from jaxlm.tree import named_leaves

CFG = TransformerConfig(
    vocab_size=96,
    num_layers=2,
    model_dim=64,
    mlp_dim=96,
    norm_eps=1e-5,
    tie_embeddings=True,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
)
TYPES = {name: gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q4_0", "Q4_1", "Q8_0")}


def permuted(w, heads):
    """Rows of each head from halves to interleaved pairs, as llama.cpp's converter does it."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    params = transformer.init(dataclasses.replace(CFG, init_std=0.3), jax.random.key(3))
    save(Pretrained(CFG, params, FAMILIES["llama"], {}), path)
    return path


def restored(w, heads):
    """The inverse of `permuted`."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write(folder, path, kind, **fields):
    """The folder's model as GGUF; returns its tensors as the type rounds them, rows in the folder's order."""
    writer = gguf.GGUFWriter(path, fields.pop("arch", "llama"))
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    letters = [chr(c) for c in range(33, 127)] + ["Ġ"]
    words = ["<|end|>", *letters, "to", "Ġb", "Ġbe"]
    writer.add_token_list(words)
    writer.add_token_types([3] + [1] * (len(words) - 1))
    writer.add_token_merges(["t o", "Ġ b", "Ġb e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {ours: theirs for theirs, ours in _NAMES.items()}
    rounded = {}
    for name, w in load_file(folder / "model.safetensors").items():
        layer = name.split(".")[2] if ".layers." in name else ""
        pattern = name.replace(f".layers.{layer}.", ".layers.{i}.") if layer else name
        own = TYPES["F32"] if w.ndim == 1 else kind
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
        data = gguf.quantize(permuted(w, heads) if heads else w, own)
        kept = gguf.dequantize(data, own)
        rounded[name] = restored(kept, heads) if heads else kept
        assert heads == 0 or (data != gguf.quantize(w, own)).any()
        writer.add_tensor(names[pattern].replace("{i}", layer), data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded


@pytest.mark.parametrize("kind", TYPES)
def test_a_gguf_file_holds_the_folders_model_as_its_type_rounds_it(folder, tmp_path, kind):
    rounded = write(folder, tmp_path / "model.gguf", TYPES[kind])
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(rounded, tmp_path / "model.safetensors", metadata={"format": "pt"})
    same, ours = (jaxlm.hf.load(p, param_dtype="float32") for p in (tmp_path, tmp_path / "model.gguf"))
    assert ours.cfg == same.cfg
    for (name, a), (_, b) in zip(named_leaves(same.params), named_leaves(ours.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), name)
    before = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert (np.asarray(ours.params["embed"]["table"]) == before).all() == (kind == "F32")


K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def test_k_quants_are_read_as_the_packages_own_code_dequantises_them(tmp_path):
    """Random blocks, as `gguf` writes none of these: any bytes are numbers, but for the scales in half."""
    cfg = dataclasses.replace(CFG, num_layers=1, model_dim=256, mlp_dim=512)
    params = transformer.init(cfg, jax.random.key(0))
    save(Pretrained(cfg, params, FAMILIES["llama"], {}), tmp_path / "folder")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for name, value in dict(block_count=1, context_length=64, embedding_length=256).items():
        getattr(writer, f"add_{name}")(value)
    for name, value in dict(feed_forward_length=512, head_count=4, head_count_kv=2).items():
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    names, rng, want = {ours: theirs for theirs, ours in _NAMES.items()}, np.random.default_rng(0), {}
    matrices = 0
    for name, w in load_file(tmp_path / "folder" / "model.safetensors").items():
        theirs = names[name.replace(".layers.0.", ".layers.{i}.")].replace("{i}", "0")
        if w.ndim == 1:
            writer.add_tensor(theirs, w)
            want[name] = w
            continue
        kind = gguf.GGMLQuantizationType[K_QUANTS[matrices % len(K_QUANTS)]]
        matrices += 1
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = rng.integers(0, 256, (w.shape[0], w.shape[1] // block, size), dtype=np.uint8)
        halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
        for at in halves[kind.name]:
            scale = rng.uniform(1e-4, 1e-3, data.shape[:2]).astype(np.float16)
            data[..., at : at + 2] = scale[..., None].view(np.uint8)
        data = data.reshape(w.shape[0], -1)
        writer.add_tensor(theirs, data, raw_dtype=kind)
        plain = gguf.dequantize(data, kind)
        assert plain.shape == w.shape
        assert np.isfinite(plain).all()
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
        want[name] = restored(plain, heads) if heads else plain
    assert matrices >= len(K_QUANTS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(want, tmp_path / "folder" / "model.safetensors", metadata={"format": "pt"})
    same, ours = (jaxlm.hf.load(tmp_path / p) for p in ("folder", "model.gguf"))
    assert ours.cfg == dataclasses.replace(same.cfg, param_dtype="float32")
    for (name, a), (_, b) in zip(named_leaves(same.params), named_leaves(ours.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), name)


def test_the_tokenizer_in_a_gguf_file_is_written_out(folder, tmp_path):
    pytest.importorskip("tokenizers")
    write(folder, tmp_path / "model.gguf", TYPES["F32"])
    assert write_tokenizer(tmp_path / "model.gguf", tmp_path / "out")
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    assert [tokenizer.piece(i) for i in tokenizer.encode("to be 12")] == ["to", "Ġbe", "Ġ", "1", "2"]
    assert tokenizer.decode(tokenizer.encode("to be")) == "to be"
    assert tokenizer.eos_id == 0


def test_other_architectures_and_other_files_are_refused(folder, tmp_path):
    write(folder, tmp_path / "model.gguf", TYPES["F32"], arch="mamba")
    with pytest.raises(UserError, match=r"general.architecture='mamba' is not one of 'llama'"):
        jaxlm.hf.load(tmp_path / "model.gguf")
    (tmp_path / "no.gguf").write_bytes(b"nothing of the kind" * 10)
    with pytest.raises(UserError, match="is not a GGUF file"):
        jaxlm.hf.load(tmp_path / "no.gguf")
    with pytest.raises(UserError, match="does not exist"):
        jaxlm.hf.load(tmp_path / "missing.gguf")
