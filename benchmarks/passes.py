"""A CPU's training step by pass of the C functions, each beside the least time that it could take.

A pass takes as long at least as copying the bytes that it reads and writes, and as long as its
products take where they are fastest. Both are measured in the same run, with the same threads.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.steps import Step
from tritonbnn.native import clock, library
from tritonbnn.native.clock import Taken
from tritonbnn.native.common import TYPES
from tritonbnn.native.conv import geometry

STEPS = 3
RUNS = 20
COPIED = 2**25
"""Floats of a large copy: 128 MiB, more than caches hold."""

TABLE_TIMES = 2000
"""Rounds of the loop over tables in a run: milliseconds."""

REST = "rest of the step"
"""Torch's stem, head and optimizer, and Python."""


@dataclass(frozen=True)
class Roofs:
    """What all threads do together at most.

    Attributes:
        copy_gbs: 1e9 bytes read and written a second by a large copy.
        table_gops: 1e9 products a second by table, with all tables in the first cache.
        bit_gops: 1e9 products a second by counting bits, with the operands in the first cache.
    """

    copy_gbs: float
    table_gops: float
    bit_gops: float

    def nanoseconds(self, taken: Taken) -> float:
        """The least that the calls of a pass could take together."""
        products = taken.table_products / self.table_gops + taken.bit_products / self.bit_gops
        return max(taken.bytes / self.copy_gbs, products)


def measure_roofs() -> Roofs:
    """Seconds."""
    return Roofs(
        copy_gbs=round(_copy_rate() / 1e9, 2),
        table_gops=round(_table_rate() / 1e9, 1),
        bit_gops=round(_bit_rate() / 1e9, 1),
    )


def _copy_rate() -> float:
    """Bytes read and written a second."""
    source = torch.ones(COPIED)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source))


def _table_rate() -> float:
    """Products a second by table."""
    products, result = torch.empty(1, dtype=torch.int64), torch.empty(1)
    seconds = _fastest(lambda: library.call("table_peak", TABLE_TIMES, products, result))
    return products.item() / seconds


def _bit_rate() -> float:
    """Products a second of a convolution by counting bits.

    It has many channels to add up, and a block of the weight and a row of the input fit the first
    cache together.
    """
    shape = geometry((8, 32, 32), 4096, 64, 1, 1, 0)
    words = shape.channels // 32
    signs = torch.randint(-(2**31), 2**31, (8, 32, 32, words), dtype=torch.int32)
    weight = torch.randint(-(2**31), 2**31, (64, 1, 1, words), dtype=torch.int32)
    result = torch.empty(shape.output_shape, dtype=torch.int16)
    operands = (signs, weight, None, result, TYPES[torch.int16], None, None, shape)
    seconds = _fastest(lambda: library.call("conv_packed", *operands))
    return result.numel() * shape.channels / seconds


def _fastest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def time_by_pass(step: Step) -> dict[str, Any]:
    """Thread-milliseconds of one step: wall time times the threads, which all passes use.

    Args:
        step: has run before, on the CPU.

    Returns:
        "passes", by name "thread_ms" and "bound_ms", and the rest of the step with "thread_ms"
        alone; and the "roofs" that the bounds are from. Nothing for a step whose units do not run
        as a whole in C.
    """
    steps = sorted((_clocked(step) for _ in range(STEPS)), key=lambda clocked: clocked[0])
    nanoseconds, taken = steps[STEPS // 2]
    if not taken:
        return {}
    roofs, threads = measure_roofs(), torch.get_num_threads()
    passes = {
        name: {
            "thread_ms": _thread_ms(what.nanoseconds, threads),
            "bound_ms": _thread_ms(roofs.nanoseconds(what), threads),
        }
        for name, what in taken.items()
    }
    rest = nanoseconds - sum(what.nanoseconds for what in taken.values())
    passes[REST] = {"thread_ms": _thread_ms(rest, threads)}
    return {"passes": passes, "roofs": asdict(roofs)}


def _clocked(step: Step) -> tuple[int, dict[str, Taken]]:
    """Nanoseconds of a step, and of its passes."""
    start = time.perf_counter_ns()
    with clock.running() as taken:
        step()
    return time.perf_counter_ns() - start, taken


def _thread_ms(nanoseconds: float, threads: int) -> float:
    return round(nanoseconds * threads / 1e6, 3)


def describe(row: dict[str, Any]) -> list[str]:
    """A line for each pass, and one for the roofs; none where passes were not timed."""
    passes = row.get("passes")
    if not passes:
        return []
    lines = []
    for name, pass_ in passes.items():
        bound = pass_.get("bound_ms")
        share = f", bound {bound:8.1f} ({bound / pass_['thread_ms']:.0%})" if bound else ""
        lines.append(f"{name:32} {pass_['thread_ms']:8.1f} thread-ms{share}")
    roofs = ", ".join(f"{name} {value:g}" for name, value in row["roofs"].items())
    return [*lines, f"bounds by {roofs}"]
