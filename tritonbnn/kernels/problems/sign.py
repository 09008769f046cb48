"""Signs of a layer's input: packed, as numbers, and back to the input."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonbnn import eager, kernels, reference
from tritonbnn.bits import WORD_BITS, words
from tritonbnn.kernels import config
from tritonbnn.kernels.problems.problem import (
    PIXELS,
    WORD_BYTES,
    Kind,
    Problem,
    Tensors,
    elementwise,
    image,
    images_moved,
    random_signs,
    stream_inputs,
)


def shortcut(problem: Problem, x: Tensor) -> Tensor:
    """What skips the convolution of a unit around this layer."""
    if problem.shortcut == "pool":
        return F.avg_pool2d(x, 2)
    return torch.cat((x, x), dim=1) if problem.shortcut == "repeat" else x


def _signs(problem: Problem, t: Tensors) -> tuple[Tensor, ...]:
    return (reference.hard_sign(t["x"] + t["shift_in"]),)


def _signs_formula(t: Tensors, shortcut: str) -> Tensor:
    return torch.where(t["x"] + t["shift_in"] >= 0, 1.0, -1.0).to(t["x"].dtype)


def _packed_bytes(problem: Problem) -> int:
    batch, channels, height, width = problem.shape
    per_pixel = problem.dtype.itemsize * channels + WORD_BYTES * words(channels)
    return batch * height * width * per_pixel


def _with_residual(problem: Problem, device: torch.device) -> Tensors:
    """With the gradient that a shortcut sends back to the layer's input."""
    n, channels, height, width = problem.shape
    shape = {
        "identity": problem.shape,
        "repeat": (n, 2 * channels, height, width),
        "pool": (n, channels, height // 2, width // 2),
    }[problem.shortcut]
    inputs = stream_inputs(problem, device)
    inputs["residual"] = image(shape, problem.dtype, device)
    return inputs


def _gradients(problem: Problem, t: Tensors) -> tuple[Tensor, ...]:
    x, shift = t["x"].requires_grad_(), t["shift_in"]
    ds, dshift = torch.autograd.grad(reference.binarize(x, shift), (x, shift), t["grad"])
    (skipped,) = torch.autograd.grad(shortcut(problem, x), x, t["residual"])
    return ds + skipped, dshift


def _gradients_formula(t: Tensors, shortcut: str) -> tuple[Tensor, Tensor]:
    ds = (2 - 2 * (t["x"] + t["shift_in"]).abs()).clamp(min=0) * t["grad"]
    skipped = t["residual"]
    if shortcut == "pool":
        skipped = (skipped / 4).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    if shortcut == "repeat":
        first, second = skipped.chunk(2, dim=1)
        skipped = first + second
    return ds + skipped, ds.sum(PIXELS)


def _gradient_bytes(problem: Problem) -> int:
    residual = {"identity": 1, "repeat": 2, "pool": 0.25}[problem.shortcut]
    return images_moved(3 + residual)(problem)


def _difference_key(problem: Problem) -> config.ProblemKey:
    """A row is what one pixel's channels pack to."""
    batch, channels, height, width = problem.shape
    rows, bits = batch * height * width, WORD_BITS * words(channels)
    return config.ProblemKey(problem.op, "int32", rows, 1, 1, bits)


def _difference(problem: Problem, t: Tensors, dtype: torch.dtype) -> tuple[Tensor, ...]:
    a, b = (eager.unpack_signs(t[name], problem.layer.channels, dtype) for name in "ab")
    return ((a != b).sum(dim=1),)


def _difference_bytes(problem: Problem) -> int:
    batch, channels, height, width = problem.shape
    return batch * height * width * WORD_BYTES * (2 * words(channels) + 1)


def _two_rows(problem: Problem, device: torch.device) -> Tensors:
    return {name: random_signs(problem.shape, device).flatten(0, 2) for name in ("a", "b")}


LAUNCHERS = {
    "packed_difference": Kind(
        run=lambda _, t: kernels.packed_difference(t["a"], t["b"]),
        truth=_difference,
        formula=lambda t, _: eager.packed_difference(t["a"], t["b"]).float(),
        inputs=_two_rows,
        bytes_moved=_difference_bytes,
        key=_difference_key,
    ),
    "pack_signs": Kind(
        run=lambda _, t: kernels.pack_signs(t["x"], t["shift_in"]),
        truth=elementwise(_signs),
        formula=_signs_formula,
        inputs=stream_inputs,
        bytes_moved=_packed_bytes,
        packs=True,
    ),
    "sign_forward": Kind(
        run=lambda _, t: kernels.sign_forward(t["x"], t["shift_in"]),
        truth=elementwise(_signs),
        formula=_signs_formula,
        inputs=stream_inputs,
        bytes_moved=images_moved(2),
    ),
    "sign_backward": Kind(
        run=lambda p, t: kernels.sign_backward(
            t["grad"], t["x"], t["shift_in"], t["residual"], shortcut=p.shortcut
        ),
        truth=elementwise(_gradients),
        formula=_gradients_formula,
        inputs=_with_residual,
        bytes_moved=_gradient_bytes,
    ),
}
