import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.errors import UserError
from jaxlm.sharding import Layout, tree_shardings, use
from jaxlm.train.state import abstract_state, create_state, follow_params, replace_params
from jaxlm.train.step import make_step, split_rows
from jaxlm.tree import combine, named_leaves


def shardings(state):
    return jax.tree.map(lambda x: x.sharding, state)


def host(tree):
    return {name: np.array(leaf) for name, leaf in named_leaves(tree)}


def assert_equal(a, b):
    a, b = host(a), host(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def assert_close(a, b, rtol=2e-5, atol=1e-6):
    a, b = host(a), host(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=atol, err_msg=name)


def linear(toy):
    """SGD: its update is linear in the gradient (AdamW's first ones are signs, which rounding turns over)."""
    return toy.optimizer(name="sgd", lr=0.1)


def updates(toy, microbatches=1, steps=2):
    """State after some updates on one device, and the last metrics."""
    optimizer = linear(toy)
    state, frozen = create_state(toy.init, optimizer, 0)
    step = make_step(toy.objective, optimizer, microbatches=microbatches)
    for n in range(steps):
        state, metrics = step(state, frozen, toy.batch(n))
    return state, jax.device_get(metrics)


# ------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize(
    ("mesh", "name"),
    [
        ({"data": 8}, "lion"),
        ({"fsdp": 8}, "adamw"),
        ({"tensor": 4}, "muon"),
        ({"data": 2, "fsdp": 2, "tensor": 2}, "adafactor"),
    ],
    ids=str,
)
def test_state_is_born_sharded_and_equal_to_one_device(toy, mesh, name):
    optimizer = toy.optimizer(name=name, ema=0.9, factor_min=8)
    layout = toy.layout(**mesh)
    one, _ = create_state(toy.init, optimizer, 3)
    many, _ = create_state(toy.init, optimizer, 3, layout=layout, table=toy.AXES)
    assert_equal(one, many)
    assert int(many.step) == 0
    wanted = tree_shardings(layout, many.params, toy.AXES)
    for (leaf_name, leaf), (_, want) in zip(named_leaves(many.params), named_leaves(wanted), strict=True):
        assert leaf.sharding == want, leaf_name
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(many.params)) == (
        "fsdp" in mesh or "tensor" in mesh
    )
    shapes = dict(named_leaves(many.params))
    for leaf_name, leaf in named_leaves(many.opt_state):
        owner = next((p for n, p in shapes.items() if leaf_name.endswith("/" + n)), None)
        if owner is not None and owner.shape == leaf.shape:
            assert leaf.sharding == owner.sharding, leaf_name
        elif owner is None:
            assert leaf.sharding.is_fully_replicated, leaf_name


def test_factored_statistics_keep_the_layout_of_the_dimensions_that_are_left(toy):
    layout = toy.layout(fsdp=2, tensor=4)
    params = {"mlp": {"w": jax.ShapeDtypeStruct((3, 16, 32), jnp.float32)}}
    spec = NamedSharding(layout.mesh, PartitionSpec(None, "fsdp", "tensor"))
    statistics = {
        "row": {"mlp": {"w": jax.ShapeDtypeStruct((3, 16, 1), jnp.float32)}},
        "column": {"mlp": {"w": jax.ShapeDtypeStruct((3, 1, 32), jnp.float32)}},
        "none": {"mlp": {"w": jax.ShapeDtypeStruct((1,), jnp.float32)}},
        "count": jax.ShapeDtypeStruct((), jnp.int32),
    }
    got = dict(named_leaves(follow_params(statistics, params, {"mlp": {"w": spec}}, layout.mesh)))
    assert got["row/mlp/w"].spec == PartitionSpec(None, "fsdp", None)
    assert got["column/mlp/w"].spec == PartitionSpec(None, None, "tensor")
    assert got["none/mlp/w"].spec == PartitionSpec() == got["count"].spec


def test_abstract_state_is_what_create_state_makes(toy):
    optimizer, layout = toy.optimizer(), toy.layout(fsdp=4, tensor=2)
    chosen = {"layout": layout, "table": toy.AXES, "trainable": lambda name, _: name.startswith("blocks")}
    real = create_state(toy.init, optimizer, 0, **chosen)
    abstract = abstract_state(toy.init, optimizer, **chosen)
    assert jax.tree.structure(real) == jax.tree.structure(abstract)
    for a, b in zip(jax.tree.leaves(real), jax.tree.leaves(abstract), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_seed_decides_parameters_and_key_apart(toy):
    a, _ = create_state(toy.init, toy.optimizer(), 0)
    b, _ = create_state(toy.init, toy.optimizer(), 1)
    assert not np.array_equal(a.key, b.key)
    assert not np.array_equal(a.params["head"]["w"], b.params["head"]["w"])
    assert not np.array_equal(a.key, jax.random.key_data(jax.random.key(0)))
    with pytest.raises(UserError, match="seed=-1"):
        create_state(toy.init, toy.optimizer(), -1)


def test_frozen_parameters_do_not_move_and_have_no_optimizer_state(toy):
    optimizer = toy.optimizer()
    state, frozen = create_state(toy.init, optimizer, 0, trainable=lambda name, _: name.startswith("head"))
    assert [name for name, _ in named_leaves(state.params)] == ["head/w"]
    assert not any("mlp" in name for name, _ in named_leaves(state.opt_state))
    before = host(combine(state.params, frozen))
    step = make_step(toy.objective, optimizer)
    for n in range(2):
        state, _ = step(state, frozen, toy.batch(n))
    after = host(combine(state.params, frozen))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"head/w"}


@pytest.mark.slow
def test_replace_params_makes_the_optimizer_state_anew(toy):
    optimizer, layout = toy.optimizer(ema=0.5), toy.layout(fsdp=8)
    state, _ = create_state(toy.init, optimizer, 0, layout=layout, table=toy.AXES)
    state, _ = make_step(toy.objective, optimizer)(state, None, toy.batch(0))
    other, _ = create_state(toy.init, optimizer, 9, layout=layout, table=toy.AXES)
    warm = replace_params(state, other.params, optimizer)
    assert_equal(warm.opt_state, other.opt_state)
    assert int(warm.step) == 0
    # Donation must not meet one buffer twice.
    make_step(toy.objective, optimizer)(warm, None, toy.batch(0))


# -------------------------------------------------------------------------------------------------- step


def test_step_is_the_gradient_of_the_mean_over_all_weights(toy):
    optimizer = toy.optimizer(
        name="sgd", lr=1.0, warmup=0, schedule="constant", momentum=0.0, clip_norm=0.0, weight_decay=0.0
    )
    state, _ = create_state(toy.init, optimizer, 0)
    params, batch = host(state.params), toy.batch(0)

    def mean_loss(p):
        loss, weight, _ = toy.objective(p, batch, None)
        return loss / weight

    loss, grads = jax.value_and_grad(mean_loss)(state.params)
    after, metrics = make_step(toy.objective, optimizer)(state, None, batch)
    for name, g in named_leaves(grads):
        np.testing.assert_allclose(
            dict(named_leaves(after.params))[name], params[name] - g, rtol=1e-5, atol=1e-6
        )
    total, weight = metrics["total"]
    np.testing.assert_allclose(total / weight, loss, rtol=1e-6)
    np.testing.assert_allclose(weight, batch["weights"].sum(), rtol=1e-6)
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(grads)))
    for name in ("grad_norm", "update_norm"):
        np.testing.assert_allclose(metrics[name][0], norm, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["param_norm"][0], np.sqrt(sum(np.square(p).sum() for p in params.values())), rtol=1e-5
    )
    assert float(metrics["lr"][0]) == 1.0
    assert float(metrics["nonfinite"][0]) == 0.0
    assert all(float(metrics[name][1]) == 1.0 for name in ("lr", "grad_norm", "nonfinite"))


@pytest.fixture(scope="module")
def reference(toy):
    """Two updates in one piece on one device."""
    return updates(toy)


def test_microbatches_make_one_update(toy, reference):
    one, sums_one = reference
    for microbatches in (2, 4):
        many, sums_many = updates(toy, microbatches)
        assert_close(one.params, many.params)
        for name in ("total", "nll", "large", "grad_norm"):
            np.testing.assert_allclose(sums_one[name], sums_many[name], rtol=1e-5)
        # The weights are ragged: a mean of the microbatches' means would be another number.
        parts = toy.batch(0)["weights"].reshape(-1, microbatches, 4).sum((0, 2))
        assert parts.max() > 1.1 * parts.min()


def test_only_microbatches_scan(toy):
    optimizer = toy.optimizer()
    state, _ = create_state(toy.init, optimizer, 0)
    texts = [
        str(jax.make_jaxpr(make_step(toy.objective, optimizer, microbatches=m))(state, None, toy.batch(0)))
        for m in (1, 2)
    ]
    assert "scan[" not in texts[0]
    assert "scan[" in texts[1]


def test_microbatches_accumulate_bf16_gradients_in_fp32(toy):
    # 512 microbatches: a bf16 sum stalls when the total is 256 times the part.
    def init(key):
        return {"head": {"w": jnp.zeros((1, 1), jnp.bfloat16)}}

    def objective(params, batch, key):
        loss = jnp.sum(params["head"]["w"].astype(jnp.float32) * batch["x"])
        return loss, jnp.float32(batch["x"].size), {}

    optimizer = toy.optimizer()
    state, _ = create_state(init, optimizer, 0)
    rows = 1.0 + np.arange(512, dtype=np.float32)[:, None] / 512
    _, metrics = make_step(objective, optimizer, microbatches=512)(state, None, {"x": rows})
    np.testing.assert_allclose(metrics["grad_norm"][0], rows.mean(), rtol=4e-3)


def test_split_rows_moves_no_row_between_devices(toy):
    layout = toy.layout(data=4, tensor=2)
    rows = {"x": np.arange(16 * 3, dtype=np.float32).reshape(16, 3), "id": np.arange(16)}
    placed = jax.device_put(rows, layout.sharding(("batch",)))
    with use(layout):
        split = jax.jit(split_rows, static_argnums=1)
        text = split.lower(placed, 2).compile().as_text()
        out = split(placed, 2)
    np.testing.assert_array_equal(out["id"], np.arange(16).reshape(8, 2).T)
    np.testing.assert_array_equal(out["x"], rows["x"].reshape(8, 2, 3).swapaxes(0, 1))
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
    for shard in placed["id"].addressable_shards:
        here = next(s for s in out["id"].addressable_shards if s.device == shard.device)
        assert set(np.array(shard.data).ravel()) == set(np.array(here.data).ravel())
    with pytest.raises(ValueError, match="microbatches=3 does not divide the batch of 16 rows"):
        split_rows(rows, 3)


@pytest.mark.parametrize(
    ("mesh", "microbatches"),
    [({"data": 8}, 2), ({"fsdp": 8}, 1), ({"tensor": 4}, 2), ({"data": 2, "fsdp": 2, "tensor": 2}, 2)],
    ids=str,
)
def test_step_is_the_same_on_every_mesh(toy, reference, mesh, microbatches):
    one, sums_one = reference
    optimizer, layout = linear(toy), toy.layout(**mesh)
    with use(layout):
        state, _ = create_state(toy.init, optimizer, 0, layout=layout, table=toy.AXES)
        where = shardings(state)
        step = make_step(toy.objective, optimizer, microbatches=microbatches, shardings=where)
        for n in range(2):
            batch = jax.device_put(toy.batch(n), layout.sharding(("batch",)))
            state, metrics = step(state, None, batch)
    assert step._cache_size() == 1
    assert shardings(state) == where
    assert_close(one.params, state.params)
    for name in ("total", "nll", "grad_norm"):
        np.testing.assert_allclose(sums_one[name], metrics[name], rtol=1e-5)


def test_state_is_donated(toy):
    optimizer = toy.optimizer()
    state, _ = create_state(toy.init, optimizer, 0)
    after, _ = make_step(toy.objective, optimizer, shardings=shardings(state))(state, None, toy.batch(0))
    # (Scalars that the update overwrites without reading are not even passed in.)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.ndim)
    assert int(after.step) == 1


def test_zero_weight_is_a_zero_gradient_and_no_nan(toy):
    optimizer = toy.optimizer(weight_decay=0.0)
    state, _ = create_state(toy.init, optimizer, 0)
    before = host(state.params)
    batch = toy.batch(0) | {"weights": np.zeros((16, 4), np.float32)}
    after, metrics = make_step(toy.objective, optimizer)(state, None, batch)
    assert float(metrics["total"][1]) == 0.0
    assert float(metrics["grad_norm"][0]) == 0.0
    assert float(metrics["nonfinite"][0]) == 0.0
    for name, leaf in named_leaves(after.params):
        np.testing.assert_array_equal(leaf, before[name])


def test_nonfinite_gradient_is_skipped_and_counted(toy):
    optimizer = toy.optimizer()
    state, _ = create_state(toy.init, optimizer, 0)
    before = host(state.params)
    bad = toy.batch(0)
    bad["x"][3, 1, 0] = np.nan
    bad["weights"][3, 1] = 1.0
    step = make_step(toy.objective, optimizer)
    state, metrics = step(state, None, bad)
    assert_equal(before, state.params)
    assert (float(metrics["nonfinite"][0]), float(metrics["skipped"][0])) == (1.0, 1.0)
    state, metrics = step(state, None, toy.batch(1))
    assert (float(metrics["nonfinite"][0]), float(metrics["skipped"][0])) == (0.0, 1.0)
    assert int(state.step) == 2


def test_dropout_key_differs_by_step_and_microbatch_and_run(toy):
    def objective(params, batch, key):
        bits = jax.random.bits(key, dtype=jnp.uint32).astype(jnp.float32)
        loss = jnp.sum(params["head"]["w"]) * 0 + bits * 0
        return loss, jnp.float32(1), {"bits": (bits, jnp.float32(1))}

    optimizer, steps_by_size = toy.optimizer(), {}

    def drawn(seed, steps, microbatches=1):
        state, _ = create_state(toy.init, optimizer, seed)
        step = steps_by_size.setdefault(
            microbatches, make_step(objective, optimizer, microbatches=microbatches)
        )
        out = []
        for _ in range(steps):
            state, metrics = step(state, None, {"x": np.zeros((4, 1), np.float32)})
            out.append(float(metrics["bits"][0]))
        return out

    first = drawn(0, 3)
    assert first == drawn(0, 3)
    assert len({*first, *drawn(1, 3)}) == 6
    two = drawn(0, 1, microbatches=2)[0]
    assert two != first[0]
    assert two != 2 * first[0]


def test_optimizer_that_changes_its_state_types_is_refused(toy):
    def update(updates, state, params=None):
        return updates, state.astype(jnp.bfloat16)

    drifting = optax.GradientTransformation(lambda params: jnp.zeros((3,)), update)
    state, _ = create_state(toy.init, drifting, 0)
    with pytest.raises(ValueError, match=r"opt_state.* from float32\[3\] into bfloat16\[3\]"):
        make_step(toy.objective, drifting)(state, None, toy.batch(0))


def test_next_counts_one_update(toy):
    state, _ = create_state(toy.init, toy.optimizer(), 0)
    after = state.next(state.params, state.opt_state)
    assert int(after.step) == 1
    assert dataclasses.replace(after, step=state.step).key is state.key
    assert isinstance(toy.layout(data=8), Layout)


def test_a_batch_of_no_weight_has_no_gradient_even_of_auxiliary_losses(toy):
    def objective(params, batch, key):
        loss, weight, metrics = toy.objective(params, batch, key)
        return loss, 0.0 * weight, metrics  # the loss still has a gradient, as that of a router would

    optimizer = toy.optimizer(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0)
    state, frozen = create_state(toy.init, optimizer, 0)
    before = host(state.params)
    after, metrics = make_step(objective, optimizer)(state, frozen, toy.batch(0))
    assert float(metrics["grad_norm"][0]) == 0.0
    for name, leaf in host(after.params).items():
        np.testing.assert_array_equal(leaf, before[name], err_msg=name)
