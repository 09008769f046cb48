"""Pack signs into int32 words along channels, and back."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonbnn import checks
from tritonbnn.bits import WORD_BITS, words
from tritonbnn.kernels import config
from tritonbnn.kernels.config import TileConfig, ceil_div, power_of_two
from tritonbnn.kernels.launch import check_kernel_dtype, launch
from tritonbnn.kernels.tiles import popcount
from tritonbnn.kernels.weight import prepare
from tritonbnn.layout import channels_last, flat_pixels, from_flat

_TILE = TileConfig(64, WORD_BITS, 1, 4, 1)
"""Words and lanes that are unpacked at once."""


@triton.jit
def _pack_kernel(
    x_ptr,
    shift_ptr,
    packed_ptr,
    rows,
    CHANNELS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """packed[r, w] = sum over l of (x[r, 32 w + l] + shift[32 w + l] >= 0) << l.

    x (rows, CHANNELS) float, shift (CHANNELS,) float or None, packed (rows, WORDS) int32. A
    program packs BLOCK words, counted over the whole of ``packed``.
    """
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = word // WORDS
    lane = tl.arange(0, 32)[None, :]
    channel = (word % WORDS)[:, None] * 32 + lane
    mask = (row < rows)[:, None] & (channel < CHANNELS)
    # A lane beyond C must pack to 0, and a negative number does.
    x = tl.load(x_ptr + row[:, None] * CHANNELS + channel, mask=mask, other=-1.0).to(tl.float32)
    if shift_ptr is not None:
        x += tl.load(shift_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    packed = tl.sum((x >= 0).to(tl.int32) << lane, axis=1)
    tl.store(packed_ptr + word, packed, mask=row < rows)


@triton.jit
def _unpack_kernel(
    packed_ptr,
    x_ptr,
    rows,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x[r, c] = +1 where bit c of packed[r] is set, and -1 elsewhere.

    packed (rows, words) int32, x (rows, CHANNELS) of any number dtype. A program takes BLOCK_M
    rows, BLOCK words of them at a time.
    """
    WORDS: tl.constexpr = (CHANNELS + 31) // 32
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, 32)[None, None, :]
    one = tl.full((), 1, x_ptr.dtype.element_ty)
    for start in range(0, WORDS, BLOCK):
        word = start + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows)[:, None] & (word < WORDS)
        packed = tl.load(packed_ptr + row[:, None] * WORDS + word, mask=inside, other=0)
        channel = word[:, :, None] * 32 + lane
        x = tl.where((packed[:, :, None] >> lane) & 1 != 0, one, -one)
        mask = (row < rows)[:, None, None] & (channel < CHANNELS)
        tl.store(x_ptr + row[:, None, None] * CHANNELS + channel, x, mask=mask)


@triton.jit
def _difference_kernel(
    a_ptr,
    b_ptr,
    counts_ptr,
    rows,
    WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """counts[r] = sum over w of popcount(a[r, w] ^ b[r, w]).

    a, b (rows, WORDS) int32, counts (rows,) int32. A program takes BLOCK_M rows, BLOCK_N words of
    them at a time.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    counts = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for start in range(0, WORDS, BLOCK_N):
        word = start + tl.arange(0, BLOCK_N)[None, :]
        mask = (row < rows)[:, None] & (word < WORDS)
        offset = row[:, None] * WORDS + word
        a = tl.load(a_ptr + offset, mask=mask, other=0)
        b = tl.load(b_ptr + offset, mask=mask, other=0)
        counts += tl.sum(popcount(a ^ b), axis=1)
    tl.store(counts_ptr + row, counts, mask=row < rows)


def pack_signs(x: Tensor, shift: Tensor | None = None) -> Tensor:
    """Pack the signs of ``x + shift``: the twin of :func:`tritonbnn.eager.pack_signs`."""
    check_kernel_dtype("x", x.dtype)
    checks.check_per_channel(x.shape[1], shift=shift)
    checks.check_same_device(x=x, shift=shift)
    flat = flat_pixels(channels_last(x))
    rows, channels = flat.shape
    packed = torch.empty((rows, words(channels)), dtype=torch.int32, device=x.device)
    tile = config.choose(config.elementwise_key("pack_signs", x), x.device).tile
    block = max(1, tile.block_m * tile.block_n // WORD_BITS)
    if packed.numel():
        launch(
            _pack_kernel,
            ceil_div(packed.numel(), block),
            tile,
            x_ptr=flat,
            shift_ptr=None if shift is None else shift.contiguous(),
            packed_ptr=packed,
            rows=rows,
            CHANNELS=channels,
            WORDS=words(channels),
            BLOCK=block,
        )
    if x.dim() == 2:
        return packed
    n, _, h, w = x.shape
    return packed.view(n, h, w, packed.shape[1])


def unpack_signs(packed: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Expand packed signs to +1 and -1: the twin of :func:`tritonbnn.eager.unpack_signs`.

    ``dtype`` may also be an integer one: int8 feeds the integer tensor core.
    """
    checks.check_packed("packed", packed, channels)
    if dtype != torch.int8:
        check_kernel_dtype("dtype", dtype)
    rows = packed.numel() // packed.shape[-1]
    flat = torch.empty((rows, channels), dtype=dtype, device=packed.device)
    block = min(_TILE.block_m, power_of_two(packed.shape[-1]))
    block_m = _TILE.block_m // block
    if flat.numel():
        launch(
            _unpack_kernel,
            ceil_div(rows, block_m),
            _TILE,
            packed_ptr=packed.contiguous(),
            x_ptr=flat,
            rows=rows,
            CHANNELS=channels,
            BLOCK_M=block_m,
            BLOCK=block,
        )
    if packed.dim() == 2:
        return flat
    n, h, w, _ = packed.shape
    return from_flat(flat, (n, channels, h, w))


def pack_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a weight and scale it: the twin of :func:`tritonbnn.eager.pack_weight`."""
    check_kernel_dtype("weight", weight.dtype)
    packed, alpha, _ = prepare(weight)
    return packed, alpha


def packed_difference(a: Tensor, b: Tensor) -> Tensor:
    """Count the bits that differ: the twin of :func:`tritonbnn.eager.packed_difference`."""
    rows, words_of_row = a.shape
    counts = torch.empty(rows, dtype=torch.int32, device=a.device)
    key = config.ProblemKey("packed_difference", "int32", rows, 1, 1, words_of_row * WORD_BITS)
    tile = config.choose(key, a.device).tile
    block_n = min(32, power_of_two(words_of_row))
    block_m = max(1, tile.block_m * tile.block_n // (WORD_BITS * block_n))
    if rows:
        launch(
            _difference_kernel,
            ceil_div(rows, block_m),
            tile,
            a_ptr=a,
            b_ptr=b,
            counts_ptr=counts,
            rows=rows,
            WORDS=words_of_row,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
        )
    return counts
