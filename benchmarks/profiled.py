"""Time of a training step by family, from torch's profiler, and from the clock within C."""

from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.families import ELEMENTWISE, PASSES, kernel_family, operator_family
from benchmarks.rounds import wait
from benchmarks.steps import Step
from tritonbnn.native import clock
from tritonbnn.ops.library import through_dispatcher

PROFILES = 3


def time_by_family(step: Step, device: torch.device) -> dict[str, float]:
    """Milliseconds of one step by family: of kernels on a GPU, of operators on a CPU.

    Launchers are called as operators, so that the profiler sees them. Units that run as a whole in
    C are left as they run: the profiler sees one Function, and the clock within C its passes.

    Args:
        step: has run before, so that nothing is compiled or tuned now.
        device: where it runs.

    Returns:
        The median of each family over some steps: a first profile may load and start things.
    """
    with nullcontext() if _runs_whole_units(step, device) else through_dispatcher():
        step()
        steps = [_microseconds(step, device) for _ in range(PROFILES)]
    return {family: median(us[family] for us in steps) / 1e3 for family in steps[0]}


def _runs_whole_units(step: Step, device: torch.device) -> bool:
    if device.type != "cpu":
        return False
    with clock.running() as passes:
        step()
    return bool(passes)


def _microseconds(step: Step, device: torch.device) -> Counter[str]:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    clocked = nullcontext({}) if device.type == "cuda" else clock.running()
    wait(device)
    options = {"activities": activities, "record_shapes": True, "acc_events": True}
    with clocked as passes, profile(**options) as record:
        step()
        wait(device)
    times = _kernel_times if device.type == "cuda" else _operator_times
    total = times(record.events())
    for name, taken in passes.items():  # the profiler has them in the time of their Function
        total[ELEMENTWISE] -= taken.nanoseconds / 1e3
        total[PASSES.get(name, ELEMENTWISE)] += taken.nanoseconds / 1e3
    return total


def _operator_times(events: Iterable[FunctionEvent]) -> Counter[str]:
    total: Counter[str] = Counter()
    for event in events:
        if event.self_cpu_time_total:
            total[_family(event) or ELEMENTWISE] += event.self_cpu_time_total
    return total


def _kernel_times(events: Iterable[FunctionEvent]) -> Counter[str]:
    """By the operators that launched them; kernels that none is known of, by their names."""
    rest: Counter[str] = Counter()
    for event in events:  # annotations are drawn on the device's timeline, but are no kernels
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            rest[event.name] += event.time_range.elapsed_us()
    total: Counter[str] = Counter()
    for event in events:
        for kernel in event.kernels:
            if kernel.name in rest:
                total[_family(event) or kernel_family(kernel.name)] += kernel.duration
                rest[kernel.name] -= kernel.duration
    for name, us in rest.items():
        total[kernel_family(name)] += max(us, 0)
    return total


def _family(event: FunctionEvent | None) -> str | None:
    """That of the outermost operator around an event that has one: a launcher is one, whatever
    it calls."""
    family = None
    while event is not None:
        family = operator_family(event.name, event.input_shapes or ()) or family
        event = event.cpu_parent
    return family
