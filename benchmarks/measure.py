"""All that is measured of the rivals at one batch size and resolution."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import capacity, profiled, rounds
from benchmarks.rivals import Rival
from benchmarks.saved import saved_slope
from benchmarks.steps import CLASSES, Step, does_not_train, training_step
from benchmarks.traffic import counted_bytes

SLOPE_BATCHES = (2, 3)
"""A single image of 32 x 32 would have one value per channel at last, and no variance."""


@dataclass(frozen=True)
class Point:
    """What a training step works on.

    Attributes:
        model: a network's name.
        step: of the schedule.
        batch: images.
        size: their height and width.
        width: multiplies all channels.
        device: where.
    """

    model: str
    step: int
    batch: int
    size: int
    width: float
    device: torch.device

    def build(self, rival: Rival) -> nn.Module:
        """A rival's network, the same weights every time."""
        torch.manual_seed(0)
        return rival.build(self.model, self.step, self.width, CLASSES)

    def step_of(self, rival: Rival, batch: int) -> Step:
        """A rival's training step on a fixed batch of its own."""
        model = self.build(rival).to(self.device).to(memory_format=rival.memory_format)
        images, labels = self.images(rival, batch), torch.arange(batch) % CLASSES
        options = {"bf16": rival.bf16, "mode": rival.mode}
        return training_step(model, images, labels.to(self.device), **options)

    def images(self, rival: Rival, batch: int) -> Tensor:
        """Random images, in the rival's memory layout."""
        shape = (batch, 3, self.size, self.size)
        generator = torch.Generator().manual_seed(batch)
        images = torch.randn(shape, generator=generator).to(self.device)
        return images.to(memory_format=rival.memory_format)


def trial(point: Point, rival: Rival) -> tuple[Step | None, dict[str, Any]]:
    """A rival alone: whether it fits and trains, and the peak of its memory.

    Returns:
        Its step, or None if it is not to be timed, and what to report of it.
    """
    cuda = point.device.type == "cuda"
    made: list[Step] = []
    facts: dict[str, Any] = {}

    def attempt() -> None:
        step = point.step_of(rival, point.batch)
        if reason := does_not_train(step):
            facts["does_not_train"] = reason
        else:
            made.append(step)

    if cuda:
        capacity.release()
        before = torch.cuda.memory_allocated(point.device)
    try:
        if not capacity.fits(attempt):
            facts = _out_of_memory(point, rival)
    except RuntimeError as error:  # most often a compiler's
        facts["failed"] = str(error).strip().splitlines()[0][:200]
    if made and cuda:  # of a step like all others: a first one tunes, and takes more
        torch.cuda.reset_peak_memory_stats(point.device)
        made[0]()
        peak = torch.cuda.max_memory_allocated(point.device) - before
        facts["peak_mb"] = round(peak / 1e6, 1)
    return (made[0] if made else None), facts


def _out_of_memory(point: Point, rival: Rival) -> dict[str, Any]:
    def attempt(batch: int) -> None:
        step = point.step_of(rival, batch)
        step()
        step()  # the optimizer's state is there from the first one on

    return {
        "out_of_memory": True,
        "largest_batch": capacity.largest_fitting(attempt, point.batch),
    }


def measure(
    point: Point,
    rivals: dict[str, Rival],
    *,
    turns: int,
    count: int,
    details: bool,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """A row for each rival.

    Args:
        point: what they work on.
        rivals: by name.
        turns: of each.
        count: steps of a turn.
        details: count saved bytes and traffic too, and profile a step.
        say: takes a word on progress.
    """
    steps, rows = {}, {}
    for name, rival in rivals.items():
        say(f"{name}: does it train?")
        step, rows[name] = trial(point, rival)
        if step:
            steps[name] = step
    say(f"timing {turns} rounds of {count} steps")
    times = rounds.interleaved(steps, turns, count, point.device)
    for name, rival in rivals.items():
        if name not in times:  # beside what the others keep
            if steps.pop(name, None):
                rows[name] = _out_of_memory(point, rival)
            continue
        row = rows[name] | rounds.summary(times[name])
        row["images_per_second"] = round(point.batch / row["median_seconds"], 2)
        if details:
            say(f"{name}: a profile")
            row["time_ms"] = _rounded(profiled.time_by_family(steps[name], point.device))
            if rival.mode is None:
                row |= _counted(point, rival)
        rows[name] = row
    return rows


def has_failed(row: dict[str, Any]) -> bool:
    """Whether a rival should have been timed and was not; too large a batch is no failure."""
    return "failed" in row or "does_not_train" in row


def trouble(row: dict[str, Any]) -> str:
    """Why a rival was not timed."""
    if row.get("out_of_memory"):
        return f"out of memory; batch {row['largest_batch']} fits"
    return row.get("does_not_train") or f"failed: {row['failed']}"


def _counted(point: Point, rival: Rival) -> dict[str, Any]:
    """What needs no clock: bytes saved for backward, and bytes moved."""
    model = point.build(rival).to(point.device).to(memory_format=rival.memory_format)
    forward = _Autocast(model, point.device.type) if rival.bf16 else model
    saved = saved_slope(forward, lambda batch: point.images(rival, batch), SLOPE_BATCHES)
    moved = counted_bytes(
        lambda: point.build(rival), point.batch, point.size, bf16=rival.bf16, device=point.device
    )
    return {
        "saved_mb_per_image": round(saved.per_image, 2),
        "saved_mb_per_batch": round(saved.per_batch, 2),
        "moved_mb": _rounded({family: count / 1e6 for family, count in moved.items()}),
    }


class _Autocast(nn.Module):
    """A network under bf16 autocast."""

    def __init__(self, network: nn.Module, device_type: str) -> None:
        super().__init__()
        self.network, self.device_type = network, device_type

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device_type, torch.bfloat16):
            return self.network(x)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}
