"""Grids: what they ask for, by independent arithmetic; what they refuse, by message."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest

from jaxlm.config import RunConfig, build, config_hash, default_config
from jaxlm.errors import UserError
from jaxlm.optim import make_schedule
from jaxlm.scaling.counting import count
from jaxlm.sweep.grids import Draft, GridConfig, expand
from jaxlm.sweep.plan import SweepConfig
from jaxlm.sweep.shapes import ShapeConfig

FAMILY = ShapeConfig(dim_min=8, dim_max=256, dim_step=8, head_dims=((0, 8), (64, 16)), depth=2)


def base_run(**fields):
    config = default_config(RunConfig)
    config.model.activation = "gelu"
    config.data.seq_len, config.data.batch_size = 128, 4
    config.optim.lr, config.optim.schedule, config.optim.warmup = 4e-3, "linear", 0.1
    for name, value in fields.items():
        group, field = name.split("__")
        config[group][field] = value
    return build(config)


RUN = base_run()


def grid_of(**fields):
    return GridConfig(**{"shape": FAMILY, **fields})


def tokens(draft: Draft) -> int:
    cfg = draft.config
    return cfg.train.num_steps * cfg.data.batch_size * cfg.data.seq_len


def flops_by_hand(draft: Draft) -> float:
    """6 per weight and token, 6 n T d for causal scores: a plain dense model, without our counting."""
    m = draft.config.model
    return (
        6 * (12 * m.num_layers + 256 / m.model_dim) * m.model_dim**2 + 6 * m.num_layers * 128 * m.model_dim
    ) * (tokens(draft))


def sizes(drafts):
    return [count(d.config.model, 128).n_total for d in drafts]


# ---------------------------------------------------------------------------------------------- budgets


def test_isoflop_runs_spend_their_budget():
    grid = grid_of(budgets=(1e11, 3e11, 1e12), centers=(26e3, 41e3, 80e3), span=2.8)
    drafts = expand(RUN, grid)
    assert len(drafts) == 15
    for draft in drafts:
        assert abs(flops_by_hand(draft) / draft.budget - 1) < 0.01
        assert draft.role == "grid"
    for budget, center in zip(grid.budgets, grid.centers, strict=True):
        row = sizes(d for d in drafts if d.budget == budget)
        assert len(set(row)) == 5
        assert row == sorted(row)
        assert abs(math.log(row[2] / center)) < 0.1
        assert row[0] < center / 1.7 < center * 1.7 < row[-1]
    assert len({d.id for d in drafts}) == 15
    assert all(d.id == config_hash(d.config)[:12] for d in drafts)


def test_steps_too_coarse_for_the_budget_are_refused_with_the_deviation():
    wide = base_run(data__batch_size=512)
    grid = grid_of(budgets=(1e11,), sizes=(80e3,))
    steps = 1e11 / (flops_by_hand(expand(RUN, grid)[0]) / tokens(expand(RUN, grid)[0]) * 512 * 128)
    deviation = round(steps) / steps - 1
    assert abs(deviation) > 0.01
    with pytest.raises(UserError, match=rf"3 steps miss it by \{deviation:+.1%}.*grid\.tolerance=0\.01"):
        expand(wide, grid)
    (loose,) = expand(wide, dataclasses.replace(grid, tolerance=0.5))
    assert loose.config.train.num_steps == 3


def test_a_fit_centres_the_sizes_and_a_holdout_is_one_run():
    asked = []

    def center(budget):
        asked.append(budget)
        return 50e3 * (budget / 1e12) ** 0.5

    grid = grid_of(budgets=(1e12, 4e12), center_fit="fit.json", role="holdout", sizes_per_budget=1)
    drafts = expand(RUN, grid, center)
    assert asked == [1e12, 4e12]
    assert [d.role for d in drafts] == ["holdout", "holdout"]
    assert [d.labels["size"] for d in drafts] == [50e3, 100e3]
    assert abs(math.log(sizes(drafts)[1] / 100e3)) < 0.1


def test_seeds_repeat_the_middle_size_of_each_budget():
    grid = grid_of(budgets=(1e11, 1e12), centers=(26e3, 80e3), seeds=(1, 2))
    drafts = expand(RUN, grid)
    assert len(drafts) == 14
    for budget in grid.budgets:
        row = [d for d in drafts if d.budget == budget]
        middle = [d for d in row if d.role == "grid"][2]
        repeats = [d for d in row if d.role == "seed"]
        assert [(d.config.seed, d.config.data.seed) for d in repeats] == [(1, 1), (2, 2)]
        for d in repeats:
            data = dataclasses.replace(d.config.data, seed=0)
            assert dataclasses.replace(d.config, seed=0, data=data) == middle.config
    # Given sizes have their middle in their logarithm.
    given = expand(RUN, grid_of(budgets=(1e11,), sizes=(14e3, 26e3, 59e3), seeds=(5,)))
    assert sizes(given)[-1] == sizes(given)[1]
    with pytest.raises(UserError, match=r"0 is run\.seed"):
        expand(RUN, dataclasses.replace(grid, seeds=(0,)))


# ------------------------------------------------------------------------------------------ other designs


def test_a_ladder_has_its_tokens_per_parameter():
    drafts = expand(RUN, grid_of(kind="ladder", ratios=(5.0, 20.0), sizes=(41e3, 80e3)))
    found = [tokens(d) / n for d, n in zip(drafts, sizes(drafts), strict=True)]
    assert found == pytest.approx([5, 5, 20, 20], rel=0.01)
    assert [d.labels["ratio"] for d in drafts] == [5, 5, 20, 20]


def test_a_rectangle_is_every_size_with_every_token_count():
    drafts = expand(RUN, grid_of(kind="rectangle", tokens=(1e5, 2e5), sizes=(14e3, 41e3, 80e3)))
    cells = list(zip(sizes(drafts), [round(tokens(d), -4) for d in drafts], strict=True))
    assert cells == [(n, t) for t in (1e5, 2e5) for n in (14_416, 41_120, 80_112)]


def test_lr_batch_sees_as_many_tokens_at_every_batch():
    grid = grid_of(kind="lr_batch", lrs=(1e-3, 2e-3), batches=(2, 8), sizes=(26e3,), tokens=(3e5,))
    drafts = expand(RUN, grid)
    assert [d.role for d in drafts] == ["tune"] * 4
    found = {(d.config.optim.lr, d.config.data.batch_size): tokens(d) for d in drafts}
    assert found.keys() == set(itertools.product((1e-3, 2e-3), (2, 8)))
    assert all(abs(t / 3e5 - 1) < 0.01 for t in found.values())
    # Neither size nor amount: the run as it stands, its tokens kept.
    drafts = expand(RUN, grid_of(kind="lr_batch", lrs=(1e-3,), batches=(4, 8)))
    assert [d.config.train.num_steps for d in drafts] == [1000, 500]
    assert all(d.config.model == RUN.model for d in drafts)
    (draft,) = expand(RUN, grid_of(kind="lr_batch", lrs=(1e-3,), sizes=(26e3,), budgets=(1e11,)))
    assert draft.budget == 1e11
    assert abs(flops_by_hand(draft) / 1e11 - 1) < 0.01


def test_inner_learning_rates_multiply_the_cells():
    grid = grid_of(budgets=(1e11,), sizes=(26e3, 41e3), lrs=(2e-3, 4e-3, 8e-3))
    drafts = expand(RUN, grid)
    assert [(d.labels["size"], d.labels["lr"]) for d in drafts] == [
        (n, lr) for n in (26e3, 41e3) for lr in grid.lrs
    ]
    assert [d.config.optim.lr for d in drafts[:3]] == list(grid.lrs)


def test_trunks_and_branches_are_wsd_runs():
    run = base_run(optim__cooldown=0.2, optim__final=0.0)
    grid = grid_of(kind="trunks", sizes=(41e3, 80e3), tokens=(0.75e6, 1.5e6, 3e6, 6e6), standalone=(1.5e6,))
    drafts = expand(run, grid)
    roles = [d.role for d in drafts]
    assert roles == (["trunk"] + ["branch"] * 4 + ["grid"]) * 2
    trunk, *branches, alone = drafts[:6]
    assert trunk.config.train.num_steps == branches[-1].branch_step
    assert trunk.config.train.save_steps == tuple(sorted(b.branch_step for b in branches))
    steps = np.arange(trunk.config.train.num_steps)

    def rates(draft, at):
        schedule = make_schedule(draft.config.optim, draft.config.train.num_steps, 512)
        return np.asarray(jax.jit(schedule)(at))

    along = rates(trunk, steps)
    warm = math.ceil(0.1 * branches[0].config.train.num_steps)
    assert along[warm:].min() == along.max() == np.float32(4e-3)
    assert along[warm - 2] < along[warm - 1] == along[warm]
    for branch, asked in zip(branches, grid.tokens, strict=True):
        cfg = branch.config
        assert branch.parent == cfg.train.branch_from == trunk.id == config_hash(trunk.config)[:12]
        assert cfg.train.branch_step == branch.branch_step
        assert abs(tokens(branch) / asked - 1) < 0.01
        assert (cfg.train.num_steps - branch.branch_step) / cfg.train.num_steps == pytest.approx(
            0.2, abs=1e-3
        )
        own = rates(branch, np.arange(cfg.train.num_steps))
        # The same rates up to the branch, falling from its first step but one to (nearly) 0 at the end.
        np.testing.assert_array_equal(own[: branch.branch_step], along[: branch.branch_step])
        after = own[branch.branch_step :]
        assert (np.diff(after) < 0).all()
        assert after[0] == along[-1]
        assert after[-1] < 0.01 * 4e-3
    spent = tokens(trunk) + sum(tokens(b) * (1 - b.branch_step / b.config.train.num_steps) for b in branches)
    # 1 + .2 (1/8 + 1/4 + 1/2) instead of 1/8 + 1/4 + 1/2 + 1 runs of 6 M tokens: 37% less.
    assert spent / sum(map(tokens, branches)) == pytest.approx(1.175 / 1.875, rel=0.01)
    assert alone.config.optim == dataclasses.replace(run.optim)
    assert alone.labels["standalone"] == 1
    late = base_run(optim__cooldown=0.8, optim__warmup=0.3)
    with pytest.raises(UserError, match="is not over where the shortest branch"):
        expand(late, grid)


def test_a_product_sets_any_field():
    product = (("optim.lr", (1e-3, 2e-3)), ("model.num_layers,model.model_dim", ((2, 64), (3, 96))))
    drafts = expand(RUN, grid_of(kind="product", product=product))
    found = [(d.config.optim.lr, d.config.model.num_layers, d.config.model.model_dim) for d in drafts]
    assert found == [(1e-3, 2, 64), (1e-3, 3, 96), (2e-3, 2, 64), (2e-3, 3, 96)]
    assert drafts[1].labels == {"optim.lr": 1e-3, "model.num_layers": 3, "model.model_dim": 96}
    budgeted = expand(RUN, grid_of(kind="product", product=product, budgets=(1e12,)))
    assert all(d.budget == 1e12 and d.config.train.num_steps != 1000 for d in budgeted)
    with pytest.raises(UserError, match=r"did you mean 'optim\.lr'"):
        expand(RUN, grid_of(kind="product", product=(("optim.lrr", (1.0,)),)))
    with pytest.raises(UserError, match=r"config optim\.lr: expected float"):
        expand(RUN, grid_of(kind="product", product=(("optim.lr", ("high",)),)))
    with pytest.raises(UserError, match="not one value for each"):
        expand(RUN, grid_of(kind="product", product=(("seed,data.seed", (1, 2)),)))
    with pytest.raises(UserError, match=r"train\.num_steps, which grid\.budgets decides"):
        expand(RUN, grid_of(kind="product", product=(("train.num_steps", (5,)),), budgets=(1e9,)))


def test_a_product_from_an_experiment_and_from_json():
    config = default_config(SweepConfig)
    config.grid.kind, config.grid.product = "product", (("data.train", ("a/*.txt", "b/*.txt")),)
    sweep = build(config, SweepConfig)
    assert [d.config.data.train for d in expand(sweep.run, sweep.grid)] == ["a/*.txt", "b/*.txt"]
    assert build({"grid": {"kind": "product", "product": [["seed", [1, 2]]]}}, SweepConfig).grid.product == (
        ("seed", (1, 2)),
    )


# ---------------------------------------------------------------------------------------------- the rules


def test_width_rule_and_exponents():
    grid = grid_of(budgets=(1e12,), sizes=(41e3, 131e3, 195e3), lr_rule="width", tolerance=0.05)
    drafts = expand(RUN, grid)
    assert [d.config.model.model_dim for d in drafts] == [32, 64, 80]
    assert [d.config.optim.multipliers[-1][1] for d in drafts] == [2.0, 1.0, 0.8]
    assert all(d.config.optim.lr == 4e-3 for d in drafts)
    scaled = dataclasses.replace(
        grid, lr_exponent=-0.5, batch_exponent=0.5, reference_size=41120.0, batch_multiple=2
    )
    drafts = expand(RUN, scaled)
    ratio = [n / 41120 for n in sizes(drafts)]
    assert [d.config.optim.lr for d in drafts] == pytest.approx([4e-3 * r**-0.5 for r in ratio], rel=1e-5)
    assert [d.config.data.batch_size for d in drafts] == [4, 8, 8]
    assert all(abs(flops_by_hand(d) / 1e12 - 1) < 0.01 for d in drafts)
    both = expand(RUN, dataclasses.replace(scaled, lrs=(1e-3, 4e-3)))
    found = [d.config.optim.lr / lr for d, lr in zip(both, (1e-3, 4e-3) * 3, strict=True)]
    assert found == pytest.approx([x for r in ratio for x in (r**-0.5,) * 2], rel=1e-5)
    with pytest.raises(UserError, match="reference_size must be set"):
        grid_of(lr_exponent=-0.5)


def test_a_parametrisation_takes_the_place_of_the_width_rule():
    grid = grid_of(budgets=(1e12,), sizes=(41e3,), lr_rule="param")
    with pytest.raises(UserError, match=r"run\.model\.parametrization='standard' has one rate"):
        expand(RUN, grid)
    model = dataclasses.replace(
        RUN.model, parametrization="mup", base_width=64, base_head_dim=8, mlp_dim=4 * RUN.model.model_dim
    )
    mup = dataclasses.replace(RUN, model=model)
    (draft,) = expand(mup, grid)
    assert draft.config.model.parametrization == "mup"
    assert draft.config.optim == RUN.optim
    with pytest.raises(UserError, match="slow hidden matrices down twice"):
        expand(mup, dataclasses.replace(grid, lr_rule="width"))


# -------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(kind="isoflops"), "did you mean 'isoflop'"),
        (dict(size_by="n_totl"), "did you mean 'n_total'"),
        (dict(role="hold"), r"grid\.role='hold' is not one of"),
        (dict(ratios=(20.0,)), r"grid\.ratios is not read by grid\.kind='isoflop' \(by ladder\)"),
        (dict(kind="trunks", seeds=(1,)), r"grid\.seeds is not read by grid\.kind='trunks'"),
        (dict(budgets=(1e11,), sizes=(1e4,), centers=(1e4,)), r"grid\.sizes and grid\.centers exclude"),
        (dict(kind="lr_batch", budgets=(1e9,), tokens=(1e5,)), "exclude each other"),
        (dict(budgets=(-1.0,)), "must be positive"),
        (dict(budgets=(1e11, 1e11)), "repeats a value"),
        (dict(budgets=(1e11,), sizes=(1e4,), lrs=(1.0,), seeds=(1,)), "under another --name"),
        (dict(tolerance=0.0), r"must lie in \(0, 1\)"),
    ],
)
def test_what_a_grid_refuses(fields, message):
    with pytest.raises(UserError, match=message):
        grid_of(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"needs grid\.budgets"),
        (dict(budgets=(1e11,)), r"needs grid\.sizes, grid\.centers or grid\.center_fit"),
        (dict(budgets=(1e11,), centers=(1e4, 2e4)), "2 sizes for 1 budgets"),
        (dict(kind="ladder", sizes=(1e4,)), r"needs grid\.ratios"),
        (dict(kind="lr_batch"), r"needs grid\.lrs"),
        (dict(kind="trunks", sizes=(41e3,), tokens=(1e6, 1.0001e6)), "two branches .* equal steps"),
    ],
)
def test_what_an_expansion_refuses(fields, message):
    with pytest.raises(UserError, match=message):
        expand(RUN, grid_of(**fields))


def test_ids_are_of_content_alone():
    grid = grid_of(budgets=(1e11,), sizes=(26e3, 41e3))
    ids = [d.id for d in expand(RUN, grid)]
    assert [d.id for d in expand(RUN, dataclasses.replace(grid, sizes=(41e3, 26e3)))] == ids[::-1]
    logged = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, log_every=7))
    assert [d.id for d in expand(logged, grid)] == ids
    assert not set(ids) & {d.id for d in expand(base_run(optim__b2=0.9), grid)}
