"""The launchers as torch.library operators, so that torch.compile sees each as one opaque node.

An operator has its eager twin's schema and no gradient: gradients belong to the autograd Functions
that call it. Outside of tracing, the launcher is called directly: the dispatcher costs some 30
microseconds a call, which a training step would pay several hundred times.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tritonbnn import eager, native
from tritonbnn.bits import words
from tritonbnn.checks import conv_output_size
from tritonbnn.eager.common import accumulator
from tritonbnn.layout import empty_channels_last, empty_pixels
from tritonbnn.ops import backend
from tritonbnn.ops.flops import NAMESPACE, tell_counter
from tritonbnn.packed import PackedWeight

OPERATORS: dict[str, Callable[..., Any]] = {}
_dispatched: bool | None = None


@contextmanager
def through_dispatcher(always: bool = True) -> Iterator[None]:
    """Have every launcher called as torch's operator, so that modes and profilers see it.

    It holds for all threads: autograd runs a GPU's backward in threads of its own.

    Args:
        always: False for the opposite: every launcher called directly, even where operands hold no
            data, so that its launches can be recorded.
    """
    global _dispatched
    before, _dispatched = _dispatched, always
    try:
        yield
    finally:
        _dispatched = before


def operator(fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register the launcher named as ``fake``, which computes shapes only; return its caller."""
    name = fake.__name__
    schema = torch.library.infer_schema(getattr(eager, name), mutates_args=())

    def launch(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(backend.launchers(x.device), name)(x, *args, **kwargs)

    operator = torch.library.custom_op(
        f"{NAMESPACE}::{name}", launch, mutates_args=(), schema=schema
    )
    operator.register_fake(fake)
    OPERATORS[name] = operator

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if through_operators(x, *args):
            _refuse_distributed(x, *args)
            return operator(x, *args, **kwargs)
        return launch(x, *args, **kwargs)

    call.__name__ = name
    call.__doc__ = getattr(eager, name).__doc__
    return call


def through_operators(*operands: Any) -> bool:
    """Whether a launcher is called as torch's operator.

    So it is where torch traces, where a mode wants to see operators or a caller asks for it, and
    where an operand is not what its memory holds, so that torch must see to it first.
    """
    if torch.compiler.is_compiling():
        return True
    if _dispatched is not None:
        return _dispatched
    if torch._C._len_torch_dispatch_stack():
        tell_counter()
        return True
    # asked in every call: map takes half of a generator's time
    return not all(map(_holds_data, [x for x in operands if isinstance(x, Tensor)]))


def in_one_call(takes: Callable[..., bool], x: Tensor, *others: Tensor | None) -> bool:
    """Whether C, which ``takes`` these operands or not, computes them in one call a direction.

    Not while torch traces, which is to see operators.
    """
    return (
        not through_operators(x, *others)
        and backend.launchers(x.device) is native
        and takes(x, *others)
    )


def whole_units(x: Tensor, *others: Tensor | None) -> ModuleType | None:
    """The launchers whose ``whole`` computes a unit of these operands in one call a direction.

    None where there are no such, and while torch traces, which is to see operators.
    """
    if through_operators(x, *others):
        return None
    launchers = backend.launchers(x.device)
    whole = getattr(launchers, "whole", None)
    return launchers if whole is not None and whole.takes(x, *others) else None


_ORDINARY = (Tensor, torch.nn.Parameter, PackedWeight)


def _holds_data(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary tensor: of no subclass, not meta, sparse, or negated lazily."""
    if type(x) not in _ORDINARY:
        return False
    return x.layout is torch.strided and not x.is_meta and not x.is_neg()


def _refuse_distributed(*operands: Any) -> None:
    """Raise TypeError for a DTensor, for which an operator would need a strategy of sharding."""
    if any(type(x).__name__ == "DTensor" for x in operands):
        raise TypeError(
            "DTensors are not supported in a call: shard a module with fully_shard, which gathers "
            "its parameters before each call, or leave binary layers out of distribute_module"
        )


@operator
def pack_signs(x, shift=None):
    spatial = x.shape[2:]
    return x.new_empty((x.shape[0], *spatial, words(x.shape[1])), dtype=torch.int32)


@operator
def unpack_signs(packed, channels, dtype):
    if packed.dim() == 2:
        return packed.new_empty((packed.shape[0], channels), dtype=dtype)
    n, h, w, _ = packed.shape
    return empty_channels_last((n, channels, h, w), dtype, packed.device)


@operator
def pack_weight(weight):
    packed = weight.new_empty(
        (weight.shape[0], *weight.shape[2:], words(weight.shape[1])), dtype=torch.int32
    )
    return packed, weight.new_empty(weight.shape[0], dtype=accumulator(weight.dtype))


def signs_and_scale(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A binary weight's packed signs, and its scale: :func:`pack_weight`, or as it is stored."""
    if isinstance(weight, PackedWeight):
        return weight.packed, weight.alpha
    return pack_weight(weight)


@operator
def packed_matmul(a, b, k):
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


@operator
def packed_difference(a, b):
    return a.new_empty(a.shape[0])


@operator
def conv_packed(x, weight, alpha, *, channels, stride, padding, dtype):
    size = conv_output_size(x.shape[1], x.shape[2], weight.shape[1], stride, padding)
    return empty_channels_last((x.shape[0], weight.shape[0], *size), dtype, x.device)


@operator
def conv_moments(x, weight, *, channels, stride, padding):
    return tuple(x.new_empty(weight.shape[0], dtype=torch.float64) for _ in range(2))


@operator
def conv_unit_forward(
    x,
    weight,
    stream,
    mean,
    scale,
    offset,
    shift_mid,
    slope,
    shift_out,
    next_shift,
    *,
    channels,
    stride,
    padding,
    shortcut,
    pack,
):
    size = conv_output_size(x.shape[1], x.shape[2], weight.shape[1], stride, padding)
    shape = (x.shape[0], weight.shape[0], *size)
    signs = x.new_empty((x.shape[0], *size, words(weight.shape[0]) if pack else 0))
    return empty_channels_last(shape, stream.dtype, x.device), signs


@operator
def conv_real(x, weight, *, stride, padding, dtype):
    size = conv_output_size(x.shape[1], x.shape[2], weight.shape[2], stride, padding)
    return empty_channels_last((x.shape[0], weight.shape[0], *size), dtype, x.device)


@operator
def conv_input_grad(grad, weight, alpha, *, channels, height, width, stride, padding):
    return empty_channels_last((grad.shape[0], channels, height, width), grad.dtype, grad.device)


@operator
def conv_weight_grad(grad, x, *, channels, kernel_size, stride, padding):
    shape = (grad.shape[1], channels, kernel_size, kernel_size)
    return empty_channels_last(shape, accumulator(grad.dtype), grad.device)


@operator
def channel_moments(a):
    return tuple(a.new_empty(a.shape[1], dtype=torch.float64) for _ in range(2))


@operator
def unit_forward(
    a, stream, mean, scale, offset, shift_mid, slope, shift_out, next_shift, *, shortcut, pack
):
    n, channels, height, width = a.shape
    packed = (n, height, width, words(channels) if pack else 0)
    return empty_pixels(a, stream.dtype), a.new_empty(packed, dtype=torch.int32)


@operator
def unit_activation_backward(grad, a, stream, mean, scale, offset, shift_mid, slope, *, shortcut):
    sums = grad.new_empty((4, a.shape[1]), dtype=accumulator(grad.dtype))
    return empty_pixels(a, grad.dtype), sums


@operator
def unit_norm_backward(du, a, du_scale, a_scale, constant):
    return empty_pixels(a, du.dtype)
