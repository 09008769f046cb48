"""A bit for each output of a block on the one-bit core, packed and stored, or read, in Gluon.

A thread has a few channels of each of its pixels, a part of a word. It packs those in registers,
and lanes exchange parts until each has whole words, of fewer pixels: bytes, which they send four at
a time. Sums across lanes would send every part on its own.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tritonbnn.kernels.mma_tile import bits, group_layout, output_layout


@gluon.constexpr_function
def parts_layout(cut):
    """Pixels x words x parts of a word, as they are stored: a thread has all parts of a word.

    It is the layout that conditions come in, but that the lanes of a word's parts have as many of
    the thread's pixels, or the same one where a thread has too few.
    """
    pixels, parts = 8 * cut.tiles_p, 16 // cut.tiles_o
    own = bits(2, 0, rank=3) + bits(cut.tiles_p, 0, 8, rank=3)
    exchanged = len(bits(parts, 2, rank=3))
    given = own[:exchanged] + [[0, 0, 0]] * (exchanged - len(own))
    return gl.DistributedLinearLayout(
        bits(parts, 2, rank=3) + own[exchanged:],
        bits(4, 0, 2, rank=3) + given + bits(8 // parts, 1, rank=3),
        bits(cut.warps_p, 0, pixels, rank=3) + bits(cut.warps_o, 1, 8 // parts, rank=3),
        [],
        [cut.warps_p * pixels, cut.warps_o * cut.tiles_o // 2, parts],
    )


@gluon.jit
def store_bits(
    conditions, words_ptr, pixels, block_p, block_o, shape: gl.constexpr, cut: gl.constexpr
):
    """Pack a block of conditions (pixels, channels), in the output's layout, and store its words.

    Channel c is bit c % 32 of its pixel's word c // 32; words (pixels, ceil(O / 32)) int32. The
    block has at least 32 channels. Of channels that do not exist a condition must not hold.
    """
    GROUPS: gl.constexpr = group_layout(cut)
    PARTS: gl.constexpr = parts_layout(cut)
    WORDS: gl.constexpr = (shape.out_channels + 31) // 32
    PART_BITS: gl.constexpr = 2 * cut.tiles_o
    bit = gl.arange(0, PART_BITS, gl.SliceLayout(0, gl.SliceLayout(1, GROUPS)))[None, None, :]
    split = gl.convert_layout(conditions.to(gl.int32).reshape(GROUPS.shape), GROUPS)
    parts = gl.sum(split << bit, axis=2).to(gl.uint8).reshape(PARTS.shape)
    part = gl.arange(0, PARTS.shape[2], gl.SliceLayout(0, gl.SliceLayout(1, PARTS)))[None, None, :]
    parts = gl.convert_layout(parts, PARTS).to(gl.int32)
    packed = gl.sum(parts << part * PART_BITS, axis=2)
    STORED: gl.constexpr = gl.SliceLayout(2, PARTS)
    pixel = block_p * PARTS.shape[0] + gl.arange(0, PARTS.shape[0], gl.SliceLayout(1, STORED))
    word = block_o * PARTS.shape[1] + gl.arange(0, PARTS.shape[1], gl.SliceLayout(0, STORED))
    inside = (pixel < pixels)[:, None] & (word < WORDS)[None, :]
    gl.store(words_ptr + (pixel.to(gl.int64)[:, None] * WORDS + word[None, :]), packed, mask=inside)


@gluon.jit
def load_bits(words_ptr, pixels, block_p, block_o, shape: gl.constexpr, cut: gl.constexpr):
    """What :func:`store_bits` stored, as conditions in the output's layout; not set beyond it.

    The channels that a thread has of a pixel lie in one word, which it reads once.
    """
    GROUPS: gl.constexpr = group_layout(cut)
    READ: gl.constexpr = gl.SliceLayout(2, GROUPS)
    WORDS: gl.constexpr = (shape.out_channels + 31) // 32
    PART_BITS: gl.constexpr = 2 * cut.tiles_o
    pixel = block_p * GROUPS.shape[0] + gl.arange(0, GROUPS.shape[0], gl.SliceLayout(1, READ))
    group = block_o * GROUPS.shape[1] + gl.arange(0, GROUPS.shape[1], gl.SliceLayout(0, READ))
    word = group * PART_BITS // 32
    inside = (pixel < pixels)[:, None] & (word < WORDS)[None, :]
    place = pixel.to(gl.int64)[:, None] * WORDS + word[None, :]
    words = gl.load(words_ptr + place, mask=inside, other=0) >> (group * PART_BITS % 32)[None, :]
    bit = gl.arange(0, PART_BITS, gl.SliceLayout(0, gl.SliceLayout(1, GROUPS)))[None, None, :]
    OUTPUT: gl.constexpr = output_layout(cut)
    return gl.convert_layout((((words[:, :, None] >> bit) & 1) != 0).reshape(OUTPUT.shape), OUTPUT)
