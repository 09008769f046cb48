"""The kernels at the shapes of a real network, on a GPU."""

from dataclasses import replace

import pytest
import torch

from tests.helpers import OF_BOTH_STEPS
from tritonbnn import eager, kernels
from tritonbnn.kernels import config, shipped, truth
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.problems import OPS, Problem

pytestmark = pytest.mark.gpu

BEYOND_INT32 = 2**31


@pytest.mark.parametrize("batch", [3, 256])
@pytest.mark.parametrize("layer", shipped.REPRESENTATIVE, ids=shipped.describe)
@pytest.mark.parametrize(("op", "binary_weight"), OF_BOTH_STEPS)
def test_bf16_at_real_shapes(gpu, op, binary_weight, layer, batch):
    problem = Problem(op, replace(layer, batch=batch), torch.bfloat16, binary_weight)
    inputs = problem.inputs(gpu)
    assert truth.error_of(problem, inputs, problem.run(inputs)) == ""


@pytest.mark.parametrize("op", OPS)
def test_float32_is_not_tf32(gpu, op):
    problem = Problem(op, replace(shipped.REPRESENTATIVE[1], batch=4), torch.float32)
    inputs = problem.inputs(gpu)
    assert truth.error_of(problem, inputs, problem.run(inputs)) == ""


@pytest.mark.parametrize("layer", shipped.REPRESENTATIVE, ids=shipped.describe)
def test_the_weight_gradient_is_the_same_every_time(gpu, layer):
    problem = Problem("conv_weight_grad", layer, torch.bfloat16)
    inputs = problem.inputs(gpu)
    first, again = problem.run(inputs)[0], problem.run(inputs)[0]
    assert torch.equal(first, again)


@pytest.mark.parametrize("layer", shipped.REPRESENTATIVE, ids=shipped.describe)
def test_formulations_agree_exactly(gpu, layer):
    problem = Problem("conv_packed", layer, torch.float32)
    inputs = problem.inputs(gpu)
    results = []
    for formulation in config.known_formulations("conv_packed"):
        with config.using(config.default(problem.key, formulation)):
            results.append(problem.run(inputs)[0])
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_addresses_beyond_int32_when_reading(gpu):
    x = torch.randn(1, 1024, 1025, 2050, dtype=torch.bfloat16, device=gpu)
    x = x.contiguous(memory_format=torch.channels_last)
    assert x.numel() > BEYOND_INT32
    packed = kernels.pack_signs(x)
    assert torch.equal(packed[:, -1], eager.pack_signs(x[:, :, -1:])[:, 0])
    dx, _ = kernels.sign_backward(x, x)
    last = eager.sign_backward(x[:, :, -1:], x[:, :, -1:])[0]
    torch.testing.assert_close(dx[:, :, -1:], last)


@pytest.mark.parametrize("formulation", config.known_formulations("conv_packed"))
def test_addresses_beyond_int32_when_writing(gpu, formulation):
    channels, outputs = 64, 2048
    x = torch.randint(-(2**31), 2**31 - 1, (1, 1025, 1025, 2), dtype=torch.int32, device=gpu)
    weight = torch.randint(-(2**31), 2**31 - 1, (outputs, 1, 1, 2), dtype=torch.int32, device=gpu)
    arguments = {"channels": channels, "stride": 1, "padding": 0, "dtype": torch.int16}
    key = Geometry(1, 1025, 1025, channels, outputs, 1, 1, 0).key("conv_packed", "int32")
    with config.using(config.default(key, formulation)):
        y = kernels.conv_packed(x, weight, None, **arguments)
    assert y.numel() > BEYOND_INT32
    last = eager.conv_packed(x[:, -1:], weight, None, **arguments)
    assert torch.equal(y[:, :, -1:], last)
