"""Kernels compiled before a step are those that its launches look for."""

import json

import pytest
import torch

from benchmarks import precompile
from benchmarks.machine import ROOT
from tests.helpers import in_its_own_process
from tritonbnn import cli
from tritonbnn.kernels.targets import TARGETS

AHEAD = """
import json, sys, torch
from torch import nn
from triton import knobs
from benchmarks import precompile
from benchmarks.launches import as_on_a_gpu
from benchmarks.stand_in import standing_in
from benchmarks.steps import training_step
from tritonbnn.kernels.config import Choice, TileConfig
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.targets import TARGETS
from tritonbnn.nn import BinaryUnit

def build():
    return nn.Sequential(
        nn.Conv2d(3, 40, 3, padding=1), BinaryUnit(40, 40, 3), BinaryUnit(40, 40, 3, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10),
    )

if __name__ == "__main__":
    target = TARGETS["sm_90"]
    gpu = precompile.gpu_of(target)
    jobs = precompile.jobs_of_step(build, 6, 10, bf16=True, target=target)
    failed = precompile.compile_all(jobs[1:], gpu, 2)
    missed, hits = [], []
    def heard(src, cache_hit, **rest):
        (hits if cache_hit else missed).append(src.name)
    knobs.compilation.listener = heard
    def launched(kernel, arguments, tile, grid):
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        kernel.warmup(**arguments, grid=grid, **options)
    images = torch.randn(6, 3, 10, 10).to(memory_format=torch.channels_last)
    model = build().to(memory_format=torch.channels_last)
    with standing_in(gpu), as_on_a_gpu(target, launched):
        training_step(model, images, torch.zeros(6, dtype=torch.int64), bf16=True)()
    key = Geometry(6, 10, 10, 40, 40, 3, 1, 1).key("conv_input_grad", "bfloat16").bucketed()
    table = {key: Choice("dot", TileConfig(32, 16, 32, 4, 2))}
    tuned = precompile.jobs_of_step(build, 6, 10, bf16=True, target=target, table=table)
    rows = [job.arguments["BLOCK_M"] for job in tuned if job.kernel == "_conv_input_grad_kernel"]
    print(json.dumps([jobs[0].kernel, len(jobs), failed, missed, len(hits), rows]))
"""


@pytest.mark.compile
def test_a_launch_finds_what_was_compiled_ahead(tmp_path):
    """All kernels of a step on real tensors, but the one that was left out."""
    script = tmp_path / "ahead.py"
    script.write_text(AHEAD)
    root = str(ROOT)
    cache = str(tmp_path / "cache")
    done = in_its_own_process(str(script), TRITON_CACHE_DIR=cache, PYTHONPATH=root)
    assert done.returncode == 0, done.stderr
    left_out, count, failed, missed, hits, rows = json.loads(done.stdout.splitlines()[-1])
    assert failed == []
    assert missed == [left_out]
    assert hits == count - 1 > 10
    assert rows == [32]  # of the one layer that is tuned; the other has the target's default


def test_a_step_s_kernels_are_recorded_once_each():
    """What a tensor is a view of counts: where it begins decides what is compiled."""
    base = torch.empty(4, 33, device="meta")
    whole, row = (precompile._operand(each) for each in (base, base[1]))
    assert (whole.data_ptr(), row.data_ptr()) == (0, 33 * 4 % 16)
    assert whole.ptr_range() == row.ptr_range() == 4 * 33 * 4


class Broken:
    """A kernel that no compiler takes."""

    def warmup(self, **_):
        raise RuntimeError("PassManager::run failed\nand more")


def test_a_kernel_that_cannot_be_compiled_costs_its_line(monkeypatch):
    monkeypatch.setattr(precompile, "BROKEN", Broken(), raising=False)
    job = precompile.Job(precompile.__name__, "BROKEN", {}, 4, 1)
    failed = precompile.compile_all([job] * 2, precompile.gpu_of(TARGETS["sm_80"]), 1)
    assert failed == ["BROKEN: PassManager::run failed"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sm_10"], "target must be one of sm_75, "),
        (["--processes", "0"], "must be a whole number of at least 1"),
        (["--model", "nonsense", "--target", "sm_90"], "unknown model 'nonsense'"),
        ([], "no CUDA device here: name a GPU with --target"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, arguments, message):
    monkeypatch.setattr(precompile, "interpreted", lambda kernel: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(cli.UserError, match=message) as caught:
        precompile.main(arguments)
    assert "\n" not in str(caught.value)
