"""Weight prediction: the gradient is taken where the weights are about to be (XGrad, 2305.18240).

Before a forward pass the weights move ``horizon`` steps along the optimiser's last direction. The
gradient is taken there, the weights come back, and the ordinary step follows. It is a look-ahead
like Nesterov's, for one copy of the weights.

    optimizer = AdamWPrediction(model.parameters(), lr=1e-3)
    for images, labels in batches:
        optimizer.zero_grad()
        with optimizer.predicted():
            loss(model(images), labels).backward()
        optimizer.step()
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from tritonbnn.optim.base import check_devices, check_number, dense_gradient, portions

_Directed = tuple[list[Tensor], list[Tensor], list[float]]


class _Prediction(Optimizer):
    """What the three forms share: they move weights, and put them back.

    A horizon is a setting of each group. Where it is 0, or before the first step, there is nothing
    to move, and the optimiser is torch's own bit for bit.
    """

    _away = False  # whether the weights are where the coming step may take them

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            check_number(self, "horizon", self.param_groups[-1]["horizon"], least=0)
            check_devices(self)
        except ValueError:
            self.param_groups.pop()  # as if it had never been added
            raise

    @contextmanager
    def predicted(self) -> Iterator[None]:
        """Move the weights ahead for the block. They come back bit for bit, also from an error.

        All parts of an accumulated gradient belong into one block. What is not a weight, as running
        statistics of BatchNorm, keeps what the block made of it. A checkpoint or an evaluation in
        the block would see the moved weights.

        Raises:
            RuntimeError: the weights are moved already.
        """
        if self._away:
            raise RuntimeError(
                "predicted() inside predicted(): the weights are moved already, so leave the"
                " outer block first"
            )
        moved = [w for group in self.param_groups for w in self._movable(group)]
        kept = [w.detach().clone() for w in moved]
        self._away = True
        try:
            with torch.no_grad():
                for group in self.param_groups:
                    self._move(self._movable(group), group)
            yield
        finally:
            self._away = False
            if moved:
                with torch.no_grad():
                    torch._foreach_copy_(moved, kept)

    def passes(self) -> AbstractContextManager[None]:
        """What a trainer puts around the forward and backward passes of a step."""
        return self.predicted()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Torch's own step, at the weights as they are.

        Args:
            closure: computes the loss again, inside :meth:`predicted` if the gradient is to be
                taken there.

        Raises:
            RuntimeError: the weights are moved.
            ValueError: a sparse gradient.
        """
        if self._away:
            raise RuntimeError(
                "step() inside predicted(): the weights would be put back after it, so leave the"
                " block first"
            )
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    dense_gradient(self, weight)
        return super().step(closure)

    def _movable(self, group: dict[str, Any]) -> list[Tensor]:
        """A group's weights that have a direction."""
        if not group["horizon"] or not group["lr"]:
            return []
        return [w for w in group["params"] if self._has_direction(self.state.get(w), group)]

    def _has_direction(self, state: dict[str, Any] | None, group: dict[str, Any]) -> bool:
        raise NotImplementedError

    def _move(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        raise NotImplementedError


class _AdamDirection(_Prediction):
    """w - horizon lr m_hat / (sqrt(v_hat) + eps). Weight decay has no part in it, as published."""

    def _has_direction(self, state: dict[str, Any] | None, group: dict[str, Any]) -> bool:
        return bool(state)

    def _move(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        length = group["horizon"] * group["lr"]
        at_step = defaultdict(list)  # weights that began together are moved together
        for weight in weights:
            step = self.state[weight]["step"]
            at_step[step if step.is_cuda else step.item()].append(weight)
        for step, together in at_step.items():
            scale = (1 - beta2**step) ** 0.5
            stretch = (1 - beta1**step) / (scale * length)
            for part in portions(together):
                moved = together[part]
                roots = torch._foreach_sqrt([self.state[w]["exp_avg_sq"] for w in moved])
                torch._foreach_add_(roots, scale * group["eps"])
                torch._foreach_mul_(roots, stretch)
                averages = [self.state[w]["exp_avg"] for w in moved]
                torch._foreach_addcdiv_(moved, averages, roots, value=-1)


class AdamWPrediction(_AdamDirection, AdamW):
    """AdamW whose gradients are taken where the weights are predicted to be (2302.00195, XGrad).

    Inside ``with optimizer.predicted():`` the weights are
    w - horizon lr m_hat / (sqrt(v_hat) + eps). ``step`` is that of torch.optim.AdamW.

    Args:
        params: parameters or groups of them.
        lr: learning rate. The prediction uses that of the coming step.
        betas: of the two averages.
        eps: added to the root.
        weight_decay: decoupled.
        horizon: steps to look ahead, not only whole ones. 0 is AdamW bit for bit.
        fused: as for torch.optim.AdamW.

    Raises:
        ValueError: a setting out of range, parameters on several devices.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        horizon: float = 1,
        fused: bool | None = None,
    ) -> None:
        groups = _with_horizon(params, horizon)
        super().__init__(groups, lr, betas, eps, weight_decay, fused=fused)


class AdamPrediction(_AdamDirection, Adam):
    """Adam with the look-ahead of :class:`AdamWPrediction`. Weight decay is added to the gradient.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: of the two averages.
        eps: added to the root.
        weight_decay: an L2 term.
        horizon: steps to look ahead. 0 is Adam bit for bit.
        fused: as for torch.optim.Adam.

    Raises:
        ValueError: a setting out of range, parameters on several devices.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        horizon: float = 1,
        fused: bool | None = None,
    ) -> None:
        groups = _with_horizon(params, horizon)
        super().__init__(groups, lr, betas, eps, weight_decay, fused=fused)


class SGDPrediction(_Prediction, SGD):
    """SGD with momentum, whose gradients are taken at w - horizon lr (momentum buffer).

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        momentum: above 0, as the prediction is made of it.
        weight_decay: an L2 term.
        horizon: steps to look ahead. 0 is SGD bit for bit.
        fused: as for torch.optim.SGD.

    Raises:
        ValueError: a setting out of range, parameters on several devices.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        horizon: float = 1,
        fused: bool | None = None,
    ) -> None:
        groups = _with_horizon(params, horizon)
        super().__init__(groups, lr, momentum, weight_decay=weight_decay, fused=fused)

    def _has_direction(self, state: dict[str, Any] | None, group: dict[str, Any]) -> bool:
        return state is not None and state.get("momentum_buffer") is not None

    def _move(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        for weight in weights:
            buffer = self.state[weight]["momentum_buffer"]
            weight.sub_(buffer, alpha=group["horizon"] * group["lr"])


def _with_horizon(params: Iterable[Any], horizon: float) -> list[dict[str, Any]]:
    """The groups that torch would make of ``params``, each with a horizon.

    torch's constructors know no such setting, so it cannot be one of their defaults.
    """
    given = list(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    return [{"horizon": horizon, **group} for group in groups]
