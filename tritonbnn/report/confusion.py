"""Which class a network takes for which."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tritonbnn.compute import Compute

_DRAWN = 20  # classes in a picture of the whole matrix


@dataclass(frozen=True)
class Pair:
    """Images of one class that were taken for another.

    Attributes:
        label: index of their class.
        guess: index of the class they were taken for.
        images: how many.
        of: how many images of the class there are.
    """

    label: int
    guess: int
    images: int
    of: int


@dataclass(frozen=True, eq=False)
class Counts:
    """How many images of one class were taken for another: only the pairs that there are.

    All pairs of many classes would take gigabytes.

    Attributes:
        classes: how many there are.
        cells: (pairs,) int64, label * classes + guess, in rising order.
        images: (pairs,) int64, of each.
    """

    classes: int
    cells: Tensor
    images: Tensor

    @property
    def labels(self) -> Tensor:
        """(pairs,) int64."""
        return self.cells // self.classes

    @property
    def guesses(self) -> Tensor:
        """(pairs,) int64."""
        return self.cells % self.classes

    def matrix(self) -> Tensor:
        """(classes, classes) int64; rows are labels, columns guesses."""
        all_cells = torch.zeros(self.classes**2, dtype=torch.int64)
        all_cells[self.cells] = self.images
        return all_cells.view(self.classes, self.classes)


@dataclass(frozen=True, eq=False)
class Confused:
    """What a checkpoint took for what.

    Attributes:
        stage: of the checkpoint.
        classes: their names.
        counts: from :func:`confusion`.
    """

    stage: str
    classes: list[str]
    counts: Counts

    @property
    def is_small(self) -> bool:
        """Whether a picture shows it; else a list of pairs does."""
        return len(self.classes) <= _DRAWN


@torch.no_grad()
def confusion(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], compute: Compute, classes: int
) -> Counts:
    """Count images by their class and the network's first guess.

    Args:
        model: where and as it runs; it is put in eval mode.
        batches: images (N, C, H, W) and labels (N,).
        compute: device and precision.
        classes: how many there are.

    Returns:
        The counts.
    """
    model.eval()
    seen = []
    for images, labels in batches:
        images, labels = compute.to_device(images, labels)
        with compute.autocast():
            guesses = model(images).argmax(dim=1)
        seen.append(labels * classes + guesses)
    cells, images_of = torch.unique(torch.cat(seen), return_counts=True)
    return Counts(classes, cells.cpu(), images_of.cpu())


def most_confused(counts: Counts, count: int) -> list[Pair]:
    """The ``count`` pairs of different classes with most images, those with most first.

    Args:
        counts: from :func:`confusion`.
        count: at most so many pairs.
    """
    of = torch.zeros(counts.classes, dtype=torch.int64)
    of.index_add_(0, counts.labels, counts.images)
    wrong = counts.labels != counts.guesses
    order = torch.argsort(counts.images[wrong], descending=True, stable=True)[:count]
    columns = [x[wrong][order].tolist() for x in (counts.labels, counts.guesses, counts.images)]
    return [
        Pair(row, guess, images, int(of[row])) for row, guess, images in zip(*columns, strict=True)
    ]
