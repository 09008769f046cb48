"""Sums kept on the device, and read only once in a while."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

TOP = 5


class TrainMeter:
    """Loss and correct answers of an epoch so far, in this process.

    Attributes:
        sums: loss, right answers, images; float64, so that counts stay exact.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, losses: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count images by their losses (N,), logits (N, classes) and labels (N,)."""
        right = (logits.argmax(dim=1) == labels).sum()
        images = torch.full_like(right, len(labels))
        self.sums += torch.stack((losses.detach().double().sum(), right.double(), images.double()))

    def clear(self) -> None:
        """Begin an epoch."""
        self.sums.zero_()


class FirstBad:
    """The first optimiser step whose loss was not finite, noted without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._index = torch.full((), -1, dtype=torch.int64, device=device)

    def note(self, loss: Tensor, index: int) -> None:
        """Look at the loss of optimiser step ``index``."""
        fresh = (self._index < 0) & ~torch.isfinite(loss.detach())
        self._index.masked_fill_(fresh, index)

    def read(self) -> int | None:
        """Its index, or None. Waits for the device."""
        index = int(self._index)
        return None if index < 0 else index


@dataclass(frozen=True)
class Evaluation:
    """What a network scored on the validation images.

    Attributes:
        loss: mean cross-entropy with the labels.
        top1: percent of the images whose label is the first guess.
        top5: percent whose label is among the first five, or among all where there are fewer.
        images: how many were counted.
    """

    loss: float
    top1: float
    top5: float
    images: int


def evaluation_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss, first guesses right, five guesses right and images of a batch, float64 (4,)."""
    losses = F.cross_entropy(logits.double(), labels, reduction="sum")
    guesses = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
    right = guesses == labels[:, None]
    images = torch.full_like(losses, len(labels))
    return torch.stack((losses, right[:, 0].sum().double(), right.sum().double(), images))
