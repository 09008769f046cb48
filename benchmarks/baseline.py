"""The obvious implementation of ReActNet-A, which everything here is compared with.

It is what one writes first, and what the public trainers do: float32 tensors that hold +-1, the
sign through elementwise autograd with float masks, weights binarised in every forward pass, and
separate modules for shifts, PReLU and BatchNorm. sign(0) = +1, as everywhere in this project.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritonbnn.models.blocks import scaled
from tritonbnn.models.reactnet import BLOCKS, STEM_CHANNELS


def hard_sign(x: Tensor) -> Tensor:
    return (x >= 0).to(x.dtype) * 2 - 1


class BinaryActivation(nn.Module):
    """sign(x), with the clipped quadratic in its place for backward."""

    def forward(self, x: Tensor) -> Tensor:
        below, negative, inside = ((x < bound).to(x.dtype) for bound in (-1, 0, 1))
        left = -below + (x * x + 2 * x) * (1 - below)
        right = left * negative + (-x * x + 2 * x) * (1 - negative)
        quadratic = right * inside + (1 - inside)
        return (hard_sign(x) - quadratic).detach() + quadratic


class Shift(nn.Module):
    """A learnable shift per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.expand_as(x)


class SimulatedConv2d(nn.Conv2d):
    """A float convolution whose weight is scaled signs."""

    def binarised(self) -> Tensor:
        """Mean |w| of a filter times sign(w), with the clipped weight in its place for backward."""
        scale = self.weight.abs().mean(dim=(1, 2, 3), keepdim=True).detach()
        clipped = self.weight.clamp(-1, 1)
        return (scale * hard_sign(self.weight) - clipped).detach() + clipped

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.binarised(), stride=self.stride, padding=self.padding)


class Block(nn.Module):
    """One published block: a 3x3 half, then one 1x1 convolution or a widening pair.

    Args:
        channels: that come in.
        widen: twice as many go out.
        stride: 2 halves height and width.
        conv: makes a convolution.
        activation: makes the sign.
        shift: makes a shift.
    """

    def __init__(
        self,
        channels: int,
        widen: bool,
        stride: int,
        conv: type[nn.Conv2d],
        activation: type[nn.Module],
        shift: type[nn.Module],
    ) -> None:
        super().__init__()
        out = 2 * channels if widen else channels
        self.move11 = shift(channels)
        self.binary_3x3 = conv(channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.move12, self.prelu1, self.move13 = shift(channels), nn.PReLU(channels), shift(channels)
        self.move21 = shift(channels)
        if widen:
            self.binary_pw_down1 = conv(channels, channels, 1, bias=False)
            self.binary_pw_down2 = conv(channels, channels, 1, bias=False)
            self.bn2_1, self.bn2_2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        else:
            self.binary_pw = conv(channels, channels, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(channels)
        self.move22, self.prelu2, self.move23 = shift(out), nn.PReLU(out), shift(out)
        self.binary_activation = activation()
        self.pooling = nn.AvgPool2d(2, 2)
        self.widen, self.stride = widen, stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.binary_3x3(self.binary_activation(self.move11(x))))
        y = y + (self.pooling(x) if self.stride == 2 else x)
        u = self.move13(self.prelu1(self.move12(y)))
        s = self.binary_activation(self.move21(u))
        if self.widen:
            v1 = self.bn2_1(self.binary_pw_down1(s)) + u
            v2 = self.bn2_2(self.binary_pw_down2(s)) + u
            v = torch.cat([v1, v2], dim=1)
        else:
            v = self.bn2(self.binary_pw(s)) + u
        return self.move23(self.prelu2(self.move22(v)))


class Stem(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x))


class ObviousReActNetA(nn.Module):
    """ReActNet-A with the published parameter names and the published, unmerged, pairs.

    Args:
        num_classes: outputs of the head.
        binary_weights: False for the network of step 1.
        width: multiplies all channels.
        in_channels: of the image.
        small_images: a stem of stride 1.
    """

    activation: type[nn.Module] = BinaryActivation
    binary_conv: type[nn.Conv2d] = SimulatedConv2d
    shift: type[nn.Module] = Shift

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        binary_weights: bool = True,
        width: float = 1.0,
        in_channels: int = 3,
        small_images: bool = False,
    ) -> None:
        super().__init__()
        channels = scaled(STEM_CHANNELS, width)
        self.feature = nn.ModuleList([Stem(in_channels, channels, 1 if small_images else 2)])
        conv = self.binary_conv if binary_weights else nn.Conv2d
        for out, stride in BLOCKS:
            out_channels = scaled(out, width)
            pieces = (conv, self.activation, self.shift)
            self.feature.append(Block(channels, out_channels != channels, stride, *pieces))
            channels = out_channels
        self.pool1 = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.feature:
            x = layer(x)
        return self.fc(self.pool1(x).flatten(1))
