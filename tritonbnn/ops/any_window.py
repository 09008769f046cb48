"""The binary convolution by a window that the launchers have not: torch's own convolves the signs.

Kernels of any size, any stride, padding and dilation, groups. It keeps no more for backward than
the launchers do: the signs are computed again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonbnn.eager.common import accumulator
from tritonbnn.layout import channels_last, in_format_of, laid_out_as
from tritonbnn.ops import exported
from tritonbnn.ops.autocast import without_autocast
from tritonbnn.ops.binarize import sign_forward
from tritonbnn.ops.once import differentiable_once
from tritonbnn.ops.plain import scaled_conv2d
from tritonbnn.ops.signs import clipped_weight_grad, sign_grads
from tritonbnn.window import Window, padded_window


class AnyWindow(torch.autograd.Function):
    """y = alpha * conv(sign(x + shift), sign(w)), or conv(sign(x + shift), w).

    Signs are multiplied as float32, or float64 where x is that, so sums of them are exact.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        shift: Tensor | None,
        window: Window,
        binary_weight: bool,
        may_be_binary: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, shift)
        ctx.window, ctx.binary_weight, ctx.may_be_binary = window, binary_weight, may_be_binary
        operand, alpha = _operand(weight, x.dtype, binary_weight)
        with without_autocast(x):  # it would round sums of signs
            y = F.conv2d(
                _signs(x, shift, window),
                operand,
                None,
                window.stride,
                window.padding,
                window.dilation,
                window.groups,
            )
            if alpha is not None:
                y = y * alpha.view(-1, 1, 1)
        return in_format_of(y if y.dtype == x.dtype else y.to(x.dtype), x, weight)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, shift = ctx.saved_tensors
        needs_x, needs_weight, needs_shift = ctx.needs_input_grad[:3]
        operand, alpha = _operand(weight, x.dtype, ctx.binary_weight)
        dy, dx, dweight, dshift = grad.to(operand.dtype), None, None, None
        if needs_weight:
            signs = _signs(x, shift, ctx.window)
            dweight = _convolution_grads(dy, signs, operand, ctx.window, [False, True, False])[1]
            if ctx.binary_weight:
                dweight = clipped_weight_grad(dweight, weight)
            dweight = laid_out_as(dweight, weight)
        if needs_x or needs_shift:
            scaled = operand if alpha is None else operand * alpha.view(-1, 1, 1, 1)
            bottom, right = ctx.window.extra
            padded = dy.new_empty((*x.shape[:2], x.shape[2] + bottom, x.shape[3] + right))
            dsigns = _convolution_grads(dy, padded, scaled, ctx.window, [True, False, False])[0]
            dsigns = channels_last(dsigns[:, :, : x.shape[2], : x.shape[3]].to(x.dtype))
            dx, dshift = sign_grads(dsigns, x, shift, ctx.may_be_binary and needs_x)
            dx = laid_out_as(dx, x)
        return dx if needs_x else None, dweight, dshift if needs_shift else None, None, None, None


def _signs(x: Tensor, shift: Tensor | None, window: Window) -> Tensor:
    signs = sign_forward(x, shift)
    wide = signs if signs.dtype == torch.float64 else signs.to(torch.float32)
    bottom, right = window.extra
    return F.pad(wide, (0, right, 0, bottom)) if bottom or right else wide


def _operand(
    weight: Tensor, dtype: torch.dtype, binary_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """What the signs are convolved with, and the scale of the result per output channel."""
    wide = accumulator(dtype)
    if not binary_weight:
        return weight.to(dtype).to(wide), None
    alpha = weight.abs().mean(dim=(1, 2, 3), dtype=wide)
    return torch.where(weight >= 0, 1.0, -1.0).to(wide), alpha


def _convolution_grads(
    dy: Tensor, signs: Tensor, weight: Tensor, window: Window, wanted: list[bool]
) -> tuple[Tensor, ...]:
    geometry = [list(window.stride), list(window.padding), list(window.dilation)]
    return torch.ops.aten.convolution_backward(
        dy, signs, weight, None, *geometry, False, [0, 0], window.groups, wanted
    )


def _window(
    x: Tensor, weight: Tensor, shift: Tensor | None, *options: Any
) -> tuple[Window, tuple[bool, bool]]:
    *sides, groups, binary_weight, may_be_binary = options
    stride, padding, extra, dilation = sides
    window = padded_window(weight.shape[2:], stride, padding, extra, dilation, groups)
    return window, (binary_weight, may_be_binary)


def _compute(x: Tensor, weight: Tensor, shift: Tensor | None, *options: Any) -> Tensor:
    window, kinds = _window(x, weight, shift, *options)
    return AnyWindow.apply(x, weight, shift, window, *kinds)


def _fake(x: Tensor, weight: Tensor, shift: Tensor | None, *options: Any) -> Tensor:
    window, _ = _window(x, weight, shift, *options)
    return exported.image_like(x, weight, window.output_size(x.shape[2:]))


def _plain(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    stride: list[int],
    padding: list[int],
    extra: list[int],
    dilation: list[int],
    groups: int,
    binary_weight: bool,
    may_be_binary: bool,
) -> Tensor:
    window: dict[str, Any] = {"stride": stride, "padding": padding}
    window |= {"dilation": dilation, "groups": groups}
    y = scaled_conv2d(x, weight, shift, binary_weight, extra, **window)
    return in_format_of(y.to(x.dtype), x, weight)


_operator = exported.register(
    "binary_conv2d_window",
    "Tensor x, Tensor weight, Tensor? shift, int[] stride, int[] padding, int[] extra, "
    "int[] dilation, int groups, bool binary_weight, bool may_be_binary",
    _compute,
    _fake,
    _plain,
)


def _exported(
    x: Tensor, weight: Tensor, shift: Tensor | None, window: Window, *kinds: bool
) -> Tensor:
    sides = (list(window.stride), list(window.padding), list(window.extra), list(window.dilation))
    return _operator(x, weight, shift, *sides, window.groups, *kinds)


exported.replace(AnyWindow, "binary_conv2d_window", _exported)
