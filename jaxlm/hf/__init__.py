"""Import and export of Hugging Face checkpoints, one table per family; see README.md."""

from jaxlm.hf.pretrained import Pretrained, load

__all__ = ["Pretrained", "load"]
