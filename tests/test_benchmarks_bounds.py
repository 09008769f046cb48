"""Instructions counted in a disassembly, and what follows of them, against hand counts."""

import ast
import json

import pytest
import torch

from benchmarks import bounds, bounds_table, products, sass
from benchmarks.launches import OURS, Counted
from benchmarks.multiprocessor import MACHINES
from benchmarks.products import Products
from benchmarks.sass import Code, Loop, Work
from tests.test_aot import run_python
from tritonbnn import cli
from tritonbnn.kernels.config import TileConfig
from tritonbnn.kernels.launch import Launch
from tritonbnn.kernels.targets import TARGETS

H100 = MACHINES["sm_90"]
NONE = Products({}, ())

LISTING = """
.text._some_kernel:
                           LDC R1, c[0x0][0x28] ;
                           LDG.E.LTC128B.128 R4, desc[UR4][R2.64] ;
                           BRA `(.L_x_9) ;
.L_x_9:
.L_x_0:
                           LDG.E.U8 R4, desc[UR4][R2.64+0x80] ;
.L_x_1:
                           HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8].tnspB, R24 ;
                      @!P1 HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR8].tnspB, R24 ;
                      @!PT LDS RZ, [RZ] ;
                       @P2 LDS.U16 R7, [R6] ;
                           LDGSTS.E.BYPASS.128 [R109], desc[UR18][R90.64], P6 ;
                           LDSM.16.MT88.4 R8, [R3] ;
                           LDSM.16.M88 R8, [R3] ;
                           STL [R1+0x4], R7 ;
                      @UP0 BRA `(.L_x_1) ;
                       @P0 BRA `(.L_x_0) ;
                           STS.64 [R5], R6 ;
                           SHFL.BFLY PT, R5, R4, 0x1, 0x1f ;
                           POPC R4, R4 ;
                           IMAD.MOV.U32 R4, RZ, RZ, R5 ;
                           F2FP.BF16.F32.PACK_AB R4, R5, R4 ;
                           HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
                           BMMA.168256.AND.POPC R4, R8.ROW, R12.COL, R4 ;
                           STG.E desc[UR4][R2.64], R4 ;
                       @P1 EXIT ;
                           EXIT ;
.L_x_2:
                           BRA `(.L_x_2);
                           NOP;
"""


def test_every_instruction_adds_its_work_to_the_loop_around_it():
    outside, (inner, outer) = sass._stretches(LISTING)
    assert (inner.around, outer.around) == (False, True)
    assert inner.work == {
        "issue": 9,
        "HGMMA": 2 * 64 * 128 * 16 // 4,
        # operands of products, half a word, 16 bytes of every lane, four matrices, one, a spill
        "l1": (64 + 128 + 128) * 16 * 2 // 4 + 128 + 512 + 512 + 128 + 128,
        "l2": 32 * 16,
        "spilled": 1,
    }
    assert outer.work == {"issue": 2, "global": 32, "l1": 128}
    assert outside == {
        "issue": 13,
        "xu": 1,
        "imad": 1,
        "alu": 1,
        "HMMA": 16 * 8 * 16,
        "BMMA": 16 * 8 * 256,
        "global": 32 * 16 + 32 * 4,
        "l1": 32 * 16 + 256 + 128 + 128,
    }


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "expected"),
    [
        ("sm_80", 32, 0, 8, 8),  # 2048 threads
        ("sm_86", 32, 0, 8, 6),  # 1536
        ("sm_86", 16, 0, 1, 16),  # blocks
        ("sm_90", 98, 0, 4, 4),  # of 104 registers a warp, as they are given out
        ("sm_90", 183, 0, 1, 8),  # a quarter of the warps on each scheduler
        ("sm_90", 168, 0, 8, 1),
        ("sm_90", 32, 96 * 1024, 8, 2),
        ("sm_89", 32, 96 * 1024, 8, 1),
    ],
)
def test_as_many_blocks_run_at_once_as_fit(target, registers, shared, warps, expected):
    code = Code(registers, 8, shared, NONE, Work(spilled=2), ())
    assert not code.spills_in_loops
    assert MACHINES[target].resident(code, warps) == expected


class Kernel:
    """What has a name and a source."""

    __name__ = "_some_kernel"

    def __init__(self, source):
        self.source = source

    def parse(self):
        return ast.parse(self.source)


def launched(grid=(300, 4), warps=8, source="", operations=0, **arguments):
    tile = TileConfig(64, 64, 1, warps, 1)
    launch = Launch(Kernel(source), arguments, tile, grid)
    return Counted(OURS, "some", 8_000, {"x": 2_000, "y": 6_000}, operations, launch)


IR = """
  tt.func public @_some_kernel(%x_ptr: !tt.ptr<i32> {tt.divisibility = 16 : i32}, %pixels: i32) {
    %c0_i32 = arith.constant 0 : i32 loc(#loc)
    %c3_i32 = arith.constant 3 : i32 loc(#loc)
    %c8_i32 = arith.constant 8 : i32
    %y_17 = tt.get_program_id y : i32 loc(#loc4)
    %0 = arith.addi %y_17, %c3_i32 : i32
    %1 = arith.extsi %0 : i32 to i64
    %2 = arith.subi %pixels, %1 : i32
    %3 = tt.get_num_programs x : i32
    %4 = arith.divsi %2, %c3_i32 : i32
    %5 = arith.remsi %4, %c8_i32 : i32
    %6 = arith.addi %5, %c8_i32 : i32
    %wide = arith.muli %tile, %cst : tensor<4x4xi32>
    %acc:2 = scf.for %i = %1 to %6 step %3 iter_args(%a = %cst) -> (tensor<64x32xf32>)  : i32 {
      scf.if %known {
        tt.store %p, %q : tensor<64x!tt.ptr<f32>>
      } else {
        tt.store %p, %r : tensor<64x!tt.ptr<f32>>
      }
      %b = scf.for %j = %c0_i32 to %c8_i32 step %c3_i32 iter_args(%c = %a) -> (f32) : i32 {
        %d = tt.dot %g, %w, %c : tensor<64x16xbf16> * tensor<16x32xbf16> -> tensor<64x32xf32>
        %e = tt.elementwise_inline_asm "{mma.sync.aligned.m16n8k256.row; \
mma.sync.aligned.m16n8k256.row}" {packed_element = 4 : i32, pure = true} %f : tensor<2x8x32x4xi32> \
-> tensor<2x8x32x4xi32, #a> loc(#l)
      } loc(#loc9)
    }
    %h = tt.dot %g, %w, %c : tensor<64x16xbf16> * tensor<16x32xbf16> -> tensor<64x32xf32>
    tt.return
  }
"""


def test_products_are_those_of_every_turn_of_the_loops_around_them():
    launch = launched((2, 3), pixels=40).launch
    dot = 64 * 16 * 32
    in_turn = dot + 2 * 8 * 2 * 16 * 8 * 256  # a dot, and of 16 times two of 4 values
    turns = [len(range(y + 3, (40 - (y + 3)) // 3 % 8 + 8, 2)) for y in range(3)]
    assert len(set(turns)) > 1
    outermost = sum(turns) / 3
    assert products.read(IR, 8).of(launch) == (
        pytest.approx(in_turn * 3 * outermost + dot),
        outermost,
    )


def test_a_bound_of_a_loop_that_follows_from_nothing_is_named():
    found = products.read(IR.replace("arith.subi", "arith.xori"), 8)
    with pytest.raises(ValueError, match=r"depends on arith\.xori"):
        found.of(launched(pixels=40).launch)
    with pytest.raises(ValueError, match="depends on %pixels"):
        products.read(IR, 8).of(launched().launch)


def ends(turns, done):
    """Products of one loop of so many turns."""
    numbers = {"%0": ("arith.constant", "0"), "%1": ("arith.constant", "1")}
    numbers["%n"] = "arith.constant", str(turns)
    return Products(numbers, (((("%0", "%n", "%1"),), done),))


def test_a_loop_turns_until_its_share_of_the_products_is_done():
    """Of 8 warps. A turn does what two turns of the source do, and half of one is outside."""
    loop, outside = Work(HGMMA=1000, issue=40), Work(HGMMA=250, issue=100)
    code = Code(32, 0, 0, ends(9, 8 * 500), outside, (Loop(loop),))
    found = bounds.bound(launched(operations=2), code, H100, 1.0)
    assert found.turns == (4.25,)
    blocks = 10  # of 1200, on the fullest of 132 multiprocessors
    assert found.seconds["tensor"] == pytest.approx(blocks * 8 * 9 * 500 / 2048 / 1.755e9)
    assert found.seconds["issue"] == pytest.approx(blocks * 8 * (100 + 4.25 * 40) / 4 / 1.755e9)
    assert found.seconds["dram"] == 8e-6
    assert found.binding == "dram"
    assert found.least == 8e-6


def test_a_loop_around_another_turns_as_its_source_says():
    loops = Loop(Work(BMMA=300)), Loop(Work(BMMA=100, issue=7), around=True)
    code = Code(32, 0, 0, ends(9, 8 * 1900), Work(BMMA=600), loops)
    found = bounds.bound(launched(operations=2), code, H100, 1.0)
    assert found.turns == ((9 * 1900 - 9 * 100 - 600) / 300, 9)


def test_a_slow_pipe_holds_up_more_than_the_schedulers():
    code = Code(32, 0, 0, NONE, Work(issue=100, xu=20, alu=60), ())
    found = bounds.bound(launched((132,), warps=4), code, H100, 1.0)
    assert found.seconds["issue"] == pytest.approx(20 * 8 / 1.755e9)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # 13 blocks of rows, 2 of channels, in 2 programs
        ({"rows": 800, "BLOCK_M": 64, "CHANNELS": 100, "BLOCK_N": 64}, 13 * 2 / 2),
        ({}, 8_000 / 2 / 4 / 250),
    ],
)
def test_a_loop_without_products_turns_by_rows_or_by_bytes(arguments, expected):
    code = Code(32, 0, 0, NONE, Work(issue=1), (Loop(Work({"global": 250, "issue": 1})),))
    found = bounds.bound(launched((2,), warps=4, **arguments), code, H100, 1.0)
    assert found.turns == (expected,)


@pytest.mark.parametrize(("registers", "late"), [(64, 0), (168, 0.75)])
def test_a_block_alone_overlaps_its_product_with_its_operands_only(registers, late):
    source = "for i in range(3):\n    load(x_ptr + i)\nstore(y_ptr, i)"
    counted = launched((132,), source=source, operations=2 * 132 * 8 * 1000)
    code = Code(registers, 0, 0, NONE, Work(HGMMA=1000), ())
    found = bounds.bound(counted, code, H100, 1.0)
    assert found.late == late
    product, moving = 8 * 1000 / 2048 / 1.755e9 / 0.7, 8e-6 / 0.88
    assert found.estimate == pytest.approx(max(product, moving * (1 - late)) + moving * late)


def test_a_product_without_a_tensor_core_is_refused():
    with pytest.raises(ValueError, match="some has no tensor-core instruction"):
        bounds.bound(launched(operations=2), Code(32, 0, 0, NONE, Work(issue=1), ()), H100, 1.0)


def test_equal_launches_are_one_row_with_their_sums():
    x = torch.empty(2, 3, 5, 7, device="meta")
    counted = [launched((132,), x_ptr=x)] * 2 + [Counted("torch", "add", 8)]
    bound = bounds.bound(counted[0], Code(32, 0, 0, NONE, Work(issue=9), ()), H100, 1.0)
    (row,) = bounds_table.rows_of(counted, [bound, bound, None])
    assert (row["kernel"], row["layer"], row["launches"], row["mb"]) == (
        "some",
        "3 at 5x7",
        2,
        0.016,
    )
    assert row["bound_ms"] == pytest.approx(0.016)
    lines = list(bounds_table.describe_rows([row], TARGETS["sm_90"]))
    assert lines[-1].split()[:4] == ["all", "sum", "2", "0"]


def test_interpreted_kernels_are_refused_and_an_unknown_machine_has_no_bounds():
    counted = [launched()]  # by no kernel of Triton's
    with pytest.raises(cli.UserError, match="unset TRITON_INTERPRET"):
        bounds.bounds_of(counted, TARGETS["sm_90"], 1.0)
    assert bounds.bounds_of(counted, TARGETS["sm_100"], 1.0) == [None]


COMPILED = """
import json, torch
from benchmarks import bounds, launches, sass
from tritonbnn.kernels import config, shipped
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.targets import TARGETS

layers = Geometry(256, 28, 28, 256, 256, 3, 1, 1), Geometry(256, 28, 28, 256, 256, 3, 2, 1)
choices = (
    ("conv_packed", config.Choice("mma", config.TileConfig(128, 64, 1, 4, 1))),
    ("conv_input_grad", config.Choice("dot", config.TileConfig(128, 128, 64, 8, 3))),
    ("conv_weight_grad", config.Choice("dot", config.TileConfig(128, 128, 64, 8, 3))),
)
for name in ("sm_80", "sm_90", "sm_120"):
    target = TARGETS[name]
    for layer in layers:
        for op, choice in choices:
            if op == "conv_packed" and name == "sm_120":
                continue
            problem = shipped.Problem(op, layer, torch.bfloat16)
            recorded = shipped.launches_of(problem, choice, target)
            of = [launches.of_ours(launch) for launch in recorded]
            (counted,) = [each for each in of if each.operations]
            found = bounds.bound_of(counted.launch, target, 3000)
            code = found.code
            multiplied = sass.multiplications(code.outside) + sum(
                turns * sass.multiplications(loop.work)
                for turns, loop in zip(found.turns, code.loops)
            )
            programs = torch.Size(counted.launch.grid).numel()
            print(json.dumps({
                "name": name, "op": op, "stride": layer.stride, "turns": found.turns,
                "grid": counted.launch.grid,
                "operations": counted.operations,
                "multiplied": multiplied * choice.tile.num_warps * programs,
                "steps": counted.launch.arguments.get("steps"),
                "loops": [dict(loop.work) for loop in code.loops],
            }))
"""


@pytest.fixture(scope="session")
def compiled():
    """Products of the default tiles, compiled."""
    return [json.loads(line) for line in run_python(COMPILED).splitlines()]


@pytest.mark.compile
def test_a_compiled_product_is_counted_whole(compiled):
    assert len(compiled) == 16
    for row in compiled:
        padded = 1
        if row["op"] == "conv_packed":  # 9 taps of 8 words are 4.5 chunks, of which it does 5
            padded = 5 / 4.5 * 40 / 32  # and for each 4 tiles of the weight one of ones
        if row["op"] == "conv_weight_grad":  # its programs have equal shares, of 64 pixels a step
            padded = row["grid"][2] * row["steps"] * 64 / (256 * 28 * 28 / row["stride"] ** 2)
        assert 2 * row["multiplied"] == pytest.approx(row["operations"] * padded), row


@pytest.mark.compile
def test_a_compiled_loop_turns_as_often_as_its_source_says(compiled):
    for row in compiled:
        if not row["turns"]:
            assert (row["name"], row["op"]) == ("sm_80", "conv_packed")  # unrolled
            continue
        (turns,) = row["turns"]
        # of the input gradient, a pixel of stride 2 meets a quarter of the 9 taps of 4 chunks each
        expected = {"conv_packed": 5, "conv_input_grad": 9 * 4 / row["stride"] ** 2}
        assert turns == (row["steps"] or expected[row["op"]]), row


@pytest.mark.compile
def test_the_loop_of_the_one_bit_core_is_as_its_source_says(compiled):
    """Nearly half of its instructions are the core's: 40 of 91 for 3x3 and 256 channels."""
    for row in compiled:
        if (row["op"], row["name"]) == ("conv_packed", "sm_90"):
            (loop,) = row["loops"]
            assert loop["BMMA"] == 40 * 16 * 8 * 256
            assert 80 <= loop["issue"] <= 96
            assert loop["global"] == 12 * 512  # 8 loads of the weight and 4 of the image


@pytest.mark.compile
def test_the_command_prints_the_bounds_of_a_network(tmp_path):
    path = tmp_path / "count.json"
    flags = ["--model", "reactnet_18", "--batch", "16", "--size", "64", "--json", str(path)]
    printed = run_python(f"from benchmarks import count; count.main({flags!r})")
    assert "bounds of our kernels on sm_90: H100" in printed
    rows = json.loads(path.read_text())["rows"]["ours+bf16"]["bounds"]
    gradients = [row for row in rows if row["kernel"].startswith("conv_input_grad")]
    assert sum(row["launches"] for row in gradients) == 16
    for row in rows:
        assert row["bound_ms"] >= max(row[f"{name}_ms"] for name in bounds.LIMITS) * 0.999
        assert row["estimated_ms"] > row["bound_ms"]
        assert 1 <= row["blocks"] <= 32
    assert all(row["tensor_ms"] > 0 for row in gradients)
