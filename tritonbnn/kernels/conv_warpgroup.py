"""The convolution with a real weight on the warpgroup's tensor core, its signs made in registers.

``wgmma`` reads its first operand from registers, where a lane makes +1, -1 and, outside of the
image, 0 of the packed words that it loads. Shared memory holds the weight alone. In Triton's own
product the signs go there and back, which takes longer than the core has to multiply.

Two signs are made at once, of bits 16 apart. Any order of K will do, so the weight's rows come in
the order that this asks for.

Prediction, nothing has been measured yet: at 128 pixels by 128 outputs the core has 512 clocks of
work for 64 channels. Shared memory is busy for 450 of them, and schedulers issue 310 instructions
each.
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
from tritonbnn.kernels.tiles import store_moments
from tritonbnn.kernels.warpgroup import SIGNED

_OPERANDS = gl.constexpr("=r,r,r,r,r,r,r")


@gluon.constexpr_function
def signs_layout(warps, block_k):
    """Signs by (pixel, word, bit), as the core's first operand has them: a warp has 16 pixels."""
    return gl.DistributedLinearLayout(
        bits(2, 2, rank=3)
        + bits(2, 0, 8, rank=3)
        + bits(4, 2, 8, rank=3)
        + bits(block_k // 32, 1, rank=3),
        bits(4, 2, 2, rank=3) + bits(8, 0, rank=3),
        bits(warps, 0, 16, rank=3),
        [],
        [warps * 16, block_k // 32, 32],
    )


@gluon.constexpr_function
def sums_layout(warps, block_o):
    """Accumulators, (pixels, outputs)."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, block_o, 16])


@gluon.constexpr_function
def wide_layout(warps, block_o):
    """(rows, outputs), 16 bytes of a row side by side."""
    lanes = block_o // 8
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.jit
def _place(first, pixels, rows_layout: gl.constexpr, ROWS: gl.constexpr, shape: gl.constexpr):
    """Row, column and flat place in the image of the first tap, which may be outside."""
    pixel = gl.arange(0, ROWS, rows_layout) + first
    pixel = gl.minimum(pixel, pixels - 1)  # what no pixel needs is computed too, and not stored
    line = pixel // shape.out_width
    x = (pixel - line * shape.out_width) * shape.stride - shape.padding
    image = line // shape.out_height
    y = (line - image * shape.out_height) * shape.stride - shape.padding
    return y, x, (image * shape.height + y) * shape.width + x


@gluon.jit
def _signs(
    x_ptr,
    weight_ptr,
    step,
    y,
    x,
    place,
    shape: gl.constexpr,
    LAYOUT: gl.constexpr,
    SUMS: gl.constexpr,
):
    """+1 and -1 of a step's channels at a block's pixels, and 0 outside of the image.

    Of a word's columns, 8 i + 2 t + e is the sign of channel 4 i + t + 16 e.
    """
    WORDS: gl.constexpr = (shape.channels + 31) // 32
    STEP_WORDS: gl.constexpr = LAYOUT.shape[1]
    CHUNKS: gl.constexpr = (WORDS + STEP_WORDS - 1) // STEP_WORDS
    WORD: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT))
    tap = step // CHUNKS
    dy, dx = tap // shape.kernel_size, tap % shape.kernel_size
    word = step % CHUNKS * STEP_WORDS + gl.arange(0, STEP_WORDS, WORD)
    here = place + (dy * shape.width + dx)
    # unsigned, what lies before the first row or column is beyond the last one
    inside = (y + dy).to(gl.uint32) < shape.height
    inside = inside & ((x + dx).to(gl.uint32) < shape.width) & (tap < shape.kernel_size**2)
    words = gl.load(
        x_ptr + (here[:, None] * WORDS + word[None, :]),
        mask=inside[:, None] & (word < WORDS)[None, :],
        other=0,
    )
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, :]
    shift = 15 - (lane // 8 * 4 + lane % 8 // 2)
    # of 16 bits the highest is the sign, and all others of 1.0 and -1.0 are alike
    BFLOAT16: gl.constexpr = weight_ptr.dtype.element_ty == gl.bfloat16
    MINUS_ONES: gl.constexpr = -0x407F4080 if BFLOAT16 else -0x43FF4400
    alike = gl.where(inside, MINUS_ONES, 0)[:, None]
    signs = gl.inline_asm_elementwise(
        SIGNED,
        _OPERANDS,
        [words[:, :, None], shift[:, None, :], alike[:, :, None]],
        weight_ptr.dtype.element_ty,
        is_pure=True,
        pack=2,
    )
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    return gl.convert_layout(signs.reshape([LAYOUT.shape[0], STEP_WORDS * 32]), OPERAND)


@gluon.jit
def _copy_weight(weight_ptr, stage, step, block_o, shape: gl.constexpr, WARPS: gl.constexpr):
    """Ask for a step's weight, (channels, outputs), in the signs' order; 0 beyond the last."""
    BLOCK_K: gl.constexpr = stage.shape[0]
    BLOCK_O: gl.constexpr = stage.shape[1]
    CHUNKS: gl.constexpr = (shape.channels + BLOCK_K - 1) // BLOCK_K
    COPY: gl.constexpr = wide_layout(WARPS, BLOCK_O)
    tap = step // CHUNKS
    row = gl.arange(0, BLOCK_K, gl.SliceLayout(1, COPY))
    in_word = row % 8 // 2 + row % 32 // 8 * 4 + row % 2 * 16
    channel = step % CHUNKS * BLOCK_K + row // 32 * 32 + in_word
    out = block_o * BLOCK_O + gl.arange(0, BLOCK_O, gl.SliceLayout(0, COPY))
    known = (channel < shape.channels) & (tap < shape.kernel_size**2)
    offset = (tap * shape.channels + channel)[:, None] * shape.out_channels + out[None, :]
    mask = known[:, None] & (out < shape.out_channels)[None, :]
    async_copy.async_copy_global_to_shared(stage, weight_ptr + offset, mask=mask)
    async_copy.commit_group()


@gluon.jit
def _store(
    y_ptr, sums_ptr, acc, block_p, block_o, pixels, shape: gl.constexpr, WARPS: gl.constexpr
):
    """Store a block, (pixels, outputs), and its moments as the kernel has them."""
    BLOCK_P: gl.constexpr = acc.shape[0]
    BLOCK_O: gl.constexpr = acc.shape[1]
    WIDE: gl.constexpr = wide_layout(WARPS, BLOCK_O)
    y = gl.convert_layout(acc.to(y_ptr.dtype.element_ty), WIDE)
    pixel = block_p * BLOCK_P + gl.arange(0, BLOCK_P, gl.SliceLayout(1, WIDE))
    out = block_o * BLOCK_O + gl.arange(0, BLOCK_O, gl.SliceLayout(0, WIDE))
    exists, known = (pixel < pixels)[:, None], out < shape.out_channels
    place = pixel.to(gl.int64)[:, None] * shape.out_channels + out[None, :]
    gl.store(y_ptr + place, y, mask=exists & known[None, :])
    if sums_ptr is not None:
        count = gl.minimum(pixels - block_p * BLOCK_P, BLOCK_P)
        stored = gl.where(exists, y.to(gl.float32), 0.0)
        sums_ptr += block_p.to(gl.int64) * 2 * shape.out_channels
        store_moments(stored, exists, count, out, known, sums_ptr, shape.out_channels)


@gluon.jit
def _conv_real_hopper_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    sums_ptr,
    pixels,
    shape: gl.constexpr,
    WARPS: gl.constexpr,
    BLOCK_O: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """y[p, o] = sum over valid taps t and c of sign(x[p + t, c]) weight[t, c, o].

    x (N H W, words) int32; weight (kh kw, C, O) and y (N H' W', O) of 16 bits. sums (blocks of 16
    WARPS pixels, 2, O) float32 or None: a block's sum of y as stored, and its sum of squares about
    the block's mean.
    """
    SUMS: gl.constexpr = sums_layout(WARPS, BLOCK_O)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128 if BLOCK_O >= 64 else 2 * BLOCK_O, 16, 2)
    LAYOUT: gl.constexpr = signs_layout(WARPS, BLOCK_K)
    DTYPE: gl.constexpr = weight_ptr.dtype.element_ty
    STEPS: gl.constexpr = shape.kernel_size**2 * ((shape.channels + BLOCK_K - 1) // BLOCK_K)
    blocks_o: gl.constexpr = (shape.out_channels + BLOCK_O - 1) // BLOCK_O
    block_p, block_o = gl.program_id(0) // blocks_o, gl.program_id(0) % blocks_o

    stages = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_K, BLOCK_O], SHARED)
    for early in gl.static_range(STAGES - 1):
        _copy_weight(weight_ptr, stages.index(early), early, block_o, shape, WARPS)
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))
    y, x, place = _place(block_p * (WARPS * 16), pixels, ROW, WARPS * 16, shape)
    signs = _signs(x_ptr, weight_ptr, 0, y, x, place, shape, LAYOUT, SUMS)
    acc = gl.full([WARPS * 16, BLOCK_O], 0.0, gl.float32, SUMS)
    for step in range(STEPS):
        async_copy.wait_group(STAGES - 2)
        thread_barrier()  # every thread's copies are there
        hopper.fence_async_shared()  # to the tensor core
        running = hopper.warpgroup_mma(signs, stages.index(step % STAGES), acc, is_async=True)
        # this is the stage of the step before, which nobody reads since the barrier above
        ahead = step + (STAGES - 1)
        _copy_weight(weight_ptr, stages.index(ahead % STAGES), ahead, block_o, shape, WARPS)
        ahead_signs = _signs(x_ptr, weight_ptr, step + 1, y, x, place, shape, LAYOUT, SUMS)
        acc = hopper.warpgroup_mma_wait(0, deps=[running])
        signs = ahead_signs
    async_copy.wait_group(0)  # what was asked for beyond the last step, which is nothing
    _store(y_ptr, sums_ptr, acc, block_p, block_o, pixels, shape, WARPS)


def conv_warpgroup_real(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    sums: Tensor | None,
    geometry: Geometry,
    tile: TileConfig,
) -> None:
    """Run the kernel.

    Args:
        x: packed (N, H, W, words), contiguous.
        weight: (kh, kw, C, O), bf16 or float16, contiguous; O a multiple of 8.
        y: (N H' W', O) in the weight's dtype, the result.
        sums: float32 (blocks of ``block_m`` pixels, 2, O), its moments, or None.
        geometry: of the convolution.
        tile: ``block_m`` pixels, 16 a warp, by ``block_n`` outputs, ``block_k`` channels a step.
    """
    blocks = ceil_div(geometry.pixels, tile.block_m)
    blocks *= ceil_div(geometry.out_channels, tile.block_n)
    launch(
        _conv_real_hopper_kernel,
        blocks,
        tile,
        x_ptr=x,
        weight_ptr=weight,
        y_ptr=y,
        sums_ptr=sums,
        pixels=geometry.pixels,
        shape=geometry.shape,
        WARPS=tile.num_warps,
        BLOCK_O=tile.block_n,
        BLOCK_K=tile.block_k,
        STAGES=tile.num_stages,
    )
