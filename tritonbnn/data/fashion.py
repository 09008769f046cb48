"""Fashion-MNIST from its four IDX files, packed (.gz) or unpacked."""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import ClassVar

import numpy as np
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

from tritonbnn.cli import UserError
from tritonbnn.data.folder import is_tree
from tritonbnn.data.splits import GREY, ArrayImages, InFolder, Normalisation, Splits

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
SIDE = 28
DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")

_BORDER = 2  # 28 + 2 * 2 = 32, the nearest legal network input
_BYTES = b"\x08"  # of an IDX file's types
_PARTS = {"train": "train", "val": "t10k"}
_FILES = tuple(
    f"{p}-{f}" for p in _PARTS.values() for f in ("images-idx3-ubyte", "labels-idx1-ubyte")
)
_REMEDY = (
    "run `apt install dataset-fashion-mnist`, or pass --data-dir with the four .gz files of"
    " https://github.com/zalandoresearch/fashion-mnist"
)

Arrays = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Fashion(InFolder):
    """Opens Fashion-MNIST: 60,000 and 10,000 grey images, with a black border around them."""

    title: ClassVar[str] = "Fashion-MNIST"
    channels: ClassVar[int] = 1
    normalisation: ClassVar[Normalisation] = GREY
    side: ClassVar[int] = SIDE
    border: ClassVar[int] = _BORDER

    def open(self) -> Splits:
        """Read the four files."""
        train, val = load(self.data_dir)
        return Splits(CLASSES, _bordered(*train), _bordered(*val))


def _bordered(pixels: np.ndarray, labels: np.ndarray) -> ArrayImages:
    sides = (_BORDER, _BORDER)
    return ArrayImages(np.pad(pixels, ((0, 0), sides, sides))[:, None], labels)


def find(data_dir: Path | None) -> Path | None:
    """The folder that holds the files, None where there is none.

    That is ``data_dir``, or where torchvision puts them below it; without a ``data_dir``, where
    Debian's package dataset-fashion-mnist installs them.
    """
    if data_dir is None:
        places = [DEBIAN_DIR]
    else:
        places = [data_dir, data_dir / "FashionMNIST" / "raw"]
    return next((p for p in places if any(_locate(p, name) for name in _FILES)), None)


def load(data_dir: Path | None) -> tuple[Arrays, Arrays]:
    """The training and the test part, each (N, 28, 28) uint8 images and (N,) labels."""
    folder = find(data_dir)
    if folder is None and data_dir is not None and is_tree(data_dir):
        raise UserError(
            f"{data_dir} is a tree of images, and Fashion-MNIST is four files: use the recipe"
            " images"
        )
    if folder is None:
        where = DEBIAN_DIR if data_dir is None else data_dir
        raise UserError(f"no Fashion-MNIST files in {where}: {_REMEDY}")
    return _load_part(folder, "train"), _load_part(folder, "val")


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, packed (.gz) or not.

    Raises:
        UserError: The file is no complete IDX file; the message names it.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise _corrupt(path, getattr(error, "strerror", None) or str(error)) from error
    if content[2:3] != _BYTES:
        raise _corrupt(path, "it does not begin like an IDX file of bytes")
    try:
        # torchvision's reader takes the name of an unpacked file
        with TemporaryDirectory() as folder:
            (Path(folder) / "idx").write_bytes(content)
            return read_sn3_pascalvincent_tensor(str(Path(folder) / "idx")).numpy()
    except OSError as error:
        raise UserError(
            f"cannot unpack {path} into {gettempdir()} ({error.strerror}): make room there, or set"
            " TMPDIR to another folder"
        ) from error
    # on damaged bytes its reader raises almost anything, and AssertionError without a word
    except Exception as error:
        raise _corrupt(path, "its size is not what its header says") from error


def _load_part(folder: Path, part: str) -> Arrays:
    prefix = _PARTS[part]
    image_path = _require(folder, f"{prefix}-images-idx3-ubyte")
    label_path = _require(folder, f"{prefix}-labels-idx1-ubyte")
    images, labels = read_idx(image_path), read_idx(label_path)
    if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE) or not len(images):
        raise _corrupt(image_path, f"an array of shape {images.shape}, not of 28 x 28 images")
    if labels.shape != images.shape[:1]:
        raise _corrupt(label_path, f"labels of shape {labels.shape} for {len(images)} images")
    if labels.max() >= len(CLASSES):
        raise _corrupt(label_path, f"a label {labels.max()}; there are classes 0 to 9")
    return images, labels.astype(np.int64)


def _locate(folder: Path, name: str) -> Path | None:
    candidates = (folder / f"{name}.gz", folder / name)
    return next((path for path in candidates if path.is_file()), None)


def _require(folder: Path, name: str) -> Path:
    path = _locate(folder, name)
    if path is None:
        raise UserError(f"{folder / name}.gz is missing: {_REMEDY}")
    return path


def _corrupt(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is corrupt ({reason}): replace it; {_REMEDY}")
