"""A unit's norm: whether it can be fused, what a call of it must return, and its averages."""

from itertools import chain
from typing import TypeGuard

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm


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


def count_batch(bn: _BatchNorm, statistics: tuple[Tensor, Tensor] | None) -> None:
    """Count a batch, and move the running averages towards its statistics, as nn.BatchNorm2d does.

    Args:
        bn: in training mode, and tracking.
        statistics: mean and unbiased variance, (O,) each, without a gradient; None for a batch
            without values.

    Raises:
        ValueError: an average has another shape, or is elsewhere.
    """
    counter, moving = bn.num_batches_tracked, averages(bn)
    if counter is not None:
        counter.add_(1)
    step: float | Tensor
    if bn.momentum is not None:
        step = bn.momentum
    elif counter is not None:
        step = 1 / counter.double()  # a cumulative average
    else:
        return  # nn.BatchNorm2d's, too, stands still without a count
    if moving is None or statistics is None:
        return
    for average, value in zip(moving, statistics, strict=True):
        weight = step.to(average.dtype) if isinstance(step, Tensor) else step
        try:
            average.lerp_(value.to(average.dtype), weight)
        except RuntimeError as error:
            raise ValueError(
                f"a running average of the norm must be {tuple(value.shape)} on {value.device}, "
                f"not {tuple(average.shape)} on {average.device}"
            ) from error
