"""The binary linear layer, on the packed matrix product."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonbnn import checks
from tritonbnn.eager.common import accumulator
from tritonbnn.layout import laid_out_as
from tritonbnn.ops import exported, library
from tritonbnn.ops.apply import apply
from tritonbnn.ops.autocast import autocast_input
from tritonbnn.ops.nan import refuse_nan
from tritonbnn.ops.once import differentiable_once
from tritonbnn.ops.plain import operand, signs
from tritonbnn.ops.signs import clipped_weight_grad, sign_grads

_POINTWISE = {"stride": 1, "padding": 0}


def _as_image(matrix: Tensor) -> Tensor:
    """(M, C) as M images of one pixel, whose convolution with a 1x1 kernel is the product."""
    return matrix[:, :, None, None]


class _BinaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        shift: Tensor | None,
        binary_weight: bool,
        may_be_binary: bool,
    ) -> Tensor:
        signs = library.pack_signs(x, shift)
        packed, alpha = library.signs_and_scale(weight) if binary_weight else (None, None)
        ctx.save_for_backward(x, shift, weight, signs, packed, alpha)
        ctx.may_be_binary = may_be_binary
        if packed is None:
            pixels, image = signs[:, None, None], _as_image(weight)
            y = library.conv_real(pixels, image, dtype=x.dtype, **_POINTWISE)
            return y.flatten(1).clone()  # no view, as that may not be changed in place
        y = library.packed_matmul(signs, packed, x.shape[1]) * alpha
        # torch.compile takes a cast that does nothing for a second output, and y's gradient is lost
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor):
        x, shift, weight, signs, packed, alpha = ctx.saved_tensors
        features = x.shape[1]
        needs_x, needs_weight, needs_shift = ctx.needs_input_grad[:3]
        dx = dweight = dshift = None
        image_grad = _as_image(grad.contiguous())
        if needs_weight:
            signs = signs[:, None, None]
            dweight = library.conv_weight_grad(
                image_grad, signs, channels=features, kernel_size=1, **_POINTWISE
            ).flatten(1)
            if packed is not None:
                dweight = clipped_weight_grad(dweight, weight)
            dweight = laid_out_as(dweight, weight)
        if needs_x or needs_shift:
            operand = _as_image(weight) if packed is None else packed[:, None, None]
            size = {"channels": features, "height": 1, "width": 1}
            dsigns = library.conv_input_grad(image_grad, operand, alpha, **size, **_POINTWISE)
            look = ctx.may_be_binary and needs_x
            dx, dshift = sign_grads(dsigns.flatten(1), x, shift, look)
        return dx if needs_x else None, dweight, dshift if needs_shift else None, None, None


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _plain(
    x: Tensor, weight: Tensor, shift: Tensor | None, binary_weight: bool, may_be_binary: bool
) -> Tensor:
    kernel, alpha = operand(weight, accumulator(x.dtype), binary_weight)
    y = F.linear(signs(x, shift), kernel)
    return (y if alpha is None else y * alpha).to(x.dtype)


exported.stand_in(
    _BinaryLinear,
    "binary_linear",
    "Tensor x, Tensor weight, Tensor? shift, bool binary_weight, bool may_be_binary",
    fake=_fake,
    plain=_plain,
)


def binary_linear(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    binary_weight: bool = True,
    may_be_binary: bool = True,
) -> Tensor:
    """sign(x + shift) @ (alpha * sign(w))^T, alpha the mean of abs(w) per output feature.

    The gradients are those of :func:`~tritonbnn.ops.binary_conv2d`: if all of x is +1 or -1, its
    gradient passes unchanged. With ``binary_weight=False`` it is sign(x + shift) @ w^T.
    NaN counts as -1, except in torch's anomaly mode, where it is refused.

    Args:
        x: (..., K); float32, bfloat16, float16, or float64 on the CPU. Under autocast a float32 x
            is cast first.
        weight: (O, K), floating point.
        shift: (K,), added before the sign, or None.
        bias: (O,), added to the result, or None.
        binary_weight: False for a real weight, as in step 1 of the two-step schedule.
        may_be_binary: False where x is known to be real: backward then leaves out a look at x.

    Returns:
        (..., O) in ``x``'s dtype.

    Raises:
        RuntimeError: x holds NaN, in torch's anomaly mode.
        TypeError: an operand is not floating point, or the weight is neither in ``x``'s dtype nor
            float32 beside a narrower x.
        ValueError: the shapes do not match, or several devices.
    """
    checks.check_float("x", x)
    checks.check_float("weight", weight)
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            "x (..., K) and weight (O, K) must share K, "
            f"not {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    checks.check_per_channel(x.shape[-1], shift=shift)
    checks.check_per_channel(weight.shape[0], bias=bias)
    checks.check_same_device(x=x, weight=weight, shift=shift, bias=bias)
    x = autocast_input(x)
    checks.check_weight_dtype(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    refuse_nan(x)
    y = apply(_BinaryLinear, rows, weight, shift, binary_weight, may_be_binary)
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias.to(y.dtype)
