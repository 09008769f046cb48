"""CIFAR-10 and CIFAR-100, from the files that torchvision uses or from a tree of image files.

The files are Python pickles. They are read without running any code that a pickle may name, see
:mod:`tritonbnn.data.plain_pickle`.
"""

import hashlib
import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from einops import rearrange
from torchvision import datasets

from tritonbnn.cli import UserError
from tritonbnn.data.folder import Tree, is_tree
from tritonbnn.data.plain_pickle import ByteArray, read_plain
from tritonbnn.data.splits import ArrayImages, Normalisation, Splits

SIDE = 32
_CHANNELS = 3
_SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html"

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Cifar(Tree):
    """What both have in common. ``data_dir`` has the files, or their folder, or is an image tree.

    The settings of a tree count for a tree alone.
    """

    channels: ClassVar[int] = _CHANNELS
    side: ClassVar[int] = SIDE

    published: ClassVar[type[datasets.CIFAR10]]
    labels_key: ClassVar[str]

    def open(self) -> Splits:
        """Read the files, or list the tree."""
        if self.data_dir is None:
            raise UserError(f"{self.title} is not part of the package: {self._remedy}")
        folder = self._folder()
        if folder is not None:
            classes = self._classes(folder)
            train = self._read_files(folder, self.published.train_list, len(classes))
            val = self._read_files(folder, self.published.test_list, len(classes))
            return Splits(classes, train, val)
        if self.data_dir.is_dir() and not is_tree(self.data_dir):
            raise UserError(f"no {self.title} in {self.data_dir}: {self._remedy}")
        opened = self.open_tree()
        if len(opened.classes) != self.count:
            raise UserError(
                f"{self.data_dir} has {len(opened.classes)} classes and {self.title} has"
                f" {self.count}: for other images, use the recipe images"
            )
        return opened

    @property
    def count(self) -> int:
        """How many classes it has."""
        return int(self.title.removeprefix("CIFAR-"))

    @property
    def _remedy(self) -> str:
        name = self.published.filename
        return (
            f"pass --data-dir with {self.published.base_folder}/ (unpack {name} of {_SOURCE}),"
            " or with train/CLASS/ and test/CLASS/ of image files"
        )

    def _folder(self) -> Path | None:
        names = [n for n, _ in (*self.published.train_list, *self.published.test_list)]
        places = (self.data_dir, self.data_dir / self.published.base_folder)
        # of a folder with classes below, `train` and `test` are no files
        return next((p for p in places if any((p / n).is_file() for n in names)), None)

    def _classes(self, folder: Path) -> tuple[str, ...]:
        meta = self.published.meta
        path = folder / meta["filename"]
        names = self._entry(path, self._read(path, meta["md5"]), meta["key"], list)
        names = [n.decode("ascii", "replace") if isinstance(n, bytes) else n for n in names]
        if len(set(map(str, names))) != self.count or not all(isinstance(n, str) for n in names):
            raise self._damaged(path, f"it does not name {self.count} classes")
        return tuple(names)

    def _read_files(self, folder: Path, files: list, classes: int) -> ArrayImages:
        parts = [self._read_part(folder / name, checksum, classes) for name, checksum in files]
        pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        sides = {"c": _CHANNELS, "h": SIDE, "w": SIDE}
        return ArrayImages(rearrange(pixels, "n (c h w) -> n c h w", **sides), labels)

    def _read_part(self, path: Path, checksum: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
        content = self._read(path, checksum)
        labels = self._entry(path, content, self.labels_key, list)
        try:
            pixels = self._entry(path, content, "data", ByteArray).array()
        except ValueError as error:
            raise self._damaged(path, str(error)) from error
        if pixels.ndim != 2 or pixels.shape[1] != _CHANNELS * SIDE**2:
            raise self._damaged(path, f"an array of shape {pixels.shape}, not of 3 x 32 x 32 rows")
        if len(labels) != len(pixels) or not labels:
            raise self._damaged(path, f"{len(labels)} labels for {len(pixels)} images")
        for label in labels:
            if type(label) is not int or not 0 <= label < classes:
                raise self._damaged(path, f"a label {label!r:.20}; there are 0 to {classes - 1}")
        return pixels, np.array(labels, np.int64)

    def _read(self, path: Path, checksum: str) -> Any:
        if not path.is_file():
            raise UserError(f"{path} is missing: {self._remedy}")
        content = path.read_bytes()
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != checksum:
            logger.warning("%s is not the published file: its checksum is another", path)
        try:
            return read_plain(content)
        except pickle.UnpicklingError as error:
            raise self._damaged(path, str(error)) from error

    def _entry(self, path: Path, content: Any, key: str, kind: type[T]) -> T:
        for name in (key.encode(), key):
            if isinstance(content, dict) and isinstance(content.get(name), kind):
                return content[name]
        raise self._damaged(path, f"it has no {key}")

    def _damaged(self, path: Path, reason: str) -> UserError:
        reason = " ".join(reason.split())
        return UserError(f"{path} is damaged ({reason}): replace it; {self._remedy}")


@dataclass(frozen=True)
class Cifar10(_Cifar):
    """Opens CIFAR-10: 50,000 and 10,000 images of ten classes."""

    title: ClassVar[str] = "CIFAR-10"
    normalisation: ClassVar[Normalisation] = Normalisation(
        (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    )
    published: ClassVar[type[datasets.CIFAR10]] = datasets.CIFAR10
    labels_key: ClassVar[str] = "labels"


@dataclass(frozen=True)
class Cifar100(_Cifar):
    """Opens CIFAR-100 with its 100 fine classes: 50,000 and 10,000 images."""

    title: ClassVar[str] = "CIFAR-100"
    normalisation: ClassVar[Normalisation] = Normalisation(
        (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    )
    published: ClassVar[type[datasets.CIFAR10]] = datasets.CIFAR100
    labels_key: ClassVar[str] = "fine_labels"
