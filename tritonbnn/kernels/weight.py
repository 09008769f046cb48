"""All that a step needs of a binary convolution's weight: its signs in three forms, and its clip.

A weight is small beside the images, so what counts here is the number of launches: one before the
products, one for the gradient to the input, and one after the gradient to the weight.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonbnn.bits import WORD_BITS, words
from tritonbnn.kernels.config import TileConfig, ceil_div, power_of_two
from tritonbnn.kernels.launch import launch
from tritonbnn.layout import empty_channels_last, from_flat

_TILE = TileConfig(64, WORD_BITS, 1, 4, 1)
"""Words and lanes of a block."""

_SUM_TILE = TileConfig(1024, 1, 1, 4, 1)


class Numbers(NamedTuple):
    """A packed weight as numbers, as the integer tensor core multiplies it.

    Attributes:
        values: int8 (O kh kw, C), +1 and -1.
        tap_sums: int32 (O kh kw,), their sums over C.
    """

    values: Tensor
    tap_sums: Tensor


@triton.jit
def _weight_kernel(
    weight_ptr,
    packed_ptr,
    alpha_ptr,
    values_ptr,
    tap_sums_ptr,
    stride_out,
    stride_channel,
    stride_tap,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A filter's packed signs, the mean of its magnitudes, and its signs as numbers.

    weight (O, C, TAPS) float of any strides; packed (O, TAPS, words) int32; alpha (O,) float32;
    values (O, TAPS, C) int8 and tap_sums (O, TAPS) int32, or None together.
    """
    WORDS: tl.constexpr = (CHANNELS + 31) // 32
    out = tl.program_id(0)
    lane = tl.arange(0, 32)[None, :]
    filter_ptr = weight_ptr + out.to(tl.int64) * stride_out
    magnitude = tl.zeros((BLOCK, 32), tl.float32)
    for tap in range(TAPS):
        row = (out * TAPS + tap).to(tl.int64)
        ones = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, WORDS, BLOCK):
            word = start + tl.arange(0, BLOCK)
            channel = word[:, None] * 32 + lane
            known = channel < CHANNELS
            offset = channel.to(tl.int64) * stride_channel + tap * stride_tap
            w = tl.load(filter_ptr + offset, mask=known, other=0.0).to(tl.float32)
            magnitude += tl.abs(w)
            positive = (w >= 0) & known
            bits = tl.sum(positive.to(tl.int32) << lane, axis=1)
            tl.store(packed_ptr + row * WORDS + word, bits, mask=word < WORDS)
            if values_ptr is not None:
                values = tl.where(positive, 1, -1).to(tl.int8)
                tl.store(values_ptr + row * CHANNELS + channel, values, mask=known)
                ones += tl.sum(positive.to(tl.int32), axis=1)
        if values_ptr is not None:
            tl.store(tap_sums_ptr + row, 2 * tl.sum(ones, axis=0) - CHANNELS)
    total = tl.sum(tl.sum(magnitude, axis=1), axis=0)
    tl.store(alpha_ptr + out, total / (CHANNELS * TAPS))


@triton.jit
def _expand_kernel(
    packed_ptr,
    alpha_ptr,
    values_ptr,
    tap_sums_ptr,
    rows,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """values[r, c] = alpha[r // TAPS] sign[r, c], and their sums over c.

    packed (rows, words) int32, alpha (rows / TAPS,) float or None for 1; values (rows, C) of any
    number dtype, to which alpha is rounded; tap_sums (rows,) int32 or None.
    """
    WORDS: tl.constexpr = (CHANNELS + 31) // 32
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, 32)[None, None, :]
    scale = tl.full((BLOCK_M,), 1, values_ptr.dtype.element_ty)
    if alpha_ptr is not None:
        scale = tl.load(alpha_ptr + row // TAPS, mask=row < rows, other=0.0)
        scale = scale.to(values_ptr.dtype.element_ty)
    ones = tl.zeros((BLOCK_M, BLOCK), tl.int32)
    for start in range(0, WORDS, BLOCK):
        word = start + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows)[:, None] & (word < WORDS)
        packed = tl.load(packed_ptr + row[:, None] * WORDS + word, mask=inside, other=0)
        bits = (packed[:, :, None] >> lane) & 1
        channel = word[:, :, None] * 32 + lane
        values = tl.where(bits != 0, scale[:, None, None], -scale[:, None, None])
        mask = (row < rows)[:, None, None] & (channel < CHANNELS)
        tl.store(values_ptr + row[:, None, None] * CHANNELS + channel, values, mask=mask)
        ones += tl.sum(bits, axis=2)  # lanes beyond C are 0
    if tap_sums_ptr is not None:
        total = 2 * tl.sum(ones, axis=1) - CHANNELS
        tl.store(tap_sums_ptr + row, total, mask=row < rows)


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

    partial (splits, O TAPS C) float32; weight (O, C, TAPS) float of any strides, or None for no
    clip; grad the same shape, float32, of any strides. count is O TAPS C.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        first = partial_ptr + tl.cast(split, tl.int64) * count
        total += tl.load(first + index, mask=mask, other=0.0)
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


def prepare(weight: Tensor, *, numbers: bool) -> tuple[Tensor, Tensor, Numbers | None]:
    """Pack a weight and scale it, and expand its signs in the same launch.

    Args:
        weight: (O, C, k, k) or (O, C).
        numbers: whether they are wanted.

    Returns:
        Packed signs (O, k, k, words) or (O, words), alpha (O,) float32, and the numbers.
    """
    weight = in_a_row(weight)
    out_channels, channels = weight.shape[:2]
    taps = weight[0, 0].numel() if weight.dim() == 4 else 1
    device = weight.device
    shape = (out_channels, *weight.shape[2:], words(channels))
    packed = torch.empty(shape, dtype=torch.int32, device=device)
    alpha = torch.empty(out_channels, dtype=torch.float32, device=device)
    expanded = None
    if numbers:
        expanded = _empty_numbers(out_channels * taps, channels, device)
    if packed.numel():
        out, channel, tap = strides(weight)
        launch(
            _weight_kernel,
            out_channels,
            _TILE,
            weight_ptr=weight,
            packed_ptr=packed,
            alpha_ptr=alpha,
            values_ptr=None if expanded is None else expanded.values,
            tap_sums_ptr=None if expanded is None else expanded.tap_sums,
            stride_out=out,
            stride_channel=channel,
            stride_tap=tap,
            CHANNELS=channels,
            TAPS=taps,
            BLOCK=min(_TILE.block_m, power_of_two(words(channels))),
        )
    return packed, alpha, expanded


def _empty_numbers(rows: int, channels: int, device: torch.device) -> Numbers:
    values = torch.empty((rows, channels), dtype=torch.int8, device=device)
    return Numbers(values, torch.empty(rows, dtype=torch.int32, device=device))


def expand(packed: Tensor, channels: int) -> Numbers:
    """A packed weight (O, k, k, words) as numbers."""
    rows = packed.numel() // packed.shape[-1]
    numbers = _empty_numbers(rows, channels, packed.device)
    expand_rows(packed, numbers.values, tap_sums=numbers.tap_sums)
    return numbers


def scaled(packed: Tensor, alpha: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """alpha times a packed weight's signs, (O, C, k, k) in ``dtype`` and channels_last memory."""
    out_channels, kernel_size = packed.shape[:2]
    shape = (out_channels, channels, kernel_size, kernel_size)
    values = empty_channels_last(shape, dtype, packed.device)
    expand_rows(packed, values, alpha=alpha)
    return values


def expand_rows(
    packed: Tensor,
    values: Tensor,
    *,
    alpha: Tensor | None = None,
    tap_sums: Tensor | None = None,
) -> None:
    """Write packed signs as numbers, times ``alpha`` if it is given.

    Args:
        packed: int32, words innermost.
        values: the result, (rows, C), or (O, C, kh, kw) in channels_last memory; any number dtype.
        alpha: (O,), of as many rows each.
        tap_sums: int32 (rows,), for the sums over C; or None.
    """
    channels = values.shape[1]
    rows = values.numel() // channels
    block = min(_TILE.block_m, power_of_two(words(channels)))
    block_m = _TILE.block_m // block
    if values.numel():
        launch(
            _expand_kernel,
            ceil_div(rows, block_m),
            _TILE,
            packed_ptr=packed.contiguous(),
            alpha_ptr=None if alpha is None else alpha.contiguous(),
            values_ptr=values,
            tap_sums_ptr=tap_sums,
            rows=rows,
            CHANNELS=channels,
            TAPS=1 if alpha is None else rows // len(alpha),
            BLOCK_M=block_m,
            BLOCK=block,
        )


def summed(partial: Tensor, clip: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor:
    """The gradient to a weight from its splits: summed, and clipped in the weight's layout.

    Args:
        partial: (splits, O kh kw, C) float32.
        clip: the latent weight, where the gradient is 0 at abs(w) > 1 (AdamBNN 1.3); None for no
            clip, and channels_last memory.
        shape: (O, C, kh, kw).
    """
    splits, rows, channels = partial.shape
    if clip is None and splits == 1:
        return from_flat(partial[0], shape)
    if clip is None:
        grad = empty_channels_last(shape, torch.float32, partial.device)
    else:
        clip = in_a_row(clip)
        grad = torch.empty_like(clip, dtype=torch.float32)
    if grad.numel():
        of_clip = (0, 0, 0) if clip is None else strides(clip)
        names = ("out", "channel", "tap")
        launch(
            _weight_sum_kernel,
            ceil_div(grad.numel(), _SUM_TILE.block_m),
            _SUM_TILE,
            partial_ptr=partial,
            weight_ptr=clip,
            grad_ptr=grad,
            splits=splits,
            count=rows * channels,
            **{f"weight_{n}": stride for n, stride in zip(names, of_clip, strict=True)},
            **{f"grad_{n}": stride for n, stride in zip(names, strides(grad), strict=True)},
            CHANNELS=channels,
            TAPS=rows // shape[0],
            BLOCK=_SUM_TILE.block_m,
        )
    return grad
