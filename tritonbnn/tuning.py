"""``--tune``: time the kernels for the run's own network first, in a process of its own."""

import logging
import subprocess
import sys
from typing import Any

from tritonbnn.cli import UserError
from tritonbnn.compute import choose_device
from tritonbnn.distributed import launched

TUNER = "tritonbnn.kernels.autotune"

logger = logging.getLogger(__name__)


def tune(device: str, *, small_images: bool, **facts: Any) -> None:
    """Tune the kernels at the shapes that a network poses, costliest first.

    What is tuned lands in the user's cache, where this run and all later ones find it. A tuner that
    fails costs a line.

    Args:
        device: as ``--device`` takes it.
        small_images: of the network.
        facts: the tuner's flags: model, batch, size, width, dtype, minutes.

    Raises:
        UserError: there is no GPU to tune on, or several processes would tune at once.
    """
    if launched():
        raise UserError("--tune is for one process: run it once without torchrun, then train")
    if choose_device(device).type != "cuda":
        raise UserError("--tune times kernels on a GPU, and this run has none: leave it out")
    code = subprocess.run(command(small_images=small_images, **facts), check=False).returncode
    if code:
        logger.warning("the tuner ended with code %d: going on with what is tuned", code)


def command(*, small_images: bool, **facts: Any) -> list[str]:
    """What runs the tuner."""
    flags = [word for key, value in facts.items() for word in (f"--{key}", str(value))]
    small = ["--small-images"] if small_images else []
    return [sys.executable, "-m", TUNER, *flags, *small]
