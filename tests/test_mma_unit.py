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
from tritonbnn.kernels import config, mma_unit_grad
from tritonbnn.kernels.config import Choice, TileConfig
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.mma_unit import half_blocks, product_of
from tritonbnn.kernels.weight import fragments_of
from tritonbnn.layout import channels_last

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


@pytest.mark.parametrize("activated", [True, False], ids=["prelu", "bare"])
@pytest.mark.parametrize("shortcut", ["identity", "pool", "repeat"])
def test_the_backward_passes_are_those_of_the_unit(one_bit_core, shortcut, activated):
    k, stride = (3, 2) if shortcut == "pool" else (1, 1)
    channels, outputs = (17, 34) if shortcut == "repeat" else (33, 33)
    geometry = Geometry(3, 6 * stride, 5 * stride, channels, outputs, k, stride, k // 2)
    problem = (3, channels, geometry.height, geometry.width, outputs, k, stride)
    x, weight = (each.to(KERNEL_DEVICE) for each in operands(problem)[2:])
    shape = shortcut_input_shape(geometry.output_shape, shortcut)
    stream = activation(*shape, layout="channels_last").to(KERNEL_DEVICE)
    grad = channels_last(gradient(*geometry.output_shape).to(KERNEL_DEVICE))
    *norm, mid, slope, du_scale, a_scale, constant = (
        v.to(KERNEL_DEVICE) for v in vectors(8, outputs)
    )
    after = (mid, slope) if activated else (None, None)
    blocks = half_blocks(geometry)
    product = product_of(x, fragments_of(weight, channels, blocks.cut), blocks)
    passed = (product, grad, stream, torch.stack(norm), after)
    sums, by_bits = mma_unit_grad.activation_sums_mma(*passed, geometry, shortcut)
    last = (product, by_bits, torch.stack((du_scale, a_scale, constant)))
    (du, *nothing), dy = mma_unit_grad.unit_grad_mma(*last, stored=True)
    skipped, dy_again = mma_unit_grad.unit_grad_mma(*last, stored=False)
    assert nothing == [None, None]
    assert torch.equal(dy_again, dy)
    assert skipped.grad is grad
    if activated:
        signs = eager.unpack_signs(skipped.positive.cpu(), outputs, torch.float32).to(grad.device)
        from_signs = torch.where(signs > 0, grad, grad * slope.view(-1, 1, 1))
        assert torch.equal(from_signs, du)
        assert torch.equal(eager.pack_signs(signs.cpu()), skipped.positive.cpu())
    else:
        assert du is grad

    window = {"channels": channels, "stride": stride, "padding": k // 2, "dtype": torch.int32}
    a = eager.conv_packed(x.cpu(), weight.cpu(), None, **window)
    given = [None if v is None else v.cpu() for v in (grad, a, stream, *norm, *after)]
    usual_du, usual_sums = eager.unit_activation_backward(*given, shortcut=shortcut)
    torch.testing.assert_close(du.cpu(), usual_du)
    torch.testing.assert_close(sums.sum(0).cpu(), usual_sums, rtol=1e-5, atol=1e-3)
    coefficients = [each.cpu() for each in (du_scale, a_scale, constant)]
    usual_dy = eager.unit_norm_backward(usual_du, a, *coefficients)
    torch.testing.assert_close(dy.cpu(), usual_dy, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "shortcut",
    [
        "pool",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("identity", "repeat", "tensor")),
    ],
)
def test_a_whole_unit_runs_on_it(one_bit_core, monkeypatch, shortcut):
    if not HAS_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    stride = 2 if shortcut == "pool" else 1
    channels, outputs = (17, 34) if shortcut == "repeat" else (33, 33)
    x, weight = activation(2, channels, 4, 6), gradient(outputs, channels, 3, 3)
    grad = gradient(2, outputs, 4 // stride, 6 // stride, seed=6)
    affine, shift, after = vectors(2, outputs), vectors(1, channels), vectors(3, outputs, seed=5)
    given = (x, weight, *affine, *shift, *after, activation(*grad.shape, seed=7))
    leaves = [each.to(KERNEL_DEVICE) for each in given[: None if shortcut == "tensor" else -1]]
    key = Geometry(2, 4, 6, channels, outputs, 3, stride, 1).key("conv_packed", "int32")
    results = []
    for plan, table in (("recompute", {}), ("fused", {key: ON_THE_CORE})):
        tensors = [each.detach().requires_grad_() for each in leaves]
        options = {"shortcut": (*tensors, shortcut)[8], "stride": stride, "plan": plan}
        with config.using(table):
            made = ops.binary_unit(*tensors[:8], **options, pack=True)
            gradients = torch.autograd.grad(made.z, tensors, grad.to(KERNEL_DEVICE))
        results.append((made.z, made.mean, made.variance, *gradients))
        assert torch.equal(made.signs.cpu(), eager.pack_signs(made.z.detach().cpu()))
    for usual, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, usual)
