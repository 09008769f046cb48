"""The counts that the analysis rests on, against plain numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import activation, flips, gradient
from tritonbnn.analysis import EDGES, Probe, Recorder, SignLayout, histogram
from tritonbnn.analysis.window import mean_magnitude
from tritonbnn.nn import BinaryConv2d, BinaryLinear, BinaryUnit

SHAPES = [(5, 3, 3, 3), (40, 33, 1, 1), (7,), (33, 70)]  # of 135, 1320, 7 and 2310 elements


def test_differences_are_counted_layer_by_layer(launchers, device):
    """Zeros of both signs, sizes that fill no row, weights that are not contiguous."""
    before = [activation(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    after = [activation(*shape, seed=9 + i) for i, shape in enumerate(SHAPES)]
    before[0] = before[0].to(memory_format=torch.channels_last)
    layout = SignLayout([w.to(device) for w in before])
    a, b = (layout.signs([w.to(device) for w in weights]) for weights in (before, after))
    assert a.shape == (1 + 2 + 1 + 3, 32)
    expected = flips([w.numpy() for w in before], [w.numpy() for w in after])
    assert 0 < expected[2] < 7
    assert layout.differing(a, b).tolist() == expected
    assert layout.differing(a, a).tolist() == [0] * 4


def test_host_memory_holds_the_bits_of_the_operator(launchers, device):
    """numpy packs what ``pack_signs`` would, which counts where there is a GPU."""
    weights = [activation(*shape, seed=i).to(device) for i, shape in enumerate(SHAPES)]
    weights[0] = weights[0].to(memory_format=torch.channels_last)
    weights[2] = weights[2].bfloat16()
    weights[3][:, :2] = torch.tensor([torch.nan, -torch.inf], device=device)
    layout = SignLayout(weights)
    alike = {"signs": (), "reaching": (0.375,), "finite": ()}
    found = {name: getattr(layout, name)(weights, *args) for name, args in alike.items()}
    layout._on_host = False
    for name, args in alike.items():
        assert torch.equal(found[name], getattr(layout, name)(weights, *args)), name
    assert layout.count(~found["finite"]).tolist() == [0, 0, 0, 66]


def test_what_reaches_a_threshold_is_counted(launchers, device):
    tensors = [gradient(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    edge = 0.375
    tensors[2][:4] = torch.tensor([edge, -edge, np.nextafter(np.float32(edge), 0), 0.0])
    layout = SignLayout([t.to(device) for t in tensors])
    bits = layout.reaching([t.to(device) for t in tensors], edge)
    expected = [int((np.abs(t.numpy()) >= edge).sum()) for t in tensors]
    assert layout.count(bits).tolist() == expected
    assert layout.count(layout.empty()).tolist() == [0] * 4


def test_one_sign_in_a_million(launchers, device):
    weight = torch.ones(1 << 20, device=device)
    layout = SignLayout([weight])
    before = layout.signs([weight])
    weight[777_777] = -1e-30
    assert layout.differing(before, layout.signs([weight])).tolist() == [1]


def test_saturation_is_counted_per_channel():
    """Of two units: the first sees the images, the second what the first makes of them."""
    torch.manual_seed(0)
    model = nn.Sequential(BinaryUnit(8, 8, 3, 2), BinaryUnit(8, 16, 1)).train()
    for unit in model:
        unit.shift_in.data.copy_(torch.linspace(-1, 1, 8))
        unit.bn.running_var.fill_(30.0)
    model[0].shift_in.data[3] = 0.0
    images = activation(4, 8, 6, 6) * 2
    images[:, 3, :, :2] = torch.tensor([1.0, -1.0])  # exactly 1 is not saturated
    images[:, 7] = 5.0
    found = Probe(images).measure(model)
    assert model.training
    assert not model[0]._forward_pre_hooks
    model.eval()
    with torch.no_grad():
        inputs = {"0.weight": images, "1.weight": model[0](images)}
    assert found.keys() == inputs.keys()
    counts, total = 0, 0
    for (name, x), unit in zip(inputs.items(), model, strict=True):
        large = np.abs(x.numpy() + unit.shift_in.detach().numpy()[:, None, None]) > 1
        assert found[name].counts.tolist() == large.sum((0, 2, 3)).tolist()
        np.testing.assert_array_equal(found[name].shares, large.mean((0, 2, 3)))
        assert found[name].share == large.mean()
        assert found[name].saturated_channels == (large.mean((0, 2, 3)) > 0.99).mean()
        counts, total = counts + large.sum(), total + large.size
    assert found["0.weight"].saturated_channels >= 1 / 8
    optimizer = torch.optim.SGD(model.parameters())
    recorder = Recorder(model, optimizer, level="light", probe=Probe(images))
    record = recorder.record(1)
    assert record["saturation"] == counts / total
    assert record["layers"]["1.weight"]["saturation"] == found["1.weight"].share


def test_saturation_of_features_is_along_the_last_dimension():
    x = activation(3, 5, 7) * 2
    found = Probe(x).measure(nn.Sequential(BinaryLinear(7, 4)))
    assert found["0.weight"].counts.tolist() == (np.abs(x.numpy()) > 1).sum((0, 1)).tolist()
    assert found["0.weight"].total == 15


@pytest.mark.parametrize(
    "layer", [BinaryLinear(7, 4, shift=True), BinaryConv2d(7, 4, 1, shift=True)]
)
def test_saturation_counts_what_a_layers_own_shift_makes_of_its_input(layer):
    layer.shift.data.copy_(torch.linspace(-2, 2, 7))
    x = activation(3, 7, 1, 1)
    inputs = x[..., 0, 0] if isinstance(layer, BinaryLinear) else x
    found = Probe(inputs).measure(nn.Sequential(layer))
    large = np.abs(x[..., 0, 0].numpy() + layer.shift.detach().numpy()) > 1
    assert found["0.weight"].counts.tolist() == large.sum(0).tolist()


def test_histogram_is_that_of_numpy():
    weight = torch.cat((gradient(5000) * 0.6, EDGES, torch.tensor([-0.0, 0.0, 9.0, -9.0])))
    assert (weight.abs() > 1.5).sum() > 20
    edges = EDGES.numpy()
    counts, _ = np.histogram(np.clip(weight.numpy(), edges[0], edges[-1]), edges)
    assert histogram(weight.view(-1, 5)).tolist() == counts.tolist()
    middle = len(counts) // 2
    assert edges[middle] == 0
    assert histogram(torch.tensor([-0.0, 0.0]))[middle] == 2
    assert np.array_equal(edges, -edges[::-1])


@pytest.mark.parametrize("shape", [(1024, 1024, 3, 3), (7,), (1, 1), (33, 1000)])
def test_the_mean_of_a_layer_is_that_of_float64(shape):
    """Of a real layer too, and the same bits whatever the number of threads."""
    weight = gradient(*shape) * 1e-3
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(mean_magnitude(weight).item())
    finally:
        torch.set_num_threads(threads)
    exact = np.abs(weight.numpy().astype(np.float64)).mean()
    assert found[0] == pytest.approx(exact, rel=1e-13, abs=0)
    assert found == found[:1] * 3
