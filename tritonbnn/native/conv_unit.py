"""A binary convolution together with what follows it in a unit, in C."""

import torch
from torch import Tensor

from tritonbnn import checks
from tritonbnn.native import library
from tritonbnn.native.common import TYPES
from tritonbnn.native.conv import conv_packed, geometry
from tritonbnn.native.unit import unit_forward


def conv_moments(
    x: Tensor, weight: Tensor, *, channels: int, stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    """:func:`tritonbnn.eager.conv_moments`; the convolution's output is never written."""
    out_channels, kernel_size = weight.shape[:2]
    shape = geometry(x.shape[:3], channels, out_channels, kernel_size, stride, padding)
    total, squares = torch.empty((2, weight.shape[0]), dtype=torch.float64, device=x.device)
    operands = (x.contiguous(), weight.contiguous(), None, None, TYPES[torch.int32])
    library.call("conv_packed", *operands, total, squares, shape)
    values = max(shape.images * shape.out_height * shape.out_width, 1)
    mean = total / values
    return mean, (squares / values - mean * mean).clamp_(min=0)


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
    """:func:`tritonbnn.eager.conv_unit_forward`."""
    window = {"channels": channels, "stride": stride, "padding": padding}
    dtype = checks.sum_dtype(channels * weight.shape[1] ** 2)
    a = conv_packed(x, weight, None, dtype=dtype, **window)
    vectors = (mean, scale, offset, shift_mid, slope, shift_out, next_shift)
    return unit_forward(a, stream, *vectors, shortcut=shortcut, pack=pack)
