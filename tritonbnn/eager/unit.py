"""The half-block around its convolution, in torch: statistics, epilogue, and their gradients.

a is the convolution's output, integers or real; xhat = (a - mean) * invstd. A unit computes
u = gamma * xhat + beta + shortcut and z = PReLU(u + shift_mid) + shift_out.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonbnn.eager.common import accumulator
from tritonbnn.layout import channels_last, flat_pixels, from_flat


def unit_plan(
    *,
    batch: int,
    height: int,
    width: int,
    channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int,
    dtype: torch.dtype,
    device: torch.device,
) -> str:
    """Whether a unit keeps its convolution's output for backward, or convolves again.

    Here it always convolves again: on a CPU, too, memory is what batches run out of first.

    Args:
        batch: N of the unit's input, as are the next three.
        height: H.
        width: W.
        channels: C.
        out_channels: O.
        kernel_size: 1 or 3.
        stride: 1 or 2.
        dtype: of the stream.
        device: of the stream.

    Returns:
        "keep" or "recompute".
    """
    return "recompute"


def channel_moments(a: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel.

    Those of integers are exact up to one rounding: the sums of a and of a^2 are integers below
    2^63 for fewer than 2^36 values of at most 9216, which is the largest K here.

    Args:
        a: (N, C, H, W) with at least one value per channel: int16, int32 or floating point.

    Returns:
        Mean and variance, (C,) float64.
    """
    flat = flat_pixels(channels_last(a))
    if not len(flat):
        return tuple(torch.zeros(2, a.shape[1], dtype=torch.float64, device=a.device))
    if a.is_floating_point():
        variance, mean = torch.var_mean(flat.to(accumulator(a.dtype)), dim=0, correction=0)
        return mean.double(), variance.double()
    count = flat.shape[0]
    total = flat.sum(0, dtype=torch.int64)
    wide = flat.to(torch.int32)  # 9216^2 < 2^31
    squares = (wide * wide).sum(0, dtype=torch.int64)
    # count * squares - total^2 may pass 2^63; float64 differs from it by rounding only.
    mean = total.double() / count
    return mean, (squares.double() / count - mean * mean).clamp_(min=0)


def _shortcut(stream: Tensor, kind: str) -> Tensor:
    if kind == "pool":
        return F.avg_pool2d(stream, 2)
    return torch.cat((stream, stream), dim=1) if kind == "repeat" else stream


def _pre_activation(
    a: Tensor,
    stream: Tensor,
    mean: Tensor,
    scale: Tensor,
    offset: Tensor,
    shift_mid: Tensor | None,
    shortcut: str,
) -> Tensor:
    """t = (a - mean) * scale + offset + shortcut(stream) + shift_mid, as (pixels, O)."""
    acc = accumulator(stream.dtype)
    constant = offset - mean * scale if shift_mid is None else offset - mean * scale + shift_mid
    t = torch.addcmul(constant.to(acc), flat_pixels(a).to(acc), scale.to(acc))
    return t.add_(flat_pixels(channels_last(_shortcut(stream, shortcut))))


def unit_forward(
    a: Tensor,
    stream: Tensor,
    mean: Tensor,
    scale: Tensor,
    offset: Tensor,
    shift_mid: Tensor | None,
    slope: Tensor | None,
    shift_out: Tensor | None,
    *,
    shortcut: str,
) -> Tensor:
    """A unit's epilogue: z = PReLU((a - mean) * scale + offset + shortcut + shift_mid) + shift_out.

    Args:
        a: (N, O, H', W'), the convolution's output: int16, int32 or floating point.
        stream: what the shortcut starts from: (N, O, H', W') for "identity",
            (N, O / 2, H', W') for "repeat", (N, O, 2 H', 2 W') for "pool"; floating point.
        mean: (O,), of a.
        scale: (O,), gamma * invstd.
        offset: (O,), beta.
        shift_mid: (O,), or None together with the next two: no activation, z = u.
        slope: (O,), the PReLU's slope where its input is <= 0.
        shift_out: (O,).
        shortcut: "identity", "repeat" or "pool".

    Returns:
        (N, O, H', W') in ``stream``'s dtype and channels_last memory.
    """
    t = _pre_activation(a, stream, mean, scale, offset, shift_mid, shortcut)
    if slope is not None and shift_out is not None:
        t = F.prelu(t, slope.to(t.dtype)).add_(shift_out)
    return from_flat(t.to(stream.dtype), tuple(a.shape))


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
    """Backward through a unit's activation, and the sums that its BatchNorm needs, in one pass.

    With t the input of the PReLU, du = grad * (t > 0 ? 1 : slope).

    Args:
        grad: (N, O, H', W'), the gradient to z.
        a: as in :func:`unit_forward`, as are the others.

    Returns:
        du, (N, O, H', W') in ``grad``'s dtype; and the sums of du, of du * (a - mean), of
        grad * min(t, 0) and of grad, (4, O) float32 (float64 for a float64 ``grad``).
    """
    g = flat_pixels(channels_last(grad)).to(accumulator(grad.dtype))
    centred = flat_pixels(a).to(g.dtype) - mean.to(g.dtype)
    if slope is None:
        du, dslope, dshift_out = g, torch.zeros_like(scale, dtype=g.dtype), g.sum(0)
    else:
        t = _pre_activation(a, stream, mean, scale, offset, shift_mid, shortcut)
        du = torch.where(t > 0, g, g * slope)
        dslope, dshift_out = t.clamp_(max=0).mul_(g).sum(0), g.sum(0)
    sums = torch.stack((du.sum(0), centred.mul_(du).sum(0), dslope, dshift_out))
    return from_flat(du.to(grad.dtype), tuple(a.shape)), sums


def unit_norm_backward(
    du: Tensor, a: Tensor, du_scale: Tensor, a_scale: Tensor, constant: Tensor
) -> Tensor:
    """Backward through BatchNorm, once its sums are known: du_scale * du + a_scale * a + constant.

    Args:
        du: (N, O, H', W'), the gradient to BatchNorm's output.
        a: (N, O, H', W'), the convolution's output.
        du_scale: (O,), as are the other two.

    Returns:
        The gradient to the convolution's scaled output, in ``du``'s dtype.
    """
    acc = accumulator(du.dtype)
    result = torch.addcmul(constant.to(acc), flat_pixels(a).to(acc), a_scale.to(acc))
    result.addcmul_(flat_pixels(channels_last(du)).to(acc), du_scale.to(acc))
    return from_flat(result.to(du.dtype), tuple(a.shape))
