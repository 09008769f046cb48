"""Sums over the pixels of many blocks of a convolution on the one-bit core, in Gluon.

A thread adds up its own pixels, and threads are added once, when all blocks are done: adding across
threads in every block would cost more than what is summed.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tritonbnn.kernels.mma_tile import bits, output_layout


@gluon.constexpr_function
def sums_layout(cut):
    """What a thread has summed, by warp of pixels, lane of pixels, channel."""
    channels = 2 * cut.tiles_o
    return gl.DistributedLinearLayout(
        bits(channels, 2, rank=3),
        bits(4, 1, rank=3) + bits(8, 2, channels, rank=3),
        bits(cut.warps_p, 0, rank=3) + bits(cut.warps_o, 2, 8 * channels, rank=3),
        [],
        [cut.warps_p, 4, cut.warps_o * 8 * channels],
    )


@gluon.jit
def no_sums(dtype: gl.constexpr, cut: gl.constexpr):
    """Where summing begins."""
    LAYOUT: gl.constexpr = sums_layout(cut)
    return gl.full(LAYOUT.shape, 0, dtype, LAYOUT)


@gluon.jit
def thread_sums(values, cut: gl.constexpr):
    """The sums over each thread's pixels of values (pixels, channels), in the output's layout."""
    BLOCK_O: gl.constexpr = cut.warps_o * cut.tiles_o * 16
    split = values.reshape([cut.warps_p, cut.tiles_p, 4, 2, BLOCK_O])
    return gl.convert_layout(gl.sum(gl.sum(split, axis=3), axis=1), sums_layout(cut))


@gluon.jit
def store_sums(sums, sums_ptr, row, block_o, shape: gl.constexpr, cut: gl.constexpr):
    """Add up a program's threads, and store them as a row of sums (rows, O)."""
    CHANNELS: gl.constexpr = gl.SliceLayout(0, output_layout(cut))
    BLOCK_O: gl.constexpr = cut.warps_o * cut.tiles_o * 16
    total = gl.convert_layout(gl.sum(gl.sum(sums, axis=1), axis=0), CHANNELS)
    out = block_o * BLOCK_O + gl.arange(0, BLOCK_O, CHANNELS)
    place = row.to(gl.int64) * shape.out_channels + out
    gl.store(sums_ptr + place, total, mask=out < shape.out_channels)
