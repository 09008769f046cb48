"""ReActNet's activation in C."""

import torch
from torch import Tensor

from tritonbnn import checks, eager
from tritonbnn.layout import channels_last, empty_pixels
from tritonbnn.native import library
from tritonbnn.native.common import TYPES, pixels, runs, vector


def rprelu_forward(x: Tensor, shift_in: Tensor, slope: Tensor, shift_out: Tensor) -> Tensor:
    """:func:`tritonbnn.eager.rprelu_forward`."""
    if not runs(x.dtype):
        return eager.rprelu_forward(x, shift_in, slope, shift_out)
    checks.check_per_channel(x.shape[1], shift_in=shift_in, slope=slope, shift_out=shift_out)
    z = empty_pixels(x, x.dtype)
    shape = (pixels(x), x.shape[1])
    vectors = (vector(shift_in), vector(slope), vector(shift_out))
    library.call("rprelu_forward", channels_last(x), TYPES[x.dtype], *shape, *vectors, z)
    return z


def rprelu_backward(
    grad: Tensor, x: Tensor, shift_in: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`tritonbnn.eager.rprelu_backward`."""
    if grad.dtype != x.dtype or not runs(x.dtype):
        return eager.rprelu_backward(grad, x, shift_in, slope)
    checks.check_per_channel(x.shape[1], shift_in=shift_in, slope=slope)
    checks.check_same_shape(x=x, grad=grad)
    dx = empty_pixels(x, x.dtype)
    sums = torch.empty((4, x.shape[1]), dtype=torch.float32, device=x.device)
    library.call(
        "rprelu_backward",
        *(channels_last(grad), channels_last(x), TYPES[x.dtype], pixels(x), x.shape[1]),
        *(vector(shift_in), vector(slope), dx, sums),
    )
    # operators may not return views of one tensor
    return dx, sums[0].clone(), sums[2].clone(), sums[3].clone()
