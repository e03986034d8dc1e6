"""Tiny random checkpoints of every family, made with `transformers`, of sizes that hide no mistake.

Six heads, two of keys, 24 wide: no dimension equals another by accident. Norms and biases are random too.
"""

from pathlib import Path
from typing import Any

SIZES = dict(
    vocab_size=307,
    hidden_size=72,
    intermediate_size=88,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GPT = dict(vocab_size=307, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)
MOE = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=40)
LATENT = SIZES | dict(
    num_key_value_heads=6,
    kv_lora_rank=20,
    q_lora_rank=28,
    qk_nope_head_dim=10,
    qk_rope_head_dim=8,
    v_head_dim=14,
    n_routed_experts=6,
    n_shared_experts=1,
    moe_intermediate_size=40,
)

# case -> (model_type, fields of its config)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES | dict(head_dim=24)),
    "llama-tied-biases": (
        "llama",
        SIZES | dict(head_dim=24, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ),
    "llama-3.1": ("llama", SIZES | dict(rope_parameters=LLAMA3)),
    "llama-linear": (
        "llama",
        SIZES | dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)),
    ),
    "llama-dynamic": (
        "llama",
        SIZES
        | dict(
            max_position_embeddings=12, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
        ),
    ),
    "llama-yarn": ("llama", SIZES | dict(rope_parameters=YARN)),
    "llama-longrope": (
        "llama",
        SIZES
        | dict(
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=1e4,
                factor=4.0,
                short_factor=[1.0 + 0.1 * i for i in range(6)],
                long_factor=[2.0 + 0.3 * i for i in range(6)],
                original_max_position_embeddings=8,
            )
        ),
    ),
    "mistral": ("mistral", SIZES | dict(head_dim=24, sliding_window=7)),
    "mixtral": ("mixtral", SIZES | dict(num_local_experts=5, num_experts_per_tok=2, sliding_window=None)),
    "qwen2": ("qwen2", SIZES),
    "qwen2-window": ("qwen2", SIZES | dict(use_sliding_window=True, sliding_window=7, max_window_layers=1)),
    "qwen3": ("qwen3", SIZES | dict(head_dim=24)),
    "qwen2-moe": (
        "qwen2_moe",
        SIZES | MOE | dict(shared_expert_intermediate_size=56, decoder_sparse_step=2, norm_topk_prob=False),
    ),
    "qwen3-moe": ("qwen3_moe", SIZES | MOE | dict(head_dim=24, norm_topk_prob=True)),
    "gpt-oss": (
        "gpt_oss",
        SIZES
        | dict(head_dim=24, num_local_experts=5, num_experts_per_tok=2, sliding_window=7, swiglu_limit=1.0),
    ),
    "gpt-oss-yarn": (
        "gpt_oss",
        SIZES
        | dict(
            head_dim=24,
            num_local_experts=5,
            num_experts_per_tok=3,
            sliding_window=5,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
            rope_parameters=YARN | dict(truncate=False),
        ),
    ),
    "deepseek-v2": (
        "deepseek_v2",
        LATENT | dict(q_lora_rank=None, num_experts_per_tok=3, n_shared_experts=2),
    ),
    "deepseek-v2-groups": (
        "deepseek_v2",
        LATENT
        | dict(
            topk_method="group_limited_greedy",
            n_group=3,
            topk_group=2,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            routed_scaling_factor=1.5,
            rope_parameters=YARN | dict(mscale=0.707, mscale_all_dim=0.707),
        ),
    ),
    "deepseek-v3": (
        "deepseek_v3",
        LATENT | dict(n_group=3, topk_group=2, num_experts_per_tok=3, first_k_dense_replace=1),
    ),
    "deepseek-v3-yarn": (
        "deepseek_v3",
        LATENT
        | dict(
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=2,
            q_lora_rank=None,
            attention_bias=True,
            norm_topk_prob=False,
            rope_interleave=False,
            rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.5),
        ),
    ),
    "gemma": ("gemma", SIZES | dict(head_dim=24)),
    "gemma2": ("gemma2", SIZES | dict(head_dim=24, sliding_window=7, query_pre_attn_scalar=20)),
    "gemma3": (
        "gemma3_text",
        SIZES
        | dict(
            head_dim=24,
            sliding_window=7,
            query_pre_attn_scalar=20,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            rope_parameters={
                "full_attention": dict(rope_type="linear", rope_theta=1e6, factor=8.0),
                "sliding_attention": dict(rope_type="default", rope_theta=1e4),
            },
        ),
    ),
    "olmo": ("olmo", SIZES | dict(clip_qkv=0.3)),
    "olmo2": ("olmo2", SIZES),
    "olmoe": ("olmoe", SIZES | dict(num_experts=5, num_experts_per_tok=2, clip_qkv=0.5)),
    "smollm3": ("smollm3", SIZES | dict(no_rope_layers=[1, 1, 0])),
    "stablelm": ("stablelm", SIZES | dict(use_qkv_bias=True, partial_rotary_factor=0.5)),
    "stablelm-parallel": (
        "stablelm",
        SIZES | dict(use_parallel_residual=True, qk_layernorm=True, partial_rotary_factor=0.5),
    ),
    "cohere": ("cohere", SIZES | dict(use_qk_norm=True)),
    "phi": ("phi", SIZES | dict(partial_rotary_factor=0.5)),
    "phi-qk-norm": ("phi", SIZES | dict(partial_rotary_factor=0.5, qk_layernorm=True)),
    "gpt2": ("gpt2", GPT | dict(n_embd=72, n_layer=3, n_head=6, n_positions=64, n_inner=100)),
    "gpt-neo": (
        "gpt_neo",
        GPT
        | dict(
            hidden_size=72,
            num_layers=3,
            num_heads=6,
            intermediate_size=100,
            max_position_embeddings=64,
            attention_types=[[["global", "local"], 1], [["local"], 1]],
            window_size=7,
        ),
    ),
    "gpt-j": ("gptj", GPT | dict(n_embd=72, n_layer=3, n_head=6, n_positions=64, rotary_dim=8)),
    "gpt-neox": ("gpt_neox", SIZES | dict(rotary_pct=0.5)),
    "gpt-neox-serial": (
        "gpt_neox",
        SIZES | dict(use_parallel_residual=False, attention_bias=False, rotary_pct=0.5),
    ),
    "opt": (
        "opt",
        GPT
        | dict(
            hidden_size=72,
            num_hidden_layers=3,
            ffn_dim=88,
            num_attention_heads=6,
            max_position_embeddings=64,
            word_embed_proj_dim=72,
        ),
    ),
    "bloom": ("bloom", GPT | dict(hidden_size=72, n_layer=3, n_head=6)),
    "mpt": ("mpt", GPT | dict(d_model=72, n_layers=3, n_heads=6, max_seq_len=64)),
    "falcon-7b": (
        "falcon",
        GPT | dict(hidden_size=72, num_hidden_layers=3, num_attention_heads=6),
    ),
    "falcon-40b": (
        "falcon",
        GPT
        | dict(
            hidden_size=72,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_kv_heads=2,
            new_decoder_architecture=True,
        ),
    ),
    "falcon-11b": (
        "falcon",
        GPT
        | dict(
            hidden_size=72,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_kv_heads=2,
            new_decoder_architecture=True,
            num_ln_in_parallel_attn=1,
            ffn_hidden_size=100,
        ),
    ),
    "falcon-rw": (
        "falcon",
        GPT
        | dict(
            hidden_size=72,
            num_hidden_layers=3,
            num_attention_heads=6,
            alibi=True,
            multi_query=False,
            parallel_attn=False,
            bias=True,
        ),
    ),
    "gpt-1": ("openai-gpt", GPT | dict(n_embd=72, n_layer=3, n_head=6, n_positions=64)),
}

DISTIL = dict(vocab_size=307, dim=72, n_layers=3, n_heads=6, hidden_dim=88, max_position_embeddings=64)
BERT = dict(vocab_size=307, hidden_size=72, num_hidden_layers=3, num_attention_heads=6, intermediate_size=88)
# Encoders, and classes that are no language models: case -> (model_type, class, fields of its config)
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("bert", "BertForMaskedLM", BERT | dict(max_position_embeddings=64)),
    "bert-pooler": ("bert", "BertModel", BERT | dict(max_position_embeddings=64)),
    "roberta": (
        "roberta",
        "RobertaForMaskedLM",
        BERT | dict(max_position_embeddings=66, type_vocab_size=1, pad_token_id=1),
    ),
    "xlm-roberta": (
        "xlm-roberta",
        "XLMRobertaForMaskedLM",
        BERT | dict(max_position_embeddings=66, type_vocab_size=1, pad_token_id=1),
    ),
    "distilbert": (
        "distilbert",
        "DistilBertForMaskedLM",
        DISTIL,
    ),
}
for _model_type, _name, _fields in (
    ("bert", "Bert", BERT | dict(max_position_embeddings=64)),
    ("roberta", "Roberta", BERT | dict(max_position_embeddings=66, type_vocab_size=2, pad_token_id=1)),
    ("distilbert", "DistilBert", DISTIL),
):
    for _end in ("ForSequenceClassification", "ForTokenClassification"):
        _case = f"{_model_type}-{_end}"
        ENCODERS[_case] = (_model_type, f"{_name}{_end}", _fields | dict(num_labels=5))
for _end in ("ForPreTraining", "ForNextSentencePrediction", "ForQuestionAnswering"):
    ENCODERS[f"bert-{_end}"] = ("bert", f"Bert{_end}", BERT | dict(max_position_embeddings=64))
ALBERT = BERT | dict(max_position_embeddings=64, embedding_size=40)
GROUPED = ALBERT | dict(num_hidden_layers=4, num_hidden_groups=2)
ELECTRA = BERT | dict(max_position_embeddings=64, embedding_size=40)
DEBERTA = BERT | dict(
    max_position_embeddings=64,
    relative_attention=True,
    position_buckets=6,
    max_relative_positions=12,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    pos_att_type="p2c|c2p",
    position_biased_input=False,
)
OWN = DEBERTA | dict(share_att_key=False, norm_rel_ebd="none", position_buckets=-1, type_vocab_size=3)
ENCODERS |= {
    "albert-ForMaskedLM": ("albert", "AlbertForMaskedLM", GROUPED),
    "albert-ForPreTraining": ("albert", "AlbertForPreTraining", ALBERT | dict(hidden_act="gelu")),
    "albert-ForSequenceClassification": (
        "albert",
        "AlbertForSequenceClassification",
        ALBERT | dict(inner_group_num=2, num_hidden_layers=2),
    ),
    "electra-ForPreTraining": ("electra", "ElectraForPreTraining", ELECTRA),
    "electra-ForMaskedLM": ("electra", "ElectraForMaskedLM", ELECTRA),
    "electra-ForSequenceClassification": (
        "electra",
        "ElectraForSequenceClassification",
        ELECTRA | dict(embedding_size=72),
    ),
    "deberta-ForMaskedLM": ("deberta-v2", "DebertaV2ForMaskedLM", DEBERTA),
    "deberta-own-projections": ("deberta-v2", "DebertaV2ForSequenceClassification", OWN),
    "deberta-c2p": ("deberta-v2", "DebertaV2Model", OWN | dict(pos_att_type=["c2p"])),
    "deberta-p2c": (
        "deberta-v2",
        "DebertaV2ForTokenClassification",
        DEBERTA | dict(pos_att_type=["p2c"], position_biased_input=True),
    ),
    "deberta-convolution": (
        "deberta-v2",
        "DebertaV2ForMaskedLM",
        DEBERTA | dict(conv_kernel_size=3, conv_act="gelu", pooler_hidden_act="tanh"),
    ),
    "deberta-absolute": ("deberta-v2", "DebertaV2Model", BERT | dict(max_position_embeddings=64)),
}
# Decoders that classify.
for _case, _name in (("llama", "Llama"), ("gpt2", "GPT2"), ("gpt-neox", "GPTNeoX"), ("gpt-j", "GPTJ")):
    for _end in ("ForSequenceClassification", "ForTokenClassification", "Model"):
        if (_name, _end) != ("GPTJ", "ForTokenClassification"):  # there is none
            _model_type, _fields = CASES[_case]
            ENCODERS[f"{_case}-{_end}"] = (_model_type, f"{_name}{_end}", _fields | dict(num_labels=5))

T5 = dict(
    vocab_size=307,
    d_model=72,
    d_kv=24,
    d_ff=88,
    num_layers=3,
    num_decoder_layers=2,
    num_heads=6,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    pad_token_id=0,
    eos_token_id=1,
    decoder_start_token_id=0,
)
BART = dict(
    vocab_size=307,
    d_model=72,
    encoder_layers=3,
    encoder_attention_heads=4,
    encoder_ffn_dim=88,
    decoder_layers=2,
    decoder_attention_heads=6,
    decoder_ffn_dim=96,
    max_position_embeddings=64,
)
MARIAN = BART | dict(
    activation_function="swish",
    pad_token_id=306,
    decoder_start_token_id=306,
    eos_token_id=0,
    forced_eos_token_id=0,
    scale_embedding=True,
)
# case -> (model_type, class, fields of its config)
SEQ2SEQ: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("t5", "T5ForConditionalGeneration", T5),
    "t5-1.1": (
        "t5",
        "T5ForConditionalGeneration",
        T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "t5-1.1-untied": (
        "t5",
        "T5ForConditionalGeneration",
        T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "mt5-untied": ("mt5", "MT5ForConditionalGeneration", T5 | dict(feed_forward_proj="gated-gelu")),
    "bart": ("bart", "BartForConditionalGeneration", BART | dict(forced_bos_token_id=0)),
    "bart-bare": ("bart", "BartModel", BART | dict(scale_embedding=True)),
    "bart-untied": ("bart", "BartForConditionalGeneration", BART | dict(tie_word_embeddings=False)),
    "marian": ("marian", "MarianMTModel", MARIAN),
    "marian-split": (
        "marian",
        "MarianMTModel",
        MARIAN
        | dict(share_encoder_decoder_embeddings=False, decoder_vocab_size=311, tie_word_embeddings=False),
    ),
    "m2m-100": ("m2m_100", "M2M100ForConditionalGeneration", BART),
}


def make(case: str, folder: Path) -> Any:
    """Write the case's checkpoint into `folder`; returns the model in eval mode."""
    import torch
    import transformers

    model_type, *top, fields = {**CASES, **ENCODERS, **SEQ2SEQ}[case]
    torch.manual_seed(sum(map(ord, case)))
    config = transformers.AutoConfig.for_model(model_type, **fields)
    # Their eager code adds ALiBi twice where the positions are Falcon's.
    config._attn_implementation = "sdpa" if model_type == "falcon" else "eager"
    if top:
        model = getattr(transformers, top[0])._from_config(config).float().eval()
    else:
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    if "forced_bos_token_id" in fields:
        model.generation_config.forced_bos_token_id = fields["forced_bos_token_id"]
    if case.endswith("-untied"):  # as the published ones are, whatever the class makes of its config
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with torch.no_grad():
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(0.3 * torch.randn(model.final_logits_bias.shape))
        for name, p in model.named_parameters():
            if not p.requires_grad:  # Marian's sines
                continue
            if p.ndim == 1 or "bias" in name:
                p.copy_(0.3 * torch.randn(p.shape) + (1.0 if "norm" in name or "ln_" in name else 0.0))
            else:
                p.copy_(torch.randn(p.shape) * (0.5 if "embed" in name else 1.5 * p.shape[-1] ** -0.5))
            if name.endswith("Attention.q.weight"):  # T5 does not scale its scores: its weights do
                p.mul_(config.d_kv**-0.5)
        for name, b in model.named_buffers():
            if "correction_bias" in name:
                b.copy_(0.1 * torch.randn(b.shape))
    model.save_pretrained(folder)
    return model
