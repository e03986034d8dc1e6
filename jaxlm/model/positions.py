"""Where a token stands: rotary tables, sinusoids, ALiBi and T5 biases, as pure functions of positions.

Every function takes explicit positions, so packed rows (positions restart with each document), left padding
and decoding at any offset are the same code. A model computes tables and biases once, not once per layer.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from jaxlm.errors import UserError, check, check_choice

KINDS = ("rope", "alibi", "learned", "sinusoidal", "t5", "none")
SINES = ("interleaved", "halves", "inclusive")
SCALINGS = ("none", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope")
BY_LENGTH = ("dynamic", "longrope")  # whose frequencies depend on the batch, see `dynamic_frequencies`


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    """Which position scheme a model uses, and its constants."""

    kind: str = "rope"  # rope | alibi | learned | sinusoidal | t5 | none
    theta: float = 10000.0  # RoPE base: pair i turns theta ** (-2 i / R) radians per token
    local_theta: float = 0.0  # RoPE base of local layers, then not scaled; 0 = as global layers
    fraction: float = 1.0  # leading share of head_dim that rotates (partial RoPE)
    interleaved: bool = False  # pairs are (0, 1), (2, 3).. as in GPT-J; default pairs are (i, i + R/2)
    scaling: str = "none"  # context extension, name in SCALINGS
    factor: float = 1.0  # context extension ratio, >= 1
    original_length: int = 0  # tokens of context before extension (dynamic, yarn, llama3, longrope)
    low_freq_factor: float = 1.0  # llama3: wavelengths above original_length / this are fully interpolated
    high_freq_factor: float = 4.0  # llama3: wavelengths below original_length / this are left alone
    beta_fast: float = 32.0  # yarn: pairs with more turns than this in original_length are left alone
    beta_slow: float = 1.0  # yarn: pairs with fewer turns than this are fully interpolated
    beta_round: bool = True  # yarn: the pairs of these numbers of turns are rounded outwards to whole ones
    short_factors: tuple[float, ...] = ()  # longrope: what each pair's frequency is divided by,
    long_factors: tuple[float, ...] = ()  # and from more than original_length positions on
    attention_factor: float = 0.0  # multiplies cos and sin; 0 = by formula (yarn: 0.1 ln factor + 1)
    max_length: int = 0  # positions in the learned table
    offset: int = 0  # learned, sinusoidal: row of position 0 (OPT: 2)
    sines: str = "interleaved"  # sinusoidal: order and range of frequencies, see `sinusoidal`
    bias_scale: float = 1.0  # alibi: multiplies the slopes
    num_buckets: int = 32  # t5: rows of the bias table
    max_distance: int = 128  # t5: distances from here on share the last bucket

    def __post_init__(self):
        check_choice(self.kind, KINDS, "position.kind")
        check_choice(self.scaling, SCALINGS, "position.scaling")
        check_choice(self.sines, SINES, "position.sines")
        for name in ("theta", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "must be > 0")
        for name in ("local_theta", "attention_factor", "original_length", "max_length", "offset"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must be >= 0")
        _require(0 < self.fraction <= 1, "fraction", self.fraction, "must be in (0, 1]")
        _require(self.factor >= 1, "factor", self.factor, "must be >= 1 (the context grows by it)")
        _require(self.bias_scale > 0, "bias_scale", self.bias_scale, "must be > 0")
        for name in ("short_factors", "long_factors"):
            factors = getattr(self, name)
            ok = bool(factors) == (self.scaling == "longrope") and all(f > 0 for f in factors)
            _require(ok, name, factors, "must hold positive numbers with scaling='longrope', and none else")
        if self.scaling in ("dynamic", "yarn", "llama3", "longrope"):
            _require(
                self.original_length > 0,
                "original_length",
                self.original_length,
                f"must be > 0 with scaling={self.scaling!r}: the context length before the extension",
            )
        if self.scaling == "llama3":
            _require(
                self.high_freq_factor > self.low_freq_factor,
                "high_freq_factor",
                self.high_freq_factor,
                f"must exceed low_freq_factor={self.low_freq_factor}",
            )
        if self.scaling == "yarn":
            _require(
                self.beta_fast > self.beta_slow,
                "beta_fast",
                self.beta_fast,
                f"must exceed beta_slow={self.beta_slow}",
            )
            _require(self.theta > 1, "theta", self.theta, "must be > 1 with scaling='yarn'")
        if self.kind == "learned":
            _require(
                self.max_length > 0,
                "max_length",
                self.max_length,
                "must be > 0 with kind='learned': the longest context, in tokens",
            )
        if self.kind == "t5":
            _require(self.num_buckets >= 4, "num_buckets", self.num_buckets, "must be >= 4")
            _require(self.num_buckets % 2 == 0, "num_buckets", self.num_buckets, "must be even")
            _require(
                self.max_distance > self.num_buckets // 2,
                "max_distance",
                self.max_distance,
                f"must exceed num_buckets / 2 = {self.num_buckets // 2}",
            )


def _require(ok: bool, name: str, value: object, rule: str) -> None:
    check(ok, f"position.{name}={value!r} {rule}")


# --- Rotary ---


def rotary_dim(cfg: PositionConfig, head_dim: int) -> int:
    """Number R of leading head dimensions that rotate; of an odd R one more does, to make (R + 1) / 2 pairs.

    >>> rotary_dim(PositionConfig(fraction=0.25), 64)
    16

    Raises:
        UserError: R is zero, or odd and the whole head.
    """
    dim = int(head_dim * cfg.fraction + 1e-6)  # 0.29 * 100 is 28.999..
    if dim < 1 or dim + dim % 2 > head_dim:
        even = max(2, dim - dim % 2)
        raise UserError(
            f"position.fraction={cfg.fraction} of head_dim={head_dim} rotates {dim} dimensions, which must "
            f"be positive and go in pairs; nearest is fraction={even / head_dim:g} ({even} dimensions)"
        )
    return dim


def rope_frequencies(
    cfg: PositionConfig, head_dim: int, *, local: bool = False
) -> tuple[Float32[np.ndarray, " R/2"], float]:
    """Angular frequencies of rotary embeddings, scaled for a longer context as `cfg` says.

    With f_i = theta ** (-2 i / R), wavelength l_i = 2 pi / f_i, factor s and original context L:

        none    f_i
        linear  f_i / s
        ntk     theta -> theta * s ** (R / (R - 2)): the slowest pair is interpolated by s, the fastest not
        yarn    f_i / s * (1 - g_i) + f_i * g_i; g = 1 for pairs that turn > beta_fast times in L, 0 for
                < beta_slow, linear in the pair's index between (ends rounded as in the authors' code)
        dynamic f_i here; see `dynamic_frequencies`
        longrope f_i / short_factors_i here; see `dynamic_frequencies`
        llama3  f_i for l_i < L / high_freq_factor, f_i / s for l_i > L / low_freq_factor, and between them
                blended linearly in L / l_i

    Args:
        cfg: position constants.
        head_dim: width of a head; the leading `cfg.fraction` of it rotates.
        local: for sliding-window layers; with `cfg.local_theta` > 0 they use that base and no scaling.

    Returns:
        inv_freq: float32 [R/2], radians per token.
        attention_factor: multiplies cos and sin; `cfg.attention_factor`, or 0.1 ln(s) + 1 for yarn, or
            sqrt(1 + ln(s) / ln(L)) for longrope, or 1.

    Sources: Su et al. 2021 (arXiv:2104.09864); linear: Chen et al. 2023 (arXiv:2306.15595); ntk and yarn:
    Peng et al. 2023 (arXiv:2309.00071); llama3: the Llama 3.1 reference code; longrope: arXiv:2402.13753.

    >>> inv_freq, factor = rope_frequencies(PositionConfig(theta=10000.0), 4)
    >>> inv_freq.tolist(), factor
    ([1.0, 0.009999999776482582], 1.0)
    """
    dim = rotary_dim(cfg, head_dim)
    own_base = local and cfg.local_theta > 0
    theta = cfg.local_theta if own_base else cfg.theta
    scaling = "none" if own_base else cfg.scaling
    if scaling == "ntk":
        if dim < 4:
            raise UserError(f"position.scaling='ntk' needs at least 4 rotated dimensions, not {dim}")
        theta = theta * cfg.factor ** (dim / (dim - 2))
    inv_freq = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    factor = 1.0
    if scaling == "linear":
        inv_freq = inv_freq / cfg.factor
    elif scaling == "yarn":
        keep = 1.0 - _yarn_ramp(cfg, theta, dim)
        inv_freq = inv_freq / cfg.factor * (1.0 - keep) + inv_freq * keep
        factor = 0.1 * math.log(cfg.factor) + 1.0
    elif scaling == "longrope":
        inv_freq = inv_freq / _by_pair(cfg.short_factors, dim)
        factor = math.sqrt(1.0 + math.log(cfg.factor) / math.log(cfg.original_length))
    elif scaling == "llama3":
        turns = cfg.original_length * inv_freq / (2 * math.pi)  # in the original context
        keep = (turns - cfg.low_freq_factor) / (cfg.high_freq_factor - cfg.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        inv_freq = inv_freq / cfg.factor * (1.0 - keep) + inv_freq * keep
    if cfg.attention_factor > 0 and not own_base:
        factor = cfg.attention_factor
    return inv_freq.astype(np.float32), float(factor)


def dynamic_frequencies(
    cfg: PositionConfig, head_dim: int, positions_BT: Int[Array, "B T"]
) -> Float32[Array, " R/2"]:
    """Frequencies that a batch of n positions needs, for scalings that change once n exceeds L.

        dynamic  theta -> theta * (s n / L - (s - 1)) ** (R / (R - 2)),  n at least L
        longrope f_i / long_factors_i in place of f_i / short_factors_i

    Keys that were cached under a shorter n keep the rotation that they got, as elsewhere.
    """
    dim = rotary_dim(cfg, head_dim)
    if cfg.scaling == "longrope":
        longer = jnp.max(positions_BT) + 1 > cfg.original_length
        short, long = (jnp.asarray(_by_pair(f, dim)) for f in (cfg.short_factors, cfg.long_factors))
        return cfg.theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim) / jnp.where(longer, long, short)
    n = jnp.maximum(jnp.max(positions_BT) + 1, cfg.original_length).astype(jnp.float32)
    theta = cfg.theta * (cfg.factor * n / cfg.original_length - (cfg.factor - 1)) ** (dim / (dim - 2))
    return theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def _by_pair(factors: tuple[float, ...], dim: int) -> np.ndarray:
    check(
        len(factors) == (dim + 1) // 2,
        f"position: {len(factors)} long or short factors, but {dim} rotated dimensions make {(dim + 1) // 2} "
        "pairs",
    )
    return np.asarray(factors, np.float32)


def _yarn_ramp(cfg: PositionConfig, theta: float, dim: int) -> np.ndarray:
    """Share of interpolation of every pair: 0 for fast pairs, 1 for slow ones."""

    def pair_of(turns):  # index of the pair that makes this many turns in the original context
        return dim * math.log(cfg.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(cfg.beta_fast), pair_of(cfg.beta_slow)
    if cfg.beta_round:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = max(high - low, 0.001)  # both ends on one pair: a step
    return np.clip((np.arange((dim + 1) // 2) - low) / width, 0.0, 1.0)


def rope_tables(
    positions_BT: Int[Array, "B T"], inv_freq: Float[np.ndarray, " R"], attention_factor: float = 1.0
) -> tuple[Float32[Array, "B T R"], Float32[Array, "B T R"]]:
    """Cosines and sines of every position's angles, for all heads, layers, queries and keys that share them.

    Args:
        positions_BT: integer positions.
        inv_freq: radians per token of R pairs.
        attention_factor: multiplies both tables.

    Returns:
        cos_BTR, sin_BTR in float32, R = number of pairs.
    """
    angle_BTR = positions_BT.astype(jnp.float32)[..., None] * jnp.asarray(inv_freq, jnp.float32)
    cos_BTR, sin_BTR = jnp.cos(angle_BTR), jnp.sin(angle_BTR)
    if attention_factor == 1.0:
        return cos_BTR, sin_BTR
    return cos_BTR * attention_factor, sin_BTR * attention_factor


def rotate(
    x_BTNH: Float[Array, "B T N H"],
    cos_BTR: Float32[Array, "B T R"],
    sin_BTR: Float32[Array, "B T R"],
    interleaved: bool = False,
) -> Float[Array, "B T N H"]:
    """Turn each pair (a, b) of the leading 2 R dimensions: (a cos - b sin, b cos + a sin); the rest passes.

    Computed in float32, returned in x's dtype.

    Args:
        x_BTNH: queries or keys.
        cos_BTR: from `rope_tables`.
        sin_BTR: from `rope_tables`.
        interleaved: pairs are (2 i, 2 i + 1) instead of (i, i + R).
    """
    pairs = cos_BTR.shape[-1]
    cos, sin = cos_BTR[:, :, None, :], sin_BTR[:, :, None, :]
    turned, rest = x_BTNH[..., : 2 * pairs].astype(jnp.float32), x_BTNH[..., 2 * pairs :]
    if interleaved:
        both = turned.reshape(*turned.shape[:-1], pairs, 2)
        a, b = both[..., 0], both[..., 1]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    turned = turned.astype(x_BTNH.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def apply_rope(
    x_BTNH: Float[Array, "B T N H"],
    positions_BT: Int[Array, "B T"],
    inv_freq: Float[np.ndarray, " R"],
    attention_factor: float = 1.0,
    interleaved: bool = False,
) -> Float[Array, "B T N H"]:
    """`rotate` with its own tables, for one-off use; a model computes the tables once for all layers.

    >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> apply_rope(x, jnp.array([[1]]), np.array([np.pi / 2], np.float32)).round(3).ravel().tolist()
    [-0.0, 1.0]
    """
    cos_BTR, sin_BTR = rope_tables(positions_BT, inv_freq, attention_factor)
    return rotate(x_BTNH, cos_BTR, sin_BTR, interleaved)


# --- Absolute ---


def sinusoidal(
    positions_BT: Int[Array, "B T"], dim: int, sines: str = "interleaved"
) -> Float32[Array, "B T D"]:
    """Fixed absolute embeddings: sines and cosines of p f_i, i < D / 2.

        interleaved  f_i = 10000 ** (-2 i / D), its sine at 2 i and its cosine at 2 i + 1
        halves       the same numbers, all sines before all cosines
        inclusive    likewise halves, of f_i = 10000 ** (-i / (D / 2 - 1)), the last of which is 1 / 10000

    Sources: Vaswani et al. 2017 (arXiv:1706.03762), section 3.5; Marian's and tensor2tensor's code.

    >>> sinusoidal(jnp.array([[0]]), 4).ravel().tolist()
    [0.0, 1.0, 0.0, 1.0]
    """
    if dim % 2:
        raise UserError(
            f"position.kind='sinusoidal' needs an even model_dim, not {dim}; nearest is {dim + 1}"
        )
    last = dim - 2 if sines == "inclusive" else dim
    inv_freq = 10000.0 ** (-np.arange(0, dim, 2, dtype=np.float64) / last)
    cos_BTR, sin_BTR = rope_tables(positions_BT, inv_freq)
    if sines != "interleaved":
        return jnp.concatenate([sin_BTR, cos_BTR], axis=-1)
    return jnp.stack([sin_BTR, cos_BTR], axis=-1).reshape(*positions_BT.shape, dim)


# --- Relative biases ---


def alibi_slopes(num_heads: int) -> Float32[np.ndarray, " N"]:
    """Slope of each head: 2 ** (-8 n / N) for n = 1..N when N is a power of two.

    Otherwise the slopes of the power of two below, then every second one of the power of two above, as in the
    authors' code. Source: Press et al. 2021 (arXiv:2108.12409).

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    below = 2 ** int(math.log2(num_heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, below + 1) / below)
    finer = 2.0 ** (-8.0 * np.arange(1, 2 * below + 1, 2) / (2 * below))
    return np.concatenate([slopes, finer])[:num_heads].astype(np.float32)


def alibi_bias(
    q_positions_BT: Int[Array, "B T"], k_positions_BS: Int[Array, "B S"], slopes_N: Float[Array, " N"]
) -> Float32[Array, "B N T S"]:
    """Bias to attention scores: -slope * |q position - k position|.

    >>> alibi_bias(jnp.array([[2]]), jnp.array([[0, 1, 2]]), np.array([0.5])).ravel().tolist()
    [-1.0, -0.5, -0.0]
    """
    distance_BTS = jnp.abs(q_positions_BT[:, :, None] - k_positions_BS[:, None, :]).astype(jnp.float32)
    return distance_BTS[:, None] * -jnp.asarray(slopes_N, jnp.float32)[:, None, None]


def t5_buckets(
    q_positions_BT: Int[Array, "B T"],
    k_positions_BS: Int[Array, "B S"],
    *,
    bidirectional: bool,
    num_buckets: int,
    max_distance: int,
) -> Int32[Array, "B T S"]:
    """Bucket of each (query, key) pair: exact for near keys, logarithmic to `max_distance`, then one for all.

    With n = q - k >= 0, E = num_buckets / 2 exact buckets: n if n < E, else
    E + floor(ln(n / E) / ln(max_distance / E) * (num_buckets - E)), at most num_buckets - 1. Keys after the
    query are in bucket 0, or with `bidirectional` in the upper half of the table (num_buckets / 2 rows each).
    Bucket edges are found with integers on the host, so that no device's logarithm can move them.

    Source: Raffel et al. 2019 (arXiv:1910.10683) and its Mesh TensorFlow code.

    >>> t5_buckets(jnp.array([[40]]), jnp.array([[40, 30, 8, 50]]), bidirectional=False, num_buckets=32,
    ...            max_distance=128).ravel().tolist()
    [0, 10, 21, 0]
    """
    offset_BTS = q_positions_BT[:, :, None] - k_positions_BS[:, None, :]
    bucket_BTS = jnp.zeros(offset_BTS.shape, jnp.int32)
    if bidirectional:
        num_buckets //= 2
        bucket_BTS = jnp.where(offset_BTS < 0, num_buckets, 0).astype(jnp.int32)
        offset_BTS = jnp.abs(offset_BTS)
    distance_BTS = jnp.maximum(offset_BTS, 0)
    edges = _t5_edges(num_buckets, max_distance)
    return bucket_BTS + (distance_BTS[..., None] >= edges).sum(-1, dtype=jnp.int32)


def _t5_edges(num_buckets: int, max_distance: int) -> np.ndarray:
    """Smallest distance of buckets 1 .. num_buckets - 1."""
    exact = num_buckets // 2
    steps = num_buckets - exact
    edges = list(range(1, exact + 1))
    for step in range(1, steps):  # least n with (n / exact) ** steps >= (max_distance / exact) ** step
        n = edges[-1]
        while n**steps * exact**step < max_distance**step * exact**steps:
            n += 1
        edges.append(n)
    return np.asarray(edges, np.int32)
