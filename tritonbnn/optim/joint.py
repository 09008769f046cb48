"""Several optimisers as one: Bop for the signs, and another for all that is real."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.optim import Optimizer

from tritonbnn.optim.base import CheckedOptimizer, closure_loss


class Joint(CheckedOptimizer):
    """Optimisers of different parameters, with one state dict, one step and one loss scaler.

    Groups and state are those of the parts, in their order: a schedule that changes a group here
    changes it there.

    Args:
        parts: optimisers without a parameter in common, which have not stepped yet.

    Raises:
        ValueError: a parameter of two parts, or parameters on several devices.
    """

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            self.defaults |= part.defaults
        self._share()

    def _share(self) -> None:
        """Hand groups and state, which loading makes anew, to the parts."""
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:end], self.state
            start = end

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, as torch does, into all parts."""
        super().load_state_dict(state_dict)
        self._share()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of each part.

        Args:
            closure: computes the loss again, once for all.
        """
        loss = closure_loss(closure)
        for part in self.parts:
            part.step()
        return loss

    @contextmanager
    def passes(self) -> Iterator[None]:
        """What the parts want around the forward and backward passes of a step."""
        with ExitStack() as stack:
            for part in self.parts:
                if hasattr(part, "passes"):
                    stack.enter_context(part.passes())
            yield
