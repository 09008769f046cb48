"""Counting what is taken for what, against a loop in plain Python."""

import resource

import torch
from torch import nn

from tritonbnn.compute import Compute
from tritonbnn.report.confusion import Pair, confusion, most_confused

CLASSES, CPU = 5, Compute(torch.device("cpu"))


def test_every_image_is_counted_once():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(23, CLASSES, generator=generator)
    labels = torch.randint(CLASSES, (23,), generator=generator)
    model = nn.Sequential(nn.BatchNorm1d(CLASSES)).train()
    batches = list(zip(images.split(7), labels.split(7), strict=True))
    matrix = confusion(model, batches, CPU, CLASSES).matrix()
    expected = [[0] * CLASSES for _ in range(CLASSES)]
    for image, label in zip(images.tolist(), labels.tolist(), strict=True):
        expected[label][image.index(max(image))] += 1
    assert matrix.tolist() == expected
    assert matrix.dtype == torch.int64
    assert not model.training


def counts(matrix):
    """Of a network that says what its images say."""
    pairs = [(i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) for _ in range(n)]
    labels, guesses = torch.tensor(pairs).T
    images = torch.nn.functional.one_hot(guesses, len(matrix)).float()
    return confusion(nn.Identity(), [(images, labels)], CPU, len(matrix))


def test_the_most_confused_come_first():
    matrix = [[9, 2, 0], [5, 1, 3], [0, 0, 4]]
    found = counts(matrix)
    assert found.matrix().tolist() == matrix
    assert most_confused(found, 10) == [Pair(1, 0, 5, 9), Pair(1, 2, 3, 9), Pair(0, 1, 2, 11)]
    assert most_confused(found, 1) == [Pair(1, 0, 5, 9)]
    assert most_confused(counts([[1, 0], [0, 2]]), 4) == []


def test_many_classes_take_little_memory():
    """Of all pairs of ImageNet-21k's classes alone the counts would be 3.8 GB."""
    classes = 21_841
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    labels = torch.arange(64)
    images = torch.zeros(64, classes)
    images[range(64), labels + 1] = 1
    found = confusion(nn.Identity(), [(images, labels)] * 20, CPU, classes)
    assert most_confused(found, 2) == [Pair(0, 1, 20, 20), Pair(1, 2, 20, 20)]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
