"""A binary convolution that stands alone, in one C call a direction."""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from tritonbnn.bits import words
from tritonbnn.layout import channels_last, empty_channels_last
from tritonbnn.native import library
from tritonbnn.native.conv import Geometry, WeightStrides, geometry
from tritonbnn.native.library import pointer
from tritonbnn.native.pack import empty_words, weight_bits
from tritonbnn.packed import PackedWeight

_POINTERS = (
    *("x", "shift", "weight", "signs", "packed", "alpha", "y"),
    *("grad", "dweight", "dx", "dshift"),
)


class _Layer(ctypes.Structure):
    """``layer`` in ``csrc/layer.c``."""

    _fields_ = (
        ("g", Geometry),
        ("strides", WeightStrides),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("may_be_binary", ctypes.c_int64),
    )


class Gradients(NamedTuple):
    """The gradients to a layer's operands, None where they are not wanted."""

    x: Tensor | None
    weight: Tensor | None
    shift: Tensor | None


def takes(x: Tensor, weight: Tensor, shift: Tensor | None) -> bool:
    """Whether C has a layer of these operands: float32, with 1-bit weights."""
    operands = (x, weight) if shift is None else (x, weight, shift)
    return all(t.dtype == torch.float32 and t.is_cpu for t in operands)


def _layer(
    x: Tensor, weight: Tensor, strides: Tensor, stride: int, padding: int, **pointers: Tensor | None
) -> _Layer:
    """A layer of C that points at tensors, which the caller keeps alive."""
    images, channels, height, width = x.shape
    out_channels, _, kernel_size, _ = weight.shape
    window = (kernel_size, stride, padding)
    return _Layer(
        g=geometry((images, height, width), channels, out_channels, *window),
        strides=WeightStrides(*strides.stride()),
        x=pointer(x),
        # C takes a packed weight's bits instead
        weight=None if isinstance(weight, PackedWeight) else pointer(weight),
        **{name: pointer(tensor) for name, tensor in pointers.items()},
    )


def forward(
    x: Tensor, weight: Tensor, shift: Tensor | None, *, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A layer's forward pass; see :func:`tritonbnn.ops.binary_conv2d`.

    Returns:
        y, the packed signs of x + shift and of the weight, and the weight's scale.
    """
    x, shift = channels_last(x), None if shift is None else shift.contiguous()
    images, channels, height, width = x.shape
    signs = empty_words(images, height, width, words(channels))
    packed, alpha = (bits.contiguous() for bits in weight_bits(weight))
    others = {"shift": shift, "signs": signs, "packed": packed, "alpha": alpha}
    layer = _layer(x, weight, weight, stride, padding, **others)
    y = empty_channels_last(layer.g.output_shape, torch.float32, x.device)
    layer.y = pointer(y)
    library.call("layer_forward", layer)
    return y, signs, packed, alpha


def backward(
    grad: Tensor,
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    signs: Tensor,
    packed: Tensor,
    alpha: Tensor,
    *,
    stride: int,
    padding: int,
    may_be_binary: bool,
    wants_input: bool,
    wants_weight: bool,
) -> Gradients:
    """All gradients of a layer; those to x and shift, and to the weight, if they are wanted."""
    grad, x = channels_last(grad), channels_last(x)
    dweight = torch.empty_like(weight) if wants_weight else None
    if dweight is not None and dweight.stride() != weight.stride():
        weight = weight.contiguous()  # C writes one where it reads the other; this was a view
    gradients = Gradients(
        x=torch.empty_like(x) if wants_input else None,
        weight=dweight,
        shift=torch.empty(x.shape[1]) if wants_input else None,
    )
    kept = {
        "signs": signs.contiguous(),  # hooks of autograd may have moved them
        "packed": packed.contiguous(),
        "alpha": alpha.contiguous(),
        "shift": None if shift is None else shift.contiguous(),
    }
    others = {f"d{name}": gradient for name, gradient in gradients._asdict().items()}
    strides = weight if dweight is None else dweight
    layer = _layer(x, weight, strides, stride, padding, grad=grad, **kept, **others)
    layer.may_be_binary = may_be_binary
    library.call("layer_backward", layer)
    return gradients
