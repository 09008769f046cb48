"""Image transforms whose every random choice is drawn from a generator that is passed in.

A training sample is a function of ``(seed, step, epoch, index)``: :func:`sample_generator` makes
its generator, and nothing here touches a global one. So the number of workers, a resume and the
number of processes change no sample.

The crop and the flip draw what torchvision's own transforms draw, in the same order: equally
seeded, ``TrainTransform("imagenet", "none", 224)`` equals ``RandomResizedCrop(224)`` followed by
``RandomHorizontalFlip()``.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

AUGMENTATIONS = ("imagenet", "crop-flip", "crop", "none")
_FLIPPED = ("imagenet", "crop-flip")
LIGHTINGS = ("published", "pca", "none")

_NORMALISATION = {
    1: ((0.5,), (0.5,)),
    3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_CROP_SCALE = (0.08, 1.0)
_CROP_RATIO = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10
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

Box = tuple[int, int, int, int]


def sample_generator(seed: int, step: int, epoch: int, index: int) -> torch.Generator:
    """The generator that draws everything random about one training sample."""
    entropy = np.random.SeedSequence((seed, step, epoch, index))
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


@dataclass(frozen=True)
class TrainTransform:
    """A random view of a PIL image as a normalised float32 (C, H, W) tensor.

    Args:
        augment: ``"imagenet"`` (random-resized crop and flip), ``"crop-flip"`` (the image fitted to
            ``image_size``, shifted by up to an eighth of it over a black border, and flipped),
            ``"crop"`` (the same without the flip, which would change a digit) or ``"none"``.
        lighting: colour noise along ImageNet's principal components, std 0.1. ``"pca"`` adds it to
            pixels in [0, 1], as it was meant. ``"published"`` adds the same numbers to 8-bit
            pixels and truncates, as AdamBNN's code did: in effect each channel drops by one grey
            level with probability 0.5. ``"none"`` leaves the colours alone.
        image_size: height and width of the result.
    """

    augment: str
    lighting: str
    image_size: int

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        image = self._crop(image, generator)
        shift = None if self.lighting == "none" else _colour_shift(generator)
        if self.augment in _FLIPPED and torch.rand(1, generator=generator).item() < 0.5:
            image = F.hflip(image)
        if shift is None:
            return _normalise(F.to_tensor(image))
        if self.lighting == "published":
            return _normalise(F.to_tensor(_shift_8_bit(image, shift)))
        return _normalise(F.to_tensor(image) + shift.float().view(3, 1, 1))

    def _crop(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        size = self.image_size
        if self.augment == "imagenet":
            box = random_resized_box(image.width, image.height, generator)
            return F.resized_crop(image, *box, [size, size], InterpolationMode.BILINEAR)
        image = _fit(image, size)
        if self.augment in ("crop-flip", "crop"):
            border = size // 8
            top = int(torch.randint(0, 2 * border + 1, (1,), generator=generator))
            left = int(torch.randint(0, 2 * border + 1, (1,), generator=generator))
            image = F.crop(F.pad(image, [border]), top, left, size, size)
        return image


@dataclass(frozen=True)
class EvalTransform:
    """The fixed view of a PIL image as a normalised float32 (C, H, W) tensor.

    With ``augment="imagenet"`` the shorter side is resized to 256/224 of ``image_size`` before the
    centre crop; otherwise to ``image_size`` itself, so that small images keep their borders.
    """

    augment: str
    image_size: int

    def __call__(self, image: Image.Image) -> Tensor:
        margin = 256 / 224 if self.augment == "imagenet" else 1
        return _normalise(F.to_tensor(_fit(image, self.image_size, margin)))


def random_resized_box(width: int, height: int, generator: torch.Generator) -> Box:
    """A crop (top, left, height, width): 8 to 100 % of the area, aspect ratio 3/4 to 4/3."""
    log_ratio = torch.tensor(_CROP_RATIO).log().tolist()
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * torch.empty(1).uniform_(*_CROP_SCALE, generator=generator).item()
        ratio = torch.empty(1).uniform_(*log_ratio, generator=generator).exp().item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,), generator=generator))
            left = int(torch.randint(0, width - w + 1, (1,), generator=generator))
            return top, left, h, w
    return _central_box(width, height)


def _central_box(width: int, height: int) -> Box:
    narrowest, widest = _CROP_RATIO
    w, h = width, height
    if width / height < narrowest:
        h = round(width / narrowest)
    elif width / height > widest:
        w = round(height * widest)
    return (height - h) // 2, (width - w) // 2, h, w


def _fit(image: Image.Image, size: int, margin: float = 1) -> Image.Image:
    """The central square, the image's shorter side resized to ``margin`` times ``size``."""
    shorter = round(size * margin)
    if max(image.size) > _THIN * min(image.size):
        return _fit_thin(image, size, shorter)
    image = F.resize(image, [shorter], InterpolationMode.BILINEAR)
    return F.center_crop(image, [size, size])


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


def _colour_shift(generator: torch.Generator) -> Tensor:
    strength = torch.randn(3, generator=generator, dtype=torch.float64) * _PCA_STD
    return _PCA_VECTORS @ (_PCA_VALUES * strength)


def _shift_8_bit(image: Image.Image, shift: Tensor) -> Image.Image:
    levels = np.arange(256.0) + shift.numpy()[:, None]
    return image.point(np.clip(levels, 0, 255).astype(np.uint8).ravel().tolist())


def normalisation(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation by which pixels in [0, 1] of so many channels are normalised."""
    return _NORMALISATION[channels]


def _normalise(pixels: Tensor) -> Tensor:
    mean, std = normalisation(len(pixels))
    return F.normalize(pixels, list(mean), list(std), inplace=True)
