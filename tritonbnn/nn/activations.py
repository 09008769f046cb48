"""ReActNet's two activations: a sign and a PReLU, with learnable shifts (2003.03488)."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from tritonbnn import ops
from tritonbnn.nn.leaf import as_leaf
from tritonbnn.window import check_count

INITIAL_SLOPE = 0.25  # nn.PReLU's


class RSign(nn.Module):
    """sign(x + shift), with one learnable shift per channel.

    :class:`~tritonbnn.nn.BinaryConv2d` and :class:`~tritonbnn.nn.BinaryLinear` see that the result
    is binary already and pass its gradient on. Where one of them follows directly, its own
    ``shift=True`` does the same in one step.

    Args:
        num_features: C.
        channel_dim: where the channels are: 1 for (N, C), (N, C, L) and (N, C, H, W), -1 for
            (N, L, C), -3 for images with or without a batch. A single row (C,) always works.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        Any that has C channels in ``channel_dim``, to the same.

    Raises:
        ValueError: ``num_features`` is not a positive int.
    """

    def __init__(
        self,
        num_features: int,
        channel_dim: int = 1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("num_features", num_features)
        self.num_features, self.channel_dim = num_features, channel_dim
        self.shift = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the shift to 0."""
        nn.init.zeros_(self.shift)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return as_leaf(self, x)
        return ops.binarize(x, self.shift, channel_dim=self.channel_dim)

    def extra_repr(self) -> str:
        return _representation(self.num_features, self.channel_dim)


class RPReLU(nn.Module):
    """PReLU(x + shift_in) + shift_out, with learnable shifts and slope per channel.

    Args:
        num_features: C.
        init: the slope at the start.
        channel_dim: where the channels are, as :class:`RSign` says.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        Any that has C channels in ``channel_dim``, to the same.

    Raises:
        ValueError: ``num_features`` is not a positive int.
    """

    def __init__(
        self,
        num_features: int,
        init: float = INITIAL_SLOPE,
        channel_dim: int = 1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("num_features", num_features)
        self.num_features, self.init, self.channel_dim = num_features, init, channel_dim
        place = {"device": device, "dtype": dtype}
        self.shift_in = nn.Parameter(torch.empty(num_features, **place))
        self.slope = nn.Parameter(torch.empty(num_features, **place))
        self.shift_out = nn.Parameter(torch.empty(num_features, **place))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the shifts to 0, and the slope to what it was at the start."""
        nn.init.zeros_(self.shift_in)
        nn.init.constant_(self.slope, self.init)
        nn.init.zeros_(self.shift_out)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return as_leaf(self, x)
        return ops.rprelu(
            x, self.shift_in, self.slope, self.shift_out, channel_dim=self.channel_dim
        )

    def extra_repr(self) -> str:
        return _representation(self.num_features, self.channel_dim)


def _representation(num_features: int, channel_dim: int) -> str:
    return f"{num_features}" if channel_dim == 1 else f"{num_features}, channel_dim={channel_dim}"
