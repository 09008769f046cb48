"""A binary convolution together with what follows it in a unit, its output never returned."""

import torch
from torch import Tensor

from tritonbnn.eager.conv import conv_packed
from tritonbnn.eager.unit import channel_moments, unit_forward


def conv_moments(
    x: Tensor, weight: Tensor, *, channels: int, stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel of a convolution of signs with signs.

    Args:
        x: int32 (N, H, W, words), packed signs of the input.
        weight: int32 (O, kh, kw, words), packed signs of the weight.
        channels: C, the true number of input channels.
        stride: 1 or 2.
        padding: kh // 2.

    Returns:
        Mean and variance, (O,) float64, as :func:`channel_moments` has them.
    """
    window = {"channels": channels, "stride": stride, "padding": padding}
    return channel_moments(conv_packed(x, weight, None, dtype=torch.int32, **window))


def conv_unit_forward(
    x: Tensor,
    weight: Tensor,
    stream: Tensor,
    mean: Tensor,
    scale: Tensor,
    offset: Tensor,
    shift_mid: Tensor | None,
    slope: Tensor | None,
    shift_out: Tensor | None,
    next_shift: Tensor | None,
    *,
    channels: int,
    stride: int,
    padding: int,
    shortcut: str,
    pack: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`unit_forward` of a convolution of signs with signs.

    Args:
        x: int32 (N, H, W, words), packed signs of the input.
        weight: int32 (O, kh, kw, words), packed signs of the weight.
        stream: as in :func:`unit_forward`, as are the others up to ``next_shift``.
        mean: (O,).
        scale: (O,).
        offset: (O,).
        shift_mid: (O,) or None.
        slope: (O,) or None.
        shift_out: (O,) or None.
        next_shift: (O,) or None.
        channels: C, the true number of input channels.
        stride: 1 or 2.
        padding: kh // 2.
        shortcut: as in :func:`unit_forward`.
        pack: likewise.

    Returns:
        z and its packed signs.
    """
    window = {"channels": channels, "stride": stride, "padding": padding}
    a = conv_packed(x, weight, None, dtype=torch.int32, **window)
    vectors = (mean, scale, offset, shift_mid, slope, shift_out, next_shift)
    return unit_forward(a, stream, *vectors, shortcut=shortcut, pack=pack)
