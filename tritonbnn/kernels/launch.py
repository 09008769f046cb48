"""The one way a launcher starts a kernel."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
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


_instead: Callable[[Any, dict[str, Any], TileConfig, tuple[int, ...]], None] | None = None


@contextmanager
def launching_by(
    call: Callable[[Any, dict[str, Any], TileConfig, tuple[int, ...]], None],
) -> Iterator[None]:
    """Hand the launches of the block to ``call`` instead of running them.

    Args:
        call: takes kernel, arguments, tile and grid.
    """
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
    with launching_by(lambda *launch: launches.append(Launch(*launch))):
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
        _instead(kernel, arguments, tile, grid)
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if interpreted(kernel):
        _interpret(kernel, grid, arguments)
    elif device.type == "cuda":
        if device.index == torch.cuda.current_device():
            start(kernel, grid, tile, arguments, device)
        else:
            with torch.cuda.device(device):
                start(kernel, grid, tile, arguments, device)
    else:
        raise ValueError(
            f"a Triton kernel needs CUDA tensors, or TRITON_INTERPRET=1; these are on {device}"
        )


_runners: dict[tuple[Any, ...], Callable[..., None]] = {}

MOST_REMEMBERED = 8192
"""Launches that are remembered: more than a run with a few batch sizes has."""


def start(
    kernel: Any,
    grid: tuple[int, ...],
    tile: TileConfig,
    arguments: dict[str, Any],
    device: torch.device,
) -> None:
    """Start a kernel on the current device.

    Triton looks at every argument to find what it has compiled, which takes the host 20
    microseconds. What starts a launch is remembered here by a key of its own. It is finer than
    Triton's: numbers by their values, tensors by dtype and by whether their address is a multiple
    of 16. On AMD's GPUs Triton looks at a tensor's size too, and is asked each time.

    Raises:
        TypeError: a tensor is an argument whose name does not end in ``_ptr``.
    """
    ordered, pointers, constants = _readers(kernel.fn)
    key = [kernel.fn, grid, tile.num_warps, tile.num_stages, device, *constants(arguments)]
    for tensor in pointers(arguments):
        if tensor is None:
            key.append(None)
        else:
            key.append(tensor.dtype)
            key.append(tensor.data_ptr() % 16)
    known = tuple(key)
    runner = None if torch.version.hip else _runners.get(known)
    if runner is not None:
        runner(*ordered(arguments))
        return
    if any(isinstance(value, Tensor) for value in constants(arguments)):
        raise TypeError(f"tensors of {kernel.__name__} must be arguments named *_ptr")
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    compiled = kernel[grid](**arguments, **options)
    if len(_runners) >= MOST_REMEMBERED:
        _runners.clear()
    _runners[known] = compiled[(*grid, 1, 1)[:3]]


_Reader = Callable[[dict[str, Any]], tuple[Any, ...]]


@cache
def _readers(function: Callable[..., None]) -> tuple[_Reader, _Reader, _Reader]:
    """What takes from arguments by name those of a kernel in order, its pointers, and the rest."""
    names = tuple(inspect.signature(function).parameters)
    pointers = tuple(name for name in names if name.endswith("_ptr"))
    return _reader(names), _reader(pointers), _reader(tuple(n for n in names if n not in pointers))


def _reader(names: tuple[str, ...]) -> _Reader:
    if len(names) > 1:
        return itemgetter(*names)
    return lambda arguments: tuple(arguments[name] for name in names)  # else no tuple, but the one


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
