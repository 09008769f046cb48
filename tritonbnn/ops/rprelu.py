"""ReActNet's activation: a PReLU with a learnable shift before and after it."""

import torch
from torch import Tensor

from tritonbnn import checks
from tritonbnn.ops import library
from tritonbnn.ops.apply import apply
from tritonbnn.ops.once import differentiable_once


class _RPReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shift_in: Tensor, slope: Tensor, shift_out: Tensor) -> Tensor:
        ctx.save_for_backward(x, shift_in, slope)
        return library.rprelu_forward(x, shift_in, slope, shift_out)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor):
        x, shift_in, slope = ctx.saved_tensors
        return library.rprelu_backward(grad, x, shift_in, slope)


def rprelu(x: Tensor, shift_in: Tensor, slope: Tensor, shift_out: Tensor) -> Tensor:
    """PReLU(x + shift_in) + shift_out, per channel (ReActNet, 2003.03488, section 4.2).

    Args:
        x: (N, C, H, W) or (M, C); float32, bfloat16, float16, or float64 on the CPU.
        shift_in: (C,), added before the PReLU.
        slope: (C,), the slope where x + shift_in <= 0.
        shift_out: (C,), added after the PReLU.

    Returns:
        The shape and dtype of ``x``, channels innermost in memory.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: a parameter has another shape, or is on another device.
    """
    checks.check_activation("x", x)
    parameters = {"shift_in": shift_in, "slope": slope, "shift_out": shift_out}
    checks.check_per_channel(x.shape[1], **parameters)
    checks.check_same_device(x=x, **parameters)
    return apply(_RPReLU, x, shift_in, slope, shift_out)
