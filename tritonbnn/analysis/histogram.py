"""Histograms of latent weights over fixed bins, so that epochs and runs can be compared."""

import torch
from torch import Tensor

LIMIT, BINS = 1.5, 300

EDGES = torch.arange(-BINS // 2, BINS // 2 + 1) / (BINS / (2 * LIMIT))
"""(BINS + 1,) float32. Zero is an edge, so that no bin holds both signs."""


def histogram(weight: Tensor) -> Tensor:
    """How many elements lie in each bin [edge, next edge); the end bins take all beyond them.

    Args:
        weight: any shape, floating point.

    Returns:
        int64 (BINS,), on the weight's device; NaN counts in the last bin.
    """
    inner = EDGES[1:-1].to(weight.device)
    bins = torch.bucketize(weight.detach().flatten().float(), inner, right=True)
    return torch.bincount(bins, minlength=BINS)
