"""The gradient of a binary convolution to its input: implicit GEMM, and on through the sign.

One operand is real, so this is a real GEMM: products in the gradient's dtype (float32 in true
float32), sums in float32. Nothing is added atomically, so results are the same every time.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonbnn import checks
from tritonbnn.kernels import below_triton, config
from tritonbnn.kernels.binarize import (
    Skipped,
    shortcut_grad,
    sign_gradients,
    sign_slope,
    skipped_arguments,
)
from tritonbnn.kernels.config import ceil_div
from tritonbnn.kernels.geometry import Geometry, check_geometry
from tritonbnn.kernels.launch import check_kernel_dtype, launch
from tritonbnn.kernels.library import convolution_backward
from tritonbnn.kernels.sign_words import CHANNELS, sign_words
from tritonbnn.kernels.tiles import tile_of
from tritonbnn.kernels.weight import scaled
from tritonbnn.layout import channels_last, empty_channels_last, empty_pixels

AT_ONCE = tl.constexpr(32)
"""Channels that are taken through the sign at a time."""


@triton.jit
def _finish_input_grad(
    acc,
    first,
    target,
    exists,
    block,
    dx_ptr,
    stream_ptr,
    shift_ptr,
    residual_ptr,
    positive_ptr,
    slope_ptr,
    sums_ptr,
    shape: tl.constexpr,
    SHORTCUT: tl.constexpr,
):
    """What follows the product, for (pixels, channels from the first on): a few channels at a time.

    All that is read at once would take more registers than there are beside the sums. Operands as
    :func:`_conv_input_grad_kernel` takes them, (pixels, 1) of a pixel.
    """
    PIXELS: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    CHANNELS: tl.constexpr = shape.channels
    if BLOCK_N > AT_ONCE:
        HALF: tl.constexpr = BLOCK_N // 2
        lower, upper = tl.split(tl.permute(tl.reshape(acc, (PIXELS, 2, HALF)), (0, 2, 1)))
        for half in tl.static_range(2):
            _finish_input_grad(
                lower if half == 0 else upper,
                first + half * HALF,
                target,
                exists,
                block,
                dx_ptr,
                stream_ptr,
                shift_ptr,
                residual_ptr,
                positive_ptr,
                slope_ptr,
                sums_ptr,
                shape,
                SHORTCUT,
            )
    else:
        channel = first + tl.arange(0, BLOCK_N)
        known = channel < CHANNELS
        mask = exists & known[None, :]
        offs = target * CHANNELS + channel[None, :]
        if stream_ptr is not None:
            signed = tl.load(stream_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            if shift_ptr is not None:
                shift = tl.load(shift_ptr + channel, mask=known, other=0.0)
                signed += shift.to(tl.float32)[None, :]
            acc *= sign_slope(signed)  # outside of the image acc is 0
            tl.store(sums_ptr + block * CHANNELS + channel, tl.sum(acc, axis=0), mask=known)
            if residual_ptr is not None:
                acc += shortcut_grad(
                    residual_ptr,
                    positive_ptr,
                    slope_ptr,
                    target,
                    exists,
                    first,
                    CHANNELS,
                    shape.height,
                    shape.width,
                    SHORTCUT,
                    BLOCK_N,
                )
        tl.store(dx_ptr + offs, acc.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _conv_input_grad_kernel(
    grad_ptr,
    weight_ptr,
    dx_ptr,
    stream_ptr,
    shift_ptr,
    residual_ptr,
    positive_ptr,
    slope_ptr,
    sums_ptr,
    batch,
    shape: tl.constexpr,
    SHORTCUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx[y, x, c] = sum over ky, kx, o of grad[(y + p - ky) / s, (x + p - kx) / s, o] w[o, t, c].

    grad (N H' W', O) float, weight (O, kh kw, C) and dx (N H W, C) of the same dtype. With stride 2
    a pixel meets only the taps of its parity, so axis 1 of the grid is the parity class and a
    program's pixels share their taps.

    stream (N H W, C), if it is given, is what the signs are of: dx is then the gradient to it, that
    through the shortcut added; sums (blocks of pixels, C) float32 are each block's share of the
    gradient to the shift. Operands as the sign's own backward kernel has them.
    """
    CHANNELS: tl.constexpr = shape.channels
    OUT_CHANNELS: tl.constexpr = shape.out_channels
    KERNEL_SIZE: tl.constexpr = shape.kernel_size
    STRIDE: tl.constexpr = shape.stride
    PADDING: tl.constexpr = shape.padding
    TAPS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE
    CHUNKS: tl.constexpr = (OUT_CHANNELS + BLOCK_K - 1) // BLOCK_K
    ROWS: tl.constexpr = (shape.height + STRIDE - 1) // STRIDE
    COLUMNS: tl.constexpr = (shape.width + STRIDE - 1) // STRIDE
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(CHANNELS, BLOCK_N))
    pixel = (pid_m * BLOCK_M).to(tl.int32) + tl.arange(0, BLOCK_M)
    image = pixel // (ROWS * COLUMNS)
    y = pixel // COLUMNS % ROWS * STRIDE + tl.program_id(1) // STRIDE
    x = pixel % COLUMNS * STRIDE + tl.program_id(1) % STRIDE
    exists = (image < batch) & (y < shape.height) & (x < shape.width)
    first_y = (tl.program_id(1) // STRIDE + PADDING) % STRIDE
    first_x = (tl.program_id(1) % STRIDE + PADDING) % STRIDE
    taps_y = (KERNEL_SIZE - first_y + STRIDE - 1) // STRIDE
    taps_x = (KERNEL_SIZE - first_x + STRIDE - 1) // STRIDE
    divisor = tl.maximum(taps_x, 1)  # a class may have no taps, and loads run ahead of the loop
    channel = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(taps_y * taps_x * CHUNKS):
        out = step % CHUNKS * BLOCK_K + tl.arange(0, BLOCK_K)
        ky = first_y + step // CHUNKS // divisor * STRIDE
        kx = first_x + step // CHUNKS % divisor * STRIDE
        # Exact, since a class has the taps that its pixels meet and no others.
        out_y = (y + PADDING - ky) // STRIDE
        out_x = (x + PADDING - kx) // STRIDE
        inside = exists & (out_y >= 0) & (out_y < shape.out_height)
        inside &= (out_x >= 0) & (out_x < shape.out_width)
        source = (image * shape.out_height + out_y).to(tl.int64) * shape.out_width + out_x
        g_mask = inside[:, None] & (out < OUT_CHANNELS)[None, :]
        g = tl.load(grad_ptr + source[:, None] * OUT_CHANNELS + out[None, :], mask=g_mask, other=0)
        offs_w = (out[:, None] * TAPS + ky * KERNEL_SIZE + kx) * CHANNELS + channel[None, :]
        w_mask = (out < OUT_CHANNELS)[:, None] & (channel < CHANNELS)[None, :]
        w = tl.load(weight_ptr + offs_w, mask=w_mask, other=0)
        acc = tl.dot(g, w, acc, input_precision="ieee")
    target = (image * shape.height + y).to(tl.int64) * shape.width + x
    blocks = tl.num_programs(0) // tl.cdiv(CHANNELS, BLOCK_N)
    _finish_input_grad(
        acc,
        pid_n * BLOCK_N,
        target[:, None],
        exists[:, None],
        tl.program_id(1) * blocks + pid_m,
        dx_ptr,
        stream_ptr,
        shift_ptr,
        residual_ptr,
        positive_ptr,
        slope_ptr,
        sums_ptr,
        shape,
        SHORTCUT,
    )


def conv_input_grad(
    grad: Tensor,
    weight: Tensor,
    alpha: Tensor | None,
    *,
    channels: int,
    height: int,
    width: int,
    stride: int,
    padding: int,
) -> Tensor:
    """The gradient to the +-1 input: the twin of :func:`tritonbnn.eager.conv_input_grad`."""
    check_kernel_dtype("grad", grad.dtype)
    checks.check_same_device(grad=grad, weight=weight, alpha=alpha)
    given = _given_weight(weight, alpha, channels, grad.dtype)
    out_channels, kernel_size = weight.shape[0], weight.shape[2]
    geometry = Geometry(
        grad.shape[0], height, width, channels, out_channels, kernel_size, stride, padding
    )
    check_geometry(geometry)
    checks.check_shape("grad", grad, geometry.output_shape)
    return input_grad(grad, given, geometry)


class Binary(NamedTuple):
    """A weight that is ``alpha`` times its signs.

    Attributes:
        packed: (O, k, k, words) int32, contiguous.
        alpha: (O,), rounded to the gradient's dtype before it is multiplied.
    """

    packed: Tensor
    alpha: Tensor


def reads_signs(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a binary weight's signs are multiplied as they are, and not expanded to numbers."""
    return _choice(geometry, dtype, device, binary=True).formulation == "warpgroup"


def _choice(
    geometry: Geometry, dtype: torch.dtype, device: torch.device, *, binary: bool
) -> config.Choice:
    """What the input's gradient runs as."""
    key = geometry.key("conv_input_grad", config.dtype_name(dtype))
    able = binary and geometry.padding == geometry.kernel_size // 2
    return below_triton.choose(key, device, "dot", able=able)


def input_grad(grad: Tensor, weight: Tensor | Binary, geometry: Geometry) -> Tensor:
    """The gradient to the input, unchecked.

    Args:
        grad: (N, O, H', W').
        weight: as numbers, (O, C, kh, kw) in ``grad``'s dtype and channels_last memory, or binary.
        geometry: of the convolution.
    """
    binary = isinstance(weight, Binary)
    choice = _choice(geometry, grad.dtype, grad.device, binary=binary)
    shape = (geometry.batch, geometry.channels, geometry.height, geometry.width)
    dx = empty_channels_last(shape, grad.dtype, grad.device)
    if choice.formulation == "library":
        real = _numbers(weight, geometry, grad.dtype)
        return convolution_backward(grad, dx, real, geometry, [True, False, False])[0]
    if dx.numel():
        _launch_input_grad(channels_last(grad), weight, dx, geometry, choice)
    return dx


def stream_grad(
    grad: Tensor,
    weight: Tensor | Binary,
    geometry: Geometry,
    stream: Tensor,
    shift: Tensor | None,
    skipped: Skipped | None,
    shortcut: str,
) -> tuple[Tensor, Tensor]:
    """The gradient to the stream whose signs a unit convolves, unchecked.

    Where the product is ours, it is :func:`input_grad` and the sign's backward pass in one kernel,
    and the gradient to the signs is never written.

    Args:
        grad: (N, O, H', W').
        weight: as :func:`input_grad` takes it, as are the first three.
        geometry: likewise.
        stream: (N, C, H, W) in channels_last memory.
        shift: (C,), what is added before the sign, or None.
        skipped: the gradient to the shortcut's output, or None.
        shortcut: "identity", "pool" or "repeat".

    Returns:
        dx; and shares of the shift's gradient, float32, to be added over all but the last axis.
    """
    binary = isinstance(weight, Binary)
    choice = _choice(geometry, grad.dtype, grad.device, binary=binary)
    if choice.formulation == "library" or not stream.numel():
        signs_grad = input_grad(grad, weight, geometry)
        return sign_gradients(signs_grad, stream, skipped, shift, shortcut)
    dx = empty_pixels(stream, grad.dtype)
    sign = {"stream_ptr": stream, "shift_ptr": shift, **skipped_arguments(skipped)}
    sums = _launch_input_grad(
        channels_last(grad), weight, dx, geometry, choice, **sign, SHORTCUT=shortcut
    )
    return dx, sums


def _given_weight(
    weight: Tensor, alpha: Tensor | None, channels: int, dtype: torch.dtype
) -> Tensor | Binary:
    """The weight as :func:`input_grad` takes it, checked."""
    if alpha is None:
        if weight.shape[1] != channels:
            raise ValueError(f"weight must have {channels} input channels, not {weight.shape[1]}")
        return channels_last(weight.to(dtype))
    checks.check_packed("weight", weight, channels)
    checks.check_per_channel(weight.shape[0], alpha=alpha)
    return Binary(weight.contiguous(), alpha)


def _numbers(weight: Tensor | Binary, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """The weight as numbers, (O, C, kh, kw) in ``dtype`` and channels_last memory."""
    if isinstance(weight, Binary):
        return scaled(*weight, geometry.channels, dtype)[0]
    return weight


def _launch_input_grad(
    grad: Tensor,
    weight: Tensor | Binary,
    dx: Tensor,
    geometry: Geometry,
    choice: config.Choice,
    **sign: Any,
) -> Tensor:
    """Run the kernel; ``sign`` is what it takes beside to go on through the sign.

    Returns:
        Shares of the shift's gradient, (blocks, C); of no block where the kernel ends at the signs.
    """
    stride, tile = geometry.stride, choice.tile
    rows, columns = ceil_div(geometry.height, stride), ceil_div(geometry.width, stride)
    programs = ceil_div(geometry.batch * rows * columns, tile.block_m)
    blocks = programs * stride * stride if sign else 0
    sums = torch.empty((blocks, geometry.channels), dtype=torch.float32, device=dx.device)
    none = {"stream_ptr": None, "shift_ptr": None, **skipped_arguments(None), "SHORTCUT": ""}
    further = {"dx_ptr": dx, **(sign or none), "sums_ptr": sums if sign else None}
    if choice.formulation == "warpgroup":
        from tritonbnn.kernels.input_grad_warpgroup import input_grad_warpgroup  # it needs Gluon

        assert isinstance(weight, Binary)
        tiles = tile.block_n // CHANNELS
        signs = sign_words(*weight, geometry.channels, grad.dtype, tiles)
        input_grad_warpgroup(grad, signs, geometry, tile, further)
        return sums
    launch(
        _conv_input_grad_kernel,
        (programs * ceil_div(geometry.channels, tile.block_n), stride * stride),
        tile,
        grad_ptr=grad,
        weight_ptr=_numbers(weight, geometry, grad.dtype),
        **further,
        batch=geometry.batch,
        shape=geometry.shape,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
    )
    return sums
