"""The half-block: everything between two residual streams."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritonbnn import ops
from tritonbnn.nn.activations import INITIAL_SLOPE
from tritonbnn.nn.layers import initial_weight


class BinaryUnit(nn.Module):
    """rprelu(BatchNorm(binary_conv2d(x)) + shortcut(x)): all of ReActNet between two streams.

    The shortcut follows from the shapes: 2x2 average pooling at stride 2, the channels repeated
    twice where ``out_channels == 2 * in_channels`` (both 1x1 convolutions of a published widening
    pair, merged into one), else the input itself. It can also be given to :meth:`forward`.

    Args:
        in_channels: C.
        out_channels: O, which is C or 2 C unless the shortcut is given.
        kernel_size: 1 or 3; the padding is kernel_size // 2.
        stride: 1 or 2.
        binary_weight: False for a real weight (step 1 of the two-step schedule).
        rprelu: False for Bi-Real Net's unit, which has neither shifts nor a PReLU.

    Shape:
        (N, C, H, W) to (N, O, H / stride, W / stride); H and W even at stride 2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        binary_weight: bool = True,
        rprelu: bool = True,
    ) -> None:
        super().__init__()
        self.stride, self.binary_weight = stride, binary_weight
        self.weight = initial_weight(out_channels, in_channels, kernel_size, kernel_size)
        self.bn = nn.BatchNorm2d(out_channels)
        if rprelu:
            self.shift_in = nn.Parameter(torch.zeros(in_channels))
            self.shift_mid = nn.Parameter(torch.zeros(out_channels))
            self.slope = nn.Parameter(torch.full((out_channels,), INITIAL_SLOPE))
            self.shift_out = nn.Parameter(torch.zeros(out_channels))
        else:
            for name in ("shift_in", "shift_mid", "slope", "shift_out"):
                self.register_parameter(name, None)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Apply the unit.

        Args:
            x: (N, C, H, W), the input stream.
            shortcut: (N, O, H', W'), what is added after BatchNorm; None for the unit's own.
        """
        a = ops.binary_conv2d(
            x,
            self.weight,
            self.shift_in,
            stride=self.stride,
            padding=self.weight.shape[2] // 2,
            binary_weight=self.binary_weight,
        )
        u = self.bn(a)
        shortcut = self._shortcut(x) if shortcut is None else shortcut
        if shortcut.shape != u.shape:
            raise ValueError(
                f"the shortcut must have shape {tuple(u.shape)}, not {tuple(shortcut.shape)}"
            )
        u = u + shortcut
        if self.slope is None:
            return u
        return ops.rprelu(u, self.shift_mid, self.slope, self.shift_out)

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            if x.shape[2] % 2 or x.shape[3] % 2:
                raise ValueError(
                    f"a unit of stride 2 needs even height and width, not {tuple(x.shape[2:])}"
                )
            return F.avg_pool2d(x, 2)
        out_channels, in_channels = self.weight.shape[:2]
        return torch.cat((x, x), dim=1) if out_channels == 2 * in_channels else x

    def extra_repr(self) -> str:
        out_channels, in_channels, kernel_size, _ = self.weight.shape
        return (
            f"{in_channels}, {out_channels}, kernel_size={kernel_size}, stride={self.stride}, "
            f"binary_weight={self.binary_weight}"
        )
