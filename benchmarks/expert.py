"""The expert's ReActNet-A: the obvious network with its two float-mask pieces as Functions.

This is what someone who knows torch writes instead of the masks, in a dozen lines: each piece says
its own backward pass, so autograd keeps one tensor where the masks leave many. Results are those of
:mod:`benchmarks.baseline`, and everything else is its code. It is the rival to measure against.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from benchmarks.baseline import BinaryActivation, ObviousReActNetA, Shift, SimulatedConv2d

# copysign is the fastest sign that torch has. It tells -0 from +0, but neither a sum with a shift
# nor an updated weight ends at -0, so sign(0) = +1 holds here too.


class SignFunction(Function):
    """sign(x); backward is the slope of the clipped quadratic, max(0, 2 - 2 |x|)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.copysign(x.new_ones(()), x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x.abs().mul_(-2).add_(2).clamp_(min=0).mul_(gradient)


class ScaledSignFunction(Function):
    """mean |w| of a filter times sign(w); backward is zero where |w| > 1."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.copysign(weight.abs().mean(dim=(1, 2, 3), keepdim=True), weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (weight,) = ctx.saved_tensors
        return gradient.masked_fill(weight.abs() > 1, 0)


class ExpertActivation(BinaryActivation):
    """:class:`SignFunction` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return SignFunction.apply(x)


class ExpertConv2d(SimulatedConv2d):
    """A float convolution whose weight is :class:`ScaledSignFunction`'s."""

    def binarised(self) -> Tensor:
        return ScaledSignFunction.apply(self.weight)


class ExpertShift(Shift):
    """A shift in the stream's dtype: a float32 one would make autocast's stream float32 too."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.to(x.dtype)


class ExpertReActNetA(ObviousReActNetA):
    """The obvious network, with the same parameters by the same names, in the expert's pieces."""

    activation = ExpertActivation
    binary_conv = ExpertConv2d
    shift = ExpertShift
