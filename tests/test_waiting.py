"""No step waits for the device: nothing on it is read while training.

On a machine without a GPU the launches of the GPU's code path are left out, and the operators that
would copy a number to the host are looked for.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import HAS_GPU
from tests.hand import plain, taught
from tests.helpers import KERNEL_DEVICE
from tritonbnn.analysis import Recorder
from tritonbnn.compute import Compute
from tritonbnn.data.batches import MicroBatch
from tritonbnn.data.splits import IMAGENET
from tritonbnn.kernels.launch import recording
from tritonbnn.models import build_model
from tritonbnn.optim import build_optimizer
from tritonbnn.train.checkpoint import State
from tritonbnn.train.engine import FirstBad, train_one_epoch

READING = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.item,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.nonzero,
    torch.ops.aten.equal,
    torch.ops.aten.masked_select,
    torch.ops.aten._unique2,
}


class Waits(TorchDispatchMode):
    """Collects the operators that read a tensor on the host, or whose shape hangs on values."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in READING:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def epoch(precision, binary_weights, has_teacher, after_step=lambda: None):
    """An epoch of two optimiser steps, the last one of two parts; returns what runs it."""
    compute = Compute(KERNEL_DEVICE, precision, channels_last=True, normalise=IMAGENET)
    torch.manual_seed(0)
    options = {"width": 0.25, "num_classes": 7, "small_images": True}
    model = build_model("reactnet_a", binary_weights=binary_weights, **options)
    compute.place(model)
    method = plain(compute, 0.1)
    if has_teacher:
        teacher = nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        compute.place_frozen(teacher)
        method = taught(compute, teacher)
    optimizer = build_optimizer("adam", model, 1e-3, 1e-5)
    recorder = Recorder(model, optimizer, level="light", interval=1)
    state = State.new(method, model, optimizer, recorder)
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    labels = torch.tensor([3, 5])
    parts = [(2, True), (4, False), (4, True)]
    batches = [MicroBatch(images, labels, 2, count, last) for count, last in parts]
    bad = FirstBad(KERNEL_DEVICE)
    return lambda: train_one_epoch(state, model, batches, bad, after_step=after_step)


CASES = [
    pytest.param("fp32", True, False, id="labels"),
    pytest.param("bf16", False, True, id="step1-bf16-teacher"),
    pytest.param("fp16", True, True, id="fp16-teacher"),
]


@pytest.mark.parametrize(("precision", "binary_weights", "has_teacher"), CASES)
def test_nothing_is_read_within_a_step(monkeypatch, precision, binary_weights, has_teacher):
    if not HAS_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    run, waits = epoch(precision, binary_weights, has_teacher), Waits()
    with recording() as launches, waits:
        run()
    assert len(launches) > 26 * 8  # all units, forward and backward
    assert waits.seen == []


def test_a_wait_would_be_seen(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    look = torch.ones(3)
    run, waits = epoch("fp32", True, False, after_step=lambda: float(look.sum())), Waits()
    with recording(), waits:
        run()
    assert waits.seen == ["aten._local_scalar_dense.default"] * 2


@pytest.mark.parametrize(("precision", "binary_weights", "has_teacher"), CASES)
def test_a_gpu_is_not_waited_for(gpu, precision, binary_weights, has_teacher):
    run = epoch(precision, binary_weights, has_teacher)
    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
