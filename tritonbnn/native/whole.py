"""A whole unit in one C call a direction: small networks lose more by calls than by products."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from tritonbnn import checks, eager
from tritonbnn.bits import words
from tritonbnn.contract import Gradients, Kept, Options, Statistics
from tritonbnn.layout import channels_last, empty_channels_last
from tritonbnn.native import library
from tritonbnn.native.common import SHORTCUTS, TYPES, runs
from tritonbnn.native.conv import Geometry, WeightStrides, geometry
from tritonbnn.packed import PackedWeight

_NUMBERS = ("type", "a_type", "shortcut")
_OPERANDS = (
    *("x", "weight", "gamma", "beta", "shift_in", "shift_mid", "slope", "shift_out"),
    *("next_shift", "residual", "given_mean", "given_variance"),
)
_KEPT = ("packed", "alpha", "a", "vectors")
_RETURNED = ("z", "next_signs", "mean", "variance")
_BACKWARD = ("grad", "dx", "dweight", "sums", "dshift_in", "dresidual", "dy", "du", "dsigns")


def _of_type(kind: Any, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names]


class _Unit(ctypes.Structure):
    """``unit`` in ``csrc/unit.c``."""

    _fields_ = (
        ("g", Geometry),
        ("strides", WeightStrides),
        *_of_type(ctypes.c_int64, _NUMBERS),
        ("eps", ctypes.c_double),
        *_of_type(ctypes.c_void_p, _OPERANDS),
        ("signs", ctypes.c_void_p),
        ("signs_are_packed", ctypes.c_int64),
        *_of_type(ctypes.c_void_p, (*_KEPT, *_RETURNED, *_BACKWARD)),
        ("wants_input", ctypes.c_int64),
    )

    def point(self, **tensors: Tensor | None) -> None:
        """Point the fields of these names at tensors' data, which the caller keeps alive."""
        for name, tensor in tensors.items():
            if tensor is not None:
                setattr(self, name, library.pointer(tensor))


def takes(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether C has a unit of these operands: activations in float32 or bfloat16, else float32."""
    given = [tensor for tensor in others if tensor is not None]
    vectors = [tensor for tensor in given if tensor.dim() == 1]
    return (
        runs(x.dtype)
        and weight.dtype == torch.float32
        and all(v.dtype == torch.float32 and v.is_contiguous() for v in vectors)
        and all(tensor.is_cpu for tensor in given)
    )


def _problem(x: Tensor, weight: Tensor, residual: Tensor | None, options: Options) -> _Unit:
    out_channels, channels, kernel_size, _ = weight.shape
    size = (x.shape[0], *x.shape[2:])
    unit = _Unit()
    unit.g = geometry(size, channels, out_channels, kernel_size, options.stride, kernel_size // 2)
    unit.strides = WeightStrides(*weight.stride())
    unit.type, unit.shortcut = TYPES[x.dtype], SHORTCUTS[options.shortcut]
    stored = None if isinstance(weight, PackedWeight) else weight  # C takes its bits instead
    unit.point(x=x, weight=stored, residual=residual)
    return unit


def forward(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    shift_in: Tensor | None,
    shift_mid: Tensor | None,
    slope: Tensor | None,
    shift_out: Tensor | None,
    residual: Tensor | None,
    signs: Tensor | None,
    next_shift: Tensor | None,
    statistics: Statistics | None,
    options: Options,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Kept]:
    """A unit's forward pass; see :func:`tritonbnn.ops.binary_unit`.

    Returns:
        z, its packed signs (with no words if they are not wanted), mean and variance; and what
        backward needs.
    """
    x = channels_last(x)
    residual = None if residual is None else channels_last(residual)
    weight = weight if options.binary_weight else channels_last(weight)
    unit = _problem(x, weight, residual, options)
    out_channels, channels = weight.shape[:2]
    shape = unit.g.output_shape
    a_type = checks.sum_dtype(weight[0].numel()) if options.binary_weight else x.dtype
    packed, alpha = _weight_bits(weight) if options.binary_weight else (None, None)
    kept = Kept(
        signs=torch.empty((*x.shape[:1], *x.shape[2:], words(channels)), dtype=torch.int32)
        if signs is None
        else signs.contiguous(),
        packed=packed,
        alpha=alpha,
        a=empty_channels_last(shape, a_type, x.device) if options.plan == "keep" else None,
        vectors=torch.empty((6, out_channels)),
    )
    z = empty_channels_last(shape, x.dtype, x.device)
    width = words(out_channels) if options.pack else 0
    next_signs = torch.empty((shape[0], *shape[2:], width), dtype=torch.int32)
    mean, variance = torch.empty(out_channels), torch.empty(out_channels)
    given = (None, None) if statistics is None else statistics
    unit.a_type, unit.eps = TYPES[a_type], options.eps
    unit.signs_are_packed = signs is not None
    unit.point(
        gamma=gamma,
        beta=beta,
        shift_in=shift_in,
        shift_mid=shift_mid,
        slope=slope,
        shift_out=shift_out,
        next_shift=next_shift,
        given_mean=given[0],
        given_variance=given[1],
        z=z,
        next_signs=next_signs if options.pack else None,
        mean=mean,
        variance=variance,
        **kept._asdict(),
    )
    library.call("unit_whole_forward", unit)
    return (z, next_signs, mean, variance), kept


def _weight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Packed signs and scale of a binary weight: stored already, or memory where C puts them."""
    if isinstance(weight, PackedWeight):
        return weight.packed, weight.alpha
    filters, channels, *size = weight.shape
    packed = torch.empty((filters, *size, words(channels)), dtype=torch.int32)
    return packed, torch.empty(filters)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _as_left(kept: Kept) -> Kept:
    """In the memory in which forward left it: hooks of autograd may return it in another."""
    return kept._replace(
        signs=kept.signs.contiguous(),
        packed=_contiguous(kept.packed),
        alpha=_contiguous(kept.alpha),
        a=None if kept.a is None else channels_last(kept.a),
        vectors=kept.vectors.contiguous(),
    )


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    shift_in: Tensor | None,
    shift_mid: Tensor | None,
    slope: Tensor | None,
    residual: Tensor | None,
    kept: Kept,
    options: Options,
    *,
    wants_input: bool,
    wants_weight: bool,
) -> Gradients:
    """All gradients of a unit; those to x and shift_in, and to the weight, if they are wanted."""
    grad, x = channels_last(grad), channels_last(x)
    residual = None if residual is None else channels_last(residual)
    kept = _as_left(kept)
    vectors = {"gamma": gamma, "shift_in": shift_in, "shift_mid": shift_mid, "slope": slope}
    vectors = {name: _contiguous(vector) for name, vector in vectors.items()}
    dweight = torch.empty_like(weight) if wants_weight else None
    if kept.packed is None:
        weight = channels_last(weight)
    elif dweight is not None and dweight.stride() != weight.stride():
        weight = weight.contiguous()  # C writes one where it reads the other; this was a view
    out_channels, channels = weight.shape[:2]
    gradients = Gradients(
        x=torch.empty_like(x) if wants_input else None,
        weight=dweight,
        sums=torch.empty((4, out_channels)),
        shift_in=torch.empty(channels) if wants_input else None,
        residual=None if residual is None else torch.empty_like(residual),
    )
    unit = _problem(x, weight, residual, options)
    if dweight is not None:
        unit.strides = WeightStrides(*dweight.stride())
    a_type = x.dtype if kept.packed is None else checks.sum_dtype(weight[0].numel())
    unit.a_type, unit.wants_input = TYPES[a_type], wants_input
    unit.point(
        grad=grad,
        **vectors,
        dx=gradients.x,
        dweight=dweight,
        sums=gradients.sums,
        dshift_in=gradients.shift_in,
        dresidual=gradients.residual,
        **kept._asdict(),
    )
    if kept.packed is not None:
        library.call("unit_whole_backward", unit)
        return gradients
    dy = empty_channels_last(unit.g.output_shape, torch.float32, x.device)
    du = torch.empty_like(dy) if residual is None else None
    unit.point(dy=dy, du=du)
    library.call("unit_upper_backward", unit)
    if wants_input:  # no operand of this product is signs
        size = {"channels": channels, "height": x.shape[2], "width": x.shape[3]}
        window = {"stride": options.stride, "padding": weight.shape[2] // 2}
        dsigns = eager.conv_input_grad(dy, weight, None, **size, **window)
        unit.point(dsigns=dsigns)
    library.call("unit_lower_backward", unit)
    return gradients
