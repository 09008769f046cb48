"""The launchers' contracts in torch, packed bits included, for machines without a GPU.

Every function here has a twin of the same name, signature and module in ``tritonbnn.kernels``;
tests hold the two together. Activations have shape (N, C, H, W) in channels_last memory, or
(M, C). Packed signs are int32, channels innermost: (N, H, W, words), (M, words), and
(O, kh, kw, words) for a weight, ordered as :mod:`tritonbnn.bits` says. sign(0) = +1, for -0.0 too.

Sums run in float32, and in float64 for float64 input: the mode in which whole networks are
compared with other code.
"""

from tritonbnn.eager.binarize import sign_backward, sign_forward
from tritonbnn.eager.bop import bop_update, bop_update_packed
from tritonbnn.eager.conv import conv_input_grad, conv_packed, conv_real, conv_weight_grad
from tritonbnn.eager.conv_unit import conv_moments, conv_unit_forward
from tritonbnn.eager.pack import (
    pack_signs,
    pack_weight,
    packed_difference,
    packed_matmul,
    unpack_signs,
)
from tritonbnn.eager.rprelu import rprelu_backward, rprelu_forward
from tritonbnn.eager.unit import (
    channel_moments,
    unit_activation_backward,
    unit_forward,
    unit_norm_backward,
    unit_plan,
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
