"""ReActNet's activation in torch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonbnn.eager.common import accumulator, image_chunks, scratch, shifted
from tritonbnn.layout import channels_last, empty_pixels, flat_pixels


def rprelu_forward(x: Tensor, shift_in: Tensor, slope: Tensor, shift_out: Tensor) -> Tensor:
    """PReLU(x + shift_in) + shift_out, slopes and shifts per channel (ReActNet, 2003.03488).

    Args:
        x: (N, C, H, W) or (M, C), floating point.
        shift_in: (C,), added before the PReLU.
        slope: (C,), the PReLU's slope where x + shift_in <= 0.
        shift_out: (C,), added after it.

    Returns:
        The shape and dtype of ``x``, channels innermost in memory.
    """
    z = empty_pixels(x, x.dtype)
    for part in image_chunks(x):
        t, out = shifted(x[part], shift_in), flat_pixels(z[part])
        out.copy_(torch.add(F.prelu(t, slope.to(t.dtype)), shift_out, out=scratch(out, t.dtype)))
    return z


def prelu_backward(grad: Tensor, t: Tensor, slope: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of PReLU(t), in arithmetic: random masks cost torch ten times as much.

    Args:
        grad: (pixels, C), the gradient to the output.
        t: (pixels, C), the input; it is overwritten.
        slope: (C,).
        out: (pixels, C), memory for the first result.

    Returns:
        The gradients to ``t``, grad * (t > 0 ? 1 : slope), and to ``slope``, the column sums of
        grad * min(t, 0).
    """
    positive = torch.ops.aten.threshold_backward(grad, t, 0)  # grad where t > 0, else 0
    negative = grad - positive  # exact: one of the two is 0
    dt = torch.addcmul(positive, negative, slope.to(grad.dtype), out=out)
    return dt, t.mul_(negative).sum(0)


def rprelu_backward(
    grad: Tensor, x: Tensor, shift_in: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All gradients of :func:`rprelu_forward` from one pass over ``grad`` and ``x``.

    Args:
        grad: the gradient to the output, of ``x``'s shape.
        x: the input of the forward pass.
        shift_in: (C,).
        slope: (C,).

    Returns:
        The gradients to ``x`` (in its dtype), ``shift_in``, ``slope`` and ``shift_out``; the last
        three (C,) float32 (float64 for float64 ``x``).
    """
    dx = empty_pixels(x, x.dtype)
    sums = torch.zeros(3, x.shape[1], dtype=accumulator(x.dtype), device=x.device)
    for part in image_chunks(x):
        out, g = flat_pixels(dx[part]), flat_pixels(channels_last(grad[part])).to(sums.dtype)
        t = shifted(x[part], shift_in)
        dt, dslope = prelu_backward(g, t, slope, out=scratch(out, g.dtype))
        sums += torch.stack((dt.sum(0), dslope, g.sum(0)))
        out.copy_(dt)
    return dx, *(s.clone() for s in sums)  # operators may not return views of one tensor
