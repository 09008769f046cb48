"""How the operators call their autograd Functions."""

from typing import Any

import torch
from torch import Tensor


def apply(function: type[torch.autograd.Function], *operands: Any) -> Any:
    """``function.apply(*operands)``, guarded where torch would go wrong.

    While it traces, torch.compile keeps one gradient per tensor. A tensor that is given as two
    operands would get the gradient of the last one only, so each operand is made a tensor of its
    own: a view, which the compiler removes again.

    Raises:
        RuntimeError: called under a transform of torch.func (grad, vmap, jvp) that is not compiled,
            or by torch.jit.trace, which would turn sizes into tensors.
    """
    if torch.compiler.is_compiling():
        operands = tuple(o.view_as(o) if isinstance(o, Tensor) else o for o in operands)
    elif torch._C._are_functorch_transforms_active():  # torch's own test in Function.apply
        raise RuntimeError(
            "torch.func's transforms (grad, vmap, jvp and the like) are not supported: "
            "use loss.backward() or torch.autograd.grad, or compile the transformed function "
            "with torch.compile(torch.func.grad(...))"
        )
    elif torch._C._is_tracing():
        raise RuntimeError(
            "torch.jit.trace, and what exports through it, is not supported: use "
            "torch.export.export, or torch.compile"
        )
    return function.apply(*operands)
