"""Plain differentiable torch for every op: the definition of correct.

Nothing of ours is used and no Function is written: autograd derives every backward pass, so these
are the truth for tests, in float64. sign(0) = +1 everywhere. Activations are (N, C, H, W) or
(M, C); shifts and slopes (C,).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def hard_sign(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1. Its gradient is zero."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def binarize(x: Tensor, shift: Tensor | None = None) -> Tensor:
    """sign(x + shift) whose gradient is that of the clipped quadratic (AdamBNN 1.2)."""
    t = x if shift is None else x + _per_channel(shift, x)
    inside = torch.where(t < 0, t * t + 2 * t, 2 * t - t * t)
    quadratic = torch.where(t.abs() < 1, inside, hard_sign(t).detach())
    return hard_sign(t) + quadratic - quadratic.detach()


def binarize_input(x: Tensor, shift: Tensor | None, may_be_binary: bool) -> Tensor:
    """As :func:`binarize`; but an x that is +-1 throughout passes its gradient on unchanged."""
    if may_be_binary and (x.abs() == 1).all():
        return binarize(x.detach(), shift) + x - x.detach()
    return binarize(x, shift)


def binarize_weight(weight: Tensor) -> Tensor:
    """alpha * sign(w), alpha the detached mean of abs(w) per output; gradient 1 on abs(w) <= 1."""
    dims = tuple(range(1, weight.dim()))
    alpha = weight.detach().abs().mean(dims, keepdim=True)
    # as clamp, whose gradient at the bounds themselves is 1 up to torch 2.13, and 0 from there on
    clipped = torch.where(weight.abs() <= 1, weight, weight.detach().clamp(-1, 1))
    return alpha * hard_sign(weight) + clipped - clipped.detach()


def binary_conv2d(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    binary_weight: bool = True,
    may_be_binary: bool = True,
) -> Tensor:
    """conv2d(sign(x + shift), alpha * sign(w)), or with the real w; zeros padded after the sign."""
    w = binarize_weight(weight) if binary_weight else weight
    signs = binarize_input(x, shift, may_be_binary)
    return F.conv2d(signs, w, bias, stride, padding, dilation, groups)


def binary_linear(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    binary_weight: bool = True,
) -> Tensor:
    """sign(x + shift) @ (alpha * sign(w))^T, or with the real w."""
    w = binarize_weight(weight) if binary_weight else weight
    return F.linear(binarize_input(x, shift, True), w, bias)


def rprelu(x: Tensor, shift_in: Tensor, slope: Tensor, shift_out: Tensor) -> Tensor:
    """PReLU(x + shift_in) + shift_out."""
    t = x + _per_channel(shift_in, x)
    return torch.where(t > 0, t, t * _per_channel(slope, x)) + _per_channel(shift_out, x)


def binary_unit(
    x: Tensor,
    shift_in: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    shift_mid: Tensor,
    slope: Tensor,
    shift_out: Tensor,
    *,
    shortcut: Tensor,
    stride: int = 1,
    padding: int = 0,
    binary_weight: bool = True,
    eps: float = 1e-5,
) -> Tensor:
    """rprelu(BatchNorm(binary_conv2d(x)) + shortcut) with the batch's own statistics."""
    a = binary_conv2d(
        x,
        weight,
        shift_in,
        stride=stride,
        padding=padding,
        binary_weight=binary_weight,
        may_be_binary=False,
    )
    u = F.batch_norm(a, None, None, gamma, beta, training=True, eps=eps) + shortcut
    return rprelu(u, shift_mid, slope, shift_out)
