"""Updates one layer at a time: the same numbers as all at once, for every optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.optim import OPTIMIZERS, OptimConfig, make_optimizer
from jaxlm.sharding import HOST, MeshConfig, make_layout, use
from jaxlm.train.state import follow_params
from jaxlm.transforms import owner_of, stacked
from jaxlm.tree import map_named, named_leaves

SHAPES = {  # two stacks of different length, and leaves outside them
    "embed": {"table": (12, 8)},
    "blocks": {
        "0": {
            "attention": {"wq": (4, 8, 2, 4), "wo": (4, 2, 4, 8)},
            "mlp_norm": {"scale": (4, 8)},
            "moe": {"router_bias": (4, 2), "w_up": (4, 2, 8, 6)},
        },
    },
    "encoder": {"blocks": {"0": {"mlp": {"w_up": (2, 8, 6)}}}},
    "head": {"w": (8, 12)},
}
CASES = {
    "adamw": OptimConfig(name="adamw", ema=0.9, multipliers=(("embed", 2.0),)),
    "adafactor": OptimConfig(name="adafactor", factor_min=2, parameter_scale=True),
    "lion": OptimConfig(name="lion", b2=0.99),
    "muon": OptimConfig(name="muon"),
    "sgd": OptimConfig(name="sgd"),
    "master": OptimConfig(name="adamw"),  # these two with bf16 parameters
    "stochastic": OptimConfig(name="adamw", low_precision="stochastic"),
}
MESHES = {"one": MeshConfig(data=1), "stages": MeshConfig(data=1, fsdp=2, pipe=2)}


def tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = jax.tree.leaves(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    leaves = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    return jax.tree.unflatten(jax.tree.structure(SHAPES, is_leaf=lambda x: isinstance(x, tuple)), leaves)


def shardings_of(mesh, params):
    """Layers over the stages, the next dimension over fsdp."""

    def one(name, _):
        dims = ("pipe", "fsdp") if stacked(name) else ("fsdp",)
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*dims))

    return map_named(one, params)


def updated(case, mesh, offload):
    """(parameters, state) after four updates, the third of them with a NaN, and the traced update."""
    params = tree(0, jnp.bfloat16 if case in ("master", "stochastic") else jnp.float32)
    optimizer = make_optimizer(CASES[case], lambda count: 0.1 / (count + 1))
    layout = make_layout(MESHES[mesh])
    shardings = shardings_of(layout.mesh, params)
    params = jax.device_put(params, shardings)
    state = optimizer.init(params)
    places = follow_params(state, params, shardings, layout.mesh)
    names = {name for name, _ in named_leaves(params)}
    if offload:
        places = map_named(lambda name, s: s.with_memory_kind(HOST) if owner_of(name, names) else s, places)
    state = jax.device_put(state, places)

    def update(grads, params, state):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with use(layout):
        update = jax.jit(update, out_shardings=(shardings, places))
        traced = update.trace(jax.device_put(tree(1), shardings), params, state)
        step = traced.lower().compile()
        for n in range(4):
            grads = tree(1 + n)
            if n == 2:
                grads["head"]["w"] = grads["head"]["w"].at[0, 0].set(jnp.nan)
            old = jax.tree.leaves((params, state.inner))
            params, state = step(jax.device_put(grads, shardings), params, state)
            new = jax.tree.leaves((params, state.inner))
            assert all(map(np.array_equal, old, new)) == (n == 2)
    return params, state, str(traced.jaxpr)


@pytest.mark.parametrize(
    ("case", "mesh"),
    [
        *[(case, "one") for case in CASES],
        *[(case, "stages") for case in ("adamw", "adafactor", "muon", "master")],
    ],
)
def test_by_layer_is_the_same_update(case, mesh):
    params, state, _ = want = updated(case, mesh, offload=False)
    got = updated(case, mesh, offload=True)
    assert got[2].count("scan[") == want[2].count("scan[") + 2  # a loop for each of the two stacks
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)} == {"device"}
    moved = [name for name, leaf in named_leaves(got[1]) if leaf.sharding.memory_kind == HOST]
    assert moved
    assert all(owner_of(name, {n for n, _ in named_leaves(params)}) for name in moved)
    assert state.nonfinite == 1
    for (name, a), (_, b) in zip(named_leaves(want[:2]), named_leaves(got[:2]), strict=True):
        # A loop's body and the whole update are fused differently: the last bit of a float32 may differ.
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(b, a, rtol=1e-6, atol=5e-7, err_msg=name)


def test_every_optimizer_is_among_the_cases():
    assert {cfg.name for cfg in CASES.values()} == set(OPTIMIZERS)
