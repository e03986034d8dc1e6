"""Host memory that an import takes beside the arrays that it makes.

On emulated devices all shards lie in the host's memory, so that what counts is what is used beyond them: the
largest anonymous resident memory while importing, less what was resident before and the bytes of the arrays.
Pages of the files themselves are not counted: the system can drop them at will.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("safetensors", reason="checkpoints need the extra `pip install 'jaxlm[hf]'`")

# Llama 3 8B but for two layers of 32 and a quarter of the vocabulary, so that 1.4 GB of arrays are enough.
CONFIG = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    vocab_size=32064,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=2,
    num_attention_heads=32,
    num_key_value_heads=8,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
)
SCRIPT = """
import os, sys, threading, time
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jaxlm.hf
from jaxlm.sharding import MeshConfig, make_layout

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

layout = make_layout(MeshConfig(data=1, fsdp=4, tensor=2))
jax.block_until_ready(jax.device_put(jax.numpy.zeros(8), jax.devices()[7]))
before, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
model = jaxlm.hf.load(sys.argv[1], layout=layout)
done.set()
watcher.join()
leaves = jax.tree.leaves(model.params)
assert not any(leaf.sharding.is_fully_replicated for leaf in leaves if leaf.ndim > 2)
assert not any(bool(leaf.any()) for leaf in leaves if leaf.ndim == 2)
held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
one = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
print(before, peak[0], held, one, max(leaf.nbytes for leaf in leaves))
"""


def write_zeros(folder: Path, shards: int) -> None:
    """Sparse files: a header and a hole."""
    D, F, V = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    shapes = {"model.embed_tokens.weight": [V, D], "lm_head.weight": [V, D], "model.norm.weight": [D]}
    for i in range(CONFIG["num_hidden_layers"]):
        layer = {"input_layernorm": [D], "post_attention_layernorm": [D]}
        layer |= {f"self_attn.{x}_proj": [D if x in "qo" else D // 4, D] for x in "qkvo"}
        layer |= {"mlp.gate_proj": [F, D], "mlp.up_proj": [F, D], "mlp.down_proj": [D, F]}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    where = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(shapes)}
    for file in sorted(set(where.values())):
        header, at = {}, 0
        for name in (name for name in shapes if where[name] == file):
            size = 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(CONFIG))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_importing_onto_eight_devices_takes_a_shard_and_a_leaf_beside_the_arrays(tmp_path):
    write_zeros(tmp_path, shards=4)
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path], env=env, check=True, capture_output=True, text=True
    )
    before, peak, held, shard, leaf = map(int, out.stdout.split())
    assert held > 1.3e9
    beside = peak - before - held
    print(f"beside {beside / 1e6:.0f} MB, one shard {shard / 1e6:.0f} MB, largest leaf {leaf / 1e6:.0f} MB")
    assert beside < 1.3 * shard + leaf
