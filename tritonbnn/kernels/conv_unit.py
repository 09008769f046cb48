"""A binary convolution together with what follows it in a unit: one kernel on the one-bit core.

Where the tuning table does not choose the one-bit tensor core, the convolution's output is written
and read again.
"""

from typing import Any

import torch
from torch import Tensor

from tritonbnn import checks
from tritonbnn.kernels.below_triton import on_one_bit_core
from tritonbnn.kernels.conv import conv_packed
from tritonbnn.kernels.geometry import Geometry, checked_geometry
from tritonbnn.kernels.launch import check_kernel_dtype
from tritonbnn.kernels.unit import channel_moments, contiguous, moments_of, unit_forward
from tritonbnn.kernels.weight import fragments_of
from tritonbnn.layout import channels_last


def conv_moments(
    x: Tensor, weight: Tensor, *, channels: int, stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    """Moments of a convolution: the twin of :func:`tritonbnn.eager.conv_moments`."""
    geometry = _checked(x, weight, channels, stride, padding)
    if on_one_bit_core(geometry, x.device):
        from tritonbnn.kernels.mma_unit import moments_blocks, moments_mma  # it needs Gluon

        product = _product(x, weight, geometry, moments_blocks(geometry))
        return moments_of(moments_mma(product, geometry), geometry.pixels)
    return channel_moments(_convolution(x, weight, geometry))


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
    """A unit from its signs on: the twin of :func:`tritonbnn.eager.conv_unit_forward`."""
    geometry = _checked(x, weight, channels, stride, padding)
    vectors = (mean, scale, offset, shift_mid, slope, shift_out, next_shift)
    if not on_one_bit_core(geometry, x.device):
        a = _convolution(x, weight, geometry)
        return unit_forward(a, stream, *vectors, shortcut=shortcut, pack=pack)
    from tritonbnn.kernels.mma_unit import unit_blocks, unit_mma  # it needs Gluon

    check_kernel_dtype("stream", stream.dtype)
    expected = checks.shortcut_input_shape(geometry.output_shape, shortcut)
    checks.check_shape("stream", stream, expected)
    names = ("mean", "scale", "offset", "shift_mid", "slope", "shift_out", "next_shift")
    named = dict(zip(names, vectors, strict=True))
    checks.check_per_channel(geometry.out_channels, **named)
    checks.check_same_device(x=x, stream=stream, **named)
    return unit_mma(
        _product(x, weight, geometry, unit_blocks(geometry)),
        channels_last(stream),
        torch.stack((mean, scale, offset)),
        contiguous(shift_mid, slope, shift_out),
        None if next_shift is None else next_shift.contiguous(),
        geometry,
        shortcut=shortcut,
        pack=pack,
    )


def _checked(x: Tensor, weight: Tensor, channels: int, stride: int, padding: int) -> Geometry:
    checks.check_packed("x", x, channels)
    checks.check_packed("weight", weight, channels)
    checks.check_same_device(x=x, weight=weight)
    return checked_geometry(x, channels, weight.shape[0], weight.shape[1], stride, padding)


def _product(x: Tensor, weight: Tensor, geometry: Geometry, blocks: Any) -> Any:
    from tritonbnn.kernels.mma_unit import product_of  # it needs Gluon

    fragments = fragments_of(weight.contiguous(), geometry.channels, blocks.cut)
    return product_of(x.contiguous(), fragments, blocks)


def _convolution(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """In the narrowest integers that hold it."""
    return conv_packed(
        x,
        weight,
        None,
        channels=geometry.channels,
        stride=geometry.stride,
        padding=geometry.padding,
        dtype=checks.sum_dtype(geometry.channels * geometry.kernel_size**2),
    )
