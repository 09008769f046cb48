"""Triton kernels and a compact trainer for 1-bit convolutional networks."""

import sys
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("tritonbnn")
except PackageNotFoundError:  # a checkout that was not installed, as torch.hub uses it
    __version__ = "0"
__all__ = ["__version__"]

if "torch" in sys.modules:  # so that a saved program finds its operators; torch is not brought in
    import tritonbnn.ops  # noqa: F401
