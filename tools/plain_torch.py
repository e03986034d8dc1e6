"""The same workload as plain_jax.py, in PyTorch: `torch.compile`, scaled_dot_product_attention, fused AdamW.

Optional: nothing of jaxlm needs PyTorch, and tools/bench_train.py runs this where it is installed.
"""

import numpy as np
import torch
import torch.nn.functional as F

OPTIMIZER = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8}
WEIGHT_DECAY = 0.1
CLIP = 1.0


def load(params: dict) -> dict[str, torch.Tensor]:
    """Numpy arrays by their names in plain_jax.py's tree (`layers/0/wq`), as trainable tensors."""
    return {name: torch.tensor(np.asarray(leaf)).requires_grad_() for name, leaf in params.items()}


def rmsnorm(x_BTD, scale_D, eps):
    return F.rms_norm(x_BTD, (x_BTD.shape[-1],), scale_D, eps)


def rope(x_BNTH, theta):
    """Rotates the first half of the head against the second."""
    T, half = x_BNTH.shape[2], x_BNTH.shape[3] // 2
    angle_Th = torch.arange(T)[:, None] * theta ** (-torch.arange(half) / half)
    sin, cos = torch.sin(angle_Th), torch.cos(angle_Th)
    a, b = x_BNTH[..., :half], x_BNTH[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def loss(params, tokens_BT, targets_BT, *, layers: int, heads: int, rope_theta: float, norm_eps: float):
    """Mean negative log-likelihood in nats per token."""
    B, T = tokens_BT.shape
    x_BTD = F.embedding(tokens_BT, params["embed"])
    D = x_BTD.shape[-1]
    for n in range(layers):
        p = {
            name.rpartition("/")[2]: leaf for name, leaf in params.items() if name.startswith(f"layers/{n}/")
        }
        h_BTD = rmsnorm(x_BTD, p["attention_norm"], norm_eps)
        q, k, v = (
            (h_BTD @ p[w].view(D, -1)).view(B, T, heads, -1).transpose(1, 2) for w in ("wq", "wk", "wv")
        )
        out_BNTH = F.scaled_dot_product_attention(rope(q, rope_theta), rope(k, rope_theta), v, is_causal=True)
        x_BTD = x_BTD + out_BNTH.transpose(1, 2).reshape(B, T, -1) @ p["wo"].view(-1, D)
        h_BTD = rmsnorm(x_BTD, p["mlp_norm"], norm_eps)
        x_BTD = x_BTD + (F.silu(h_BTD @ p["w_gate"]) * (h_BTD @ p["w_up"])) @ p["w_down"]
    logits_BTV = rmsnorm(x_BTD, params["norm"], norm_eps) @ params["head"]
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def make_step(params: dict[str, torch.Tensor], *, threads: int, **shape):
    """`step(tokens_BT, targets_BT) -> loss`, which updates `params` in place."""
    torch.set_num_threads(threads)
    matrices = [leaf for leaf in params.values() if leaf.ndim > 1]
    vectors = [leaf for leaf in params.values() if leaf.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, fused=True, **OPTIMIZER)
    compiled = torch.compile(lambda *batch: loss(params, *batch, **shape))

    def step(tokens_BT: np.ndarray, targets_BT: np.ndarray) -> float:
        value = compiled(torch.from_numpy(tokens_BT).long(), torch.from_numpy(targets_BT).long())
        value.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step
