"""Kernels compiled ahead of time for GPUs that need not be there, in a process of their own.

An interpreted kernel cannot be compiled, and these tests run beside interpreted ones.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch

from tritonbnn.kernels import aot, config, shipped
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.workload import OPS, Problem

pytestmark = pytest.mark.xdist_group("aot")  # one worker compiles, once

TARGETS = ("sm_80", "sm_90")

OPERAND_KERNELS = {"_unpack_kernel", "_fragments_kernel", "_base_kernel", "_patch_kernel"}
"""What only prepares the operands of a product."""


def run_shipped(*arguments):
    """Run the command with kernels that are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tritonbnn.kernels.shipped", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=900, check=False
    )


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """What the representative layers compile to in bf16, on both targets."""
    path = tmp_path_factory.mktemp("aot") / "rows.json"
    targets = [word for target in TARGETS for word in ("--target", target)]
    done = run_shipped(*targets, "--json", str(path))
    assert path.exists(), done.stderr
    return json.loads(path.read_text())


def test_every_kernel_is_compiled_for_every_target(rows):
    kernels = OPERAND_KERNELS | {
        "_conv_dot_kernel",
        "_conv_input_grad_kernel",
        "_conv_mma_kernel",
        "_conv_popcount_kernel",
        "_conv_weight_grad_kernel",
        "_pack_kernel",
        "_rprelu_backward_kernel",
        "_rprelu_forward_kernel",
        "_sign_backward_kernel",
        "_sign_forward_kernel",
        "_channel_moments_kernel",
        "_unit_activation_backward_kernel",
        "_unit_forward_kernel",
        "_unit_norm_backward_kernel",
    }
    for target in TARGETS:
        assert {row["kernel"] for row in rows if row["target"] == target} == kernels


def test_no_kernel_breaks_a_limit(rows):
    broken = [(row["target"], row["layer"], row["kernel"], row["problems"]) for row in rows]
    assert [row for row in broken if row[-1]] == []
    for row in rows:
        assert 0 < row["registers"] <= 255
        assert row["spill_bytes"] == 0
        assert row["shared_bytes"] <= {"sm_80": 163, "sm_90": 227}[row["target"]] * 1024


@pytest.mark.parametrize(
    ("op", "units"),
    [
        ("conv_packed", {"IMMA", "IGMMA", "BMMA"}),
        ("conv_real", {"HMMA", "HGMMA"}),
        ("conv_input_grad", {"HMMA", "HGMMA"}),
        ("conv_weight_grad", {"HMMA", "HGMMA"}),
    ],
)
def test_products_run_on_tensor_cores(rows, op, units):
    products = [
        row
        for row in rows
        if row["op"] == op and row["kernel"] not in {*OPERAND_KERNELS, "_conv_popcount_kernel"}
    ]
    assert products
    for row in products:
        assert set(row["tensor_core"]), row
        assert set(row["tensor_core"]) <= units, row


def test_the_popcount_idiom_becomes_one_instruction(rows):
    popcounts = [row for row in rows if row["kernel"] == "_conv_popcount_kernel"]
    assert popcounts
    assert all(row["popcounts"] > 0 and not row["tensor_core"] for row in popcounts)


def test_the_one_bit_core_is_fed_by_wide_loads(rows):
    products = [row for row in rows if row["kernel"] == "_conv_mma_kernel"]
    assert len(products) == len(TARGETS) * len(shipped.REPRESENTATIVE)
    for row in products:
        busy, loads = row["tensor_core"], row["wide_loads"]
        assert set(busy) == {"BMMA"}
        assert row["shared_bytes"] == row["shuffles"] == 0  # every lane keeps what it has
        # A chunk of 4 x 4 tiles is 32 instructions, 8 loads of the weight and 4 of the image.
        if "32>32" not in row["layer"]:
            assert loads >= busy["BMMA"] * 12 // 32
            assert row["loop"]["BMMA"] / sum(row["loop"].values()) > 0.07


def run_python(code):
    """What a program prints where kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_unit_on_the_one_bit_core_keeps_its_registers():
    code = """
import json, torch
from tritonbnn import kernels
from tritonbnn.checks import shortcut_input_shape
from tritonbnn.kernels import aot, config, shipped

def run(problem):
    layer, shape = problem.layer, problem.layer.output_shape
    inputs = problem.inputs(shipped.META)
    product = inputs["signs"], inputs["weight_signs"]
    window = {name: getattr(layer, name) for name in ("channels", "stride", "padding")}
    given = shortcut_input_shape(shape, problem.shortcut)
    stream = torch.empty(given, dtype=torch.bfloat16, device="meta")
    stream = stream.contiguous(memory_format=torch.channels_last)
    vectors = [torch.empty(shape[1], device="meta")] * 7
    with config.using(config.default(problem.key, "mma")):
        kernels.conv_moments(*product, **window)
        kernels.conv_unit_forward(
            *product, stream, *vectors, **window, shortcut=problem.shortcut, pack=True
        )

for layer in shipped.REPRESENTATIVE:
    problem = shipped.Problem("conv_packed", layer, torch.bfloat16)
    for launch in aot.record(lambda: run(problem))[3::4]:
        for capability in (80, 90):
            made = aot.compile_launch(launch, capability)
            print(json.dumps([made.kernel, made.spill_bytes, made.wide_loads, made.tensor_core]))
"""
    rows = [json.loads(line) for line in run_python(code).splitlines()]
    names = ["_moments_mma_kernel"] * 2 + ["_unit_mma_kernel"] * 2
    assert [row[0] for row in rows] == names * len(shipped.REPRESENTATIVE)
    for _, spilled, wide_loads, busy in rows:
        assert spilled == 0
        assert wide_loads > 0
        assert set(busy) == {"BMMA"}


def test_the_peak_is_measured_on_registers():
    code = """
import torch
from tritonbnn.kernels import aot, mma_peak
(launch,) = aot.record(lambda: mma_peak.run_steps(2, 4096, torch.device("meta")))
for capability in (80, 90):
    print(aot.compile_launch(launch, capability).tensor_core_share)
"""
    assert all(float(line) > 0.8 for line in run_python(code).splitlines())


def test_the_one_bit_core_reads_registers_in_the_order_of_memory():
    """The 4 words of a load are the weight's fragment; those of the image, two instructions'."""
    code = """
import torch
from tritonbnn.kernels import aot, config, shipped
from tritonbnn.kernels.geometry import Geometry
problem = shipped.Problem("conv_packed", Geometry(4, 7, 7, 1024, 64, 1, 1, 0), torch.float32)
launch = shipped.launches_of(problem, config.default(problem.key, "mma"))[-1]
print(aot.compile_kernel(launch, 80).asm["ptx"])
"""
    ptx = run_python(code)
    quads = [tuple(re.findall(r"%r\d+", line)) for line in re.findall("v4.b32 {.*?}", ptx)]
    products = re.findall(r"and.popc\s+{(.*)}, {(.*)}, {(.*)}, {(.*)};", ptx)
    assert len(products) == 32
    for number, (result, weight, image, sums) in enumerate(products):
        assert result == sums
        assert tuple(weight.split(",")) in quads
        half = slice(2 * (number % 2), 2 * (number % 2) + 2)
        assert tuple(image.split(",")) in [quad[half] for quad in quads]


def test_float32_products_stay_off_the_tensor_core(tmp_path):
    path = tmp_path / "rows.json"
    ops = ("conv_real", "conv_input_grad", "conv_weight_grad")
    named = [word for op in ops for word in ("--op", op)]
    done = run_shipped("--dtype", "fp32", "--layer", "0", *named, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    products = json.loads(path.read_text())
    assert {row["op"] for row in products} == set(ops)
    assert not any(row["tensor_core"] for row in products)


def test_an_unknown_target_is_one_line():
    done = run_shipped("--target", "sm_70")
    assert done.returncode == 2
    assert done.stderr == "error: target must be one of sm_80, sm_90, not 'sm_70'\n"


def test_recording_runs_nothing():
    layer = Geometry(2, 6, 4, 33, 31, 3, 2, 1)
    kernels = Counter()
    for op in OPS:
        launches = shipped.launches_of(Problem(op, layer, torch.bfloat16))
        assert all(value.is_meta for value in launches[-1].arguments.values() if is_tensor(value))
        kernels.update(launch.kernel.__name__ for launch in launches)
    assert kernels["_unpack_kernel"] == 2
    assert len(kernels) == 13


def is_tensor(value):
    return isinstance(value, torch.Tensor)


def test_limits_are_reported():
    made = aot.Resources("_conv_mma_kernel", 255, 8, 230 * 1024, Counter({"FFMA": 1}), Counter())
    tile = config.TileConfig(16, 16, 32, 4, 1)
    row = shipped.Row("sm_90", "conv_packed", "", "bf16", tile, made)
    assert row.problems == [
        "spills 8 bytes",
        "takes 235520 of 232448 bytes of shared memory",
        "has no tensor-core instruction",
        "is not on the one-bit tensor core",
        "has no load of 16 bytes",
    ]
