"""How the operators call their autograd Functions."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def exporting() -> bool:
    """Whether torch.export traces.

    torch.compiler.is_exporting() says so to torch.compile's tracer at all times.
    """
    return torch.compiler._is_exporting_flag


def apply(function: type[torch.autograd.Function], *operands: Any) -> Any:
    """``function.apply(*operands)``, guarded where torch would go wrong.

    While it traces, torch.compile keeps one gradient per tensor. A tensor that is given as two
    operands would get the gradient of the last one only, so each operand is made a tensor of its
    own: a view, which the compiler removes again. torch.export keeps operators alone, so there the
    Function's ``exported`` is called, which :mod:`tritonbnn.ops.exported` gives it.

    Raises:
        RuntimeError: called under a transform of torch.func (grad, vmap, jvp) that is not compiled,
            with a dual tensor of forward-mode differentiation, or by torch.jit.trace, which would
            turn sizes into tensors.
    """
    if torch.compiler.is_compiling():
        if exporting():
            return function.exported(*operands)  # type: ignore[attr-defined]
        return function.apply(*(o.view_as(o) if isinstance(o, Tensor) else o for o in operands))
    if torch._C._are_functorch_transforms_active():  # torch's own test in Function.apply
        raise RuntimeError(
            "torch.func's transforms (grad, vmap, jvp and the like) are not supported: "
            "use loss.backward() or torch.autograd.grad, in a loop where there are several samples "
            "or models, or compile the transformed function with "
            "torch.compile(torch.func.grad(...)), which torch 2.11 and newer can"
        )
    if _in_forward_mode(operands):
        raise RuntimeError(
            "forward-mode differentiation is not supported: use torch.autograd.grad, "
            "once for each output, in a loop"
        )
    if torch._C._is_tracing():
        raise RuntimeError(
            "torch.jit.trace, and what exports through it, is not supported: use "
            "torch.export.export, or torch.compile"
        )
    if torch.autograd._profiler_enabled():
        with torch.profiler.record_function(function.operator):  # type: ignore[attr-defined]
            return function.apply(*operands)
    return function.apply(*operands)


def _in_forward_mode(operands: tuple[Any, ...]) -> bool:
    """Whether an operand carries a tangent. Outside of a level, which is the rule, none is asked.

    torch.compile refuses a Function with a ``jvp`` of its own, where this could else be said.
    """
    if getattr(forward_ad, "_current_level", -1) < 0:
        return False
    tensors = (operand for operand in operands if isinstance(operand, Tensor))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
