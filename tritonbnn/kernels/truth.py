"""What is right for a problem, by autograd through :mod:`tritonbnn.reference`, and how far off a
result may be.

A convolution's input is +-0.5 here, where the pseudo-gradient's slope is exactly 1, so that
autograd yields the bare gradient of the convolution.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonbnn import eager, reference
from tritonbnn.kernels.library import contract
from tritonbnn.kernels.workload import PLAN, SCALED, VECTORS, WHOLE_UNIT, Problem

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
        return _plain(problem, inputs, dtype)


def _plain(problem: Problem, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    if problem.op.startswith("conv"):
        return _convolution(problem, inputs, dtype)
    if problem.op == "packed_difference":
        a, b = (eager.unpack_signs(inputs[name], problem.layer.channels, dtype) for name in "ab")
        return ((a != b).sum(dim=1),)
    if problem.op == PLAN:
        return _whole_unit(problem, inputs, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    tensors = {name: tensor.to(wide) for name, tensor in inputs.items()}
    for name in VECTORS:
        tensors[name] = tensors[name].view(-1, 1, 1).clone().requires_grad_()
    results = _elementwise(problem, tensors)
    return tuple(r.detach().to(dtype) if r.dim() == 4 else r.detach().flatten() for r in results)


def _elementwise(problem: Problem, t: Inputs) -> tuple[Tensor, ...]:
    if problem.op == "channel_moments":
        variance, mean = torch.var_mean(t["a"], dim=(0, 2, 3), correction=0)
        return mean, variance
    if problem.op == "unit_norm_backward":
        return (t["scale"] * t["grad"] + t["slope"] * t["a"] + t["offset"],)
    if problem.op.startswith("unit"):
        return _unit(problem, t)
    x, shift = t["x"].requires_grad_(), t["shift_in"]
    if problem.op in ("pack_signs", "sign_forward"):
        return (reference.hard_sign(x + shift),)
    if problem.op == "sign_backward":
        ds, dshift = torch.autograd.grad(reference.binarize(x, shift), (x, shift), t["grad"])
        (skipped,) = torch.autograd.grad(_shortcut(problem, x), x, t["residual"])
        return ds + skipped, dshift
    leaves = (x, shift, t["slope"], t["shift_out"])
    z = reference.rprelu(*leaves)
    return (z,) if problem.op == "rprelu_forward" else torch.autograd.grad(z, leaves, t["grad"])


def _shortcut(problem: Problem, x: Tensor) -> Tensor:
    if problem.shortcut == "pool":
        return F.avg_pool2d(x, 2)
    return torch.cat((x, x), dim=1) if problem.shortcut == "repeat" else x


def _unit(problem: Problem, t: Inputs) -> tuple[Tensor, ...]:
    """z, or du with the sums of du, du (a - mean), grad min(t, 0) and grad in one row each."""
    u = (t["a"] - t["mean"]) * t["scale"] + t["offset"] + _shortcut(problem, t["stream"])
    z = reference.rprelu(u, t["shift_mid"], t["slope"], t["shift_out"])
    if problem.op == "unit_forward":
        return (z,)
    leaves = (u, t["offset"], t["scale"], t["slope"], t["shift_out"])
    du, *sums = torch.autograd.grad(z, leaves, t["grad"])
    return du, torch.stack([each.flatten() for each in sums])


def _whole_unit(problem: Problem, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """z and the gradients to all leaves."""
    leaves = [inputs[name].to(dtype).requires_grad_() for name in WHOLE_UNIT]
    x, weight, gamma, beta, shift_in, *activation = leaves
    z = reference.binary_unit(
        *(x, shift_in, weight, gamma, beta, *activation),
        shortcut=_shortcut(problem, x),
        stride=problem.layer.stride,
        padding=problem.layer.padding,
        binary_weight=problem.binary_weight,
    )
    return z.detach(), *torch.autograd.grad(z, leaves, inputs["grad"].to(dtype))


def _convolution(problem: Problem, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """y, dx or dweight of conv2d on numbers; alpha counts as part of the weight."""
    layer = problem.layer
    x = eager.unpack_signs(inputs["signs"], layer.channels, dtype).div_(2).requires_grad_()
    weight = inputs["weight"].to(dtype)
    if problem.op in ("conv_packed", SCALED, "conv_input_grad"):
        weight = eager.unpack_signs(inputs["weight_signs"], layer.channels, dtype)
    if problem.op in (SCALED, "conv_input_grad"):
        weight = weight * inputs["alpha"].to(dtype).view(-1, 1, 1, 1)
    weight = weight.requires_grad_()
    y = reference.binary_conv2d(
        x, weight, stride=layer.stride, padding=layer.padding, binary_weight=False
    )
    if problem.op in ("conv_packed", SCALED, "conv_real"):
        return (y.detach(),)
    leaf = x if problem.op == "conv_input_grad" else weight
    return torch.autograd.grad(y, (leaf,), inputs["grad"].to(dtype))


def error_of(problem: Problem, inputs: Inputs, results: tuple[Tensor, ...]) -> str:
    """Why the results are wrong, or "" if none errs more than :func:`tolerance` allows.

    Integers have no tolerance.
    """
    if problem.op == "pack_signs":
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
