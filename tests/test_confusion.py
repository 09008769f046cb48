"""Counting what is taken for what, against a loop in plain Python."""

import torch
from torch import nn

from tritonbnn.compute import Compute
from tritonbnn.report.confusion import Pair, confusion, most_confused

CLASSES = 5


def test_every_image_is_counted_once():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(23, CLASSES, generator=generator)
    labels = torch.randint(CLASSES, (23,), generator=generator)
    model = nn.Sequential(nn.BatchNorm1d(CLASSES)).train()
    batches = list(zip(images.split(7), labels.split(7), strict=True))
    matrix = confusion(model, batches, Compute(torch.device("cpu")), CLASSES)
    expected = [[0] * CLASSES for _ in range(CLASSES)]
    for image, label in zip(images.tolist(), labels.tolist(), strict=True):
        expected[label][image.index(max(image))] += 1
    assert matrix.tolist() == expected
    assert matrix.dtype == torch.int64
    assert not model.training


def test_the_most_confused_come_first():
    matrix = torch.tensor([[9, 2, 0], [5, 1, 3], [0, 0, 4]])
    assert most_confused(matrix, 10) == [Pair(1, 0, 5, 9), Pair(1, 2, 3, 9), Pair(0, 1, 2, 11)]
    assert most_confused(matrix, 1) == [Pair(1, 0, 5, 9)]
    assert matrix.diagonal().tolist() == [9, 1, 4]
    assert most_confused(torch.eye(3, dtype=torch.int64), 4) == []
