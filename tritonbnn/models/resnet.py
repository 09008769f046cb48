"""ResNet-18's layout with a shortcut around every binary convolution.

Bi-Real Net 18 (ECCV 2018) has no activation but the sign; ReActNet-18 (2003.03488) adds the
learnable shifts and the PReLU.
"""

from typing import Any

from torch import Tensor, nn

from tritonbnn.models.blocks import BinaryNetwork, conv_bn, scaled
from tritonbnn.nn import BinaryUnit, Chain

STAGES = (64, 128, 256, 512)
UNITS_PER_STAGE = 4


class DownsamplingUnit(BinaryUnit):
    """A 3x3 unit of stride 2 whose shortcut is pooled and projected by a real 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, **options: Any) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, given_shortcut=True, **options)
        self.downsample = nn.Sequential(
            nn.AvgPool2d(2), *conv_bn(in_channels, out_channels, 1, stride=1)
        )

    def projected(self, x: Tensor) -> Tensor:
        return self.downsample(x)


def resnet_18(
    *,
    num_classes: int,
    binary_weights: bool,
    width: float,
    in_channels: int,
    small_images: bool,
    fused: bool,
    plan: str,
    rprelu: bool,
) -> BinaryNetwork:
    """Build ReActNet-18 (``rprelu=True``) or Bi-Real Net 18.

    Args:
        num_classes: outputs of the head.
        binary_weights: False for the network of step 1.
        width: multiplies all channels; they are rounded to multiples of 8.
        in_channels: 1 or 3.
        small_images: a 3x3 stem of stride 1 without max-pooling, for images of 32x32; sizes are
            multiples of 8, not 32.
        fused: see :class:`~tritonbnn.nn.BinaryUnit`.
        plan: likewise.
        rprelu: whether a unit has shifts and a PReLU.
    """
    channels = scaled(STAGES[0], width)
    if small_images:
        stem = conv_bn(in_channels, channels, 3, stride=1)
    else:
        stem = conv_bn(in_channels, channels, 7, stride=2)
        stem.append(nn.MaxPool2d(3, stride=2, padding=1))
    options: dict[str, Any] = {"binary_weight": binary_weights, "rprelu": rprelu}
    options |= {"fused": fused, "plan": plan}
    units: list[nn.Module] = []
    for stage in STAGES:
        out_channels = scaled(stage, width)
        for index in range(UNITS_PER_STAGE):
            if index == 0 and stage != STAGES[0]:
                units.append(DownsamplingUnit(channels, out_channels, **options))
            else:
                units.append(BinaryUnit(out_channels, out_channels, 3, **options))
        channels = out_channels
    return BinaryNetwork(
        stem,
        Chain(*units),
        in_channels=in_channels,
        features=channels,
        num_classes=num_classes,
        size_multiple=8 if small_images else 32,
    )
