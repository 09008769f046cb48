"""Layers whose input, and usually weight, is one bit."""

import math

import torch
from torch import Tensor, nn

from tritonbnn import ops


def initial_weight(*shape: int) -> nn.Parameter:
    """A weight of ``shape``, initialised as nn.Conv2d's and nn.Linear's."""
    weight = nn.Parameter(torch.empty(shape))
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return weight


class BinaryConv2d(nn.Module):
    """Convolve the input's signs with the weight's signs, scaled per output channel.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: 1 or 3.
        stride: 1 or 2.
        padding: kernel_size // 2; zeros, after the sign.
        binary_weight: False for a real weight (step 1 of the two-step schedule).

    Shape:
        (N, C, H, W) to (N, O, H', W').
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        binary_weight: bool = True,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.binary_weight = stride, padding, binary_weight
        self.weight = initial_weight(out_channels, in_channels, kernel_size, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return ops.binary_conv2d(
            x,
            self.weight,
            stride=self.stride,
            padding=self.padding,
            binary_weight=self.binary_weight,
        )

    def extra_repr(self) -> str:
        out_channels, in_channels, kernel_size, _ = self.weight.shape
        return (
            f"{in_channels}, {out_channels}, kernel_size={kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, binary_weight={self.binary_weight}"
        )


class BinaryLinear(nn.Module):
    """Multiply the input's signs by the weight's signs, scaled per output feature.

    Args:
        in_features: K.
        out_features: O.

    Shape:
        (..., K) to (..., O).
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = initial_weight(out_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return ops.binary_linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"
