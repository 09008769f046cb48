"""A packed network as an ONNX graph, run by ONNX Runtime."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.commands import EVALUATE, PREDICT, TRAIN, run, write_tiny
from tests.test_bad_input import assert_one_line
from tests.test_deploy import NETWORKS, dyadic_network, random_network
from tests.test_stop import ENVIRON
from tritonbnn import deploy
from tritonbnn.deploy.fold import fold
from tritonbnn.deploy.packed import Packed

onnx = pytest.importorskip("onnx", reason="needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")

from tritonbnn.deploy import onnx as to_onnx  # noqa: E402 - it imports onnx

EXPORT = "tritonbnn.export"
LEVELS = onnxruntime.GraphOptimizationLevel


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, its packed file and its ONNX file."""
    folder = tmp_path_factory.mktemp("onnx")
    write_tiny(folder)
    (folder / "cut.tbnn").write_bytes(b"\x99" * 50)
    for module, *argv in (
        (TRAIN, "tiny.toml", "--out", "run"),
        (EXPORT, "run", "--out", "net.tbnn"),
        (EXPORT, "run", "--out", "net.onnx"),
    ):
        result = run(module, *argv, cwd=folder)
        assert result.code == 0, result.output
    return folder


def session(model: bytes | str, **options: object) -> Any:
    """A network that ONNX Runtime runs on the CPU, with options of its own."""
    given = onnxruntime.SessionOptions()
    for name, value in options.items():
        setattr(given, name, value)
    return onnxruntime.InferenceSession(model, given, providers=["CPUExecutionProvider"])


def logits(packed: Packed, images: torch.Tensor, **options: object) -> torch.Tensor:
    ran = session(to_onnx.model(packed).SerializeToString(), **options)
    [found] = ran.run(None, {"images": images.numpy()})
    return torch.from_numpy(found)


@pytest.mark.parametrize("level", [LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_ALL])
@pytest.mark.parametrize(("name", "options", "shape"), NETWORKS)
def test_exact_sums_give_torch_s_logits(name, options, shape, level):
    model = dyadic_network(name, **options)
    images = torch.randint(-4, 5, (7, *shape[1:])).float()
    with torch.no_grad():
        truth = model.double()(images.double())
    found = logits(fold(model.float()), images, graph_optimization_level=level)
    assert (found.double() - truth).abs().max() < 1e-6


def test_sums_of_signs_stay_whole_whatever_a_runtime_folds(tmp_path):
    """Scales are folded into no weight, so each still holds +1 and -1 alone."""
    packed = fold(random_network("birealnet_18", width=0.25, small_images=True))
    path = tmp_path / "optimised.onnx"
    session(to_onnx.model(packed).SerializeToString(), optimized_model_filepath=str(path))
    model = onnx.load(path)
    held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    nodes = {output: node for node in model.graph.node for output in node.output}
    rounds = [node for node in model.graph.node if node.op_type == "Round"]
    assert len(rounds) == len(packed.units)
    for node in rounds:
        convolution = nodes[node.input[0]]
        while "Conv" not in convolution.op_type:  # a change of layout, as ONNX Runtime likes it
            convolution = nodes[convolution.input[0]]
        weight = held[convolution.input[1]]
        assert set(np.unique(weight)) <= {-1, 0, 1}  # 0 in channels that fill a block up
        assert len(convolution.input) == 2  # and no constant is added before the rounding


def test_half_ends_are_computed_in_float32():
    model = random_network("birealnet_18", width=0.125, small_images=True)
    images = torch.randn(3, 3, 32, 32)
    packed = fold(model, half_ends=True)
    expected = deploy.Engine(packed)(images)
    assert (logits(packed, images).argmax(1) == expected.argmax(1)).all()
    assert len(to_onnx.model(packed).SerializeToString()) < len(
        to_onnx.model(fold(model)).SerializeToString()
    )


def test_a_module_is_written(tmp_path):
    model = dyadic_network("reactnet_a", width=0.25, small_images=True)
    names = [f"class {i}" for i in range(12)]
    size = deploy.export(model, tmp_path / "net.onnx", classes=names, format="onnx")
    assert size == (tmp_path / "net.onnx").stat().st_size
    ran = session(str(tmp_path / "net.onnx"))
    facts = ran.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == names
    images = torch.randint(-4, 5, (2, 3, 32, 32)).float()
    [found] = ran.run(None, {"images": images.numpy()})
    assert np.abs(found - model(images).detach().numpy()).max() < 1e-6
    with pytest.raises(ValueError, match="'tflite': choose from packed, onnx"):
        deploy.export(model, tmp_path / "net.tflite", format="tflite")


def test_a_run_s_file_predicts_as_the_run(place):
    """The graph of a trained run, on the images that evaluate sees."""
    said = run(EVALUATE, "run", "--engine", "torch", cwd=place)
    ran = session(str(place / "net.onnx"))
    facts = ran.get_modelmeta().custom_metadata_map
    transform = json.loads(facts["transform"])
    assert set(transform) >= {"mean", "std"}
    assert said.code == 0
    engine = deploy.load(place / "net.tbnn")
    images = np.random.default_rng(0).normal(size=(16, 3, 32, 32)).astype(np.float32)
    [found] = ran.run(None, {"images": images})
    assert (found.argmax(1) == engine(images).argmax(1)).all()


def test_a_packed_file_becomes_a_graph(place, tmp_path):
    result = run(EXPORT, place / "net.tbnn", "--out", tmp_path / "again.onnx", cwd=tmp_path)
    assert result.code == 0, result.output
    assert (tmp_path / "again.onnx").read_bytes() == (place / "net.onnx").read_bytes()


def test_a_suffix_in_capitals_is_one(place, tmp_path):
    result = run(EXPORT, place / "run", "--out", tmp_path / "NET.ONNX", cwd=tmp_path)
    assert result.code == 0, result.output
    assert (tmp_path / "NET.ONNX").read_bytes() == (place / "net.onnx").read_bytes()


def test_a_format_may_be_named_in_place_of_the_suffix(place, tmp_path):
    result = run(EXPORT, place / "run", "--out", "net", "--format", "onnx", cwd=tmp_path)
    assert result.code == 0, result.output
    assert (tmp_path / "net.onnx").read_bytes() == (place / "net.onnx").read_bytes()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("net.tbnn", "--out", "again.tbnn"), "is a packed file already"),
        (("net.tbnn", "--out", "x.onnx", "--half-ends"), "--half-ends"),
        (("run", "--out", "x.onnx", "--format", "tflite"), "invalid choice: 'tflite'"),
        (("net.onnx", "--out", "x.tbnn"), "net.onnx"),
        (("nowhere", "--out", "x.onnx"), "nowhere"),
        (("run", "--out", "x.onnx", "--format", "packed"), "name two formats"),
        (("run", "--out", "x.tbnn", "--format", "onnx"), "name two formats"),
        (("run/step1/best.safetensors", "--out", "x.onnx"), "real weights"),
        (("cut.tbnn", "--out", "x.onnx"), "cut.tbnn"),
        (("run", "--out", "."), "is a folder: name a file in it"),
        (
            ("run", "--out", "run/config.toml"),
            "config.toml exists and ends in none of .tbnn, .onnx",
        ),
    ],
)
def test_mistakes_are_one_line(place, argv, words):
    assert_one_line(run(EXPORT, *argv, cwd=place), words)
    assert not (place / "x.onnx").exists()


def test_a_graph_is_no_run(place):
    for command in (EVALUATE, PREDICT):
        argv = ("net.onnx", "images/val") if command == PREDICT else ("net.onnx",)
        words = "net.onnx is an ONNX graph, which is for other programs"
        assert_one_line(run(command, *argv, cwd=place), words)


@pytest.mark.slow
def test_without_the_package_there_is_one_line(place):
    """The packed format needs it no more than before."""
    code = f"""
import runpy, sys
sys.modules["onnx"] = None
sys.argv = ["export", "run", "--out", sys.argv[1]]
runpy.run_module({EXPORT!r}, run_name="__main__")
"""
    for out, code_of_exit in (("y.onnx", 2), ("y.tbnn", 0)):
        found = subprocess.run(
            [sys.executable, "-c", code, out],
            cwd=place,
            env=ENVIRON,
            capture_output=True,
            text=True,
        )
        assert found.returncode == code_of_exit, found.stderr
        if code_of_exit:
            [line] = found.stderr.splitlines()
            assert line.startswith("error: format onnx needs the package onnx: pip install onnx")
