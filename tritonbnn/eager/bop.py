"""The flips of Bop and of its second-order form in torch."""

import torch
from torch import Tensor

from tritonbnn.contract import BOP_EPSILON
from tritonbnn.eager.pack import pack_signs, unpack_signs


def bop_update(
    weight: Tensor,
    grad: Tensor,
    average: Tensor,
    squares: Tensor | None,
    *,
    threshold: float,
    gamma: float,
    sigma: float = 0.0,
    scale: float = 1.0,
    squares_scale: float = 1.0,
) -> Tensor:
    """Move the averages by one gradient, then flip the weights that disagree with them.

    First order (Helwegen et al., 1906.02107): m <- (1 - gamma) m + gamma grad. A weight w flips
    where w m > threshold. Second order (2104.05124): also v <- (1 - sigma) v + sigma grad^2, and
    w (scale m) / (sqrt(squares_scale v) + 1e-10) takes the place of w m. The scales are 1, or the
    corrections of averages that start at 0.

    The comparison is strict. Where both sides are equal the weight becomes positive, whatever it
    was, as in the authors' code. Where one side is NaN nothing flips.

    Args:
        weight: of any shape, +1 or -1. It is changed in place.
        grad: the same shape and strides, any floating dtype.
        average: m, the same shape and strides, float32 or float64. It is changed in place.
        squares: v, likewise; None for the first order.
        threshold: at least 0.
        gamma: in [0, 1].
        sigma: in [0, 1].
        scale: of m.
        squares_scale: of v.

    Returns:
        How many weights have changed, int64 of no dimensions.
    """
    signal = _signal(grad, average, squares, gamma, sigma, scale, squares_scale)
    agreement = weight.to(signal.dtype).mul(signal)
    flipped = torch.where(agreement > threshold, -weight, weight)
    flipped = torch.where(agreement == threshold, weight.abs(), flipped)
    changed = (flipped != weight).sum()
    weight.copy_(flipped)
    return changed


def bop_update_packed(
    packed: Tensor,
    grad: Tensor,
    average: Tensor,
    squares: Tensor | None,
    *,
    threshold: float,
    gamma: float,
    sigma: float = 0.0,
    scale: float = 1.0,
    squares_scale: float = 1.0,
) -> Tensor:
    """:func:`bop_update` of weights that are bits, 32 channels to a word.

    Args:
        packed: int32 (rows, words), changed in place.
        grad: (rows, C), contiguous, any floating dtype.
        average: (rows, C), contiguous, float32 or float64. It is changed in place.
        squares: likewise, or None.
        threshold: and the other numbers are those of :func:`bop_update`.
        gamma: of the first average.
        sigma: of the second average.
        scale: of the first average.
        squares_scale: of the second average.

    Returns:
        How many weights have changed, int64 of no dimensions.
    """
    weight = unpack_signs(packed, grad.shape[1], average.dtype)
    changed = bop_update(
        *(weight, grad, average, squares),
        threshold=threshold,
        gamma=gamma,
        sigma=sigma,
        scale=scale,
        squares_scale=squares_scale,
    )
    packed.copy_(pack_signs(weight))
    return changed


def _signal(
    grad: Tensor,
    average: Tensor,
    squares: Tensor | None,
    gamma: float,
    sigma: float,
    scale: float,
    squares_scale: float,
) -> Tensor:
    """What a weight is compared with, after the averages have moved."""
    grad = grad.to(average.dtype)
    average.mul_(1 - gamma).add_(grad, alpha=gamma)
    if squares is None:
        return average
    squares.mul_(1 - sigma).addcmul_(grad, grad, value=sigma)
    return (average * scale).div_((squares * squares_scale).sqrt_().add_(BOP_EPSILON))
