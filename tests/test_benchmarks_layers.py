"""The layer alone against torch's: what each call computes, and the whole command at tiny sizes."""

import json
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from benchmarks import layers
from benchmarks.layers import FLOAT, OURS, WAYS, Layer, LayerRunner
from tritonbnn import cli

LAYER = Layer(3, 33, 7)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", [OURS, FLOAT])
def test_a_call_computes_what_its_way_says(name, monkeypatch):
    """Both layers by their definition, in float64, and which tensors get a gradient."""
    made = []
    build = Layer.build
    monkeypatch.setattr(Layer, "build", lambda *a: made.append(build(*a)) or made[-1])
    runner = LayerRunner(LAYER, name, 2)
    (module,) = made
    outputs = []
    module.register_forward_hook(lambda module, inputs, y: outputs.append((*inputs, y)))
    for way in WAYS:
        module.weight.grad = None
        runner.turn(way, 1)  # three more go before it, one of them to see how long it takes
        assert len(outputs) > 3
        (x, y), outputs = outputs[-1], []
        module._forward_hooks.popitem()
        module.register_forward_hook(
            lambda module, inputs, y, outputs=outputs: outputs.append((*inputs, y))
        )
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert y.requires_grad == (way != "eval")
        assert x.requires_grad == (way == "stream")
        assert (module.weight.grad is None) == (way == "eval")
        weight, signs = module.weight.detach().double(), x.detach().double()
        if name == OURS:
            alpha = weight.abs().mean((1, 2, 3), keepdim=True)
            weight, signs = alpha * torch.where(weight >= 0, 1.0, -1.0), signs.sign()
        torch.testing.assert_close(
            y.double(), F.conv2d(signs, weight, padding=1), atol=1e-5, rtol=0
        )


@pytest.mark.bench
def test_the_command_times_both_and_says_so(tmp_path, threads, capsys):
    path = tmp_path / "new" / "layers.json"
    flags = ["--layers", "3x3:33@6,1x1:8@5", "--batch", "2", "--rounds", "3", "--milliseconds", "2"]
    assert layers.main([*flags, "--threads", "1", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["command"].startswith("python -m benchmarks.layers --layers 3x3:33@6")
    assert (result["threads"], result["batch"], result["milliseconds_of_a_turn"]) == (1, 2, 2)
    assert list(map(layers.layer_of, result["layers"])) == [Layer(3, 33, 6), Layer(1, 8, 5)]
    out = capsys.readouterr().out
    for entry in result["layers"]:
        assert set(entry["ways"]) == set(WAYS)
        assert str(layers.layer_of(entry)) in out
        for way, name in product(WAYS, (OURS, FLOAT)):
            row = entry["ways"][way][name]
            assert row["median_seconds"] == sorted(row["seconds"])[1] > 0
            assert row["cpu_seconds"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "5x5:8@4"], "'5x5:8@4' is no layer: write 3x3:128@56"),
        (["--layers", "3x3:8@4,3x1:8@4"], "'3x1:8@4' is no layer"),
        (["--layers", "3x3:0@4"], "is no layer"),
        (["--batch", "0"], "--batch"),
        (["--json", "/dev/null/x.json"], "/dev/null"),
    ],
)
def test_a_user_error_is_one_line(flags, message, threads, capsys):
    with pytest.raises((cli.UserError, SystemExit)) as caught:
        layers.main(flags)
    said = capsys.readouterr().err or str(caught.value)
    assert message in said
    assert "\n" not in said.strip()
