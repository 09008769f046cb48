"""The convolution and its gradients.

The truth's input is +-0.5, where the pseudo-gradient's slope is exactly 1, so that autograd yields
the bare gradient of the convolution.
"""

import torch
from torch import Tensor

from tritonbnn import eager, kernels, reference
from tritonbnn.bits import words
from tritonbnn.kernels import config
from tritonbnn.kernels.problems.problem import (
    WORD_BYTES,
    Kind,
    Problem,
    Tensors,
    Truth,
    image,
    random_signs,
)

INTEGER_BYTES = 2
"""Of a convolution's output."""


def operands(problem: Problem, device: torch.device) -> Tensors:
    """Packed input, weight as numbers and as packed signs, scale, and gradient."""
    layer = problem.layer
    x_shape = (layer.batch, layer.channels, layer.height, layer.width)
    weight_shape = (layer.out_channels, layer.channels, layer.kernel_size, layer.kernel_size)
    return {
        "signs": random_signs(x_shape, device),
        "weight": image(weight_shape, torch.float32, device).div_(8).clamp_(-1, 1),
        "weight_signs": random_signs(weight_shape, device),
        "alpha": torch.rand(layer.out_channels, device=device),
        "grad": image(layer.output_shape, problem.dtype, device),
    }


def _key(problem: Problem) -> config.ProblemKey:
    return problem.layer.key(problem.op, config.dtype_name(problem.dtype))


def _packed_key(problem: Problem) -> config.ProblemKey:
    return problem.layer.key("conv_packed", "int32")


def _window(problem: Problem) -> dict[str, int]:
    layer = problem.layer
    return {"channels": layer.channels, "stride": layer.stride, "padding": layer.padding}


def _truth(result: str, *, binary: bool, scaled: bool) -> Truth:
    """y, dx or dweight of conv2d on numbers; alpha counts as part of the weight."""

    def truth(problem: Problem, t: Tensors, dtype: torch.dtype) -> tuple[Tensor, ...]:
        layer = problem.layer
        x = eager.unpack_signs(t["signs"], layer.channels, dtype).div_(2).requires_grad_()
        weight = t["weight"].to(dtype)
        if binary:
            weight = eager.unpack_signs(t["weight_signs"], layer.channels, dtype)
        if scaled:
            weight = weight * t["alpha"].to(dtype).view(-1, 1, 1, 1)
        weight = weight.requires_grad_()
        y = reference.binary_conv2d(
            x, weight, stride=layer.stride, padding=layer.padding, binary_weight=False
        )
        if result == "y":
            return (y.detach(),)
        return torch.autograd.grad(y, x if result == "dx" else weight, t["grad"].to(dtype))

    return truth


def _sizes(problem: Problem) -> tuple[int, int, int, int]:
    """Weights a channel, bytes of a pixel's signs, pixels, and outputs."""
    layer = problem.layer
    taps = layer.out_channels * layer.kernel_size**2
    pixels = layer.batch * layer.height * layer.width
    return taps, WORD_BYTES * words(layer.channels), pixels, layer.pixels * layer.out_channels


def _packed_bytes(problem: Problem) -> int:
    taps, word_bytes, pixels, outputs = _sizes(problem)
    return (pixels + taps) * word_bytes + INTEGER_BYTES * outputs


def _scaled_bytes(problem: Problem) -> int:
    taps, word_bytes, pixels, outputs = _sizes(problem)
    return (pixels + taps) * word_bytes + problem.dtype.itemsize * outputs


def _real_bytes(problem: Problem) -> int:
    taps, word_bytes, pixels, outputs = _sizes(problem)
    numbers = taps * problem.layer.channels + outputs
    return pixels * word_bytes + problem.dtype.itemsize * numbers


def _input_grad_bytes(problem: Problem) -> int:
    taps, word_bytes, pixels, outputs = _sizes(problem)
    numbers = outputs + pixels * problem.layer.channels
    return problem.dtype.itemsize * numbers + taps * word_bytes


def _weight_grad_bytes(problem: Problem) -> int:
    taps, word_bytes, pixels, outputs = _sizes(problem)
    return (
        pixels * word_bytes + problem.dtype.itemsize * outputs + 4 * taps * problem.layer.channels
    )


LAUNCHERS = {
    "conv_packed": Kind(
        run=lambda p, t: kernels.conv_packed(
            t["signs"], t["weight_signs"], None, dtype=torch.int16, **_window(p)
        ),
        truth=_truth("y", binary=True, scaled=False),
        bytes_moved=_packed_bytes,
        key=_packed_key,
        product="bits",
        inputs=operands,
    ),
    # conv_packed as binary_conv2d launches it: times alpha, in the stream's dtype
    "conv_scaled": Kind(
        run=lambda p, t: kernels.conv_packed(
            t["signs"], t["weight_signs"], t["alpha"], dtype=p.dtype, **_window(p)
        ),
        truth=_truth("y", binary=True, scaled=True),
        bytes_moved=_scaled_bytes,
        key=_packed_key,
        product="bits",
        inputs=operands,
    ),
    "conv_real": Kind(
        run=lambda p, t: kernels.conv_real(
            t["signs"], t["weight"], stride=p.layer.stride, padding=p.layer.padding, dtype=p.dtype
        ),
        truth=_truth("y", binary=False, scaled=False),
        bytes_moved=_real_bytes,
        key=_key,
        product="real",
        inputs=operands,
    ),
    "conv_input_grad": Kind(
        run=lambda p, t: kernels.conv_input_grad(
            t["grad"],
            t["weight_signs"],
            t["alpha"],
            height=p.layer.height,
            width=p.layer.width,
            **_window(p),
        ),
        truth=_truth("dx", binary=True, scaled=True),
        bytes_moved=_input_grad_bytes,
        key=_key,
        product="real",
        inputs=operands,
    ),
    "conv_weight_grad": Kind(
        run=lambda p, t: kernels.conv_weight_grad(
            t["grad"], t["signs"], kernel_size=p.layer.kernel_size, **_window(p)
        ),
        truth=_truth("dweight", binary=False, scaled=False),
        bytes_moved=_weight_grad_bytes,
        key=_key,
        product="real",
        inputs=operands,
    ),
}
