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
class Confused:
    """What a checkpoint took for what.

    Attributes:
        stage: of the checkpoint.
        classes: their names.
        counts: (classes, classes) int64 from :func:`confusion`.
    """

    stage: str
    classes: list[str]
    counts: Tensor

    @property
    def is_small(self) -> bool:
        """Whether a picture shows it; else a list of pairs does."""
        return len(self.classes) <= _DRAWN


@torch.no_grad()
def confusion(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], compute: Compute, classes: int
) -> Tensor:
    """Count images by their class and the network's first guess.

    Args:
        model: where and as it runs; it is put in eval mode.
        batches: images (N, C, H, W) and labels (N,).
        compute: device and precision.
        classes: how many there are.

    Returns:
        (classes, classes) int64 on the CPU; rows are labels, columns guesses.
    """
    model.eval()
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=compute.device)
    for images, labels in batches:
        images, labels = compute.to_device(images, labels)
        with compute.autocast():
            guesses = model(images).argmax(dim=1)
        counts += torch.bincount(labels * classes + guesses, minlength=classes * classes)
    return counts.view(classes, classes).cpu()


def most_confused(matrix: Tensor, count: int) -> list[Pair]:
    """The ``count`` largest entries off the diagonal, largest first; none that is 0.

    Args:
        matrix: (classes, classes) from :func:`confusion`.
        count: at most so many pairs.
    """
    wrong = matrix.clone().fill_diagonal_(0)
    order = torch.argsort(wrong.flatten(), descending=True, stable=True)[:count]
    totals = matrix.sum(dim=1).tolist()
    cells = [divmod(index, len(matrix)) for index in order.tolist()]
    pairs = [Pair(row, column, int(wrong[row, column]), totals[row]) for row, column in cells]
    return [pair for pair in pairs if pair.images]
