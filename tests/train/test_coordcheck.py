"""The coordinate check: muP passes and the standard parametrisation fails, over widths and over depths."""

import dataclasses
import re

import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.model.attention import AttentionConfig
from jaxlm.model.config import TransformerConfig
from jaxlm.model.moe import MoEConfig
from jaxlm.optim import OptimConfig
from jaxlm.train import coordcheck
from jaxlm.train.coordcheck import (
    CoordCheck,
    coordcheck_command,
    coordinate_check,
    markov_batch,
    parametrised,
    resize,
)

MODEL = TransformerConfig(
    vocab_size=32,
    num_layers=2,
    model_dim=32,
    base_width=32,
    base_depth=2,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
)
MUP = dataclasses.replace(MODEL, parametrization="mup")
OPTIM = OptimConfig(lr=3e-3)
SMALL = dict(steps=3, seeds=1, rows=4, columns=32)


def over_widths(model, optim=OPTIM, widths=(32, 128), **options):
    return coordinate_check(model, optim, axis="width", sizes=widths, **{**SMALL, **options})


def test_mup_passes_and_standard_fails_over_widths():
    standard, mup = over_widths(MODEL), over_widths(MUP)
    for role in ("attention", "mlp", "stream 2", "logits"):
        assert standard.slope(role) > 0.5, standard.text()
        assert not standard.passes(role)
    assert mup.passed, mup.text()
    assert abs(mup.slope("embedding")) < 0.03
    # At the base width they are one model.
    for role in mup.change:
        np.testing.assert_allclose(mup.change[role][0], standard.change[role][0], rtol=1e-6)


@pytest.mark.slow
def test_completep_is_flat_over_depths_and_mup_drifts():
    complete = dataclasses.replace(MODEL, parametrization="completep")
    sizes = dict(axis="depth", sizes=(2, 4, 8))
    flat = coordinate_check(complete, OPTIM, **sizes, **SMALL)
    assert flat.passed
    mup = coordinate_check(MUP, OPTIM, **sizes, **SMALL)
    assert mup.slope("stream 1/1") > 0.1 > abs(flat.slope("stream 1/1")), mup.text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "optim",
    [
        OptimConfig(name="sgd", lr=0.1),
        OptimConfig(name="lion", lr=1e-3),
        OptimConfig(name="muon", lr=3e-3),
        OptimConfig(name="muon", lr=3e-3, muon_rms=0.0),
        OptimConfig(name="adafactor", lr=1e-3, factor_min=1),
    ],
    ids=["sgd", "lion", "muon", "muon_shape", "adafactor"],
)
def test_other_optimizers_have_the_right_rules(optim):
    check = over_widths(MUP, optim)
    assert check.passed, check.text()
    plain = over_widths(MODEL, optim)
    assert not plain.passed, plain.text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        dict(tie_embeddings=True),
        dict(mlp_pattern=("moe",), moe=MoEConfig(num_experts=4, expert_dim=32, dropless_backend="dense")),
        dict(norm_position="sandwich", init_std=0.0, scale_embeddings=True, activation="gelu"),
    ],
    ids=["tied", "moe", "sandwich"],
)
def test_variations_pass(fields):
    check = over_widths(dataclasses.replace(MUP, **fields))
    assert check.passed, check.text()


def test_wider_models_have_more_heads_and_wider_mlps():
    model = dataclasses.replace(
        MODEL, mlp_dim=48, mlp_pattern=("moe",), moe=MoEConfig(num_experts=2, expert_dim=16)
    )
    wide = resize(model, "width", 96)
    assert (wide.model_dim, wide.mlp_dim, wide.moe.expert_dim) == (96, 144, 48)
    assert (wide.attention.num_heads, wide.attention.num_kv_heads, wide.head_dim) == (12, 6, 8)
    assert resize(MODEL, "depth", 6).num_layers == 6
    with pytest.raises(UserError, match=r"--widths: 44 is not divisible by 8.* nearest that is: 48"):
        resize(MODEL, "width", 44)


def test_the_smallest_size_is_the_base_where_none_is_named():
    fresh = dataclasses.replace(MODEL, model_dim=48, base_width=0, base_depth=0)
    complete = parametrised(fresh, "completep", (96, 48), ())
    assert (complete.base_width, complete.base_depth, complete.attention.head_dim) == (48, 2, 12)
    assert parametrised(fresh, "mup", (), (8, 4)).base_depth == 4
    assert parametrised(MODEL, "mup", (96, 48), (8, 4)).base_width == 32


def test_the_batch_is_a_markov_chain():
    batch = markov_batch(256, 64, 200, seed=1)
    assert batch["tokens"].shape == batch["targets"].shape == (64, 200)
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    pairs = set(zip(batch["tokens"].ravel().tolist(), batch["targets"].ravel().tolist(), strict=True))
    assert len(pairs) <= 32 * 4
    assert batch["tokens"].max() < 32


def made(slope, broken=False):
    sizes = (64, 128, 256)
    change = {
        role: np.outer(np.array(sizes, float) ** slope, [0.5, 1.0])
        for role in ("embedding", "stream 1", "logits")
    }
    if broken:
        change["logits"][2, 1] = np.nan
    return CoordCheck("mup", "width", sizes, change)


def test_slopes_and_verdicts():
    assert made(0.4).slope("logits") == pytest.approx(0.4)
    assert made(0.4).slope("logits", 0) == pytest.approx(0.4)
    assert [made(slope).passed for slope in (0.0, 0.15, 0.25, -0.15, -0.3)] == [
        True,
        True,
        False,
        True,
        False,
    ]
    assert not made(0.0, broken=True).passed
    assert re.search(r"logits +.* \+0.40 .*FAIL\nmup: FAIL$", made(0.4).text())


@pytest.mark.slow
def test_the_picture_and_the_command(tmp_path, capsys, monkeypatch):
    from matplotlib.image import imread

    asked = []

    def measured(model, optim, *, axis, sizes, **options):
        asked.append((model.parametrization, axis, sizes))
        grows = axis == "depth" or model.parametrization == "standard"
        return dataclasses.replace(made(0.7 * grows), parametrization=model.parametrization)

    monkeypatch.setattr(coordcheck, "coordinate_check", measured)
    out = tmp_path / "new" / "check.png"
    assert coordcheck_command(MUP, OPTIM, widths=(32, 64), out=out)
    assert capsys.readouterr().out.rstrip().endswith(f"mup: PASS\npicture: {out}")
    height = imread(out).shape[0]
    assert not coordcheck_command(MUP, OPTIM, widths=(32, 64), depths=(2, 4), out=out)
    assert "mup: FAIL" in capsys.readouterr().out
    assert imread(out).shape[0] > 1.5 * height
    assert asked == [("mup", "width", (32, 64))] * 2 + [("mup", "depth", (2, 4))]
    assert [path.name for path in out.parent.iterdir()] == ["check.png"]

    # Only what promises a transfer has to hold it.
    both = dict(parametrizations=("standard", "mup"), widths=(32, 64), out=out)
    assert coordcheck_command(MODEL, OPTIM, **both)
    assert re.search("standard: FAIL.*mup: PASS", capsys.readouterr().out, re.DOTALL)
    assert not coordcheck_command(MODEL, OPTIM, widths=(32, 64), out=out)


def test_refusals():
    for options, message in (
        (dict(axis="width", sizes=(64,)), "--widths=64: a slope needs two"),
        (dict(axis="depth", sizes=(2, 3)), "--depths=2,3 must be even"),
        (dict(axis="width", sizes=(32, 64), steps=0), "--steps=0"),
    ):
        with pytest.raises(UserError, match=message):
            coordinate_check(MODEL, OPTIM, **options)
    with pytest.raises(UserError, match="needs --widths or --depths"):
        coordcheck_command(MODEL, OPTIM, widths=(), depths=())
    with pytest.raises(UserError, match="'sgd'"):
        coordcheck_command(MODEL, OptimConfig(name="sgd"), parametrizations=("standard", "completep"))
