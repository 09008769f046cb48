"""The gradients of the binary convolution, to its input and to its weight."""

import pytest
import torch

from tests.helpers import (
    KERNEL_DEVICE,
    activation,
    assert_no_worse_than_eager,
    gradient,
    plus_minus,
    vectors,
)
from tests.test_conv import PROBLEMS
from tritonbnn import eager, kernels, reference
from tritonbnn.kernels import config, input_grad, weight_grad
from tritonbnn.kernels.binarize import Skipped
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.layout import channels_last

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Problem:
    """One convolution with a random upstream gradient, and its gradients by autograd.

    The input is +-0.5, where the pseudo-gradient's slope is exactly 1, and a weight is below 1,
    where the clip passes everything: autograd through ``reference`` gives the bare gradients.
    """

    def __init__(self, problem, dtype):
        n, c, h, w, o, k, stride = problem
        self.x = plus_minus(n, c, h, w) / 2
        self.weight = gradient(o, c, k, k, seed=4).div(8).clamp(-1, 1)
        self.geometry = {"stride": stride, "padding": k // 2}
        y = reference.binary_conv2d(self.x, self.weight, **self.geometry)
        self.grad = gradient(*y.shape, dtype=dtype, seed=5)
        self.size = {"channels": c, "height": h, "width": w}

    def autograd(self, dtype, binary_weight):
        """Gradients to input and weight, in ``dtype`` throughout."""
        x = self.x.to(dtype).requires_grad_()
        weight = self.weight.to(dtype).requires_grad_()
        y = reference.binary_conv2d(x, weight, binary_weight=binary_weight, **self.geometry)
        return torch.autograd.grad(y, (x, weight), self.grad.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PROBLEMS)
def test_the_gradient_to_the_input(launchers, device, shape, dtype):
    problem = Problem(shape, dtype)
    grad = problem.grad.to(device)
    packed, alpha = eager.pack_weight(problem.weight)
    weights = {
        True: (packed.to(device), alpha.to(device)),
        False: (problem.weight.to(device), None),
    }
    for binary, weight in weights.items():
        dx = launchers.conv_input_grad(grad, *weight, **problem.size, **problem.geometry)
        assert dx.dtype == dtype
        assert dx.permute(0, 2, 3, 1).is_contiguous()
        ordinary, truth = (problem.autograd(kind, binary)[0] for kind in (dtype, torch.float64))
        assert_no_worse_than_eager(dx, ordinary, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PROBLEMS)
def test_the_gradient_to_the_weight(launchers, device, shape, dtype):
    problem = Problem(shape, dtype)
    packed = eager.pack_signs(problem.x).to(device)
    dweight = launchers.conv_weight_grad(
        problem.grad.to(device),
        packed,
        channels=shape[1],
        kernel_size=shape[5],
        **problem.geometry,
    )
    assert dweight.dtype == torch.float32
    ordinary, truth = (problem.autograd(kind, True)[1] for kind in (dtype, torch.float64))
    assert_no_worse_than_eager(dweight, ordinary, truth)


def test_pixels_split_over_programs_give_the_same_sum(monkeypatch):
    problem = Problem((2, 33, 5, 3, 20, 3, 1), torch.float32)
    packed = eager.pack_signs(problem.x).to(KERNEL_DEVICE)
    grad = problem.grad.to(KERNEL_DEVICE)
    arguments = {"channels": 33, "kernel_size": 3, **problem.geometry}
    monkeypatch.setattr(weight_grad, "MIN_STEPS", 1)
    tile = config.TileConfig(32, 64, 16, 4, 1)
    with config.using(config.Choice("dot", tile)):
        first = kernels.conv_weight_grad(grad, packed, **arguments)
        again = kernels.conv_weight_grad(grad, packed, **arguments)
    assert torch.equal(first, again)
    ordinary, truth = (problem.autograd(kind, True)[1] for kind in (torch.float32, torch.float64))
    assert_no_worse_than_eager(first, ordinary, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_library_formulation_agrees(dtype):
    problem = Problem((2, 33, 5, 3, 7, 3, 2), dtype)
    packed, alpha = (t.to(KERNEL_DEVICE) for t in eager.pack_weight(problem.weight))
    signs = eager.pack_signs(problem.x).to(KERNEL_DEVICE)
    grad = problem.grad.to(KERNEL_DEVICE)
    tile = config.TileConfig(16, 16, 32, 4, 1)
    with config.using(config.Choice("library", tile)):
        dx = kernels.conv_input_grad(grad, packed, alpha, **problem.size, **problem.geometry)
        dweight = kernels.conv_weight_grad(
            grad, signs, channels=33, kernel_size=3, **problem.geometry
        )
    ordinary, truth = (problem.autograd(kind, True) for kind in (dtype, torch.float64))
    assert_no_worse_than_eager(dx, ordinary[0], truth[0])
    assert_no_worse_than_eager(dweight.to(dtype), ordinary[1], truth[1])


@pytest.mark.parametrize("formulation", ["dot", "library"])
@pytest.mark.parametrize(
    ("shortcut", "channels"),
    [("identity", 33), ("identity", 13), ("pool", 40), ("repeat", 33), ("repeat", 40)],
)
def test_signs_and_slope_give_the_skipped_gradient(shortcut, channels, formulation):
    n, h, w, dtype = 3, 2, 4, torch.float16  # in which slope times gradient is rounded
    stride, outputs = 1 + (shortcut == "pool"), channels * (1 + (shortcut == "repeat"))
    geometry = Geometry(n, h, w, channels, outputs, 3, stride, 1)
    given = gradient(*geometry.output_shape, dtype=dtype, seed=4)
    dy = gradient(*geometry.output_shape, dtype=dtype, seed=5)
    stream = activation(n, channels, h, w, dtype=dtype)
    real = gradient(outputs, channels, 3, 3, dtype=dtype, seed=6)
    given, dy, stream, real = (
        channels_last(each.to(KERNEL_DEVICE)) for each in (given, dy, stream, real)
    )
    positive = plus_minus(*geometry.output_shape)
    slope = vectors(1, outputs)[0].to(KERNEL_DEVICE)
    low = (given.float() * slope.view(-1, 1, 1)).to(dtype)
    du = channels_last(torch.where(positive.to(KERNEL_DEVICE) > 0, given, low))
    packed = eager.pack_signs(positive).to(KERNEL_DEVICE)
    results = []
    with config.using(config.Choice(formulation, config.TileConfig(16, 32, 32, 4, 1))):
        for skipped in (Skipped(du), Skipped(given, packed, slope)):
            passed = (dy, real, geometry, stream, None, skipped, shortcut)
            results.append(input_grad.stream_grad(*passed))
    for whole, by_signs in zip(*results, strict=True):
        assert torch.equal(whole, by_signs)


def test_an_empty_batch_has_no_gradient(launchers, device):
    grad = torch.zeros(0, 7, 5, 3, device=device)
    weight = torch.zeros(7, 1, 1, 2, dtype=torch.int32, device=device)
    x = torch.zeros(0, 5, 3, 2, dtype=torch.int32, device=device)
    alpha = torch.ones(7, device=device)
    geometry = {"channels": 40, "stride": 1, "padding": 0}
    dx = launchers.conv_input_grad(grad, weight, alpha, height=5, width=3, **geometry)
    assert dx.shape == (0, 40, 5, 3)
    dweight = launchers.conv_weight_grad(grad, x, kernel_size=1, **geometry)
    assert torch.equal(dweight.cpu(), torch.zeros(7, 40, 1, 1))


def test_bad_input_is_named():
    grad = torch.zeros(2, 7, 5, 3)
    weight = torch.zeros(7, 3, 3, 2, dtype=torch.int32)
    good = {"channels": 40, "height": 5, "width": 3, "stride": 1, "padding": 1}
    with pytest.raises(ValueError, match=r"grad must have shape \(2, 7, 3, 2\)"):
        kernels.conv_input_grad(grad, weight, torch.ones(7), **{**good, "stride": 2})
    with pytest.raises(ValueError, match=r"alpha must have shape \(7,\)"):
        kernels.conv_input_grad(grad, weight, torch.ones(6), **good)
    with pytest.raises(ValueError, match="weight must have 40 input channels, not 39"):
        kernels.conv_input_grad(grad, torch.zeros(7, 39, 3, 3), None, **good)
    with pytest.raises(ValueError, match="must not be negative, not 2, -5, 3"):
        kernels.conv_input_grad(grad, weight, torch.ones(7), **{**good, "height": -5})
    x = torch.zeros(2, 5, 3, 2, dtype=torch.int32)
    with pytest.raises(TypeError, match="grad is float64"):
        kernels.conv_weight_grad(grad.double(), x, channels=40, kernel_size=3, stride=1, padding=1)
