"""Order, sharding and loaders, against the whole batch cut by hand."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tritonbnn.cli import UserError
from tritonbnn.data.batches import epoch_order, train_batches, train_steps, val_batches
from tritonbnn.data.sources import SampleKey, open_source


class Numbers:
    """Image i is the number i, and so is its label; the keys that were read are noted."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.read: list[SampleKey] = []

    def __len__(self) -> int:
        return self.size

    def batch(self, keys: list[SampleKey]) -> tuple[torch.Tensor, torch.Tensor]:
        self.read += keys
        numbers = torch.tensor([key.index for key in keys])
        return numbers.float().view(-1, 1, 1, 1), numbers


def batches(size: int, **options) -> list:
    defaults = {"seed": 0, "step": 1, "epoch": 0, "batch_size": 8}
    return list(train_batches(Numbers(size), **{**defaults, **options}))


def by_step(micro_batches: list) -> list[list]:
    steps: list[list] = [[]]
    for batch in micro_batches:
        steps[-1].append(batch)
        if batch.last:
            steps.append([])
    assert not steps.pop()
    return steps


def digits(**options):
    defaults = {"image_size": 16, "augment": "crop-flip", "lighting": "none", "seed": 0, "step": 1}
    return open_source("digits", data_dir=None, **{**defaults, **options})


def test_epoch_order_is_a_permutation_of_its_four_numbers():
    order = epoch_order(0, 1, 0, 1000)
    assert sorted(order) == list(range(1000))
    np.testing.assert_array_equal(epoch_order(0, 1, 0, 1000), order)
    for other in [(1, 1, 0), (0, 2, 0), (0, 1, 1)]:
        # a random permutation has one fixed point on average; ten have probability 1e-7
        assert (epoch_order(*other, 1000) == order).sum() < 10


@pytest.mark.parametrize(
    ("size", "batch_size", "accumulation", "world_size"),
    [
        (32, 8, 1, 1),
        (37, 8, 1, 1),
        (37, 8, 3, 1),
        (37, 8, 1, 3),
        (37, 8, 2, 3),
        (33, 8, 2, 4),  # the last global batch has one image for four processes
        (35, 8, 4, 2),  # and here three images for two processes of four parts
        (5, 100, 7, 5),
    ],
)
def test_every_image_is_seen_once_and_weighs_the_same(size, batch_size, accumulation, world_size):
    options = {"batch_size": batch_size, "accumulation": accumulation, "world_size": world_size}
    ranks = [by_step(batches(size, rank=rank, **options)) for rank in range(world_size)]
    order = epoch_order(0, 1, 0, size)
    assert {len(steps) for steps in ranks} == {train_steps(size, batch_size)}
    for number, shares in enumerate(zip(*ranks, strict=True)):
        whole = order[number * batch_size : (number + 1) * batch_size]
        parts = [part for share in shares for part in share]
        assert {len(share) for share in shares} == {min(accumulation, -(-len(whole) // world_size))}
        real = [label for part in parts if part.count for label in part.labels.tolist()]
        assert real == whole.tolist()
        assert {part.global_count for part in parts} == {len(whole)}
        assert all(part.count for part in shares[0])
        for part in parts:
            assert len(part.images) == len(part.labels) == max(part.count, 1)
        sizes = [sum(part.count for part in share) for share in shares]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1
        mean = sum(p.images.sum().item() * (p.count > 0) / p.global_count for p in parts)
        assert mean == pytest.approx(whole.mean())


def test_a_started_epoch_is_entered_without_reading_what_is_done():
    whole = by_step(batches(37, accumulation=2, epoch=3))
    dataset = Numbers(37)
    options = {"seed": 0, "step": 1, "epoch": 3, "batch_size": 8, "accumulation": 2}
    rest = by_step(list(train_batches(dataset, **options, start_batch=2)))
    for ours, expected in zip(rest, whole[2:], strict=True):
        for a, b in zip(ours, expected, strict=True):
            assert torch.equal(a.images, b.images)
            assert (a.count, a.global_count, a.last) == (b.count, b.global_count, b.last)
    assert dataset.read == [SampleKey(3, int(i)) for i in epoch_order(0, 1, 3, 37)[16:]]
    assert batches(37, start_batch=5) == []


@pytest.mark.parametrize(("size", "batch_size", "world_size"), [(37, 8, 1), (37, 8, 3), (2, 8, 3)])
def test_validation_sees_each_image_once(size, batch_size, world_size):
    seen = []
    for rank in range(world_size):
        dataset = Numbers(size)
        for images, labels in val_batches(
            dataset, batch_size=batch_size, rank=rank, world_size=world_size
        ):
            assert 1 <= len(images) == len(labels) <= -(-batch_size // world_size)
            seen += labels.tolist()
    assert sorted(seen) == list(range(size))


def test_workers_and_processes_change_no_sample_and_no_generator():
    source = digits()
    options = {"seed": 0, "step": 1, "epoch": 1, "batch_size": 512}
    before = torch.get_rng_state()
    alone = [b.images for b in train_batches(source.train, **options)]
    helped = [b.images for b in train_batches(source.train, **options, workers=2)]
    halves = [
        [b.images for b in train_batches(source.train, **options, rank=rank, world_size=2)]
        for rank in range(2)
    ]
    assert torch.equal(torch.cat(alone), torch.cat(helped))
    assert [len(images) for images in alone] == [len(images) for images in helped]
    for whole, *shares in zip(alone, *halves, strict=True):
        assert torch.equal(whole, torch.cat(shares))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("size", "batch_size"), [(3, 8), (30, 3)])
def test_too_few_images_for_the_processes_are_refused(size, batch_size):
    with pytest.raises(UserError, match="4 processes"):
        batches(size, batch_size=batch_size, world_size=4)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_one_line_even_from_a_worker(tmp_path, workers):
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    bad = tmp_path / "train" / "bee" / "0.png"
    bad.write_bytes(b"")
    source = open_source(
        "images", data_dir=tmp_path, image_size=8, augment="none", lighting="none", seed=0, step=1
    )
    with pytest.raises(UserError) as error:
        list(train_batches(source.train, seed=0, step=1, epoch=0, batch_size=2, workers=workers))
    assert str(error.value).startswith(f"{bad} cannot be read as an image (it is empty)")
    assert "\n" not in str(error.value)
    assert multiprocessing.active_children() == []


def test_an_abandoned_epoch_leaves_no_worker():
    options = {"seed": 0, "step": 1, "epoch": 0, "batch_size": 64, "workers": 2}
    loader = train_batches(digits().train, **options)
    next(loader)
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    assert multiprocessing.active_children() == []


SCRIPT = """
import signal, sys
from tests.test_data import digits
from tritonbnn.data.batches import train_batches

caught = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda n, frame: caught.append(n))
loader = train_batches(digits().train, seed=0, step=1, epoch=0, batch_size=64, workers=2)
seen = next(loader).count
print("ready", flush=True)
sys.stdin.readline()
if sys.argv[1] == "fail":
    raise RuntimeError("a mistake of ours")
seen += sum(batch.count for batch in loader)
print(seen, sorted(caught))
"""


@pytest.fixture
def start():
    """A function that runs SCRIPT in a session of its own, up to its first batch."""
    started = []

    def run(ending: str) -> subprocess.Popen:
        root = Path(__file__).parents[1]
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, ending],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
def test_workers_outlive_a_signal_to_the_group(start):
    process = start("go on")
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(process.pid, number)
    out, err = process.communicate("\n", timeout=120)
    assert out == f"1437 [{signal.SIGINT:d}, {signal.SIGTERM:d}]\n"
    assert err == ""


def test_workers_end_with_a_process_that_fails(start):
    process = start("fail")
    _, err = process.communicate("\n", timeout=120)
    assert process.returncode == 1
    assert err.rstrip().endswith("RuntimeError: a mistake of ours")
