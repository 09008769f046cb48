"""The input's gradient on the warpgroup's tensor core, whose weight never leaves the registers.

``wgmma`` reads its first operand from registers: there it is the weight, channels by outputs, of
which a lane makes 32 numbers from one word of signs and their outputs' scales. So shared memory
holds the gradient alone, and the second cache is asked for nothing else.

Prediction, nothing has been measured yet: for 128 channels by 128 pixels by 64 outputs the core has
512 clocks of work. Meanwhile 16 KiB are written to shared memory and 32 KiB are read, which takes
384 clocks. The plain product writes and reads 80 KiB. Two blocks fit a multiprocessor, so that
images of the one move while the other multiplies.
"""

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from tritonbnn.kernels.binarize import sign_slope
from tritonbnn.kernels.config import TileConfig, ceil_div
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.launch import launch
from tritonbnn.kernels.mma_tile import bits, taps_inside, thread_barrier
from tritonbnn.kernels.sign_words import SignWords
from tritonbnn.kernels.warpgroup import SIGNED

AT_ONCE = gl.constexpr(16)
"""Pixels that are taken through the sign at a time."""

_OPERANDS = gl.constexpr("=r,r,r,r,r,r")  # two scales come in one register

COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
"""The gradient, (pixels, outputs), in copies of 16 bytes: a lane's are in few pixels."""


@gluon.constexpr_function
def weight_layout(tiles):
    """The weight by (tile, warp, i, g, j, t, e), as the core's first operand has it.

    Channel 64 tile + 16 warp + 8 i + g and output 8 j + 2 t + e.
    """
    return gl.DistributedLinearLayout(
        bits(2, 6, rank=7) + bits(2, 2, rank=7) + bits(8, 4, rank=7) + bits(tiles, 0, rank=7),
        bits(4, 5, rank=7) + bits(8, 3, rank=7),
        bits(4, 1, rank=7),
        [],
        [tiles, 4, 2, 8, 8, 4, 2],
    )


@gluon.constexpr_function
def words_layout(tiles):
    """Words by (warp, lane, tile), of which a lane reads its own at once."""
    return gl.DistributedLinearLayout(
        bits(tiles, 2, rank=3), bits(32, 1, rank=3), bits(4, 0, rank=3), [], [4, 32, tiles]
    )


@gluon.constexpr_function
def scales_layout():
    """Scales by (t, those of a lane), which a lane reads at once."""
    return gl.DistributedLinearLayout(
        bits(16, 1), bits(4, 0) + [[0, 0]] * 3, [[0, 0]] * 2, [], [4, 16]
    )


@gluon.constexpr_function
def sums_layout(pixels):
    """Accumulators, (channels, pixels): a warp has 16 channels in 64."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, pixels, 16])


@gluon.constexpr_function
def image_layout(channels):
    """(pixels, channels / 8, 8), 16 bytes of 16 bits a thread."""
    across = channels // 8
    return gl.BlockedLayout([1, 1, 8], [32 // across, across, 1], [4, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def _only(layout, *axes):
    """The layout of some axes of a tensor of rank 7."""
    for other in range(6, -1, -1):
        layout = layout if other in axes else gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def _weight(words_ptr, scales_ptr, place, chunk, SUMS: gl.constexpr, TILES: gl.constexpr):
    """alpha times the signs of a block's channels by 64 outputs, in registers.

    Operands as :class:`tritonbnn.kernels.sign_words.SignWords`; ``place`` counts (tap, chunk, block
    of channels).
    """
    LAYOUT: gl.constexpr = weight_layout(TILES)
    OWN: gl.constexpr = words_layout(TILES)
    warp = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, OWN)))[:, None, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, OWN)))[None, :, None]
    tile = gl.arange(0, TILES, gl.SliceLayout(0, gl.SliceLayout(1, OWN)))[None, None, :]
    words_ptr += place.to(gl.int64) * (4 * 32 * TILES)
    words = gl.load(words_ptr + ((warp * 32 + lane) * TILES + tile))
    words = words.reshape([4, 8, 4, TILES]).permute(3, 0, 1, 2)
    words = gl.convert_layout(words, _only(LAYOUT, 0, 1, 3, 5))

    LANES: gl.constexpr = scales_layout()
    member = gl.arange(0, 4, gl.SliceLayout(1, LANES))[:, None]
    own = gl.arange(0, 16, gl.SliceLayout(0, LANES))[None, :]
    scales = gl.load(scales_ptr + chunk * 64 + (member * 16 + own))
    scales = scales.reshape([4, 8, 2]).permute(1, 0, 2)
    scales = gl.convert_layout(scales, _only(LAYOUT, 4, 5, 6))

    upper = gl.arange(0, 2, _only(LAYOUT, 2))[None, None, :, None, None, None, None]
    step = gl.arange(0, 8, _only(LAYOUT, 4))[None, None, None, None, :, None, None]
    numbers = gl.inline_asm_elementwise(
        SIGNED,
        _OPERANDS,
        [
            words[:, :, None, :, None, :, None],
            15 - upper * 8 - step,
            scales[None, None, None, None],
        ],
        scales_ptr.dtype.element_ty,
        is_pure=True,
        pack=2,
    )
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    return gl.convert_layout(numbers.reshape([TILES * 64, 64]), OPERAND)


@gluon.jit
def _tap(index, y_class, x_class, shape: gl.constexpr):
    """Which tap of the weight comes at a place in the sum, and how far away its gradient is.

    With stride 2 an input pixel meets the taps of its parity alone. Distances count the gradient's
    rows and columns.
    """
    if shape.stride == 1:
        row, column = index // shape.kernel_size, index % shape.kernel_size
        y, x = shape.padding - row, shape.padding - column
    else:  # of 3x3 taps the middle one, or the two beside it
        down, right = index >> x_class, index & x_class
        row, column = 1 - y_class + 2 * down, 1 - x_class + 2 * right
        y, x = y_class - down, x_class - right
    return row * shape.kernel_size + column, y, x


@gluon.jit
def _neighbours(pixel, pixels, shape: gl.constexpr):
    """Which of the 3x3 gradients around each pixel of the gradient exist: a bit each."""
    row, column = pixel // shape.out_width % shape.out_height, pixel % shape.out_width
    inside = taps_inside(row - 1, column - 1, shape.out_height, shape.out_width)
    return gl.where(pixel < pixels, inside, 0)


@gluon.jit
def _copy_gradient(grad_ptr, stage, inside, first, y, x, chunk, wanted, shape: gl.constexpr):
    """Ask for the gradient (y, x) away from a block's, (pixels, outputs); 0 where there is none.

    ``first`` is the block's first pixel.
    """
    OUTPUTS: gl.constexpr = stage.shape[1]
    row = gl.arange(0, stage.shape[0], gl.SliceLayout(1, COPY)).to(gl.int64)
    out = gl.arange(0, OUTPUTS, gl.SliceLayout(0, COPY))
    # Beyond the last tap it is any bit, for nothing is wanted there.
    inside = ((inside >> ((y * 3 + x + 4) & 31)) % 2 != 0) & wanted
    known = chunk * OUTPUTS + out < shape.out_channels
    # a row within a block is small: addresses take fewer instructions than by rows of all images
    moved = (first + (y * shape.out_width + x)).to(gl.int64) * shape.out_channels
    offset = row[:, None] * shape.out_channels + out[None, :]
    source = grad_ptr + (moved + chunk * OUTPUTS) + offset
    async_copy.async_copy_global_to_shared(stage, source, mask=inside[:, None] & known[None, :])
    async_copy.commit_group()


@gluon.jit
def _skipped(
    residual_ptr, positive_ptr, slope_ptr, pixel, exists, group, lane, CHANNELS: gl.constexpr
):
    """The gradient to a shortcut's output at (pixels, groups, 8 channels), in float32.

    Operands as in :class:`tritonbnn.kernels.binarize.Skipped`, ``group`` a group's first channel.
    Where none exists, there is none of its channels.
    """
    channel = group + lane
    grad = gl.load(residual_ptr + (pixel * CHANNELS + channel), mask=exists, other=0.0)
    grad = grad.to(gl.float32)
    if positive_ptr is not None:
        WORDS: gl.constexpr = (CHANNELS + 31) // 32
        bits = gl.load(positive_ptr + (pixel * WORDS + group // 32), mask=exists, other=0)
        positive = ((bits >> group % 32 >> lane) & 1) != 0
        slope = gl.load(slope_ptr + channel, mask=channel < CHANNELS, other=0.0).to(gl.float32)
        low = (grad * slope).to(residual_ptr.dtype.element_ty).to(gl.float32)
        grad = gl.where(positive, grad, low)
    return grad


@gluon.jit
def _finish_part(
    acc,
    first,
    first_channel,
    y_class,
    x_class,
    pixels,
    dx_ptr,
    stream_ptr,
    shift_ptr,
    residual_ptr,
    positive_ptr,
    slope_ptr,
    shape: gl.constexpr,
    SHORTCUT: gl.constexpr,
):
    """:func:`_finish` for (pixels, groups, 8 channels)."""
    CHANNELS: gl.constexpr = shape.channels
    IMAGE: gl.constexpr = image_layout(acc.shape[1] * 8)
    pixel = first + gl.arange(0, acc.shape[0], gl.SliceLayout(1, gl.SliceLayout(2, IMAGE)))
    pixel = pixel[:, None, None]
    group = gl.arange(0, acc.shape[1], gl.SliceLayout(0, gl.SliceLayout(2, IMAGE)))
    lane = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, IMAGE)))
    group, lane = first_channel + group[None, :, None] * 8, lane[None, None, :]
    channel = group + lane
    exists = (pixel < pixels) & (group < CHANNELS)
    target = pixel.to(gl.int64)
    if shape.stride == 2:
        image = pixel // (shape.out_height * shape.out_width)
        y = pixel // shape.out_width % shape.out_height * 2 + y_class
        x = pixel % shape.out_width * 2 + x_class
        exists = exists & (y < shape.height) & (x < shape.width)
        target = (image * shape.height + y).to(gl.int64) * shape.width + x
    place = target * CHANNELS + channel
    dx = acc
    if stream_ptr is not None:
        signed = gl.load(stream_ptr + place, mask=exists, other=0.0).to(gl.float32)
        if shift_ptr is not None:
            signed += gl.load(shift_ptr + channel, mask=channel < CHANNELS, other=0.0).to(
                gl.float32
            )
        acc = acc * sign_slope(signed)  # outside of the image the sum is 0
        dx = acc
        if residual_ptr is not None:
            skipped = residual_ptr, positive_ptr, slope_ptr
            if SHORTCUT == "pool":
                pooled = pixel.to(gl.int64)
                dx += 0.25 * _skipped(*skipped, pooled, exists, group, lane, CHANNELS)
            elif SHORTCUT == "repeat":
                dx += _skipped(*skipped, target, exists, group, lane, 2 * CHANNELS)
                dx += _skipped(*skipped, target, exists, group + CHANNELS, lane, 2 * CHANNELS)
            else:
                dx += _skipped(*skipped, target, exists, group, lane, CHANNELS)
    gl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=exists)
    return acc


@gluon.jit
def _finish(
    acc,
    first,
    first_channel,
    y_class,
    x_class,
    pixels,
    dx_ptr,
    stream_ptr,
    shift_ptr,
    residual_ptr,
    positive_ptr,
    slope_ptr,
    shape: gl.constexpr,
    SHORTCUT: gl.constexpr,
):
    """What follows the product, for (channels, pixels) from the first of each: a few pixels a time.

    All that is read at once would take more registers than there are beside the sums. Operands as
    :func:`_conv_input_grad_hopper_kernel` takes them.

    Returns:
        The gradient before the sign, or behind it where there is one, added over parts, (pixels of
        a part, groups, 8 channels).
    """
    BLOCK: gl.constexpr = acc.shape[0]
    PIXELS: gl.constexpr = acc.shape[1]
    given = first_channel, y_class, x_class, pixels, dx_ptr, stream_ptr, shift_ptr
    skipped = residual_ptr, positive_ptr, slope_ptr
    if PIXELS > AT_ONCE:
        lower, upper = gl.split(acc.reshape([BLOCK, 2, PIXELS // 2]).permute(0, 2, 1))
        total = _finish(lower, first, *given, *skipped, shape, SHORTCUT)
        total += _finish(upper, first + PIXELS // 2, *given, *skipped, shape, SHORTCUT)
    else:
        parts = acc.permute(1, 0).reshape([PIXELS, BLOCK // 8, 8])
        parts = gl.convert_layout(parts, image_layout(BLOCK))
        total = _finish_part(parts, first, *given, *skipped, shape, SHORTCUT)
    return total


@gluon.jit
def _conv_input_grad_hopper_kernel(
    grad_ptr,
    words_ptr,
    scales_ptr,
    dx_ptr,
    stream_ptr,
    shift_ptr,
    residual_ptr,
    positive_ptr,
    slope_ptr,
    sums_ptr,
    pixels,
    shape: gl.constexpr,
    SHORTCUT: gl.constexpr,
    TILES: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """dx[y, x, c] = sum over ky, kx, o of grad[(y + p - ky) / s, (x + p - kx) / s, o] w[o, t, c].

    grad (N H' W', O) of 16 bits, ``pixels`` of them; words and scales the fields of
    :class:`tritonbnn.kernels.sign_words.SignWords`; dx (N H W, C) in grad's dtype. The others as
    the plain product takes them (:mod:`tritonbnn.kernels.input_grad`), as is axis 1 of the grid. A
    pixel of a class has the number of the gradient's that is nearest.
    """
    CHUNKS: gl.constexpr = (shape.out_channels + 63) // 64
    BLOCKS: gl.constexpr = (shape.channels + 64 * TILES - 1) // (64 * TILES)
    SUMS: gl.constexpr = sums_layout(BLOCK_N)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    block, block_c = gl.program_id(0) // BLOCKS, gl.program_id(0) % BLOCKS
    y_class, x_class = gl.program_id(1) // shape.stride, gl.program_id(1) % shape.stride
    steps = shape.kernel_size * shape.kernel_size * CHUNKS
    if shape.stride == 2:
        steps = (1 + y_class) * (1 + x_class) * CHUNKS
    first = block * BLOCK_N
    pixel = first + gl.arange(0, BLOCK_N, gl.SliceLayout(1, COPY))
    inside = _neighbours(pixel, pixels, shape)

    stages = gl.allocate_shared_memory(grad_ptr.dtype.element_ty, [STAGES, BLOCK_N, 64], SHARED)
    for early in gl.static_range(STAGES - 1):
        _, y, x = _tap(early // CHUNKS, y_class, x_class, shape)
        _copy_gradient(
            grad_ptr, stages.index(early), inside, first, y, x, early % CHUNKS, early < steps, shape
        )
    tap, _, _ = _tap(0, y_class, x_class, shape)
    weight = _weight(words_ptr, scales_ptr, tap * (CHUNKS * BLOCKS) + block_c, 0, SUMS, TILES)
    acc = gl.full([TILES * 64, BLOCK_N], 0.0, gl.float32, SUMS)
    for index in range(steps):
        async_copy.wait_group(STAGES - 2)
        thread_barrier()  # every thread's copies are there; Triton adds one unless it comes next
        hopper.fence_async_shared()  # to the tensor core
        stage = stages.index(index % STAGES).permute((1, 0))
        running = hopper.warpgroup_mma(weight, stage, acc, is_async=True)
        # Triton puts a barrier here, for it does not know one stage from another. None is needed:
        # this is the stage of the step before, which nobody reads since the barrier above.
        ahead = index + (STAGES - 1)
        _, y, x = _tap(ahead // CHUNKS, y_class, x_class, shape)
        stage = stages.index(ahead % STAGES)
        _copy_gradient(grad_ptr, stage, inside, first, y, x, ahead % CHUNKS, ahead < steps, shape)
        ahead = gl.minimum(index + 1, steps - 1)  # what no step needs is made too
        tap, _, _ = _tap(ahead // CHUNKS, y_class, x_class, shape)
        place = (tap * CHUNKS + ahead % CHUNKS) * BLOCKS + block_c
        ahead_weight = _weight(words_ptr, scales_ptr, place, ahead % CHUNKS, SUMS, TILES)
        acc = hopper.warpgroup_mma_wait(0, deps=[running])
        weight = ahead_weight
    async_copy.wait_group(0)  # what was asked for beyond the last step, which is nothing

    channel = block_c * (64 * TILES)
    total = _finish(
        acc,
        first,
        channel,
        y_class,
        x_class,
        pixels,
        dx_ptr,
        stream_ptr,
        shift_ptr,
        residual_ptr,
        positive_ptr,
        slope_ptr,
        shape,
        SHORTCUT,
    )
    if stream_ptr is not None:
        IMAGE: gl.constexpr = gl.SliceLayout(0, image_layout(64 * TILES))
        group = gl.arange(0, 8 * TILES, gl.SliceLayout(1, IMAGE))
        lane = gl.arange(0, 8, gl.SliceLayout(0, IMAGE))
        channel += group[:, None] * 8 + lane[None, :]
        blocks = gl.num_programs(0) // BLOCKS
        row = (gl.program_id(1) * blocks + block).to(gl.int64) * shape.channels
        gl.store(sums_ptr + row + channel, gl.sum(total, axis=0), mask=channel < shape.channels)


def input_grad_warpgroup(
    grad: Tensor,
    weight: SignWords,
    geometry: Geometry,
    tile: TileConfig,
    further: dict[str, Any],
) -> None:
    """Run the kernel.

    Args:
        grad: (N, O, H', W'), bf16 or float16, in channels_last memory; O and C multiples of 8.
        weight: its signs and scales.
        geometry: of the convolution, whose stride is 1, or 2 with 3x3 taps.
        tile: ``block_m`` pixels by ``block_n`` channels by 64 outputs a step.
        further: what the plain product takes beside: dx and what is behind the sign.
    """
    blocks = ceil_div(geometry.pixels, tile.block_m)
    launch(
        _conv_input_grad_hopper_kernel,
        (blocks * ceil_div(geometry.channels, tile.block_n), geometry.stride**2),
        tile,
        grad_ptr=grad,
        words_ptr=weight.words,
        scales_ptr=weight.scales,
        **further,
        pixels=geometry.pixels,
        shape=geometry.shape,
        TILES=weight.words.shape[-1],
        BLOCK_N=tile.block_m,
        STAGES=tile.num_stages,
    )
