"""The binary activation in torch."""

from torch import Tensor

from tritonbnn.eager.common import shifted
from tritonbnn.layout import channels_last, flat_pixels, from_flat


def sign_forward(x: Tensor, shift: Tensor | None = None) -> Tensor:
    """sign(x + shift) as +1 and -1 in ``x``'s dtype.

    Args:
        x: (N, C, H, W) or (M, C), floating point.
        shift: (C,), or None for no shift.

    Returns:
        The shape and dtype of ``x``, channels innermost in memory.
    """
    positive = shifted(x, shift) >= 0
    return from_flat(positive.to(x.dtype).mul_(2).sub_(1), tuple(x.shape))


def sign_backward(
    grad: Tensor, x: Tensor, shift: Tensor | None = None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The clipped quadratic's pseudo-gradient (AdamBNN 1.2): slope max(0, 2 - 2 abs(x + shift)).

    The slope is computed again from ``x``, which costs less than storing it.

    Args:
        grad: the gradient to the signs, of ``x``'s shape.
        x: (N, C, H, W) or (M, C), the input of the sign.
        shift: (C,), or None for no shift.
        residual: of ``x``'s shape: a gradient that reaches ``x`` by another way, added in the
            same pass; or None.

    Returns:
        The gradient to ``x``, slope * grad + residual, in ``x``'s dtype; and the gradient to the
        shift, sum of slope * grad, (C,) float32 (float64 for float64 ``x``).
    """
    slope = shifted(x, shift).abs().mul_(-2).add_(2).clamp_(min=0)
    dx = slope.mul_(flat_pixels(channels_last(grad)))
    dshift = dx.sum(0)
    if residual is not None:
        dx = dx + flat_pixels(channels_last(residual))
    return from_flat(dx.to(x.dtype), tuple(x.shape)), dshift
