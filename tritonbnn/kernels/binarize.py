"""The sign as +-1, and its pseudo-gradient with the residual added in the same pass."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonbnn import checks
from tritonbnn.kernels import config
from tritonbnn.kernels.elementwise import launch_elementwise, launch_partial_sums
from tritonbnn.kernels.launch import check_kernel_dtype
from tritonbnn.kernels.tiles import tile_of
from tritonbnn.layout import channels_last, empty_pixels, flat_pixels, from_flat


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
def sign_slope(x):
    """The pseudo-gradient of the sign, in float32: max(0, 2 - 2 abs(x)), and NaN of NaN."""
    return tl.maximum(2.0 - 2.0 * tl.abs(x), 0.0, propagate_nan=tl.PropagateNan.ALL)


class Skipped(NamedTuple):
    """The gradient to a shortcut's output: ``grad``, or what the PReLU after it makes of that.

    Attributes:
        grad: (N, O, H', W'), in channels_last memory.
        positive: packed (N, H', W', words): where a bit is 0, the gradient is ``slope`` times
            ``grad``, rounded to its dtype. None, with the next, where it is ``grad``.
        slope: (O,), contiguous.
    """

    grad: Tensor
    positive: Tensor | None = None
    slope: Tensor | None = None


@triton.jit
def skipped_grad(
    residual_ptr,
    positive_ptr,
    slope_ptr,
    pixel,
    exists,
    first,
    left,
    CHANNELS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient to a shortcut's output, (pixel, BLOCK_N channels from the first), in float32.

    Operands as in :class:`Skipped`; ``left`` channels exist, STEP is a power of two that divides
    the first.
    """
    lane = tl.arange(0, BLOCK_N)[None, :]
    known = lane < left
    offs = pixel * CHANNELS + (first + lane)
    grad = tl.load(residual_ptr + offs, mask=exists & known, other=0.0).to(tl.float32)
    if positive_ptr is not None:
        # a word is loaded once for those of its bits that lie side by side here
        GROUP: tl.constexpr = STEP if STEP < 32 else 32
        WORDS: tl.constexpr = (CHANNELS + 31) // 32
        group = tl.arange(0, BLOCK_N // GROUP)[None, :] * GROUP
        offs = pixel * WORDS + (first + group) // 32
        bits = tl.load(positive_ptr + offs, mask=exists & (group < left), other=0)
        bits = bits >> (first + group) % 32
        bits = (bits[:, :, None] >> tl.arange(0, GROUP)[None, None, :]) & 1
        slope = tl.load(slope_ptr + (first + lane), mask=known, other=0.0).to(tl.float32)
        low = (grad * slope).to(residual_ptr.dtype.element_ty).to(tl.float32)
        grad = tl.where(tl.reshape(bits, grad.shape) != 0, grad, low)
    return grad


@triton.jit
def shortcut_grad(
    residual_ptr,
    positive_ptr,
    slope_ptr,
    row,
    exists,
    first,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SHORTCUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The shortcut's transpose applied to its output's gradient, in float32.

    Operands as in :class:`Skipped`. The result is at (row, BLOCK_N channels from the first) of the
    shortcut's input, where rows exist; the first is a multiple of BLOCK_N.
    """
    given = residual_ptr, positive_ptr, slope_ptr
    left = CHANNELS - first
    if SHORTCUT == "pool":
        image = row // (HEIGHT * WIDTH)
        y = row // WIDTH % HEIGHT // 2
        x = row % WIDTH // 2
        pixel = (image * (HEIGHT // 2) + y) * (WIDTH // 2) + x
        return 0.25 * skipped_grad(*given, pixel, exists, first, left, CHANNELS, BLOCK_N, BLOCK_N)
    if SHORTCUT == "repeat":
        STEP: tl.constexpr = CHANNELS & -CHANNELS
        total = skipped_grad(*given, row, exists, first, left, 2 * CHANNELS, BLOCK_N, BLOCK_N)
        return total + skipped_grad(
            *given,
            row,
            exists,
            first + CHANNELS,
            left,
            2 * CHANNELS,
            STEP if STEP < BLOCK_N else BLOCK_N,
            BLOCK_N,
        )
    return skipped_grad(*given, row, exists, first, left, CHANNELS, BLOCK_N, BLOCK_N)


@triton.jit
def _sign_backward_kernel(
    grad_ptr,
    x_ptr,
    shift_ptr,
    residual_ptr,
    positive_ptr,
    slope_ptr,
    dx_ptr,
    sums_ptr,
    rows,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SHORTCUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx = ds + shortcut^T(residual), where ds = max(0, 2 - 2 abs(x + shift)) grad; and ds's sums.

    grad, x and dx (rows, CHANNELS) float; shift (CHANNELS,) or None; residual None or, with
    positive and slope, as in :class:`Skipped`; sums (programs, 1, CHANNELS) float32: each program's
    share of the sum of ds. A program takes every ``programs``-th block of rows.
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
        dx = sign_slope(x + shift) * grad
        acc += dx
        if residual_ptr is not None:
            dx += shortcut_grad(
                residual_ptr,
                positive_ptr,
                slope_ptr,
                row,
                row < rows,
                pid_n * BLOCK_N,
                CHANNELS,
                HEIGHT,
                WIDTH,
                SHORTCUT,
                BLOCK_N,
            )
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    out = sums_ptr + pid * CHANNELS + channel
    tl.store(out, tl.sum(acc, axis=0)[None, :], mask=channel < CHANNELS)


def sign_forward(x: Tensor, shift: Tensor | None = None) -> Tensor:
    """sign(x + shift) in ``x``'s dtype: the twin of :func:`tritonbnn.eager.sign_forward`."""
    check_kernel_dtype("x", x.dtype)
    checks.check_per_channel(x.shape[1], shift=shift)
    checks.check_same_device(x=x, shift=shift)
    flat = flat_pixels(channels_last(x))
    y = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    launch_elementwise(
        _sign_forward_kernel,
        config.choose(config.elementwise_key("sign_forward", x), x.device).tile,
        y,
        x_ptr=flat,
        shift_ptr=None if shift is None else shift.contiguous(),
        y_ptr=y,
    )
    return from_flat(y, tuple(x.shape))


def sign_backward(
    grad: Tensor,
    x: Tensor,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    shortcut: str = "identity",
) -> tuple[Tensor, Tensor]:
    """Gradients to x and shift: the twin of :func:`tritonbnn.eager.sign_backward`."""
    check_kernel_dtype("x", x.dtype)
    checks.check_per_channel(x.shape[1], shift=shift)
    checks.check_same_device(grad=grad, x=x, shift=shift, residual=residual)
    checks.check_same_shape(x=x, grad=grad)
    if residual is not None:
        checks.check_shape("x", x, checks.shortcut_input_shape(residual.shape, shortcut))
    skipped = None if residual is None else Skipped(channels_last(residual))
    shift = None if shift is None else shift.contiguous()
    dx, sums = sign_gradients(channels_last(grad), channels_last(x), skipped, shift, shortcut)
    return dx, sums.sum((0, 1))


def sign_gradients(
    grad: Tensor, x: Tensor, skipped: Skipped | None, shift: Tensor | None, shortcut: str
) -> tuple[Tensor, Tensor]:
    """:func:`sign_backward`, unchecked: channels_last images, and a contiguous shift.

    Returns:
        dx, and each program's share of the shift's gradient, (programs, 1, C).
    """
    height, width = x.shape[2:] if x.dim() == 4 else (1, 1)
    dx = empty_pixels(x, x.dtype)
    sums = launch_partial_sums(
        _sign_backward_kernel,
        config.choose(config.elementwise_key("sign_backward", x), x.device).tile,
        dx,
        count=1,
        grad_ptr=grad,
        x_ptr=x,
        shift_ptr=shift,
        **skipped_arguments(skipped),
        dx_ptr=dx,
        HEIGHT=height,
        WIDTH=width,
        SHORTCUT=shortcut,
    )
    return dx, sums


def skipped_arguments(skipped: Skipped | None) -> dict[str, Any]:
    """What a kernel that adds a skipped gradient takes; of none where there is none."""
    grad, positive, slope = (None, None, None) if skipped is None else skipped
    return {"residual_ptr": grad, "positive_ptr": positive, "slope_ptr": slope}
