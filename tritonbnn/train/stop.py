"""SIGTERM and SIGINT as requests: finish the optimiser step, save, then end."""

import os
import signal
from types import FrameType

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


class Stopped(Exception):  # noqa: N818 - it is no error
    """The run was asked to stop, and has saved its state.

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
        self._patient = patient
        for number in EXIT_CODES:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.number and not self._patient:
            os._exit(EXIT_CODES[signal.Signals(number)])
        self.number = self.number or number
