"""AlexNet's layout, as BNN (1602.02830) and XNOR-Net (1603.05279) have it, without shortcuts."""

from torch import nn

from tritonbnn.models.blocks import BinaryNetwork, scaled, signed_layer
from tritonbnn.nn.ends import OrderedBatchNorm2d, OrderedConv2d

HIDDEN = 4096
STEM_CHANNELS = {"binary_alexnet": 64, "xnornet": 96}
_SECOND = {"binary_alexnet": 192, "xnornet": 256}  # channels of the 5x5 convolution
_MAP = 6  # pixels a side that reach the dense layers


def alexnet(
    name: str,
    *,
    num_classes: int,
    binary_weights: bool,
    width: float,
    in_channels: int,
    small_images: bool,
    fused: bool,
    plan: str,
) -> BinaryNetwork:
    """Build one of the two AlexNets with which Bop's numbers on ImageNet were made (1906.02107).

    A real 11x11 convolution of stride 4, then sign, convolution, pooling, BatchNorm: 5x5, three of
    3x3 with 384, 384 and 256 channels, and two dense layers of 4096, which are 1x1 convolutions of
    one pixel. Pools are of 3x3 with stride 2. XNOR-Net has a ReLU and one more BatchNorm in the
    stem, and a ReLU before the head.

    Unlike BNN's AlexNet, the first and the last layer are real, as in all networks here.

    Args:
        name: "binary_alexnet" or "xnornet".
        num_classes: outputs of the head.
        binary_weights: False for binary activations and real weights.
        width: multiplies all channels; they are rounded to multiples of 8.
        in_channels: 1 or 3.
        small_images: a 3x3 stem of stride 1.
        fused: there is no unit here to fuse.
        plan: of units, of which there are none.
    """
    is_xnor = name == "xnornet"
    channels = scaled(STEM_CHANNELS[name], width)
    kernel_size, stride = (3, 1) if small_images else (11, 4)
    stem: list[nn.Module] = [
        OrderedConv2d(
            in_channels, channels, kernel_size, stride, padding=kernel_size // 2, bias=False
        )
    ]
    if is_xnor:
        stem += [OrderedBatchNorm2d(channels), nn.ReLU()]
    stem += [nn.MaxPool2d(3, 2), OrderedBatchNorm2d(channels)]
    layers: list[nn.Module] = []

    def add(out_channels: int, kernel_size: int, pool: nn.Module | None = None) -> None:
        nonlocal channels
        layers.extend(signed_layer(channels, out_channels, kernel_size, binary_weights, pool))
        channels = out_channels

    add(scaled(_SECOND[name], width), 5, nn.MaxPool2d(3, 2))
    add(scaled(384, width), 3)
    add(scaled(384, width), 3)
    add(scaled(256, width), 3, nn.AdaptiveMaxPool2d(_MAP))  # of 13 x 13 pixels it pools as the rest
    channels *= _MAP**2
    layers += [nn.Flatten(), nn.Unflatten(1, (channels, 1, 1))]
    add(scaled(HIDDEN, width), 1)
    add(scaled(HIDDEN, width), 1)
    if is_xnor:
        layers.append(nn.ReLU())
    return BinaryNetwork(
        nn.Sequential(*stem),
        nn.Sequential(*layers),
        in_channels=in_channels,
        features=channels,
        num_classes=num_classes,
        size_multiple=8 if small_images else 32,
    )
