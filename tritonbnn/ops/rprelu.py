"""ReActNet's activation: a PReLU with a learnable shift before and after it."""

import torch
from torch import Tensor

from tritonbnn import checks
from tritonbnn.eager.common import accumulator
from tritonbnn.layout import empty_pixels, in_format_of, laid_out_as
from tritonbnn.ops import exported
from tritonbnn.ops.apply import apply
from tritonbnn.ops.channels import by_channel
from tritonbnn.ops.library import operator
from tritonbnn.ops.once import differentiable_once
from tritonbnn.ops.plain import per_channel


@operator
def rprelu_forward(x, shift_in, slope, shift_out):
    return empty_pixels(x, x.dtype)


@operator
def rprelu_backward(grad, x, shift_in, slope):
    sums = [x.new_empty(x.shape[1], dtype=accumulator(x.dtype)) for _ in range(3)]
    return empty_pixels(x, x.dtype), *sums


class _RPReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shift_in: Tensor, slope: Tensor, shift_out: Tensor) -> Tensor:
        ctx.save_for_backward(x, shift_in, slope)
        return in_format_of(rprelu_forward(x, shift_in, slope, shift_out), x)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor):
        x, shift_in, slope = ctx.saved_tensors
        dx, *sums = rprelu_backward(grad, x, shift_in, slope)
        return laid_out_as(dx, x), *sums


def rprelu(
    x: Tensor, shift_in: Tensor, slope: Tensor, shift_out: Tensor, *, channel_dim: int = 1
) -> Tensor:
    """PReLU(x + shift_in) + shift_out, per channel (ReActNet, 2003.03488, section 4.2).

    Args:
        x: (N, C), (N, C, L), (N, C, H, W) or any shape that has channels in ``channel_dim``, or
            (C,); float32, bfloat16, float16, or float64 on the CPU.
        shift_in: (C,), added before the PReLU.
        slope: (C,), the slope where x + shift_in <= 0.
        shift_out: (C,), added after the PReLU.
        channel_dim: -1 for (N, L, C), -3 for images with or without a batch.

    Returns:
        The shape, dtype and memory format of ``x``.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: ``x`` has another number of channels than the parameters, they differ among
            each other, or one is on another device.
    """
    checks.check_float("x", x)
    parameters = {"shift_in": shift_in, "slope": slope, "shift_out": shift_out}
    checks.check_vectors(**parameters)
    checks.check_same_device(x=x, **parameters)

    def activated(x: Tensor) -> Tensor:
        return apply(_RPReLU, x, shift_in, slope, shift_out)

    return by_channel(x, channel_dim, len(slope), activated)


def plain_rprelu(x: Tensor, shift_in: Tensor, slope: Tensor, shift_out: Tensor) -> Tensor:
    """The same in torch's own operators, forward alone."""
    t = x.to(accumulator(x.dtype))
    t = t + per_channel(shift_in, t)
    t = torch.where(t > 0, t, t * per_channel(slope, t))
    return (t + per_channel(shift_out, t)).to(x.dtype)


exported.stand_in(
    _RPReLU,
    "rprelu",
    "Tensor x, Tensor shift_in, Tensor slope, Tensor shift_out",
    fake=exported.like_pixels,
    plain=plain_rprelu,
)
