"""ReActNet's activation, on the images that follow a layer."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonbnn import kernels, reference
from tritonbnn.kernels.problems.problem import (
    PIXELS,
    Kind,
    Problem,
    Tensors,
    elementwise,
    images_moved,
    stream_inputs,
)


def _leaves(t: Tensors) -> tuple[Tensor, ...]:
    return t["x"].requires_grad_(), t["shift_in"], t["slope"], t["shift_out"]


def _z(problem: Problem, t: Tensors) -> tuple[Tensor, ...]:
    return (reference.rprelu(*_leaves(t)),)


def _gradients(problem: Problem, t: Tensors) -> tuple[Tensor, ...]:
    leaves = _leaves(t)
    return torch.autograd.grad(reference.rprelu(*leaves), leaves, t["grad"])


def _forward_formula(t: Tensors, shortcut: str) -> Tensor:
    return F.prelu(t["x"] + t["shift_in"], t["slope"].flatten()) + t["shift_out"]


def _backward_formula(t: Tensors, shortcut: str) -> tuple[Tensor, ...]:
    shifted, grad = t["x"] + t["shift_in"], t["grad"]
    dx = torch.where(shifted > 0, grad, grad * t["slope"])
    dslope = (shifted.clamp(max=0) * grad).sum(PIXELS)
    return dx, dx.sum(PIXELS), dslope, grad.sum(PIXELS)


LAUNCHERS = {
    "rprelu_forward": Kind(
        run=lambda _, t: kernels.rprelu_forward(t["x"], t["shift_in"], t["slope"], t["shift_out"]),
        truth=elementwise(_z),
        formula=_forward_formula,
        inputs=stream_inputs,
        bytes_moved=images_moved(2),
        of_outputs=True,
    ),
    "rprelu_backward": Kind(
        run=lambda _, t: kernels.rprelu_backward(t["grad"], t["x"], t["shift_in"], t["slope"]),
        truth=elementwise(_gradients),
        formula=_backward_formula,
        inputs=stream_inputs,
        bytes_moved=images_moved(3),
        of_outputs=True,
    ),
}
