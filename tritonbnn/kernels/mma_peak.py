"""How fast the one-bit tensor core can be: its instruction on registers alone, in a loop."""

from collections.abc import Callable

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from tritonbnn.kernels.config import TileConfig
from tritonbnn.kernels.cut import Cut
from tritonbnn.kernels.launch import launch
from tritonbnn.kernels.mma_tile import (
    add_common_ones,
    as_matrix,
    fragment_layout,
    output_layout,
    steps_along,
    thread_barrier,
)
from tritonbnn.kernels.mma_warpgroup import (
    add_ones_of_stage,
    as_pixels,
    pixels_layout,
    sums_layout,
)
from tritonbnn.kernels.timing import time_callable

WARPS = 8
TILES = 4
"""Of channels and of pixels, a warp: 16 sums that do not wait for each other."""

STEP_OPERATIONS = WARPS * TILES * TILES * 2 * (2 * 16 * 8 * 256)
"""Multiplications and additions of a block and step: two instructions a tile."""

WARPGROUP_STEPS = 8
"""Instructions of a step: enough that waiting for the last of them costs little."""

WARPGROUP_STEP_OPERATIONS = WARPS // 4 * WARPGROUP_STEPS * (2 * 64 * 256 * 256)


@gluon.jit
def _peak_kernel(words_ptr, sums_ptr, steps, cut: gl.constexpr):
    """sums[b, p, o] = steps popcount(x & w), of two chunks of 256 bits, a block b a program.

    words (32, 4) int32, the operands by lane and register; sums (programs, pixels, channels) int32.
    """
    LAYOUT: gl.constexpr = fragment_layout(cut, cut.tiles_o)
    X: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT))
    W: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))
    OUTPUT: gl.constexpr = output_layout(cut)
    PIXELS: gl.constexpr = OUTPUT.shape[0]
    CHANNELS: gl.constexpr = OUTPUT.shape[1]
    x = gl.load(words_ptr + (steps_along(32, 2, X) * 4 + steps_along(4, 3, X)))
    w = gl.load(words_ptr + (steps_along(32, 2, W) * 4 + steps_along(4, 3, W)))
    acc = gl.full(LAYOUT.shape, 0, gl.int32, LAYOUT)
    for _ in range(steps):
        acc = add_common_ones(w, w, x, acc)
    pixel = gl.program_id(0) * PIXELS + gl.arange(0, PIXELS, gl.SliceLayout(1, OUTPUT))
    channel = gl.arange(0, CHANNELS, gl.SliceLayout(0, OUTPUT))
    offset = pixel[:, None] * CHANNELS + channel[None, :]
    gl.store(sums_ptr + offset, as_matrix(acc, OUTPUT))


def run_steps(blocks: int, steps: int, device: torch.device) -> torch.Tensor:
    """Run the loop on operands of ones: every sum is 512 ``steps``, (blocks, pixels, channels)."""
    words = torch.full((32, 4), -1, dtype=torch.int32, device=device)
    shape = (blocks, 8 * WARPS * TILES, 16 * TILES)
    sums = torch.empty(shape, dtype=torch.int32, device=device)
    tile = TileConfig(shape[1], shape[2], 1, WARPS, 1)
    arguments = {"words_ptr": words, "sums_ptr": sums, "steps": steps}
    launch(_peak_kernel, blocks, tile, **arguments, cut=Cut(1, TILES, WARPS, TILES))
    return sums


@gluon.jit
def _warpgroup_peak_kernel(
    words_ptr,
    sums_ptr,
    steps,
    WARPS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STEPS: gl.constexpr,
):
    """sums[b, p, o] = steps popcount(x & w), of STEPS instructions' bits, a block b a program.

    words (8 STEPS BLOCK_N,) int32, the weight; a thread's x is 4 STEPS of them, by thread;
    sums (programs, 16 WARPS, BLOCK_N) int32.
    """
    LAYOUT: gl.constexpr = sums_layout(WARPS, BLOCK_N, STEPS)
    X: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    OUTPUT: gl.constexpr = pixels_layout(WARPS, BLOCK_N)
    STAGE: gl.constexpr = BLOCK_N * STEPS * 8
    COPY: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    stage = gl.allocate_shared_memory(gl.int32, [STAGE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    stage.store(gl.load(words_ptr + gl.arange(0, STAGE, COPY)))
    hopper.fence_async_shared()
    thread_barrier()
    place = steps_along(32 * WARPS, 0, X) * (4 * STEPS) + steps_along(STEPS // 2, 1, X) * 8
    x = gl.load(words_ptr + (place + steps_along(2, 2, X) * 4 + steps_along(4, 3, X)))
    acc = gl.full([32 * WARPS, BLOCK_N // (8 * STEPS), STEPS // 2, 2, 4], 0, gl.int32, LAYOUT)
    for _ in range(steps):
        acc = add_ones_of_stage(x, acc, 0, BLOCK_N, STEPS)
    pixel = gl.program_id(0) * (16 * WARPS) + gl.arange(0, 16 * WARPS, gl.SliceLayout(1, OUTPUT))
    channel = gl.arange(0, BLOCK_N, gl.SliceLayout(0, OUTPUT))
    offset = pixel[:, None] * BLOCK_N + channel[None, :]
    gl.store(sums_ptr + offset, as_pixels(acc, WARPS, BLOCK_N))


def run_warpgroup_steps(blocks: int, steps: int, device: torch.device) -> torch.Tensor:
    """As :func:`run_steps` on the warpgroup's: every sum is 2048 ``steps``, (blocks, 128, 256)."""
    words = torch.full((8 * WARPGROUP_STEPS * 256,), -1, dtype=torch.int32, device=device)
    sums = torch.empty((blocks, 16 * WARPS, 256), dtype=torch.int32, device=device)
    tile = TileConfig(16 * WARPS, 256, 256 * WARPGROUP_STEPS, WARPS, 1)
    arguments = {"words_ptr": words, "sums_ptr": sums, "steps": steps}
    constants = {"WARPS": WARPS, "BLOCK_N": 256, "STEPS": WARPGROUP_STEPS}
    launch(_warpgroup_peak_kernel, blocks, tile, **arguments, **constants)
    return sums


def one_bit_rate(device: torch.device) -> float:
    """Operations per second that the instruction reaches: the roof over every product of signs."""
    return _rate(run_steps, 512, STEP_OPERATIONS, device)


def warpgroup_rate(device: torch.device) -> float:
    """The same of the warpgroup's instruction."""
    return _rate(run_warpgroup_steps, WARPGROUP_STEPS * 256, WARPGROUP_STEP_OPERATIONS, device)


def _rate(
    run: Callable[[int, int, torch.device], torch.Tensor],
    ones: int,
    operations: int,
    device: torch.device,
) -> float:
    """Operations per second of a loop, of which a step adds ``ones`` to every sum."""
    blocks = 4 * torch.cuda.get_device_properties(device).multi_processor_count
    steps = 4096
    if not (run(blocks, steps, device) == ones * steps).all():
        raise RuntimeError("the one-bit tensor core counts wrongly")
    timing = time_callable(lambda: run(blocks, steps, device), device, runs=20)
    return blocks * steps * operations / (timing.p50 * 1e-6)
