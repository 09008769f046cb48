"""RPReLU forward, and its backward with all per-channel sums from one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonbnn import checks
from tritonbnn.kernels import config
from tritonbnn.kernels.elementwise import launch_elementwise, launch_partial_sums
from tritonbnn.kernels.launch import check_kernel_dtype
from tritonbnn.kernels.tiles import tile_of
from tritonbnn.layout import channels_last, flat_pixels, from_flat


@triton.jit
def _rprelu_forward_kernel(
    x_ptr,
    shift_in_ptr,
    slope_ptr,
    shift_out_ptr,
    z_ptr,
    rows,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """z = t > 0 ? t : slope t, plus shift_out, where t = x + shift_in.

    x and z (rows, CHANNELS) float; slope and shifts (CHANNELS,) float.
    """
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(CHANNELS, BLOCK_N))
    row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    channel = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    known = channel < CHANNELS
    mask = (row < rows) & known
    offs = row * CHANNELS + channel
    t = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    t += tl.load(shift_in_ptr + channel, mask=known, other=0.0).to(tl.float32)
    slope = tl.load(slope_ptr + channel, mask=known, other=0.0).to(tl.float32)
    z = tl.where(t > 0, t, t * slope)
    z += tl.load(shift_out_ptr + channel, mask=known, other=0.0).to(tl.float32)
    tl.store(z_ptr + offs, z.to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rprelu_backward_kernel(
    grad_ptr,
    x_ptr,
    shift_in_ptr,
    slope_ptr,
    dx_ptr,
    sums_ptr,
    rows,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx = t > 0 ? grad : slope grad, where t = x + shift_in, and the sums over all rows.

    grad, x and dx (rows, CHANNELS) float; shift_in and slope (CHANNELS,) float; sums (programs, 3,
    CHANNELS) float32: each program's share of the sums of dx, min(t, 0) grad, and grad. A program
    takes every ``programs``-th block of rows.
    """
    pid, pid_n = tile_of(tl.program_id(0), tl.cdiv(CHANNELS, BLOCK_N))
    programs = tl.num_programs(0) // tl.cdiv(CHANNELS, BLOCK_N)
    channel = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    known = channel < CHANNELS
    shift_in = tl.load(shift_in_ptr + channel, mask=known, other=0.0).to(tl.float32)
    slope = tl.load(slope_ptr + channel, mask=known, other=0.0).to(tl.float32)
    sum_dx = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_slope = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(pid, tl.cdiv(rows, BLOCK_M), programs):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
        mask = (row < rows) & known
        offs = row * CHANNELS + channel
        t = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + shift_in
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dx = tl.where(t > 0, grad, slope * grad)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        sum_dx += dx
        sum_slope += tl.where(t > 0, 0.0, t) * grad
        sum_grad += grad
    out = sums_ptr + pid * 3 * CHANNELS + channel
    tl.store(out, tl.sum(sum_dx, axis=0)[None, :], mask=known)
    tl.store(out + CHANNELS, tl.sum(sum_slope, axis=0)[None, :], mask=known)
    tl.store(out + 2 * CHANNELS, tl.sum(sum_grad, axis=0)[None, :], mask=known)


def rprelu_forward(x: Tensor, shift_in: Tensor, slope: Tensor, shift_out: Tensor) -> Tensor:
    """PReLU(x + shift_in) + shift_out: the twin of :func:`tritonbnn.eager.rprelu_forward`."""
    check_kernel_dtype("x", x.dtype)
    checks.check_per_channel(x.shape[1], shift_in=shift_in, slope=slope, shift_out=shift_out)
    checks.check_same_device(x=x, shift_in=shift_in, slope=slope, shift_out=shift_out)
    flat = flat_pixels(channels_last(x))
    z = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    launch_elementwise(
        _rprelu_forward_kernel,
        config.choose(config.elementwise_key("rprelu_forward", x), x.device).tile,
        z,
        x_ptr=flat,
        shift_in_ptr=shift_in.contiguous(),
        slope_ptr=slope.contiguous(),
        shift_out_ptr=shift_out.contiguous(),
        z_ptr=z,
    )
    return from_flat(z, tuple(x.shape))


def rprelu_backward(
    grad: Tensor, x: Tensor, shift_in: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All four gradients: the twin of :func:`tritonbnn.eager.rprelu_backward`."""
    check_kernel_dtype("x", x.dtype)
    checks.check_per_channel(x.shape[1], shift_in=shift_in, slope=slope)
    checks.check_same_device(grad=grad, x=x, shift_in=shift_in, slope=slope)
    checks.check_same_shape(x=x, grad=grad)
    flat = flat_pixels(channels_last(x))
    dx = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    sums = launch_partial_sums(
        _rprelu_backward_kernel,
        config.choose(config.elementwise_key("rprelu_backward", x), x.device).tile,
        dx,
        count=3,
        grad_ptr=flat_pixels(channels_last(grad)),
        x_ptr=flat,
        shift_in_ptr=shift_in.contiguous(),
        slope_ptr=slope.contiguous(),
        dx_ptr=dx,
    )
    # three sums, because operators may not return views of one tensor
    dshift_in, dslope, dshift_out = (share.sum(0) for share in sums.unbind(1))
    return from_flat(dx, tuple(x.shape)), dshift_in, dslope, dshift_out
