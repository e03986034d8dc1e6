"""Attention kernels: against the reference where they can run here, by their arguments where they cannot."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax._src.interpreters import partial_eval as pe

from jaxlm.errors import UserError
from jaxlm.model import backends
from jaxlm.model.attention import AttentionConfig
from jaxlm.model.backends import BACKENDS, attend, executed_keys
from jaxlm.model.masks import Mask
from jaxlm.model.splash import tile_size
from jaxlm.model.transformer import TransformerConfig
from jaxlm.sharding import Layout, MeshConfig, make_layout, make_mesh, platform, use
from jaxlm.stack import rematerialised

B, T, N, H = 2, 300, 4, 16  # three tiles of 128 columns, the last one part padding


def packed(length=T, rows=B):
    """Segments and positions of packed rows: two documents and padding, then one document."""
    cut = length // 3
    segments = np.ones((rows, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    segments[0, cut:], positions[0, cut:] = 2, np.arange(length - cut)
    segments[0, -20:], positions[0, -20:] = 0, 0
    return segments, positions


def tensors(kv_heads, rows=B, length=T, heads=N):
    rng = np.random.default_rng(0)
    shapes = dict(q=(rows, length, heads, H), k=(rows, length, kv_heads, H), v=(rows, length, kv_heads, H))
    x = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return x | {"weight": rng.normal(size=shapes["q"]).astype(np.float32)}


def loss_and_gradients(x, mask, backend, options, tiles=(0, 0)):
    """Of a weighted sum over what is not padding."""
    real = 1.0 if mask.q_segments_BT is None else (mask.q_segments_BT != 0)[..., None, None]
    learned = {name: x[name] for name in ("q", "k", "v", "sinks") if name in x}

    @jax.jit
    def run(learned):
        sinks = learned.get("sinks")
        kinds = dict(backend=backend, sinks_N=sinks, tiles=tiles, **options)
        return jnp.sum(attend(learned["q"], learned["k"], learned["v"], mask, **kinds) * x["weight"] * real)

    return jax.value_and_grad(run)(learned)


def assert_equal(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-4)
    for name in want[1]:
        np.testing.assert_allclose(got[1][name], want[1][name], atol=3e-5, err_msg=name)


CASES = {
    "gqa": dict(kv_heads=2),
    "mqa, windowed, capped": dict(kv_heads=1, window=150, options=dict(softcap=3.0)),
    "sinks, windowed": dict(kv_heads=4, window=40, sinks=True),
    "both ways": dict(kv_heads=2, causal=False),
    "both ways, windowed": dict(kv_heads=4, causal=False, window=70),
    "one document a row": dict(kv_heads=2, segments=False),
}


@pytest.mark.parametrize("name", CASES)
def test_splash_equals_the_reference_on_packed_rows_with_gradients(name):
    """Several tiles of 128, some of which the mask skips; fp32 sums of 300 terms in another order."""
    case = dict(causal=True, window=0, segments=True, sinks=False, options={}) | CASES[name]
    x = tensors(case["kv_heads"])
    if case["sinks"]:
        x["sinks"] = np.linspace(-1, 2, N).astype(np.float32)
    segments, positions = packed()
    if not case["segments"]:
        segments, positions = None, np.tile(np.arange(T), (B, 1))
    mask = Mask(positions, positions, segments, segments, case["causal"], case["window"], ordered=True)
    computed = executed_keys("splash", T, causal=case["causal"], window=case["window"], tiles=(128, 128))
    assert (computed < 384**2 / T) == (case["causal"] or case["window"] > 0)  # of three tiles by three
    want = loss_and_gradients(x, mask, "reference", case["options"])
    assert_equal(loss_and_gradients(x, mask, "splash_interpret", case["options"], (128, 128)), want)


@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        (
            MeshConfig(data=2, tensor=4),
            (("kv_heads", ""),),
        ),  # a device's query head reads one key head of two
        pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), (), marks=pytest.mark.slow),
    ],
)
def test_splash_on_a_mesh_equals_one_device(mesh, rules):
    """Each device runs the kernel on its own rows and heads, and gathers nothing of the others'."""
    length = 64
    x = tensors(2, rows=4, length=length)
    segments, positions = packed(length, 4)
    mask = Mask(positions, positions, segments, segments, ordered=True)
    want = loss_and_gradients(x, mask, "splash_interpret", {})
    layout = make_layout(dataclasses.replace(mesh, rules=rules))
    with use(layout):
        axes = dict(q="heads", k="kv_heads", v="kv_heads", weight="heads")
        places = {name: layout.sharding(("batch", None, axis, None)) for name, axis in axes.items()}
        placed = {name: jax.device_put(x[name], places[name]) for name in x}
        assert not placed["q"].sharding.is_fully_replicated
        assert_equal(loss_and_gradients(placed, mask, "splash_interpret", {}), want)


def test_a_kernel_inside_a_manual_region_is_called_as_it_is():
    """As a sequence-parallel form does it: inside a `shard_map` over some axes, or over all of them."""
    x = tensors(2, rows=4, length=32)
    positions = np.tile(np.arange(32), (4, 1))
    layout = Layout(make_mesh(MeshConfig(data=4, tensor=2)))

    def run(q, k, v):
        mask = Mask(*(jnp.broadcast_to(jnp.arange(32), q.shape[:2]),) * 2, ordered=True)
        return attend(q, k, v, mask, backend="splash_interpret")

    want = attend(x["q"], x["k"], x["v"], Mask(positions, positions), backend="reference")
    rows = jax.P("data")
    with use(layout):
        for names in ({"data"}, set(layout.mesh.axis_names)):
            split = jax.shard_map(
                run, in_specs=(rows, rows, rows), out_specs=rows, axis_names=names, check_vma=False
            )
            np.testing.assert_allclose(jax.jit(split)(x["q"], x["k"], x["v"]), want, atol=2e-5)


@pytest.mark.parametrize("window", [0, pytest.param(200, marks=pytest.mark.slow)])
def test_splash_of_a_part_of_the_columns_skips_what_that_part_cannot_see(window):
    """Queries split over devices, keys gathered: every device has the tiles of its own rows of the mask."""
    x, length = tensors(2, rows=2, length=512), 512
    segments, positions = packed(length, 2)
    layout = Layout(make_mesh(MeshConfig(data=2, sequence=4)))
    columns = jax.P(None, "sequence")

    def run(x, positions, segments):
        whole = lambda a: jax.lax.all_gather(a, "sequence", axis=1, tiled=True)  # noqa: E731
        sides = (positions, whole(positions), segments, whole(segments))
        mask = Mask(*sides, window=window, ordered=True, part=(jax.lax.axis_index("sequence"), 4))
        return attend(x["q"], whole(x["k"]), whole(x["v"]), mask, backend="splash_interpret")

    def loss(x):
        split = jax.shard_map(run, in_specs=(columns,) * 3, out_specs=columns, check_vma=False)
        return jnp.sum(split(x, positions, segments) * x["weight"] * (segments != 0)[..., None, None])

    mask = Mask(positions, positions, segments, segments, window=window, ordered=True)
    want = loss_and_gradients(x, mask, "reference", {})
    with use(layout):
        value, grads = jax.jit(jax.value_and_grad(loss))(x)
    assert_equal((value, grads), want)


def kernels_in(jaxpr):
    """Names of the Pallas kernels in a jaxpr, nested ones included."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            found.append(str(eqn.params["name"] if "name" in eqn.params else eqn.params["name_and_src_info"]))
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found += kernels_in(getattr(inner, "jaxpr", inner))
    return found


@pytest.mark.parametrize(("remat", "forward_runs"), [("none", 1), ("minimal", 1), ("full", 2)])
def test_minimal_remat_keeps_what_the_kernel_needs_and_full_runs_it_again(remat, forward_runs):
    positions = np.tile(np.arange(32), (B, 1))
    mask = Mask(positions, positions, ordered=True)
    x = tensors(2, length=32)

    def block(x, q):
        return attend(q, x["k"], x["v"], mask, backend="splash_interpret")

    loss = lambda x: jnp.sum(rematerialised(block, remat, scan=True)(x, x["q"]) ** 2)  # noqa: E731
    jaxpr = jax.make_jaxpr(jax.grad(loss))(x).jaxpr
    needed, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    names = kernels_in(needed)
    assert sum("fwd" in name for name in names) == forward_runs, names
    assert sum("dkv" in name or "dq" in name for name in names) == 2, names


@pytest.mark.parametrize(("remat", "forward_runs"), [("none", 1), ("minimal", 1), ("full", 2)])
def test_minimal_remat_keeps_what_cudnn_needs(remat, forward_runs, monkeypatch):
    """Traced, not run: JAX asks for cuDNN and the GPU while it traces."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(fused_attention_stablehlo, "check_is_flash_attention", lambda *args, **options: None)
    x = jnp.ones((2, 32, 4, 16), jnp.bfloat16)

    def block(x, q):
        return jax.nn.dot_product_attention(q, x, x, is_causal=True, implementation="cudnn")

    loss = lambda q: rematerialised(block, remat, scan=True)(x, q).astype(jnp.float32).sum()  # noqa: E731
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(x).jaxpr
    needed, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    assert str(needed).count("dot_product_attention_fwd_wrapper[") == forward_runs
    assert str(needed).count("dot_product_attention_bwd_wrapper[") == 1


def test_tiles_are_chosen_by_rule_or_by_the_config():
    assert [tile_size(n) for n in (100, 256, 640, 2048, 131072)] == [128, 256, 128, 512, 512]
    with pytest.raises(
        UserError, match=r"tile_q=384 must be a multiple of 128 that divides the 2048 columns"
    ):
        tile_size(2048, 384, "tile_q")
    assert executed_keys("splash", 2048, causal=True) == 2048 * (1 + 4) / 2 / 4
    assert executed_keys("splash", 2048, causal=True, tiles=(128, 128)) < 1100
    with pytest.raises(UserError, match=r"model.attention.tile_k=100 must be a multiple of 128"):
        AttentionConfig(tile_k=100)
    with pytest.raises(UserError, match=r"has no tiles to choose \(tile_q, tile_k\); use 'splash'"):
        TransformerConfig(attention=AttentionConfig(tile_q=256))


@pytest.mark.parametrize(("backend", "where"), [("splash", "TPU"), ("cudnn", "GPU")])
def test_a_kernel_of_another_platform_is_refused_with_the_alternative(backend, where):
    x = tensors(2, length=32)
    positions = np.tile(np.arange(32), (B, 1))
    run = partial(attend, x["q"], x["k"], x["v"], backend=backend)
    with pytest.raises(
        UserError, match=rf"backend='{backend}' runs on a {where}, and this is a CPU; use 'blocked'"
    ):
        run(Mask(positions, positions, ordered=True))
    with pytest.raises(
        UserError, match="has no mask over positions in any order; use 'blocked' or 'reference'"
    ):
        run(Mask(positions, positions))
    with pytest.raises(UserError, match="has no mask beyond positions and segments; use 'blocked'"):
        run(Mask(positions, positions, allowed_BTS=np.ones((B, 32, 32), bool), ordered=True))


def test_splash_multiplies_in_bfloat16_on_a_tpu(monkeypatch):
    monkeypatch.setattr(backends, "platform", lambda: "tpu")
    x = tensors(2, length=32)
    positions = np.tile(np.arange(32), (B, 1))
    with pytest.raises(UserError, match=r"model.dtype='float32': backend 'splash' multiplies in bfloat16"):
        attend(x["q"], x["k"], x["v"], Mask(positions, positions, ordered=True), backend="splash")


@pytest.mark.parametrize(
    ("backend", "fields", "message"),
    [
        ("splash", dict(dtype="float32"), r"model.dtype='float32': backend 'splash' multiplies in bfloat16"),
        (
            "splash",
            dict(accum_dtype="bfloat16"),
            r"model.accum_dtype='bfloat16': backend 'splash' sums in fl",
        ),
        ("cudnn", dict(dtype="float32"), r"backend 'cudnn' multiplies in bfloat16 or float16; use that, or"),
        ("cudnn", dict(model_dim=48), r"head_dim=12: backend 'cudnn' takes multiples of 8 up to 256"),
    ],
)
def test_what_a_kernel_does_not_take_is_refused_with_the_config(backend, fields, message):
    good = dict(dtype="bfloat16", model_dim=64, attention=AttentionConfig(backend=backend))
    TransformerConfig(**good)
    with pytest.raises(UserError, match=message):
        TransformerConfig(**good | fields)


@pytest.mark.parametrize(
    ("causal", "window", "segmented"),
    [(True, 0, False), (True, 7, True), (False, 0, True), (False, 7, True), (False, 7, False)],
)
def test_what_cudnn_is_asked_for_means_our_mask(monkeypatch, causal, window, segmented):
    """The same arguments, given to JAX's XLA form of the same function, equal the reference (in fp16)."""
    asked, real_fn = {}, jax.nn.dot_product_attention

    def recorded(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        asked.update(kwargs)
        return real_fn(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    monkeypatch.setattr(backends, "platform", lambda: "gpu")
    x = tensors(2, length=32)
    segments, positions = packed(32)
    if not segmented:
        segments, positions = None, np.tile(np.arange(32), (B, 1))
    mask = Mask(positions, positions, segments, segments, causal, window, ordered=True)
    got = attend(x["q"], x["k"], x["v"], mask, backend="cudnn", dtype="float16", scale=0.3)
    assert asked["is_causal"] == causal
    assert asked["local_window_size"] == ((window - 1, 0) if window and causal else None)
    assert (asked["mask"] is None) == (not segmented and not (window and not causal))
    want = attend(x["q"], x["k"], x["v"], mask, backend="reference", scale=0.3)
    real = np.ones((B, 32), bool) if segments is None else segments != 0
    np.testing.assert_allclose(got[real], want[real], atol=4e-3)
    with pytest.raises(
        UserError, match=r"model\.dtype='float32': backend 'cudnn' multiplies in bfloat16 or float16"
    ):
        attend(x["q"], x["k"], x["v"], mask, backend="cudnn")
    part = dataclasses.replace(mask, part=(jnp.int32(0), 2))
    with pytest.raises(UserError, match="backend 'cudnn' takes whole rows"):
        attend(x["q"], x["k"], x["v"], part, backend="cudnn", dtype="float16")
    with pytest.raises(UserError, match="head_dim=15: backend 'cudnn' takes multiples of 8 up to 256"):
        attend(*(x[name][..., :15] for name in "qkv"), mask, backend="cudnn", dtype="bfloat16")


def test_the_platform_is_that_of_the_mesh_in_use():
    assert platform() == "cpu"
    with use(Layout(make_mesh(MeshConfig(data=2, tensor=4)))):
        assert jax.jit(lambda: jnp.zeros(len(platform())))().shape == (3,)
    tpu = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",), abstract_device=tpu)):
        assert platform() == "tpu"
    assert {name for name, row in BACKENDS.items() if row.platform} == {"splash", "cudnn"}
