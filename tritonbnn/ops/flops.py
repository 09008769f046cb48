"""How many operations the operators do, told to torch's FlopCounterMode.

A binary product counts as the real one that it stands for: a multiplication and an addition for
each pair of signs. So numbers can be set beside those of other networks.
"""

import sys
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tritonbnn import checks

NAMESPACE = "tritonbnn"


def _taps(weight: Tensor) -> int:
    """Pixels of a kernel: of (O, k, k, words) where it is packed, else of (O, C, k, k)."""
    return prod(weight.shape[1:3] if weight.dtype == torch.int32 else weight.shape[2:])


def _packed(x: Tensor, weight: Tensor, *_: Any, channels: int, out_val: Any, **__: Any) -> int:
    output = out_val if isinstance(out_val, Tensor) else out_val[0]
    return 2 * output.numel() * channels * _taps(weight)


def _moments(
    x: Tensor, weight: Tensor, *_: Any, channels: int, stride: int, padding: int, **__: Any
) -> int:
    size = checks.conv_output_size(x.shape[1], x.shape[2], weight.shape[1], stride, padding)
    return 2 * x.shape[0] * weight.shape[0] * prod(size) * channels * _taps(weight)


def _input_grad(grad: Tensor, weight: Tensor, *_: Any, channels: int, **__: Any) -> int:
    return 2 * grad.numel() * channels * _taps(weight)


def _weight_grad(grad: Tensor, *_: Any, channels: int, kernel_size: int, **__: Any) -> int:
    return 2 * grad.numel() * channels * kernel_size**2


def _matmul(a: Tensor, b: Tensor, k: int, **_: Any) -> int:
    return 2 * a.shape[0] * b.shape[0] * k


def _from_floats(x: Tensor, weight: Tensor, *_: Any, out_val: Any, **__: Any) -> int:
    """Of a real weight (O, C, k, k) or (O, K)."""
    output = out_val if isinstance(out_val, Tensor) else out_val[0]
    return 2 * output.numel() * weight[0].numel()


def _gradients(grad: Tensor, wanted: list[bool], x: Tensor, weight: Tensor, *_: Any, **__: Any):
    """Forward once more, and a product for each of the two operands that is asked for."""
    return 2 * grad.numel() * weight[0].numel() * (1 + sum(wanted[:2]))


_EXPORTED = ("binary_conv2d", "binary_conv2d_window", "binary_linear", "binary_unit")
_FORMULAS: dict[str, Callable[..., int]] = {
    "conv_packed": _packed,
    "conv_unit_forward": _packed,
    "conv_moments": _moments,
    "conv_real": _from_floats,
    "conv_input_grad": _input_grad,
    "conv_weight_grad": _weight_grad,
    "packed_matmul": _matmul,
    **dict.fromkeys(_EXPORTED, _from_floats),
    **{f"{name}_gradients": _gradients for name in _EXPORTED},
}


def tell_counter() -> None:
    """Register the formulas, if torch's counter is there at all, and tell the one that counts now.

    That is not done at import: the counter's module imports Triton, or warns that there is none.
    """
    module: Any = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    operators = getattr(torch.ops, NAMESPACE)
    targets = {getattr(operators, name): formula for name, formula in _FORMULAS.items()}
    if next(iter(targets)) not in module.flop_registry:
        for target, formula in targets.items():
            module.register_flop_formula(target, get_raw=True)(formula)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, module.FlopCounterMode):
            counter.flop_registry |= targets  # it has copied the registry before
