"""Packed signs in torch: pack, unpack, scale of a weight, exact matrix product and difference."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonbnn.bits import WORD_BITS, words
from tritonbnn.eager.common import accumulator, image_chunks, shifted
from tritonbnn.layout import from_flat

# Eight bytes of 0 or 1, read as one int64 and multiplied by this, leave byte i on bit 56 + i.
_GATHER_BYTES = 0x0102040810204080


def _pack_rows(positive: Tensor) -> Tensor:
    """Pack (rows, C) booleans into (rows, words) int32."""
    channels = positive.shape[1]
    lanes = words(channels) * WORD_BITS
    if lanes != channels:
        positive = F.pad(positive, (0, lanes - channels))
    octets = positive.contiguous().view(torch.uint8).view(torch.int64)
    packed = (octets * _GATHER_BYTES).view(torch.uint8)[:, 7::8]
    # A clone, because an empty slice counts as contiguous and keeps its odd offset.
    return packed.clone(memory_format=torch.contiguous_format).view(torch.int32)


def _sign_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 8): the eight signs that a byte holds, lowest bit first."""
    byte = torch.arange(256, device=device).unsqueeze(1)
    return (byte >> torch.arange(8, device=device) & 1).to(dtype).mul_(2).sub_(1)


def _unpack_rows(packed: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Unpack (rows, words) int32 into (rows, channels) of +1 and -1."""
    rows = packed.shape[0]
    octets = packed.contiguous().view(torch.uint8).to(torch.int32)
    signs = F.embedding(octets.view(-1), _sign_table(dtype, packed.device))
    return signs.view(rows, packed.shape[1] * WORD_BITS)[:, :channels]


def pack_signs(x: Tensor, shift: Tensor | None = None) -> Tensor:
    """Pack the signs of ``x + shift``: a bit is 1 iff the sum, in float32, is >= 0.

    Args:
        x: (N, C, H, W) or (M, C), floating point.
        shift: (C,), or None for no shift.

    Returns:
        int32, (N, H, W, words) or (M, words), contiguous.
    """
    shape = (x.shape[0], *x.shape[2:], words(x.shape[1]))
    packed = torch.empty(shape, dtype=torch.int32, device=x.device)
    for part in image_chunks(x):
        packed[part] = _pack_rows(shifted(x[part], shift) >= 0).view_as(packed[part])
    return packed


def unpack_signs(packed: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`pack_signs`: +1 and -1 in ``dtype``.

    Args:
        packed: int32, (N, H, W, words) or (M, words).
        channels: C, the true number of channels.
        dtype: of the result.

    Returns:
        (N, C, H, W) in channels_last memory, or (M, C).
    """
    rows = _unpack_rows(packed.reshape(-1, packed.shape[-1]), channels, dtype).contiguous()
    if packed.dim() == 2:
        return rows
    n, h, w, _ = packed.shape
    return from_flat(rows, (n, channels, h, w))


def pack_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a weight's signs, and its scale alpha_o = mean over (I, kh, kw) of abs(w) (AdamBNN 1.3).

    Args:
        weight: (O, I, kh, kw) or (O, I), floating point, any strides.

    Returns:
        The packed signs, int32 (O, kh, kw, words) or (O, words), and alpha, (O,) float32
        (float64 for a float64 weight).
    """
    alpha = weight.new_empty(len(weight), dtype=accumulator(weight.dtype))
    rest = tuple(range(1, weight.dim()))
    for part in image_chunks(weight):
        alpha[part] = weight[part].abs().mean(dim=rest, dtype=alpha.dtype)
    return pack_signs(weight), alpha


def packed_matmul(a: Tensor, b: Tensor, k: int) -> Tensor:
    """The exact product of two matrices of signs, a @ b^T.

    Args:
        a: int32 (M, words(k)), packed signs.
        b: int32 (N, words(k)), packed signs.
        k: the number of signs in a row.

    Returns:
        int32 (M, N), each entry in [-k, k].
    """
    # Sums of +-1 are exact in float32 up to k = 2^24.
    dtype = torch.float32 if k <= 2**24 else torch.float64
    with torch.autocast(a.device.type, enabled=False):
        return (_unpack_rows(a, k, dtype) @ _unpack_rows(b, k, dtype).T).to(torch.int32)


def packed_difference(a: Tensor, b: Tensor) -> Tensor:
    """How many bits of each row differ: the sum of popcount(a ^ b).

    Args:
        a: int32 (R, W), contiguous.
        b: int32 (R, W), contiguous.

    Returns:
        int32 (R,).
    """
    # Pairs, nibbles and bytes of a word count their bits; the product sums the bytes on top.
    # Signed shifts repeat the sign bit, which the masks remove. In place: new memory costs more.
    x = a ^ b
    part = (x >> 1).bitwise_and_(0x55555555)
    x -= part
    torch.bitwise_right_shift(x, 2, out=part)
    x.bitwise_and_(0x33333333).add_(part.bitwise_and_(0x33333333))
    torch.bitwise_right_shift(x, 4, out=part)
    x.add_(part).bitwise_and_(0x0F0F0F0F)
    return x.mul_(0x01010101).bitwise_right_shift_(24).sum(dim=1, dtype=torch.int32)
