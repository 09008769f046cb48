"""Backward passes that can be run, but not differentiated again."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a Function's ``backward`` raise where torch was asked for a graph of it.

    torch's own ``once_differentiable`` raises only if the upstream gradient requires grad; with a
    constant one, as that of ``sum()``, second-order terms would be silently missing. It also raises
    where many gradients come as one: the launchers cannot look into such a batch.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, *grads)
        if isinstance(grads[0], torch.Tensor) and _is_batch(grads[0]):
            raise RuntimeError(
                "batched gradients (is_grads_batched=True, vectorize=True) are not supported: "
                "call torch.autograd.grad once for each gradient, in a loop"
            )
        if torch.is_grad_enabled():
            raise RuntimeError(
                "double backward is not supported: a pseudo-gradient has no derivative; "
                "leave out create_graph=True"
            )
        return backward(ctx, *grads)

    return checked


def _is_batch(grad: torch.Tensor) -> bool:
    """Whether ``grad`` is many: of torch.func's vmap, or of autograd's own older one."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad)
