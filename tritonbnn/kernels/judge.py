"""Check a choice for a problem, then time it."""

from typing import Protocol

import torch
from torch import Tensor
from triton.errors import TritonError
from triton.runtime import OutOfResources

from tritonbnn.kernels import config
from tritonbnn.kernels.config import Choice, Table
from tritonbnn.kernels.problems import Problem
from tritonbnn.kernels.problems.problem import Tensors
from tritonbnn.kernels.targets import target_of
from tritonbnn.kernels.timing import time_callable
from tritonbnn.kernels.truth import error_of

CHECK_BATCH = 2
"""Images that a choice is compared with the truth on, which float64 takes long to find."""

NEAR = 1 / 64
"""How far reals of the whole batch may be from the first choice's, relative in the norm."""

RUNS = 30


class UnfitError(Exception):
    """A choice that is wrong or cannot run. The message is one line, or empty if that is usual."""


class Judges(Protocol):
    """Who checks and times choices, here or elsewhere."""

    device: torch.device

    def begin(self, problem: Problem, table: Table) -> None:
        """Take a problem up; the table is what launchers inside a whole unit run as.

        Raises:
            UnfitError: its operands do not fit into memory.
        """

    def time(self, choice: Choice) -> float:
        """How many microseconds the problem takes as ``choice``.

        Raises:
            UnfitError: it is wrong or cannot run.
        """


class Judge:
    """Checks and times choices in this process.

    A choice is checked on a few images against the truth. On all that are timed, where the compiler
    may know more of the sizes, it must have the integers of the first choice that was right, and
    reals near its reals.

    Args:
        device: where.
        runs: timed runs.
    """

    def __init__(self, device: torch.device, runs: int = RUNS) -> None:
        self.device, self._runs = device, runs

    def begin(self, problem: Problem, table: Table) -> None:
        self._problem, self._table = problem, table
        self._small = problem.with_batch(min(CHECK_BATCH, problem.layer.batch))
        self._usual: tuple[Tensor, ...] | None = None
        self._inputs: Tensors = {}  # the problem before gives its memory back
        try:
            self._small_inputs = self._small.inputs(self.device)
            self._inputs = problem.inputs(self.device)
        except torch.OutOfMemoryError as error:
            raise UnfitError(f"its operands do not fit: {first_line(error)}") from error

    def time(self, choice: Choice) -> float:
        table = {**self._table, self._problem.key.bucketed(): choice}
        with config.using(table, target_of(self.device)):
            try:
                wrong = self._wrong()
                if wrong:
                    raise UnfitError(f"is wrong: {wrong}")
                return time_callable(self._run, self.device, runs=self._runs).p50
            except OutOfResources as error:
                raise UnfitError from error  # the count that pruned it was too kind
            except (TritonError, RuntimeError) as error:  # a compiler's, or the device's
                raise UnfitError(f"cannot run: {first_line(error)}") from error

    def _run(self) -> tuple[Tensor, ...]:
        return self._problem.run(self._inputs)

    def _wrong(self) -> str:
        """Why the choice in force is wrong; "" if it is not."""
        found = self._small.run(self._small_inputs)
        wrong = error_of(self._small, self._small_inputs, found)
        results = self._run()
        if self._usual is None and not wrong:
            self._usual = results
        return wrong or difference(results, self._usual or results)


def difference(results: tuple[Tensor, ...], usual: tuple[Tensor, ...]) -> str:
    """Why results are not those of the first choice; "" if they are."""
    for result, expected in zip(results, usual, strict=True):
        if not result.is_floating_point():
            count = int((result != expected).sum())
            if count:
                return f"{count} integers are not the default's"
            continue
        allowed = NEAR * expected.float().norm()
        if not (result.float() - expected.float()).norm() <= allowed:  # a NaN is wrong too
            return "its reals are not near the default's"
    return ""


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or repr(error)).splitlines()[0]
