"""A unit on the one-bit tensor core: its statistics, its epilogue, the whole of it."""

import pytest
import torch

from tests.conftest import HAS_GPU
from tests.helpers import (
    KERNEL_DEVICE,
    activation,
    assert_no_worse_than_eager,
    gradient,
    vectors,
)
from tests.test_conv import PROBLEMS, by_unfolding, operands
from tritonbnn import eager, kernels, ops
from tritonbnn.checks import shortcut_input_shape
from tritonbnn.kernels import config
from tritonbnn.kernels.config import Choice, TileConfig
from tritonbnn.kernels.geometry import Geometry

ON_THE_CORE = Choice("mma", TileConfig(32, 16, 1, 4, 1))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_moments_are_those_of_the_written_integers(one_bit_core, problem):
    _, c, _, _, _, k, stride = problem
    packed = [each.to(KERNEL_DEVICE) for each in operands(problem)[2:]]
    window = {"channels": c, "stride": stride, "padding": k // 2}
    with config.using(ON_THE_CORE):
        results = kernels.conv_moments(*packed, **window)
    truth = eager.channel_moments(by_unfolding(*operands(problem)[:2], stride, k // 2).int())
    assert all(torch.equal(a.cpu(), b) for a, b in zip(results, truth, strict=True))


def test_moments_of_the_largest_sums_do_not_overflow(one_bit_core):
    x = torch.full((3, 9, 9, 32), -1, dtype=torch.int32, device=KERNEL_DEVICE)
    weight = torch.full((16, 3, 3, 32), -1, dtype=torch.int32, device=KERNEL_DEVICE)
    window = {"channels": 1024, "stride": 1, "padding": 1}
    with config.using(ON_THE_CORE):
        mean, variance = kernels.conv_moments(x, weight, **window)
    sums = torch.tensor([9216.0] * 49 + [6144.0] * 28 + [4096.0] * 4, dtype=torch.float64)
    assert torch.allclose(mean.cpu(), sums.mean().expand(16), rtol=1e-15)
    assert torch.allclose(variance.cpu(), sums.var(correction=0).expand(16), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activated", [True, False], ids=["prelu", "bare"])
@pytest.mark.parametrize("shortcut", ["identity", "pool", "repeat"])
def test_the_epilogue_is_that_of_the_unit(one_bit_core, shortcut, activated, dtype):
    k, stride = (3, 2) if shortcut == "pool" else (1, 1)
    outputs, height = (34, 5) if shortcut == "repeat" else (33, 10 if shortcut == "pool" else 5)
    problem = (2, 17 if shortcut == "repeat" else 33, height, 6, outputs, k, stride)
    _, _, *packed = operands(problem)
    shape = (2, outputs, (height + stride - 1) // stride, 6 // stride)
    stream = activation(*shortcut_input_shape(shape, shortcut), layout="channels_last")
    *affine, mid, slope, out, following = given = vectors(7, outputs)
    for tensor in (*given, stream.transpose(0, 1)):
        tensor[3] = 0  # sign(0) = +1
    rest = (mid, slope, out) if activated else (None,) * 3
    window = {"channels": problem[1], "stride": stride, "padding": k // 2}

    def run(module, on, to):
        wide = torch.promote_types(to, torch.float32)
        tensors = [
            None if v is None else v.to(device=on, dtype=wide) for v in (*affine, *rest, following)
        ]
        return module.conv_unit_forward(
            *(each.to(on) for each in packed),
            stream.to(device=on, dtype=to),
            *tensors,
            **window,
            shortcut=shortcut,
            pack=True,
        )

    with config.using(ON_THE_CORE):
        z, signs = run(kernels, KERNEL_DEVICE, dtype)
    exact, _ = run(eager, "cpu", torch.float64)
    usual, _ = run(eager, "cpu", dtype)
    assert (z.shape, z.dtype) == (shape, dtype)
    assert_no_worse_than_eager(z, usual, exact)
    assert torch.equal(signs.cpu(), eager.pack_signs(z.cpu(), following))


def test_a_whole_unit_runs_on_it(one_bit_core, monkeypatch):
    if not HAS_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = activation(2, 33, 4, 6)
    weight, grad = gradient(33, 33, 3, 3), gradient(2, 33, 2, 3, seed=6)
    leaves = [each.to(KERNEL_DEVICE) for each in (x, weight, *vectors(6, 33))]
    key = Geometry(2, 4, 6, 33, 33, 3, 2, 1).key("conv_packed", "int32")
    results = []
    for plan, table in (("recompute", {}), ("fused", {key: ON_THE_CORE})):
        tensors = [each.detach().requires_grad_() for each in leaves]
        with config.using(table):
            made = ops.binary_unit(*tensors, shortcut="pool", stride=2, plan=plan, pack=True)
            gradients = torch.autograd.grad(made.z, tensors, grad.to(KERNEL_DEVICE))
        results.append((made.z, made.mean, made.variance, *gradients))
        assert torch.equal(made.signs.cpu(), eager.pack_signs(made.z.detach().cpu()))
    for usual, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, usual)
