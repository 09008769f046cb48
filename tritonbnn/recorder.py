"""CUDA graphs: what a GPU is told once, and then repeats at one word from the host.

A graph repeats kernels with the addresses and the numbers that they had when it was recorded. So
whatever changes from call to call must lie in tensors that stay where they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class CaptureError(RuntimeError):
    """Why work cannot be recorded, in one line."""


class Recorder:
    """Records work as graphs that share their memory, of which one is repeated at a time.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Do the block's work on the stream that records. It begins and ends as if on this one.

        Work must be done so before it is recorded: libraries prepare themselves, and kernels are
        compiled and chosen.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        """Record work without doing it; what is returned does it.

        Raises:
            CaptureError: it cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on allocating page-locked memory, as a loader's does.
        capturing = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        # A capture that fails does not leave its stream, so the outer context goes back.
        current = torch.cuda.stream(torch.cuda.current_stream(self._device))
        try:
            with current, capturing:
                work()
        except RuntimeError as error:
            first = error.__context__ or error  # a capture ends with an error of its own
            raise CaptureError(str(first).strip().partition("\n")[0]) from error
        return graph.replay
