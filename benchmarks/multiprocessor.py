"""What GPUs can do: how many blocks run at once, and how fast they go.

A target is one GPU here. Nothing is measured. Most figures are the makers'. These have no table:

* one bit on sm_86 and sm_89 is 8 times as fast as int8, as it is on sm_80
* one bit on sm_90 is as fast as on sm_80, the warpgroup's twice that
* tensor-core instructions that are not the warpgroup's reach 5/8 of its rate on sm_90
* the second cache of sm_90 gives as many bytes a clock as sm_80's
"""

from dataclasses import dataclass, field

from benchmarks.products import LANES
from benchmarks.sass import CACHE_BYTES, Code, Work
from tritonbnn.kernels.config import ceil_div
from tritonbnn.kernels.targets import KILOBYTE

SCHEDULERS = 4
REGISTERS = 2**16
REGISTERS_AT_ONCE = 256
"""That a warp gets at least, and multiples of it."""

OWN_SHARED = KILOBYTE
"""Shared memory of a block that is the system's."""


@dataclass(frozen=True)
class Machine:
    """One GPU.

    Attributes:
        model: its name.
        multiprocessors: of it.
        gigahertz: of their clock under load.
        warps: that a multiprocessor holds at most, as the next two.
        blocks: likewise.
        shared_bytes: likewise.
        products: multiplications and additions of its tensor cores in a clock, by instruction.
        pipes: clocks that an instruction holds a scheduler's pipe.
        l2_bytes: that all multiprocessors together read of the second cache in a clock, or None
            where no table says.
    """

    model: str
    multiprocessors: int
    gigahertz: float
    warps: int
    blocks: int
    shared_bytes: int
    products: dict[str, int]
    pipes: dict[str, int] = field(default_factory=dict)
    l2_bytes: int | None = None

    @property
    def hertz(self) -> float:
        return self.gigahertz * 1e9

    def resident(self, code: Code, num_warps: int) -> int:
        """Blocks of a kernel that a multiprocessor runs at once; at least one, as it would run."""
        a_warp = ceil_div(code.registers * LANES, REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
        fitting = REGISTERS // a_warp // SCHEDULERS * SCHEDULERS
        limits = (
            self.blocks,
            self.warps // num_warps,
            fitting // num_warps,
            self.shared_bytes // (code.shared_bytes + OWN_SHARED),
        )
        return max(1, min(limits))

    def clocks(self, work: Work, num_warps: int) -> dict[str, float]:
        """The least that a multiprocessor takes for one block, by what holds it up.

        Args:
            work: of one warp.
            num_warps: of the block.
        """
        held = max([work["issue"], *(work[pipe] * n for pipe, n in self.pipes.items())])
        multiplied = sum(work[name] / rate for name, rate in self.products.items())
        return {
            "issue": held * num_warps / SCHEDULERS,
            "l1": work["l1"] * num_warps / CACHE_BYTES,
            "tensor": multiplied * num_warps,
        }


def _pipes(fp64: int, *, wide: bool = True, unified: bool = False) -> dict[str, int]:
    """Clocks by pipe.

    Args:
        fp64: of a product in float64.
        wide: whether a scheduler has 32 lanes for float32, not 16.
        unified: whether they take integers too.
    """
    integer = 1 if unified else 2
    return {"alu": integer, "imad": integer, "fma": 1 if wide else 2, "xu": 8, "fp64": fp64}


_CONSUMER = {"HMMA": 256, "IMMA": 1024, "BMMA": 8192}

MACHINES = {
    "sm_80": Machine(
        *("A100", 108, 1.41, 64, 32, 164 * KILOBYTE),
        {"HMMA": 1024, "IMMA": 2048, "BMMA": 16384},
        _pipes(4, wide=False),
        5120,
    ),
    "sm_86": Machine("RTX 3090", 82, 1.695, 48, 16, 100 * KILOBYTE, _CONSUMER, _pipes(64)),
    "sm_89": Machine("RTX 4090", 128, 2.52, 48, 24, 100 * KILOBYTE, _CONSUMER, _pipes(64)),
    "sm_90": Machine(
        *("H100 or H200", 132, 1.755, 64, 32, 228 * KILOBYTE),
        {"HGMMA": 2048, "IGMMA": 4096, "BGMMA": 32768}
        | {"HMMA": 1280, "IMMA": 2560, "BMMA": 16384},
        _pipes(2),
        5120,
    ),
    "sm_120": Machine(
        *("RTX 5090", 170, 2.41, 48, 24, 100 * KILOBYTE),
        {"HMMA": 256, "IMMA": 1024},
        _pipes(64, unified=True),
    ),
}
"""By target: those whose instructions are counted."""
