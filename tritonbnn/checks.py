"""Argument checks that name the offending argument, what was expected and what was given."""

import torch
from torch import Tensor

from tritonbnn.bits import words

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_float(name: str, x: Tensor) -> None:
    """Raise TypeError unless ``x`` is a floating-point tensor of a supported dtype."""
    if getattr(x, "dtype", None) in FLOATS:
        return
    given = x.dtype if isinstance(x, Tensor) else type(x).__name__
    raise TypeError(
        f"{name} must be a tensor of float32, bfloat16, float16 or float64, not {given}"
    )


def check_activation(
    name: str, x: Tensor, dims: tuple[int, ...] = (2, 4), *, or_unbatched: bool = False
) -> None:
    """Raise unless ``x`` is floating point with channels in dimension 1: (N, C, H, W) or (M, C).

    ``or_unbatched`` has the message name one dimension less, which the caller takes too.
    """
    check_float(name, x)
    if x.dim() not in dims:
        expected = " or ".join(str(d) for d in ((dims[0] - 1, *dims) if or_unbatched else dims))
        raise ValueError(f"{name} must have {expected} dimensions, not shape {tuple(x.shape)}")
    if x.shape[1] < 1:
        raise ValueError(f"{name} must have at least one channel, not shape {tuple(x.shape)}")


def check_conv_weight(weight: Tensor, channels: int) -> None:
    """Raise unless ``weight`` is floating point of shape (O, channels, k, k)."""
    check_float("weight", weight)
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight must have shape (O, C, k, k), not {tuple(weight.shape)}")
    if weight.shape[1] != channels:
        raise ValueError(
            f"weight must have {channels} input channels, as x has, not {weight.shape[1]}; "
            "grouped convolution is not supported"
        )


def check_weight_dtype(x: Tensor, weight: Tensor) -> None:
    """Raise TypeError unless ``weight`` has ``x``'s dtype, or is float32 and ``x`` is narrower.

    torch's own layers refuse two dtypes too. They have no float32 weights beside a narrow input,
    because autocast casts the weight; here it is binarised from float32.
    """
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    if weight.dtype != x.dtype and not (narrow and weight.dtype == torch.float32):
        raise TypeError(
            f"x is {x.dtype} but weight is {weight.dtype}: convert one to the other's dtype"
        )


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all the given tensors are on one device."""
    devices = [x.device for x in tensors.values() if x is not None]
    if devices and devices.count(devices[0]) < len(devices):  # a set would hash each in every call
        given = (f"{name} on {x.device}" for name, x in tensors.items() if x is not None)
        raise ValueError(f"all tensors must be on one device, not {', '.join(given)}")


def check_per_channel(channels: int, **vectors: Tensor | None) -> None:
    """Raise ValueError unless each vector given has shape ``(channels,)``."""
    expected = (channels,)
    for name, vector in vectors.items():
        if vector is not None and vector.shape != expected:
            raise ValueError(
                f"{name} must have shape ({channels},), one value per channel, "
                f"not {tuple(vector.shape)}"
            )


def check_vectors(**vectors: Tensor | None) -> None:
    """Raise ValueError unless all the vectors given have one dimension, and are equally long."""
    given = {name: tuple(vector.shape) for name, vector in vectors.items() if vector is not None}
    first = next(iter(given.values()), (0,))
    if any(len(shape) != 1 or shape != first for shape in given.values()):
        shapes = ", ".join(f"{name} {shape}" for name, shape in given.items())
        raise ValueError(f"one value per channel is needed, of as many channels each, not {shapes}")


def check_same_shape(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all the given tensors have the shape of the first."""
    given = {name: tuple(x.shape) for name, x in tensors.items() if x is not None}
    if len(set(given.values())) > 1:
        shapes = ", ".join(f"{name} {shape}" for name, shape in given.items())
        raise ValueError(f"all tensors must have one shape, not {shapes}")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless ``x`` has the given shape."""
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, not {tuple(x.shape)}")


def sum_dtype(terms: int) -> torch.dtype:
    """The narrowest of the integer dtypes in use that holds a sum of so many signs."""
    return torch.int16 if terms <= torch.iinfo(torch.int16).max else torch.int32


def shortcut_input_shape(shape: tuple[int, ...], shortcut: str) -> tuple[int, ...]:
    """The shape that a unit's shortcut starts from, given that of its output, (N, O, H', W').

    Args:
        shape: of the output; of any number of dimensions for "identity".
        shortcut: "identity", "pool" (2x2 average) or "repeat" (the channels twice).
    """
    if shortcut == "identity":
        return tuple(shape)
    n, channels, height, width = shape
    if shortcut == "repeat":
        return n, channels // 2, height, width
    return n, channels, 2 * height, 2 * width


def check_packed(name: str, packed: Tensor, channels: int) -> None:
    """Raise unless ``packed`` is int32 with the words of ``channels`` signs innermost."""
    if packed.dtype != torch.int32:
        raise TypeError(f"{name} must be packed signs in int32, not {packed.dtype}")
    if channels < 1:
        raise ValueError(f"{name}: the number of channels must be at least 1, not {channels}")
    if packed.shape[-1] != words(channels):
        raise ValueError(
            f"{name} must hold {words(channels)} words for {channels} channels in its last "
            f"dimension, not {packed.shape[-1]}"
        )


def conv_output_size(
    height: int, width: int, kernel_size: int, stride: int, padding: int
) -> tuple[int, int]:
    """Output height and width of a convolution, after checking that its geometry is supported.

    Supported: 3x3 and 1x1 kernels, stride 1 or 2, padding ``kernel_size // 2``, no dilation, no
    groups, images of one pixel at least.
    """
    if kernel_size not in (1, 3):
        raise ValueError(f"kernel_size must be 1 or 3, not {kernel_size}")
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, not {stride}")
    if padding != kernel_size // 2:
        raise ValueError(
            f"padding must be {kernel_size // 2} for kernel_size {kernel_size}, not {padding}"
        )
    if height < 1 or width < 1:
        raise ValueError(f"an image must have height and width, not {height} x {width}")
    reach = kernel_size - 2 * padding
    return (height - reach) // stride + 1, (width - reach) // stride + 1
