"""The forward convolution, and the packed product, on the one-bit tensor core.

Prediction, nothing has been measured yet: a block of 128 pixels and 64 channels is 40 of the
core's instructions a chunk in a loop of 91 (sm_90, 3x3, 256 channels), at 1/8 instruction a clock
and scheduler a loop bound by the core. At batch 256 an H100 would be bound by the int16 result
where C <= 128 and by the core where C >= 512; a product of 8192 cubed would take 145 us at its
peak and 90 us of memory for the int32 result.
"""

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tritonbnn.kernels.config import TileConfig, ceil_div
from tritonbnn.kernels.cut import block_tiles
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.launch import launch
from tritonbnn.kernels.mma_tile import block_of_program, signed_sums, store_scaled
from tritonbnn.kernels.weight import Fragments, fragments_of


@gluon.jit
def _conv_mma_kernel(
    x_ptr,
    weight_ptr,
    base_ptr,
    alpha_ptr,
    y_ptr,
    pixels,
    shape: gl.constexpr,
    cut: gl.constexpr,
):
    """y[p, o] = alpha[o] (base[border[p], o] - 2 ones[p] + 4 popcount(x & w)).

    x (N H W, words) int32; weight and base as :mod:`tritonbnn.kernels.weight` makes them; alpha
    (O,) float32 or None; y (N H' W', O) of any number dtype.
    """
    block_p, block_o, _ = block_of_program(shape, cut)
    y, pixel, out = signed_sums(x_ptr, weight_ptr, base_ptr, pixels, block_p, block_o, shape, cut)
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
    cut = block_tiles(tile)
    fragments = fragments_of(weight, geometry.channels, cut)
    product = product_operands(x, fragments) | product_constants(geometry, tile)
    programs = ceil_div(geometry.pixels, tile.block_m) * channel_blocks(geometry, tile)
    launch(_conv_mma_kernel, programs, tile, **product, alpha_ptr=alpha, y_ptr=y)


def channel_blocks(geometry: Geometry, tile: TileConfig) -> int:
    """Blocks of output channels."""
    return ceil_div(geometry.out_channels, tile.block_n)


def product_operands(x: Tensor, fragments: Fragments) -> dict[str, Any]:
    """What a kernel on the one-bit tensor core multiplies.

    Args:
        x: as in :func:`conv_mma`.
        fragments: the weight's, of the tile's cut.
    """
    return {"x_ptr": x, "weight_ptr": fragments.words, "base_ptr": fragments.base}


def product_constants(geometry: Geometry, tile: TileConfig) -> dict[str, Any]:
    """What it knows of the product beside; operands as in :func:`conv_mma`."""
    return {"pixels": geometry.pixels, "shape": geometry.shape, "cut": block_tiles(tile)}
