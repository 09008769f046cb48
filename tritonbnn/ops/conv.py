"""The binary convolution: signs in, real numbers out, packed signs saved."""

import torch
from torch import Tensor

from tritonbnn import checks
from tritonbnn.ops import library
from tritonbnn.ops.apply import apply
from tritonbnn.ops.autocast import autocast_input
from tritonbnn.ops.nan import refuse_nan
from tritonbnn.ops.once import differentiable_once


class _BinaryConv2d(torch.autograd.Function):
    """y = alpha * conv(sign(x + shift), sign(w)), or conv(sign(x + shift), w).

    Saved: x, which the shortcut keeps alive anyway, and the packed signs of both operands.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        shift: Tensor | None,
        stride: int,
        padding: int,
        binary_weight: bool,
        may_be_binary: bool,
    ) -> Tensor:
        signs = library.pack_signs(x, shift)
        geometry = {"stride": stride, "padding": padding}
        packed, alpha = library.pack_weight(weight) if binary_weight else (None, None)
        if binary_weight:
            y = library.conv_packed(
                signs, packed, alpha, channels=x.shape[1], dtype=x.dtype, **geometry
            )
        else:
            y = library.conv_real(signs, weight, dtype=x.dtype, **geometry)
        ctx.save_for_backward(x, shift, weight, signs, packed, alpha)
        ctx.geometry, ctx.may_be_binary = geometry, may_be_binary
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor):
        x, shift, weight, signs, packed, alpha = ctx.saved_tensors
        channels, height, width = x.shape[1:]
        needs_x, needs_weight, needs_shift = ctx.needs_input_grad[:3]
        dx = dweight = dshift = None
        if needs_weight:
            dweight = library.conv_weight_grad(
                grad, signs, channels=channels, kernel_size=weight.shape[2], **ctx.geometry
            )
            if packed is not None:
                dweight = clipped_weight_grad(dweight, weight)
        if needs_x or needs_shift:
            operand = weight if packed is None else packed
            size = {"channels": channels, "height": height, "width": width}
            dsigns = library.conv_input_grad(grad, operand, alpha, **size, **ctx.geometry)
            dx, dshift = sign_grads(dsigns, x, shift, ctx.may_be_binary and needs_x)
        return (
            dx if needs_x else None,
            dweight,
            dshift if needs_shift else None,
            *(None, None, None, None),
        )


def sign_grads(
    dsigns: Tensor, x: Tensor, shift: Tensor | None, may_be_binary: bool
) -> tuple[Tensor, Tensor]:
    """The gradients to x and shift from that to the signs, past the sign where x is binary already.

    The pseudo-gradient is 0 at +-1, so behind another sign nothing would be trained.
    """
    dx, dshift = library.sign_backward(dsigns, x, shift)
    if not may_be_binary:
        return dx, dshift
    if x.device.type == "cpu" and not library.through_operators(x):
        return dsigns if _is_binary(x) else dx, dshift
    # chosen on the device, so that nothing waits for it
    return torch.where((x.abs() == 1).all(), dsigns, dx), dshift


def _is_binary(x: Tensor) -> bool:
    """Whether all of x is +1 or -1.

    Real numbers nearly always show in the first pixel that they are. Then the rest is not read.
    """
    first = x[:1] if x.dim() == 2 else x[:1, :, :1, :1]
    return bool((first.abs() == 1).all()) and bool((x.abs() == 1).all())


def clipped_weight_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient to a latent weight: 0 where abs(w) > 1 (AdamBNN 1.3).

    It comes in the weight's memory layout, which autograd would else copy it to. ``grad`` may be
    overwritten.
    """
    edge = 1 + torch.finfo(grad.dtype).eps  # hardtanh's gradient is 0 from its bounds on
    real = weight.to(grad.dtype)
    # in place where it may be: new memory costs a CPU more than the clipping
    in_place = grad.stride() == weight.stride() and not library.through_operators(weight)
    clipped = grad if in_place else torch.empty_like(weight, dtype=grad.dtype)
    return torch.ops.aten.hardtanh_backward(grad, real, -edge, edge, grad_input=clipped)


def binary_conv2d(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    binary_weight: bool = True,
    may_be_binary: bool = True,
) -> Tensor:
    """Convolve sign(x + shift) with alpha * sign(w), alpha the mean of abs(w) per output channel.

    Zero padding comes after the sign, so it adds nothing. Gradients (AdamBNN, 2106.11309): to x
    and shift through the clipped quadratic, see :func:`~tritonbnn.ops.binarize`; to w it is the
    gradient to the binary weight where abs(w) <= 1, else 0, with no alpha and none through alpha.
    With ``binary_weight=False`` the weight is real, as in the first step of the schedule.

    If all of x is +1 or -1, it is binary already, and its gradient passes unchanged, where the
    clipped quadratic would stop it. So x may come from :func:`~tritonbnn.ops.binarize`, also by way
    of max-pooling, reshaping or permuting. The zeros of dropout or padding make x real again: put
    those before the sign. The gradient to shift is always that of the clipped quadratic.
    NaN counts as -1, except in torch's anomaly mode, where it is refused.

    Args:
        x: (N, C, H, W); float32, bfloat16, float16, or float64 on the CPU. Under autocast a
            float32 x is cast first.
        weight: (O, C, k, k), k = 1 or 3, floating point.
        shift: (C,), added before the sign, or None.
        stride: 1 or 2.
        padding: k // 2.
        binary_weight: whether the weight is binarised.
        may_be_binary: False where x is known to be real: backward then leaves out a look at x.

    Returns:
        (N, O, H', W') in ``x``'s dtype and channels_last memory.

    Raises:
        RuntimeError: x holds NaN, in torch's anomaly mode.
        TypeError: an operand is not floating point, or the weight is neither in ``x``'s dtype nor
            float32 beside a narrower x.
        ValueError: the shapes do not match, a geometry that is not supported, several devices.
    """
    checks.check_activation("x", x, dims=(4,))
    checks.check_conv_weight(weight, x.shape[1])
    checks.check_per_channel(x.shape[1], shift=shift)
    checks.check_same_device(x=x, weight=weight, shift=shift)
    checks.conv_output_size(x.shape[2], x.shape[3], weight.shape[2], stride, padding)
    x = autocast_input(x)
    checks.check_weight_dtype(x, weight)
    options = (stride, padding, binary_weight, may_be_binary)
    refuse_nan(x)
    return apply(_BinaryConv2d, x, weight, shift, *options)
