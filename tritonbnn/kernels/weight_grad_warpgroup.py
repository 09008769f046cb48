"""The weight's gradient on the warpgroup's tensor core, with signs that never leave the registers.

``wgmma`` reads its first operand from registers. There a lane makes +1 and -1 of the packed words,
so that the second cache is asked for the gradient alone, and shared memory holds nothing else.

Prediction, nothing has been measured yet: at 128 channels by 256 outputs the core has 1,024 clocks
of work for 64 pixels, in which schedulers have 400 instructions to issue, or 600 if pixels are not
at equal distances (a stride); the library on unpacked signs has no such work, and moves 4 bytes
more for each element of the image.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from tritonbnn.kernels.config import TileConfig, ceil_div
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.launch import launch
from tritonbnn.kernels.mma_tile import bits, thread_barrier


@gluon.constexpr_function
def pairs_layout(warps, block_k):
    """Pairs of pixels as the core's first operand has them, by (warp, half, row, eight, pair).

    A warp has 16 channels, 8 in each half, and the step's pixels, of which every eight are 4 pairs.
    """
    return gl.DistributedLinearLayout(
        bits(2, 1, rank=5) + bits(block_k // 8, 3, rank=5),
        bits(4, 4, rank=5) + bits(8, 2, rank=5),
        bits(warps, 0, rank=5),
        [],
        [warps, 2, 8, block_k // 8, 4],
    )


@gluon.constexpr_function
def sums_layout(warps, block_o):
    """Accumulators, (channels, outputs): a warp has 16 channels."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, block_o, 16])


@gluon.constexpr_function
def copy_layout(warps, block_k):
    """The gradient, (pixels, outputs), in copies of 16 bytes.

    A lane has all of its copies in two pixels: finding out whether they are inside costs more.
    """
    pixels = min(8, max(4, block_k // (2 * warps)))
    return gl.BlockedLayout([1, 8], [pixels, 32 // pixels], [warps, 1], [1, 0])


@gluon.jit
def _pixel_inside(pixel, end, tap, shape: gl.constexpr):
    """Whether a tap of an output pixel before the end, uint32, lies inside the image."""
    inside = pixel < end
    if shape.padding > 0:
        line = pixel // shape.out_width
        column = pixel - line * shape.out_width
        row = line % shape.out_height
        # unsigned, what lies before the first row or column is beyond the last one
        y = row * shape.stride + (tap // shape.kernel_size - shape.padding).to(gl.uint32)
        x = column * shape.stride + (tap % shape.kernel_size - shape.padding).to(gl.uint32)
        inside = inside & (y < shape.height) & (x < shape.width)
    return inside


@gluon.jit
def _source(pixel, shape: gl.constexpr):
    """The input pixel, flat, that the first tap of an output pixel meets if nothing is padded."""
    # what a line of the input has more than a line of outputs reaches, and an image less
    LONGER: gl.constexpr = shape.stride * (shape.width - shape.out_width)
    LOWER: gl.constexpr = (shape.stride * shape.out_height - shape.height) * shape.width
    source = pixel * shape.stride
    if LONGER != 0:
        source += pixel // shape.out_width * LONGER
    if LOWER != 0:
        source -= pixel // (shape.out_width * shape.out_height) * LOWER
    return source


@gluon.jit
def _load_pairs(
    x_ptr,
    step,
    block_c,
    shift,
    inputs,
    shape: gl.constexpr,
    WARPS: gl.constexpr,
    BLOCK_K: gl.constexpr,
):
    """A warp's 16 channels of a pixel, and of the next one above them.

    (warps, eights, pairs) int32. Outside of the image they are those of another pixel, for there
    the gradient is taken as 0. For channels that do not exist they are others: their sums are not
    stored.
    """
    HALVES: gl.constexpr = (shape.channels + 31) // 32 * 2
    LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, pairs_layout(WARPS, BLOCK_K)))
    PAIR: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    eight = gl.arange(0, BLOCK_K // 8, gl.SliceLayout(1, PAIR))[:, None]
    pair = gl.arange(0, 4, gl.SliceLayout(0, PAIR))[None, :]
    half = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    half = gl.minimum(block_c * WARPS + half, HALVES - 1)
    pixel = step * BLOCK_K + eight * 8 + pair * 2
    even = _source(pixel.to(gl.uint32), shape) + shift.to(gl.uint32)
    if shape.stride == 1 or shape.out_width % 2 == 0:
        odd = even + shape.stride
    else:
        odd = _source((pixel + 1).to(gl.uint32), shape) + shift.to(gl.uint32)
    # unsigned, what lies before the first pixel is beyond the last one, which is read instead
    even, odd = gl.minimum(even, inputs - 1), gl.minimum(odd, inputs - 1)
    first = x_ptr.to(gl.pointer_type(gl.uint16), bitcast=True) + half
    first_half = gl.load(first + (even.to(gl.int64) * HALVES)[None]).to(gl.int32)
    return first_half | (gl.load(first + (odd.to(gl.int64) * HALVES)[None]).to(gl.int32) << 16)


@gluon.jit
def _signs(
    x_ptr,
    step,
    block_c,
    shift,
    inputs,
    shape: gl.constexpr,
    WARPS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    SUMS: gl.constexpr,
    DTYPE: gl.constexpr,
):
    """+1 and -1 of a block's channels at a step's pixels, in registers.

    Two at once, of a pair of pixels: -1 and -1, from which a bit of 1 takes the sign.
    """
    LAYOUT: gl.constexpr = pairs_layout(WARPS, BLOCK_K)
    ROWS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(3, gl.SliceLayout(4, LAYOUT)))
    half = gl.arange(0, 2, gl.SliceLayout(1, ROWS))[:, None]
    row = half * 8 + gl.arange(0, 8, gl.SliceLayout(0, ROWS))[None, :]
    # A row's bits, and minus what makes each the highest of its 16. Masking, and multiplying with
    # an addition, keep two pipes busy; to shift, mask and invert is more, and all on one of them.
    bit = (1 + (1 << 16) << row)[None, :, :, None, None]
    factor = (-(1 << 15) >> row)[None, :, :, None, None]
    MINUS_ONES: gl.constexpr = (0xBF80BF80 if gl.bfloat16 == DTYPE else 0xBC00BC00) - (1 << 32)
    pairs = _load_pairs(x_ptr, step, block_c, shift, inputs, shape, WARPS, BLOCK_K)
    both = (pairs[:, None, None] & bit) * factor + MINUS_ONES
    signs = gl.join(both.to(gl.int16), (both >> 16).to(gl.int16)).to(DTYPE, bitcast=True)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    return gl.convert_layout(signs.reshape([WARPS * 16, BLOCK_K]), OPERAND)


@gluon.jit
def _copy_gradient(
    grad_ptr, stage, step, end, block_o, tap, shape: gl.constexpr, WARPS: gl.constexpr
):
    """Ask for a step's gradient, (pixels, outputs); 0 where the tap is outside of the image."""
    BLOCK_K: gl.constexpr = stage.shape[0]
    BLOCK_O: gl.constexpr = stage.shape[1]
    COPY: gl.constexpr = copy_layout(WARPS, BLOCK_K)
    pixel = gl.arange(0, BLOCK_K, gl.SliceLayout(1, COPY))
    out = gl.arange(0, BLOCK_O, gl.SliceLayout(0, COPY))
    inside = _pixel_inside((step * BLOCK_K + pixel).to(gl.uint32), end, tap, shape)
    first = step.to(gl.int64) * (BLOCK_K * shape.out_channels) + block_o * BLOCK_O
    offset = pixel[:, None] * shape.out_channels + out[None, :]
    mask = inside[:, None]
    if shape.out_channels % BLOCK_O != 0:
        mask = mask & (block_o * BLOCK_O + out < shape.out_channels)[None, :]
    async_copy.async_copy_global_to_shared(stage, grad_ptr + first + offset, mask=mask)
    async_copy.commit_group()


@gluon.jit
def _store_sums(partial_ptr, acc, channel, out, shape: gl.constexpr, WARPS: gl.constexpr):
    """Store (channels, outputs) from the first of each on, in parts.

    All addresses at once are more than there are registers beside the sums.
    """
    OUTPUTS: gl.constexpr = acc.shape[1]
    if OUTPUTS > 32:
        halves = acc.reshape([WARPS * 16, 2, OUTPUTS // 2]).permute(0, 2, 1)
        first, second = gl.split(halves)
        _store_sums(partial_ptr, first, channel, out, shape, WARPS)
        _store_sums(partial_ptr, second, channel, out + OUTPUTS // 2, shape, WARPS)
    else:
        TAPS: gl.constexpr = shape.kernel_size * shape.kernel_size
        SUMS: gl.constexpr = sums_layout(WARPS, OUTPUTS)
        acc = gl.convert_layout(acc, SUMS)
        channel += gl.arange(0, WARPS * 16, gl.SliceLayout(1, SUMS))
        out += gl.arange(0, OUTPUTS, gl.SliceLayout(0, SUMS))
        mask = (channel < shape.channels)[:, None] & (out < shape.out_channels)[None, :]
        place = out[None, :] * (TAPS * shape.channels) + channel[:, None]
        gl.store(partial_ptr + place, acc, mask=mask)


@gluon.jit
def _conv_weight_grad_hopper_kernel(
    grad_ptr,
    x_ptr,
    partial_ptr,
    pixels,
    steps,
    shape: gl.constexpr,
    WARPS: gl.constexpr,
    BLOCK_O: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """partial[split, o, t, c] = sum over the split's pixels p of grad[p, o] sign(x[p + t, c]).

    grad (N H' W', O) of 16 bits; x (N H W, words) int32; partial (splits, O, kh kw, C) float32.
    Axis 1 of the grid is the tap, axis 2 the split, ``steps`` blocks of BLOCK_K pixels each.
    """
    CHANNELS: gl.constexpr = shape.channels
    TAPS: gl.constexpr = shape.kernel_size * shape.kernel_size
    SUMS: gl.constexpr = sums_layout(WARPS, BLOCK_O)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    DTYPE: gl.constexpr = grad_ptr.dtype.element_ty
    blocks_o: gl.constexpr = (shape.out_channels + BLOCK_O - 1) // BLOCK_O
    block_c, block_o = gl.program_id(0) // blocks_o, gl.program_id(0) % blocks_o
    tap, split = gl.program_id(1), gl.program_id(2)
    first = split * steps
    # unsigned, as the last split may end beyond what an int32 counts
    end = gl.minimum((first + steps).to(gl.uint32) * BLOCK_K, pixels)
    inputs = pixels // (shape.out_height * shape.out_width) * (shape.height * shape.width)
    shift = (tap // shape.kernel_size - shape.padding) * shape.width
    shift += tap % shape.kernel_size - shape.padding

    stages = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_K, BLOCK_O], SHARED)
    for early in gl.static_range(STAGES - 1):
        _copy_gradient(
            grad_ptr, stages.index(early), first + early, end, block_o, tap, shape, WARPS
        )
    signs = _signs(x_ptr, first, block_c, shift, inputs, shape, WARPS, BLOCK_K, SUMS, DTYPE)
    acc = gl.full([WARPS * 16, BLOCK_O], 0.0, gl.float32, SUMS)
    for index in range(steps):
        async_copy.wait_group(STAGES - 2)
        thread_barrier()  # every thread's copies are there
        hopper.fence_async_shared()  # to the tensor core
        running = hopper.warpgroup_mma(signs, stages.index(index % STAGES), acc, is_async=True)
        # Triton puts a barrier here, for it does not know one stage from another. None is needed:
        # this is the stage of the step before, which nobody reads since the barrier above.
        ahead = index + (STAGES - 1)
        stage = stages.index(ahead % STAGES)
        _copy_gradient(grad_ptr, stage, first + ahead, end, block_o, tap, shape, WARPS)
        # what no step needs is read too
        ahead_signs = _signs(
            x_ptr, first + index + 1, block_c, shift, inputs, shape, WARPS, BLOCK_K, SUMS, DTYPE
        )
        acc = hopper.warpgroup_mma_wait(0, deps=[running])
        signs = ahead_signs
    async_copy.wait_group(0)  # what was asked for beyond the last step, which is nothing

    partial_ptr += split.to(gl.int64) * (shape.out_channels * TAPS * CHANNELS) + tap * CHANNELS
    channel = block_c * (WARPS * 16)
    _store_sums(partial_ptr, acc, channel, block_o * BLOCK_O, shape, WARPS)


def weight_grad_warpgroup(
    grad: Tensor, x: Tensor, partial: Tensor, geometry: Geometry, tile: TileConfig, steps: int
) -> None:
    """Run the kernel.

    Args:
        grad: (N, O, H, W), bf16 or float16, in channels_last memory; O a multiple of 8.
        x: packed (N, H, W, words), contiguous.
        partial: (splits, O kh kw, C) float32, the result.
        geometry: of the convolution.
        tile: ``block_m`` outputs, ``block_n`` channels, 16 a warp, by ``block_k`` pixels a step.
        steps: of a split.
    """
    blocks = ceil_div(geometry.out_channels, tile.block_m)
    blocks *= ceil_div(geometry.channels, tile.block_n)
    launch(
        _conv_weight_grad_hopper_kernel,
        (blocks, geometry.kernel_size**2, len(partial)),
        tile,
        grad_ptr=grad,
        x_ptr=x,
        partial_ptr=partial,
        pixels=geometry.pixels,
        steps=steps,
        shape=geometry.shape,
        WARPS=tile.num_warps,
        BLOCK_O=tile.block_m,
        BLOCK_K=tile.block_k,
        STAGES=tile.num_stages,
    )
