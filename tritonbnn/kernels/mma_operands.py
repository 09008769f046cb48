"""What the warpgroup's one-bit tensor core needs beside packed operands.

Bytes: the ones of pixels cost 8 a pixel, written and read, and one more pass over the packed image.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonbnn.kernels.config import TileConfig, ceil_div, power_of_two
from tritonbnn.kernels.launch import launch
from tritonbnn.kernels.tiles import popcount

_TILE = TileConfig(256, 1, 1, 4, 1)


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
def _ones_kernel(
    packed_ptr,
    ones_ptr,
    rows,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """ones[r] = the bits set in a row, int32; packed (rows, WORDS) int32."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = tl.arange(0, BLOCK_WORDS)[None, :]
    mask = (row < rows)[:, None] & (word < WORDS)
    packed = tl.load(packed_ptr + row[:, None] * WORDS + word, mask=mask, other=0)
    tl.store(ones_ptr + row, tl.sum(popcount(packed), axis=1), mask=row < rows)


class WarpgroupOperands(NamedTuple):
    """What the warpgroup's product takes beside x.

    Attributes:
        matrices: the weight, int32, in the order in which the instruction reads it.
        weight_ones: (O,) int32, the bits set in the weight of each output.
        x_ones: (N H W,) int32, those of each pixel.
    """

    matrices: Tensor
    weight_ones: Tensor
    x_ones: Tensor


def warpgroup_operands(x: Tensor, weight: Tensor, tile: TileConfig) -> WarpgroupOperands:
    """The operands of a product.

    Args:
        x: packed (N, H, W, words), contiguous.
        weight: packed (O, 1, 1, words), contiguous.
        tile: of the product.
    """
    matrices = _weight_matrices(weight, tile.block_n, tile.block_k // 256)
    return WarpgroupOperands(matrices, _row_ones(weight), _row_ones(x))


def _weight_matrices(weight: Tensor, block_n: int, steps: int) -> Tensor:
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


def _row_ones(packed: Tensor) -> Tensor:
    """The bits set in every row of packed (..., words), flat, int32."""
    words = packed.shape[-1]
    rows = packed.numel() // words
    ones = torch.empty(rows, dtype=torch.int32, device=packed.device)
    block_words = power_of_two(words)
    block = max(1, 1024 // block_words)
    launch(
        _ones_kernel,
        ceil_div(rows, block),
        _TILE,
        packed_ptr=packed,
        ones_ptr=ones,
        rows=rows,
        WORDS=words,
        BLOCK=block,
        BLOCK_WORDS=block_words,
    )
    return ones
