"""Triton kernels and a compact trainer for 1-bit convolutional networks."""

from importlib.metadata import version

__version__ = version("tritonbnn")
__all__ = ["__version__"]
