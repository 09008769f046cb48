"""Bytes that autograd saves for backward, and the slope of it per image.

The bytes of a pass are those of the unique storages that pass through
``torch.autograd.graph.saved_tensors_hooks``, parameters and buffers left out. "MB saved per image"
is always the slope between two batch sizes; what does not grow with the batch is reported apart.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class SavedBytes(NamedTuple):
    """Megabytes (1e6 bytes) saved for backward: a slope, and the part that does not grow."""

    per_image: float
    per_batch: float


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the unique storages that ``forward`` saves for backward.

    Args:
        model: its parameters and buffers are not counted.
        forward: runs the pass.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            storages[address] = tensor  # kept, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def saved_slope(
    model: nn.Module, make_images: Callable[[int], Tensor], batch_sizes: tuple[int, int] = (1, 2)
) -> SavedBytes:
    """The slope of :func:`saved_bytes` between two batch sizes, and its constant.

    Args:
        model: takes images.
        make_images: from a batch size to images.
        batch_sizes: two different sizes.
    """
    small, large = batch_sizes
    low, high = (saved_bytes(model, lambda n=n: model(make_images(n))) for n in (small, large))
    slope = (high - low) / (large - small)
    return SavedBytes(slope / 1e6, (low - slope * small) / 1e6)
