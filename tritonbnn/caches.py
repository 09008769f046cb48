"""Folders where others keep what they compile: found before the work that needs them begins."""

import logging
import os
import tempfile
from pathlib import Path

from tritonbnn.cli import UserError
from tritonbnn.compiled.build import temporary_folder

logger = logging.getLogger(__name__)

TRITON, INDUCTOR, MATPLOTLIB = "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR"


def prepare(variable: str) -> None:
    """Have a folder that can be written for the owner of an environment variable.

    A folder that the user named must do. Else, where the home cannot be written, this process and
    those that it starts get one in the temporary folder that no other user can write to.

    Args:
        variable: TRITON, INDUCTOR or MATPLOTLIB.

    Raises:
        UserError: neither can be written.
    """
    chosen = os.environ.get(variable)
    try:
        folder = Path(chosen) if chosen else _default(variable)
        if folder is not None:
            _write_into(folder)
        return
    except (OSError, RuntimeError) as error:  # the latter: a user without a home
        if chosen:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"{variable} is {chosen}, which cannot be written ({reason}): set it to a folder"
                " that can"
            ) from error
    try:
        folder = temporary_folder() / variable.partition("_")[0].lower()
        _write_into(folder)
    except OSError as error:
        raise UserError(
            f"neither the home nor the temporary folder can be written: set {variable} to a folder"
            " that can"
        ) from error
    os.environ[variable] = str(folder)
    logger.info("the home cannot be written: using %s; %s chooses another", folder, variable)


def _default(variable: str) -> Path | None:
    """Where the owner would write, or None for the temporary folder.

    Raises:
        RuntimeError: the user has no home.
    """
    if variable == TRITON:
        home = os.environ.get("TRITON_HOME")
        return (Path(home) if home else Path.home()) / ".triton" / "cache"
    if variable == MATPLOTLIB:
        return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "matplotlib"
    return None


def _write_into(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
