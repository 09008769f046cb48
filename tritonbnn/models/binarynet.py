"""BinaryNet (1602.02830): VGG's layout for images of 32 x 32, without shortcuts."""

from torch import nn

from tritonbnn.models.blocks import BinaryNetwork, conv_bn, scaled, signed_layer

CHANNELS = 128
HIDDEN = 1024
_MAP = 4  # pixels a side that reach the dense layers


def binarynet(
    *,
    num_classes: int,
    binary_weights: bool,
    width: float,
    in_channels: int,
    small_images: bool,
    fused: bool,
    plan: str,
) -> BinaryNetwork:
    """Build BinaryNet, with which the numbers of Bop on CIFAR-10 were made (1906.02107).

    Pairs of 3x3 convolutions of 128, 256 and 512 channels, each pair ending in 2x2 max-pooling,
    then two dense layers of 1024. A layer is sign, convolution, pooling, BatchNorm. The dense
    layers are 1x1 convolutions of one pixel.

    Unlike the authors' network, the first and the last layer are real, as in all networks here. The
    first one is padded, so that 4 x 4 pixels reach the dense layers.

    Args:
        num_classes: outputs of the head.
        binary_weights: False for binary activations and real weights.
        width: multiplies all channels; they are rounded to multiples of 8.
        in_channels: 1 or 3.
        small_images: must be True.
        fused: there is no unit here to fuse.
        plan: of units, of which there are none.

    Raises:
        ValueError: ``small_images`` is False.
    """
    if not small_images:
        raise ValueError("binarynet is for images of about 32 x 32: set small_images")
    channels = scaled(CHANNELS, width)
    stem = conv_bn(in_channels, channels, 3, stride=1)
    layers: list[nn.Module] = []

    def add(out_channels: int, kernel_size: int, pool: nn.Module | None = None) -> None:
        nonlocal channels
        layers.extend(signed_layer(channels, out_channels, kernel_size, binary_weights, pool))
        channels = out_channels

    add(channels, 3, nn.MaxPool2d(2))
    add(scaled(2 * CHANNELS, width), 3)
    add(channels, 3, nn.MaxPool2d(2))
    add(scaled(4 * CHANNELS, width), 3)
    add(channels, 3, nn.AdaptiveMaxPool2d(_MAP))  # of 32 x 32 pixels it pools 2 x 2
    channels *= _MAP**2
    layers += [nn.Flatten(), nn.Unflatten(1, (channels, 1, 1))]
    add(scaled(HIDDEN, width), 1)
    add(channels, 1)
    return BinaryNetwork(
        stem,
        nn.Sequential(*layers),
        in_channels=in_channels,
        features=channels,
        num_classes=num_classes,
        size_multiple=4,
    )
