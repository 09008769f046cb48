"""What a network sees of an image: a fixed view to evaluate on, and random views to train on.

The random transforms are torchvision's (``torchvision.transforms.v2``). They draw from torch's
default generator. :func:`seeded` seeds it for one sample, and puts its state back afterwards. So a
training sample is a function of ``(seed, step, epoch, index)``, and the number of workers, a resume
and the number of processes change none.

Views are 8-bit as long as they can be. A batch of them becomes float32 and is normalised at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from tritonbnn.data.splits import Picture

_THIN = 16  # times as long as wide; no photograph is

# Principal components of ImageNet's colours, for pixels in [0, 1] (Krizhevsky et al., 2012).
_PCA_VALUES = torch.tensor([0.2175, 0.0188, 0.0045], dtype=torch.float64)
_PCA_VECTORS = torch.tensor(
    [
        [-0.5675, 0.7192, 0.4009],
        [-0.5808, -0.0045, -0.8140],
        [-0.5836, -0.6948, 0.4203],
    ],
    dtype=torch.float64,
)
_PCA_STD = 0.1

Step = Callable[[Any], Any]  # from image to image, from an image to its pixels, or on these


def sample_seed(seed: int, step: int, epoch: int, index: int) -> int:
    """What seeds everything random about one training sample: a number of 64 bits."""
    entropy = np.random.SeedSequence((seed, step, epoch, index))
    return int(entropy.generate_state(1, np.uint64)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's default generator on the CPU, and put its state back afterwards."""
    generator = torch.default_generator  # torch.manual_seed would seed all GPUs too
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


@dataclass(frozen=True)
class Fit:
    """The central square as uint8 (C, ``size``, ``size``).

    Args:
        size: height and width of the result.
        margin: the shorter side is resized to this times ``size`` before the crop.
    """

    size: int
    margin: float = 1

    def __call__(self, image: Picture) -> Tensor:
        shorter = round(self.size * self.margin)
        if isinstance(image, Tensor) and image.shape[1:] == (shorter, shorter) == (self.size,) * 2:
            return image
        image = as_pillow(image)
        if max(image.size) > _THIN * min(image.size):
            return F.pil_to_tensor(_fit_thin(image, self.size, shorter))
        image = F.resize(image, [shorter], InterpolationMode.BILINEAR)
        return F.pil_to_tensor(F.center_crop(image, [self.size, self.size]))


@dataclass(frozen=True)
class Augmentation:
    """Views of one kind.

    Attributes:
        random: makes the random steps from the views' size.
        margin: of the fixed view, see :class:`Fit`.
    """

    random: Callable[[int], list[Step]]
    margin: float = 1


def as_pillow(image: Picture) -> Image.Image:
    """The image as Pillow has it, whose way of resizing is the one that counts."""
    return F.to_pil_image(image) if isinstance(image, Tensor) else image


def _resized_crop_and_flip(size: int) -> list[Step]:
    crop = v2.RandomResizedCrop(size, interpolation=InterpolationMode.BILINEAR)
    return [as_pillow, crop, F.pil_to_tensor, v2.RandomHorizontalFlip()]


def _padded_crop(size: int) -> list[Step]:
    return [Fit(size), v2.RandomCrop(size, padding=size // 8)]


AUGMENTATIONS: dict[str, Augmentation] = {
    # 8 to 100 % of the area, aspect ratio 3/4 to 4/3, and flipped half the time
    "imagenet": Augmentation(_resized_crop_and_flip, margin=256 / 224),
    # shifted by up to an eighth over a black border, and flipped half the time
    "crop-flip": Augmentation(lambda size: [*_padded_crop(size), v2.RandomHorizontalFlip()]),
    # without the flip, which would change a digit
    "crop": Augmentation(_padded_crop),
    # the fixed view
    "none": Augmentation(lambda size: [Fit(size)]),
}


def _shift_8_bit(pixels: Tensor) -> Tensor:
    """Add the colour noise to 8-bit levels and truncate, as AdamBNN's published code did.

    In effect each channel drops by one grey level with probability 0.5.
    """
    shift = _colour_shift().floor().to(torch.int16)
    return (pixels + shift.view(3, 1, 1)).clamp_(0, 255).to(torch.uint8)


def _shift(pixels: Tensor) -> Tensor:
    """Add the colour noise to pixels in [0, 1], as it was meant."""
    return pixels.float().div_(255).add_(_colour_shift().float().view(3, 1, 1))


LIGHTING: dict[str, Callable[[Tensor], Tensor] | None] = {
    "published": _shift_8_bit,
    "pca": _shift,
    "none": None,
}


@dataclass(frozen=True)
class TrainView:
    """A random view of an image, drawn from torch's default generator.

    Args:
        augment: of :data:`AUGMENTATIONS`.
        lighting: of :data:`LIGHTING`: colour noise along ImageNet's principal components, with
            standard deviation 0.1. Needs colour images.
        image_size: height and width of the result.
    """

    augment: str
    lighting: str
    image_size: int

    def __call__(self, image: Picture) -> Tensor:
        """Draw a view of an image: uint8 (C, H, W), or float32 in [0, 1] after "pca"."""
        result: Any = image
        for step in self._steps:
            result = step(result)
        return result

    @property
    def eight_bit(self) -> bool:
        """Whether views are uint8."""
        return LIGHTING[self.lighting] is not _shift

    @cached_property
    def _steps(self) -> list[Step]:
        steps = AUGMENTATIONS[self.augment].random(self.image_size)
        if noise := LIGHTING[self.lighting]:
            # the noise is drawn before the flip: so drew the published code
            steps.insert(len(steps) - isinstance(steps[-1], v2.RandomHorizontalFlip), noise)
        return steps


def eval_view(augment: str, image_size: int) -> Fit:
    """The fixed view of an image.

    With "imagenet" the shorter side is resized to 256/224 of ``image_size`` before the centre crop.
    Otherwise it is resized to ``image_size`` itself, so that small images keep their borders.
    """
    return Fit(image_size, AUGMENTATIONS[augment].margin)


def _fit_thin(image: Image.Image, size: int, shorter: int) -> Image.Image:
    """The same square without the whole resized image, which could take gigabytes.

    Pillow rounds a box to float32, so a pixel may differ by a grey level from resize and crop.
    """
    box = []
    for length in image.size:
        resized = int(shorter * length / min(image.size))
        start = round((resized - size) / 2)
        box.append((start * length / resized, min((start + size) * length / resized, length)))
    (left, right), (top, bottom) = box
    return image.resize((size, size), Image.Resampling.BILINEAR, (left, top, right, bottom))


def _colour_shift() -> Tensor:
    """What is added to red, green and blue, (3,) float64."""
    strength = torch.randn(3, dtype=torch.float64) * _PCA_STD
    return _PCA_VECTORS @ (_PCA_VALUES * strength)
