"""The half-block around its convolution: statistics, epilogue, and their gradients.

Bytes per output element with a bf16 stream and int16 a: moments 2, forward 6, backward through the
activation 8, through BatchNorm 6. All four only move memory.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonbnn import checks
from tritonbnn.kernels import config
from tritonbnn.kernels.binarize import MAX_PARTIALS
from tritonbnn.kernels.launch import check_kernel_dtype, launch
from tritonbnn.kernels.tiles import tile_of
from tritonbnn.layout import channels_last, flat_pixels, from_flat


@triton.jit
def _shortcut(
    stream_ptr,
    row,
    channel,
    mask,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SHORTCUT: tl.constexpr,
):
    """shortcut(stream) at (row, channel) of the output, in float32."""
    if SHORTCUT == "pool":
        image = row // (HEIGHT * WIDTH)
        y = row // WIDTH % HEIGHT
        x = row % WIDTH
        pixel = (image * 2 * HEIGHT + 2 * y) * 2 * WIDTH + 2 * x
        first = stream_ptr + pixel * CHANNELS + channel
        below = first + 2 * WIDTH * CHANNELS
        total = tl.load(first, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(first + CHANNELS, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(below, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(below + CHANNELS, mask=mask, other=0.0).to(tl.float32)
        return total * 0.25
    if SHORTCUT == "repeat":
        half: tl.constexpr = CHANNELS // 2
        offs = row * half + channel % half
        return tl.load(stream_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    offs = row * CHANNELS + channel
    return tl.load(stream_ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _per_channel(ptr, channel, known):
    return tl.load(ptr + channel, mask=known, other=0.0).to(tl.float32)


@triton.jit
def _channel_moments_kernel(
    a_ptr,
    sums_ptr,
    rows,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Each program's share of sum(d) and sum(d^2), d = a - a[0]; of integers, d = a.

    a (rows, CHANNELS) int or float; sums (programs, 2, CHANNELS) int64 or float32. Integers are at
    most 9216 in size, so a square fits int32; sums over rows are int64. Reals are taken relative to
    the first row, so that a mean far from 0 costs the variance no digits.
    """
    pid, pid_n = tile_of(tl.program_id(0), tl.cdiv(CHANNELS, BLOCK_N))
    programs = tl.num_programs(0) // tl.cdiv(CHANNELS, BLOCK_N)
    channel = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    known = channel < CHANNELS
    accumulator: tl.constexpr = tl.int64 if EXACT else tl.float32
    total = tl.zeros((1, BLOCK_N), accumulator)
    squares = tl.zeros((1, BLOCK_N), accumulator)
    for block in range(pid, tl.cdiv(rows, BLOCK_M), programs):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
        mask = (row < rows) & known
        value = tl.load(a_ptr + row * CHANNELS + channel, mask=mask, other=0)
        if EXACT:
            d = value.to(tl.int32)
        else:
            pivot = tl.load(a_ptr + channel, mask=known, other=0.0).to(tl.float32)
            d = tl.where(mask, value.to(tl.float32) - pivot, 0.0)
        total += tl.sum(d.to(accumulator), axis=0)[None, :]
        squares += tl.sum((d * d).to(accumulator), axis=0)[None, :]
    out = sums_ptr + pid * 2 * CHANNELS + channel
    tl.store(out, total, mask=known)
    tl.store(out + CHANNELS, squares, mask=known)


@triton.jit
def _unit_forward_kernel(
    a_ptr,
    stream_ptr,
    mean_ptr,
    scale_ptr,
    offset_ptr,
    shift_mid_ptr,
    slope_ptr,
    shift_out_ptr,
    z_ptr,
    rows,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SHORTCUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """z = PReLU((a - mean) scale + offset + shortcut + shift_mid) + shift_out.

    a (rows, CHANNELS) int or float, stream and z float in one dtype, vectors (CHANNELS,) float.
    """
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(CHANNELS, BLOCK_N))
    row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    channel = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    known = channel < CHANNELS
    mask = (row < rows) & known
    offs = row * CHANNELS + channel
    a = tl.load(a_ptr + offs, mask=mask, other=0).to(tl.float32)
    t = (a - _per_channel(mean_ptr, channel, known)) * _per_channel(scale_ptr, channel, known)
    t += _per_channel(offset_ptr, channel, known)
    t += _shortcut(stream_ptr, row, channel, mask, CHANNELS, HEIGHT, WIDTH, SHORTCUT)
    if ACTIVATION:
        t += _per_channel(shift_mid_ptr, channel, known)
        t = tl.where(t > 0, t, t * _per_channel(slope_ptr, channel, known))
        t += _per_channel(shift_out_ptr, channel, known)
    tl.store(z_ptr + offs, t.to(z_ptr.dtype.element_ty), mask=mask)


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
    mean = _per_channel(mean_ptr, channel, known)
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
            t = centred * _per_channel(scale_ptr, channel, known)
            t += _per_channel(offset_ptr, channel, known)
            t += _shortcut(stream_ptr, row, channel, mask, CHANNELS, HEIGHT, WIDTH, SHORTCUT)
            t += _per_channel(shift_mid_ptr, channel, known)
            du = tl.where(t > 0, grad, grad * _per_channel(slope_ptr, channel, known))
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
    dy = dy * _per_channel(a_scale_ptr, channel, known) + _per_channel(constant_ptr, channel, known)
    du = tl.load(du_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dy += du * _per_channel(du_scale_ptr, channel, known)
    tl.store(dy_ptr + offs, dy.to(dy_ptr.dtype.element_ty), mask=mask)


def unit_plan(
    *,
    batch: int,
    height: int,
    width: int,
    channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int,
    dtype: torch.dtype,
    device: torch.device,
) -> str:
    """What the tuning table says, or "keep": the twin of :func:`tritonbnn.eager.unit_plan`.

    Unpacking bits makes the convolution dearer than the 4 bytes an element that keeping costs.
    """
    name = config.dtype_name(dtype)
    shape = (batch, height, width, channels, out_channels, kernel_size, stride)
    return config.choose(config.ProblemKey("unit_plan", name, *shape), device).formulation


def channel_moments(a: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel: the twin of :func:`tritonbnn.eager.channel_moments`."""
    flat = flat_pixels(channels_last(a))
    rows, channels = flat.shape
    exact = not a.is_floating_point()
    if not exact:
        check_kernel_dtype("a", a.dtype)
    tile = config.choose(config.elementwise_key("channel_moments", a), a.device).tile
    programs = min(MAX_PARTIALS, triton.cdiv(rows, tile.block_m))
    dtype = torch.int64 if exact else torch.float32
    sums = torch.empty((programs, 2, channels), dtype=dtype, device=a.device)
    if not rows:
        return tuple(torch.zeros((2, channels), dtype=torch.float64, device=a.device))
    launch(
        _channel_moments_kernel,
        programs * triton.cdiv(channels, tile.block_n),
        tile,
        a_ptr=flat,
        sums_ptr=sums,
        rows=rows,
        CHANNELS=channels,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        EXACT=exact,
    )
    total, squares = (sums.sum(0) if exact else sums.double().sum(0)).double().unbind(0)
    mean = total / rows
    variance = (squares / rows - mean * mean).clamp_(min=0)
    return mean if exact else mean + flat[0], variance


def unit_forward(
    a: Tensor,
    stream: Tensor,
    mean: Tensor,
    scale: Tensor,
    offset: Tensor,
    shift_mid: Tensor | None,
    slope: Tensor | None,
    shift_out: Tensor | None,
    *,
    shortcut: str,
) -> Tensor:
    """A unit's epilogue: the twin of :func:`tritonbnn.eager.unit_forward`."""
    check_kernel_dtype("stream", stream.dtype)
    activation = {"shift_mid": shift_mid, "slope": slope, "shift_out": shift_out}
    problem = _problem(a, stream, shortcut, mean=mean, scale=scale, offset=offset, **activation)
    z = torch.empty(problem["a_ptr"].shape, dtype=stream.dtype, device=a.device)
    tile = config.choose(config.elementwise_key("unit_forward", a), a.device).tile
    rows, channels = z.shape
    if rows:
        launch(
            _unit_forward_kernel,
            triton.cdiv(rows, tile.block_m) * triton.cdiv(channels, tile.block_n),
            tile,
            **problem,
            z_ptr=z,
            rows=rows,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
        )
    return from_flat(z, tuple(a.shape))


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
    vectors = {"mean": mean, "scale": scale, "offset": offset}
    problem = _problem(a, stream, shortcut, **vectors, shift_mid=shift_mid, slope=slope)
    rows, channels = problem["a_ptr"].shape
    tile = config.choose(config.elementwise_key("unit_activation_backward", a), a.device).tile
    programs = min(MAX_PARTIALS, triton.cdiv(rows, tile.block_m))
    du = torch.empty((rows, channels), dtype=grad.dtype, device=a.device)
    sums = torch.empty((programs, 4, channels), dtype=torch.float32, device=a.device)
    if rows:
        launch(
            _unit_activation_backward_kernel,
            programs * triton.cdiv(channels, tile.block_n),
            tile,
            **problem,
            grad_ptr=flat_pixels(channels_last(grad)),
            du_ptr=du,
            sums_ptr=sums,
            rows=rows,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
        )
    return from_flat(du, tuple(a.shape)), sums.sum(0)


def unit_norm_backward(
    du: Tensor, a: Tensor, du_scale: Tensor, a_scale: Tensor, constant: Tensor
) -> Tensor:
    """Backward through BatchNorm: the twin of :func:`tritonbnn.eager.unit_norm_backward`."""
    check_kernel_dtype("du", du.dtype)
    checks.check_same_shape(a=a, du=du)
    vectors = {"du_scale": du_scale, "a_scale": a_scale, "constant": constant}
    checks.check_per_channel(a.shape[1], **vectors)
    checks.check_same_device(a=a, du=du, **vectors)
    flat = flat_pixels(channels_last(a))
    rows, channels = flat.shape
    dy = torch.empty((rows, channels), dtype=du.dtype, device=a.device)
    tile = config.choose(config.elementwise_key("unit_norm_backward", a), a.device).tile
    if rows:
        launch(
            _unit_norm_backward_kernel,
            triton.cdiv(rows, tile.block_m) * triton.cdiv(channels, tile.block_n),
            tile,
            du_ptr=flat_pixels(channels_last(du)),
            a_ptr=flat,
            **{f"{name}_ptr": vector.contiguous() for name, vector in vectors.items()},
            dy_ptr=dy,
            rows=rows,
            CHANNELS=channels,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
        )
    return from_flat(dy, tuple(a.shape))


def _problem(a: Tensor, stream: Tensor, shortcut: str, **vectors: Tensor | None) -> dict[str, Any]:
    """The arguments that the two kernels share, checked; vectors that are absent read ``mean``."""
    n, channels, height, width = a.shape
    expected = {
        "identity": (n, channels, height, width),
        "repeat": (n, channels // 2, height, width),
        "pool": (n, channels, 2 * height, 2 * width),
    }
    checks.check_shape("stream", stream, expected[shortcut])
    checks.check_per_channel(channels, **vectors)
    checks.check_same_device(a=a, stream=stream, **vectors)
    present = {name: vectors["mean"] if v is None else v for name, v in vectors.items()}
    return {
        "a_ptr": flat_pixels(channels_last(a)),
        "stream_ptr": flat_pixels(channels_last(stream)),
        **{f"{name}_ptr": v.contiguous() for name, v in present.items() if v is not None},
        "CHANNELS": channels,
        "HEIGHT": height,
        "WIDTH": width,
        "SHORTCUT": shortcut,
        "ACTIVATION": vectors["slope"] is not None,
    }
