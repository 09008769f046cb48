"""Packed signs in C: pack, unpack, scale of a weight, difference."""

import torch
from torch import Tensor

from tritonbnn import checks, eager
from tritonbnn.bits import words
from tritonbnn.layout import channels_last, empty_channels_last
from tritonbnn.native import library
from tritonbnn.native.common import TYPES, pixels, runs, vector
from tritonbnn.packed import PackedWeight


def pack_signs(x: Tensor, shift: Tensor | None = None) -> Tensor:
    """:func:`tritonbnn.eager.pack_signs`."""
    if not runs(x.dtype):
        return eager.pack_signs(x, shift)
    checks.check_per_channel(x.shape[1], shift=shift)
    shape = (x.shape[0], *x.shape[2:], words(x.shape[1]))
    packed = torch.empty(shape, dtype=torch.int32, device=x.device)
    data = channels_last(x)
    library.call("pack_signs", data, TYPES[x.dtype], vector(shift), pixels(x), x.shape[1], packed)
    return packed


def unpack_signs(packed: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """:func:`tritonbnn.eager.unpack_signs`."""
    checks.check_packed("packed", packed, channels)
    if not runs(dtype):
        return eager.unpack_signs(packed, channels, dtype)
    if packed.dim() == 2:
        x = torch.empty((len(packed), channels), dtype=dtype, device=packed.device)
    else:
        n, height, width, _ = packed.shape
        x = empty_channels_last((n, channels, height, width), dtype, packed.device)
    library.call("unpack_signs", packed.contiguous(), pixels(x), channels, x, TYPES[dtype])
    return x


def pack_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`tritonbnn.eager.pack_weight`."""
    if not runs(weight.dtype):
        return eager.pack_weight(weight)
    filters, channels, *size = weight.shape
    packed = torch.empty((filters, *size, words(channels)), dtype=torch.int32, device=weight.device)
    alpha = torch.empty(filters, dtype=torch.float32, device=weight.device)
    height, width = size or (1, 1)
    strides = weight.stride() if size else (*weight.stride(), 0, 0)
    shape = (filters, channels, height, width)
    library.call("pack_weight", weight, TYPES[weight.dtype], *shape, *strides, packed, alpha)
    return packed, alpha


def weight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Packed signs and scale of a binary weight: stored already, or memory where C puts them."""
    if isinstance(weight, PackedWeight):
        return weight.packed, weight.alpha
    filters, channels, height, width = weight.shape
    return empty_words(filters, height, width, words(channels)), torch.empty(filters)


def empty_words(*shape: int) -> Tensor:
    """Memory for packed signs."""
    return torch.empty(shape, dtype=torch.int32)


def packed_difference(a: Tensor, b: Tensor) -> Tensor:
    """:func:`tritonbnn.eager.packed_difference`."""
    checks.check_same_shape(a=a, b=b)
    counts = torch.empty(len(a), dtype=torch.int32, device=a.device)
    library.call("packed_difference", a.contiguous(), b.contiguous(), *a.shape, counts)
    return counts
