"""The formulation that expands signs and lets torch's library convolve."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonbnn.kernels.geometry import Geometry
from tritonbnn.layout import channels_last


@contextmanager
def contract() -> Iterator[None]:
    """cuDNN as our contracts want it: deterministic, and real float32 products.

    ``torch.backends.cudnn.flags`` raises where a user has set one of torch's newer
    ``fp32_precision``, and puts another one back.
    """
    cudnn: Any = torch.backends.cudnn
    before = cudnn.enabled, cudnn.deterministic, cudnn.conv.fp32_precision
    cudnn.enabled, cudnn.deterministic, cudnn.conv.fp32_precision = True, True, "ieee"
    try:
        yield
    finally:
        cudnn.enabled, cudnn.deterministic, cudnn.conv.fp32_precision = before


def convolution(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """torch's conv2d in the operands' own dtype, whatever autocast would make of it."""
    device = x.device.type
    has_autocast = torch.amp.is_autocast_available(
        device
    )  # meta, to which kernels compile, has not
    with contract(), torch.autocast(device, enabled=False) if has_autocast else nullcontext():
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
