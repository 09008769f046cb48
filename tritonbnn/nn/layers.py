"""Layers whose input, and usually weight, is one bit."""

import logging
import math
from functools import cache

import torch
from torch import Tensor, nn

from tritonbnn import ops

logger = logging.getLogger(__name__)


def initial_weight(*shape: int) -> nn.Parameter:
    """A weight of ``shape``, initialised as nn.Conv2d's and nn.Linear's."""
    weight = nn.Parameter(torch.empty(shape))
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return weight


def _initial_shift(channels: int, wanted: bool) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(channels)) if wanted else None


def tell_of_pruning(layer: nn.Module) -> None:
    """Warn once in a process where torch.nn.utils.prune has pruned a weight that is binarised."""
    if "weight_mask" in layer._buffers:
        _warn_of_pruning()


@cache
def _warn_of_pruning() -> None:
    logger.warning(
        "a pruned weight of 0 counts as +1 in a binary layer, so pruning removes nothing there:"
        " prune real layers only, or build narrower binary ones"
    )


class BinaryConv2d(nn.Module):
    """Convolve the input's signs with the weight's signs, scaled per output channel.

    The input may be real or binary already. A real one is binarised here, with ``shift=True`` after
    a learnable shift. One that is binary already, as an :class:`~tritonbnn.nn.RSign` returns it,
    passes its gradient on unchanged, also through max-pooling, reshaping and permuting. Dropout and
    zero padding make it real again: put those before the sign. See
    :func:`~tritonbnn.ops.binary_conv2d`.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: 1 or 3.
        stride: 1 or 2.
        padding: kernel_size // 2; zeros, after the sign.
        shift: whether a learnable shift per input channel is added before the sign.
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
        shift: bool = False,
        binary_weight: bool = True,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.binary_weight = stride, padding, binary_weight
        self.weight = initial_weight(out_channels, in_channels, kernel_size, kernel_size)
        self.shift = _initial_shift(in_channels, shift)

    def forward(self, x: Tensor) -> Tensor:
        if self.binary_weight:
            tell_of_pruning(self)
        return ops.binary_conv2d(
            x,
            self.weight,
            self.shift,
            stride=self.stride,
            padding=self.padding,
            binary_weight=self.binary_weight,
        )

    def extra_repr(self) -> str:
        out_channels, in_channels, kernel_size, _ = self.weight.shape
        return (
            f"{in_channels}, {out_channels}, kernel_size={kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, shift={self.shift is not None}, "
            f"binary_weight={self.binary_weight}"
        )


class BinaryLinear(nn.Module):
    """Multiply the input's signs by the weight's signs, scaled per output feature.

    The input may be real or binary already, as :class:`BinaryConv2d` says.

    Args:
        in_features: K.
        out_features: O.
        shift: whether a learnable shift per input feature is added before the sign.

    Shape:
        (..., K) to (..., O).
    """

    def __init__(self, in_features: int, out_features: int, *, shift: bool = False) -> None:
        super().__init__()
        self.weight = initial_weight(out_features, in_features)
        self.shift = _initial_shift(in_features, shift)

    def forward(self, x: Tensor) -> Tensor:
        tell_of_pruning(self)
        return ops.binary_linear(x, self.weight, self.shift)

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return (
            f"in_features={in_features}, out_features={out_features}, "
            f"shift={self.shift is not None}"
        )
