"""A driver for Triton where there is no GPU, or none is to be asked."""

from collections.abc import Iterator
from contextlib import contextmanager

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


class StandIn:
    """What Triton asks its driver for at a launch, of a GPU that is not there."""

    def __init__(self, gpu: GPUTarget) -> None:
        self._gpu = gpu

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._gpu


@contextmanager
def standing_in(gpu: GPUTarget) -> Iterator[None]:
    """Have Triton take the stand-in for its driver."""
    before = driver._active
    driver.set_active(StandIn(gpu))
    try:
        yield
    finally:
        driver._active = before
