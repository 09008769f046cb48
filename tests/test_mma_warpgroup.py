"""The warpgroup's one-bit tensor core: emulated in numpy without a GPU, run where there is one."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import gluon_numpy
from tests.conftest import HAS_GPU
from tests.helpers import KERNEL_DEVICE, plus_minus, vectors
from tests.test_conv import by_unfolding, operands
from tests.warpgroup_numpy import BASE, wgmma_m64nk256
from tritonbnn import eager, kernels
from tritonbnn.kernels import below_triton, config, mma_peak, mma_warpgroup
from tritonbnn.kernels.candidates import candidates
from tritonbnn.kernels.config import Choice, TileConfig
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.targets import TARGETS

# One to four warpgroups, 2 to 8 instructions a stage, fewer and more stages than K has.
TILES = [
    TileConfig(64, 32, 512, 4, 2),
    TileConfig(128, 64, 1024, 8, 3),
    TileConfig(256, 128, 512, 16, 4),
    TileConfig(64, 256, 2048, 4, 3),
]


@pytest.fixture
def warpgroup_core(one_bit_core):
    """A GPU with the instruction, or its emulation."""
    if HAS_GPU and not below_triton.runs(KERNEL_DEVICE, "wgmma"):
        pytest.skip("needs a GPU with the warpgroup's one-bit tensor core: sm_90")


def product(size, tile):
    """a @ b^T on the warpgroup's tensor core, and in float32, exact below 2^24 signs."""
    m, n, k = size
    a, b = plus_minus(m, k, seed=m), plus_minus(n, k, seed=n + 1)
    packed = [eager.pack_signs(each).to(KERNEL_DEVICE) for each in (a, b)]
    with config.using(Choice("wgmma", tile)):
        y = kernels.packed_matmul(*packed, k)
    return y.cpu().long(), (a @ b.T).long()


def test_the_emulated_instruction_is_the_ptx_isas():
    """Bit by bit, from the ISA's formulas of fragments and of 8 x 16 byte matrices."""
    rng = np.random.default_rng(0)
    columns, leading, stride, start = 24, 384, 128, BASE + 512
    a, b = rng.integers(0, 2, (64, 256)), rng.integers(0, 2, (256, columns))
    c = rng.integers(-1000, 1000, (64, columns))
    words = np.zeros((4, 32, 4), np.uint32)
    sums, expected = np.zeros((2, 4, 32, columns // 2), np.int32)
    memory = rng.integers(0, 256, 2048, dtype=np.uint8)
    for k in range(256):
        for n in range(columns):
            byte = start - BASE + n // 8 * stride + n % 8 * 16 + k // 128 * leading + k % 128 // 8
            memory[byte] = memory[byte] & (255 - (1 << k % 8)) | b[k, n] << k % 8
    for thread in range(128):
        warp, lane = thread >> 5, thread & 31
        group, member = lane >> 2, lane % 4
        for i in range(128):
            row = 16 * warp + (group if i < 32 or 64 <= i < 96 else group + 8)
            column = member * 32 + (i & 31) + (0 if i < 64 else 128)
            words[warp, lane, i // 32] |= a[row, column] << (i % 32)
        for i in range(columns // 2):
            place = (16 * warp + group + 8 * (i % 4 // 2), 8 * (i // 4) + 2 * member + (i & 1))
            sums[warp, lane, i], expected[warp, lane, i] = c[place], (a @ b + c)[place]
    descriptor = start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32
    found = wgmma_m64nk256(words.view(np.int32), descriptor, memory.view(np.int32), sums)
    assert np.array_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t.block_m}x{t.block_n}x{t.block_k}")
@pytest.mark.parametrize("size", [(1, 1, 1), (70, 300, 700), (130, 33, 5000)], ids=str)
def test_products_are_exact(warpgroup_core, size, tile):
    y, truth = product(size, tile)
    assert torch.equal(y, truth)


@settings(derandomize=True, deadline=None, max_examples=10)
@given(
    size=st.tuples(st.integers(1, 150), st.integers(1, 80), st.integers(1, 3000)),
    tile=st.sampled_from(TILES[:3]),
)
def test_any_product_is_exact(size, tile):
    if HAS_GPU and not below_triton.runs(KERNEL_DEVICE, "wgmma"):
        pytest.skip("needs a GPU with the warpgroup's one-bit tensor core: sm_90")
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_GPU:
            gluon_numpy.emulate(patch)
        y, truth = product(size, tile)
    assert torch.equal(y, truth)


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.float16], ids=str)
def test_convolutions_scale_and_round_as_they_should(warpgroup_core, dtype):
    problem = (2, 577, 5, 7, 45, 1, 1)
    x, weight, *packed = operands(problem)
    alpha = None if dtype == torch.int16 else vectors(1, 45)[0]
    on_device = [t if t is None else t.to(KERNEL_DEVICE) for t in (*packed, alpha)]
    arguments = {"channels": 577, "stride": 1, "padding": 0, "dtype": dtype}
    with config.using(Choice("wgmma", TILES[0])):
        y = kernels.conv_packed(*on_device, **arguments).cpu()
    truth = by_unfolding(x, weight, 1, 0)
    scaled = truth if alpha is None else truth.float() * alpha.view(-1, 1, 1)
    assert torch.equal(y, scaled.to(dtype))


@pytest.mark.parametrize("window", [(3, 1), (1, 2)], ids=str)
def test_other_convolutions_run_as_the_default(monkeypatch, window):
    kernel_size, stride = window
    padding = kernel_size // 2
    monkeypatch.setattr(below_triton, "runs", lambda *_: True)
    x, weight, *packed = operands((2, 33, 5, 3, 31, kernel_size, stride))
    arguments = {"channels": 33, "stride": stride, "padding": padding, "dtype": torch.int16}
    with config.using(Choice("wgmma", TILES[0])):
        y = kernels.conv_packed(*(t.to(KERNEL_DEVICE) for t in packed), None, **arguments)
    assert torch.equal(y.cpu().long(), by_unfolding(x, weight, stride, padding))


def test_without_the_core_int8_runs_and_says_nothing(capfd):
    if HAS_GPU:
        pytest.skip("the interpreter has no one-bit tensor core, this GPU may")
    y, truth = product((9, 33, 65), TILES[0])
    assert torch.equal(y, truth)
    assert capfd.readouterr() == ("", "")


def test_only_sm_90_has_it(monkeypatch):
    monkeypatch.setattr(below_triton, "interpreted", lambda kernel: False)
    monkeypatch.setattr(below_triton.verdicts, "trusted", lambda device, name: True)
    known = below_triton.runs.__wrapped__
    for capability, native in {(8, 0): False, (9, 0): True, (10, 0): False}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert known(torch.device("cuda"), "wgmma") is native


def test_only_products_on_sm_90_have_candidates():
    plain = Geometry(8192, 1, 1, 8192, 8192, 1, 1, 0).key("conv_packed", "int32")
    tiles = [
        each.tile for each in candidates(plain, TARGETS["sm_90"]) if each.formulation == "wgmma"
    ]
    assert len(tiles) > 8
    assert config.default_tile(plain, "wgmma") in tiles
    for tile in (*tiles, *TILES):
        assert tile.block_m == 16 * tile.num_warps
        assert tile.block_n >= 32
        assert tile.block_n * tile.block_k // 8 * tile.num_stages <= 227 * 1024
    narrow = Geometry(64, 1, 1, 4096, 32, 1, 1, 0).key("conv_packed", "int32")
    for each in candidates(narrow, TARGETS["sm_90"]):
        if each.formulation == "wgmma":
            layout = mma_warpgroup.sums_layout(
                each.tile.num_warps, each.tile.block_n, each.tile.block_k // 256
            )
            assert min(layout.shape) > 0, each
    for key, target in (
        (plain, "sm_80"),
        (Geometry(256, 14, 14, 512, 512, 3, 1, 1).key("conv_packed", "int32"), "sm_90"),
        (Geometry(256, 14, 14, 512, 512, 1, 2, 0).key("conv_packed", "int32"), "sm_90"),
    ):
        assert "wgmma" not in {each.formulation for each in candidates(key, TARGETS[target])}


def test_the_peak_counts_every_instruction(warpgroup_core):
    sums = mma_peak.run_warpgroup_steps(2, 3, KERNEL_DEVICE)
    assert sums.shape == (2, 128, 256)
    assert (sums == 3 * 8 * 256).all()
    assert mma_peak.WARPGROUP_STEP_OPERATIONS == 2 * 128 * 256 * 8 * 256


@pytest.mark.gpu
def test_random_products_on_the_gpu(gpu, warpgroup_core):
    rng = random.Random(0)
    for _ in range(60):
        size = (rng.randint(1, 2000), rng.randint(1, 2000), rng.randint(1, 9000))
        y, truth = product(size, rng.choice(TILES))
        assert torch.equal(y, truth), size
