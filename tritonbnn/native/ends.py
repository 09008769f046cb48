"""A network's real ends, in C: sums in an order that the shapes fix, whatever the threads."""

import torch
from torch import Tensor

from tritonbnn.layout import channels_last, empty_channels_last
from tritonbnn.native import library
from tritonbnn.native.conv import geometry


def real_weight_grad(
    grad: Tensor, x: Tensor, kernel_size: int, stride: int, padding: int
) -> Tensor:
    """The gradient of a real convolution to its weight, (O, C, k, k) float32, summed in order.

    Args:
        grad: (N, O, H', W') float32, to the output.
        x: (N, C, H, W) float32, the input.
        kernel_size: k.
        stride: 1 or 2.
        padding: k // 2.
    """
    size = (x.shape[0], *x.shape[2:])
    shape = geometry(size, x.shape[1], grad.shape[1], kernel_size, stride, padding)
    weights = (grad.shape[1], x.shape[1], kernel_size, kernel_size)
    dweight = empty_channels_last(weights, torch.float32, x.device)
    library.call("real_weight_grad", channels_last(x), channels_last(grad), dweight, shape)
    return dweight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight^T + bias: (M, K) by (O, K), all float32, to (M, O)."""
    y = torch.empty((len(x), len(weight)), device=x.device)
    operands = (x.contiguous(), weight.contiguous(), bias)
    library.call("linear", *operands, *x.shape, len(weight), y)
    return y


def linear_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """grad @ weight: (M, O) by (O, K) to (M, K)."""
    dx = torch.empty((len(grad), weight.shape[1]), device=grad.device)
    sizes = (len(grad), weight.shape[1], len(weight))
    library.call("linear_input_grad", grad.contiguous(), weight.contiguous(), *sizes, dx)
    return dx


def linear_weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T @ x: (M, O) by (M, K) to (O, K)."""
    dweight = torch.empty((grad.shape[1], x.shape[1]), device=grad.device)
    sizes = (len(grad), x.shape[1], grad.shape[1])
    library.call("linear_weight_grad", grad.contiguous(), x.contiguous(), *sizes, dweight)
    return dweight
