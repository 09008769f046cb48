"""Tensors of any shape, as the images or rows that launchers take."""

from collections.abc import Callable
from math import prod

from torch import Tensor


def by_channel(
    x: Tensor, channel_dim: int, features: int | None, function: Callable[[Tensor], Tensor]
) -> Tensor:
    """``function`` of ``x`` as (N, C, H, W) or (M, C), its result in ``x``'s shape again.

    Args:
        x: of any shape.
        channel_dim: the dimension of the channels, from either end; 0 where ``x`` has but one.
        features: how many channels there must be, or None for any number.
        function: keeps the shape.

    Raises:
        ValueError: there is no such dimension, or it has another size.
    """
    dim = _dimension(x, channel_dim)
    if features is not None and x.shape[dim] != features:
        raise ValueError(_mismatch(x, channel_dim, features))
    channels = x.shape[dim]
    if channels < 1:
        raise ValueError(f"x must have at least one channel, not shape {tuple(x.shape)}")
    if dim == 1 and x.dim() in (2, 4):
        return function(x)
    if dim == x.dim() - 1 or x.stride(dim) == 1:  # pixels whose channels lie side by side
        pixels = x.movedim(dim, -1)
        return function(pixels.reshape(-1, channels)).view(pixels.shape).movedim(-1, dim)
    images = x.reshape(prod(x.shape[:dim]), channels, 1, prod(x.shape[dim + 1 :]))
    return function(images).reshape(x.shape)


def _dimension(x: Tensor, channel_dim: int) -> int:
    if x.dim() == 1 and channel_dim in (1, -1):
        return 0  # one row, as nn.Linear takes it
    dim = channel_dim + x.dim() if channel_dim < 0 else channel_dim
    if not 0 <= dim < x.dim():
        raise ValueError(
            f"channel_dim is {channel_dim}, which an x of shape {tuple(x.shape)} does not have"
        )
    return dim


def _mismatch(x: Tensor, channel_dim: int, features: int) -> str:
    """That ``x`` has another number of channels, and where they may be instead."""
    message = (
        f"x must have {features} channels in dimension {channel_dim}, not shape {tuple(x.shape)}"
    )
    for dim in (-3, -1):
        if -dim <= x.dim() and x.shape[dim] == features:
            return f"{message}: if they are in dimension {dim}, give channel_dim={dim}"
    return message
