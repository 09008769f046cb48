"""What the eager twins share: the accumulator's dtype, work in chunks, and shifted input."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tritonbnn.layout import channels_last, flat_pixels

CHUNK = 2**20
"""Numbers that are worked on at a time, so that what is computed in between is small, in memory
and for the caches. A single image may have more."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums run in float32, and in float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunks(images: int, numbers: int) -> Iterator[slice]:
    """Slices that cover a batch, in order; one empty slice where there are no images.

    Args:
        images: in the batch.
        numbers: per image.
    """
    size = max(1, CHUNK // max(numbers, 1))
    for start in range(0, max(images, 1), size):
        yield slice(start, start + size)


def image_chunks(x: Tensor) -> Iterator[slice]:
    """:func:`chunks` of (N, C, H, W), or of (M, C)."""
    return chunks(len(x), x[:1].numel())


def scratch(out: Tensor, dtype: torch.dtype) -> Tensor:
    """``out`` itself to compute in, if it has the dtype, else memory of its shape that has."""
    return out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)


def shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    """``x + shift`` in the accumulator's dtype, as (pixels, C)."""
    flat = flat_pixels(channels_last(x))
    flat = flat.to(accumulator(x.dtype))
    return flat if shift is None else flat + shift
