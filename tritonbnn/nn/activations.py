"""ReActNet's two activations: a sign and a PReLU, with learnable shifts (2003.03488)."""

import torch
from torch import Tensor, nn

from tritonbnn import ops

INITIAL_SLOPE = 0.25  # nn.PReLU's


class RSign(nn.Module):
    """sign(x + shift), with one learnable shift per channel.

    :class:`~tritonbnn.nn.BinaryConv2d` and :class:`~tritonbnn.nn.BinaryLinear` see that the result
    is binary already and pass its gradient on. Where one of them follows directly, its own
    ``shift=True`` does the same in one step.

    Args:
        num_features: C.

    Shape:
        (N, C, H, W) or (M, C), to the same.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return ops.binarize(x, self.shift)

    def extra_repr(self) -> str:
        return str(self.shift.numel())


class RPReLU(nn.Module):
    """PReLU(x + shift_in) + shift_out, with learnable shifts and slope per channel.

    Args:
        num_features: C.
        init: the slope at the start.

    Shape:
        (N, C, H, W) or (M, C), to the same.
    """

    def __init__(self, num_features: int, init: float = INITIAL_SLOPE) -> None:
        super().__init__()
        self.shift_in = nn.Parameter(torch.zeros(num_features))
        self.slope = nn.Parameter(torch.full((num_features,), init))
        self.shift_out = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rprelu(x, self.shift_in, self.slope, self.shift_out)

    def extra_repr(self) -> str:
        return str(self.slope.numel())
