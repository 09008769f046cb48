"""The float twin of ReActNet-A: real weights and activations, no sign; all else the same.

It answers what binary training costs against training the same layers in floats. The shift before
the sign has no twin: without a sign, BatchNorm undoes it.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.baseline import Shift
from tritonbnn.models.blocks import BinaryNetwork, conv_bn, scaled
from tritonbnn.models.reactnet import BLOCKS, STEM_CHANNELS


class FloatUnit(nn.Module):
    """rprelu(BatchNorm(conv2d(x)) + shortcut(x)), with the shortcuts of a BinaryUnit."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = conv_bn(channels, out_channels, kernel_size, stride)
        self.rprelu = nn.Sequential(
            Shift(out_channels), nn.PReLU(out_channels), Shift(out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if y.shape[2] != x.shape[2]:
            x = F.avg_pool2d(x, 2)
        return self.rprelu(y + (x if y.shape[1] == x.shape[1] else x.repeat(1, 2, 1, 1)))


class FloatReActNetA(BinaryNetwork):
    """ReActNet-A's layout in :class:`FloatUnit`.

    Args:
        num_classes: outputs of the head.
        binary_weights: ignored: both steps have the same twin.
        width: multiplies all channels.
        in_channels: of the image.
        small_images: a stem of stride 1.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        binary_weights: bool = False,
        width: float = 1.0,
        in_channels: int = 3,
        small_images: bool = False,
    ) -> None:
        first = channels = scaled(STEM_CHANNELS, width)
        units: list[nn.Module] = []
        for out, stride in BLOCKS:
            out_channels = scaled(out, width)
            units += [
                FloatUnit(channels, channels, 3, stride),
                FloatUnit(channels, out_channels, 1),
            ]
            channels = out_channels
        super().__init__(
            conv_bn(in_channels, first, 3, 1 if small_images else 2),
            nn.Sequential(*units),
            in_channels,
            channels,
            num_classes,
            16 if small_images else 32,
        )

    def forward_features(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))  # in the layout that torch chooses
