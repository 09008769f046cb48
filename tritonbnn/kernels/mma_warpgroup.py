"""The packed product and 1x1 convolutions on the warpgroup's one-bit tensor core, sm_90's alone.

``wgmma.mma_async.m64nNk256 ... and.popc`` (PTX ISA, "Asynchronous Warpgroup Level Matrix
Instructions") counts common ones as ``mma.sync`` does in :mod:`tritonbnn.kernels.mma_tile`, for 64
pixels and up to 256 channels at once. Pixels are its rows, read by lanes straight from the image;
the weight is its columns, which it reads from shared memory. There the weight lies as the
instruction wants it without swizzle, matrices of 8 channels by 4 words each in one piece.
:mod:`tritonbnn.kernels.mma_operands` has put it into that order before, so that copying is linear.
While a stage of K is multiplied, the next ones are on their way.

Prediction, nothing has been measured yet: at 128 pixels by 256 channels a block asks the second
level cache for 12 KB every 256 clocks at the instruction's peak, more than it gives.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from tritonbnn.kernels.config import TileConfig, ceil_div
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.launch import launch
from tritonbnn.kernels.mma_operands import WarpgroupOperands
from tritonbnn.kernels.mma_tile import (
    bits,
    steps_along,
    store_scaled,
    thread_barrier,
)

_DESCRIPTOR = (128 >> 4) << 16 | (256 >> 4) << 32
"""No swizzle; bytes from a matrix to the next along K, and along the channels, in sixteens."""


@gluon.constexpr_function
def product(block_n, steps):
    """The assembly: accumulators in place, ``steps`` instructions, all of them waited for.

    Operands, ``block_n`` / 2 each: the accumulators, x (its first 4 ``steps`` count), the address
    of the stage in shared memory (its first counts). ``global_smem`` is what Triton calls the
    shared memory of a kernel, which here is one allocation, at 0.
    """
    sums = block_n // 2
    accumulators = ",".join(f"${i}" for i in range(sums))
    lines = [
        ".reg .b32 address; .reg .b64 weight",
        "mov.u32 address, global_smem",
        f"add.u32 address, address, ${2 * sums}",
        "shr.u32 address, address, 4",
        "and.b32 address, address, 0x3fff",
        "cvt.u64.u32 weight, address",
        f"or.b64 weight, weight, {_DESCRIPTOR:#x}",
        "wgmma.fence.sync.aligned",
    ]
    for step in range(steps):
        # Of a pair's eight words, a lane has four of a pixel, then four of the eighth after it.
        first = sums + 8 * (step // 2) + 2 * (step % 2)
        x = ",".join(f"${first + i}" for i in (0, 4, 1, 5))
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{block_n}k256.s32.b1.b1.and.popc "
            f"{{{accumulators}}}, {{{x}}}, weight, 1"
        )
        lines.append(f"add.u64 weight, weight, {32 * block_n >> 4}")
    lines += ["wgmma.commit_group.sync.aligned", "wgmma.wait_group.sync.aligned 0"]
    return "{\n" + "".join(f"{line};\n" for line in lines) + "}"


@gluon.constexpr_function
def operands(block_n):
    """The constraints of :func:`product`."""
    sums = block_n // 2
    return "=r," * sums + "r," * (2 * sums) + ",".join(str(i) for i in range(sums))


@gluon.constexpr_function
def sums_layout(warps, block_n, steps):
    """Accumulators by (thread, group, pair of instructions, half of its pixels, word).

    The last three are a thread's words of x, so that these are a slice of it.
    """
    groups, pairs = block_n // (8 * steps), steps // 2
    return gl.DistributedLinearLayout(
        bits(4, 4, rank=5) + bits(2, 3, rank=5) + bits(pairs, 2, rank=5) + bits(groups, 1, rank=5),
        bits(32, 0, rank=5),
        bits(warps, 0, 32, rank=5),
        [],
        [32 * warps, groups, pairs, 2, 4],
    )


@gluon.constexpr_function
def pixels_layout(warps, block_n):
    """The same accumulators as pixels x channels; a thread has 8 channels side by side."""
    return gl.DistributedLinearLayout(
        bits(8, 1) + bits(block_n // 32, 1, 32) + bits(2, 0, 8),
        bits(4, 1, 8) + bits(8, 0),
        bits(warps, 0, 16),
        [],
        [16 * warps, block_n],
    )


@gluon.jit
def add_ones_of_stage(x, acc, stage_bytes, BLOCK_N: gl.constexpr, STEPS: gl.constexpr):
    """acc + popcount(x & w), of a stage of K that lies in shared memory.

    x (threads, STEPS / 2, 2, 4) and acc (threads, groups, STEPS / 2, 2, 4), int32, in
    :func:`sums_layout` and its slice; the stage begins ``stage_bytes`` into shared memory.
    """
    return gl.inline_asm_elementwise(
        product(BLOCK_N, STEPS),
        operands(BLOCK_N),
        [x[:, None], stage_bytes, acc],
        gl.int32,
        is_pure=False,
        pack=BLOCK_N // 2,
    )


@gluon.jit
def as_pixels(acc, WARPS: gl.constexpr, BLOCK_N: gl.constexpr):
    """Accumulators as (pixels, channels); no lane gives any away.

    Lane 4 g + t of warp w, register 4 j + 2 h + c: pixel 16 w + 8 h + g, and channel
    32 (j / 4) + 8 t + 2 (j % 4) + c, as the weight was ordered.
    """
    split = acc.reshape([WARPS, 8, 4, BLOCK_N // 32, 2, 2, 2, 2])
    moved = split.permute(0, 6, 1, 3, 2, 4, 5, 7)
    return gl.convert_layout(moved.reshape([16 * WARPS, BLOCK_N]), pixels_layout(WARPS, BLOCK_N))


@gluon.jit
def _conv_warpgroup_kernel(
    x_ptr,
    weight_ptr,
    weight_ones_ptr,
    x_ones_ptr,
    alpha_ptr,
    y_ptr,
    pixels,
    CHANNELS: gl.constexpr,
    OUT_CHANNELS: gl.constexpr,
    WARPS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """y[p, o] = alpha[o] (C - 2 ones(w[o]) - 2 ones(x[p]) + 4 popcount(x & w)).

    x (N H W, words) int32; weight and the ones of both as :mod:`tritonbnn.kernels.mma_operands`
    makes them; alpha (O,) float32 or None; y (N H W, O) of any number dtype.
    """
    WORDS: gl.constexpr = (CHANNELS + 31) // 32
    CHUNKS: gl.constexpr = (WORDS + 8 * STEPS - 1) // (8 * STEPS)
    STAGE: gl.constexpr = BLOCK_N * STEPS * 8
    LAYOUT: gl.constexpr = sums_layout(WARPS, BLOCK_N, STEPS)
    X: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    OUTPUT: gl.constexpr = pixels_layout(WARPS, BLOCK_N)
    COPY: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    LINEAR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    blocks_o: gl.constexpr = (OUT_CHANNELS + BLOCK_N - 1) // BLOCK_N
    pid_p = gl.program_id(0) // blocks_o
    pid_o = gl.program_id(0) % blocks_o

    stages = gl.allocate_shared_memory(gl.int32, [STAGES, STAGE], LINEAR)
    source = weight_ptr + (pid_o * (CHUNKS * STAGE) + gl.arange(0, STAGE, COPY))
    for chunk in gl.static_range(STAGES - 1):
        if chunk < CHUNKS:
            async_copy.async_copy_global_to_shared(stages.index(chunk), source + chunk * STAGE)
        async_copy.commit_group()

    thread = steps_along(32 * WARPS, 0, X)
    pixel = thread // 32 * 16 + steps_along(2, 2, X) * 8 + thread % 32 // 4
    pixel = gl.minimum(pid_p * (16 * WARPS) + pixel, pixels - 1)
    position = steps_along(STEPS // 2, 1, X) * 16 + thread % 4 * 4 + steps_along(4, 3, X)
    row = pixel.to(gl.int64) * WORDS
    x = gl.load(x_ptr + (row + position), mask=position < WORDS, other=0)

    acc = gl.full([32 * WARPS, BLOCK_N // (8 * STEPS), STEPS // 2, 2, 4], 0, gl.int32, LAYOUT)
    for chunk in range(CHUNKS):
        async_copy.wait_group(STAGES - 2)
        thread_barrier()  # every thread's copies are there; Triton adds one unless it comes next
        hopper.fence_async_shared()  # to the tensor core
        ahead = chunk + (STAGES - 1)
        # Two conditions, for the compiler fails on a branch that is never taken.
        if CHUNKS >= STAGES:  # noqa: SIM102
            if ahead < CHUNKS:
                async_copy.async_copy_global_to_shared(
                    stages.index(ahead % STAGES), source + ahead * STAGE
                )
        async_copy.commit_group()
        words = (chunk + 1) * (8 * STEPS) + position
        x_ahead = gl.load(x_ptr + (row + words), mask=words < WORDS, other=0)
        acc = add_ones_of_stage(x, acc, chunk % STAGES * (4 * STAGE), BLOCK_N, STEPS)
        x = x_ahead

    pixel = pid_p * (16 * WARPS) + gl.arange(0, 16 * WARPS, gl.SliceLayout(1, OUTPUT))
    out = pid_o * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, OUTPUT))
    common = as_pixels(acc, WARPS, BLOCK_N)
    x_ones = gl.load(x_ones_ptr + pixel, mask=pixel < pixels, other=0)[:, None]
    weight_ones = gl.load(weight_ones_ptr + out, mask=out < OUT_CHANNELS, other=0)[None, :]
    y = common * 4 - (weight_ones + x_ones) * 2 + CHANNELS
    store_scaled(y, y_ptr, alpha_ptr, pixel, out, pixels, OUT_CHANNELS)


def conv_warpgroup(
    x: Tensor,
    operands: WarpgroupOperands,
    alpha: Tensor | None,
    y: Tensor,
    geometry: Geometry,
    tile: TileConfig,
) -> None:
    """Run the kernel of the warpgroup's one-bit tensor core.

    Args:
        x: packed (N, H, W, words), contiguous.
        operands: the weight's, and the ones of both, for the tile.
        alpha: (O,) float32, or None for 1.
        y: (N H W, O), the result.
        geometry: of the convolution: 1x1, stride 1, no padding.
        tile: ``block_m`` pixels, 16 a warp, by ``block_n`` channels, 32 to 256; ``block_k`` bits
            a stage, 512 or more; ``num_stages`` at least 2.
    """
    launch(
        _conv_warpgroup_kernel,
        ceil_div(geometry.pixels, tile.block_m) * ceil_div(geometry.out_channels, tile.block_n),
        tile,
        x_ptr=x,
        weight_ptr=operands.matrices,
        weight_ones_ptr=operands.weight_ones,
        x_ones_ptr=operands.x_ones,
        alpha_ptr=alpha,
        y_ptr=y,
        pixels=geometry.pixels,
        CHANNELS=geometry.channels,
        OUT_CHANNELS=geometry.out_channels,
        WARPS=tile.num_warps,
        BLOCK_N=tile.block_n,
        STEPS=tile.block_k // 256,
        STAGES=tile.num_stages,
    )
