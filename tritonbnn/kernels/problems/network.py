"""The layers that a network poses."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from tritonbnn.kernels.geometry import Geometry
from tritonbnn.models import build_model
from tritonbnn.nn import BinaryConv2d, BinaryUnit


def model_layers(
    model: str, batch: int, size: int, width: float = 1.0, *, small_images: bool = False
) -> Counter[Geometry]:
    """The binary convolutions of a network by name, and how often each shape occurs."""
    layers: Counter[Geometry] = Counter()

    def count(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, channels, height, width = inputs[0].shape
        out_channels, _, k, _ = module.weight.shape
        stride = module.stride
        geometry = Geometry(batch, height, width, channels, out_channels, k, stride, k // 2)
        layers[geometry] += 1

    with torch.device("meta"), torch.no_grad():
        network = build_model(model, width=width, small_images=small_images).eval()
        for module in network.modules():
            if isinstance(module, (BinaryUnit, BinaryConv2d)):
                module.register_forward_hook(count)
        network(torch.empty(1, 3, size, size))
    return layers
