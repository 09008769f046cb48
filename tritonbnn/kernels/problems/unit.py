"""The passes of a unit around its convolution, and the unit as a whole."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonbnn import kernels, ops, reference
from tritonbnn.bits import words
from tritonbnn.checks import shortcut_input_shape
from tritonbnn.contract import Averages, Options, Statistics
from tritonbnn.kernels import config, whole
from tritonbnn.kernels.problems import conv
from tritonbnn.kernels.problems.problem import (
    PIXELS,
    PLAN,
    WORD_BYTES,
    Kind,
    Problem,
    Tensors,
    elementwise,
    grid,
    image,
    vector_inputs,
)
from tritonbnn.kernels.problems.sign import shortcut
from tritonbnn.kernels.unit_norm import batch_norm, local_sums

_UNIT = ("a", "stream", "mean", "scale", "offset", "shift_mid", "slope")

_WHOLE = ("stream", "weight", "scale", "offset", "shift_in", "shift_mid", "slope", "shift_out")
"""The operands of a whole unit, as binary_unit takes them; scale and offset are BatchNorm's."""


def _operands(problem: Problem, device: torch.device) -> Tensors:
    """A convolution's output, the stream that skips it, and vectors."""
    shape = problem.shape
    inputs = vector_inputs(problem, device)
    integers = image(shape, torch.float32, device).mul_(16).to(torch.int16)
    inputs["a"] = integers.to(problem.output_dtype)
    inputs["scale"] = torch.full((shape[1],), 1 / 16, device=device)
    stream = image(shortcut_input_shape(shape, problem.shortcut), problem.dtype, device)
    inputs["stream"] = grid(stream)
    return inputs


def _whole_operands(problem: Problem, device: torch.device) -> Tensors:
    inputs = _operands(problem, device)
    inputs["weight"] = conv.operands(problem, device)["weight"]
    inputs["shift_in"] = grid(torch.randn(problem.layer.channels, device=device))
    return inputs


def _key(problem: Problem, *others: torch.dtype) -> config.ProblemKey:
    batch, channels, height, width = problem.shape
    name = config.joint_dtype_name(problem.output_dtype, *others)
    return config.ProblemKey(problem.op, name, batch, height, width, channels)


def _key_with_stream(problem: Problem) -> config.ProblemKey:
    return _key(problem, problem.dtype)


def _whole_key(problem: Problem) -> config.ProblemKey:
    name = config.joint_dtype_name(problem.output_dtype, problem.dtype)
    return problem.layer.key(PLAN, name)


def _bytes(problem: Problem, outputs: int, images: int, streams: int = 0, packs: int = 0) -> int:
    """Of so many convolution outputs, images, shortcuts' streams and packed signs."""
    batch, channels, height, width = problem.shape
    image = problem.dtype.itemsize * channels
    stream = {"identity": image, "repeat": image // 2, "pool": 4 * image}[problem.shortcut]
    per_pixel = outputs * problem.output_dtype.itemsize * channels + images * image
    per_pixel += streams * stream + packs * WORD_BYTES * words(channels)
    return batch * height * width * per_pixel


def _moments(problem: Problem, t: Tensors) -> tuple[Tensor, ...]:
    variance, mean = torch.var_mean(t["a"], dim=PIXELS, correction=0)
    return mean, variance


def _moments_formula(t: Tensors, shortcut: str) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(t["a"].float(), dim=PIXELS, correction=0)
    return mean, variance


def _pre_activation(problem: Problem, t: Tensors) -> Tensor:
    return (t["a"] - t["mean"]) * t["scale"] + t["offset"] + shortcut(problem, t["stream"])


def _z(problem: Problem, t: Tensors) -> tuple[Tensor, ...]:
    u = _pre_activation(problem, t)
    return (reference.rprelu(u, t["shift_mid"], t["slope"], t["shift_out"]),)


def _gradients(problem: Problem, t: Tensors) -> tuple[Tensor, ...]:
    """du, and the sums of du, du (a - mean), grad min(t, 0) and grad in one row each."""
    u = _pre_activation(problem, t)
    z = reference.rprelu(u, t["shift_mid"], t["slope"], t["shift_out"])
    leaves = (u, t["offset"], t["scale"], t["slope"], t["shift_out"])
    du, *sums = torch.autograd.grad(z, leaves, t["grad"])
    return du, torch.stack([each.flatten() for each in sums])


def _shifted_formula(t: Tensors, shortcut: str) -> Tensor:
    stream = t["stream"]
    if shortcut == "pool":
        stream = F.avg_pool2d(stream, 2)
    if shortcut == "repeat":
        stream = torch.cat((stream, stream), dim=1)
    return (t["a"] - t["mean"]) * t["scale"] + t["offset"] + stream + t["shift_mid"]


def _z_formula(t: Tensors, shortcut: str) -> Tensor:
    return F.prelu(_shifted_formula(t, shortcut), t["slope"].flatten()) + t["shift_out"]


def _gradients_formula(t: Tensors, shortcut: str) -> tuple[Tensor, ...]:
    u, grad = _shifted_formula(t, shortcut), t["grad"]
    du = torch.where(u > 0, grad, grad * t["slope"])
    centred = t["a"] - t["mean"]
    parts = (du, du * centred, u.clamp(max=0) * grad, grad)
    return du, torch.stack([part.sum(PIXELS) for part in parts])


def _norm_formula(t: Tensors, shortcut: str) -> Tensor:
    return t["scale"] * t["grad"] + t["slope"] * t["a"] + t["offset"]


def _run_whole(problem: Problem, t: Tensors) -> tuple[Tensor, ...]:
    """A unit's output and all its gradients, under the plan of the tuning table."""
    if t["stream"].is_meta:  # torch would ask for shapes only, and nothing would be launched
        return _launch_whole(problem, t)
    leaves = [t[name].detach().requires_grad_() for name in _WHOLE]
    z = ops.binary_unit(
        *leaves,
        shortcut=problem.shortcut,
        stride=problem.layer.stride,
        binary_weight=problem.binary_weight,
    ).z
    return z.detach(), *torch.autograd.grad(z, leaves, t["grad"])


def _launch_whole(problem: Problem, t: Tensors) -> tuple[Tensor, ...]:
    """All that a unit's passes launch: training, eval mode, and statistics of several processes."""
    x, weight, gamma, beta, shift_in, shift_mid, slope, shift_out = (t[name] for name in _WHOLE)
    given = Statistics(t["mean"], t["scale"])
    counter = torch.zeros((), dtype=torch.int64, device=x.device)
    options = Options(
        stride=problem.layer.stride,
        shortcut=problem.shortcut,
        binary_weight=problem.binary_weight,
        eps=1e-5,
        plan=config.choose(problem.key, x.device).formulation,
        group=None,
        pack=True,
        averages=Averages(*given, counter, momentum=0.1),
    )
    operands = (x, weight, gamma, beta, shift_in, shift_mid, slope, shift_out, None, None)
    whole.forward(*operands, t["offset"], given, options)
    (z, *_), kept = whole.forward(*operands, t["offset"], None, options)
    sums = torch.empty(2, 2, len(gamma), dtype=torch.int64, device=x.device)
    batch_norm(local_sums(sums, None, 1), None, 1, None, gamma, beta, options)
    backward = (t["grad"], x, weight, gamma, shift_in, shift_mid, slope, None)
    gradients = whole.backward(*backward, kept, options, wants_input=True, wants_weight=True)
    return z, *(each for each in gradients if each is not None)


def _whole(problem: Problem, t: Tensors, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """z and the gradients to all leaves."""
    leaves = [t[name].to(dtype).requires_grad_() for name in _WHOLE]
    x, weight, gamma, beta, shift_in, *activation = leaves
    z = reference.binary_unit(
        *(x, shift_in, weight, gamma, beta, *activation),
        shortcut=shortcut(problem, x),
        stride=problem.layer.stride,
        padding=problem.layer.padding,
        binary_weight=problem.binary_weight,
    )
    return z.detach(), *torch.autograd.grad(z, leaves, t["grad"].to(dtype))


LAUNCHERS = {
    "channel_moments": Kind(
        run=lambda _, t: kernels.channel_moments(t["a"]),
        truth=elementwise(_moments),
        formula=_moments_formula,
        inputs=_operands,
        bytes_moved=lambda p: _bytes(p, outputs=1, images=0),
        key=_key,
        on_convolution=True,
    ),
    "unit_forward": Kind(
        run=lambda p, t: kernels.unit_forward(
            **{name: t[name] for name in (*_UNIT, "shift_out")},
            next_shift=t["offset"],
            shortcut=p.shortcut,
            pack=True,  # as in a chain; the stream is what is compared
        )[0],
        truth=elementwise(_z),
        formula=_z_formula,
        inputs=_operands,
        bytes_moved=lambda p: _bytes(p, outputs=1, images=1, streams=1, packs=1),
        key=_key_with_stream,
        on_convolution=True,
    ),
    "unit_activation_backward": Kind(
        run=lambda p, t: kernels.unit_activation_backward(
            **{name: t[name] for name in ("grad", *_UNIT)}, shortcut=p.shortcut
        ),
        truth=elementwise(_gradients),
        formula=_gradients_formula,
        inputs=_operands,
        bytes_moved=lambda p: _bytes(p, outputs=1, images=2, streams=1),
        key=_key_with_stream,
        on_convolution=True,
    ),
    "unit_norm_backward": Kind(
        run=lambda _, t: kernels.unit_norm_backward(
            t["grad"], t["a"], t["scale"], t["slope"], t["offset"]
        ),
        truth=elementwise(lambda _, t: (_norm_formula(t, ""),)),
        formula=_norm_formula,
        inputs=_operands,
        bytes_moved=lambda p: _bytes(p, outputs=1, images=2),
        key=_key_with_stream,
        on_convolution=True,
    ),
    PLAN: Kind(
        run=_run_whole,
        truth=_whole,
        inputs=_whole_operands,
        bytes_moved=lambda p: _bytes(p, outputs=0, images=0),
        key=_whole_key,
        on_convolution=True,
    ),
}
