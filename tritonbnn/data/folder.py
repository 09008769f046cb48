"""Trees of image files: ``train/CLASS/...`` and ``val/CLASS/...``, as torchvision's ImageFolder."""

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from tritonbnn.cli import UserError
from tritonbnn.data.images import BadImageError, load_image
from tritonbnn.data.listing import list_images

CHANNELS = 3
_SCAN_BLOCK = 64
_LAYOUT = "an image tree has train/CLASS/*.jpg and val/CLASS/*.jpg"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FolderImages:
    """The images of one split, read when they are asked for.

    Args:
        root: the split's folder.
        paths: encoded paths below ``root``. One array of bytes, because a list of a million
            strings would be copied into every worker as its reference counts are touched.
        labels: the class of each, (N,) int64.
    """

    root: Path
    paths: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """The file of one image."""
        return self.root / os.fsdecode(self.paths[index])

    def image(self, index: int) -> Image.Image:
        """One image as 8-bit RGB."""
        return load_image(self.path(index), CHANNELS)


def open_tree(
    root: Path, *, skip_bad_images: bool = False
) -> tuple[tuple[str, ...], FolderImages, FolderImages]:
    """List an image tree: class names, training images, validation images.

    Hidden files and folders are left out, files that are no images are counted and logged, and
    links are followed as :func:`~tritonbnn.data.listing.list_images` says. A damaged image is
    found when it is read, unless ``skip_bad_images``: then every file is decoded once, here and by
    every process, and the damaged ones are left out of the lists and logged. What remains depends
    on the files alone, so that all processes, workers and resumed runs agree on every index.

    Raises:
        UserError: The tree is missing, incomplete or contradicts itself.
        OSError: A folder cannot be read.
    """
    classes = _classes_of(root)
    train, val = (_list_split(root / split, classes) for split in ("train", "val"))
    if skip_bad_images:
        train, val = _readable(train), _readable(val)
    for split in (train, val):
        _check_no_class_is_empty(split, classes)
    return classes, train, val


def _classes_of(root: Path) -> tuple[str, ...]:
    if not root.exists():
        raise UserError(f"data folder {root} does not exist: check --data-dir")
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: {_LAYOUT}; check --data-dir")
    if not any(root.iterdir()):
        raise UserError(f"data folder {root} is empty: {_LAYOUT}")
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise UserError(f"data folder {root} has no folder {split}/: {_LAYOUT}")
    train, val = _folders(root / "train"), _folders(root / "val")
    if len(train) < 2:
        found = f"only the class {train[0]}" if train else "no class folder"
        raise UserError(f"{root / 'train'} has {found}: there must be at least two; {_LAYOUT}")
    if train != val:
        odd = sorted(set(train) ^ set(val))
        where = "train" if odd[0] in train else "val"
        raise UserError(
            f"the classes of train/ and val/ in {root} differ in {len(odd)} (the first: {odd[0]},"
            f" only in {where}/): give both the same class folders"
        )
    return train


def _folders(path: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in path.iterdir() if p.is_dir() and p.name[0] != "."))


def _list_split(root: Path, classes: tuple[str, ...]) -> FolderImages:
    listing = list_images(root, classes)
    listing.tell(root)
    per_class = [listing.paths[name] for name in classes]
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in per_class])
    return FolderImages(root, np.array([p for paths in per_class for p in paths], "S"), labels)


def _readable(images: FolderImages) -> FolderImages:
    bad = _find_bad(images)
    if bad:
        logger.warning("skipping %d bad images of %d in %s:", len(bad), len(images), images.root)
    for index, reason in bad.items():
        logger.warning("  %s (%s)", images.path(index), reason)
    good = np.delete(np.arange(len(images)), list(bad))
    return FolderImages(images.root, images.paths[good], images.labels[good])


def _find_bad(images: FolderImages) -> dict[int, str]:
    left = threading.Event()

    def check(block: range) -> dict[int, str]:
        found = {}
        for index in block:
            if left.is_set():  # else whoever interrupts would wait for whole blocks
                break
            try:
                images.image(index)
            except BadImageError as error:
                found[index] = error.reason
        return found

    count = len(images)
    blocks = [range(i, min(i + _SCAN_BLOCK, count)) for i in range(0, count, _SCAN_BLOCK)]
    bad: dict[int, str] = {}
    pool = ThreadPoolExecutor()
    try:
        with tqdm(total=count, desc=f"checking {images.root}", unit="img", disable=None) as bar:
            for block, found in zip(blocks, pool.map(check, blocks), strict=True):
                bad |= found
                bar.update(len(block))
    finally:
        left.set()
        pool.shutdown(cancel_futures=True)
    return bad


def _check_no_class_is_empty(images: FolderImages, classes: tuple[str, ...]) -> None:
    counts = np.bincount(images.labels, minlength=len(classes))
    for name, count in zip(classes, counts, strict=True):
        if count == 0:
            raise UserError(
                f"class folder {images.root / name} holds no readable image: add some, or remove"
                " the class from both train/ and val/"
            )
