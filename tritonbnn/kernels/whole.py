"""A whole unit as a row of kernels: the twin of :mod:`tritonbnn.ops.composed`, with fewer launches.

Between launchers that torch sees as operators, what is computed per channel or per weight is some
sixty launches of torch's. Here operands are prepared once a step, and partial sums go from kernel
to kernel as they are.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonbnn import checks
from tritonbnn.contract import Averages, Gradients, Kept, Options, Statistics
from tritonbnn.kernels.below_triton import on_one_bit_core
from tritonbnn.kernels.binarize import Skipped
from tritonbnn.kernels.conv import convolved, product_choice, real_convolved
from tritonbnn.kernels.geometry import Geometry, checked_geometry
from tritonbnn.kernels.input_grad import Binary, reads_signs, stream_grad
from tritonbnn.kernels.launch import KERNEL_DTYPES, check_kernel_dtype
from tritonbnn.kernels.pack import pack_signs
from tritonbnn.kernels.unit import Vectors, contiguous, epilogue, moment_sums
from tritonbnn.kernels.unit_grad import activation_backward, norm_backward
from tritonbnn.kernels.unit_norm import batch_norm, given_norm, norm_grads
from tritonbnn.kernels.weight import Numbers, expand, fragments_of, prepare, scaled
from tritonbnn.kernels.weight_grad import weight_grad
from tritonbnn.layout import channels_last, flat_pixels
from tritonbnn.packed import PackedWeight

SHARES_STATISTICS = True
"""Whether a unit's statistics may be those of several processes."""

NUMBERS = "int8"
"""The formulation that multiplies a weight as numbers."""


def takes(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels have a unit of these operands: none of them is float64."""
    dtypes = [tensor.dtype for tensor in (x, weight, *others) if tensor is not None]
    return all(map(KERNEL_DTYPES.__contains__, dtypes))


def moves(averages: Averages, channels: int, device: torch.device) -> bool:
    """Whether :func:`forward` can move running averages: those of every ordinary BatchNorm."""
    mean, variance, counter, momentum = averages
    return (
        momentum is not None
        and _is_ordinary(mean, channels, device)
        and _is_ordinary(variance, channels, device)
        and (counter is None or counter.device == device)
    )


def _is_ordinary(average: Tensor | None, channels: int, device: torch.device) -> bool:
    return (
        average is not None
        and average.shape == (channels,)
        and average.dtype == torch.float32
        and average.is_contiguous()
        and average.device == device
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
    check_kernel_dtype("x", x.dtype)
    x = channels_last(x)
    signs = pack_signs(x, shift_in) if signs is None else signs.contiguous()
    geometry = _geometry(signs, weight, options)
    gamma, beta = gamma.contiguous(), beta.contiguous()
    shift_mid, slope, shift_out, next_shift = contiguous(shift_mid, slope, shift_out, next_shift)
    stream = x if residual is None else channels_last(residual)
    shortcut, pack = options.shortcut, options.pack
    packed = alpha = numbers = kept_a = None
    if _in_one(options, geometry, x.device):
        from tritonbnn.kernels.mma_unit import (  # it needs Gluon
            moments_blocks,
            moments_mma,
            product_of,
            unit_blocks,
            unit_mma,
        )

        blocks = unit_blocks(geometry)
        packed, alpha, fragments = _prepared(weight, cut=blocks.cut)
        sums = None
        if statistics is None:
            product = product_of(signs, fragments, moments_blocks(geometry))
            sums = Sums(moments_mma(product, geometry))
        vectors, found = _norm(sums, geometry, alpha, gamma, beta, statistics, options)
        product = product_of(signs, fragments, blocks)
        passed = (stream, vectors, (shift_mid, slope, shift_out), next_shift)
        z, next_signs = unit_mma(product, *passed, geometry, shortcut=shortcut, pack=pack)
    else:
        if options.binary_weight:
            choice = product_choice(geometry, x.device)
            packed, alpha, numbers = _prepared(weight, numbers=choice.formulation == NUMBERS)
        operands = (signs, weight, packed, numbers, geometry, x.dtype)
        a, sums = _convolution(*operands, summed=statistics is None)
        vectors, found = _norm(sums, geometry, alpha, gamma, beta, statistics, options)
        norm, after = _affine(vectors), (shift_mid, slope, shift_out)
        z, next_signs = epilogue(a, stream, norm, after, next_shift, shortcut, pack=pack)
        kept_a = a if options.plan == "keep" else None
    kept = Kept(signs, packed, alpha, kept_a, vectors)
    mean, variance = found.unbind(0)
    return (z, next_signs, mean, variance), kept


def _in_one(options: Options, geometry: Geometry, device: torch.device) -> bool:
    """Whether the convolution is done within the passes around it, on the one-bit core."""
    return options.binary_weight and options.plan == "fused" and on_one_bit_core(geometry, device)


def _prepared(weight: Tensor, **form: Any) -> tuple[Tensor, Tensor, Any]:
    """A binary weight's packed signs, its scale, and a form as :func:`prepare` takes it."""
    if not isinstance(weight, PackedWeight):
        return prepare(weight, **form)
    packed, channels = weight.packed.contiguous(), weight.shape[1]
    if form.get("numbers"):
        return packed, weight.alpha, expand(packed, channels)
    cut = form.get("cut")
    return packed, weight.alpha, None if cut is None else fragments_of(packed, channels, cut)


def _geometry(signs: Tensor, weight: Tensor, options: Options) -> Geometry:
    out_channels, channels, kernel_size, _ = weight.shape
    window = (kernel_size, options.stride, kernel_size // 2)
    return checked_geometry(signs, channels, out_channels, *window)


class Sums(NamedTuple):
    """What passes leave of a convolution for its moments, as :func:`batch_norm` takes it.

    Attributes:
        shares: (parts, 2, O).
        pivot: (O,), or None.
        rows: of a part, or 0.
    """

    shares: Tensor
    pivot: Tensor | None = None
    rows: int = 0


def _convolution(
    signs: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    numbers: Numbers | None,
    geometry: Geometry,
    dtype: torch.dtype,
    *,
    summed: bool = False,
) -> tuple[Tensor, Sums | None]:
    """Before its scale, integers or for a real weight ``dtype``; and its sums if wanted."""
    if packed is None:
        a, moments = real_convolved(signs, weight, geometry, dtype, summed=summed)
        if moments is not None:
            return a, Sums(moments.sums, rows=moments.rows)
    else:
        integer = checks.sum_dtype(geometry.channels * geometry.kernel_size**2)
        choice = product_choice(geometry, signs.device)
        a = convolved(signs, packed, numbers, None, geometry, choice, integer)
    if not summed:
        return a, None
    pivot = flat_pixels(a)[0] if a.is_floating_point() and a.numel() else None
    return a, Sums(moment_sums(a), pivot)


def _norm(
    sums: Sums | None,
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
    operands = (sums.shares, sums.pivot, geometry.pixels, alpha, gamma, beta, options)
    return batch_norm(*operands, rows=sums.rows)


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
    stream = x if residual is None else channels_last(residual)
    shift_in, *activation = contiguous(shift_in, shift_mid, slope)
    past = (grad, stream, tuple(activation), gamma.contiguous(), kept, options)
    factor: Tensor | Binary | None = None
    # behind a pool four pixels would each compute it again, to save a quarter of the bytes
    stored = residual is not None or options.shortcut == "pool"
    if _in_one(options, geometry, x.device):
        passed = _through_product(
            signs, weight, *past, geometry, stored=stored, wants_input=wants_input
        )
        skipped, dy, grads, factor = passed
    else:
        a = _kept(kept, signs, weight, geometry, x.dtype)
        skipped, dy, grads = _through_norm(a, *past, stored=stored)
        del a
    dx = dweight = dshift_in = None
    if wants_input:
        factor = _factor(weight, kept, dy.dtype) if factor is None else factor
        added = skipped if residual is None else None
        dx, shares = stream_grad(dy, factor, geometry, x, shift_in, added, options.shortcut)
        dshift_in = None if shift_in is None else shares.flatten(0, -2).sum(0)
    del factor
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
        residual=None if residual is None else skipped.grad,
    )


def _kept(
    kept: Kept, signs: Tensor, weight: Tensor, geometry: Geometry, dtype: torch.dtype
) -> Tensor:
    """The convolution before its scale, computed again where it was not kept."""
    if kept.a is None:
        return _convolution(signs, weight, kept.packed, None, geometry, dtype)[0]
    return channels_last(kept.a)  # hooks of autograd may return it in another memory


def _through_norm(
    a: Tensor,
    grad: Tensor,
    stream: Tensor,
    activation: Vectors,
    gamma: Tensor,
    kept: Kept,
    options: Options,
    *,
    stored: bool,
) -> tuple[Skipped, Tensor, Tensor]:
    """The gradients to u, y and the unit's vectors, from the convolution.

    Unless that to u is to be ``stored``, there are signs in place of it.
    """
    vectors = kept.vectors.contiguous()
    norm = _affine(vectors)
    operands = (grad, a, stream, norm, activation, options.shortcut)
    skipped, sums = activation_backward(*operands, stored=stored)
    grads, coefficients = norm_grads(sums, vectors, kept.alpha, gamma, options.group)
    return skipped, norm_backward(skipped, a, *coefficients.unbind(0)), grads


def _through_product(
    signs: Tensor,
    weight: Tensor,
    grad: Tensor,
    stream: Tensor,
    activation: Vectors,
    gamma: Tensor,
    kept: Kept,
    options: Options,
    geometry: Geometry,
    *,
    stored: bool,
    wants_input: bool,
) -> tuple[Skipped, Tensor, Tensor, Tensor | None]:
    """As :func:`_through_norm`, with the convolution done twice.

    The weight as numbers comes too, where the input's gradient asks for them.
    """
    from tritonbnn.kernels.mma_unit import half_blocks, product_of, unit_blocks  # it needs Gluon
    from tritonbnn.kernels.mma_unit_grad import activation_sums_mma, unit_grad_mma

    assert kept.packed is not None
    assert kept.alpha is not None
    vectors = kept.vectors.contiguous()
    blocks, real = half_blocks(geometry), None
    if wants_input and not reads_signs(geometry, grad.dtype, grad.device):
        forms = (geometry.channels, grad.dtype, blocks.cut)
        real, fragments = scaled(kept.packed, kept.alpha, *forms)
        assert fragments is not None
    else:
        fragments = fragments_of(kept.packed, geometry.channels, blocks.cut)
    product = product_of(signs, fragments, blocks)
    passed = (grad, stream, vectors, activation, geometry, options.shortcut)
    sums, skipped = activation_sums_mma(product, *passed)
    grads, coefficients = norm_grads(sums, vectors, kept.alpha, gamma, options.group)
    if not stored:  # who stores more has no registers for more pixels at once
        product = product_of(signs, fragments, unit_blocks(geometry))
    skipped, dy = unit_grad_mma(product, skipped, coefficients, stored=stored)
    return skipped, dy, grads, real


def _factor(weight: Tensor, kept: Kept, dtype: torch.dtype) -> Tensor | Binary:
    """The weight as the input's gradient takes it."""
    if kept.packed is None or kept.alpha is None:
        return channels_last(weight.to(dtype))
    return Binary(kept.packed.contiguous(), kept.alpha)
