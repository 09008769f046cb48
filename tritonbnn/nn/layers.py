"""Layers whose input, and usually weight, is one bit; arguments and attributes as torch.nn's."""

import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from tritonbnn import ops
from tritonbnn.nn.leaf import as_leaf
from tritonbnn.window import Size, check_count, check_layer, sizes

logger = logging.getLogger(__name__)


def new_weight(*shape: int, device: Any = None, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A weight of ``shape`` whose memory holds anything yet."""
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))


def initialise_weight(weight: Tensor) -> None:
    """Draw a weight as nn.Conv2d and nn.Linear draw theirs."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


def initialise_bias(bias: Tensor | None, weight: Tensor) -> None:
    """Draw a bias as nn.Conv2d and nn.Linear draw theirs."""
    if bias is not None:
        bound = 1 / math.sqrt(weight[0].numel())
        nn.init.uniform_(bias, -bound, bound)


def tell_of_pruning(layer: nn.Module) -> None:
    """Warn once in a process where torch.nn.utils.prune has pruned a weight that is binarised."""
    if "weight_mask" in layer._buffers:
        _warn_of_pruning()


@cache
def _warn_of_pruning() -> None:
    logger.warning(
        "a pruned weight of 0 counts as +1 in a binary layer, so pruning removes nothing there:"
        " prune real layers only, or build narrower binary ones"
    )


class _BinaryLayer(nn.Module):
    """A layer with a weight, and perhaps a shift of its input and a bias of its output."""

    weight: nn.Parameter
    shift: nn.Parameter | None
    bias: nn.Parameter | None

    def _make_parameters(
        self,
        shape: tuple[int, ...],
        inputs: int,
        shift: bool,
        bias: bool,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        place = {"device": device, "dtype": dtype}
        self.weight = new_weight(*shape, **place)
        self.shift = nn.Parameter(torch.empty(inputs, **place)) if shift else None
        self.bias = nn.Parameter(torch.empty(shape[0], **place)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as torch.nn's layers do, and set the shift to 0."""
        initialise_weight(self.weight)
        if self.shift is not None:
            nn.init.zeros_(self.shift)
        initialise_bias(self.bias, self.weight)


class _BinaryConvolution(_BinaryLayer):
    """What convolutions of any number of dimensions share."""

    _dimensions: int
    _convolve: Callable[..., Tensor]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        shift: bool = False,
        binary_weight: bool = True,
    ) -> None:
        super().__init__()
        self.kernel_size = sizes("kernel_size", kernel_size, self._dimensions)
        self.stride = sizes("stride", stride, self._dimensions)
        self.dilation = sizes("dilation", dilation, self._dimensions)
        self.padding = (
            padding if isinstance(padding, str) else sizes("padding", padding, self._dimensions, 0)
        )
        window = (self.kernel_size, self.stride, self.padding, self.dilation)
        check_layer(in_channels, out_channels, *window, groups, padding_mode)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.padding_mode, self.binary_weight = padding_mode, binary_weight
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self._make_parameters(shape, in_channels, shift, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return as_leaf(self, x)
        if self.binary_weight:
            tell_of_pruning(self)
        return self._convolve(
            x,
            self.weight,
            self.shift,
            bias=self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            binary_weight=self.binary_weight,
        )

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        parts += [f"stride={self.stride}", f"padding={self.padding!r}"]
        if any(step != 1 for step in self.dilation):
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        parts += [f"bias={self.bias is not None}", f"shift={self.shift is not None}"]
        return ", ".join([*parts, f"binary_weight={self.binary_weight}"])


class BinaryConv2d(_BinaryConvolution):
    """Convolve the input's signs with the weight's signs, scaled per output channel.

    The input may be real or binary already. A real one is binarised here, with ``shift=True`` after
    a learnable shift. One that is binary already, as an :class:`~tritonbnn.nn.RSign` returns it,
    passes its gradient on unchanged, also through max-pooling, reshaping and permuting. Dropout and
    zero padding make it real again: put those before the sign. See
    :func:`~tritonbnn.ops.binary_conv2d`, also for which windows are fast.

    The arguments are nn.Conv2d's. Two defaults differ in what they do: there is no bias unless it
    is asked for, and padding adds zeros to the signs, not to the input.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: an int or a pair, as the next three.
        stride: of the kernel.
        padding: zeros on each side, after the sign; or "same" or "valid". With half the kernel,
            1x1 and 3x3 kernels are fastest.
        dilation: the distance between the kernel's elements.
        groups: parts of the channels that are convolved separately.
        bias: whether a learnable bias is added to the output.
        padding_mode: "zeros".
        device: of the parameters.
        dtype: of the parameters.
        shift: whether a learnable shift per input channel is added before the sign.
        binary_weight: False for a real weight (step 1 of the two-step schedule).

    Shape:
        (N, C, H, W) to (N, O, H', W'), or (C, H, W) to (O, H', W').

    Raises:
        ValueError: an argument is out of range, or of what is not supported.
    """

    _dimensions = 2
    _convolve = staticmethod(ops.binary_conv2d)


class BinaryConv1d(_BinaryConvolution):
    """:class:`BinaryConv2d` in one dimension, for sequences; arguments as nn.Conv1d's.

    Shape:
        (N, C, L) to (N, O, L'), or (C, L) to (O, L').

    Raises:
        ValueError: an argument is out of range, or of what is not supported.
    """

    _dimensions = 1
    _convolve = staticmethod(ops.binary_conv1d)


class BinaryLinear(_BinaryLayer):
    """Multiply the input's signs by the weight's signs, scaled per output feature.

    The input may be real or binary already, as :class:`BinaryConv2d` says.

    Args:
        in_features: K.
        out_features: O.
        bias: whether a learnable bias is added to the output; unlike nn.Linear's, not by default.
        device: of the parameters.
        dtype: of the parameters.
        shift: whether a learnable shift per input feature is added before the sign.
        binary_weight: False for a real weight (step 1 of the two-step schedule).

    Shape:
        (..., K) to (..., O).

    Raises:
        ValueError: a size is not a positive int.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        shift: bool = False,
        binary_weight: bool = True,
    ) -> None:
        super().__init__()
        for name, count in (("in_features", in_features), ("out_features", out_features)):
            check_count(name, count)
        self.in_features, self.out_features = in_features, out_features
        self.binary_weight = binary_weight
        shape = (out_features, in_features)
        self._make_parameters(shape, in_features, shift, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return as_leaf(self, x)
        if self.binary_weight:
            tell_of_pruning(self)
        return ops.binary_linear(
            x, self.weight, self.shift, bias=self.bias, binary_weight=self.binary_weight
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, shift={self.shift is not None}, "
            f"binary_weight={self.binary_weight}"
        )
