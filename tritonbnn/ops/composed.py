"""The half-block as a row of launchers, each of which torch can see as an operator."""

from math import prod

import torch
from torch import Tensor

from tritonbnn import checks
from tritonbnn.contract import Gradients, Kept, Options, Statistics
from tritonbnn.eager.common import accumulator
from tritonbnn.ops import library
from tritonbnn.ops.binarize import sign_backward
from tritonbnn.ops.norm import Affine, batch_affine, norm_grads, running_affine
from tritonbnn.ops.signs import clipped_weight_grad


def _convolve(
    signs: Tensor, weight: Tensor, packed: Tensor | None, stride: int, dtype: torch.dtype
) -> Tensor:
    """The convolution before its scale: integers, or for a real weight ``dtype``."""
    if packed is None:
        padding = weight.shape[2] // 2
        return library.conv_real(signs, weight, dtype=dtype, stride=stride, padding=padding)
    integer = checks.sum_dtype(weight[0].numel())
    return library.conv_packed(signs, packed, None, dtype=integer, **_window(weight, stride))


def _window(weight: Tensor, stride: int) -> dict[str, int]:
    return {"channels": weight.shape[1], "stride": stride, "padding": weight.shape[2] // 2}


def output_size(x: Tensor, weight: Tensor, stride: int) -> tuple[int, int]:
    """Height and width of a unit's output."""
    size = weight.shape[2]
    return checks.conv_output_size(x.shape[2], x.shape[3], size, stride, size // 2)


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
    if signs is None:
        signs = library.pack_signs(x, shift_in)
    packed, alpha = library.signs_and_scale(weight) if options.binary_weight else (None, None)
    window = _window(weight, options.stride)
    fused = options.plan == "fused" and packed is not None
    a = None if fused else _convolve(signs, weight, packed, options.stride, x.dtype)
    if statistics is None:
        if fused:
            moments = library.conv_moments(signs, packed, **window)
        else:
            moments = library.channel_moments(a)
        values = x.shape[0] * prod(output_size(x, weight, options.stride))
        norm = (alpha, gamma, beta, options.eps, options.group)
        affine, statistics = batch_affine(moments, values, *norm)
    else:
        affine = running_affine(*statistics, alpha, gamma, beta, options.eps)
    dtype = accumulator(x.dtype)
    affine = affine.to(dtype)
    epilogue = (
        x if residual is None else residual,
        *(affine.centre, affine.scale, affine.offset),
        *(shift_mid, slope, shift_out, next_shift),
    )
    kinds = {"shortcut": options.shortcut, "pack": options.pack}
    if fused:
        z, next_signs = library.conv_unit_forward(signs, packed, *epilogue, **window, **kinds)
    else:
        z, next_signs = library.unit_forward(a, *epilogue, **kinds)
    mean, variance = (s.to(dtype, copy=True) for s in statistics)
    kept = Kept(signs, packed, alpha, a if options.plan == "keep" else None, torch.stack(affine))
    return (z, next_signs, mean, variance), kept


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
    affine, a = Affine(*kept.vectors), kept.a
    if a is None:
        a = _convolve(kept.signs, weight, kept.packed, options.stride, x.dtype)
    du, sums = library.unit_activation_backward(
        grad,
        a,
        x if residual is None else residual,
        *(affine.centre, affine.scale, affine.offset),
        *(shift_mid, slope),
        shortcut=options.shortcut,
    )
    du_sum, du_a_sum, dslope, dshift_out = sums
    dgamma, coefficients = norm_grads(affine, kept.alpha, gamma, du_sum, du_a_sum, options.group)
    dy = library.unit_norm_backward(du, a, *coefficients)
    del a
    dx = dweight = dshift_in = dsigns = None
    if wants_input:
        dsigns = _signs_grad(dy, x, weight, kept.packed, kept.alpha, options)
    if wants_weight:  # after the expanded weight is gone, which may be as large
        dweight = _weight_grad(dy, kept.signs, weight, options)
    del dy
    if dsigns is not None:
        skipped = du if residual is None else None
        dx, dshift_in = sign_backward(dsigns, x, shift_in, skipped, shortcut=options.shortcut)
    return Gradients(
        x=dx,
        weight=dweight,
        gamma=dgamma,
        beta=du_sum,
        shift_in=dshift_in,
        shift_mid=None if slope is None else du_sum.clone(),
        slope=None if slope is None else dslope,
        shift_out=None if slope is None else dshift_out,
        residual=None if residual is None else du,
    )


def _weight_grad(dy: Tensor, signs: Tensor, weight: Tensor, options: Options) -> Tensor:
    channels, kernel_size = weight.shape[1], weight.shape[2]
    grad = library.conv_weight_grad(
        dy,
        signs,
        channels=channels,
        kernel_size=kernel_size,
        stride=options.stride,
        padding=kernel_size // 2,
    )
    return clipped_weight_grad(grad, weight) if options.binary_weight else grad


def _signs_grad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    alpha: Tensor | None,
    options: Options,
) -> Tensor:
    _, channels, height, width = x.shape
    return library.conv_input_grad(
        dy,
        weight if packed is None else packed,
        alpha,
        channels=channels,
        height=height,
        width=width,
        stride=options.stride,
        padding=weight.shape[2] // 2,
    )
