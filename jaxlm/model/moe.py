"""Mixture of experts: a router picks `top_k` of E expert MLPs for each token; every row is routed by itself.

Two dispatches. `capacity`: each expert takes at most C tokens of a row, in token order, and the rest get
nothing from it. `dropless`: every token gets every expert it chose. How tokens get to the experts of other
devices is told in `jaxlm.model.dispatch`. Losses and statistics are sums over rows and tokens, so that
splitting a batch leaves them unchanged.
"""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from jaxlm.errors import check
from jaxlm.model import dispatch
from jaxlm.model.axes import AXES
from jaxlm.model.grouped import grouped_matmul
from jaxlm.model.layers import ACTIVATIONS, gate, normal_init
from jaxlm.model.routing import Aux, MoEConfig, Routing, auxiliary, route
from jaxlm.sharding import Layout, current, manual_axes, platform, spec_axes
from jaxlm.weights import gather_by_hand, hand_steps, lay_out, matmul, wire_of


def capacity(cfg: MoEConfig, length: int) -> int:
    """Tokens C that an expert takes from a row of T = `length`: ceil(capacity_factor * T * k / E), at most T.

    >>> capacity(MoEConfig(num_experts=8, top_k=2, capacity_factor=1.25), 256)
    80
    """
    share = cfg.capacity_factor * length * cfg.top_k / cfg.num_experts
    return min(length, max(1, math.ceil(share - 1e-9)))


def dropless_backend(cfg: MoEConfig) -> str:
    """The products that dropless dispatch will use here and now, with `auto` resolved.

    dense   every expert on every token, unchosen ones weighted 0: E / k times the FLOPs, but plain einsums
            that need nothing sorted or sent
    loop    tokens sorted by expert, one product per block of an expert's rows: exact FLOPs up to padding; CPU
    ragged  tokens sorted by expert, `jax.lax.ragged_dot`: accelerators (on a CPU, XLA makes it dense)

    `auto` is `loop` on CPU and `ragged` elsewhere. All three give the same values up to rounding.
    """
    if cfg.dropless_backend != "auto":
        return cfg.dropless_backend
    return "loop" if platform() == "cpu" else "ragged"


def exchange(cfg: MoEConfig) -> str:
    """How dropless choices travel here and now: `auto` is `padded` on CPU, whose XLA has no ragged one."""
    if cfg.exchange != "auto":
        return cfg.exchange
    return "padded" if platform() == "cpu" else "ragged"


# --- The layer ---


class MoE(nn.Module):
    """sum over chosen experts e of weight_e * MLP_e(x), plus the shared experts' MLP(x)."""

    cfg: MoEConfig
    mlp_dim: int  # width of an expert where cfg.expert_dim is 0
    activation: str
    init_std: Callable[[int], float]  # fan in -> standard deviation
    out_scale: float  # of the initial output projections
    dtype: str
    param_dtype: str
    accum_dtype: str
    router_std: float = 0.0  # of the router's initial weights; 0 = init_std(D)
    router_scale: float = 1.0  # of the router's logits
    gate_limit: float = 0.0  # see jaxlm.model.layers.gate

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], mask_BT: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Aux]:
        """Route, dispatch and combine.

        Args:
            x_BTD: activations.
            mask_BT: True for real tokens; padding is not routed, takes no capacity and is not counted.

        Returns:
            y_BTD in the compute dtype, and the losses and statistics of `auxiliary`.
        """
        cfg, dim = self.cfg, x_BTD.shape[-1]
        width = cfg.expert_dim or self.mlp_dim
        x_BTD = x_BTD.astype(self.dtype)
        mask_BT = mask_BT.astype(bool)
        router_init = normal_init(self.router_std or self.init_std(dim))
        with jax.named_scope("route"):
            router_DE = self.param("router_w", router_init, (dim, cfg.num_experts), self.param_dtype)
            bias_E = None
            if cfg.bias_balancing:  # moved by small equal steps, which a bf16 parameter would swallow
                bias_E = self.param("router_bias", nn.initializers.zeros, (cfg.num_experts,), "float32")
            logits_BTE = matmul("BTD,DE->BTE", x_BTD, router_DE, out=("batch", "length", None))
            if cfg.bias:
                b_E = self.param("router_b", nn.initializers.zeros, (cfg.num_experts,), self.param_dtype)
                logits_BTE += b_E.astype(logits_BTE.dtype)
            routing = route(cfg, self.router_scale * logits_BTE, mask_BT, bias_E)
        experts = self._parameters("", (cfg.num_experts,), dim, width)
        if cfg.bias:
            for name, w in list(experts.items()):
                shape = (cfg.num_experts, w.shape[-1])
                b = f"b{name[1:]}"
                experts[b] = self.param(b, nn.initializers.zeros, shape, self.param_dtype)
        if cfg.dispatch == "dropless" and dropless_backend(cfg) == "dense":
            y_BTD, dropped = self._dense(x_BTD, routing, experts), jnp.zeros((), jnp.float32)
        else:
            y_BTD, dropped = self._dispatch(x_BTD, mask_BT, routing, experts)
        if cfg.shared_experts:
            shared = self._parameters("shared_", (), dim, cfg.shared_dim or cfg.shared_experts * width)
            with jax.named_scope("shared_experts"):
                shared_BTD = self._mlp(
                    shared,
                    lambda w_DF: self._matmul("BTD,DF->BTF", x_BTD, w_DF, ("batch", "length", "mlp")),
                    lambda h_BTF, w_FD: self._matmul("BTF,FD->BTD", h_BTF, w_FD),
                )
                if cfg.shared_gate:
                    gate_D1 = self.param("shared_gate", router_init, (dim, 1), self.param_dtype)
                    gate_BT1 = self.router_scale * self._matmul("BTD,DO->BTO", x_BTD, gate_D1)
                    shared_BTD *= jax.nn.sigmoid(gate_BT1)
                y_BTD = y_BTD + shared_BTD
        return y_BTD, auxiliary(cfg, routing, mask_BT, dropped, bias_E)

    def _parameters(self, prefix: str, lead: tuple[int, ...], dim: int, width: int) -> dict[str, Array]:
        """w_up, w_gate (if the activation is gated) and w_down, with `lead` dimensions in front."""
        up_init = normal_init(self.init_std(dim))
        down_init = normal_init(self.init_std(width) * self.out_scale)
        names = ("w_up", "w_gate") if ACTIVATIONS[self.activation][1] else ("w_up",)
        weights = {n: self.param(prefix + n, up_init, (*lead, dim, width), self.param_dtype) for n in names}
        weights["w_down"] = self.param(prefix + "w_down", down_init, (*lead, width, dim), self.param_dtype)
        return weights

    def _matmul(self, eqn: str, x: Array, w: Array, out: tuple[str | None, ...] | None = None) -> Array:
        return matmul(eqn, x, w, dtype=self.dtype, accum=self.accum_dtype, out=out)

    def _mlp(
        self,
        weights: dict[str, Array],
        up: Callable[[Array], Array],
        down: Callable[[Array, Array], Array],
        spread: Callable[[Array], Array] = lambda b: b,
    ) -> Array:
        """`down(act(up(w_up)))` or, gated, `down(act(up(w_gate)) * up(w_up))`; biases are added if there are.

        Args:
            weights: w_up, w_down, and as the case may be w_gate and biases.
            up, down: the products with a weight.
            spread: a bias of each expert, [E, F], as it is added to rows.
        """
        fn, gated = ACTIVATIONS[self.activation]

        def biased(y: Array, name: str) -> Array:
            return y + spread(weights[name].astype(y.dtype)) if name in weights else y

        with jax.named_scope("experts_up"):
            h = biased(up(weights["w_up"]), "b_up")
            if gated:
                h = gate(self.activation, biased(up(weights["w_gate"]), "b_gate"), h, self.gate_limit)
            else:
                h = fn(h)
        with jax.named_scope("experts_down"):
            return biased(down(h, weights["w_down"]), "b_down")

    def _dispatch(
        self, x_BTD: Array, mask_BT: Array, routing: Routing, weights: dict[str, Array]
    ) -> tuple[Array, Array]:
        """Tokens to experts and back, by hand on each device; and how many choices went without."""
        cfg, layout = self.cfg, current()
        kept_BTK, room = jnp.broadcast_to(mask_BT[..., None], routing.experts_BTK.shape), 0
        if cfg.dispatch == "capacity":
            # The first C choices of an expert in a row, in token order, whichever choice of theirs it is: a
            # later token then never displaces an earlier one, so that dropping is causal.
            room = capacity(cfg, x_BTD.shape[1])
            before_BTE = jnp.cumsum(routing.chosen_BTE, axis=1) - routing.chosen_BTE
            place_BTK = jnp.take_along_axis(before_BTE, routing.experts_BTK, axis=-1)
            kept_BTK = kept_BTK & (place_BTK < room)
        tokens = (x_BTD, routing.experts_BTK, kept_BTK, routing.weights_BTK)
        if layout is None:
            y_BTD, lost_1 = self._on_device(dispatch.Group(), (), room, *tokens, weights)
        else:
            y_BTD, lost_1 = self._on_devices(layout, room, tokens, weights)
        dropped = jnp.sum(mask_BT) * cfg.top_k - jnp.sum(kept_BTK) + jnp.sum(lost_1)
        return y_BTD, dropped.astype(jnp.float32)

    def _on_devices(
        self, layout: Layout, room: int, tokens: tuple[Array, ...], weights: dict[str, Array]
    ) -> tuple[Array, Array]:
        """`_on_device` on every device of the mesh."""
        manual = manual_axes()
        rows, columns = layout.fitting(tokens[0].shape[:2], ("batch", "length"))
        split = (*spec_axes(rows), *spec_axes(columns))
        free = lambda axis: tuple(m for m in layout.mesh_axes(axis, compute=True) if m not in manual)  # noqa: E731
        experts, width = free("experts"), free("expert_mlp")
        check(
            not set(experts) & set(split) or set(experts) <= set(split),
            f"experts are split over {experts}, of which tokens are split over a part, {split}: "
            "let mesh.rules split 'batch' over all of them, or over none",
        )
        check(
            not set(width) & set(split),
            f"'expert_mlp' is split over {width}, over which tokens are too ({split}); change mesh.rules",
        )
        group = dispatch.Group(experts, layout.size(experts), own_tokens=set(experts) <= set(split))
        over = lambda axes: axes or None  # noqa: E731
        steps, where = {}, {}
        for name, w in weights.items():
            axes = AXES[f"moe/{name}"]
            stored, used = (_free(layout.spec(axes, compute=use), manual) for use in (False, True))
            steps[name] = hand_steps(stored, used)
            if steps[name] is None:  # the compiler's business
                weights[name] = lay_out({"moe": {name: w}}, AXES, self.dtype)["moe"][name]
                stored, steps[name] = used, ()
            copies = tuple(m for m in split if m not in {a for part in stored for a in spec_axes(part)})
            where[name] = P(over(copies), *stored)
            weights[name] = _copies(weights[name], layout.size(copies), where[name])

        def one(x, experts_BTK, kept_BTK, weights_BTK, weights):
            gradients = wire_of(self.accum_dtype)[1]
            whole = {}
            for name, w in weights.items():
                narrower = jnp.finfo(self.dtype).bits < jnp.finfo(w.dtype).bits
                travels = (self.dtype if narrower else str(w.dtype), gradients)
                whole[name] = gather_by_hand(jnp.squeeze(w, 0), steps[name], *travels)
            return self._on_device(group, width, room, x, experts_BTK, kept_BTK, weights_BTK, whole)

        part = P(rows, columns, None)
        return jax.shard_map(
            one,
            in_specs=(part, part, part, part, where),
            out_specs=(part, P(over(split))),
            axis_names=set(layout.mesh.axis_names) - manual,
            check_vma=False,
        )(*tokens, weights)

    def _on_device(
        self,
        group: dispatch.Group,
        width: tuple[str, ...],
        room: int,
        x_BTD: Array,
        experts_BTK: Array,
        kept_BTK: Array,
        weights_BTK: Array,
        weights: dict[str, Array],
    ) -> tuple[Array, Array]:
        """What this device's tokens get, and how many choices found no room in a dropless buffer.

        Args:
            group: the devices that share out the experts.
            width: mesh axes over which the experts' width is split.
            room: places C of an expert and row; capacity dispatch.
            x_BTD, experts_BTK, kept_BTK, weights_BTK: this device's tokens, and which choices are to go.
            weights: of this device's experts.
        """
        cfg, where = self.cfg, dict(group=group, num_experts=self.cfg.num_experts)
        lost = jnp.zeros((), jnp.int32)
        if "b_down" in weights and width:  # of the devices whose results are summed, one adds it
            first = jax.lax.axis_index(width) == 0
            weights = {**weights, "b_down": jnp.where(first, weights["b_down"], 0)}
        if cfg.dispatch == "capacity":

            def batched(x_EMD: Array) -> Array:
                # One batch dimension: XLA:CPU has no bf16 product for two.
                return self._mlp(
                    weights,
                    lambda w_EDF: self._matmul("EMD,EDF->EMF", x_EMD, w_EDF),
                    lambda h_EMF, w_EFD: self._matmul("EMF,EFD->EMD", h_EMF, w_EFD),
                    lambda b_EF: b_EF[:, None],
                )

            slots = min(room, x_BTD.shape[1])
            y_BTD = dispatch.by_capacity(
                x_BTD, experts_BTK, kept_BTK, weights_BTK, batched, slots=slots, **where
            )
        else:

            def some(tokens: tuple[Array, ...], weights: dict[str, Array]) -> tuple[Array, Array]:
                def grouped(x_MD: Array, sizes_E: Array) -> Array:
                    how = dict(backend=dropless_backend(cfg), dtype=self.dtype, accum=self.accum_dtype)
                    product = partial(grouped_matmul, group_sizes_E=sizes_E, **how)

                    def spread(b_EF: Array) -> Array:
                        rows_M = jnp.arange(x_MD.shape[0])
                        expert_M = jnp.searchsorted(jnp.cumsum(sizes_E), rows_M, side="right")
                        return b_EF.at[expert_M].get(mode="clip")

                    return self._mlp(weights, lambda w_EDF: product(x_MD, w_EDF), product, spread)

                how = dict(exchange=exchange(cfg), buffer_factor=cfg.buffer_factor)
                y_BTD, lost = dispatch.dropless(*tokens, grouped, **where, **how)
                return y_BTD.astype(self.dtype), lost

            tokens = (x_BTD, experts_BTK, kept_BTK[..., 0], weights_BTK)
            y_BTD, lost = _in_rounds(some, cfg.rounds, tokens, weights)
        y_BTD = y_BTD.astype(self.dtype)
        partial_sums = width if group.own_tokens else (*width, *group.axes)
        return jax.lax.psum(y_BTD, partial_sums) if partial_sums else y_BTD, lost[None]

    def _dense(self, x_BTD: Array, routing: Routing, weights: dict[str, Array]) -> Array:
        """Every expert on every token; the weighted sum over experts is part of the last product."""
        onehot_BTKE = jax.nn.one_hot(routing.experts_BTK, self.cfg.num_experts, dtype=jnp.float32)
        share_BET = (routing.weights_BTK[..., None] * onehot_BTKE).sum(2).swapaxes(1, 2).astype(self.dtype)
        hidden = ("expert_batch", "experts", None, "expert_mlp")
        weights = lay_out({"moe": weights}, AXES, self.dtype)["moe"]
        of_rows = {name: b for name, b in weights.items() if name != "b_down"}
        y_BTD = self._mlp(
            of_rows,
            lambda w_EDF: self._matmul("BTD,EDF->BETF", x_BTD, w_EDF, hidden),
            lambda h_BETF, w_EFD: self._matmul("BETF,EFD->BTD", h_BETF * share_BET[..., None], w_EFD),
            lambda b_EF: b_EF[:, None],
        )
        if "b_down" in weights:
            y_BTD = y_BTD + self._matmul("BET,ED->BTD", share_BET, weights["b_down"])
        return y_BTD


def _in_rounds(
    fn: Callable[[tuple[Array, ...], dict[str, Array]], tuple[Array, Array]],
    rounds: int,
    tokens: tuple[Array, ...],
    weights: dict[str, Array],
) -> tuple[Array, Array]:
    """`fn(tokens, weights)` on parts of the tokens [B, T, ...], one after another, and the sum of its counts.

    There are `rounds` parts, or the most that divide both that and the tokens (a decoded few). The backward
    pass computes a part again when it comes to it, so that only one part's buffers are there at a time.
    """
    B, T = tokens[0].shape[:2]
    parts = math.gcd(rounds, B * T)
    if parts == 1:
        return fn(tokens, weights)

    def body(lost: Array, part: tuple[Array, ...]) -> tuple[Array, Array]:
        y, here = jax.checkpoint(fn, prevent_cse=False)(part, weights)
        return lost + here, y

    split = tuple(x.reshape(parts, 1, B * T // parts, *x.shape[2:]) for x in tokens)
    lost, y = jax.lax.scan(body, jnp.zeros((), jnp.int32), split)
    return y.reshape(B, T, -1), lost


def _free(spec: P, manual: frozenset[str]) -> P:
    """A spec without the mesh axes that a surrounding `shard_map` has split by hand."""
    return P(*[tuple(m for m in spec_axes(part) if m not in manual) or None for part in spec])


# Over mesh axes that split tokens and do not split the weights in storage, every device's gradient is its own
# until all are added up, in `reduce_dtype`; a `shard_map` would add them in the dtype of the weights.
@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _copies(w: Array, n: int, where: P) -> Array:
    """`w` as the one copy, of `n`, that each device along the first axes of `where` holds."""
    return jax.lax.with_sharding_constraint(jnp.broadcast_to(w, (n, *w.shape)), where)


def _sum_copies(n: int, where: P, _: None, g: Array) -> tuple[Array]:
    layout = current()
    narrow = jnp.finfo(layout.reduce_dtype).bits < jnp.finfo(g.dtype).bits
    s = g.astype(layout.reduce_dtype) if narrow else g
    return (jax.lax.reduce(s, jnp.zeros((), s.dtype), jax.lax.add, (0,)).astype(g.dtype),)


_copies.defvjp(lambda w, n, where: (_copies(w, n, where), None), _sum_copies)
