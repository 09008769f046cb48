"""A packed weight as the input gradient's warpgroups read it: signs of channels by outputs.

``wgmma`` reads its first operand from registers. Of 16 channels by 64 outputs a lane has 32 values,
so that one word holds their signs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonbnn.kernels.config import TileConfig, ceil_div
from tritonbnn.kernels.launch import launch

OUTPUTS = 64
"""Outputs that a word's lane shares with three others: a step of the product."""

CHANNELS = 64
"""Of a warpgroup's instruction: 16 a warp."""

_WARPS = 4
_TILE = TileConfig(1, 1, 1, 4, 1)


class SignWords(NamedTuple):
    """What the product's first operand is made of.

    Attributes:
        words: int32 (taps, chunks of 64 outputs, blocks of channels, 4 warps, 32 lanes, tiles): a
            warp has ``tiles`` tiles of 16 channels, 64 apart. Of lane 4 g + t, bit 8 i + j + 16 e
            is that of channel 8 i + g and output 8 j + 2 t + e, and is 1 where the sign is -1.
        scales: (chunks, 4, 8, 2) in the gradient's dtype, by t, j and e: alpha of each output, 0
            beyond the last.
    """

    words: Tensor
    scales: Tensor


@triton.jit
def _sign_words_kernel(
    packed_ptr,
    alpha_ptr,
    words_ptr,
    scales_ptr,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    TILES: tl.constexpr,
):
    """packed (O, taps, words) int32 and alpha (O,) float32 as :class:`SignWords`.

    Axis 0 of the grid is the block of channels, axis 1 the chunk of outputs, axis 2 the tap.
    """
    WORDS: tl.constexpr = (CHANNELS + 31) // 32
    index = tl.arange(0, 4 * 32 * TILES)
    lane = index // TILES % 32
    channel = tl.program_id(0) * TILES + index % TILES
    channel = channel * 64 + index // (32 * TILES) * 16 + lane // 4
    first = tl.program_id(1) * 64 + lane % 4 * 2
    found = tl.zeros((4 * 32 * TILES,), tl.int32)
    for bit in range(32):
        row = channel + bit % 16 // 8 * 8
        out = first + bit % 8 * 8 + bit // 16
        known = (row < CHANNELS) & (out < OUT_CHANNELS)
        place = (out.to(tl.int64) * TAPS + tl.program_id(2)) * WORDS + row // 32
        packed = tl.load(packed_ptr + place, mask=known, other=0)
        found |= ((packed >> (row % 32)) & 1 ^ 1) << bit
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0)
    program += tl.program_id(0)
    tl.store(words_ptr + program.to(tl.int64) * (4 * 32 * TILES) + index, found)
    if (tl.program_id(0) == 0) & (tl.program_id(2) == 0):
        place = tl.program_id(1) * 64 + tl.arange(0, 64)
        out = tl.program_id(1) * 64 + place // 2 % 8 * 8 + place // 16 % 4 * 2 + place % 2
        alpha = tl.load(alpha_ptr + out, mask=out < OUT_CHANNELS, other=0.0)
        tl.store(scales_ptr + place, alpha.to(scales_ptr.dtype.element_ty))


def sign_words(
    packed: Tensor, alpha: Tensor, channels: int, dtype: torch.dtype, tiles: int
) -> SignWords:
    """The signs and scales of a packed weight, for the input's gradient.

    Args:
        packed: (O, k, k, words), contiguous.
        alpha: (O,) float32, rounded to ``dtype``.
        channels: C.
        dtype: of the gradient, bf16 or float16.
        tiles: of 16 channels that a warp has.
    """
    out_channels, kernel_size = packed.shape[:2]
    blocks, chunks = ceil_div(channels, CHANNELS * tiles), ceil_div(out_channels, OUTPUTS)
    taps, device = kernel_size**2, packed.device
    shape = (taps, chunks, blocks, _WARPS, 32, tiles)
    words = torch.empty(shape, dtype=torch.int32, device=device)
    scales = torch.empty((chunks, 4, 8, 2), dtype=dtype, device=device)
    launch(
        _sign_words_kernel,
        (blocks, chunks, taps),
        _TILE,
        packed_ptr=packed,
        alpha_ptr=alpha.contiguous(),
        words_ptr=words,
        scales_ptr=scales,
        CHANNELS=channels,
        OUT_CHANNELS=out_channels,
        TAPS=taps,
        TILES=tiles,
    )
    return SignWords(words, scales)
