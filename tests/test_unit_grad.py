"""The fused half-block as a Function: its output and all its gradients."""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import activation, vectors
from tritonbnn import ops, reference

PLANS = ("keep", "recompute", "fused")
PARAMETERS = ("weight", "gamma", "beta", "shift_in", "shift_mid", "slope", "shift_out")
# (N, C, H, W), out channels, kernel size, stride, shortcut
UNITS = [
    pytest.param((2, 32, 8, 6), 32, 3, 1, "identity", id="identity"),
    pytest.param((3, 33, 5, 3), 33, 3, 1, "identity", id="odd"),
    pytest.param((1, 1, 1, 7), 1, 3, 1, "identity", id="one-channel"),
    pytest.param((2, 96, 6, 4), 96, 3, 2, "pool", id="pool"),
    pytest.param((2, 31, 3, 5), 62, 1, 1, "repeat", id="repeat"),
    pytest.param((2, 33, 6, 4), 40, 3, 2, "tensor", id="tensor"),
]


def leaves(shape, out_channels, kernel_size, shortcut, dtype):
    """Random tensors of a unit by name, each requiring grad."""
    n, channels, height, width = shape
    named = {
        "x": activation(*shape, layout="channels_last"),
        "weight": activation(out_channels, channels, kernel_size, kernel_size, seed=3) * 0.7,
        "shift_in": vectors(1, channels, seed=4)[0],
    }
    names = ("gamma", "beta", "shift_mid", "slope", "shift_out")
    named |= dict(zip(names, vectors(5, out_channels, seed=5), strict=True))
    if shortcut == "tensor":
        named["residual"] = activation(n, out_channels, height // 2, width // 2, seed=6)
    return {k: v.to(dtype).requires_grad_() for k, v in named.items()}


def shortcut_of(x, kind, residual=None):
    if kind == "pool":
        return F.avg_pool2d(x, 2)
    if kind == "repeat":
        return torch.cat((x, x), dim=1)
    return x if residual is None else residual


def by_reference(t, stride, kind, binary_weight):
    return reference.binary_unit(
        t["x"],
        t["shift_in"],
        *(t[k] for k in ("weight", "gamma", "beta", "shift_mid", "slope", "shift_out")),
        shortcut=shortcut_of(t["x"], kind, t.get("residual")),
        stride=stride,
        padding=t["weight"].shape[2] // 2,
        binary_weight=binary_weight,
    )


def by_unit(t, stride, kind, binary_weight, plan):
    return ops.binary_unit(
        t["x"],
        *(t[name] for name in PARAMETERS),
        shortcut=t.get("residual", kind),
        stride=stride,
        binary_weight=binary_weight,
        plan=plan,
    ).z


def with_gradients(run, tensors, device="cpu"):
    """The output of ``run`` and its gradients to all tensors, for a fixed upstream gradient."""
    moved = {k: v.detach().to(device).requires_grad_() for k, v in tensors.items()}
    z = run(moved)
    grad = activation(*z.shape, seed=8).to(z)
    return [z.detach(), *torch.autograd.grad(z, list(moved.values()), grad)]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("binary_weight", [True, False], ids=["step2", "step1"])
@pytest.mark.parametrize(("shape", "out", "kernel_size", "stride", "shortcut"), UNITS)
def test_all_gradients_in_float64(shape, out, kernel_size, stride, shortcut, binary_weight, plan):
    t = leaves(shape, out, kernel_size, shortcut, torch.float64)
    result = with_gradients(lambda m: by_unit(m, stride, shortcut, binary_weight, plan), t)
    truth = with_gradients(lambda m: by_reference(m, stride, shortcut, binary_weight), t)
    for actual, expected in zip(result, truth, strict=True):
        assert (actual - expected).abs().max() <= 1e-10 * max(expected.abs().max(), 1)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("binary_weight", [True, False], ids=["step2", "step1"])
@pytest.mark.parametrize(("shape", "out", "kernel_size", "stride", "shortcut"), UNITS)
def test_all_gradients_in_float32(
    launchers, device, shape, out, kernel_size, stride, shortcut, binary_weight, plan
):
    t = leaves(shape, out, kernel_size, shortcut, torch.float32)
    wide = {k: v.double() for k, v in t.items()}
    result = with_gradients(lambda m: by_unit(m, stride, shortcut, binary_weight, plan), t, device)
    truth = with_gradients(lambda m: by_reference(m, stride, shortcut, binary_weight), wide)
    for actual, expected in zip(result, truth, strict=True):
        assert (actual.cpu().double() - expected).norm() <= 1e-5 * max(expected.norm(), 0.1)


@pytest.mark.parametrize("shortcut", ["identity", "pool", "repeat"])
def test_given_statistics_are_used(launchers, device, shortcut):
    shape, out, stride = (2, 33, 6, 4), {"repeat": 66}.get(shortcut, 33), 1 + (shortcut == "pool")
    t = leaves(shape, out, 3, shortcut, torch.float32)
    mean, variance = vectors(2, out, seed=9)
    variance = variance.abs() + 0.5

    def run(m):
        given = mean.to(m["x"].device), variance.to(m["x"].device)
        output = ops.binary_unit(
            m["x"], *(m[k] for k in PARAMETERS), shortcut=shortcut, stride=stride, statistics=given
        )
        assert torch.equal(output.mean, given[0])
        return output.z

    def truth(m):
        a = reference.binary_conv2d(m["x"], m["weight"], m["shift_in"], stride=stride, padding=1)
        u = F.batch_norm(a, mean.double(), variance.double(), m["gamma"], m["beta"])
        u = u + shortcut_of(m["x"], shortcut)
        return reference.rprelu(u, m["shift_mid"], m["slope"], m["shift_out"])

    expected = with_gradients(truth, {k: v.double() for k, v in t.items()})
    for actual, exact in zip(with_gradients(run, t, device), expected, strict=True):
        assert (actual.cpu().double() - exact).norm() <= 1e-5 * exact.norm()
