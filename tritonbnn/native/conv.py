"""Binary convolution and its gradients in C: by counting bits, and by table."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from tritonbnn import checks, eager
from tritonbnn.layout import channels_last, empty_channels_last
from tritonbnn.native import library
from tritonbnn.native.common import TYPES, runs, vector


class Geometry(ctypes.Structure):
    """``geometry`` in ``csrc/geometry.h``."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("images", "height", "width", "channels"),
            *("out_height", "out_width", "out_channels"),
            *("kernel_size", "stride", "padding"),
        )
    )

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return self.images, self.out_channels, self.out_height, self.out_width


class WeightStrides(ctypes.Structure):
    """``weight_strides`` in ``csrc/geometry.h``."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("out_channel", "channel", "row", "column"))


def geometry(
    size: Sequence[int],
    channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int,
    padding: int,
) -> Geometry:
    """The problem of an input of ``size``: images, height and width.

    Raises:
        ValueError: the geometry is not supported.
    """
    images, height, width = size
    output = checks.conv_output_size(height, width, kernel_size, stride, padding)
    shape = (images, height, width, channels, *output, out_channels)
    return Geometry(*shape, kernel_size, stride, padding)


def conv_packed(
    x: Tensor,
    weight: Tensor,
    alpha: Tensor | None,
    *,
    channels: int,
    stride: int,
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    """:func:`tritonbnn.eager.conv_packed`."""
    if dtype not in TYPES:
        window = {"channels": channels, "stride": stride, "padding": padding}
        return eager.conv_packed(x, weight, alpha, dtype=dtype, **window)
    shape = geometry(x.shape[:3], channels, weight.shape[0], weight.shape[1], stride, padding)
    y = empty_channels_last(shape.output_shape, dtype, x.device)
    operands = (x.contiguous(), weight.contiguous(), vector(alpha))
    library.call("conv_packed", *operands, y, TYPES[dtype], None, None, shape)
    return y


def conv_real(
    x: Tensor, weight: Tensor, *, stride: int, padding: int, dtype: torch.dtype
) -> Tensor:
    """:func:`tritonbnn.eager.conv_real`."""
    if not runs(dtype) or weight.dtype == torch.float64:
        return eager.conv_real(x, weight, stride=stride, padding=padding, dtype=dtype)
    out_channels, channels, kernel_size, _ = weight.shape
    shape = geometry(x.shape[:3], channels, out_channels, kernel_size, stride, padding)
    y = empty_channels_last(shape.output_shape, dtype, x.device)
    real = channels_last(weight.to(torch.float32))
    library.call("conv_real", x.contiguous(), real, y, TYPES[dtype], shape)
    return y


def conv_input_grad(
    grad: Tensor,
    weight: Tensor,
    alpha: Tensor | None,
    *,
    channels: int,
    height: int,
    width: int,
    stride: int,
    padding: int,
) -> Tensor:
    """:func:`tritonbnn.eager.conv_input_grad`; with a real weight no operand is signs."""
    if alpha is None or not runs(grad.dtype):
        size = {"channels": channels, "height": height, "width": width}
        window = {"stride": stride, "padding": padding}
        return eager.conv_input_grad(grad, weight, alpha, **size, **window)
    out_channels, kernel_size = weight.shape[:2]
    shape = geometry(
        (len(grad), height, width), channels, out_channels, kernel_size, stride, padding
    )
    dx = empty_channels_last((len(grad), channels, height, width), torch.float32, grad.device)
    real = channels_last(grad.to(torch.float32))
    library.call("input_grad", real, weight.contiguous(), vector(alpha), dx, shape)
    return dx.to(grad.dtype)


def conv_weight_grad(
    grad: Tensor, x: Tensor, *, channels: int, kernel_size: int, stride: int, padding: int
) -> Tensor:
    """:func:`tritonbnn.eager.conv_weight_grad`."""
    window = {"stride": stride, "padding": padding}
    if not runs(grad.dtype):
        return eager.conv_weight_grad(grad, x, channels=channels, kernel_size=kernel_size, **window)
    shape = geometry(x.shape[:3], channels, grad.shape[1], kernel_size, stride, padding)
    size = (grad.shape[1], channels, kernel_size, kernel_size)
    dweight = empty_channels_last(size, torch.float32, grad.device)
    library.call(
        "weight_grad",
        *(channels_last(grad), TYPES[grad.dtype], x.contiguous()),
        *(dweight, None, shape, WeightStrides(*dweight.stride())),
    )
    return dweight
