"""Ours and the expert's against the obvious network: whole in float64, blocks in float32."""

import pytest
import torch
from torch import nn

from benchmarks.baseline import (
    BinaryActivation,
    Block,
    ObviousReActNetA,
    Shift,
    SimulatedConv2d,
)
from benchmarks.expert import (
    ExpertReActNetA,
    ExpertShift,
    ScaledSignFunction,
    SignFunction,
)
from tritonbnn.models import build_model, load_adambnn
from tritonbnn.nn import BinaryUnit


def randomised(model):
    """Move every parameter that starts at a constant off it, so that a mix-up shows."""
    for name, parameter in model.named_parameters():
        if parameter.squeeze().dim() <= 1:
            scale = 0.1 if "prelu" in name else 0.3
            parameter.data += scale * torch.randn_like(parameter)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer += 0.2 * torch.rand_like(buffer)
    return model


def gradients_as_published(model, ours):
    """Gradients of ``ours`` under the published names, pairs cut apart again."""
    loaded = {}
    twin = {n: p.grad for n, p in ours.named_parameters()}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if name.startswith("fc."):
            loaded[name] = twin[name]
        elif parts[1] == "0":
            loaded[name] = twin[f"stem.{0 if parts[2] == 'conv1' else 1}.{parts[3]}"]
        else:
            loaded[name] = unit_gradient(parts, parameter.shape, twin)
    return loaded


def unit_gradient(parts, shape, twin):
    layer = parts[2]
    half = 0 if layer in ("move11", "binary_3x3", "bn1", "move12", "prelu1", "move13") else 1
    prefix = f"blocks.{int(parts[1]) - 1}.{half}."
    shifts = {"1": "shift_in", "2": "shift_mid", "3": "shift_out"}
    if layer.startswith("move"):
        kind = "shift_in" if layer in ("move11", "move21") else shifts[layer[-1]]
        return twin[prefix + kind].view(shape)
    if layer.startswith("prelu"):
        return twin[prefix + "slope"]
    entry = "weight" if layer.startswith("binary") else f"bn.{parts[3]}"
    grad = twin[prefix + entry]
    if layer in ("binary_pw_down1", "bn2_1"):
        return grad[: shape[0]]
    if layer in ("binary_pw_down2", "bn2_2"):
        return grad[shape[0] :]
    return grad


def assert_close(actual, expected, relative, name):
    error = (actual - expected).abs().max()
    assert error <= relative * expected.abs().max(), f"{name}: {error}"


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("binary", [False, True], ids=["step1", "step2"])
@pytest.mark.parametrize(("size", "small"), [(32, True), (224, False)], ids=["32", "224"])
def test_whole_network_equals_the_baseline_in_float64(size, small, binary, train):
    torch.manual_seed(1)
    options = {
        "num_classes": 10,
        "width": 0.25,
        "small_images": small,
        "binary_weights": binary,
    }
    obvious = randomised(ObviousReActNetA(**options).double()).train(train)
    ours = build_model("reactnet_a", **options).double().train(train)
    load_adambnn(ours, obvious.state_dict())
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    expected, actual = obvious(x), ours(x)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    actual.backward(upstream)
    assert_close(actual, expected, 1e-9, "logits")
    for name, grad in gradients_as_published(obvious, ours).items():
        assert_close(grad, obvious.get_parameter(name).grad, 1e-9, name)


@pytest.mark.parametrize("binary", [False, True], ids=["step1", "step2"])
@pytest.mark.parametrize(("channels", "size", "small"), [(1, 32, True), (3, 64, False)])
def test_the_expert_equals_the_baseline_in_float64(channels, size, small, binary):
    torch.manual_seed(4)
    options = {"num_classes": 10, "width": 0.25, "small_images": small, "in_channels": channels}
    obvious = randomised(ObviousReActNetA(**options, binary_weights=binary).double())
    for name, parameter in obvious.named_parameters():
        if "binary" in name:  # some beyond 1, where the gradient of a binary weight ends
            parameter.data *= 1.3 / parameter.abs().max()
    expert = ExpertReActNetA(**options, binary_weights=binary).double()
    expert.load_state_dict(obvious.state_dict())
    x = torch.randn(3, channels, size, size, dtype=torch.float64)
    expected, actual = obvious(x), expert(x)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    actual.backward(upstream)
    assert_close(actual, expected, 1e-11, "logits")
    for name, parameter in obvious.named_parameters():
        assert_close(expert.get_parameter(name).grad, parameter.grad, 1e-11, name)


def test_the_experts_pieces_at_their_corners():
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.25, 1.0, 3.0], requires_grad=True)
    signs = SignFunction.apply(x)
    assert signs.tolist() == [-1, -1, -1, 1, 1, 1, 1]
    signs.backward(torch.full_like(x, 3.0))
    assert x.grad.tolist() == [0, 0, 3, 6, 4.5, 0, 0]
    weight = torch.tensor([[-1.0, 0.0], [1.25, -0.25]]).view(2, 2, 1, 1).requires_grad_()
    scaled = ScaledSignFunction.apply(weight)
    assert scaled.flatten().tolist() == [-0.5, 0.5, 0.75, -0.75]
    scaled.backward(torch.full_like(weight, 2.0))
    assert weight.grad.flatten().tolist() == [2, 2, 0, 2]


@pytest.mark.parametrize("binary", [False, True], ids=["step1", "step2"])
@pytest.mark.parametrize(
    ("channels", "widen", "stride"), [(32, False, 1), (40, True, 2), (24, True, 1)]
)
def test_a_unit_equals_the_baseline_in_float32(channels, widen, stride, binary):
    torch.manual_seed(2)
    conv = SimulatedConv2d if binary else nn.Conv2d
    block = randomised(Block(channels, widen, stride, conv, BinaryActivation, Shift))
    x = torch.randn(4, channels, 8, 8)
    for half in (0, 1):
        unit, obvious = unit_of(block, half, channels, widen, stride, binary)
        a, b = (x.clone().requires_grad_() for _ in range(2))
        expected, actual = obvious(a), unit(b)
        upstream = torch.randn_like(expected)
        expected.backward(upstream)
        actual.backward(upstream)
        assert norm_relative(actual, expected) < 1e-5
        assert norm_relative(b.grad, a.grad) < 1e-4


def norm_relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def unit_of(block, half, channels, widen, stride, binary):
    """One of the block's halves as our unit, and as the baseline's modules."""
    if half == 0:
        unit = BinaryUnit(channels, channels, 3, stride, binary_weight=binary)
        shift_in, convs, norms = block.move11, [block.binary_3x3], [block.bn1]
        tail = (block.move12, block.prelu1, block.move13)
    else:
        unit = BinaryUnit(channels, 2 * channels if widen else channels, 1, binary_weight=binary)
        shift_in = block.move21
        convs = [block.binary_pw_down1, block.binary_pw_down2] if widen else [block.binary_pw]
        norms = [block.bn2_1, block.bn2_2] if widen else [block.bn2]
        tail = (block.move22, block.prelu2, block.move23)
    unit.load_state_dict(
        {
            "shift_in": shift_in.bias.flatten(),
            "weight": torch.cat([c.weight for c in convs]),
            **{
                f"bn.{k}": joined([n.state_dict()[k] for n in norms]) for k in norms[0].state_dict()
            },
            "shift_mid": tail[0].bias.flatten(),
            "slope": tail[1].weight,
            "shift_out": tail[2].bias.flatten(),
        }
    )

    def obvious(x):
        s = block.binary_activation(shift_in(x))
        shortcut = block.pooling(x) if half == 0 and stride == 2 else x
        parts = [n(c(s)) + shortcut for c, n in zip(convs, norms, strict=True)]
        return tail[2](tail[1](tail[0](torch.cat(parts, dim=1))))

    return unit, obvious


def joined(tensors):
    return tensors[0] if tensors[0].dim() == 0 else torch.cat(tensors)


def adam_losses(model, batches):
    """The loss of each of a few Adam steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2.5e-3)
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("binary", [False, True], ids=["step1", "step2"])
def test_twenty_adam_steps_agree_in_float64(binary):
    torch.manual_seed(3)
    options = {"num_classes": 10, "width": 0.25, "small_images": True, "binary_weights": binary}
    obvious = ObviousReActNetA(**options).double()
    fused, composed = (
        build_model("reactnet_a", fused=f, **options).double() for f in (True, False)
    )
    for model in (fused, composed):
        load_adambnn(model, obvious.state_dict())
    batches = [
        (torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(10, (4,))) for _ in range(20)
    ]
    expected = adam_losses(obvious, batches)
    assert len(set(expected)) == 20
    for model in (fused, composed):
        assert adam_losses(model, batches) == pytest.approx(expected, rel=1e-7)


def test_the_experts_stream_stays_narrow():
    """Where the obvious one's becomes float32: a vector's dtype decides, as of any tensor."""
    x = torch.randn(2, 4, 3, 3).bfloat16()
    assert ExpertShift(4)(x).dtype == torch.bfloat16
    assert Shift(4)(x).dtype == torch.float32
