"""Bop and its second-order form: averages, comparison, flips and their count in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonbnn import checks
from tritonbnn.contract import BOP_EPSILON
from tritonbnn.kernels.config import TileConfig, ceil_div
from tritonbnn.kernels.launch import check_kernel_dtype, launch

_TILE = TileConfig(1024, 1, 1, 4, 1)
"""Weights of a program, and its warps. It is bound by memory, so no shape wants another."""


@triton.jit
def _signal(
    grad_ptr,
    average_ptr,
    squares_ptr,
    offs,
    mask,
    gamma,
    keep,
    sigma,
    keep_squares,
    scale,
    squares_scale,
    EPSILON: tl.constexpr,
):
    """Move the averages at ``offs``; what a weight there is compared with, float32."""
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    average = tl.load(average_ptr + offs, mask=mask, other=0.0)
    average = tl.fma(grad, gamma, average * keep)
    tl.store(average_ptr + offs, average, mask=mask)
    signal = average
    if squares_ptr is not None:
        squares = tl.load(squares_ptr + offs, mask=mask, other=0.0)
        squares = tl.fma(grad * grad, sigma, squares * keep_squares)
        tl.store(squares_ptr + offs, squares, mask=mask)
        root = tl.sqrt_rn(squares * squares_scale) + EPSILON
        signal = tl.div_rn(average * scale, root)
    return signal


@triton.jit
def _bop_kernel(
    weight_ptr,
    grad_ptr,
    average_ptr,
    squares_ptr,
    counts_ptr,
    size,
    threshold,
    gamma,
    keep,
    sigma,
    keep_squares,
    scale,
    squares_scale,
    EPSILON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """w <- -w where w signal > threshold, abs(w) where they are equal.

    weight, grad (size,) float; average, squares (size,) float32, squares may be None; counts
    (programs,) int32: how many weights of a program have changed.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    signal = _signal(
        grad_ptr,
        average_ptr,
        squares_ptr,
        offs,
        mask,
        gamma,
        keep,
        sigma,
        keep_squares,
        scale,
        squares_scale,
        EPSILON,
    )
    weight = tl.load(weight_ptr + offs, mask=mask, other=1.0).to(tl.float32)
    agreement = weight * signal
    flips = (agreement > threshold) | ((agreement == threshold) & (weight < 0))
    flips = flips & mask
    # few weights flip, and the others need not be written
    tl.store(weight_ptr + offs, (-weight).to(weight_ptr.dtype.element_ty), mask=flips)
    tl.store(counts_ptr + tl.program_id(0), tl.sum(flips.to(tl.int32), axis=0))


@triton.jit
def _bop_packed_kernel(
    packed_ptr,
    grad_ptr,
    average_ptr,
    squares_ptr,
    counts_ptr,
    rows,
    threshold,
    gamma,
    keep,
    sigma,
    keep_squares,
    scale,
    squares_scale,
    CHANNELS: tl.constexpr,
    WORDS: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same for weights that are bits.

    packed (rows, WORDS) int32; grad (rows, CHANNELS) float; average, squares (rows, CHANNELS)
    float32, squares may be None; counts (programs,) int32. A program takes BLOCK words, counted
    over the whole of ``packed``.
    """
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = word // WORDS
    lane = tl.arange(0, 32)[None, :]
    channel = (word % WORDS)[:, None] * 32 + lane
    mask = (row < rows)[:, None] & (channel < CHANNELS)
    signal = _signal(
        grad_ptr,
        average_ptr,
        squares_ptr,
        row[:, None] * CHANNELS + channel,
        mask,
        gamma,
        keep,
        sigma,
        keep_squares,
        scale,
        squares_scale,
        EPSILON,
    )
    words = tl.load(packed_ptr + word, mask=row < rows, other=0)
    positive = ((words[:, None] >> lane) & 1) != 0
    agreement = tl.where(positive, signal, -signal)
    flips = (agreement > threshold) | ((agreement == threshold) & (positive == 0))
    flips = (flips & mask).to(tl.int32)
    tl.store(packed_ptr + word, words ^ tl.sum(flips << lane, axis=1), mask=row < rows)
    tl.store(counts_ptr + tl.program_id(0), tl.sum(tl.sum(flips, axis=1), axis=0))


def bop_update(
    weight: Tensor,
    grad: Tensor,
    average: Tensor,
    squares: Tensor | None,
    *,
    threshold: float,
    gamma: float,
    sigma: float = 0.0,
    scale: float = 1.0,
    squares_scale: float = 1.0,
) -> Tensor:
    """One step: the twin of :func:`tritonbnn.eager.bop_update`."""
    _check(weight, grad, average, squares)
    check_kernel_dtype("weight", weight.dtype)
    checks.check_same_shape(weight=weight, grad=grad, average=average, squares=squares)
    for tensor in (grad, average, *(() if squares is None else (squares,))):
        if tensor.stride() != weight.stride():
            raise ValueError("weight, gradient and averages must lie alike in memory")
    programs = ceil_div(weight.numel(), _TILE.block_m)
    counts = torch.empty(programs, dtype=torch.int32, device=weight.device)
    if programs:
        launch(
            _bop_kernel,
            programs,
            _TILE,
            weight_ptr=weight,
            grad_ptr=grad,
            average_ptr=average,
            squares_ptr=squares,
            counts_ptr=counts,
            size=weight.numel(),
            **_numbers(threshold, gamma, sigma, scale, squares_scale),
            EPSILON=BOP_EPSILON,
            BLOCK=_TILE.block_m,
        )
    return counts.sum()


def bop_update_packed(
    packed: Tensor,
    grad: Tensor,
    average: Tensor,
    squares: Tensor | None,
    *,
    threshold: float,
    gamma: float,
    sigma: float = 0.0,
    scale: float = 1.0,
    squares_scale: float = 1.0,
) -> Tensor:
    """One step: the twin of :func:`tritonbnn.eager.bop_update_packed`."""
    _check(packed, grad, average, squares)
    checks.check_same_shape(grad=grad, average=average, squares=squares)
    checks.check_packed("packed", packed, grad.shape[1])
    rows, channels = grad.shape
    block = _TILE.block_m // 32
    programs = ceil_div(packed.numel(), block)
    counts = torch.empty(programs, dtype=torch.int32, device=packed.device)
    if programs:
        launch(
            _bop_packed_kernel,
            programs,
            _TILE,
            packed_ptr=packed,
            grad_ptr=grad,
            average_ptr=average,
            squares_ptr=squares,
            counts_ptr=counts,
            rows=rows,
            **_numbers(threshold, gamma, sigma, scale, squares_scale),
            CHANNELS=channels,
            WORDS=packed.shape[1],
            EPSILON=BOP_EPSILON,
            BLOCK=block,
        )
    return counts.sum()


def _check(weight: Tensor, grad: Tensor, average: Tensor, squares: Tensor | None) -> None:
    check_kernel_dtype("the gradient", grad.dtype)
    check_kernel_dtype("the average", average.dtype)
    checks.check_same_device(weight=weight, grad=grad, average=average, squares=squares)


def _numbers(
    threshold: float, gamma: float, sigma: float, scale: float, squares_scale: float
) -> dict[str, float]:
    return {
        "threshold": float(threshold),
        "gamma": float(gamma),
        "keep": 1.0 - gamma,
        "sigma": float(sigma),
        "keep_squares": 1.0 - sigma,
        "scale": float(scale),
        "squares_scale": float(squares_scale),
    }
