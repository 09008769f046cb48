"""A unit's norm: any module of torch.nn's manners, against the composition in plain float64 torch.

Each case builds a unit and a twin with one factory. The unit runs as users call it; the twin's norm
is called between operators of the reference, so that torch itself says what it computes.
"""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torchvision.ops import FrozenBatchNorm2d

from tests.helpers import gradient
from tritonbnn import reference
from tritonbnn.models import build_model
from tritonbnn.nn import BinaryUnit

CHANNELS = 9


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each pixel."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x):
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class ActivatedBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class SplitBatchNorm(nn.BatchNorm2d):
    """Statistics of its own for the second half of a batch in training."""

    def __init__(self, channels):
        super().__init__(channels)
        self.second = nn.BatchNorm2d(channels)

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        first, second = x.chunk(2)
        return torch.cat((super().forward(first), self.second(second)))


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def batch_norm(kind=nn.BatchNorm2d, *, later=(), **options):
    """A factory of batch norms, which sets the attributes ``later`` after construction."""

    def build(channels):
        bn = kind(channels, **options)
        for name, value in dict(later).items():
            setattr(bn, name, value)
        return bn

    return build


def hooked(register, hook):
    def build(channels):
        bn = nn.BatchNorm2d(channels)
        getattr(bn, register)(hook)
        return bn

    return build


def wrapped(channels):
    """As what offloads a module's weights wraps its forward."""
    bn = nn.BatchNorm2d(channels)
    inner = bn.forward
    bn.forward = lambda x: inner(x) - 1
    return bn


def parametrised(channels):
    bn = nn.BatchNorm2d(channels)
    parametrize.register_parametrization(bn, "weight", Doubled())
    return bn


def pruned(channels):
    bn = nn.BatchNorm2d(channels)
    bn.weight.data.uniform_()
    return prune.l1_unstructured(bn, "weight", amount=0.5)


NORMS = {
    "batch": batch_norm(),
    "sync_batch": batch_norm(nn.SyncBatchNorm),
    "large_eps": batch_norm(eps=0.7),
    "small_eps": batch_norm(eps=1e-12),
    "momentum": batch_norm(momentum=0.7),
    "momentum_0": batch_norm(momentum=0.0),
    "cumulative": batch_norm(momentum=None),
    "untracked": batch_norm(track_running_stats=False),
    "untracked_later": batch_norm(later={"track_running_stats": False}),
    "uncounted": batch_norm(later={"num_batches_tracked": None}),
    "uncounted_cumulative": batch_norm(momentum=None, later={"num_batches_tracked": None}),
    "no_averages_later": batch_norm(later={"running_mean": None, "running_var": None}),
    "not_affine": batch_norm(affine=False),
    "no_bias": batch_norm(later={"bias": None}),
    "group": lambda channels: nn.GroupNorm(3, channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels),
    "instance_affine": lambda channels: nn.InstanceNorm2d(
        channels, affine=True, track_running_stats=True
    ),
    "identity": lambda channels: nn.Identity(),
    "sequence": lambda channels: nn.Sequential(nn.BatchNorm2d(channels), nn.Hardtanh()),
    "channel": ChannelNorm,
    "activated": ActivatedBatchNorm,
    "split": SplitBatchNorm,
    "frozen": FrozenBatchNorm2d,
    "forward_hook": hooked("register_forward_hook", lambda bn, args, y: 1.5 * y),
    "forward_pre_hook": hooked("register_forward_pre_hook", lambda bn, args: (args[0] + 1,)),
    "backward_hook": hooked("register_full_backward_hook", lambda bn, dx, dy: (3 * dx[0],)),
    "backward_pre_hook": hooked("register_full_backward_pre_hook", lambda bn, dy: (3 * dy[0],)),
    "wrapped_forward": wrapped,
    "parametrised": parametrised,
    "pruned": pruned,
}


def unit_of(norm, stride, **options):
    """A float64 unit with random parameters and averages, the same at every call."""
    torch.manual_seed(0)
    unit = BinaryUnit(CHANNELS, CHANNELS, 3, stride, norm=norm, **options).double()
    generator = torch.Generator().manual_seed(1)
    for tensor in (*unit.parameters(), *unit.buffers()):
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data += 0.3 * noise
    return unit


def truth(unit, x):
    a = reference.binary_conv2d(
        x,
        unit.weight,
        unit.shift_in,
        stride=unit.stride,
        padding=1,
        binary_weight=unit.binary_weight,
        may_be_binary=False,
    )
    shortcut = x if unit.stride == 1 else nn.functional.avg_pool2d(x, 2)
    return reference.rprelu(unit.bn(a) + shortcut, unit.shift_mid, unit.slope, unit.shift_out)


def passes(unit, apply):
    """What three training passes and two in evaluation leave, by name."""
    seen = {}
    for step, training in enumerate((True, True, True, False, False)):
        unit.train(training)
        x = gradient(4, CHANNELS, 6, 4, dtype=torch.float64, seed=step).requires_grad_()
        z = apply(x)
        unit.zero_grad()
        z.backward(gradient(*z.shape, dtype=torch.float64, seed=9 + step))
        seen |= {f"{step} z": z.detach(), f"{step} dx": x.grad}
        seen |= {f"{step} d{name}": p.grad for name, p in unit.named_parameters()}
        seen |= {f"{step} {name}": b.clone() for name, b in unit.named_buffers()}
    return seen


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
@pytest.mark.parametrize(("stride", "binary_weight"), [(1, True), (2, False)])
@pytest.mark.parametrize("name", NORMS)
def test_a_unit_computes_what_its_norm_does(name, stride, binary_weight, fused):
    unit, twin = (
        unit_of(NORMS[name], stride, binary_weight=binary_weight, fused=fused) for _ in range(2)
    )
    actual, expected = passes(unit, unit), passes(twin, lambda x: truth(twin, x))
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            actual[key], value, rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_averages_of_a_float32_unit_follow_its_norm():
    """In C, which computes in float32; without a momentum the count is divided by."""
    units = [unit_of(batch_norm(momentum=None), 1, fused=fused).float() for fused in (True, False)]
    for step in range(3):
        x = gradient(4, CHANNELS, 6, 4, seed=step)
        for unit in units:
            unit(x)
    for a, b in zip(units[0].bn.buffers(), units[1].bn.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_an_empty_batch_is_counted_as_torch_counts_it():
    units = [unit_of(nn.BatchNorm2d, 1, fused=fused) for fused in (True, False)]
    for unit in units:
        unit(torch.zeros(0, CHANNELS, 4, 4, dtype=torch.float64))
    for a, b in zip(units[0].bn.buffers(), units[1].bn.buffers(), strict=True):
        assert torch.equal(a, b)


def test_an_eps_of_0_is_refused_as_torch_refuses_it():
    with pytest.raises(ValueError, match="eps must be positive"):
        unit_of(batch_norm(eps=0.0), 1)(gradient(2, CHANNELS, 4, 4, dtype=torch.float64))


def network():
    """In float64, its units after one step's worth of random motion."""
    torch.manual_seed(0)
    model = build_model("reactnet_a", width=0.25, num_classes=3, small_images=True).double()
    for parameter in model.blocks.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def logits_and_gradients(model):
    x = gradient(2, 3, 16, 16, dtype=torch.float64)
    y = model(x)
    y.backward(gradient(*y.shape, dtype=torch.float64))
    return y.detach(), {name: p.grad for name, p in model.named_parameters()}


def other_norm(units):
    units[3].bn = nn.GroupNorm(4, units[3].bn.num_features).double()


def hook_on_a_norm(units):
    units[3].bn.register_forward_hook(lambda bn, args, y: 1.5 * y)


def hook_between(units):
    units[3].register_forward_pre_hook(lambda unit, args: (args[0].neg(), *args[1:]))


def hook_behind(units):
    units[3].register_forward_hook(lambda unit, args, output: output.neg())


def pruned_shift(units):
    """Whose product with its mask is taken when the unit is called."""
    prune.l1_unstructured(units[3], "shift_in", amount=0.5)
    units[3].shift_in_orig.data.neg_()


@pytest.mark.parametrize(
    "change", [other_norm, hook_on_a_norm, hook_between, hook_behind, pruned_shift]
)
def test_a_chain_is_its_units_whatever_stands_between(change):
    """Signs packed ahead are right, or not used."""
    models = [network(), network()]
    for model in models:
        change([m for m in model.modules() if isinstance(m, BinaryUnit)])
    for unit in models[1].modules():
        if isinstance(unit, BinaryUnit):
            unit.fused = False  # then it packs for itself
    torch.testing.assert_close(*map(logits_and_gradients, models))


class Changed(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x)


BAD = {
    "shape": (lambda c: nn.AvgPool2d(2), r"keep shape \(2, 9, 4, 4\), not return \(2, 9, 2, 2\)"),
    "broadcast": (lambda c: Changed(lambda x: x.mean((2, 3), True)), "keep shape"),
    "dtype": (lambda c: Changed(torch.Tensor.double), "keep dtype torch.float32, not return"),
    "device": (lambda c: nn.GroupNorm(3, c, device="meta"), "x on cpu, the norm's weight on meta"),
    "plain_device": (lambda c: nn.BatchNorm2d(c, device="meta"), "one device.*gamma on meta"),
    "output": (lambda c: Changed(lambda x: (x,)), "norm Changed must return a tensor, not tuple"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_norm_that_does_not_fit_is_named(name):
    norm, message = BAD[name]
    unit = BinaryUnit(CHANNELS, CHANNELS, 3, norm=norm)
    with pytest.raises(ValueError, match=message):
        unit(gradient(2, CHANNELS, 4, 4))


def test_averages_on_another_device_are_named():
    unit = BinaryUnit(CHANNELS, CHANNELS, 3).eval()
    unit.bn.running_var = unit.bn.running_var.to("meta")
    with pytest.raises(ValueError, match=r"one device.*the running variance on meta"):
        unit(gradient(2, CHANNELS, 4, 4))


@pytest.mark.parametrize("training", [True, False])
def test_averages_of_another_shape_are_named(training):
    unit = BinaryUnit(CHANNELS, CHANNELS, 3).train(training)
    unit.bn.running_var = torch.ones(CHANNELS - 2)
    with pytest.raises(ValueError, match=r"running (average|variance) .* \(9,\).*not \(7,\)"):
        unit(gradient(2, CHANNELS, 4, 4))


def test_averages_on_another_device_are_named_in_training():
    unit = BinaryUnit(CHANNELS, CHANNELS, 3)
    unit.bn.running_mean = unit.bn.running_mean.to("meta")
    with pytest.raises(ValueError, match=r"must be \(9,\) on cpu, not \(9,\) on meta"):
        unit(gradient(2, CHANNELS, 4, 4))


@pytest.mark.parametrize("norm", [lambda c: torch.relu, lambda c: None])
def test_a_norm_that_is_no_module_is_refused(norm):
    with pytest.raises(TypeError, match="norm must make a module, not a "):
        BinaryUnit(CHANNELS, CHANNELS, 3, norm=norm)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_unit_sees_buffers_and_norms_that_are_swapped(training):
    unit, twin = (unit_of(nn.BatchNorm2d, 1).float().train(training) for _ in range(2))
    run = torch.compile(unit, backend="aot_eager")
    x = gradient(4, CHANNELS, 6, 4)
    run(x), twin(x)

    def averages(unit):
        unit.bn.running_mean, unit.bn.running_var = gradient(2, CHANNELS).square() + 0.5

    def none(unit):
        unit.bn.running_mean = unit.bn.running_var = None

    def other(unit):
        unit.bn = nn.GroupNorm(3, CHANNELS)

    for swap in (averages, none, other):
        swap(unit)
        swap(twin)
        torch.testing.assert_close(run(x), twin(x))
        for a, b in zip(unit.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["batch", "group", "channel", "instance", "identity", "frozen"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
def test_under_autocast_a_unit_returns_its_dtype(name, fused):
    unit = unit_of(NORMS[name], 2, fused=fused).float()
    x = gradient(2, CHANNELS, 6, 4).requires_grad_()
    residual = gradient(2, CHANNELS, 3, 2)
    exact = unit(x)
    for shortcut in (None, residual):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = unit(x, shortcut)
        z.backward(gradient(*z.shape, dtype=z.dtype))
        assert z.dtype == torch.bfloat16
        assert x.grad.dtype == torch.float32
        if shortcut is None:
            assert (z - exact).norm() <= 0.03 * exact.norm()
