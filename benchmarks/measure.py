"""All that is measured of the rivals at one batch size and resolution."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from statistics import median
from typing import Any, TypeVar

import torch

from benchmarks import rounds
from benchmarks.point import Point
from benchmarks.rivals import Rival
from benchmarks.rounds import Turn
from benchmarks.runner import RivalError, Runner
from benchmarks.worker import Worker

Say = Callable[[str], None]
T = TypeVar("T")


def own_processes(device: torch.device) -> bool:
    """Whether each rival has a process of its own.

    On a GPU they share one: each process there would take memory for its context, and CUDA's
    allocator keeps what is freed.
    """
    return device.type == "cpu"


def measure(
    point: Point, rivals: dict[str, Rival], *, turns: int, count: int, details: bool, say: Say
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
    own = own_processes(point.device)
    make = Worker if own else Runner
    taken: dict[str, list[Turn]] = {name: [] for name in rivals}
    with ExitStack() as stack:
        field = _Field(say)
        for name, rival in rivals.items():
            field.enter(name, stack.enter_context(closing(make(point, rival))))
        for name, facts in field.each("does it train?", lambda runner: runner.trial()):
            field.rows[name] |= facts
        say(f"timing {turns} rounds of {count} steps")
        for _ in range(turns):
            for name, turn in field.each("", lambda runner: runner.turn(count)):
                taken[name].append(turn)
        for name in field.runners:
            row = rounds.summary([turn.seconds for turn in taken[name]])
            row["images_per_second"] = round(point.batch / row["median_seconds"], 2)
            if own:
                cpu_seconds = median(turn.cpu_seconds for turn in taken[name])
                row["cpu_seconds"] = round(cpu_seconds, 6)
                row["page_faults"] = round(median(turn.page_faults for turn in taken[name]))
            field.rows[name] |= row
        if details:
            for name, facts in field.each("a profile", lambda runner: runner.details()):
                field.rows[name] |= facts
    return field.rows


class _Field:
    """The rivals still to be measured, and the rows of all.

    Args:
        say: takes a word on progress.
    """

    def __init__(self, say: Say) -> None:
        self.say = say
        self.runners: dict[str, Runner | Worker] = {}
        self.rows: dict[str, dict[str, Any]] = {}

    def enter(self, name: str, runner: Runner | Worker) -> None:
        """One more."""
        self.runners[name], self.rows[name] = runner, {}

    def each(self, word: str, ask: Callable[[Runner | Worker], T]) -> Iterator[tuple[str, T]]:
        """Answers of one after the other; one that has none says why in its row, and leaves.

        Args:
            word: on progress, if any.
            ask: what.
        """
        for name, runner in list(self.runners.items()):
            if word:
                self.say(f"{name}: {word}")
            try:
                yield name, ask(runner)
            except RivalError as error:
                self.rows[name] |= error.facts
                self.runners.pop(name).close()


def has_failed(row: dict[str, Any]) -> bool:
    """Whether a rival should have been timed and was not; too large a batch is no failure."""
    return "failed" in row or "does_not_train" in row


def trouble(row: dict[str, Any]) -> str:
    """Why a rival was not timed."""
    if row.get("out_of_memory"):
        return f"out of memory; batch {row['largest_batch']} fits"
    return row.get("does_not_train") or f"failed: {row['failed']}"
