"""Which parameters are what, in networks whose weights are pruned or parametrised."""

import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.helpers import gradient
from tritonbnn import ops
from tritonbnn.analysis.saturation import Probe
from tritonbnn.models import build_model
from tritonbnn.nn import (
    BinaryConv2d,
    BinaryLinear,
    BinaryUnit,
    binary_weights,
    decayed_parameters,
    layers,
)
from tritonbnn.nn.parameters import binary_layers


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


def network():
    torch.manual_seed(0)
    return build_model("reactnet_a", width=0.25, num_classes=3, small_images=True)


def pruned(module, name):
    prune.l1_unstructured(module, name, amount=0.3)


def parametrised(module, name):
    parametrize.register_parametrization(module, name, Halved())


def normalised(module, name):
    """Computed from a length and a direction."""
    parametrizations.weight_norm(module, name)


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, (BinaryUnit, nn.Conv2d))]


@pytest.mark.parametrize(("change", "share"), [(pruned, 1), (parametrised, 1), (normalised, 2)])
def test_all_weights_and_shifts_are_still_known(change, share):
    """By tensors, each weight counted as often as it has parts; in the state dict; trained."""
    plain, model = network(), network()
    weights, decayed = len(binary_weights(plain)), len(list(decayed_parameters(plain)))
    of_units = [m for m in layers_of(model) if isinstance(m, BinaryUnit)]
    for layer in layers_of(model):
        change(layer, "weight")
    if share == 1:
        for unit in of_units:
            change(unit, "shift_in")
    named = binary_weights(model)
    convolutions = len(layers_of(model))
    chosen = list(decayed_parameters(model))
    assert (len(named), len(chosen)) == (share * weights, decayed + (share - 1) * convolutions)
    assert len({id(p) for p in chosen}) == len(chosen)
    state = dict(model.named_parameters())
    assert all(state[name] is weight for name, weight in named.items())
    assert set(named) <= set(model.state_dict())
    y = model(gradient(2, 3, 16, 16))
    y.backward(gradient(*y.shape))
    assert all(p.grad is not None and p.grad.any() for p in (*named.values(), *chosen))


@pytest.mark.parametrize("change", [pruned, parametrised])
def test_a_changed_weight_trains_its_original(change):
    """The unit's gradients are those of the Function with the weight that was computed."""
    torch.manual_seed(0)
    unit = BinaryUnit(8, 8, 3)
    change(unit, "weight")
    x = gradient(2, 8, 5, 3)
    unit(x).backward(gradient(2, 8, 5, 3))
    original = next(iter(binary_weights(unit).values()))
    factor = unit.weight_mask if change is pruned else 0.5
    weight = (original * factor).detach().requires_grad_()
    norm = (unit.bn.weight, unit.bn.bias)
    shifts = (unit.shift_in, unit.shift_mid, unit.slope, unit.shift_out)
    ops.binary_unit(x, weight, *norm, *shifts).z.backward(gradient(2, 8, 5, 3))
    torch.testing.assert_close(original.grad, weight.grad * factor)


def test_saturation_of_parametrised_layers():
    plain, model = network(), network()
    for layer in layers_of(model):
        parametrised(layer, "weight")
    probe = Probe(gradient(2, 3, 16, 16))
    assert list(probe.measure(model)) == list(binary_layers(model)) == list(binary_weights(model))
    assert len(probe.measure(model)) == len(probe.measure(plain))


def test_a_layer_alone_is_named_as_in_its_state_dict():
    layer = BinaryConv2d(8, 8, 3)
    assert list(binary_weights(layer)) == list(layer.state_dict()) == ["weight"]


def test_pruning_what_is_binary_is_told_once(caplog):
    layers._warn_of_pruning.cache_clear()
    of_step_1 = BinaryUnit(8, 8, 3, binary_weight=False)
    pruned(of_step_1, "weight")
    of_step_1(gradient(2, 8, 4, 4))
    assert not caplog.records
    for layer, shape in (
        (BinaryLinear(8, 8), (2, 8)),
        (BinaryConv2d(8, 8, 3, padding=1), (2, 8, 4, 4)),
        (BinaryUnit(8, 8, 3), (2, 8, 4, 4)),
    ):
        pruned(layer, "weight")
        layer(gradient(*shape))
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "pruned weight of 0 counts as +1" in caplog.text


MADE = {
    "conv": (lambda: BinaryConv2d(8, 8, 3, padding=1), (2, 8, 4, 4)),
    "linear": (lambda: BinaryLinear(8, 8), (2, 8)),
    "fused": (lambda: BinaryUnit(8, 8, 3), (2, 8, 4, 4)),
    "composed": (lambda: BinaryUnit(8, 8, 3, fused=False), (2, 8, 4, 4)),
}
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.mark.parametrize("name", MADE)
def test_two_dtypes_are_refused_as_torchs_layers_refuse_them(name):
    make, shape = MADE[name]
    for given, weights in ((F32, F64), (F64, F32), (F32, BF16), (BF16, F64)):
        module, x = make().to(weights), gradient(*shape, dtype=given)
        with pytest.raises(TypeError, match=f"x is {given} but weight is {weights}: convert"):
            module(x)
    assert make()(gradient(*shape, dtype=BF16)).dtype == BF16  # float32 weights, as under autocast
