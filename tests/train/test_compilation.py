"""The compilation cache between processes, and the count of what was compiled."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp

from jaxlm.train.compilation import counted_compilations

SCRIPT = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp
from jaxlm.train.compilation import counted_compilations

@jax.jit
def program(x):
    for _ in range(60):
        x = jnp.tanh(x @ x) + jnp.sort(x)
    return x

before = jax.config.jax_compilation_cache_dir
with counted_compilations(Path(sys.argv[1])) as counted:
    program(jnp.ones((8, 8))).block_until_ready()
assert jax.config.jax_compilation_cache_dir == before
print(json.dumps(counted.to_dict()))
"""


def child(cache, **env):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **env}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(cache)], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_next_process_finds_the_program(tmp_path):
    first, second = child(tmp_path / "cache"), child(tmp_path / "cache")
    assert (first["cache_hits"], first["cache_misses"] > 0) == (0, True)
    assert second["cache_hits"] == first["cache_misses"]
    assert second["cache_misses"] == 0
    assert len(first["programs"]["program"]) == len(second["programs"]["program"]) == 1
    assert second["seconds"] < first["seconds"]


def test_a_cache_that_was_chosen_stays(tmp_path):
    result = child(tmp_path / "ours", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "theirs"))
    assert result["cache_dir"] == str(tmp_path / "theirs")
    assert not (tmp_path / "ours").exists()


def test_each_compilation_is_counted_once():
    def double(x):
        return 2 * x

    x, y = jnp.ones(3), jnp.ones(4)
    with counted_compilations(None) as counted:
        jitted = jax.jit(double)
        jitted(x)
        jitted(x)
        assert len(counted.programs["double"]) == 1
        jitted(y)
    assert len(counted.programs["double"]) == 2
    jax.jit(double)(jnp.ones(5))
    assert len(counted.programs["double"]) == 2
