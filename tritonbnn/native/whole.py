"""A whole unit in one C call a direction: small networks lose more by calls than by products."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from tritonbnn import checks, eager
from tritonbnn.bits import words
from tritonbnn.contract import Averages, Gradients, Kept, Options, Statistics
from tritonbnn.layout import channels_last, empty_channels_last
from tritonbnn.native import library
from tritonbnn.native.common import SHORTCUTS, TYPES, runs
from tritonbnn.native.conv import Geometry, WeightStrides, geometry
from tritonbnn.native.library import pointer
from tritonbnn.native.pack import empty_words, weight_bits
from tritonbnn.packed import PackedWeight

SHARES_STATISTICS = False
"""Whether a unit's statistics may be those of several processes: they meet between two calls."""

_NUMBERS = ("type", "a_type", "shortcut")
_OPERANDS = (
    *("x", "weight", "gamma", "beta", "shift_in", "shift_mid", "slope", "shift_out"),
    *("next_shift", "residual", "given_mean", "given_variance"),
)
_KEPT = ("packed", "alpha", "a", "vectors")
_RETURNED = ("z", "next_signs", "mean", "variance")
_BACKWARD = (
    *("grad", "dx", "dweight", "dgamma", "dbeta", "dshift_in"),
    *("dshift_mid", "dslope", "dshift_out", "dresidual", "dy", "du", "dsigns"),
)


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


def takes(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether C has a unit of these operands: activations in float32 or bfloat16, else float32."""
    if not runs(x.dtype) or weight.dtype != torch.float32:
        return False
    for tensor in others:
        if tensor is None:
            continue
        is_vector = tensor.dim() == 1
        if is_vector and not (tensor.dtype == torch.float32 and tensor.is_contiguous()):
            return False
        if not tensor.is_cpu:
            return False
    return True


def moves(averages: Averages, channels: int, device: torch.device) -> bool:
    """Whether :func:`forward` can move running averages."""
    return False


def _problem(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    options: Options,
    others: dict[str, Tensor | None],
) -> _Unit:
    """A unit of C that points at tensors, which the caller keeps alive."""
    out_channels, channels, kernel_size, _ = weight.shape
    images, _, height, width = x.shape
    window = (kernel_size, options.stride, kernel_size // 2)
    terms = channels * kernel_size * kernel_size
    a_type = checks.sum_dtype(terms) if options.binary_weight else x.dtype
    return _Unit(
        g=geometry((images, height, width), channels, out_channels, *window),
        strides=WeightStrides(*weight.stride()),
        type=TYPES[x.dtype],
        a_type=TYPES[a_type],
        shortcut=SHORTCUTS[options.shortcut],
        eps=options.eps,
        x=pointer(x),
        # C takes a packed weight's bits instead
        weight=None if isinstance(weight, PackedWeight) else pointer(weight),
        residual=pointer(residual),
        **{name: pointer(tensor) for name, tensor in others.items()},
    )


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
    binary, keeps = options.binary_weight, options.plan == "keep"
    weight = weight if binary else channels_last(weight)
    images, channels, height, width = x.shape
    out_channels, _, kernel_size, _ = weight.shape
    out_height, out_width = checks.conv_output_size(
        height, width, kernel_size, options.stride, kernel_size // 2
    )
    shape = (images, out_channels, out_height, out_width)
    a_type = checks.sum_dtype(weight.shape[1:].numel()) if binary else x.dtype
    packed, alpha = weight_bits(weight) if binary else (None, None)
    kept = Kept(
        signs=empty_words(images, height, width, words(channels))
        if signs is None
        else signs.contiguous(),
        packed=packed,
        alpha=alpha,
        a=empty_channels_last(shape, a_type, x.device) if keeps else None,
        vectors=torch.empty((6, out_channels)),
    )
    z = empty_channels_last(shape, x.dtype, x.device)
    next_signs = empty_words(images, out_height, out_width, words(out_channels) * options.pack)
    mean, variance = torch.empty(out_channels), torch.empty(out_channels)
    given_mean, given_variance = (None, None) if statistics is None else statistics
    others = {
        "gamma": gamma,
        "beta": beta,
        "shift_in": shift_in,
        "shift_mid": shift_mid,
        "slope": slope,
        "shift_out": shift_out,
        "next_shift": next_shift,
        "given_mean": given_mean,
        "given_variance": given_variance,
        "z": z,
        "next_signs": next_signs if options.pack else None,
        "mean": mean,
        "variance": variance,
        **kept._asdict(),
    }
    unit = _problem(x, weight, residual, options, others)
    unit.signs_are_packed = signs is not None
    library.call("unit_whole_forward", unit)
    return (z, next_signs, mean, variance), kept


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _as_left(kept: Kept) -> Kept:
    """In the memory in which forward left it: hooks of autograd may return it in another."""
    return Kept(
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
    dweight = torch.empty_like(weight) if wants_weight else None
    if kept.packed is None:
        weight = channels_last(weight)
    elif dweight is not None and dweight.stride() != weight.stride():
        weight = weight.contiguous()  # C writes one where it reads the other; this was a view
    out_channels, channels = weight.shape[:2]
    gradients = Gradients(
        x=torch.empty_like(x) if wants_input else None,
        weight=dweight,
        gamma=torch.empty(out_channels),
        beta=torch.empty(out_channels),
        shift_in=torch.empty(channels) if wants_input else None,
        shift_mid=None if slope is None else torch.empty(out_channels),
        slope=None if slope is None else torch.empty(out_channels),
        shift_out=None if slope is None else torch.empty(out_channels),
        residual=None if residual is None else torch.empty_like(residual),
    )
    dy = du = None
    if not options.binary_weight:
        dy = torch.empty_like(grad, dtype=torch.float32)
        du = torch.empty_like(dy) if residual is None else None
    vectors = {"gamma": gamma, "shift_in": shift_in, "shift_mid": shift_mid, "slope": slope}
    vectors = {name: _contiguous(vector) for name, vector in vectors.items()}
    others = {f"d{name}": gradient for name, gradient in gradients._asdict().items()}
    others |= {"grad": grad, "dy": dy, "du": du, **vectors, **kept._asdict()}
    unit = _problem(x, weight, residual, options, others)
    unit.wants_input = wants_input
    if dweight is not None:
        unit.strides = WeightStrides(*dweight.stride())
    if dy is None:
        library.call("unit_whole_backward", unit)
        return gradients
    library.call("unit_upper_backward", unit)
    if wants_input:  # no operand of this product is signs
        size = {"channels": channels, "height": x.shape[2], "width": x.shape[3]}
        window = {"stride": options.stride, "padding": weight.shape[2] // 2}
        dsigns = eager.conv_input_grad(dy, weight, None, **size, **window)
        unit.dsigns = pointer(dsigns)
    library.call("unit_lower_backward", unit)
    return gradients
