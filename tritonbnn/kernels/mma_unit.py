"""A unit's forward pass on the one-bit tensor core, the convolution's output never written.

Convolved once for its statistics and once more for the epilogue: bytes per output element with a
bf16 stream, 4 in place of the 10 where an int16 output is written and read twice, for twice the
core's operations. A prediction: nothing has been measured yet.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tritonbnn.bits import words
from tritonbnn.kernels.config import TileConfig, ceil_div, default_tile, whole_words
from tritonbnn.kernels.cut import CHUNK_WORDS, Cut, block_tiles
from tritonbnn.kernels.elementwise import MAX_PARTIALS
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.launch import launch
from tritonbnn.kernels.mma import channel_blocks, product_constants, product_operands
from tritonbnn.kernels.mma_pack import store_bits
from tritonbnn.kernels.mma_sums import no_sums, store_sums, thread_sums
from tritonbnn.kernels.mma_tile import block_of_program, place_of_block, signed_sums
from tritonbnn.kernels.unit import Vectors, per_channel, shortcut_value
from tritonbnn.kernels.weight import Fragments
from tritonbnn.layout import empty_channels_last


@gluon.jit
def _moments_mma_kernel(
    x_ptr,
    weight_ptr,
    base_ptr,
    sums_ptr,
    pixels,
    shape: gl.constexpr,
    cut: gl.constexpr,
):
    """Each program's share of the sums over pixels of y and y^2, y as the convolution has it.

    Operands as :func:`tritonbnn.kernels.mma_tile.signed_sums` takes them; sums (programs, 2, O)
    int64. A program takes every ``programs``-th block of pixels.
    """
    K: gl.constexpr = shape.channels * shape.kernel_size * shape.kernel_size
    SQUARES: gl.constexpr = gl.int32 if K * K * cut.tiles_p * 2 < 2**31 else gl.int64
    BLOCK_P: gl.constexpr = cut.warps_p * cut.tiles_p * 8
    first, block_o, programs = block_of_program(shape, cut)
    total = no_sums(gl.int64, cut)
    squares = no_sums(gl.int64, cut)
    for block_p in range(first, (pixels + BLOCK_P - 1) // BLOCK_P, programs):
        y, pixel, _ = signed_sums(x_ptr, weight_ptr, base_ptr, pixels, block_p, block_o, shape, cut)
        y = gl.where((pixel < pixels)[:, None], y, 0)
        total += thread_sums(y, cut).to(gl.int64)
        squares += thread_sums(y.to(SQUARES) * y.to(SQUARES), cut).to(gl.int64)
    store_sums(total, sums_ptr, 2 * first, block_o, shape, cut)
    store_sums(squares, sums_ptr, 2 * first + 1, block_o, shape, cut)


@gluon.jit
def block_shortcut(
    stream_ptr,
    start,
    row,
    pixel,
    out,
    mask,
    shape: gl.constexpr,
    SHORTCUT: gl.constexpr,
):
    """shortcut(stream) of a block's pixels and channels, in float32.

    ``row`` counts pixels from that whose first channel is element ``start`` of the output.
    """
    if SHORTCUT == "pool":
        row = pixel.to(gl.int64)[:, None]
    elif SHORTCUT == "repeat":
        stream_ptr += start // 2
    else:
        stream_ptr += start
    return shortcut_value(
        stream_ptr, row, out, mask, shape.out_channels, shape.out_height, shape.out_width, SHORTCUT
    )


@gluon.jit
def centred(y, affine_ptr, out, known):
    """y - mean, in float32; operands as :func:`normalised` takes them."""
    return y.to(gl.float32) - per_channel(affine_ptr, out, known)


@gluon.jit
def normalised(y, affine_ptr, out, known, shape: gl.constexpr):
    """y scale + offset, of a y that :func:`centred` returned.

    affine (3 or more, O) float: mean, scale and offset, as a BatchNorm has them.
    """
    y = y * per_channel(affine_ptr + shape.out_channels, out, known)
    return y + per_channel(affine_ptr + 2 * shape.out_channels, out, known)


@gluon.jit
def _unit_mma_kernel(
    x_ptr,
    weight_ptr,
    base_ptr,
    stream_ptr,
    affine_ptr,
    shift_mid_ptr,
    slope_ptr,
    shift_out_ptr,
    next_shift_ptr,
    z_ptr,
    signs_ptr,
    pixels,
    shape: gl.constexpr,
    cut: gl.constexpr,
    SHORTCUT: gl.constexpr,
):
    """z = PReLU((y - mean) scale + offset + shortcut + shift_mid) + shift_out, and z's signs.

    Operands of y as :func:`tritonbnn.kernels.mma_tile.signed_sums` takes them; affine as
    :func:`normalised` takes it; the others as the epilogue of :mod:`tritonbnn.kernels.unit` does.
    """
    block_p, block_o, _ = block_of_program(shape, cut)
    y, pixel, out = signed_sums(x_ptr, weight_ptr, base_ptr, pixels, block_p, block_o, shape, cut)
    out = out[None, :]
    known = out < shape.out_channels
    mask = (pixel < pixels)[:, None] & known
    t = normalised(centred(y, affine_ptr, out, known), affine_ptr, out, known, shape)
    start, row = place_of_block(block_p, cut, shape.out_channels)
    t += block_shortcut(stream_ptr, start, row, pixel, out, mask, shape, SHORTCUT)
    if slope_ptr is not None:
        t += per_channel(shift_mid_ptr, out, known)
        t = gl.where(t > 0, t, t * per_channel(slope_ptr, out, known))
        t += per_channel(shift_out_ptr, out, known)
    z = t.to(z_ptr.dtype.element_ty)
    gl.store(z_ptr + start + (row * shape.out_channels + out), z, mask=mask)
    if signs_ptr is not None:
        s = z.to(gl.float32)
        if next_shift_ptr is not None:
            s += per_channel(next_shift_ptr, out, known)
        store_bits((s >= 0) & known, signs_ptr, pixels, block_p, block_o, shape, cut)


@dataclass(frozen=True)
class Blocks:
    """How kernels cut a convolution together with what follows it, which its shape decides.

    Attributes:
        tile: of the kernels.
        cut: how warps share a block.
        pixels: blocks of pixels.
        channels: blocks of channels.
        summing: programs that share the blocks of pixels in a kernel that sums.
        constants: what kernels take of the convolution beside its operands.
    """

    tile: TileConfig
    cut: Cut
    pixels: int
    channels: int
    summing: int
    constants: dict[str, Any]


def _blocks(geometry: Geometry, tile: TileConfig) -> Blocks:
    pixels, channels = ceil_div(geometry.pixels, tile.block_m), channel_blocks(geometry, tile)
    summing = min(ceil_div(MAX_PARTIALS, channels), pixels)
    constants = product_constants(geometry, tile)
    return Blocks(tile, block_tiles(tile), pixels, channels, summing, constants)


@lru_cache(maxsize=1024)
def unit_blocks(geometry: Geometry) -> Blocks:
    """Of a convolution with what follows it.

    Not the tuning table's, for a larger tile leaves too few registers for what follows.
    """
    return _blocks(geometry, _unit_tile(geometry))


@lru_cache(maxsize=1024)
def half_blocks(geometry: Geometry) -> Blocks:
    """As :func:`unit_blocks`, for what takes more registers: sums of the backward pass.

    Channels are cut alike.
    """
    tile = _unit_tile(geometry)
    return _blocks(geometry, replace(tile, block_m=tile.block_m // 2))


@lru_cache(maxsize=1024)
def moments_blocks(geometry: Geometry) -> Blocks:
    """As :func:`unit_blocks`, for moments.

    Of a few steps of K compilers make a row of loads, for which there are registers beside half of
    the pixels alone.
    """
    steps = ceil_div(geometry.kernel_size**2 * words(geometry.channels), CHUNK_WORDS)
    return half_blocks(geometry) if 4 <= steps <= 8 else unit_blocks(geometry)


def _unit_tile(geometry: Geometry) -> TileConfig:
    return whole_words(default_tile(geometry.key("conv_packed", "int32"), "mma"))


class Product(NamedTuple):
    """A convolution that several kernels compute anew, each with what follows it.

    Attributes:
        blocks: how they cut it.
        arguments: what they take of it, by name.
    """

    blocks: Blocks
    arguments: dict[str, Any]


def product_of(x: Tensor, weight: Fragments, blocks: Blocks) -> Product:
    """The convolution of packed operands.

    Args:
        x: packed (N, H, W, words), contiguous.
        weight: of the blocks' cut.
        blocks: :func:`unit_blocks` or another of these.
    """
    return Product(blocks, product_operands(x, weight) | blocks.constants)


def moments_mma(product: Product, geometry: Geometry) -> Tensor:
    """Each program's share of the sums of the convolution and its square, (parts, 2, O) int64."""
    blocks = product.blocks
    shape = (blocks.summing, 2, geometry.out_channels)
    sums = torch.empty(shape, dtype=torch.int64, device=product.arguments["x_ptr"].device)
    programs = blocks.summing * blocks.channels
    launch(_moments_mma_kernel, programs, blocks.tile, **product.arguments, sums_ptr=sums)
    return sums


def unit_mma(
    product: Product,
    stream: Tensor,
    affine: Tensor,
    activation: Vectors,
    next_shift: Tensor | None,
    geometry: Geometry,
    *,
    shortcut: str,
    pack: bool,
) -> tuple[Tensor, Tensor]:
    """z and its signs, as :func:`tritonbnn.eager.conv_unit_forward` returns them.

    Args:
        product: the convolution.
        stream: channels innermost.
        affine: (3 or more, O), contiguous: mean, scale and offset, and what else is kept there.
        activation: shift_mid, slope and shift_out, (O,), contiguous, or three times None.
        next_shift: (O,), contiguous, or None.
        geometry: of the convolution.
        shortcut: "identity", "pool" or "repeat".
        pack: whether the signs are wanted.
    """
    shift_mid, slope, shift_out = activation
    n, channels, height, width = geometry.output_shape
    z = empty_channels_last(geometry.output_shape, stream.dtype, stream.device)
    shape = (n, height, width, words(channels) if pack else 0)
    signs = torch.empty(shape, dtype=torch.int32, device=stream.device)
    launch(
        _unit_mma_kernel,
        product.blocks.pixels * product.blocks.channels,
        product.blocks.tile,
        **product.arguments,
        stream_ptr=stream,
        affine_ptr=affine,
        shift_mid_ptr=shift_mid,
        slope_ptr=slope,
        shift_out_ptr=shift_out,
        next_shift_ptr=next_shift,
        z_ptr=z,
        signs_ptr=signs if pack else None,
        SHORTCUT=shortcut,
    )
    return z, signs
