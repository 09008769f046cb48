"""Time of a training step by family, from torch's profiler."""

from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.families import ELEMENTWISE, kernel_family, operator_family
from benchmarks.rounds import wait
from benchmarks.steps import Step
from benchmarks.traffic import through_dispatcher


def time_by_family(step: Step, device: torch.device) -> dict[str, float]:
    """Milliseconds of one step by family: of kernels on a GPU, of operators on a CPU.

    Args:
        step: has run before, so that nothing is compiled or tuned now.
        device: where it runs.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with through_dispatcher():
        step()
        wait(device)
        with profile(activities=activities, record_shapes=True, acc_events=True) as record:
            step()
            wait(device)
    total: Counter[str] = Counter()
    for event in record.events():
        if device.type == "cuda":
            for kernel in event.kernels:
                total[_family(event) or kernel_family(kernel.name)] += kernel.duration
        elif event.self_cpu_time_total:
            total[_family(event) or ELEMENTWISE] += event.self_cpu_time_total
    return {family: us / 1e3 for family, us in total.items()}


def _family(event: Any) -> str | None:
    """That of the outermost operator around an event that has one: a launcher is one, whatever
    it calls."""
    family = None
    while event is not None:
        family = operator_family(event.name, event.input_shapes or ()) or family
        event = event.cpu_parent
    return family
