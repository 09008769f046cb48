"""ReActNet's activation in torch."""

import torch
from torch import Tensor

from tritonbnn.eager.common import shifted
from tritonbnn.layout import channels_last, flat_pixels, from_flat


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
    t = shifted(x, shift_in)
    z = torch.where(t > 0, t, t * slope).add_(shift_out)
    return from_flat(z.to(x.dtype), tuple(x.shape))


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
    t = shifted(x, shift_in)
    g = flat_pixels(channels_last(grad)).to(t.dtype)
    dx = torch.where(t > 0, g, g * slope)
    dslope = t.clamp_(max=0).mul_(g).sum(0)
    return from_flat(dx.to(x.dtype), tuple(x.shape)), dx.sum(0), dslope, g.sum(0)
