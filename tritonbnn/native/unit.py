"""The half-block around its convolution, in C: statistics, epilogue, and their gradients."""

import torch
from torch import Tensor

from tritonbnn import checks, eager
from tritonbnn.bits import words
from tritonbnn.layout import channels_last, empty_pixels
from tritonbnn.native import library
from tritonbnn.native.common import SHORTCUTS, TYPES, geometry, pixels, runs, vector


def channel_moments(a: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`tritonbnn.eager.channel_moments`."""
    if a.dtype not in TYPES:
        return eager.channel_moments(a)
    # not two rows of one tensor: operators may not return views of one
    mean, variance = (torch.empty(a.shape[1], dtype=torch.float64) for _ in range(2))
    data = channels_last(a)
    library.call("channel_moments", data, TYPES[a.dtype], pixels(a), a.shape[1], mean, variance)
    return mean, variance


def _check(a: Tensor, stream: Tensor, shortcut: str, **vectors: Tensor | None) -> None:
    checks.check_shape("stream", stream, checks.shortcut_input_shape(a.shape, shortcut))
    checks.check_per_channel(a.shape[1], **vectors)


def unit_forward(
    a: Tensor,
    stream: Tensor,
    mean: Tensor,
    scale: Tensor,
    offset: Tensor,
    shift_mid: Tensor | None,
    slope: Tensor | None,
    shift_out: Tensor | None,
    next_shift: Tensor | None,
    *,
    shortcut: str,
    pack: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`tritonbnn.eager.unit_forward`."""
    norm, activation = (mean, scale, offset), (shift_mid, slope, shift_out)
    if a.dtype not in TYPES or not runs(stream.dtype):
        return eager.unit_forward(
            a, stream, *norm, *activation, next_shift, shortcut=shortcut, pack=pack
        )
    _check(a, stream, shortcut, mean=mean, scale=scale, offset=offset, shift_mid=shift_mid)
    checks.check_per_channel(a.shape[1], slope=slope, shift_out=shift_out, next_shift=next_shift)
    n, height, width, channels = geometry(a)
    z = empty_pixels(a, stream.dtype)
    signs = torch.empty(
        (n, height, width, words(channels) if pack else 0), dtype=torch.int32, device=a.device
    )
    library.call(
        "unit_forward",
        *(channels_last(a), TYPES[a.dtype], channels_last(stream), TYPES[stream.dtype]),
        *(n, height, width, channels, SHORTCUTS[shortcut]),
        *map(vector, (*norm, *activation, next_shift)),
        *(z, signs if pack else None),
    )
    return z, signs


def unit_activation_backward(
    grad: Tensor,
    a: Tensor,
    stream: Tensor,
    mean: Tensor,
    scale: Tensor,
    offset: Tensor,
    shift_mid: Tensor | None,
    slope: Tensor | None,
    *,
    shortcut: str,
) -> tuple[Tensor, Tensor]:
    """:func:`tritonbnn.eager.unit_activation_backward`."""
    if a.dtype not in TYPES or grad.dtype != stream.dtype or not runs(grad.dtype):
        return eager.unit_activation_backward(
            grad, a, stream, mean, scale, offset, shift_mid, slope, shortcut=shortcut
        )
    _check(a, stream, shortcut, mean=mean, scale=scale, offset=offset, shift_mid=shift_mid)
    checks.check_per_channel(a.shape[1], slope=slope)
    checks.check_same_shape(a=a, grad=grad)
    du = empty_pixels(grad, grad.dtype)
    sums = torch.empty((4, a.shape[1]), dtype=torch.float32, device=a.device)
    library.call(
        "unit_activation_backward",
        *(channels_last(grad), channels_last(a), TYPES[a.dtype]),
        *(channels_last(stream), TYPES[stream.dtype], *geometry(a), SHORTCUTS[shortcut]),
        *map(vector, (mean, scale, offset, shift_mid, slope)),
        *(du, sums),
    )
    return du, sums


def unit_norm_backward(
    du: Tensor, a: Tensor, du_scale: Tensor, a_scale: Tensor, constant: Tensor
) -> Tensor:
    """:func:`tritonbnn.eager.unit_norm_backward`."""
    if a.dtype not in TYPES or not runs(du.dtype):
        return eager.unit_norm_backward(du, a, du_scale, a_scale, constant)
    vectors = {"du_scale": du_scale, "a_scale": a_scale, "constant": constant}
    checks.check_per_channel(a.shape[1], **vectors)
    checks.check_same_shape(a=a, du=du)
    dy = empty_pixels(du, du.dtype)
    library.call(
        "unit_norm_backward",
        *(channels_last(du), TYPES[du.dtype], channels_last(a), TYPES[a.dtype]),
        *(pixels(a), a.shape[1], *map(vector, vectors.values()), dy),
    )
    return dy
