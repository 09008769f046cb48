"""The gradient of a binary convolution to its weight: implicit GEMM over pixels.

One operand is real, so this is a real GEMM: products in the gradient's dtype (float32 in true
float32), sums in float32. Nothing is added atomically, so results are the same every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonbnn import checks
from tritonbnn.bits import WORD_BITS
from tritonbnn.kernels import below_triton, config
from tritonbnn.kernels.config import ceil_div
from tritonbnn.kernels.geometry import Geometry, checked_geometry
from tritonbnn.kernels.launch import check_kernel_dtype, launch
from tritonbnn.kernels.library import convolution_backward
from tritonbnn.kernels.pack import unpack_signs
from tritonbnn.kernels.tiles import signs, tile_of, window
from tritonbnn.kernels.weight import summed
from tritonbnn.layout import channels_last, empty_channels_last, flat_pixels

TARGET_PROGRAMS = 512
"""Programs that share the pixels: a few waves of any current GPU."""

MULTIPROCESSORS = 132
"""Of the GPUs whose warpgroups multiply, H100 and H200."""

MIN_STEPS = 8
"""Blocks of pixels that a split is worth, so that partial sums stay small traffic."""


@triton.jit
def _conv_weight_grad_kernel(
    grad_ptr,
    x_ptr,
    partial_ptr,
    pixels,
    steps,
    shape: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[split, o, t, c] = sum over the split's pixels p of grad[p, o] sign(x[p + t, c]).

    grad (N H' W', O) float; x (N H W, words) int32, expanded in registers to grad's dtype; partial
    (splits, O, kh kw, C) float32. Axis 1 of the grid is the tap, axis 2 the split, ``steps``
    blocks of BLOCK_K pixels each.
    """
    OPERAND: tl.constexpr = grad_ptr.dtype.element_ty
    CHANNELS: tl.constexpr = shape.channels
    OUT_CHANNELS: tl.constexpr = shape.out_channels
    WORDS: tl.constexpr = (CHANNELS + 31) // 32
    TAPS: tl.constexpr = shape.kernel_size * shape.kernel_size
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(CHANNELS, BLOCK_N))
    tap = tl.program_id(1)
    split = tl.program_id(2)
    out = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    word = pid_n * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
    channel = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(split * steps, split * steps + steps):
        pixel = step * BLOCK_K + tl.arange(0, BLOCK_K)
        source, inside = window(pixel, pixels, tap, shape)
        offs_g = pixel.to(tl.int64)[None, :] * OUT_CHANNELS + out[:, None]
        # A tap outside the image adds nothing: dropping its gradient is free, masking signs is not.
        g_mask = inside[None, :] & (out < OUT_CHANNELS)[:, None]
        g = tl.load(grad_ptr + offs_g, mask=g_mask, other=0)
        x_mask = inside[:, None] & (word < WORDS)[None, :]
        bits = tl.load(x_ptr + source[:, None] * WORDS + word[None, :], mask=x_mask, other=0)
        acc = tl.dot(g, signs(bits, OPERAND), acc, input_precision="ieee")
    offs = ((split * OUT_CHANNELS + out[:, None]) * TAPS + tap) * CHANNELS + channel[None, :]
    mask = (out < OUT_CHANNELS)[:, None] & (channel < CHANNELS)[None, :]
    tl.store(partial_ptr + offs, acc, mask=mask)


def conv_weight_grad(
    grad: Tensor, x: Tensor, *, channels: int, kernel_size: int, stride: int, padding: int
) -> Tensor:
    """The gradient to the weight: the twin of :func:`tritonbnn.eager.conv_weight_grad`."""
    check_kernel_dtype("grad", grad.dtype)
    checks.check_packed("x", x, channels)
    checks.check_same_device(grad=grad, x=x)
    geometry = checked_geometry(x, channels, grad.shape[1], kernel_size, stride, padding)
    checks.check_shape("grad", grad, geometry.output_shape)
    return weight_grad(grad, x.contiguous(), geometry, clip=None)


def weight_grad(grad: Tensor, x: Tensor, geometry: Geometry, *, clip: Tensor | None) -> Tensor:
    """The gradient to the weight, unchecked, float32.

    Args:
        grad: (N, O, H', W').
        x: packed (N, H, W, words), contiguous.
        geometry: of the convolution.
        clip: the latent weight, (O, C, kh, kw), where the gradient is 0 at abs(w) > 1. The
            gradient comes in its memory layout. None for no clip, and channels_last memory.
    """
    choice = _choice(geometry, grad.dtype, grad.device)
    channels, kernel_size = geometry.channels, geometry.kernel_size
    shape = (geometry.out_channels, channels, kernel_size, kernel_size)
    if choice.formulation == "library":
        real = empty_channels_last(shape, grad.dtype, grad.device)
        signs_of_x = unpack_signs(x, channels, grad.dtype)
        mask = [False, True, False]
        found = convolution_backward(grad, signs_of_x, real, geometry, mask)[1]
        partial = flat_pixels(channels_last(found))[None]
        return summed(partial, clip, shape)
    tile = choice.tile
    blocks = ceil_div(geometry.pixels, tile.block_k)
    splits = _splits(geometry, tile, blocks, choice.formulation)
    taps = kernel_size * kernel_size
    partial = torch.empty(
        (splits, geometry.out_channels * taps, channels), dtype=torch.float32, device=grad.device
    )
    if partial.numel() and choice.formulation == "warpgroup":
        from tritonbnn.kernels.weight_grad_warpgroup import weight_grad_warpgroup  # it needs Gluon

        steps = ceil_div(blocks, splits)
        weight_grad_warpgroup(channels_last(grad), x, partial, geometry, tile, steps)
    elif partial.numel():
        _launch_weight_grad(channels_last(grad), x, partial, geometry, tile, blocks)
    return summed(partial, clip, shape)


def _choice(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> config.Choice:
    """What the weight's gradient runs as."""
    key = geometry.key("conv_weight_grad", config.dtype_name(dtype))
    return below_triton.choose(key, device, "library")


def _splits(geometry: Geometry, tile: config.TileConfig, blocks: int, formulation: str) -> int:
    """How many programs share the pixels of one tile: a function of the problem alone.

    No device is asked, so that the order of summation is the same on all of them.
    """
    tiles = ceil_div(geometry.out_channels, tile.block_m)
    tiles *= ceil_div(geometry.channels, tile.block_n) * geometry.kernel_size**2
    most = ceil_div(blocks, MIN_STEPS)
    if formulation == "warpgroup":
        splits = _even_splits(tiles, most)
    else:
        splits = min(ceil_div(TARGET_PROGRAMS, tiles), most)
    return ceil_div(blocks, ceil_div(blocks, splits)) if splits else 0


def _even_splits(tiles: int, most: int) -> int:
    """The fewest splits with which nearly all multiprocessors work all of the time.

    Each of them has one program of a tile at once: splits beyond are memory traffic alone.
    """
    best, reached = min(1, most), 0.0
    for splits in range(1, min(most, ceil_div(TARGET_PROGRAMS, tiles)) + 1):
        busy = tiles * splits / (MULTIPROCESSORS * ceil_div(tiles * splits, MULTIPROCESSORS))
        if busy > reached:
            best, reached = splits, busy
        if reached > 0.95:
            break
    return best


def _launch_weight_grad(
    grad: Tensor,
    x: Tensor,
    partial: Tensor,
    geometry: Geometry,
    tile: config.TileConfig,
    blocks: int,
) -> None:
    splits = partial.shape[0]
    tiles = ceil_div(geometry.out_channels, tile.block_m)
    tiles *= ceil_div(geometry.channels, tile.block_n)
    launch(
        _conv_weight_grad_kernel,
        (tiles, geometry.kernel_size**2, splits),
        tile,
        grad_ptr=grad,
        x_ptr=x,
        partial_ptr=partial,
        pixels=geometry.pixels,
        steps=ceil_div(blocks, splits),
        shape=geometry.shape,
        BLOCK_M=tile.block_m,
        BLOCK_N=max(tile.block_n, WORD_BITS),
        BLOCK_K=tile.block_k,
    )
