"""jaxlm: a research framework for language models in JAX."""

import importlib.metadata
import os

__version__ = "0.1.0"

# XLA:CPU of jaxlib 0.10 gets some products of many small matrices wrong, such as those of a `vmap` over the
# cotangents of a transformer (tests/model/test_transformer.py has one; 0.12 is right). It hands them to
# YNNPACK, without which a training step is as fast. Read when JAX makes its first array.
if importlib.metadata.version("jaxlib").startswith("0.10.") and "ynn" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_experimental_ynn_fusion_type="
