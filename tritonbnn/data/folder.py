"""Trees of image files: ``train/CLASS/...`` and ``val/CLASS/...``, as torchvision's ImageFolder."""

import hashlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from tqdm.auto import tqdm

from tritonbnn.cli import UserError
from tritonbnn.data.classes import CLASS_ORDERS, odd_class
from tritonbnn.data.flat import complain_of_flat
from tritonbnn.data.images import (
    PLAIN,
    WHITE_16_BITS,
    BadImageError,
    Decoding,
    brightest,
    load_image,
)
from tritonbnn.data.listing import is_left_out, list_images
from tritonbnn.data.memory import Decoded, decode_if_small
from tritonbnn.data.splits import IMAGENET, InFolder, Normalisation, Picture, Splits

CHANNELS = 3
VAL_NAMES = ("val", "valid", "validation", "test")
SPLIT_NAMES = ("train", *VAL_NAMES)
_SCAN_BLOCK = 64
_LAYOUT = "an image tree has train/CLASS/*.jpg and val/CLASS/*.jpg"
_SIZES = 1 << 16  # files whose size is part of a digest; of more it would take its time
_LOOKED_AT = 64  # images, for their white level
_BITS = (8, 10, 12, 14, 16)  # that cameras and scanners have

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class FolderImages:
    """The images of one split, read when they are asked for.

    Args:
        root: the split's folder.
        paths: encoded paths below ``root``. One array of bytes, because a list of a million
            strings would be copied into every worker as its reference counts are touched.
        labels: the class of each, (N,) int64.
        decoding: how they are read.
    """

    root: Path
    paths: np.ndarray
    labels: np.ndarray
    decoding: Decoding = PLAIN
    _decoded: Decoded | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """The file of one image."""
        return self.root / os.fsdecode(self.paths[index])

    def image(self, index: int) -> Picture:
        """One image as 8-bit RGB."""
        if self._decoded is not None:
            return self._decoded.image(index)
        return load_image(self.path(index), CHANNELS, self.decoding)

    def digest(self) -> str:
        """Of the files' paths below the root, and of the sizes of 65,536 of them, or of all."""
        some = np.linspace(0, len(self) - 1, min(_SIZES, len(self))).astype(int)
        # 0 for what is gone since it was listed: reading it says so
        sizes = [p.stat().st_size if (p := self.path(i)).exists() else 0 for i in some]
        found = hashlib.sha256(b"\0".join(self.paths.tolist()))
        found.update(np.array(sizes, "<i8").data)
        return found.hexdigest()

    def load(self) -> None:
        """Decode all images into memory, if they are small. Bad ones are met here."""
        if self._decoded is None:
            self._decoded = decode_if_small(len(self), self.path, self.image, str(self.root))


@dataclass(frozen=True)
class Tree(InFolder):
    """Opens a tree of image files of any kind.

    Hidden files and folders are left out, files that are no images are counted and logged, and
    links are followed as :func:`~tritonbnn.data.listing.list_images` says.

    Args:
        skip_bad_images: decode every file once, here and by every process, and leave the damaged
            ones out. They are logged. What remains depends on the files alone, so that all
            processes, workers and resumed runs agree on every index. Without it, a damaged image is
            an error when it is read.
        class_order: of :data:`~tritonbnn.data.classes.CLASS_ORDERS`.
        white_level: see :class:`~tritonbnn.data.images.Decoding`; 0 guesses it from the files.
        background: see the same.
    """

    skip_bad_images: bool = False
    class_order: str = "name"
    white_level: int = 0
    background: str = "white"

    title: ClassVar[str] = "a tree of images"
    channels: ClassVar[int] = CHANNELS
    normalisation: ClassVar[Normalisation] = IMAGENET
    side: ClassVar[int] = 0
    border: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.class_order not in CLASS_ORDERS:
            raise UserError(
                f"unknown class order {self.class_order!r}: choose from {', '.join(CLASS_ORDERS)}"
            )
        Decoding(self.white_level or WHITE_16_BITS, self.background)

    def open(self) -> Splits:
        """List the tree."""
        return self.open_tree()

    def open_tree(self) -> Splits:
        """See :meth:`open`; a data set that may also lie elsewhere has its own."""
        if self.data_dir is None:
            raise UserError("no data folder given: pass an image tree as --data-dir")
        names = splits_of(self.data_dir)
        classes = tuple(CLASS_ORDERS[self.class_order](_classes_of(self.data_dir, *names)))
        _warn_of_shared(self.data_dir / names[0], self.data_dir / names[1], classes)
        train, val = (_list_split(self.data_dir / split, classes) for split in names)
        decoding = Decoding(self.white_level or _guess_white(train), self.background)
        for split in (train, val):
            split.decoding = decoding
        if self.skip_bad_images:
            train, val = _readable(train), _readable(val)
        for split in (train, val):
            _check_no_class_is_empty(split, classes)
        return Splits(classes, train, val, decoding)


def is_tree(root: Path) -> bool:
    """Whether a folder has a split of an image tree in it."""
    return any((root / split).is_dir() for split in SPLIT_NAMES)


def splits_of(root: Path) -> tuple[str, str]:
    """The names of the folders to train and to validate on.

    Raises:
        UserError: One is missing.
    """
    if not root.exists():
        raise UserError(f"data folder {root} does not exist: check --data-dir")
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: {_LAYOUT}; check --data-dir")
    if not any(root.iterdir()):
        raise UserError(f"data folder {root} is empty: {_LAYOUT}")
    val = next((name for name in VAL_NAMES if (root / name).is_dir()), None)
    for split, found in (("train", (root / "train").is_dir()), ("val", val is not None)):
        if not found:
            more = f" (nor {', '.join(VAL_NAMES[1:])})" if split == "val" else ""
            raise UserError(f"data folder {root} has no folder {split}/{more}: {_LAYOUT}")
    return "train", str(val)


def _classes_of(root: Path, train_name: str, val_name: str) -> list[str]:
    train, val = _folders(root / train_name), _folders(root / val_name)
    if len(train) < 2:
        found = f"only the class {train[0]}" if train else "no class folder"
        raise UserError(f"{root / 'train'} has {found}: there must be at least two; {_LAYOUT}")
    if odd := odd_class(train, val, f"{train_name}/", f"{val_name}/"):
        complain_of_flat(root / val_name, val, train)
        raise UserError(
            f"the classes of {train_name}/ and {val_name}/ in {root} differ in {odd}:"
            " give both the same class folders"
        )
    return train


def _warn_of_shared(train: Path, val: Path, classes: Sequence[str]) -> None:
    """A link from one split to the other makes a score of images that were trained on."""
    shared = [name for name in classes if (train / name).samefile(val / name)]
    if shared:
        count = f"{len(shared)} of {len(classes)} classes"
        logger.warning(
            "%s and %s are one folder (%s): what is validated there was trained on",
            *(train / shared[0], val / shared[0], count),
        )


def _folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not is_left_out(p.name))


def _list_split(root: Path, classes: tuple[str, ...]) -> FolderImages:
    listing = list_images(root, classes)
    beside = [p.name for p in root.iterdir() if p.is_dir() and is_left_out(p.name)]
    listing.left_out += Counter(name for name in beside if name[0] != ".")
    listing.tell(root)
    per_class = [listing.paths[name] for name in classes]
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in per_class])
    return FolderImages(root, np.array([p for paths in per_class for p in paths], "S"), labels)


def _guess_white(images: FolderImages) -> int:
    """The white level of 16-bit grey: by the brightest of some images, of the usual bits.

    A function of the files alone, so that all processes and resumed runs agree.
    """
    looked_at = np.linspace(0, len(images) - 1, min(_LOOKED_AT, len(images))).astype(int)
    found = [brightest(images.path(index)) for index in looked_at]
    levels = [level for level in found if level is not None and 0 <= level <= WHITE_16_BITS]
    if not levels:
        return WHITE_16_BITS
    white = next(2**bits - 1 for bits in _BITS if max(levels) < 2**bits)
    if white < WHITE_16_BITS:
        logger.warning(
            "%s: the brightest level of %d images of 16-bit grey is %d, so %d is taken for white:"
            " --white-level sets another",
            *(images.root, len(levels), max(levels), white),
        )
    return white


def _readable(images: FolderImages) -> FolderImages:
    bad = _find_bad(images)
    if bad:
        logger.warning("skipping %d bad images of %d in %s:", len(bad), len(images), images.root)
    for index, reason in bad.items():
        logger.warning("  %s (%s)", images.path(index), reason)
    good = np.delete(np.arange(len(images)), list(bad))
    return FolderImages(images.root, images.paths[good], images.labels[good], images.decoding)


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
                " the class from both splits"
            )
