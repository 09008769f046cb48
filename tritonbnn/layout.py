"""Memory layout: torch's NCHW shapes in channels_last memory, and the flat (pixels, C) view."""

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """``x`` with its channels innermost in memory, copied only when they are not.

    Args:
        x: (N, C, H, W), or (M, C), of any dtype and strides.
    """
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def empty_channels_last(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """An uninitialised (N, C, H, W) tensor in channels_last memory."""
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)


def empty_pixels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor of ``x``'s shape, (N, C, H, W) or (M, C), channels innermost."""
    memory = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=memory)


def flat_pixels(x: Tensor) -> Tensor:
    """View (N, C, H, W) in channels_last memory, or (M, C), as (pixels, C); never copies."""
    if x.dim() == 2:
        return x
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).view(n * h * w, c)


def from_flat(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`flat_pixels`: view (pixels, C) as ``shape``, channels innermost."""
    if len(shape) == 2:
        return flat.view(shape)
    n, c, h, w = shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)
