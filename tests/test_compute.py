"""How a network is computed, as far as no other test sees it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet34

from tests.hand import taught
from tritonbnn.compute import Compute, searching_convolutions
from tritonbnn.data.batches import MicroBatch
from tritonbnn.data.splits import IMAGENET

CPU = torch.device("cpu")


def test_more_sizes_of_a_batch_are_compiled_than_torch_does_by_default():
    network = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    limits = torch._dynamo.config
    sizes = range(2, limits.recompile_limit + 5)
    with limits.patch(fail_on_recompile_limit_hit=True):
        Compute(CPU, compiled=True).place(network)
        for size in sizes:
            x = torch.randn(size, 8)
            torch.testing.assert_close(network(x), network.forward(x))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_frozen_network_answers_with_the_same_bits_and_casts_no_weight(precision: str):
    torch.manual_seed(0)
    network = resnet34(num_classes=7).eval().requires_grad_(False)
    frozen, compute = copy.deepcopy(network), Compute(CPU, precision)
    compute.place(network)
    compute.place_frozen(frozen)
    images = torch.randn(3, 3, 33, 35)
    with torch.no_grad(), compute.autocast(), Casts() as casts:
        answers = frozen(images)
    with torch.no_grad(), compute.autocast():
        assert torch.equal(answers, network(images))
    assert casts.shapes <= {tuple(images.shape)}
    assert all(p.dtype == torch.float32 for n, p in frozen.named_parameters() if "bn" in n)


class Casts(TorchDispatchMode):
    """The shapes of all tensors that are cast."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket == torch.ops.aten._to_copy:
            self.shapes.add(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_of_8_bits_are_normalised_on_the_device(channels_last: bool):
    levels = torch.randint(256, (3, 3, 5, 7), dtype=torch.uint8)
    compute = Compute(CPU, channels_last=channels_last, normalise=IMAGENET)
    images, labels = compute.to_device(levels, torch.arange(3))
    assert torch.equal(images, IMAGENET(levels))
    assert images.is_contiguous(memory_format=torch.channels_last) == channels_last
    again, _ = compute.to_device(images, labels)  # what is normalised stays as it is
    assert again is images


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_convolutions_of_a_teacher_are_timed_and_no_others(kind: str):
    class Noting(nn.Module):
        def forward(self, x):
            self.seen = torch.backends.cudnn.benchmark
            return x

    student, teacher = Noting(), Noting()
    batch = MicroBatch(torch.randn(2, 3), torch.zeros(2, dtype=torch.int64), 2, 2, True)
    taught(Compute(torch.device(kind)), teacher).losses(student, batch)
    assert (student.seen, teacher.seen) == (False, kind == "cuda")


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_convolutions_are_timed_for_a_gpu(monkeypatch, before: bool, kind: str):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)

    def fail():
        with searching_convolutions(torch.device(kind)):
            assert torch.backends.cudnn.benchmark == (before or kind == "cuda")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.backends.cudnn.benchmark == before
