"""Timing in rounds: every rival in turn, so that a change in the machine's load hits all."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks import capacity

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


def interleaved(
    calls: dict[str, Call], rounds: int, count: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each call in each round; a call that runs out of memory is left out.

    Args:
        calls: by name. Each runs once untimed at the start of its turn: caches and the allocator
            are then as its own run leaves them, not its predecessor's.
        rounds: how often each has its turn.
        count: calls of a turn.
        device: where they run.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}

    def take_turn(name: str) -> None:
        calls[name]()
        times[name].append(seconds(calls[name], count, device))

    for _ in range(rounds):
        for name in calls:
            if name in times and not capacity.fits(partial(take_turn, name)):
                del times[name]
    return times


def summary(times: list[float]) -> dict[str, Any]:
    """The rounds, their median, and their spread: (slowest - fastest) / median."""
    middle = median(times)
    return {
        "seconds": [round(t, 6) for t in times],
        "median_seconds": round(middle, 6),
        "spread": round((max(times) - min(times)) / middle, 4),
    }
