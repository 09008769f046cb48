"""Binary operators with gradients: they run on packed bits, and save packed bits for backward."""

from tritonbnn.ops import exported_unit  # noqa: F401  an exported program calls it
from tritonbnn.ops.binarize import binarize
from tritonbnn.ops.conv import binary_conv1d, binary_conv2d
from tritonbnn.ops.exported import decompositions
from tritonbnn.ops.linear import binary_linear
from tritonbnn.ops.pack import pack_signs, packed_difference, packed_matmul, unpack_signs
from tritonbnn.ops.rprelu import rprelu
from tritonbnn.ops.unit import UnitOutput, binary_unit

__all__ = [
    "UnitOutput",
    "binarize",
    "binary_conv1d",
    "binary_conv2d",
    "binary_linear",
    "binary_unit",
    "decompositions",
    "pack_signs",
    "packed_difference",
    "packed_matmul",
    "rprelu",
    "unpack_signs",
]
