"""The two ways to launch an elementwise kernel on (rows, channels): alone, or with sums over rows.

Both give the kernel ``rows``, ``CHANNELS``, ``BLOCK_M`` and ``BLOCK_N``, and start nothing where
there are no rows.
"""

from typing import Any

import torch
from torch import Tensor

from tritonbnn.kernels.config import TileConfig, ceil_div
from tritonbnn.kernels.launch import launch

MAX_PARTIALS = 1024
"""Programs that sum, over all blocks of channels: enough to fill a GPU, few enough to sum after."""


def launch_elementwise(kernel: Any, tile: TileConfig, like: Tensor, **arguments: Any) -> None:
    """Run a kernel with one program per tile.

    Args:
        kernel: a ``triton.jit`` function.
        tile: of rows and channels.
        like: (rows, channels), or (N, C, H, W) in channels_last memory: what is cut into tiles.
        **arguments: the rest of the kernel's, by name.
    """
    rows, channels = _sizes(like)
    programs = ceil_div(rows, tile.block_m) * ceil_div(channels, tile.block_n)
    if programs:
        launch(kernel, programs, tile, **_cut(tile, rows, channels), **arguments)


def launch_partial_sums(
    kernel: Any,
    tile: TileConfig,
    like: Tensor,
    count: int,
    *,
    dtype: torch.dtype = torch.float32,
    **arguments: Any,
) -> Tensor:
    """Run a kernel whose programs take every ``programs``-th block of rows, and sum over it.

    Args:
        kernel: a ``triton.jit`` function, which writes its sums to ``sums_ptr``.
        tile: of rows and channels.
        like: (rows, channels), or (N, C, H, W) in channels_last memory: what is cut into tiles.
        count: sums per channel.
        dtype: of the sums.
        **arguments: the rest of the kernel's, by name.

    Returns:
        Each program's share of the sums, (programs, count, channels). They are added without
        atomics, so that a result is the same in every run.
    """
    rows, channels = _sizes(like)
    blocks = ceil_div(channels, tile.block_n)
    programs = min(ceil_div(MAX_PARTIALS, blocks), ceil_div(rows, tile.block_m))
    sums = torch.empty((programs, count, channels), dtype=dtype, device=like.device)
    if programs:
        cut = _cut(tile, rows, channels)
        launch(kernel, programs * blocks, tile, sums_ptr=sums, **cut, **arguments)
    return sums


def _sizes(like: Tensor) -> tuple[int, int]:
    channels = like.shape[1]
    return like.numel() // channels, channels


def _cut(tile: TileConfig, rows: int, channels: int) -> dict[str, int]:
    return {
        "rows": rows,
        "CHANNELS": channels,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
