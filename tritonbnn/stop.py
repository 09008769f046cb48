"""Requests to stop, as signals: finish the optimiser step, save, then end."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

# From whom each comes, and the exit code. Not every system has all of them.
_CODES = {
    "SIGTERM": 75,  # batch systems, containers, torchrun, kill
    "SIGINT": 130,  # Ctrl-C
    "SIGUSR1": 75,  # Slurm, some minutes before the time is up
    "SIGHUP": 75,  # a terminal or a connection that closes
}
EXIT_CODES = {getattr(signal, name): code for name, code in _CODES.items() if hasattr(signal, name)}

# Who sends one of these twice wants the end at once. A closing terminal sends its own twice, and
# a batch system that has sent SIGUSR1 sends SIGTERM some time later.
_INSISTENT = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):  # no `except Exception` is meant for it
    """The run was asked to stop, and all of it is saved.

    Attributes:
        signal: what asked.
        code: the exit code for it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)
        self.code = EXIT_CODES[self.signal]


class StopSignals:
    """Remembers the first request to stop. A second SIGTERM or SIGINT ends the process at once.

    As a context it hears the signals of :data:`EXIT_CODES` inside, and gives each back to whoever
    had it before. A signal that the process ignores stays ignored: ``nohup`` means it so. Outside
    the main thread Python hears no signals, and so does this.

    Args:
        patient: ignore further signals, and keep the handlers to the end of the process. Under
            torchrun one Ctrl-C arrives twice, from the terminal and from torchrun, the second time
            perhaps after the run has been saved. torchrun itself kills what takes too long.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.number = 0
        self._patient, self._at_once, self._insisted = patient, False, False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                before = signal.getsignal(number)
                # None is a handler of C, which could not be given back
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = before
                    signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._patient:
            for number, before in self._before.items():
                signal.signal(number, before)

    @contextmanager
    def obeyed_at_once(self) -> Iterator[None]:
        """For work with nothing to save: in here a signal raises :class:`Stopped` as it comes."""
        self._at_once = True
        try:
            if self.number:
                raise Stopped(self.number)
            yield
        finally:
            self._at_once = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number in _INSISTENT:
            if self._insisted and not self._patient:
                os._exit(EXIT_CODES[signal.Signals(number)])
            self._insisted = True
        first, self.number = not self.number, self.number or number
        if first and self._at_once:
            raise Stopped(number)
