"""Whether a launcher's results are right: how far off they may be."""

import torch
from torch import Tensor

from tritonbnn import eager
from tritonbnn.kernels.library import contract
from tritonbnn.kernels.problems import PLAN, Problem

UNIT_TOLERANCE = 0.01
"""Of a whole unit, relative in the norm: where a rounding decides on a branch of the PReLU, one
element in n is wrong as a whole."""

Inputs = dict[str, Tensor]


def plain(problem: Problem, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What plain torch makes of the same inputs in ``dtype``.

    Elementwise formulas run in float32 at least and round their images once, as fused ones do.
    float32 is no TF32: what errs as much as that would pass for eager torch's own error.
    """
    with contract():
        return problem.kind.truth(problem, inputs, dtype)


def error_of(problem: Problem, inputs: Inputs, results: tuple[Tensor, ...]) -> str:
    """Why the results are wrong, or "" if none errs more than :func:`tolerance` allows.

    Integers have no tolerance.
    """
    if problem.kind.packs:
        channels = problem.layer.channels
        results = (eager.unpack_signs(results[0], channels, problem.dtype),)
    ordinary = plain(problem, inputs, problem.dtype)
    truth = plain(problem, inputs, torch.float64)
    for result, usual, exact in zip(results, ordinary, truth, strict=True):
        difference = result.double().reshape(exact.shape) - exact
        error, allowed = difference.abs().max().item(), 0.0
        if problem.op == PLAN:
            error = difference.norm().item()
            allowed = 2 * (usual.double() - exact).norm().item()
            allowed += UNIT_TOLERANCE * exact.norm().item()
        elif result.is_floating_point():
            allowed = tolerance(result.dtype, usual.reshape(exact.shape), exact)
        if not error <= allowed:  # a NaN is wrong too
            return f"error {error:.3g} where {allowed:.3g} is allowed"
    return ""


def tolerance(dtype: torch.dtype, usual: Tensor, exact: Tensor) -> float:
    """The error a result may have: twice eager torch's own, and a floor of a few roundings.

    Args:
        dtype: of the result.
        usual: eager torch's result.
        exact: the truth, float64.
    """
    rounding = max(torch.finfo(dtype).eps, 8 * torch.finfo(torch.float32).eps)
    floor = rounding * max(exact.abs().max().item(), 1.0)
    return 2 * (usual.double() - exact).abs().max().item() + floor
