"""Binary convolution and its gradients in torch: signs are expanded, then torch convolves."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonbnn.checks import conv_output_size
from tritonbnn.eager import common
from tritonbnn.eager.common import accumulator, chunks
from tritonbnn.eager.pack import unpack_signs
from tritonbnn.layout import channels_last, empty_channels_last

FILTERS = 128
"""Filters of a large weight whose gradient is computed at a time: torch holds it three times."""


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
    """Convolve signs with signs; zero padding comes after the sign, so it adds nothing.

    Args:
        x: int32 (N, H, W, words), packed signs of the input.
        weight: int32 (O, kh, kw, words), packed signs of the weight.
        alpha: (O,), a scale per output channel, applied in float32; None for the bare integers.
        channels: C, the true number of input channels.
        stride: 1 or 2.
        padding: kh // 2.
        dtype: of the result. An integer dtype must hold +-C kh kw.

    Returns:
        (N, O, H', W') in channels_last memory.
    """
    real = unpack_signs(weight, channels, accumulator(dtype))
    return _convolution(x, real, alpha, stride, padding, dtype)


def conv_real(
    x: Tensor, weight: Tensor, *, stride: int, padding: int, dtype: torch.dtype
) -> Tensor:
    """Convolve signs with a real weight (step 1 of the two-step schedule).

    Args:
        x: int32 (N, H, W, words(C)), packed signs of the input.
        weight: (O, C, kh, kw), floating point; rounded to ``dtype`` before the product.
        stride: 1 or 2.
        padding: kh // 2.
        dtype: of the result.

    Returns:
        (N, O, H', W') in channels_last memory.
    """
    real = weight.to(dtype).to(accumulator(dtype))
    return _convolution(x, real, None, stride, padding, dtype)


def _convolution(
    x: Tensor, weight: Tensor, alpha: Tensor | None, stride: int, padding: int, dtype: torch.dtype
) -> Tensor:
    """Packed signs by a weight in the accumulator's dtype, scaled, rounded once to ``dtype``."""
    out_channels, channels, kernel_size, _ = weight.shape
    images, height, width, _ = x.shape
    size = conv_output_size(height, width, kernel_size, stride, padding)
    y = empty_channels_last((images, out_channels, *size), dtype, x.device)
    # autocast would round the integers of the result
    with torch.autocast(x.device.type, enabled=False):
        for part in chunks(images, channels * height * width):
            signs = unpack_signs(x[part], channels, weight.dtype)
            result = F.conv2d(signs, weight, stride=stride, padding=padding)
            if alpha is not None:
                result.mul_(alpha.view(-1, 1, 1))
            y[part].copy_(result)
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
    """The gradient of a binary convolution to its +-1 input.

    Args:
        grad: (N, O, H', W'), the gradient to the output.
        weight: packed signs, int32 (O, kh, kw, words), with ``alpha``; or a real (O, C, kh, kw)
            without.
        alpha: (O,), the scale per output channel, or None for a real weight.
        channels: C.
        height: H of the input.
        width: W of the input.
        stride: 1 or 2.
        padding: kh // 2.

    Returns:
        (N, C, H, W) in ``grad``'s dtype and channels_last memory.
    """
    acc = accumulator(grad.dtype)
    if alpha is None:
        real = weight.to(grad.dtype).to(acc)
    else:
        real = unpack_signs(weight, channels, acc).mul_(alpha.view(-1, 1, 1, 1))
    size, mask = (channels, height, width), [True, False, False]

    def convolved(grad: Tensor) -> Tensor:
        like = empty_channels_last((len(grad), *size), acc, grad.device)
        return _convolution_backward(grad, like, real, stride, padding, mask)[0]

    if grad.dtype == acc:
        return channels_last(convolved(grad))
    dx = empty_channels_last((len(grad), *size), grad.dtype, grad.device)
    for part in chunks(len(grad), channels * height * width):
        dx[part].copy_(convolved(grad[part].to(acc)))
    return dx


def conv_weight_grad(
    grad: Tensor, x: Tensor, *, channels: int, kernel_size: int, stride: int, padding: int
) -> Tensor:
    """The gradient of a binary convolution to its weight: signs correlated with ``grad``.

    No alpha enters, and no mask (AdamBNN 1.3): the caller applies the clip's mask.

    Args:
        grad: (N, O, H', W'), the gradient to the output.
        x: int32 (N, H, W, words), packed signs of the input.
        channels: C.
        kernel_size: kh = kw.
        stride: 1 or 2.
        padding: kh // 2.

    Returns:
        (O, C, kh, kw), float32 (float64 for a float64 ``grad``), in channels_last memory.
    """
    acc = accumulator(grad.dtype)
    shape = (grad.shape[1], channels, kernel_size, kernel_size)
    total = empty_channels_last(shape, acc, grad.device).zero_()
    mask = [False, True, False]
    size = FILTERS if total.numel() > common.CHUNK else len(total)
    for part in chunks(len(x), channels * x.shape[1] * x.shape[2]):
        signs, g = unpack_signs(x[part], channels, acc), grad[part].to(acc)
        for share, filters in zip(g.split(size, dim=1), total.split(size, dim=0), strict=True):
            filters += _convolution_backward(share, signs, filters, stride, padding, mask)[1]
    return total


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    s, p = [stride, stride], [padding, padding]
    return torch.ops.aten.convolution_backward(
        channels_last(grad), x, weight, None, s, p, [1, 1], False, [0, 0], 1, mask
    )
