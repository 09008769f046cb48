"""Binary convolution, forward: implicit GEMM over packed channels-last images.

M is the output pixels, N the output channels, K the taps times the channels. A weight arrives
either packed, for the popcount kernel, or expanded to numbers, for the tensor cores: it is small,
and expanding it once spares every tile the shuffles that expanding both operands would cost.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonbnn import checks
from tritonbnn.bits import WORD_BITS
from tritonbnn.kernels import below_triton, config
from tritonbnn.kernels.config import ONE_BIT, ceil_div
from tritonbnn.kernels.geometry import Geometry, checked_geometry
from tritonbnn.kernels.launch import check_kernel_dtype, launch
from tritonbnn.kernels.library import convolution
from tritonbnn.kernels.mma_operands import warpgroup_operands
from tritonbnn.kernels.pack import unpack_signs
from tritonbnn.kernels.targets import target_of
from tritonbnn.kernels.tiles import popcount, signs, store_moments, tile_of, window
from tritonbnn.kernels.weight import Numbers, expand
from tritonbnn.layout import channels_last, empty_channels_last, flat_pixels, from_flat


class BlockMoments(NamedTuple):
    """Moments of a convolution's output, by blocks of pixels.

    Attributes:
        sums: float32 (blocks, 2, O): a block's sum, and its sum of squares about its own mean.
        rows: pixels of a block, of which the last one may have fewer.
    """

    sums: Tensor
    rows: int


@triton.jit
def _conv_dot_kernel(
    x_ptr,
    weight_ptr,
    tap_sum_ptr,
    alpha_ptr,
    y_ptr,
    sums_ptr,
    pixels,
    shape: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[p, o] = alpha[o] * sum over valid taps t and c of sign(x[p + t, c]) weight[o, t, c].

    x (N H W, words) int32, expanded in registers to the weight's dtype; weight (O, kh kw, C)
    float or int8; tap_sum (O, kh kw), the weight's sums over C in the accumulator's dtype, or
    None without padding; alpha (O,) float32 or None; y (N H' W', O) of any number dtype. sums
    (blocks of BLOCK_M pixels, 2, O) float32 or None: y's moments, as :func:`store_moments` has
    them.
    """
    OPERAND: tl.constexpr = weight_ptr.dtype.element_ty
    ACCUMULATOR: tl.constexpr = tl.int32 if OPERAND.is_int() else tl.float32
    CHANNELS: tl.constexpr = shape.channels
    OUT_CHANNELS: tl.constexpr = shape.out_channels
    WORDS: tl.constexpr = (CHANNELS + 31) // 32
    TAPS: tl.constexpr = shape.kernel_size * shape.kernel_size
    CHUNKS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(OUT_CHANNELS, BLOCK_N))
    pixel = (pid_m * BLOCK_M).to(tl.int32) + tl.arange(0, BLOCK_M)
    out = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    for step in range(TAPS * CHUNKS):
        tap = step // CHUNKS
        chunk = step % CHUNKS
        source, inside = window(pixel, pixels, tap, shape)
        word = chunk * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
        x_mask = inside[:, None] & (word < WORDS)[None, :]
        bits = tl.load(x_ptr + source[:, None] * WORDS + word[None, :], mask=x_mask, other=0)
        channel = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
        offs_w = (out[None, :] * TAPS + tap) * CHANNELS + channel[:, None]
        w_mask = (channel < CHANNELS)[:, None] & (out < OUT_CHANNELS)[None, :]
        # Lanes beyond C are -1 in x, and the weight's are 0.
        w = tl.load(weight_ptr + offs_w, mask=w_mask, other=0)
        acc = tl.dot(signs(bits, OPERAND), w, acc, input_precision="ieee", out_dtype=ACCUMULATOR)
    known = out < OUT_CHANNELS
    if shape.padding > 0:
        # A tap outside the image was all -1 above; giving back its sum once costs less than
        # masking every sign.
        for tap in range(TAPS):
            _, inside = window(pixel, pixels, tap, shape)
            tap_sum = tl.load(tap_sum_ptr + out * TAPS + tap, mask=known, other=0)
            acc += tl.where(inside[:, None], 0, tap_sum[None, :])
    y = acc
    if alpha_ptr is not None:
        y = acc.to(tl.float32) * tl.load(alpha_ptr + out, mask=known, other=0.0)[None, :]
    offs_y = pixel.to(tl.int64)[:, None] * OUT_CHANNELS + out[None, :]
    exists = (pixel < pixels)[:, None]
    mask = exists & known[None, :]
    tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=mask)
    if sums_ptr is not None:
        # In the accumulator's layout a sum over pixels takes six times the shuffles: read again as
        # stored, a thread has eight channels side by side, of many pixels.
        tl.debug_barrier()
        stored = tl.load(y_ptr + offs_y, mask=mask, other=0.0).to(tl.float32)
        block = tl.program_id(0) // tl.cdiv(OUT_CHANNELS, BLOCK_N)
        count = tl.minimum(pixels - block * BLOCK_M, BLOCK_M)
        sums_ptr += block.to(tl.int64) * 2 * OUT_CHANNELS
        store_moments(stored, exists, count, out, known, sums_ptr, OUT_CHANNELS)


@triton.jit
def _conv_popcount_kernel(
    x_ptr,
    weight_ptr,
    alpha_ptr,
    y_ptr,
    pixels,
    shape: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y[p, o] = alpha[o] * sum over valid taps t of C - 2 popcount(x[p + t] ^ weight[o, t]).

    x (N H W, words) int32; weight (O, kh kw, words) int32; alpha (O,) float32 or None; y
    (N H' W', O) of any number dtype.
    """
    CHANNELS: tl.constexpr = shape.channels
    OUT_CHANNELS: tl.constexpr = shape.out_channels
    WORDS: tl.constexpr = (CHANNELS + 31) // 32
    TAPS: tl.constexpr = shape.kernel_size * shape.kernel_size
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(OUT_CHANNELS, BLOCK_N))
    pixel = (pid_m * BLOCK_M).to(tl.int32) + tl.arange(0, BLOCK_M)
    out = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    known = out < OUT_CHANNELS
    differing = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    valid_taps = tl.zeros((BLOCK_M,), tl.int32)
    for tap in range(TAPS):
        source, inside = window(pixel, pixels, tap, shape)
        valid_taps += inside.to(tl.int32)
        # x ^ w & keep is one three-input instruction, so the padding costs nothing.
        keep = tl.where(inside, -1, 0)[:, None]
        for word in range(WORDS):
            x = tl.load(x_ptr + source * WORDS + word, mask=inside, other=0)
            w = tl.load(weight_ptr + (out * TAPS + tap) * WORDS + word, mask=known, other=0)
            differing += popcount((x[:, None] ^ w[None, :]) & keep)
    y = CHANNELS * valid_taps[:, None] - 2 * differing
    if alpha_ptr is not None:
        y = y.to(tl.float32) * tl.load(alpha_ptr + out, mask=known, other=0.0)[None, :]
    offs_y = pixel.to(tl.int64)[:, None] * OUT_CHANNELS + out[None, :]
    mask = (pixel < pixels)[:, None] & known[None, :]
    tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=mask)


def conv_packed(
    x: Tensor,
    weight: Tensor,
    alpha: Tensor | None,
    *,
    channels: int,
    stride: int,
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    """Convolve signs with signs: the twin of :func:`tritonbnn.eager.conv_packed`."""
    checks.check_packed("x", x, channels)
    checks.check_packed("weight", weight, channels)
    checks.check_same_device(x=x, weight=weight, alpha=alpha)
    checks.check_per_channel(weight.shape[0], alpha=alpha)
    if dtype not in (torch.int16, torch.int32):
        check_kernel_dtype("dtype", dtype)
    geometry = checked_geometry(x, channels, weight.shape[0], weight.shape[1], stride, padding)
    if alpha is not None:
        alpha = alpha.to(torch.float32).contiguous()
    choice = product_choice(geometry, x.device)
    return convolved(x.contiguous(), weight.contiguous(), None, alpha, geometry, choice, dtype)


def product_choice(geometry: Geometry, device: torch.device) -> config.Choice:
    """What a packed convolution runs as: the table's choice, if the device has what it takes."""
    key = geometry.key("conv_packed", "int32")
    choice = config.choose(key, device)
    name = choice.formulation
    if name not in ONE_BIT or (config.takes(name, key) and below_triton.runs(device, name)):
        return choice
    return config.on_common_cores(key, target_of(device))


def convolved(
    x: Tensor,
    weight: Tensor,
    numbers: Numbers | None,
    alpha: Tensor | None,
    geometry: Geometry,
    choice: config.Choice,
    dtype: torch.dtype,
) -> Tensor:
    """Convolve signs with signs, unchecked.

    Args:
        x: packed (N, H, W, words), contiguous.
        weight: packed (O, kh, kw, words), contiguous.
        numbers: the weight's, if they are there already.
        alpha: (O,) float32, or None for 1.
        geometry: of the convolution.
        choice: what it runs as.
        dtype: of the result.

    Returns:
        (N, O, H', W') in channels_last memory.
    """
    y = empty_channels_last(geometry.output_shape, dtype, x.device)
    if y.numel() and choice.formulation == "mma":
        from tritonbnn.kernels.mma import conv_mma  # it needs Gluon, which not every Triton has

        conv_mma(x, weight, alpha, flat_pixels(y), geometry, choice.tile)
    elif y.numel() and choice.formulation == "wgmma":
        from tritonbnn.kernels.mma_warpgroup import conv_warpgroup

        operands = warpgroup_operands(x, weight, choice.tile)
        conv_warpgroup(x, operands, alpha, flat_pixels(y), geometry, choice.tile)
    elif y.numel() and choice.formulation == "popcount":
        _launch_popcount(x, weight, alpha, y, geometry, choice.tile)
    elif y.numel():
        values, sums = numbers or expand(weight, geometry.channels)
        tap_sums = sums if geometry.padding else None
        _launch_dot(x, values, tap_sums, alpha, y, None, geometry, choice.tile)
    return y


def conv_real(
    x: Tensor, weight: Tensor, *, stride: int, padding: int, dtype: torch.dtype
) -> Tensor:
    """Convolve signs with a real weight: the twin of :func:`tritonbnn.eager.conv_real`."""
    out_channels, channels, kernel_size, _ = weight.shape
    checks.check_packed("x", x, channels)
    checks.check_same_device(x=x, weight=weight)
    check_kernel_dtype("weight", weight.dtype)
    check_kernel_dtype("dtype", dtype)
    geometry = checked_geometry(x, channels, out_channels, kernel_size, stride, padding)
    return real_convolved(x, weight, geometry, dtype, summed=False)[0]


def real_convolved(
    x: Tensor, weight: Tensor, geometry: Geometry, dtype: torch.dtype, *, summed: bool
) -> tuple[Tensor, BlockMoments | None]:
    """:func:`conv_real`, unchecked, and its moments if they are wanted and the product is ours.

    They cost 8 bytes a block and channel, where a pass over the result would read all of it.

    Args:
        x: packed (N, H, W, words).
        weight: (O, C, kh, kw).
        geometry: of the convolution.
        dtype: of operands and result.
        summed: whether moments are wanted.
    """
    choice = _real_choice(geometry, dtype, x.device)
    if choice.formulation == "library":
        signs = unpack_signs(x, geometry.channels, dtype)
        return channels_last(convolution(signs, channels_last(weight.to(dtype)), geometry)), None
    outputs, block = geometry.out_channels, choice.tile.block_m
    y = torch.empty((geometry.pixels, outputs), dtype=dtype, device=x.device)
    sums = None
    if summed:
        shape = (ceil_div(geometry.pixels, block), 2, outputs)
        sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    if y.numel() and choice.formulation == "warpgroup":
        from tritonbnn.kernels.conv_warpgroup import conv_warpgroup_real  # it needs Gluon

        numbers = weight.permute(2, 3, 1, 0)  # outputs side by side
        numbers = numbers.to(dtype, copy=True, memory_format=torch.contiguous_format)
        conv_warpgroup_real(x.contiguous(), numbers, y, sums, geometry, choice.tile)
    elif y.numel():
        flat = flat_pixels(channels_last(weight.to(dtype)))
        tap_sums = flat.sum(1, dtype=torch.float32) if geometry.padding else None
        _launch_dot(x.contiguous(), flat, tap_sums, None, y, sums, geometry, choice.tile)
    moments = None if sums is None else BlockMoments(sums, block)
    return from_flat(y, geometry.output_shape), moments


def _real_choice(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> config.Choice:
    """What a real weight's product runs as."""
    key = geometry.key("conv_real", config.dtype_name(dtype))
    return below_triton.choose(key, device, "dot")


def _launch_dot(
    x: Tensor,
    weight: Tensor,
    tap_sums: Tensor | None,
    alpha: Tensor | None,
    y: Tensor,
    sums: Tensor | None,
    geometry: Geometry,
    tile: config.TileConfig,
) -> None:
    """Run the tensor-core kernel; ``weight`` holds numbers, (O kh kw, C), with their sums."""
    launch(
        _conv_dot_kernel,
        ceil_div(geometry.pixels, tile.block_m) * ceil_div(geometry.out_channels, tile.block_n),
        tile,
        x_ptr=x,
        weight_ptr=weight,
        tap_sum_ptr=tap_sums,
        alpha_ptr=alpha,
        y_ptr=y,
        sums_ptr=sums,
        pixels=geometry.pixels,
        shape=geometry.shape,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=max(tile.block_k, WORD_BITS),
    )


def _launch_popcount(
    x: Tensor,
    weight: Tensor,
    alpha: Tensor | None,
    y: Tensor,
    geometry: Geometry,
    tile: config.TileConfig,
) -> None:
    """Run the popcount kernel; ``weight`` is packed, (O, kh, kw, words)."""
    launch(
        _conv_popcount_kernel,
        ceil_div(geometry.pixels, tile.block_m) * ceil_div(geometry.out_channels, tile.block_n),
        tile,
        x_ptr=x,
        weight_ptr=weight,
        alpha_ptr=alpha,
        y_ptr=y,
        pixels=geometry.pixels,
        shape=geometry.shape,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
    )
