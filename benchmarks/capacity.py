"""Out of memory: to know it when one sees it, and to find the largest batch that fits."""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator gave up, CUDA's or the CPU's."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def fits(attempt: Callable[[], Any]) -> bool:
    """Whether ``attempt`` ends without running out of memory; what it took is given back."""
    try:
        attempt()
        enough = True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        enough = False
    # only now: the error held the frames, and they the tensors
    release()
    return enough


def release() -> None:
    """Give unused memory back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def largest_fitting(attempt: Callable[[int], Any], batch: int) -> int:
    """The largest of batch / 2, batch / 4, ... that fits; 0 if not even one image does.

    Args:
        attempt: takes a batch size.
        batch: one that does not fit.
    """
    while batch > 1:
        batch //= 2
        if fits(partial(attempt, batch)):
            return batch
    return 0
