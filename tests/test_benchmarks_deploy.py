"""The packed engine's benchmark: exact rivals, its loop, its tables, and the whole command."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from benchmarks import deploy, deploy_gpu, deploy_layers, deploy_networks, deploy_table
from benchmarks.deploy_layers import MANY, ONE, UNITS
from benchmarks.rivals import parse
from benchmarks.tables import Device
from tests.helpers import KERNEL_DEVICE, in_its_own_process
from tritonbnn import cli
from tritonbnn.deploy import Engine, plain

ODD = [(3, 33, 7), (1, 40, 5)]
WHOLE = [(3, 32, 7), (1, 40, 5), (3, 64, 4)]
"""Channels that OpenVINO multiplies exactly: 33 it does not."""


@pytest.fixture(autouse=True)
def as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("layer", ODD)
def test_a_layer_s_network_is_what_numpy_computes(layer):
    packed = deploy_layers.network(*layer, units=2)
    image = np.random.default_rng(2).standard_normal((1, 1, layer[2], layer[2]), np.float32)
    truth = plain.PlainNetwork(packed).logits(image, None, 1)
    np.testing.assert_allclose(Engine(packed, 1)(image), truth, rtol=1e-4)


@pytest.mark.parametrize("package", deploy_layers.RIVALS)
@pytest.mark.parametrize("layer", WHOLE)
def test_a_rival_s_sums_are_exact_or_it_is_refused(package, layer, monkeypatch):
    if importlib.util.find_spec(package.lower()) is None:
        pytest.skip(f"{package} is not installed: pip install 'tritonbnn[bench]'")
    assert package in deploy_layers.calls(*layer)
    exact = deploy_layers.RIVALS[package]

    def other(x, signs):
        call, sums = exact(x, signs)
        return call, lambda output: sums(output) + torch.eye(layer[2])

    monkeypatch.setitem(deploy_layers.RIVALS, package, other)
    with pytest.raises(RuntimeError, match=f"{package}'s sums are not exact"):
        deploy_layers.calls(*layer)


def test_the_loop_alone_counts_bits():
    """As many as numpy finds in the same numbers."""
    products, different = deploy_layers.count(16)
    words, lanes = 72, 16
    pixels, left = divmod(products, 16 * lanes * words * 32)
    assert left == 0
    weight = np.arange(1, words * lanes + 1, dtype=np.uint32) * np.uint32(2654435761)
    inputs = np.arange(1, pixels + words + 1, dtype=np.uint32) * np.uint32(2246822519)
    truth = 0
    for pixel in range(pixels):
        differing = weight.reshape(words, lanes) ^ inputs[pixel : pixel + words, None]
        truth += int(np.unpackbits(differing.view(np.uint8)).sum())
    assert different == truth


def test_a_unit_s_speed_is_that_of_many_less_one():
    seconds = {ONE: 0.5, MANY: 0.5 + UNITS * 2.0, "float32": 4.0}
    speeds = deploy_layers.gops(3, 10, 5, seconds)
    assert speeds == {"packed": 2 * 9 * 100 * 25 / 2e9, "float32": 2 * 9 * 100 * 25 / 4e9}


def test_tables_have_the_file_s_figures(tmp_path):
    race = {"batch": 4, "threads": 1, "seconds": {"packed": [0.04, 0.02, 0.06], "other": [0.4]}}
    gops = {"3x3 8@4": {"packed": 500.0, "NumKong": 250.0, "float32": 10.0}}
    held = {"packed": {"file": 2_000_000}, "float twin": {"weights": 9_500_000}}
    result = {"race": [race], "layers": {"peak_gops": 1000.0, "gops": gops}, "memory": held}
    folder = tmp_path / "cpu-a"
    folder.mkdir()
    (folder / "deploy.json").write_text(json.dumps(result))
    (folder / "deploy.svg").touch()
    lines = deploy_table.measured([Device(folder)], tmp_path).splitlines()
    assert "![milliseconds an image, one thread](cpu-a/deploy.svg)" in lines
    assert "| packed | 10 ± 50% |" in lines
    assert "| other | 100 ± 0%, 10.0 x |" in lines
    assert "| 3x3 8@4 | 500 | 50% | - | 250 | 10 |" in lines
    assert "| the file | 2.0 | - |" in lines
    assert "| weights, as they are run | - | 9.5 |" in lines
    (folder / "deploy.json").write_text(json.dumps({**result, "race": 3}))
    with pytest.raises(cli.UserError, match=r"deploy\.json is not as expected"):
        deploy_table.measured([Device(folder)], tmp_path)


def test_unknown_rivals_and_missing_packages_are_named(monkeypatch):
    with pytest.raises(cli.UserError, match="--rivals tflite: choose from packed; "):
        deploy.main(["--rivals", "tflite"])
    monkeypatch.setattr(deploy_networks, "NEEDS", {"OpenVINO": ("no_such_package",)})
    with pytest.raises(cli.UserError, match="OpenVINO int8: pip install no_such_package"):
        deploy.main(["--rivals", "float twin, OpenVINO int8"])
    assert not any("OpenVINO" in name for name in deploy_networks.makers(None))


@pytest.mark.bench
def test_the_command_measures_all_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(deploy, "LAYERS", WHOLE)
    monkeypatch.setattr(deploy, "TURN_SECONDS", 0.0)
    path = tmp_path / "deploy.json"
    flags = ["--batch", "1", "--threads", "1", "--rounds", "1", "--rivals", "float twin"]
    assert deploy.main([*flags, "--json", str(path)]) == 0
    result, said = json.loads(path.read_text()), capsys.readouterr().out
    assert set(result["race"][0]["seconds"]) == {"packed", "float twin"}
    assert result["memory"]["packed"]["file"] < 9e6 < result["memory"]["float twin"]["weights"]
    for line in ("batch 1, threads 1: ms an image", "3x3 32@7", "the loop alone", "scratch"):
        assert line in said
    assert deploy_table.race_table(result)


@pytest.mark.bench
def test_the_race_on_a_gpu_is_of_one_network(tmp_path, capsys):
    """Interpreted where there is no GPU: packed and torch answer alike, and each has its row."""
    images = torch.randn(1, 3, 32, 32, device=KERNEL_DEVICE)
    answers = []
    with torch.no_grad():
        for make, how in ((deploy_gpu.packed_call, "fp32"), (deploy_gpu.torch_call, parse("ours"))):
            torch.manual_seed(0)
            answers.append(make(how, images, 0.25)())
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)
    path = tmp_path / "deploy_gpu.json"
    words = ["--width", "0.25", "--size", "32", "--batch", "1", "--rounds", "1", "--calls", "1"]
    words += ["--device", KERNEL_DEVICE.type, "--precision", "fp32", "--rivals", "twin"]
    assert deploy_gpu.main([*words, "--json", str(path)]) == 0
    [point] = json.loads(path.read_text())["points"]
    assert list(point["rivals"]) == ["packed, fp32", "twin"]
    assert all(row["median_seconds"] > 0 for row in point["rivals"].values())
    assert "batch 1: ms a call, images a second" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_120"])
def test_a_packed_call_is_a_launch_or_two_a_unit(tmp_path, target):
    """Its bytes are at least those of the stream of a unit."""
    path = tmp_path / "counts.json"
    words = ["--width", "0.25", "--size", "64", "--batch", "3", "--count", target]
    done = in_its_own_process("-m", "benchmarks.deploy_gpu", *words, "--json", str(path))
    assert done.returncode == 0, done.stderr
    [point] = json.loads(path.read_text())["points"]
    packed, ours = point["counts"].values()
    core = target == "sm_80"
    per_unit = {"unit_mma"} if core else {"conv_dot", "unit_forward"}
    assert {name for name, count in packed["kernels"].items() if count == 26} == per_unit
    assert packed["launches"] < 26 * len(per_unit) + 6 < ours["launches"]
    first_unit = 2 * 2 * 8 * 32 * 32 / 1e6  # its stream is read and written, in two bytes a number
    assert first_unit < packed["mb_per_image"] < ours["mb_per_image"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "sm_75"], "sm_75 has no bfloat16, in which calls are counted"),
        (["--count", "sm_10"], "target must be one of sm_75, "),
        (["--device", "cpu", "--rivals", "nobody"], "unknown rival 'nobody'"),
        (["--device", "cpu", "--size", "30"], "multiples of 32, not 30 x 30"),
        (["--device", "cpu", "--width", "0.01"], "width 0.01 leaves no channels"),
    ],
)
def test_a_mistake_on_a_gpu_is_one_line(words, message):
    with pytest.raises(cli.UserError, match=message) as caught:
        deploy_gpu.main(words)
    assert "\n" not in str(caught.value)
