"""thop and torchinfo count what a network does and has, as docs/clients.md says."""

import re
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.clients import client
from tests.helpers import gradient
from tritonbnn.models import build_model

DOC = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()


def network():
    return build_model("reactnet_a", width=0.25, num_classes=3, small_images=True).eval()


def counted(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() / 2


def test_thop_counts_with_the_rules_of_the_page():
    thop, model, x, scope = client("thop"), network(), gradient(1, 3, 32, 32), {}
    exec(re.search(r"```python\n(def products.*?)```", DOC, re.DOTALL)[1], scope)
    macs, _ = thop.profile(model, inputs=(x,), custom_ops=scope["rules"](model), verbose=False)
    assert macs == counted(network(), x)


def test_torchinfo_counts_parameters_and_the_layers_that_it_knows():
    torchinfo = client("torchinfo")
    model = network()
    summary = torchinfo.summary(model, (1, 3, 32, 32), verbose=0)
    assert summary.total_params == sum(p.numel() for p in model.parameters())
