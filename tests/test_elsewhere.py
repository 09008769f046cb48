"""Weights that other trainers saved: loaded where no code need run, else one line says how."""

import argparse
import collections
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet34

from benchmarks.baseline import ObviousReActNetA
from tests.commands import EVALUATE, PREDICT, TRAIN, run, write_tiny, write_tree
from tests.test_bad_input import assert_one_line
from tritonbnn.methods.teacher import load_teacher
from tritonbnn.models import MODELS, build_model, load_adambnn, network_of_weights
from tritonbnn.models.foreign import read_tensors
from tritonbnn.train.checkpoint import read

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


class Trainer:
    """What somebody else's checkpoint may hold an object of."""

    def __init__(self):
        self.lr = 0.1


class Options(dict):
    """A configuration as some libraries have it."""


class Harmful:
    """Unpickled, it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def optimizer(model):
    return torch.optim.Adam(model.parameters())


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def wrapped(state):
    """What trainers put around a state dict, by a short name."""
    model = network()
    adam = optimizer(model)
    schedule = torch.optim.lr_scheduler.StepLR(adam, 3)
    paths = {"data": Path("data"), "names": [Path("a")]}
    return {
        "alone": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "model": {"model": state, "optimizer": adam.state_dict()},
        "model_state_dict": {"model_state_dict": state},
        "nested": {"model": {"state_dict": state}},
        "module": prefixed(state, "module."),
        "compiled": {"model": prefixed(state, "_orig_mod.")},
        "both": {"model": prefixed(state, "module._orig_mod.")},
        "other order": prefixed(state, "_orig_mod.module."),
        "lightning": {"state_dict": prefixed(state, "model."), "loops": {}},
        "compiled lightning": {"state_dict": prefixed(state, "model._orig_mod.")},
        "numpy scalar": {"model": state, "best": np.float64(70.5), "epoch": np.int64(3)},
        "numpy array": {"model": state, "mean": np.arange(3.0), "names": np.array(["a"])},
        "arguments": {"model": state, "args": argparse.Namespace(lr=0.1, where=Path("x"))},
        "paths": {"model": state, "config": paths},
        "default dict": {"model": state, "seen": collections.defaultdict(list, {1: [2]})},
        "schedule": {"net": state, "schedule": schedule},
        "object": {"model": state, "trainer": Trainer()},
        "parameters": {name: nn.Parameter(t, t.is_floating_point()) for name, t in state.items()}
        if all(t.is_floating_point() for t in state.values())
        else state,
        "a function": {"model": state, "print": print},
    }


KINDS = list(wrapped({}))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_is_found_whatever_is_around_it(tmp_path, kind, old):
    state = network().state_dict()
    path = tmp_path / "x.pth"
    torch.save(wrapped(state)[kind], path, _use_new_zipfile_serialization=not old)
    found = read_tensors(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_part_alone_may_be_compiled(tmp_path):
    model = network()
    model[0] = torch.compile(model[0])
    assert "0._orig_mod.weight" in model.state_dict()
    torch.save(model.state_dict(), tmp_path / "x.pth")
    assert read_tensors(tmp_path / "x.pth").keys() == network().state_dict().keys()


def unloadable(state):
    """Content, what its message names, and a line that converts it."""
    return {
        "whole network": (network(), "torch.nn.modules.container.Sequential"),
        "network inside": (
            {"model": network()},
            "torch.nn.modules.container.Sequential as 'model'",
        ),
        "options": ({"state_dict": state, "cfg": Options(a=1)}, "Options as 'cfg'"),
        "arrays": ({"model": {k: t.numpy() for k, t in state.items()}}, "numpy"),
    }


@pytest.mark.parametrize("kind", list(unloadable({})))
def test_what_needs_code_is_named_with_a_line_that_converts_it(tmp_path, kind):
    state = network().state_dict()
    content, words = unloadable(state)[kind]
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="cannot be loaded without running code") as caught:
        read_tensors(tmp_path / "x.pth")
    said = str(caught.value)
    assert words in said
    assert "\n" not in said
    _, command, code = shlex.split(said.partition("convert it: ")[2])[:3]
    assert command == "-c"
    environ = {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, check=True)
    found = read_tensors(tmp_path / "weights.pth")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("old", [False, True])
def test_no_code_is_run_wherever_it_stands(tmp_path, old):
    witness, state = tmp_path / "witness", network().state_dict()
    for content in (
        {"model": state, "x": Harmful(witness)},
        {"model": state | {"0.weight": Harmful(witness)}},
        {"model": Harmful(witness)},
        Harmful(witness),
    ):
        torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not old)
        with suppress(ValueError):
            read_tensors(tmp_path / "x.pth")
    assert not witness.exists()


# As a teacher, for AdamBNN's networks, and for our own


@pytest.mark.parametrize("kind", ["model", "both", "arguments", "numpy scalar", "lightning"])
def test_a_teacher_from_elsewhere(tmp_path, kind):
    state = resnet34(num_classes=5).state_dict()
    torch.save(wrapped(state)[kind], tmp_path / "x.pth")
    teacher = load_teacher(str(tmp_path / "x.pth"), num_classes=5, device="cpu")
    assert all(torch.equal(t, state[name]) for name, t in teacher.state_dict().items())


@pytest.mark.parametrize("kind", ["model", "both", "arguments", "numpy scalar", "safetensors"])
def test_adambnn_from_elsewhere(tmp_path, kind):
    torch.manual_seed(0)
    options = {"num_classes": 5, "width": 0.25}
    state = ObviousReActNetA(**options).state_dict()
    if kind == "safetensors":
        save_file(state, tmp_path / "x.pth")
    else:
        torch.save(wrapped(state)[kind], tmp_path / "x.pth")
    model, same = build_model("reactnet_a", **options), build_model("reactnet_a", **options)
    load_adambnn(model, tmp_path / "x.pth")
    load_adambnn(same, state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])


def test_a_model_without_memory_is_refused():
    options = {"num_classes": 5, "width": 0.25}
    with torch.device("meta"):
        model = build_model("reactnet_a", **options)
    with pytest.raises(ValueError, match=r"meta device.*to_empty"):
        load_adambnn(model, ObviousReActNetA(**options).state_dict())


@pytest.mark.parametrize("width", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("small_images", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_network_of_weights_is_seen_by_their_shapes(name, small_images, width):
    if name == "binarynet" and not small_images:
        pytest.skip("it is for small images alone")
    options = {"num_classes": 7, "in_channels": 1, "small_images": small_images}
    with torch.device("meta"):
        state = build_model(name, width=width, **options).state_dict()
        found = network_of_weights(state, small_images=small_images)
        again = build_model(**found).state_dict()
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}
    assert {**found, "width": width} == {"name": name, "width": width, **options}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny run, and its weights as somebody would save them."""
    folder = tmp_path_factory.mktemp("elsewhere")
    write_tiny(folder)
    result = run(TRAIN, "tiny.toml", "--out", "run", cwd=folder)
    assert result.code == 0, result.output
    state = read(folder / "run" / "step2" / "best.safetensors").group("model")
    torch.save(state, folder / "plain.pth")
    torch.save(
        {"model": prefixed(state, "module._orig_mod."), "args": argparse.Namespace(lr=1)},
        folder / "more.pth",
    )
    save_file(state, folder / "plain.safetensors")
    return folder


FILES = ["plain.pth", "more.pth", "plain.safetensors"]


def last_line(result):
    assert result.code == 0, result.output
    return result.output.splitlines()[-1]


@pytest.mark.parametrize("file", FILES)
def test_our_own_weights_score_and_predict_as_their_run(place, file):
    told = ("--step", 2, "--recipe", "tiny.toml")
    score = last_line(run(EVALUATE, "run", cwd=place)).partition(": ")[2]
    assert last_line(run(EVALUATE, file, *told, cwd=place)).partition(": ")[2] == score
    image = "images/val/a/0.png"
    guesses = last_line(run(PREDICT, "run", image, cwd=place))
    assert last_line(run(PREDICT, file, image, *told, cwd=place)) == guesses


@pytest.mark.parametrize("file", FILES)
def test_our_own_weights_start_another_run(place, file):
    argv = ("tiny.toml", "--step", 2, "--epochs", 1, "--fresh")
    for start, out in (("run", "a"), (file, "b")):
        result = run(TRAIN, *argv, "--init-from", start, "--out", out, cwd=place)
        assert result.code == 0, result.output
    a, b = (
        read(next(place.glob(f"{out}*")) / "step2" / "last.safetensors").group("model")
        for out in "ab"
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_adambnn_s_weights_predict(place):
    write_tree(place / "three", train=1, val=2, classes="xyz")
    torch.manual_seed(0)
    torch.save(ObviousReActNetA(num_classes=3, width=0.25).state_dict(), place / "adam.pth")
    image = "three/val/x/0.png"
    named = last_line(
        run(PREDICT, "adam.pth", image, "--step", 1, "--data-dir", "three", cwd=place)
    )
    numbered = last_line(run(PREDICT, "adam.pth", image, "--step", 1, cwd=place))
    for number, name in enumerate("xyz"):
        numbered = numbered.replace(f" class {number} ", f" {name} ")
    assert numbered == named


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["plain.pth"], "does not say which step its weights are of: give --step 1"),
        (["run", "--step", "2"], "knows its own: leave it out"),
        (["run", "--recipe", "digits"], "knows its own: leave it out"),
        (["plain.pth", "--step", "2", "--recipe", "digit"], "did you mean digits?"),
        (["other.pth", "--step", "2"], "not the weights of a network of tritonbnn"),
        (["more-of-it.pth", "--step", "2"], "not the weights of a birealnet_18"),
    ],
)
@pytest.mark.parametrize("command", [EVALUATE, PREDICT])
def test_mistakes_are_one_line(place, command, argv, words):
    torch.save(network().state_dict(), place / "other.pth")
    state = torch.load(place / "plain.pth", weights_only=True)
    torch.save(state | {"blocks.0.more": torch.ones(1)}, place / "more-of-it.pth")
    images = ["images/val/a/0.png"] if command == PREDICT else []
    assert_one_line(run(command, argv[0], *images, *argv[1:], cwd=place), words)


def test_classes_that_are_known_need_no_data(place):
    result = run(PREDICT, "run", "images/val/a/0.png", "--data-dir", "images", cwd=place)
    assert_one_line(result, "knows its classes: leave --data-dir out")
