"""What the networks share: widths, stems, and the input sizes that they take."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from tritonbnn.nn import BinaryUnit
from tritonbnn.nn.ends import OrderedBatchNorm2d, OrderedConv2d, OrderedLinear

WIDTH_MULTIPLE = 8


def scaled(channels: int, width: float) -> int:
    """``channels * width`` rounded to a multiple of 8.

    Raises:
        ValueError: no channels would be left.
    """
    result = round(channels * width / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    if result < 1:
        raise ValueError(f"width {width:g} leaves no channels of {channels}; use a larger width")
    return result


def check_widening(channels: int, out_channels: int, width: float) -> None:
    """Raise ValueError unless a block keeps or doubles its channels at this width."""
    if out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"width {width:g} rounds a doubling of channels to {channels} and then {out_channels}: "
            "use a multiple of 0.25"
        )


def conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Sequential:
    """A real convolution, padded, without bias, and its BatchNorm."""
    return nn.Sequential(
        OrderedConv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
        ),
        OrderedBatchNorm2d(out_channels),
    )


class BinaryNetwork(nn.Module):
    """A stem, binary blocks, global average pooling, and a real linear head.

    Args:
        stem: from the image to the first residual stream.
        blocks: the body.
        in_channels: of the image.
        features: channels that reach the head.
        num_classes: outputs of the head.
        size_multiple: height and width of an image must be multiples of this.
    """

    def __init__(
        self,
        stem: nn.Sequential,
        blocks: nn.Sequential,
        in_channels: int,
        features: int,
        num_classes: int,
        size_multiple: int,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = blocks
        self.fc = OrderedLinear(features, num_classes)
        self.in_channels = in_channels
        self.size_multiple = size_multiple

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1 or 3, H, W) to logits (N, num_classes).

        Raises:
            ValueError: the image has the wrong channels, or a size that is not legal.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"images must have shape (N, {self.in_channels}, H, W), not {tuple(x.shape)}"
            )
        if any(size == 0 or size % self.size_multiple for size in x.shape[2:]):
            raise ValueError(
                f"height and width must be multiples of {self.size_multiple}, "
                f"not {x.shape[2]} x {x.shape[3]}"
            )
        # once for all units, which keep it
        stream = self.stem(x).contiguous(memory_format=torch.channels_last)
        return self.fc(self._body(stream).mean(dim=(2, 3)))

    def _body(self, stream: Tensor) -> Tensor:
        """All units in a row: each packs the signs that the next one starts with."""
        units = [m for m in self.blocks.modules() if isinstance(m, BinaryUnit)]
        signs = None
        for unit, following in pairwise(units):
            stream, signs = unit(stream, signs=signs, following=following)
        return units[-1](stream, signs=signs)
