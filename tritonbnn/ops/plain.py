"""What the operators compute in torch's own, for where Python and this package are not.

Forward alone and on floats: signs are multiplied as +-1.0. That is exact in float32 for as long as
sums of signs are, which is up to 2^24 of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonbnn.eager.common import accumulator


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """A vector of a value per channel, as it broadcasts over ``like``, in its dtype."""
    return vector.to(like.dtype).view(-1, *[1] * (like.dim() - 2))


def signs(x: Tensor, shift: Tensor | None) -> Tensor:
    """sign(x + shift) as +-1.0, in the dtype of sums."""
    x = x.to(accumulator(x.dtype))
    x = x if shift is None else x + per_channel(shift, x)
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def operand(weight: Tensor, dtype: torch.dtype, binary: bool) -> tuple[Tensor, Tensor | None]:
    """What is convolved with, and the scale per output channel of the result."""
    weight = weight.to(dtype)
    return (signs(weight, None), weight.abs().flatten(1).mean(1)) if binary else (weight, None)


def scaled_conv2d(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    binary: bool,
    extra: Sequence[int] = (0, 0),
    **window: Any,
) -> Tensor:
    """The binary convolution in the dtype of sums; ``extra`` rows and columns of zeros follow."""
    kernel, alpha = operand(weight, accumulator(x.dtype), binary)
    padded = F.pad(signs(x, shift), (0, extra[1], 0, extra[0]))
    y = F.conv2d(padded, kernel, None, **window)
    return y if alpha is None else y * per_channel(alpha, y)
