"""What the optimisers share: checks of their input, and state that comes back in its own dtype."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_PORTION = 1 << 15  # numbers that a CPU's caches hold in several copies


class CheckedOptimizer(Optimizer):
    """An optimiser that looks at its parameters once, and keeps its state's dtypes on loading."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does, after a check of its settings and parameters.

        Raises:
            ValueError: a setting out of range, a parameter that this optimiser cannot train, or
                parameters on several devices.
            TypeError: a parameter that is not floating point.
        """
        super().add_param_group(param_group)
        try:
            self.check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()  # as if it had never been added
            raise

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise if a group cannot be trained."""
        check_devices(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, as torch does, but keep dtypes: torch casts all state to its parameter's."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for name, saved in state_dict["state"].get(index, {}).items():
                loaded = self.state[parameter][name]
                if isinstance(saved, Tensor) and saved.dtype != loaded.dtype:
                    self.state[parameter][name] = saved.to(parameter.device, copy=True)


def check_devices(optimizer: Optimizer) -> None:
    """Raise ValueError unless all parameters are on one device."""
    devices = {str(p.device) for group in optimizer.param_groups for p in group["params"]}
    if len(devices) > 1:
        name = type(optimizer).__name__
        raise ValueError(
            f"{name}'s parameters are on {' and '.join(sorted(devices))}: move them to one device,"
            f" or make one {name} for each"
        )


def check_number(
    owner: Optimizer, name: str, value: Any, *, least: float, most: float = math.inf
) -> None:
    """Raise ValueError unless a setting is a number in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        limit = f"at least {least:g}" if math.isinf(most) else f"from {least:g} to {most:g}"
        raise ValueError(f"{type(owner).__name__}: {name} must be {limit}, not {value!r}")


def dense_gradient(owner: Optimizer, parameter: Tensor) -> Tensor:
    """A parameter's gradient.

    Raises:
        ValueError: it is sparse.
    """
    grad = parameter.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise ValueError(
            f"{type(owner).__name__} takes no sparse gradient: make the embedding with sparse=False"
        )
    return grad


def closure_loss(closure: Any) -> Any:
    """What a step's closure returns, computed with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def portions(weights: list[Tensor]) -> Iterator[slice]:
    """Slices of parameters to update at once: all on a GPU, on a CPU what its caches hold."""
    if weights and weights[0].device.type != "cpu":
        yield slice(None)
        return
    start = numbers = 0
    for end, weight in enumerate(weights):
        numbers += weight.numel()
        if numbers >= _PORTION or end + 1 == len(weights):
            yield slice(start, end + 1)
            start, numbers = end + 1, 0
