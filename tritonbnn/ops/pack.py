"""Packed signs for users: 32 channels to an int32 word, their exact product and difference."""

import torch
from torch import Tensor

from tritonbnn import checks
from tritonbnn.ops import library


def pack_signs(x: Tensor, shift: Tensor | None = None) -> Tensor:
    """Pack the signs of ``x + shift``, 32 channels to a word; sign(0) = +1.

    Args:
        x: (N, C, H, W) or (M, C), floating point, any strides.
        shift: (C,), or None.

    Returns:
        int32, (N, H, W, ceil(C / 32)) or (M, ceil(C / 32)), contiguous; bits past C are 0.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: ``shift`` has another shape, or is on another device.
    """
    checks.check_activation("x", x)
    checks.check_per_channel(x.shape[1], shift=shift)
    checks.check_same_device(x=x, shift=shift)
    return library.pack_signs(x.detach(), None if shift is None else shift.detach())


def unpack_signs(packed: Tensor, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unpack signs into +1 and -1.

    Args:
        packed: int32, (N, H, W, ceil(channels / 32)) or (M, ceil(channels / 32)).
        channels: C, the true number of channels.
        dtype: of the result.

    Returns:
        (N, C, H, W) in channels_last memory, or (M, C).

    Raises:
        TypeError: ``packed`` is not int32.
        ValueError: ``packed`` does not hold ``channels`` signs, or has neither 2 nor 4 dimensions.
    """
    checks.check_packed("packed", packed, channels)
    if packed.dim() not in (2, 4):
        raise ValueError(f"packed must have 2 or 4 dimensions, not {packed.dim()}")
    return library.unpack_signs(packed.contiguous(), channels, dtype)


def packed_matmul(a: Tensor, b: Tensor, k: int) -> Tensor:
    """The exact integer product a @ b^T of two matrices of packed signs.

    Args:
        a: int32 (M, ceil(k / 32)).
        b: int32 (N, ceil(k / 32)).
        k: the number of signs in a row.

    Returns:
        int32 (M, N): k - 2 popcount(a xor b).

    Raises:
        TypeError: an operand is not int32.
        ValueError: an operand is not a matrix, does not hold ``k`` signs a row, or the two are on
            different devices.
    """
    for name, operand in (("a", a), ("b", b)):
        checks.check_packed(name, operand, k)
        if operand.dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions, not {operand.dim()}")
    checks.check_same_device(a=a, b=b)
    return library.packed_matmul(a.contiguous(), b.contiguous(), k)


def packed_difference(a: Tensor, b: Tensor) -> Tensor:
    """How many signs of each row differ between two matrices of packed signs.

    Args:
        a: int32 (R, W).
        b: int32 (R, W).

    Returns:
        int32 (R,): popcount(a xor b), summed over a row.

    Raises:
        TypeError: an operand is not int32.
        ValueError: an operand is not a matrix, or the two differ in shape or device.
    """
    for name, operand in (("a", a), ("b", b)):
        if operand.dtype != torch.int32:
            raise TypeError(f"{name} must be packed signs in int32, not {operand.dtype}")
        if operand.dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions, not {operand.dim()}")
    checks.check_same_shape(a=a, b=b)
    checks.check_same_device(a=a, b=b)
    return library.packed_difference(a.contiguous(), b.contiguous())
