"""A unit's norm: whether it can be fused, what a call of it must return, and its averages."""

from itertools import chain
from typing import TypeGuard

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tritonbnn.contract import Averages


def is_fusible(norm: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether the fused Function computes exactly what a call of ``norm`` would.

    A subclass may compute anything, and parametrising a module makes it one. Hooks and a
    ``forward`` put on the instance are seen by calls alone. What torch refuses is left to torch.
    """
    if type(norm) is not nn.BatchNorm2d and type(norm) is not nn.SyncBatchNorm:
        return False
    # looked up where modules keep them: asked twice in every call, and the way of modules is slow
    parameters, buffers = norm._parameters, norm._buffers
    return (
        parameters.get("weight") is not None
        and parameters.get("bias") is not None
        and (buffers.get("running_mean") is None) == (buffers.get("running_var") is None)
        and norm.eps > 0
        and "forward" not in norm.__dict__
        and not norm._forward_pre_hooks
        and not norm._forward_hooks
        and not norm._backward_pre_hooks
        and not norm._backward_hooks
    )


def normed(norm: nn.Module, a: Tensor) -> Tensor:
    """``norm(a)``, in ``a``'s dtype.

    Raises:
        ValueError: the norm is on another device, or what it returns is not like ``a``.
    """
    _check_device(norm, a)
    u = norm(a)
    name = type(norm).__name__
    if not isinstance(u, Tensor):
        raise ValueError(f"the norm {name} must return a tensor, not {type(u).__name__}")
    if u.dtype != a.dtype and torch.is_autocast_enabled(a.device.type):
        u = u.to(a.dtype)  # autocast runs some norms in float32
    for what in ("shape", "dtype", "device"):
        given, expected = getattr(u, what), getattr(a, what)
        if given != expected:
            given, expected = (tuple(v) if what == "shape" else v for v in (given, expected))
            raise ValueError(
                f"the norm {name} must keep {what} {expected}, not return {given}: "
                "choose a norm that does"
            )
    return u


def _check_device(norm: nn.Module, a: Tensor) -> None:
    """Raise ValueError where a norm's tensors are elsewhere and nothing is there to bring them."""
    if any(m._forward_pre_hooks or "forward" in m.__dict__ for m in norm.modules()):
        return
    for name, tensor in chain(norm.named_parameters(), norm.named_buffers()):
        if tensor.dim() and tensor.device != a.device:
            raise ValueError(
                f"all tensors must be on one device, not x on {a.device}, "
                f"the norm's {name} on {tensor.device}"
            )


def statistics_group(bn: _BatchNorm) -> distributed.ProcessGroup | None:
    """The processes that share ``bn``'s batch statistics: none, unless it is a SyncBatchNorm."""
    if not (isinstance(bn, nn.SyncBatchNorm) and bn.training and distributed.is_initialized()):
        return None
    group = bn.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


def averages(bn: _BatchNorm) -> tuple[Tensor, Tensor] | None:
    """What ``bn`` normalises by in eval mode; None for the batch's own, if it keeps no averages."""
    if bn.running_mean is None or bn.running_var is None:
        return None
    return bn.running_mean, bn.running_var


def running_averages(bn: _BatchNorm) -> Averages:
    """What a batch moves of ``bn``, which is in training mode and tracks."""
    kept = bn._buffers.get  # as in is_fusible: the way of modules is slow
    counter = kept("num_batches_tracked")
    return Averages(kept("running_mean"), kept("running_var"), counter, bn.momentum)
