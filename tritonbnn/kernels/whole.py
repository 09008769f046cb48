"""A whole unit as a row of kernels: the twin of :mod:`tritonbnn.ops.composed`, with fewer launches.

Between launchers that torch sees as operators, what is computed per channel or per weight is some
sixty launches of torch's. Here operands are prepared once a step, and partial sums go from kernel
to kernel as they are.
"""

import torch
from torch import Tensor

from tritonbnn import checks
from tritonbnn.contract import Averages, Gradients, Kept, Options, Statistics
from tritonbnn.kernels.conv import conv_real, convolved, product_choice
from tritonbnn.kernels.conv_grad import stream_grad, weight_grad
from tritonbnn.kernels.conv_unit import on_one_bit_core
from tritonbnn.kernels.geometry import Geometry, checked_geometry
from tritonbnn.kernels.launch import KERNEL_DTYPES, check_kernel_dtype
from tritonbnn.kernels.pack import pack_signs
from tritonbnn.kernels.unit import contiguous, epilogue, moment_sums
from tritonbnn.kernels.unit_grad import activation_backward, norm_backward
from tritonbnn.kernels.unit_norm import batch_norm, given_norm, norm_grads
from tritonbnn.kernels.weight import Numbers, expand, prepare, scaled
from tritonbnn.layout import channels_last, flat_pixels
from tritonbnn.packed import PackedWeight

SHARES_STATISTICS = True
"""Whether a unit's statistics may be those of several processes."""

NUMBERS = "int8"
"""The formulation that multiplies a weight as numbers."""


def takes(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels have a unit of these operands: none of them is float64."""
    tensors = (x, weight, *others)
    return all(tensor is None or tensor.dtype in KERNEL_DTYPES for tensor in tensors)


def moves(averages: Averages, channels: int, device: torch.device) -> bool:
    """Whether :func:`forward` can move running averages: those of every ordinary BatchNorm."""
    if averages.momentum is None:
        return False
    vectors = (averages.mean, averages.variance)
    ordinary = all(
        v is not None and v.shape == (channels,) and v.dtype == torch.float32 and v.is_contiguous()
        for v in vectors
    )
    tensors = [tensor for tensor in (*vectors, averages.counter) if tensor is not None]
    return ordinary and all(tensor.device == device for tensor in tensors)


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
    check_kernel_dtype("x", x.dtype)
    x = channels_last(x)
    signs = pack_signs(x, shift_in) if signs is None else signs.contiguous()
    geometry = _geometry(signs, weight, options)
    gamma, beta = gamma.contiguous(), beta.contiguous()
    shift_mid, slope, shift_out, next_shift = contiguous(shift_mid, slope, shift_out, next_shift)
    stream = x if residual is None else channels_last(residual)
    shortcut, pack = options.shortcut, options.pack
    packed = alpha = numbers = kept_a = None
    if options.binary_weight and options.plan == "fused" and on_one_bit_core(geometry, x):
        from tritonbnn.kernels.mma_unit import moments_mma, product_of, unit_mma  # it needs Gluon

        packed, alpha, _ = _prepared(weight, numbers=False)
        product = product_of(signs, packed, geometry)
        sums = None if statistics is not None else moments_mma(product, geometry)
        vectors, found = _norm(sums, None, geometry, alpha, gamma, beta, statistics, options)
        centre, scale, offset = _affine(vectors)
        named = {"mean": centre, "scale": scale, "offset": offset, "shift_mid": shift_mid}
        named |= {"slope": slope, "shift_out": shift_out, "next_shift": next_shift}
        z, next_signs = unit_mma(product, stream, named, geometry, shortcut=shortcut, pack=pack)
    else:
        if options.binary_weight:
            choice = product_choice(geometry, x.device)
            packed, alpha, numbers = _prepared(weight, numbers=choice.formulation == NUMBERS)
        a = _convolution(signs, weight, packed, numbers, geometry, x.dtype)
        sums = pivot = None
        if statistics is None:
            sums = moment_sums(a)
            pivot = flat_pixels(a)[0] if a.is_floating_point() and a.numel() else None
        vectors, found = _norm(sums, pivot, geometry, alpha, gamma, beta, statistics, options)
        norm, after = _affine(vectors), (shift_mid, slope, shift_out)
        z, next_signs = epilogue(a, stream, norm, after, next_shift, shortcut, pack=pack)
        kept_a = a if options.plan == "keep" else None
    kept = Kept(signs, packed, alpha, kept_a, vectors)
    mean, variance = found.unbind(0)
    return (z, next_signs, mean, variance), kept


def _prepared(weight: Tensor, *, numbers: bool) -> tuple[Tensor, Tensor, Numbers | None]:
    """A binary weight's packed signs, its scale, and if wanted its signs as numbers."""
    if isinstance(weight, PackedWeight):
        packed = weight.packed.contiguous()
        return packed, weight.alpha, expand(packed, weight.shape[1]) if numbers else None
    return prepare(weight, numbers=numbers)


def _geometry(signs: Tensor, weight: Tensor, options: Options) -> Geometry:
    out_channels, channels, kernel_size, _ = weight.shape
    window = (kernel_size, options.stride, kernel_size // 2)
    return checked_geometry(signs, channels, out_channels, *window)


def _convolution(
    signs: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    numbers: Numbers | None,
    geometry: Geometry,
    dtype: torch.dtype,
) -> Tensor:
    """Before its scale: integers, or for a real weight ``dtype``."""
    if packed is None:
        window = {"stride": geometry.stride, "padding": geometry.padding}
        return channels_last(conv_real(signs, weight, dtype=dtype, **window))
    integer = checks.sum_dtype(geometry.channels * geometry.kernel_size**2)
    choice = product_choice(geometry, signs.device)
    return convolved(signs, packed, numbers, None, geometry, choice, integer)


def _norm(
    sums: Tensor | None,
    pivot: Tensor | None,
    geometry: Geometry,
    alpha: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    statistics: Statistics | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """BatchNorm by given statistics, or else by those of the sums."""
    if statistics is not None:
        given = Statistics(*(each.contiguous() for each in statistics))
        return given_norm(given, alpha, gamma, beta, options.eps)
    assert sums is not None
    return batch_norm(sums, pivot, geometry.pixels, alpha, gamma, beta, options)


def _affine(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the passes over images apply: centre, scale and offset."""
    centre, scale, offset, *_ = vectors.unbind(0)
    return centre, scale, offset


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
    x, grad, signs = channels_last(x), channels_last(grad), kept.signs.contiguous()
    geometry = _geometry(signs, weight, options)
    if kept.a is None:
        a = _convolution(signs, weight, kept.packed, None, geometry, x.dtype)
    else:
        a = channels_last(kept.a)  # hooks of autograd may return it in another memory
    stream = x if residual is None else channels_last(residual)
    shift_in, *activation = contiguous(shift_in, shift_mid, slope)
    vectors = kept.vectors.contiguous()
    norm = _affine(vectors)
    du, sums = activation_backward(grad, a, stream, norm, tuple(activation), options.shortcut)
    grads, coefficients = norm_grads(sums, vectors, kept.alpha, gamma.contiguous(), options.group)
    du_scale, a_scale, constant = coefficients.unbind(0)
    dy = norm_backward(du, a, du_scale, a_scale, constant)
    del a
    dx = dweight = dshift_in = None
    if wants_input:
        real = _real_weight(weight, kept, dy.dtype)
        skipped = du if residual is None else None
        dx, shares = stream_grad(dy, real, geometry, x, shift_in, skipped, options.shortcut)
        dshift_in = None if shift_in is None else shares.view(-1, shares.shape[-1]).sum(0)
        del real
    if wants_weight:  # after the expanded weight is gone, which may be as large
        signed = isinstance(weight, PackedWeight)  # of +1 and -1, none of which is above 1
        clip = weight if options.binary_weight and not signed else None
        dweight = weight_grad(dy, signs, geometry, clip=clip)
    dgamma, dbeta, dshift_mid, dslope, dshift_out = grads.unbind(0)
    return Gradients(
        x=dx,
        weight=dweight,
        gamma=dgamma,
        beta=dbeta,
        shift_in=dshift_in,
        shift_mid=None if slope is None else dshift_mid,
        slope=None if slope is None else dslope,
        shift_out=None if slope is None else dshift_out,
        residual=None if residual is None else du,
    )


def _real_weight(weight: Tensor, kept: Kept, dtype: torch.dtype) -> Tensor:
    """As numbers, (O, C, kh, kw) in ``dtype`` and channels_last memory."""
    if kept.packed is None or kept.alpha is None:
        return channels_last(weight.to(dtype))
    return scaled(kept.packed, kept.alpha, weight.shape[1], dtype)
