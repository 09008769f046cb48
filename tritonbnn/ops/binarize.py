"""The binary activation: sign with the clipped quadratic's pseudo-gradient."""

import torch
from torch import Tensor

from tritonbnn import checks
from tritonbnn.ops import library
from tritonbnn.ops.apply import apply
from tritonbnn.ops.nan import refuse_nan
from tritonbnn.ops.once import differentiable_once


class _Binarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shift: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, shift)
        return library.sign_forward(x, shift)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor):
        x, shift = ctx.saved_tensors
        dx, dshift = library.sign_backward(grad, x, shift)
        return dx, dshift if ctx.needs_input_grad[1] else None


def binarize(x: Tensor, shift: Tensor | None = None) -> Tensor:
    """sign(x + shift), with sign(0) = +1, as +1 and -1 (AdamBNN, 2106.11309, section 3).

    The pseudo-gradient is that of the clipped quadratic: max(0, 2 - 2 abs(x + shift)), so 2 at 0
    and 0 from +-1 outwards. It is computed again from ``x`` in backward, never stored.
    NaN counts as -1, except in torch's anomaly mode, where it is refused.

    Args:
        x: (N, C, H, W) or (M, C); float32, bfloat16, float16, or float64 on the CPU.
        shift: (C,), a learnable shift per channel, or None.

    Returns:
        The shape and dtype of ``x``, channels innermost in memory.

    Raises:
        RuntimeError: x holds NaN, in torch's anomaly mode.
        TypeError: ``x`` is not floating point.
        ValueError: ``shift`` has another shape, or is on another device.
    """
    checks.check_activation("x", x)
    checks.check_per_channel(x.shape[1], shift=shift)
    checks.check_same_device(x=x, shift=shift)
    refuse_nan(x)
    return apply(_Binarize, x, shift)
