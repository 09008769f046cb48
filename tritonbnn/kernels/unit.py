"""The half-block around its convolution, forward: statistics and epilogue.

Bytes per output element with a bf16 stream and int16 a: moments 2, forward 6. Both only move
memory. The next unit's signs, packed in the epilogue, cost 1/8 byte there; a pass of their own
would read the stream again, 2 bytes.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonbnn import checks
from tritonbnn.bits import words
from tritonbnn.kernels import config
from tritonbnn.kernels.below_triton import on_one_bit_core
from tritonbnn.kernels.elementwise import launch_elementwise, launch_partial_sums
from tritonbnn.kernels.geometry import known_geometry
from tritonbnn.kernels.launch import check_kernel_dtype
from tritonbnn.kernels.tiles import tile_of
from tritonbnn.layout import channels_last, empty_pixels, flat_pixels

Vectors = tuple[Tensor | None, ...]


@triton.jit
def shortcut_value(
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
def store_bits(conditions, words_ptr, row, rows, block, CHANNELS: tl.constexpr):
    """Pack a block of conditions (rows, channels), and store the bytes of its words.

    row (rows of the block, 1); ``block`` counts blocks of channels, which are of whole words. Of
    channels that do not exist a condition must not hold. A thread has the eight channels of a byte,
    or half of them, where a word's are several threads' and go through shared memory.
    """
    BLOCK_M: tl.constexpr = conditions.shape[0]
    BYTES: tl.constexpr = conditions.shape[1] // 8
    ALL: tl.constexpr = (CHANNELS + 31) // 32 * 4
    lane = tl.arange(0, 8)[None, None, :]
    bits = tl.where(tl.reshape(conditions, (BLOCK_M, BYTES, 8)), 1 << lane, 0)
    byte = block * BYTES + tl.arange(0, BYTES)[None, :]
    place = words_ptr.to(tl.pointer_type(tl.uint8)) + (row * ALL + byte)
    tl.store(place, tl.sum(bits, axis=2).to(tl.uint8), mask=(row < rows) & (byte < ALL))


@triton.jit
def per_channel(ptr, channel, known):
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

    a (rows, CHANNELS) int or float; sums (programs, 2, CHANNELS) int64 or float32. The square of an
    int16 fits int32, that of a wider integer needs int64. Reals are taken relative to the first
    row, so that a mean far from 0 costs the variance no digits.
    """
    pid, pid_n = tile_of(tl.program_id(0), tl.cdiv(CHANNELS, BLOCK_N))
    programs = tl.num_programs(0) // tl.cdiv(CHANNELS, BLOCK_N)
    channel = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    known = channel < CHANNELS
    accumulator: tl.constexpr = tl.int64 if EXACT else tl.float32
    square: tl.constexpr = tl.int32 if a_ptr.dtype.element_ty == tl.int16 else tl.int64
    # every thread adds up its own: adding across threads in every block costs more than the loads
    total = tl.zeros((BLOCK_M, BLOCK_N), accumulator)
    squares = tl.zeros((BLOCK_M, BLOCK_N), accumulator)
    for block in range(pid, tl.cdiv(rows, BLOCK_M), programs):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
        mask = (row < rows) & known
        value = tl.load(a_ptr + row * CHANNELS + channel, mask=mask, other=0)
        if EXACT:
            d = value.to(square)
        else:
            pivot = tl.load(a_ptr + channel, mask=known, other=0.0).to(tl.float32)
            d = tl.where(mask, value.to(tl.float32) - pivot, 0.0)
        total += d.to(accumulator)
        squares += (d * d).to(accumulator)
    out = sums_ptr + pid * 2 * CHANNELS + channel
    tl.store(out, tl.sum(total, axis=0)[None, :], mask=known)
    tl.store(out + CHANNELS, tl.sum(squares, axis=0)[None, :], mask=known)


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
    next_shift_ptr,
    z_ptr,
    signs_ptr,
    rows,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SHORTCUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """z = PReLU((a - mean) scale + offset + shortcut + shift_mid) + shift_out, and z's signs.

    a (rows, CHANNELS) int or float, stream and z float in one dtype, vectors (CHANNELS,) float;
    signs (rows, words) int32 or None: those of z as stored, plus next_shift, (CHANNELS,) or None.
    """
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(CHANNELS, BLOCK_N))
    row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    channel = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    known = channel < CHANNELS
    mask = (row < rows) & known
    offs = row * CHANNELS + channel
    a = tl.load(a_ptr + offs, mask=mask, other=0).to(tl.float32)
    t = (a - per_channel(mean_ptr, channel, known)) * per_channel(scale_ptr, channel, known)
    t += per_channel(offset_ptr, channel, known)
    t += shortcut_value(stream_ptr, row, channel, mask, CHANNELS, HEIGHT, WIDTH, SHORTCUT)
    if ACTIVATION:
        t += per_channel(shift_mid_ptr, channel, known)
        t = tl.where(t > 0, t, t * per_channel(slope_ptr, channel, known))
        t += per_channel(shift_out_ptr, channel, known)
    z = t.to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + offs, z, mask=mask)
    if signs_ptr is not None:
        s = z.to(tl.float32)
        if next_shift_ptr is not None:
            s += per_channel(next_shift_ptr, channel, known)
        store_bits((s >= 0) & known, signs_ptr, row, rows, pid_n, CHANNELS)


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
    binary_weight: bool,
    device: torch.device,
) -> str:
    """What the tuning table says, or the default: the twin of :func:`tritonbnn.eager.unit_plan`.

    That is "fused" where the one-bit core does the convolution, and "keep" elsewhere: unpacking
    bits makes it dearer than the 4 bytes an element that keeping costs.
    """
    shape = (batch, height, width, channels, out_channels, kernel_size, stride)
    plan = config.choose(_plan_key(dtype, binary_weight, *shape), device).formulation
    if plan != "fused":
        return plan
    geometry = known_geometry(*shape, kernel_size // 2)
    return plan if binary_weight and on_one_bit_core(geometry, device) else "keep"


@lru_cache(maxsize=4096)
def _plan_key(dtype: torch.dtype, binary_weight: bool, *shape: int) -> config.ProblemKey:
    name = config.joint_dtype_name(torch.int16 if binary_weight else dtype, dtype)
    return config.ProblemKey("unit_plan", name, *shape)


def channel_moments(a: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel: the twin of :func:`tritonbnn.eager.channel_moments`."""
    a = channels_last(a)
    flat = flat_pixels(a)
    rows, channels = flat.shape
    exact = not a.is_floating_point()
    if not exact:
        check_kernel_dtype("a", a.dtype)
    if not rows:
        return tuple(torch.zeros((2, channels), dtype=torch.float64, device=a.device))
    mean, variance = moments_of(moment_sums(a), rows)
    return mean if exact else mean + flat[0], variance


def moment_sums(a: Tensor) -> Tensor:
    """Each program's share of the sums of a, less its first row if it is real, and of the square.

    Args:
        a: (N, C, H, W), in channels_last memory.

    Returns:
        (programs, 2, C), int64 or float32.
    """
    exact = not a.is_floating_point()
    return launch_partial_sums(
        _channel_moments_kernel,
        config.choose(config.elementwise_key("channel_moments", a), a.device).tile,
        a,
        count=2,
        dtype=torch.int64 if exact else torch.float32,
        a_ptr=a,
        EXACT=exact,
    )


def moments_of(sums: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Mean and variance, (C,) float64, from sums over rows of a value and of its square.

    Args:
        sums: each program's share, (programs, 2, C) int64 or float32.
        rows: over which all programs have summed.
    """
    wide = sums if sums.dtype == torch.int64 else sums.double()
    total, squares = wide.sum(0).double().unbind(0)
    mean = total / rows
    return mean, (squares / rows - mean * mean).clamp_(min=0)


def unit_forward(
    a: Tensor,
    stream: Tensor,
    mean: Tensor,
    scale: Tensor,
    offset: Tensor,
    shift_mid: Tensor | None,
    slope: Tensor | None,
    shift_out: Tensor | None,
    next_shift: Tensor | None,
    *,
    shortcut: str,
    pack: bool,
) -> tuple[Tensor, Tensor]:
    """A unit's epilogue: the twin of :func:`tritonbnn.eager.unit_forward`."""
    check_kernel_dtype("stream", stream.dtype)
    affine = {"mean": mean, "scale": scale, "offset": offset}
    activation = {"shift_mid": shift_mid, "slope": slope, "shift_out": shift_out}
    check_unit(a, stream, shortcut, **affine, **activation, next_shift=next_shift)
    norm, after = contiguous(mean, scale, offset), contiguous(shift_mid, slope, shift_out)
    following = None if next_shift is None else next_shift.contiguous()
    return epilogue(
        channels_last(a), channels_last(stream), norm, after, following, shortcut, pack=pack
    )


def epilogue(
    a: Tensor,
    stream: Tensor,
    norm: Vectors,
    after: Vectors,
    next_shift: Tensor | None,
    shortcut: str,
    *,
    pack: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`unit_forward`, unchecked: images in channels_last memory, vectors contiguous.

    Args:
        a: as there, as are the others.
        norm: mean, scale and offset.
        after: shift_mid, slope and shift_out, or three times None.
    """
    n, channels, height, width = a.shape
    z = empty_pixels(a, stream.dtype)
    shape = (n, height, width, words(channels) if pack else 0)
    signs = torch.empty(shape, dtype=torch.int32, device=a.device)
    tile = config.choose(config.elementwise_key("unit_forward", a, stream), a.device).tile
    launch_elementwise(
        _unit_forward_kernel,
        config.whole_words(tile),
        z,
        **pass_arguments(a, stream, norm, after[:2], shortcut),
        shift_out_ptr=norm[0] if after[2] is None else after[2],
        next_shift_ptr=next_shift,
        z_ptr=z,
        signs_ptr=signs if pack else None,
    )
    return z, signs


def check_unit(a: Tensor, stream: Tensor, shortcut: str, **vectors: Tensor | None) -> None:
    """Raise unless a pass over a unit's images takes these."""
    checks.check_shape("stream", stream, checks.shortcut_input_shape(a.shape, shortcut))
    checks.check_per_channel(a.shape[1], **vectors)
    checks.check_same_device(a=a, stream=stream, **vectors)


def contiguous(*vectors: Tensor | None) -> Vectors:
    """Vectors as kernels read them."""
    return tuple([None if vector is None else vector.contiguous() for vector in vectors])


def pass_arguments(
    a: Tensor, stream: Tensor, norm: Vectors, activation: Vectors, shortcut: str
) -> dict[str, Any]:
    """What epilogue and activation backward read alike; an absent vector is the mean."""
    mean, scale, offset = norm
    shift_mid, slope = activation
    return {
        "a_ptr": a,
        "stream_ptr": stream,
        "mean_ptr": mean,
        "scale_ptr": scale,
        "offset_ptr": offset,
        "shift_mid_ptr": mean if shift_mid is None else shift_mid,
        "slope_ptr": mean if slope is None else slope,
        "HEIGHT": a.shape[2],
        "WIDTH": a.shape[3],
        "SHORTCUT": shortcut,
        "ACTIVATION": slope is not None,
    }
