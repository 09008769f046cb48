"""Losses and right answers, summed on the device and read only once in a while."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritonbnn.compute import Compute
from tritonbnn.distributed import World

TOP = 5


class TrainMeter:
    """Loss and correct answers of an epoch so far, in this process.

    Attributes:
        sums: loss, right answers, images; float64, so that counts stay exact.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, losses: Tensor, logits: Tensor | None, labels: Tensor) -> None:
        """Count images by their losses (N,), logits (N, classes) and labels (N,).

        Without logits nothing was classified, and the count of right answers becomes NaN.
        """
        loss = losses.detach().double().sum()
        images = torch.full_like(loss, len(labels))
        right = torch.full_like(loss, torch.nan)
        if logits is not None:
            right = (logits.argmax(dim=1) == labels).sum().double()
        self.sums += torch.stack((loss, right, images))

    def clear(self) -> None:
        """Begin an epoch."""
        self.sums.zero_()


@dataclass(frozen=True)
class Evaluation:
    """What a network scored on the validation images.

    Attributes:
        loss: mean cross-entropy with the labels.
        top1: percent of the images whose label is the first guess; None where nothing is
            classified. The least loss makes the best checkpoint then.
        top5: percent whose label is among the first five guesses; None where there are no more than
            five classes, as every label is among these.
        images: how many were counted.
    """

    loss: float
    top1: float | None
    top5: float | None
    images: int

    @property
    def merit(self) -> float:
        """What the best checkpoint has most of."""
        return -self.loss if self.top1 is None else self.top1


def evaluation_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss, first guesses right, five guesses right and images of a batch, float64 (4,)."""
    losses = F.cross_entropy(logits.double(), labels, reduction="sum")
    guesses = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
    right = guesses == labels[:, None]
    images = torch.full_like(losses, len(labels))
    return torch.stack((losses, right[:, 0].sum().double(), right.sum().double(), images))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    compute: Compute,
    world: World,
) -> Evaluation:
    """Score the model on batches that, over all processes, hold every image once."""
    model.eval()
    classes = 0
    sums = torch.zeros(4, dtype=torch.float64, device=compute.device)
    for images, labels in batches:
        images, labels = compute.to_device(images, labels)
        with compute.autocast():
            logits = model(images)
        sums += evaluation_sums(logits, labels)
        classes = logits.shape[1]
    loss, first, five, images_seen = world.total(sums.cpu()).tolist()
    [classes] = world.agree(classes)  # a process may have had no images
    if not images_seen:
        raise ValueError("there are no images to evaluate on")
    return Evaluation(
        loss=loss / images_seen,
        top1=100 * first / images_seen,
        top5=100 * five / images_seen if classes > TOP else None,
        images=int(images_seen),
    )
