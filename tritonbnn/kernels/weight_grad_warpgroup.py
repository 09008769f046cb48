"""The weight's gradient on the warpgroup's tensor core, with signs that never leave the registers.

``wgmma`` reads its first operand from registers. There a lane makes +1 and -1 of the packed words,
so that the second cache is asked for the gradient alone, and shared memory holds nothing else.

Prediction, nothing has been measured yet: at 128 channels by 256 outputs the core has 1,024 clocks
of work for 64 pixels, in which schedulers have 660 instructions to issue; the library on unpacked
signs has no such work, and moves 4 bytes more for each element of the image.
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
def words_layout(warps, block_k):
    """Packed words by (warp, row of a warp's 16, pixel), as the core's first operand has them."""
    return gl.DistributedLinearLayout(
        bits(2, 2, rank=3) + bits(2, 1, 8, rank=3) + bits(block_k // 8, 2, 8, rank=3),
        bits(4, 2, 2, rank=3) + bits(8, 1, rank=3),
        bits(warps, 0, rank=3),
        [],
        [warps, 16, block_k],
    )


@gluon.constexpr_function
def sums_layout(warps, block_o):
    """Accumulators, (channels, outputs): a warp has 16 channels."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, block_o, 16])


@gluon.constexpr_function
def copy_layout(warps):
    """The gradient, (pixels, outputs), in copies of 16 bytes.

    A lane has all of its copies in few pixels: finding out whether they are inside costs more.
    """
    return gl.BlockedLayout([1, 8], [4, 8], [warps, 1], [1, 0])


@gluon.jit
def _pixel_inside(pixel, pixels, tap, shape: gl.constexpr):
    """Whether a tap of an output pixel lies inside the image."""
    inside = pixel < pixels
    if shape.padding > 0:
        # unsigned, what lies before the first row or column is beyond the last one
        line = pixel.to(gl.uint32) // shape.width
        column = pixel.to(gl.uint32) - line * shape.width
        y = line % shape.height + (tap // shape.kernel_size - 1).to(gl.uint32)
        x = column + (tap % shape.kernel_size - 1).to(gl.uint32)
        inside = inside & (y < shape.height) & (x < shape.width)
    return inside


@gluon.jit
def _signs(
    x_ptr,
    step,
    block_c,
    shift,
    pixels,
    shape: gl.constexpr,
    WARPS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    SUMS: gl.constexpr,
    DTYPE: gl.constexpr,
):
    """+1 and -1 of a block's channels at a step's pixels, in registers.

    Outside of the image it is the sign of another pixel, for there the gradient is taken as 0.
    """
    WORDS: gl.constexpr = (shape.channels + 31) // 32
    LAYOUT: gl.constexpr = words_layout(WARPS, BLOCK_K)
    WORD: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    word = (block_c * WARPS + gl.arange(0, WARPS, gl.SliceLayout(1, WORD))) // 2
    pixel = step * BLOCK_K + shift + gl.arange(0, BLOCK_K, gl.SliceLayout(0, WORD))
    if shape.padding > 0:
        pixel = gl.maximum(pixel, 0)
    pixel = gl.minimum(pixel, pixels - 1)
    words = gl.load(
        (x_ptr + word)[:, None] + pixel[None, :] * WORDS, mask=(word < WORDS)[:, None], other=0
    )
    row = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    bit = warp[:, None] % 2 * 16 + row[None, :]
    # the sign of 16 bits is the highest one, and of 1.0 and -1.0 all others are alike
    MINUS_ONE: gl.constexpr = 0xBF80 if gl.bfloat16 == DTYPE else 0xBC00
    halves = ((words[:, None, :] >> bit[:, :, None]) << 15) ^ MINUS_ONE
    signs = halves.to(gl.int16).to(DTYPE, bitcast=True)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    return gl.convert_layout(signs.reshape([WARPS * 16, BLOCK_K]), OPERAND)


@gluon.jit
def _copy_gradient(
    grad_ptr, stage, step, last, block_o, tap, pixels, shape: gl.constexpr, WARPS: gl.constexpr
):
    """Ask for a step's gradient, (pixels, outputs); 0 where the tap is outside of the image."""
    BLOCK_K: gl.constexpr = stage.shape[0]
    BLOCK_O: gl.constexpr = stage.shape[1]
    COPY: gl.constexpr = copy_layout(WARPS)
    pixel = step * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(1, COPY))
    out = block_o * BLOCK_O + gl.arange(0, BLOCK_O, gl.SliceLayout(0, COPY))
    inside = _pixel_inside(pixel, pixels, tap, shape) & (step < last)
    offset = pixel.to(gl.int64)[:, None] * shape.out_channels + out[None, :]
    mask = inside[:, None] & (out < shape.out_channels)[None, :]
    async_copy.async_copy_global_to_shared(stage, grad_ptr + offset, mask=mask)
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

    grad (N H W, O) of 16 bits; x (N H W, words) int32; partial (splits, O, kh kw, C) float32. Axis
    1 of the grid is the tap, axis 2 the split, ``steps`` blocks of BLOCK_K pixels each.
    """
    CHANNELS: gl.constexpr = shape.channels
    TAPS: gl.constexpr = shape.kernel_size * shape.kernel_size
    SUMS: gl.constexpr = sums_layout(WARPS, BLOCK_O)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    DTYPE: gl.constexpr = grad_ptr.dtype.element_ty
    blocks_o: gl.constexpr = (shape.out_channels + BLOCK_O - 1) // BLOCK_O
    block_c, block_o = gl.program_id(0) // blocks_o, gl.program_id(0) % blocks_o
    tap, split = gl.program_id(1), gl.program_id(2)
    first, last = split * steps, split * steps + steps
    shift = (tap // shape.kernel_size - shape.padding) * shape.width
    shift += tap % shape.kernel_size - shape.padding

    stages = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_K, BLOCK_O], SHARED)
    for early in gl.static_range(STAGES - 1):
        _copy_gradient(
            grad_ptr, stages.index(early), first + early, last, block_o, tap, pixels, shape, WARPS
        )
    signs = _signs(x_ptr, first, block_c, shift, pixels, shape, WARPS, BLOCK_K, SUMS, DTYPE)
    acc = gl.full([WARPS * 16, BLOCK_O], 0.0, gl.float32, SUMS)
    for index in range(steps):
        async_copy.wait_group(STAGES - 2)
        hopper.fence_async_shared()  # what was copied, to the tensor core, of every thread
        thread_barrier()
        ahead = index + (STAGES - 1)
        _copy_gradient(
            grad_ptr,
            stages.index(ahead % STAGES),
            first + ahead,
            last,
            block_o,
            tap,
            pixels,
            shape,
            WARPS,
        )
        stage = stages.index(index % STAGES)
        running = hopper.warpgroup_mma(signs, stage, acc, is_async=True)
        # what no step needs is read too, from the last pixel
        ahead_signs = _signs(
            x_ptr, first + index + 1, block_c, shift, pixels, shape, WARPS, BLOCK_K, SUMS, DTYPE
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
        geometry: of the convolution, whose stride is 1.
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
