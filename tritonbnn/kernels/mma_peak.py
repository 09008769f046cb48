"""How fast the one-bit tensor core can be: its instruction on registers alone, in a loop."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tritonbnn.kernels.config import TileConfig
from tritonbnn.kernels.launch import launch
from tritonbnn.kernels.mma_tile import (
    add_common_ones,
    as_matrix,
    fragment_layout,
    output_layout,
    steps_along,
)
from tritonbnn.kernels.timing import time_callable

WARPS = 8
TILES = 4
"""Of channels and of pixels, a warp: 16 sums that do not wait for each other."""

STEP_OPERATIONS = WARPS * TILES * TILES * 2 * (2 * 16 * 8 * 256)
"""Multiplications and additions of a block and step: two instructions a tile."""


@gluon.jit
def _peak_kernel(words_ptr, sums_ptr, steps, WARPS: gl.constexpr, TILES: gl.constexpr):
    """sums[b, p, o] = steps popcount(x & w), of two chunks of 256 bits, a block b a program.

    words (32, 4) int32, the operands by lane and register; sums (programs, 8 WARPS TILES, 16 TILES)
    int32.
    """
    LAYOUT: gl.constexpr = fragment_layout(1, TILES, WARPS, TILES)
    X: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT))
    W: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))
    OUTPUT: gl.constexpr = output_layout(1, TILES, WARPS, TILES)
    PIXELS: gl.constexpr = 8 * WARPS * TILES
    CHANNELS: gl.constexpr = 16 * TILES
    x = gl.load(words_ptr + (steps_along(32, 2, X) * 4 + steps_along(4, 3, X)))
    w = gl.load(words_ptr + (steps_along(32, 2, W) * 4 + steps_along(4, 3, W)))
    acc = gl.full([1, TILES, WARPS, TILES, 32, 4], 0, gl.int32, LAYOUT)
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
    launch(_peak_kernel, blocks, tile, **arguments, WARPS=WARPS, TILES=TILES)
    return sums


def one_bit_rate(device: torch.device) -> float:
    """Operations per second that the instruction reaches: the roof over every product of signs."""
    blocks = 4 * torch.cuda.get_device_properties(device).multi_processor_count
    steps = 4096
    if not (run_steps(blocks, steps, device) == 512 * steps).all():
        raise RuntimeError("the one-bit tensor core counts wrongly")
    timing = time_callable(lambda: run_steps(blocks, steps, device), device, runs=20)
    return blocks * steps * STEP_OPERATIONS / (timing.p50 * 1e-6)
