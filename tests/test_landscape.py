"""The loss around a network, against plain numpy and against networks moved by hand."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers import gradient
from tritonbnn.analysis.landscape import filter_directions, landscape
from tritonbnn.models import build_model

CLASSES = 3


def batch(images=5):
    labels = torch.arange(images) % CLASSES
    return gradient(images, 1, 32, 32), labels


def network(*, binary_weights):
    torch.manual_seed(0)
    return build_model(
        "reactnet_a",
        width=0.25,
        num_classes=CLASSES,
        in_channels=1,
        small_images=True,
        binary_weights=binary_weights,
    )


def test_directions_have_the_length_of_each_filter():
    weights = {"conv": gradient(7, 3, 3, 3), "fc": gradient(4, 5, seed=6)}
    weights["conv"][2] = 0
    directions = filter_directions(weights, seed=3, number=0)
    for name, weight in weights.items():
        expected = np.linalg.norm(weight.double().flatten(1).numpy(), axis=1)
        lengths = np.linalg.norm(directions[name].double().flatten(1).numpy(), axis=1)
        np.testing.assert_allclose(lengths, expected, rtol=1e-6)
    flat = [
        torch.cat([d.flatten() for d in filter_directions(weights, seed, n).values()])
        for seed, n in ((3, 0), (3, 1), (4, 0), (3, 0))
    ]
    assert torch.equal(flat[0], flat[3])
    for other in flat[1:3]:
        assert abs(F.cosine_similarity(flat[0], other, dim=0)) < 0.3


def test_a_linear_model_has_the_loss_of_its_formula():
    model = nn.Linear(6, CLASSES).double()
    images, labels = gradient(9, 6, dtype=torch.float64), torch.arange(9) % CLASSES
    found = landscape(model, images, labels, points=5, radius=2.0, seed=1)
    np.testing.assert_array_equal(found.axis, [-2, -1, 0, 1, 2])
    weight, bias = model.weight.detach().numpy(), model.bias.detach().numpy()
    first, second = (
        filter_directions({"weight": model.weight.detach()}, 1, n)["weight"].numpy() for n in (0, 1)
    )
    for row, y in enumerate(found.axis):
        for column, x in enumerate(found.axis):
            moved = weight + x * first + y * second
            logits = images.numpy() @ moved.T + bias
            right = logits[np.arange(9), labels.numpy()]
            expected = (np.log(np.exp(logits).sum(axis=1)) - right).mean()
            assert found.loss[row, column] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("binary_weights", [False, True])
def test_latent_weights_move_and_are_binarised_again(binary_weights):
    model = network(binary_weights=binary_weights)
    images, labels = batch()
    found = landscape(model, images, labels, points=3, radius=0.5, seed=2)
    latent = {n: w.detach() for n, w in model.named_parameters() if w.dim() > 1}
    first, second = filter_directions(latent, 2, 0), filter_directions(latent, 2, 1)
    for row, column in ((1, 1), (0, 1), (2, 0)):
        x, y = found.axis[column], found.axis[row]
        moved = {n: w + float(x) * first[n] + float(y) * second[n] for n, w in latent.items()}
        by_hand = copy.deepcopy(model).train()
        by_hand.load_state_dict({**model.state_dict(), **moved})
        with torch.no_grad():
            expected = float(F.cross_entropy(by_hand(images).double(), labels))
        assert found.loss[row, column] == expected
    assert len(np.unique(found.loss)) == found.loss.size


def test_the_network_is_left_as_it_was():
    model = network(binary_weights=True).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    landscape(model, *batch(), points=3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(module.training for module in model.modules())
    assert all(weight.requires_grad for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_has_one_dimension_stays():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(CLASSES))
    images, labels = gradient(8, CLASSES), torch.arange(8) % CLASSES
    found = landscape(model, images, labels, points=3)
    assert len(np.unique(found.loss)) == 1


def test_a_loss_that_is_not_finite_is_nan():
    model = nn.Linear(4, CLASSES, bias=False)
    nn.init.constant_(model.weight, 1e38)
    found = landscape(model, gradient(4, 4) * 1e3, torch.zeros(4, dtype=torch.int64), points=3)
    assert np.isnan(found.loss[0, 0])


@pytest.mark.parametrize("points", [-1, 1, 4])
def test_a_grid_without_middle_is_refused(points):
    with pytest.raises(ValueError, match=f"odd and at least 3, not {points}"):
        landscape(nn.Linear(2, 2), torch.zeros(1, 2), torch.zeros(1, dtype=int), points=points)
