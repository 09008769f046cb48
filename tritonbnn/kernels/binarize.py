"""The sign as +-1, and its pseudo-gradient with the residual added in the same pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonbnn import checks
from tritonbnn.kernels import config
from tritonbnn.kernels.launch import check_kernel_dtype, launch
from tritonbnn.kernels.tiles import tile_of
from tritonbnn.layout import channels_last, flat_pixels, from_flat

MAX_PARTIALS = 1024
"""Programs per channel block of a backward pass: enough to fill a GPU, few enough to sum after."""


@triton.jit
def _sign_forward_kernel(
    x_ptr,
    shift_ptr,
    y_ptr,
    rows,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = x + shift >= 0 ? 1 : -1, all (rows, CHANNELS); shift (CHANNELS,) or None."""
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(CHANNELS, BLOCK_N))
    row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    channel = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (row < rows) & (channel < CHANNELS)
    offs = row * CHANNELS + channel
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        x += tl.load(shift_ptr + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    y = tl.where(x >= 0, 1.0, -1.0).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs, y, mask=mask)


@triton.jit
def _sign_backward_kernel(
    grad_ptr,
    x_ptr,
    shift_ptr,
    residual_ptr,
    dx_ptr,
    dshift_ptr,
    rows,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx = max(0, 2 - 2 abs(x + shift)) grad + residual; dshift[program] = its share of the sum.

    grad, x, residual (or None) and dx (rows, CHANNELS) float; shift (CHANNELS,) or None; dshift
    (programs, CHANNELS) float32. A program takes every ``programs``-th block of rows.
    """
    pid, pid_n = tile_of(tl.program_id(0), tl.cdiv(CHANNELS, BLOCK_N))
    programs = tl.num_programs(0) // tl.cdiv(CHANNELS, BLOCK_N)
    channel = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    shift = tl.zeros((1, BLOCK_N), tl.float32)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(pid, tl.cdiv(rows, BLOCK_M), programs):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
        mask = (row < rows) & (channel < CHANNELS)
        offs = row * CHANNELS + channel
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        slope = tl.maximum(2.0 - 2.0 * tl.abs(x + shift), 0.0, propagate_nan=tl.PropagateNan.ALL)
        dx = slope * grad
        acc += dx
        if residual_ptr is not None:
            dx += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    out = dshift_ptr + pid * CHANNELS + channel
    tl.store(out, tl.sum(acc, axis=0)[None, :], mask=channel < CHANNELS)


def sign_forward(x: Tensor, shift: Tensor | None = None) -> Tensor:
    """sign(x + shift) in ``x``'s dtype: the twin of :func:`tritonbnn.eager.sign_forward`."""
    check_kernel_dtype("x", x.dtype)
    checks.check_per_channel(x.shape[1], shift=shift)
    checks.check_same_device(x=x, shift=shift)
    flat = flat_pixels(channels_last(x))
    rows, channels = flat.shape
    y = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    tile = config.choose(config.elementwise_key("sign_forward", x), x.device).tile
    if rows:
        launch(
            _sign_forward_kernel,
            triton.cdiv(rows, tile.block_m) * triton.cdiv(channels, tile.block_n),
            tile,
            x_ptr=flat,
            shift_ptr=None if shift is None else shift.contiguous(),
            y_ptr=y,
            rows=rows,
            CHANNELS=channels,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
        )
    return from_flat(y, tuple(x.shape))


def sign_backward(
    grad: Tensor, x: Tensor, shift: Tensor | None = None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients to x and shift: the twin of :func:`tritonbnn.eager.sign_backward`."""
    check_kernel_dtype("x", x.dtype)
    checks.check_per_channel(x.shape[1], shift=shift)
    checks.check_same_device(grad=grad, x=x, shift=shift, residual=residual)
    checks.check_same_shape(x=x, grad=grad, residual=residual)
    flat = flat_pixels(channels_last(x))
    rows, channels = flat.shape
    tile = config.choose(config.elementwise_key("sign_backward", x), x.device).tile
    programs = min(MAX_PARTIALS, triton.cdiv(rows, tile.block_m))
    dx = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    dshift = torch.empty((programs, channels), dtype=torch.float32, device=x.device)
    if rows:
        launch(
            _sign_backward_kernel,
            programs * triton.cdiv(channels, tile.block_n),
            tile,
            grad_ptr=flat_pixels(channels_last(grad)),
            x_ptr=flat,
            shift_ptr=None if shift is None else shift.contiguous(),
            residual_ptr=None if residual is None else flat_pixels(channels_last(residual)),
            dx_ptr=dx,
            dshift_ptr=dshift,
            rows=rows,
            CHANNELS=channels,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
        )
    return from_flat(dx, tuple(x.shape)), dshift.sum(0)
