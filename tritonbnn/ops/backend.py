"""Who does the work: the Triton kernels, the C functions, or their eager twins."""

import logging
import os
from functools import cache
from types import ModuleType

import torch

from tritonbnn import eager, native
from tritonbnn.cli import SettingError
from tritonbnn.native import library

VARIABLE = "TRITONBNN_LAUNCHERS"

logger = logging.getLogger(__name__)


def launchers(device: torch.device) -> ModuleType:
    """The module whose launchers run on ``device``.

    The Triton kernels on CUDA, and on any device under ``TRITON_INTERPRET=1``. On a CPU the native
    launchers, or eager torch where no C library can be had, which is said once. Eager torch on any
    other device. ``TRITONBNN_LAUNCHERS=eager|native|triton`` forces one.

    Raises:
        SettingError: the one forced is unknown, or does not run here.
    """
    # asked at every call, as a test may change them; it takes a microsecond
    forced = os.environ.get(VARIABLE)
    if forced:
        return _forced(forced, device)
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        from tritonbnn import kernels  # needs triton, which a machine without a GPU may lack

        return kernels
    if device.type != "cpu":
        return eager
    if library.available():
        return native
    _tell_once(library.reason())
    return eager


def _forced(name: str, device: torch.device) -> ModuleType:
    if name == "eager":
        return eager
    if name == "native":
        return _native(device)
    if name == "triton":
        return _kernels(device)
    raise SettingError(f"{VARIABLE} must be eager, native or triton, not {name!r}")


def _native(device: torch.device) -> ModuleType:
    if device.type != "cpu":
        raise SettingError(f"{VARIABLE}=native runs on a CPU, not on {device.type}: unset it")
    if not library.available():
        raise SettingError(f"{VARIABLE}=native, but there is no C library: {library.reason()}")
    return native


def _kernels(device: torch.device) -> ModuleType:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SettingError(
            f"{VARIABLE}=triton runs on CUDA, or interpreted with TRITON_INTERPRET=1,"
            f" not on {device.type}"
        )
    try:
        from tritonbnn import kernels
    except ModuleNotFoundError as error:
        raise SettingError(f"{VARIABLE}=triton needs {error.name}: install it") from error
    return kernels


@cache
def _tell_once(reason: str) -> None:
    logger.warning("eager torch does the work on this CPU, which is slower than C: %s", reason)
