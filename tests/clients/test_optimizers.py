"""pytorch-optimizer: what it does to the network is what it does to plain tensors."""

import pytest
import torch
from torch import nn

from tests.clients import client
from tests.helpers import gradient
from tritonbnn.models import build_model

optimizers = client("pytorch_optimizer")


@pytest.mark.parametrize("name", ["lion", "adabelief", "lamb", "prodigy", "adan", "muon"])
def test_an_optimiser_moves_a_network_as_a_float_twin(name):
    torch.manual_seed(0)
    model = build_model("reactnet_a", width=0.25, num_classes=3, small_images=True)
    twin = nn.ParameterList(p.detach().clone() for p in model.parameters())
    kind = optimizers.load_optimizer(name)

    def built(parameters):
        parameters = list(parameters)
        if name != "muon":
            return kind(parameters, lr=1e-2, weight_decay=1e-3)
        matrices = {"params": [p for p in parameters if p.dim() > 1], "use_muon": True}
        vectors = {"params": [p for p in parameters if p.dim() <= 1], "use_muon": False}
        return kind([matrices, vectors])

    first, second = built(model.parameters()), built(twin)
    start = [p.detach().clone() for p in twin]
    for step in range(3):
        first.zero_grad()
        model(gradient(4, 3, 32, 32, seed=step)).square().mean().backward()
        for p, q in zip(model.parameters(), twin, strict=True):
            q.grad = p.grad.clone()
        first.step()
        second.step()
    for (key, p), q in zip(model.named_parameters(), twin, strict=True):
        assert torch.equal(p, q), key
    assert sum(not torch.equal(p, q) for p, q in zip(start, twin, strict=True)) > len(start) / 2
