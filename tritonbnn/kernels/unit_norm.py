"""All that a unit's BatchNorm computes per channel: one kernel a direction, in float64 inside.

The passes over images leave partial sums. These kernels add them up and compute what the next pass
needs, by the formulas of :mod:`tritonbnn.ops.norm`. Where processes share statistics, there are
two a direction, with the exchange between them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, distributed

from tritonbnn.contract import Averages, Options, Statistics
from tritonbnn.kernels.config import TileConfig, ceil_div
from tritonbnn.kernels.launch import launch

_TILE = TileConfig(256, 8, 1, 4, 1)
"""Parts and channels of a block: 32 bytes of float32 lie side by side."""

MOST_PARTS = 1024
"""That a program adds up: a convolution may leave 25 times as many, which are joined before."""


@triton.jit
def _total(
    sums_ptr,
    row,
    parts,
    channel,
    known,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One row of sums (parts, ROWS, CHANNELS), added over parts: integers exactly, in float64."""
    WIDE: tl.constexpr = tl.int64 if sums_ptr.dtype.element_ty == tl.int64 else tl.float64
    BLOCK_N: tl.constexpr = channel.shape[1]
    total = tl.zeros((BLOCK_P, BLOCK_N), WIDE)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)[:, None]
        mask = (part < parts) & known
        offset = (part * ROWS + row) * CHANNELS + channel
        total += tl.load(sums_ptr + offset, mask=mask, other=0).to(WIDE)
    return tl.sum(total, axis=0)[None, :].to(tl.float64)


@triton.jit
def _squares(
    sums_ptr,
    parts,
    values,
    channel,
    known,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The sum of squares of sums (parts, 2, CHANNELS), in float64.

    If ROWS is 0, it is the sum of the second row. Else that is each part's about its own mean, of
    ROWS values and in the last part what is left of them all, and the result is about 0. That wide,
    a mean of 1e5 spreads leaves the variance 6 digits.
    """
    if ROWS == 0:
        return _total(sums_ptr, 1, parts, channel, known, 2, CHANNELS, BLOCK_P)
    squares = tl.zeros((BLOCK_P, channel.shape[1]), tl.float64)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)[:, None]
        mask = (part < parts) & known
        place = sums_ptr + part * 2 * CHANNELS + channel
        total = tl.load(place, mask=mask, other=0.0).to(tl.float64)
        rows = tl.maximum(tl.minimum(values - part * ROWS, ROWS), 1).to(tl.float64)
        squares += tl.load(place + CHANNELS, mask=mask, other=0.0).to(tl.float64)
        squares += total * total / rows
    return tl.sum(squares, axis=0)[None, :]


@triton.jit
def _double(ptr, channel, known, other):
    """A vector in float64; ``other`` where there is none."""
    if ptr is None:
        value = tl.full(channel.shape, other, tl.float64)
    else:
        value = tl.load(ptr + channel, mask=known, other=0.0).to(tl.float64)
    return value


@triton.jit
def _store_row(ptr, row: tl.constexpr, channel, known, value, CHANNELS: tl.constexpr):
    tl.store(ptr + row * CHANNELS + channel, value.to(ptr.dtype.element_ty), mask=known)


@triton.jit
def _store_affine(
    vectors_ptr,
    statistics_ptr,
    channel,
    known,
    centre,
    rest,
    variance,
    unbiased,
    share,
    alpha,
    gamma,
    beta,
    CHANNELS: tl.constexpr,
    EPS: tl.constexpr,
):
    """BatchNorm as the passes apply it, the fields of Affine; and the statistics of y.

    Returns the statistics as stored.
    """
    invstd = 1.0 / tl.sqrt(variance + EPS)
    gain = gamma * invstd
    _store_row(vectors_ptr, 0, channel, known, centre, CHANNELS)
    _store_row(vectors_ptr, 1, channel, known, gain * alpha, CHANNELS)
    _store_row(vectors_ptr, 2, channel, known, beta - gain * rest, CHANNELS)
    _store_row(vectors_ptr, 3, channel, known, rest, CHANNELS)
    _store_row(vectors_ptr, 4, channel, known, invstd, CHANNELS)
    _store_row(vectors_ptr, 5, channel, known, share, CHANNELS)
    _store_row(statistics_ptr, 0, channel, known, alpha * centre + rest, CHANNELS)
    _store_row(statistics_ptr, 1, channel, known, unbiased, CHANNELS)


@triton.jit
def _move(average_ptr, towards, step, channel, known):
    """average += step (towards - average)."""
    average = tl.load(average_ptr + channel, mask=known, other=0.0).to(tl.float32)
    moved = average + step * (towards.to(tl.float32) - average)
    tl.debug_barrier()  # a small tensor is loaded by every warp, and stored by one
    tl.store(average_ptr + channel, moved.to(average_ptr.dtype.element_ty), mask=known)


@triton.jit
def _local_sums_kernel(
    sums_ptr,
    pivot_ptr,
    local_ptr,
    parts,
    values,
    share,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """This process's count, sum and sum of squares, about 0, local (splits, 3, CHANNELS) float64.

    sums and pivot as :func:`_batch_norm_kernel` takes them. Axis 1 of the grid is the split, of
    ``share`` parts.
    """
    channel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    known = channel < CHANNELS
    first = tl.program_id(1) * share
    sums_ptr += first.to(tl.int64) * 2 * CHANNELS
    parts = tl.minimum(parts - first, share)
    if ROWS > 0:
        values = tl.minimum(values - first * ROWS, share * ROWS)
    total = _total(sums_ptr, 0, parts, channel, known, 2, CHANNELS, BLOCK_P)
    squares = _squares(sums_ptr, parts, values, channel, known, ROWS, CHANNELS, BLOCK_P)
    count = tl.zeros((1, BLOCK_N), tl.float64) + values
    pivot = _double(pivot_ptr, channel, known, 0.0)
    squares += pivot * (2.0 * total + pivot * count)
    local_ptr += tl.program_id(1) * 3 * CHANNELS
    _store_row(local_ptr, 0, channel, known, count, CHANNELS)
    _store_row(local_ptr, 1, channel, known, total + pivot * count, CHANNELS)
    _store_row(local_ptr, 2, channel, known, squares, CHANNELS)


@triton.jit
def _batch_norm_kernel(
    sums_ptr,
    pivot_ptr,
    alpha_ptr,
    gamma_ptr,
    beta_ptr,
    running_mean_ptr,
    running_variance_ptr,
    counter_ptr,
    vectors_ptr,
    statistics_ptr,
    parts,
    values,
    momentum,
    CHANNELS: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BatchNorm by the batch's statistics, and the running averages moved towards them.

    sums (parts, 2, CHANNELS) int64, of a and a^2; or float32, of a - pivot and its square, pivot
    (CHANNELS,); or float32, as :func:`_squares` takes them with ROWS; or (parts, 3, CHANNELS)
    float64, of splits or of all processes, as :func:`_local_sums_kernel` has them. Vectors
    (CHANNELS,) float; counter int64 of one element; vectors (6, CHANNELS) and statistics
    (2, CHANNELS) float32. Where there are no averages, all three are None.
    """
    channel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    known = channel < CHANNELS
    if sums_ptr.dtype.element_ty == tl.float64:
        count = _total(sums_ptr, 0, parts, channel, known, 3, CHANNELS, BLOCK_P)
        count = tl.maximum(count, 1.0)
        total = _total(sums_ptr, 1, parts, channel, known, 3, CHANNELS, BLOCK_P)
        squares = _total(sums_ptr, 2, parts, channel, known, 3, CHANNELS, BLOCK_P)
    else:
        count = tl.maximum(tl.zeros((1, BLOCK_N), tl.float64) + values, 1.0)
        total = _total(sums_ptr, 0, parts, channel, known, 2, CHANNELS, BLOCK_P)
        squares = _squares(sums_ptr, parts, values, channel, known, ROWS, CHANNELS, BLOCK_P)
    mean = total / count
    spread = tl.maximum(squares / count - mean * mean, 0.0)
    centre = mean + _double(pivot_ptr, channel, known, 0.0)
    alpha = _double(alpha_ptr, channel, known, 1.0)
    variance = alpha * alpha * spread
    unbiased = variance * (count / tl.maximum(count - 1.0, 1.0))
    _store_affine(
        vectors_ptr,
        statistics_ptr,
        channel,
        known,
        centre,
        tl.zeros((1, BLOCK_N), tl.float64),
        variance,
        unbiased,
        1.0 / count,
        alpha,
        _double(gamma_ptr, channel, known, 0.0),
        _double(beta_ptr, channel, known, 0.0),
        CHANNELS,
        EPS,
    )
    if running_mean_ptr is not None:
        _move(running_mean_ptr, alpha * centre, momentum, channel, known)
        _move(running_variance_ptr, unbiased, momentum, channel, known)
    if counter_ptr is not None:
        first = tl.program_id(0) == 0
        batches = tl.load(counter_ptr, mask=first, other=0)
        tl.debug_barrier()
        tl.store(counter_ptr, batches + 1, mask=first)


@triton.jit
def _given_norm_kernel(
    mean_ptr,
    variance_ptr,
    alpha_ptr,
    gamma_ptr,
    beta_ptr,
    vectors_ptr,
    statistics_ptr,
    CHANNELS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BatchNorm by given statistics of y, as in eval mode; tensors as :func:`_batch_norm_kernel`'s.

    The centre is 0: alpha = 0 would leave it undefined.
    """
    channel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    known = channel < CHANNELS
    variance = _double(variance_ptr, channel, known, 0.0)
    zero = tl.zeros((1, BLOCK_N), tl.float64)
    _store_affine(
        vectors_ptr,
        statistics_ptr,
        channel,
        known,
        zero,
        _double(mean_ptr, channel, known, 0.0),
        variance,
        variance,
        zero,
        _double(alpha_ptr, channel, known, 1.0),
        _double(gamma_ptr, channel, known, 0.0),
        _double(beta_ptr, channel, known, 0.0),
        CHANNELS,
        EPS,
    )


@triton.jit
def _norm_grads_kernel(
    sums_ptr,
    shared_ptr,
    vectors_ptr,
    alpha_ptr,
    gamma_ptr,
    grads_ptr,
    coefficients_ptr,
    parts,
    CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradients to a unit's vectors, and that to y as du_scale du + a_scale a + constant.

    sums (parts, 4, CHANNELS) float32, of du, du (a - centre), min(t, 0) grad and grad; grads
    (5, CHANNELS) float32, to gamma, beta, shift_mid, slope and shift_out. coefficients
    (3, CHANNELS) float32 of dy, or None. shared (2, CHANNELS) float32, all processes' first two
    rows of grads: with it sums and grads are None, and only coefficients are computed.
    """
    channel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    known = channel < CHANNELS
    invstd = _double(vectors_ptr + 4 * CHANNELS, channel, known, 0.0)
    scale = invstd * _double(alpha_ptr, channel, known, 1.0)  # xhat per unit of a
    if shared_ptr is not None:
        dgamma = _double(shared_ptr, channel, known, 0.0)
        du_sum = _double(shared_ptr + CHANNELS, channel, known, 0.0)
    else:
        du_sum = _total(sums_ptr, 0, parts, channel, known, 4, CHANNELS, BLOCK_P)
        du_a_sum = _total(sums_ptr, 1, parts, channel, known, 4, CHANNELS, BLOCK_P)
        rest = _double(vectors_ptr + 3 * CHANNELS, channel, known, 0.0)
        dgamma = scale * du_a_sum - invstd * rest * du_sum
        slope = _total(sums_ptr, 2, parts, channel, known, 4, CHANNELS, BLOCK_P)
        shift_out = _total(sums_ptr, 3, parts, channel, known, 4, CHANNELS, BLOCK_P)
        _store_row(grads_ptr, 0, channel, known, dgamma, CHANNELS)
        _store_row(grads_ptr, 1, channel, known, du_sum, CHANNELS)
        _store_row(grads_ptr, 2, channel, known, du_sum, CHANNELS)
        _store_row(grads_ptr, 3, channel, known, slope, CHANNELS)
        _store_row(grads_ptr, 4, channel, known, shift_out, CHANNELS)
    if coefficients_ptr is not None:
        share = _double(vectors_ptr + 5 * CHANNELS, channel, known, 0.0)
        centre = _double(vectors_ptr, channel, known, 0.0)
        du_scale = _double(gamma_ptr, channel, known, 0.0) * invstd
        a_scale = -du_scale * scale * dgamma * share
        constant = -du_scale * du_sum * share - a_scale * centre
        _store_row(coefficients_ptr, 0, channel, known, du_scale, CHANNELS)
        _store_row(coefficients_ptr, 1, channel, known, a_scale, CHANNELS)
        _store_row(coefficients_ptr, 2, channel, known, constant, CHANNELS)


def batch_norm(
    sums: Tensor,
    pivot: Tensor | None,
    values: int,
    alpha: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    options: Options,
    *,
    rows: int = 0,
) -> tuple[Tensor, Tensor]:
    """BatchNorm by the batch's own statistics, over all devices of a group if there is one.

    ``options.averages``, if there are any, move towards them in place.

    Args:
        sums: (parts, 2, O) int64 or float32, as the passes leave them: of values and of squares.
        pivot: (O,), what was subtracted before reals were summed; None for integers.
        values: per channel, of this process.
        alpha: (O,), or None for 1.
        gamma: (O,), BatchNorm's weight.
        beta: (O,), BatchNorm's bias.
        options: of the unit.
        rows: of a part, if its squares are about its own mean; the last part may have fewer.

    Returns:
        The fields of Affine, (6, O) float32; and mean and unbiased variance of y, (2, O) float32.
    """
    channels = sums.shape[2]
    if options.group is not None or (rows and len(sums) > MOST_PARTS):
        sums, pivot, rows = local_sums(sums, pivot, values, rows=rows), None, 0
    if options.group is not None:
        sums = sums if len(sums) == 1 else sums.sum(0, keepdim=True)
        distributed.all_reduce(sums, group=options.group)
    vectors = torch.empty((6, channels), dtype=torch.float32, device=sums.device)
    statistics = torch.empty((2, channels), dtype=torch.float32, device=sums.device)
    averages = options.averages or Averages(None, None, None, 0.0)
    known = bool(values) or options.group is not None
    _launch(
        _batch_norm_kernel,
        channels,
        sums_ptr=sums,
        pivot_ptr=pivot,
        alpha_ptr=alpha,
        gamma_ptr=gamma,
        beta_ptr=beta,
        running_mean_ptr=averages.mean if known else None,
        running_variance_ptr=averages.variance if known else None,
        counter_ptr=averages.counter,
        vectors_ptr=vectors,
        statistics_ptr=statistics,
        parts=len(sums),
        values=values,
        momentum=averages.momentum,
        EPS=options.eps,
        ROWS=rows,
        BLOCK_P=_TILE.block_m,
    )
    return vectors, statistics


def local_sums(sums: Tensor, pivot: Tensor | None, values: int, *, rows: int = 0) -> Tensor:
    """What processes that share statistics add up: count, sum and sum of squares about 0.

    Args:
        sums: as :func:`batch_norm` takes them, as are the others.

    Returns:
        (splits, 3, O) float64, of several splits where a block's sums are many. So wide, moments
        about 0 do the variance no harm.
    """
    parts, _, channels = sums.shape
    share = _TILE.block_m if rows and parts > MOST_PARTS else max(parts, 1)
    splits = max(ceil_div(parts, share), 1)
    local = torch.empty((splits, 3, channels), dtype=torch.float64, device=sums.device)
    _launch(
        _local_sums_kernel,
        channels,
        splits,
        sums_ptr=sums,
        pivot_ptr=pivot,
        local_ptr=local,
        parts=parts,
        values=values,
        share=share,
        ROWS=rows,
        BLOCK_P=_TILE.block_m,
    )
    return local


def given_norm(
    statistics: Statistics, alpha: Tensor | None, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """BatchNorm by given statistics of y, as in eval mode; returns as :func:`batch_norm`."""
    channels = len(gamma)
    vectors = torch.empty((6, channels), dtype=torch.float32, device=gamma.device)
    copied = torch.empty((2, channels), dtype=torch.float32, device=gamma.device)
    _launch(
        _given_norm_kernel,
        channels,
        mean_ptr=statistics.mean,
        variance_ptr=statistics.variance,
        alpha_ptr=alpha,
        gamma_ptr=gamma,
        beta_ptr=beta,
        vectors_ptr=vectors,
        statistics_ptr=copied,
        EPS=eps,
    )
    return vectors, copied


def norm_grads(
    sums: Tensor,
    vectors: Tensor,
    alpha: Tensor | None,
    gamma: Tensor,
    group: distributed.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """The gradients to a unit's vectors, and the coefficients of that to y.

    Args:
        sums: (parts, 4, O) float32, as the pass through the activation leaves them.
        vectors: (6, O), of the forward pass.
        alpha: (O,), or None for 1.
        gamma: (O,).
        group: whose devices share statistics, or None.

    Returns:
        Gradients to gamma, beta, shift_mid, slope and shift_out, (5, O), from this process's
        values; and du_scale, a_scale and constant, (3, O).
    """
    parts, _, channels = sums.shape
    grads = torch.empty((5, channels), dtype=torch.float32, device=sums.device)
    coefficients = torch.empty((3, channels), dtype=torch.float32, device=sums.device)
    alike: dict[str, Any] = {"vectors_ptr": vectors, "alpha_ptr": alpha, "gamma_ptr": gamma}
    alike["BLOCK_P"] = _TILE.block_m
    own: dict[str, Any] = {"sums_ptr": sums, "shared_ptr": None, "grads_ptr": grads, "parts": parts}
    if group is None:
        _launch(_norm_grads_kernel, channels, **own, **alike, coefficients_ptr=coefficients)
        return grads, coefficients
    _launch(_norm_grads_kernel, channels, **own, **alike, coefficients_ptr=None)
    shared = grads[:2].clone()
    distributed.all_reduce(shared, group=group)
    others: dict[str, Any] = {"sums_ptr": None, "shared_ptr": shared, "grads_ptr": None, "parts": 0}
    _launch(_norm_grads_kernel, channels, **others, **alike, coefficients_ptr=coefficients)
    return grads, coefficients


def _launch(kernel: Any, channels: int, splits: int = 1, **arguments: Any) -> None:
    grid = ceil_div(channels, _TILE.block_n), splits
    launch(kernel, grid, _TILE, CHANNELS=channels, BLOCK_N=_TILE.block_n, **arguments)
