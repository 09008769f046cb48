"""The problems that a network poses to the kernels, for tuner, benchmark and ahead-of-time gate.

Each file here describes launchers: their operands, bytes and truth. A new file is found by lying
here.
"""

import importlib
import pkgutil

from tritonbnn.kernels.problems import problem
from tritonbnn.kernels.problems.problem import DTYPES, PLAN, VECTORS, Kind, Problem

__all__ = ["DTYPES", "OPS", "PLAN", "STEP_OPS", "VECTORS", "Kind", "Problem"]

for _module in sorted(found.name for found in pkgutil.iter_modules(__path__)):
    problem.KINDS.update(getattr(importlib.import_module(f"{__name__}.{_module}"), "LAUNCHERS", {}))

STEP_OPS = (
    "pack_signs",
    "conv_packed",
    "channel_moments",
    "unit_forward",
    "unit_activation_backward",
    "unit_norm_backward",
    "conv_weight_grad",
    "conv_input_grad",
    "sign_backward",
)
"""What a training step of one unit launches, in its order."""

OPS = (*STEP_OPS, *(op for op in problem.KINDS if op not in (*STEP_OPS, PLAN)))
"""Every launcher that is described, those of a step first."""
