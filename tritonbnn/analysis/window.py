"""What the optimiser's updates do to binary weights over an epoch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tritonbnn.analysis.signs import SignLayout

DEAD_BELOW = 1e-12

# torch splits no sum of this many numbers among threads, so that its last bits are always the same
_SERIAL = 1 << 15
_BLOCK = 32 * _SERIAL  # numbers at a time, so that a float64 copy of a whole layer is never made


class Window:
    """The updates of one epoch: all are counted, and some looked at. No call waits for the device.

    Args:
        layout: of the weights.
        weights: whose signs, gradients and steps to follow.
        optimizer: over them.

    Attributes:
        updates: so far.
        looks: the updates so far whose gradients and steps were looked at.
        flips: int64 (L,), signs that updates changed, of all updates.
        moved: a matrix of ``layout``: 1 where a gradient reached 1e-12 at a look, or where an
            update changed the sign.
        known: a matrix of ``layout``: 1 where a gradient was a finite number at a look.
        gradients: float64 (2, L): means of abs(gradient), summed over the looks at which they were
            finite, and the number of these.
        adam_steps: the same of abs(Adam's step).
    """

    def __init__(
        self, layout: SignLayout, weights: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        self._layout, self._weights, self._optimizer = layout, weights, optimizer
        self.begin()

    def begin(self) -> None:
        """Forget all updates; the signs of now are those before the first."""
        sizes = self._layout.sizes
        self.updates = self.looks = 0
        self.flips = torch.zeros_like(sizes)
        self.moved, self.known = self._layout.empty(), self._layout.empty()
        self.gradients = sizes.new_zeros((2, len(sizes)), dtype=torch.float64)
        self.adam_steps = torch.zeros_like(self.gradients)
        self._signs = self._layout.signs(self._weights)

    @torch.no_grad()
    def before_update(self) -> None:
        """Look at the gradients; these are of the loss, and not scaled."""
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in self._weights]
        finite = self._layout.finite(gradients)
        self.known |= finite
        self.moved |= self._layout.reaching(gradients, DEAD_BELOW) & finite
        self._add_finite(self.gradients, [mean_magnitude(g) for g in gradients])

    @torch.no_grad()
    def after_update(self, *, looked: bool) -> None:
        """Count the signs that the update has changed; if it is looked at, see Adam's state too."""
        signs = self._layout.signs(self._weights)
        self.flips += self._layout.differing(signs, self._signs)
        self.moved |= self._signs.bitwise_xor_(signs)
        self._signs = signs
        self.updates += 1
        if looked:
            self.looks += 1
            self._look_at_adam()

    def _look_at_adam(self) -> None:
        states = [self._optimizer.state[weight] for weight in self._weights]
        # None where fp16 has skipped every update so far
        if isinstance(self._optimizer, torch.optim.Adam) and all("step" in s for s in states):
            # asked for anew: an optimiser that loads its state puts other groups in their place
            of_parameter = {id(p): g for g in self._optimizer.param_groups for p in g["params"]}
            groups = [of_parameter[id(weight)] for weight in self._weights]
            steps = [_adam_step(s, g) for s, g in zip(states, groups, strict=True)]
            self._add_finite(self.adam_steps, steps)

    def _add_finite(self, sums: Tensor, means: list[Tensor]) -> None:
        """Count in what is finite; an fp16 update that overflowed is not, and is skipped."""
        if means:
            values = torch.stack(means)
            finite = values.isfinite()
            sums += torch.stack((torch.where(finite, values, 0), finite))

    def tensors(self) -> dict[str, Tensor]:
        """What a run that goes on within the epoch needs."""
        return {
            "updates": torch.tensor(self.updates),
            "looks": torch.tensor(self.looks),
            "flips": self.flips,
            "moved": self.moved,
            "known": self.known,
            "gradients": self.gradients,
            "adam_steps": self.adam_steps,
            "signs": self._signs,
        }

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Become what was saved."""
        self.updates, self.looks = int(saved["updates"]), int(saved["looks"])
        for name in ("flips", "moved", "known", "gradients", "adam_steps"):
            getattr(self, name).copy_(saved[name])
        self._signs.copy_(saved["signs"])


def mean_magnitude(x: Tensor) -> Tensor:
    """Mean of abs(x), summed in float64: the same bits with any number of threads."""
    return torch.stack([_sum_magnitude(block) for block in _blocks(x)]).sum() / x.numel()


def _blocks(x: Tensor) -> Sequence[Tensor]:
    """All elements, a block at a time."""
    return x.detach().reshape(-1).split(_BLOCK)


def _sum_magnitude(flat: Tensor) -> Tensor:
    whole = flat.numel() // _SERIAL * _SERIAL
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _SERIAL), 1, dim=1, dtype=torch.float64)
    return rows.sum() + torch.linalg.vector_norm(flat[whole:], 1, dtype=torch.float64)


def _adam_step(state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
    """Mean abs(lr m_hat / (sqrt(v_hat) + eps)) of the update that has just been made."""
    beta1, beta2 = group["betas"]
    updates = state["step"].double()
    first, second = 1 - beta1**updates, (1 - beta2**updates).sqrt()
    # both numerator and denominator are times the root of the second moment's correction
    eps = group["eps"] * second
    sums = [
        _sum_magnitude(m.div(v.sqrt().add_(eps)))
        for m, v in zip(_blocks(state["exp_avg"]), _blocks(state["exp_avg_sq"]), strict=True)
    ]
    ratio = torch.stack(sums).sum() / state["exp_avg"].numel()
    return group["lr"] * ratio * second / first
