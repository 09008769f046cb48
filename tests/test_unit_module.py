"""The fused half-block as a module: training, evaluation, chains, and what it refuses."""

import pytest
import torch
from torch import nn

from tritonbnn import ops, reference
from tritonbnn.models import build_model
from tritonbnn.nn import BinaryUnit

PLANS = ("keep", "recompute", "fused")


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
    # as nn.BatchNorm2d does it
    assert unit.bn.num_batches_tracked == 1
    before["bn.num_batches_tracked"] += 1
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
    ({"plan": "forget"}, "plan must be one of auto, keep, recompute, fused, not 'forget'"),
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


def test_the_plan_comes_from_the_tuning_table(launchers, device, monkeypatch):
    """A unit saves its convolution's output iff the plan for its shapes says so."""
    unit = BinaryUnit(8, 8, 3).to(device)
    x = torch.randn(2, 8, 4, 4, device=device, requires_grad=True)
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


def test_a_chain_equals_its_units_one_by_one():
    """A network hands packed signs on; its units applied alone pack for themselves."""
    torch.manual_seed(0)
    model = build_model("reactnet_18", width=0.25, num_classes=5, small_images=True)
    for parameter in model.blocks.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    x = torch.randn(2, 3, 16, 16)
    model(x)  # moves the running statistics off their start
    model.eval()
    alone = model.fc(model.blocks(model.stem(x)).mean(dim=(2, 3)))
    assert torch.equal(model(x), alone)


def test_hooks_of_a_unit_run_in_a_chain():
    model = build_model("reactnet_a", width=0.25, num_classes=5, small_images=True)
    seen = []
    for unit in model.modules():
        if isinstance(unit, BinaryUnit):
            unit.register_forward_hook(lambda unit, args, output: seen.append(unit))
    model(torch.randn(2, 3, 32, 32))
    assert len(seen) == 26


FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])


def test_evaluation_before_any_training_uses_the_initial_averages():
    torch.manual_seed(0)
    units = [BinaryUnit(33, 33, 3, fused=fused).double().eval() for fused in (True, False)]
    units[1].load_state_dict(units[0].state_dict())
    x = torch.randn(1, 33, 1, 1, dtype=torch.float64)  # one value per channel is enough here
    assert torch.allclose(units[0](x), units[1](x), rtol=1e-12)
    assert units[0].bn.num_batches_tracked == 0


def test_without_running_averages_evaluation_uses_the_batch():
    torch.manual_seed(0)
    unit = BinaryUnit(8, 8, 3)
    unit.bn = nn.BatchNorm2d(8, track_running_stats=False)
    x = torch.randn(2, 8, 4, 3)
    assert torch.equal(unit.eval()(x), unit.train()(x))


@FUSED
def test_one_value_per_channel_is_torchs_error(fused):
    unit = BinaryUnit(8, 8, 3, fused=fused)
    before = unit.bn.running_mean.clone()
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training"):
        unit(torch.randn(1, 8, 1, 1))
    assert torch.equal(unit.bn.running_mean, before)


@FUSED
@pytest.mark.parametrize("size", [(5, 4), (4, 5)])
def test_an_odd_size_at_stride_2_is_named(fused, size):
    unit = BinaryUnit(8, 8, 3, stride=2, fused=fused)
    with pytest.raises(ValueError, match=rf"even height and width, not \({size[0]}, {size[1]}\)"):
        unit(torch.randn(2, 8, *size))


@FUSED
def test_a_shortcut_that_cannot_be_added_is_named(fused):
    unit = BinaryUnit(8, 16, 3, stride=2, fused=fused)
    with pytest.raises(ValueError, match=r"shortcut must have shape \(2, 16, 2, 2\)"):
        unit(torch.randn(2, 8, 4, 4), torch.randn(2, 8, 2, 2))


@FUSED
def test_channels_without_a_shortcut_are_refused(fused):
    with pytest.raises(ValueError, match=r"lead from 8 to 24 channels|shape \(2, 24, 4, 4\)"):
        BinaryUnit(8, 24, 3, fused=fused)(torch.randn(2, 8, 4, 4))


@pytest.mark.slow
def test_requires_grad_may_change_between_steps(launchers, device):
    """Each step's gradients are those of a unit that was never frozen, for what is not frozen."""
    torch.manual_seed(0)
    unit, twin = (BinaryUnit(8, 8, 3).to(device) for _ in range(2))
    twin.load_state_dict(unit.state_dict())
    x = torch.randn(2, 8, 3, 3, device=device)
    names = [name for name, _ in unit.named_parameters()]
    for frozen in (set(), set(names) - {"bn.bias"}, {"weight"}, set(names), set()):
        for name, parameter in unit.named_parameters():
            parameter.requires_grad_(name not in frozen)
        unit.zero_grad()
        twin.zero_grad()
        z, full = unit(x), twin(x)
        assert z.requires_grad is (frozen != set(names))
        full.square().sum().backward()
        if z.requires_grad:
            z.square().sum().backward()
        for name, parameter in unit.named_parameters():
            expected = None if name in frozen else twin.get_parameter(name).grad
            assert (parameter.grad is None) is (expected is None)
            assert expected is None or torch.equal(parameter.grad, expected)


def test_a_unit_moves_between_dtypes():
    """float32, float64, bf16 and back: each step is that of the composition in the same dtype."""
    torch.manual_seed(0)
    units = [BinaryUnit(33, 33, 3, fused=fused) for fused in (True, False)]
    units[1].load_state_dict(units[0].state_dict())
    x = torch.randn(2, 33, 4, 3)
    for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.03)):
        outputs = []
        for unit in units:
            unit.to(dtype).zero_grad()
            z = unit(x.to(dtype))
            z.float().square().sum().backward()
            outputs.append(z)
        assert outputs[0].dtype == dtype
        assert (outputs[0] - outputs[1]).norm() <= rtol * outputs[1].norm()
        for (name, a), b in zip(units[0].named_parameters(), units[1].parameters(), strict=True):
            assert a.grad.dtype == dtype
            assert (a.grad - b.grad).norm() <= 2 * rtol * b.grad.norm(), (dtype, name)
    assert units[0].float()(x).dtype == torch.float32


def test_a_unit_moves_between_devices(gpu):
    torch.manual_seed(0)
    unit = BinaryUnit(33, 33, 3)
    x = torch.randn(2, 33, 4, 3)
    unit.eval()
    there = unit.to(gpu)(x.to(gpu))
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        unit(x)
    back = unit.cpu()(x)
    assert (there.cpu() - back).norm() <= 1e-5 * back.norm()


def test_tensors_on_two_devices_are_named():
    with pytest.raises(ValueError, match="one device, not x on meta, weight on cpu"):
        BinaryUnit(8, 8, 3)(torch.randn(2, 8, 4, 4, device="meta"))
