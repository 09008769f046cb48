"""Triton kernels and their launchers, the twins of :mod:`tritonbnn.eager`.

Importing this package imports Triton; nothing else does.
"""

from tritonbnn.kernels import whole as whole
from tritonbnn.kernels.binarize import sign_backward, sign_forward
from tritonbnn.kernels.bop import bop_update, bop_update_packed
from tritonbnn.kernels.conv import conv_packed, conv_real
from tritonbnn.kernels.conv_unit import conv_moments, conv_unit_forward
from tritonbnn.kernels.input_grad import conv_input_grad
from tritonbnn.kernels.matmul import packed_matmul
from tritonbnn.kernels.pack import pack_signs, pack_weight, packed_difference, unpack_signs
from tritonbnn.kernels.rprelu import rprelu_backward, rprelu_forward
from tritonbnn.kernels.unit import channel_moments, unit_forward, unit_plan
from tritonbnn.kernels.unit_grad import unit_activation_backward, unit_norm_backward
from tritonbnn.kernels.weight_grad import conv_weight_grad

__all__ = [
    "bop_update",
    "bop_update_packed",
    "channel_moments",
    "conv_input_grad",
    "conv_moments",
    "conv_packed",
    "conv_real",
    "conv_unit_forward",
    "conv_weight_grad",
    "pack_signs",
    "pack_weight",
    "packed_difference",
    "packed_matmul",
    "rprelu_backward",
    "rprelu_forward",
    "sign_backward",
    "sign_forward",
    "unit_activation_backward",
    "unit_forward",
    "unit_norm_backward",
    "unit_plan",
    "unpack_signs",
]
