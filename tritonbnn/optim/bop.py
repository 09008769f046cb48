"""Bop (1906.02107) and second-order Bop (2104.05124): optimisers that flip signs.

A usual binary network keeps a real "latent" number for each weight and binarises it in each forward
pass. Here the stored weight is +1 or -1 itself, and the only memory beside it is an average of its
gradients. A weight flips where that average has its own sign and is large enough.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tritonbnn import checks, eager
from tritonbnn.eager.common import accumulator
from tritonbnn.layout import flat_pixels
from tritonbnn.ops import backend
from tritonbnn.optim.base import CheckedOptimizer, check_number, closure_loss, dense_gradient
from tritonbnn.packed import PackedWeight


@torch.no_grad()
def to_signs_(parameters: Iterable[Tensor]) -> None:
    """Replace each weight by its sign, in place; sign(0) = +1.

    Args:
        parameters: of any shape, floating point.
    """
    for weight in parameters:
        weight.copy_(torch.where(weight >= 0, 1.0, -1.0))


class Bop(CheckedOptimizer):
    """Flip a weight where the average of its gradients agrees with it and exceeds a threshold.

    m <- (1 - gamma) m + gamma grad, then w <- -w where w m > threshold. Where w m is exactly the
    threshold the weight becomes +1, whatever it was, as in the authors' code (plumerai,
    rethinking-bnn-optimization).

    The threshold is in units of the gradient. So it depends on the batch's size and on whether the
    loss is a mean or a sum. A torch.amp.GradScaler is taken out before: call ``scaler.step`` as
    usual. A smaller ``gamma`` averages over more steps, and fewer weights flip.

    Real parameters, as BatchNorm's, need an optimiser of their own. Weights that
    :func:`tritonbnn.nn.pack_weights_` has packed are flipped as bits.

    Args:
        params: parameters that hold +1 and -1 (see :func:`to_signs_`), or groups of them.
        threshold: at least 0. A schedule may change ``group["threshold"]``.
        gamma: from 0 to 1. A schedule may change ``group["gamma"]``. A group that has an ``lr``
            takes that for its gamma, so that torch's schedulers can move it.

    State:
        ``average``: m, of the weight's shape, in float32 (float64 for a float64 weight).

    Raises:
        ValueError: a weight that is not +1 or -1, a setting out of range, weight decay in a group,
            or parameters on several devices.
        TypeError: a parameter that is not floating point.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        threshold: float = 1e-8,
        gamma: float = 1e-4,
    ) -> None:
        super().__init__(params, {"threshold": threshold, "gamma": gamma})
        self._flips: list[Tensor] = []

    @property
    def flips(self) -> Tensor | None:
        """How many weights the last step flipped, int64 on their device; None before a step."""
        return torch.stack(self._flips).sum() if self._flips else None

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        name = type(self).__name__
        check_number(self, "threshold", group["threshold"], least=0)
        check_number(self, "gamma", group["gamma"], least=0, most=1)
        if group.get("weight_decay"):
            raise ValueError(
                f"{name} has no weight decay, as a weight of +1 or -1 cannot shrink: leave"
                " weight_decay out"
            )
        for weight in group["params"]:
            checks.check_float(f"{name}'s parameter", weight)
            known = isinstance(weight, PackedWeight) or weight.is_meta
            if not (known or bool((weight.detach().abs() == 1).all())):
                raise ValueError(
                    f"{name}'s weights must be +1 or -1, and one of shape {tuple(weight.shape)} has"
                    " others: call tritonbnn.optim.to_signs_ on them first"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the averages and flip.

        Args:
            closure: computes the loss again, as for torch's optimisers.

        Returns:
            What the closure returns.

        Raises:
            ValueError: a sparse gradient.
        """
        loss = closure_loss(closure)
        self._flips = [
            self._update(weight, group)
            for group in self.param_groups
            for weight in group["params"]
            if weight.grad is not None
        ]
        return loss

    def _update(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        """One weight's step; how many of its signs changed."""
        grad = _laid_out(dense_gradient(self, weight), weight)
        state = self.state[weight]
        if not state:
            self._begin(weight, state)
        average, squares = state["average"], state.get("squares")
        numbers = {"threshold": group["threshold"], **self._numbers(state, group)}
        if isinstance(weight, PackedWeight):
            launchers = backend.launchers(weight.device)
            rows = (None if x is None else flat_pixels(x) for x in (grad, average, squares))
            return launchers.bop_update_packed(weight.rows, *rows, **numbers)
        alike = average.stride() == weight.stride() and average.dtype == torch.float32
        launchers = backend.launchers(weight.device) if alike else eager
        return launchers.bop_update(weight.detach(), grad, average, squares, **numbers)

    def _begin(self, weight: Tensor, state: dict[str, Any]) -> None:
        """The state before the first step."""
        state["average"] = torch.zeros_like(weight, dtype=accumulator(weight.dtype))

    def _numbers(self, state: dict[str, Any], group: dict[str, Any]) -> dict[str, float]:
        """The numbers of the rule, apart from the threshold."""
        return {"gamma": _gamma(group)}


class Bop2ndOrder(Bop):
    """Bop that divides the average by the root of an average of squares before it compares.

    Also v <- (1 - sigma) v + sigma grad^2, and a weight flips where
    w m / (sqrt(v) + 1e-10) > threshold. That ratio has no unit: the threshold does not depend on
    the gradient's size, and is not that of :class:`Bop`.

    With ``bias_correction`` both averages are divided by the share of them that is not their first
    value of 0: 1 - (1 - gamma)^t, or the product of all (1 - gamma) where a schedule has moved it.
    The ratio is then about 1 from the first step on, where it is otherwise gamma / sqrt(sigma). So
    thresholds of the two forms differ too. The authors' public code has the form without.

    Args:
        params: as for :class:`Bop`.
        threshold: at least 0.
        gamma: of the first average, from 0 to 1.
        sigma: of the second average, from 0 to 1.
        bias_correction: whether averages are corrected for their start at 0.

    State:
        ``average``, ``squares``: m and v, of the weight's shape, float32 (float64 for float64).
        ``start``, ``squares_start``: with ``bias_correction``, how much of the first 0 is left.

    Raises:
        ValueError: as :class:`Bop`.
        TypeError: as :class:`Bop`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        threshold: float = 1e-6,
        gamma: float = 1e-7,
        sigma: float = 1e-3,
        bias_correction: bool = False,
    ) -> None:
        defaults = {"threshold": threshold, "gamma": gamma, "sigma": sigma}
        super(Bop, self).__init__(params, defaults | {"bias_correction": bias_correction})
        self._flips = []

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_number(self, "sigma", group["sigma"], least=0, most=1)

    def _begin(self, weight: Tensor, state: dict[str, Any]) -> None:
        super()._begin(weight, state)
        state["squares"] = torch.zeros_like(state["average"])

    def _numbers(self, state: dict[str, Any], group: dict[str, Any]) -> dict[str, float]:
        numbers = {"gamma": _gamma(group), "sigma": group["sigma"]}
        if group["bias_correction"]:
            state["start"] = state.get("start", 1.0) * (1 - numbers["gamma"])
            state["squares_start"] = state.get("squares_start", 1.0) * (1 - group["sigma"])
            numbers["scale"] = _correction(state["start"])
            numbers["squares_scale"] = _correction(state["squares_start"])
        return numbers


def _gamma(group: dict[str, Any]) -> float:
    return group.get("lr", group["gamma"])


def _correction(start: float) -> float:
    # an average that has never moved is 0, whatever it is multiplied by
    return 1 / (1 - start) if start < 1 else 1.0


def _laid_out(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient in the weight's memory layout, which the launchers need."""
    if grad.stride() == weight.stride():
        return grad
    return torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
