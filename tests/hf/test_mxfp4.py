"""GPT-OSS with its experts in MXFP4 against the same model saved whole."""

import json

import numpy as np
import pytest

pytest.importorskip("torch", reason="parity needs the extra `pip install 'jaxlm[parity]'`")
pytest.importorskip("transformers", reason="parity needs the extra `pip install 'jaxlm[parity]'`")
pytest.importorskip("safetensors")
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import jaxlm.hf
from jaxlm.errors import UserError
from jaxlm.hf.pretrained import save
from jaxlm.tree import named_leaves

SIZES = dict(model_type="gpt_oss", architectures=["GptOssForCausalLM"], vocab_size=40, num_hidden_layers=2)
SIZES |= dict(hidden_size=64, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
SIZES |= dict(num_local_experts=3, num_experts_per_tok=2, sliding_window=4)


def draw(*shape):
    return torch.randn(shape).to(torch.bfloat16) * 0.1


def test_blocks_and_scales_are_the_matrices_that_transformers_makes_of_them(tmp_path):
    torch.manual_seed(0)
    D, F, E, H = 64, 32, 3, 16
    shared = {"model.embed_tokens.weight": draw(40, D), "lm_head.weight": draw(40, D)}
    shared["model.norm.weight"] = draw(D)
    packed, whole = {}, {}
    for i in range(2):
        layer = f"model.layers.{i}."
        for name, rows, cols in (("q", 4 * H, D), ("k", 2 * H, D), ("v", 2 * H, D), ("o", D, 4 * H)):
            shared |= {f"{layer}self_attn.{name}_proj.weight": draw(rows, cols)}
            shared |= {f"{layer}self_attn.{name}_proj.bias": draw(rows)}
        shared |= {f"{layer}{name}_layernorm.weight": draw(D) for name in ("input", "post_attention")}
        shared |= {f"{layer}self_attn.sinks": draw(4), f"{layer}mlp.router.weight": draw(E, D)}
        shared |= {f"{layer}mlp.router.bias": draw(E), f"{layer}mlp.experts.down_proj_bias": draw(E, D)}
        shared[f"{layer}mlp.experts.gate_up_proj_bias"] = draw(E, 2 * F)
        for name, rows, groups in (("gate_up_proj", 2 * F, D // 32), ("down_proj", D, F // 32)):
            blocks = torch.randint(0, 256, (E, rows, groups, 16), dtype=torch.uint8)
            scales = torch.randint(118, 124, (E, rows, groups), dtype=torch.uint8)
            packed |= {f"{layer}mlp.experts.{name}_blocks": blocks}
            packed |= {f"{layer}mlp.experts.{name}_scales": scales}
            made = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.bfloat16)
            whole[f"{layer}mlp.experts.{name}"] = made.contiguous()
    for folder, tensors in (("packed", packed), ("whole", whole)):
        (tmp_path / folder).mkdir()
        save_file({**shared, **tensors}, tmp_path / folder / "model.safetensors")
        quantised = {"quantization_config": {"quant_method": "mxfp4"}} if folder == "packed" else {}
        (tmp_path / folder / "config.json").write_text(json.dumps(SIZES | quantised))
    ours, want = (jaxlm.hf.load(tmp_path / folder) for folder in ("packed", "whole"))
    assert ours.cfg == want.cfg
    assert ours.cfg.param_dtype == "bfloat16"
    for (name, a), (_, b) in zip(named_leaves(ours.params), named_leaves(want.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32), name)
    save(ours, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, {**shared, **whole}[name]), name


def test_other_quantisations_are_refused_by_name(tmp_path):
    config = SIZES | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"lm_head.weight": draw(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="quantised by 'fp8' are not read, only 'mxfp4'"):
        jaxlm.hf.load(tmp_path)
