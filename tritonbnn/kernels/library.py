"""The formulation that expands signs and lets torch's library convolve."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonbnn.kernels.geometry import Geometry
from tritonbnn.layout import channels_last


def contract() -> AbstractContextManager[None]:
    """cuDNN as our contracts want it: deterministic, and real float32 products."""
    return torch.backends.cudnn.flags(
        enabled=True,
        benchmark=torch.backends.cudnn.benchmark,
        deterministic=True,
        allow_tf32=False,
    )


def convolution(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """torch's conv2d in the operands' own dtype, whatever autocast would make of it."""
    with contract(), torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(x, weight, stride=geometry.stride, padding=geometry.padding)
    return channels_last(y)


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's gradients of a convolution to (input, weight, bias), those that ``mask`` asks for."""
    stride, padding = [geometry.stride] * 2, [geometry.padding] * 2
    with contract():
        return torch.ops.aten.convolution_backward(
            channels_last(grad), x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, mask
        )
