"""The one-bit tensor core's kernels: emulated in numpy without a GPU, run where there is one."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import gluon_numpy
from tests.conftest import HAS_GPU
from tests.helpers import KERNEL_DEVICE, plus_minus, vectors
from tests.test_conv import PROBLEMS, by_unfolding, operands
from tritonbnn import cli, eager, kernels
from tritonbnn.kernels import below_triton, bench_matmul, config, conv, mma_peak
from tritonbnn.kernels.candidates import candidates
from tritonbnn.kernels.config import Choice, TileConfig
from tritonbnn.kernels.cut import block_tiles
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.problems import Problem
from tritonbnn.kernels.problems.network import model_layers
from tritonbnn.kernels.targets import TARGETS

# A warp's tiles: 1, 2 and 4 of channels, 1, 2 and 8 of pixels; warps beside each other either way.
TILES = [
    TileConfig(32, 16, 1, 4, 1),
    TileConfig(64, 32, 1, 4, 1),
    TileConfig(64, 128, 1, 8, 1),
    TileConfig(64, 64, 1, 1, 1),
]


def convolve(problem, tile, dtype=torch.int16, alpha=None):
    """The convolution on the one-bit tensor core, and the exact one in int64."""
    _, c, _, _, _, k, stride = problem
    x, weight, *packed = operands(problem)
    arguments = {"channels": c, "stride": stride, "padding": k // 2, "dtype": dtype}
    on_device = [t if t is None else t.to(KERNEL_DEVICE) for t in (*packed, alpha)]
    with config.using(Choice("mma", tile)):
        y = kernels.conv_packed(*on_device, **arguments)
    return y.cpu(), by_unfolding(x, weight, stride, k // 2)


def test_the_emulated_instruction_is_the_ptx_isas():
    """Bit by bit, from the formulas of "Matrix Fragments for mma.m16n8k256"."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, (16, 256)), rng.integers(0, 2, (256, 8))
    c = rng.integers(-1000, 1000, (16, 8))
    fragments = [np.zeros((32, n), np.uint32) for n in (4, 2)]
    elements = np.zeros((32, 4), np.int32)
    expected = np.zeros((32, 4), np.int32)
    d = a @ b + c
    for lane in range(32):
        group, member = lane >> 2, lane % 4
        for i in range(128):
            row = group if i < 32 or 64 <= i < 96 else group + 8
            column = member * 32 + (i & 31) + (0 if i < 64 else 128)
            fragments[0][lane, i // 32] |= a[row, column] << (i % 32)
        for i in range(64):
            row = member * 32 + (i & 31) + (0 if i < 32 else 128)
            fragments[1][lane, i // 32] |= b[row, group] << (i % 32)
        for i in range(4):
            place = (group if i < 2 else group + 8, member * 2 + (i & 1))
            elements[lane, i], expected[lane, i] = c[place], d[place]
    words = [each.view(np.int32) for each in fragments]
    assert np.array_equal(gluon_numpy.mma_m16n8k256(*words, elements), expected)


@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t.block_m}x{t.block_n}")
@pytest.mark.parametrize("problem", PROBLEMS)
def test_convolutions_are_exact(one_bit_core, problem, tile):
    y, truth = convolve(problem, tile)
    assert torch.equal(y.long(), truth)


@pytest.mark.parametrize(
    "problem",
    [
        pytest.param((1, 1024, 3, 2, 20, 3, 1), id="9216_bits", marks=pytest.mark.slow),
        pytest.param((1, 128, 5, 4, 33, 3, 2), id="lanes_in_different_taps"),
        pytest.param((1, 64, 4, 5, 17, 3, 2), id="two_taps_a_lane"),
        pytest.param((2, 512, 3, 3, 16, 1, 1), id="1x1"),
    ],
)
def test_wide_convolutions_are_exact(one_bit_core, problem):
    y, truth = convolve(problem, TILES[1])
    assert torch.equal(y.long(), truth)


@settings(derandomize=True, deadline=None, max_examples=12)
@given(
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    channels=st.integers(1, 140),
    outputs=st.integers(1, 40),
    kernel_size=st.sampled_from([1, 3]),
    stride=st.integers(1, 2),
    tile=st.sampled_from(TILES),
)
def test_any_convolution_is_exact(size, channels, outputs, kernel_size, stride, tile):
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_GPU:
            gluon_numpy.emulate(patch)
        y, truth = convolve((2, channels, *size, outputs, kernel_size, stride), tile)
    assert torch.equal(y.long(), truth)


@pytest.mark.parametrize("size", [(1, 1, 1), (33, 16, 33), (40, 70, 96), (5, 3, 700)], ids=str)
def test_products_are_exact(one_bit_core, size):
    m, n, k = size
    a, b = plus_minus(m, k, seed=m), plus_minus(n, k, seed=n + 1)
    packed = [eager.pack_signs(each).to(KERNEL_DEVICE) for each in (a, b)]
    with config.using(Choice("mma", TILES[1])):
        product = kernels.packed_matmul(*packed, k)
    assert torch.equal(product.cpu().long(), a.long() @ b.long().T)


@pytest.mark.slow
def test_integers_beyond_int16_are_exact(one_bit_core):
    x = torch.full((2, 1, 1, 1050), -1, dtype=torch.int32, device=KERNEL_DEVICE)
    with config.using(Choice("mma", TILES[1])):
        product = kernels.packed_matmul(x[:, 0, 0], x[:1, 0, 0], 33_600)
    assert product.tolist() == [[33_600], [33_600]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_scale_is_applied_in_float32(one_bit_core, dtype):
    (alpha,) = vectors(1, 31)
    y, truth = convolve((2, 33, 5, 3, 31, 3, 2), TILES[1], dtype, alpha)
    assert torch.equal(y, (truth.float() * alpha.view(-1, 1, 1)).to(dtype))


def test_the_peak_counts_every_instruction(one_bit_core):
    sums = mma_peak.run_steps(2, 3, KERNEL_DEVICE)
    assert sums.shape == (2, 256, 64)
    assert (sums == 3 * 2 * 256).all()
    instructions = mma_peak.WARPS * 2 * (256 // 8 // mma_peak.WARPS) * (64 // 16)
    assert instructions * 2 * 16 * 8 * 256 == mma_peak.STEP_OPERATIONS


def test_the_matmul_benchmark_checks_then_relates(one_bit_core, monkeypatch):
    monkeypatch.setattr(below_triton, "runs", lambda *_: True)
    roofs = dict.fromkeys(("copy_bytes_per_s", *bench_matmul.ROOFS.values()), 1e9)
    row = bench_matmul.measure(32, KERNEL_DEVICE, roofs, limit=1, runs=1)
    assert (row["operations"], row["bytes"]) == (2 * 32**3, 2 * 32 * 4 + 32 * 32 * 4)
    others = min(row["int8_us"]["p50"], row["torch_int_mm_us"]["p50"])
    for form in ("mma", "wgmma"):
        share = pytest.approx(1e6 * 2 * 32**3 / 1e9 / row[f"{form}_us"]["p50"])
        assert row[f"{form}_share_of_peak"] == row[f"{form}_share_of_floor"] == share
        lead = pytest.approx(others / row[f"{form}_us"]["p50"])
        assert row[f"{form}_times_faster_than_int8"] == lead
    monkeypatch.setattr(bench_matmul, "packed_matmul", lambda a, b, k: torch.zeros(32, 32))
    with pytest.raises(RuntimeError, match=r"formulation='int8'.* is wrong"):
        bench_matmul.measure(32, KERNEL_DEVICE, roofs, limit=1, runs=1)


def test_the_matmul_benchmark_names_its_sizes():
    with pytest.raises(cli.UserError, match="--size must be a multiple of 8 and at least 32"):
        bench_matmul.main(["--size", "100"])


def test_without_the_core_int8_runs_and_says_nothing(capfd):
    if HAS_GPU:
        pytest.skip("the interpreter has no one-bit tensor core, this GPU may")
    assert not below_triton.runs(KERNEL_DEVICE)
    y, truth = convolve((2, 33, 5, 3, 31, 3, 2), TILES[0])
    assert torch.equal(y.long(), truth)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("capability", "native"),
    [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 0), False)],
)
def test_the_core_is_known_by_capability(monkeypatch, capability, native):
    monkeypatch.setattr(below_triton, "interpreted", lambda kernel: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(below_triton.verdicts, "trusted", lambda device, name: True)
    known = below_triton.runs.__wrapped__
    assert known(torch.device("cuda")) is native
    assert not known(torch.device("cpu"))
    monkeypatch.setattr(below_triton.verdicts, "trusted", lambda device, name: False)
    assert not known(torch.device("cuda"))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_what_is_not_trusted_gives_way_to_int8(monkeypatch, target):
    layer = Geometry(2, 5, 3, 33, 31, 3, 1, 1)
    monkeypatch.setattr(conv, "target_of", lambda device: TARGETS[target])
    with config.using(TARGETS[target]):
        for trusted, formulation in ((True, "mma"), (False, "int8")):
            monkeypatch.setattr(below_triton, "runs", lambda *_, trusted=trusted: trusted)
            assert conv.product_choice(layer, torch.device("meta")).formulation == formulation


def test_in_the_interpreter_only_a_table_chooses_it():
    key = Geometry(2, 5, 3, 33, 31, 3, 1, 1).key("conv_packed", "int32")
    assert config.look_up(key, {}).formulation == "int8"
    choice = Choice("mma", TILES[0])
    assert config.look_up(key, {key: choice}) == choice


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
def test_every_candidate_is_a_whole_number_of_tiles(target):
    key = Geometry(256, 14, 14, 512, 512, 3, 1, 1).key("conv_packed", "int32")
    tiles = [c.tile for c in candidates(key, TARGETS[target]) if c.formulation == "mma"]
    assert len(tiles) > 8
    for tile in (*tiles, *TILES, config.default_tile(key, "mma")):
        cut = block_tiles(tile)
        assert cut.warps_o * cut.warps_p == tile.num_warps
        assert 16 * cut.warps_o * cut.tiles_o == tile.block_n
        assert 8 * cut.warps_p * cut.tiles_p == tile.block_m


LAYERS = model_layers("reactnet_a", 4, 224)


@pytest.mark.gpu
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layers_of_reactnet_a_on_the_gpu(gpu, one_bit_core, layer):
    problem = Problem("conv_packed", layer, torch.float32)
    inputs = problem.inputs(gpu)
    truth = eager.conv_packed(
        *(inputs[name].cpu() for name in ("signs", "weight_signs")),
        None,
        channels=layer.channels,
        stride=layer.stride,
        padding=layer.padding,
        dtype=torch.int32,
    )
    choices = [choice for choice in candidates(problem.key, 80) if choice.formulation == "mma"]
    for choice in choices[::4]:  # compiling takes longer than all else
        with config.using(choice):
            (y,) = problem.run(inputs)
        assert torch.equal(y.cpu().int(), truth), choice


@pytest.mark.gpu
def test_random_problems_on_the_gpu(gpu, one_bit_core):
    rng = random.Random(0)
    for _ in range(60):
        sizes = [rng.randint(1, high) for high in (5, 600, 20, 20, 150)]
        problem = (*sizes, rng.choice((1, 3)), rng.randint(1, 2))
        y, truth = convolve(problem, rng.choice(TILES), torch.int32)
        assert torch.equal(y.long(), truth), problem
