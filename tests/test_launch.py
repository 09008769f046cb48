"""A remembered launch runs what Triton itself would run, in a process that interprets nothing."""

import os
import subprocess
import sys

import pytest

CODE = """
import itertools
import torch
from benchmarks.host_time import _Nothing, launches_do_nothing
from tritonbnn.kernels import launch
from tritonbnn.kernels.config import TileConfig
from tritonbnn.kernels.pack import _pack_kernel
from tritonbnn.kernels.targets import TARGETS

ran, kinds = [], set()
_Nothing._count = lambda self, *arguments: ran.append((self, arguments))
memory = {dtype: torch.zeros(512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
packed = torch.zeros(64, dtype=torch.int32)
cases = list(itertools.product(
    memory, (0, 1, 8), (None, torch.zeros(32)), (1, 2, 16, 48), (31, 32), (4, 8), (1, 2)
))
with launches_do_nothing(TARGETS["sm_90"]):
    for dtype, offset, shift, rows, channels, warps, stages in cases * 2:
        tile = TileConfig(64, 1, 1, warps, stages)
        arguments = {
            "x_ptr": memory[dtype][offset:], "shift_ptr": shift, "packed_ptr": packed,
            "rows": rows, "CHANNELS": channels, "WORDS": 1, "BLOCK": 64,
        }
        launch.start(_pack_kernel, (3,), tile, arguments, packed.device)
        remembered, given = ran.pop()
        options = {"num_warps": warps, "num_stages": stages}
        triton_own = _pack_kernel[(3,)](**arguments, **options)
        assert remembered is triton_own, (dtype, offset, shift, rows, channels)
        assert given[:3] == (3, 1, 1)
        _, expected = ran.pop()
        for mine, own in zip(given[-len(arguments):], expected[-len(arguments):], strict=True):
            assert mine is own or mine == own
        kinds.add(id(remembered))
    try:
        launch.start(_pack_kernel, (3,), tile, arguments | {"rows": packed}, packed.device)
    except TypeError as error:
        assert "tensors of _pack_kernel" in str(error)
    else:
        raise AssertionError("a tensor that is no pointer by its name is not looked at")
print(len(kinds), len(launch._runners), len(cases))
"""


@pytest.mark.slow
def test_a_remembered_launch_is_tritons_own():
    """Every combination of dtype, alignment, absence, divisibility, constant and option, twice."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kinds, remembered, cases = map(int, done.stdout.split())
    assert remembered == cases * 2 // 3  # of three offsets, two are aligned
    assert 16 < kinds < remembered  # Triton tells fewer apart
