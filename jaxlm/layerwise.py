"""The optimizer's update with its state in the host's memory: fetched and sent back one layer at a time.

A compiler that is given the whole update fetches all of the state, and then what lies in the host's memory
has saved nothing on the device. A loop over the layers leaves it no choice: an iteration slices one layer's
state out of the host's buffers, fetches it, updates it and writes it back in place. Leaves that are not
stacked over layers (embedding, head) follow one after another.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax
from jaxtyping import Array, Int

from jaxlm.sharding import current
from jaxlm.transforms import Transform, owner_of, stacked
from jaxlm.tree import combine, named_leaves, partition
from jaxlm.weights import beside, in_host, on_device

Names = frozenset[str]


def by_layer(inner: Transform) -> Transform:
    """`inner`, run on one part of the parameters after the other if its state lies in the host's memory.

    Parts are the layers of leaves that are stacked over layers, and every other leaf by itself. `inner` must
    treat layers and matrices each for themselves, and find out what a leaf is from its name and rank: it gets
    a layer as a stack of one. What its state has beside leaves that belong to parameters (counts, the
    learning rate) must depend on nothing but the number of updates.

    Gradients are float32, as updates take their place.
    """

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if not any(map(in_host, jax.tree.leaves(state))):
            return inner.update(grads, state, params)
        names = frozenset(name for name, _ in named_leaves(grads))
        old, state = partition(state, lambda name, _: owner_of(name, names) is None)
        new = old
        for part, length in _parts(grads):
            mine = lambda name, _, part=part: owner_of(name, names) in part  # noqa: E731
            (g, updates), (s, others), (p, _) = (partition(tree, mine) for tree in (grads, state, params))

            def one(g: Any, s: Any, p: Any) -> tuple[Any, Any, Any]:
                u, after = inner.update(g, combine(old, jax.tree.map(on_device, s)), p)
                new, after = partition(after, lambda name, _: owner_of(name, names) is None)
                return u, jax.tree.map(beside, after, s), new

            u, s, new = _over_layers(one, length, g, s, p, new) if length else one(g, s, p)
            # The next part waits for this one, or the compiler would fetch both at once.
            grads, state = jax.lax.optimization_barrier((combine(u, updates), combine(s, others)))
        return grads, combine(new, state)

    return optax.GradientTransformation(inner.init, update)


def _parts(grads: Any) -> Iterator[tuple[Names, int]]:
    """(leaves, number of layers over which they are stacked), or (one leaf, 0)."""
    leaves = named_leaves(grads)
    lengths = {name: leaf.shape[0] for name, leaf in leaves if stacked(name)}
    for length in sorted(set(lengths.values())):
        yield frozenset(name for name in lengths if lengths[name] == length), length
    for name, _ in leaves:
        if name not in lengths:
            yield frozenset([name]), 0


def _over_layers(
    one: Callable[..., tuple[Any, Any, Any]], length: int, g: Any, s: Any, p: Any, new: Any
) -> tuple[Any, Any, Any]:
    """`one` for each of the layers, its results in the place of `g` and `s`.

    Layers that a mesh axis splits are taken as many at a time as there are parts, one from each.
    """
    layout = current()
    ways = 1 if layout is None else layout.shards("layers")

    def at(x: Array, i: Int[Array, ""]) -> Array:
        return jax.lax.dynamic_index_in_dim(x.reshape(ways, -1, *x.shape[1:]), i, 1, keepdims=False)

    def put(x: Array, part: Array, i: Int[Array, ""]) -> Array:
        parts = x.reshape(ways, -1, *x.shape[1:])
        return jax.lax.dynamic_update_index_in_dim(parts, part, i, 1).reshape(x.shape)

    def body(i: Int[Array, ""], carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        g, s, _ = carry
        layer = jax.tree.map(lambda x: at(x, i), (g, s, p))
        u, after, new = one(*layer)
        return *jax.tree.map(lambda x, part: put(x, part, i), (g, s), (u, after)), new

    return jax.lax.fori_loop(0, length // ways, body, (g, s, new))
