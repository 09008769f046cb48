"""The clock: seconds, CPU time and page faults of steps, and what the turns of all rounds say."""

import resource
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]


def wait(device: torch.device) -> None:
    """Until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Call, count: int, device: torch.device) -> float:
    """Seconds of one of ``count`` calls in a row, from an idle device to an idle device."""
    wait(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    wait(device)
    return (time.perf_counter() - start) / count


class Turn(NamedTuple):
    """What a step of a turn took.

    Attributes:
        seconds: by the clock on the wall.
        cpu_seconds: that all threads of the process worked or waited busily, added up.
        page_faults: minor ones of the whole process: pages that it got from the system.
    """

    seconds: float
    cpu_seconds: float
    page_faults: float


def turn(call: Call, count: int, device: torch.device) -> Turn:
    """``count`` calls in a row.

    One untimed call goes before them: caches and the allocator are then as its own run leaves them,
    not its predecessor's.
    """
    call()
    faults, worked = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
    took = seconds(call, count, device)
    worked = time.process_time() - worked
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return Turn(took, worked / count, faults / count)


def summary(times: list[float]) -> dict[str, Any]:
    """The rounds, their median, and their spread: (slowest - fastest) / median."""
    middle = median(times)
    return {
        "seconds": [round(t, 6) for t in times],
        "median_seconds": round(middle, 6),
        "spread": round((max(times) - min(times)) / middle, 4),
    }
