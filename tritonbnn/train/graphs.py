"""A training step's CUDA graphs."""

from collections.abc import Callable

from tritonbnn.cli import UserError
from tritonbnn.recorder import CaptureError, Recorder


class Graphs(Recorder):
    """As :class:`~tritonbnn.recorder.Recorder`, of training: what fails names the flag."""

    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        """Record work without doing it; what is returned does it.

        Raises:
            UserError: it cannot be recorded.
        """
        try:
            return super().record(work)
        except CaptureError as error:
            raise UserError(
                f"a training step cannot be captured as a CUDA graph ({error}): leave --graph out"
            ) from error
