"""Several optimisers as one."""

import copy

import pytest
import torch
from torch import nn

from tests.helpers import gradient
from tritonbnn.nn import BinaryLinear
from tritonbnn.optim import IVON, AdamWPrediction, Bop, Joint, to_signs_


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 20), BinaryLinear(20, 9), nn.Linear(9, 3))
    to_signs_([model[1].weight])
    return model


def parts_of(model):
    rest = [*model[0].parameters(), *model[2].parameters()]
    return Bop([model[1].weight], threshold=1e-4, gamma=0.1), torch.optim.Adam(rest, lr=0.01)


def train(model, optimizers, steps, scaler=None):
    for step in steps:
        loss = model(gradient(4, 7, seed=step)).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        (scaler.scale(loss) if scaler else loss).backward()
        for optimizer in optimizers:
            scaler.step(optimizer) if scaler else optimizer.step()
        if scaler:
            scaler.update()
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_it_is_its_parts():
    plain, joined = network(), network()
    expected = train(plain, parts_of(plain), range(10))
    joint = Joint(*parts_of(joined))
    assert equal(train(joined, [joint], range(10)), expected)
    assert not equal(expected, network().parameters())
    scaled = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert equal(train(scaled, [Joint(*parts_of(scaled))], range(10), scaler), expected)


def test_a_run_goes_on_from_its_state():
    whole = network()
    expected = train(whole, [Joint(*parts_of(whole))], range(10))
    first = network()
    joint = Joint(*parts_of(first))
    train(first, [joint], range(4))
    second = copy.deepcopy(first)
    other = Joint(*parts_of(second))
    other.load_state_dict(copy.deepcopy(joint.state_dict()))
    assert equal(train(second, [other], range(4, 10)), expected)


def test_a_group_is_the_parts_own_also_after_loading():
    model = network()
    joint = Joint(*parts_of(model))
    train(model, [joint], range(2))
    joint.load_state_dict(joint.state_dict())
    joint.param_groups[1]["lr"] = 0.0
    before = [p.detach().clone() for p in model[0].parameters()]
    train(model, [joint], range(2))
    assert equal(before, model[0].parameters())


def test_passes_are_those_of_all_parts():
    model = network()
    optimizer = Joint(
        IVON([model[0].weight], 0.1, ess=10), AdamWPrediction([model[2].weight], lr=0.01)
    )
    for step in range(2):
        before = [model[i].weight.detach().clone() for i in (0, 2)]
        optimizer.zero_grad()
        with optimizer.passes():
            moved = [
                not torch.equal(model[i].weight, w) for i, w in zip((0, 2), before, strict=True)
            ]
            model(gradient(4, 7)).square().mean().backward()
        assert moved == [True, step > 0]
        assert equal(before, [model[i].weight for i in (0, 2)])
        optimizer.step()


def test_bad_input_is_named():
    model = network()
    first, second = parts_of(model)
    with pytest.raises(ValueError, match="more than one parameter group"):
        Joint(first, second, torch.optim.SGD([model[1].weight], lr=0.1))
