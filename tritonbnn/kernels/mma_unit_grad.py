"""A unit's backward pass on the one-bit tensor core, up to its convolution, which is done again.

Twice, because BatchNorm's gradient needs sums over all pixels first. Bytes per output element with
a bf16 stream: the sums read the gradient and the stream, 4; the second pass reads both once more
and writes dy and a bit of du, 6 1/8: all of du follows from the bit and the gradient, which the
gradient to the input then reads in its place. Where the convolution's output is kept as int16 it is
8 and 6, and 2 more to keep it. A prediction: nothing has been measured yet.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tritonbnn.bits import words
from tritonbnn.kernels.binarize import Skipped
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.launch import launch
from tritonbnn.kernels.mma_pack import store_bits
from tritonbnn.kernels.mma_sums import no_sums, store_sums, thread_sums
from tritonbnn.kernels.mma_tile import (
    block_of_program,
    output_layout,
    place_of_block,
    signed_sums,
)
from tritonbnn.kernels.mma_unit import Product, block_shortcut, centred, normalised
from tritonbnn.kernels.unit import Vectors, per_channel
from tritonbnn.layout import empty_pixels


@gluon.jit
def _through_activation(
    y,
    start,
    row,
    pixel,
    out,
    grad_ptr,
    stream_ptr,
    affine_ptr,
    shift_mid_ptr,
    slope_ptr,
    pixels,
    shape: gl.constexpr,
    cut: gl.constexpr,
    SHORTCUT: gl.constexpr,
):
    """grad, y - mean, t > 0, du = t > 0 ? grad : slope grad, and min(t, 0) grad.

    Tensors as in the forward pass, t what the PReLU is of; start and row as in
    :func:`tritonbnn.kernels.mma_unit.block_shortcut`. Where nothing is, gradients are 0.
    """
    out = out[None, :]
    known = out < shape.out_channels
    mask = (pixel < pixels)[:, None] & known
    grad = gl.load(grad_ptr + start + (row * shape.out_channels + out), mask=mask, other=0.0)
    grad = grad.to(gl.float32)
    distance = centred(y, affine_ptr, out, known)
    LAYOUT: gl.constexpr = output_layout(cut)
    positive = gl.full(LAYOUT.shape, True, gl.int1, LAYOUT)
    du, low = grad, gl.full(LAYOUT.shape, 0.0, gl.float32, LAYOUT)
    if slope_ptr is not None:
        # the shortcut first: behind the vectors, ptxas spills some registers of them
        t = block_shortcut(stream_ptr, start, row, pixel, out, mask, shape, SHORTCUT)
        t += normalised(distance, affine_ptr, out, known, shape)
        t += per_channel(shift_mid_ptr, out, known)
        positive = t > 0
        du = gl.where(positive, grad, grad * per_channel(slope_ptr, out, known))
        low = gl.where(positive, 0.0, t) * grad
    return grad, distance, positive, du, low


@gluon.jit
def _activation_sums_mma_kernel(
    x_ptr,
    weight_ptr,
    base_ptr,
    grad_ptr,
    stream_ptr,
    affine_ptr,
    shift_mid_ptr,
    slope_ptr,
    sums_ptr,
    pixels,
    shape: gl.constexpr,
    cut: gl.constexpr,
    SHORTCUT: gl.constexpr,
):
    """Each program's share of the sums of du, du (y - mean), min(t, 0) grad, and grad.

    Operands of y as :func:`tritonbnn.kernels.mma_tile.signed_sums` takes them; sums (programs, 4,
    O) float32. A program takes every ``programs``-th block of pixels.
    """
    BLOCK_P: gl.constexpr = cut.warps_p * cut.tiles_p * 8
    first, block_o, programs = block_of_program(shape, cut)
    sum_du = no_sums(gl.float32, cut)
    sum_du_y = no_sums(gl.float32, cut)
    sum_slope = no_sums(gl.float32, cut)
    sum_grad = no_sums(gl.float32, cut)
    for block_p in range(first, (pixels + BLOCK_P - 1) // BLOCK_P, programs):
        y, pixel, out = signed_sums(
            x_ptr, weight_ptr, base_ptr, pixels, block_p, block_o, shape, cut
        )
        grad, distance, _, du, low = _through_activation(
            y,
            0,  # from a block's beginning, addresses would take more registers than there are
            pixel.to(gl.int64)[:, None],
            pixel,
            out,
            grad_ptr,
            stream_ptr,
            affine_ptr,
            shift_mid_ptr,
            slope_ptr,
            pixels,
            shape,
            cut,
            SHORTCUT,
        )
        sum_du += thread_sums(du, cut)
        sum_du_y += thread_sums(du * distance, cut)
        sum_slope += thread_sums(low, cut)
        sum_grad += thread_sums(grad, cut)
    store_sums(sum_du, sums_ptr, 4 * first, block_o, shape, cut)
    store_sums(sum_du_y, sums_ptr, 4 * first + 1, block_o, shape, cut)
    store_sums(sum_slope, sums_ptr, 4 * first + 2, block_o, shape, cut)
    store_sums(sum_grad, sums_ptr, 4 * first + 3, block_o, shape, cut)


@gluon.jit
def _unit_grad_mma_kernel(
    x_ptr,
    weight_ptr,
    base_ptr,
    grad_ptr,
    stream_ptr,
    affine_ptr,
    shift_mid_ptr,
    slope_ptr,
    coefficients_ptr,
    du_ptr,
    positive_ptr,
    dy_ptr,
    pixels,
    shape: gl.constexpr,
    cut: gl.constexpr,
    SHORTCUT: gl.constexpr,
):
    """du = t > 0 ? grad : slope grad, and dy = du_scale du + a_scale y + constant.

    Operands as :func:`_activation_sums_mma_kernel` takes them; coefficients (3, O) float32, in that
    order. du_ptr and positive_ptr may be None. positive (N H' W', words) int32 has the packed bits
    of t > 0, which with grad give du.
    """
    block_p, block_o, _ = block_of_program(shape, cut)
    y, pixel, out = signed_sums(x_ptr, weight_ptr, base_ptr, pixels, block_p, block_o, shape, cut)
    start, row = place_of_block(block_p, cut, shape.out_channels)
    _, _, positive, du, _ = _through_activation(
        y,
        start,
        row,
        pixel,
        out,
        grad_ptr,
        stream_ptr,
        affine_ptr,
        shift_mid_ptr,
        slope_ptr,
        pixels,
        shape,
        cut,
        SHORTCUT,
    )
    out = out[None, :]
    known = out < shape.out_channels
    mask = (pixel < pixels)[:, None] & known
    place = row * shape.out_channels + out
    du = du.to(dy_ptr.dtype.element_ty)
    if du_ptr is not None:
        gl.store(du_ptr + start + place, du, mask=mask)
    if positive_ptr is not None:
        store_bits(positive & known, positive_ptr, pixels, block_p, block_o, shape, cut)
    dy = y.to(gl.float32) * per_channel(coefficients_ptr + shape.out_channels, out, known)
    dy += per_channel(coefficients_ptr + 2 * shape.out_channels, out, known)
    dy += du.to(gl.float32) * per_channel(coefficients_ptr, out, known)
    gl.store(dy_ptr + start + place, dy.to(dy_ptr.dtype.element_ty), mask=mask)


def activation_sums_mma(
    product: Product,
    grad: Tensor,
    stream: Tensor,
    affine: Tensor,
    activation: Vectors,
    geometry: Geometry,
    shortcut: str,
) -> Tensor:
    """The sums of :func:`tritonbnn.kernels.unit_grad.activation_backward`, (programs, 4, O).

    Args:
        product: the convolution.
        grad: (N, O, H', W') in channels_last memory, as are the next ones.
        stream: of the shortcut.
        affine: (3 or more, O), contiguous: mean, scale and offset, and what else is kept there.
        activation: shift_mid and slope, contiguous, or twice None.
        geometry: of the convolution.
        shortcut: "identity", "pool" or "repeat".
    """
    blocks = product.blocks
    shape = (blocks.summing, 4, geometry.out_channels)
    sums = torch.empty(shape, dtype=torch.float32, device=grad.device)
    launch(
        _activation_sums_mma_kernel,
        blocks.summing * blocks.channels,
        blocks.tile,
        **product.arguments,
        **_activation_arguments(grad, stream, affine, activation, shortcut),
        sums_ptr=sums,
    )
    return sums


def unit_grad_mma(
    product: Product,
    grad: Tensor,
    stream: Tensor,
    affine: Tensor,
    activation: Vectors,
    coefficients: Tensor,
    geometry: Geometry,
    shortcut: str,
    *,
    stored: bool,
) -> tuple[Skipped, Tensor]:
    """The gradients to u, which the PReLU is of but for its shift, and to y.

    Args:
        product: as :func:`activation_sums_mma` takes it, as are the others.
        grad: likewise.
        stream: likewise.
        affine: likewise.
        activation: likewise.
        coefficients: (3, O), contiguous: du_scale, a_scale and constant.
        geometry: likewise.
        shortcut: likewise.
        stored: that to u is wanted as a tensor, not as the signs that give it.
    """
    _, slope = activation
    dy = empty_pixels(grad, grad.dtype)
    du = positive = None
    if slope is not None and stored:
        du = empty_pixels(grad, grad.dtype)
    elif slope is not None:
        n, channels, height, width = geometry.output_shape
        shape = (n, height, width, words(channels))
        positive = torch.empty(shape, dtype=torch.int32, device=grad.device)
    launch(
        _unit_grad_mma_kernel,
        product.blocks.pixels * product.blocks.channels,
        product.blocks.tile,
        **product.arguments,
        **_activation_arguments(grad, stream, affine, activation, shortcut),
        coefficients_ptr=coefficients,
        du_ptr=du,
        positive_ptr=positive,
        dy_ptr=dy,
    )
    if positive is None:
        return Skipped(grad if du is None else du), dy
    return Skipped(grad, positive, slope), dy


def _activation_arguments(
    grad: Tensor, stream: Tensor, affine: Tensor, activation: Vectors, shortcut: str
) -> dict[str, Tensor | str | None]:
    shift_mid, slope = activation
    return {
        "grad_ptr": grad,
        "stream_ptr": stream,
        "affine_ptr": affine,
        "shift_mid_ptr": shift_mid,
        "slope_ptr": slope,
        "SHORTCUT": shortcut,
    }
