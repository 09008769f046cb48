"""The binary convolution of packed signs: what the launchers do."""

from typing import Any

import torch
from torch import Tensor

from tritonbnn import checks
from tritonbnn.layout import in_format_of, laid_out_as
from tritonbnn.native import layer
from tritonbnn.ops import exported, library
from tritonbnn.ops.once import differentiable_once
from tritonbnn.ops.plain import scaled_conv2d
from tritonbnn.ops.signs import clipped_weight_grad, sign_grads


class PackedConv2d(torch.autograd.Function):
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
        geometry = {"stride": stride, "padding": padding}
        at_once = binary_weight and library.in_one_call(layer.takes, x, weight, shift)
        compute: Any = _binary_forward if binary_weight else _real_forward
        compute = layer.forward if at_once else compute
        y, signs, packed, alpha = compute(x, weight, shift, **geometry)
        ctx.save_for_backward(x, shift, weight, signs, packed, alpha)
        ctx.geometry, ctx.may_be_binary, ctx.at_once = geometry, may_be_binary, at_once
        return in_format_of(y, x, weight)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor):
        saved = ctx.saved_tensors
        needs_x, needs_weight, needs_shift = ctx.needs_input_grad[:3]
        at_once = ctx.at_once and not library.through_operators(grad)
        compute = layer.backward if at_once else _gradients
        dx, dweight, dshift = compute(
            *(grad, *saved),
            **ctx.geometry,
            may_be_binary=ctx.may_be_binary and needs_x,
            wants_input=needs_x or needs_shift,
            wants_weight=needs_weight,
        )
        x, _, weight = saved[:3]
        return (
            laid_out_as(dx, x) if needs_x else None,
            laid_out_as(dweight, weight),
            dshift if needs_shift else None,
            *(None, None, None, None),
        )


def _binary_forward(
    x: Tensor, weight: Tensor, shift: Tensor | None, *, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The convolution, the packed signs of both operands and the weight's scale."""
    signs = library.pack_signs(x, shift)
    packed, alpha = library.signs_and_scale(weight)
    options = {"channels": x.shape[1], "dtype": x.dtype, "stride": stride, "padding": padding}
    return library.conv_packed(signs, packed, alpha, **options), signs, packed, alpha


def _real_forward(
    x: Tensor, weight: Tensor, shift: Tensor | None, *, stride: int, padding: int
) -> tuple[Tensor, Tensor, None, None]:
    """The same with a real weight, which has neither signs nor scale."""
    signs = library.pack_signs(x, shift)
    y = library.conv_real(signs, weight, dtype=x.dtype, stride=stride, padding=padding)
    return y, signs, None, None


def _gradients(
    grad: Tensor,
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    signs: Tensor,
    packed: Tensor | None,
    alpha: Tensor | None,
    *,
    stride: int,
    padding: int,
    may_be_binary: bool,
    wants_input: bool,
    wants_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients to x, weight and shift, launcher by launcher."""
    channels, height, width = x.shape[1:]
    geometry = {"stride": stride, "padding": padding}
    dx = dweight = dshift = None
    if wants_weight:
        dweight = library.conv_weight_grad(
            grad, signs, channels=channels, kernel_size=weight.shape[2], **geometry
        )
        if packed is not None:
            dweight = clipped_weight_grad(dweight, weight)
    if wants_input:
        operand = weight if packed is None else packed
        size = {"channels": channels, "height": height, "width": width}
        dsigns = library.conv_input_grad(grad, operand, alpha, **size, **geometry)
        dx, dshift = sign_grads(dsigns, x, shift, may_be_binary)
    return dx, dweight, dshift


def _fake(
    x: Tensor, weight: Tensor, shift: Tensor | None, stride: int, padding: int, *_: bool
) -> Tensor:
    size = checks.conv_output_size(x.shape[2], x.shape[3], weight.shape[2], stride, padding)
    return exported.image_like(x, weight, size)


def _plain(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    stride: int,
    padding: int,
    binary_weight: bool,
    may_be_binary: bool = False,
) -> Tensor:
    y = scaled_conv2d(x, weight, shift, binary_weight, stride=stride, padding=padding)
    return in_format_of(y.to(x.dtype), x, weight)


exported.stand_in(
    PackedConv2d,
    "binary_conv2d",
    "Tensor x, Tensor weight, Tensor? shift, int stride, int padding, bool binary_weight, "
    "bool may_be_binary",
    fake=_fake,
    plain=_plain,
)
