"""The half-block around its convolution, backward: through the activation, then BatchNorm.

Bytes per output element with a bf16 stream and int16 a: activation 8, BatchNorm 6. Both only move
memory. They are two, because BatchNorm's gradient needs sums over all rows of the activation's.
"""

import triton
import triton.language as tl
from torch import Tensor

from tritonbnn import checks
from tritonbnn.kernels import config
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

    Tensors as in the forward pass; sums (programs, 4, CHANNELS) float32: each program's share of
    the sums of du, du (a - mean), min(t, 0) grad, and grad. A program takes every ``programs``-th
    block of rows.
    """
    pid, pid_n = tile_of(tl.program_id(0), tl.cdiv(CHANNELS, BLOCK_N))
    programs = tl.num_programs(0) // tl.cdiv(CHANNELS, BLOCK_N)
    channel = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    known = channel < CHANNELS
    mean = per_channel(mean_ptr, channel, known)
    sum_du = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_du_a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_slope = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(pid, tl.cdiv(rows, BLOCK_M), programs):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
        mask = (row < rows) & known
        offs = row * CHANNELS + channel
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        centred = tl.load(a_ptr + offs, mask=mask, other=0).to(tl.float32) - mean
        du = grad
        if ACTIVATION:
            t = centred * per_channel(scale_ptr, channel, known)
            t += per_channel(offset_ptr, channel, known)
            t += shortcut_value(stream_ptr, row, channel, mask, CHANNELS, HEIGHT, WIDTH, SHORTCUT)
            t += per_channel(shift_mid_ptr, channel, known)
            du = tl.where(t > 0, grad, grad * per_channel(slope_ptr, channel, known))
            sum_slope += tl.where(t > 0, 0.0, t) * grad
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
    du_ptr,
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

    du and dy (rows, CHANNELS) float, a int or float, vectors (CHANNELS,) float.
    """
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(CHANNELS, BLOCK_N))
    row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    channel = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    known = channel < CHANNELS
    mask = (row < rows) & known
    offs = row * CHANNELS + channel
    dy = tl.load(a_ptr + offs, mask=mask, other=0).to(tl.float32)
    dy = dy * per_channel(a_scale_ptr, channel, known) + per_channel(constant_ptr, channel, known)
    du = tl.load(du_ptr + offs, mask=mask, other=0.0).to(tl.float32)
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
    du, sums = activation_backward(grad, a, stream, norm, activation, shortcut)
    return du, sums.sum(0)


def activation_backward(
    grad: Tensor, a: Tensor, stream: Tensor, norm: Vectors, activation: Vectors, shortcut: str
) -> tuple[Tensor, Tensor]:
    """:func:`unit_activation_backward`, unchecked, its sums each program's share.

    Args:
        grad: in channels_last memory, as are the next two.
        a: as there, as are the others.
        norm: mean, scale and offset, contiguous.
        activation: shift_mid and slope, contiguous, or twice None.

    Returns:
        du, and (programs, 4, O).
    """
    du = empty_pixels(a, grad.dtype)
    sums = launch_partial_sums(
        _unit_activation_backward_kernel,
        config.choose(config.elementwise_key("unit_activation_backward", a, grad), a.device).tile,
        du,
        count=4,
        **pass_arguments(a, stream, norm, activation, shortcut),
        grad_ptr=grad,
        du_ptr=du,
    )
    return du, sums


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
    return norm_backward(channels_last(du), channels_last(a), *contiguous_ones)


def norm_backward(
    du: Tensor, a: Tensor, du_scale: Tensor, a_scale: Tensor, constant: Tensor
) -> Tensor:
    """:func:`unit_norm_backward`, unchecked: channels_last images, contiguous vectors."""
    dy = empty_pixels(a, du.dtype)
    launch_elementwise(
        _unit_norm_backward_kernel,
        config.choose(config.elementwise_key("unit_norm_backward", a, du), a.device).tile,
        dy,
        du_ptr=du,
        a_ptr=a,
        du_scale_ptr=du_scale,
        a_scale_ptr=a_scale,
        constant_ptr=constant,
        dy_ptr=dy,
    )
    return dy
