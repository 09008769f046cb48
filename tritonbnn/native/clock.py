"""What the passes of whole units take, from a clock within the C functions themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from tritonbnn.native import library

PASSES = (
    "weights packed",
    "signs packed",
    "forward product",
    "moments",
    "norm, shortcut, RPReLU, signs",
    "backward sums",
    "backward apply",
    "input gradient",
    "weight gradient",
    "slope, shift, skip",
)
"""The names of ``Clocked`` in ``csrc/clock.h``, in its order."""


class Taken(NamedTuple):
    """What the calls of a pass took together, and what they had to do at least.

    Attributes:
        calls: how many.
        nanoseconds: by the clock on the wall.
        bytes: that they read and write, each once.
        table_products: of a number and a sign, by table.
        bit_products: of two signs, by counting bits.
    """

    calls: int
    nanoseconds: int
    bytes: int
    table_products: int
    bit_products: int


@contextmanager
def running() -> Iterator[dict[str, Taken]]:
    """Time the passes of all units that run meanwhile, in any thread.

    Yields:
        A dict that has each pass which ran, by its name of :data:`PASSES`, once this ends. It stays
        empty where no C function runs.
    """
    taken: dict[str, Taken] = {}
    if not library.available():
        yield taken
        return
    library.call("clock_run", 1)
    try:
        yield taken
    finally:
        library.call("clock_run", 0)
    table = torch.empty((len(PASSES), len(Taken._fields)), dtype=torch.int64)
    library.call("clock_read", table)
    for name, row in zip(PASSES, table.tolist(), strict=True):
        if row[0]:
            taken[name] = Taken(*row)
