"""Named leaves of nested dicts: the only pytree functions of the library.

A leaf's name is its path joined by slashes, such as `blocks/0/attention/wq`.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Tree = Any


def path_name(path: tuple) -> str:
    """The slash-joined name of a `jax.tree_util` key path.

    >>> [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path({"a": {"b": 1}, "c": [2]})]
    ['a/b', 'c/0']
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """`(name, leaf)` pairs of `tree` in flattening order."""
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def map_named(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`jax.tree.map` whose function also gets the leaf's name: `fn(name, leaf, *rest_leaves)`."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: fn(path_name(path), *leaves), tree, *rest)


def partition(tree: Tree, predicate: Callable[[str, Any], bool]) -> tuple[Tree, Tree]:
    """Split `tree` in two of the same structure: leaves where `predicate(name, leaf)` holds, and the others.

    The holes are `None`, which JAX treats as an empty subtree, so either half goes through `jax.grad`,
    Optax or a checkpoint as it is.

    >>> partition({"w": 1, "b": 2}, lambda name, leaf: name == "w")
    ({'b': None, 'w': 1}, {'b': 2, 'w': None})
    """
    chosen = map_named(lambda name, leaf: bool(predicate(name, leaf)), tree)
    yes = jax.tree.map(lambda keep, leaf: leaf if keep else None, chosen, tree)
    no = jax.tree.map(lambda keep, leaf: None if keep else leaf, chosen, tree)
    return yes, no


def combine(first: Tree, second: Tree) -> Tree:
    """Put the two halves of `partition` together again.

    >>> combine({'b': None, 'w': 1}, {'b': 2, 'w': None})
    {'b': 2, 'w': 1}
    """
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None)


def size(tree: Tree) -> int:
    """Number of array elements in `tree` (arrays or `ShapeDtypeStruct`s)."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Tree) -> int:
    """Bytes of all arrays in `tree` (arrays or `ShapeDtypeStruct`s)."""
    return sum(
        int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
