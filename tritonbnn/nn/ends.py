"""A network's real layers: torch's own modules, whose bits do not depend on threads on a CPU."""

import torch
from torch import Tensor, fx, nn

from tritonbnn.nn.leaf import as_leaf
from tritonbnn.nn.norm import running_averages
from tritonbnn.ops import ends
from tritonbnn.ops.norm import move_averages


class OrderedConv2d(nn.Conv2d):
    """nn.Conv2d whose weight's gradient is summed in a fixed order where it is float32 on a CPU.

    It is meant for a few input channels, such as a network's first layer has.
    """

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return as_leaf(self, x)
        plain = (
            self.bias is None
            and x.dim() == 4
            and self.groups == 1
            and self.dilation == (1, 1)
            and self.padding_mode == "zeros"
            and self.kernel_size in ((1, 1), (3, 3))
            and self.padding == (self.kernel_size[0] // 2,) * 2
            and self.stride in ((1, 1), (2, 2))
        )
        if plain and torch.is_grad_enabled() and ends.in_order(x, self.weight):
            return ends.convolution(x, self.weight, self.stride[0], self.kernel_size[0] // 2)
        return super().forward(x)


class OrderedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose sums over pixels have a fixed order where they are float32 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return as_leaf(self, x)
        tracked = self.running_mean is not None and self.num_batches_tracked is not None
        if not (self.training and self.affine and tracked and self.track_running_stats):
            return super().forward(x)
        self._check_input_dim(x)
        if x.numel() <= x.shape[1] or not ends.in_order(x, self.weight, self.bias):
            return super().forward(x)
        y, mean, variance = ends.batch_norm(x, self.weight, self.bias, self.eps)
        move_averages(running_averages(self), (mean, variance))
        return y


class OrderedLinear(nn.Linear):
    """nn.Linear whose sums have a fixed order where they are float32 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return as_leaf(self, x)
        operands = (self.weight,) if self.bias is None else (self.weight, self.bias)
        if x.dim() == 2 and ends.in_order(x, *operands):
            return ends.linear(x, self.weight, self.bias)
        return super().forward(x)
