"""What the launchers tell C about tensors."""

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int16: 2, torch.int32: 3}
"""The numbers of ``Type`` in ``csrc/passes.h``."""

SHORTCUTS = {"identity": 0, "repeat": 1, "pool": 2}
"""The numbers of ``Shortcut`` in ``csrc/passes.h``."""

FLOATS = (torch.float32, torch.bfloat16)


def runs(*dtypes: torch.dtype) -> bool:
    """Whether C has these floating-point dtypes. A launcher is eager's for all others."""
    return all(dtype in FLOATS for dtype in dtypes)


def vector(values: Tensor | None) -> Tensor | None:
    """One value per channel as C reads it: float32, contiguous."""
    return None if values is None else values.to(torch.float32).contiguous()


def geometry(x: Tensor) -> tuple[int, int, int, int]:
    """Images, height, width and channels of (N, C, H, W), or of (M, C), in this order."""
    if x.dim() == 2:
        return x.shape[0], 1, 1, x.shape[1]
    n, channels, height, width = x.shape
    return n, height, width, channels


def pixels(x: Tensor) -> int:
    """Pixels of (N, C, H, W), or rows of (M, C)."""
    return x.numel() // x.shape[1]
