"""Decoder-only families at their published shapes, each to be trained from scratch.

Claim: one config makes each of them; its parameters are the published ones (`parameters`, to the digit where
the checkpoint is public, else within what its paper rounds).
Command:
    jaxlm prepare --input='data/web/*.parquet' --tokenizer=data/tokenizer.json --out=data/web/shards
    jaxlm train --config=experiments/families/decoders.py:gpt2 --workdir=runs/gpt2
    jaxlm train --config=experiments/families/decoders.py:gpt2:smoke --workdir=runs/gpt2_smoke
Hardware: as `jaxlm config --config=... --devices=N` says for the shape; smoke sizes train on one CPU core.
Expected: not run yet; the smoke sizes are run by the tests, no loss of a published size is claimed.
Last run: none.

`NAME` is a published shape and `NAME:smoke` the same variations at toy size on Python's own source code, byte
tokens. The shapes are written as the checkpoints' own config.json, which `jaxlm.hf` reads: the variations of
a family (norms, positions, biases, branches) stand there, once. Learning rate and tokens a step follow table
2.1 of Brown et al. 2020 (arXiv:2005.14165) by size, whatever the family's own were.
"""

import dataclasses
import os
from typing import Any

from ml_collections import ConfigDict

from jaxlm.config import config_dict_of, default_config
from jaxlm.errors import check, check_choice
from jaxlm.hf.families import FAMILIES
from jaxlm.hf.family import config_of, read_config
from jaxlm.model.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Shape:
    """A published model."""

    fields: dict[str, Any]  # of config.json, with model_type; or without one, of TransformerConfig
    parameters: int  # as published
    seq_len: int  # it was trained on
    source: str
    rounded: float = 0.0  # share of `parameters` that the source rounds away; 0 = counted

    def config(self) -> TransformerConfig:
        """Ours of theirs."""
        if "model_type" not in self.fields:
            return config_of(self.fields)
        return read_config(FAMILIES[self.fields["model_type"]], self.fields)


def llama(layers: int, dim: int, mlp: int, heads: int, vocab: int = 32000, **more: Any) -> dict[str, Any]:
    """config.json in the manner of Llama."""
    sizes = dict(num_hidden_layers=layers, hidden_size=dim, intermediate_size=mlp, num_attention_heads=heads)
    return {"model_type": "llama", "vocab_size": vocab, "num_key_value_heads": heads, **sizes, **more}


def gpt(model_type: str, layers: int, dim: int, heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    """config.json in the manner of GPT-2."""
    return dict(model_type=model_type, n_layer=layers, n_embd=dim, n_head=heads, vocab_size=vocab, **more)


def plain(model_type: str, layers: int, dim: int, heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    """config.json in the manner of those between."""
    sizes = dict(num_hidden_layers=layers, hidden_size=dim, num_attention_heads=heads, vocab_size=vocab)
    return {"model_type": model_type, **sizes, **more}


LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


DEEPSEEK_ROPE = dict(
    rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0
)
GPT3 = "Brown et al. 2020, arXiv:2005.14165, tables 2.1 and D.1"
OSS_ROPE = {**DEEPSEEK_ROPE, "factor": 32.0, "truncate": False}


def palm(layers: int, dim: int, heads: int) -> dict[str, Any]:
    """PaLM: parallel branches, one key/value head, SwiGLU of 4 D, no biases, tied embeddings."""
    return {
        "vocab_size": 256000,
        "num_layers": layers,
        "model_dim": dim,
        "mlp_dim": 4 * dim,
        "activation": "swiglu",
        "norm": "layernorm_scale",
        "parallel_block": True,
        "tie_embeddings": True,
        "attention.num_heads": heads,
        "attention.num_kv_heads": 1,
        "attention.head_dim": 256,
    }


def gpt3(layers: int, dim: int, heads: int) -> dict[str, Any]:
    """GPT-3: GPT-2 on 2,048 tokens, every second layer of which sees a band of the nearest ones.

    How wide the band is was not published; 256 is what GPT-Neo has, which was made after it.
    """
    return {
        "vocab_size": 50257,
        "num_layers": layers,
        "model_dim": dim,
        "mlp_dim": 4 * dim,
        "activation": "gelu_tanh",
        "mlp_bias": True,
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "tie_embeddings": True,
        "attention.num_heads": heads,
        "attention.num_kv_heads": heads,
        "attention.head_dim": dim // heads,
        "attention.qkv_bias": True,
        "attention.out_bias": True,
        "attention.pattern": ("global", "local"),
        "attention.window": 256,
        "position.kind": "learned",
        "position.max_length": 2048,
    }


SHAPES: dict[str, Shape] = {
    "gpt1": Shape(gpt("openai-gpt", 12, 768, 12, 40478), 116_534_784, 512, "Hugging Face openai-gpt"),
    "gpt2": Shape(gpt("gpt2", 12, 768, 12, 50257), 124_439_808, 1024, "Hugging Face gpt2"),
    "gpt2_xl": Shape(gpt("gpt2", 48, 1600, 25, 50257), 1_557_611_200, 1024, "Hugging Face gpt2-xl"),
    "gpt3_125m": Shape(gpt3(12, 768, 12), 125_000_000, 2048, GPT3, 4e-3),
    "gpt3_6_7b": Shape(gpt3(32, 4096, 32), 6_660_000_000, 2048, GPT3, 8e-4),
    "gpt3_175b": Shape(gpt3(96, 12288, 96), 174_600_000_000, 2048, GPT3, 3e-4),
    "gpt_neo_1b": Shape(
        dict(
            model_type="gpt_neo",
            num_layers=24,
            hidden_size=2048,
            num_heads=16,
            vocab_size=50257,
            max_position_embeddings=2048,
            attention_types=[[["global", "local"], 12]],
        ),
        1_315_575_808,
        2048,
        "Hugging Face EleutherAI/gpt-neo-1.3B",
    ),
    "opt_125m": Shape(
        plain("opt", 12, 768, 12, 50272, ffn_dim=3072), 125_239_296, 2048, "Hugging Face facebook/opt-125m"
    ),
    "gptj_6b": Shape(
        gpt("gptj", 28, 4096, 16, 50400, n_positions=2048, rotary_dim=64),
        6_050_882_784,
        2048,
        "Hugging Face EleutherAI/gpt-j-6b",
    ),
    "gpt_neox_20b": Shape(
        plain("gpt_neox", 44, 6144, 64, 50432, intermediate_size=24576),
        20_554_567_680,
        2048,
        "Black et al. 2022, arXiv:2204.06745, section 2.1",
    ),
    "phi_2": Shape(
        plain(
            "phi",
            32,
            2560,
            32,
            51200,
            intermediate_size=10240,
            partial_rotary_factor=0.4,
            hidden_act="gelu_new",
            layer_norm_eps=1e-5,
        ),
        2_779_683_840,
        2048,
        "Hugging Face microsoft/phi-2",
    ),
    "palm_8b": Shape(
        palm(32, 4096, 16), 8_630_000_000, 2048, "Chowdhery et al. 2022, arXiv:2204.02311, table 1", 1e-3
    ),
    "palm_540b": Shape(
        palm(118, 18432, 48), 540_350_000_000, 2048, "Chowdhery et al. 2022, arXiv:2204.02311, table 1", 1e-3
    ),
    "bloom_560m": Shape(
        dict(model_type="bloom", n_layer=24, hidden_size=1024, n_head=16, vocab_size=250880),
        559_214_592,
        2048,
        "Hugging Face bigscience/bloom-560m",
    ),
    "mpt_7b": Shape(
        dict(model_type="mpt", n_layers=32, d_model=4096, n_heads=32, vocab_size=50432),
        6_649_286_656,
        2048,
        "Hugging Face mosaicml/mpt-7b",
    ),
    "falcon_7b": Shape(
        plain("falcon", 32, 4544, 71, 65024), 6_921_720_704, 2048, "Hugging Face tiiuae/falcon-7b, head tied"
    ),
    "falcon_40b": Shape(
        plain("falcon", 60, 8192, 128, 65024, num_kv_heads=8, new_decoder_architecture=True),
        41_303_293_952,
        2048,
        "Hugging Face tiiuae/falcon-40b, head tied",
    ),
    "falcon_rw_1b": Shape(
        plain("falcon", 24, 2048, 32, 50304, alibi=True, bias=True, multi_query=False, parallel_attn=False),
        1_311_625_216,
        2048,
        "Hugging Face tiiuae/falcon-rw-1b",
    ),
    "stablelm_3b": Shape(
        llama(32, 2560, 6912, 32, 50304, model_type="stablelm", partial_rotary_factor=0.25),
        2_795_443_200,
        4096,
        "Hugging Face stabilityai/stablelm-3b-4e1t",
    ),
    "command_r": Shape(
        llama(40, 8192, 22528, 64, 256000, model_type="cohere", rope_theta=8e6),
        34_980_831_232,
        8192,
        "Hugging Face CohereForAI/c4ai-command-r-v01",
    ),
    "llama_7b": Shape(llama(32, 4096, 11008, 32), 6_738_415_616, 2048, "Hugging Face huggyllama/llama-7b"),
    "llama2_70b": Shape(
        llama(80, 8192, 28672, 64, num_key_value_heads=8, rms_norm_eps=1e-5),
        68_976_648_192,
        4096,
        "Hugging Face meta-llama/Llama-2-70b-hf",
    ),
    "llama3_8b": Shape(
        llama(32, 4096, 14336, 32, 128256, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=5e5),
        8_030_261_248,
        8192,
        "Hugging Face meta-llama/Meta-Llama-3-8B",
    ),
    "llama3_1_405b": Shape(
        llama(
            126,
            16384,
            53248,
            128,
            128256,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
            rope_theta=5e5,
            rope_scaling=LLAMA3_ROPE,
        ),
        405_853_388_800,
        8192,
        "Hugging Face meta-llama/Llama-3.1-405B",
    ),
    "smollm3_3b": Shape(
        llama(36, 2048, 11008, 16, 128256, model_type="smollm3", num_key_value_heads=4, rope_theta=5e6),
        3_075_098_624,
        4096,
        "Hugging Face HuggingFaceTB/SmolLM3-3B",
    ),
    "mistral_7b": Shape(
        llama(32, 4096, 14336, 32, model_type="mistral", num_key_value_heads=8, rms_norm_eps=1e-5),
        7_241_732_096,
        8192,
        "Hugging Face mistralai/Mistral-7B-v0.1",
    ),
    "mixtral_8x7b": Shape(
        llama(
            32,
            4096,
            14336,
            32,
            model_type="mixtral",
            num_key_value_heads=8,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        46_702_792_704,
        8192,
        "Hugging Face mistralai/Mixtral-8x7B-v0.1",
    ),
    "qwen2_7b": Shape(
        llama(28, 3584, 18944, 28, 152064, model_type="qwen2", num_key_value_heads=4, rope_theta=1e6),
        7_615_616_512,
        4096,
        "Hugging Face Qwen/Qwen2-7B",
    ),
    "qwen_moe_a2_7b": Shape(
        llama(
            24,
            2048,
            5632,
            16,
            151936,
            model_type="qwen2_moe",
            rope_theta=1e6,
            num_experts=60,
            num_experts_per_tok=4,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
        ),
        14_315_784_192,
        4096,
        "Hugging Face Qwen/Qwen1.5-MoE-A2.7B",
    ),
    "qwen3_8b": Shape(
        llama(36, 4096, 12288, 32, 151936, model_type="qwen3", num_key_value_heads=8, rope_theta=1e6),
        8_190_735_360,
        4096,
        "Hugging Face Qwen/Qwen3-8B",
    ),
    "qwen3_30b_a3b": Shape(
        llama(
            48,
            2048,
            6144,
            32,
            151936,
            model_type="qwen3_moe",
            num_key_value_heads=4,
            head_dim=128,
            rope_theta=1e6,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=True,
        ),
        30_532_122_624,
        4096,
        "Hugging Face Qwen/Qwen3-30B-A3B",
    ),
    "gemma_2b": Shape(
        llama(18, 2048, 16384, 8, 256000, model_type="gemma", num_key_value_heads=1, head_dim=256),
        2_506_172_416,
        8192,
        "Hugging Face google/gemma-2b",
    ),
    "gemma2_2b": Shape(
        llama(26, 2304, 9216, 8, 256000, model_type="gemma2", num_key_value_heads=4, head_dim=256),
        2_614_341_888,
        8192,
        "Hugging Face google/gemma-2-2b",
    ),
    "gemma3_1b": Shape(
        llama(
            26,
            1152,
            6912,
            4,
            262144,
            model_type="gemma3_text",
            num_key_value_heads=1,
            head_dim=256,
            sliding_window=512,
        ),
        999_885_952,
        8192,
        "Hugging Face google/gemma-3-1b-pt",
    ),
    "olmo_1b": Shape(
        llama(16, 2048, 8192, 16, 50304, model_type="olmo", tie_word_embeddings=True),
        1_176_764_416,
        2048,
        "Hugging Face allenai/OLMo-1B-hf",
    ),
    "olmo2_7b": Shape(
        llama(32, 4096, 11008, 32, 100352, model_type="olmo2", rope_theta=5e5),
        7_298_617_344,
        4096,
        "Hugging Face allenai/OLMo-2-1124-7B",
    ),
    "deepseek_v2_lite": Shape(
        llama(
            27,
            2048,
            10944,
            16,
            102400,
            model_type="deepseek_v2",
            q_lora_rank=None,
            n_routed_experts=64,
            num_experts_per_tok=6,
            moe_intermediate_size=1408,
            first_k_dense_replace=1,
            rope_scaling=DEEPSEEK_ROPE | dict(mscale=0.707, mscale_all_dim=0.707),
        ),
        15_706_484_224,
        4096,
        "Hugging Face deepseek-ai/DeepSeek-V2-Lite",
    ),
    "deepseek_v3": Shape(
        llama(
            61,
            7168,
            18432,
            128,
            129280,
            model_type="deepseek_v3",
            n_routed_experts=256,
            rope_scaling=DEEPSEEK_ROPE | dict(mscale=1.0, mscale_all_dim=1.0),
        ),
        671_000_000_000,
        4096,
        "DeepSeek-AI 2024, arXiv:2412.19437, without the modules that predict further tokens",
        1e-3,
    ),
    "gpt_oss_20b": Shape(
        llama(
            24,
            2880,
            2880,
            64,
            201088,
            model_type="gpt_oss",
            num_key_value_heads=8,
            num_local_experts=32,
            num_experts_per_tok=4,
            rope_scaling=OSS_ROPE,
        ),
        20_914_757_184,
        4096,
        "Hugging Face openai/gpt-oss-20b",
    ),
    "gpt_oss_120b": Shape(
        llama(
            36,
            2880,
            2880,
            64,
            201088,
            model_type="gpt_oss",
            num_key_value_heads=8,
            num_local_experts=128,
            num_experts_per_tok=4,
            rope_scaling=OSS_ROPE,
        ),
        116_829_156_672,
        4096,
        "Hugging Face openai/gpt-oss-120b",
    ),
    "olmoe_1b_7b": Shape(
        llama(16, 2048, 1024, 16, 50304, model_type="olmoe", num_experts=64, num_experts_per_tok=8),
        6_919_161_856,
        4096,
        "Hugging Face allenai/OLMoE-1B-7B-0924",
    ),
}

# Of at most so many parameters: learning rate, tokens a step.
RECIPES = (
    (2e8, 6e-4, 2**19),
    (6e8, 3e-4, 2**19),
    (1e9, 2.5e-4, 2**19),
    (2e9, 2e-4, 2**20),
    (5e9, 1.6e-4, 2**20),
    (9e9, 1.2e-4, 2**21),
    (5e10, 1e-4, 2**21),
    (float("inf"), 6e-5, 2**22),
)


def smoke(cfg: TransformerConfig) -> TransformerConfig:
    """The same variations at toy size: two layers or one period of them, bytes."""
    heads = 4
    grouped = {1: 1, cfg.attention.num_heads: heads}.get(cfg.attention.kv_heads, 2)
    latent = cfg.attention.latent
    if latent.kv_rank:
        ranks = dict(kv_rank=16, q_rank=min(latent.q_rank, 24))
        latent = dataclasses.replace(latent, **ranks, nope_dim=8, rope_dim=8, value_dim=16)
    attention = dataclasses.replace(
        cfg.attention,
        num_heads=heads,
        num_kv_heads=grouped,
        head_dim=16,
        window=min(cfg.attention.window, 16),
        latent=latent,
    )
    position = dataclasses.replace(
        cfg.position,
        max_length=min(cfg.position.max_length, 64),
        original_length=min(cfg.position.original_length, 32),
        fraction=max(cfg.position.fraction, 0.25),
    )
    moe = cfg.moe
    if moe.num_experts:
        moe = dataclasses.replace(
            moe,
            num_experts=4,
            top_k=2,
            expert_dim=min(moe.expert_dim, 32),
            shared_dim=min(moe.shared_dim, 32),
            groups=min(moe.groups, 2),
            top_groups=min(moe.top_groups, 1),
        )
    first = min(cfg.first_dense, 1)
    layers = first + max(cfg.period, 2)
    sizes = dict(vocab_size=256, num_layers=layers, first_dense=first, model_dim=64, mlp_dim=128)
    return dataclasses.replace(cfg, **sizes, attention=attention, position=position, moe=moe)


def get_config(arg: str = "gpt2") -> ConfigDict:
    name, _, size = arg.partition(":")
    check_choice(name, SHAPES, "--config: shape after the colon")
    check_choice(size, ("", "smoke"), "--config: size after the shape")
    shape, config = SHAPES[name], default_config()
    model = shape.config()
    _, lr, tokens = next(row for row in RECIPES if shape.parameters <= row[0])
    check(tokens % shape.seq_len == 0, f"{tokens} tokens a step are no whole rows of {shape.seq_len}")

    config.data.tokenizer = "data/tokenizer.json"
    config.data.train, config.data.eval = "data/web/shards", "data/web/eval/*.parquet"
    config.data.seq_len, config.data.batch_size = shape.seq_len, tokens // shape.seq_len
    config.optim.lr, config.optim.warmup = lr, 0.01
    config.mesh.data, config.mesh.fsdp = 1, -1
    train = config.train
    train.num_steps = 20 * shape.parameters // tokens  # Hoffmann et al. 2022: 20 tokens a parameter
    train.eval_every = train.save_every = 1000
    model = dataclasses.replace(model, dtype="bfloat16", remat="full")

    if size == "smoke":
        stdlib = os.path.dirname(os.__file__)
        data = config.data
        data.tokenizer, data.train, data.eval = "byte", f"{stdlib}/asyncio/*.py", f"{stdlib}/json/*.py"
        data.seq_len, data.batch_size, data.eval_tokens = 32, 16, 8192
        model = dataclasses.replace(smoke(model), dtype="float32", remat="none")
        # Logits that are scaled down move little in a few steps.
        config.optim.lr, config.optim.warmup = 3e-3 if model.logit_scale >= 1 else 3e-2, 0.1
        config.sample.max_new_tokens = 16
        config.mesh.data, config.mesh.fsdp = -1, 1
        train.num_steps, train.log_every, train.eval_every, train.save_every = 20, 5, 0, 0
    config.model = config_dict_of(model)
    return config
