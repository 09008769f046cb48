"""Judge choices in a process of its own, which a choice may kill or hang.

A kernel that faults takes its process's memory of the GPU with it, and one without an end never
gives the GPU back. So the tuner's choices run in a child. What ends it is that choice's verdict
alone: the next choice gets a new child.
"""

import subprocess
import sys
import tempfile
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import torch

from tritonbnn.kernels import verdicts
from tritonbnn.kernels.config import Choice, Table
from tritonbnn.kernels.judge import RUNS, Judge, UnfitError
from tritonbnn.kernels.problems import Problem

MODULE = "tritonbnn.kernels.apart"
START_SECONDS = 300
"""After which a child is ended that has not begun a problem: it may import, compile and find the
truth meanwhile."""

SECONDS = 120
"""After which it is ended if a choice still runs. Its kernels are compiled in that time too."""

GRACE_SECONDS = 10
"""For a child to end that answers no more."""


class ChildError(Exception):
    """The child is no more. The message is one line that says how it ended."""


class JudgeApart:
    """A judge in a child: use it in a ``with`` block, at whose end the child is gone.

    Args:
        device: where.
        runs: timed runs.
    """

    def __init__(self, device: torch.device, runs: int = RUNS) -> None:
        self.device, self._runs = device, runs
        self._child: subprocess.Popen | None = None
        self._pipe: Connection
        self._said: Any = None
        self._right: Choice | None = None

    def __enter__(self) -> "JudgeApart":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def begin(self, problem: Problem, table: Table) -> None:
        self._problem, self._table, self._right = problem, table, None
        try:
            self._begin_there()
        except ChildError as error:
            raise UnfitError(str(error)) from error

    def time(self, choice: Choice) -> float:
        try:
            if self._child is None:
                self._begin_there()
            seconds = self._ask(choice, SECONDS)
        except ChildError as error:
            raise UnfitError(f"cannot run: {error}") from error
        self._right = self._right or choice
        return seconds

    def _begin_there(self) -> None:
        """Have the child take the problem up; a new one looks at what was right before first."""
        if self._child is None:
            self._start()
        self._ask((self._problem, self._table), START_SECONDS)
        if self._right is not None:
            self._ask(self._right, START_SECONDS)

    def _start(self) -> None:
        self._pipe, there = Pipe()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  it is closed at the child's end
        command = [sys.executable, "-m", MODULE, str(there.fileno())]
        self._child = subprocess.Popen(
            [*command, str(self.device), str(self._runs)],
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=subprocess.STDOUT,
        )
        there.close()  # so that a child's end is the end of the pipe

    def _ask(self, question: Any, seconds: float) -> Any:
        """The child's answer.

        Raises:
            UnfitError: as the child's judge does.
            ChildError: the child has ended, or did not answer in time.
        """
        try:
            self._pipe.send(question)
            if not self._pipe.poll(seconds):
                self._end()
                raise ChildError(f"it did not end in {seconds:g} s")
            answer, goes_on = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ChildError(self._how_it_ended()) from error
        if not goes_on:
            self._end()
        if isinstance(answer, UnfitError):
            raise answer
        return answer

    def _how_it_ended(self) -> str:
        assert self._child is not None
        try:
            code = self._child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:  # it hangs on its way out
            self._child.kill()
            code = self._child.wait()
        said = self._said
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
        self._end()
        how = f"signal {-code}" if code < 0 else f"code {code}"
        return f"its process ended with {how}" + (f": {lines[-1][:200]}" if lines else "")

    def _end(self) -> None:
        if self._child is None:
            return
        self._child.kill()
        self._child.wait()
        self._pipe.close()
        self._said.close()
        self._child = None


def serve(pipe: Connection, judge: Judge) -> None:
    """Answer what a parent asks: a problem to begin, or a choice to time.

    It ends with the parent, or after a fault of the GPU, which this process does not get over.
    """
    goes_on = True
    while goes_on:
        try:
            question = pipe.recv()
        except EOFError:
            return
        answer = _answer(question, judge)
        if isinstance(answer, UnfitError):
            goes_on = _is_sound(judge.device)
        pipe.send((answer, goes_on))


def _answer(question: Any, judge: Judge) -> float | UnfitError | None:
    try:
        if isinstance(question, Choice):
            return judge.time(question)
        judge.begin(*question)
        return None
    except UnfitError as error:
        return UnfitError(str(error))  # without the tensors that its traceback holds


def _is_sound(device: torch.device) -> bool:
    """Whether the GPU still works for this process; what a choice left behind is given back."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def main(argv: list[str]) -> None:
    """The child's command line: the pipe's number, the device, and timed runs."""
    number, device, runs = argv
    verdicts.inside = True
    serve(Connection(int(number)), Judge(torch.device(device), int(runs)))


if __name__ == "__main__":
    main(sys.argv[1:])
