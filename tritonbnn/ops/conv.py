"""The binary convolution: signs in, real numbers out, packed signs saved."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tritonbnn import checks
from tritonbnn.ops.any_window import AnyWindow
from tritonbnn.ops.apply import apply
from tritonbnn.ops.autocast import autocast_input
from tritonbnn.ops.nan import refuse_nan
from tritonbnn.ops.packed_conv import PackedConv2d
from tritonbnn.window import Size, Window, check_weight, sizes, window

_known_window = lru_cache(maxsize=1024, typed=True)(window)


def _window(kernel_size: torch.Size, *arguments: Any) -> Window:
    """The window of these arguments, which for a layer are the same at each call."""
    if torch.compiler.is_compiling():
        return window(kernel_size, *arguments)  # torch traces no cache
    try:
        return _known_window(kernel_size, *arguments)
    except TypeError:  # a list has no hash
        return window(kernel_size, *arguments)


def binary_conv2d(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    binary_weight: bool = True,
    may_be_binary: bool = True,
) -> Tensor:
    """Convolve sign(x + shift) with alpha * sign(w), alpha the mean of abs(w) per output channel.

    Zero padding comes after the sign, so it adds nothing. Gradients (AdamBNN, 2106.11309): to x
    and shift through the clipped quadratic, see :func:`~tritonbnn.ops.binarize`; to w it is the
    gradient to the binary weight where abs(w) <= 1, else 0, with no alpha and none through alpha.
    With ``binary_weight=False`` the weight is real, as in the first step of the schedule.

    If all of x is +1 or -1, it is binary already, and its gradient passes unchanged, where the
    clipped quadratic would stop it. So x may come from :func:`~tritonbnn.ops.binarize`, also by way
    of max-pooling, reshaping or permuting. The zeros of dropout or padding make x real again: put
    those before the sign. The gradient to shift is always that of the clipped quadratic.
    NaN counts as -1, except in torch's anomaly mode, where it is refused.

    Packed signs are convolved by 1x1 and 3x3 kernels of stride 1 or 2 without groups, where
    ``padding`` is half the kernel. For any other window torch convolves +1 and -1 as floats, which
    takes longer and more memory meanwhile. It keeps no more for backward.

    Args:
        x: (N, C, H, W) or (C, H, W); float32, bfloat16, float16, or float64 on the CPU. Under
            autocast a float32 x is cast first.
        weight: (O, C / groups, kh, kw), floating point.
        shift: (C,), added before the sign, or None.
        bias: (O,), added to the result, or None.
        stride: an int, or one for each dimension, as the next two.
        padding: zeros on each side, after the sign; or "same", which needs stride 1, or "valid".
        dilation: the distance between the kernel's elements.
        groups: parts of the channels that are convolved separately.
        binary_weight: whether the weight is binarised.
        may_be_binary: False where x is known to be real: backward then leaves out a look at x.

    Returns:
        (N, O, H', W') or (O, H', W') in ``x``'s dtype. It is in channels_last memory where ``x`` or
        ``weight`` is, else contiguous, as nn.Conv2d's output is.

    Raises:
        RuntimeError: x holds NaN, in torch's anomaly mode.
        TypeError: an operand is not floating point, or the weight is neither in ``x``'s dtype nor
            float32 beside a narrower x.
        ValueError: the shapes do not match, a window that does not fit, several devices.
    """
    unbatched = isinstance(x, Tensor) and x.dim() == 3
    x = x[None] if unbatched else x
    checks.check_activation("x", x, dims=(4,), or_unbatched=True)
    checks.check_float("weight", weight)
    check_weight(weight, x.shape[1], groups)
    checks.check_per_channel(x.shape[1], shift=shift)
    if bias is not None:
        checks.check_per_channel(weight.shape[0], bias=bias)
    checks.check_same_device(x=x, weight=weight, shift=shift, bias=bias)
    geometry = _window(weight.shape[2:], stride, padding, dilation, groups)
    geometry.check(*x.shape[2:])
    x = autocast_input(x)
    checks.check_weight_dtype(x, weight)
    refuse_nan(x)
    kinds = (binary_weight, may_be_binary)
    if geometry.packed:
        packed = (geometry.stride[0], geometry.padding[0])
        y = apply(PackedConv2d, x, weight, shift, *packed, *kinds)
    else:
        y = apply(AnyWindow, x, weight, shift, geometry, *kinds)
    if bias is not None:
        y = y + bias.to(y.dtype).view(-1, 1, 1)
    return y[0] if unbatched else y


def binary_conv1d(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    binary_weight: bool = True,
    may_be_binary: bool = True,
) -> Tensor:
    """:func:`binary_conv2d` in one dimension: of an image of one row.

    Args:
        x: (N, C, L) or (C, L), of dtypes as there.
        weight: (O, C / groups, k), floating point.
        shift: (C,), added before the sign, or None.
        bias: (O,), added to the result, or None.
        stride: of the kernel.
        padding: zeros on each side, after the sign; or "same", which needs stride 1, or "valid".
        dilation: the distance between the kernel's elements.
        groups: parts of the channels that are convolved separately.
        binary_weight: whether the weight is binarised.
        may_be_binary: False where x is known to be real: backward then leaves out a look at x.

    Returns:
        (N, O, L') or (O, L') in ``x``'s dtype, contiguous.

    Raises:
        TypeError: as there.
        ValueError: as there.
    """
    checks.check_float("x", x)
    checks.check_float("weight", weight)
    if x.dim() not in (2, 3) or weight.dim() != 3:
        raise ValueError(
            "x must have shape (N, C, L) or (C, L), and weight (O, C / groups, k), "
            f"not {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    one_row = {"stride": (1, *sizes("stride", stride, 1))}
    one_row["dilation"] = (1, *sizes("dilation", dilation, 1))
    return binary_conv2d(
        x.unsqueeze(-2),
        weight.unsqueeze(-2),
        shift,
        bias=bias,
        padding=padding if isinstance(padding, str) else (0, *sizes("padding", padding, 1, 0)),
        **one_row,
        groups=groups,
        binary_weight=binary_weight,
        may_be_binary=may_be_binary,
    ).squeeze(-2)
