"""Packed networks: folded exactly, run alike by C, numpy and torch, in every build."""

import copy
import os
import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tritonbnn import deploy
from tritonbnn.compiled import build, loader
from tritonbnn.deploy import engine as engine_module
from tritonbnn.deploy import file, native, plain
from tritonbnn.deploy.engine import Engine
from tritonbnn.deploy.fold import FoldError, fold
from tritonbnn.deploy.native import NativeNetwork
from tritonbnn.deploy.packed import PackedError
from tritonbnn.models import build_model
from tritonbnn.models.registry import MODELS
from tritonbnn.models.resnet import DownsamplingUnit
from tritonbnn.nn import BinaryUnit

NETWORKS = [
    pytest.param("reactnet_a", {"width": 0.25, "small_images": True}, (5, 3, 64, 16), id="narrow"),
    pytest.param("reactnet_a", {"width": 1.0, "in_channels": 1}, (2, 1, 32, 64), id="wide"),
    pytest.param("reactnet_18", {"width": 0.4}, (3, 3, 64, 32), id="pooled_stem"),
    pytest.param("birealnet_18", {"width": 0.3, "small_images": True}, (9, 3, 32, 16), id="bireal"),
]
ODD = [
    pytest.param("reactnet_a", {"width": 0.75, "small_images": True}, (5, 3, 48, 80), id="odd"),
    pytest.param("birealnet_18", {"width": 0.1, "small_images": True}, (3, 3, 8, 24), id="few"),
]
"""Maps of odd sizes, and channels that fill no word."""
ISAS = [isa for isa in build.ISAS if build.compilers()]
STEP = 1 / 64


def random_network(name, seed=0, **options):
    """A network with random numbers in all its vectors, in eval mode."""
    torch.manual_seed(seed)
    model = build_model(name, num_classes=70, **options)
    for key, parameter in model.named_parameters():
        if "shift" in key:
            parameter.data.normal_(0, 0.2)
        if "slope" in key:
            parameter.data.uniform_(-0.5, 0.8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(-1.5, 1.5)
            module.bias.data.normal_(0, 0.3)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.2, 2)
    return model.eval()


def dyadic_network(name, **options):
    """A network all of whose sums are exact in float32: thousands of values meet a sign at 0.

    Scales are powers of two, vectors multiples of 1/64 and slopes -1, 0 or 1.
    """
    torch.manual_seed(1)
    model = build_model(name, num_classes=12, **options)

    def steps(parameter, most):
        parameter.data = torch.randint(-most, most + 1, parameter.shape) * STEP

    for key, parameter in model.named_parameters():
        if "shift" in key:
            steps(parameter, 8)
        if "slope" in key:
            parameter.data = torch.randint(-1, 2, parameter.shape).float()
    for module in model.modules():
        if isinstance(module, BinaryUnit):
            module.weight.data = module.weight.data.sign()
        elif isinstance(module, nn.Conv2d):
            module.weight.data = torch.randint(-2, 3, module.weight.shape).float()
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 2.0**-10
            module.running_var.fill_(1 - module.eps)
            module.weight.data = 0.5 ** torch.randint(3, 6, module.weight.shape)
            steps(module.bias, 16)
            module.running_mean.copy_(torch.randint(-4, 5, module.bias.shape))
    for module in model.modules():
        if isinstance(module, DownsamplingUnit):  # no more digits than the stream has
            _, convolution, norm = module.downsample
            chosen = torch.randint(convolution.in_channels, (convolution.out_channels,))
            matrix = nn.functional.one_hot(chosen, convolution.in_channels).float()
            convolution.weight.data = matrix[..., None, None]
            norm.weight.data.fill_(1)
    choice = torch.randint(model.fc.in_features, (12,))  # a logit of one feature has no rounding
    model.fc.weight.data = nn.functional.one_hot(choice, model.fc.in_features).float()
    steps(model.fc.bias, 16)
    return model.eval()


@contextmanager
def isa(name, monkeypatch):
    """Engines that are made meanwhile run these instructions."""
    if list(build.ISAS).index(name) > list(build.ISAS).index(loader.best_isa()):
        pytest.skip(f"this CPU does not run {name}")
    monkeypatch.setenv(loader.VARIABLE, name)
    yield
    monkeypatch.delenv(loader.VARIABLE)


@pytest.fixture(params=[*ISAS, "numpy"])
def make(request, monkeypatch):
    """Makes an engine, in each build of the C library and in numpy."""
    if request.param != "numpy":
        with isa(request.param, monkeypatch):
            yield Engine
        return

    def without_library(packed):
        raise RuntimeError("none wanted")

    monkeypatch.setattr(engine_module, "NativeNetwork", without_library)
    yield Engine


def streams(model, images):
    """The input and the output of each unit, as torch computes them."""
    seen = []

    def remember(module, inputs, output):
        seen.append((inputs[0], output if isinstance(output, torch.Tensor) else output[0]))

    hooked = copy.deepcopy(model)
    for module in hooked.blocks.modules():
        if isinstance(module, BinaryUnit):
            module.register_forward_hook(remember)
    with torch.no_grad():
        hooked(images)
    return seen


@pytest.mark.parametrize(("name", "options", "shape"), NETWORKS)
def test_exact_sums_give_torch_s_logits(make, name, options, shape):
    model = dyadic_network(name, **options)
    images = torch.randint(-4, 5, (20, *shape[1:])).float()
    with torch.no_grad():
        truth = model.double()(images.double())
    ties = sum(int((x == 0).sum()) for x, _ in streams(model.float(), images))
    assert ties > 1000  # at a sign, where a rounding would show
    engine = make(fold(model.float()))
    assert (engine(images).double() - truth).abs().max() < 1e-6


@pytest.mark.parametrize(("name", "options", "shape"), NETWORKS + ODD)
def test_a_unit_s_output_is_torch_s_on_the_same_input(name, options, shape):
    """Signs are, of all values that are not within a rounding of their threshold."""
    model = random_network(name, **options)
    packed = fold(model)
    for unit, (x, z) in zip(packed.units, streams(model, torch.randn(shape)), strict=True):
        own = torch.from_numpy(plain.run_unit(unit, plain.weight_signs(unit), x.numpy()))
        assert (own - z).abs().max() <= 1e-5 * z.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize(("name", "options", "shape"), NETWORKS + ODD)
def test_c_is_numpy(make, name, options, shape, threads):
    """On random numbers, which no sign of these seeds is near enough to turn."""
    packed = fold(random_network(name, **options))
    images = np.random.default_rng(3).standard_normal(shape, np.float32)
    engine = make(packed, threads)
    truth = plain.PlainNetwork(packed).logits(images, None, 1)
    for count in (1, len(images)):
        np.testing.assert_allclose(engine(images[:count]), truth[:count], rtol=1e-4, atol=1e-4)


def test_streams_that_flow_are_the_same(monkeypatch):
    """Large images go through the first units a few rows at a time, where one thread runs."""
    packed = fold(random_network("reactnet_a", width=0.5))
    images = np.random.default_rng(4).standard_normal((3, 3, 256, 224), np.float32)
    alone, together = Engine(packed, 1), Engine(packed, 4)
    np.testing.assert_array_equal(alone(images), together(images))
    truth = plain.PlainNetwork(packed).logits(images, None, 1)
    np.testing.assert_allclose(alone(images), truth, rtol=1e-4, atol=1e-4)


def test_calls_at_once_do_not_meet():
    packed = fold(random_network("reactnet_a", width=0.25, small_images=True))
    engine = Engine(packed, 2)
    images = np.random.default_rng(0).standard_normal((6, 3, 32, 32), np.float32)
    truth, found = engine(images), {}

    def call(index):
        found[index] = [engine(images[index : index + 1]) for _ in range(20)]

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, answers in found.items():
        for answer in answers:
            np.testing.assert_array_equal(answer, truth[index : index + 1])


def test_bytes_are_normalised_as_torchvision_does(make):
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    model = random_network("reactnet_a", width=0.25, small_images=True)
    engine = make(fold(model, transform={"mean": mean, "std": std}))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    own = pixels.float().div(255).sub(torch.tensor(mean).view(3, 1, 1))
    own = own.div(torch.tensor(std).view(3, 1, 1))
    assert torch.equal(engine(pixels), engine(own))


def test_predict_names_classes():
    names = [f"class {i}" for i in range(70)]
    model = random_network("reactnet_a", width=0.25, small_images=True)
    engine = Engine(fold(model, classes=names))
    images = torch.randn(3, 3, 32, 32)
    prediction = engine.predict(images)
    with torch.no_grad():
        truth = model(images).softmax(1)
    assert prediction.indices.tolist() == truth.argmax(1).tolist()
    assert prediction.classes == [names[i] for i in prediction.indices]
    np.testing.assert_allclose(prediction.probabilities, truth.numpy(), atol=1e-5)


def test_half_ends_are_near_and_smaller(tmp_path):
    model = random_network("reactnet_a", width=0.25, small_images=True)
    images = torch.randn(4, 3, 32, 32)
    whole = deploy.export(model, tmp_path / "whole.tbnn")
    half = deploy.export(model, tmp_path / "half.tbnn", half_ends=True)
    assert half < whole - 70 * 256 * 1.9
    packed = file.read(tmp_path / "half.tbnn")
    assert packed.head_weight.dtype == packed.stem_weight.dtype == np.float16
    truth = model.fc.weight.detach().half().float().numpy()
    np.testing.assert_array_equal(packed.head_weight, truth)
    assert deploy.load(tmp_path / "half.tbnn")(images).isfinite().all()


def test_a_full_network_is_a_fourteenth(tmp_path):
    model = build_model("reactnet_a").eval()
    floats = 4 * sum(t.numel() for t in model.state_dict().values())
    assert floats / deploy.export(model, tmp_path / "a.tbnn") >= 14
    assert floats / deploy.export(model, tmp_path / "b.tbnn", half_ends=True) >= 19


def test_a_file_is_the_network(tmp_path):
    model = random_network("reactnet_18", width=0.25)
    deploy.export(model, tmp_path / "net.tbnn", classes=[str(i) for i in range(70)])
    engine = deploy.load(tmp_path / "net.tbnn")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(engine(images), Engine(fold(model))(images))
    assert engine.classes == tuple(str(i) for i in range(70))


def break_training(model):
    model.blocks[0].train()


def break_hook(model):
    model.blocks[0][0].register_forward_hook(lambda *_: None)


def break_weights(model):
    model.blocks[0][0].binary_weight = False


def break_block(model):
    model.blocks[0][0] = nn.Dropout().eval()


def break_norm(model):
    model.blocks[0][0].bn = nn.GroupNorm(2, 8).eval()


def break_numbers(model):
    model.blocks[0][1].slope.data[3] = float("inf")


def break_parametrisation(model):
    parametrize.register_parametrization(model.blocks[0][0], "weight", nn.Identity().eval())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (break_training, r"blocks\.0 is in training mode: call model\.eval"),
        (break_hook, r"blocks\.0\.0 has hooks"),
        (break_weights, r"blocks\.0\.0 has real weights, as step 1"),
        (break_block, r"blocks\.0\.0 is a Dropout"),
        (break_norm, r"blocks\.0\.0\.bn is a GroupNorm"),
        (break_numbers, r"blocks\.0\.1\.slope holds numbers that are not finite"),
        (break_parametrisation, r"blocks\.0\.0 is a Parametrized|blocks\.0\.0 is parametrised"),
    ],
)
def test_what_cannot_be_packed_is_named(spoil, message):
    model = random_network("reactnet_a", width=0.25, small_images=True)
    spoil(model)
    with pytest.raises(FoldError, match=message):
        fold(model)


def test_a_network_is_packed_or_its_refusal_names_those_that_are():
    refusals = {}
    for name in MODELS:
        model = build_model(name, width=0.25, num_classes=2, small_images=True).eval()
        try:
            fold(model)
        except FoldError as error:
            refusals[name] = str(error)
    assert refusals
    for refusal in refusals.values():
        assert {name for name in MODELS if name in refusal} == MODELS.keys() - refusals.keys()


def test_another_module_is_named():
    with pytest.raises(FoldError, match="cannot pack a Linear: give the network of build_model"):
        fold(nn.Linear(3, 3).eval())


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ({"mean": (0.5,) * 3, "std": [0.5] * 3}, "the transform's mean must be a list of 3 num"),
        ({"mean": [0.5] * 3, "std": [0.5] * 2 + [0]}, "the transform's std must be 1e-06 or more"),
        ({"mean": [0.5] * 3, "std": [1e-40] * 3}, "the transform's std must be 1e-06 or more"),
        ({"size": {1, 2}}, "the transform must be a dict that JSON can hold"),
        ({"size": 1, 2: 3}, "the transform must be a dict that JSON can hold"),
        ("imagenet", "the transform must be a dict that JSON can hold"),
    ],
)
def test_a_transform_that_no_file_can_hold_is_refused(transform, message):
    model = build_model("birealnet_18", width=0.125, num_classes=2, small_images=True).eval()
    with pytest.raises(PackedError, match=message):
        fold(model, transform=transform)


def test_the_least_std_gives_finite_numbers(make):
    model = random_network("birealnet_18", width=0.125, small_images=True)
    transform = {"mean": [-999_999.0] * 3, "std": [1e-6] * 3}
    engine = make(fold(model, transform=transform))
    assert np.isfinite(engine(np.full((1, 3, 16, 16), 255, np.uint8))).all()


BAD_IMAGES = [
    (np.zeros((1, 1, 32, 32), np.float32), ValueError, r"shape \(N, 3, H, W\)"),
    (np.zeros((3, 32, 32), np.float32), ValueError, r"shape \(N, 3, H, W\)"),
    (np.zeros((1, 3, 32, 30), np.float32), ValueError, "multiples of 16, not 32 x 30"),
    (np.zeros((1, 3, 0, 16), np.float32), ValueError, "multiples of 16"),
    (np.zeros((1, 3, 32, 32), np.int32), TypeError, "uint8 or floats, not (torch.)?int32"),
    (np.zeros((1, 3, 32, 32), np.uint8), TypeError, "no mean and std"),
    (np.full((1, 3, 32, 32), np.nan, np.float32), ValueError, "image 0 .* not finite"),
    (np.full((1, 3, 32, 32), 1e300), ValueError, "not finite"),
]
"""For a network of 3 channels and sizes that are multiples of 16, whose file has no mean."""


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [*BAD_IMAGES, (np.zeros((1, 3, 32768, 16), np.float32), ValueError, "size")],
)
def test_bad_images_are_refused(images, error, message):
    engine = Engine(fold(random_network("reactnet_a", width=0.25, small_images=True)))
    with pytest.raises(error, match=message):
        engine(images)


@pytest.mark.parametrize(
    "convert",
    [
        lambda images: images.bfloat16(),
        lambda images: images.double(),
        lambda images: images.numpy().astype(">f4"),
        lambda images: images.numpy().astype(np.float16)[::-1][::-1],
    ],
)
def test_all_floats_are_taken(convert):
    engine = Engine(fold(random_network("reactnet_a", width=0.25, small_images=True)))
    images = torch.randint(-4, 5, (2, 3, 32, 32)).float()
    assert np.array_equal(engine(convert(images)), engine(images))


def test_no_images_give_no_logits():
    engine = Engine(fold(random_network("reactnet_a", width=0.25, small_images=True)))
    assert engine(np.zeros((0, 3, 32, 32), np.float32)).shape == (0, 70)


def test_memory_is_what_the_network_holds():
    packed = fold(build_model("reactnet_a").eval())
    engine = Engine(packed, 1)
    assert engine.memory()["scratch"] == 0
    engine(np.zeros((1, 3, 224, 224), np.float32))
    memory = engine.memory()
    assert memory["weights"] < 12e6
    assert 0 < memory["scratch"] < 6e6


def test_scratch_of_a_huge_image_is_not_kept(monkeypatch):
    engine = Engine(fold(random_network("reactnet_a", width=0.25, small_images=True)), 1)
    small, large = (np.zeros((1, 3, side, side), np.float32) for side in (32, 128))
    engine(small)
    kept = engine.memory()["scratch"]
    monkeypatch.setattr(native, "MOST_KEPT", 2 * kept)
    engine(large)
    assert engine.memory()["scratch"] == 0
    engine(small)
    assert engine.memory()["scratch"] == kept


WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "triton"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import numpy as np
import tritonbnn, tritonbnn.deploy
engine = tritonbnn.deploy.load(sys.argv[1], threads=2)
images = np.load(sys.argv[2])
np.save(sys.argv[3], engine(images))
assert "torch" not in sys.modules
print(engine.name, end="")
"""


@pytest.mark.parametrize("compiler", [True, False])
def test_an_engine_needs_no_torch(tmp_path, compiler):
    model = random_network("reactnet_a", width=0.25, small_images=True)
    deploy.export(model, tmp_path / "net.tbnn")
    images = torch.randn(5, 3, 32, 32)
    np.save(tmp_path / "images.npy", images.numpy())
    environ = {"TRITONBNN_CACHE": str(tmp_path / "none"), "PATH": "", "CC": ""}
    arguments = [str(tmp_path / name) for name in ("net.tbnn", "images.npy", "logits.npy")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments],
        env={**os.environ, **({} if compiler else environ)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (f"C, {loader.best_isa()}" if compiler else "numpy")
    told = [line for line in done.stderr.splitlines() if line]
    assert len(told) == (0 if compiler else 1)
    truth = Engine(fold(model))(images).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), truth, atol=1e-4)


def test_c_refuses_counts_that_do_not_fit():
    network = NativeNetwork(fold(random_network("reactnet_a", width=0.25, small_images=True)))
    images = np.zeros((1, 3, 32, 32), np.float32)
    network.logits(images, None, 1)
    for change in ("weight_count", "channels", "out_channels", "kernel_size", "shortcut", "stride"):
        before = getattr(network._units[3], change)
        for value in (before + 1, -1, 1 << 40, (1 << 63) - 1):
            setattr(network._units[3], change, value)
            with pytest.raises(RuntimeError, match="refuses"):
                network.logits(images, None, 1)
        setattr(network._units[3], change, before)
    network.logits(images, None, 1)
