"""A rival in a process of its own, as a user has it.

In a process with others, glibc's heap decides how many page faults a rival's step takes, and the
others have grown that heap and cut it up: the same code took up to twice the time.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.point import Point
from benchmarks.rivals import Rival
from benchmarks.rounds import Turn
from benchmarks.runner import RivalError, Runner
from benchmarks.steps import as_trainers_run
from tritonbnn.compute import keep_freed_memory

GRACE_SECONDS = 5
"""For a process to end by itself: what a compiler left about is then cleared away."""


class Process:
    """A runner in a fresh process, with as many threads as here.

    It computes while it is asked, and waits for the next question on a pipe. It ends with the pipe:
    so it outlives its parent by one answer at most, however that ends.

    Args:
        make: makes the runner, in that process.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, far_end = spawn.Pipe()
        arguments = (far_end, torch.get_num_threads(), make)
        self._process = spawn.Process(target=_serve, args=arguments, daemon=True)
        with _deaf_to_interrupts():
            self._process.start()
        far_end.close()  # else the process could end, and the pipe would not

    def close(self) -> None:
        """End the process: one that waits ends with the pipe, one that computes is killed."""
        self._pipe.close()
        self._process.join(GRACE_SECONDS)
        self._process.kill()
        self._process.join()

    def ask(self, question: str, *arguments: Any) -> Any:
        """The runner's answer: of its method of that name.

        Raises:
            RivalError: the runner's, or the process has ended.
        """
        try:
            self._pipe.send((question, arguments))
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise RivalError({"failed": f"its process {_end(self._process.exitcode)}"}) from None
        if isinstance(answer, RivalError):
            raise answer
        return answer


class Worker(Process):
    """A :class:`Runner` in a process of its own.

    Args:
        point: what the rival works on.
        rival: whose step.
    """

    def __init__(self, point: Point, rival: Rival) -> None:
        super().__init__(partial(Runner, point, rival))

    def trial(self) -> dict[str, Any]:
        """As of the runner."""
        return self.ask("trial")

    def turn(self, count: int) -> Turn:
        """As of the runner."""
        return self.ask("turn", count)

    def details(self) -> dict[str, Any]:
        """As of the runner."""
        return self.ask("details")


def _end(code: int | None) -> str:
    """How a process ended, from its exit code."""
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    cause = ", most often for want of memory" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{cause}"


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes that start meanwhile never hear Ctrl-C: it is their parent's to end them."""
    resource_tracker.ensure_running()  # it starts with the first process, and lifts the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, threads: int, make: Callable[[], Any]) -> None:
    """The process: ask a runner what comes through the pipe, until nobody is at its other end."""
    torch.set_num_threads(threads)
    keep_freed_memory()  # as the trainer does
    runner = make()
    with as_trainers_run(), suppress(EOFError, ConnectionError):
        while True:
            question, arguments = pipe.recv()
            try:
                answer = getattr(runner, question)(*arguments)
            except RivalError as error:
                answer = error
            pipe.send(answer)
