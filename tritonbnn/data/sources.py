"""Where images come from: the embedded digits, Fashion-MNIST, or a tree of image files."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from tritonbnn.cli import UserError
from tritonbnn.data import fashion, folder
from tritonbnn.data.images import load_image
from tritonbnn.data.views import (
    AUGMENTATIONS,
    LIGHTINGS,
    EvalTransform,
    TrainTransform,
    sample_generator,
)

NAMES = ("digits", "fashion", "folder")
_FASHION_BORDER = 2  # 28 + 2 * 2 = 32, the nearest legal network input


@dataclass(frozen=True, slots=True)
class SampleKey:
    """What a data set is indexed with. The epoch matters to training images only."""

    epoch: int
    index: int


class Images(Protocol):
    """Labelled images before any transform."""

    @property
    def labels(self) -> np.ndarray:
        """The class of each image, (N,) int64."""

    def image(self, index: int) -> Image.Image:
        """One image as 8-bit RGB or grey."""


_Opened = tuple[tuple[str, ...], Images, Images]


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Grey images (N, H, W) uint8 in memory, shown with a black border of some pixels."""

    pixels: np.ndarray
    labels: np.ndarray
    border: int = 0

    def image(self, index: int) -> Image.Image:
        """One image as 8-bit grey."""
        return ImageOps.expand(Image.fromarray(self.pixels[index]), self.border)


@dataclass(frozen=True, eq=False)
class TrainSet(Dataset):
    """Random views of the training images; a view depends on seed, step, epoch and index only."""

    images: Images
    transform: TrainTransform
    seed: int
    step: int

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int]:
        generator = sample_generator(self.seed, self.step, key.epoch, key.index)
        image = self.transform(self.images.image(key.index), generator)
        return image, int(self.images.labels[key.index])


@dataclass(frozen=True, eq=False)
class EvalSet(Dataset):
    """The fixed view of every validation image."""

    images: Images
    transform: EvalTransform

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int]:
        image = self.transform(self.images.image(key.index))
        return image, int(self.images.labels[key.index])


@dataclass(frozen=True)
class Source:
    """A data set for training. ``train[SampleKey]`` and ``val[SampleKey]`` are (image, label)."""

    name: str
    classes: tuple[str, ...]
    channels: int
    train: TrainSet
    val: EvalSet

    def of_step(self, step: int) -> "Source":
        """The same images with the training views of another step; nothing is read again."""
        return replace(self, train=replace(self.train, step=step))


def open_source(
    name: str,
    *,
    data_dir: Path | None,
    image_size: int,
    augment: str,
    lighting: str,
    seed: int,
    step: int,
    skip_bad_images: bool = False,
) -> Source:
    """Open a data set by name.

    Args:
        name: ``"digits"``, ``"fashion"`` or ``"folder"``. Where ``data_dir`` is a tree of image
            files, the first two open that tree instead, and ``Source.name`` is ``"folder"``.
        data_dir: the image tree, or the folder with Fashion-MNIST's files.
        image_size: height and width of the images handed out.
        augment: see :class:`~tritonbnn.data.views.TrainTransform`.
        lighting: see the same; needs colour images.
        seed: the run's seed.
        step: the training step, 1 or 2.
        skip_bad_images: see :func:`~tritonbnn.data.folder.open_tree`.

    Raises:
        UserError: The data are missing or damaged, or an option does not fit them.
    """
    _check_choice("data set", name, NAMES)
    _check_choice("augment", augment, AUGMENTATIONS)
    _check_choice("lighting", lighting, LIGHTINGS)
    try:
        name = _resolve(name, data_dir)
        classes, train, val = _open(name, data_dir, skip_bad_images)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    channels = folder.CHANNELS if name == "folder" else 1
    if channels == 1 and lighting != "none":
        raise UserError(f"lighting {lighting!r} needs colour images and {name} is grey: use 'none'")
    return Source(
        name,
        classes,
        channels,
        TrainSet(train, TrainTransform(augment, lighting, image_size), seed, step),
        EvalSet(val, EvalTransform(augment, image_size)),
    )


def eval_reader(
    name: str, *, image_size: int, augment: str, channels: int
) -> Callable[[Path], Tensor]:
    """A function from an image file to the network input that the named data set makes of it.

    An image of Fashion-MNIST's own size gets the border that the data set's images have.
    """
    transform = EvalTransform(augment, image_size)

    def read(path: Path) -> Tensor:
        image = load_image(path, channels)
        if name == "fashion" and image.size == (fashion.SIDE, fashion.SIDE):
            image = ImageOps.expand(image, _FASHION_BORDER)
        return transform(image)

    return read


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"unknown {what} {value!r}: choose from {', '.join(choices)}")


def _resolve(name: str, data_dir: Path | None) -> str:
    if data_dir is None:
        return name
    has_files = name == "fashion" and fashion.find(data_dir) is not None
    is_tree = (data_dir / "train").is_dir() or (data_dir / "val").is_dir()
    if name == "digits" or (name == "fashion" and is_tree and not has_files):
        return "folder"
    return name


def _open(name: str, data_dir: Path | None, skip_bad_images: bool) -> _Opened:
    if name == "digits":
        return _open_digits()
    if name == "fashion":
        return _open_fashion(data_dir)
    if data_dir is None:
        raise UserError("no data folder given: pass an image tree as --data-dir")
    return folder.open_tree(data_dir, skip_bad_images=skip_bad_images)


def _open_fashion(data_dir: Path | None) -> _Opened:
    train, val = fashion.load(data_dir)
    border = _FASHION_BORDER
    return fashion.CLASSES, ArrayImages(*train, border), ArrayImages(*val, border)


def _open_digits() -> _Opened:
    with resources.files("tritonbnn.data").joinpath("digits.npz").open("rb") as file:
        arrays = dict(np.load(file))
    test = arrays["test"]
    pixels = np.rint(arrays["images"] * (255 / 16)).astype(np.uint8)
    labels = arrays["labels"].astype(np.int64)
    classes = tuple(str(digit) for digit in range(10))
    return (
        classes,
        ArrayImages(pixels[~test], labels[~test]),
        ArrayImages(pixels[test], labels[test]),
    )
