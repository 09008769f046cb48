"""The trainer's settings of the process that it runs in."""

import ctypes
import os
import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from tritonbnn.compute import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for turn in range(20):  # the first ones may find gaps a few bytes too small
    before = faults()
    # as a pass forward and backward: all are freed, the last first
    tensors = [torch.ones(2**23) for _ in range(4)]
    while tensors:
        tensors.pop()
print(faults() - before)
"""
PAGES = 4 * 2**23 * 4 // os.sysconf("SC_PAGE_SIZE")


def faults_of_a_turn(how, **variables):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", CODE, how]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True, env=clean | variables
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc's malloc")
def test_freed_memory_is_kept_for_the_next_tensors():
    assert faults_of_a_turn("as it is") > 0.9 * PAGES
    assert faults_of_a_turn("keep") < 0.01 * PAGES
    # what the user chose stays
    assert faults_of_a_turn("keep", MALLOC_MMAP_THRESHOLD_="1048576") > 0.9 * PAGES
