"""The one way a launcher starts a kernel."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from tritonbnn.kernels.config import TileConfig

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of run: all that ahead-of-time compilation needs."""

    kernel: Any
    arguments: dict[str, Any]
    tile: TileConfig
    grid: tuple[int, ...]


_instead: Callable[[Launch], None] | None = None


@contextmanager
def launching_by(call: Callable[[Launch], None]) -> Iterator[None]:
    """Hand the launches of the block to ``call`` instead of running them."""
    global _instead
    _instead, previous = call, _instead
    try:
        yield
    finally:
        _instead = previous


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches of the block instead of running them; use it with ``meta`` tensors."""
    launches: list[Launch] = []
    with launching_by(launches.append):
        yield launches


def launch(
    kernel: Any, programs: int | tuple[int, ...], tile: TileConfig, **arguments: Any
) -> None:
    """Run a kernel on the device of its tensors, with a tile's warps and stages.

    Args:
        kernel: a ``triton.jit`` function.
        programs: the grid.
        tile: gives ``num_warps`` and ``num_stages``; block sizes are arguments.
        **arguments: of the kernel, by name.
    """
    grid = programs if isinstance(programs, tuple) else (programs,)
    if _instead is not None:
        _instead(Launch(kernel, arguments, tile, grid))
        return
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if interpreted(kernel):
        _interpret(kernel, grid, arguments)
    elif device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](**arguments, **options)
    else:
        raise ValueError(
            f"a Triton kernel needs CUDA tensors, or TRITON_INTERPRET=1; these are on {device}"
        )


def _interpret(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Run a kernel in Triton's interpreter, with float32 in place of bf16.

    The interpreter multiplies bf16 wrongly and truncates where a GPU rounds.
    """
    narrow = {
        name: value
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.dtype == torch.bfloat16
    }
    wide = {name: value.to(torch.float32) for name, value in narrow.items()}
    kernel[grid](**{**arguments, **wide})
    for name, value in narrow.items():
        # An input comes back as it went, and `data` keeps that from looking like a change to it.
        value.data.copy_(wide[name])


def interpreted(kernel: Any) -> bool:
    """Whether a kernel runs in Triton's interpreter, as decided when its module was imported."""
    return not isinstance(kernel, triton.runtime.JITFunction)


def check_kernel_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise TypeError unless kernels take the dtype."""
    if dtype == torch.float64:
        raise TypeError(
            f"{name} is float64, which has no kernel: tritonbnn.eager runs it, on the CPU"
        )
    if dtype not in KERNEL_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, not {dtype}")
