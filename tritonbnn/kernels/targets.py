"""The GPUs that kernels compile for, and what each has: one table for the default, tuner and gate.

A GPU that is not in the table gets the nearest older one of NVIDIA's, or :data:`UNKNOWN`,
which has only what is safe everywhere.
"""

from dataclasses import dataclass
from typing import Any

import torch

from tritonbnn.cli import UserError

KILOBYTE = 1024


@dataclass(frozen=True)
class Target:
    """A kind of GPU.

    Attributes:
        name: as ``--target`` takes it.
        models: some that are of the kind.
        backend: of Triton, "cuda" or "hip".
        architecture: what the backend calls it.
        warp_size: threads that run in step.
        shared_bytes: of shared memory that a block may have.
        products: formulations of the packed convolution that exist here, the default first.
        bfloat16: whether it has bfloat16 arithmetic.
        matrices: whether Triton multiplies float16 on its tensor cores. Else the library does.
        narrow: whether others' tiles of a product take more registers than there are.
        most_stages: of a product's loop that the compiler has registers for.
        weight_grads: formulations of the weight's gradient that exist here, and are not the
            library's alone, the default first (by ``benchmarks.count``).
        input_grads: the same of the input's gradient.
        reals: the same of the convolution with a real weight.
    """

    name: str
    models: str
    backend: str
    architecture: int | str
    warp_size: int
    shared_bytes: int
    products: tuple[str, ...] = ("int8", "popcount")
    bfloat16: bool = True
    matrices: bool = True
    narrow: bool = False
    most_stages: int = 3
    weight_grads: tuple[str, ...] = ("dot", "library")
    input_grads: tuple[str, ...] = ("dot", "library")
    reals: tuple[str, ...] = ("dot", "library")

    @property
    def formulations(self) -> set[str]:
        """All that exist here, of any operation."""
        return {*self.products, *self.weight_grads, *self.input_grads, *self.reals}


def _cuda(capability: int, models: str, kilobytes: int, *products: str, **facts: Any) -> Target:
    shared, name = kilobytes * KILOBYTE, f"sm_{capability}"
    return Target(name, models, "cuda", capability, 32, shared, products, **facts)


def _hip(name: str, models: str, warp_size: int, *, narrow: bool = False) -> Target:
    stages = 1 if narrow else 3
    return Target(
        *(name, models, "hip", name, warp_size, 64 * KILOBYTE), narrow=narrow, most_stages=stages
    )


TARGETS = {
    target.name: target
    for target in (
        _cuda(75, "T4, RTX 2080", 64, "popcount", bfloat16=False, matrices=False),
        _cuda(80, "A100", 163, "mma", "int8", "popcount"),
        _cuda(86, "A10, RTX 3090", 99, "mma", "int8", "popcount"),
        _cuda(89, "L4, RTX 4090", 99, "mma", "int8", "popcount"),
        _cuda(
            *(90, "H100, H200", 227, "mma", "int8", "popcount", "wgmma"),
            weight_grads=("warpgroup", "library", "dot"),
            input_grads=("warpgroup", "dot", "library"),
            reals=("warpgroup", "dot", "library"),
        ),
        _cuda(100, "B200", 227, "int8", "popcount"),
        _cuda(120, "RTX 5090", 99, "int8", "popcount", most_stages=2),
        _hip("gfx90a", "MI200", 64),
        _hip("gfx942", "MI300", 64),
        _hip("gfx1100", "RX 7900", 32, narrow=True),
        _hip("gfx1201", "RX 9070", 32, narrow=True),
    )
}

OLDEST = TARGETS["sm_75"]
"""NVIDIA's oldest that the kernels compile for."""

ANY = Target("any", "no GPU", "", "", 32, 64 * KILOBYTE)
"""What runs where there is no GPU: the interpreter."""

UNKNOWN = Target(
    *("unknown", "a GPU that is not in the table", "hip", "", 32, 64 * KILOBYTE),
    products=("popcount",),
    matrices=False,
)
"""What is safe everywhere: bits counted by plain instructions, other products by the library."""


def parse_target(text: str) -> Target:
    """The target of a name such as ``sm_90`` or ``gfx942``.

    Raises:
        UserError: it is not in the table; the known ones are listed.
    """
    if text not in TARGETS:
        raise UserError(f"target must be one of {', '.join(TARGETS)}, not {text!r}")
    return TARGETS[text]


def target_of(device: torch.device) -> Target:
    """The target of a CUDA or ROCm device, or :data:`ANY` for one that is no GPU.

    Raises:
        UserError: the GPU is older than all in the table.
    """
    if device.type != "cuda":
        return ANY
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return TARGETS.get(name, UNKNOWN)
    major, minor = torch.cuda.get_device_capability(device)
    return nearest(10 * major + minor)


def nearest(capability: int) -> Target:
    """NVIDIA's target of a compute capability (90 for 9.0), or the next older one.

    Raises:
        UserError: there is none so old.
    """
    known = {t.architecture: t for t in TARGETS.values() if isinstance(t.architecture, int)}
    older = [each for each in known if each <= capability]
    if not older:
        raise UserError(
            f"a GPU of sm_{capability} is older than {OLDEST.name} ({OLDEST.models}), the oldest"
            " that the kernels compile for: use --device cpu, or TRITONBNN_LAUNCHERS=eager"
        )
    return known[max(older)]
