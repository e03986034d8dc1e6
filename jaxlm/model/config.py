"""The config of a transformer: its shape, its variations, and how it differs from a smaller one."""

import dataclasses
import math
import operator

from jaxlm.errors import UserError, check, check_choice
from jaxlm.model import positions as pos
from jaxlm.model.attention import AttentionConfig
from jaxlm.model.backends import check_backend, check_limits
from jaxlm.model.context_parallel import check_context
from jaxlm.model.convolution import ConvolutionConfig
from jaxlm.model.disentangled import DisentangledConfig
from jaxlm.model.layers import ACTIVATIONS, NORMS
from jaxlm.model.moe import MoEConfig
from jaxlm.model.positions import PositionConfig
from jaxlm.quant import FORMATS
from jaxlm.stack import REMAT

DTYPES = ("float32", "bfloat16", "float16")
READOUTS = ("first", "last", "mean", "each")
PARAMETRIZATIONS = ("standard", "mup", "completep")  # see jaxlm.model.parametrization


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The stack that reads the inputs of a sequence-to-sequence model; else as the decoder."""

    num_layers: int = 0  # 0 = the model has no encoder
    num_heads: int = 0  # 0 = as many as the decoder's
    head_dim: int = 0  # 0 = attention.head_dim, or model_dim over these heads if that is 0 too
    mlp_dim: int = 0  # 0 = as wide as the decoder's
    vocab_size: int = 0  # of an embedding table of its own; 0 = it reads the decoder's

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            check(size >= 0, f"model.encoder.{field.name}={size} must not be negative")
            check(
                self.num_layers > 0 or size == 0,
                f"model.encoder.{field.name}={size} without an encoder: set model.encoder.num_layers",
            )


@dataclasses.dataclass(frozen=True)
class ReadoutConfig:
    """What is read out of the hidden states beside the vocabulary's logits, see jaxlm.model.heads."""

    classes: int = 0  # C, logits of a linear layer on it; 0 = none
    of: str = "first"  # first | last | mean: of a row's tokens | each: one by one
    dense: str = ""  # activation after a D x D layer before them (BERT's pooler: tanh); '' = no such layer
    bias: bool = True  # on the logits

    def __post_init__(self) -> None:
        check(self.classes >= 0, f"model.readout.classes={self.classes} must not be negative")
        check_choice(self.of, READOUTS, "model.readout.of")
        plain = [name for name, (_, gated) in ACTIVATIONS.items() if not gated]
        check_choice(self.dense, ("", *plain), "model.readout.dense")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and variations of a transformer stack."""

    vocab_size: int = 256  # V
    num_layers: int = 4  # L
    shared_layers: int = 1  # layers in a row (periods of the pattern) with the same parameters (ALBERT)
    model_dim: int = 128  # D
    embed_dim: int = 0  # E of tables that a linear layer projects to D (ALBERT); 0 = D, and no such layer
    mlp_dim: int = 0  # F, width of a dense MLP; 0 = 4 D
    mlp_pattern: tuple[str, ...] = ("dense",)  # one period of layers, each 'dense' or 'moe'
    first_dense: int = 0  # so many first layers have a dense MLP; mlp_pattern begins after them (DeepSeek)
    activation: str = "swiglu"  # name in jaxlm.model.layers.ACTIVATIONS
    mlp_bias: bool = False  # biases in the dense MLPs
    gate_limit: float = 0.0  # c: gated MLPs become act(min(g, c)) (clip(h, -c, c) + 1); 0 = off (GPT-OSS: 7)
    norm: str = "rmsnorm"  # rmsnorm | layernorm | layernorm_scale (no bias) | layernorm_plain (neither)
    norm_offset: bool = False  # norms multiply by 1 + scale (Gemma)
    norm_eps: float = 1e-6  # added to the variance
    norm_position: str = "pre"  # pre: x + f(n(x)) | post: n(x + f(x)) | branch: x + n(f(x)) | sandwich: both
    parallel_block: bool = False  # x + attention(n(x)) + mlp(n(x)), one norm (GPT-J, PaLM)
    parallel_norms: bool = False  # the MLP of a parallel block has a norm of its own (GPT-NeoX)
    embed_norm: bool = False  # a norm right after the embeddings (BLOOM, BERT)
    head_bias: bool = False  # a bias on the logits
    head_transform: bool = False  # a dense layer, the activation and a norm before the logits (BERT)
    token_types: int = 0  # embeddings of the kinds of tokens, such as first and second sentence; 0 = none
    tie_embeddings: bool = False  # the head is the embedding table
    scale_embeddings: bool = False  # embeddings times sqrt(D) (Gemma)
    logit_scale: float = 1.0  # logits are multiplied by it
    logit_softcap: float = 0.0  # logits become c tanh(logits / c); 0 = off
    dropout: float = 0.0  # of the embeddings and of each branch before it is added
    causal: bool = True  # False: every position sees its whole segment
    init_std: float = 0.02  # of weights; 0 = fan_in ** -0.5
    parametrization: str = "standard"  # standard | mup | completep: how a wider or deeper model differs
    base_width: int = 0  # mup, completep: model_dim of the model that lr and init_std were tuned on
    base_depth: int = 0  # completep: num_layers of that model
    base_head_dim: int = 0  # mup, completep: its head_dim; 0 = attention.head_dim (width adds heads)
    scan: bool = True  # lax.scan over the layers, or an unrolled loop
    remat: str = "none"  # none | minimal | full | offload | offload_minimal, see jaxlm.stack.REMAT
    dtype: str = "float32"  # operands of products, and activations
    param_dtype: str = "float32"  # stored parameters
    accum_dtype: str = "float32"  # sums inside products
    quant: str = "none"  # none | int8 | int8_full | fp8: 8-bit products of dense layers, see jaxlm.quant
    attention: AttentionConfig = AttentionConfig()
    position: PositionConfig = PositionConfig()
    moe: MoEConfig = MoEConfig()
    encoder: EncoderConfig = EncoderConfig()
    readout: ReadoutConfig = ReadoutConfig()
    disentangled: DisentangledConfig = DisentangledConfig()
    convolution: ConvolutionConfig = ConvolutionConfig()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "model_dim", "shared_layers"):
            check(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1")
        for name in ("mlp_dim", "embed_dim"):
            check(getattr(self, name) >= 0, f"model.{name}={getattr(self, name)} must not be negative")
        check(
            self.shared_layers == 1
            or (self.num_layers % (self.shared_layers * self.period) == 0 and not self.first_dense),
            f"model.num_layers={self.num_layers} is not a multiple of model.shared_layers="
            f"{self.shared_layers} times the {self.period} layers of the pattern, or model.first_dense="
            f"{self.first_dense} is not 0",
        )
        check_choice(self.activation, ACTIVATIONS, "model.activation")
        check(
            self.gate_limit == 0.0 or (self.gate_limit > 0.0 and ACTIVATIONS[self.activation][1]),
            f"model.gate_limit={self.gate_limit} must be positive and needs a gated activation, not "
            f"model.activation={self.activation!r}; 0 = no limit",
        )
        check_choice(self.norm, NORMS, "model.norm")
        check_choice(self.norm_position, ("pre", "post", "sandwich", "branch"), "model.norm_position")
        check_choice(self.remat, REMAT, "model.remat")
        has_moe = "moe" in self.mlp_pattern
        for name in ("dtype", "param_dtype", "accum_dtype"):
            check_choice(getattr(self, name), DTYPES, f"model.{name}")
        check_choice(self.quant, ("none", *FORMATS), "model.quant")
        check(
            self.quant == "none" or not has_moe,
            f"model.quant={self.quant!r}: the products of experts are not quantised; use 'none', or a model "
            "without 'moe' layers",
        )
        check(
            self.quant == "none" or not self.attention.latent.kv_rank,
            f"model.quant={self.quant!r}: the products of latent attention are not quantised; use 'none'",
        )
        check(0.0 <= self.dropout < 1.0, f"model.dropout={self.dropout} must be in [0, 1)")
        check(self.init_std >= 0.0, f"model.init_std={self.init_std} must not be negative")
        check(self.logit_softcap >= 0.0, f"model.logit_softcap={self.logit_softcap} must not be negative")
        check(len(self.mlp_pattern) > 0, "model.mlp_pattern must name at least one layer kind")
        for kind in self.mlp_pattern:
            check_choice(kind, ("dense", "moe"), "model.mlp_pattern")
        check(
            self.first_dense == 0 or (has_moe and 0 < self.first_dense < self.num_layers),
            f"model.first_dense={self.first_dense} must lie between 0 and model.num_layers="
            f"{self.num_layers} and needs 'moe' in model.mlp_pattern={self.mlp_pattern}",
        )
        check(
            has_moe == (self.moe.num_experts > 0),
            f"model.moe.num_experts={self.moe.num_experts} and model.mlp_pattern={self.mlp_pattern} "
            f"disagree: "
            "experts need 'moe' layers, and 'moe' layers need experts",
        )
        check(
            not (self.parallel_block and self.norm_position != "pre"),
            f"model.parallel_block needs norm_position='pre', got {self.norm_position!r}",
        )
        check(
            self.parallel_block or not self.parallel_norms,
            "model.parallel_norms=True needs parallel_block=True",
        )
        check(self.token_types >= 0, f"model.token_types={self.token_types} must not be negative")
        check(self.logit_scale > 0, f"model.logit_scale={self.logit_scale} must be positive")
        heads = self.attention.num_heads
        if not self.attention.head_dim and not self.attention.latent.kv_rank and self.model_dim % heads:
            raise UserError(
                f"model.model_dim={self.model_dim} is not divisible by model.attention.num_heads={heads}; "
                f"the nearest that is: {max(heads, round(self.model_dim / heads) * heads)}, or set "
                f"attention.head_dim"
            )
        self._check_parametrization()
        if self.position.kind == "rope":
            pos.rotary_dim(self.position, self.rope_dim)  # refuses what cannot be paired
        check(
            self.position.kind == "rope" or not self.attention.latent.kv_rank,
            f"model.position.kind={self.position.kind!r} with model.attention.latent.kv_rank="
            f"{self.attention.latent.kv_rank}: latent attention needs 'rope'",
        )
        biased = self.position.kind in ("alibi", "t5") or self.disentangled.span > 0
        check_backend(
            self.attention.backend,
            softcap=self.attention.softcap > 0,
            sinks=self.attention.sinks,
            bias=biased,
            tiled=self.attention.tile_q > 0 or self.attention.tile_k > 0,
        )
        dtypes = dict(dtype=self.dtype, accum=self.accum_dtype)
        check_limits(self.attention.backend, head_dim=self.head_dim, **dtypes)
        check_context(self.attention.context, bias=biased)
        latent, grouped = self.attention.latent.kv_rank, self.attention.kv_heads != self.attention.num_heads
        check(
            not self.disentangled.span or not (latent or grouped or self.attention.qk_norm),
            f"model.disentangled needs as many keys as queries and no norms of them, got "
            f"model.attention.num_kv_heads={self.attention.num_kv_heads}, qk_norm={self.attention.qk_norm}, "
            f"latent.kv_rank={latent}",
        )
        known = ("none", "learned", "sinusoidal")
        check(
            not self.disentangled.span or self.position.kind in known,
            f"model.position.kind={self.position.kind!r} with model.disentangled.span="
            f"{self.disentangled.span}: scores know distances already; use {', '.join(map(repr, known))}",
        )
        check(
            not (self.convolution.width and self.causal),
            f"model.convolution.width={self.convolution.width} with model.causal=True: a convolution sees "
            "the tokens after its own; use model.causal=False, or width 0",
        )
        check(
            self.attention.context != "ring" or not has_moe or self.moe.dispatch != "capacity",
            "model.attention.context='ring' changes the order of columns, by which model.moe.dispatch="
            "'capacity' drops tokens; use context 'gather' or 'ulysses', or dispatch 'dropless'",
        )
        if self.has_encoder:
            self._check_encoder()

    def _check_encoder(self) -> None:
        wanted = {"causal": True, "parallel_block": False, "token_types": 0, "attention.latent.kv_rank": 0}
        wanted["disentangled.span"] = 0  # whose scale of scores would be that of cross-attention too
        for name, value in wanted.items():
            given = operator.attrgetter(name)(self)
            check(
                given == value,
                f"model.{name}={given!r} with model.encoder.num_layers={self.encoder.num_layers}: a decoder "
                f"that attends to an encoder needs {name}={value!r}",
            )
        check(
            self.parametrization != "completep" or self.encoder.num_layers == self.num_layers,
            f"model.parametrization='completep' scales by one depth: model.encoder.num_layers="
            f"{self.encoder.num_layers} must be model.num_layers={self.num_layers}",
        )
        try:
            encoder_of(self)
        except UserError as error:  # which knows of no encoder: what it names are the fields of a decoder
            own = {
                field.name: getattr(self.encoder, field.name) for field in dataclasses.fields(self.encoder)
            }
            sizes = ", ".join(f"{name}={size}" for name, size in own.items() if size)
            raise UserError(f"the encoder cannot have model.encoder.{sizes}: as a model, {error}") from error

    def _check_parametrization(self) -> None:
        check_choice(self.parametrization, PARAMETRIZATIONS, "model.parametrization")
        for name in ("base_width", "base_depth", "base_head_dim"):
            check(getattr(self, name) >= 0, f"model.{name}={getattr(self, name)} must not be negative")
        needed = {"standard": (), "mup": ("base_width",), "completep": ("base_width", "base_depth")}
        for name in needed[self.parametrization]:
            own = "model_dim" if name == "base_width" else "num_layers"
            check(
                getattr(self, name) > 0,
                f"model.parametrization={self.parametrization!r} needs model.{name}: the {own} of the model "
                f"that the learning rate was tuned on (this one's is {getattr(self, own)})",
            )
        check(
            self.parametrization == "standard" or not self.embed_dim,
            f"model.parametrization={self.parametrization!r} has no rule for model.embed_dim="
            f"{self.embed_dim}, which does not grow with the width; use model.embed_dim=0",
        )
        derived = self.attention.head_dim == 0 and self.base_head_dim == 0
        if self.parametrization != "standard" and derived and self.model_dim != self.base_width:
            narrow = max(1, self.base_width // self.attention.num_heads)
            raise UserError(
                f"model.parametrization={self.parametrization!r} scales attention by base_head_dim / "
                f"head_dim, and model.model_dim={self.model_dim} against model.base_width={self.base_width} "
                f"leaves two choices open: set model.attention.head_dim={self.head_dim} if the wider model "
                f"has more heads of one size, or model.base_head_dim={narrow} if its heads are wider"
            )

    @property
    def has_encoder(self) -> bool:
        """Whether the layers attend to what an encoder made of the inputs."""
        return self.encoder.num_layers > 0

    @property
    def head_dim(self) -> int:
        """H, of queries and keys."""
        return (
            self.attention.latent.key_dim
            or self.attention.head_dim
            or self.model_dim // self.attention.num_heads
        )

    @property
    def value_dim(self) -> int:
        """H of values."""
        return self.attention.latent.value_dim or self.head_dim

    @property
    def rope_dim(self) -> int:
        """Of a head, what rotates if `position.fraction` is 1."""
        return self.attention.latent.rope_dim or self.head_dim

    @property
    def embed_width(self) -> int:
        """E."""
        return self.embed_dim or self.model_dim

    @property
    def unembeds(self) -> bool:
        """Whether logits of the vocabulary can be made of the hidden states: a tied table must fit them."""
        return not self.tie_embeddings or self.head_transform or self.embed_width == self.model_dim

    @property
    def mlp_width(self) -> int:
        """F."""
        return self.mlp_dim or 4 * self.model_dim

    @property
    def layer_kinds(self) -> tuple[tuple[str, str], ...]:
        """(attention kind, mlp kind) of every layer."""
        a, m, n = self.attention.pattern, self.mlp_pattern, self.first_dense
        kind = lambda i: "dense" if i < n else m[(i - n) % len(m)]  # noqa: E731
        return tuple((a[i % len(a)], kind(i)) for i in range(self.num_layers))

    @property
    def period(self) -> int:
        """P, layers in the unit that is scanned: the least common multiple of both patterns, if so many."""
        length = math.lcm(len(self.attention.pattern), len(self.mlp_pattern))
        return min(length, self.num_layers - self.first_dense)

    @property
    def repeats(self) -> int:
        """How often that unit is repeated."""
        return (self.num_layers - self.first_dense) // self.period

    def place(self, layer: int) -> tuple[str, int | None]:
        """Where a layer's parameters stand, and which of a stack they are; None = they are not stacked.

        >>> attention = AttentionConfig(pattern=("local", "global"), window=2)
        >>> cfg = TransformerConfig(num_layers=6, attention=attention)
        >>> cfg.place(3), dataclasses.replace(cfg, num_layers=3).place(2)
        (('blocks/1', 1), ('tail/0', None))
        """
        if layer < self.first_dense:
            return f"first/{layer}", None
        row, j = divmod(layer - self.first_dense, self.period)
        return (f"blocks/{j}", row // self.shared_layers) if row < self.repeats else (f"tail/{j}", None)

    @property
    def num_moe_layers(self) -> int:
        """How many layers route."""
        return sum(mlp == "moe" for _, mlp in self.layer_kinds)


def encoder_of(cfg: TransformerConfig) -> TransformerConfig:
    """The encoder of a sequence-to-sequence model as a stack of its own, which sees whole segments.

    >>> cfg = TransformerConfig(num_layers=2, encoder=EncoderConfig(num_layers=6))
    >>> encoder_of(cfg).num_layers, encoder_of(cfg).causal, encoder_of(cfg).has_encoder
    (6, False, False)
    """
    own, heads = cfg.encoder, cfg.attention
    attention = dataclasses.replace(
        heads,
        num_heads=own.num_heads or heads.num_heads,
        num_kv_heads=0 if heads.kv_heads == heads.num_heads else heads.num_kv_heads,
        head_dim=own.head_dim or heads.head_dim,
    )
    return dataclasses.replace(
        cfg,
        num_layers=own.num_layers,
        mlp_dim=own.mlp_dim or cfg.mlp_dim,
        vocab_size=own.vocab_size or cfg.vocab_size,
        attention=attention,
        causal=False,
        encoder=EncoderConfig(),
        # It ends in hidden states: the head is the decoder's.
        tie_embeddings=True,
        head_bias=False,
        head_transform=False,
        readout=ReadoutConfig(),
    )
