"""ReActNet-A (2003.03488): MobileNet's layout in binary half-blocks."""

from functools import partial

from tritonbnn.models.blocks import BinaryNetwork, check_widening, conv_bn, scaled
from tritonbnn.nn import BinaryUnit, Chain

STEM_CHANNELS = 32
# Output channels and stride of each block; the first widens at stride 1.
BLOCKS = (
    (64, 1),
    *((128, 2), (128, 1)),
    *((256, 2), (256, 1)),
    *((512, 2), *[(512, 1)] * 5),
    *((1024, 2), (1024, 1)),
)


def reactnet_a(
    *,
    num_classes: int,
    binary_weights: bool,
    width: float,
    in_channels: int,
    small_images: bool,
    fused: bool,
    plan: str,
) -> BinaryNetwork:
    """Build ReActNet-A: a stem, 13 blocks of two units each, a head.

    A block is a 3x3 unit that keeps the channels and may halve the resolution, and a 1x1 unit that
    keeps or doubles the channels. The published pairs of widening 1x1 convolutions, each with a
    BatchNorm and the same shortcut, are one unit here.

    Args:
        num_classes: outputs of the head.
        binary_weights: False for the network of step 1.
        width: multiplies all channels; they are rounded to multiples of 8.
        in_channels: 1 or 3.
        small_images: a stem of stride 1, for images of 32x32; sizes are multiples of 16, not 32.
        fused: see :class:`~tritonbnn.nn.BinaryUnit`.
        plan: likewise.
    """
    channels = scaled(STEM_CHANNELS, width)
    stem = conv_bn(in_channels, channels, 3, stride=1 if small_images else 2)
    unit = partial(BinaryUnit, binary_weight=binary_weights, fused=fused, plan=plan)
    blocks = []
    for out, stride in BLOCKS:
        out_channels = scaled(out, width)
        check_widening(channels, out_channels, width)
        blocks.append(
            Chain(
                unit(channels, channels, 3, stride),
                unit(channels, out_channels, 1),
            )
        )
        channels = out_channels
    return BinaryNetwork(
        stem,
        Chain(*blocks),
        in_channels=in_channels,
        features=channels,
        num_classes=num_classes,
        size_multiple=16 if small_images else 32,
    )
