"""``python -m tritonbnn.compare.child MODULE ...``: a command that ends with whoever started it.

Its stdin is a pipe that nobody writes to. The pipe closes when the comparison ends, however it
ends, and then the run saves and ends too: else it would go on in a folder that the next comparison
wants.
"""

import importlib
import os
import signal
import threading

from tritonbnn import cli


def main(argv: list[str]) -> int:
    """Run the ``main`` of the module that comes first, with the rest."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return importlib.import_module(argv[0]).main(argv[1:])


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the pipe closes
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    cli.run(main)
