"""Real layers for a network's ends, whose bits do not depend on the number of threads.

Those of torch's own do: a convolution splits the sum of a weight's gradient among threads,
BatchNorm in channels_last the sums over pixels, a linear layer the sum over its outputs. A last bit
that differs there may turn a sign in any layer behind. So on a CPU, in training, these sums are
made in an order that the shapes fix.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonbnn import native
from tritonbnn.layout import channels_last
from tritonbnn.native import ends
from tritonbnn.ops import backend, library
from tritonbnn.ops.norm import Affine, batch_affine, norm_grads
from tritonbnn.ops.once import differentiable_once


def in_order(x: Tensor, *others: Tensor) -> bool:
    """Whether the operators of this file take these operands; torch's own do otherwise."""
    return (
        x.device.type == "cpu"
        and all(t.dtype == torch.float32 for t in (x, *others))
        and not torch.is_autocast_enabled("cpu")
        and not library.through_operators(x, *others)
        and not torch._C._are_functorch_transforms_active()
        and backend.launchers(x.device) is native
    )


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, kernel_size = ctx.stride, ctx.padding, weight.shape[2]
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            window = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1)
            wanted = [True, False, False]
            dx, _, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *window, wanted)
        if ctx.needs_input_grad[1]:
            # in the weight's own layout, as its gradient from torch's convolution is
            dweight = torch.empty_like(weight).copy_(
                ends.real_weight_grad(grad, x, kernel_size, stride, padding)
            )
        return dx, dweight, None, None


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        values = x.numel() // x.shape[1]
        x = channels_last(x)  # once: each launcher below would copy what is not
        moments = library.channel_moments(x)
        affine, statistics = batch_affine(moments, values, None, gamma, beta, eps, None)
        constant = affine.offset - affine.centre * affine.scale
        ctx.save_for_backward(x, gamma, torch.stack(affine.to(torch.float32)))
        vectors = (affine.scale.float(), torch.zeros_like(gamma), constant.float())
        y = library.unit_norm_backward(x, x, *vectors)  # scale * x + 0 * x + constant
        mean, variance = (s.float() for s in statistics)
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, vectors = ctx.saved_tensors
        grad = channels_last(grad)
        affine = Affine(*vectors)
        statistics = (affine.centre, affine.scale, affine.offset)
        _, sums = library.unit_activation_backward(
            grad, x, x, *statistics, None, None, shortcut="identity"
        )
        dgamma, coefficients = norm_grads(affine, None, gamma, sums[0], sums[1], None)
        return library.unit_norm_backward(grad, x, *coefficients), dgamma, sums[0], None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return ends.linear(x, weight, bias)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            ends.linear_input_grad(grad, weight) if needs_x else None,
            ends.linear_weight_grad(grad, x) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def convolution(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """``F.conv2d(x, weight, None, stride, padding)``, its weight's gradient summed in order.

    Args:
        x: (N, C, H, W) float32, on a CPU.
        weight: (O, C, k, k) float32, k = 1 or 3.
        stride: 1 or 2.
        padding: k // 2.
    """
    return _Convolution.apply(x, weight, stride, padding)


def batch_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm by the batch's own statistics, summed in order.

    Args:
        x: (N, C, H, W) float32, on a CPU, with more than one value per channel.
        gamma: (C,) float32.
        beta: (C,) float32.
        eps: added to the variance.

    Returns:
        The normalised x in channels_last memory, and the batch's mean and unbiased variance.
    """
    return _BatchNorm.apply(x, gamma, beta, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear(x, weight, bias)``, all sums in order.

    Args:
        x: (M, K) float32, on a CPU.
        weight: (O, K) float32.
        bias: (O,) float32, or None.
    """
    return _Linear.apply(x, weight, bias)
