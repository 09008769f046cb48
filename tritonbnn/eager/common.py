"""What the eager twins share: the accumulator's dtype, and rows of shifted input."""

import torch
from torch import Tensor

from tritonbnn.layout import channels_last, flat_pixels


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums run in float32, and in float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    """``x + shift`` in the accumulator's dtype, as (pixels, C)."""
    flat = flat_pixels(channels_last(x))
    flat = flat.to(accumulator(x.dtype))
    return flat if shift is None else flat + shift
