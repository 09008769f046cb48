"""Backward passes that can be run, but not differentiated again."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a Function's ``backward`` raise where torch was asked for a graph of it.

    torch's own ``once_differentiable`` raises only if the upstream gradient requires grad; with a
    constant one, as that of ``sum()``, second-order terms would be silently missing.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "double backward is not supported: a pseudo-gradient has no derivative; "
                "leave out create_graph=True"
            )
        return backward(ctx, *grads)

    return checked
