"""What optimiser steps do to binary weights, looked at now and then over an epoch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tritonbnn.analysis.signs import SignLayout

DEAD_BELOW = 1e-12


class Window:
    """The looks of one epoch. A look is two calls, around an update; neither waits for the device.

    Args:
        layout: of the weights.
        weights: whose signs, gradients and steps to follow.
        optimizer: over them.

    Attributes:
        looks: so far.
        moved: a matrix of ``layout``: 1 where a gradient reached 1e-12 at a look, or the sign was
            not that of the look before, or of the other side of the update.
        flips: int64 (L,), signs that updates changed.
        gradients: float64 (2, L): means of abs(gradient), summed over the looks at which they were
            finite, and the number of these.
        adam_steps: the same of abs(Adam's step).
    """

    def __init__(
        self, layout: SignLayout, weights: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        self._layout, self._weights, self._optimizer = layout, weights, optimizer
        self._group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self.begin()

    def begin(self) -> None:
        """Forget all looks; the signs of now are those before the first."""
        sizes = self._layout.sizes
        self.looks = 0
        self.moved = self._layout.empty()
        self.flips = torch.zeros_like(sizes)
        self.gradients = sizes.new_zeros((2, len(sizes)), dtype=torch.float64)
        self.adam_steps = torch.zeros_like(self.gradients)
        self._signs = self._layout.signs(self._weights)

    @torch.no_grad()
    def before_update(self) -> None:
        """Look at the signs and the gradients; these are of the loss, and not scaled."""
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in self._weights]
        signs = self._layout.signs(self._weights)
        self.moved |= self._layout.reaching(gradients, DEAD_BELOW) | (signs ^ self._signs)
        self._signs = signs
        self._add_finite(self.gradients, [mean_magnitude(g) for g in gradients])

    @torch.no_grad()
    def after_update(self) -> None:
        """Look at the signs again, and at Adam's state."""
        signs = self._layout.signs(self._weights)
        self.moved |= signs ^ self._signs
        self.flips += self._layout.differing(signs, self._signs)
        self._signs = signs
        self.looks += 1
        states = [self._optimizer.state[weight] for weight in self._weights]
        # None where fp16 has skipped every update so far
        if isinstance(self._optimizer, torch.optim.Adam) and all("step" in s for s in states):
            groups = [self._group_of[id(weight)] for weight in self._weights]
            steps = [_adam_step(s, g) for s, g in zip(states, groups, strict=True)]
            self._add_finite(self.adam_steps, steps)

    def _add_finite(self, sums: Tensor, means: list[Tensor]) -> None:
        """Count in what is finite; an fp16 update that overflowed is not, and is skipped."""
        if means:
            values = torch.stack(means).double()
            finite = values.isfinite()
            sums += torch.stack((torch.where(finite, values, 0), finite))

    def tensors(self) -> dict[str, Tensor]:
        """What a run that goes on within the epoch needs."""
        return {
            "looks": torch.tensor(self.looks),
            "moved": self.moved,
            "flips": self.flips,
            "gradients": self.gradients,
            "adam_steps": self.adam_steps,
            "signs": self._signs,
        }

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Become what was saved."""
        self.looks = int(saved["looks"])
        for name in ("moved", "flips", "gradients", "adam_steps"):
            getattr(self, name).copy_(saved[name])
        self._signs = saved["signs"].to(self._signs.device)


def mean_magnitude(x: Tensor) -> Tensor:
    """Mean of abs(x), in its dtype."""
    return torch.linalg.vector_norm(x, 1) / x.numel()


def _adam_step(state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
    """Mean abs(lr m_hat / (sqrt(v_hat) + eps)) of the update that has just been made."""
    beta1, beta2 = group["betas"]
    updates = state["step"].double()
    first, second = 1 - beta1**updates, (1 - beta2**updates).sqrt()
    # both numerator and denominator are times the root of the second moment's correction
    denominator = state["exp_avg_sq"].sqrt().add_(group["eps"] * second)
    ratio = mean_magnitude(state["exp_avg"].div(denominator))
    return group["lr"] * ratio * second / first
