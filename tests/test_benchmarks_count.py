"""Counted launches against hand counts, and a step's host time."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from benchmarks import count, host_time, launches, scheduled
from benchmarks.launches import COMPILED, OURS, TORCH, Counted
from benchmarks.rivals import parse
from tritonbnn import cli
from tritonbnn.kernels.targets import TARGETS
from tritonbnn.nn import BinaryUnit, Chain

SM_90 = TARGETS["sm_90"]


class Small(nn.Module):
    """Two units between a sum over pixels and the image."""

    def __init__(self):
        super().__init__()
        self.units = Chain(BinaryUnit(3, 3, 3), BinaryUnit(3, 6, 1))

    def forward(self, x):
        return self.units(x).sum((2, 3))


def small_step(target="sm_100"):
    """Of a GPU without a one-bit core, by default."""
    return launches.step_launches(Small, 16, 8, bf16=False, target=TARGETS[target])


def test_every_launcher_of_a_step_is_counted_once():
    counted = small_step()
    ours = [each.name for each in counted if each.source == OURS]
    for name in ("conv_dot", "conv_input_grad", "conv_weight_grad", "unit_forward"):
        assert ours.count(name) == 2, name
    signs = next(each for each in counted if each.name == "unit_forward")
    assert signs.tensors["signs"] == 16 * 8 * 8 * 4  # the first packs for the second
    torchs = [each.name for each in counted if each.source == TORCH]
    assert torchs.count("_fused_adam_") == 1


def test_bytes_and_products_are_those_of_the_shapes():
    first, second = (each for each in small_step() if each.name == "conv_dot")
    pixels = 16 * 8 * 8
    expected = {"x": 4 * pixels, "weight": 3 * 9 * 3, "y": 2 * 3 * pixels}
    assert expected.items() <= first.tensors.items()
    assert first.bytes == sum(first.tensors.values())
    assert (first.operations, second.operations) == (2 * 9 * 9 * pixels, 2 * 18 * pixels)
    for gradient in ("conv_input_grad", "conv_weight_grad"):
        found = [each.operations for each in small_step() if each.name == gradient]
        assert sorted(found) == sorted((first.operations, second.operations)), gradient


def test_a_unit_launches_twelve_kernels_and_nothing_of_torchs_but_a_sum():
    """The first packs its signs besides; what is not of a unit is on the other side."""
    counted = small_step()
    names = [each.name for each in counted]
    ours = [each.name for each in counted if each.source == OURS]
    assert len(ours) == 2 * 12 + 1
    assert ours.count("pack") == 1
    assert names.count("sum") == 2 + 1  # of the shift's gradient, and the network's own
    assert len(names) < 2 * 13 + 1 + 16


def test_a_gpu_with_a_one_bit_core_multiplies_there_and_leaves_a_gradient_to_the_library():
    counted = small_step("sm_90")
    names = [each.name for each in counted]
    passes = ("moments_mma", "unit_mma", "activation_sums_mma", "unit_grad_mma")
    for name in (*passes, "convolution_backward"):
        assert names.count(name) == 2, name
        operations = [each.operations for each in counted if each.name == name]
        assert sorted(operations) == [2 * 18 * 1024, 2 * 81 * 1024]
    assert names.count("filter") == 4
    assert not {"conv_dot", "conv_mma", "conv_weight_grad"} & set(names)
    assert not any("a" in each.tensors for each in counted)


def test_an_operator_of_torch_is_a_launch_and_a_view_is_none():
    counted = []
    a = torch.zeros(4, 6)
    with launches._Torch(counted):
        a.t().view(6, 4)
        torch.empty(100)
        a + a[0]
        a @ a.t()
    found = [(each.name, each.bytes, each.operations) for each in counted]
    assert found == [("add", 4 * (24 + 6 + 24), 0), ("mm", 4 * (24 + 24 + 16), 2 * 4 * 6 * 4)]


class Plain(nn.Module):
    """A convolution, and what a compiler fuses into one launch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1, bias=False)

    def forward(self, x):
        return (self.conv(x).relu() * 2 + 1).sum((2, 3))


def test_a_compiled_network_is_counted_as_it_is_scheduled():
    counted = scheduled.compiled_launches(Plain, 2, 8, bf16=False)
    compiled = [each for each in counted if each.source == COMPILED]
    products = {each.name: each for each in compiled if each.operations}
    assert set(products) == {"convolution", "convolution_backward.default"}
    pixels = 2 * 8 * 8
    x, y, weight = (4 * n for n in (3 * pixels, 5 * pixels, 15))
    assert products["convolution"].bytes == x + y + weight
    assert products["convolution"].operations == 2 * 15 * pixels
    # an image has no gradient, so backward has the weight's alone
    backward = products["convolution_backward.default"]
    assert (backward.bytes, backward.operations) == (x + y + 2 * weight, 2 * 15 * pixels)
    fused = [each.bytes for each in compiled if not each.operations and each.bytes > y]
    assert fused.count(y + 4 * 2 * 5) == 1  # relu, product, sum and the reduction: one launch
    assert [each.name for each in counted if each.source == TORCH][-1] == "_fused_adam_"


def test_the_summary_adds_up_and_a_launch_takes_the_longer_of_its_two():
    moving = Counted(OURS, "pack", 880, {"x": 800, "packed": 80})
    multiplying = Counted(COMPILED, "convolution", 8, operations=7_000_000)
    rates = (1.0, 1.0)  # GB/s, TFLOP/s
    assert count.seconds(moving, *rates) == pytest.approx(2e-6 + 1e-6)
    assert count.seconds(multiplying, *rates) == pytest.approx(2e-6 + 1e-5)
    row = count.summary([moving, multiplying, moving], 2, *rates)
    assert (row["launches"], row["small_launches"]) == (3, 3)
    assert row["estimated_ms"] == pytest.approx(0.018)
    assert row["kernels"]["pack"]["bytes"] == 1760
    assert row["mb_per_image_by_tensor"] == {"x": 0.001, "packed": 0.0}


def test_the_command_counts_a_network(tmp_path, capsys):
    path = tmp_path / "count.json"
    flags = ["--model", "reactnet_18", "--batch", "2", "--size", "64", "--target", "sm_100"]
    assert count.main([*flags, "--json", str(path)]) == 0
    row = json.loads(path.read_text())["rows"]["ours+bf16"]
    assert row["kernels"]["conv_input_grad"]["launches"] == 16
    printed = capsys.readouterr().out
    assert f"{row['launches']} launches" in printed
    assert "no bounds on sm_100" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sm_1"], "target must be one of"),
        (["--target", "sm_75"], "sm_75 has no bfloat16"),
        (["--copy-gbs", "0"], "must be above 0"),
        (["--model", "nonsense"], "unknown model 'nonsense'"),
    ],
)
def test_a_user_error_is_one_line(arguments, message):
    with pytest.raises(cli.UserError, match=message):
        count.main(arguments)


@pytest.mark.slow
def test_host_time_is_of_every_launch(tmp_path):
    """In a process of its own, as kernels are interpreted in this one."""
    path = tmp_path / "time.json"
    words = ["--model", "reactnet_18", "--runs", "1", "--json", str(path)]
    command = [sys.executable, "-m", "benchmarks.host_time", *words]
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(command, env=environ, check=True)
    result = json.loads(path.read_text())
    assert result["total_ms"] == pytest.approx(sum(result["parts_ms"].values()), abs=0.01)
    assert min(result["parts_ms"].values()) > 0
    options = {"num_classes": host_time.CLASSES, "width": host_time.WIDTH}
    counted = launches.step_launches(
        lambda: parse("ours").build("reactnet_18", 2, **options),
        *(host_time.BATCH, host_time.SIZE),
        bf16=True,
        target=SM_90,
    )
    assert result["launches"] == sum(each.source == OURS for each in counted)
