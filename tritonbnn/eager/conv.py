"""Binary convolution and its gradients in torch: signs are expanded, then torch convolves."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonbnn.eager.common import accumulator
from tritonbnn.eager.pack import unpack_signs
from tritonbnn.layout import channels_last, empty_channels_last, flat_pixels


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
    acc = accumulator(dtype)
    real = unpack_signs(weight, channels, acc)
    y = _convolution(unpack_signs(x, channels, acc), real, stride, padding)
    if alpha is not None:
        flat_pixels(y).mul_(alpha)
    return y.to(dtype)


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
    acc = accumulator(dtype)
    signs = unpack_signs(x, weight.shape[1], acc)
    return _convolution(signs, weight.to(dtype).to(acc), stride, padding).to(dtype)


def _convolution(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """conv2d in the operands' own dtype: autocast would round the integers of the result."""
    with torch.autocast(x.device.type, enabled=False):
        return channels_last(F.conv2d(x, weight, stride=stride, padding=padding))


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
        real = unpack_signs(weight, channels, acc) * alpha.view(-1, 1, 1, 1)
    like = empty_channels_last((grad.shape[0], channels, height, width), acc, grad.device)
    mask = [True, False, False]
    return _convolution_backward(grad.to(acc), like, real, stride, padding, mask)[0].to(grad.dtype)


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
    like = empty_channels_last(shape, acc, grad.device)
    signs = unpack_signs(x, channels, acc)
    mask = [False, True, False]
    weight_grad = _convolution_backward(grad.to(acc), signs, like, stride, padding, mask)[1]
    return channels_last(weight_grad)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    s, p = [stride, stride], [padding, padding]
    return torch.ops.aten.convolution_backward(
        channels_last(grad), x, weight, None, s, p, [1, 1], False, [0, 0], 1, mask
    )
