"""No parameter goes without a gradient, in any network here; and the helper that says so."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.baseline import ObviousReActNetA
from tests import gradients, test_engine
from tests.helpers import gradient
from tritonbnn.models import MODELS, build_model
from tritonbnn.nn import BinaryConv2d, BinaryLinear, RPReLU, RSign, check_gradients

README = Path(__file__).parent.parent / "README.md"


def images(size=16, dtype=torch.float32):
    return gradient(8, 3, size, size, dtype=dtype)


def after_two_steps(model, x):
    """The model, trained for two steps on labels that mean nothing."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):
        logits = model(x)
        labels = torch.arange(len(logits)) % logits.shape[1]
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_all_of_a_network_is_trained(name, step):
    torch.manual_seed(0)
    options = {"width": 0.25, "num_classes": 10, "small_images": True}
    model = build_model(name, binary_weights=step == 2, **options)
    assert check_gradients(after_two_steps(model, images()), images()) == []


@pytest.mark.parametrize("network", [test_engine.network, gradients.network])
def test_all_of_the_tests_own_networks_is_trained(network):
    model = network()
    x = images(dtype=next(model.parameters()).dtype)
    assert check_gradients(after_two_steps(model, x), x) == []


def test_all_of_the_obvious_network_is_trained():
    torch.manual_seed(0)
    model = ObviousReActNetA(num_classes=10, width=0.25)
    assert check_gradients(after_two_steps(model, images(size=32)), images(size=32)) == []


def test_all_of_the_readmes_example_is_trained():
    torch.manual_seed(0)
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(example, names)
    assert check_gradients(names["model"], names["images"]) == []


def vgg(binarised):
    """A small VGG: a sign of its own before each layer, or each layer's shift.

    Args:
        binarised: makes what comes before a layer of so many channels, and that layer's options.
    """

    def conv(channels, out_channels, *after):
        signs, options = binarised(channels)
        layer = BinaryConv2d(channels, out_channels, 3, padding=1, **options)
        return [*signs, *after, layer, nn.BatchNorm2d(out_channels), RPReLU(out_channels)]

    signs, options = binarised(16)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)),
        *conv(8, 16),
        *conv(16, 16, nn.MaxPool2d(2)),
        *conv(16, 16, nn.MaxPool2d(2)),
        *(*signs, nn.Flatten(), BinaryLinear(16 * 4 * 4, 12, **options)),
        *(nn.BatchNorm1d(12), nn.Linear(12, 10)),
    )


STYLES = {
    "sign_before": lambda channels: ([RSign(channels)], {}),
    "own_shift": lambda channels: ([], {"shift": True}),
}


@pytest.mark.parametrize("style", STYLES)
def test_all_of_a_vgg_is_trained(style):
    torch.manual_seed(0)
    model = vgg(STYLES[style])
    assert check_gradients(model, images()) == []
    assert check_gradients(after_two_steps(model, images()), images()) == []


class Branches(nn.Module):
    """One parameter that is used, and others that are not reached, each in its way."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.detached = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.zeroed = nn.Parameter(torch.ones(3))
        self.used = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.frozen(x) * self.used + self.detached(x).detach() + 0 * self.zeroed


def test_what_is_not_reached_is_named_and_what_is_frozen_is_not():
    expected = ["zeroed", "unused.weight", "unused.bias", "detached.weight", "detached.bias"]
    assert check_gradients(Branches(), gradient(4, 3)) == expected
    assert check_gradients(nn.Linear(3, 3).requires_grad_(False), gradient(4, 3)) == []


def test_a_sign_on_top_of_dropped_out_signs_is_named():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), RSign(8), nn.Dropout(), BinaryLinear(8, 4)]
    stopped = ["0.weight", "0.bias", "1.shift"]
    assert check_gradients(nn.Sequential(*layers), gradient(5, 6)) == stopped
    layers[1:3] = layers[2], layers[1]  # the remedy
    assert check_gradients(nn.Sequential(*layers), gradient(5, 6)) == []


def test_a_loss_decides_what_is_reached():
    model, x, labels = nn.Linear(3, 2), gradient(4, 3), torch.zeros(4, dtype=torch.int64)
    assert check_gradients(model, x, lambda logits: F.cross_entropy(logits, labels)) == []
    assert check_gradients(model, (x,), lambda logits: 0 * logits.sum()) == ["weight", "bias"]
    assert check_gradients(model, x, lambda logits: (logits - x[:, :2]).mean().detach()) == [
        "weight",
        "bias",
    ]


class Stateful(nn.Module):
    """Replaces a buffer, draws random numbers, and averages."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return F.dropout(self.bn(x))


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(training):
    model, x = Stateful().train(training), gradient(4, 3).requires_grad_()
    model.bn.weight.grad = torch.full((3,), 7.0)
    buffers = dict(model.named_buffers())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    for loss in (None, lambda y: y.sum().log(), lambda y: y):
        with torch.no_grad():
            try:
                check_gradients(model, x, loss)
            except ValueError as error:
                assert "scalar" in str(error)  # noqa: PT017  the last loss makes none
        assert model.training is training
        assert x.grad is model.bn.bias.grad is None
        assert torch.equal(model.bn.weight.grad, torch.full((3,), 7.0))
        assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)


class Pair(nn.Linear):
    def forward(self, a, b):
        return super().forward(a), b


def test_what_cannot_be_checked_is_named():
    x = gradient(4, 3)
    with pytest.raises(TypeError, match="one floating-point tensor, not tuple: give a loss"):
        check_gradients(Pair(3, 2), (x, x))
    with pytest.raises(ValueError, match=r"loss must return a scalar tensor, not \(4, 2\)"):
        check_gradients(nn.Linear(3, 2), x, lambda y: y)
    with pytest.raises(ValueError, match="loss must return a scalar tensor, not float"):
        check_gradients(nn.Linear(3, 2), x, lambda y: y.sum().item())
    assert check_gradients(Pair(3, 2), (x, x), lambda pair: pair[0].square().sum()) == []
