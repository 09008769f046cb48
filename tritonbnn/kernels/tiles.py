"""Jit helpers that several kernels share: popcount, signs from bits, program order, moments."""

import triton
import triton.language as tl


@triton.jit
def popcount(x):
    """The number of bits set in each int32. LLVM knows this idiom and emits one POPC for it."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def signs(words, DTYPE: tl.constexpr):
    """Expand (ROWS, WORDS) int32 to (ROWS, 32 WORDS) of +1 and -1."""
    ROWS: tl.constexpr = words.shape[0]
    WORDS: tl.constexpr = words.shape[1]
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    one = tl.full((1, 1, 1), 1, DTYPE)
    return tl.reshape(tl.where(bits != 0, one, -one), (ROWS, 32 * WORDS))


@triton.jit
def tile_of(program, tiles_n):
    """The (m, n) tile of a program. n runs fastest: neighbours share the larger operand in L2."""
    return (program // tiles_n).to(tl.int64), program % tiles_n


@triton.jit
def window(pixel, pixels, tap, shape: tl.constexpr):
    """The input pixel (flat, int64) that a tap of an output pixel reads, and whether it exists."""
    column = pixel % shape.out_width
    row = pixel // shape.out_width % shape.out_height
    image = pixel // (shape.out_width * shape.out_height)
    y = row * shape.stride - shape.padding + tap // shape.kernel_size
    x = column * shape.stride - shape.padding + tap % shape.kernel_size
    inside = (pixel < pixels) & (y >= 0) & (y < shape.height) & (x >= 0) & (x < shape.width)
    return (image * shape.height + y).to(tl.int64) * shape.width + x, inside


@triton.jit
def store_moments(y, exists, count, out, known, sums_ptr, OUT_CHANNELS: tl.constexpr):
    """The sum of a block's ``count`` rows, and the sum of their squares about their own mean.

    y float32, 0 where no row exists; sums (2, OUT_CHANNELS) float32. Nothing that is known before
    is sure to be near a channel's mean, and far from it squares lose digits. So each block takes
    its own: :mod:`tritonbnn.kernels.unit_norm` adds blocks up in float64.
    """
    total = tl.sum(y, axis=0)
    d = tl.where(exists, y - (total / count)[None, :], 0.0)
    tl.store(sums_ptr + out, total, mask=known)
    tl.store(sums_ptr + OUT_CHANNELS + out, tl.sum(d * d, axis=0), mask=known)
