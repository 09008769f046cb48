"""The binary activation: sign with the clipped quadratic's pseudo-gradient."""

import torch
from torch import Tensor

from tritonbnn import checks
from tritonbnn.eager.common import accumulator
from tritonbnn.layout import empty_pixels, in_format_of, laid_out_as
from tritonbnn.ops import exported
from tritonbnn.ops.apply import apply
from tritonbnn.ops.channels import by_channel
from tritonbnn.ops.library import operator
from tritonbnn.ops.nan import refuse_nan
from tritonbnn.ops.once import differentiable_once
from tritonbnn.ops.plain import signs


@operator
def sign_forward(x, shift=None):
    return empty_pixels(x, x.dtype)


@operator
def sign_backward(grad, x, shift=None, residual=None, *, shortcut="identity"):
    return empty_pixels(x, x.dtype), x.new_empty(x.shape[1], dtype=accumulator(x.dtype))


class _Binarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shift: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, shift)
        return in_format_of(sign_forward(x, shift), x)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor):
        x, shift = ctx.saved_tensors
        dx, dshift = sign_backward(grad, x, shift)
        return laid_out_as(dx, x), dshift if ctx.needs_input_grad[1] else None


def binarize(x: Tensor, shift: Tensor | None = None, *, channel_dim: int = 1) -> Tensor:
    """sign(x + shift), with sign(0) = +1, as +1 and -1 (AdamBNN, 2106.11309, section 3).

    The pseudo-gradient is that of the clipped quadratic: max(0, 2 - 2 abs(x + shift)), so 2 at 0
    and 0 from +-1 outwards. It is computed again from ``x`` in backward, never stored.
    NaN counts as -1, except in torch's anomaly mode, where it is refused.

    Args:
        x: (N, C), (N, C, L), (N, C, H, W) or any shape that has channels in ``channel_dim``, or
            (C,); float32, bfloat16, float16, or float64 on the CPU.
        shift: (C,), a learnable shift per channel, or None.
        channel_dim: -1 for (N, L, C), -3 for images with or without a batch.

    Returns:
        The shape, dtype and memory format of ``x``.

    Raises:
        RuntimeError: x holds NaN, in torch's anomaly mode.
        TypeError: ``x`` is not floating point.
        ValueError: ``x`` has another number of channels than ``shift``, or is on another device.
    """
    checks.check_float("x", x)
    checks.check_vectors(shift=shift)
    checks.check_same_device(x=x, shift=shift)
    refuse_nan(x)
    features = None if shift is None else len(shift)
    return by_channel(x, channel_dim, features, lambda x: apply(_Binarize, x, shift))


def _plain(x: Tensor, shift: Tensor | None) -> Tensor:
    return signs(x, shift).to(x.dtype)


exported.stand_in(
    _Binarize, "binarize", "Tensor x, Tensor? shift", fake=exported.like_pixels, plain=_plain
)
