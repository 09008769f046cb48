"""What the one-bit tensor core's kernels need beside the image: who has one, how a block is cut,
and four small operands, made by plain Triton kernels.

Bytes: ``patch`` costs 8 an output pixel, written and read, and one more pass over the packed image;
the others are about as small as the packed weight.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonbnn.checks import sum_dtype
from tritonbnn.kernels import verdicts
from tritonbnn.kernels.config import TileConfig, ceil_div, power_of_two
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.launch import interpreted, launch
from tritonbnn.kernels.targets import target_of
from tritonbnn.kernels.tiles import popcount, window

CHUNK_WORDS = 16
"""Words of K in a step of the kernel's loop, two instructions of 256 bits."""

BORDERS = 16
"""Ways in which a 3x3 window can cross the image's border: a bit each for its four sides."""

_TILE = TileConfig(256, 1, 1, 4, 1)


@triton.jit
def _fragments_kernel(
    weight_ptr,
    fragments_ptr,
    words,
    OUT_CHANNELS: tl.constexpr,
    TAP_WORDS: tl.constexpr,
    TILES_O: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weight, tile by tile of 16 channels, in the order in which lanes read it.

    weight (O, TAP_WORDS) int32; fragments (tiles, chunks, 2, 32 lanes, 4) int32, 0 beyond O and K.
    Register r of lane 4 g + t for instruction s of a chunk: word 4 t + 2 s + r / 2 of the chunk,
    and of the 16 TILES_O channels of a warp number 2 TILES_O g + 2 tile + r % 2.
    """
    CHUNKS: tl.constexpr = (TAP_WORDS + 15) // 16
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    register = index % 4
    lane = index // 4 % 32
    step = index // 128 % 2
    chunk = index // 256 % CHUNKS
    tile = index // (256 * CHUNKS)
    in_warp = lane // 4 * 2 * TILES_O + tile % TILES_O * 2 + register % 2
    channel = tile // TILES_O * (16 * TILES_O) + in_warp
    word = chunk * 16 + lane % 4 * 4 + step * 2 + register // 2
    mask = (index < words) & (channel < OUT_CHANNELS) & (word < TAP_WORDS)
    value = tl.load(weight_ptr + channel * TAP_WORDS + word, mask=mask, other=0)
    tl.store(fragments_ptr + index, value, mask=index < words)


@triton.jit
def _matrices_kernel(
    weight_ptr,
    matrices_ptr,
    words,
    OUT_CHANNELS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weight, stage by stage, in the order in which a warpgroup's instruction reads it.

    weight (O, WORDS) int32; matrices (blocks, chunks, STEPS, BLOCK_N / 8, 2, 8, 4) int32, 0 beyond
    O and K: by step of a stage, 8 columns, half of the step's words, column, word. Word t of half h
    is the chunk's 16 (step / 2) + 4 t + 2 (step % 2) + h, as lanes read x; column 8 j + 2 t + c is
    the block's channel 32 (j / 4) + 8 t + 2 (j % 4) + c, so that lane t has 8 side by side.
    """
    CHUNKS: tl.constexpr = (WORDS + 8 * STEPS - 1) // (8 * STEPS)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    quarter = index % 4
    column = index // 4 % 8
    half = index // 32 % 2
    eighth = index // 64 % (BLOCK_N // 8)
    step = index // (8 * BLOCK_N) % STEPS
    chunk = index // (8 * BLOCK_N * STEPS) % CHUNKS
    block = index // (8 * BLOCK_N * STEPS * CHUNKS)
    in_block = eighth // 4 * 32 + column // 2 * 8 + eighth % 4 * 2 + column % 2
    channel = block * BLOCK_N + in_block
    word = (chunk * STEPS + step // 2 * 2) * 8 + quarter * 4 + step % 2 * 2 + half
    mask = (index < words) & (channel < OUT_CHANNELS) & (word < WORDS)
    value = tl.load(weight_ptr + channel * WORDS + word, mask=mask, other=0)
    tl.store(matrices_ptr + index, value, mask=index < words)


@triton.jit
def _base_kernel(
    weight_ptr,
    base_ptr,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    BORDERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """base[b, o] = sum over the taps inside at border b of C - 2 popcount(weight[o, tap]).

    weight (O, kh kw, words) int32; base (BORDERS, O) int16 or int32.
    """
    WORDS: tl.constexpr = (CHANNELS + 31) // 32
    TAPS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE
    out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = out < OUT_CHANNELS
    border = tl.arange(0, BORDERS)[:, None]
    base = tl.zeros((BORDERS, BLOCK), tl.int32)
    for tap in range(TAPS):
        ones = tl.zeros((BLOCK,), tl.int32)
        for word in range(WORDS):
            w = tl.load(weight_ptr + (out * TAPS + tap) * WORDS + word, mask=known, other=0)
            ones += popcount(w)
        last = KERNEL_SIZE - 1
        row, column = tap // KERNEL_SIZE, tap % KERNEL_SIZE
        above = (row == 0) & (border % 2 != 0)
        below = (row == last) & (border // 2 % 2 != 0)
        left = (column == 0) & (border // 4 % 2 != 0)
        right = (column == last) & (border // 8 != 0)
        base += tl.where(above | below | left | right, 0, CHANNELS - 2 * ones[None, :])
    offs = border * OUT_CHANNELS + out[None, :]
    tl.store(base_ptr + offs, base.to(base_ptr.dtype.element_ty), mask=known[None, :])


@triton.jit
def _patch_kernel(
    x_ptr,
    patch_ptr,
    pixels,
    shape: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """patch[p] = 16 ones[p] + border[p]: the bits set in a window, and the sides it crosses.

    x (N H W, words) int32; patch (N H' W') int32.
    """
    WORDS: tl.constexpr = (shape.channels + 31) // 32
    pixel = (tl.program_id(0) * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    word = tl.arange(0, BLOCK_WORDS)[None, :]
    ones = tl.zeros((BLOCK,), tl.int32)
    for tap in range(shape.kernel_size * shape.kernel_size):
        source, inside = window(pixel, pixels, tap, shape)
        mask = inside[:, None] & (word < WORDS)
        x = tl.load(x_ptr + source[:, None] * WORDS + word, mask=mask, other=0)
        ones += tl.sum(popcount(x), axis=1)
    row = pixel // shape.out_width % shape.out_height * shape.stride - shape.padding
    column = pixel % shape.out_width * shape.stride - shape.padding
    below, right = row + shape.kernel_size > shape.height, column + shape.kernel_size > shape.width
    border = (row < 0).to(tl.int32) + 2 * below.to(tl.int32)
    border += 4 * (column < 0).to(tl.int32) + 8 * right.to(tl.int32)
    tl.store(patch_ptr + pixel, 16 * ones + border, mask=pixel < pixels)


@dataclass(frozen=True)
class Cut:
    """How a block's warps share it, in tiles of 16 channels by 8 pixels: a kernel's constant."""

    warps_o: int
    tiles_o: int
    warps_p: int
    tiles_p: int


def block_tiles(tile: TileConfig) -> Cut:
    """How warps share a block: channels first, at most 64 a warp, then pixels.

    A count is 0 where the block is too small for its warps.
    """
    tiles_o = min(4, tile.block_n // 16)
    warps_o = tile.block_n // (16 * tiles_o)
    warps_p = tile.num_warps // warps_o
    tiles_p = tile.block_m // (8 * warps_p) if warps_p else 0
    return Cut(warps_o, tiles_o, warps_p, tiles_p)


def takes(formulation: str, geometry: Geometry) -> bool:
    """Whether a formulation has a kernel for a problem: the warpgroup's takes a plain product."""
    return formulation != "wgmma" or (geometry.kernel_size, geometry.stride) == (1, 1)


@lru_cache
def has_one_bit_core(device: torch.device, formulation: str = "mma") -> bool:
    """Whether the one-bit tensor core's kernels run on a device; on ``meta``, whether they compile.

    Not in the interpreter, and not with a Triton that has no Gluon or another one than these need.
    On a GPU they must have been exact in a process of their own.
    """
    if interpreted(_patch_kernel):
        return False
    try:
        if formulation == "wgmma":
            from tritonbnn.kernels import mma_warpgroup  # noqa: F401
        else:
            from tritonbnn.kernels import mma  # noqa: F401
    except ImportError:
        return False
    if device.type == "cuda":
        there = formulation in target_of(device).products
        return there and verdicts.trusted(device, formulation)
    return device.type == "meta"


def weight_fragments(weight: Tensor, geometry: Geometry, tiles_o: int, tiles: int) -> Tensor:
    """A packed weight as the tensor core's lanes read it.

    Args:
        weight: packed (O, kh, kw, words).
        geometry: of the convolution.
        tiles_o: tiles of 16 channels that a warp has.
        tiles: tiles in all, those beyond the last channel included.
    """
    tap_words = weight[0].numel()
    shape = (tiles, ceil_div(tap_words, CHUNK_WORDS), 2, 32, 4)
    fragments = torch.empty(shape, dtype=torch.int32, device=weight.device)
    launch(
        _fragments_kernel,
        ceil_div(fragments.numel(), _TILE.block_m),
        _TILE,
        weight_ptr=weight,
        fragments_ptr=fragments,
        words=fragments.numel(),
        OUT_CHANNELS=geometry.out_channels,
        TAP_WORDS=tap_words,
        TILES_O=tiles_o,
        BLOCK=_TILE.block_m,
    )
    return fragments


def weight_matrices(weight: Tensor, block_n: int, steps: int) -> Tensor:
    """A packed weight as a warpgroup's tensor core reads it.

    Args:
        weight: packed (O, 1, 1, words).
        block_n: channels of a block.
        steps: of 256 bits of K in a stage.
    """
    out_channels, words = len(weight), weight.shape[-1]
    blocks, chunks = ceil_div(out_channels, block_n), ceil_div(words, 8 * steps)
    shape = (blocks, chunks, steps, block_n // 8, 2, 8, 4)
    matrices = torch.empty(shape, dtype=torch.int32, device=weight.device)
    launch(
        _matrices_kernel,
        ceil_div(matrices.numel(), _TILE.block_m),
        _TILE,
        weight_ptr=weight,
        matrices_ptr=matrices,
        words=matrices.numel(),
        OUT_CHANNELS=out_channels,
        WORDS=words,
        BLOCK_N=block_n,
        STEPS=steps,
        BLOCK=_TILE.block_m,
    )
    return matrices


def window_bases(weight: Tensor, geometry: Geometry) -> Tensor:
    """What a window without any ones yields, (borders, O); one border without padding.

    In int16 where that holds it: half the registers, which the accumulators need.
    """
    borders = BORDERS if geometry.padding else 1
    dtype = sum_dtype(geometry.channels * geometry.kernel_size**2)
    base = torch.empty((borders, geometry.out_channels), dtype=dtype, device=weight.device)
    block = 32
    launch(
        _base_kernel,
        ceil_div(geometry.out_channels, block),
        _TILE,
        weight_ptr=weight,
        base_ptr=base,
        CHANNELS=geometry.channels,
        OUT_CHANNELS=geometry.out_channels,
        KERNEL_SIZE=geometry.kernel_size,
        BORDERS=borders,
        BLOCK=block,
    )
    return base


def window_ones(x: Tensor, geometry: Geometry) -> Tensor:
    """16 times the bits set in every window, plus its border, (N H' W') int32; K is below 2^27."""
    patch = torch.empty(geometry.pixels, dtype=torch.int32, device=x.device)
    block_words = power_of_two(x.shape[-1])
    block = max(1, 1024 // block_words)
    launch(
        _patch_kernel,
        ceil_div(geometry.pixels, block),
        _TILE,
        x_ptr=x,
        patch_ptr=patch,
        pixels=geometry.pixels,
        shape=geometry.shape,
        BLOCK=block,
        BLOCK_WORDS=block_words,
    )
    return patch
