"""The binary activation in C."""

import torch
from torch import Tensor

from tritonbnn import checks, eager
from tritonbnn.layout import channels_last, empty_pixels
from tritonbnn.native import library
from tritonbnn.native.common import SHORTCUTS, TYPES, geometry, pixels, runs, vector


def sign_forward(x: Tensor, shift: Tensor | None = None) -> Tensor:
    """:func:`tritonbnn.eager.sign_forward`."""
    if not runs(x.dtype):
        return eager.sign_forward(x, shift)
    checks.check_per_channel(x.shape[1], shift=shift)
    signs = empty_pixels(x, x.dtype)
    data = channels_last(x)
    library.call("sign_forward", data, TYPES[x.dtype], vector(shift), pixels(x), x.shape[1], signs)
    return signs


def sign_backward(
    grad: Tensor,
    x: Tensor,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    shortcut: str = "identity",
) -> tuple[Tensor, Tensor]:
    """:func:`tritonbnn.eager.sign_backward`."""
    du = x if residual is None else residual
    if not runs(grad.dtype, x.dtype, du.dtype):
        return eager.sign_backward(grad, x, shift, residual, shortcut=shortcut)
    checks.check_per_channel(x.shape[1], shift=shift)
    checks.check_same_shape(x=x, grad=grad)
    if residual is not None:
        checks.check_shape("x", x, checks.shortcut_input_shape(residual.shape, shortcut))
    dx = empty_pixels(x, x.dtype)
    dshift = torch.empty(x.shape[1], dtype=torch.float32, device=x.device)
    library.call(
        "sign_backward",
        *(channels_last(grad), TYPES[grad.dtype], channels_last(x), TYPES[x.dtype]),
        *(None if residual is None else channels_last(residual), TYPES[du.dtype]),
        *(*geometry(x), SHORTCUTS[shortcut], vector(shift), dx, dshift),
    )
    return dx, dshift
