"""Kernels compiled ahead of time for GPUs that need not be there, in a process of their own.

An interpreted kernel cannot be compiled, and these tests run beside interpreted ones.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tritonbnn.kernels import aot, config, shipped
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.problems import OPS, Problem
from tritonbnn.kernels.targets import TARGETS

FIRST = ("sm_80", "sm_90")
"""Where every formulation is compiled, the one-bit tensor core's too."""

OPERAND_KERNELS = {
    *("_filter_kernel", "_sign_words_kernel", "_weight_sum_kernel"),
    *("_unpack_kernel", "_ones_kernel"),
}
"""What only prepares the operands of a product."""

SOURCES = Path(shipped.__file__).parent

ELSEWHERE = {
    *("_bop_kernel", "_bop_packed_kernel"),  # an optimiser's, of a weight and no layer
    *("_peak_kernel", "_warpgroup_peak_kernel"),  # measure what a GPU reaches
}
"""Kernels that no layer's default launches."""

WARPGROUP_KERNELS = {
    *("_conv_warpgroup_kernel", "_matrices_kernel", "_ones_kernel", "_conv_real_hopper_kernel"),
    *("_conv_input_grad_hopper_kernel", "_sign_words_kernel", "_conv_weight_grad_hopper_kernel"),
    "_unpack_kernel",  # what the library is given there
}
"""What sm_90 alone launches."""


def run_shipped(*arguments):
    """Run the command with kernels that are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tritonbnn.kernels.shipped", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=900, check=False
    )


def run_python(code):
    """What a program prints where kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """What the representative layers compile to in bf16, on both targets."""
    path = tmp_path_factory.mktemp("aot") / "rows.json"
    targets = [word for target in FIRST for word in ("--target", target)]
    done = run_shipped(*targets, "--json", str(path))
    assert path.exists(), done.stderr
    return json.loads(path.read_text())


def kernels_in_the_sources():
    """The names of all kernels of the package."""
    jitted = re.compile(r"@\w+\.jit\ndef (_\w+_kernel)\(")
    return {name for path in SOURCES.glob("*.py") for name in jitted.findall(path.read_text())}


@pytest.mark.compile
def test_every_kernel_is_compiled_for_every_target(rows):
    for target in FIRST:
        expected = kernels_in_the_sources() - ELSEWHERE
        expected -= WARPGROUP_KERNELS if target != "sm_90" else set()
        assert {row["kernel"] for row in rows if row["target"] == target} == expected


@pytest.mark.compile
def test_no_kernel_breaks_a_limit(rows):
    broken = [(row["target"], row["layer"], row["kernel"], row["problems"]) for row in rows]
    assert [row for row in broken if row[-1]] == []
    for row in rows:
        assert 0 < row["registers"] <= 255
        assert row["spill_bytes"] <= shipped.SPILLED
        assert row["shared_bytes"] <= TARGETS[row["target"]].shared_bytes


@pytest.mark.compile
@pytest.mark.parametrize("target", [name for name in TARGETS if name not in FIRST])
def test_every_other_target_compiles_within_its_limits(target, tmp_path):
    """What a GPU of the kind runs by default: no spill, no more shared memory than there is."""
    path = tmp_path / "rows.json"
    done = run_shipped("--target", target, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert {row["target"] for row in found} == {target}
    products = {row["kernel"] for row in found if row["op"] == "conv_packed"}
    assert ("_conv_mma_kernel" in products) == ("mma" in TARGETS[target].products)
    assert "_conv_popcount_kernel" in products
    for row in found:
        assert 0 < row["registers"] <= 512
        assert row["spill_bytes"] <= shipped.SPILLED
        assert row["shared_bytes"] <= TARGETS[target].shared_bytes


@pytest.mark.compile
@pytest.mark.parametrize(
    ("op", "units"),
    [
        ("conv_packed", {"IMMA", "IGMMA", "BMMA", "BGMMA"}),
        ("conv_scaled", {"IMMA", "IGMMA", "BMMA", "BGMMA"}),
        ("conv_real", {"HMMA", "HGMMA"}),
        ("conv_input_grad", {"HMMA", "HGMMA"}),
        ("conv_weight_grad", {"HMMA", "HGMMA"}),
    ],
)
def test_products_run_on_tensor_cores(rows, op, units):
    products = [
        row
        for row in rows
        if row["op"] == op
        and row["kernel"] not in {*OPERAND_KERNELS, "_matrices_kernel", "_conv_popcount_kernel"}
    ]
    assert products
    for row in products:
        assert set(row["tensor_core"]), row
        assert set(row["tensor_core"]) <= units, row


@pytest.mark.compile
def test_the_popcount_idiom_becomes_one_instruction(rows):
    popcounts = [row for row in rows if row["kernel"] == "_conv_popcount_kernel"]
    assert popcounts
    assert all(row["popcounts"] > 0 and not row["tensor_core"] for row in popcounts)


@pytest.mark.compile
def test_the_one_bit_core_is_fed_by_wide_loads(rows):
    products = [row for row in rows if row["kernel"] == "_conv_mma_kernel"]
    assert len(products) == 2 * len(FIRST) * len(shipped.REPRESENTATIVE)  # integers, scaled
    for row in products:
        busy, loads = row["tensor_core"], row["wide_loads"]
        assert set(busy) == {"BMMA"}
        assert row["shared_bytes"] == row["shuffles"] == 0  # every lane keeps what it has
        # A chunk of 4 x 4 tiles is 32 instructions, 8 loads of the weight and 4 of the image; and 8
        # that count ones.
        if "32>32" not in row["layer"]:
            assert loads >= busy["BMMA"] * 12 // 40
    loops = [row["loop"] for row in products if "STG" not in row["loop"]]  # others are unrolled
    assert loops
    assert all(loop["BMMA"] / sum(loop.values()) > 0.3 for loop in loops)


@pytest.mark.compile
def test_no_kernel_of_a_unit_spills_at_any_layer(tmp_path):
    """Those under pressure, for both steps; bf16 on sm_90 has spilled where others had not."""
    path = tmp_path / "rows.json"
    ops = ["--op", "unit_forward", "--op", "unit_activation_backward"]
    done = run_shipped("--model", "reactnet_a", *ops, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(row["layer"], row["step"], row["op"]) for row in json.loads(path.read_text())}
    assert {step for _, step, _ in found} == {1, 2}
    assert len(found) > 50  # layers with the same output and shortcut share their kernels


@pytest.mark.compile
def test_float32_products_stay_off_the_tensor_core(tmp_path):
    path = tmp_path / "rows.json"
    ops = ("conv_real", "conv_input_grad", "conv_weight_grad")
    named = [word for op in ops for word in ("--op", op)]
    done = run_shipped("--dtype", "fp32", "--layer", "0", *named, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    products = json.loads(path.read_text())
    assert {row["op"] for row in products} == set(ops)
    assert not any(row["tensor_core"] for row in products)


@pytest.mark.compile
def test_what_runs_ahead_of_a_loop_divides_by_no_zero():
    """Pixels of a 1x1 convolution of stride 2 may meet no tap, but loads run ahead of the loop."""
    code = """
import torch
from tritonbnn.kernels import aot, shipped
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.targets import TARGETS
problem = shipped.Problem("conv_input_grad", Geometry(4, 28, 28, 64, 64, 1, 2, 0), torch.bfloat16)
print(aot.compile_kernel(shipped.launches_of(problem)[-1], TARGETS["sm_90"]).asm["ttgir"])
"""
    ir = run_python(code)
    divisors = set(re.findall(r"arith\.(?:div|rem)si %\w+, (%\w+) : i32", ir))
    counted = {each for each in divisors if not re.fullmatch(r"%c[1-9]\d*_i32", each)}
    assert counted
    assert all(f"{each} = arith.maxsi" in ir for each in counted)


def test_an_unknown_target_is_one_line():
    done = run_shipped("--target", "sm_70")
    assert done.returncode == 2
    known = ", ".join(TARGETS)
    assert done.stderr == f"error: target must be one of {known}, not 'sm_70'\n"


def test_recording_runs_nothing():
    layer = Geometry(2, 6, 4, 33, 31, 3, 2, 1)
    kernels = Counter()
    for op in OPS:
        launches = shipped.launches_of(Problem(op, layer, torch.bfloat16))
        assert all(value.is_meta for value in launches[-1].arguments.values() if is_tensor(value))
        kernels.update(launch.kernel.__name__ for launch in launches)
    assert kernels["_filter_kernel"] == 3
    assert len(kernels) == 14


def is_tensor(value):
    return isinstance(value, torch.Tensor)


def test_limits_are_reported():
    made = aot.Resources("_conv_mma_kernel", 255, 16, 230 * 1024, Counter({"FFMA": 1}), Counter())
    tile = config.TileConfig(16, 16, 32, 4, 1)
    row = shipped.Row("sm_90", "conv_packed", 2, "", "bf16", tile, made)
    assert row.problems == [
        "spills 16 bytes",
        "takes 235520 of 232448 bytes of shared memory",
        "has no tensor-core instruction",
        "is not on the one-bit tensor core",
        "has no load of 16 bytes",
    ]
