"""The operator that stands for a unit in an exported program."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonbnn.contract import Options, Statistics
from tritonbnn.eager.common import accumulator
from tritonbnn.layout import in_format_of
from tritonbnn.ops import composed, exported, library
from tritonbnn.ops.plain import per_channel, scaled_conv2d
from tritonbnn.ops.rprelu import plain_rprelu
from tritonbnn.ops.unit import _BinaryUnit

_TENSORS = 11
"""Arguments of the operator, before those that a unit's options begin with."""


def _compute(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *operands, mean, variance = arguments[:_TENSORS]
    given = None if mean is None or variance is None else Statistics(mean, variance)
    stride, shortcut, binary_weight, eps, plan = arguments[_TENSORS:]
    options = Options(stride, shortcut, binary_weight, eps, plan, group=None, pack=False)
    z, _, *statistics = _BinaryUnit.apply(*operands, None, None, given, options)
    return z, statistics[0], statistics[1]


def _fake(x: Tensor, weight: Tensor, *operands: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    stride: Any = operands[9]
    size = composed.output_size(x, weight, stride)
    z = exported.image_like(x, weight, size)
    dtype = accumulator(x.dtype)
    mean, variance = (z.new_empty(weight.shape[0], dtype=dtype) for _ in range(2))
    return z, mean, variance


def _plain(
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
    y = scaled_conv2d(x, weight, shift_in, binary_weight, stride=stride, padding=padding)
    if mean is None or variance is None:
        variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
        values = y.shape[0] * y.shape[2] * y.shape[3]
        unbiased = variance * (values / (values - 1))
    else:
        mean, variance = mean.to(y.dtype, copy=True), variance.to(y.dtype, copy=True)
        unbiased = variance
    scale = gamma.to(y.dtype) * (variance + eps).rsqrt()
    y = (y - per_channel(mean, y)) * per_channel(scale, y) + per_channel(beta, y)
    z = y + _shortcut(x if residual is None else residual, shortcut).to(y.dtype)
    if shift_mid is not None and slope is not None and shift_out is not None:
        z = plain_rprelu(z, shift_mid, slope, shift_out)
    return in_format_of(z.to(x.dtype), x, weight), mean, unbiased


def _shortcut(x: Tensor, kind: str) -> Tensor:
    if kind == "pool":
        return F.avg_pool2d(x, 2)
    return torch.cat((x, x), dim=1) if kind == "repeat" else x


_operator = exported.register(
    "binary_unit",
    "Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor? shift_in, Tensor? shift_mid, "
    "Tensor? slope, Tensor? shift_out, Tensor? residual, Tensor? mean, Tensor? variance, "
    "int stride, str shortcut, bool binary_weight, float eps, str plan",
    _compute,
    _fake,
    _plain,
    outputs=3,
    constants=(9, 10),
)


def _exported(
    *operands: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, _, next_shift, given, options = operands
    if options.group is not None:
        raise ValueError(
            "a unit whose batch statistics several processes share cannot be exported: "
            "export it in eval mode, or before the process group is made"
        )
    fields = (options.stride, options.shortcut, options.binary_weight, options.eps, options.plan)
    z, mean, variance = _operator(*tensors, *(given or (None, None)), *fields)
    if options.pack:
        signs = library.pack_signs(z.detach(), next_shift)
    else:
        signs = z.new_empty((z.shape[0], *z.shape[2:], 0), dtype=torch.int32)
    return z, signs, mean.detach(), variance.detach()


exported.replace(_BinaryUnit, "binary_unit", _exported)
