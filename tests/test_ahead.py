"""Batches that are sent one ahead: all of them, in order, and none too early."""

import multiprocessing

import pytest
import torch

from tests.commands import write_tree
from tritonbnn.cli import UserError
from tritonbnn.data.ahead import ahead, one_ahead
from tritonbnn.data.batches import MicroBatch, epoch_order, train_batches, val_batches
from tritonbnn.data.sources import open_source
from tritonbnn.data.splits import GREY, IMAGENET, Normalisation

CPU = torch.device("cpu")


class Road:
    """What is under way; no more than two at a time, and received in the order of sending."""

    def __init__(self):
        self.open = []

    def send(self, item):
        self.open.append(item)
        assert len(self.open) <= 2
        return ("sent", item)

    def receive(self, sent):
        assert sent == ("sent", self.open.pop(0))
        return sent[1]


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_all_come_in_order_and_one_is_on_its_way(count):
    road = Road()
    seen = []
    for item in one_ahead(range(count), road.send, road.receive):
        seen.append(item)
        assert road.open == ([item + 1] if item + 1 < count else [])
    assert seen == list(range(count))


@pytest.mark.parametrize("good", [0, 1, 3])
def test_an_error_waits_until_what_was_sent_is_used(good):
    def items():
        yield from range(good)
        raise OSError("the disk is gone")

    road, seen = Road(), []

    def use():
        for item in one_ahead(items(), road.send, road.receive):
            seen.append(item)

    with pytest.raises(OSError, match="the disk is gone"):
        use()
    assert seen == list(range(good))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_comes_after_the_batch_before_it(tmp_path, workers):
    write_tree(tmp_path, train=3, val=1)
    order = {"seed": 0, "step": 1, "epoch": 0, "batch_size": 2}
    bad = sorted((tmp_path / "train").glob("*/*"))[epoch_order(0, 1, 0, 6)[3]]
    bad.write_bytes(b"")
    source = open_source("images", data_dir=tmp_path, image_size=16, augment="none")
    seen, road = [], Road()

    def use():
        batches = train_batches(source.train, **order, workers=workers, levels=True)
        for batch in one_ahead(batches, road.send, road.receive):
            seen.append(batch)

    with pytest.raises(UserError, match=bad.name):
        use()
    assert [len(batch.images) for batch in seen] == [2]
    assert multiprocessing.active_children() == []


def images_of(**options):
    defaults = {"image_size": 16, "augment": "crop-flip", "seed": 0, "step": 1}
    return open_source("digits", **{**defaults, **options})


def test_levels_normalised_later_are_the_same_bits():
    source = images_of()
    options = {"seed": 0, "step": 1, "epoch": 2, "batch_size": 500}
    normalised = list(train_batches(source.train, **options))
    raw = list(ahead(train_batches(source.train, **options, levels=True), CPU))
    assert len(raw[-1].images) not in (0, 500)  # the odd last one too
    for a, b in zip(normalised, raw, strict=True):
        assert (a.images.dtype, b.images.dtype) == (torch.float32, torch.uint8)
        assert torch.equal(a.images, source.train.normalisation(b.images))
        assert torch.equal(a.labels, b.labels)
        assert (a.count, a.global_count, a.last) == (b.count, b.global_count, b.last)
    pairs = zip(
        val_batches(source.val, batch_size=100),
        ahead(val_batches(source.val, batch_size=100, levels=True), CPU),
        strict=True,
    )
    for (a, labels), (b, same) in pairs:
        assert torch.equal(a, source.val.normalisation(b))
        assert torch.equal(labels, same)


def test_views_without_8_bits_come_normalised(tmp_path):
    write_tree(tmp_path, train=3, val=1)
    options = {"image_size": 16, "augment": "none", "lighting": "pca", "seed": 0, "step": 1}
    source = open_source("images", data_dir=tmp_path, **options)
    order = {"seed": 0, "step": 1, "epoch": 0, "batch_size": 4}
    assert not source.train.transform.eight_bit
    for a, b in zip(
        train_batches(source.train, **order),
        train_batches(source.train, **order, levels=True),
        strict=True,
    ):
        assert torch.equal(a.images, b.images)


@pytest.mark.parametrize("normalisation", [GREY, IMAGENET])
def test_normalisation_is_what_it_was(normalisation: Normalisation):
    """The arithmetic of Python's numbers, on every level."""
    channels = len(normalisation.mean)
    levels = torch.arange(256, dtype=torch.uint8).view(2, 1, 16, 8).repeat(1, channels, 1, 1)
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (normalisation.mean, normalisation.std))
    expected = (levels.float() / 255 - mean) / std
    assert torch.equal(normalisation(levels), expected)
    pixels = levels.float() / 255
    before = pixels.clone()
    assert torch.equal(normalisation(pixels), expected)
    assert torch.equal(pixels, before)


def batches_of_every_kind():
    generator = torch.Generator().manual_seed(0)
    for count in (5, 5, 3):
        levels = torch.randint(256, (count, 3, 7, 9), generator=generator, dtype=torch.uint8)
        yield MicroBatch(levels.pin_memory(), torch.arange(count).pin_memory(), count, count, True)


@pytest.mark.gpu
def test_a_gpu_gets_the_same_batches(gpu):
    for a, b in zip(ahead(batches_of_every_kind(), gpu), batches_of_every_kind(), strict=True):
        assert a.images.device.type == "cuda"
        assert torch.equal(a.images.cpu(), b.images)
        assert torch.equal(a.labels.cpu(), b.labels)
        assert (a.count, a.global_count, a.last) == (b.count, b.global_count, b.last)


@pytest.mark.gpu
@pytest.mark.parametrize("normalisation", [GREY, IMAGENET])
def test_a_gpu_normalises_to_the_same_bits(gpu, normalisation: Normalisation):
    channels = len(normalisation.mean)
    levels = torch.arange(256, dtype=torch.uint8).view(2, 1, 16, 8).repeat(1, channels, 1, 1)
    assert torch.equal(normalisation(levels.to(gpu)).cpu(), normalisation(levels))
