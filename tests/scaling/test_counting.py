"""Counting against closed forms, published numbers, the model's own leaves and XLA's own cost analysis."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from jaxlm.model import encoder_decoder, transformer
from jaxlm.model.attention import AttentionConfig, LatentConfig
from jaxlm.model.config import EncoderConfig
from jaxlm.model.masks import Mask
from jaxlm.model.moe import MoEConfig
from jaxlm.model.positions import PositionConfig
from jaxlm.model.transformer import AXES, TransformerConfig, abstract_params, apply, init, init_cache, unembed
from jaxlm.optim import OptimConfig, make_optimizer
from jaxlm.scaling import count_tables, counting
from jaxlm.scaling.counting import (
    Shape,
    conventions,
    count,
    forward_flops,
    hardware_flops,
    mean_keys,
    weights,
)
from jaxlm.scaling.memory import memory
from jaxlm.sharding import Layout, MeshConfig, describe, make_layout, make_mesh
from jaxlm.train.state import abstract_state
from jaxlm.transforms import stacked
from jaxlm.tree import named_leaves, nbytes, size

GPT2 = TransformerConfig(
    vocab_size=50257,
    num_layers=12,
    model_dim=768,
    activation="gelu_tanh",
    mlp_bias=True,
    norm="layernorm",
    tie_embeddings=True,
    attention=AttentionConfig(num_heads=12, qkv_bias=True, out_bias=True),
    position=PositionConfig(kind="learned", max_length=1024),
)
GPT3 = dataclasses.replace(
    GPT2,
    num_layers=96,
    model_dim=12288,
    attention=AttentionConfig(
        num_heads=96, qkv_bias=True, out_bias=True, pattern=("global", "local"), window=256
    ),
    position=PositionConfig(kind="learned", max_length=2048),
)
LLAMA3_8B = TransformerConfig(
    vocab_size=128256,
    num_layers=32,
    model_dim=4096,
    mlp_dim=14336,
    attention=AttentionConfig(num_heads=32, num_kv_heads=8),
)
MIXTRAL = dataclasses.replace(
    LLAMA3_8B, vocab_size=32000, mlp_pattern=("moe",), moe=MoEConfig(num_experts=8, top_k=2)
)
DEEPSEEK_V3 = TransformerConfig(
    vocab_size=129280,
    num_layers=61,
    model_dim=7168,
    mlp_dim=18432,
    first_dense=3,
    mlp_pattern=("moe",),
    moe=MoEConfig(
        num_experts=256, top_k=8, expert_dim=2048, shared_experts=1, router="sigmoid", bias_balancing=True
    ),
    attention=AttentionConfig(
        num_heads=128,
        latent=LatentConfig(kv_rank=512, q_rank=1536, nope_dim=128, rope_dim=64, value_dim=128),
    ),
)
GPT_OSS_20B = TransformerConfig(
    vocab_size=201088,
    num_layers=24,
    model_dim=2880,
    mlp_dim=2880,
    mlp_pattern=("moe",),
    moe=MoEConfig(num_experts=32, top_k=4, bias=True),
    attention=AttentionConfig(
        num_heads=64, num_kv_heads=8, head_dim=64, sinks=True, qkv_bias=True, out_bias=True
    ),
)
LATENT = AttentionConfig(
    num_heads=4, latent=LatentConfig(kv_rank=128, q_rank=96, nope_dim=64, rope_dim=32, value_dim=48)
)
SMALL = TransformerConfig(vocab_size=512, num_layers=4, model_dim=256, attention=AttentionConfig(num_heads=4))
SMALL_MOE = MoEConfig(
    num_experts=8, top_k=2, expert_dim=512, shared_experts=1, dispatch="capacity", capacity_factor=1.0
)

# --- Parameters ---


@pytest.mark.parametrize(
    ("cfg", "total", "active"),
    [
        (GPT2, 124_439_808, 124_439_808),  # Radford et al. 2019, as loaded from the release
        (GPT3, 174_604_259_328, 174_604_259_328),  # "175B", arXiv:2005.14165; it does not say its window
        (LLAMA3_8B, 8_030_261_248, 8_030_261_248),  # Hugging Face meta-llama/Meta-Llama-3-8B
        (MIXTRAL, 46_702_792_704, 12_879_925_248),  # Hugging Face mistralai/Mixtral-8x7B-v0.1
        (DEEPSEEK_V3, 671_026_419_200, 37_552_297_472),  # "671B total, 37B activated", arXiv:2412.19437
        (GPT_OSS_20B, 20_914_757_184, 4_187_440_704),  # "20.91B", and "3.61B" without the embeddings
    ],
)
def test_published_parameter_counts(cfg, total, active):
    counts = count(cfg, 1024)
    assert counts.n_total == total
    assert counts.n_active == active
    assert (
        counts.n_total
        == counts.n_embedding + counts.n_head + counts.n_non_embedding
        == sum(counts.rooms.values())
    )


def test_rooms_of_a_tied_and_an_untied_model():
    tied, untied = count(GPT2, 1024), count(LLAMA3_8B, 1024)
    assert (tied.n_embedding, tied.n_head) == ((50257 + 1024) * 768, 0)
    assert untied.n_embedding == untied.n_head == 128256 * 4096
    assert untied.rooms["attention"] == 32 * (2 * 4096**2 + 2 * 4096 * 1024)
    assert untied.rooms["mlp"] == 32 * 3 * 4096 * 14336
    assert untied.rooms["norms"] == 65 * 4096


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(norm_position="sandwich", norm="layernorm", mlp_bias=True, tie_embeddings=True),
        dict(norm_position="post", position=PositionConfig(kind="t5")),
        dict(parallel_block=True, position=PositionConfig(kind="learned", max_length=64)),
        dict(encoder=EncoderConfig(num_layers=3, mlp_dim=40)),
        dict(attention=AttentionConfig(num_heads=4, sinks=True, qk_norm=True, qkv_bias=True, out_bias=True)),
        dict(mlp_pattern=("dense", "moe", "moe"), moe=dataclasses.replace(SMALL_MOE, bias_balancing=True)),
        dict(
            attention=AttentionConfig(num_heads=4, pattern=("local", "local", "global"), window=16)
        ),  # with a tail
        dict(
            attention=dataclasses.replace(LATENT, qkv_bias=True, out_bias=True),
            first_dense=1,
            mlp_pattern=("moe",),
            moe=dataclasses.replace(SMALL_MOE, bias=True),
        ),
    ],
)
def test_every_leaf_is_counted_once(changes):
    cfg = dataclasses.replace(SMALL, **changes)
    counted, params = weights(cfg), abstract_params(cfg)
    assert counted.total == size(params) == sum(counted.rooms.values())
    # By the table of layouts, not by the names that counting knows: matrices but for tables and biases.
    products = 0
    for name, leaf in named_leaves(params):
        axes = AXES["/".join(name.split("/")[-2:])]
        if (
            len(axes) > 1
            and not name.startswith(("embed", "position_bias", "head", "pooler", "classifier"))
            and not name.split("/")[-1].startswith("b")
        ):
            products += leaf.size * cfg.moe.top_k // cfg.moe.num_experts if "experts" in axes else leaf.size
    assert counted.body_products == products


def test_every_name_of_the_model_is_known():
    known = (*counting.PRODUCTS, *counting.RELATIVE, *counting.LOOKUPS, *counting.VECTORS)
    assert [key for key in AXES if key.split("/")[-1] not in known] == []


def test_an_unknown_leaf_is_refused(monkeypatch):
    tree = {"blocks": {"0": {"mlp": {"w_new": jnp.zeros((2, 2))}}}}
    monkeypatch.setattr(transformer, "abstract_params", lambda cfg: tree)
    with pytest.raises(ValueError, match="blocks/0/mlp/w_new"):
        weights.__wrapped__(SMALL)  # not the remembered count


# --- FLOPs: conventions ---


def test_gpt2_small_in_every_convention():
    published = {
        "kaplan": 509_607_936,
        "kaplan_attention": 566_231_040,
        "6nd": 741_192_192,
        "porian_attention": 797_815_296,
        "palm": 854_438_400,
        "deepseek": 622_854_144,
        "chinchilla": 1_087_349_760,
        "chinchilla_table_a4": 624_181_248,  # the line above less 6 V d twice over
    }
    assert conventions(Shape.standard(12, 768, 12, 50257), 1024) == published
    assert Shape.of(GPT2) == Shape.standard(12, 768, 12, 50257)
    counts = count(GPT2, 1024)
    assert counts.conventions == published
    assert counts.flops_train == 797_815_296
    assert counts.flops_forward * 3 == counts.flops_train


def test_table_a4_of_chinchilla():
    """Hoffmann et al. 2022, table A4: FLOPs of the appendix over 6 N, T 2048, V 32000; N as in table A9."""
    T, V = 2048, 32000
    rows = [  # layers, d, ff, heads, N in millions, printed ratio
        (10, 640, 2560, 10, 73, 1.03),
        (20, 1024, 4096, 16, 305, 1.10),
        (24, 1280, 5120, 10, 552, 1.08),
        (26, 1792, 7168, 14, 1143, 1.04),
        (28, 2048, 8192, 16, 1593, 1.03),
        (40, 3584, 14336, 28, 6796, 0.99),
    ]
    printed_formula = []
    for n, d, ff, h, millions, ratio in rows:
        # Attention with relative positions: a fifth d x d matrix; biases; two LayerNorms; embeddings once.
        params = n * (5 * d * d + 2 * d * ff + 11 * d + ff) + 2 * d + V * d
        assert params // 10**6 == millions
        flops = conventions(Shape.standard(n, d, h, V, ff), T)
        assert round(flops["chinchilla_table_a4"] / (6 * params), 2) == ratio
        printed_formula.append(flops["chinchilla"] / (6 * params))
    assert round(printed_formula[0], 2) == 1.58  # so the printed formula is not what the table was made with
    assert round(printed_formula[-1], 2) == 1.03


def test_shares_of_a_tiny_model():
    """Causal attention / dense = T / (12 d) and head / dense = V / (12 n d)."""
    cfg = TransformerConfig(
        vocab_size=256, num_layers=3, model_dim=64, activation="gelu", attention=AttentionConfig(num_heads=4)
    )
    counts = count(cfg, 128)
    dense = counts.conventions["kaplan"]
    assert counts.flops_attention / dense == pytest.approx(128 / (12 * 64))
    assert counts.flops_head / dense == pytest.approx(256 / (12 * 3 * 64))
    assert counts.flops_train == dense + counts.flops_attention + counts.flops_head


@pytest.mark.slow
def test_exact_closed_form_of_grouped_gated_windowed_and_routed():
    D, N, K, H, F, V, E, T, w = 64, 8, 2, 16, 96, 128, 4, 64, 24
    cfg = TransformerConfig(
        vocab_size=V,
        num_layers=6,
        model_dim=D,
        mlp_dim=160,
        mlp_pattern=("dense", "moe"),
        attention=AttentionConfig(
            num_heads=N, num_kv_heads=K, head_dim=H, pattern=("local", "local", "global"), window=w
        ),
        moe=MoEConfig(num_experts=E, top_k=2, expert_dim=F, shared_experts=1),
    )
    attention = 6 * (2 * D * N * H + 2 * D * K * H)
    mlps = 3 * 3 * D * 160 + 3 * (2 * 3 * D * F + 3 * D * F + D * E)
    keys = 4 * (w - w * w / (2 * T)) + 2 * T / 2
    assert forward_flops(cfg, T) == 2 * (attention + mlps + D * V) + 4 * N * H * keys
    whole = dataclasses.replace(cfg, attention=dataclasses.replace(cfg.attention, backend="reference"))
    assert forward_flops(whole, T, executed=True) == 2 * (attention + mlps + D * V) + 4 * N * H * 6 * T
    both_ways = dataclasses.replace(cfg, causal=False)
    assert forward_flops(both_ways, T) - forward_flops(cfg, T) == 4 * N * H * keys


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 5, 31, 32, 100])
def test_mean_keys_is_the_mean_of_the_mask(causal, window):
    """The model's own mask, with both ends of a query's reach counted half: T / 2, not (T + 1) / 2."""
    T = 32
    positions = jnp.arange(T)[None]

    def seen(window):
        mask = Mask(positions, positions, causal=causal, window=window)
        return float(jnp.sum(mask.visible_BTS()))

    far_end_half = (seen(window) + seen(window + 1)) / 2 if window else seen(0)
    own_half = T / 2 if causal else 0  # the other way, the query's own key ends the reach to both sides
    expected = (far_end_half - own_half) / T
    assert mean_keys(T, window=window, causal=causal) == pytest.approx(expected, abs=1e-12)


# --- FLOPs: XLA's own count ---

XLA = TransformerConfig(
    vocab_size=4096,
    num_layers=2,
    model_dim=512,
    activation="gelu_tanh",
    scan=False,
    attention=AttentionConfig(num_heads=4),
)
XLA_CASES = {
    "dense": XLA,
    "encoder": dataclasses.replace(
        XLA,
        encoder=EncoderConfig(num_layers=2, mlp_dim=640),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2),
    ),
    "bidirectional": dataclasses.replace(XLA, causal=False),
    "tied": dataclasses.replace(XLA, tie_embeddings=True),
    "grouped": dataclasses.replace(XLA, attention=AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=128)),
    "gated": dataclasses.replace(XLA, activation="swiglu", mlp_dim=1408),
    "windowed": dataclasses.replace(
        XLA, attention=AttentionConfig(num_heads=4, pattern=("local", "global"), window=64)
    ),
    "latent": dataclasses.replace(
        XLA,
        attention=AttentionConfig(
            num_heads=4, latent=LatentConfig(kv_rank=256, q_rank=192, nope_dim=128, rope_dim=64, value_dim=96)
        ),
    ),
    # Capacity factor 1: experts x capacity = top_k x tokens, so XLA's static shapes hold no spare slots.
    "routed": dataclasses.replace(
        XLA, mlp_pattern=("dense", "moe"), activation="swiglu", mlp_dim=768, moe=SMALL_MOE
    ),
}


def xla_flops(cfg, batch, seq_len, *, train):
    """FLOPs per token of the compiled program, by XLA's cost analysis. Nothing is executed."""

    def logits(params, tokens_BT):
        if cfg.has_encoder:  # half as many inputs as tokens
            hidden_BTD, _ = encoder_decoder.apply(cfg, params, tokens_BT[:, ::2], tokens_BT)
        else:
            hidden_BTD, _, _ = apply(cfg, params, tokens_BT)
        return unembed(cfg, params, hidden_BTD)

    def loss(params, tokens_BT):
        logits_BTV = logits(params, tokens_BT)
        picked = jnp.take_along_axis(logits_BTV, tokens_BT[..., None], axis=-1)[..., 0]
        return jnp.sum(jax.nn.logsumexp(logits_BTV, axis=-1) - picked)

    tokens = jax.ShapeDtypeStruct((batch, seq_len), jnp.int32)
    program = jax.jit(jax.grad(loss) if train else logits).lower(abstract_params(cfg), tokens).compile()
    return program.cost_analysis()["flops"] / (batch * seq_len)


@pytest.mark.parametrize(
    ("name", "train"),
    [
        *((name, False) for name in XLA_CASES),
        *(pytest.param(name, True, marks=() if name == "routed" else pytest.mark.slow) for name in XLA_CASES),
    ],
)
def test_exact_formula_agrees_with_xla(name, train):
    """Within 2%, on an unrolled, unchunked model without remat.

    What XLA counts beyond the formula: a backend computes scores that it masks, so the formula is asked for
    the executed ones (for the bidirectional model that is the exact formula itself); and elementwise work
    (norms, softmax, activations), under 2% at these widths. XLA can only be higher.
    """
    cfg, T = XLA_CASES[name], 512
    expected = forward_flops(cfg, T, executed=True, input_len=T // 2) * (3 if train else 1)
    measured = xla_flops(cfg, 1, T, train=train)
    assert 1.0 <= measured / expected < 1.02


@pytest.mark.parametrize("remat", ["none", "minimal", "full"])
def test_hardware_flops_bound_what_remat_executes(remat):
    """Within 5%: elementwise work is computed again too, and a product that no gradient needs is not."""
    cfg = dataclasses.replace(XLA_CASES["gated"], remat=remat)
    assert xla_flops(cfg, 1, 512, train=True) / hardware_flops(cfg, 512) == pytest.approx(1.0, abs=0.05)


# --- Memory ---


def kept_for_backward(cfg, batch, seq_len):
    """Bytes of the scanned layers' residuals, from the shapes that `jax.vjp` closes over."""

    def vjp(params, tokens_BT):
        def outputs(params):
            hidden_BTD, _, aux = apply(cfg, params, tokens_BT)
            return hidden_BTD, aux.get("loss", 0.0)

        return jax.vjp(outputs, params)[1]

    params = abstract_params(cfg)
    residuals = jax.eval_shape(vjp, params, jax.ShapeDtypeStruct((batch, seq_len), jnp.int32))
    stacked = [leaf for leaf in jax.tree.leaves(residuals) if leaf.shape[:1] == (cfg.num_layers,)]
    return nbytes(stacked) - nbytes(params["blocks"])  # weights are kept too, but are no activations


@pytest.mark.parametrize("remat", ["none", "minimal", "full"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(dtype="bfloat16"),
        dict(activation="gelu", norm="layernorm"),
        dict(norm_position="sandwich"),
        dict(norm_position="post"),
        dict(parallel_block=True),
        dict(attention=AttentionConfig(num_heads=4, num_kv_heads=1)),
        dict(mlp_pattern=("moe",), moe=SMALL_MOE),
        dict(attention=LATENT),
    ],
    ids=["gated", "bf16", "gelu", "sandwich", "post", "parallel", "multi-query", "moe", "latent"],
)
def test_activations_are_what_autodiff_keeps(changes, remat):
    cfg = dataclasses.replace(SMALL, remat=remat, num_layers=5, **changes)
    batch, T = 8, 256
    estimate = memory(cfg, batch_size=batch, seq_len=T).activations
    assert estimate == pytest.approx(kept_for_backward(cfg, batch, T), rel=0.04)


def test_memory_of_a_sharded_step():
    cfg = dataclasses.replace(SMALL, mlp_pattern=("dense", "moe"), moe=SMALL_MOE)
    layout = Layout(make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, expert=2)))
    per_device = sum(row.bytes_per_device for row in describe(layout, abstract_params(cfg), AXES))
    one = memory(cfg, batch_size=16, seq_len=64)
    split = memory(cfg, batch_size=16, seq_len=64, layout=layout)
    assert one.params == nbytes(abstract_params(cfg))
    assert split.params == split.grads == per_device < one.params / 3
    assert split.opt_state == 2 * per_device
    assert one.logits == 8 * 16 * 64 * 512
    assert split.logits == one.logits // 8
    assert split.activations < one.activations / 4
    assert memory(cfg, batch_size=16, seq_len=64, layout=layout, microbatches=2).grads == 2 * per_device
    columns = memory(cfg, batch_size=16, seq_len=64, layout=make_layout(MeshConfig(data=1, sequence=4)))
    assert (columns.logits, columns.activations) == (one.logits // 4, round(one.activations / 4))

    optimizer = make_optimizer(OptimConfig(), lambda step: 1e-3)
    state, _ = abstract_state(lambda key: init(cfg, key), optimizer, layout=layout, table=AXES)
    exact = memory(cfg, batch_size=16, seq_len=64, layout=layout, opt_state=state.opt_state).opt_state
    assert 2 * per_device <= exact < 2 * per_device + 1000  # Adam's two moments, and a few counters


def test_what_is_in_the_hosts_memory_is_counted_apart():
    optimizer = make_optimizer(OptimConfig(), lambda step: 1e-3)
    plain = memory(SMALL, batch_size=16, seq_len=64)
    leaves = dict(named_leaves(abstract_params(SMALL)))
    blocks = sum(nbytes(leaf) for name, leaf in leaves.items() if stacked(name))
    largest = blocks // SMALL.num_layers
    assert largest > nbytes(leaves["embed/table"])
    for offload, layers in (("optimizer", 0), ("all", blocks)):
        layout = make_layout(MeshConfig(data=1, offload=offload))
        state, _ = abstract_state(lambda key: init(SMALL, key), optimizer, layout=layout, table=AXES)
        guess = memory(SMALL, batch_size=16, seq_len=64, layout=layout)
        exact = memory(SMALL, batch_size=16, seq_len=64, layout=layout, opt_state=state.opt_state)
        assert guess.opt_state == 0 < exact.opt_state < 100  # counts stay
        assert guess.host == exact.host == plain.opt_state + layers
        assert exact.params == plain.params - layers
        assert guess.update == exact.update == layers + 4 * largest  # two moments of a layer, old and new
        assert exact.total < plain.total - plain.opt_state // 2


def test_memory_of_the_cache_and_of_chunked_logits():
    cfg = dataclasses.replace(
        SMALL, attention=AttentionConfig(num_heads=4, num_kv_heads=2, pattern=("local", "global"), window=16)
    )
    got = memory(cfg, batch_size=3, seq_len=100, logit_tokens=50)
    slots = 2 * 16 + 2 * 100
    assert (
        got.kv_cache
        == 3 * slots * (2 * 2 * 64 * 4 + 4)
        == nbytes(jax.eval_shape(lambda: init_cache(cfg, 3, 100)))
    )
    assert got.logits == 8 * 50 * 512
    held = got.params + got.opt_state + got.activations + got.casts + got.head_grad
    loss, backward = held + got.logits + got.head, held + got.grads + got.layer
    assert got.total == max(loss, backward, got.state + got.grads + got.update)


# --- Results ---


def test_to_dict_is_json_and_tables_print():
    counts, estimate = count(MIXTRAL, 4096), memory(MIXTRAL, batch_size=1, seq_len=4096)
    assert json.loads(json.dumps(counts.to_dict()))["n_active"] == 12_879_925_248
    assert json.loads(json.dumps(estimate.to_dict()))["total"] == estimate.total
    console = Console(width=120, record=True, file=io.StringIO())
    for table in count_tables.tables(counts, estimate):
        console.print(table)
    text = console.export_text()
    for part in ("46,702,792,704", "exact (use this)", "kaplan_attention", "activations"):
        assert part in text


def test_bad_sequence_length():
    with pytest.raises(ValueError, match="seq_len=0"):
        count(SMALL, 0)
