"""The one-bit tensor core's kernels, compiled: what the assembly does with registers and loads."""

import json
import re

import pytest

from tests.test_aot import run_python
from tritonbnn.kernels import shipped

pytestmark = pytest.mark.compile


def test_a_unit_on_the_one_bit_core_keeps_its_registers():
    code = """
import json, torch
from tritonbnn import kernels
from tritonbnn.checks import shortcut_input_shape
from tritonbnn.kernels import aot, config, shipped
from tritonbnn.kernels.targets import TARGETS

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
    for launch in aot.record(lambda: run(problem))[1::2]:
        for name in ("sm_80", "sm_90"):
            made = aot.compile_launch(launch, TARGETS[name])
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
from tritonbnn.kernels.targets import TARGETS
(launch,) = aot.record(lambda: mma_peak.run_steps(2, 4096, torch.device("meta")))
for name in ("sm_80", "sm_90"):
    print(aot.compile_launch(launch, TARGETS[name]).tensor_core_share)
"""
    assert all(float(line) > 0.8 for line in run_python(code).splitlines())


def test_the_one_bit_core_reads_registers_in_the_order_of_memory():
    """The 4 words of a load are the weight's fragment; those of the image, two instructions'.

    Of each five products, the last is with ones, which are in no memory.
    """
    code = """
import torch
from tritonbnn.kernels import aot, config, shipped
from tritonbnn.kernels.targets import TARGETS
from tritonbnn.kernels.geometry import Geometry
problem = shipped.Problem("conv_packed", Geometry(4, 7, 7, 1024, 64, 1, 1, 0), torch.float32)
launch = shipped.launches_of(problem, config.default(problem.key, "mma"))[-1]
print(aot.compile_kernel(launch, TARGETS["sm_80"]).asm["ptx"])
"""
    ptx = run_python(code)
    quads = [tuple(re.findall(r"%r\d+", line)) for line in re.findall("v4.b32 {.*?}", ptx)]
    products = re.findall(r"and.popc\s+{(.*)}, {(.*)}, {(.*)}, {(.*)};", ptx)
    assert len(products) == 40
    counting = [weight for _, weight, _, _ in products if len(set(weight.split(","))) == 1]
    assert len(counting) == 8
    assert len(set(counting)) == 1
    for number, (result, weight, image, sums) in enumerate(products):
        assert result == sums
        assert weight in counting or tuple(weight.split(",")) in quads
        half = slice(2 * (number % 2), 2 * (number % 2) + 2)
        assert tuple(image.split(",")) in [quad[half] for quad in quads]


def test_the_warpgroups_stages_begin_where_its_assembly_expects_them():
    """Its descriptors count from the beginning of shared memory, as one allocation does."""
    code = """
import json, torch
from tritonbnn.kernels import aot, config, mma_peak, shipped
from tritonbnn.kernels.targets import TARGETS
from tritonbnn.kernels.geometry import Geometry
layer = Geometry(8192, 1, 1, 8192, 8192, 1, 1, 0)
problem = shipped.Problem("conv_packed", layer, torch.float32)
choice = config.default(problem.key, "wgmma")
stages = choice.tile.block_n * choice.tile.block_k // 8 * choice.tile.num_stages
multiply = shipped.launches_of(problem, choice)[-1]
(peak,) = aot.record(lambda: mma_peak.run_warpgroup_steps(2, 4096, torch.device("meta")))
for launch, expected in ((multiply, stages), (peak, 256 * 256)):
    target = TARGETS["sm_90"]
    made, ptx = aot.compile_launch(launch, target), aot.compile_kernel(launch, target).asm["ptx"]
    print(json.dumps([made.spill_bytes, made.shared_bytes, expected, made.tensor_core]))
    print(json.dumps([made.instructions["SHFL"], made.wide_loads, ptx.count("global_smem+")]))
"""
    multiply, moves, peak, _ = map(json.loads, run_python(code).splitlines())
    for spilled, shared, expected, busy in (multiply, peak):
        assert (spilled, shared) == (0, expected)
        assert set(busy) == {"BGMMA"}
        assert busy["BGMMA"] % 4 == 0
    assert moves[0] == moves[2] == 0
    assert moves[1] > 0


def test_a_stage_of_the_warpgroup_has_the_barriers_that_it_needs():
    """One, after which all copies are there, and nobody reads the stage that is asked for next.

    Of the weight's gradient Triton knows what reads shared memory, but not which stage of it, and
    has one more. Its signs are made of few instructions.
    """
    code = """
import json, torch
from tritonbnn.kernels import aot, config, shipped
from tritonbnn.kernels.targets import TARGETS
from tritonbnn.kernels.geometry import Geometry
target = TARGETS["sm_90"]
for op, formulation, layer in (
    ("conv_packed", "wgmma", Geometry(8192, 1, 1, 65536, 8192, 1, 1, 0)),
    ("conv_weight_grad", "warpgroup", Geometry(256, 14, 14, 512, 512, 3, 1, 1)),
    ("conv_weight_grad", "warpgroup", Geometry(256, 28, 28, 256, 256, 3, 2, 1)),
):
    problem = shipped.Problem(op, layer, torch.bfloat16)
    choice = config.default(problem.key, formulation, target)
    made = [aot.compile_launch(each, target) for each in shipped.launches_of(problem, choice)]
    (multiplies,) = (each for each in made if each.tensor_core)
    print(json.dumps([multiplies.loop["BAR"], multiplies.spill_bytes, multiplies.loop.total()]))
"""
    packed, flat, strided = map(json.loads, run_python(code).splitlines())
    assert [packed[0], flat[0], strided[0]] == [1, 2, 2]
    assert packed[1] == flat[1] == strided[1] == 0
    assert flat[2] < 230  # a lane's 32 signs by 40, and 4 for each of its 16 halves of a word
    assert strided[2] < 290
