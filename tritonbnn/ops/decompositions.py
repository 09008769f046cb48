"""The operators of an exported program in torch's own, for where Python and this package are not.

They compute what the operators do, forward alone and on floats: signs are multiplied as +-1.0. That
is exact in float32 for as long as sums of signs are, which is up to 2^24 of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonbnn.layout import in_format_of
from tritonbnn.ops import exported


def decompositions() -> dict[Any, Callable[..., Any]]:
    """A table for ``ExportedProgram.run_decompositions``: after it the program needs torch alone.

    Such a program can be compiled by AOTInductor, and run from C++. It computes the forward pass,
    without packed bits, and has no pseudo-gradients.

    Example:
        >>> program = torch.export.export(model.eval(), (images,))
        >>> program = program.run_decompositions(tritonbnn.ops.decompositions())
        >>> torch._inductor.aoti_compile_and_package(program)
    """
    return {exported.OPERATORS[name]._opoverload: made for name, made in _TABLE.items()}


def _wide(x: Tensor) -> torch.dtype:
    """In which dtype the operators add up: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like.dtype).view(-1, *[1] * (like.dim() - 2))


def _signs(x: Tensor, shift: Tensor | None) -> Tensor:
    x = x.to(_wide(x))
    x = x if shift is None else x + _per_channel(shift, x)
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def _binarize(x: Tensor, shift: Tensor | None) -> Tensor:
    return _signs(x, shift).to(x.dtype)


def _rprelu(x: Tensor, shift_in: Tensor, slope: Tensor, shift_out: Tensor) -> Tensor:
    t = x.to(_wide(x))
    t = t + _per_channel(shift_in, t)
    t = torch.where(t > 0, t, t * _per_channel(slope, t))
    return (t + _per_channel(shift_out, t)).to(x.dtype)


def _weight(weight: Tensor, dtype: torch.dtype, binary: bool) -> tuple[Tensor, Tensor | None]:
    """What is convolved with, and the scale per output channel of the result."""
    weight = weight.to(dtype)
    return (_signs(weight, None), weight.abs().flatten(1).mean(1)) if binary else (weight, None)


def _conv2d(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    stride: int,
    padding: int,
    binary_weight: bool,
    may_be_binary: bool = False,
) -> Tensor:
    y = _scaled_conv2d(x, weight, shift, binary_weight, stride=stride, padding=padding)
    return in_format_of(y.to(x.dtype), x, weight)


def _conv2d_window(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    stride: list[int],
    padding: list[int],
    extra: list[int],
    dilation: list[int],
    groups: int,
    binary_weight: bool,
    may_be_binary: bool,
) -> Tensor:
    window: dict[str, Any] = {"stride": stride, "padding": padding}
    window |= {"dilation": dilation, "groups": groups}
    y = _scaled_conv2d(x, weight, shift, binary_weight, extra, **window)
    return in_format_of(y.to(x.dtype), x, weight)


def _scaled_conv2d(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    binary: bool,
    extra: Sequence[int] = (0, 0),
    **window: Any,
) -> Tensor:
    kernel, alpha = _weight(weight, _wide(x), binary)
    signs = F.pad(_signs(x, shift), (0, extra[1], 0, extra[0]))
    y = F.conv2d(signs, kernel, None, **window)
    return y if alpha is None else y * _per_channel(alpha, y)


def _linear(
    x: Tensor, weight: Tensor, shift: Tensor | None, binary_weight: bool, may_be_binary: bool
) -> Tensor:
    kernel, alpha = _weight(weight, _wide(x), binary_weight)
    y = F.linear(_signs(x, shift), kernel)
    return (y if alpha is None else y * alpha).to(x.dtype)


def _unit(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    shift_in: Tensor | None,
    shift_mid: Tensor | None,
    slope: Tensor | None,
    shift_out: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    stride: int,
    shortcut: str,
    binary_weight: bool,
    eps: float,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor]:
    padding = weight.shape[2] // 2
    y = _scaled_conv2d(x, weight, shift_in, binary_weight, stride=stride, padding=padding)
    if mean is None or variance is None:
        variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
        values = y.shape[0] * y.shape[2] * y.shape[3]
        unbiased = variance * (values / (values - 1))
    else:
        mean, variance = mean.to(y.dtype, copy=True), variance.to(y.dtype, copy=True)
        unbiased = variance
    scale = gamma.to(y.dtype) * (variance + eps).rsqrt()
    y = (y - _per_channel(mean, y)) * _per_channel(scale, y) + _per_channel(beta, y)
    z = y + _shortcut(x if residual is None else residual, shortcut).to(y.dtype)
    if shift_mid is not None and slope is not None and shift_out is not None:
        z = _rprelu(z, shift_mid, slope, shift_out)
    return in_format_of(z.to(x.dtype), x, weight), mean, unbiased


def _shortcut(x: Tensor, kind: str) -> Tensor:
    if kind == "pool":
        return F.avg_pool2d(x, 2)
    return torch.cat((x, x), dim=1) if kind == "repeat" else x


_TABLE: dict[str, Callable[..., Any]] = {
    "binarize": _binarize,
    "rprelu": _rprelu,
    "binary_conv2d": _conv2d,
    "binary_conv2d_window": _conv2d_window,
    "binary_linear": _linear,
    "binary_unit": _unit,
}
