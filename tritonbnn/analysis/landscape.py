"""The loss around trained weights, on a grid along two random directions.

Directions are filter-normalised (Li et al. 2018, arXiv 1712.09913; methods 1.11): each filter of a
direction has the norm of the network's own filter, so one unit along an axis moves every filter by
its own length, and networks of differently scaled weights can be compared. What has one dimension,
BatchNorm's weights, biases, shifts and slopes, stays where it is. Where weights are binary the
latent weights move and are binarised again.

BatchNorm takes the statistics of the batch that the loss is measured on. Running averages belong
to the weights in the middle: a few flipped signs shift a binary layer's integer sums, and with old
averages the picture would show this mismatch, which training, where every step has the statistics
of its own batch, never meets. The price: the loss in the middle is that of training mode and not
quite the one that evaluation gives.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Landscape:
    """The loss on a square grid.

    Attributes:
        axis: (P,) float64, positions along both directions, in lengths of each filter.
        loss: (P, P) float64, mean cross-entropy; the first index is along the second direction.
        images: how many the loss was measured on.
    """

    axis: np.ndarray
    loss: np.ndarray
    images: int


def landscape(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    points: int,
    radius: float = 1.0,
    seed: int = 0,
    after_point: Callable[[], None] | None = None,
) -> Landscape:
    """Measure the loss around a network's weights. The network itself is not touched.

    Args:
        model: where and as it runs.
        images: (N, C, H, W) on the model's device.
        labels: (N,) int64 on the same.
        points: P, along each direction; odd, for the middle to be the network itself.
        radius: the axes run from -radius to radius.
        seed: of the directions; networks of the same shapes get the same ones before scaling.
        after_point: called when one of the ``points ** 2`` losses is known.

    Raises:
        ValueError: ``points`` is not an odd number of at least 3.
    """
    if points < 3 or points % 2 == 0:
        raise ValueError(f"points must be odd and at least 3, not {points}")
    moved = copy.deepcopy(model).train().requires_grad_(False)
    centre = {n: w.clone() for n, w in moved.named_parameters() if w.dim() > 1}
    across, along = filter_directions(centre, seed, 0), filter_directions(centre, seed, 1)
    axis = np.linspace(-radius, radius, points)
    loss = np.empty((points, points))
    for row, column in np.ndindex(points, points):
        x, y = float(axis[column]), float(axis[row])
        for name, weight in moved.named_parameters():
            if name in centre:
                weight.copy_(centre[name] + x * across[name] + y * along[name])
        loss[row, column] = _mean_loss(moved, images, labels)
        if after_point:
            after_point()
    return Landscape(axis, loss, len(labels))


def filter_directions(weights: dict[str, Tensor], seed: int, number: int) -> dict[str, Tensor]:
    """A random direction; each filter (first index) has the norm of the weights' own filter.

    Args:
        weights: by name, two or more dimensions each.
        seed: of all directions.
        number: which one.
    """
    generator = torch.Generator().manual_seed(2 * seed + number)
    directions = {}
    for name, weight in weights.items():
        direction = torch.randn(weight.shape, generator=generator).to(weight)
        dims = tuple(range(1, weight.dim()))
        norms = [torch.linalg.vector_norm(t, dim=dims, keepdim=True) for t in (weight, direction)]
        directions[name] = direction * (norms[0] / norms[1])
    return directions


@torch.no_grad()
def _mean_loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    loss = float(F.cross_entropy(model(images).double(), labels))
    return loss if math.isfinite(loss) else math.nan
