"""Bop and its second-order form in C."""

import torch
from torch import Tensor

from tritonbnn import checks, eager
from tritonbnn.native import library


def bop_update(
    weight: Tensor,
    grad: Tensor,
    average: Tensor,
    squares: Tensor | None,
    *,
    threshold: float,
    gamma: float,
    sigma: float = 0.0,
    scale: float = 1.0,
    squares_scale: float = 1.0,
) -> Tensor:
    """:func:`tritonbnn.eager.bop_update`."""
    checks.check_same_shape(weight=weight, grad=grad, average=average, squares=squares)
    numbers = {"threshold": threshold, "gamma": gamma, "sigma": sigma}
    numbers |= {"scale": scale, "squares_scale": squares_scale}
    tensors = (weight, grad, average, *(() if squares is None else (squares,)))
    dense = all(t.stride() == weight.stride() for t in tensors) and _is_dense(weight)
    if not (dense and all(t.dtype == torch.float32 for t in tensors)):
        return eager.bop_update(weight, grad, average, squares, **numbers)
    return _call("bop_update", weight, grad, average, squares, weight.numel(), numbers=numbers)


def bop_update_packed(
    packed: Tensor,
    grad: Tensor,
    average: Tensor,
    squares: Tensor | None,
    *,
    threshold: float,
    gamma: float,
    sigma: float = 0.0,
    scale: float = 1.0,
    squares_scale: float = 1.0,
) -> Tensor:
    """:func:`tritonbnn.eager.bop_update_packed`."""
    numbers = {"threshold": threshold, "gamma": gamma, "sigma": sigma}
    numbers |= {"scale": scale, "squares_scale": squares_scale}
    if grad.dtype != torch.float32 or average.dtype != torch.float32:
        return eager.bop_update_packed(packed, grad, average, squares, **numbers)
    checks.check_same_shape(grad=grad, average=average, squares=squares)
    checks.check_packed("packed", packed, grad.shape[1])
    operands = (packed, grad, average, squares, *grad.shape)
    return _call("bop_update_packed", *operands, numbers=numbers)


def _call(name: str, *operands: Tensor | int | None, numbers: dict[str, float]) -> Tensor:
    changed = torch.empty((), dtype=torch.int64)
    library.call(name, *operands, *map(float, numbers.values()), changed)
    return changed


def _is_dense(x: Tensor) -> bool:
    """Whether its numbers fill one stretch of memory, in whatever order."""
    return x.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )
