"""RoPE and its context extensions against formulas written apart, ALiBi and T5 against their papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.model.positions import (
    PositionConfig,
    alibi_bias,
    alibi_slopes,
    apply_rope,
    rope_frequencies,
    rope_tables,
    rotary_dim,
    rotate,
    sinusoidal,
    t5_buckets,
)

YARN_64K = PositionConfig(scaling="yarn", factor=16.0, original_length=4096)  # Llama-2 yarn-64k
YARN_DEEPSEEK = PositionConfig(scaling="yarn", factor=40.0, original_length=4096, attention_factor=1.0)
YARN_QWEN = PositionConfig(theta=1e6, scaling="yarn", factor=4.0, original_length=32768)
LLAMA31 = PositionConfig(theta=5e5, scaling="llama3", factor=8.0, original_length=8192)
LLAMA32 = PositionConfig(theta=5e5, scaling="llama3", factor=32.0, original_length=8192)
SCHEMES = [
    PositionConfig(),
    PositionConfig(theta=5e5, fraction=0.5),
    PositionConfig(interleaved=True),
    PositionConfig(interleaved=True, fraction=0.25),
    PositionConfig(scaling="linear", factor=4.0),
    PositionConfig(scaling="ntk", factor=4.0),
    YARN_64K,
    LLAMA31,
]


turn = jax.jit(apply_rope, static_argnames=("attention_factor", "interleaved"))


def x_(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# --- Rotary: the operation ---


@pytest.mark.parametrize("cfg", SCHEMES, ids=lambda c: f"{c.scaling}-{c.fraction}-{c.interleaved}")
def test_scores_depend_on_the_difference_of_positions_only(cfg):
    q_BTNH, k_BTNH = x_(1, 1, 3, 32), x_(1, 1, 3, 32, seed=1)
    inv_freq, factor = rope_frequencies(cfg, 32)

    def score(q_at, k_at):
        q = turn(q_BTNH, jnp.array([[q_at]]), inv_freq, factor, cfg.interleaved)
        k = turn(k_BTNH, jnp.array([[k_at]]), inv_freq, factor, cfg.interleaved)
        return np.asarray((q * k).sum(-1))

    np.testing.assert_allclose(score(7, 3), score(507, 503), rtol=1e-4, atol=1e-4)
    assert np.abs(score(7, 3) - score(8, 3)).max() > 1e-3


@pytest.mark.parametrize("cfg", SCHEMES, ids=lambda c: f"{c.scaling}-{c.fraction}-{c.interleaved}")
def test_rotation_scales_norms_by_the_attention_factor_and_leaves_the_rest(cfg):
    x_BTNH = x_(2, 5, 3, 32)
    positions_BT = jnp.arange(10).reshape(2, 5) * 37
    inv_freq, factor = rope_frequencies(cfg, 32)
    dim = rotary_dim(cfg, 32)
    assert inv_freq.shape == (dim // 2,)
    assert inv_freq.dtype == np.float32
    y_BTNH = turn(x_BTNH, positions_BT, inv_freq, factor, cfg.interleaved)
    np.testing.assert_array_equal(y_BTNH[..., dim:], x_BTNH[..., dim:])
    norms = [np.linalg.norm(a[..., :dim], axis=-1) for a in (x_BTNH, y_BTNH)]
    np.testing.assert_allclose(norms[1], norms[0] * factor, rtol=1e-5)
    np.testing.assert_allclose(y_BTNH[0, 0, :, :dim], x_BTNH[0, 0, :, :dim] * factor, rtol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_complex_multiplication(interleaved):
    x_BTNH = np.asarray(x_(1, 6, 2, 8), np.float64)
    inv_freq, _ = rope_frequencies(PositionConfig(theta=100.0), 8)
    turn_T1R = np.exp(1j * np.arange(6)[:, None, None] * inv_freq.astype(np.float64))
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + 4) for i in range(4)]
    want = np.empty_like(x_BTNH)
    for r, (a, b) in enumerate(pairs):
        z = (x_BTNH[..., a] + 1j * x_BTNH[..., b]) * turn_T1R[..., r]
        want[..., a], want[..., b] = z.real, z.imag
    got = turn(jnp.asarray(x_BTNH, jnp.float32), jnp.arange(6)[None], inv_freq, 1.0, interleaved)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_tables_serve_many_heads_and_bf16_is_rotated_in_fp32():
    inv_freq, factor = rope_frequencies(YARN_64K, 16)
    positions_BT = jnp.arange(8)[None] + 30_000
    cos_BTR, sin_BTR = rope_tables(positions_BT, inv_freq, factor)
    assert cos_BTR.shape == (1, 8, 8)
    assert cos_BTR.dtype == sin_BTR.dtype == jnp.float32
    x_BTNH = x_(1, 8, 4, 16).astype(jnp.bfloat16)
    y_BTNH = rotate(x_BTNH, cos_BTR, sin_BTR)
    assert y_BTNH.dtype == jnp.bfloat16
    want = turn(x_BTNH.astype(jnp.float32), positions_BT, inv_freq, factor)
    np.testing.assert_array_equal(y_BTNH, want.astype(jnp.bfloat16))


# --- Rotary: frequencies, from the papers' formulas ---


def plain(theta, dim):
    return np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])


def oracle_yarn(cfg, dim):
    """Equations 17-23 of arXiv:2309.00071 with the ramp over pair indices of the authors' code."""
    out = []

    def index(turns):  # pair whose wavelength fits `turns` times into the original context
        return dim / 2 * math.log(cfg.original_length / (2 * math.pi * turns)) / math.log(cfg.theta)

    low, high = math.floor(index(cfg.beta_fast)), math.ceil(index(cfg.beta_slow))
    low, high = max(low, 0), min(high, dim - 1)
    for i, f in enumerate(plain(cfg.theta, dim)):
        if i <= low:
            out.append(f)
        elif i >= high:
            out.append(f / cfg.factor)
        else:
            ramp = (i - low) / (high - low)
            out.append(ramp * f / cfg.factor + (1 - ramp) * f)
    return np.array(out)


def oracle_llama3(cfg, dim):
    """`apply_scaling` of the Llama 3.1 reference code, branch by branch."""
    out = []
    for f in plain(cfg.theta, dim):
        wavelength = 2 * math.pi / f
        if wavelength < cfg.original_length / cfg.high_freq_factor:
            out.append(f)
        elif wavelength > cfg.original_length / cfg.low_freq_factor:
            out.append(f / cfg.factor)
        else:
            smooth = (cfg.original_length / wavelength - cfg.low_freq_factor) / (
                cfg.high_freq_factor - cfg.low_freq_factor
            )
            out.append((1 - smooth) * f / cfg.factor + smooth * f)
    return np.array(out)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("cfg", [YARN_64K, YARN_DEEPSEEK, YARN_QWEN], ids=["llama2", "deepseek", "qwen"])
def test_yarn(cfg, dim):
    inv_freq, factor = rope_frequencies(cfg, dim)
    np.testing.assert_allclose(inv_freq, oracle_yarn(cfg, dim), rtol=1e-6)
    base = plain(cfg.theta, dim)
    share = inv_freq / base
    assert share[0] == 1.0
    np.testing.assert_allclose(share[-1], 1 / cfg.factor, rtol=1e-6)
    assert (np.diff(share) <= 1e-7).all()
    assert ((share > 1.01 / cfg.factor) & (share < 0.99)).sum() > 3  # a real ramp between
    want = 1.0 if cfg.attention_factor else 0.1 * math.log(cfg.factor) + 1
    assert factor == pytest.approx(want)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("cfg", [LLAMA31, LLAMA32], ids=["3.1", "3.2"])
def test_llama3(cfg, dim):
    inv_freq, factor = rope_frequencies(cfg, dim)
    np.testing.assert_allclose(inv_freq, oracle_llama3(cfg, dim), rtol=1e-6)
    share = inv_freq / plain(cfg.theta, dim)
    assert factor == 1.0
    assert (np.abs(share[:20] - 1) < 1e-6).sum() > 5
    np.testing.assert_allclose(share[-1], 1 / cfg.factor, rtol=1e-6)


def test_linear_is_position_interpolation():
    inv_freq, factor = rope_frequencies(PositionConfig(scaling="linear", factor=8.0), 64)
    np.testing.assert_allclose(inv_freq, plain(1e4, 64) / 8, rtol=1e-6)
    assert factor == 1.0


def test_ntk_interpolates_the_slowest_pair_only():
    inv_freq, _ = rope_frequencies(PositionConfig(scaling="ntk", factor=8.0), 64)
    np.testing.assert_allclose(inv_freq, plain(1e4 * 8 ** (64 / 62), 64), rtol=1e-6)
    share = inv_freq / plain(1e4, 64)
    assert share[0] == 1.0
    np.testing.assert_allclose(share[-1], 1 / 8, rtol=1e-6)


def test_factor_one_changes_nothing():
    base, _ = rope_frequencies(PositionConfig(), 64)
    for scaling in ("linear", "ntk", "yarn", "llama3"):
        cfg = PositionConfig(scaling=scaling, factor=1.0, original_length=2048)
        inv_freq, factor = rope_frequencies(cfg, 64)
        np.testing.assert_allclose(inv_freq, base, rtol=1e-6)
        assert factor == 1.0


def test_local_layers_use_their_own_base_unscaled():
    yarn = dict(theta=1e6, local_theta=1e4, scaling="yarn", factor=8.0, original_length=4096)
    for cfg in (PositionConfig(**yarn), PositionConfig(**yarn, attention_factor=1.3)):
        inv_freq, factor = rope_frequencies(cfg, 64, local=True)
        np.testing.assert_allclose(inv_freq, plain(1e4, 64), rtol=1e-6)
        assert factor == 1.0
        assert rope_frequencies(cfg, 64)[1] > 1.0
    same = PositionConfig(theta=1e6, scaling="linear", factor=8.0)
    np.testing.assert_array_equal(rope_frequencies(same, 64, local=True)[0], rope_frequencies(same, 64)[0])


# --- Absolute ---


def test_sinusoidal_is_the_papers_formula():
    positions_BT = jnp.array([[0, 1, 50], [7, 0, 3]])
    got = sinusoidal(positions_BT, 10)
    want = np.empty((2, 3, 10))
    for b in range(2):
        for t in range(3):
            for i in range(5):
                angle = int(positions_BT[b, t]) / 10000 ** (2 * i / 10)
                want[b, t, 2 * i], want[b, t, 2 * i + 1] = math.sin(angle), math.cos(angle)
    np.testing.assert_allclose(got, want, atol=1e-5)


# --- ALiBi ---


def test_alibi_slopes_of_the_paper():
    np.testing.assert_allclose(alibi_slopes(8), [1 / 2**i for i in range(1, 9)])
    # 12 heads: the 8 of the power of two below, then 2^-0.5, 2^-1.5.. of 16 heads
    np.testing.assert_allclose(
        alibi_slopes(12), [1 / 2**i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    )
    np.testing.assert_allclose(alibi_slopes(16), [2 ** (-i / 2) for i in range(1, 17)], rtol=1e-6)
    assert alibi_slopes(1).tolist() == [2.0**-8]


def test_alibi_bias_is_minus_slope_times_distance():
    q, k, slopes = jnp.array([[5, 2]]), jnp.array([[0, 2, 9]]), alibi_slopes(2)
    got = np.asarray(alibi_bias(q, k, slopes))
    assert got.shape == (1, 2, 2, 3)
    for n in range(2):
        for t in range(2):
            for s in range(3):
                assert got[0, n, t, s] == pytest.approx(-slopes[n] * abs(int(q[0, t]) - int(k[0, s])))


# --- T5 ---


def literal_t5_bucket(memory_minus_query, bidirectional, num_buckets, max_distance):
    """`_relative_position_bucket` of the Mesh TensorFlow T5 code, one pair at a time."""
    ret, n = 0, -memory_minus_query
    if bidirectional:
        num_buckets //= 2
        ret += num_buckets if n < 0 else 0
        n = abs(n)
    else:
        n = max(n, 0)
    max_exact = num_buckets // 2
    if n < max_exact:
        return ret + n
    # 1e-9: an exact bucket edge must not fall below itself by rounding
    large = math.log(n / max_exact) / math.log(max_distance / max_exact) * (num_buckets - max_exact) + 1e-9
    return ret + min(max_exact + int(large), num_buckets - 1)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (64, 256), (8, 20), (4, 3)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_buckets_match_the_literal_loop(bidirectional, num_buckets, max_distance):
    q_BT, k_BS = jnp.array([[0, 3, 300]]), jnp.arange(0, 600)[None]
    got = np.asarray(
        t5_buckets(
            q_BT, k_BS, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
        )
    )
    want = [
        [literal_t5_bucket(s - q, bidirectional, num_buckets, max_distance) for s in range(600)]
        for q in (0, 3, 300)
    ]
    np.testing.assert_array_equal(got[0], want)
    assert got.dtype == np.int32
    assert got.max() == num_buckets - 1 if bidirectional else got.max() <= num_buckets - 1


# --- Every relative scheme under packing and jit ---


def test_positions_that_restart_give_the_same_tables_as_separate_rows():
    inv_freq, factor = rope_frequencies(LLAMA31, 16)
    packed = jnp.array([[0, 1, 2, 0, 1]])
    cos_BTR, sin_BTR = jax.jit(lambda p: rope_tables(p, inv_freq, factor))(packed)
    np.testing.assert_array_equal(cos_BTR[:, :2], cos_BTR[:, 3:])
    np.testing.assert_array_equal(sin_BTR[:, :2], sin_BTR[:, 3:])
    args = dict(bidirectional=True, num_buckets=8, max_distance=20)
    buckets = t5_buckets(packed, packed, **args)
    np.testing.assert_array_equal(buckets[:, 3:, 3:], t5_buckets(packed[:, :2], packed[:, :2], **args))


# --- Bad input ---


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(kind="rop"), "did you mean 'rope'"),
        (dict(scaling="yarm"), "did you mean 'yarn'"),
        (dict(scaling="yarn", factor=4.0), r"position.original_length=0 must be > 0 with scaling='yarn'"),
        (dict(scaling="llama3", factor=8.0), r"position.original_length=0"),
        (dict(scaling="linear", factor=0.5), r"position.factor=0.5 must be >= 1"),
        (dict(fraction=1.5), r"position.fraction=1.5 must be in \(0, 1\]"),
        (dict(theta=0.0), r"position.theta=0.0 must be > 0"),
        (dict(kind="learned"), r"position.max_length=0 must be > 0"),
        (dict(kind="t5", num_buckets=7), r"position.num_buckets=7 must be even"),
        (dict(kind="t5", max_distance=16), r"position.max_distance=16 must exceed"),
        (dict(scaling="llama3", original_length=8, high_freq_factor=1.0), r"must exceed low_freq_factor=1.0"),
        (dict(scaling="yarn", original_length=8, beta_fast=0.5), r"must exceed beta_slow=1.0"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message):
        PositionConfig(**fields)


def test_of_an_odd_rotated_width_one_more_turns():
    """GPT-NeoX's quarter of 20: frequencies of five dimensions, and six that turn."""
    cfg = PositionConfig(fraction=0.25)
    inv_freq, _ = rope_frequencies(cfg, 20)
    np.testing.assert_allclose(inv_freq, [10000.0 ** (-i / 5) for i in (0, 2, 4)], rtol=1e-6)
    x = jax.random.normal(jax.random.key(0), (1, 1, 1, 20))
    turned = apply_rope(x, jnp.array([[7]]), inv_freq) != x
    assert turned.ravel().tolist() == [True] * 6 + [False] * 14


def test_a_rotated_width_without_pairs_names_the_nearest_fraction():
    with pytest.raises(UserError, match=r"rotates 0 dimensions.*nearest is fraction=0.1 \(2 dimensions\)"):
        rope_frequencies(PositionConfig(fraction=0.01), 20)
    with pytest.raises(UserError, match=r"rotates 5 dimensions.*nearest is fraction=0.8 \(4 dimensions\)"):
        rope_frequencies(PositionConfig(), 5)
    with pytest.raises(UserError, match="even model_dim"):
        sinusoidal(jnp.array([[0]]), 5)
