"""The launchers' contracts in C, for CPUs; each is the twin of :mod:`tritonbnn.eager`'s.

What is not listed from a module of this package is eager's own. Importing it compiles and loads
nothing: :mod:`tritonbnn.native.library` does, at the first call.
"""

from tritonbnn.eager.unit import unit_plan
from tritonbnn.native import whole as whole
from tritonbnn.native.binarize import sign_backward, sign_forward
from tritonbnn.native.bop import bop_update, bop_update_packed
from tritonbnn.native.conv import conv_input_grad, conv_packed, conv_real, conv_weight_grad
from tritonbnn.native.conv_unit import conv_moments, conv_unit_forward
from tritonbnn.native.matmul import packed_matmul
from tritonbnn.native.pack import pack_signs, pack_weight, packed_difference, unpack_signs
from tritonbnn.native.rprelu import rprelu_backward, rprelu_forward
from tritonbnn.native.unit import (
    channel_moments,
    unit_activation_backward,
    unit_forward,
    unit_norm_backward,
)

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
