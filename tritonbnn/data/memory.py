"""Sets of small images are decoded once: reading a small file takes longer than its view."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from tqdm.auto import tqdm

from tritonbnn.data.images import pixels_of
from tritonbnn.data.splits import Picture

MOST_BYTES = 1 << 29
"""Of a split that is kept decoded: 174,000 images of 32 x 32, or 14,000 of 112 x 112."""

_LOOKED_AT = 64  # images, for their size


@dataclass(frozen=True, eq=False)
class Decoded:
    """Images of any sizes, one after the other in one array.

    Args:
        levels: all their bytes.
        starts: where each begins, and where the last one ends, (N + 1,) int64.
        shapes: (N, 3): channels, height, width.
    """

    levels: np.ndarray
    starts: np.ndarray
    shapes: np.ndarray

    def image(self, index: int) -> Tensor:
        """One image, (C, H, W) uint8."""
        levels = self.levels[self.starts[index] : self.starts[index + 1]]
        return torch.from_numpy(levels.reshape(self.shapes[index]))


def decode_if_small(
    count: int, path: Callable[[int], Path], read: Callable[[int], Picture], name: str
) -> Decoded | None:
    """Decode all images, if they are small together. Some of them say how large they may be.

    Args:
        count: of images.
        path: gives an image's file.
        read: gives the image.
        name: of the set, for the bar.

    Returns:
        The images, or None where they take more than :data:`MOST_BYTES`.
    """
    looked_at = np.linspace(0, count - 1, min(_LOOKED_AT, count)).astype(int)
    if not count or count * np.mean([3 * pixels_of(path(i)) for i in looked_at]) > MOST_BYTES:
        return None
    levels, shapes, size = [], [], 0
    for index in tqdm(range(count), desc=f"reading {name}", unit="img", disable=None):
        image = read(index)
        image = image if isinstance(image, Tensor) else F.pil_to_tensor(image)
        levels.append(image.numpy().ravel())
        shapes.append(image.shape)
        size += levels[-1].size
        if size > 2 * MOST_BYTES:  # those looked at were not like the others
            return None
    starts = np.cumsum([0, *(len(some) for some in levels)])
    return Decoded(np.concatenate(levels), starts, np.array(shapes))
