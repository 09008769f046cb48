"""What an opened data set consists of, and what every opener of one offers."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tritonbnn.data.images import PLAIN, Decoding

Picture = Image.Image | Tensor
"""An image of 8-bit levels: Pillow's RGB or grey, or uint8 (C, H, W)."""


class Images(Protocol):
    """Labelled images before any transform."""

    @property
    def labels(self) -> np.ndarray:
        """The class of each image, (N,) int64."""

    def image(self, index: int) -> Picture:
        """One image as 8-bit RGB or grey."""

    def digest(self) -> str:
        """Says which images these are: others, or the same in another order, have another one."""

    def load(self) -> None:
        """Decode all images into memory, if that is small enough to be worth it."""


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images in memory.

    Args:
        pixels: (N, C, H, W) uint8.
        labels: (N,) int64.
    """

    pixels: np.ndarray
    labels: np.ndarray

    def image(self, index: int) -> Tensor:
        """One image, (C, H, W) uint8."""
        return torch.from_numpy(self.pixels[index])

    def digest(self) -> str:
        """Of all pixels and labels."""
        found = hashlib.sha256(np.ascontiguousarray(self.pixels).data)
        found.update(np.ascontiguousarray(self.labels).data)
        return found.hexdigest()

    def load(self) -> None:
        """They are in memory."""


@dataclass(frozen=True, eq=False)
class Splits:
    """An opened data set.

    Attributes:
        classes: their names; a label is a place in this list.
        train: what is trained on.
        val: what is validated on.
        decoding: how the set's image files are read.
    """

    classes: tuple[str, ...]
    train: Images
    val: Images
    decoding: Decoding = PLAIN


@dataclass(frozen=True)
class Normalisation:
    """What is taken from each channel of pixels in [0, 1], and what it is then divided by."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, views: Tensor) -> Tensor:
        """Normalise a batch where it lies. Every device gives the same bits.

        Args:
            views: (N, C, H, W), uint8, or float32 in about [0, 1].

        Returns:
            (N, C, H, W) float32.
        """
        # Divided by a tensor: a GPU would multiply by the rounded reciprocal of a Python number.
        white, mean, std = (_of_channels(x, views.device) for x in ((255.0,), self.mean, self.std))
        pixels = views.float().div_(white) if views.dtype == torch.uint8 else views.clone()
        return pixels.sub_(mean).div_(std)


@cache
def _of_channels(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """A number for each channel, copied to a device once: a copy in each step would wait for it."""
    return torch.tensor(numbers, device=device).view(-1, 1, 1)


GREY = Normalisation((0.5,), (0.5,))
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Opener(Protocol):
    """A data set that can be opened: a dataclass whose fields are the settings that it takes.

    Attributes:
        title: its name in a message.
        channels: of its images.
        normalisation: of its images.
        side: height and width of its images, where ``border`` black pixels go around them.
        border: these pixels; 0 for none.
    """

    title: ClassVar[str]
    channels: ClassVar[int]
    normalisation: ClassVar[Normalisation]
    side: ClassVar[int]
    border: ClassVar[int]

    def open(self) -> Splits:
        """Find, check and list or read the images.

        Raises:
            UserError: They are missing or damaged, or contradict each other.
            OSError: A file or folder cannot be read.
        """


@dataclass(frozen=True)
class InFolder:
    """The setting of all data sets that are not part of the package.

    Args:
        data_dir: the folder that holds it.
    """

    data_dir: Path | None = None
