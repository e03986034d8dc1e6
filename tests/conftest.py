"""Eight emulated CPU devices and a compilation cache for every test, set before JAX starts."""

import gc
import importlib.metadata
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Test programs are tiny and run once: compiling is nearly all of their time. LLVM's optimiser is left out, a
# program is one LLVM module, fusions do without MLIR's passes (an option that jaxlib 0.12 lacks).
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".cache" / "jax-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# Tracing makes objects by the million that live on: looking through them often is a twentieth of the time.
gc.set_threshold(50_000, 20, 50)

# A process takes whole files, in this order: one that started last would keep the others waiting.
LONGEST = (
    "test_quickstart",
    "tests/test_families",
    "test_conformance",
    "test_experiments",
    "train/test_run",
    "test_vectorized",
    "test_worker",
    "test_coordcheck",
    "test_durability",
    "test_tools",
)


def pytest_collection_modifyitems(items):
    def rank(item):
        path = item.path.with_suffix("").as_posix()
        return next((i for i, name in enumerate(LONGEST) if path.endswith(name)), len(LONGEST))

    items.sort(key=rank)
