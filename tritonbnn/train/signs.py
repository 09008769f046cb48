"""How many binary weights changed their sign in an epoch."""

import torch
from torch import Tensor, nn

from tritonbnn.nn import binary_weights


class SignTracker:
    """Remembers the signs that the epoch began with; sign(0) is +1.

    Args:
        model: whose binary weights to follow. In step 1 they are the weights that step 2 binarises.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = binary_weights(model)
        self.positive: dict[str, Tensor] = {}
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Remember the signs of now."""
        self.positive = {name: weight.detach() >= 0 for name, weight in self._weights.items()}

    def flipped(self) -> float:
        """The share of all binary weights whose sign is not the remembered one."""
        flips = [
            (self.positive[name] != (weight.detach() >= 0)).sum()
            for name, weight in self._weights.items()
        ]
        total = sum(weight.numel() for weight in self._weights.values())
        return int(torch.stack(flips).sum()) / total if total else 0.0
