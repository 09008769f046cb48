"""The fused half-block: its launchers, the whole Function with all gradients, and its module."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers import activation, assert_no_worse_than_eager, vectors
from tritonbnn import eager, kernels, ops, reference
from tritonbnn.kernels import config
from tritonbnn.kernels import unit as unit_kernels
from tritonbnn.nn import BinaryUnit

PLANS = ("keep", "recompute")
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


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_moments_of_integers_are_exact(launchers, device, monkeypatch, dtype):
    monkeypatch.setattr(unit_kernels, "MAX_PARTIALS", 3)
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-9216, 9217, (7, 33, 11, 13), generator=generator, dtype=dtype)
    a[:, 5] = 9216
    mean, variance = (m.cpu() for m in launchers.channel_moments(a.to(device)))
    values = a.transpose(0, 1).reshape(33, -1).tolist()
    total = [sum(v) for v in values]
    count = len(values[0])
    spread = [sum(x * x for x in v) * count - s * s for v, s in zip(values, total, strict=True)]
    assert mean.tolist() == [s / count for s in total]
    exact = torch.tensor([s / count**2 for s in spread], dtype=torch.float64)
    # One rounding of mean^2, which is at most 9216^2.
    assert (variance - exact).abs().max() <= 2**-52 * 9216**2
    assert variance[5] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_reals_survive_a_large_mean(launchers, device, dtype):
    a = activation(4, 33, 5, 7, dtype=dtype, layout="channels_last") + 1000
    mean, variance = (m.cpu() for m in launchers.channel_moments(a.to(device)))
    truth = torch.var_mean(a.double(), dim=(0, 2, 3), correction=0)
    assert torch.allclose(variance, truth[0], rtol=1e-5)
    assert torch.allclose(mean, truth[1], rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shortcut", ["identity", "pool", "repeat"])
def test_launchers_are_no_worse_than_eager(launchers, device, dtype, shortcut):
    size = {"pool": (33, 10, 6), "identity": (33, 5, 3), "repeat": (17, 5, 3)}[shortcut]
    channels = 34 if shortcut == "repeat" else 33
    a = (activation(2, channels, 5, 3, seed=2) * 20).to(torch.int16)
    a = a.contiguous(memory_format=torch.channels_last)
    stream = activation(2, *size, dtype=dtype, layout="channels_last")
    grad = activation(2, channels, 5, 3, dtype=dtype, seed=5)
    mean, scale, offset, shift_mid, slope, shift_out = vectors(6, channels)

    def run(module, on, to):
        m = [v.to(device=on, dtype=to) for v in (mean, scale, offset, shift_mid, slope, shift_out)]
        s, g = stream.to(device=on, dtype=to), grad.to(device=on, dtype=to)
        z = module.unit_forward(a.to(on), s, *m, shortcut=shortcut)
        du, sums = module.unit_activation_backward(g, a.to(on), s, *m[:5], shortcut=shortcut)
        return z, du, *sums, module.unit_norm_backward(g, a.to(on), *m[:3])

    exact = run(eager, "cpu", torch.float64)
    # The eager twin in this dtype is the yardstick, not the truth.
    plain = run(eager, "cpu", dtype)
    for result, ordinary, truth in zip(run(launchers, device, dtype), plain, exact, strict=True):
        assert_no_worse_than_eager(result, ordinary, truth)


@pytest.mark.parametrize("rprelu", [True, False], ids=["reactnet", "bireal"])
@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(33, 33, 1), (33, 33, 2), (17, 34, 1)])
def test_fused_module_equals_the_composition(inputs, outputs, stride, rprelu):
    torch.manual_seed(0)
    units = [
        BinaryUnit(inputs, outputs, 3, stride, rprelu=rprelu, fused=f).double()
        for f in (True, False)
    ]
    for parameter in units[0].parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    units[1].load_state_dict(units[0].state_dict())
    for batch in range(3):
        x = torch.randn(2, inputs, 6, 4, dtype=torch.float64)
        grad = torch.randn(2, outputs, 6 // stride, 4 // stride, dtype=torch.float64)
        for unit in units:
            unit.train(batch < 2)
            unit(x).backward(grad)
    for name, value in units[1].state_dict().items():
        assert torch.allclose(units[0].state_dict()[name], value, rtol=1e-12), name
    for (name, a), b in zip(units[0].named_parameters(), units[1].parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-10 * b.grad.abs().max(), name


def test_running_statistics_follow_batch_norm(launchers, device):
    torch.manual_seed(0)
    unit, bn = BinaryUnit(8, 8, 1).to(device), nn.BatchNorm2d(8)
    for momentum in (0.1, None):
        unit.bn.momentum = bn.momentum = momentum
        x = torch.randn(3, 8, 5, 3)
        unit(x.to(device))
        bn(reference.binary_conv2d(x, unit.weight.detach().cpu()))
    assert torch.allclose(unit.bn.running_mean.cpu(), bn.running_mean, rtol=1e-5, atol=1e-7)
    assert torch.allclose(unit.bn.running_var.cpu(), bn.running_var, rtol=1e-5)
    assert unit.bn.num_batches_tracked == bn.num_batches_tracked == 2


def test_a_dead_filter_does_no_harm(launchers, device):
    """All weights of one output are 0, so its scale is 0: output and gradients stay finite."""
    unit = BinaryUnit(8, 8, 1).to(device)
    unit.weight.data[3] = 0
    x = torch.randn(2, 8, 3, 3, device=device, requires_grad=True)
    for training in (True, False):
        unit.train(training)(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in unit.parameters())


def test_frozen_parameters_and_inputs_get_no_gradient(launchers, device):
    unit = BinaryUnit(8, 8, 3).to(device)
    x = torch.randn(2, 8, 3, 3, device=device)
    unit(x).sum().backward()
    assert x.grad is None
    full = {name: p.grad.clone() for name, p in unit.named_parameters()}
    unit.zero_grad()
    frozen = ("weight", "shift_in", "bn.weight", "slope")
    for name in frozen:
        unit.get_parameter(name).requires_grad_(False)
    unit(x).sum().backward()
    for name, parameter in unit.named_parameters():
        if name in frozen:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, full[name])


def test_an_empty_batch(launchers, device):
    unit = BinaryUnit(8, 16, 1).to(device)
    before = {k: v.clone() for k, v in unit.state_dict().items()}
    x = torch.zeros(0, 8, 4, 4, device=device, requires_grad=True)
    z = unit(x)
    z.sum().backward()
    assert z.shape == (0, 16, 4, 4)
    assert x.grad.shape == x.shape
    assert all((p.grad == 0).all() for p in unit.parameters())
    assert all(torch.equal(v, before[k]) for k, v in unit.state_dict().items())


def test_autocast_is_followed():
    unit = BinaryUnit(8, 8, 3)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = unit(x)
    z.float().sum().backward()
    assert z.dtype == torch.bfloat16
    assert x.grad.dtype == torch.float32


def test_double_backward_raises():
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    z = BinaryUnit(8, 8, 3)(x)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(z.sum(), x, create_graph=True)


BAD = [
    ({"plan": "forget"}, "plan must be one of auto, keep, recompute, not 'forget'"),
    ({"shortcut": "none"}, "one of identity, pool, repeat, not 'none'"),
    ({"shortcut": "pool"}, "'pool' does not go with stride 1"),
    ({"shortcut": "repeat"}, "does not lead from 8 to 8 channels"),
    ({"shortcut": torch.zeros(1, 8, 4, 5)}, r"shortcut must have shape \(2, 8, 4, 5\)"),
    ({"slope": torch.ones(8)}, "must be given together"),
    ({"gamma": torch.ones(7)}, r"gamma must have shape \(8,\)"),
    ({"stride": 2, "shortcut": "pool"}, r"even height and width, not \(4, 5\)"),
    ({"x": torch.ones(1, 8, 1, 1)}, "Expected more than 1 value per channel"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_named(change, message):
    arguments = {
        "x": torch.zeros(2, 8, 4, 5),
        "weight": torch.zeros(8, 8, 3, 3),
        "gamma": torch.ones(8),
        "beta": torch.ones(8),
    }
    with pytest.raises(ValueError, match=message):
        ops.binary_unit(**(arguments | change))


def test_kernels_name_bad_input():
    a, vector = torch.zeros(2, 8, 4, 4, dtype=torch.int16), torch.zeros(8)
    with pytest.raises(ValueError, match=r"stream must have shape \(2, 8, 8, 8\)"):
        kernels.unit_forward(a, a.float(), *[vector] * 6, shortcut="pool")
    with pytest.raises(TypeError, match="float64"):
        kernels.unit_forward(a, a.double(), *[vector] * 6, shortcut="identity")


def test_the_plan_comes_from_the_tuning_table(launchers, monkeypatch):
    """A unit saves its convolution's output iff the plan for its shapes says so."""
    unit = BinaryUnit(8, 8, 3)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    asked, saved = [], []

    def save(tensor):
        saved.append(tensor)
        return tensor

    for plan in PLANS:
        monkeypatch.setattr(launchers, "unit_plan", lambda plan=plan, **s: asked.append(s) or plan)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            unit(x)
        assert (torch.int16 in {t.dtype for t in saved}) is (plan == "keep")
    assert asked[0]["channels"] == asked[0]["out_channels"] == 8
    assert (asked[0]["kernel_size"], asked[0]["stride"], asked[0]["batch"]) == (3, 1, 2)


def test_a_plan_is_looked_up_by_shape():
    shapes = {"batch": 3, "height": 4, "width": 4, "channels": 8, "out_channels": 8}
    shapes |= {"kernel_size": 3, "stride": 1, "dtype": torch.float32, "device": torch.device("cpu")}
    assert eager.unit_plan(**shapes) == "recompute"
    assert kernels.unit_plan(**shapes) == "keep"
    key = config.ProblemKey("unit_plan", "float32", 4, 4, 4, 8, 8, 3, 1)
    choice = config.Choice("recompute", config.default_tile(key))
    with config.using(choice):
        assert kernels.unit_plan(**shapes) == "recompute"
    assert config.look_up(key, {key: choice}).formulation == "recompute"
