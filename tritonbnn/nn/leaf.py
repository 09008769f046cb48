"""Modules that torch.fx does not look into."""

from typing import Any

from torch import Tensor, fx, nn


def as_leaf(module: nn.Module, x: fx.Proxy, *others: Any) -> Tensor:
    """Write a call of ``module`` into the graph that is being traced, as one node.

    torch.fx traces with stand-ins for tensors, which have no shape. So it cannot follow a module
    that checks shapes, nor one that calls C or Triton. A tracer takes torch's own modules as leaves
    of its graph, and so does a module of ours that meets a stand-in, by calling this.
    """
    tracer: Any = x.tracer
    given = tuple(other for other in others if other is not None)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x, *given), {})
