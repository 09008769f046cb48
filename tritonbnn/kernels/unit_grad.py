"""The half-block around its convolution, backward: through the activation, then BatchNorm.

Bytes per output element with a bf16 stream and int16 a: activation 6 1/8, BatchNorm 6 1/8. Both
only move memory. They are two, because BatchNorm's gradient needs sums over all rows of the
activation's. Between them is a bit, not the 2 bytes of du: with the gradient to z, which is there
already, it gives all of du.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonbnn import checks
from tritonbnn.bits import words
from tritonbnn.kernels import config
from tritonbnn.kernels.binarize import Skipped, skipped_arguments, skipped_grad
from tritonbnn.kernels.elementwise import launch_elementwise, launch_partial_sums
from tritonbnn.kernels.launch import check_kernel_dtype
from tritonbnn.kernels.tiles import tile_of
from tritonbnn.kernels.unit import (
    Vectors,
    check_unit,
    contiguous,
    pass_arguments,
    per_channel,
    shortcut_value,
    store_bits,
)
from tritonbnn.layout import channels_last, empty_pixels


@triton.jit
def _unit_activation_backward_kernel(
    grad_ptr,
    a_ptr,
    stream_ptr,
    mean_ptr,
    scale_ptr,
    offset_ptr,
    shift_mid_ptr,
    slope_ptr,
    du_ptr,
    positive_ptr,
    sums_ptr,
    rows,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SHORTCUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """du = t > 0 ? grad : slope grad, t as in the forward pass, and the sums over all rows.

    Tensors as in the forward pass; du_ptr may be None, and positive_ptr, the packed bits of t > 0,
    as :class:`tritonbnn.kernels.binarize.Skipped` has them; sums (programs, 4, CHANNELS) float32:
    each program's share of the sums of du, du (a - mean), min(t, 0) grad, and grad. A program takes
    every ``programs``-th block of rows.
    """
    pid, pid_n = tile_of(tl.program_id(0), tl.cdiv(CHANNELS, BLOCK_N))
    programs = tl.num_programs(0) // tl.cdiv(CHANNELS, BLOCK_N)
    channel = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    known = channel < CHANNELS
    sum_du = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_du_a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_slope = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(pid, tl.cdiv(rows, BLOCK_M), programs):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
        mask = (row < rows) & known
        offs = row * CHANNELS + channel
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        centred = tl.load(a_ptr + offs, mask=mask, other=0).to(tl.float32)
        centred -= per_channel(mean_ptr, channel, known)
        du = grad
        if ACTIVATION:
            t = centred * per_channel(scale_ptr, channel, known)
            t += per_channel(offset_ptr, channel, known)
            t += shortcut_value(stream_ptr, row, channel, mask, CHANNELS, HEIGHT, WIDTH, SHORTCUT)
            t += per_channel(shift_mid_ptr, channel, known)
            du = tl.where(t > 0, grad, grad * per_channel(slope_ptr, channel, known))
            sum_slope += tl.where(t > 0, 0.0, t) * grad
            if positive_ptr is not None:
                store_bits((t > 0) & known, positive_ptr, row, rows, pid_n, CHANNELS)
        if du_ptr is not None:
            tl.store(du_ptr + offs, du.to(du_ptr.dtype.element_ty), mask=mask)
        sum_du += du
        sum_du_a += du * centred
        sum_grad += grad
    out = sums_ptr + pid * 4 * CHANNELS + channel
    tl.store(out, tl.sum(sum_du, axis=0)[None, :], mask=known)
    tl.store(out + CHANNELS, tl.sum(sum_du_a, axis=0)[None, :], mask=known)
    tl.store(out + 2 * CHANNELS, tl.sum(sum_slope, axis=0)[None, :], mask=known)
    tl.store(out + 3 * CHANNELS, tl.sum(sum_grad, axis=0)[None, :], mask=known)


@triton.jit
def _unit_norm_backward_kernel(
    residual_ptr,
    positive_ptr,
    slope_ptr,
    a_ptr,
    du_scale_ptr,
    a_scale_ptr,
    constant_ptr,
    dy_ptr,
    rows,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dy = du_scale du + a_scale a + constant.

    du as :class:`tritonbnn.kernels.binarize.Skipped` has it; dy (rows, CHANNELS) float, a int or
    float, vectors (CHANNELS,) float.
    """
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(CHANNELS, BLOCK_N))
    row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    channel = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    known = channel < CHANNELS
    mask = (row < rows) & known
    offs = row * CHANNELS + channel
    dy = tl.load(a_ptr + offs, mask=mask, other=0).to(tl.float32)
    dy = dy * per_channel(a_scale_ptr, channel, known) + per_channel(constant_ptr, channel, known)
    du = skipped_grad(
        residual_ptr,
        positive_ptr,
        slope_ptr,
        row,
        row < rows,
        pid_n * BLOCK_N,
        CHANNELS - pid_n * BLOCK_N,
        CHANNELS,
        BLOCK_N,
        BLOCK_N,
    )
    dy += du * per_channel(du_scale_ptr, channel, known)
    tl.store(dy_ptr + offs, dy.to(dy_ptr.dtype.element_ty), mask=mask)


def unit_activation_backward(
    grad: Tensor,
    a: Tensor,
    stream: Tensor,
    mean: Tensor,
    scale: Tensor,
    offset: Tensor,
    shift_mid: Tensor | None,
    slope: Tensor | None,
    *,
    shortcut: str,
) -> tuple[Tensor, Tensor]:
    """du and its sums: the twin of :func:`tritonbnn.eager.unit_activation_backward`."""
    check_kernel_dtype("grad", grad.dtype)
    checks.check_same_shape(a=a, grad=grad)
    checks.check_same_device(a=a, grad=grad)
    affine = {"mean": mean, "scale": scale, "offset": offset}
    check_unit(a, stream, shortcut, **affine, shift_mid=shift_mid, slope=slope)
    norm, activation = contiguous(mean, scale, offset), contiguous(shift_mid, slope)
    grad, a, stream = channels_last(grad), channels_last(a), channels_last(stream)
    du = empty_pixels(a, grad.dtype)
    return du, _activation_sums(grad, a, stream, norm, activation, shortcut, du=du).sum(0)


def activation_backward(
    grad: Tensor,
    a: Tensor,
    stream: Tensor,
    norm: Vectors,
    activation: Vectors,
    shortcut: str,
    *,
    stored: bool,
) -> tuple[Skipped, Tensor]:
    """:func:`unit_activation_backward`, unchecked, its sums each program's share.

    Args:
        grad: in channels_last memory, as are the next two.
        a: as there, as are the others.
        norm: mean, scale and offset, contiguous.
        activation: shift_mid and slope, contiguous, or twice None.
        stored: du is wanted as a tensor, not as the bits that give it.

    Returns:
        du, and (programs, 4, O).
    """
    operands = (grad, a, stream, norm, activation, shortcut)
    _, slope = activation
    if slope is None:
        return Skipped(grad), _activation_sums(*operands)
    if stored:
        du = empty_pixels(a, grad.dtype)
        return Skipped(du), _activation_sums(*operands, du=du)
    n, channels, height, width = a.shape
    shape = (n, height, width, words(channels))
    positive = torch.empty(shape, dtype=torch.int32, device=a.device)
    return Skipped(grad, positive, slope), _activation_sums(*operands, positive=positive)


def _activation_sums(
    grad: Tensor,
    a: Tensor,
    stream: Tensor,
    norm: Vectors,
    activation: Vectors,
    shortcut: str,
    *,
    du: Tensor | None = None,
    positive: Tensor | None = None,
) -> Tensor:
    """The sums, and what is given filled: du, or the bits that give it."""
    key = config.elementwise_key("unit_activation_backward", a, grad)
    tile = config.choose(key, a.device).tile
    return launch_partial_sums(
        _unit_activation_backward_kernel,
        tile if positive is None else config.whole_words(tile),
        a,
        count=4,
        **pass_arguments(a, stream, norm, activation, shortcut),
        grad_ptr=grad,
        du_ptr=du,
        positive_ptr=positive,
    )


def unit_norm_backward(
    du: Tensor, a: Tensor, du_scale: Tensor, a_scale: Tensor, constant: Tensor
) -> Tensor:
    """Backward through BatchNorm: the twin of :func:`tritonbnn.eager.unit_norm_backward`."""
    check_kernel_dtype("du", du.dtype)
    checks.check_same_shape(a=a, du=du)
    vectors = {"du_scale": du_scale, "a_scale": a_scale, "constant": constant}
    checks.check_per_channel(a.shape[1], **vectors)
    checks.check_same_device(a=a, du=du, **vectors)
    contiguous_ones = (vector.contiguous() for vector in vectors.values())
    return norm_backward(Skipped(channels_last(du)), channels_last(a), *contiguous_ones)


def norm_backward(
    du: Skipped, a: Tensor, du_scale: Tensor, a_scale: Tensor, constant: Tensor
) -> Tensor:
    """:func:`unit_norm_backward`, unchecked: channels_last images, contiguous vectors."""
    dy = empty_pixels(a, du.grad.dtype)
    launch_elementwise(
        _unit_norm_backward_kernel,
        config.choose(config.elementwise_key("unit_norm_backward", a, du.grad), a.device).tile,
        dy,
        **skipped_arguments(du),
        a_ptr=a,
        du_scale_ptr=du_scale,
        a_scale_ptr=a_scale,
        constant_ptr=constant,
        dy_ptr=dy,
    )
    return dy
