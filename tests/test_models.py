"""The networks' counts, names, sizes and errors."""

import pytest
import torch
from torch import nn

from benchmarks.baseline import ObviousReActNetA
from tritonbnn.models import MODELS, build_model
from tritonbnn.nn import BinaryUnit, binary_weights, check_gradients, decayed_parameters


def scalars(tensors):
    return sum(t.numel() for t in tensors)


@pytest.mark.parametrize(
    ("name", "parameters", "tensors", "entries", "binary", "layers", "decayed"),
    [
        ("reactnet_a", 29_343_592, 187, 268, 28_253_184, 26, (105, 28_285_792)),
        ("reactnet_18", 11_704_424, 126, 186, 10_985_472, 16, (68, 11_177_984)),
        ("birealnet_18", 11_689_512, 62, 122, 10_985_472, 16, (20, 11_166_912)),
    ],
)
def test_counts_are_the_published_ones(name, parameters, tensors, entries, binary, layers, decayed):
    with torch.device("meta"):
        model = build_model(name)
    weights = binary_weights(model)
    group = list(decayed_parameters(model))
    assert scalars(model.parameters()) == parameters
    assert len(list(model.parameters())) == tensors
    assert len(model.state_dict()) == entries
    assert (len(weights), scalars(weights.values())) == (layers, binary)
    assert (len(group), scalars(group)) == decayed


def test_binarynet_has_the_published_layers():
    """Pairs of 128, 256 and 512 channels, two dense layers of 1024; gradients reach all of it."""
    with torch.device("meta"):
        model = build_model("binarynet", num_classes=10, small_images=True)
    shapes = [tuple(w.shape) for w in binary_weights(model).values()]
    assert shapes == [
        *((128, 128, 3, 3), (256, 128, 3, 3), (256, 256, 3, 3), (512, 256, 3, 3), (512, 512, 3, 3)),
        *((1024, 8192, 1, 1), (1024, 1024, 1, 1)),
    ]
    for binary in (True, False):
        torch.manual_seed(0)
        model = build_model(
            "binarynet", num_classes=7, width=0.0625, small_images=True, binary_weights=binary
        )
        images = torch.randn(4, 3, 32, 32)
        assert model(images).shape == (4, 7)
        check_gradients(model, images)
    with pytest.raises(ValueError, match="binarynet is for images of about 32 x 32"):
        build_model("binarynet")


@pytest.mark.parametrize(
    ("name", "stem", "second", "published"),
    [("binary_alexnet", 64, 192, 61_859_192), ("xnornet", 96, 256, 62_396_768)],
)
def test_alexnets_have_the_published_layers(name, stem, second, published):
    with torch.device("meta"):
        model = build_model(name).eval()
        features = model.forward_features(torch.empty(1, 3, 224, 224))
    assert (tuple(model.stem[0].weight.shape), model.stem[0].stride) == ((stem, 3, 11, 11), (4, 4))
    assert [tuple(w.shape) for w in binary_weights(model).values()] == [
        *((second, stem, 5, 5), (384, second, 3, 3), (384, 384, 3, 3), (256, 384, 3, 3)),
        *((4096, 9216, 1, 1), (4096, 4096, 1, 1)),
    ]
    assert features.shape == (1, 4096, 1, 1)
    # There a norm has a shift and two statistics, but no scale. A head has no bias, BNN's a norm.
    weights = [model.stem[0].weight, *binary_weights(model).values(), model.fc.weight]
    norms = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    norms += 1000 if name == "binary_alexnet" else 0
    assert scalars(weights) + 3 * norms == published


def test_the_baseline_counts_are_the_published_ones():
    with torch.device("meta"):
        model = ObviousReActNetA()
    kinds = [name for name, _ in model.named_parameters() if "binary" in name]
    group = [p for n, p in model.named_parameters() if p.dim() == 4 or "conv" in n]
    assert scalars(model.parameters()) == 29_343_592
    assert (len(list(model.parameters())), len(model.state_dict()), len(kinds)) == (202, 298, 31)
    assert (len(group), scalars(group)) == (110, 28_285_792)


def test_both_steps_share_names_and_shapes():
    with torch.device("meta"):
        one, two = (build_model("reactnet_a", binary_weights=b) for b in (False, True))
    assert {k: v.shape for k, v in one.state_dict().items()} == {
        k: v.shape for k, v in two.state_dict().items()
    }


def test_only_the_second_step_depends_on_the_signs_alone():
    for binary, same in ((True, True), (False, False)):
        torch.manual_seed(0)
        model = build_model(
            "reactnet_a", binary_weights=binary, width=0.25, num_classes=10, small_images=True
        ).eval()
        x = torch.randn(2, 3, 32, 32)
        before = model(x)
        for weight in binary_weights(model).values():
            magnitude = weight.detach().abs().mean(dim=(1, 2, 3), keepdim=True)
            weight.data = torch.where(weight >= 0, magnitude, -magnitude)
        assert torch.allclose(before, model(x), atol=1e-4) is same


@pytest.mark.parametrize(
    ("name", "small", "multiple"),
    [
        ("reactnet_a", True, 16),
        ("reactnet_a", False, 32),
        ("reactnet_18", True, 8),
        ("birealnet_18", False, 32),
    ],
)
def test_legal_sizes_run_and_others_are_named(name, small, multiple):
    model = build_model(name, width=0.25, num_classes=7, in_channels=1, small_images=small).eval()
    assert model(torch.randn(2, 1, multiple, 2 * multiple)).shape == (2, 7)
    with pytest.raises(ValueError, match=f"multiples of {multiple}, not {multiple + 1} x"):
        model(torch.randn(1, 1, multiple + 1, multiple))
    with pytest.raises(ValueError, match=r"\(N, 1, H, W\)"):
        model(torch.randn(1, 3, multiple, multiple))


def test_width_rounds_to_multiples_of_8():
    model = build_model("reactnet_18", width=0.3, num_classes=2)
    assert model.stem[0].weight.shape[0] == 16  # 19.2
    assert model.fc.weight.shape[1] == 152  # 153.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet"}, "unknown model 'resnet'; choose from reactnet_a"),
        ({"width": 0.01}, "width 0.01 leaves no channels"),
        ({"width": 0.0}, "positive"),
        ({"width": 0.13}, "width 0.13 rounds a doubling of channels to 64 and then 136"),
        ({"width": float("nan")}, "positive"),
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"in_channels": 2}, "in_channels must be 1 or 3"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build_model(**{"name": "reactnet_a", **options})


def test_a_unit_names_what_does_not_fit():
    unit = BinaryUnit(8, 8, 3, stride=2)
    with pytest.raises(ValueError, match=r"even height and width, not \(5, 4\)"):
        unit(torch.randn(1, 8, 5, 4))
    with pytest.raises(ValueError, match=r"shortcut must have shape \(1, 8, 2, 2\)"):
        unit(torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BinaryUnit(8, 8, 3)(torch.randn(1, 8, 1, 1))


@pytest.mark.parametrize("name", MODELS)
def test_a_network_has_the_manners_of_timms(name):
    torch.manual_seed(0)
    model = build_model(name, width=0.25, num_classes=5, small_images=True).double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    features, logits = model.forward_features(x), model(x)
    assert features.shape[1] == model.num_features == model.head_hidden_size
    assert torch.equal(model.forward_head(features), logits)
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.equal(pooled, features.mean((2, 3)))
    assert model.get_classifier() is model.get_submodule(model.get_classifier(name_only=True))
    model.reset_classifier(7)
    assert (model(x).shape, model.num_classes) == ((2, 7), 7)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    with pytest.raises(ValueError, match=r'global_pool must be "avg"'):
        model.reset_classifier(3)
    model.reset_classifier(3, "avg")
    assert (model(x).shape, model.fc.training) == ((2, 3), False)


OF_UNITS = ("reactnet_a", "reactnet_18", "birealnet_18")


@pytest.mark.parametrize("name", OF_UNITS)
@pytest.mark.parametrize("small", [True, False])
def test_feature_facts_are_those_of_the_streams(name, small):
    model = build_model(name, width=0.25, num_classes=5, small_images=small).eval()
    seen = {}
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(
            lambda m, args, y, key=info["module"]: seen.update({key: y})
        )
    facts = model.default_cfg
    channels, height, width = facts["min_input_size"]
    model(torch.randn(1, channels, height, 2 * width))
    for info in model.feature_info:
        shape = (1, info["num_chs"], height // info["reduction"], 2 * width // info["reduction"])
        assert seen[info["module"]].shape == shape
    reductions = [info["reduction"] for info in model.feature_info]
    assert reductions == sorted(set(reductions))
    assert reductions[-1] == model.size_multiple
    assert facts["input_size"][1] == facts["pool_size"][0] * model.size_multiple


def test_a_network_that_computes_its_blocks_again_has_the_same_gradients():
    models = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = build_model("reactnet_a", width=0.25, num_classes=5, small_images=True).double()
        model.set_grad_checkpointing(enable)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            y = model(torch.randn(2, 3, 16, 16, dtype=torch.float64))
        y.square().sum().backward()
        models.append((len(saved), y.detach(), [p.grad for p in model.parameters()]))
    (many, *plain), (few, *again) = models
    assert few < many / 3
    torch.testing.assert_close(again, plain, rtol=1e-9, atol=1e-9)
