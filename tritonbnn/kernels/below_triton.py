"""Whether kernels in a language below Triton's may run: those on the one-bit core, and warpgroups'.

They are written in Gluon, for instructions that Triton does not choose itself.
"""

from functools import lru_cache

import torch

from tritonbnn.kernels import config, verdicts
from tritonbnn.kernels.config import ONE_BIT, Choice, ProblemKey
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.launch import interpreted
from tritonbnn.kernels.targets import target_of
from tritonbnn.kernels.tiles import popcount


@lru_cache
def runs(device: torch.device, formulation: str = "mma") -> bool:
    """Whether a formulation's kernels run on a device; on ``meta``, whether they compile.

    Not in the interpreter, and not with a Triton that has no Gluon or another one than these need.
    On a GPU they must have been exact in a process of their own.
    """
    if interpreted(popcount):  # as all kernels are, then
        return False
    try:
        if formulation == "wgmma":
            from tritonbnn.kernels import mma_warpgroup  # noqa: F401
        elif formulation == "warpgroup":
            from tritonbnn.kernels import (  # noqa: F401
                conv_warpgroup,
                input_grad_warpgroup,
                weight_grad_warpgroup,
            )
        else:
            from tritonbnn.kernels import mma  # noqa: F401
    except ImportError:
        return False
    if device.type == "cuda":
        there = formulation in target_of(device).formulations
        return there and verdicts.trusted(device, formulation)
    return device.type == "meta"


def on_one_bit_core(geometry: Geometry, device: torch.device) -> bool:
    """Whether units around a packed convolution do it on ``mma``'s core, within their passes.

    By the tuning table and the device, wherever the product alone runs on either one-bit core.
    """
    choice = config.choose(geometry.key("conv_packed", "int32"), device)
    return geometry.pixels > 0 and choice.formulation in ONE_BIT and runs(device)


def choose(key: ProblemKey, device: torch.device, instead: str, *, able: bool = True) -> Choice:
    """The table's choice, or a default where that is a warpgroup's kernel which cannot run.

    Args:
        key: of the problem.
        device: that runs it.
        instead: the formulation of that default.
        able: whether the kernel can do what the key does not tell.
    """
    choice = config.choose(key, device)
    if choice.formulation != "warpgroup":
        return choice
    if able and config.takes("warpgroup", key) and runs(device, "warpgroup"):
        return choice
    return config.choose_default(key, instead, device)
