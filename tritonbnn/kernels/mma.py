"""The forward convolution, and the packed product, on the one-bit tensor core.

Prediction, nothing has been measured yet: a block of 128 pixels and 64 channels is 32 of the
core's instructions a chunk in a loop of 86 (sm_90, 3x3, 256 channels), at 1/8 instruction a clock
and scheduler a loop bound by the core. At batch 256 an H100 would be bound by the int16 result
where C <= 128 and by the core where C >= 512; a product of 8192 cubed would take 145 us at its
peak and 90 us of memory for the int32 result.
"""

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tritonbnn.kernels.config import TileConfig, ceil_div
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.launch import launch
from tritonbnn.kernels.mma_operands import (
    block_tiles,
    weight_fragments,
    window_bases,
    window_ones,
)
from tritonbnn.kernels.mma_tile import signed_sums, store_scaled


@gluon.jit
def _conv_mma_kernel(
    x_ptr,
    weight_ptr,
    base_ptr,
    patch_ptr,
    alpha_ptr,
    y_ptr,
    pixels,
    shape: gl.constexpr,
    cut: gl.constexpr,
):
    """y[p, o] = alpha[o] (base[border[p], o] - 2 ones[p] + 4 popcount(x & w)).

    x (N H W, words) int32; weight, base and patch as :mod:`tritonbnn.kernels.mma_operands` makes
    them; alpha (O,) float32 or None; y (N H' W', O) of any number dtype.
    """
    y, pixel, out = signed_sums(x_ptr, weight_ptr, base_ptr, patch_ptr, pixels, shape, cut)
    store_scaled(y, y_ptr, alpha_ptr, pixel, out, pixels, shape.out_channels)


def conv_mma(
    x: Tensor,
    weight: Tensor,
    alpha: Tensor | None,
    y: Tensor,
    geometry: Geometry,
    tile: TileConfig,
) -> None:
    """Run the one-bit tensor core's kernel.

    Args:
        x: packed (N, H, W, words), contiguous.
        weight: packed (O, kh, kw, words), contiguous.
        alpha: (O,) float32, or None for 1.
        y: (N H' W', O), the result.
        geometry: of the convolution.
        tile: ``block_m`` pixels by ``block_n`` channels, at least 16; the rest means nothing.
    """
    programs, product = product_arguments(x, weight, geometry, tile)
    launch(_conv_mma_kernel, programs, tile, **product, alpha_ptr=alpha, y_ptr=y)


def product_arguments(
    x: Tensor, weight: Tensor, geometry: Geometry, tile: TileConfig
) -> tuple[int, dict[str, Any]]:
    """How many programs a kernel on the one-bit tensor core runs, and what it multiplies.

    Args:
        x: as in :func:`conv_mma`, as are the others.
        weight: likewise.
        geometry: likewise.
        tile: likewise.
    """
    cut = block_tiles(tile)
    blocks_o = ceil_div(geometry.out_channels, tile.block_n)
    tiles = blocks_o * tile.block_n // 16
    return ceil_div(geometry.pixels, tile.block_m) * blocks_o, {
        "x_ptr": x,
        "weight_ptr": weight_fragments(weight, geometry, cut.tiles_o, tiles),
        "base_ptr": window_bases(weight, geometry),
        "patch_ptr": window_ones(x, geometry),
        "pixels": geometry.pixels,
        "shape": geometry.shape,
        "cut": cut,
    }
