"""All that a step needs of a binary convolution's weight: its signs in four forms, and its clip.

A weight is small beside the images, so what counts here is the number of launches: one before the
products, one before the gradients, and one after the gradient to the weight.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonbnn.bits import WORD_BITS, words
from tritonbnn.checks import sum_dtype
from tritonbnn.kernels.config import TileConfig, ceil_div, power_of_two
from tritonbnn.kernels.cut import CHUNK_WORDS, Cut
from tritonbnn.kernels.launch import launch
from tritonbnn.kernels.tiles import popcount
from tritonbnn.layout import empty_channels_last, from_flat

_TILE = TileConfig(64, WORD_BITS, 1, 4, 1)
"""Words and lanes of a block."""

_MOST_FILTERS = 16
"""Of a program: tiles of 16 filters are whole."""

_SUM_TILE = TileConfig(1024, 1, 1, 4, 1)


BORDERS = 16
"""Ways in which a 3x3 window can cross the image's border: a bit each for its four sides."""


class Numbers(NamedTuple):
    """A packed weight as numbers, as the integer tensor core multiplies it.

    Attributes:
        values: int8 (O kh kw, C), +1 and -1.
        tap_sums: int32 (O kh kw,), their sums over C.
    """

    values: Tensor
    tap_sums: Tensor


class Fragments(NamedTuple):
    """A packed weight as the one-bit tensor core multiplies it.

    Attributes:
        words: int32 (tiles of 16 channels, chunks of 16 words, 2, 32 lanes, 4), in the order in
            which lanes read it, 0 beyond O and K.
        base: what a window without any ones yields, (borders, O), int16 where that holds it: half
            the registers, which accumulators need.
        tiles_o: tiles that a warp has.
    """

    words: Tensor
    base: Tensor
    tiles_o: int


@triton.jit
def _fragment_place(out, word, CHUNKS: tl.constexpr, TILES_O: tl.constexpr):
    """Where the core's lanes read a word of a filter.

    Register r of lane 4 g + t for instruction s of a chunk: word 4 t + 2 s + r / 2 of the chunk,
    and of the 16 TILES_O channels of a warp number 2 TILES_O g + 2 tile + r % 2.
    """
    in_warp = out % (16 * TILES_O)
    group, in_group = in_warp // (2 * TILES_O), in_warp % (2 * TILES_O)
    tile = out // (16 * TILES_O) * TILES_O + in_group // 2
    lane = 4 * group + word % 16 // 4
    step = (tile * CHUNKS + word // 16) * 2 + word // 2 % 2
    return step * 128 + lane * 4 + word % 2 * 2 + in_group % 2


@triton.jit
def _crosses(border, tap, KERNEL_SIZE: tl.constexpr):
    """Whether a tap lies outside of the image at a border."""
    row, column = tap // KERNEL_SIZE, tap % KERNEL_SIZE
    last: tl.constexpr = KERNEL_SIZE - 1
    above = (row == 0) & (border % 2 != 0)
    below = (row == last) & (border // 2 % 2 != 0)
    left = (column == 0) & (border // 4 % 2 != 0)
    right = (column == last) & (border // 8 != 0)
    return above | below | left | right


@triton.jit
def _filter_kernel(
    weight_ptr,
    packed_ptr,
    alpha_ptr,
    values_ptr,
    tap_sums_ptr,
    fragments_ptr,
    base_ptr,
    stride_out,
    stride_channel,
    stride_tap,
    OUT_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    BORDERS: tl.constexpr,
    TILES_O: tl.constexpr,
    SCALED: tl.constexpr,
    FILTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All forms of a few filters: those that are None are not wanted.

    weight (O, C, taps) float of any strides gives packed (O, taps, words) int32 and its mean
    magnitude alpha (O,) float32; where it is None, those two are read. values (O, taps, C) of any
    number dtype, +1 and -1 or SCALED by alpha; tap_sums (O, taps) int32, the sums of the signs.
    fragments and base: the fields of :class:`Fragments`. There are filters up to its last tile.
    """
    WORDS: tl.constexpr = (CHANNELS + 31) // 32
    TAPS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE
    CHUNKS: tl.constexpr = (TAPS * WORDS + 15) // 16
    out = tl.program_id(0) * FILTERS + tl.arange(0, FILTERS)
    exists = out < OUT_CHANNELS
    lane = tl.arange(0, 32)[None, None, :]
    border = tl.arange(0, BORDERS)[None, :]
    base = tl.zeros((FILTERS, BORDERS), tl.int32)
    magnitude = tl.zeros((FILTERS, BLOCK, 32), tl.float32)
    if SCALED:
        scale = tl.load(alpha_ptr + out, mask=exists, other=0.0).to(values_ptr.dtype.element_ty)
    for tap in range(TAPS):
        row = (out * TAPS + tap).to(tl.int64)
        count = tl.zeros((FILTERS, BLOCK), tl.int32)
        for start in range(0, WORDS, BLOCK):
            word = start + tl.arange(0, BLOCK)[None, :]
            channel = word[:, :, None] * 32 + lane
            known = exists[:, None, None] & (channel < CHANNELS)
            inside = exists[:, None] & (word < WORDS)
            if weight_ptr is not None:
                offset = out.to(tl.int64)[:, None, None] * stride_out + tap * stride_tap
                offset += channel.to(tl.int64) * stride_channel
                w = tl.load(weight_ptr + offset, mask=known, other=0.0).to(tl.float32)
                magnitude += tl.abs(w)
                positive = ((w >= 0) & known).to(tl.int32)
                packed = tl.sum(positive << lane, axis=2)
                tl.store(packed_ptr + row[:, None] * WORDS + word, packed, mask=inside)
            else:
                packed = tl.load(packed_ptr + row[:, None] * WORDS + word, mask=inside, other=0)
                positive = (packed[:, :, None] >> lane) & 1
            count += popcount(packed)
            if values_ptr is not None:
                if SCALED:
                    one = scale[:, None, None]
                else:
                    one = tl.full((1, 1, 1), 1, values_ptr.dtype.element_ty)
                values = tl.where(positive != 0, one, -one)
                place = row[:, None, None] * CHANNELS + channel
                tl.store(values_ptr + place, values, mask=known)
            if fragments_ptr is not None:
                place = _fragment_place(out[:, None], tap * WORDS + word, CHUNKS, TILES_O)
                tl.store(fragments_ptr + place, packed, mask=word < WORDS)
        tap_sum = 2 * tl.sum(count, axis=1) - CHANNELS
        if tap_sums_ptr is not None:
            tl.store(tap_sums_ptr + row, tap_sum, mask=exists)
        if base_ptr is not None:
            base -= tl.where(_crosses(border, tap, KERNEL_SIZE), 0, tap_sum[:, None])
    if weight_ptr is not None:
        total = tl.sum(tl.sum(magnitude, axis=2), axis=1)
        tl.store(alpha_ptr + out, total / (CHANNELS * TAPS), mask=exists)
    if base_ptr is not None:
        place = border * OUT_CHANNELS + out[:, None]
        tl.store(base_ptr + place, base.to(base_ptr.dtype.element_ty), mask=exists[:, None])
        beyond = TAPS * WORDS + tl.arange(0, 16)[None, :]
        place = _fragment_place(out[:, None], beyond, CHUNKS, TILES_O)
        nothing = tl.zeros((FILTERS, 16), tl.int32)
        tl.store(fragments_ptr + place, nothing, mask=beyond < CHUNKS * 16)


@triton.jit
def _weight_sum_kernel(
    partial_ptr,
    weight_ptr,
    grad_ptr,
    splits,
    count,
    weight_out,
    weight_channel,
    weight_tap,
    grad_out,
    grad_channel,
    grad_tap,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad = the sum over splits of partial, but 0 where abs(weight) > 1.

    partial (splits, O TAPS C) float; weight (O, C, TAPS) float of any strides, or None for no
    clip; grad the same shape, float32, of any strides. count is O TAPS C.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        first = partial_ptr + tl.cast(split, tl.int64) * count
        total += tl.load(first + index, mask=mask, other=0.0).to(tl.float32)
    channel = (index % CHANNELS).to(tl.int64)
    tap = index // CHANNELS % TAPS
    out = (index // (CHANNELS * TAPS)).to(tl.int64)
    if weight_ptr is not None:
        offset = out * weight_out + channel * weight_channel + tap * weight_tap
        w = tl.load(weight_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        total = tl.where(tl.abs(w) > 1, 0.0, total)
    offset = out * grad_out + channel * grad_channel + tap * grad_tap
    tl.store(grad_ptr + offset, total, mask=mask)


def strides(weight: Tensor) -> tuple[int, int, int]:
    """Between filters, channels and taps of (O, C, k, k) or (O, C), whose taps are in one row.

    Raises:
        ValueError: they are not.
    """
    if weight.dim() == 2:
        return weight.stride(0), weight.stride(1), 0
    out, channel, row, tap = weight.stride()
    if weight.shape[2] > 1 and row != weight.shape[3] * tap:
        raise ValueError(f"a filter's taps must lie in one row, not at strides {weight.stride()}")
    return out, channel, tap


def in_a_row(weight: Tensor) -> Tensor:
    """``weight``, copied only where its taps are not in one row."""
    if weight.dim() == 2 or weight.stride(2) == weight.shape[3] * weight.stride(3):
        return weight
    return weight.contiguous()


def prepare(
    weight: Tensor, *, numbers: bool = False, cut: Cut | None = None
) -> tuple[Tensor, Tensor, Numbers | Fragments | None]:
    """Pack a weight and scale it, and make the form that is multiplied in the same launch.

    Args:
        weight: (O, C, k, k) or (O, C).
        numbers: whether its signs are wanted as numbers.
        cut: of the blocks that the one-bit core multiplies, if it does.

    Returns:
        Packed signs (O, k, k, words) or (O, words), alpha (O,) float32, and the form.
    """
    weight = in_a_row(weight)
    out_channels, channels = weight.shape[:2]
    device = weight.device
    shape = (out_channels, *weight.shape[2:], words(channels))
    packed = torch.empty(shape, dtype=torch.int32, device=device)
    alpha = torch.empty(out_channels, dtype=torch.float32, device=device)
    if numbers:
        expanded = _empty_numbers(packed, channels)
        _launch_filters(packed, channels, alpha, weight=weight, numbers=expanded)
        return packed, alpha, expanded
    fragments = None if cut is None else _empty_fragments(packed, channels, cut)
    _launch_filters(packed, channels, alpha, weight=weight, fragments=fragments)
    return packed, alpha, fragments


def expand(packed: Tensor, channels: int) -> Numbers:
    """A packed weight (O, k, k, words) as numbers."""
    numbers = _empty_numbers(packed, channels)
    _launch_filters(packed, channels, None, numbers=numbers)
    return numbers


def fragments_of(packed: Tensor, channels: int, cut: Cut) -> Fragments:
    """A packed weight (O, k, k, words) as the one-bit tensor core multiplies it."""
    fragments = _empty_fragments(packed, channels, cut)
    _launch_filters(packed, channels, None, fragments=fragments)
    return fragments


def scaled(
    packed: Tensor, alpha: Tensor, channels: int, dtype: torch.dtype, cut: Cut | None = None
) -> tuple[Tensor, Fragments | None]:
    """alpha times a packed weight's signs, and with a ``cut`` its fragments in the same launch.

    Args:
        packed: (O, k, k, words).
        alpha: (O,), rounded to ``dtype``.
        channels: C.
        dtype: of the numbers.
        cut: of the blocks that the one-bit core multiplies, or None.

    Returns:
        (O, C, k, k) in channels_last memory, and the fragments.
    """
    out_channels, kernel_size = packed.shape[:2]
    shape = (out_channels, channels, kernel_size, kernel_size)
    values = empty_channels_last(shape, dtype, packed.device)
    fragments = None if cut is None else _empty_fragments(packed, channels, cut)
    alpha = alpha.contiguous()
    _launch_filters(packed, channels, alpha, values=values, fragments=fragments)
    return values, fragments


def _empty_numbers(packed: Tensor, channels: int) -> Numbers:
    rows = packed.numel() // packed.shape[-1]
    values = torch.empty((rows, channels), dtype=torch.int8, device=packed.device)
    return Numbers(values, torch.empty(rows, dtype=torch.int32, device=packed.device))


def _empty_fragments(packed: Tensor, channels: int, cut: Cut) -> Fragments:
    words, base, dtype = _fragment_shapes(packed.shape, channels, cut)
    device = packed.device
    return Fragments(
        torch.empty(words, dtype=torch.int32, device=device),
        torch.empty(base, dtype=dtype, device=device),
        cut.tiles_o,
    )


@lru_cache(maxsize=1024)
def _fragment_shapes(
    packed: torch.Size, channels: int, cut: Cut
) -> tuple[tuple[int, ...], tuple[int, int], torch.dtype]:
    """Of the words and the base, and the dtype of the base."""
    taps = packed[1:-1].numel()
    block = 16 * cut.tiles_o * cut.warps_o
    tiles = ceil_div(packed[0], block) * block // 16
    words = (tiles, ceil_div(taps * packed[-1], CHUNK_WORDS), 2, 32, 4)
    return words, (BORDERS if taps > 1 else 1, packed[0]), sum_dtype(channels * taps)


def _launch_filters(
    packed: Tensor,
    channels: int,
    alpha: Tensor | None,
    *,
    weight: Tensor | None = None,
    numbers: Numbers | None = None,
    values: Tensor | None = None,
    fragments: Fragments | None = None,
) -> None:
    """Write what is given, of ``weight``, or else of ``packed`` and ``alpha``."""
    if not packed.numel():
        return
    out_channels = packed.shape[0]
    out, channel, tap = (0, 0, 0) if weight is None else strides(weight)
    block = min(_TILE.block_m, power_of_two(packed.shape[-1]))
    at_once = min(_MOST_FILTERS, _TILE.block_m // block)
    launch(
        _filter_kernel,
        ceil_div(out_channels if fragments is None else 16 * fragments.words.shape[0], at_once),
        _TILE,
        weight_ptr=weight,
        packed_ptr=packed,
        alpha_ptr=alpha,
        values_ptr=values if numbers is None else numbers.values,
        tap_sums_ptr=None if numbers is None else numbers.tap_sums,
        fragments_ptr=None if fragments is None else fragments.words,
        base_ptr=None if fragments is None else fragments.base,
        stride_out=out,
        stride_channel=channel,
        stride_tap=tap,
        OUT_CHANNELS=out_channels,
        CHANNELS=channels,
        KERNEL_SIZE=packed.shape[1] if packed.dim() == 4 else 1,
        BORDERS=1 if fragments is None else fragments.base.shape[0],
        TILES_O=1 if fragments is None else fragments.tiles_o,
        SCALED=values is not None,
        FILTERS=at_once,
        BLOCK=block,
    )


def summed(partial: Tensor, clip: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor:
    """The gradient to a weight from its splits, float32: summed, and clipped in its layout.

    Args:
        partial: (splits, O kh kw, C) float.
        clip: the latent weight, where the gradient is 0 at abs(w) > 1 (AdamBNN 1.3); None for no
            clip, and channels_last memory.
        shape: (O, C, kh, kw).
    """
    splits, rows, channels = partial.shape
    if clip is None and splits == 1:
        return from_flat(partial[0], shape).to(torch.float32)
    if clip is None:
        grad = empty_channels_last(shape, torch.float32, partial.device)
    else:
        clip = in_a_row(clip)
        grad = torch.empty_like(clip, dtype=torch.float32)
    if grad.numel():
        weight_out, weight_channel, weight_tap = (0, 0, 0) if clip is None else strides(clip)
        grad_out, grad_channel, grad_tap = strides(grad)
        launch(
            _weight_sum_kernel,
            ceil_div(grad.numel(), _SUM_TILE.block_m),
            _SUM_TILE,
            partial_ptr=partial,
            weight_ptr=clip,
            grad_ptr=grad,
            splits=splits,
            count=rows * channels,
            weight_out=weight_out,
            weight_channel=weight_channel,
            weight_tap=weight_tap,
            grad_out=grad_out,
            grad_channel=grad_channel,
            grad_tap=grad_tap,
            CHANNELS=channels,
            TAPS=rows // shape[0],
            BLOCK=_SUM_TILE.block_m,
        )
    return grad
