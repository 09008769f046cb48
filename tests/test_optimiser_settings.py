"""The optimisers of binary networks as a recipe chooses them: built, trained, gone on with."""

import pytest
import torch

from tests.helpers import gradient
from tritonbnn.cli import UserError
from tritonbnn.models import build_model
from tritonbnn.nn import binary_weights
from tritonbnn.optim import (
    IVON,
    OPTIMIZERS,
    AdamWPrediction,
    Bop,
    Bop2ndOrder,
    Joint,
    build_optimizer,
    optimizer_state,
    restore_optimizer,
    set_learning_rate,
)
from tritonbnn.packed import PackedWeight
from tritonbnn.settings import Choice

CHOICES = {
    "bop": {"threshold": 1e-6, "gamma": 1e-2},
    "bop_second_order": {"threshold": 1e-2, "gamma": 1e-2, "sigma": 1e-2},
    "adamw_prediction": {},
    "ivon": {"ess": 1e6, "hess_init": 0.01, "clip_radius": 0.25},
}


def built(name, binary=True, weight_decay=0.0, **settings):
    torch.manual_seed(0)
    model = build_model(
        "birealnet_18", width=0.125, num_classes=5, small_images=True, binary_weights=binary
    )
    choice = Choice(name, OPTIMIZERS[name](**settings))
    return model, build_optimizer(choice, model, 0.01, weight_decay)


def train(model, optimizer, steps):
    for step in steps:
        with optimizer.passes():
            model(gradient(2, 3, 8, 8, seed=step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", CHOICES)
def test_a_run_goes_on_bit_for_bit(name):
    whole, optimizer = built(name, **CHOICES[name])
    train(whole, optimizer, range(6))
    first, optimizer = built(name, **CHOICES[name])
    train(first, optimizer, range(3))
    tensors, facts = optimizer_state(first, optimizer)
    second, optimizer = built(name, **CHOICES[name])
    second.load_state_dict(first.state_dict())
    restore_optimizer(second, optimizer, tensors, facts)
    train(second, optimizer, range(3, 6))
    for key, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


def test_kinds():
    model, optimizer = built("bop", **CHOICES["bop"])
    assert isinstance(optimizer, Joint)
    assert type(optimizer.parts[0]) is Bop
    assert all(isinstance(w, PackedWeight) for w in binary_weights(model).values())
    assert type(built("bop_second_order")[1].parts[0]) is Bop2ndOrder
    assert type(built("adamw_prediction")[1]) is AdamWPrediction
    assert type(built("ivon", **CHOICES["ivon"])[1]) is IVON


def test_the_schedule_moves_gamma():
    _, optimizer = built("bop", **CHOICES["bop"])
    set_learning_rate(optimizer, 0.005)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["binary"] == pytest.approx(0.5e-2)
    assert rates["rest"] == 0.005


def test_bad_input_is_named():
    with pytest.raises(UserError, match=r"Bop trains 1-bit weights \(binary_weights = true\)"):
        built("bop", binary=False)
    with pytest.raises(UserError, match="optimizer bop: Bop has no weight decay"):
        built("bop", weight_decay=1e-4)
    with pytest.raises(UserError, match="optimizer ivon needs ess"):
        built("ivon")
