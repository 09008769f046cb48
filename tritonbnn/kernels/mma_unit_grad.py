"""A unit's backward pass on the one-bit tensor core, up to its convolution, which is done again.

Twice, because BatchNorm's gradient needs sums over all pixels first. Bytes per output element with
a bf16 stream: the sums read the gradient and the stream and write a bit of du, 4 1/8. All of du
follows from that bit and the gradient, so that the second pass reads these two alone and writes dy,
4 1/8, and the gradient to the input reads them in place of du. Where the convolution's output is
kept as int16 it is 6 1/8 and 6 1/8, and 2 more to keep it. A prediction: nothing has been measured
yet.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tritonbnn.bits import words
from tritonbnn.kernels.binarize import Skipped
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.launch import launch
from tritonbnn.kernels.mma_pack import load_bits, store_bits
from tritonbnn.kernels.mma_sums import no_sums, store_sums, thread_sums
from tritonbnn.kernels.mma_tile import block_of_program, place_of_block, signed_sums
from tritonbnn.kernels.mma_unit import Product, block_shortcut, centred, normalised
from tritonbnn.kernels.unit import Vectors, per_channel
from tritonbnn.layout import empty_pixels


@gluon.jit
def _behind_activation(positive, grad, slope_ptr, out, known):
    """du = t > 0 ? grad : slope grad, of conditions (pixels, channels)."""
    return gl.where(positive, grad, grad * per_channel(slope_ptr, out, known))


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
    positive_ptr,
    pixels,
    shape: gl.constexpr,
    cut: gl.constexpr,
    SHORTCUT: gl.constexpr,
):
    """Each program's share of the sums of du, du (y - mean), min(t, 0) grad, and grad.

    And the bits of t > 0, t what the PReLU is of. Operands of y as
    :func:`tritonbnn.kernels.mma_tile.signed_sums` takes them, the others as in the forward pass;
    sums (programs, 4, O) float32; positive (N H' W', words) int32, None together with slope. A
    program takes every ``programs``-th block of pixels.
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
        known = (out < shape.out_channels)[None, :]
        mask = (pixel < pixels)[:, None] & known
        # from a block's beginning, addresses would take more registers than there are
        row = pixel.to(gl.int64)[:, None]
        channel = out[None, :]
        grad = gl.load(grad_ptr + (row * shape.out_channels + channel), mask=mask, other=0.0)
        grad = grad.to(gl.float32)
        du, distance = grad, centred(y, affine_ptr, channel, known)
        if slope_ptr is not None:
            # the shortcut first: behind the vectors, ptxas spills some registers of them
            t = block_shortcut(stream_ptr, 0, row, pixel, channel, mask, shape, SHORTCUT)
            t += normalised(distance, affine_ptr, channel, known, shape)
            t += per_channel(shift_mid_ptr, channel, known)
            positive = t > 0
            sum_slope += thread_sums(gl.where(positive, 0.0, t) * grad, cut)
            store_bits(positive & known, positive_ptr, pixels, block_p, block_o, shape, cut)
            du = _behind_activation(positive, grad, slope_ptr, channel, known)
        sum_du += thread_sums(du, cut)
        sum_du_y += thread_sums(du * distance, cut)
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
    positive_ptr,
    slope_ptr,
    coefficients_ptr,
    du_ptr,
    dy_ptr,
    pixels,
    shape: gl.constexpr,
    cut: gl.constexpr,
):
    """du = t > 0 ? grad : slope grad, and dy = du_scale du + a_scale y + constant.

    Operands as :func:`_activation_sums_mma_kernel` takes and leaves them; coefficients (3, O)
    float32, in that order. du_ptr may be None.
    """
    block_p, block_o, _ = block_of_program(shape, cut)
    y, pixel, out = signed_sums(x_ptr, weight_ptr, base_ptr, pixels, block_p, block_o, shape, cut)
    start, row = place_of_block(block_p, cut, shape.out_channels)
    out = out[None, :]
    known = out < shape.out_channels
    mask = (pixel < pixels)[:, None] & known
    place = row * shape.out_channels + out
    du = gl.load(grad_ptr + start + place, mask=mask, other=0.0)
    if positive_ptr is not None:
        positive = load_bits(positive_ptr, pixels, block_p, block_o, shape, cut)
        du = _behind_activation(positive, du.to(gl.float32), slope_ptr, out, known)
        du = du.to(dy_ptr.dtype.element_ty)
    if du_ptr is not None:
        gl.store(du_ptr + start + place, du, mask=mask)
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
) -> tuple[Tensor, Skipped]:
    """The sums of :func:`tritonbnn.kernels.unit_grad.activation_backward`, and the gradient to u.

    Args:
        product: the convolution.
        grad: (N, O, H', W') in channels_last memory, as are the next ones.
        stream: of the shortcut.
        affine: (3 or more, O), contiguous: mean, scale and offset, and what else is kept there.
        activation: shift_mid and slope, contiguous, or twice None.
        geometry: of the convolution.
        shortcut: "identity", "pool" or "repeat".

    Returns:
        Sums (programs, 4, O); and the gradient to u, which the PReLU is of but for its shift, as
        the bits that give it.
    """
    blocks, (shift_mid, slope) = product.blocks, activation
    device = grad.device
    sums = torch.empty(
        (blocks.summing, 4, geometry.out_channels), dtype=torch.float32, device=device
    )
    positive = None
    if slope is not None:
        n, channels, height, width = geometry.output_shape
        shape = (n, height, width, words(channels))
        positive = torch.empty(shape, dtype=torch.int32, device=device)
    launch(
        _activation_sums_mma_kernel,
        blocks.summing * blocks.channels,
        blocks.tile,
        **product.arguments,
        grad_ptr=grad,
        stream_ptr=stream,
        affine_ptr=affine,
        shift_mid_ptr=shift_mid,
        slope_ptr=slope,
        sums_ptr=sums,
        positive_ptr=positive,
        SHORTCUT=shortcut,
    )
    return sums, Skipped(grad, positive, slope)


def unit_grad_mma(
    product: Product, skipped: Skipped, coefficients: Tensor, *, stored: bool
) -> tuple[Skipped, Tensor]:
    """The gradients to u and to y.

    Args:
        product: as :func:`activation_sums_mma` takes it.
        skipped: that to u, as it returns it.
        coefficients: (3, O), contiguous: du_scale, a_scale and constant.
        stored: that to u is wanted as a tensor, not as the bits that give it.
    """
    grad, positive, slope = skipped
    dy = empty_pixels(grad, grad.dtype)
    du = empty_pixels(grad, grad.dtype) if stored and positive is not None else None
    launch(
        _unit_grad_mma_kernel,
        product.blocks.pixels * product.blocks.channels,
        product.blocks.tile,
        **product.arguments,
        grad_ptr=grad,
        positive_ptr=positive,
        slope_ptr=slope,
        coefficients_ptr=coefficients,
        du_ptr=du,
        dy_ptr=dy,
    )
    return skipped if du is None else Skipped(du), dy
