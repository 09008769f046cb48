"""Sums of products of signs on the one-bit tensor core, in Gluon: what its kernels share.

``mma.sync.m16n8k256 ... and.popc`` (PTX ISA, "Warp-level matrix instructions") counts the bits that
are 1 in both operands. With 1 for +1 and 0 for -1, over the taps t inside the image,

    y[p, o] = base[border(p), o] - 2 ones[p] + 4 popcount(x & w)
    base[b, o] = sum over t of C - 2 popcount(w[o, t]),   ones[p] = sum over t of popcount(x[p + t])

A word outside the image is 0, so it adds to neither sum. ``base`` and the weight in the order in
which lanes read it come from :mod:`tritonbnn.kernels.weight`. ``ones`` is one product more, with a
weight of ones: 1/4 of the core's operations more at 64 channels a warp, and no pass over x.

Output channels are the instruction's rows and pixels its columns, so that every lane's words of a
pixel are one 16-byte load for two instructions. K is cut into chunks of 16 words, of which lane
4 g + t holds words 4 t to 4 t + 3: any order of K will do, if both operands have it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# A newer Triton has another name for it.
thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier

# Per lane: accumulators (in place), four words of each instruction's weight, four words of x.
_PRODUCT = gl.constexpr("""{
mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc
    {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$12,$13}, {$0,$1,$2,$3};
mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc
    {$0,$1,$2,$3}, {$8,$9,$10,$11}, {$14,$15}, {$0,$1,$2,$3};
}""")
_OPERANDS = gl.constexpr("=r,=r,=r,=r," + "r," * 12 + "0,1,2,3")


@gluon.constexpr_function
def bits(size, axis, scale=1, rank=2):
    """The bases of a linear layout for ``size`` steps of ``scale`` along an axis."""
    steps = [scale << bit for bit in range(size.bit_length() - 1)]
    return [[step if axis == i else 0 for i in range(rank)] for step in steps]


@gluon.constexpr_function
def fragment_layout(cut, tiles_o):
    """Accumulators by (channel warp, channel tile, pixel warp, pixel tile, lane, register)."""
    return gl.DistributedLinearLayout(
        bits(4, 5, rank=6) + bits(cut.tiles_p, 3, rank=6) + bits(tiles_o, 1, rank=6),
        bits(32, 4, rank=6),
        bits(cut.warps_p, 2, rank=6) + bits(cut.warps_o, 0, rank=6),
        [],
        [cut.warps_o, tiles_o, cut.warps_p, cut.tiles_p, 32, 4],
    )


@gluon.constexpr_function
def output_layout(cut):
    """The same accumulators as pixels x channels; a thread has 2 tiles_o channels side by side."""
    channels, pixels = 2 * cut.tiles_o, 8 * cut.tiles_p
    return gl.DistributedLinearLayout(
        bits(channels, 1) + bits(2, 0) + bits(cut.tiles_p, 0, 8),
        bits(4, 0, 2) + bits(8, 1, channels),
        bits(cut.warps_p, 0, pixels) + bits(cut.warps_o, 1, 8 * channels),
        [],
        [cut.warps_p * pixels, cut.warps_o * 8 * channels],
    )


@gluon.constexpr_function
def group_layout(cut):
    """The same as pixels x groups of channels that lie in one thread x channels of a group."""
    pixels = 8 * cut.tiles_p
    return gl.DistributedLinearLayout(
        bits(2 * cut.tiles_o, 2, rank=3) + bits(2, 0, rank=3) + bits(cut.tiles_p, 0, 8, rank=3),
        bits(4, 0, 2, rank=3) + bits(8, 1, rank=3),
        bits(cut.warps_p, 0, pixels, rank=3) + bits(cut.warps_o, 1, 8, rank=3),
        [],
        [cut.warps_p * pixels, cut.warps_o * 8, 2 * cut.tiles_o],
    )


@gluon.constexpr_function
def _axis_layout(layout, axis):
    """The layout of one axis of a tensor of rank 4."""
    for other in (3, 2, 1, 0):
        layout = layout if other == axis else gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def steps_along(size: gl.constexpr, axis: gl.constexpr, LAYOUT: gl.constexpr):
    """0 to ``size`` - 1 along an axis of a tensor of rank 4."""
    steps = gl.arange(0, size, _axis_layout(LAYOUT, axis))
    for other in gl.static_range(4):
        if other != axis:
            steps = gl.expand_dims(steps, other)
    return steps


@gluon.jit
def taps_inside(row, column, HEIGHT: gl.constexpr, WIDTH: gl.constexpr):
    """Which taps of a 3x3 window at (row, column) lie inside the image: a bit each."""
    first, last = (column >= 0).to(gl.int32), (column + 2 < WIDTH).to(gl.int32)
    line = first + 2 + last * 4
    above, below = (row >= 0).to(gl.int32), (row + 2 < HEIGHT).to(gl.int32)
    return line * (above + 8 + below * 64)


@gluon.jit
def _windows(pixel, shape: gl.constexpr):
    """The first word of each pixel's window, int64, and its taps inside the image."""
    WORDS: gl.constexpr = (shape.channels + 31) // 32
    start, inside = pixel, pixel  # a window of one tap asks for no taps
    if shape.kernel_size > 1 or shape.stride > 1:
        row = pixel // shape.out_width % shape.out_height * shape.stride - shape.padding
        column = pixel % shape.out_width * shape.stride - shape.padding
        if shape.stride > 1:
            image = pixel // (shape.out_width * shape.out_height)
            start = (image * shape.height + row) * shape.width + column
        else:  # images are as large as before
            start = pixel - shape.padding * (shape.width + 1)
        inside = taps_inside(row, column, shape.height, shape.width)
    return start.to(gl.int64) * WORDS, inside


@gluon.jit
def _window_words(x_ptr, start, inside, position, shape: gl.constexpr):
    """The words of x at ``position`` among a window's; 0 outside the image and beyond K."""
    WORDS: gl.constexpr = (shape.channels + 31) // 32
    SIZE: gl.constexpr = shape.kernel_size
    if SIZE == 1:
        if WORDS % 16 == 0:
            return gl.load(x_ptr + (start + position))
        return gl.load(x_ptr + (start + position), mask=position < WORDS, other=0)
    tap = position // WORDS
    word = tap // SIZE * (shape.width * WORDS) + tap % SIZE * WORDS + position % WORDS
    # Of the taps beyond the window, no bit is set either.
    return gl.load(x_ptr + (start + word), mask=(inside >> tap) % 2 != 0, other=0)


@gluon.jit
def add_common_ones(w0, w1, x, acc):
    """acc + popcount(x & w), of one chunk of K.

    w0 and w1 (WARPS_O, TILES_O, 32, 4), x (WARPS_P, TILES_P, 32, 4) and acc (WARPS_O, TILES_O,
    WARPS_P, TILES_P, 32, 4), int32, in :func:`fragment_layout` and its slices.
    """
    return gl.inline_asm_elementwise(
        _PRODUCT,
        _OPERANDS,
        [w0[:, :, None, None], w1[:, :, None, None], x[None, None], acc],
        gl.int32,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def as_matrix(acc, LAYOUT: gl.constexpr):
    """Sums by warp, tile, lane and register as (pixels, channels); no lane gives any away.

    Lane 4 g + t, register 2 h + c: channel 2 TILES_O g + 2 tile + h, pixel 8 tile + 2 t + c.
    """
    WARPS_O: gl.constexpr = acc.shape[0]
    TILES_O: gl.constexpr = acc.shape[1]
    WARPS_P: gl.constexpr = acc.shape[2]
    TILES_P: gl.constexpr = acc.shape[3]
    split = acc.reshape([WARPS_O, TILES_O, WARPS_P, TILES_P, 8, 4, 2, 2])
    moved = split.permute(2, 3, 5, 7, 0, 4, 1, 6)
    return gl.convert_layout(moved.reshape([WARPS_P * TILES_P * 8, WARPS_O * TILES_O * 16]), LAYOUT)


@gluon.jit
def as_groups(ones, cut: gl.constexpr):
    """Of ones in a window by warp, lane and register, twice as many, (pixels, groups).

    Rows g and g + 8 of the product are alike, so that their sum is what is asked for, and every
    lane has it of the pixels whose sums it has.
    """
    WARPS_O: gl.constexpr = cut.warps_o
    WARPS_P: gl.constexpr = cut.warps_p
    TILES_P: gl.constexpr = cut.tiles_p
    twice = gl.sum(ones.reshape([WARPS_O, WARPS_P, TILES_P, 8, 4, 2, 2]), axis=5)
    moved = twice.permute(1, 2, 4, 5, 0, 3)
    GROUPS: gl.constexpr = gl.SliceLayout(2, group_layout(cut))
    return gl.convert_layout(moved.reshape([WARPS_P * TILES_P * 8, WARPS_O * 8]), GROUPS)


@gluon.jit
def _bases(base_ptr, pixel, out, shape: gl.constexpr):
    """What windows without any ones yield, (pixel, out) int32, or (1, out) without padding."""
    known = (out < shape.out_channels)[None, :]
    offset = out[None, :]
    if shape.padding > 0:
        row = pixel // shape.out_width % shape.out_height * shape.stride
        column = pixel % shape.out_width * shape.stride
        border = (row == 0).to(gl.int32) + (row + 2 > shape.height).to(gl.int32) * 2
        border += (column == 0).to(gl.int32) * 4 + (column + 2 > shape.width).to(gl.int32) * 8
        offset = border[:, None] * shape.out_channels + offset
    return gl.load(base_ptr + offset, mask=known, other=0).to(gl.int32)


@gluon.jit
def store_scaled(y, y_ptr, alpha_ptr, pixel, out, pixels, OUT_CHANNELS: gl.constexpr):
    """y[pixel, out] = alpha[out] y, of what exists; alpha_ptr None for 1."""
    known = out < OUT_CHANNELS
    mask = (pixel < pixels)[:, None] & known[None, :]
    if alpha_ptr is not None:
        alpha = gl.load(alpha_ptr + out, mask=known, other=0.0)
        y = y.to(gl.float32) * alpha[None, :]
    offset = pixel.to(gl.int64)[:, None] * OUT_CHANNELS + out[None, :]
    gl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def block_of_program(shape: gl.constexpr, cut: gl.constexpr):
    """Which block of pixels, which of channels, and how many programs share the blocks of pixels.

    Channels run fastest: neighbours share x.
    """
    BLOCK_O: gl.constexpr = cut.warps_o * cut.tiles_o * 16
    blocks_o: gl.constexpr = (shape.out_channels + BLOCK_O - 1) // BLOCK_O
    program = gl.program_id(0)
    return program // blocks_o, program % blocks_o, gl.num_programs(0) // blocks_o


@gluon.jit
def place_of_block(block_p, cut: gl.constexpr, channels: gl.constexpr):
    """Where a block's pixels begin in a tensor (pixels, channels), and its rows from there, int64.

    The beginning is one number, and a row within a block is small: addresses take fewer
    instructions than by rows of the whole tensor.
    """
    BLOCK_P: gl.constexpr = cut.warps_p * cut.tiles_p * 8
    row = gl.arange(0, BLOCK_P, gl.SliceLayout(1, output_layout(cut))).to(gl.int64)[:, None]
    return block_p.to(gl.int64) * (BLOCK_P * channels), row


@gluon.jit
def signed_sums(
    x_ptr, weight_ptr, base_ptr, pixels, block_p, block_o, shape: gl.constexpr, cut: gl.constexpr
):
    """A block of the convolution: sums, pixels, channels.

    The sums are (pixels, channels) int32 in :func:`output_layout`, the others the indices of its
    axes. Beyond the last pixel and the last channel a sum is anything.

    x (N H W, words) int32; weight and base as :mod:`tritonbnn.kernels.weight` makes them; ``shape``
    a :class:`tritonbnn.kernels.geometry.Shape`, ``cut`` a
    :class:`tritonbnn.kernels.cut.Cut`.
    """
    WORDS: gl.constexpr = (shape.channels + 31) // 32
    CHUNKS: gl.constexpr = (shape.kernel_size * shape.kernel_size * WORDS + 15) // 16
    LAYOUT: gl.constexpr = fragment_layout(cut, cut.tiles_o)
    X: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT))
    W: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))
    ONES: gl.constexpr = fragment_layout(cut, 1)
    OUTPUT: gl.constexpr = output_layout(cut)
    BLOCK_P: gl.constexpr = cut.warps_p * cut.tiles_p * 8
    BLOCK_O: gl.constexpr = cut.warps_o * cut.tiles_o * 16

    tile = steps_along(cut.warps_p, 0, X) * cut.tiles_p + steps_along(cut.tiles_p, 1, X)
    lane = steps_along(32, 2, X)
    pixel = gl.minimum(block_p * BLOCK_P + tile * 8 + lane // 4, pixels - 1)
    start, inside = _windows(pixel, shape)
    position = lane % 4 * 4 + steps_along(4, 3, X)

    tile = block_o * cut.warps_o + steps_along(cut.warps_o, 0, W)
    tile = tile * cut.tiles_o + steps_along(cut.tiles_o, 1, W)
    fragment = tile * (CHUNKS * 256) + steps_along(32, 2, W) * 4 + steps_along(4, 3, W)

    acc = gl.full(LAYOUT.shape, 0, gl.int32, LAYOUT)
    # One tile more of the weight, of ones alone, counts the ones of every window.
    ones = gl.full(ONES.shape, 0, gl.int32, ONES)
    every = gl.full(
        [cut.warps_o, 1, 32, 4], -1, gl.int32, gl.SliceLayout(2, gl.SliceLayout(3, ONES))
    )
    for chunk in range(CHUNKS):
        x = _window_words(x_ptr, start, inside, chunk * 16 + position, shape)
        w0 = gl.load(weight_ptr + (chunk * 256 + fragment))
        w1 = gl.load(weight_ptr + (chunk * 256 + 128 + fragment))
        acc = add_common_ones(w0, w1, x, acc)
        alike = gl.convert_layout(x, gl.SliceLayout(0, gl.SliceLayout(1, ONES)))
        ones = add_common_ones(every, every, alike, ones)

    pixel = block_p * BLOCK_P + gl.arange(0, BLOCK_P, gl.SliceLayout(1, OUTPUT))
    out = block_o * BLOCK_O + gl.arange(0, BLOCK_O, gl.SliceLayout(0, OUTPUT))
    common = as_matrix(acc, OUTPUT).reshape([BLOCK_P, cut.warps_o * 8, 2 * cut.tiles_o])
    common = gl.convert_layout(common, group_layout(cut))
    y = common * 4 - as_groups(ones, cut)[:, :, None]
    y = gl.convert_layout(y.reshape([BLOCK_P, BLOCK_O]), OUTPUT)
    return y + _bases(base_ptr, pixel, out, shape), pixel, out
