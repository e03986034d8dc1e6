"""How every weight of the transformer is laid out: the logical axes of each leaf."""

# The last two components of a leaf's name -> the logical axes of its dimensions.
AXES: dict[str, tuple[str | None, ...]] = {
    "embed/table": ("vocab", "embed"),
    "embed/positions": (None, "embed"),
    "embed/types": (None, "embed"),
    "position_bias/table": (None, "heads"),
    "attention/wq": ("embed", "heads", "head_dim"),
    "attention/wk": ("embed", "kv_heads", "head_dim"),
    "attention/wv": ("embed", "kv_heads", "head_dim"),
    "attention/wo": ("heads", "head_dim", "embed"),
    "attention/bq": ("heads", "head_dim"),
    "attention/bk": ("kv_heads", "head_dim"),
    "attention/bv": ("kv_heads", "head_dim"),
    "attention/bo": ("norm",),
    "attention/sinks": ("heads",),
    "attention/wq_down": ("embed", None),
    "attention/wkv_down": ("embed", None),
    "attention/wq_up": ("embed", "heads", "head_dim"),  # ranks are split in storage as the stream is
    "attention/wk_up": ("embed", "heads", "head_dim"),
    "attention/wv_up": ("embed", "heads", "head_dim"),
    "attention/b_q": ("norm",),
    "attention/b_kv": ("norm",),
    "mlp/w_up": ("embed", "mlp"),
    "mlp/w_gate": ("embed", "mlp"),
    "mlp/w_down": ("mlp", "embed"),
    "mlp/b_up": ("mlp",),
    "mlp/b_gate": ("mlp",),
    "mlp/b_down": ("norm",),
    "moe/router_w": ("embed", None),
    "moe/router_bias": (None,),
    "moe/router_b": (None,),
    "moe/w_gate": ("experts", "embed", "expert_mlp"),
    "moe/w_up": ("experts", "embed", "expert_mlp"),
    "moe/w_down": ("experts", "expert_mlp", "embed"),
    "moe/b_gate": ("experts", "expert_mlp"),
    "moe/b_up": ("experts", "expert_mlp"),
    "moe/b_down": ("experts", "norm"),
    "moe/shared_gate": ("embed", None),
    "moe/shared_w_gate": ("embed", "mlp"),
    "moe/shared_w_up": ("embed", "mlp"),
    "moe/shared_w_down": ("mlp", "embed"),
    "head/w": ("embed", "vocab"),
    "head/b": ("vocab",),
    "transform/w": ("embed", None),
    "transform/b": ("norm",),
    "pooler/w": ("embed", None),
    "pooler/b": ("norm",),
    "classifier/w": ("embed", None),
    "classifier/b": (None,),
}
for _name in (
    "attention_norm",
    "attention_post_norm",
    "cross_norm",
    "cross_post_norm",
    "mlp_norm",
    "mlp_post_norm",
    "embed_norm",
    "final_norm",
    "transform_norm",
    "q_norm",
    "k_norm",
    "kv_norm",
):
    AXES[f"{_name}/scale"] = AXES[f"{_name}/bias"] = ("norm",)
for _leaf in ("wq", "wk", "wv", "wo", "bq", "bk", "bv", "bo", "sinks"):
    AXES[f"cross_attention/{_leaf}"] = AXES[f"attention/{_leaf}"]


STREAM = ("batch", "residual", "activation")  # of the residual stream, between blocks
EXACT = ("moe/router_w",)  # leaves that are used in their own dtype, not in the model's
