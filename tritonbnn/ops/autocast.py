"""What an operator does under torch.autocast: follow it, as torch's own convolution does."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_input(x: Tensor) -> Tensor:
    """``x`` in the autocast dtype if autocast is on and ``x`` is float32, else unchanged.

    Packed signs are the same either way as long as ``x + shift`` keeps its sign in the narrower
    dtype; parameters stay float32, because the launchers read them in float32.
    """
    kind = x.device.type
    if x.dtype == torch.float32 and not x.is_meta and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which torch's operators keep the dtype of what is on ``x``'s device."""
    # there is none for meta
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
