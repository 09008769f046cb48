"""The optimiser's groups, its arithmetic, and the learning rate's curve."""

import logging

import pytest
import torch
from torch import nn
from tritonbnn.train.optim import (
    build_optimizer,
    describe_groups,
    learning_rate,
    warn_of_few_epochs,
)

from tritonbnn.models import build_model


def test_learning_rate_has_the_published_corners():
    assert learning_rate(1.25e-3, 0, 256) == pytest.approx(0.0012451171875, rel=1e-15)
    assert learning_rate(1.25e-3, 127, 256) == 6.25e-4
    assert learning_rate(1.25e-3, 254, 256) == 4.8828125e-6
    assert learning_rate(1.25e-3, 255, 256) == 0


def test_few_epochs_are_warned_of(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        warn_of_few_epochs(1, 3)
        assert not caplog.records
        warn_of_few_epochs(1, 2)
        assert "no weight moves in the last one" in caplog.text


def test_groups_have_the_published_sizes():
    with torch.device("meta"):
        model = build_model("reactnet_a", binary_weights=False)
    optimizer = build_optimizer("adam", model, 1e-3, 5e-6)
    sizes = [
        (len(g["params"]), sum(p.numel() for p in g["params"])) for g in optimizer.param_groups
    ]
    assert sizes == [(105, 28_285_792), (82, 29_343_592 - 28_285_792)]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [5e-6, 0]
    assert "105 tensors / 28,285,792 scalars at L2 5e-06" in describe_groups(optimizer)


def test_three_steps_of_adam_are_the_formula():
    """Moments, bias correction, and the L2 term added to the gradient of the decayed group."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3)).double()
    lr, decay, beta1, beta2 = 0.01, 0.1, 0.9, 0.999
    optimizer = build_optimizer("adam", model, lr, decay)
    assert optimizer.defaults["fused"]
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in expected.items()}
    for step in range(1, 4):
        for name, parameter in model.named_parameters():
            gradient = torch.randn_like(parameter)
            parameter.grad = gradient.clone()
            gradient += decay * expected[name] if name == "0.weight" else 0
            m, v = moments[name]
            m.mul_(beta1).add_((1 - beta1) * gradient)
            v.mul_(beta2).add_((1 - beta2) * gradient**2)
            scaled = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + 1e-8)
            expected[name] -= lr * scaled
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-14)


def test_three_steps_of_sgd_are_the_formula():
    """Momentum 0.9, and the L2 term added to the gradient of the decayed group."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3)).double()
    lr, decay = 0.01, 0.1
    optimizer = build_optimizer("sgd", model, lr, decay)
    assert "SGD: 1 tensors / 54 scalars at L2 0.1, 2 tensors" in describe_groups(optimizer)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    momenta = {name: torch.zeros_like(p) for name, p in expected.items()}
    for _ in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            gradient = parameter.grad + (decay * expected[name] if name == "0.weight" else 0)
            momenta[name] = 0.9 * momenta[name] + gradient
            expected[name] = expected[name] - lr * momenta[name]
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-14)
