"""Modules over the binary operators, with torch.nn's signatures."""

from tritonbnn.nn.activations import RPReLU, RSign
from tritonbnn.nn.chain import Chain
from tritonbnn.nn.gradients import check_gradients
from tritonbnn.nn.layers import BinaryConv1d, BinaryConv2d, BinaryLinear
from tritonbnn.nn.packing import pack_weights_
from tritonbnn.nn.parameters import binary_weights, decayed_parameters
from tritonbnn.nn.unit import BinaryUnit

__all__ = [
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryLinear",
    "BinaryUnit",
    "Chain",
    "RPReLU",
    "RSign",
    "binary_weights",
    "check_gradients",
    "decayed_parameters",
    "pack_weights_",
]
