"""From the gradients of a product of signs back to what the signs were taken of."""

import torch
from torch import Tensor

from tritonbnn.ops import library
from tritonbnn.ops.binarize import sign_backward
from tritonbnn.packed import PackedWeight


def sign_grads(
    dsigns: Tensor, x: Tensor, shift: Tensor | None, may_be_binary: bool
) -> tuple[Tensor, Tensor]:
    """The gradients to x and shift from that to the signs, past the sign where x is binary already.

    The pseudo-gradient is 0 at +-1, so behind another sign nothing would be trained.
    """
    dx, dshift = sign_backward(dsigns, x, shift)
    if not may_be_binary:
        return dx, dshift
    if x.device.type == "cpu" and not library.through_operators(x):
        return dsigns if _is_binary(x) else dx, dshift
    # chosen on the device, so that nothing waits for it
    return torch.where((x.abs() == 1).all(), dsigns, dx), dshift


def _is_binary(x: Tensor) -> bool:
    """Whether all of x is +1 or -1.

    Real numbers nearly always show in the first pixel that they are. Then the rest is not read.
    """
    first = x[:1] if x.dim() == 2 else x[:1, :, :1, :1]
    return bool((first.abs() == 1).all()) and bool((x.abs() == 1).all())


def clipped_weight_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient to a latent weight: 0 where abs(w) > 1 (AdamBNN 1.3).

    It comes in the weight's memory layout, which autograd would else copy it to. ``grad`` may be
    overwritten.
    """
    if isinstance(weight, PackedWeight):  # of +1 and -1, none of which is above 1
        return grad
    edge = 1 + torch.finfo(grad.dtype).eps  # hardtanh's gradient is 0 from its bounds on
    real = weight.to(grad.dtype)
    # in place where it may be: new memory costs a CPU more than the clipping
    in_place = grad.stride() == weight.stride() and not library.through_operators(weight)
    clipped = grad if in_place else torch.empty_like(weight, dtype=grad.dtype)
    return torch.ops.aten.hardtanh_backward(grad, real, -edge, edge, grad_input=clipped)
