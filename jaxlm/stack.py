"""Run L copies of a block: scanned or unrolled, with a remat policy by name. Knows no transformer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.sharding import current
from jaxlm.weights import ATTENDED, PRODUCT

Block = Callable[[Any, Any, Any], tuple[Any, Any]]  # (one layer's params, carry, its slice of xs)

BLOCK_INPUT = "block_input"  # the name by which a remat policy finds what a block is given


def _to_host(*names: str) -> Callable[..., Any]:
    """Keep the residuals of these names, in pinned host memory, and no others."""
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst="pinned_host",
    )


_NAMED = jax.checkpoint_policies.save_only_these_names(PRODUCT, ATTENDED)
_CUDNN = "dot_product_attention_fwd_wrapper"  # JAX's primitive, whose results carry no name


def _keep_products(prim: Any, *args: Any, **params: Any) -> bool:
    """Keep what has a name of ours, and cuDNN's attention."""
    return prim.name == _CUDNN or _NAMED(prim, *args, **params)


REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,  # keep every residual
    # keep weight products, in their own dtype, and what an attention kernel's backward pass reads; by name,
    # as a policy does not see into their custom gradients
    "minimal": _keep_products,
    "full": jax.checkpoint_policies.nothing_saveable,  # keep the block's input alone
    "offload": _to_host(BLOCK_INPUT),  # keep the block's input, in the host's memory
    # what `minimal` keeps, in the host's memory, but for cuDNN's attention, which runs again
    "offload_minimal": _to_host(BLOCK_INPUT, PRODUCT, ATTENDED),
}


@jax.custom_vjp
def unstack(tree: Any) -> list[Any]:
    """The L slices of a tree whose leaves are stacked along a leading axis of length L."""
    length = jax.tree.leaves(tree)[0].shape[0]
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(length)]


# Autodiff of L slices is L scatters into L zero arrays; stacking the cotangents is one copy.
unstack.defvjp(
    lambda tree: (unstack(tree), None),
    lambda _, gs: (jax.tree.map(lambda *g: jnp.stack(g), *gs),),
)


def _keep_all_but_moved(prim: Any, *_: Any, **params: Any) -> bool:
    """Keep every residual but casts and changes of layout, else every layer would keep gathered weights."""
    moves = ("sharding_constraint", "all_gather", "device_put")
    return prim.name not in (*moves, "convert_element_type", "broadcast_in_dim", "squeeze")


def rematerialised(block: Callable[..., Any], remat: str, *, scan: bool) -> Callable[..., Any]:
    """`block` under the remat policy of that name; see `REMAT`."""
    policy = REMAT[remat]
    if policy is None:
        if current() is None:
            return block
        policy = _keep_all_but_moved

    def named(params: Any, carry: Any, *rest: Any) -> Any:
        return block(params, jax.tree.map(lambda x: checkpoint_name(x, BLOCK_INPUT), carry), *rest)

    return jax.checkpoint(named, policy=policy, prevent_cse=not scan)


def run_stack(
    block: Block,
    params: Any,
    carry: Any,
    xs: Any = None,
    *,
    scan: bool = True,
    remat: str = "none",
    uses: int = 1,
) -> tuple[Any, Any]:
    """Apply `block` once per layer: `carry, y = block(params_l, carry, x_l)`.

    Args:
        block: pure function of (one layer's params, carry, one layer's slice of `xs`).
        params: tree with leaves stacked along a leading axis of length L / uses.
        carry: what flows from layer to layer.
        xs: further per-layer inputs (caches, keys), stacked along an axis of length L, or None.
        scan: `lax.scan` (one compiled body) or an unrolled Python loop; the values are the same.
        remat: name in `REMAT`.
        uses: how many layers in a row have the same parameters; their gradients are added up.

    Returns:
        The last carry, and the per-layer outputs stacked along a leading axis of length L.
    """
    body = rematerialised(block, remat, scan=scan)
    if scan and uses == 1:
        return jax.lax.scan(lambda c, px: body(px[0], c, px[1]), carry, (params, xs))
    if scan:
        xs = jax.tree.map(lambda x: x.reshape(x.shape[0] // uses, uses, *x.shape[1:]), xs)
        carry, ys = jax.lax.scan(
            lambda c, px: jax.lax.scan(lambda c, x: body(px[0], c, x), c, px[1]), carry, (params, xs)
        )
        return carry, jax.tree.map(lambda y: y.reshape(y.shape[0] * uses, *y.shape[2:]), ys)
    outs = []
    layers = [params_l for params_l in unstack(params) for _ in range(uses)]
    for i, params_l in enumerate(layers):
        carry, y = body(params_l, carry, jax.tree.map(lambda x, i=i: x[i], xs))
        outs.append(y)
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *outs)
