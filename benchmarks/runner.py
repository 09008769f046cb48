"""One rival in training in this process, and all that is measured of it."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks import capacity, passes, profiled, rounds
from benchmarks.point import Point
from benchmarks.rivals import OWN, Rival
from benchmarks.rounds import Turn
from benchmarks.saved import saved_slope
from benchmarks.steps import Step, does_not_train
from benchmarks.traffic import counted_bytes
from tritonbnn.cli import UserError

SLOPE_BATCHES = (2, 3)
"""A single image of 32 x 32 would have one value per channel at last, and no variance."""

PARTITIONED = "aot_eager_decomp_partition"
"""torch.compile without making code: what a compiled network saves is decided before that."""

T = TypeVar("T")


class RivalError(Exception):
    """A rival cannot be measured.

    Args:
        facts: what its row says of it: "does_not_train" or "failed", and why; or "out_of_memory",
            and the "largest_batch" that fits.
    """

    def __init__(self, facts: dict[str, Any]) -> None:
        super().__init__(facts)
        self.facts = facts


class Runner:
    """A rival's training step. What it is asked raises :class:`RivalError` if it cannot be done.

    Args:
        point: what it works on.
        rival: whose step.
    """

    def __init__(self, point: Point, rival: Rival) -> None:
        self.point, self.rival = point, rival
        self._step: Step | None = None

    def trial(self) -> dict[str, Any]:
        """See that the rival fits and trains; on a GPU, the peak of its memory."""
        capacity.release()
        cuda = self.point.device.type == "cuda"
        before = torch.cuda.memory_allocated(self.point.device) if cuda else 0
        self._step = self._attempt(lambda: self.point.step_of(self.rival, self.point.batch))
        if reason := self._attempt(lambda: does_not_train(self._step)):
            raise RivalError({"does_not_train": reason})
        if not cuda:
            return {}
        # of a step like all others: a first one tunes, and takes more
        torch.cuda.reset_peak_memory_stats(self.point.device)
        self._attempt(self._step)
        peak = torch.cuda.max_memory_allocated(self.point.device) - before
        return {"peak_mb": round(peak / 1e6, 1)}

    def turn(self, count: int) -> Turn:
        """Time ``count`` steps in a row."""
        return self._attempt(lambda: rounds.turn(self._step, count, self.point.device))

    def details(self) -> dict[str, Any]:
        """What the step spends its time on, the bytes that it saves for backward and moves."""
        return self._attempt(self._details)

    def close(self) -> None:
        """Let go of all memory."""
        self._step = None

    def _attempt(self, call: Callable[[], T]) -> T:
        answers: list[T] = []
        try:
            if capacity.fits(lambda: answers.append(call())):
                return answers[0]
            facts = self._out_of_memory()
        # a compiler's, of a size that it refuses, or of a step that cannot be captured
        except (RuntimeError, ValueError, UserError) as error:
            said = str(error).strip() or repr(error)
            facts = {"failed": said.splitlines()[0][:200]}
        raise RivalError(facts)

    def _out_of_memory(self) -> dict[str, Any]:
        self.close()
        capacity.release()

        def attempt(batch: int) -> None:
            step = self.point.step_of(self.rival, batch)
            step()
            step()  # the optimizer's state is there from the first one on

        return {
            "out_of_memory": True,
            "largest_batch": capacity.largest_fitting(attempt, self.point.batch),
        }

    def _details(self) -> dict[str, Any]:
        times = profiled.time_by_family(self._step, self.point.device)
        moved = {} if self.rival.mode else self._moved()  # compiled operators are the compiler's
        own = self.rival.network in OWN and self.point.device.type == "cpu"
        by_pass = passes.time_by_pass(self._step) if own else {}
        return {"time_ms": _rounded(times), **by_pass, **self._saved(), **moved}

    def _saved(self) -> dict[str, Any]:
        """What autograd keeps for backward."""
        point, rival = self.point, self.rival
        model = point.build(rival).to(point.device).to(memory_format=rival.memory_format)
        forward = _Autocast(model, point.device.type) if rival.bf16 else model
        if rival.mode:
            forward = torch.compile(forward, backend=PARTITIONED, dynamic=False)
        saved = saved_slope(forward, lambda batch: point.images(rival, batch), SLOPE_BATCHES)
        return {
            "saved_mb_per_image": round(saved.per_image, 2),
            "saved_mb_per_batch": round(saved.per_batch, 2),
        }

    def _moved(self) -> dict[str, Any]:
        """What the operators read and write."""
        point, rival = self.point, self.rival
        moved = counted_bytes(
            lambda: point.build(rival),
            point.batch,
            point.size,
            bf16=rival.bf16,
            device=point.device,
            in_channels=point.in_channels,
        )
        return {
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
