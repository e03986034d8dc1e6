"""The standard CPU workload as a minimal, hand-written, unrolled training step in plain JAX and Optax.

It is what jaxlm's own step is measured against. 6 layers, D 384, 6 heads, SwiGLU 1024, RMSNorm, RoPE, untied
head: 16.9 M parameters; V 8192, T 256, B 16; fp32; AdamW; clip 1.0. What is known to be fast on a CPU is in
it: no scan, no remat, attention with the heads before the positions, one jit of the whole step with the state
donated. Nothing of jaxlm is.

    python tools/plain_jax.py       # ten steps on random tokens
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Workload:
    """Shapes of the model and of the batch."""

    layers: int = 6
    model_dim: int = 384
    heads: int = 6
    mlp_dim: int = 1024
    vocab: int = 8192
    length: int = 256
    batch: int = 16
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6


OPTIMIZER = {"learning_rate": 3e-4, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
CLIP = 1.0


def init(shape: Workload, key: jax.Array) -> dict:
    """Normal(0.02) weights: `embed` [V,D], `layers` (a list), `norm` [D], `head` [D,V]."""
    D, N, F, V = shape.model_dim, shape.heads, shape.mlp_dim, shape.vocab
    H = D // N
    keys = iter(jax.random.split(key, 2 + 7 * shape.layers))

    def normal(*dims):
        return 0.02 * jax.random.normal(next(keys), dims, jnp.float32)

    def layer():
        return {
            "attention_norm": jnp.ones(D), "mlp_norm": jnp.ones(D),
            "wq": normal(D, N, H), "wk": normal(D, N, H), "wv": normal(D, N, H), "wo": normal(N, H, D),
            "w_gate": normal(D, F), "w_up": normal(D, F), "w_down": normal(F, D),
        }  # fmt: skip

    layers = [layer() for _ in range(shape.layers)]
    return {"embed": normal(V, D), "layers": layers, "norm": jnp.ones(D), "head": normal(D, V)}


def rmsnorm(x_BTD, scale_D, eps):
    return x_BTD * jax.lax.rsqrt(jnp.mean(x_BTD * x_BTD, -1, keepdims=True) + eps) * scale_D


def rope(x_BNTH, theta):
    """Rotates the first half of the head against the second."""
    T, half = x_BNTH.shape[2], x_BNTH.shape[3] // 2
    angle_Th = jnp.arange(T)[:, None] * theta ** (-jnp.arange(half) / half)
    sin, cos = jnp.sin(angle_Th), jnp.cos(angle_Th)
    a, b = x_BNTH[..., :half], x_BNTH[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def block(p, x_BTD, shape: Workload):
    T, H = x_BTD.shape[1], p["wq"].shape[2]
    h_BTD = rmsnorm(x_BTD, p["attention_norm"], shape.norm_eps)
    q_BNTH, k_BNSH, v_BNSH = (jnp.einsum("BTD,DNH->BNTH", h_BTD, p[w]) for w in ("wq", "wk", "wv"))
    q_BNTH, k_BNSH = rope(q_BNTH, shape.rope_theta) * H**-0.5, rope(k_BNSH, shape.rope_theta)
    scores_BNTS = jnp.einsum("BNTH,BNSH->BNTS", q_BNTH, k_BNSH)
    scores_BNTS = jnp.where(jnp.tri(T, dtype=bool), scores_BNTS, jnp.finfo(jnp.float32).min)
    out_BNTH = jnp.einsum("BNTS,BNSH->BNTH", jax.nn.softmax(scores_BNTS), v_BNSH)
    x_BTD = x_BTD + jnp.einsum("BNTH,NHD->BTD", out_BNTH, p["wo"])
    h_BTD = rmsnorm(x_BTD, p["mlp_norm"], shape.norm_eps)
    return x_BTD + (jax.nn.silu(h_BTD @ p["w_gate"]) * (h_BTD @ p["w_up"])) @ p["w_down"]


def loss(params, tokens_BT, targets_BT, shape: Workload):
    """Mean negative log-likelihood in nats per token."""
    x_BTD = params["embed"][tokens_BT]
    for p in params["layers"]:
        x_BTD = block(p, x_BTD, shape)
    logits_BTV = rmsnorm(x_BTD, params["norm"], shape.norm_eps) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT).mean()


def optimizer() -> optax.GradientTransformation:
    """AdamW behind a clip of the global norm; norm scales are not decayed."""
    matrices = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)  # noqa: E731
    return optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(**OPTIMIZER, mask=matrices))


def make_step(shape: Workload):
    """`step(params, opt_state, tokens_BT, targets_BT) -> (params, opt_state, loss)`, jitted and donating."""
    transform = optimizer()

    def step(params, opt_state, tokens_BT, targets_BT):
        value, grads = jax.value_and_grad(loss)(params, tokens_BT, targets_BT, shape)
        updates, opt_state = transform.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return jax.jit(step, donate_argnums=(0, 1))


def main() -> None:
    """Ten steps on random tokens, with the time of each."""
    shape = Workload()
    params = init(shape, jax.random.key(0))
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:.1f} M parameters")
    opt_state, step = optimizer().init(params), make_step(shape)
    ids = jax.random.randint(jax.random.key(1), (shape.batch, shape.length + 1), 0, shape.vocab)
    for n in range(10):
        began = time.perf_counter()
        params, opt_state, value = step(params, opt_state, ids[:, :-1], ids[:, 1:])
        value = float(value)
        seconds = time.perf_counter() - began
        rate = shape.batch * shape.length / seconds
        print(f"step {n}: loss {value:.4f}, {seconds:.2f} s, {rate:.0f} tokens/s")


if __name__ == "__main__":
    main()
