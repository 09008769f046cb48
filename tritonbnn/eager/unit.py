"""The half-block around its convolution, in torch: statistics, epilogue, and their gradients.

a is the convolution's output, integers or real; xhat = (a - mean) * invstd. A unit computes
u = gamma * xhat + beta + shortcut and z = PReLU(u + shift_mid) + shift_out.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonbnn.bits import words
from tritonbnn.eager.common import accumulator, image_chunks, scratch
from tritonbnn.eager.pack import pack_signs
from tritonbnn.eager.rprelu import prelu_backward
from tritonbnn.layout import channels_last, empty_pixels, flat_pixels


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
    binary_weight: bool,
    device: torch.device,
) -> str:
    """Whether a unit keeps its convolution's output for backward, or convolves again.

    Here it always keeps it: on a CPU a convolution costs more than its output's memory traffic.

    Args:
        batch: N of the unit's input, as are the next three.
        height: H.
        width: W.
        channels: C.
        out_channels: O.
        kernel_size: 1 or 3.
        stride: 1 or 2.
        dtype: of the stream.
        binary_weight: whether the convolution's output is integers, or real as in step 1.
        device: of the stream.

    Returns:
        "keep".
    """
    return "keep"


def channel_moments(a: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel.

    Those of integers are exact up to one rounding: the sums of a and of a^2 are integers, below
    2^53 for up to 10^8 values of at most 9216, the largest K of the networks here. For reals
    float64 leaves room for a mean far from 0; torch's own variance takes ten times as long.

    Args:
        a: (N, C, H, W) with at least one value per channel: int16, int32 or floating point.

    Returns:
        Mean and variance, (C,) float64.
    """
    flat = flat_pixels(channels_last(a))
    total = torch.zeros(a.shape[1], dtype=torch.float64, device=a.device)
    squares = torch.zeros_like(total)
    if not len(flat):
        return total, squares
    if a.dtype == torch.float64:
        variance, mean = torch.var_mean(flat, dim=0, correction=0)
        return mean, variance
    for part in image_chunks(flat):
        wide = flat[part].double()
        total += wide.sum(0)
        squares += wide.mul_(wide).sum(0)
    mean = total / len(flat)
    return mean, (squares / len(flat) - mean * mean).clamp_(min=0)


def _add_shortcut(t: Tensor, stream: Tensor, kind: str) -> Tensor:
    """Add the shortcut of (N, C, H, W) to (pixels, O), in place."""
    if kind == "pool":
        stream = F.avg_pool2d(stream, 2)
    flat = flat_pixels(channels_last(stream))
    for half in t.chunk(2, dim=1) if kind == "repeat" else (t,):
        half.add_(flat)
    return t


def _pre_activation(
    values: Tensor,
    stream: Tensor,
    mean: Tensor,
    scale: Tensor,
    offset: Tensor,
    shift_mid: Tensor | None,
    shortcut: str,
) -> Tensor:
    """t = (a - mean) * scale + offset + shortcut(stream) + shift_mid, with a as (pixels, O)."""
    constant = offset - mean * scale if shift_mid is None else offset - mean * scale + shift_mid
    t = torch.addcmul(constant.to(values.dtype), values, scale.to(values.dtype))
    return _add_shortcut(t, stream, shortcut)


def _values(a: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, O, H', W') as (pixels, O) in the dtype of the sums."""
    return flat_pixels(channels_last(a)).to(accumulator(dtype))


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
        next_shift: (O,), what the next unit adds before its sign, or None.
        shortcut: "identity", "repeat" or "pool".
        pack: whether the signs of z + next_shift are wanted.

    Returns:
        z, (N, O, H', W') in ``stream``'s dtype and channels_last memory; and its packed signs,
        int32 (N, H', W', words), or with no words if they are not wanted.
    """
    n, _, height, width = a.shape
    z = empty_pixels(a, stream.dtype)
    signs = a.new_empty((n, height, width, words(a.shape[1]) if pack else 0), dtype=torch.int32)
    for part in image_chunks(a):
        values = _values(a[part], stream.dtype)
        t = _pre_activation(values, stream[part], mean, scale, offset, shift_mid, shortcut)
        out = flat_pixels(z[part])
        if slope is not None and shift_out is not None:
            t = torch.add(F.prelu(t, slope.to(t.dtype)), shift_out, out=scratch(out, t.dtype))
        out.copy_(t)
        if pack:  # while they are in the caches
            signs[part] = pack_signs(z[part], next_shift)
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
    """Backward through a unit's activation, and the sums that its BatchNorm needs, in one pass.

    With t the input of the PReLU, du = grad * (t > 0 ? 1 : slope).

    Args:
        grad: (N, O, H', W'), the gradient to z.
        a: as in :func:`unit_forward`, as are the others.

    Returns:
        du, (N, O, H', W') in ``grad``'s dtype; and the sums of du, of du * (a - mean), of
        grad * min(t, 0) and of grad, (4, O) float32 (float64 for a float64 ``grad``).
    """
    du = empty_pixels(grad, grad.dtype)
    sums = torch.zeros(4, a.shape[1], dtype=accumulator(grad.dtype), device=a.device)
    for part in image_chunks(a):
        g, values = _values(grad[part], grad.dtype), _values(a[part], grad.dtype)
        out, d = flat_pixels(du[part]), g
        if slope is not None:
            t = _pre_activation(values, stream[part], mean, scale, offset, shift_mid, shortcut)
            d, dslope = prelu_backward(g, t, slope, out=scratch(out, g.dtype))
            sums[2] += dslope
        sums[0] += d.sum(0)
        sums[1] += (values - mean.to(g.dtype)).mul_(d).sum(0)
        sums[3] += g.sum(0)
        out.copy_(d)
    return du, sums


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
    du_scale, a_scale, constant = (v.to(acc) for v in (du_scale, a_scale, constant))
    dy = empty_pixels(du, du.dtype)
    for part in image_chunks(a):
        d, values = _values(du[part], du.dtype), _values(a[part], du.dtype)
        out = flat_pixels(dy[part])
        result = torch.addcmul(constant, values, a_scale, out=scratch(out, acc))
        out.copy_(result.addcmul_(d, du_scale))
    return dy
