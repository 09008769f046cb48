"""Brevitas: its binary quantiser and ours have the same signs, beside each other in one network."""

import torch
from torch import nn

from tests.clients import client
from tests.helpers import gradient
from tritonbnn.nn import BinaryConv2d, BinaryUnit

layers = client("brevitas.nn")


def test_a_binary_layer_of_brevitas_computes_what_ours_does():
    from brevitas.quant.binary import (
        SignedBinaryActPerTensorConst,
        SignedBinaryWeightPerTensorConst,
    )

    ours = BinaryConv2d(8, 5, 3, padding=1)
    theirs = layers.QuantConv2d(
        8, 5, 3, padding=1, bias=False, weight_quant=SignedBinaryWeightPerTensorConst
    )
    identity = layers.QuantIdentity(act_quant=SignedBinaryActPerTensorConst)
    theirs.weight.data.copy_(ours.weight)
    x = gradient(2, 8, 6, 4)
    sums = ours(x) / ours.weight.abs().mean((1, 2, 3)).view(-1, 1, 1)
    scales = identity.act_quant.scale() * theirs.weight_quant.scale()
    torch.testing.assert_close(theirs(identity(x)) / scales, sums)


def test_quantised_layers_train_around_a_unit():
    torch.manual_seed(0)
    model = nn.Sequential(
        layers.QuantConv2d(3, 8, 3, padding=1, weight_bit_width=4),
        BinaryUnit(8, 16, 3, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        layers.QuantLinear(16, 3, bias=True, weight_bit_width=4),
    )
    model(gradient(4, 3, 8, 8)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
