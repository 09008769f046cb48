"""The binary activation in torch."""

import torch
from torch import Tensor

from tritonbnn.eager.common import accumulator, image_chunks, scratch, shifted
from tritonbnn.layout import channels_last, empty_pixels, flat_pixels


def sign_forward(x: Tensor, shift: Tensor | None = None) -> Tensor:
    """sign(x + shift) as +1 and -1 in ``x``'s dtype.

    Args:
        x: (N, C, H, W) or (M, C), floating point.
        shift: (C,), or None for no shift.

    Returns:
        The shape and dtype of ``x``, channels innermost in memory.
    """
    signs = empty_pixels(x, x.dtype)
    # no view of other memory: autograd lets nobody change one in place that a Function returns
    torch.ge(shifted(x, shift), 0, out=flat_pixels(signs)).mul_(2).sub_(1)
    return signs


def sign_backward(
    grad: Tensor,
    x: Tensor,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    shortcut: str = "identity",
) -> tuple[Tensor, Tensor]:
    """The clipped quadratic's pseudo-gradient (AdamBNN 1.2): slope max(0, 2 - 2 abs(x + shift)).

    The slope is computed again from ``x``, which costs less than storing it.

    Args:
        grad: the gradient to the signs, of ``x``'s shape.
        x: (N, C, H, W) or (M, C), the input of the sign.
        shift: (C,), or None for no shift.
        residual: the gradient to the output of a shortcut from ``x``, sent back to ``x`` in the
            same pass; or None.
        shortcut: "identity" (the residual has ``x``'s shape), "pool" (half its height and width)
            or "repeat" (twice its channels).

    Returns:
        The gradient to ``x``, slope * grad + shortcut^T(residual), in ``x``'s dtype; and the
        gradient to the shift, sum of slope * grad, (C,) float32 (float64 for float64 ``x``).
    """
    dx = empty_pixels(x, x.dtype)
    dshift = torch.zeros(x.shape[1], dtype=accumulator(x.dtype), device=x.device)
    for part in image_chunks(x):
        out, g = flat_pixels(dx[part]), flat_pixels(channels_last(grad[part]))
        slope = torch.rsub(shifted(x[part], shift).abs(), 2, alpha=2).clamp_(min=0)
        ds = torch.mul(slope, g, out=scratch(out, dshift.dtype))
        dshift += ds.sum(0)
        if residual is not None:
            _add_shortcut_grad(ds, channels_last(residual[part]), shortcut)
        out.copy_(ds)
    return dx, dshift


def _add_shortcut_grad(dx: Tensor, residual: Tensor, shortcut: str) -> None:
    """Add the shortcut's transpose, applied to (N, O, H', W'), to (pixels, C)."""
    if shortcut == "pool":
        n, channels, height, width = residual.shape
        blocks = dx.view(n, height, 2, width, 2, channels)
        blocks.add_(residual.permute(0, 2, 3, 1)[:, :, None, :, None], alpha=0.25)
    elif shortcut == "repeat":
        first, second = flat_pixels(residual).chunk(2, dim=1)
        dx.add_(first).add_(second)
    else:
        dx.add_(flat_pixels(residual))
