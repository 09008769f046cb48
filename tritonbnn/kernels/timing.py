"""The one way a callable is timed."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

L2_FLUSH_BYTES = 256 * 2**20
"""Larger than any L2 so far, so that no run finds its operands cached by the one before."""

_SPIN_CYCLES = 2_000_000
"""About a millisecond in which the device waits: Python has queued the whole run by then, and its
own time is not measured."""


@dataclass(frozen=True)
class Timing:
    """Percentiles of the runs, in microseconds."""

    p20: float
    p50: float
    p80: float


def time_callable(
    call: Callable[[], Any], device: torch.device, *, runs: int = 50, warmup: int = 5
) -> Timing:
    """Time a callable: CUDA events with the L2 cache flushed before every run, or the CPU's clock.

    Args:
        call: what to time. It must not depend on what an earlier call left behind.
        device: where it runs.
        runs: timed runs.
        warmup: untimed runs before, which compile and allocate.
    """
    for _ in range(warmup):
        call()
    elapsed = _cuda_events if device.type == "cuda" else _clock
    return percentiles(elapsed(call, device, runs))


def percentiles(microseconds: list[float]) -> Timing:
    """The 20th, 50th and 80th percentile of at least one value."""
    if len(microseconds) == 1:
        return Timing(*microseconds * 3)
    fifths = statistics.quantiles(microseconds, n=5, method="inclusive")
    return Timing(fifths[0], statistics.median(microseconds), fifths[3])


def _cuda_events(call: Callable[[], Any], device: torch.device, runs: int) -> list[float]:
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)
    events = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(_SPIN_CYCLES)
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def _clock(call: Callable[[], Any], device: torch.device, runs: int) -> list[float]:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a large copy: the roof over every elementwise kernel."""
    shape = (2**30 if device.type == "cuda" else 2**27,)
    source = torch.randint(-128, 128, shape, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timing = time_callable(lambda: target.copy_(source), device, runs=20)
    return 2 * source.nbytes / (timing.p50 * 1e-6)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product in ``dtype``: the roof over every GEMM.

    Of random operands, because a GPU that multiplies zeros draws less power and clocks higher;
    int8 ones are signs, with int32 sums.
    """
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device)
    if dtype == torch.int8:
        a = a.sign()
    a = a.to(dtype)
    b = a.t().contiguous().t()  # int8 wants its second operand by columns
    product = torch._int_mm if dtype == torch.int8 else torch.mm
    timing = time_callable(lambda: product(a, b), device, runs=20)
    return 2 * size**3 / (timing.p50 * 1e-6)
