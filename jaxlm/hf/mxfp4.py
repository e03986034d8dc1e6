"""Checkpoints whose experts are kept in MXFP4 (GPT-OSS), read as if they had been saved in bfloat16.

A matrix [E, in, out] is kept transposed in two tensors: `NAME_blocks` [E, out, in / 32, 16], two numbers of
four bits a byte, the lower half first, and `NAME_scales` [E, out, in / 32], the exponent, biased by 127, of
what 32 numbers are multiplied by. Source: OCP Microscaling Formats 1.0, section 5.3.3.
"""

import dataclasses

import ml_dtypes
import numpy as np

from jaxlm.errors import check
from jaxlm.hf.files import Source

# Sign, two bits of exponent, one of mantissa.
_VALUES = np.array([s * v for s in (1, -1) for v in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)], np.float32)


def dequantized(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[..., G, 16] bytes and [..., G] exponents -> [..., 32 G] in bfloat16, which holds every value exactly.

    >>> dequantized(np.full((1, 16), 0x92, np.uint8), np.array([128], np.uint8))[:4].tolist()
    [2.0, -1.0, 2.0, -1.0]
    """
    numbers = np.stack([_VALUES[blocks & 15], _VALUES[blocks >> 4]], axis=-1)
    numbers = numbers.reshape(*scales.shape, 2 * blocks.shape[-1])
    scaled = np.ldexp(numbers, scales.astype(np.int32)[..., None] - 127)
    return scaled.reshape(*scales.shape[:-1], -1).astype(ml_dtypes.bfloat16)


def unpacked(source: Source) -> Source:
    """The source with whole matrices in place of blocks and scales, read one at a time."""
    shapes = {}
    for name, shape in source.shapes.items():
        whole = name.removesuffix("_blocks")
        if whole != name:
            check(f"{whole}_scales" in source.shapes, f"{source.path}: {name} has no {whole}_scales")
            shapes[whole] = (*shape[:-3], shape[-2] * shape[-1] * 2, shape[-3])
        elif not name.endswith("_scales"):
            shapes[name] = shape

    def read(name: str) -> np.ndarray:
        if name in source.shapes:
            return source.read(name)
        parts = source.read(f"{name}_blocks"), source.read(f"{name}_scales")
        return np.swapaxes(dequantized(*parts), -1, -2)

    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    return dataclasses.replace(source, config=config, shapes=shapes, dtype="bfloat16", read=read)
