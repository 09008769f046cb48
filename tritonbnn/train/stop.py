"""SIGTERM and SIGINT as requests: finish the optimiser step, save, then end."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


class Stopped(BaseException):  # no `except Exception` is meant for it
    """The run was asked to stop, and all of it is saved.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)
        self.code = EXIT_CODES[self.signal]


class StopSignals:
    """Remembers the first stop signal; a second one ends the process at once.

    Args:
        patient: ignore further signals. Under torchrun one Ctrl-C arrives twice, from the terminal
            and from torchrun, which itself kills a process that takes too long.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.number = 0
        self._patient, self._at_once = patient, False
        for number in EXIT_CODES:
            signal.signal(number, self._receive)

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
        if self.number and not self._patient:
            os._exit(EXIT_CODES[signal.Signals(number)])
        first, self.number = not self.number, self.number or number
        if first and self._at_once:
            raise Stopped(number)
