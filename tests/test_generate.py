"""Sampling against brute force, and decoding against the full forward pass."""

import copy
import dataclasses
import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxlm import sharding
from jaxlm.errors import UserError
from jaxlm.generate.decode import Generator, bucket, decode_step, prefill
from jaxlm.generate.decoder import Decoder, decoder
from jaxlm.generate.sampling import SampleConfig, process_logits, row_keys, sample_token, stack_rows
from jaxlm.model import transformer
from jaxlm.model.attention import AttentionConfig
from jaxlm.model.moe import MoEConfig
from jaxlm.model.positions import PositionConfig
from jaxlm.model.transformer import TransformerConfig
from jaxlm.tree import map_named

# --- sampling ---------------------------------------------------------------------------------------------

V = 11
CASES = {
    "plain": SampleConfig(),
    "greedy": SampleConfig(temperature=0.0),
    "greedy with the rest": SampleConfig(
        temperature=0.0, top_k=3, top_p=0.5, min_p=0.2, repetition_penalty=1.5
    ),
    "cold": SampleConfig(temperature=0.5),
    "hot": SampleConfig(temperature=2.0),
    "top_k 1": SampleConfig(top_k=1),
    "top_k 4": SampleConfig(top_k=4),
    "top_k above V": SampleConfig(top_k=V + 5),
    "top_p 0": SampleConfig(top_p=0.0),
    "top_p tiny": SampleConfig(top_p=1e-6),
    "top_p 0.5": SampleConfig(top_p=0.5),
    "top_p 0.95": SampleConfig(top_p=0.95),
    "min_p 0.2": SampleConfig(min_p=0.2),
    "min_p 1": SampleConfig(min_p=1.0),
    "penalty 1.4": SampleConfig(repetition_penalty=1.4),
    "penalty 0.7": SampleConfig(repetition_penalty=0.7),
    "top_k then top_p": SampleConfig(top_k=5, top_p=0.7),
    "all": SampleConfig(temperature=1.3, top_k=8, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
}


def brute_force(logits_V: np.ndarray, cfg: SampleConfig, counts_V: np.ndarray) -> np.ndarray:
    """The probabilities that are drawn from, one token at a time, in float64."""
    z = [float(x) for x in logits_V]
    for v in range(V):
        if counts_V[v]:
            z[v] = z[v] / cfg.repetition_penalty if z[v] > 0 else z[v] * cfg.repetition_penalty
    order = sorted(range(V), key=lambda v: (-z[v], v))
    if cfg.temperature == 0:
        return np.eye(V)[order[0]]
    z = [x / cfg.temperature for x in z]
    kept = list(order)
    if cfg.top_k:
        kth = z[order[min(cfg.top_k, V) - 1]]
        kept = [v for v in order if z[v] >= kth]
    mass = sum(np.exp(z[v]) for v in kept)
    nucleus, gone = [], 0.0
    for v in kept:
        if nucleus and gone >= cfg.top_p and cfg.top_p < 1:
            break
        nucleus.append(v)
        gone += np.exp(z[v]) / mass
    kept = [v for v in nucleus if np.exp(z[v]) >= cfg.min_p * np.exp(z[nucleus[0]])]
    p_V = np.zeros(V)
    p_V[kept] = np.exp([z[v] for v in kept])
    return p_V / p_V.sum()


def draws(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1.5, (rows, V)).astype(np.float32), rng.integers(0, 3, (rows, V)).astype(np.int32)


@jax.jit
def sample(logits_BV, counts_BV, rows, seed_B, index_B):
    """What is drawn from, the tokens, and their log-probabilities."""
    keys = row_keys(seed_B.astype(jnp.uint32), index_B)
    return process_logits(logits_BV, rows, counts_BV), *sample_token(logits_BV, keys, rows, counts_BV)


@pytest.mark.parametrize("name", CASES)
def test_distribution_is_the_brute_force_one(name):
    cfg = CASES[name]
    logits_BV, counts_BV = draws(50)
    processed_BV, _, _ = sample(logits_BV, counts_BV, stack_rows([cfg] * 50), np.arange(50), np.arange(50))
    probs_BV = np.asarray(jax.nn.softmax(processed_BV, axis=-1))
    expected_BV = np.stack([brute_force(z, cfg, c) for z, c in zip(logits_BV, counts_BV, strict=True)])
    np.testing.assert_array_equal(probs_BV > 0, expected_BV > 0)
    np.testing.assert_allclose(probs_BV, expected_BV, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_distribution(name):
    """Chi-square, over requests (seeds) and over the tokens of one request (indices)."""
    cfg, n = CASES[name], 3000
    logits_BV, counts_BV = (np.repeat(x, n, axis=0) for x in draws(1, seed=1))
    expected_V = brute_force(logits_BV[0], cfg, counts_BV[0])
    rows = stack_rows([cfg] * n)
    many = np.arange(n)
    for seed_B, index_B in ((many, np.full(n, 5)), (np.full(n, 17), many)):
        _, tokens_B, _ = sample(logits_BV, counts_BV, rows, seed_B, index_B)
        seen_V = np.bincount(tokens_B, minlength=V)
        assert not seen_V[expected_V == 0].any()
        possible = expected_V > 0
        if possible.sum() > 1:
            p_value = stats.chisquare(seen_V[possible], n * expected_V[possible]).pvalue
            assert p_value > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_a_row_does_not_depend_on_its_batch(name):
    configs = list(CASES.values())
    logits_BV, counts_BV = draws(len(configs), seed=2)
    b = list(CASES).index(name)

    def draw(rows_b: list[int]):
        rows, seed_B = stack_rows([configs[i] for i in rows_b]), np.asarray(rows_b) + 100
        return sample(logits_BV[rows_b], counts_BV[rows_b], rows, seed_B, np.full(len(rows_b), 3))

    alone = draw([b])
    for others in (list(range(len(configs))), [b, 0], list(reversed(range(len(configs))))):
        for one, batch in zip(alone, draw(others), strict=True):
            np.testing.assert_array_equal(one[0], batch[others.index(b)])


@pytest.mark.parametrize(
    ("cfg", "probs", "kept"),
    [
        (SampleConfig(top_k=2), [0.4, 0.2, 0.2, 0.2], [0, 1, 2, 3]),  # all that tie with the second stay
        (SampleConfig(top_k=1), [0.1, 0.4, 0.1, 0.4], [1, 3]),
        (SampleConfig(top_p=0.5), [0.25, 0.25, 0.25, 0.25], [0, 1]),  # just enough; lowest ids first
        (SampleConfig(top_p=0.51), [0.25, 0.25, 0.25, 0.25], [0, 1, 2]),
        (SampleConfig(top_p=0.75), [0.125, 0.25, 0.5, 0.125], [1, 2]),
        (SampleConfig(top_p=0.0), [0.25, 0.25, 0.25, 0.25], [0]),
        (SampleConfig(top_p=1.0), [1.0, 1e-30, 1e-30, 0.0], [0, 1, 2]),  # sums that round to 1 cut nothing,
        (
            SampleConfig(top_p=1.0, top_k=3),
            [1.0, 1e-30, 1e-30, 0.0],
            [0, 1, 2],
        ),  # in a batch that is sorted, too
        (SampleConfig(top_p=0.999), [1.0, 1e-30, 1e-30, 0.0], [0]),
        (SampleConfig(min_p=1.0), [0.4, 0.1, 0.4, 0.1], [0, 2]),
        (SampleConfig(min_p=0.5), [0.5, 0.25, 0.125, 0.125], [0, 1]),
        (SampleConfig(temperature=0.0), [0.1, 0.4, 0.4, 0.1], [1]),
        (SampleConfig(top_k=3, top_p=0.5), [0.4, 0.3, 0.2, 0.1], [0, 1]),  # 0.4 of 0.9 is not yet half
        (SampleConfig(top_k=2, top_p=0.5), [0.4, 0.3, 0.2, 0.1], [0]),  # 0.4 of 0.7 is: top-k comes first
    ],
)
def test_ties_and_edges(cfg, probs, kept):
    with np.errstate(divide="ignore"):
        logits_BV = np.log(np.asarray([probs], np.float32))
    processed_BV = jax.jit(process_logits)(logits_BV, stack_rows([cfg]))
    assert np.flatnonzero(np.isfinite(processed_BV[0])).tolist() == kept


def test_logprobs_are_the_models_own():
    logits_BV, counts_BV = draws(len(CASES))
    many, rows = np.arange(len(CASES)), stack_rows(list(CASES.values()))
    _, token_B, logprob_B = sample(logits_BV, counts_BV, rows, many, many)
    expected_BV = logits_BV - np.log(np.exp(logits_BV).sum(-1, keepdims=True))
    np.testing.assert_allclose(logprob_B, expected_BV[many, token_B], atol=2e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(temperature=-1.0),
        dict(temperature=float("nan")),
        dict(top_k=-1),
        dict(top_p=1.5),
        dict(min_p=-0.1),
        dict(repetition_penalty=0.0),
        dict(max_new_tokens=0),
        dict(seed=-1),
        dict(stop="text"),
        dict(stop=("",)),
    ],
    ids=str,
)
def test_bad_parameters_are_refused(wrong):
    with pytest.raises(UserError, match=f"sample.{next(iter(wrong))}="):
        SampleConfig(**wrong)


# --- decode == forward ------------------------------------------------------------------------------------

HEADS = {
    "global": AttentionConfig(num_heads=4),
    "global gqa": AttentionConfig(num_heads=4, num_kv_heads=2),
    "window gqa": AttentionConfig(num_heads=4, num_kv_heads=1, pattern=("local", "global"), window=5),
}
POSITIONS = {
    "rope": PositionConfig(kind="rope", local_theta=100.0),
    "yarn": PositionConfig(kind="rope", scaling="yarn", factor=4.0, original_length=16),
    "alibi": PositionConfig(kind="alibi"),
    "learned": PositionConfig(kind="learned", max_length=40),
    "sinusoidal": PositionConfig(kind="sinusoidal"),
    "t5": PositionConfig(kind="t5"),
    "none": PositionConfig(kind="none"),
}


def small(**changes) -> TransformerConfig:
    base = dict(vocab_size=31, num_layers=2, model_dim=32, mlp_dim=48, attention=HEADS["global gqa"])
    return TransformerConfig(**(base | changes))


MODELS = {
    f"{p} {h}": small(position=position, attention=heads)
    for p, position in POSITIONS.items()
    for h, heads in HEADS.items()
}
MODELS["extras"] = small(
    num_layers=5,  # a period of two, twice, and a tail
    norm_position="sandwich",
    logit_softcap=5.0,
    scale_embeddings=True,
    tie_embeddings=True,
    attention=dataclasses.replace(HEADS["window gqa"], softcap=3.0, qk_norm=True, sinks=True, qkv_bias=True),
)
MODELS["moe"] = small(mlp_pattern=("dense", "moe"), moe=MoEConfig(num_experts=4, top_k=2))
MODELS["parallel unrolled"] = small(parallel_block=True, scan=False, norm="layernorm", activation="gelu")


def make_params(cfg: TransformerConfig):
    """Weights of about fan-in size, every leaf random: attention is not flat, so a wrong key shows."""
    rng = np.random.default_rng(3)

    def leaf(name: str, like) -> np.ndarray:
        x = rng.normal(0, 0.2, like.shape).astype(like.dtype)
        return 1 + x if name.endswith("scale") else 4 * x if "embed" in name or "position" in name else x

    return map_named(leaf, transformer.abstract_params(cfg))


# These programs run once: compiling them fast matters more than running them fast.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


@partial(quick_jit, static_argnums=0)
def forward(cfg, params, tokens_BT):
    """The oracle: all logits at once, without a cache."""
    hidden_BTD, _, _ = transformer.apply(cfg, params, tokens_BT)
    return transformer.unembed(cfg, params, hidden_BTD)


def sparing(names, fast):
    """Parameters of which only those in `fast` belong to the fast suite."""
    return [pytest.param(name, marks=[] if name in fast else [pytest.mark.slow]) for name in names]


# The models with a window have global layers and grouped heads, too.
@pytest.mark.parametrize(
    "name", sparing(MODELS, [n for n in MODELS if "global" not in n and n[:4] not in ("yarn", "none")])
)
def test_decode_is_forward(name):
    """Ragged prefill, then one token a call: every logit equals the full forward pass to 2e-5 in fp32.

    A window of 5 is passed many times over by 24 tokens: the ring buffer wraps in prefill and in decoding.
    """
    cfg = MODELS[name]
    model, params = decoder(cfg), make_params(cfg)
    B, T = 3, 24
    lengths_B = np.asarray([0, 14, 9], np.int32)
    tokens_BT = np.random.default_rng(1).integers(0, cfg.vocab_size, (B, T), np.int32)

    @quick_jit
    def incremental(params):
        cache = prefill(model, params, jnp.asarray(tokens_BT[:, :16]), lengths_B, cache_length=T)

        def step(cache, i):
            position_B1 = (lengths_B + i)[:, None]
            active_B1 = position_B1 < T
            token_B1 = jnp.take_along_axis(tokens_BT, jnp.minimum(position_B1, T - 1), axis=1)
            logits_B1V, cache = decode_step(model, params, cache, token_B1, position_B1, active_B1)
            return cache, logits_B1V[:, 0]

        return jax.lax.scan(step, cache, jnp.arange(T - min(lengths_B)))[1]

    full_BTV = np.asarray(forward(cfg, params, tokens_BT))
    got_IBV = np.asarray(incremental(params))
    assert np.ptp(full_BTV) > 1  # logits worth comparing
    for b, length in enumerate(lengths_B):
        np.testing.assert_allclose(got_IBV[: T - length, b], full_BTV[b, length:], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "name", sparing(["rope window gqa", "alibi window gqa", "t5 global"], ["rope window gqa"])
)
def test_several_tokens_a_step_are_forward(name):
    """What speculative decoding and chunked prefill will do: calls of 9 and 15 columns on one cache."""
    cfg = MODELS[name]
    model, params = decoder(cfg), make_params(cfg)
    B, T = 2, 24
    tokens_BT = np.random.default_rng(2).integers(0, cfg.vocab_size, (B, T), np.int32)
    full_BTV = forward(cfg, params, tokens_BT)
    step = quick_jit(partial(decode_step, model))
    cache, begin = model.init_cache(B, T), 0
    for n in (9, 15):
        positions_BT = np.broadcast_to(np.arange(begin, begin + n, dtype=np.int32), (B, n))
        part_BT = tokens_BT[:, begin : begin + n]
        logits_BTV, cache = step(params, cache, part_BT, positions_BT, np.ones((B, n), bool))
        np.testing.assert_allclose(logits_BTV, full_BTV[:, begin : begin + n], atol=2e-5, rtol=2e-5)
        begin += n


# --- the loop ---------------------------------------------------------------------------------------------

PROMPTS = [[1, 2, 3], [4], [5] * 14, [6, 7, 8, 9, 10, 11, 12], [30, 0]]


@pytest.fixture(scope="module")
def windowed():
    cfg = MODELS["rope window gqa"]
    return cfg, make_params(cfg), Generator(decoder(cfg), cache_length=48, chunk=7)


def test_greedy_is_argmax_of_repeated_forward(windowed):
    """With and without a repetition penalty, which numpy applies to the logits of whole forward passes."""
    cfg, params, generator = windowed
    n, penalties = 20, (1.0, 1.3, 1.0, 0.8, 1.0)
    samples = [SampleConfig(temperature=0.0, max_new_tokens=n, repetition_penalty=p) for p in penalties]
    results = generator.generate(params, PROMPTS, samples)
    tokens_BT = np.zeros((len(PROMPTS), 40), np.int32)  # causal: what is not yet written changes nothing
    lengths_B = np.asarray([len(p) for p in PROMPTS])
    for b, prompt in enumerate(PROMPTS):
        tokens_BT[b, : len(prompt)] = prompt
    for i in range(n):
        logits_BTV = np.asarray(forward(cfg, params, tokens_BT))
        for b, (length, penalty) in enumerate(zip(lengths_B + i, penalties, strict=True)):
            logits_V = logits_BTV[b, length - 1]
            seen_V = np.isin(np.arange(cfg.vocab_size), tokens_BT[b, :length])
            penalized_V = np.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
            best = tokens_BT[b, length] = np.where(seen_V, penalized_V, logits_V).argmax()
            assert results[b].tokens[i] == best
            logprob = logits_V[best] - np.log(np.exp(logits_V).sum())
            assert results[b].logprobs[i] == pytest.approx(logprob, abs=2e-5)
    assert {r.finish for r in results} == {"length"}
    assert all(len(r.tokens) == len(r.logprobs) == n for r in results)


def test_seeds(windowed):
    _, params, generator = windowed
    cfg = SampleConfig(max_new_tokens=12, seed=40, repetition_penalty=1.1)
    same_prompt = [[3, 1, 4]] * 5
    first = [r.tokens for r in generator.generate(params, same_prompt, cfg)]
    assert first == [r.tokens for r in generator.generate(params, same_prompt, cfg)]
    assert len({tuple(t) for t in first}) == 5
    # Request i of a common config has seed + i.
    backwards = [dataclasses.replace(cfg, seed=40 + i) for i in reversed(range(5))]
    assert [r.tokens for r in generator.generate(params, same_prompt, backwards)] == first[::-1]
    # A longer limit continues the same text.
    longer = generator.generate(params, same_prompt, dataclasses.replace(cfg, max_new_tokens=20))
    assert [r.tokens[:12] for r in longer] == first


def mixed_configs() -> list[SampleConfig]:
    return [
        SampleConfig(max_new_tokens=17, seed=5, temperature=0.8, repetition_penalty=1.1),
        SampleConfig(max_new_tokens=30, seed=2**32 - 1, top_k=5, repetition_penalty=1.1),
        SampleConfig(max_new_tokens=1, seed=9, repetition_penalty=1.1),
        SampleConfig(max_new_tokens=25, seed=1, top_p=0.9, repetition_penalty=1.3),
        SampleConfig(max_new_tokens=9, temperature=0.0, repetition_penalty=1.3),
    ]


def test_a_request_alone_says_the_same(windowed):
    """Ragged prompts, limits and parameters in one batch == each request alone."""
    _, params, generator = windowed
    together = generator.generate(params, PROMPTS, mixed_configs())
    assert [len(r.tokens) for r in together] == [17, 30, 1, 25, 9]
    for prompt, cfg, expected in zip(PROMPTS, mixed_configs(), together, strict=True):
        (alone,) = generator.generate(params, [prompt], [cfg])
        assert alone.tokens == expected.tokens
        np.testing.assert_allclose(alone.logprobs, expected.logprobs, atol=2e-5)


def test_generation_has_room_for_every_choice_of_experts():
    """Whatever training does: a smaller buffer would be shared with the prompts beside."""
    moe = MoEConfig(num_experts=4, top_k=2, buffer_factor=1.5)
    seen = []
    own = transformer.apply
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "apply", lambda cfg, *a, **k: seen.append(cfg.moe) or own(cfg, *a, **k))
        cfg = small(mlp_pattern=("moe",), moe=moe)
        Generator(decoder(cfg)).generate(make_params(cfg), [[1, 2]], [SampleConfig(max_new_tokens=1)])
    assert seen
    assert {(m.dispatch, m.buffer_factor) for m in seen} == {("dropless", 0.0)}


def test_experts_do_not_fill_up_with_other_prompts():
    """Trained with capacity, whose limit depends on the padded row: generation drops nothing."""
    moe = MoEConfig(num_experts=4, top_k=2, dispatch="capacity", capacity_factor=0.5)
    cfg = small(mlp_pattern=("moe",), moe=moe)
    params, generator = make_params(cfg), Generator(decoder(cfg))
    greedy = SampleConfig(temperature=0.0, max_new_tokens=6)
    prompt, longer = [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8] * 12
    (alone,) = generator.generate(params, [prompt], [greedy])
    beside, _ = generator.generate(params, [prompt, longer], [greedy] * 2)
    assert alone.tokens == beside.tokens
    tokens_BT = np.asarray([prompt + alone.tokens])
    dropless = dataclasses.replace(cfg, moe=dataclasses.replace(moe, dispatch="dropless"))
    logits_TV = np.asarray(forward(dropless, params, tokens_BT))[0]
    assert logits_TV.argmax(-1)[len(prompt) - 1 : -1].tolist() == alone.tokens


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [dict(data=4, tensor=2), dict(data=1, fsdp=2, tensor=2)], ids=str)
def test_a_mesh_says_the_same(mesh):
    """Sharded parameters and rows; five rows are filled up to a multiple of the batch axes."""
    cfg = small(attention=dataclasses.replace(HEADS["window gqa"], num_kv_heads=2), vocab_size=32)
    params = make_params(cfg)
    layout = sharding.Layout(sharding.make_mesh(sharding.MeshConfig(**mesh)))
    placed = jax.device_put(params, sharding.tree_shardings(layout, params, transformer.AXES))
    expected = Generator(decoder(cfg)).generate(params, PROMPTS, mixed_configs())
    generator = Generator(decoder(cfg), layout=layout, chunk=4)
    results = generator.generate(placed, PROMPTS, mixed_configs())
    assert [r.tokens for r in results] == [r.tokens for r in expected]
    assert [chunk._cache_size() for chunk in generator._pinned.values()] == [1]
    for a, b in zip(results, expected, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)


# --- when a text ends -------------------------------------------------------------------------------------


def successors(followers: dict[int, int]) -> np.ndarray:
    """The parameters of the chain model: which token it says after each."""
    table_V = np.zeros(256, np.int32)
    table_V[list(followers)] = list(followers.values())
    return table_V


def chain() -> Decoder:
    """A model that says one fixed token after each token, and whose cache counts what it was fed."""

    def apply(table_V, tokens_BT, segments_BT, positions_BT, cache):
        del positions_BT
        return table_V[tokens_BT], cache.at[:, 0].add(segments_BT.sum(1))

    def unembed(table_V, followers_BT):
        return 9.0 * jax.nn.one_hot(followers_BT, len(table_V)) - 1.0

    return Decoder(apply, unembed, lambda rows, length: jnp.zeros((rows, length), jnp.int32), 256)


class Pieces:
    """Tokens that stand for fixed strings; like many, it drops a space at the start of what it decodes."""

    bos_id, eos_id = 0, 1

    def __init__(self, *pieces: str) -> None:
        self.pieces = ("", "", *pieces)

    def encode(self, text: str) -> list[int]:
        return [self.pieces.index(text)] if text else []

    def decode(self, ids) -> str:
        return "".join(self.pieces[i] for i in ids).removeprefix(" ")


class Bytes:
    """UTF-8, with U+FFFD for what is not (yet) a character."""

    bos_id, eos_id = 0, 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids) -> str:
        return bytes(i for i in ids if i).decode(errors="replace")


GREEDY = SampleConfig(temperature=0.0, max_new_tokens=10)
#             2      3     4     5       6
WORDS = Pieces("go", " ab", "cd", "ef", " xyz")
AROUND = successors({2: 3, 3: 4, 4: 5, 5: 6, 6: 3})  # go| ab|cd|ef| xyz| ab|cd|ef| xyz ...
CHUNKS = (1, 3, 32)


@cache
def compiled(chunk: int) -> Generator:
    return Generator(chain(), WORDS, cache_length=48, batch_size=6, chunk=chunk)


def generator(chunk: int, tokenizer=WORDS, eos_ids=(1,)) -> Generator:
    """The tests share their compiled programs."""
    changed = copy.copy(compiled(chunk))
    changed.tokenizer, changed.eos_ids = tokenizer, eos_ids
    return changed


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(
    ("stop", "tokens", "text"),
    [
        (("cd",), [3, 4], " ab"),  # a token
        (("b",), [3], " a"),  # within a token
        (("bcde",), [3, 4, 5], " a"),  # over three tokens
        (("yz ab",), [3, 4, 5, 6, 3], " abcdef x"),  # over the seam of a second round
        (("f xyz ", "ef x"), [3, 4, 5, 6], " abcd"),  # what is complete first wins
        (("xyz", "z", "f x"), [3, 4, 5, 6], " abcde"),  # of those in one token, the one that starts first
        (("go",), [3, 4, 5, 6, 3, 4, 5, 6, 3, 4], " abcdef xyz abcdef xyz abcd"),  # the prompt does not count
        ((" abcdef xyz",), [3, 4, 5, 6], ""),
    ],
)
def test_stop_strings_cut_exactly(chunk, stop, tokens, text):
    (result,) = generator(chunk).generate_text(AROUND, ["go"], dataclasses.replace(GREEDY, stop=stop))
    assert (result.tokens, result.text) == (tokens, text)
    assert result.finish == ("length" if stop == ("go",) else "stop")
    assert len(result.logprobs) == len(tokens)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_stop_string_of_split_characters(chunk):
    text = "aé→b"
    ids = list(text.encode())
    table_V = successors(dict(itertools.pairwise([0, *ids])))
    for stop, cut in (("é", "a"), ("→", "aé"), ("→b", "aé")):
        cfg = dataclasses.replace(GREEDY, stop=(stop,))
        (result,) = generator(chunk, Bytes(), (0,)).generate_text(table_V, [""], cfg)
        assert (result.text, result.finish) == (cut, "stop")
        assert Bytes().decode(result.tokens) == cut + stop
    (result,) = generator(chunk, Bytes(), (0,)).generate_text(table_V, [""], GREEDY)
    assert (result.text, result.finish) == (text, "eos")  # the successor of b is 0, the end


@pytest.mark.parametrize("chunk", CHUNKS)
def test_end_of_sequence(chunk):
    table_V = successors({2: 3, 3: 4, 4: 1, 1: 2})  # go| ab|cd|EOS|go ...
    samples = [
        GREEDY,
        dataclasses.replace(GREEDY, ignore_eos=True),
        dataclasses.replace(GREEDY, max_new_tokens=3),
        dataclasses.replace(GREEDY, max_new_tokens=2),
        dataclasses.replace(GREEDY, stop=("d",)),
    ]
    results = generator(chunk).generate_text(table_V, ["go"] * 5, samples)
    assert [r.finish for r in results] == ["eos", "length", "eos", "length", "stop"]
    assert [r.tokens for r in results] == [
        [3, 4, 1],
        [3, 4, 1, 2, 3, 4, 1, 2, 3, 4],
        [3, 4, 1],
        [3, 4],
        [3, 4],
    ]
    assert [r.text for r in results] == [" abcd", " abcdgo abcdgo abcd", " abcd", " abcd", " abc"]
    assert len(results[0].logprobs) == 3


def test_several_ends_of_sequence():
    (result,) = generator(3, eos_ids=(1, 5)).generate_text(AROUND, ["go"], GREEDY)
    assert (result.tokens, result.text, result.finish) == ([3, 4, 5], " abcd", "eos")


def test_more_requests_than_rows():
    """Batches of six rows; the second is filled up. Seeds go on from one batch to the next."""
    prompts = [[2 + i % 5] for i in range(8)]
    cfg = dataclasses.replace(GREEDY, temperature=5.0, seed=7)
    results = generator(3, Bytes()).generate(AROUND, prompts, cfg)
    assert len({tuple(r.tokens) for r in results}) == 8
    (last,) = generator(3, Bytes()).generate(AROUND, prompts[-1:], dataclasses.replace(cfg, seed=14))
    assert last == results[-1]


def states(monkeypatch, watched: Generator) -> list:
    """The state after each chunk that `watched` runs from now on."""
    seen, inner = [], watched._chunk

    def chunk(*args):
        out = inner(*args)
        seen.append(jax.device_get(out[0]))
        return out

    monkeypatch.setattr(watched, "_chunk", chunk)
    return seen


def test_done_rows_leave_their_cache_alone(monkeypatch):
    """The fake cache counts active columns: prompt tokens and every drawn token but the last."""
    watched = generator(3)
    seen = states(monkeypatch, watched)
    watched.generate(AROUND, [[2], [2, 3, 4]], [GREEDY, dataclasses.replace(GREEDY, max_new_tokens=3)])
    assert seen[-1].cache[:2, 0].tolist() == seen[-1].position_B[:2].tolist() == [1 + 9, 3 + 2]


def test_stop_strings_end_the_loop(monkeypatch):
    """Stopped in its fourth token, so in the second chunk of three; the other row goes on alone."""
    watched = generator(3)
    seen = states(monkeypatch, watched)
    stopped = dataclasses.replace(GREEDY, stop=("xyz",), max_new_tokens=40)
    watched.generate(AROUND, [[2], [2]], [stopped, GREEDY])
    assert [state.index_B[:2].tolist() for state in seen] == [[3, 3], [6, 6], [6, 9], [6, 10]]


def test_compiled_once_for_each_bucket():
    counted = Generator(chain(), chunk=4)
    for prompts, new in (([[1], [2, 3]], 9), ([[1] * 9, [4]], 15), ([[5] * 12, [6]], 10)):
        counted.generate(AROUND, prompts, dataclasses.replace(GREEDY, max_new_tokens=new))
    assert bucket(9 + 15) == bucket(12 + 10) != bucket(2 + 9)
    assert counted._start._cache_size() == 2  # prompts of up to 16, caches of 16 and 24
    assert counted._chunk._cache_size() == 2


def test_no_requests():
    assert generator(3).generate(AROUND, [], GREEDY) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Generator(chain()).generate(None, [[2], []], GREEDY), "prompt 1 is empty"),
        (
            lambda: Generator(chain()).generate(None, [[2, 256]], GREEDY),
            "prompt 0: token 256 .* vocabulary of 256",
        ),
        (lambda: Generator(chain()).generate(None, [[-1]], GREEDY), "token -1"),
        (lambda: Generator(chain()).generate(None, [[2]], [GREEDY] * 2), "1 prompts, but 2 sample configs"),
        (
            lambda: Generator(chain()).generate(None, [[2]], dataclasses.replace(GREEDY, stop=("x",))),
            "needs a tokenizer",
        ),
        (lambda: Generator(chain()).generate_text(None, ["x"], GREEDY), "needs a tokenizer"),
        (
            lambda: Generator(chain(), cache_length=12).generate(None, [[2], [2] * 5], GREEDY),
            "prompt 1: 5 tokens .*=10 do not fit cache_length of 12 positions; .* max_new_tokens=7 would",
        ),
        (
            lambda: Generator(decoder(MODELS["learned global"])).generate(None, [[2] * 31], GREEDY),
            "prompt 0: 31 tokens .* position table of 40 positions; at most max_new_tokens=9 would",
        ),
        (
            lambda: Generator(decoder(MODELS["learned global"]), cache_length=41),
            "cache_length=41 .* 40 positions",
        ),
        (lambda: Generator(chain(), chunk=0), "chunk=0"),
        (lambda: decoder(small(causal=False)), "causal=False"),
    ],
)
def test_bad_requests_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.slow
def test_the_last_position_is_usable():
    """A cache and a position table that the request fills to the end, though the buckets are larger."""
    cfg = MODELS["learned global"]
    params = make_params(cfg)
    (result,) = Generator(decoder(cfg)).generate(
        params, [[2] * 33], dataclasses.replace(GREEDY, max_new_tokens=7)
    )
    assert len(result.tokens) == 7
    tokens_1T = np.asarray([[2] * 33 + result.tokens[:-1]])
    assert forward(cfg, params, tokens_1T)[0, 32:].argmax(-1).tolist() == result.tokens
