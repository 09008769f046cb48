"""Who has a one-bit tensor core, and what the warpgroup's needs beside packed operands.

Bytes: the ones of pixels cost 8 a pixel, written and read, and one more pass over the packed image.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonbnn.kernels import config, verdicts
from tritonbnn.kernels.config import ONE_BIT, TileConfig, ceil_div, power_of_two
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.launch import interpreted, launch
from tritonbnn.kernels.targets import target_of
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


@lru_cache
def has_one_bit_core(device: torch.device, formulation: str = "mma") -> bool:
    """Whether the one-bit tensor core's kernels run on a device; on ``meta``, whether they compile.

    The other kernels in Gluon are asked for here too. Not in the interpreter, and not with a Triton
    that has no Gluon or another one than these need. On a GPU they must have been exact in a
    process of their own.
    """
    if interpreted(_ones_kernel):
        return False
    try:
        if formulation == "wgmma":
            from tritonbnn.kernels import mma_warpgroup  # noqa: F401
        elif formulation == "warpgroup":
            from tritonbnn.kernels import (  # noqa: F401
                conv_warpgroup,
                input_grad_warpgroup,
                weight_grad_warpgroup,
            )
        else:
            from tritonbnn.kernels import mma  # noqa: F401
    except ImportError:
        return False
    if device.type == "cuda":
        target = target_of(device)
        there = formulation in (*target.products, *target.weight_grads)
        return there and verdicts.trusted(device, formulation)
    return device.type == "meta"


def on_one_bit_core(geometry: Geometry, device: torch.device) -> bool:
    """Whether units around a packed convolution do it on ``mma``'s core, within their passes.

    By the tuning table and the device, wherever the product alone runs on either one-bit core.
    """
    choice = config.choose(geometry.key("conv_packed", "int32"), device)
    return geometry.pixels > 0 and choice.formulation in ONE_BIT and has_one_bit_core(device)


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


def row_ones(packed: Tensor) -> Tensor:
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
