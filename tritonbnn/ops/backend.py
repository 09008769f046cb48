"""Who does the work: the Triton kernels, or their eager twins."""

import os
from types import ModuleType

import torch

from tritonbnn import eager


def launchers(device: torch.device) -> ModuleType:
    """The module whose launchers run on ``device``.

    The kernels on CUDA, and on any device under ``TRITON_INTERPRET=1``; the eager twins elsewhere.
    There is no other switch, and no fallback that would hide an error.
    """
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        from tritonbnn import kernels  # needs triton, which a machine without a GPU may lack

        return kernels
    return eager
